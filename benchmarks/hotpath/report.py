"""The table and the JSON."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hotpath.pace import Figure, Pace, rate_of


@dataclass(frozen=True, slots=True)
class Ratio:
    """One figure over another, and what it ought to be."""

    over: str
    value: float
    target: float
    at_most: bool = False

    @property
    def reached(self) -> bool:
        return self.value <= self.target if self.at_most else self.value >= self.target

    def __str__(self) -> str:
        sign = "≤" if self.at_most else "≥"
        return f"{'yes' if self.reached else 'NO '}  {self.value:.2f} × {self.over} (target {sign} {self.target:g})"


@dataclass(frozen=True, slots=True)
class Row:
    """One line. figure: requests per second over rounds, or megabytes; None: not measured.

    client, server: cores that were busy in this process and in those of the server.
    """

    group: str
    name: str
    figure: Figure | None
    unit: str
    p50_ms: float | None = None
    p99_ms: float | None = None
    client: float | None = None
    server: float | None = None
    ratios: tuple[Ratio, ...] = ()


def row_of(group: str, name: str, paces: Sequence[Pace], ratios: tuple[Ratio, ...]) -> Row:
    """A line of what some rounds showed."""
    p50 = Figure.of([pace.p50_ms for pace in paces]).median
    p99 = Figure.of([pace.p99_ms for pace in paces]).median
    client = Figure.of([pace.client for pace in paces]).median
    found = [pace.server for pace in paces if pace.server is not None]
    server = Figure.of(found).median if found else None
    return Row(group, name, rate_of(paces), "/s", p50, p99, client, server, ratios)


def show(rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Print the table."""
    table = Table(title="benchmarks/hotpath", title_justify="left", caption_justify="left")
    for heading in ("", "median", "least – greatest", "p50 ms", "p99 ms", "cores: client", "server", "against targets"):
        table.add_column(heading, justify="left" if heading in ("", "against targets") else "right")
    group = ""
    for row in rows:
        if row.group != group:
            table.add_section()
            table.add_row(f"[bold]{row.group}")
            group = row.group
        table.add_row(
            f"  {row.name}",
            "not measured" if row.figure is None else f"{_number(row.figure.median)} {row.unit}",
            "" if row.figure is None else f"{_number(row.figure.least)} – {_number(row.figure.greatest)}",
            *("" if value is None else f"{value:.2f}" for value in (row.p50_ms, row.p99_ms, row.client, row.server)),
            "\n".join(str(ratio) for ratio in row.ratios),
        )
    console = Console(width=190)
    console.print(table)
    console.print("\n".join(f"{name}: {value}" for name, value in about.items()))


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}"


def write(path: Path, rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Write the JSON."""
    lines = [{**asdict(row), "ratios": [{**asdict(r), "reached": r.reached} for r in row.ratios]} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"about": about, "rows": lines}, indent=2) + "\n")
