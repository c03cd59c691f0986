"""`--at` and `bursar credits statement`, run as an operator runs them; docs/time.md shows them as tables."""

import csv
import io
import json
from datetime import UTC, datetime
from typing import Any

import pytest
import typer

from bursar import cli, db
from bursar.cli.exits import Exit
from bursar.cli.past import instant_of
from bursar.settings import Settings


@pytest.fixture
def run(database: db.Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs a command against the tests' database; gives exit code, stdout and stderr."""
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))

    def call(*arguments: str) -> tuple[int, str, str]:
        code = cli.run(list(arguments))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def test_a_statement_is_one_document_or_comma_separated_values(run: Any, org: Any) -> None:
    at = ("--org", org.slug)
    assert run("credits", "add", "12.5", *at)[0] == Exit.DONE
    days = ("--from", "2020-01-01", "--to", "2100-01-01")
    code, out, _ = run("credits", "statement", *at, *days, "--json")
    document = json.loads(out)
    assert (code, document["is_over"]) == (Exit.DONE, False)
    [pool] = document["pools"]
    assert (pool["opening"], pool["closing"], pool["used_later"]) == ("0", "12.5", "0")
    assert pool["lines"] == [
        {"line": "grant", "source": "purchase", "used_in": None, "is_inside": True, "credits": "12.5", "count": 1}
    ]
    rows = list(csv.DictReader(io.StringIO(run("credits", "statement", *at, *days, "--csv")[1])))
    assert [(row["line"], row["credits"], row["count"]) for row in rows] == [
        ("opening balance", "0", ""), ("granted (purchase)", "12.5", "1"), ("closing balance", "12.5", ""),
    ]  # fmt: skip
    before = json.loads(run("credits", "statement", *at, "--period", "2020-02", "--json")[1])
    assert before["pools"] == []
    for wrong in ((), ("--from", "2020-01-01"), ("--period", "2020-01", "--from", "2020-01-01", "--to", "2020-02-01")):
        assert run("credits", "statement", *at, *wrong)[0] == Exit.WRONG_USAGE
    code, _, err = run("credits", "statement", *at, "--period", "2999-01")
    assert code != Exit.DONE
    assert "not_a_period" in err


def test_what_is_held_is_told_of_no_past_instant(run: Any, org: Any) -> None:
    at = ("--org", org.slug)
    run("credits", "add", "5", *at)
    [pool] = json.loads(run("credits", "show", *at, "--at", datetime.now(UTC).isoformat(), "--json")[1])["items"]
    assert (pool["granted"], pool["left"], pool["held"]) == ("5", "5", None)
    assert json.loads(run("credits", "show", *at, "--at", "2020-01-01", "--json")[1])["items"] == []
    code, _, err = run("credits", "show", *at, "--at", "2999-01-01")
    assert code != Exit.DONE
    assert "instant_to_come" in err


def test_an_instant_without_offset_is_in_utc() -> None:
    assert instant_of("2026-10-31T12:00:00.000001") == datetime(2026, 10, 31, 12, 0, 0, 1, tzinfo=UTC)
    assert instant_of("2026-10-31T12:00:00+02:00") == datetime(2026, 10, 31, 10, 0, tzinfo=UTC)
    assert instant_of("2026-10-31") == datetime(2026, 10, 31, tzinfo=UTC)
    with pytest.raises(typer.BadParameter):
        instant_of("yesterday")
