"""`--at` of balances, grants and shares, and `bursar credits statement`: what was so, from the ledger."""

import csv
import sys
from datetime import UTC, datetime
from typing import Annotated, Any, Final
from zoneinfo import ZoneInfo

import typer

from bursar import db
from bursar.cli.output import Column, JsonOption, print_json, print_rows
from bursar.cli.scope import OrgOption, names_of, within
from bursar.credits import as_of
from bursar.credits.statements import Line, Period, Statement, day_of, month_of, statements
from bursar.identity.organizations import Organization
from bursar.money import Micros, format_credits


def instant_of(text: str) -> datetime:
    """An instant such as 2026-10-31T23:59:59.999999+02:00; without zone it is in UTC, without time midnight.

    Raises:
        typer.BadParameter
    """
    try:
        instant = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no instant such as 2026-10-31T12:00:00") from None
    return instant if instant.tzinfo else instant.replace(tzinfo=UTC)


AtOption = Annotated[
    datetime | None,
    typer.Option("--at", parser=instant_of, metavar="INSTANT", help="As it was then (UTC, or with its offset)."),
]
NOT_RECORDED: Final = "What was held then is not recorded: the ledger knows what was granted and what was used."
UNKNOWN: Final = "not recorded"


def _amount(micros: int | None) -> str:
    return UNKNOWN if micros is None else format_credits(Micros(micros))


# ---------------------------------------------------------------------------------------------- at an instant


def show_pools(org: str, at: datetime, *, as_json: bool) -> None:
    """The pools of an organization at an instant."""

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await names_of(conn, organization)
        return [
            {
                "pool": pool.name,
                "kind": pool.kind.value,
                "owner": names.get(pool.owner_user_id) if pool.owner_user_id else None,
                "granted": format_credits(pool.granted_micros),
                "used": format_credits(pool.used_micros),
                "left": format_credits(pool.left_micros),
                "held": None,
                "overage": format_credits(pool.debt_micros),
                "pool_id": f"pool_{pool.pool_id.hex}",
                "at": at,
            }
            for pool in await as_of.pools_at(conn, organization_id=organization.organization_id, at=at)
        ]

    columns = [Column("pool", "Pool"), Column("kind", "Kind"), Column("owner", "Owner")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("granted", "used", "left", "overage")]
    print_rows(within(org, work), columns, as_json=as_json, empty="There was no pool then.")
    if not as_json:
        typer.echo(NOT_RECORDED)


def show_grants(org: str, at: datetime, *, as_json: bool) -> None:
    """The grants of an organization at an instant, in burn order."""

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        return [
            {
                "grant_id": f"grt_{grant.grant_id.hex}",
                "source": grant.source.value,
                "credits": format_credits(grant.amount_micros),
                "left": format_credits(grant.left_micros),
                "burnt": format_credits(grant.burnt_micros),
                "state": grant.state,
                "priority": grant.priority,
                "effective_at": grant.effective_at,
                "expires_at": grant.expires_at,
                "reason": grant.reason,
                "pool_id": f"pool_{grant.pool_id.hex}",
            }
            for grant in await as_of.grants_at(conn, organization_id=organization.organization_id, at=at)
        ]

    columns = [Column("grant_id", "Grant"), Column("source", "Source"), Column("credits", "Credits", right=True)]
    columns += [Column("left", "Left", right=True), Column("burnt", "Burnt", right=True), Column("state", "State")]
    columns += [Column("expires_at", "Expires")]
    print_rows(within(org, work), columns, as_json=as_json, empty="There was no grant then.")


def show_shares(org: str, at: datetime, *, as_json: bool) -> None:
    """The shares of an organization's members at an instant."""

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await names_of(conn, organization)
        return [
            {
                "allocation_id": f"all_{share.allocation_id.hex}",
                "user": names.get(share.user_id),
                "kind": share.kind.value,
                "period": share.period.value,
                "credits": format_credits(share.amount_micros),
                "used": _amount(share.used_in_period_micros),
                "left": _amount(share.left_micros),
                "resets_at": share.period_end,
                "when_empty": share.when_empty.value,
            }
            for share in await as_of.shares_at(conn, organization_id=organization.organization_id, at=at)
        ]

    columns = [Column("user", "User"), Column("kind", "Kind"), Column("period", "Period")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("credits", "used", "left")]
    columns += [Column("resets_at", "Renewed")]
    print_rows(within(org, work), columns, as_json=as_json, empty="There was no share then.")
    if not as_json:
        typer.echo(NOT_RECORDED)


# ---------------------------------------------------------------------------------------------- statements

WORDS: Final = {
    "grant": "granted",
    "forgiveness": "debt forgiven",
    "roll_over": "rolled over",
    "refund": "refunded",
    "expiry": "expired",
    "void": "voided",
    "transfer_in": "transferred in",
    "transfer_out": "transferred out",
    "adjustment": "adjusted",
    "usage": "used",
    "correction": "corrections",
}
"""Movements as people call them."""


def statement(
    org: OrgOption,
    period: Annotated[str | None, typer.Option(help="A month of the organization's zone, such as 2026-10.")] = None,
    from_: Annotated[str | None, typer.Option("--from", help="Instead: the first day, such as 2026-10-01.")] = None,
    to: Annotated[str | None, typer.Option(help="The day after the last, such as 2026-11-01.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print comma-separated values instead.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Print what each pool had when a period began, every movement in it, and what it had in the end.

    Examples: `bursar credits statement --org acme --period 2026-10`,
    `bursar credits statement --org acme --from 2026-10-01 --to 2026-10-15 --csv`
    """
    if (period is None) is (from_ is None or to is None):
        raise typer.BadParameter("give --period, or --from and --to")
    first, after = month_of(period) if period else (day_of(str(from_)), day_of(str(to)))

    async def work(
        conn: db.Connection, database: db.Database, organization: Organization
    ) -> tuple[Period, list[Statement], dict[Any, str]]:
        found = await statements(conn, organization_id=organization.organization_id, first=first, after=after)
        return *found, await names_of(conn, organization)

    told, found, names = within(org, work)
    rows = [row for each in found for row in _rows(each, names)]
    if as_csv:
        table = csv.DictWriter(sys.stdout, ("pool", "owner", "line", "month", "credits", "count"), lineterminator="\n")
        table.writeheader()
        table.writerows({key: row[key] for key in table.fieldnames} for row in rows)
    elif as_json:
        print_json(_document(told, found, names))
    else:
        state = "" if told.is_over else ", not over yet: as of now"
        first_instant, end = (each.astimezone(ZoneInfo(told.zone)) for each in (told.starts_at, told.ends_at))
        typer.echo(f"From {first_instant.isoformat()} until {end.isoformat()} ({told.zone}){state}")
        columns = [Column("pool", "Pool"), Column("owner", "Owner"), Column("line", "Line"), Column("month", "Used in")]
        columns += [Column("credits", "Credits", right=True), Column("count", "Count", right=True)]
        print_rows(rows, columns, as_json=False, empty="There was no pool then.")


def _rows(each: Statement, names: dict[Any, str]) -> list[dict[str, Any]]:
    """Opening, lines and closing; what is no movement of the period stands below the closing balance."""

    def row(line: str, micros: int, month: str | None = None, count: int | None = None) -> dict[str, Any]:
        owner = names.get(each.owner_user_id) if each.owner_user_id else None
        amount = format_credits(Micros(micros))
        return {"pool": each.name, "owner": owner, "line": line, "month": month, "credits": amount, "count": count}

    found = [row("opening balance", each.opening_micros)]
    found += [row(_words(line), line.micros, line.month, line.count) for line in each.lines]
    found.append(row("closing balance", each.closing_micros))
    if each.used_later_micros:
        found.append(row("used in this period, booked later", -each.used_later_micros))
    return found


def _words(line: Line) -> str:
    words = WORDS.get(line.what, line.what)
    if line.source:
        words += f" ({line.source})"
    return words if line.is_inside else f"{words} in another period, booked now"


def _document(period: Period, found: list[Statement], names: dict[Any, str]) -> dict[str, Any]:
    return {
        "starts_at": period.starts_at,
        "ends_at": period.ends_at,
        "zone": period.zone,
        "is_over": period.is_over,
        "pools": [
            {
                "pool_id": f"pool_{each.pool_id.hex}",
                "pool": each.name,
                "kind": each.kind.value,
                "owner": names.get(each.owner_user_id) if each.owner_user_id else None,
                "opening": format_credits(each.opening_micros),
                "lines": [
                    {
                        "line": line.what,
                        "source": line.source,
                        "used_in": line.month,
                        "is_inside": line.is_inside,
                        "credits": format_credits(line.micros),
                        "count": line.count,
                    }
                    for line in each.lines
                ],
                "closing": format_credits(each.closing_micros),
                "used_later": format_credits(each.used_later_micros),
            }
            for each in found
        ],
    }
