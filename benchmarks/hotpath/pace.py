"""Rounds of callers: each calls, waits for the answer, and calls again."""

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

# One call by the caller of this number; true when credits were charged for good.
Call = Callable[[int], Awaitable[bool]]


@dataclass(frozen=True, slots=True)
class Pace:
    """What one round showed: charged calls per second, and how long an answer took."""

    per_second: float
    p50_ms: float
    p99_ms: float
    charged: int


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
    """One thing to measure."""

    name: str
    call: Call
    callers: int


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
    latencies.sort()
    n = len(latencies)
    return Pace(charged / took, latencies[n // 2] * 1e3, latencies[min(n - 1, n * 99 // 100)] * 1e3, charged)
