"""Many moves of one organization: held all or not at all, and booked in portions that may be repeated at any point."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import psycopg

from bursar import db
from bursar.credits.moves import MOVE_BATCH, Action, Move, Outcome, Verdict, as_arguments, as_verdicts
from bursar.db import arrays

QUERIES: Final = db.load_queries("bursar.credits")
PORTION: Final = 500
"""Moves in one transaction where they need not be decided together: nobody waits long for the gate."""


@asynccontextmanager
async def lane(database: db.Database) -> AsyncIterator[db.Connection]:
    """A lane's connection of one's own, so that calls that wait for the shared lanes do not wait for many moves."""
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_lane"), autocommit=True) as conn:
        arrays.register(conn)
        yield conn


async def refusal_of(conn: db.Connection, sums: Sequence[Move]) -> Verdict | None:
    """Would these be refused? The first refusal, which stays recorded; of what was accepted nothing stays.

    conn: from `lane`. A few moves that stand for many: where even their sums have no room it is known at once.
    """
    async with conn.transaction():
        verdicts = await _decide(conn, sums)
        refused = _first_refused(verdicts)
        if refused is None:
            raise psycopg.Rollback
        accepted = [move for move, verdict in zip(sums, verdicts, strict=True) if verdict.accepted]
        if accepted:
            await _decide(conn, [move._replace(action=Action.RELEASE) for move in accepted])
    return refused


async def authorize_all(conn: db.Connection, moves: Sequence[Move]) -> Verdict | None:
    """Hold all of them in one transaction; or hold nothing and give the first refusal. conn: from `lane`."""
    async with conn.transaction():
        refused = _first_refused(await _decide(conn, moves))
        if refused is not None:
            raise psycopg.Rollback
    return refused


def _first_refused(verdicts: Sequence[Verdict]) -> Verdict | None:
    return next((verdict for verdict in verdicts if not verdict.accepted), None)


async def book(conn: db.Connection, moves: Sequence[Move]) -> list[Verdict]:
    """Decide moves in portions, each committed for itself; what was booked before is known. conn: from `lane`."""
    verdicts: list[Verdict] = []
    for start in range(0, len(moves), PORTION):
        verdicts += await _decide(conn, moves[start : start + PORTION])
    return verdicts


async def free(database: db.Database, conn: db.Connection, moves: Sequence[Move]) -> None:
    """Release holds of requests that came to nothing; what expiry charged for one by estimate comes back.

    conn: from `lane`. moves: releases of one organization.
    """
    verdicts = await book(conn, moves)
    gone = {
        verdict.request_id: move
        for move, verdict in zip(moves, verdicts, strict=True)
        if verdict.outcome == Outcome.NO_HOLD
    }
    if not gone:
        return
    async with database.tenant(moves[0].organization_id) as tenant, tenant.cursor() as cursor:
        await cursor.execute(QUERIES.estimated_requests, {"request_ids": list(gone)})
        charged = [gone[row[0]] for row in await cursor.fetchall()]
    # A correction down to nothing.
    nothing = (0,) * len(moves[0].usage)
    await book(conn, [move._replace(action=Action.SETTLE, usage=nothing) for move in charged])


async def _decide(conn: db.Connection, moves: Sequence[Move]) -> list[Verdict]:
    # Tens of thousands take long to pack; the calls of others go on meanwhile.
    many = len(moves) > PORTION
    arguments = await asyncio.to_thread(as_arguments, moves) if many else as_arguments(moves)
    async with conn.cursor(binary=True) as cursor:
        await cursor.execute(MOVE_BATCH, arguments)
        rows = await cursor.fetchall()
    return await asyncio.to_thread(as_verdicts, rows) if many else as_verdicts(rows)
