"""`bursar credits`: balances, grants and shares; `bursar caps`: limits on spending."""

from collections.abc import Awaitable
from datetime import datetime
from typing import Annotated, Any, Final
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_rows
from bursar.cli.scope import OrgOption, department_of, every_page, key_of, member_of, team_of, within
from bursar.clock import in_utc, uuid7
from bursar.credits import forecasts, grants, limits, pools
from bursar.credits.limits import AllocationKind, LimitAction, Metric, Period, Scope, WhenEmpty
from bursar.credits.top_ups import forgive_debt
from bursar.identity.memberships import Membership, list_memberships
from bursar.identity.organizations import Organization
from bursar.money import Micros, NotAnAmount, format_credits, parse_credits, parse_usd

app = typer.Typer(help="Credits: balances, grants, shares of the pool.", no_args_is_help=True)
caps = typer.Typer(
    help="Caps on what a user, key, team, department or the organization may spend.", no_args_is_help=True
)

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


def _shown(micros: Any) -> str:
    return "" if micros is None else format_credits(Micros(micros))


@app.command()
def show(
    org: OrgOption,
    with_forecast: Annotated[bool, typer.Option("--forecast/--no-forecast", help="Tell how long they last.")] = True,
    as_json: JsonOption = False,
) -> None:
    """Show what is available, used and held in each pool, in credits, and how long that is likely to last.

    Examples: `bursar credits show --org acme`, `bursar credits show --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        own = {"organization_id": organization.organization_id}
        found = await pools.list_pools(conn, **own)
        told = {each.id: each for each in await forecasts.forecast_pools(conn, **own)} if with_forecast else {}
        names = await _names(conn, organization)
        return [
            {
                "pool": pool.name,
                "kind": pool.kind.value,
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

    columns = [Column("pool", "Pool"), Column("kind", "Kind"), Column("owner", "Owner")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("available", "used", "held", "overage")]
    rows = within(org, work)
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
        names = await _names(conn, organization)
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
        "what": each.name if each.kind == "pool" else f"{each.name} per {each.period}".removesuffix(" per none"),
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
    source: Annotated[grants.GrantSource, typer.Option(help="Where they come from.")] = grants.GrantSource.PURCHASE,
    priority: Annotated[int, typer.Option(help="Lower burns first.", min=0, max=32767)] = grants.USUAL_PRIORITY,
    free: Annotated[bool, typer.Option("--free", help="Complimentary: brings no revenue.")] = False,
    paid: Annotated[str, typer.Option(help="Money paid for them, in USD.")] = "0",
    effective: Annotated[datetime | None, typer.Option(help="Spendable from this instant (UTC).")] = None,
    expires: Annotated[datetime | None, typer.Option(help="Spendable before this instant (UTC).")] = None,
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add credits to the organization's pool, or to a member's personal one.

    Examples: `bursar credits add 5000 --org acme`, `bursar credits add 200 --org kestrel --user dana@kestrel.example`
    """
    micros = credits_of(amount)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        owner = (await member_of(conn, database, organization.organization_id, user)).user_id if user else None
        pool_id = await pools.pool_for(
            conn,
            organization_id=organization.organization_id,
            owner_user_id=None if organization.kind == "individual" else owner,
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
        )
        return {"grant_id": f"grt_{grant_id.hex}", "pool_id": f"pool_{pool_id.hex}", "credits": format_credits(micros)}

    print_fields(within(org, work), as_json=as_json)


@app.command("grants")
def list_grants(org: OrgOption, as_json: JsonOption = False) -> None:
    """List grants in the order in which they burn.

    Examples: `bursar credits grants --org acme`, `bursar credits grants --org acme --json`
    """

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
                "reason": grant.reason,
            }
            for grant in found
        ]

    columns = [Column("grant_id", "Grant"), Column("source", "Source"), Column("credits", "Credits", right=True)]
    columns += [Column("left", "Left", right=True), Column("state", "State"), Column("expires_at", "Expires")]
    print_rows(within(org, work), columns, as_json=as_json)


@app.command()
def void(
    org: OrgOption,
    grant: Annotated[str, typer.Argument(help="The grant's id.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
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
            grant_id=_uuid(grant, "grt"),
            reason=reason,
            created_by=None,
            idempotency_key=idempotency_key or uuid7().hex,
        )
        return {"voided": format_credits(taken)}

    print_fields(within(org, work), as_json=as_json)


@app.command()
def forgive(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, or all.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    user: Annotated[str | None, typer.Option(help="A member's e-mail: what their personal credits owe.")] = None,
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

    print_fields(within(org, work), as_json=as_json)


@app.command()
def allocate(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits of the share.")],
    user: Annotated[str, typer.Option(help="The member's e-mail.")],
    capped: Annotated[bool, typer.Option("--capped", help="Only an upper bound; nothing is set aside.")] = False,
    per: Annotated[Period, typer.Option(help="For capped shares: begins anew each day, week or month.")] = Period.NONE,
    when_empty: Annotated[WhenEmpty, typer.Option(help="What follows when it is used up.")] = WhenEmpty.STOPS,
    oversubscribe: Annotated[bool, typer.Option(help="Allow more than the pool has to reserve.")] = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set a member's share of the shared pool.

    Examples: `bursar credits allocate 1000 --org lumen --user mira@lumen.example`
    """
    micros = credits_of(amount)

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
        )
        return {"allocation_id": f"all_{allocation_id.hex}", "credits": format_credits(micros)}

    print_fields(within(org, work), as_json=as_json)


@app.command()
def allocations(org: OrgOption, as_json: JsonOption = False) -> None:
    """List members' shares, and what is used of them.

    Examples: `bursar credits allocations --org lumen`, `bursar credits allocations --org lumen --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await _names(conn, organization)
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
                "when_empty": each.when_empty.value,
            }
            for each in found
        ]

    columns = [Column("user", "User"), Column("kind", "Kind"), Column("period", "Period")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("credits", "used", "held")]
    print_rows(within(org, work), columns, as_json=as_json)


@caps.command("set")
def set_cap(
    org: OrgOption,
    stop: Annotated[str | None, typer.Option(help="Refuse beyond: 5000cr, or a count of calls or tokens.")] = None,
    warn: Annotated[str | None, typer.Option(help="Only count beyond: as --stop.")] = None,
    per: Annotated[
        Period, typer.Option(help="Begins anew each day, week or month in the organization's zone.")
    ] = Period.MONTH,
    metric: Annotated[Metric, typer.Option(help="What it counts.")] = Metric.CREDITS,
    user: Annotated[str | None, typer.Option(help="A member's e-mail.")] = None,
    key: Annotated[str | None, typer.Option(help="A key's name or id.")] = None,
    team: Annotated[str | None, typer.Option(help="A team's name.")] = None,
    department: Annotated[str | None, typer.Option(help="A department's name.")] = None,
    model: Annotated[str | None, typer.Option(help="Only these models, with % for anything: gpt-%.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Hold calls without max_tokens by the most their model puts out.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Set a cap; without user, key, team or department on the whole organization.

    Examples: `bursar caps set --org acme --user dana@acme.example --stop 5000cr --per month`,
    `bursar caps set --org acme --key ci --metric calls --stop 1000 --per day`
    """
    if (stop is None) == (warn is None):
        raise typer.BadParameter("give either --stop or --warn")
    text = stop or warn or ""
    amount = credits_of(text) if metric is Metric.CREDITS else _count(text)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        scope, scope_id = await _scope(conn, database, organization, user, key, team, department)
        limit_id = await limits.set_limit(
            conn,
            organization_id=organization.organization_id,
            scope=scope,
            scope_id=scope_id,
            amount=amount,
            metric=metric,
            period=per,
            model_filter=model,
            action=LimitAction.STOPS if stop is not None else LimitAction.WARNS,
            is_strict=strict,
        )
        return {
            "limit_id": f"lim_{limit_id.hex}",
            "scope": scope.value,
            "amount": text,
            "per": per.value,
            "strict": strict,
        }

    print_fields(within(org, work), as_json=as_json)


@caps.command("list")
def list_caps(org: OrgOption, as_json: JsonOption = False) -> None:
    """List caps in force.

    Examples: `bursar caps list --org acme`, `bursar caps list --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await limits.list_limits(conn, organization_id=organization.organization_id)
        return [
            {
                "limit_id": f"lim_{each.limit_id.hex}",
                "scope": each.scope.value,
                "scope_id": each.scope_id,
                "metric": each.metric.value,
                "amount": _shown(each.amount) if each.metric is Metric.CREDITS else str(each.amount),
                "period": each.period.value,
                "models": each.model_filter,
                "does": each.action.value,
                "strict": each.is_strict,
            }
            for each in found
        ]

    columns = [Column("limit_id", "Cap"), Column("scope", "Scope"), Column("metric", "Counts")]
    columns += [Column("amount", "Amount", right=True), Column("period", "Per"), Column("does", "Does")]
    columns += [Column("strict", "Strict", show=lambda strict: "yes" if strict else "")]
    print_rows(within(org, work), columns, as_json=as_json, empty="No caps.")


@caps.command("end")
def end_cap(org: OrgOption, cap: Annotated[str, typer.Argument(help="The cap's id.")]) -> None:
    """Lift a cap.

    Examples: `bursar caps end lim_… --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await limits.end_limit(conn, organization_id=organization.organization_id, limit_id=_uuid(cap, "lim"))

    within(org, work)


async def _scope(
    conn: db.Connection,
    database: db.Database,
    organization: Organization,
    user: str | None,
    key: str | None,
    team: str | None,
    department: str | None,
) -> tuple[Scope, UUID | None]:
    if sum(each is not None for each in (user, key, team, department)) > 1:
        raise typer.BadParameter("give one of --user, --key, --team, --department")
    if user is not None:
        return Scope.USER, (await member_of(conn, database, organization.organization_id, user)).user_id
    if key is not None:
        return Scope.KEY, (await key_of(conn, organization.organization_id, key)).api_key_id
    if team is not None:
        return Scope.TEAM, (await team_of(conn, organization.organization_id, team)).team_id
    if department is not None:
        return Scope.DEPARTMENT, (await department_of(conn, organization.organization_id, department)).department_id
    return Scope.ORGANIZATION, None


async def _names(conn: db.Connection, organization: Organization) -> dict[UUID, str]:
    def page(after: UUID | None) -> Awaitable[list[Membership]]:
        return list_memberships(conn, organization_id=organization.organization_id, after=after)

    return {member.user_id: member.email for member in await every_page(page, lambda member: member.user_id)}


def _count(text: str) -> int:
    if not text.isdigit():
        raise typer.BadParameter(f"not a count: {text!r}")
    return int(text)


def _uuid(text: str, prefix: str) -> UUID:
    try:
        return UUID(text.removeprefix(f"{prefix}_"))
    except ValueError:
        raise typer.BadParameter(f"not an id: {text!r}") from None
