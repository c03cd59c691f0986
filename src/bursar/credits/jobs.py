"""Periodic work of the treasury: holds that end by themselves, partitions ahead of time, gauges. No rules here."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import psycopg
from prometheus_client import Gauge

from bursar import db
from bursar.credits.codes import finish_redemptions, forget_tries
from bursar.credits.top_ups import top_up_pools

QUERIES: Final = db.load_queries("bursar.credits")
MOST_A_RUN: Final = 500
MONTHS_AHEAD: Final = 3

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
    """End every hold whose lease is over; returns how many."""
    ended = 0
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_lane"), autocommit=True) as conn:
        while True:
            some = int(await db.fetch_value(conn, QUERIES.expire_holds, most=MOST_A_RUN))
            ended += some
            if some < MOST_A_RUN:
                return ended


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


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = (
    (1.0, expire_holds),
    (15.0, measure_holds),
    (5.0, top_up_pools),
    (60.0, finish_redemptions),
    (3600.0, forget_tries),
    (3600.0, ensure_partitions),
)
"""Seconds between runs, and what runs."""
