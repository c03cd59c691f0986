"""Periodic work of the audit: seals every minute, anchors every ten, and how far they are. No rules here."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Final
from uuid import UUID

import psycopg
from prometheus_client import Counter, Gauge

from bursar import db
from bursar.audit import anchors, seals

QUERIES: Final = db.load_queries("bursar.audit")
SEAL_SECONDS: Final = 60.0

SEAL_LAG = Gauge("bursar_seal_lag_seconds", "Time since the newest rows were sealed")
SEALED_ROWS = Counter("bursar_sealed_rows_total", "Rows that became part of a seal")
ANCHORED = Counter("bursar_anchors_total", "Anchors that were kept outside the database")


@asynccontextmanager
async def alone(database: db.Database, key: int) -> AsyncIterator[bool]:
    """True for one process at a time; the others come back later. Nothing depends on it but that work is done once."""
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_platform"), autocommit=True) as conn:
        yield bool(await db.fetch_value(conn, QUERIES.try_lock, key=key))


async def in_turn(organization_ids: Sequence[UUID], work: Callable[[UUID], Awaitable[int]]) -> int:
    """Do this for one organization after the other; returns the sum of its counts.

    Raises:
        ExceptionGroup: what was wrong in some, which keeps no other waiting.
    """
    done, faults = 0, []
    for organization_id in organization_ids:
        try:
            done += await work(organization_id)
        except Exception as error:
            error.add_note(f"in the organization {organization_id}")
            faults.append(error)
    if faults:
        raise ExceptionGroup("not done in every organization", faults)
    return done


async def seal(database: db.Database) -> None:
    """Seal what is new."""
    async with alone(database, 0x6275_7273_0001) as is_mine:
        if is_mine:
            async with database.platform() as conn:
                done = await seals.seal(conn)
            SEALED_ROWS.inc(done.rows)


async def anchor(database: db.Database) -> None:
    """Keep an anchor where one is due."""
    async with alone(database, 0x6275_7273_0002) as is_mine:
        if is_mine:
            ANCHORED.inc(len(await anchors.anchor(database)))


async def measure_seals(database: db.Database) -> None:
    """Set the gauges."""
    async with database.platform() as conn:
        SEAL_LAG.set(await db.fetch_value(conn, QUERIES.sealing_lag))


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = (
    (SEAL_SECONDS, seal),
    (anchors.SECONDS / 10, anchor),
    (15.0, measure_seals),
)
"""Seconds between runs, and what runs."""
