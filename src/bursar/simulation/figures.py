"""Figures of a stage at an instant, and the segments between the instants at which grants begin and end."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from bursar import db
from bursar.money import Micros
from bursar.simulation.stage import QUERIES, Stage


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """A pool's balance, in micros. overage: used or held beyond what was granted."""

    pool_id: UUID
    limit_micros: Micros
    used: Micros
    held: Micros
    overage: Micros

    @property
    def available(self) -> Micros:
        """What can still be authorized."""
        return Micros(max(0, self.limit_micros - self.used - self.held))


@dataclass(frozen=True, slots=True)
class GrantFigures:
    """A grant, in micros. remaining: of one that has not begun, what it will bring."""

    grant_id: UUID
    pool_id: UUID
    parent_grant_id: UUID | None
    schedule_id: UUID | None
    source: str
    state: str
    amount: Micros
    remaining: Micros
    burnt: Micros
    expired: Micros
    voided: Micros
    refunded: Micros
    effective_at: datetime
    expires_at: datetime | None

    @property
    def balance(self) -> Micros:
        """What it can pay now."""
        return self.remaining if self.state in ("active", "lingering") else Micros(0)


@dataclass(frozen=True, slots=True)
class LimitFigures:
    """A cap's or share's period; micros for credits, else counts."""

    balance_id: UUID
    metric: str
    period: str
    limit_amount: int
    used: int
    held: int
    overage: int
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class HoldFigures:
    """A hold that is open."""

    request_id: UUID
    held: Micros
    placed_at: datetime


@dataclass(frozen=True, slots=True)
class Figures:
    """All of it at an instant, after everything that happened at it. Grants in burn order within their pool."""

    at: datetime
    pools: tuple[PoolFigures, ...]
    grants: tuple[GrantFigures, ...]
    limits: tuple[LimitFigures, ...]
    holds: tuple[HoldFigures, ...]

    @property
    def available(self) -> Micros:
        """Over all pools."""
        return Micros(sum(pool.available for pool in self.pools))

    @property
    def overage(self) -> Micros:
        """Over all pools."""
        return Micros(sum(pool.overage for pool in self.pools))


async def grants_of(stage: Stage, names: dict[UUID, str] | None = None) -> tuple[GrantFigures, ...]:
    """The grants as they are; what came of a schedule or of another grant gets the name of that."""
    found = await db.fetch_all(stage.conn, GrantFigures, QUERIES.grant_figures, organization_id=stage.organization_id)
    if names is not None:
        for grant in found:
            _name(grant, found, names)
    return tuple(found)


def _name(grant: GrantFigures, found: Sequence[GrantFigures], names: dict[UUID, str]) -> str:
    if grant.grant_id not in names:
        parent = next((each for each in found if each.grant_id == grant.parent_grant_id), None)
        inherited = (
            _name(parent, found, names) if parent else names.get(grant.schedule_id) if grant.schedule_id else None
        )
        names[grant.grant_id] = inherited or grant.source
    return names[grant.grant_id]


async def look(stage: Stage, at: datetime, names: dict[UUID, str] | None = None) -> Figures:
    """The figures at an instant. Looking changes nothing: time events that it applies are taken back."""
    async with stage.conn.transaction(force_rollback=True):
        await stage.fetch(QUERIES.bring_up_to_date, at=at)
        own = {"organization_id": stage.organization_id}
        return Figures(
            at,
            tuple(await db.fetch_all(stage.conn, PoolFigures, QUERIES.pool_figures, **own)),
            await grants_of(stage, names),
            tuple(await db.fetch_all(stage.conn, LimitFigures, QUERIES.limit_figures, at=at, **own)),
            tuple(await db.fetch_all(stage.conn, HoldFigures, QUERIES.hold_figures, **own)),
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of time in which a pool's burn order does not change; amounts in micros.

    balance: what its grants had at its start. used: over the stretch, and of it each grant, in burn order; what no
    grant paid is overage.
    """

    pool_id: UUID
    starts_at: datetime
    ends_at: datetime
    balance: Micros
    overage_at_start: Micros
    used: Micros
    paid: tuple[tuple[UUID, Micros], ...]
    overage: Micros


def segments(start: Figures, end: Figures) -> Iterator[Segment]:
    """One for each pool, from figures after what happened at an instant to those before what happens at a later one."""
    before = {pool.pool_id: pool for pool in start.pools}
    burnt = {grant.grant_id: grant.burnt for grant in start.grants}
    for pool in end.pools:
        if pool.pool_id not in before:
            continue
        own = [grant for grant in end.grants if grant.pool_id == pool.pool_id]
        paid = ((grant.grant_id, Micros(grant.burnt - burnt.get(grant.grant_id, 0))) for grant in own)
        yield Segment(
            pool.pool_id,
            start.at,
            end.at,
            _balance(start.grants, pool.pool_id),
            before[pool.pool_id].overage,
            Micros(pool.used - before[pool.pool_id].used),
            tuple((grant_id, amount) for grant_id, amount in paid if amount),
            pool.overage,
        )


def _balance(grants: Iterable[GrantFigures], pool_id: UUID) -> Micros:
    return Micros(sum(grant.balance for grant in grants if grant.pool_id == pool_id))
