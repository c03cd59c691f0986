"""What was so at a past instant: balances, grants, limits and shares, from the ledger and the attribution.

A time event (a grant's start or end, a renewal) counts at its own instant, however late it was booked. What open holds
had reserved is no fact of the ledger: only holds that are open now are known, so that none is told of a past instant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from bursar import db
from bursar.credits.grants import GrantSource
from bursar.credits.limits import AllocationKind, LimitAction, Metric, Period, Scope, WhenEmpty, fold
from bursar.credits.pools import PoolKind
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits", "as_of.sql")


class NotPast(Problem):
    """Only what has been can be told."""

    status, code, title = 422, "instant_to_come", "This instant is still to come"


@dataclass(frozen=True, slots=True)
class PoolAt:
    """A pool at an instant, in micros. granted: brought in less taken out; poured: used and laid on grants by then."""

    pool_id: UUID
    kind: PoolKind
    owner_user_id: UUID | None
    name: str
    model_filter: str | None
    granted_micros: Micros
    used_micros: Micros
    poured_micros: Micros

    @property
    def left_micros(self) -> Micros:
        """What was left of it; open holds may have reserved some."""
        return Micros(max(0, self.granted_micros - self.used_micros))

    @property
    def debt_micros(self) -> Micros:
        """What had been used beyond everything granted."""
        return Micros(max(0, self.used_micros - self.granted_micros))


@dataclass(frozen=True, slots=True)
class _Booked:
    """A grant as the books had it at an instant, before use since the last pour is laid on it."""

    grant_id: UUID
    pool_id: UUID
    source: GrantSource
    amount_micros: Micros
    priority: int
    is_free: bool
    effective_at: datetime
    expires_at: datetime | None
    reason: str | None
    created_at: datetime
    has_begun: bool
    brought_micros: Micros
    burnt_micros: Micros
    was_withdrawn: bool


@dataclass(frozen=True, slots=True)
class GrantAt:
    """A grant at an instant, in micros. state: scheduled, active, lingering or ended."""

    grant_id: UUID
    pool_id: UUID
    source: GrantSource
    amount_micros: Micros
    left_micros: Micros
    burnt_micros: Micros
    state: str
    priority: int
    effective_at: datetime
    expires_at: datetime | None
    reason: str | None


@dataclass(frozen=True, slots=True)
class LimitAt:
    """A limit at an instant; amounts in micros for credits, else counts.

    amount: as it was set; None: no limit, in place of a default. raised: what raises added. used: in the period around
    the instant; None: of tokens, where the period has counted more since, or of a default as such. A default comes once
    as such, and once for each one that it counted (balance_id and scope_id are set).
    """

    limit_id: UUID
    balance_id: UUID | None
    scope: Scope
    scope_id: UUID | None
    metric: Metric
    model_filter: str | None
    period: Period
    amount: int | None
    action: LimitAction
    is_strict: bool
    is_default: bool
    within_scope: Scope | None
    within_id: UUID | None
    created_at: datetime
    raised: int
    used: int | None
    period_start: datetime | None
    period_end: datetime | None


@dataclass(frozen=True, slots=True)
class ShareAt:
    """A share at an instant, in micros. amount: as it was set; limit: all that it could have used by then.

    opening: of a renewed one, what had been used and held before its period. used: all that it had used by then, its
    earlier periods included where it is reserved; None: what its member drew cannot be told from what they drew from
    the open part.
    """

    allocation_id: UUID
    pool_id: UUID
    user_id: UUID
    kind: AllocationKind
    period: Period
    when_empty: WhenEmpty
    amount_micros: Micros
    limit_micros: Micros
    opening_micros: Micros
    used_micros: Micros | None
    period_end: datetime | None

    @property
    def used_in_period_micros(self) -> Micros | None:
        """What was used of it in its period."""
        return None if self.used_micros is None else Micros(max(0, self.used_micros - self.opening_micros))

    @property
    def left_micros(self) -> Micros | None:
        """What was left of it; the pool may have had less, and open holds may have reserved some."""
        return None if self.used_micros is None else Micros(max(0, self.limit_micros - self.used_micros))


@dataclass(frozen=True, slots=True)
class _Back:
    grant_id: UUID
    micros: Micros


@dataclass(frozen=True, slots=True)
class _Clock:
    now: datetime
    zone: str


async def pools_at(
    conn: db.Connection, *, organization_id: UUID, at: datetime, with_closed: bool = False
) -> list[PoolAt]:
    """The organization's pools at an instant, shared first; with_closed: also those that had closed and were even.

    Raises:
        NotPast: the instant is still to come. NotFound: no such organization.
    """
    await _require_past(conn, organization_id, at)
    return await _pools(conn, organization_id, at, with_closed)


async def grants_at(conn: db.Connection, *, organization_id: UUID, at: datetime) -> list[GrantAt]:
    """Every grant that there was at an instant, in burn order within its pool.

    Raises:
        NotPast: the instant is still to come. NotFound: no such organization.
    """
    await _require_past(conn, organization_id, at)
    pools = await _pools(conn, organization_id, at, True)
    booked = await db.fetch_all(conn, _Booked, QUERIES.grants, organization_id=organization_id, at=at)
    over = [pool for pool in pools if pool.poured_micros > pool.used_micros]
    backs = await db.fetch_all(
        conn,
        _Back,
        QUERIES.poured_beyond,
        organization_id=organization_id,
        at=at,
        pool_ids=[pool.pool_id for pool in over],
        used=[pool.used_micros for pool in over],
    )
    return _pour(pools, booked, {back.grant_id: back.micros for back in backs}, at)


async def limits_at(conn: db.Connection, *, organization_id: UUID, at: datetime) -> list[LimitAt]:
    """Limits that were in force at an instant, with what was used of them by then.

    Raises:
        NotPast: the instant is still to come. NotFound: no such organization.
    """
    await _require_past(conn, organization_id, at)
    return await db.fetch_all(conn, LimitAt, QUERIES.limits, organization_id=organization_id, at=at)


async def shares_at(conn: db.Connection, *, organization_id: UUID, at: datetime) -> list[ShareAt]:
    """Shares that were in force at an instant, with what was used of them by then.

    Raises:
        NotPast: the instant is still to come. NotFound: no such organization.
    """
    await _require_past(conn, organization_id, at)
    return await db.fetch_all(conn, ShareAt, QUERIES.shares, organization_id=organization_id, at=at)


async def settle_past(conn: db.Connection, *, organization_id: UUID) -> None:
    """Book what time has changed until now, and see out whoever is booking; then nothing is booked at an earlier
    instant any more. Where nothing is due, nobody is kept waiting afterwards.

    Raises:
        NotFound: no such organization.
    """
    is_due = await db.fetch_value(conn, QUERIES.is_due, organization_id=organization_id)
    async with conn.transaction(force_rollback=not is_due):
        await fold(conn, organization_id=organization_id)


async def _require_past(conn: db.Connection, organization_id: UUID, at: datetime) -> None:
    await settle_past(conn, organization_id=organization_id)
    clock = await db.fetch_one(conn, _Clock, QUERIES.clock, organization_id=organization_id)
    if at > clock.now:
        raise NotPast(f"It is {clock.now:%Y-%m-%d %H:%M:%S} UTC; `--at` looks back only")


async def _pools(conn: db.Connection, organization_id: UUID, at: datetime, with_closed: bool) -> list[PoolAt]:
    return await db.fetch_all(
        conn, PoolAt, QUERIES.pools, organization_id=organization_id, at=at, with_closed=with_closed
    )


def _pour(pools: Sequence[PoolAt], booked: Sequence[_Booked], backs: dict[UUID, Micros], at: datetime) -> list[GrantAt]:
    """Lay what each pool had used since its last pour on its grants, in burn order, as a pour at the instant would.

    booked: in burn order within each pool. backs: what a correction had taken back and no pour had seen yet.
    """
    unpoured = {pool.pool_id: max(0, pool.used_micros - pool.poured_micros) for pool in pools}
    found = []
    for grant in booked:
        back = backs.get(grant.grant_id, 0)
        left, burnt = grant.brought_micros - grant.burnt_micros + back, grant.burnt_micros - back
        if not grant.brought_micros and not grant.burnt_micros and not grant.has_begun:
            left = 0 if grant.was_withdrawn else grant.amount_micros
            found.append(_as_found(grant, left, 0, "ended" if grant.was_withdrawn else "scheduled"))
            continue
        take = min(left, unpoured.get(grant.pool_id, 0))
        if take:
            unpoured[grant.pool_id] -= take
            left, burnt = left - take, burnt + take
        is_over = grant.expires_at is not None and grant.expires_at <= at
        found.append(_as_found(grant, left, burnt, "ended" if not left else "lingering" if is_over else "active"))
    return found


def _as_found(grant: _Booked, left: int, burnt: int, state: str) -> GrantAt:
    return GrantAt(
        grant.grant_id,
        grant.pool_id,
        grant.source,
        grant.amount_micros,
        Micros(left),
        Micros(burnt),
        state,
        grant.priority,
        grant.effective_at,
        grant.expires_at,
        grant.reason,
    )
