"""`bursar why`, `bursar explain`, `bursar verify`: may this be spent, where did this go, do the books agree."""

from pathlib import Path
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.credits import credits_of
from bursar.cli.exits import Exit
from bursar.cli.output import Column, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.progress import bars
from bursar.cli.scope import OrgOption, key_of, member_of, org_of, within
from bursar.credits import explain as explaining
from bursar.credits import why as asking
from bursar.credits.repair import Difference
from bursar.credits.repair import repair as repair_books
from bursar.credits.verify import Finding, verify_all
from bursar.credits.verify import verify as verify_books
from bursar.gateway.allowances import ModelNotAllowed
from bursar.gateway.desk import why_not
from bursar.identity.organizations import Organization

BURNT_BEFORE = {
    "priority": ", which goes first by its priority",
    "expiry": ", which expires sooner than the next",
    "free_before_paid": ", which is free and goes before paid ones",
    "effective": ", which could be spent earlier than the next",
    "created": ", which was made earlier than the next",
    "id": ", which goes before the next by its id",
    "only": ", the only one there was",
}


def why(
    org: OrgOption,
    user: Annotated[str | None, typer.Option(help="The member's e-mail.")] = None,
    key: Annotated[str | None, typer.Option(help="A key's name or id.")] = None,
    model: Annotated[str, typer.Option(help="The model that is asked for.")] = "",
    feature: Annotated[str | None, typer.Option(help="What it is for: chat, images, or as a program says.")] = None,
    amount: Annotated[str, typer.Option(help="Credits that the request would need.")] = "0",
    as_json: JsonOption = False,
) -> int:
    """Say whether a user or key may spend, and which limit decides. Exit code 6 when refused.

    Examples: `bursar why --org acme --user dana@acme.example --model gpt-5`,
    `bursar why --org acme --key ci --amount 12.5 --json`
    """
    wanted = credits_of(amount)

    async def work(
        conn: db.Connection, database: db.Database, organization: Organization
    ) -> tuple[asking.Why, ModelNotAllowed | None]:
        member = await member_of(conn, database, organization.organization_id, user) if user else None
        owned = await key_of(conn, organization.organization_id, key) if key else None
        answer = await asking.why(
            conn,
            organization_id=organization.organization_id,
            user_id=member.user_id if member else owned.user_id if owned else None,
            api_key_id=owned.api_key_id if owned else None,
            model=model,
            feature=feature,
            wanted_micros=wanted,
        )
        if not model:
            return answer, None
        return answer, await why_not(
            database,
            organization,
            user_id=member.user_id if member else None,
            api_key_id=owned.api_key_id if owned else None,
            model=model,
        )

    answer, refusal = within(org, work)
    if as_json:
        document = answer.as_json(organization=org)
        print_json(document if refusal is None else document | (refusal.why or {}))
    elif refusal is not None:
        typer.echo(f"Refused ({refusal.code}): {refusal.detail}")
    else:
        _print_why(answer)
    return Exit.DONE if answer.allowed and refusal is None else Exit.REFUSED


def _print_why(answer: asking.Why) -> None:
    document = answer.as_json()
    if answer.allowed:
        typer.echo(f"Allowed: {document['available']['amount']} credits could be spent now.")
    else:
        typer.echo(f"Refused ({answer.code}): {document['available']['amount']} credits could be spent now.")
        typer.echo(f"Next: {answer.next_step}")
    rows = [
        {
            "binds": "→" if each["binding"] else "",
            "limit": each["name"],
            **{name: each[name]["amount"] for name in ("used", "held", "limit", "available")},
            "name": _described(each),
            "does": f"{each['does']}, strict" if each["strict"] else each["does"],
            "resets": each["resets_at"] or "",
        }
        for each in document["limits"]
    ]
    columns = [Column("binds", ""), Column("name", "Limit"), Column("does", "Does")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("used", "held", "limit", "available")]
    print_rows(rows, [*columns, Column("resets", "Resets")], as_json=False, empty="No limit applies.")


def _described(limit: dict[str, Any]) -> str:
    """A cap's name, with the default that it comes from and what raises are in it for a time."""
    notes = [limit["origin"]] if limit["origin"] not in (None, "own", "organization") else []
    if limit["raised"]:
        notes.append(f"raised by {limit['raised']['amount']} until {limit['raised_until']}")
    return f"{limit['name']} ({'; '.join(notes)})" if notes else str(limit["name"])


def explain(
    request: Annotated[str, typer.Argument(help="The request's id, from its X-Request-Id header.")],
    as_json: JsonOption = False,
) -> None:
    """Say where a charge came from: usage, price, the grants it drew from, the limits it passed.

    Examples: `bursar explain req_0192…`, `bursar explain req_0192… --json`
    """
    request_id = request_id_of(request)

    async def work(database: db.Database) -> dict[str, Any]:
        async with database.platform() as conn:
            organization_id = await explaining.find_organization(conn, request_id=request_id)
        async with database.tenant(organization_id) as conn:
            story = await explaining.explain(conn, organization_id=organization_id, request_id=request_id)
        return story.as_json() | explaining.margin_of(story)

    story = with_database(work)
    if as_json:
        print_json(story)
    else:
        _print_story(story)


def _print_story(story: dict[str, Any]) -> None:
    print_fields(
        {
            "request": story["request_id"],
            "state": story["state"],
            "charged": f"{story['charged']['amount']} credits",
            "provider cost": f"{story['provider_cost']['amount']} USD",
            "revenue": f"{story['revenue']['amount']} USD",
        },
        as_json=False,
    )
    for row in story["rows"]:
        if row["kind"] == "refund":
            typer.echo(f"  refund {row['charged']['amount']} at {row['booked_at']}")
            continue
        usage = ", ".join(_counted(count, kind) for kind, count in row["usage"].items())
        marks = f" ({', '.join(row['marks'])})" if row["marks"] else ""
        model = f" on {row['model']}" if row["model"] else ""
        typer.echo(f"  {row['kind']} {row['charged']['amount']} for {usage}{model}{marks}")
        price = f"price {row['price_version_id']}" if row["price_version_id"] else "no price"
        typer.echo(f"  {price}, held {row['held']['amount']}, used at {row['used_at']}")
    for grant in story["grants"]:
        typer.echo(
            f"  drew {grant['drawn']['amount']} from {grant['source'] or 'no grant yet'} {grant['grant_id'] or ''}"
            f"{BURNT_BEFORE.get(grant['burnt_before_next'] or '', '')}"
        )
    for refund in story["refunds"]:
        ended = ", where it expired" if refund["expired_at_once"] else ""
        typer.echo(f"  gave {refund['refunded']['amount']} back to {refund['source']} {refund['grant_id']}{ended}")
    for limit in story["limits_passed"]:
        typer.echo(f"  passed {limit['name']}: {limit['available']['amount']} left now")
    if story["not_charged"]:
        typer.echo(f"  {story['not_charged']['outcome']}: {story['not_charged']['reason'] or ''}")


def _counted(count: int, kind: str) -> str:
    """Some of a kind of usage: 12 input tokens, 1 request, 1 web search."""
    one = kind.removesuffix("es") if kind.endswith("ches") else kind.removesuffix("s")
    return f"{count} {(one if count == 1 else kind).replace('_', ' ')}"


def verify(
    org: Annotated[str | None, typer.Option("--org", help="One organization: its slug or id; all without it.")] = None,
    anchors: Annotated[
        Path | None, typer.Option(help="A file of anchors: shows also what was cut off the end.", dir_okay=False)
    ] = None,
    as_json: JsonOption = False,
) -> int:
    """Recompute every balance from the ledger and every seal from its rows, and report each difference.

    Exit code 1 when there is one.

    Examples: `bursar verify --org acme`, `bursar verify --anchors /mnt/safe/anchors.jsonl --json`
    """

    async def work(database: db.Database) -> list[Finding]:
        organization_id = await org_of(database, org) if org else None
        with bars("checks", least_seconds=10) as shown:
            shown.begin("verify")
            found = await verify_all(
                database,
                organization_id=organization_id,
                anchor_file=anchors,
                on_step=lambda steps: shown.add("verify", steps) if steps > 0 else shown.advance("verify", -steps),
            )
            shown.end("verify")
        return found

    found = with_database(work)
    columns = [Column(key, key.replace("_", " ").capitalize()) for key in ("invariant", "organization_id", "subject")]
    columns += [Column("expected", "Expected", right=True), Column("found", "Found", right=True)]
    print_rows(found, columns, as_json=as_json, empty="The books agree.")
    return Exit.FAILED if found else Exit.DONE


def repair(
    org: Annotated[str | None, typer.Option("--org", help="One organization: its slug or id; all without it.")] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Mend them; without it they are only shown.")] = False,
    as_json: JsonOption = False,
) -> int:
    """Show which balances differ from what ledger, attribution, holds and grants say, and mend them with --apply.

    Never changes the ledger. Exit code 1 when a difference remains.

    Examples: `bursar repair --org acme`, `bursar repair --org acme --apply`
    """

    async def work(database: db.Database) -> list[Difference]:
        if org:
            known = [await org_of(database, org)]
        else:
            async with database.platform() as conn:
                known = sorted({each.organization_id for each in await verify_books(conn)})
        found: list[Difference] = []
        for each in known:
            found += await repair_books(database, organization_id=each, by=OPERATOR, apply=apply)
        return found

    found = with_database(work)
    columns = [
        Column("mended", "", show=lambda value: "mended" if value else ""),
        Column("repairable", "", show=lambda value: "" if value else "the record itself"),
        *(Column(key, key.replace("_", " ").capitalize()) for key in ("invariant", "organization_id", "subject")),
        Column("found", "Found", right=True),
        Column("expected", "Expected", right=True),
    ]
    print_rows(found, columns, as_json=as_json, empty="The books agree.")
    return Exit.DONE if all(each.mended for each in found) else Exit.FAILED


def request_id_of(text: str) -> UUID:
    """The id of a request as people paste it.

    Raises:
        typer.BadParameter
    """
    try:
        return UUID(text.removeprefix("req_"))
    except ValueError:
        raise typer.BadParameter(f"not a request id: {text!r}") from None
