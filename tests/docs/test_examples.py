"""Every example of the documentation is run, or stands in NOT_RUN with the reason why not."""

import asyncio
import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
import typer.main
from tests.docs.pages import PAGES, ROOT, Block, Command, anchors_of, blocks_of, commands_of, files_of, links_of
from tests.docs.shell import WRITTEN_URL, Shell, is_as_written

from bursar import cli
from bursar.settings import Settings

NOT_RUN: Final = {
    "make": "sets up the virtual environment, or runs for as long as nobody stops it",
    "python3 -m venv": "sets up a virtual environment",
    "pip": "installs packages",
    "bursar serve": "runs until it is stopped; tests/cli/test_serve.py starts it",
    "bursar demo": "runs until it is stopped",
    "DATABASE_URL=": "another database than the test's",
    "psql": "a program that need not be there",
    "openssl": "a program that need not be there",
    "python -m": "a program of its own; its tests are beside it",
    "git": "changes the working tree",
}
"""Commands that are not run, by how they begin, and why. Those of bursar are read all the same."""

NO_PROGRAMS: Final = {"text"}
"""Languages of blocks that show something and are not for running."""

WITH_EXAMPLES: Final = [page for page in PAGES if any(block.language == "console" for block in blocks_of(page))]
_PRINTED: Final = re.compile(r"^\s*print\(.*\)  # (?P<written>.*)$", re.MULTILINE)


@pytest.mark.parametrize("page", WITH_EXAMPLES, ids=lambda page: page.stem)
async def test_the_examples_of_a_page_do_what_it_says(page: Path, shell: Shell, page_settings: Settings) -> None:
    for block in blocks_of(page):
        place = f"{page.name}, line {block.line}"
        match block.language:
            case "console":
                for command in commands_of(block):
                    await _run(command, shell, page.name)
            case "python":
                printed = await asyncio.to_thread(_run_python, block, shell)
                written = [match["written"] for match in _PRINTED.finditer(block.text)]
                assert is_as_written(printed, "\n".join(written)), f"{place}, prints:\n{printed}"
            case "sql":
                _run_sql(block, str(page_settings.database_url), place)
            case "csv" | "json" | "text" if block.info:
                (shell.folder / block.info).write_text(block.text, encoding="utf-8")
            case "json":
                json.loads(block.text)
            case other:
                assert other in NO_PROGRAMS, f"{place}: a block of “{other}”"


async def _run(command: Command, shell: Shell, page: str) -> None:
    """Run a command. A page that does not show what one prints says that it succeeds."""
    if not _is_run(command):
        return
    printed = await shell.run(command.text)
    place = f"{page}, line {command.line}"
    if command.prints:
        assert is_as_written(printed, command.prints), f"{place}, prints:\n{printed}"
    else:
        assert shell.variables["?"] == "0", f"{place}, fails:\n{printed}"


def _is_run(command: Command) -> bool:
    return not command.text.removeprefix(".venv/bin/").startswith(tuple(NOT_RUN))


def _run_python(block: Block, shell: Shell) -> str:
    """What a program prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(block.text.replace(WRITTEN_URL, shell.base_url), f"line {block.line}", "exec"), {})
    return out.getvalue()


def _run_sql(block: Block, dsn: str, place: str) -> None:
    """Run queries in one transaction; of those that are marked `none` no row may come back."""
    with psycopg.connect(dsn) as conn, conn.cursor() as cursor:
        cursor.execute(block.text)
        rows = cursor.fetchall() if cursor.description else []
        while cursor.nextset():
            rows += cursor.fetchall() if cursor.description else []
    assert not (rows and block.info == "none"), f"{place}: {rows}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_that_are_not_run_can_be_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for block in blocks_of(page):
        for command in commands_of(block) if block.language == "console" else ():
            words = shlex.split(command.text, comments=True)
            if not _is_run(command) and _program(words).endswith("bursar"):
                _read(words)


def test_the_examples_in_the_help_of_commands_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in _commands(_everything()):
        examples = re.findall(r"`((?:DATABASE_URL=\S+ )?bursar [^`]*)`", command.help or "")
        assert examples, f"{command.name} has no example"
        for example in examples:
            _read(shlex.split(example))


@cache
def _everything() -> Any:
    """All commands; it takes a while to build them."""
    return typer.main.get_command(cli.app)


def _commands(command: Any) -> Iterator[Any]:
    if not hasattr(command, "commands"):
        yield command
    for each in getattr(command, "commands", {}).values():
        yield from _commands(each)


def _program(words: list[str]) -> str:
    """The first word that sets no variable."""
    return next(word for word in words if not re.match(r"[A-Z_]+=", word))


def _read(words: list[str]) -> None:
    """Read a command's arguments and options as it would itself, and do nothing."""
    rest = words[words.index(_program(words)) + 1 :]
    rest = rest[: rest.index("<")] if "<" in rest else rest
    for word in rest:
        if re.fullmatch(r"[\w-]+\.(key|csv|json)", word):
            Path(word).touch()  # the file that the example names
    command = _everything()
    while rest and hasattr(command, "commands"):
        command = command.commands[rest.pop(0)]
    with contextlib.suppress(typer.Exit):
        command.make_context(command.name, rest)


@pytest.mark.parametrize("page", [*PAGES, *(PAGES[1].parent / "decisions").glob("*.md")], ids=lambda page: page.stem)
def test_links_lead_to_pages_and_headings(page: Path) -> None:
    for target, anchor in links_of(page):
        found = (page.parent / target).resolve()
        assert found.exists(), f"{page.name}: {target}"
        assert not anchor or anchor in anchors_of(found), f"{page.name}: {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_files_that_a_page_names_exist(page: Path) -> None:
    assert [name for name in files_of(page) if not (ROOT / name).exists()] == []


def test_the_readme_leads_to_every_page() -> None:
    readme = PAGES[0]
    reached = {(readme.parent / target).resolve() for target, _ in links_of(readme)}
    assert set(PAGES[1:]) <= reached
