"""`bursar schedules`: grants that come again every so many days, weeks, months or years."""

from datetime import datetime
from typing import Annotated, Any

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.credits import KeyOption, credits_of, rollover_of
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_rows, tell_dry_run
from bursar.cli.scope import OrgOption, given_id, member_of, within
from bursar.clock import in_utc, uuid7
from bursar.credits import grants, pools, schedules
from bursar.credits.schedules import Unit
from bursar.identity.organizations import Organization
from bursar.money import format_credits, parse_usd

app = typer.Typer(help="Grants that come again and again.", no_args_is_help=True)


@app.command()
def add(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits of each grant.")],
    per: Annotated[Unit, typer.Option(help="What it counts by.")] = Unit.MONTH,
    every: Annotated[int, typer.Option(help="How many of these lie between two grants.", min=1, max=1000)] = 1,
    anchor: Annotated[
        datetime | None, typer.Option(help="An occurrence, past or to come (UTC); now otherwise.")
    ] = None,
    zone: Annotated[str | None, typer.Option(help="IANA zone that it counts in; the organization's otherwise.")] = None,
    lasts: Annotated[
        str | None, typer.Option(help="How long each can be spent, such as “10 days”; until the next otherwise.")
    ] = None,
    never_expires: Annotated[bool, typer.Option("--never-expires", help="Its grants never expire.")] = False,
    ends: Annotated[datetime | None, typer.Option(help="No grant from this instant on (UTC).")] = None,
    rollover: Annotated[
        str | None, typer.Option(help="What goes on at the end of each: at most so much, or LEAST-MOST.")
    ] = None,
    user: Annotated[str | None, typer.Option(help="A member's e-mail: into their personal credits.")] = None,
    source: Annotated[grants.GrantSource, typer.Option(help="Where they come from.")] = grants.GrantSource.PLAN,
    priority: Annotated[int, typer.Option(help="Lower burns first.", min=0, max=32767)] = grants.USUAL_PRIORITY,
    free: Annotated[bool, typer.Option("--free", help="Complimentary: brings no revenue.")] = False,
    paid: Annotated[str, typer.Option(help="Money paid for each, in USD.")] = "0",
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Grant credits again and again, each time at the very instant.

    Examples: `bursar schedules add 1000 --org acme --rollover 200`,
    `bursar schedules add 50 --org acme --per day --anchor 2026-01-01T06:00:00 --zone Europe/Paris`
    """
    micros, bounds = credits_of(amount), rollover_of(rollover)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        owner = (await member_of(conn, database, organization.organization_id, user)).user_id if user else None
        schedule_id = await schedules.add_schedule(
            conn,
            organization_id=organization.organization_id,
            pool_id=await pools.pool_for(
                conn,
                organization_id=organization.organization_id,
                owner_user_id=None if organization.kind == "individual" else owner,
            ),
            amount_micros=micros,
            source=source,
            unit=per,
            every=every,
            zone=zone or organization.zone,
            anchor_at=in_utc(anchor),
            lasts=lasts,
            is_lasting=never_expires,
            ends_at=in_utc(ends),
            min_rollover_micros=bounds[0] if bounds else None,
            max_rollover_micros=bounds[1] if bounds else None,
            priority=priority,
            is_free=free,
            cost_basis_nano_usd=parse_usd(paid),
            reason=reason,
            by=OPERATOR,
            idempotency_key=idempotency_key or uuid7().hex,
        )
        return {"schedule_id": f"sch_{schedule_id.hex}", "credits": format_credits(micros)}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command("list")
def list_(org: OrgOption, as_json: JsonOption = False) -> None:
    """List schedules, with the instant of the next grant.

    Examples: `bursar schedules list --org acme`, `bursar schedules list --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        return [
            {
                "schedule_id": f"sch_{each.schedule_id.hex}",
                "credits": format_credits(each.amount_micros),
                "every": each.every,
                "unit": each.unit,
                "zone": each.zone,
                "anchor_at": each.anchor_at,
                "next_at": each.next_at,
                "ends_at": each.ends_at,
                "rollover": None
                if each.max_rollover_micros is None or each.min_rollover_micros is None
                else f"{format_credits(each.min_rollover_micros)}-{format_credits(each.max_rollover_micros)}",
                "reason": each.reason,
            }
            for each in await schedules.list_schedules(conn, organization_id=organization.organization_id)
        ]

    columns = [Column("schedule_id", "Schedule"), Column("credits", "Credits", right=True)]
    columns += [Column("every", "Every", right=True), Column("unit", ""), Column("zone", "Zone")]
    columns += [Column("next_at", "Next"), Column("rollover", "Rolls over")]
    print_rows(within(org, work), columns, as_json=as_json, empty="No schedules.")


@app.command()
def cancel(
    org: OrgOption, schedule: Annotated[str, typer.Argument(help="The schedule's id.")], dry_run: DryRunOption = False
) -> None:
    """End a schedule now; what it granted stays.

    Examples: `bursar schedules cancel sch_… --org acme`
    """
    schedule_id = given_id(schedule, "sch_")

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await schedules.cancel_schedule(
            conn, organization_id=organization.organization_id, schedule_id=schedule_id, by=OPERATOR
        )

    within(org, work, dry_run=dry_run)
    tell_dry_run(dry_run)
