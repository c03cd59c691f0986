"""Rounds of callers: each calls, waits for the answer, and calls again."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from benchmarks.hotpath import usage

# One call by the caller of this number; true when credits were charged for good.
Call = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Pace:
    """What one round showed: charged calls per second, how long an answer took, and how many cores were busy with it.

    client: of this process; server: of the server's processes, None where that cannot be found.
    """

    per_second: float
    p50_ms: float
    p99_ms: float
    charged: int
    client: float
    server: float | None


@dataclass(frozen=True, slots=True)
class Figure:
    """A median over rounds, with the least and the greatest."""

    median: float
    least: float
    greatest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure. server: the first process of the server that works for it."""

    name: str
    call: Call
    callers: int
    server: int | None = None


def rate_of(paces: Sequence[Pace]) -> Figure:
    """Charged calls per second."""
    return Figure.of([pace.per_second for pace in paces])


async def interleaved(cases: Sequence[Case], *, rounds: int, seconds: float) -> dict[str, list[Pace]]:
    """Each case once per round, in turn, so that a noisy minute hits all alike. seconds: of one case in all rounds."""
    paces: dict[str, list[Pace]] = {case.name: [] for case in cases}
    for case in cases:  # connections, prepared statements, caches
        await pace_of(case, seconds=0.3)
    for _ in range(rounds):
        for case in cases:
            paces[case.name].append(await pace_of(case, seconds=seconds / rounds))
    return paces


async def pace_of(case: Case, *, seconds: float) -> Pace:
    """One round of one case."""
    latencies: list[float] = []
    charged = 0
    own, theirs = time.process_time(), usage.seconds_of(case.server)
    stop = time.perf_counter() + seconds

    async def caller(number: int) -> None:
        nonlocal charged
        began = time.perf_counter()
        while began < stop:
            was_charged = await case.call(number)
            charged += was_charged
            ended = time.perf_counter()
            latencies.append(ended - began)
            began = ended

    began = time.perf_counter()
    await asyncio.gather(*(caller(number) for number in range(case.callers)))
    took = time.perf_counter() - began
    client = (time.process_time() - own) / took
    after = usage.seconds_of(case.server)
    server = None if theirs is None or after is None else (after - theirs) / took
    latencies.sort()
    n = len(latencies)
    p50, p99 = latencies[n // 2] * 1e3, latencies[min(n - 1, n * 99 // 100)] * 1e3
    return Pace(charged / took, p50, p99, charged, client, server)
