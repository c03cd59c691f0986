"""`bursar caps`: limits on spending, raises for a time, and what members ask for."""

from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR, Actor
from bursar.cli import past
from bursar.cli.credits import KeyOption, credits_of, filter_from
from bursar.cli.output import Column, DryRunOption, JsonOption, QuietOption, print_fields, print_rows, tell_dry_run
from bursar.cli.scope import (
    OrgOption,
    all_names_of,
    department_of,
    given_id,
    key_of,
    member_of,
    names_of,
    team_of,
    within,
)
from bursar.clock import in_utc, uuid7
from bursar.credits import as_of, filters, limits, raises
from bursar.credits import why as asking
from bursar.credits.limits import Limit, LimitAction, Metric, Period, Scope
from bursar.identity.organizations import Organization
from bursar.money import Micros, format_credits

app = typer.Typer(
    help="Caps on what a user, key, team, department, model or the organization may spend.", no_args_is_help=True
)

NONE = "none"
UserOption = Annotated[str | None, typer.Option("--user", help="A member's e-mail.")]
KeyNameOption = Annotated[str | None, typer.Option("--key", help="A key's name or id.")]
TeamOption = Annotated[str | None, typer.Option("--team", help="A team's name.")]
DepartmentOption = Annotated[str | None, typer.Option("--department", help="A department's name.")]
ByOption = Annotated[str | None, typer.Option("--by", help="E-mail of who decides; without: the operator.")]


class Every(StrEnum):
    """Whom a default is for."""

    USER = "user"
    KEY = "key"
    TEAM = "team"
    DEPARTMENT = "department"


# ---------------------------------------------------------------------------------------------- caps


@app.command("set")
def set_cap(
    org: OrgOption,
    stop: Annotated[
        str | None, typer.Option(help="Refuse beyond: 5000cr, a count of calls or tokens, or none.")
    ] = None,
    ask: Annotated[str | None, typer.Option(help="Refuse beyond, but more may be asked for: as --stop.")] = None,
    warn: Annotated[str | None, typer.Option(help="Only count beyond: as --stop.")] = None,
    per: Annotated[
        Period, typer.Option(help="Begins anew each day, week, month or cycle of the subscription.")
    ] = Period.MONTH,
    metric: Annotated[Metric, typer.Option(help="What it counts.")] = Metric.CREDITS,
    every: Annotated[
        Every | None,
        typer.Option(help="A default for each one without a cap of its own; with --team or --department of those."),
    ] = None,
    user: UserOption = None,
    key: KeyNameOption = None,
    team: TeamOption = None,
    department: DepartmentOption = None,
    model: Annotated[str | None, typer.Option(help="Only these models, with % for anything: gpt-%.")] = None,
    feature: Annotated[str | None, typer.Option(help="Only this feature, as images or support-%.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Hold calls without max_tokens by the most their model puts out.")
    ] = False,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set a cap; without user, key, team, department or every on the whole organization.

    Examples: `bursar caps set --org acme --user dana@acme.example --stop 5000cr --per month`,
    `bursar caps set --org acme --key ci --metric calls --stop 1000 --per day`,
    `bursar caps set --org acme --model "%opus%" --stop 2000cr --per cycle`,
    `bursar caps set --org acme --feature images --stop 50cr --per day`,
    `bursar caps set --org acme --every user --ask 100cr --per day`,
    `bursar caps set --org acme --user dana@acme.example --stop none --per day`
    """
    given = {LimitAction.STOPS: stop, LimitAction.ASKS: ask, LimitAction.WARNS: warn}
    actions = [(action, text) for action, text in given.items() if text is not None]
    if len(actions) != 1:
        raise typer.BadParameter("give one of --stop, --ask and --warn")
    action, text = actions[0]
    amount = None if text == NONE else _amount(metric, text)
    model_filter = filter_from(model, feature)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        within_scope: Scope | None = None
        within_id: UUID | None = None
        if every is None:
            scope, scope_id = await _scope(conn, database, organization, user, key, team, department)
        else:
            scope, scope_id = Scope(every.value), None
            if user is not None or key is not None:
                raise typer.BadParameter("--every goes with --team or --department alone")
            if team is not None or department is not None:
                within_scope, within_id = await _scope(conn, database, organization, None, None, team, department)
        if model is not None and not await limits.fits_a_model(conn, model):
            hint = "" if "%" in model else f"; --model “%{model}%” is for all that have it in their names"
            typer.echo(f"No model of the price lists fits “{model}” yet{hint}.", err=True)
        limit_id = await limits.set_limit(
            conn,
            organization_id=organization.organization_id,
            scope=scope,
            scope_id=scope_id,
            amount=amount,
            metric=metric,
            period=per,
            model_filter=model_filter,
            action=action,
            is_strict=strict,
            is_default=every is not None,
            within_scope=within_scope,
            within_id=within_id,
        )
        return {
            "limit_id": f"lim_{limit_id.hex}",
            "scope": f"every {scope.value}" if every else scope.value,
            "counts": metric.value,
            "amount": text,
            "per": per.value,
            "strict": strict,
        }

    _print_made(within(org, work, dry_run=dry_run), "limit_id", dry_run=dry_run, quiet=quiet, as_json=as_json)


@app.command("list")
def list_caps(org: OrgOption, at: past.AtOption = None, as_json: JsonOption = False) -> None:
    """List caps in force: the organization's, defaults, and those that take a default's place.

    Examples: `bursar caps list --org acme`, `bursar caps list --org acme --at 2026-10-31T23:59:59`
    """
    if at is not None:
        _list_past_caps(org, at, as_json=as_json)
        return

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await limits.list_limits(conn, organization_id=organization.organization_id)
        names = await all_names_of(conn, organization)
        return [
            {
                "limit_id": f"lim_{each.limit_id.hex}",
                "scope": _filtered(each.model_filter) if each.scope is Scope.ORGANIZATION else each.scope.value,
                "scope_id": each.scope_id,
                "whose": _whose(each, names),
                "metric": each.metric.value,
                "models": filters.models_of(each.model_filter),
                "features": filters.features_of(each.model_filter),
                "amount": _shown(each.metric, each.amount),
                "period": each.period.value,
                "does": each.action.value,
                "strict": each.is_strict,
                "origin": _origin(each, found),
            }
            for each in found
        ]

    columns = [Column("limit_id", "Cap"), Column("whose", "On"), Column("metric", "Counts"), Column("models", "Models")]
    rows = within(org, work)
    if any(row["features"] for row in rows):
        columns += [Column("features", "Features")]
    columns += [Column("amount", "Amount", right=True), Column("period", "Per"), Column("does", "Does")]
    columns += [Column("strict", "Strict", show=lambda strict: "yes" if strict else ""), Column("origin", "Origin")]
    print_rows(rows, columns, as_json=as_json, empty="No caps.")


def _list_past_caps(org: str, at: datetime, *, as_json: bool) -> None:
    """Caps that were in force at an instant, and what was used of them in the period around it."""

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await as_of.limits_at(conn, organization_id=organization.organization_id, at=at)
        names = await all_names_of(conn, organization)
        return [
            {
                "limit_id": f"lim_{each.limit_id.hex}",
                "scope": each.scope.value,
                "scope_id": each.scope_id,
                "whose": _whose_then(each, names),
                "metric": each.metric.value,
                "models": filters.models_of(each.model_filter),
                "features": filters.features_of(each.model_filter),
                "amount": _shown(each.metric, each.amount),
                "raised": _shown(each.metric, each.raised) if each.raised else None,
                "used": _used_then(each),
                "period": each.period.value,
                "resets_at": each.period_end,
                "does": each.action.value,
                "strict": each.is_strict,
            }
            for each in found
        ]

    columns = [Column("limit_id", "Cap"), Column("whose", "On"), Column("metric", "Counts"), Column("models", "Models")]
    rows = within(org, work)
    if any(row["features"] for row in rows):
        columns += [Column("features", "Features")]
    columns += [Column(key, key.capitalize(), right=True) for key in ("amount", "raised", "used")]
    columns += [Column("period", "Per"), Column("does", "Does")]
    columns += [Column("strict", "Strict", show=lambda strict: "yes" if strict else "")]
    print_rows(rows, columns, as_json=as_json, empty="There were no caps then.")


def _used_then(each: as_of.LimitAt) -> str | None:
    if each.used is None:
        return None if each.balance_id is None else past.UNKNOWN
    return _shown(each.metric, each.used)


def _whose_then(each: as_of.LimitAt, names: dict[UUID, str]) -> str:
    """A default as such is every one's; what it counted of one is that one's."""
    if each.scope_id is not None:
        return f"{each.scope.value} {names.get(each.scope_id, each.scope_id.hex)}"
    return _whose(each, names)


@app.command("end")
def end_cap(
    org: OrgOption, cap: Annotated[str, typer.Argument(help="The cap's id.")], dry_run: DryRunOption = False
) -> None:
    """Lift a cap; where there is a default, that one holds again.

    Examples: `bursar caps end lim_… --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await limits.end_limit(conn, organization_id=organization.organization_id, limit_id=given_id(cap, "lim_"))

    within(org, work, dry_run=dry_run)
    tell_dry_run(dry_run)


# ---------------------------------------------------------------------------------------------- raises


@app.command("raise")
def raise_cap(
    org: OrgOption,
    cap: Annotated[str, typer.Argument(help="The cap's id; of a default with whom it is for.")],
    amount: Annotated[str, typer.Option(help="How much on top: 50cr, or a count.")],
    until: Annotated[datetime, typer.Option(help="It ends at this instant (UTC), by itself.")],
    since: Annotated[
        datetime | None,
        typer.Option("--from", help="It begins at this instant (UTC); now where it is past or not given."),
    ] = None,
    user: UserOption = None,
    key: KeyNameOption = None,
    team: TeamOption = None,
    department: DepartmentOption = None,
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Give more than a cap does, for a time.

    Examples: `bursar caps raise lim_… --org acme --amount 50cr --until 2026-12-24`,
    `bursar caps raise lim_… --org acme --user dana@acme.example --amount 50cr --until 2026-12-24 --reason "Release"`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        limit_id = given_id(cap, "lim_")
        metric = await raises.metric_of(conn, organization_id=organization.organization_id, limit_id=limit_id)
        _, subject_id = await _scope(conn, database, organization, user, key, team, department)
        ends_at = in_utc(until)
        assert ends_at is not None
        raise_id = await raises.raise_limit(
            conn,
            organization_id=organization.organization_id,
            limit_id=limit_id,
            subject_id=subject_id,
            amount=_amount(metric, amount),
            starts_at=in_utc(since),
            ends_at=ends_at,
            reason=reason,
            idempotency_key=idempotency_key or uuid7().hex,
            by=OPERATOR,
        )
        return {"raise_id": f"rai_{raise_id.hex}", "amount": amount, "until": ends_at}

    _print_made(within(org, work, dry_run=dry_run), "raise_id", dry_run=dry_run, quiet=quiet, as_json=as_json)


@app.command("raises")
def list_raises(org: OrgOption, as_json: JsonOption = False) -> None:
    """List raises, those that have ended too.

    Examples: `bursar caps raises --org acme`, `bursar caps raises --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await all_names_of(conn, organization)
        return [
            {
                "raise_id": f"rai_{each.raise_id.hex}",
                "cap": f"lim_{each.limit_id.hex}",
                "whose": names.get(each.subject_id, "organization") if each.subject_id else "organization",
                "amount": _shown(each.metric, each.amount),
                "from": each.starts_at,
                "until": each.ends_at,
                "state": each.state,
                "reason": each.reason,
                "request_id": f"lrq_{each.limit_request_id.hex}" if each.limit_request_id else None,
            }
            for each in await raises.list_raises(conn, organization_id=organization.organization_id)
        ]

    columns = [Column("raise_id", "Raise"), Column("whose", "On"), Column("amount", "Amount", right=True)]
    columns += [Column("until", "Until"), Column("state", "State"), Column("reason", "Reason")]
    print_rows(within(org, work), columns, as_json=as_json, empty="No raises.")


@app.command("end-raise")
def end_raise(
    org: OrgOption, raised: Annotated[str, typer.Argument(help="The raise's id.")], dry_run: DryRunOption = False
) -> None:
    """End a raise before its time. It stays in the list.

    Examples: `bursar caps end-raise rai_… --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await raises.end_raise(
            conn, organization_id=organization.organization_id, raise_id=given_id(raised, "rai_"), by=OPERATOR
        )

    within(org, work, dry_run=dry_run)
    tell_dry_run(dry_run)


# ---------------------------------------------------------------------------------------------- requests


@app.command("request")
def request(
    org: OrgOption,
    user: Annotated[str, typer.Option("--user", help="E-mail of the member who asks.")],
    amount: Annotated[str, typer.Option(help="How much on top: 50cr, or a count.")],
    until: Annotated[datetime, typer.Option(help="Until this instant (UTC).")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    cap: Annotated[str | None, typer.Option(help="The cap's id, where several that ask apply.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="The key that is used: its name or id.")] = None,
    model: Annotated[str, typer.Option(help="The model that is used.")] = "",
    idempotency_key: KeyOption = None,
    dry_run: DryRunOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask for more, for a member, on a cap that asks.

    Examples: `bursar caps request --org acme --user dana@acme.example --amount 50cr --until 2026-12-24 --reason "Demo"`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        member = await member_of(conn, database, organization.organization_id, user)
        used = await key_of(conn, organization.organization_id, key) if key else None
        answer = await asking.why(
            conn,
            organization_id=organization.organization_id,
            user_id=member.user_id,
            api_key_id=used.api_key_id if used else None,
            model=model,
            wanted_micros=limits.NOTHING,
        )
        wanted = given_id(cap, "lim_") if cap else None
        able = [
            each
            for each in answer.limits
            if each.asks and (wanted is None or wanted in (each.limit_id, each.balance_id))
        ]
        if len(able) != 1 or able[0].balance_id is None:
            there = ", ".join(f"lim_{each.balance_id.hex} ({each.name})" for each in able if each.balance_id)
            raise raises.NotAskable(f"Give one of --cap {there}" if able else "No cap that asks applies")
        ends_at = in_utc(until)
        assert ends_at is not None
        request_id = await raises.request_raise(
            conn,
            organization_id=organization.organization_id,
            limit_id=able[0].balance_id,
            subject_id=None,
            user_id=member.user_id,
            amount=_amount(Metric(able[0].metric or Metric.CREDITS), amount),
            until=ends_at,
            reason=reason,
            idempotency_key=idempotency_key or uuid7().hex,
            by=Actor(kind="user", id=member.user_id),
        )
        return {"request_id": f"lrq_{request_id.hex}", "cap": able[0].name, "amount": amount, "until": ends_at}

    _print_made(within(org, work, dry_run=dry_run), "request_id", dry_run=dry_run, quiet=quiet, as_json=as_json)


@app.command("requests")
def list_requests(org: OrgOption, as_json: JsonOption = False) -> None:
    """List what members asked for, and what became of it.

    Examples: `bursar caps requests --org acme`, `bursar caps requests --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        names = await names_of(conn, organization)
        return [
            {
                "request_id": f"lrq_{each.limit_request_id.hex}",
                "user": names.get(each.user_id),
                "cap": f"lim_{each.limit_id.hex}",
                "on": _cap(each),
                "amount": _shown(each.metric, each.amount),
                "until": each.until_at,
                "reason": each.reason,
                "state": each.state.value,
                "lapses_at": each.lapses_at,
                "decided_at": each.decided_at,
                "decided_by": names.get(each.decided_by) if each.decided_by else None,
                "note": each.note,
                "granted": None if each.granted_amount is None else _shown(each.metric, each.granted_amount),
                "granted_until": each.granted_until,
            }
            for each in await raises.list_requests(conn, organization_id=organization.organization_id)
        ]

    columns = [Column("request_id", "Request"), Column("user", "User"), Column("on", "On")]
    columns += [Column("amount", "Amount", right=True)]
    columns += [Column("until", "Until"), Column("reason", "Reason"), Column("state", "State")]
    columns += [Column("granted", "Granted", right=True)]
    print_rows(within(org, work), columns, as_json=as_json, empty="Nobody has asked.")


@app.command()
def approve(
    org: OrgOption,
    asked: Annotated[str, typer.Argument(help="The request's id.")],
    amount: Annotated[str | None, typer.Option(help="Another amount than asked for.")] = None,
    until: Annotated[datetime | None, typer.Option(help="Another end than asked for (UTC).")] = None,
    note: Annotated[str | None, typer.Option(help="What is said to it.")] = None,
    by: ByOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Approve a request: a raise that ends by itself.

    Examples: `bursar caps approve lrq_… --org acme`,
    `bursar caps approve lrq_… --org acme --amount 20cr --note "for now"`
    """
    print_fields(_decided(org, asked, True, amount, until, note, by, dry_run), dry_run=dry_run, as_json=as_json)


@app.command()
def deny(
    org: OrgOption,
    asked: Annotated[str, typer.Argument(help="The request's id.")],
    note: Annotated[str | None, typer.Option(help="What is said to it.")] = None,
    by: ByOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Deny a request.

    Examples: `bursar caps deny lrq_… --org acme --note "Use the smaller model"`
    """
    print_fields(_decided(org, asked, False, None, None, note, by, dry_run), dry_run=dry_run, as_json=as_json)


def _decided(
    org: str,
    asked: str,
    is_approved: bool,
    amount: str | None,
    until: datetime | None,
    note: str | None,
    by: str | None,
    dry_run: bool,
) -> dict[str, Any]:
    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        organization_id = organization.organization_id
        request_id = given_id(asked, "lrq_")
        found = await raises.get_request(conn, organization_id=organization_id, limit_request_id=request_id)
        decider = (await member_of(conn, database, organization_id, by)).user_id if by else None
        raise_id = await raises.decide_request(
            conn,
            organization_id=organization_id,
            limit_request_id=request_id,
            is_approved=is_approved,
            amount=None if amount is None else _amount(found.metric, amount),
            until=in_utc(until),
            note=note,
            by=Actor(kind="user", id=decider) if decider else OPERATOR,
        )
        return {
            "request_id": f"lrq_{request_id.hex}",
            "state": "approved" if is_approved else "denied",
            "raise_id": f"rai_{raise_id.hex}" if raise_id else None,
        }

    return within(org, work, dry_run=dry_run)


# ---------------------------------------------------------------------------------------------- words


def _print_made(row: dict[str, Any], id_field: str, *, quiet: bool, as_json: bool, dry_run: bool = False) -> None:
    if quiet:
        typer.echo(row[id_field])
    else:
        print_fields(row, dry_run=dry_run, as_json=as_json)


async def _scope(
    conn: db.Connection,
    database: db.Database,
    organization: Organization,
    user: str | None,
    key: str | None,
    team: str | None,
    department: str | None,
) -> tuple[Scope, UUID | None]:
    """Whose limit it is. A key stands for all that it is rotated to."""
    if sum(each is not None for each in (user, key, team, department)) > 1:
        raise typer.BadParameter("give one of --user, --key, --team, --department")
    if user is not None:
        return Scope.USER, (await member_of(conn, database, organization.organization_id, user)).user_id
    if key is not None:
        return Scope.KEY, (await key_of(conn, organization.organization_id, key)).original_api_key_id
    if team is not None:
        return Scope.TEAM, (await team_of(conn, organization.organization_id, team)).team_id
    if department is not None:
        return Scope.DEPARTMENT, (await department_of(conn, organization.organization_id, department)).department_id
    return Scope.ORGANIZATION, None


def _cap(asked: raises.LimitRequest) -> str:
    """“user cap on calls per day”."""
    per = "" if asked.period == "none" else f" per {asked.period}"
    return f"{asked.scope} cap on {asked.metric}{per}{filters.on_what(asked.model_filter)}"


def _whose(limit: Limit | as_of.LimitAt, names: dict[UUID, str]) -> str:
    if limit.is_default:
        of = f" of {names.get(limit.within_id, 'a former one')}" if limit.within_id else ""
        return f"every {limit.scope.value}{of}"
    if limit.scope_id is not None:
        return f"{limit.scope.value} {names.get(limit.scope_id, limit.scope_id.hex)}"
    return _filtered(limit.model_filter)


def _filtered(model_filter: str | None) -> str:
    """Whose a cap of the organization is: of a model or feature, where it is for some alone."""
    if filters.features_of(model_filter):
        return "feature"
    return "model" if model_filter else "organization"


def _origin(limit: Limit, all_limits: list[Limit]) -> str:
    """A default is one; a limit of one's own takes the place of a default of the same kind, where there is one."""
    if limit.is_default:
        return "default"
    is_instead = any(
        each.is_default
        and (each.scope, each.metric, each.period, each.model_filter)
        == (limit.scope, limit.metric, limit.period, limit.model_filter)
        and (each.action is LimitAction.WARNS) == (limit.action is LimitAction.WARNS)
        for each in all_limits
    )
    return "instead of the default" if is_instead else ""


def _amount(metric: Metric, text: str) -> int:
    if metric is Metric.CREDITS:
        return credits_of(text)
    if not text.isdigit():
        raise typer.BadParameter(f"not a count: {text!r}")
    return int(text)


def _shown(metric: Metric, amount: int | None) -> str:
    if amount is None:
        return NONE
    return format_credits(Micros(amount)) if metric is Metric.CREDITS else str(amount)
