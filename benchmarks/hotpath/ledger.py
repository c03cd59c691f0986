"""A ledger that is full already: attribution rows of the benchmark's organizations, written without deciding anything.

They charge nothing, so that the books still agree, and are as wide as real ones. They stand in the partition that the
benchmark writes to, spread over its organizations, so that indexes are as deep as after as many requests.
"""

import time
from typing import Final

import psycopg

from benchmarks.hotpath.books import QUERIES

AT_ONCE: Final = 250_000


def fill(admin_dsn: str, rows: int) -> float:
    """Write so many rows; seconds it took, the vacuum afterwards not counted."""
    began = time.perf_counter()
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute("set synchronous_commit = off")
        for first in range(0, rows, AT_ONCE):
            conn.execute(QUERIES.fill_ledger, {"first": first, "last": min(rows, first + AT_ONCE) - 1, "rows": rows})
        took = time.perf_counter() - began
        conn.execute("vacuum (analyze) ledger.attribution")
        conn.execute("checkpoint")
    return took
