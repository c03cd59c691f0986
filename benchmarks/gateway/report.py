"""The table. One line: a target under so many callers; latencies are what it adds to the provider alone."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.hotpath.pace import Figure
from benchmarks.hotpath.report import Ratio


@dataclass(frozen=True, slots=True)
class Row:
    """per_second: over rounds. added_ms: p50, p95, p99 of whole answers, less the provider's own (of its own row: all).

    cpu_percent: of one core, by process, busiest first; database: of all of its processes together.
    """

    group: str
    name: str
    per_second: Figure
    added_ms: dict[str, float]
    rss_mb: float | None = None
    cpu_percent: tuple[float, ...] = ()
    database_percent: float | None = None
    ratios: tuple[Ratio, ...] = ()


def show(rows: Sequence[Row], about: dict[str, Any]) -> None:
    """Print it."""
    table = Table(title="benchmarks/gateway", title_justify="left", caption_justify="left")
    headings = (
        "",
        "requests/s",
        "least – greatest",
        "+p50 ms",
        "+p95 ms",
        "+p99 ms",
        "RSS MB",
        "CPU %",
        "database CPU %",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "" else "right")
    table.add_column("against targets")
    group = ""
    for row in rows:
        if row.group != group:
            table.add_section()
            table.add_row(f"[bold]{row.group}")
            group = row.group
        table.add_row(
            f"  {row.name}",
            f"{row.per_second.median:,.0f}",
            f"{row.per_second.least:,.0f} – {row.per_second.greatest:,.0f}",
            *(f"{row.added_ms[p]:.2f}" if p in row.added_ms else "" for p in ("p50", "p95", "p99")),
            "" if row.rss_mb is None else f"{row.rss_mb:,.0f}",
            " ".join(f"{each:.0f}" for each in row.cpu_percent if each >= 1),
            "" if row.database_percent is None else f"{row.database_percent:.0f}",
            "\n".join(str(ratio) for ratio in row.ratios),
        )
    console = Console(width=200)
    console.print(table)
    console.print("\n".join(f"{name}: {value}" for name, value in about.items()))
