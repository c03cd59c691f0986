"""`bursar credits`: balances, grants and shares."""

from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli import past
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_rows, tell_dry_run
from bursar.cli.scope import OrgOption, all_names_of, given_id, member_of, names_of, within
from bursar.clock import in_utc, uuid7
from bursar.credits import filters, forecasts, grants, limits, pools
from bursar.credits.limits import Allocation, AllocationKind, Period, WhenEmpty
from bursar.credits.top_ups import forgive_debt
from bursar.identity.organizations import Organization
from bursar.money import Micros, NotAnAmount, format_credits, parse_credits, parse_usd

app = typer.Typer(help="Credits: balances, grants, shares of the pool.", no_args_is_help=True)

KeyOption = Annotated[str | None, typer.Option("--idempotency-key", help="Repeat safely: the same key has one effect.")]


def credits_of(text: str) -> Micros:
    """An amount as people write it: 5000, 5000cr, 0.5.

    Raises:
        typer.BadParameter
    """
    try:
        amount = parse_credits(text.removesuffix("cr").strip())
    except NotAnAmount as error:
        raise typer.BadParameter(str(error)) from error
    if amount < 0:
        raise typer.BadParameter("an amount is not negative")
    return amount


def rollover_of(text: str | None) -> tuple[Micros, Micros] | None:
    """Bounds of a roll-over as people write them: 200 (at most), 50-200 (at least and at most).

    Raises:
        typer.BadParameter
    """
    if text is None:
        return None
    least, dash, most = text.partition("-")
    return (credits_of(least), credits_of(most)) if dash else (Micros(0), credits_of(least))


def filter_from(model: str | None, feature: str | None) -> str | None:
    """The filter that --model or --feature names.

    Raises:
        typer.BadParameter
    """
    try:
        return filters.filter_of(model=model, feature=feature)
    except filters.NotAFilter as error:
        raise typer.BadParameter(str(error)) from None


def _shown(micros: Any) -> str:
    return "" if micros is None else format_credits(Micros(micros))


@app.command()
def show(
    org: OrgOption,
    with_forecast: Annotated[bool, typer.Option("--forecast/--no-forecast", help="Tell how long they last.")] = True,
    at: past.AtOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what is available, used and held in each pool, in credits, and how long that is likely to last.

    Examples: `bursar credits show --org acme`, `bursar credits show --org acme --at 2026-10-31T23:59:59`
    """
    if at is not None:
        past.show_pools(org, at, as_json=as_json)
        return

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        own = {"organization_id": organization.organization_id}
        found = await pools.list_pools(conn, **own, with_unsettled=True)
        told = {each.id: each for each in await forecasts.forecast_pools(conn, **own)} if with_forecast else {}
        names = await names_of(conn, organization)
        return [
            {
                "pool": pool.name,
                "kind": f"{pool.kind} (closed)" if pool.is_closed and not as_json else pool.kind.value,
                "is_closed": pool.is_closed,
                "for": filters.shown(pool.model_filter),
                "owner": names.get(pool.owner_user_id) if pool.owner_user_id else None,
                "available": format_credits(pool.available_micros),
                "used": format_credits(pool.used_micros),
                "held": format_credits(pool.held_micros),
                "overage": format_credits(pool.excess_micros),
                "pool_id": f"pool_{pool.pool_id.hex}",
                "forecast": _dates(told.get(pool.pool_id)),
            }
            for pool in found
        ]

    rows = within(org, work)
    columns = [Column("pool", "Pool"), Column("kind", "Kind"), Column("owner", "Owner")]
    if any(row["for"] for row in rows):
        columns.insert(1, Column("for", "For"))
    columns += [Column(key, key.capitalize(), right=True) for key in ("available", "used", "held", "overage")]
    print_rows(rows, columns, as_json=as_json, empty="No pool yet: `bursar credits add` opens one.")
    for row in () if as_json else rows:
        if row["forecast"] and row["forecast"]["likely"]:
            told = row["forecast"]
            until = told["last"] or "later"
            typer.echo(f"{row['pool']}: likely used up on {told['likely']} (80 %: {told['first']} to {until})")


def _dates(each: forecasts.Expected | None) -> dict[str, Any] | None:
    """When a pool is likely to be used up, for people and programs."""
    if each is None:
        return None
    told = each.forecast
    return {"likely": told.likely, "first": told.first, "last": told.last, "reason": told.reason}


@app.command("forecast")
def show_forecast(org: OrgOption, as_json: JsonOption = False) -> None:
    """Say when pools, shares and caps are likely to be used up, and between which dates with 80 %.

    Examples: `bursar credits forecast --org acme`, `bursar credits forecast --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        own = {"organization_id": organization.organization_id}
        found = [*await forecasts.forecast_pools(conn, **own), *await forecasts.forecast_budgets(conn, **own)]
        names = await all_names_of(conn, organization)
        return [_expected(each, names) for each in found]

    columns = [Column("what", "What"), Column("of", "Of"), Column("available", "Available", right=True)]
    columns += [Column("per_day", "Per day", right=True), Column("likely", "Likely"), Column("first", "From")]
    columns += [Column("last", "To"), Column("note", "")]
    print_rows(within(org, work), columns, as_json=as_json, empty="There is nothing to be used up.")


def _expected(each: forecasts.Expected, names: dict[UUID, str]) -> dict[str, Any]:
    def amount(value: int) -> str:
        return format_credits(Micros(value)) if each.metric == "credits" else str(value)

    told = each.forecast
    per_day = told.per_day // 10_000 * 10_000 if each.metric == "credits" else told.per_day
    return {
        "what": each.name,
        "of": names.get(each.scope_id, str(each.scope_id)) if each.scope_id else "",
        "metric": each.metric,
        "available": amount(each.available),
        "per_day": amount(per_day),
        "likely": told.likely,
        "first": told.first,
        "last": told.last,
        "resets_on": each.resets_on,
        "reason": told.reason,
        "note": FORECAST_NOTES[told.reason] if told.reason else "",
        "id": f"{ {'pool': 'pool', 'limit': 'lim', 'allocation': 'all'}[each.kind] }_{each.id.hex}",
    }


FORECAST_NOTES: Final = {
    "too_short": "used for less than four weeks: too short to tell",
    "too_thin": "used on too few days to tell",
    "silent": "not used for two weeks",
    "lasts": "may last for more than two years",
    "reset_first": "may begin anew first",
    "not_counted": "tokens are not forecast",
}
"""Why there is no date, or no last one."""


@app.command()
def add(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, such as 5000 or 0.5; 100 are worth 1 USD.")],
    user: Annotated[str | None, typer.Option(help="A member's e-mail: into their personal credits.")] = None,
    model: Annotated[str | None, typer.Option(help="Into a pool for these models alone: gpt-%.")] = None,
    feature: Annotated[str | None, typer.Option(help="Into a pool for this feature alone: images, support-%.")] = None,
    source: Annotated[grants.GrantSource, typer.Option(help="Where they come from.")] = grants.GrantSource.PURCHASE,
    priority: Annotated[int, typer.Option(help="Lower burns first.", min=0, max=32767)] = grants.USUAL_PRIORITY,
    free: Annotated[bool, typer.Option("--free", help="Complimentary: brings no revenue.")] = False,
    paid: Annotated[str, typer.Option(help="Money paid for them, in USD.")] = "0",
    effective: Annotated[datetime | None, typer.Option(help="Spendable from this instant (UTC).")] = None,
    expires: Annotated[datetime | None, typer.Option(help="Spendable before this instant (UTC).")] = None,
    rollover: Annotated[
        str | None, typer.Option(help="What goes on when they expire: at most so much, or LEAST-MOST.")
    ] = None,
    rollover_expires: Annotated[
        datetime | None, typer.Option(help="What goes on can be spent before this instant (UTC).")
    ] = None,
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add credits to the organization's pool, or to a member's personal one.

    Credits for some models or features alone are spent before others.

    Examples: `bursar credits add 5000 --org acme`, `bursar credits add 200 --org kestrel --user dana@kestrel.example`,
    `bursar credits add 500 --org acme --feature images`
    """
    micros, bounds, model_filter = credits_of(amount), rollover_of(rollover), filter_from(model, feature)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        owner = (await member_of(conn, database, organization.organization_id, user)).user_id if user else None
        pool_id = await pools.pool_for(
            conn,
            organization_id=organization.organization_id,
            owner_user_id=None if organization.kind == "individual" else owner,
            model_filter=model_filter,
        )
        grant_id = await grants.add_grant(
            conn,
            organization_id=organization.organization_id,
            pool_id=pool_id,
            amount_micros=micros,
            source=source,
            idempotency_key=idempotency_key or uuid7().hex,
            priority=priority,
            is_free=free,
            cost_basis_nano_usd=parse_usd(paid),
            effective_at=in_utc(effective),
            expires_at=in_utc(expires),
            reason=reason,
            min_rollover_micros=bounds[0] if bounds else None,
            max_rollover_micros=bounds[1] if bounds else None,
            rollover_expires_at=in_utc(rollover_expires),
        )
        return {"grant_id": f"grt_{grant_id.hex}", "pool_id": f"pool_{pool_id.hex}", "credits": format_credits(micros)}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command("grants")
def list_grants(org: OrgOption, at: past.AtOption = None, as_json: JsonOption = False) -> None:
    """List grants in the order in which they burn.

    Examples: `bursar credits grants --org acme`, `bursar credits grants --org acme --at 2026-10-31T23:59:59`
    """
    if at is not None:
        past.show_grants(org, at, as_json=as_json)
        return

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await grants.list_grants(conn, organization_id=organization.organization_id)
        return [
            {
                "grant_id": f"grt_{grant.grant_id.hex}",
                "source": grant.source.value,
                "credits": format_credits(grant.amount_micros),
                "left": format_credits(grant.left_micros),
                "state": grant.state,
                "priority": grant.priority,
                "effective_at": grant.effective_at,
                "expires_at": grant.expires_at,
                "burns_before_next": grant.burns_before_next,
                "parent_grant_id": f"grt_{grant.parent_grant_id.hex}" if grant.parent_grant_id else None,
                "reason": grant.reason,
            }
            for grant in found
        ]

    columns = [Column("grant_id", "Grant"), Column("source", "Source"), Column("credits", "Credits", right=True)]
    columns += [Column("left", "Left", right=True), Column("state", "State"), Column("expires_at", "Expires")]
    columns += [Column("burns_before_next", "First by")]
    print_rows(within(org, work), columns, as_json=as_json)


@app.command()
def void(
    org: OrgOption,
    grant: Annotated[str, typer.Argument(help="The grant's id.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take back what a grant has left and no running request needs.

    Examples: `bursar credits void grt_… --org acme --reason "booked twice"`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, str]:
        taken = await grants.void_grant(
            conn,
            organization_id=organization.organization_id,
            grant_id=given_id(grant, "grt_"),
            reason=reason,
            created_by=None,
            idempotency_key=idempotency_key or uuid7().hex,
        )
        return {"voided": format_credits(taken)}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def forgive(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, or all.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    user: Annotated[str | None, typer.Option(help="A member's e-mail: what their personal credits owe.")] = None,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Forgive what a pool owes, as a booked entry: what was used beyond everything granted.

    Examples: `bursar credits forgive all --org acme --reason "our fault"`
    """
    micros = None if amount == "all" else credits_of(amount)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, str]:
        owner = (await member_of(conn, database, organization.organization_id, user)).user_id if user else None
        forgiven = await forgive_debt(
            conn,
            organization_id=organization.organization_id,
            pool_id=await pools.pool_for(conn, organization_id=organization.organization_id, owner_user_id=owner),
            amount_micros=micros,
            reason=reason,
            by=OPERATOR,
            idempotency_key=idempotency_key or uuid7().hex,
        )
        return {"forgiven": format_credits(forgiven)}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def allocate(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits of the share.")],
    user: Annotated[str, typer.Option(help="The member's e-mail.")],
    capped: Annotated[bool, typer.Option("--capped", help="Only an upper bound; nothing is set aside.")] = False,
    per: Annotated[Period, typer.Option(help="Begins anew each day, week, month or cycle.")] = Period.NONE,
    carry: Annotated[str, typer.Option(help="Of what a reserved share has left then, keep at most this much.")] = "0",
    when_empty: Annotated[WhenEmpty, typer.Option(help="What follows when it is used up.")] = WhenEmpty.STOPS,
    oversubscribe: Annotated[bool, typer.Option(help="Allow more than the pool has to reserve.")] = False,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set a member's share of the shared pool.

    Examples: `bursar credits allocate 1000 --org lumen --user mira@lumen.example`,
    `bursar credits allocate 100 --org lumen --user mira@lumen.example --per week --carry 50`
    """
    micros, carry_micros = credits_of(amount), credits_of(carry)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        allocation_id = await limits.allocate(
            conn,
            organization_id=organization.organization_id,
            pool_id=await pools.pool_for(conn, organization_id=organization.organization_id),
            user_id=(await member_of(conn, database, organization.organization_id, user)).user_id,
            amount_micros=micros,
            idempotency_key=idempotency_key or uuid7().hex,
            kind=AllocationKind.CAPPED if capped else AllocationKind.RESERVED,
            period=per,
            when_empty=when_empty,
            oversubscribe=oversubscribe,
            carry_micros=carry_micros,
        )
        return {"allocation_id": f"all_{allocation_id.hex}", "credits": format_credits(micros)}

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def allocations(org: OrgOption, at: past.AtOption = None, as_json: JsonOption = False) -> None:
    """List members' shares, and what is used of them.

    Examples: `bursar credits allocations --org lumen`, `bursar credits allocations --org lumen --at 2026-10-31`
    """
    if at is not None:
        past.show_shares(org, at, as_json=as_json)
        return

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await names_of(conn, organization)
        found = await limits.list_allocations(conn, organization_id=organization.organization_id)
        return [
            {
                "allocation_id": f"all_{each.allocation_id.hex}",
                "user": names.get(each.user_id),
                "kind": each.kind.value,
                "period": each.period.value,
                "credits": format_credits(each.amount_micros),
                "used": format_credits(each.used_micros),
                "held": format_credits(each.held_micros),
                "left": format_credits(each.available_micros),
                "carried": format_credits(each.carried_micros),
                "carries_at_most": format_credits(each.carry_micros),
                "adjusted": format_credits(each.adjusted_micros),
                "resets_at": each.resets_at,
                "when_empty": each.when_empty.value,
            }
            for each in found
        ]

    columns = [Column("user", "User"), Column("kind", "Kind"), Column("period", "Period")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("credits", "used", "held", "left")]
    columns += [Column("resets_at", "Renewed")]
    print_rows(within(org, work), columns, as_json=as_json)


@app.command("end-share")
def end_share(
    org: OrgOption, user: Annotated[str, typer.Argument(help="The member's e-mail.")], dry_run: DryRunOption = False
) -> None:
    """End a member's share; what it had not used returns to the part that nobody reserves.

    Examples: `bursar credits end-share mira@lumen.example --org lumen`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        share = await _share_of(conn, database, organization, user)
        await limits.end_allocation(
            conn, organization_id=organization.organization_id, allocation_id=share.allocation_id
        )

    within(org, work, dry_run=dry_run)
    tell_dry_run(dry_run)


@app.command()
def reallocate(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, or all: what is neither used nor held.")],
    giver: Annotated[str, typer.Option("--from", help="E-mail of the member whose reserved share gives.")],
    taker: Annotated[str, typer.Option("--to", help="E-mail of the member whose reserved share takes.")],
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give what one member's share has left to another's. Of a share that is renewed only this period changes.

    Examples: `bursar credits reallocate 100 --org lumen --from mira@lumen.example --to noor@lumen.example --dry-run`
    """
    print_fields(_reallocated(org, amount, giver, taker, dry_run, idempotency_key), dry_run=dry_run, as_json=as_json)


@app.command("take-back")
def take_back(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, or all: what is neither used nor held.")],
    giver: Annotated[str, typer.Option("--from", help="E-mail of the member whose reserved share gives.")],
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give what a member's share has left back to the part that nobody reserves.

    A share that is renewed is as large as ever then.

    Examples: `bursar credits take-back all --org lumen --from mira@lumen.example --dry-run`
    """
    print_fields(_reallocated(org, amount, giver, None, dry_run, idempotency_key), dry_run=dry_run, as_json=as_json)


def _reallocated(
    org: str, amount: str, giver: str, taker: str | None, dry_run: bool, idempotency_key: str | None
) -> dict[str, Any]:
    micros = None if amount == "all" else credits_of(amount)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        source = await _share_of(conn, database, organization, giver)
        target = await _share_of(conn, database, organization, taker) if taker else None
        moved = await limits.reallocate(
            conn,
            organization_id=organization.organization_id,
            allocation_id=source.allocation_id,
            to_allocation_id=target.allocation_id if target else None,
            amount_micros=micros,
            idempotency_key=idempotency_key or uuid7().hex,
            by=OPERATOR,
        )
        source = await _share_of(conn, database, organization, giver)
        answer = {"moved": format_credits(moved), "from_has_left": format_credits(source.available_micros)}
        if taker is not None:
            target = await _share_of(conn, database, organization, taker)
            answer["to_has_left"] = format_credits(target.available_micros)
        return answer

    return within(org, work, dry_run=dry_run)


async def _share_of(conn: db.Connection, database: db.Database, organization: Organization, user: str) -> Allocation:
    """The share of a member of this e-mail.

    Raises:
        ShareNotFound: there is none.
    """
    member = await member_of(conn, database, organization.organization_id, user)
    for each in await limits.list_allocations(conn, organization_id=organization.organization_id):
        if each.user_id == member.user_id:
            return each
    raise limits.ShareNotFound(f"{member.email} has none")


@app.command()
def cycle(
    org: OrgOption,
    anchor: Annotated[datetime | None, typer.Option(help="When the subscription began (UTC).")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Show the organization's cycle, or say when its subscription began.

    Cycles begin at its day and time of each month, or on the month's last day.

    Examples: `bursar credits cycle --org acme --anchor 2026-01-31`, `bursar credits cycle --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> limits.Cycle:
        if anchor is not None:
            await limits.set_cycle(
                conn, organization_id=organization.organization_id, anchor=in_utc(anchor), by=OPERATOR
            )
        return await limits.get_cycle(conn, organization_id=organization.organization_id)

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)
