"""pgledger, a double-entry ledger in PostgreSQL, from a checkout: its transfers beside our deductions.

One transfer is one deduction: from the pool's account, which may not become negative, to that of the user who spent.
"""

import random
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo

from benchmarks.hotpath.books import QUERIES
from benchmarks.hotpath.contenders import AMOUNT, Pool
from benchmarks.hotpath.pace import Call

FILES: Final = (
    "vendor/scoville-pgsql-ulid/ulid-to-uuid.sql",
    "vendor/scoville-pgsql-ulid/uuid-to-ulid.sql",
    "pgledger.sql",
)
SCHEMA: Final = "pgledger"
FUNDS: Final = Decimal(10**12)


def install(admin_dsn: str, checkout: Path) -> str:
    """Its tables and functions in a schema of their own; the DSN that finds them."""
    dsn = make_conninfo(admin_dsn, options=f"-c search_path={SCHEMA}")
    with psycopg.connect(dsn) as conn:
        conn.execute(f"create schema {SCHEMA}")
        for name in FILES:
            conn.execute((checkout / name).read_bytes())
    return dsn


def open_accounts(dsn: str, users: Sequence[UUID]) -> tuple[str, list[str]]:
    """The pool's account, with plenty in it, and one for each user."""
    with psycopg.connect(dsn) as conn:

        def opened(name: str, *, may_be_negative: bool) -> str:
            row = conn.execute(QUERIES.pgledger_account, {"name": name, "may_be_negative": may_be_negative}).fetchone()
            assert row is not None
            return str(row[0])

        bank, pool = opened("bank", may_be_negative=True), opened("pool", may_be_negative=False)
        conn.execute(QUERIES.pgledger_transfer, {"payer": bank, "taker": pool, "amount": FUNDS})
        return pool, [opened(str(user), may_be_negative=False) for user in users]


def by_transfer(pool: Pool, payer: str, takers: Sequence[str]) -> Call:
    """One transfer per request."""
    draw = random.Random(1)
    amount = Decimal(AMOUNT) / 10**6

    async def call(_: int) -> bool:
        values = {"payer": payer, "taker": draw.choice(takers), "amount": amount}
        async with pool.connection() as connection:
            await connection.execute(QUERIES.pgledger_transfer, values, prepare=True)
        return True

    return call
