"""What commands print, and how they end."""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from bursar import cli, db
from bursar.cli.exits import Exit, exit_code_of, explain
from bursar.cli.output import Column, middle, print_fields, print_rows, this_program
from bursar.credits.raises import AlreadyAsked
from bursar.db.embedded import ServerFailed
from bursar.errors import BursarError
from bursar.problems import NotFound, Problem

SEVEN = UUID(int=7)


@dataclass(frozen=True)
class Row:
    name: str
    amount: int
    made_at: datetime = datetime(2026, 11, 20, tzinfo=UTC)
    row_id: UUID = SEVEN


ROWS = [Row("first", 5), Row("a longer name", 12_345)]
COLUMNS = [Column("name", "Name", total="Total"), Column("amount", "Amount", right=True, total="12350")]


def test_a_table_lines_numbers_up_and_ends_with_its_total(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, COLUMNS, as_json=False)
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines == ["Name           Amount", "first               5", "a longer name   12345", "Total           12350"]


def test_json_is_one_document_with_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(ROWS, COLUMNS, as_json=True)
    document = json.loads(capsys.readouterr().out)
    assert document["items"][0] == {
        "name": "first",
        "amount": 5,
        "made_at": "2026-11-20T00:00:00+00:00",
        "row_id": str(UUID(int=7)),
    }


def test_markup_in_names_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([Row("[red]x[/red]", 1)], COLUMNS, as_json=False)
    assert "[red]x[/red]" in capsys.readouterr().out


def test_no_rows_say_so(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([], COLUMNS, as_json=False, empty="No keys yet.")
    assert capsys.readouterr().out == "No keys yet.\n"
    print_rows([], COLUMNS, as_json=True)
    assert json.loads(capsys.readouterr().out) == {"items": []}


def test_one_row_is_printed_field_by_field(capsys: pytest.CaptureFixture[str]) -> None:
    print_fields({"name": "x", "roles": ("a", "b"), "ended_at": None}, as_json=False)
    assert capsys.readouterr().out == "name      x\nroles     a, b\nended_at  \n"


def test_long_names_are_cut_in_the_middle() -> None:
    assert middle("engineering-platform", 11) == "engin…tform"
    assert middle("short", 11) == "short"


class Paid(Problem):
    status, code, title = 402, "test_paid", "Not enough credits"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Paid(), Exit.REFUSED),
        (NotFound(), Exit.NOT_FOUND),
        (db.NoRow(), Exit.NOT_FOUND),
        (BursarError("x"), Exit.FAILED),
        (ServerFailed("x"), Exit.UNREACHABLE),
        (psycopg.OperationalError("x"), Exit.UNREACHABLE),
        (ValueError("x"), Exit.FAILED),
    ],
)
def test_each_kind_of_end_has_its_code(error: Exception, code: Exit) -> None:
    assert exit_code_of(error) == code


@pytest.mark.parametrize(
    ("detail", "said"),
    [
        ("", "This was asked for already."),
        ("this was asked for already", "This was asked for already."),
        ("this was asked for already, and is not decided yet", "This was asked for already, and is not decided yet"),
        ("by Dana", "This was asked for already: by Dana"),
    ],
)
def test_a_refusal_says_nothing_twice(detail: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    explain(AlreadyAsked(detail))
    assert capsys.readouterr().err.splitlines() == [said, "  code: already_asked"]


def test_a_date_that_is_none_is_answered_with_one_that_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["credits", "add", "5", "--org", "acme", "--expires", "yesterday"]) == Exit.WRONG_USAGE
    assert "It is no date or time such as 2026-12-31" in capsys.readouterr().err


def test_wrong_usage_is_2_and_says_how_to_get_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["db", "status", "--nonsense"]) == Exit.WRONG_USAGE
    assert "--nonsense" in capsys.readouterr().err


def test_help_and_version_end_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--help"]) == Exit.DONE
    assert cli.run(["--version"]) == Exit.DONE
    assert capsys.readouterr().out.strip().endswith("0.1.0")


def test_without_arguments_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([]) == Exit.WRONG_USAGE
    captured = capsys.readouterr()
    assert "Usage" in captured.out
    assert "Error" not in captured.err


def test_a_hint_names_the_program_as_its_reader_can_start_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(started: str, *, path: Path = tmp_path / "elsewhere") -> str:
        monkeypatch.setenv("PATH", str(path))
        monkeypatch.setattr("sys.argv", [started, "demo"])
        return this_program()

    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for name in ("bursar", "python"):
        (folder / name).touch(0o755)
    monkeypatch.setattr("sys.executable", str(folder / "python"))
    monkeypatch.chdir(tmp_path)
    assert told(".venv/bin/bursar") == told(str(folder / "bursar")) == ".venv/bin/bursar"
    assert told(str(folder / "bursar"), path=folder) == "bursar"
    assert told("/somewhere/bursar/__main__.py") == ".venv/bin/python -m bursar"
    monkeypatch.chdir(folder)
    assert told("./bursar") == "./bursar"
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    assert told(str(folder / "bursar")) == str(folder / "bursar")
