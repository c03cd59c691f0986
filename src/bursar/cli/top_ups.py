"""`bursar top-ups`: purchases that a pool makes by itself when it runs low."""

from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.credits import credits_of
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_rows
from bursar.cli.scope import OrgOption, given_id, member_of, within
from bursar.credits import pools, top_ups
from bursar.credits.top_ups import USUAL_MOST_PER_HOUR, Bought, TopUp
from bursar.identity.organizations import Organization
from bursar.money import format_credits, format_usd, parse_usd

app = typer.Typer(help="Top-ups: credits bought by a pool itself when it runs low.", no_args_is_help=True)

UserOption = Annotated[str | None, typer.Option(help="A member's e-mail: their personal credits.")]
TopUpArgument = Annotated[str, typer.Argument(help="The purchase's id.")]


@app.command("set")
def set_(
    org: OrgOption,
    below: Annotated[str, typer.Option(help="Buy when fewer credits are available.")],
    amount: Annotated[str, typer.Option(help="Credits of one purchase.")],
    ceiling: Annotated[str, typer.Option(help="Most credits bought in a calendar month.")],
    per_hour: Annotated[
        int, typer.Option(help="More purchases within an hour stop it: a runaway.", min=1)
    ] = USUAL_MOST_PER_HOUR,
    user: UserOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set when a pool buys more. Setting it again also starts it again after declines or a runaway.

    Examples: `bursar top-ups set --org acme --below 500 --amount 5000 --ceiling 20000`
    """
    threshold, size, most = credits_of(below), credits_of(amount), credits_of(ceiling)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        pool_id = await _pool(conn, database, organization, user)
        await top_ups.set_policy(
            conn,
            organization_id=organization.organization_id,
            pool_id=pool_id,
            threshold_micros=threshold,
            amount_micros=size,
            ceiling_micros=most,
            most_per_hour=per_hour,
            by=OPERATOR,
        )
        return {"pool_id": f"pool_{pool_id.hex}", "below": below, "amount": amount, "ceiling": ceiling}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def stop(org: OrgOption, user: UserOption = None, dry_run: DryRunOption = False, as_json: JsonOption = False) -> None:
    """Switch a pool's purchases off; an open one goes on.

    Examples: `bursar top-ups stop --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        pool_id = await _pool(conn, database, organization, user)
        await top_ups.end_policy(conn, organization_id=organization.organization_id, pool_id=pool_id, by=OPERATOR)
        return {"pool_id": f"pool_{pool_id.hex}", "state": "ended"}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def show(org: OrgOption, as_json: JsonOption = False) -> None:
    """Show which pools buy more, when, and whether something stopped them.

    Examples: `bursar top-ups show --org acme`, `bursar top-ups show --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await top_ups.list_policies(conn, organization_id=organization.organization_id)
        return [
            {
                "pool": each.pool,
                "state": each.state,
                "below": format_credits(each.threshold_micros),
                "amount": format_credits(each.amount_micros),
                "ceiling": format_credits(each.ceiling_micros),
                "per_hour": each.most_per_hour,
                "next_try_at": each.next_try_at,
                "pool_id": f"pool_{each.pool_id.hex}",
            }
            for each in found
        ]

    columns = [Column("pool", "Pool"), Column("state", "State")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("below", "amount", "ceiling")]
    columns += [Column("next_try_at", "Not before")]
    print_rows(within(org, work), columns, as_json=as_json, empty="No pool buys by itself: `bursar top-ups set`.")


@app.command("list")
def list_(
    org: OrgOption,
    limit: Annotated[int, typer.Option(help="How many, newest first.", min=1, max=1000)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List purchases, newest first.

    Examples: `bursar top-ups list --org acme`, `bursar top-ups list --org acme --limit 5 --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await top_ups.list_top_ups(conn, organization_id=organization.organization_id, limit=limit)
        return [_row(each) for each in found]

    columns = [Column("id", "Purchase"), Column("state", "State"), Column("credits", "Credits", right=True)]
    columns += [Column("paid_usd", "Paid USD", right=True), Column("requested_at", "Requested")]
    columns += [Column("reason", "Reason")]
    print_rows(within(org, work), columns, as_json=as_json)


@app.command()
def confirm(
    top_up: TopUpArgument,
    org: OrgOption,
    paid: Annotated[str, typer.Option(help="Money paid for it, in USD.")],
    reference: Annotated[str, typer.Option(help="What the payment is called where it was made.")],
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say that a purchase was paid: its credits are granted. Again changes nothing.

    Examples: `bursar top-ups confirm top_… --org acme --paid 50.00 --reference INV-2041`
    """
    bought = Bought(parse_usd(paid), reference)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        done = await top_ups.confirm(
            conn,
            organization_id=organization.organization_id,
            top_up_id=given_id(top_up, "top_"),
            bought=bought,
            by=OPERATOR,
        )
        return _row(done)

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def decline(
    top_up: TopUpArgument,
    org: OrgOption,
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Say that a purchase was not paid: the next one waits an hour, then longer each time.

    Examples: `bursar top-ups decline top_… --org acme --reason "card expired"`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        done = await top_ups.decline(
            conn,
            organization_id=organization.organization_id,
            top_up_id=given_id(top_up, "top_"),
            reason=reason,
            by=OPERATOR,
        )
        return _row(done)

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


def _row(each: TopUp) -> dict[str, Any]:
    return {
        "id": f"top_{each.top_up_id.hex}",
        "state": each.state,
        "credits": format_credits(each.amount_micros),
        "paid_usd": None if each.paid_nano_usd is None else format_usd(each.paid_nano_usd),
        "requested_at": each.requested_at,
        "decided_at": each.decided_at,
        "reference": each.reference,
        "reason": each.reason,
        "grant_id": None if each.grant_id is None else f"grt_{each.grant_id.hex}",
    }


async def _pool(conn: db.Connection, database: db.Database, organization: Organization, user: str | None) -> UUID:
    owner = (await member_of(conn, database, organization.organization_id, user)).user_id if user else None
    return await pools.pool_for(
        conn,
        organization_id=organization.organization_id,
        owner_user_id=None if organization.kind == "individual" else owner,
    )
