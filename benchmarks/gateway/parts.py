"""python -m benchmarks.gateway.parts [--callers 32] [--seconds 10] [--stream]: what a call costs, by part.

Prints microseconds of processor time that a call takes in the server process and in the database's processes, and how
the server's divide. The whole is measured without a profiler; the shares are a profiler's, by the thread's own clock,
which makes what consists of many small functions look dearer than it is.
"""

import argparse
import cProfile
import os
import pstats
import runpy
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.gateway import servers

PIECES: Final = 20
REST: Final = "event loop, and what belongs to no part"
PARTS: Final = {
    "server: HTTP, ASGI, hang-ups": ("/uvicorn/", "/bursar/asgi", "/bursar/app", "/bursar/server", "/gateway/exchange"),
    "log line, metrics": ("/bursar/logs", "/prometheus_client/", "/structlog/"),
    "reading request and answer": ("_wire", "/gateway/wire", "/gateway/tokens", "/gateway/sse", "/gateway/tools"),
    "the call to the provider": ("/gateway/upstream", "/gateway/connections"),
    "key, route, prices": ("/bursar/identity/", "/bursar/pricing/", "/gateway/desk", "/gateway/allow", "/gateway/rout"),
    "moves: batches, psycopg": ("/bursar/credits/", "/psycopg", "/bursar/db/"),
    "hold, mark and settle made": ("/gateway/", "/bursar/money", "/bursar/clock", "/uuid.py"),
}
Stats = dict[
    tuple[str, int, str], tuple[int, int, float, float, dict[tuple[str, int, str], tuple[int, int, float, float]]]
]


def serve(result: Path) -> None:
    """`bursar serve` in this process, with a profile of what is between SIGUSR1 and SIGUSR2."""
    profile = cProfile.Profile(time.thread_time)

    def end(*_: Any) -> None:
        profile.disable()
        profile.dump_stats(result.with_suffix(".part"))
        result.with_suffix(".part").rename(result)

    signal.signal(signal.SIGUSR1, lambda *_: profile.enable())
    signal.signal(signal.SIGUSR2, end)
    runpy.run_module("bursar", run_name="__main__", alter_sys=True)


def by_part(stats: Stats) -> Counter[str]:
    """Seconds by part. What is not written in Python counts where it was called."""
    found: Counter[str] = Counter()
    for (file, _, _), (_, _, own, _, callers) in stats.items():
        if (part := part_of(file)) is not None or not callers:
            found[part or REST] += own
            continue
        whole = sum(each[2] for each in callers.values()) or 1.0
        for (caller, _, _), each in callers.items():
            found[part_of(caller) or REST] += own * each[2] / whole
    return found


def part_of(file: str) -> str | None:
    """None: a file of no part, or no file at all."""
    return next((part for part, places in PARTS.items() if any(place in file for place in places)), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway.parts", description=__doc__)
    parser.add_argument("--callers", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--stream", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bursar-parts-") as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)
        result = folder / "profile"
        provider = stack.enter_context(servers.provider(PIECES))
        start = ("-m", "benchmarks.gateway.parts", str(result))
        target = stack.enter_context(servers.bursar(folder / "one", provider.port, 1, start=start))

        def load(seconds: float) -> int:
            did = servers.load(target, connections=given.callers, seconds=seconds, stream=given.stream)
            return int(did["requests"])

        load(2)
        before = servers.consumed(target.pid)
        calls = load(given.seconds)
        after = servers.consumed(target.pid)
        os.kill(target.pid, signal.SIGUSR1)
        load(given.seconds)
        os.kill(target.pid, signal.SIGUSR2)
        while not result.exists():
            time.sleep(0.1)
        stats: Stats = pstats.Stats(str(result)).stats  # type: ignore[attr-defined]
    taken: Counter[str] = Counter()
    for pid, seconds in after.cpu.items():
        taken[after.names[pid]] += (seconds - before.cpu.get(pid, 0.0)) / calls * 1e6  # type: ignore[assignment]
    found = by_part(stats)
    print(f"{'streamed' if given.stream else 'plain'}, {given.callers} callers: us of processor a call")
    for part, seconds in found.most_common():
        share = seconds / found.total()
        print(f"{share * taken['server']:7.0f}  {share:4.0%}  {part}")
    print(f"{taken['server']:7.0f}        the server process\n{taken['postgres']:7.0f}        the database's processes")


if __name__ == "__main__":
    if sys.argv[2:3] == ["serve"]:
        place = Path(sys.argv.pop(1))
        serve(place)
    else:
        main()
