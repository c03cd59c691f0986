"""Periodic work of the treasury: ends of holds and stored results, partitions ahead, verification, gauges. No rules."""

from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

import psycopg
import structlog
from prometheus_client import Gauge
from psycopg.types.json import Jsonb

from bursar import db
from bursar.audit import jobs as audit_jobs
from bursar.audit.findings import Finding
from bursar.credits.codes import finish_redemptions, forget_tries
from bursar.credits.moving import finish_moves
from bursar.credits.top_ups import top_up_pools
from bursar.credits.verify import verify_in_turn

log = structlog.get_logger(__name__)
AUDIT: Final = db.load_queries("bursar.audit")
QUERIES: Final = db.load_queries("bursar.credits")
MOST_A_RUN: Final = 500
MONTHS_AHEAD: Final = 3
FORGET_LOCK: Final = 0x6275_7273_0005
FORGOTTEN_AT_ONCE: Final = 500

OPEN_HOLDS = Gauge("bursar_open_holds", "Holds of requests that are running")
HELD_MICROS = Gauge("bursar_held_micros", "Micros that open holds reserve")
OLDEST_HOLD = Gauge("bursar_oldest_hold_seconds", "Age of the oldest open hold of a call, batches aside")


@dataclass(frozen=True, slots=True)
class OpenHolds:
    """All open holds together."""

    holds: int
    held_micros: int
    oldest_seconds: int | None


async def expire_holds(database: db.Database) -> int:
    """End every hold whose lease is over; returns how many. An organization whose holds cannot be ended keeps no other
    waiting: where a run fails, each is asked by itself, and its fault is raised in the end.
    """
    ended = 0
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_lane"), autocommit=True) as conn:
        while True:
            try:
                some = int(await db.fetch_value(conn, QUERIES.expire_holds, most=MOST_A_RUN))
            except psycopg.OperationalError:
                raise
            except psycopg.Error:
                return ended + await _expire_one_by_one(database, conn)
            ended += some
            if some < MOST_A_RUN:
                return ended


async def _expire_one_by_one(database: db.Database, conn: db.Connection) -> int:
    async with database.platform() as reading:
        organization_ids = await db.fetch_values(reading, QUERIES.with_holds_to_expire)
    ended, fault = 0, None
    for organization_id in organization_ids:
        try:
            ended += int(await db.fetch_value(conn, QUERIES.expire_holds_of, organization_id=organization_id))
        except psycopg.OperationalError:
            raise
        except psycopg.Error as error:
            fault = error
    if fault is not None:
        raise fault
    return ended


async def forget_commands(database: db.Database) -> int:
    """End stored results of commands that nobody may ask for any more; returns how many."""
    async with audit_jobs.alone(database, FORGET_LOCK) as is_mine:
        if not is_mine:
            return 0
        async with database.platform() as conn:
            organization_ids = await db.fetch_values(conn, QUERIES.with_commands_to_forget)
        return await audit_jobs.in_turn(organization_ids, lambda each: _forget_commands_of(database, each))


async def _forget_commands_of(database: db.Database, organization_id: UUID) -> int:
    given = {"organization_id": organization_id, "most": FORGOTTEN_AT_ONCE}
    gone = 0
    while True:  # a few in each transaction, so that nobody waits for long
        async with database.tenant(organization_id) as conn:
            some = int(await db.fetch_value(conn, QUERIES.forget_commands, **given))
        gone += some
        if some < FORGOTTEN_AT_ONCE:
            return gone


async def ensure_partitions(database: db.Database) -> None:
    """The attribution has a partition for this month and the next ones."""
    async with database.platform() as conn:
        await db.execute(conn, QUERIES.ensure_partitions, months=MONTHS_AHEAD)


async def measure_holds(database: db.Database) -> None:
    """Set the gauges."""
    async with database.platform() as conn:
        found = await db.fetch_one(conn, OpenHolds, QUERIES.open_holds)
    OPEN_HOLDS.set(found.holds)
    HELD_MICROS.set(found.held_micros)
    OLDEST_HOLD.set(found.oldest_seconds or 0)


VERIFY_LOOK_SECONDS: Final = 60.0
VERIFY_LOCK: Final = 0x6275_7273_0003
MOST_KEPT: Final = 100

DIFFERENCES = Gauge("bursar_verify_differences", "Differences that the last verification of all books found")
VERIFIED_AT = Gauge("bursar_verify_finished_timestamp_seconds", "When the last verification of all books ended")
VERIFY_SECONDS = Gauge("bursar_verify_seconds", "How long it took")


@dataclass(frozen=True, slots=True)
class Verification:
    """The last one."""

    started_at: datetime
    finished_at: datetime
    organizations: int
    differences: int


@dataclass(frozen=True, slots=True)
class _Since:
    """Start of the last verification, or of the database. at: now."""

    started_at: datetime
    at: datetime


async def verify_when_due(database: db.Database) -> bool:
    """Verify everything, slowly, where the last time is long ago; returns whether it was."""
    hours = database.settings.verify_hours
    async with audit_jobs.alone(database, VERIFY_LOCK) as is_mine:
        if not (is_mine and hours and await _is_due(database, timedelta(hours=hours))):
            return False
        async with database.platform() as conn:
            started_at = await db.fetch_value(conn, "select clock_timestamp()")
        organizations, findings = 0, 0
        kept: list[Finding] = []
        async for _, found in verify_in_turn(database):
            organizations += 1
            findings += len(found)
            kept += found[: MOST_KEPT - len(kept)]
            for each in found:
                log.error("the books do not agree", **asdict(each))
        async with database.platform() as conn:
            await db.execute(
                conn,
                AUDIT.add_verification,
                started_at=started_at,
                organizations=organizations,
                differences=findings,
                findings=Jsonb([{**asdict(each), "organization_id": str(each.organization_id)} for each in kept]),
            )
    await measure_verification(database)
    return True


async def _is_due(database: db.Database, every: timedelta) -> bool:
    async with database.platform() as conn:
        since = await db.fetch_one(conn, _Since, AUDIT.verified_since)
    return since.at >= since.started_at + every


async def measure_verification(database: db.Database) -> None:
    """Set the gauges from what the last verification, in whichever process, has found."""
    async with database.platform() as conn:
        last = await db.fetch_optional(conn, Verification, AUDIT.last_verification)
    if last is not None:
        DIFFERENCES.set(last.differences)
        VERIFIED_AT.set(last.finished_at.timestamp())
        VERIFY_SECONDS.set((last.finished_at - last.started_at).total_seconds())


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = (
    (1.0, expire_holds),
    (15.0, measure_holds),
    (5.0, top_up_pools),
    (60.0, finish_redemptions),
    (60.0, finish_moves),
    (3600.0, forget_tries),
    (3600.0, forget_commands),
    (3600.0, ensure_partitions),
    (VERIFY_LOOK_SECONDS, verify_when_due),
    (15.0, measure_verification),
)
"""Seconds between runs, and what runs."""
