"""How far long work is: bars on a terminal's stderr, plain lines elsewhere."""

from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


class Bars:
    """One bar for each name; on no terminal, one line when a name is done. A name may have several parts."""

    def __init__(self, progress: Progress | None, unit: str, least_seconds: float = 0) -> None:
        self._progress = progress
        self._least_seconds = least_seconds
        self._unit = unit
        self._tasks: dict[str, TaskID] = {}
        self._started: dict[str, float] = {}
        self._done: dict[str, int] = {}
        self._totals: dict[str, int] = {}
        self._parts: dict[str, int] = {}

    def begin(self, name: str, parts: int = 1) -> None:
        """Work under a name begins; of all its parts only the first one begins it."""
        if name in self._started:
            return
        self._started[name], self._done[name], self._totals[name], self._parts[name] = monotonic(), 0, 0, parts
        if self._progress is not None:
            self._tasks[name] = self._progress.add_task(name, total=None)

    def add(self, name: str, units: int) -> None:
        """So many more units are to be done."""
        self._totals[name] += units
        if self._progress is not None:
            self._progress.update(self._tasks[name], total=self._totals[name])

    def advance(self, name: str, units: int) -> None:
        """So many more units are done."""
        self._done[name] += units
        if self._progress is not None:
            self._progress.update(self._tasks[name], completed=self._done[name])

    def end(self, name: str) -> None:
        """A part is done."""
        self._parts[name] -= 1
        if self._progress is None and not self._parts[name]:
            seconds = monotonic() - self._started[name]
            if seconds >= self._least_seconds:
                typer.echo(f"{name}: {self._done[name]:,} {self._unit} in {seconds:.1f} s", err=True)


@contextmanager
def bars(unit: str, *, least_seconds: float = 0) -> Iterator[Bars]:
    """Bars for the time of a block. unit: what is counted, in the plural.

    least_seconds: on no terminal, nothing is said of what takes less.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Bars(None, unit, least_seconds)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        yield Bars(progress, unit)
