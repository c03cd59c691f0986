"""The past of a real organization as it is told again: who there was, what was granted and limited, what was used."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from bursar import db
from bursar.money import Micros, NanoUsd
from bursar.pricing.usage import Usage
from bursar.simulation.stage import QUERIES

PORTION: Final = 2000


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asked: user and key, with team and department as they were at the time of use."""

    user_id: UUID | None
    api_key_id: UUID | None
    team_id: UUID | None
    department_id: UUID | None


@dataclass(frozen=True, slots=True)
class PastPool:
    """A pool."""

    pool_id: UUID
    kind: str
    owner_user_id: UUID | None
    name: str
    model_filter: str | None
    created_at: datetime


@dataclass(frozen=True, slots=True)
class PastGrant:
    """A grant, and when what it had left was taken back."""

    grant_id: UUID
    pool_id: UUID
    source: str
    amount_micros: Micros
    priority: int
    is_free: bool
    cost_basis_nano_usd: NanoUsd
    effective_at: datetime | None
    expires_at: datetime | None
    reason: str | None
    created_at: datetime
    least: Micros | None
    most: Micros | None
    rollover_expires_at: datetime | None
    voided_at: datetime | None


@dataclass(frozen=True, slots=True)
class PastAllocation:
    """A share, with the size that it has now."""

    allocation_id: UUID
    pool_id: UUID
    user_id: UUID
    kind: str
    period: str
    amount_micros: Micros
    carry_micros: Micros
    when_empty: str
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class PastLimit:
    """A cap, with the amount that it has now; amount None: somebody is excepted."""

    limit_id: UUID
    scope: str
    scope_id: UUID | None
    metric: str
    model_filter: str | None
    period: str
    amount: int | None
    action: str
    is_default: bool
    within_scope: str | None
    within_id: UUID | None
    created_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class PastSum:
    """What one asker used on one model on one day."""

    booked_at: datetime
    user_id: UUID | None
    api_key_id: UUID | None
    team_id: UUID | None
    department_id: UUID | None
    model: str | None
    feature: str | None
    charged: Micros

    @property
    def asker(self) -> Asker:
        return Asker(self.user_id, self.api_key_id, self.team_id, self.department_id)


@dataclass(frozen=True, slots=True)
class PastRequest:
    """A request that was charged, corrections included."""

    request_id: UUID
    booked_at: datetime
    used_at: datetime
    asker: Asker
    provider: str | None
    model: str | None
    feature: str | None
    charged: Micros
    flags: int
    usage: Usage


@dataclass(frozen=True, slots=True)
class PastRefusal:
    """A request that was refused, and what it would have held."""

    request_id: UUID
    happened_at: datetime
    user_id: UUID | None
    api_key_id: UUID | None
    model: str | None
    feature: str | None
    wanted_micros: Micros


@dataclass(frozen=True, slots=True)
class _Organization:
    zone: str
    anchored_at: datetime
    month_start: datetime


@dataclass(frozen=True, slots=True)
class _Correction:
    request_id: UUID
    charged: Micros


@dataclass(frozen=True, slots=True)
class _Kind:
    kind: str


@dataclass(frozen=True, slots=True)
class _Rotated:
    id: UUID
    original: UUID


@dataclass(frozen=True, slots=True)
class _Named:
    id: UUID
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """Everything but the requests. told_from: from here on they are told one by one; before, in sums of days.

    originals: of keys that others were rotated to, the first. untold: what happened besides and is not told again.
    """

    organization_id: UUID
    since: datetime
    until: datetime
    told_from: datetime
    zone: str
    anchored_at: datetime
    names: dict[UUID, str]
    originals: dict[UUID, UUID]
    askers: tuple[Asker, ...]
    pools: tuple[PastPool, ...]
    grants: tuple[PastGrant, ...]
    allocations: tuple[PastAllocation, ...]
    limits: tuple[PastLimit, ...]
    sums: tuple[PastSum, ...]
    refusals: tuple[PastRefusal, ...]
    corrections: dict[UUID, Micros]
    untold: tuple[str, ...]


async def read_past(conn: db.Connection, *, organization_id: UUID, since: datetime, until: datetime) -> Past:
    """Read what is told again. conn: as bursar_platform."""
    span = {"organization_id": organization_id, "since": since, "until": until}
    own = await db.fetch_one(conn, _Organization, QUERIES.past_organization, **span)
    told_from = min(since, own.month_start)
    people = await db.fetch_all(conn, _Named, QUERIES.past_people, **span)
    rotated = await db.fetch_all(conn, _Rotated, QUERIES.past_rotations, **span)
    corrections = await db.fetch_all(conn, _Correction, QUERIES.past_corrections, told_from=told_from, **span)
    sums = await db.fetch_all(conn, PastSum, QUERIES.past_sums, told_from=told_from, zone=own.zone, **span)
    return Past(
        organization_id=organization_id,
        since=since,
        until=until,
        told_from=told_from,
        zone=own.zone,
        anchored_at=own.anchored_at,
        names={each.id: each.name for each in people},
        originals={each.id: each.original for each in rotated},
        askers=tuple(await db.fetch_all(conn, Asker, QUERIES.past_askers, **span)),
        pools=tuple(await db.fetch_all(conn, PastPool, QUERIES.past_pools, **span)),
        grants=tuple(await db.fetch_all(conn, PastGrant, QUERIES.past_grants, **span)),
        allocations=tuple(await db.fetch_all(conn, PastAllocation, QUERIES.past_allocations, **span)),
        limits=tuple(await db.fetch_all(conn, PastLimit, QUERIES.past_limits, **span)),
        sums=tuple(sums),
        refusals=tuple(await db.fetch_all(conn, PastRefusal, QUERIES.past_refusals, **span)),
        corrections={each.request_id: each.charged for each in corrections},
        untold=tuple(each.kind for each in await db.fetch_all(conn, _Kind, QUERIES.past_movements, **span)),
    )


async def requests_of(conn: db.Connection, past: Past) -> AsyncIterator[PastRequest]:
    """Every charged request from `told_from` on, in the order in which they were booked. conn: as bursar_platform."""
    params = {"organization_id": past.organization_id, "told_from": past.told_from, "until": past.until}
    async with conn.cursor(name="past_requests") as cursor:
        cursor.itersize = PORTION
        await cursor.execute(QUERIES.past_requests, params)
        async for row in cursor:
            charged = max(0, row[10] + past.corrections.get(row[0], 0))
            asker, usage = Asker(*row[3:7]), Usage(*row[12:])
            yield PastRequest(row[0], row[1], row[2], asker, row[7], row[8], row[9], Micros(charged), row[11], usage)
