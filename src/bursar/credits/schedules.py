"""Schedules: grants that come again every so many days, weeks, months or years, each a grant of its own."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.credits.grants import USUAL_PRIORITY, GrantSource, require_given
from bursar.money import Micros, NanoUsd

QUERIES: Final = db.load_queries("bursar.credits")


class Unit(StrEnum):
    """What a schedule counts by."""

    DAY = "day"
    WEEK = "week"
    MONTH = "month"
    YEAR = "year"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A schedule. anchor: the occurrence that all others are counted from, by the clocks of `zone`; next_at None: it
    has ended. Each grant ends when the next one comes or after its own time, never where `is_lasting`.
    """

    schedule_id: UUID
    pool_id: UUID
    source: GrantSource
    amount_micros: Micros
    unit: Unit
    every: int
    zone: str
    anchor_at: datetime
    is_lasting: bool
    min_rollover_micros: Micros | None
    max_rollover_micros: Micros | None
    next_at: datetime | None
    ends_at: datetime | None
    reason: str | None


async def add_schedule(
    conn: db.Connection,
    *,
    organization_id: UUID,
    pool_id: UUID,
    amount_micros: Micros,
    source: GrantSource,
    unit: Unit,
    zone: str,
    by: Actor,
    idempotency_key: str,
    every: int = 1,
    anchor_at: datetime | None = None,
    lasts: str | None = None,
    is_lasting: bool = False,
    ends_at: datetime | None = None,
    min_rollover_micros: Micros | None = None,
    max_rollover_micros: Micros | None = None,
    priority: int = USUAL_PRIORITY,
    is_free: bool = False,
    cost_basis_nano_usd: NanoUsd = NanoUsd(0),  # noqa: B008 - an int
    reason: str | None = None,
) -> UUID:
    """Grant credits again and again, from the first occurrence that is not past. Returns the schedule's id.

    anchor_at: an occurrence, past or to come; None: now. lasts: an interval such as '10 days'.

    Raises:
        NotFound: no such open pool. InvalidGrant: it makes no sense. KeyReused: another body.
    """
    require_given(source)
    schedule_id = await db.fetch_value(
        conn,
        QUERIES.add_schedule,
        organization_id=organization_id,
        schedule_id=uuid7(),
        pool_id=pool_id,
        source=source,
        amount_micros=amount_micros,
        priority=priority,
        is_free=is_free,
        cost_basis_nano_usd=cost_basis_nano_usd,
        zone=zone,
        anchor_at=anchor_at,
        unit=unit,
        every=every,
        lasts=lasts,
        is_lasting=is_lasting,
        ends_at=ends_at,
        min_rollover_micros=min_rollover_micros,
        max_rollover_micros=max_rollover_micros,
        reason=reason,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    assert isinstance(schedule_id, UUID)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="schedule.added",
        object_id=schedule_id,
        new={"pool_id": pool_id, "amount_micros": amount_micros, "unit": unit, "every": every},
        reason=reason,
    )
    return schedule_id


async def cancel_schedule(conn: db.Connection, *, organization_id: UUID, schedule_id: UUID, by: Actor) -> None:
    """No occurrence from now on; what was granted stays. Calling again changes nothing.

    Raises:
        NotFound: no such schedule.
    """
    await db.execute(conn, QUERIES.cancel_schedule, organization_id=organization_id, schedule_id=schedule_id)
    await record(conn, organization_id=organization_id, by=by, action="schedule.canceled", object_id=schedule_id)


async def list_schedules(conn: db.Connection, *, organization_id: UUID) -> list[Schedule]:
    """Every schedule, those that go on first."""
    return await db.fetch_all(conn, Schedule, QUERIES.schedules, organization_id=organization_id)
