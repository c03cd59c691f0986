"""Limits: shares of a shared pool, caps on what a scope may spend in a period, and defaults that everybody inherits."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import OPERATOR, Actor, record
from bursar.clock import uuid7
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")
NOTHING: Final = Micros(0)


class AllocationKind(StrEnum):
    """reserved: nobody else can spend it; capped: an upper bound only."""

    RESERVED = "reserved"
    CAPPED = "capped"


class WhenEmpty(StrEnum):
    """What follows when a reserved share is empty."""

    STOPS = "stops"
    OPEN_PART = "open_part"


class Scope(StrEnum):
    """Whose spending a limit counts."""

    ORGANIZATION = "organization"
    DEPARTMENT = "department"
    TEAM = "team"
    USER = "user"
    KEY = "key"


class Metric(StrEnum):
    """What a limit counts; credits in micros."""

    CREDITS = "credits"
    CALLS = "calls"
    TOKENS = "tokens"


class Period(StrEnum):
    """How long a limit counts before it begins anew, in the organization's zone; weeks begin on Monday.

    cycle: a month of the subscription, from the day and time at which it began.
    """

    NONE = "none"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    CYCLE = "cycle"


class LimitAction(StrEnum):
    """stops: refuses beyond; asks: the same, but a raise may be asked for; warns: counts only."""

    STOPS = "stops"
    ASKS = "asks"
    WARNS = "warns"


class NotALimit(Problem):
    """Scope, default and amount do not make a limit together."""

    status, code, title = 422, "not_a_limit", "There is no such limit to set"


class NotStrict(Problem):
    """Only a limit that stops, on credits or tokens, can be strict."""

    status, code, title = 422, "limit_cannot_be_strict", "This limit cannot be strict"


class OverAllocated(Problem):
    """More would be reserved than the pool has that nobody reserved."""

    status, code, title = 409, "over_allocated", "The pool has less than this to reserve"
    sqlstate = "BR430"


class ShareNotFound(Problem):
    """This member has no share of a pool."""

    status, code, title = 404, "share_not_found", "No such share"


class CannotCarry(Problem):
    """Only what is renewed can carry something over."""

    status, code, title = 422, "share_cannot_carry", "This share carries nothing over"


class ShareHasLess(Problem):
    """More would be given away than the share has that is neither used nor held."""

    status, code, title = 409, "share_has_less", "The share has less than this left"
    sqlstate = "BR460"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A user's share of a shared pool; amounts in micros, of the current period.

    amount_micros: its size; carry_micros: how much at most it keeps of what is left when it is renewed; carried_micros:
    what it kept last time; adjusted_micros: given from other shares in this period, less what was taken.
    """

    allocation_id: UUID
    pool_id: UUID
    user_id: UUID
    kind: AllocationKind
    period: Period
    amount_micros: Micros
    when_empty: WhenEmpty
    carry_micros: Micros
    carried_micros: Micros
    adjusted_micros: Micros
    used_micros: Micros
    held_micros: Micros
    available_micros: Micros
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class Limit:
    """A cap; amount in micros for credits, else a count; None: no limit, in place of a default.

    is_default: it is for each one of its scope that has none of its own; within: of one team or department alone.
    balance_id: where it is counted; None for a default, which is counted for each one apart.
    """

    limit_id: UUID
    scope: Scope
    scope_id: UUID | None
    metric: Metric
    model_filter: str | None
    period: Period
    amount: int | None
    action: LimitAction
    is_strict: bool
    created_at: datetime
    is_default: bool
    within_scope: Scope | None
    within_id: UUID | None
    balance_id: UUID | None


@dataclass(frozen=True, slots=True)
class Cycle:
    """The organization's subscription cycle around now; anchor: what all cycles are reckoned from."""

    zone: str
    anchor: datetime
    starts_at: datetime
    ends_at: datetime


async def allocate(
    conn: db.Connection,
    *,
    organization_id: UUID,
    pool_id: UUID,
    user_id: UUID,
    amount_micros: Micros,
    idempotency_key: str,
    kind: AllocationKind = AllocationKind.RESERVED,
    period: Period = Period.NONE,
    when_empty: WhenEmpty = WhenEmpty.STOPS,
    oversubscribe: bool = False,
    carry_micros: Micros = NOTHING,
    created_by: UUID | None = None,
) -> UUID:
    """Set a user's share of a shared pool; setting it again changes its size. Returns the allocation's id.

    carry_micros: of a reserved share with a period, how much of what is left stays in it when it is renewed.

    Raises:
        NotFound: no such shared pool. OverAllocated: more than the pool's unreserved rest, without `oversubscribe`.
        KeyReused: the key was used with another body. CannotCarry: it is not reserved, or never renewed.
    """
    if carry_micros and (kind is not AllocationKind.RESERVED or period is Period.NONE):
        raise CannotCarry("Only a reserved share with a period has something to carry over")
    allocation_id = await db.fetch_value(
        conn,
        QUERIES.allocate,
        organization_id=organization_id,
        allocation_id=uuid7(),
        pool_id=pool_id,
        user_id=user_id,
        kind=kind,
        period=period,
        amount_micros=amount_micros,
        when_empty=when_empty,
        oversubscribe=oversubscribe,
        carry_micros=carry_micros,
        created_by=created_by,
        idempotency_key=idempotency_key,
    )
    assert isinstance(allocation_id, UUID)
    return allocation_id


async def end_allocation(conn: db.Connection, *, organization_id: UUID, allocation_id: UUID) -> None:
    """End a share; what it had not used returns to the part that nobody reserves.

    Raises:
        NotFound: no such allocation, or it has ended.
    """
    await db.execute(conn, QUERIES.end_allocation, organization_id=organization_id, allocation_id=allocation_id)


async def reallocate(
    conn: db.Connection,
    *,
    organization_id: UUID,
    allocation_id: UUID,
    to_allocation_id: UUID | None,
    amount_micros: Micros | None,
    idempotency_key: str,
    by: Actor,
) -> Micros:
    """Give what a reserved share has left to another one of its pool, or (None) back to the open part.

    amount_micros: None: all that is neither used nor held. Of a share that is renewed only this period changes.
    Returns what was moved.

    Raises:
        NotFound: no such reserved share. ShareHasLess: it has not so much left. KeyReused.
    """
    moved = await db.fetch_value(
        conn,
        QUERIES.reallocate,
        organization_id=organization_id,
        allocation_id=allocation_id,
        to_allocation_id=to_allocation_id,
        amount_micros=amount_micros,
        idempotency_key=idempotency_key,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="allocation.reallocated",
        object_id=allocation_id,
        new={"to_allocation_id": to_allocation_id, "amount_micros": moved},
    )
    return Micros(moved)


async def list_allocations(conn: db.Connection, *, organization_id: UUID) -> list[Allocation]:
    """Running allocations with what is used and held of the current period."""
    await fold(conn, organization_id=organization_id)
    return await db.fetch_all(conn, Allocation, QUERIES.allocations, organization_id=organization_id)


async def fold(conn: db.Connection, *, organization_id: UUID) -> None:
    """Book what time has changed of grants, shares and limits, as whoever moves credits next would.

    Raises:
        NotFound: no such organization.
    """
    await db.execute(conn, QUERIES.fold, organization_id=organization_id)


async def set_limit(
    conn: db.Connection,
    *,
    organization_id: UUID,
    scope: Scope,
    scope_id: UUID | None,
    amount: int | None,
    metric: Metric = Metric.CREDITS,
    period: Period = Period.MONTH,
    model_filter: str | None = None,
    action: LimitAction = LimitAction.STOPS,
    is_strict: bool = False,
    is_default: bool = False,
    within_scope: Scope | None = None,
    within_id: UUID | None = None,
    created_by: UUID | None = None,
) -> UUID:
    """Set a cap; the same again changes amount, strictness, and whether a cap that stops may be asked about.

    The same: with equal scope, metric, period and filter, and both stop or both only warn. Returns its id.
    amount: micros for credits, else a count; None: no limit for this one, in place of a default. is_default: for each
    one of the scope that has none of its own; within: of this team or department alone. is_strict: a call that names
    no limit of output is held by the most that its model puts out, never by a guess.

    Raises:
        NotStrict: it warns only, or counts calls. NotALimit: scope, default and amount do not fit.
    """
    if is_strict and (action is LimitAction.WARNS or metric is Metric.CALLS or amount is None):
        raise NotStrict("A strict limit stops, and counts credits or tokens")
    _require_sense(scope, scope_id, is_default, within_scope, amount)
    limit_id = await db.fetch_value(
        conn,
        QUERIES.set_limit,
        organization_id=organization_id,
        limit_id=uuid7(),
        scope=scope,
        scope_id=scope_id,
        metric=metric,
        model_filter=model_filter,
        period=period,
        amount=amount,
        action=action,
        is_strict=is_strict,
        is_default=is_default,
        within_scope=within_scope,
        within_id=within_id,
        created_by=created_by,
    )
    assert isinstance(limit_id, UUID)
    await record(
        conn,
        organization_id=organization_id,
        by=Actor(kind="user", id=created_by) if created_by else OPERATOR,
        action="limit.set",
        object_id=limit_id,
        new={"scope": scope, "scope_id": scope_id, "metric": metric, "period": period, "amount": amount}
        | {"action": action, "model_filter": model_filter, "is_default": is_default, "is_strict": is_strict},
    )
    return limit_id


_WITHIN: Final = {
    Scope.USER: (None, Scope.TEAM, Scope.DEPARTMENT),
    Scope.KEY: (None, Scope.TEAM, Scope.DEPARTMENT),
    Scope.TEAM: (None, Scope.DEPARTMENT),
    Scope.DEPARTMENT: (None,),
}
"""Of what a default may be: each of the first, of all or of one of the others."""


def _require_sense(
    scope: Scope, scope_id: UUID | None, is_default: bool, within_scope: Scope | None, amount: int | None
) -> None:
    if (scope_id is None) is not (is_default or scope is Scope.ORGANIZATION):
        raise NotALimit("A limit is for the organization, for one, or a default for each")
    if is_default and within_scope not in _WITHIN.get(scope, ()):
        raise NotALimit(f"There are no defaults for each {scope.value} of a {within_scope or 'organization'}")
    if within_scope is not None and not is_default:
        raise NotALimit("Only a default is for those of a team or department")
    if amount is None and scope_id is None and within_scope is None:
        raise NotALimit("Only one member, key, team or department can be without limit; or end the default")


async def end_limit(conn: db.Connection, *, organization_id: UUID, limit_id: UUID, by: Actor = OPERATOR) -> None:
    """Lift a cap.

    Raises:
        NotFound: no such limit, or it was lifted.
    """
    await db.execute(conn, QUERIES.end_limit, organization_id=organization_id, limit_id=limit_id)
    await record(conn, organization_id=organization_id, by=by, action="limit.ended", object_id=limit_id)


async def list_limits(conn: db.Connection, *, organization_id: UUID) -> list[Limit]:
    """Caps in force."""
    return await db.fetch_all(conn, Limit, QUERIES.limits, organization_id=organization_id)


async def fits_a_model(conn: db.Connection, pattern: str) -> bool:
    """Whether any model of the price lists fits a pattern (% is anything). A cap on none counts nothing."""
    return bool(await db.fetch_value(conn, QUERIES.is_a_priced_model, pattern=pattern))


async def set_cycle(conn: db.Connection, *, organization_id: UUID, anchor: datetime | None, by: Actor) -> None:
    """Say when the subscription began: cycles begin at its day and time of every month, or on the month's last day.

    A period that has begun ends as it would have. None: when the organization was made.
    """
    old = await db.fetch_value(conn, QUERIES.set_cycle, organization_id=organization_id, anchor=anchor)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="cycle.set",
        object_id=organization_id,
        old={"anchor": old},
        new={"anchor": anchor},
    )


async def get_cycle(conn: db.Connection, *, organization_id: UUID) -> Cycle:
    """The cycle around now.

    Raises:
        NotFound: no such organization.
    """
    return await db.fetch_one(conn, Cycle, QUERIES.cycle, organization_id=organization_id)
