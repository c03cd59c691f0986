"""The server's work alone: move_batch against the row writes that no batch of deductions can avoid.

One connection, arguments ready beforehand, only the call is timed, with its commit. The floor is one UPDATE of the
summed balance rows and one INSERT of the attribution rows in one transaction: same tables, columns, indexes.
"""

import struct
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import postgres

from benchmarks.hotpath.books import QUERIES, Payer, shuffled
from benchmarks.hotpath.contenders import AMOUNT, COST, MODEL, PROVIDER, USAGE, deduction
from bursar.clock import uuid7
from bursar.credits.moves import MOVE_BATCH, as_arguments
from bursar.db import arrays

BATCH: Final = 128
WARM_UP_CALLS: Final = 8
LEAST_CALLS: Final = 10

# Statement and arguments of the next call, made outside the time that counts.
Ready = Callable[[], tuple[str, list[Any]]]


@dataclass(frozen=True, slots=True)
class Chain:
    """What a payer's requests pass, as move_batch found it.

    balances: (balance id, start of its period in microseconds since 2000, the least integer for none).
    """

    chain_id: UUID
    pool_id: UUID
    balances: tuple[tuple[UUID, int], ...]


def chains_of(admin_dsn: str) -> dict[UUID, Chain]:
    """Chains by user; whoever was charged once has one."""
    with psycopg.connect(admin_dsn) as conn:
        rows = conn.execute(QUERIES.chains).fetchall()
    return {user: Chain(chain, pool, tuple(zip(ids, starts, strict=True))) for user, chain, pool, ids, starts in rows}


def batches(payers: Sequence[Payer], size: int) -> Ready:
    """One move_batch after the other."""
    drawn = shuffled(payers, 3)
    return lambda: (MOVE_BATCH, as_arguments([deduction(payer) for payer in islice(drawn, size)]))


def floors(payers: Sequence[Payer], size: int, chains: dict[UUID, Chain]) -> Ready:
    """One floor after the other, for the same payers."""
    drawn = shuffled(payers, 3)
    return lambda: (QUERIES.write_floor, floor_arguments(list(islice(drawn, size)), chains))


def floor_arguments(payers: Sequence[Payer], chains: dict[UUID, Chain]) -> list[Any]:
    """The rows that move_batch would write for these payers, the balances summed."""
    found = [chains[payer.user_id] for payer in payers]
    sums: Counter[tuple[UUID, UUID, int]] = Counter()
    for payer, chain in zip(payers, found, strict=True):
        for balance_id, start in chain.balances:
            sums[payer.organization_id, balance_id, start] += AMOUNT
    touched = sorted(sums)
    n = len(payers)
    return [
        arrays.uuids([payer.organization_id for payer in payers]),
        arrays.uuids([uuid7() for _ in payers]),
        arrays.uuids([payer.user_id for payer in payers]),
        arrays.uuids([payer.api_key_id for payer in payers]),
        arrays.uuids([chain.chain_id for chain in found]),
        arrays.uuids([chain.pool_id for chain in found]),
        arrays.int8s([place * AMOUNT for place in range(n)]),
        arrays.int8s([AMOUNT] * n),
        arrays.int8s([COST] * n),
        arrays.int4s(list(USAGE) * n),
        arrays.texts([PROVIDER] * n),
        arrays.texts([MODEL] * n),
        arrays.uuids([org for org, _, _ in touched]),
        arrays.uuids([balance for _, balance, _ in touched]),
        _instants([start for _, _, start in touched]),
        arrays.int8s([sums[each] for each in touched]),
    ]


def _instants(microseconds: Sequence[int]) -> arrays.TimestamptzArray:
    """timestamptz[] of the wire's own numbers, as Python has no -infinity: a bigint[] under another name."""
    data = arrays.int8s(microseconds).data
    assert data is not None
    return arrays.TimestamptzArray(data[:8] + struct.pack(">i", postgres.types["timestamptz"].oid) + data[12:])


def interleaved(
    dsns: dict[str, str], readies: dict[str, Ready], *, size: int, rounds: int, seconds: float, durable: bool
) -> dict[str, list[float]]:
    """Requests per second of each, once per round in turn; seconds: of one in all rounds."""
    connections = {name: _connect(dsn, durable) for name, dsn in dsns.items()}
    try:
        for name, ready in readies.items():
            for _ in range(WARM_UP_CALLS):
                _timed(connections[name], ready)
        rates: dict[str, list[float]] = {name: [] for name in readies}
        for _ in range(rounds):
            for name, ready in readies.items():
                rates[name].append(_rate(connections[name], ready, size, seconds / rounds))
        return rates
    finally:
        for connection in connections.values():
            connection.close()


def _connect(dsn: str, durable: bool) -> psycopg.Connection[tuple[Any, ...]]:
    connection = psycopg.connect(dsn, autocommit=True)
    connection.execute(f"set synchronous_commit = {'on' if durable else 'off'}")
    arrays.register(connection)
    return connection


def _rate(connection: psycopg.Connection[tuple[Any, ...]], ready: Ready, size: int, seconds: float) -> float:
    took = 0.0
    calls = 0
    while took < seconds or calls < LEAST_CALLS:
        took += _timed(connection, ready)
        calls += 1
    return calls * size / took


def _timed(connection: psycopg.Connection[tuple[Any, ...]], ready: Ready) -> float:
    """Seconds of one call with its commit."""
    statement, arguments = ready()
    cursor = connection.cursor(binary=True)
    began = time.perf_counter()
    cursor.execute(statement, arguments, prepare=True)
    return time.perf_counter() - began
