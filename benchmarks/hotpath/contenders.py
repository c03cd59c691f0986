"""Who deducts: our batcher, our function once per request, a function written for it, an application's transaction."""

import itertools
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import psycopg
from psycopg_pool import AsyncConnectionPool

from benchmarks.hotpath.books import QUERIES, Payer, shuffled
from benchmarks.hotpath.pace import Call
from bursar.clock import uuid7
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action, Move, as_call, as_verdicts
from bursar.db import arrays
from bursar.money import Micros, NanoUsd

AMOUNT: Final = Micros(1_234)
COST: Final = NanoUsd(12_340)
USAGE: Final = (120, 0, 0, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
PROVIDER: Final = "openai"
MODEL: Final = "gpt-4o-mini"
Connection = psycopg.AsyncConnection[tuple[Any, ...]]
Pool = AsyncConnectionPool[Connection]


def deduction(payer: Payer) -> Move:
    """One deduction as the gateway would ask for it."""
    return Move(
        Action.DEDUCT,
        payer.organization_id,
        uuid7(),
        payer.user_id,
        payer.api_key_id,
        AMOUNT,
        cost_nano_usd=COST,
        usage=USAGE,
        provider=PROVIDER,
        model=MODEL,
    )


def by_batcher(batcher: Batcher, payers: Sequence[Payer], *, refused: Sequence[Payer] = (), share: float = 0) -> Call:
    """Deductions through our batcher. share: of the calls that come from `refused` payers, evenly strewn."""
    drawn = shuffled(payers, 1)
    if refused:
        every = round(1 / share)
        poor, rich = shuffled(refused, 2), drawn
        drawn = (next(poor) if n % every == 0 else next(rich) for n in itertools.count())

    async def call(_: int) -> bool:
        return (await batcher.move(deduction(next(drawn)))).accepted

    return call


def by_hold(batcher: Batcher, payers: Sequence[Payer]) -> Call:
    """A hold, then its settle at a little less; one charge."""
    drawn = shuffled(payers, 1)

    async def call(_: int) -> bool:
        payer = next(drawn)
        request_id = uuid7()
        key = (payer.organization_id, request_id, payer.user_id, payer.api_key_id)
        hold = Move(Action.AUTHORIZE, *key, Micros(2 * AMOUNT), lease_seconds=60, provider=PROVIDER, model=MODEL)
        assert (await batcher.move(hold)).accepted
        settle = Move(Action.SETTLE, *key, AMOUNT, cost_nano_usd=COST, usage=USAGE, provider=PROVIDER, model=MODEL)
        return (await batcher.move(settle)).accepted

    return call


@asynccontextmanager
async def connections(dsn: str, size: int, *, name: str = "pool") -> AsyncIterator[Pool]:
    """A pool as an application has one, all connections made, which the server knows by `name`."""

    async def configure(connection: Connection) -> None:
        arrays.register(connection)

    async with AsyncConnectionPool(
        dsn,
        min_size=size,
        max_size=size,
        configure=configure,
        kwargs={"autocommit": True, "application_name": name},
        timeout=120,
    ) as pool:
        await pool.wait()
        yield pool


def one_by_one(pool: Pool, payers: Sequence[Payer]) -> Call:
    """Our own function, called once per request."""
    drawn = shuffled(payers, 1)

    async def call(_: int) -> bool:
        move = deduction(next(drawn))
        async with pool.connection() as connection:
            cursor = connection.cursor(binary=True)
            await cursor.execute(*as_call([move]), prepare=True)
            return as_verdicts(await cursor.fetchall())[0].accepted

    return call


def _row(payer: Payer) -> dict[str, Any]:
    return {
        "organization_id": payer.organization_id,
        "request_id": uuid7(),
        "user_id": payer.user_id,
        "api_key_id": payer.api_key_id,
        "balance_ids": payer.balance_ids,
        "provider": PROVIDER,
        "model": MODEL,
        "micros": AMOUNT,
        "cost": COST,
        "input": USAGE[0],
        "output": USAGE[4],
    }


def by_function(pool: Pool, payers: Sequence[Payer]) -> Call:
    """One call per request of a function written for just this."""
    drawn = shuffled(payers, 1)

    async def call(_: int) -> bool:
        async with pool.connection() as connection:
            await connection.execute(QUERIES.deduct, _row(next(drawn)), prepare=True)
        return True

    return call


def by_transaction(pool: Pool, payers: Sequence[Payer]) -> Call:
    """A transaction in the application: lock the rows, look, insert, update, commit."""
    drawn = shuffled(payers, 1)

    async def call(_: int) -> bool:
        row = _row(next(drawn))
        async with pool.connection() as connection, connection.transaction():
            found = await (await connection.execute(QUERIES.lock_balances, row)).fetchall()
            if any(used + row["micros"] > limit for _, limit, used in found):
                return False
            await connection.execute(QUERIES.insert_usage, row)
            await connection.execute(QUERIES.take, row)
        return True

    return call
