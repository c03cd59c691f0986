"""python -m benchmarks.alerts: what a look costs the database, in processor time of its backend.

The database is filled by plain inserts, as large as asked for; then looks are made of nothing, of requests spread over
all organizations, and of as many in one.
"""

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import psycopg

from bursar import db
from bursar.alerts.looking import QUERIES as LOOKS
from bursar.db.connections import role_dsn
from bursar.db.embedded import EmbeddedServer
from bursar.db.migrate import migrate

RESULT: Final = Path(__file__).parents[1] / "results" / "alerts.json"
QUERIES: Final = db.load_queries("benchmarks.alerts", "fill.sql")
MASTER_KEY: Final = bytes(32)
TICK: Final = os.sysconf("SC_CLK_TCK")
LOOKED_BACK_SECONDS: Final = 5  # two since the last look, and three before
IDS: Final = """
    create schema bench;
    create function bench.org(n integer) returns uuid language sql immutable as
        $$ select ('00000000-0000-7000-9000-' || lpad(to_hex(n), 12, '0'))::uuid $$;
    create function bench.id(o integer, n integer) returns uuid language sql immutable as
        $$ select ('00000000-' || lpad(to_hex(n + 16), 4, '0') || '-7000-a000-' || lpad(to_hex(o), 12, '0'))::uuid $$;
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--organizations", type=int, default=10_000)
    parser.add_argument("--members", type=int, default=100)
    parser.add_argument("--requests", type=int, default=5_000, help="a second")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bursar-benchmark-") as folder:
        server = EmbeddedServer(Path(folder) / "data", options={"fsync": "off", "shared_buffers": "512MB"})
        server.start()
        try:
            asyncio.run(migrate(server.dsn, MASTER_KEY))
            report(asked, measured(server, asked))
        finally:
            server.stop()


def measured(server: EmbeddedServer, asked: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of the backend's processor for each kind of look."""
    size = {"organizations": asked.organizations, "members": asked.members}
    with psycopg.connect(server.dsn, autocommit=True) as admin:
        admin.execute(IDS)
        admin.execute(QUERIES.without_guards)
        for name in QUERIES.names[1:-2]:
            began = time.monotonic()
            admin.execute(getattr(QUERIES, name), size)
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
        admin.execute("vacuum analyze")
        admin.execute(QUERIES.told)
        admin.execute("analyze alerts.reached")
        found: dict[str, Any] = {}
        with psycopg.connect(role_dsn(server.dsn, "bursar_platform", MASTER_KEY), autocommit=True) as conn:
            found["nothing happened"] = rounds(conn, asked.rounds, lambda: look(conn))
            for name, drawn_from in (("spread over all", asked.organizations), ("in one organization", 1)):
                admin.execute("set session_replication_role = replica; truncate ledger.attribution")
                requests = asked.requests * LOOKED_BACK_SECONDS
                some = {"requests": requests, "drawn_from": drawn_from, "seconds": LOOKED_BACK_SECONDS}
                admin.execute(QUERIES.requests, {**size, **some})
                admin.execute("vacuum analyze ledger.attribution")
                at = conn.execute("select max(booked_at) from ledger.attribution").fetchone()
                assert at is not None
                found[f"{asked.requests} requests/s {name}"] = rounds(
                    conn, asked.rounds, lambda at=at[0]: look(conn, at)
                )  # type: ignore[misc]
            ids = [row[0] for row in conn.execute("select organization_id from credits.gates limit 100").fetchall()]
            sweep = {"organization_ids": ids}
            found["sweep of 100 organizations"] = rounds(
                conn, asked.rounds, lambda: conn.execute(LOOKS.crossed_of_organizations, sweep).fetchall()
            )
    return found


def look(conn: psycopg.Connection, now: Any = None) -> None:
    """The query of a look, as the worker asks it."""
    with conn.transaction():
        conn.execute(LOOKS.plan_by_index)
        _look(conn, now)


def _look(conn: psycopg.Connection, now: Any) -> None:
    at = conn.execute("select coalesce(%s, clock_timestamp()) as now", [now]).fetchone()
    assert at is not None
    since = conn.execute("select %s::timestamptz - make_interval(secs => %s)", [at[0], LOOKED_BACK_SECONDS]).fetchone()
    assert since is not None
    conn.execute(LOOKS.crossed_by_use, {"since": since[0], "now": at[0]}).fetchall()
    conn.execute(LOOKS.refused_now, {"since": since[0], "now": at[0]}).fetchall()


def rounds(conn: psycopg.Connection, count: int, work: Callable[[], object]) -> dict[str, float]:
    """The median of some runs, each in processor time of the backend and by the clock."""
    work()  # what is not in memory yet
    cpu, clock = [], []
    for _ in range(count):
        before, began = ticks(conn), time.monotonic()
        work()
        cpu.append((ticks(conn) - before) * 1000 / TICK)
        clock.append((time.monotonic() - began) * 1000)
    return {"cpu_ms": statistics.median(cpu), "clock_ms": statistics.median(clock)}


def ticks(conn: psycopg.Connection) -> int:
    """Processor time that the connection's backend has used, in ticks."""
    fields = Path(f"/proc/{conn.info.backend_pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def report(asked: argparse.Namespace, found: dict[str, Any]) -> None:
    print(f"{asked.organizations} organizations with {asked.members} members each, a cap for every member")
    print(f"{'look':50} {'CPU ms':>8} {'ms':>8}")
    for name, each in found.items():
        print(f"{name:50} {each['cpu_ms']:8.0f} {each['clock_ms']:8.0f}")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"asked": vars(asked), "found": found}, indent=2))


if __name__ == "__main__":
    main()
