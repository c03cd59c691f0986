"""python -m benchmarks.hotpath"""

import argparse
import asyncio
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import psycopg
import uvloop

from benchmarks.hotpath import books, caps, groups, http, pgledger, report
from benchmarks.hotpath.groups import Plan, Server
from bursar.db.connections import role_dsn
from bursar.db.embedded import EmbeddedServer
from bursar.db.migrate import migrate

RESULT: Final = Path(__file__).parents[1] / "results" / "hotpath.json"
SCHEMA: Final = Path(__file__).with_name("schema.sql")
USERS: Final = 100
EXHAUSTED: Final = 5
DURABLE: Final = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
MASTER_KEY: Final = bytes(32)
FULL_LEDGER: Final = 10_000_000


def main() -> None:
    plan = _plan()
    with tempfile.TemporaryDirectory(prefix="bursar-hotpath-") as name:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the server runs as another user
        with _server(folder) as server:
            if plan.only_caps:
                rows = _with_caps(plan, server)
                about = _about(plan, server)
                with http.served(folder / "site", members=USERS) as site:
                    rows += uvloop.run(groups.caps_over_http(plan, site))
                report.show(rows, about)
                return
            print(f"opening {plan.organizations:,} organizations …", flush=True)
            ready = books.open_books(
                server.admin, server.simulator, users=USERS, exhausted=EXHAUSTED, organizations=plan.organizations
            )
            ledger = _pgledger(plan, server, ready)
            rows = uvloop.run(groups.callers(plan, server, ready, ledger))
            rows += groups.floors(plan, server, ready)
            rows += _with_caps(plan, server)
            if plan.filled:
                rows += groups.filled(plan, server, ready)
            about = _about(plan, server)
        with http.served(folder / "site", members=USERS) as site:
            rows += uvloop.run(groups.over_http(plan, site))
            rows += uvloop.run(groups.caps_over_http(plan, site))
    report.show(rows, about)
    report.write(RESULT, rows, about)
    print(f"written to {RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT}")


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hotpath", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6, help="of each case, over all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=128)
    parser.add_argument("--connections", type=int, default=32, help="of the contenders' pool")
    parser.add_argument("--pgledger", type=Path, metavar="PATH", help="a checkout of pgledger, to measure beside ours")
    parser.add_argument(
        "--filled", type=int, nargs="?", const=FULL_LEDGER, default=0, metavar="ROWS",
        help="also measure on a ledger that has this many rows before (10,000,000; takes minutes and 6 GB of disk)",
    )  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="1,000 organizations, 1 s a case, 3 rounds, never filled")
    parser.add_argument("--only-caps", action="store_true", help="measure what caps cost, print it, write nothing")
    given = parser.parse_args()
    usual = (given.callers, given.connections)
    if given.quick:
        return Plan(1.0, 3, *usual, 1_000, given.pgledger, 0, given.only_caps)
    return Plan(given.seconds, given.rounds, *usual, 10_000, given.pgledger, given.filled, given.only_caps)


@contextmanager
def _server(folder: Path) -> Iterator[Server]:
    """A migrated server of our own."""
    server = EmbeddedServer(folder / "data", options=DURABLE)
    server.start()
    try:
        asyncio.run(migrate(server.dsn, MASTER_KEY))
        with psycopg.connect(server.dsn) as conn:
            conn.execute(SCHEMA.read_text(encoding="utf-8"))
        lane, simulator = (role_dsn(server.dsn, role, MASTER_KEY) for role in ("bursar_lane", "bursar_simulator"))
        yield Server(server.dsn, lane, simulator, server.pid)
    finally:
        server.stop()


def _with_caps(plan: Plan, server: Server) -> list[report.Row]:
    organizations = caps.open_organizations(server.admin, server.simulator, users=USERS)
    work = caps.with_and_without(
        server.lane,
        server.admin,
        server.pid,
        organizations,
        callers=plan.callers,
        rounds=plan.rounds,
        seconds=plan.seconds,
    )
    return uvloop.run(work) + caps.server_alone(
        server.lane, server.admin, organizations, rounds=plan.rounds, seconds=plan.seconds / 3
    )


def _pgledger(plan: Plan, server: Server, ready: books.Books) -> groups.Pgledger | None:
    if plan.pgledger is None:
        return None
    dsn = pgledger.install(server.admin, plan.pgledger)
    return groups.Pgledger(dsn, *pgledger.open_accounts(dsn, [payer.user_id for payer in ready.hot]))


def _about(plan: Plan, server: Server) -> dict[str, Any]:
    with psycopg.connect(server.admin) as conn:
        names = ("server_version", "fsync", "synchronous_commit", "full_page_writes", "shared_buffers")
        settings = {name: conn.execute("select current_setting(%s)", [name]).fetchone()[0] for name in names}  # type: ignore[index]
        booked = conn.execute(books.QUERIES.booked).fetchone()
    assert booked is not None
    return {
        **settings,
        "seconds a case": plan.seconds,
        "rounds": plan.rounds,
        "contenders' connections": plan.connections,
        "rows booked": booked[0],
        "Python": platform.python_version(),
        "balances a request": 4,
        "cost floor": "one UPDATE of the summed balance rows, one INSERT of the attribution rows, one transaction",
    }


main()
