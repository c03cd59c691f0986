"""What processes take, by /proc: processor time and memory. Elsewhere than on Linux nothing is found."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

TICKS: Final = os.sysconf("SC_CLK_TCK")
PROC: Final = Path("/proc")


def seconds_of(pid: int | None) -> float | None:
    """Processor seconds of a process and all below it, its ended children included; None: not to be found here."""
    if pid is None or not PROC.exists():
        return None
    own = _seconds(pid, with_ended_children=True)
    return own + sum(_seconds(each, with_ended_children=False) for each in below(pid))


def below(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have."""
    found = []
    for task in (PROC / str(pid) / "task").glob("*/children"):
        for child in task.read_text().split():
            found += [int(child), *below(int(child))]
    return found


def _seconds(pid: int, *, with_ended_children: bool) -> float:
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except FileNotFoundError:
        return 0.0  # ended since it was listed
    fields = stat[stat.rindex(")") + 2 :].split()
    return sum(int(field) for field in fields[11 : 15 if with_ended_children else 13]) / TICKS


def memory_mb(pids: Iterable[int], *, private: bool) -> float | None:
    """Resident memory of processes together; private: without what they share, such as PostgreSQL's buffers."""
    wanted = "RssAnon:" if private else "VmRSS:"
    try:
        texts = [(PROC / str(pid) / "status").read_text() for pid in pids]
    except OSError:
        return None
    return sum(int(line.split()[1]) for text in texts for line in text.splitlines() if line.startswith(wanted)) / 1024
