"""`bursar whatif`: an organization's real past under other prices, caps or grants; nothing of it stays."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

import typer

from bursar import db
from bursar.cli.credits import credits_of
from bursar.cli.output import Column, JsonOption, print_json, print_rows, with_database
from bursar.cli.prices import text_of
from bursar.cli.progress import Bars, bars
from bursar.cli.scope import OrgOption, as_id, department_of, key_of, member_of, org_of, team_of
from bursar.clock import now
from bursar.credits.limits import Metric, Period
from bursar.identity.organizations import get_organization
from bursar.money import Micros, format_credits
from bursar.pricing import files
from bursar.pricing.importing import accepted
from bursar.pricing.lists import PriceList
from bursar.simulation.replaying import Change, NewCap, NewGrant, Replayed, Sums, replay

_CAP: Final = re.compile(
    r"(?P<scope>organization|department|team|user|key)(:(?P<of>[^=]+))?"
    r"=(?P<amount>[\d.]+)(?P<metric>cr|calls|tokens)?(/(?P<period>day|week|month|cycle|none))?(@(?P<models>.+))?"
)
_GRANT: Final = re.compile(r"(?P<amount>[\d.]+)(cr)?(@(?P<begins>[^.]+?)?(\.\.(?P<ends>.+))?)?")
_METRICS: Final = {"cr": Metric.CREDITS, None: Metric.CREDITS, "calls": Metric.CALLS, "tokens": Metric.TOKENS}


def whatif(
    org: OrgOption,
    since: Annotated[str, typer.Option(help="From this day (or instant) on.", metavar="DATE")],
    until: Annotated[str | None, typer.Option(help="Before this day (or instant); now.", metavar="DATE")] = None,
    price: Annotated[Path | None, typer.Option(help="A price file: its models cost this.", exists=True)] = None,
    markup: Annotated[str | None, typer.Option(help="Another mark-up, such as 1.25.")] = None,
    cap: Annotated[list[str] | None, typer.Option(help="A cap: user:dana@acme.example=40cr/day@gpt-%.")] = None,
    without_cap: Annotated[list[str] | None, typer.Option(help="Without this cap (its id), or all.")] = None,
    grant: Annotated[list[str] | None, typer.Option(help="Credits: 500cr@2026-03-01..2026-04-01.")] = None,
    without_grant: Annotated[list[str] | None, typer.Option(help="Without this grant (its id).")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell a past again under other prices, caps or grants: what would have been charged, and what refused.

    Examples: `bursar whatif --org acme --since 2026-03-01 --cap user:dana@acme.example=40cr/day`,
    `bursar whatif --org acme --since 2026-03-01 --until 2026-04-01 --price new.csv --json`
    """
    prices = _prices(price) if price else None

    async def work(database: db.Database) -> Replayed:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            zone = ZoneInfo((await get_organization(conn, organization_id=organization_id)).zone)
            change = Change(
                prices=prices,
                markup_ppm=None if markup is None else _ppm(markup),
                caps=[await _cap(conn, database, organization_id, text) for text in cap or ()],
                without_caps=None if "all" in (without_cap or ()) else frozenset(_ids(without_cap, "lim_")),
                grants=[_grant(text, zone) for text in grant or ()],
                without_grants=frozenset(_ids(without_grant, "grt_")),
            )
        with bars("requests") as shown:
            answer = await replay(
                database,
                organization_id=organization_id,
                since=_instant(since, zone),
                until=_instant(until, zone) if until else now(),
                change=change,
                progress=_progress(shown, org),
            )
            shown.end(org)
            return answer

    answer = with_database(work)
    if as_json:
        print_json(_as_json(answer))
    else:
        _print(answer)


def _progress(shown: Bars, name: str) -> Any:
    shown.begin(name)
    return lambda units: shown.advance(name, units)


# ---------------------------------------------------------------------------------------------- what is asked


def _prices(file: Path) -> PriceList:
    return accepted(files.read(text_of(file)))


def _ppm(text: str) -> int:
    return int(credits_of(text))


def _ids(texts: Iterable[str] | None, prefix: str) -> Iterable[UUID]:
    for text in texts or ():
        identifier = as_id(text, prefix)
        if identifier is None:
            raise typer.BadParameter(f"{text!r} is no id; it begins with {prefix}")
        yield identifier


def _instant(text: str, zone: ZoneInfo) -> datetime:
    """A day, which begins in the organization's zone, or an instant."""
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no date, such as 2026-03-01") from None
    return (found if found.tzinfo else found.replace(tzinfo=zone)).astimezone(UTC)


def _grant(text: str, zone: ZoneInfo) -> NewGrant:
    match = _GRANT.fullmatch(text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is no grant, such as 500cr@2026-03-01..2026-04-01")
    begins, ends = (_instant(match[name], zone) if match[name] else None for name in ("begins", "ends"))
    return NewGrant(amount_micros=credits_of(match["amount"]), effective_at=begins, expires_at=ends)


async def _cap(conn: db.Connection, database: db.Database, organization_id: UUID, text: str) -> NewCap:
    match = _CAP.fullmatch(text)
    if match is None or (match["of"] is None) != (match["scope"] == "organization"):
        raise typer.BadParameter(f"{text!r} is no cap, such as user:dana@acme.example=40cr/day@gpt-%")
    metric = _METRICS[match["metric"]]
    return NewCap(
        scope=match["scope"],
        scope_id=await _scope_id(conn, database, organization_id, match["scope"], match["of"] or ""),
        metric=metric,
        amount=credits_of(match["amount"]) if metric is Metric.CREDITS else int(match["amount"]),
        period=match["period"] or Period.MONTH,
        model_filter=match["models"],
    )


async def _scope_id(
    conn: db.Connection, database: db.Database, organization_id: UUID, scope: str, name: str
) -> UUID | None:
    match scope:
        case "user":
            return (await member_of(conn, database, organization_id, name)).user_id
        case "key":
            return (await key_of(conn, organization_id, name)).original_api_key_id
        case "team":
            return (await team_of(conn, organization_id, name)).team_id
        case "department":
            return (await department_of(conn, organization_id, name)).department_id
        case _:
            return None


# ---------------------------------------------------------------------------------------------- what is told


def _sums(sums: Sums) -> dict[str, Any]:
    return {
        "requests": sums.requests,
        "charged": format_credits(Micros(sums.charged)),
        "would_be_charged": format_credits(Micros(sums.new_charged)),
        "would_be_refused": sums.refused,
        "refused_credits": format_credits(Micros(sums.refused_micros)),
    }


def _as_json(answer: Replayed) -> dict[str, Any]:
    first = answer.first_refusal
    return {
        "unit": "credit",
        "zone": answer.zone,
        "total": _sums(answer.total),
        "first_refusal": first
        and {
            "request_id": f"req_{first.request_id.hex}",
            "at": first.at,
            "user": first.user,
            "model": first.model,
            "credits": format_credits(first.amount),
            "code": first.code,
            "refused_by": first.binding,
        },
        "refused_by": {name: _sums(sums) for name, sums in answer.bindings.items()},
        "days": {name: _sums(sums) for name, sums in sorted(answer.days.items())},
        "users": {name: _sums(sums) for name, sums in answer.users.items()},
        "models": {name: _sums(sums) for name, sums in answer.models.items()},
        "once_refused": {
            "requests": answer.once_refused,
            "would_be_let_through": answer.let_through,
            "credits_asked_for": format_credits(Micros(answer.let_through_micros)),
        },
        "pools_at_the_end": [
            {
                "pool": answer.pool_names[pool.pool_id],
                "available": format_credits(pool.available),
                "overage": format_credits(pool.overage),
            }
            for pool in (answer.end.pools if answer.end else ())
        ],
        "kept_their_price": answer.not_priced,
        "not_told_again": list(answer.untold),
    }


def _print(answer: Replayed) -> None:
    document = _as_json(answer)
    total = document["total"]
    typer.echo(f"{total['requests']:,} requests were charged {total['charged']} credits.")
    typer.echo(f"They would be charged {total['would_be_charged']}; {total['would_be_refused']:,} would be refused.")
    if first := document["first_refusal"]:
        at = f"{first['at']:%Y-%m-%d %H:%M:%S %Z}"
        typer.echo(f"The first: {first['user']} at {at} on {first['model']}, by {first['refused_by']}")
    once = document["once_refused"]
    if once["requests"]:
        typer.echo(
            f"{once['requests']:,} requests were refused then; {once['would_be_let_through']:,} would be let through."
        )
    for kind in answer.untold:
        typer.echo(f"Not told again: {kind}")
    for title, rows in (("Refused by", "refused_by"), ("User", "users"), ("Model", "models"), ("Day", "days")):
        columns = [Column("name", title), Column("requests", "Requests", right=True)]
        columns += [Column("charged", "Charged", right=True), Column("would_be_charged", "Would be", right=True)]
        columns += [Column("would_be_refused", "Refused", right=True)]
        if document[rows]:
            typer.echo("")
            print_rows([{"name": name, **sums} for name, sums in document[rows].items()], columns, as_json=False)
