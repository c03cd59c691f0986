"""Limits: allocations of a shared pool, and caps on what a scope may spend in a period."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.clock import uuid7
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")


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
    """How long a limit counts before it begins anew, in the organization's zone; weeks begin on Monday."""

    NONE = "none"
    DAY = "day"
    WEEK = "week"
    MONTH = "month"


class LimitAction(StrEnum):
    """stops: refuses beyond; warns: counts only."""

    STOPS = "stops"
    WARNS = "warns"


class NotStrict(Problem):
    """Only a limit that stops, on credits or tokens, can be strict."""

    status, code, title = 422, "limit_cannot_be_strict", "This limit cannot be strict"


class OverAllocated(Problem):
    """More would be reserved than the pool has that nobody reserved."""

    status, code, title = 409, "over_allocated", "The pool has less than this to reserve"
    sqlstate = "BR430"


@dataclass(frozen=True, slots=True)
class Allocation:
    """A user's share of a shared pool; amounts in micros, of the current period."""

    allocation_id: UUID
    pool_id: UUID
    user_id: UUID
    kind: AllocationKind
    period: Period
    amount_micros: Micros
    when_empty: WhenEmpty
    used_micros: Micros
    held_micros: Micros


@dataclass(frozen=True, slots=True)
class Limit:
    """A cap; amount in micros for credits, else a count."""

    limit_id: UUID
    scope: Scope
    scope_id: UUID | None
    metric: Metric
    model_filter: str | None
    period: Period
    amount: int
    action: LimitAction
    is_strict: bool
    created_at: datetime


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
    created_by: UUID | None = None,
) -> UUID:
    """Set a user's share of a shared pool; setting it again changes its size. Returns the allocation's id.

    Raises:
        NotFound: no such shared pool. OverAllocated: more than the pool's unreserved rest, without `oversubscribe`.
        KeyReused: the key was used with another body.
    """
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


async def list_allocations(conn: db.Connection, *, organization_id: UUID) -> list[Allocation]:
    """Running allocations with what is used and held of the current period."""
    return await db.fetch_all(conn, Allocation, QUERIES.allocations, organization_id=organization_id)


async def set_limit(
    conn: db.Connection,
    *,
    organization_id: UUID,
    scope: Scope,
    scope_id: UUID | None,
    amount: int,
    metric: Metric = Metric.CREDITS,
    period: Period = Period.MONTH,
    model_filter: str | None = None,
    action: LimitAction = LimitAction.STOPS,
    is_strict: bool = False,
    created_by: UUID | None = None,
) -> UUID:
    """Set a cap; with the same scope, metric, period, filter and action it changes amount and strictness.

    Returns its id. amount: micros for credits, else a count. is_strict: a call that names no limit of output is held by
    the most that its model puts out, never by a guess.

    Raises:
        NotStrict: it warns only, or counts calls.
    """
    if is_strict and (action is not LimitAction.STOPS or metric is Metric.CALLS):
        raise NotStrict("A strict limit stops, and counts credits or tokens")
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
        created_by=created_by,
    )
    assert isinstance(limit_id, UUID)
    return limit_id


async def end_limit(conn: db.Connection, *, organization_id: UUID, limit_id: UUID) -> None:
    """Lift a cap.

    Raises:
        NotFound: no such limit, or it was lifted.
    """
    await db.execute(conn, QUERIES.end_limit, organization_id=organization_id, limit_id=limit_id)


async def list_limits(conn: db.Connection, *, organization_id: UUID) -> list[Limit]:
    """Caps in force."""
    return await db.fetch_all(conn, Limit, QUERIES.limits, organization_id=organization_id)
