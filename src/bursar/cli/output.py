"""What commands print: tables that fit the terminal, or one JSON document."""

import asyncio
import json
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from datetime import date, datetime
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, TypeAlias, TypeVar
from uuid import UUID

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from bursar import db
from bursar.settings import Settings

JsonOption: TypeAlias = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]
QuietOption: TypeAlias = Annotated[bool, typer.Option("--quiet", "-q", help="Print only what was asked for.")]
YesOption: TypeAlias = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
DryRunOption: TypeAlias = Annotated[bool, typer.Option("--dry-run", help="Show what would change, change nothing.")]

NARROWEST_NAME = 12
# What is before an id, by how its field's name ends: as the API tells it. Commands take ids back with it or without.
ID_PREFIXES = {
    "organization_id": "org_",
    "user_id": "usr_",
    "team_id": "team_",
    "department_id": "dep_",
    "api_key_id": "key_",
    "provider_key_id": "pvk_",
    "rule_id": "rule_",
}
Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table. key: field of the row; numbers stand at the right; total: what its last line says."""

    key: str
    title: str
    right: bool = False
    total: str = ""
    show: Callable[[Any], str] = lambda value: "" if value is None else str(value)


def with_database(work: Callable[[db.Database], Coroutine[Any, Any, Answer]]) -> Answer:
    """Run async work with the database of the environment's settings, in an event loop of its own."""

    async def run() -> Answer:
        async with db.opened(Settings.from_environment()) as database:
            return await work(database)

    return asyncio.run(run())


def this_program() -> str:
    """How whoever reads this starts the program again, in the folder where it was started: as `bursar` where the PATH
    leads to it, else by its path.
    """
    started = Path(sys.argv[0])
    if started.name == "__main__.py":
        return f"{_from_here(sys.executable)} -m bursar"
    found = shutil.which(started.name)
    return started.name if found is not None and Path(found).samefile(started) else _from_here(started)


def _from_here(program: str | Path) -> str:
    """A path as the shell takes it, short where it lies below this folder. Links stay: an interpreter needs its own."""
    path, here = Path(os.path.abspath(program)), Path.cwd()
    return shlex.quote(os.path.join(".", path.name) if path.parent == here else _below(path, here))


def _below(path: Path, here: Path) -> str:
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def print_json(document: Any) -> None:
    """One document on stdout; ids, times and enums as text."""
    typer.echo(json.dumps(document, default=_plain, indent=2 if sys.stdout.isatty() else None, ensure_ascii=False))


def print_rows(
    rows: Iterable[Any], columns: Sequence[Column], *, as_json: bool, empty: str = "Nothing yet.", dry_run: bool = False
) -> None:
    """Rows (dataclasses or mappings) as a table, or as {"items": […]} with every field. dry_run: as `print_fields`."""
    items = [_fields(row) for row in rows]
    if as_json:
        print_json({"items": items} | ({"dry_run": True} if dry_run else {}))
        return
    if items:
        _print_table(items, columns)
    else:
        typer.echo(empty)
    tell_dry_run(dry_run)


def print_fields(row: Any, *, as_json: bool, dry_run: bool = False) -> None:
    """One row (a dataclass or mapping) as `name  value` lines, or as JSON. dry_run: it says that nothing changed."""
    fields = _fields(row)
    if as_json:
        print_json(fields | {"dry_run": True} if dry_run else fields)
        return
    width = max((len(name) for name in fields), default=0)
    for name, value in fields.items():
        typer.echo(f"{name.ljust(width)}  {'' if value is None else _text(value)}")
    tell_dry_run(dry_run)


def tell_dry_run(dry_run: bool) -> None:
    """Where it was a dry run: that nothing was changed."""
    if dry_run:
        typer.echo("A dry run: nothing was changed.")


def console() -> Console:
    """Stdout; colours only on a terminal and without NO_COLOR, as rich does by itself."""
    return Console(soft_wrap=False, highlight=False)


def middle(text: str, width: int) -> str:
    """Text cut in the middle, where names of a family differ least: 'averylongname' -> 'avery…ame'."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2 + (width - 1) % 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def _print_table(items: Sequence[Mapping[str, Any]], columns: Sequence[Column]) -> None:
    out = console()
    cells = [[column.show(item.get(column.key)) for column in columns] for item in items]
    widths = _widths(cells, columns, out.width if out.is_terminal else None)
    table = Table(box=None, pad_edge=False, show_footer=any(column.total for column in columns), header_style="bold")
    for column, width in zip(columns, widths, strict=True):
        table.add_column(
            column.title, column.total, justify="right" if column.right else "left", no_wrap=True, min_width=width
        )
    for row in cells:
        table.add_row(*[Text(middle(cell, width)) for cell, width in zip(row, widths, strict=True)])
    if not out.is_terminal:
        out = Console(width=sum(widths) + 2 * len(widths) + 1, highlight=False)
    out.print(table)


def _widths(cells: Sequence[Sequence[str]], columns: Sequence[Column], available: int | None) -> list[int]:
    """Wide enough for all; where the terminal is too narrow the widest text columns give way first."""
    widths = [
        max([len(column.title), len(column.total), *(len(row[place]) for row in cells)])
        for place, column in enumerate(columns)
    ]
    if available is None:
        return widths
    while sum(widths) + 2 * (len(widths) - 1) > available:
        texts = [place for place, column in enumerate(columns) if not column.right and widths[place] > NARROWEST_NAME]
        if not texts:
            break
        widths[max(texts, key=lambda place: widths[place])] -= 1
    return widths


def _fields(row: Any) -> dict[str, Any]:
    """A dataclass or mapping by the names of its fields, its ids with what they are of."""
    fields = asdict(row) if is_dataclass(row) and not isinstance(row, type) else dict(row)
    return {name: _told_id(name, value) if isinstance(value, UUID) else value for name, value in fields.items()}


def _told_id(name: str, value: UUID) -> str:
    prefix = next((prefix for end, prefix in ID_PREFIXES.items() if name.endswith(end)), None)
    return str(value) if prefix is None else f"{prefix}{value.hex}"


def _plain(value: Any) -> Any:
    if isinstance(value, datetime | date):
        return value.isoformat()
    if isinstance(value, UUID | Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"cannot be JSON: {type(value).__name__}")


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | set | frozenset):
        return ", ".join(str(each) for each in value)
    return value.isoformat() if isinstance(value, datetime | date) else str(value)
