"""What is measured, group by group, and against which target."""

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import psycopg
import uvloop

from benchmarks.hotpath import caps, contenders, floor, http, ledger, pgledger, usage
from benchmarks.hotpath.books import QUERIES, Books, Payer
from benchmarks.hotpath.pace import Case, Figure, Pace, interleaved, rate_of
from benchmarks.hotpath.report import Ratio, Row, row_of
from bursar.credits.batcher import Batcher

EXHAUSTED_SHARE: Final = 0.05
AT_ONCE: Final = 1_000
LANE_NAME: Final = "bursar lane"
PLAIN_NAME: Final = "contender"
TRANSFERS: Final = "pgledger's transfers"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to run. seconds: of one case, over all its rounds; filled: rows of a ledger that is full before, or 0.

    only_caps: measure what caps cost and nothing else.
    """

    seconds: float
    rounds: int
    callers: int
    connections: int
    organizations: int
    pgledger: Path | None
    filled: int
    only_caps: bool


@dataclass(frozen=True, slots=True)
class Server:
    """Who connects as whom, and its first process. The contenders use the admin, whom no row-level security slows."""

    admin: str
    lane: str
    simulator: str
    pid: int | None


@dataclass(frozen=True, slots=True)
class Pgledger:
    """Its database, the account of the pool and those of the users."""

    dsn: str
    payer: str
    takers: list[str]


@dataclass(frozen=True, slots=True)
class Kit:
    """Batchers and pools, open throughout."""

    one_lane: Batcher
    two_lanes: Batcher
    lane_pool: contenders.Pool
    plain_pool: contenders.Pool
    pgledger_pool: contenders.Pool | None


async def callers(plan: Plan, server: Server, ready: Books, theirs: Pgledger | None) -> list[Row]:
    """Everything that callers of this process ask."""
    async with _opened(plan, server, theirs) as kit:
        await _touch(kit.one_lane, ready)
        uniform = await _uniform(plan, server, kit, ready.uniform)
        rows = [*await _hot(plan, server, kit, ready, theirs, uniform[0]), *uniform]
        rows += await _alone(plan, server, kit, ready)
        rows += _memory(server)
    return rows


@asynccontextmanager
async def _opened(plan: Plan, server: Server, theirs: Pgledger | None) -> AsyncIterator[Kit]:
    async with AsyncExitStack() as stack:
        yield Kit(
            await stack.enter_async_context(Batcher(server.lane, lanes=1)),
            await stack.enter_async_context(Batcher(server.lane, lanes=2)),
            await stack.enter_async_context(contenders.connections(server.lane, plan.connections)),
            await stack.enter_async_context(contenders.connections(server.admin, plan.connections, name=PLAIN_NAME)),
            await stack.enter_async_context(contenders.connections(theirs.dsn, plan.connections)) if theirs else None,
        )


async def _touch(batcher: Batcher, ready: Books) -> None:
    """Charge everybody once, so that what is built at first use is there."""
    moves = [contenders.deduction(payer) for payer in (*ready.hot, *ready.exhausted, *ready.uniform)]
    for start in range(0, len(moves), AT_ONCE):
        await asyncio.gather(*(batcher.move(move) for move in moves[start : start + AT_ONCE]))


async def _hot(plan: Plan, server: Server, kit: Kit, ready: Books, theirs: Pgledger | None, uniform: Row) -> list[Row]:
    hot = ready.hot
    poor = contenders.by_batcher(kit.one_lane, hot, refused=ready.exhausted, share=EXHAUSTED_SHARE)
    calls = {
        "ours": contenders.by_batcher(kit.one_lane, hot),
        "ours, 5 % of calls by exhausted users": poor,
        "ours, hold and settle": contenders.by_hold(kit.one_lane, hot),
        "a transaction in the application": contenders.by_transaction(kit.plain_pool, hot),
        "one call per request, written for it": contenders.by_function(kit.plain_pool, hot),
        "one call per request, our own function": contenders.one_by_one(kit.lane_pool, hot),
    }
    if theirs and kit.pgledger_pool:
        calls[TRANSFERS] = pgledger.by_transfer(kit.pgledger_pool, theirs.payer, theirs.takers)
    cases = [Case(name, call, plan.callers, server.pid) for name, call in calls.items()]
    paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
    rate = {name: rate_of(each).median for name, each in paces.items()}
    ours, poor_rate, _, transaction, function, single = list(rate.values())[:6]
    against = [
        Ratio("the transaction", ours / transaction, 20),
        Ratio("one call per request", ours / max(function, single), 10),
    ]
    if TRANSFERS in rate:
        against.append(Ratio(TRANSFERS, ours / rate[TRANSFERS], 10))
    assert uniform.figure is not None
    against.append(Ratio("the uniform rate of one lane", ours / uniform.figure.median, 1))
    ratios = {
        "ours": tuple(against),
        "ours, 5 % of calls by exhausted users": (
            Ratio("the clean rate", poor_rate / ours, 0.8),
            Ratio("16,000/s", poor_rate / 16_000, 1),
        ),
    }
    group = f"hot pool, {plan.callers} callers"
    rows = [row_of(group, name, each, ratios.get(name, ())) for name, each in paces.items()]
    return rows if TRANSFERS in rate else [*rows, Row(group, TRANSFERS, None, "")]


async def _uniform(plan: Plan, server: Server, kit: Kit, payers: Sequence[Payer]) -> list[Row]:
    calls = {
        "ours, one lane": contenders.by_batcher(kit.one_lane, payers),
        "ours, two lanes": contenders.by_batcher(kit.two_lanes, payers),
        "a transaction in the application": contenders.by_transaction(kit.plain_pool, payers),
        "one call per request, written for it": contenders.by_function(kit.plain_pool, payers),
        "one call per request, our own function": contenders.one_by_one(kit.lane_pool, payers),
    }
    cases = [Case(name, call, plan.callers, server.pid) for name, call in calls.items()]
    paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
    one, two, transaction, function, single = (rate_of(each).median for each in paces.values())
    best = max(one, two)
    ratios = {
        "ours, one lane": (
            Ratio("the transaction", best / transaction, 5),
            Ratio("one call per request", best / max(function, single), 3),
        ),
        "ours, two lanes": (Ratio("one lane", two / one, 1.5),),
    }
    group = f"uniform over {plan.organizations:,} organizations, {plan.callers} callers"
    return [row_of(group, name, each, ratios.get(name, ())) for name, each in paces.items()]


async def _alone(plan: Plan, server: Server, kit: Kit, ready: Books) -> list[Row]:
    calls = {
        "ours, deduct": contenders.by_batcher(kit.one_lane, ready.hot),
        "ours, hold and settle": contenders.by_hold(kit.one_lane, ready.hot),
        "one call, our own function": contenders.one_by_one(kit.lane_pool, ready.hot),
        "one call, written for it": contenders.by_function(kit.plain_pool, ready.hot),
        "a transaction in the application": contenders.by_transaction(kit.plain_pool, ready.hot),
    }
    cases = [Case(name, call, 1, server.pid) for name, call in calls.items()]
    # Many short rounds: a disk that is slow for a moment must not meet one of them alone.
    paces = await interleaved(cases, rounds=2 * plan.rounds, seconds=plan.seconds / 2)
    p50 = {name: Figure.of([pace.p50_ms for pace in each]).median for name, each in paces.items()}
    ratios = (
        Ratio("p50, written for it", p50["ours, deduct"] / p50["one call, written for it"], 1.15, True),
        Ratio("p50, our own function", p50["ours, deduct"] / p50["one call, our own function"], 1.15, True),
    )
    return [row_of("one caller", name, each, ratios if name == "ours, deduct" else ()) for name, each in paces.items()]


def _memory(server: Server) -> list[Row]:
    """After all that: this process, and what the backends of a lane and of a contender's pool keep for themselves."""
    with psycopg.connect(server.admin) as conn:

        def each(name: str) -> float | None:
            pids = [pid for (pid,) in conn.execute(QUERIES.backends, {"name": name}).fetchall()]
            together = usage.memory_mb(pids, private=True)
            return None if together is None or not pids else together / len(pids)

        found = {
            "this process, all contenders in it": usage.memory_mb([os.getpid()], private=False),
            "backend of a lane, its own": each(LANE_NAME),
            "backend of a contender's connection, its own": each(PLAIN_NAME),
        }
    return [Row("memory", name, None if mb is None else Figure(mb, mb, mb), "MB") for name, mb in found.items()]


def filled(plan: Plan, server: Server, ready: Books) -> list[Row]:
    """The same again when the ledger has rows already, against the rates before."""
    before = uvloop.run(_lanes(plan, server, ready))
    took = ledger.fill(server.admin, plan.filled)
    print(f"wrote {plan.filled:,} rows in {took:.0f} s", flush=True)
    after = uvloop.run(_lanes(plan, server, ready))
    group = f"{plan.filled:,} rows in the ledger before, {plan.callers} callers"
    rows = []
    for name, paces in after.items():
        rate = rate_of(before[name]).median
        ratio = Ratio("the rate on an empty ledger", rate_of(paces).median / rate, 0.8)
        rows += [row_of(group, f"{name}, before", before[name], ()), row_of(group, name, paces, (ratio,))]
    return rows


async def _lanes(plan: Plan, server: Server, ready: Books) -> dict[str, list[Pace]]:
    async with Batcher(server.lane, lanes=1) as one_lane:
        calls = {"hot pool": ready.hot, "uniform": ready.uniform}
        cases = [
            Case(name, contenders.by_batcher(one_lane, payers), plan.callers, server.pid)
            for name, payers in calls.items()
        ]
        return await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)


async def over_http(plan: Plan, site: http.Site) -> list[Row]:
    """Deductions over HTTP."""
    async with http.callers(site.port, plan.callers) as connected:
        calls = {
            "POST /api/v1/credits/deduct": http.by_request(site, connected, http.DEDUCT),
            "the same, each with an Idempotency-Key": http.by_request(site, connected, http.DEDUCT, with_key=True),
            "an empty ASGI route": http.by_request(site, connected, http.EMPTY),
        }
        cases = [Case(name, call, plan.callers, site.pid) for name, call in calls.items()]
        paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
        alone = await interleaved(
            [replace(case, callers=1) for case in cases], rounds=plan.rounds, seconds=plan.seconds / 2
        )
    deduct, keyed, empty = (rate_of(each).median for each in paces.values())
    ratios = {
        "POST /api/v1/credits/deduct": (Ratio("the empty route", deduct / empty, 0.4),),
        "the same, each with an Idempotency-Key": (Ratio("the empty route", keyed / empty, 0.4),),
    }
    group = f"over HTTP, one server process, {plan.callers} connections"
    rows = [row_of(group, name, each, ratios.get(name, ())) for name, each in paces.items()]
    return rows + [
        row_of("over HTTP, one server process, one connection", name, each, ()) for name, each in alone.items()
    ]


async def caps_over_http(plan: Plan, site: http.Site) -> list[Row]:
    """Deductions over HTTP by members of a company without caps, and of one with all."""
    async with http.callers(site.port, plan.callers) as connected:
        cases = [
            Case(name, http.by_request(site, connected, http.DEDUCT, keys=keys), plan.callers, site.pid)
            for name, keys in site.members.items()
        ]
        paces = await interleaved(cases, rounds=plan.rounds, seconds=plan.seconds)
    return caps.compared(f"caps, over HTTP, one server process, {plan.callers} connections", paces)


def floors(plan: Plan, server: Server, ready: Books) -> list[Row]:
    """The server's work alone against the row writes that it cannot do without."""
    chains = floor.chains_of(server.admin)
    rows = []
    for where, payers, stretch in (("hot", ready.hot, 0.75), ("uniform", ready.uniform, 0.65)):
        for durable in (True, False):
            group = f"server alone, {where}, batches of {floor.BATCH}, " + (
                "durable" if durable else "not waiting for disk"
            )
            rates = floor.interleaved(
                {"move_batch": server.lane, "cost floor": server.admin},
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
            rows.append(Row(group, "move_batch", ours, "/s", floor.BATCH / ours.median * 1e3, ratios=ratios))
            rows.append(Row(group, "cost floor", least, "/s", floor.BATCH / least.median * 1e3))
    return rows
