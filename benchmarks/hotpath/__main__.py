"""python -m benchmarks.hotpath"""

import argparse
import asyncio
import platform
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psycopg
import uvloop

from benchmarks.hotpath import books, contenders, floor, report
from benchmarks.hotpath.books import Books, Payer
from benchmarks.hotpath.pace import Case, Figure, Pace, interleaved
from benchmarks.hotpath.report import Ratio, Row
from bursar.credits.batcher import Batcher
from bursar.db.connections import role_dsn
from bursar.db.embedded import EmbeddedServer
from bursar.db.migrate import migrate

RESULT: Final = Path(__file__).parents[1] / "results" / "hotpath.json"
SCHEMA: Final = Path(__file__).with_name("schema.sql")
USERS: Final = 100
EXHAUSTED: Final = 5
EXHAUSTED_SHARE: Final = 0.05
DURABLE: Final = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
MASTER_KEY: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. seconds: of one case, over all its rounds."""

    seconds: float
    rounds: int
    callers: int
    connections: int
    organizations: int


@dataclass(frozen=True, slots=True)
class Dsns:
    """Who connects as whom. The contenders use the admin, whom no row-level security slows."""

    admin: str
    lane: str
    simulator: str


def main() -> None:
    plan = _plan()
    with tempfile.TemporaryDirectory(prefix="bursar-hotpath-") as folder, _server(Path(folder)) as dsns:
        print(f"opening {plan.organizations:,} organizations …", flush=True)
        ready = books.open_books(
            dsns.admin, dsns.simulator, users=USERS, exhausted=EXHAUSTED, organizations=plan.organizations
        )
        rows = uvloop.run(_callers(plan, dsns, ready))
        rows += _floors(plan, dsns, ready)
        about = _about(plan, dsns)
    report.show(rows, about)
    report.write(RESULT, rows, about)
    print(f"written to {RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT}")


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hotpath", description=__doc__)
    parser.add_argument("--seconds", type=float, default=6, help="of each case, over all rounds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--callers", type=int, default=128)
    parser.add_argument("--connections", type=int, default=32, help="of the contenders' pool")
    parser.add_argument("--quick", action="store_true", help="1,000 organizations, 1 s a case, 3 rounds")
    given = parser.parse_args()
    if given.quick:
        return Plan(1.0, 3, given.callers, given.connections, 1_000)
    return Plan(given.seconds, given.rounds, given.callers, given.connections, 10_000)


@contextmanager
def _server(folder: Path) -> Iterator[Dsns]:
    """A migrated server of our own."""
    folder.chmod(0o711)  # as root, the server runs as another user
    server = EmbeddedServer(folder / "data", options=DURABLE)
    server.start()
    try:
        asyncio.run(migrate(server.dsn, MASTER_KEY))
        with psycopg.connect(server.dsn) as conn:
            conn.execute(SCHEMA.read_text(encoding="utf-8"))
        lane, simulator = (role_dsn(server.dsn, role, MASTER_KEY) for role in ("bursar_lane", "bursar_simulator"))
        yield Dsns(server.dsn, lane, simulator)
    finally:
        server.stop()


async def _callers(plan: Plan, dsns: Dsns, ready: Books) -> list[Row]:
    async with _opened(plan, dsns) as kit:
        await _touch(kit.one_lane, ready)
        rows = await _hot(plan, kit, ready)
        rows += await _uniform(plan, kit, ready.uniform)
        rows += await _alone(plan, kit, ready)
    return rows


@dataclass(frozen=True, slots=True)
class Kit:
    """Batchers and pools, open throughout."""

    one_lane: Batcher
    two_lanes: Batcher
    lane_pool: contenders.Pool
    plain_pool: contenders.Pool


@asynccontextmanager
async def _opened(plan: Plan, dsns: Dsns) -> AsyncIterator[Kit]:
    async with AsyncExitStack() as stack:
        yield Kit(
            await stack.enter_async_context(Batcher(dsns.lane, lanes=1)),
            await stack.enter_async_context(Batcher(dsns.lane, lanes=2)),
            await stack.enter_async_context(contenders.connections(dsns.lane, plan.connections)),
            await stack.enter_async_context(contenders.connections(dsns.admin, plan.connections)),
        )


async def _touch(batcher: Batcher, ready: Books) -> None:
    """Charge everybody once, so that what is built at first use is there."""
    moves = [contenders.deduction(payer) for payer in (*ready.hot, *ready.exhausted, *ready.uniform)]
    await asyncio.gather(*(batcher.move(move) for move in moves))


async def _hot(plan: Plan, kit: Kit, ready: Books) -> list[Row]:
    hot = ready.hot
    poor = contenders.by_batcher(kit.one_lane, hot, refused=ready.exhausted, share=EXHAUSTED_SHARE)
    cases = [
        Case("ours", contenders.by_batcher(kit.one_lane, hot), plan.callers),
        Case("ours, 5 % of calls by exhausted users", poor, plan.callers),
        Case("ours, hold and settle", contenders.by_hold(kit.one_lane, hot), plan.callers),
        Case("a transaction in the application", contenders.by_transaction(kit.plain_pool, hot), plan.callers),
        Case("one call per request, written for it", contenders.by_function(kit.plain_pool, hot), plan.callers),
        Case("one call per request, our own function", contenders.one_by_one(kit.lane_pool, hot), plan.callers),
    ]
    paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
    rate = {name: _rate(each).median for name, each in paces.items()}
    ours, poor_rate, _, transaction, function, single = rate.values()
    ratios = {
        "ours": (
            Ratio("the transaction", ours / transaction, 20),
            Ratio("one call per request", ours / max(function, single), 10),
        ),
        "ours, 5 % of calls by exhausted users": (
            Ratio("the clean rate", poor_rate / ours, 0.8),
            Ratio("16,000/s", poor_rate / 16_000, 1),
        ),
    }
    return [_row(f"hot pool, {plan.callers} callers", name, each, ratios.get(name, ())) for name, each in paces.items()]


async def _uniform(plan: Plan, kit: Kit, payers: Sequence[Payer]) -> list[Row]:
    cases = [
        Case("ours, one lane", contenders.by_batcher(kit.one_lane, payers), plan.callers),
        Case("ours, two lanes", contenders.by_batcher(kit.two_lanes, payers), plan.callers),
        Case("a transaction in the application", contenders.by_transaction(kit.plain_pool, payers), plan.callers),
        Case("one call per request, written for it", contenders.by_function(kit.plain_pool, payers), plan.callers),
        Case("one call per request, our own function", contenders.one_by_one(kit.lane_pool, payers), plan.callers),
    ]
    paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
    one, two, transaction, function, single = (_rate(each).median for each in paces.values())
    best = max(one, two)
    ratios = {
        "ours, one lane": (
            Ratio("the transaction", best / transaction, 5),
            Ratio("one call per request", best / max(function, single), 3),
        ),
        "ours, two lanes": (Ratio("one lane", two / one, 1.5),),
    }
    group = f"uniform over {plan.organizations:,} organizations, {plan.callers} callers"
    return [_row(group, name, each, ratios.get(name, ())) for name, each in paces.items()]


async def _alone(plan: Plan, kit: Kit, ready: Books) -> list[Row]:
    cases = [
        Case("ours, deduct", contenders.by_batcher(kit.one_lane, ready.hot), 1),
        Case("ours, hold and settle", contenders.by_hold(kit.one_lane, ready.hot), 1),
        Case("one call, our own function", contenders.one_by_one(kit.lane_pool, ready.hot), 1),
        Case("one call, written for it", contenders.by_function(kit.plain_pool, ready.hot), 1),
        Case("a transaction in the application", contenders.by_transaction(kit.plain_pool, ready.hot), 1),
    ]
    paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds / 2)
    p50 = {name: Figure.of([pace.p50_ms for pace in each]).median for name, each in paces.items()}
    ratios = (
        Ratio("p50, written for it", p50["ours, deduct"] / p50["one call, written for it"], 1.15, True),
        Ratio("p50, our own function", p50["ours, deduct"] / p50["one call, our own function"], 1.15, True),
    )
    return [_row("one caller", name, each, ratios if name == "ours, deduct" else ()) for name, each in paces.items()]


def _rate(paces: Sequence[Pace]) -> Figure:
    return Figure.of([pace.per_second for pace in paces])


def _row(group: str, name: str, paces: Sequence[Pace], ratios: tuple[Ratio, ...]) -> Row:
    p50 = Figure.of([pace.p50_ms for pace in paces]).median
    p99 = Figure.of([pace.p99_ms for pace in paces]).median
    return Row(group, name, _rate(paces), "/s", p50, p99, ratios)


def _floors(plan: Plan, dsns: Dsns, ready: Books) -> list[Row]:
    chains = floor.chains_of(dsns.admin)
    rows = []
    for where, payers, stretch in (("hot", ready.hot, 0.75), ("uniform", ready.uniform, 0.65)):
        for durable in (True, False):
            group = f"server alone, {where}, batches of {floor.BATCH}, " + (
                "durable" if durable else "not waiting for disk"
            )
            rates = floor.interleaved(
                {"move_batch": dsns.lane, "cost floor": dsns.admin},
                {
                    "move_batch": floor.batches(payers, floor.BATCH),
                    "cost floor": floor.floors(payers, floor.BATCH, chains),
                },
                size=floor.BATCH,
                rounds=plan.rounds,
                seconds=plan.seconds / 3,
                durable=durable,
            )
            ours, least = (Figure.of(each) for each in rates.values())
            share = ours.median / least.median
            ratios = (Ratio("the floor", share, 0.6), Ratio("the floor, stretch", share, stretch)) if durable else ()
            rows.append(Row(group, "move_batch", ours, "/s", floor.BATCH / ours.median * 1e3, None, ratios))
            rows.append(Row(group, "cost floor", least, "/s", floor.BATCH / least.median * 1e3))
    return rows


def _about(plan: Plan, dsns: Dsns) -> dict[str, Any]:
    with psycopg.connect(dsns.admin) as conn:
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
