"""python -m benchmarks.gateway: what Bursar adds to a call, beside a LiteLLM proxy.

Every target answers 1, 32 and 128 callers, plain and streamed, in front of one fake provider; rounds are interleaved,
so that a noisy minute hits all alike. Bursar holds, settles and keeps hard limits, durably. LiteLLM, where it is
installed, passes on and keeps none: its budgets need a database of their own, and what it did with one is `recorded`.
"""

import argparse
import os
import platform
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from benchmarks.gateway import report, servers
from benchmarks.gateway.report import Row
from benchmarks.gateway.servers import Target
from benchmarks.hotpath.pace import Figure
from benchmarks.hotpath.report import Ratio, write

RESULT: Final = Path(__file__).parents[1] / "results" / "gateway.json"
CALLERS: Final = (1, 32, 128)
PIECES: Final = 20
RECORDED: Final = {1: 97.0, 32: 214.0, 128: 190.0}
"""Requests/s of a LiteLLM proxy of two workers with a budget for its key, measured on two shared cores."""

RECORDED_MB: Final = 1_049.0


@dataclass(frozen=True, slots=True)
class Plan:
    """seconds: of one target under so many callers, over all rounds."""

    seconds: float
    rounds: int
    litellm: Path | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One target under so many callers. load: what the callers saw, a round each; cpu: seconds of one core a second."""

    target: Target
    load: list[dict[str, Any]]
    rss_mb: float
    cpu: list[dict[str, list[float]]]

    @property
    def per_second(self) -> Figure:
        return Figure.of([each["per_second"] for each in self.load])

    def ms(self, percentile: str) -> float:
        return statistics.median(each["ms"][percentile] for each in self.load)


def main() -> None:
    plan = _plan()
    with tempfile.TemporaryDirectory(prefix="bursar-gateway-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)  # as root, the database runs as another user
        print("starting …", flush=True)
        provider = stack.enter_context(servers.provider(PIECES))
        targets = [provider]
        targets.append(stack.enter_context(servers.bursar(folder / "one", provider.port, 1)))
        targets.append(stack.enter_context(servers.bursar(folder / "two", provider.port, 2)))
        if plan.litellm is not None:
            targets.append(stack.enter_context(servers.litellm(plan.litellm, folder / "litellm", provider.port)))
        rows: list[Row] = []
        for stream in (False, True):
            for callers in CALLERS:
                measured = _interleaved(plan, targets, callers, stream)
                rows += _rows(measured, callers, stream)
    about = _about(plan, rows)
    report.show(rows, about)
    write(RESULT, rows, about)  # type: ignore[arg-type]
    print(f"written to {RESULT.relative_to(Path.cwd()) if RESULT.is_relative_to(Path.cwd()) else RESULT}")


def _plan() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=15, help="of each target under so many callers, over all rounds"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="3 s, 2 rounds")
    parser.add_argument("--litellm", type=Path, help="a litellm program in an environment of its own")
    given = parser.parse_args()
    found = given.litellm or shutil.which("litellm")
    litellm = Path(found) if found else None
    return Plan(3.0, 2, litellm) if given.quick else Plan(given.seconds, given.rounds, litellm)


def _interleaved(plan: Plan, targets: Sequence[Target], callers: int, stream: bool) -> list[Measured]:
    print(f"{'streamed' if stream else 'plain'}, {callers} callers …", flush=True)
    found = [Measured(target, [], 0.0, []) for target in targets]
    for target in targets:  # connections and caches
        servers.load(target, connections=callers, seconds=0.5, stream=stream)
    seconds = plan.seconds / plan.rounds
    for _ in range(plan.rounds):
        for place, each in enumerate(found):
            before = servers.consumed(each.target.pid)
            each.load.append(servers.load(each.target, connections=callers, seconds=seconds, stream=stream))
            after = servers.consumed(each.target.pid)
            each.cpu.append(_cpu(before, after, seconds))
            found[place] = replace(each, rss_mb=max(each.rss_mb, after.rss_mb))
    return found


def _cpu(before: servers.Consumed, after: servers.Consumed, seconds: float) -> dict[str, list[float]]:
    """Percents of a core, by kind of process, busiest first."""
    cpu: dict[str, list[float]] = {"server": [], "postgres": []}
    for pid, taken in after.cpu.items():
        cpu[after.names[pid]].append((taken - before.cpu.get(pid, 0.0)) / seconds * 100)
    return {name: sorted(each, reverse=True) for name, each in cpu.items()}


def _rows(measured: Sequence[Measured], callers: int, stream: bool) -> list[Row]:
    alone, *others = measured
    group = f"{'streamed' if stream else 'plain'}, {callers} caller{'s' if callers > 1 else ''}"
    litellm = next((each for each in others if each.target.name.startswith("LiteLLM")), None)
    rows = [_row(group, alone, None)]
    for each in others:
        row = _row(group, each, alone)
        rows.append(row if each is litellm else replace(row, ratios=_ratios(each, alone, litellm, callers, stream)))
    if not stream:
        recorded = RECORDED[callers]
        figure = Figure(recorded, recorded, recorded)
        rows.append(Row(group, "LiteLLM, 2 processes, key budget (recorded)", figure, {}, RECORDED_MB))
    return rows


def _row(group: str, each: Measured, alone: Measured | None) -> Row:
    added = {p: each.ms(p) - (0.0 if alone is None else alone.ms(p)) for p in ("p50", "p95", "p99")}
    by_rank = zip(*(cpu["server"] for cpu in each.cpu), strict=False)
    cpu = tuple(round(statistics.median(rank), 1) for rank in by_rank)
    database = statistics.median(sum(cpu["postgres"]) for cpu in each.cpu)
    return Row(group, each.target.name, each.per_second, added, each.rss_mb, cpu, database or None)


def _ratios(ours: Measured, alone: Measured, litellm: Measured | None, callers: int, stream: bool) -> tuple[Ratio, ...]:
    """DESIGN section 7: against the same run where it is there, else against what was recorded."""
    ratios = []
    least = 5 if callers == 1 else 20
    if litellm is not None:
        ratios.append(Ratio("LiteLLM's requests/s", ours.per_second.median / litellm.per_second.median, least))
        for p in ("p50", "p99") if callers > 1 else ():
            theirs, added = (each.ms(p) - alone.ms(p) for each in (litellm, ours))
            ratios.append(Ratio(f"its added {p}", added / theirs, 1 / 20, at_most=True))
        ratios.append(Ratio("its memory", ours.rss_mb / litellm.rss_mb, 1 / 4, at_most=True))
    if not stream:
        ratios.append(Ratio("the recorded requests/s", ours.per_second.median / RECORDED[callers], least))
        ratios.append(Ratio("the recorded memory", ours.rss_mb / RECORDED_MB, 1 / 4, at_most=True))
    return tuple(ratios)


def _about(plan: Plan, rows: Sequence[Row]) -> dict[str, Any]:
    alone = max(row.per_second.median for row in rows if row.name == "the provider alone")
    return {
        "the provider alone": f"{alone:,.0f} requests/s at best",
        "a stream": f"{PIECES} pieces, each a write of its own",
        "Bursar": "hold, provider call, settle, each committed to disk; caps on user and organization; logs as shipped",
        "LiteLLM": "no budgets, no database" if plan.litellm else "not installed: recorded figures only",
        "seconds a target and number of callers": plan.seconds,
        "rounds": plan.rounds,
        "cores": os.cpu_count(),
        "load of the machine at the end": ", ".join(f"{each:.1f}" for each in os.getloadavg()),
        "Python": platform.python_version(),
    }


main()
