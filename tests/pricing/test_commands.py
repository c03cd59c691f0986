"""`bursar prices`, run as an operator runs it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from bursar import cli, db
from bursar.cli.exits import Exit
from bursar.settings import Settings

Run = Callable[..., Any]


@pytest.fixture
def run(
    shipped: db.Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Runs a command on the tests' database; the JSON it prints, or with `code` what it prints when it ends so."""
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))

    def run(*arguments: str, code: Exit | None = None) -> Any:
        capsys.readouterr()
        ended = cli.run(["prices", *arguments] if code is not None else ["prices", *arguments, "--json"])
        printed = capsys.readouterr()
        assert ended == (code or Exit.DONE), printed.err
        return json.loads(printed.out) if code is None else printed.out + printed.err

    return run


@pytest.fixture
def acme(run: Run, capsys: pytest.CaptureFixture[str]) -> str:
    """The slug of a new organization."""
    assert cli.run(["orgs", "create", f"Acme {uuid4().hex[:12]}", "--json"]) == Exit.DONE
    return str(json.loads(capsys.readouterr().out)["slug"])


@pytest.fixture
def csv_file(tmp_path: Path) -> Callable[..., tuple[str, str]]:
    """Writes a price file; its path and the name of its provider and list."""
    name = f"own-{uuid4().hex}"

    def write(*lines: str) -> tuple[str, str]:
        path = tmp_path / "prices.csv"
        rows = [f"{name},{line}" for line in lines]
        path.write_text("\n".join(["provider,model,kind,price_usd,unit", *rows]), encoding="utf-8")
        return str(path), name

    return write


def test_the_book_is_listed(run: Run) -> None:
    items = run("list", "--provider", "demo", "--model", "demo-1")["items"]
    assert [each["model"] for each in items] == ["demo-1", "demo-1-long", "demo-1-mini"]
    assert {"kind": "output_tokens", "price_usd": "4.00", "unit": "1M tokens"}.items() <= next(
        rate for rate in items[0]["rates"] if rate["kind"] == "output_tokens"
    ).items()
    table = run("list", "--provider", "demo", code=Exit.DONE)
    assert "web_searches 10.00/1K searches" in table
    assert "dearer above 200,000" in table


def test_a_dated_name_is_shown_as_its_model(run: Run) -> None:
    assert run("show", "openai", "gpt-4o-2024-08-06")["model"] == "gpt-4o"
    assert "service_tier=flex" in run("show", "openai", "gpt-5", code=Exit.DONE)


def test_a_model_without_a_price_is_said_to_have_none(run: Run) -> None:
    said = run("show", "demo", "nobody-knows", code=Exit.WRONG_USAGE)
    assert "model_not_priced" in said


def test_a_file_is_previewed_imported_and_changed(run: Run, csv_file: Callable[..., tuple[str, str]]) -> None:
    path, name = csv_file("large,input_tokens,2.50,1M tokens", "small,input_tokens,1,1M tokens")
    first = run("import", path, "--list", name, "--dry-run")
    assert first["lists"][0]["counts"] == {"added": 2, "changed": 0, "unchanged": 0}
    run("show", name, "large", code=Exit.WRONG_USAGE)
    run("import", path, "--list", name)
    assert run("show", name, "large")["rates"][0]["price_usd"] == "2.50"
    csv_file("large,input_tokens,3,1M tokens")
    said = run("import", path, "--list", name, "--from", "2099-01-01", code=Exit.DONE)
    assert f"{name}/large input_tokens: 2.50 -> 3.00 USD/1M tokens" in said
    assert f"{name}/small is not in the list any more; its price stays" in said
    assert run("show", name, "large")["rates"][0]["price_usd"] == "2.50"
    assert run("show", name, "large", "--at", "2099-01-01")["rates"][0]["price_usd"] == "3.00"


def test_a_rejected_row_stops_the_import_and_is_named(run: Run, csv_file: Callable[..., tuple[str, str]]) -> None:
    path, name = csv_file("large,input_tokens,2.50,1M tokens", "small,input_tokens,free,1M tokens")
    said = run("import", path, "--list", name, code=Exit.WRONG_USAGE)
    assert "line 3: not a decimal amount such as 12.5: 'free'" in said
    run("show", name, "large", code=Exit.WRONG_USAGE)


def test_the_shipped_lists_are_there_already(run: Run) -> None:
    assert run("refresh") == {"dry_run": False, "lists": []}


def test_what_an_organization_pays_is_agreed_and_shown(run: Run, acme: str) -> None:
    assert run("markup", "1.25", "--org", acme)["markup_ppm"] == 1_250_000
    assert run("show", "demo", "demo-1", "--org", acme)["markup"] == "1.25"
    run("override", "demo", "demo-1", "--org", acme, "--price", "input_tokens=0.5", "--price", "output_tokens=0")
    shown = run("show", "demo", "demo-1", "--org", acme)
    assert shown["basis"] == "override"
    assert [(each["price_usd"], each["free"]) for each in shown["charge"]["rates"]] == [("0.50", False), ("0.00", True)]
    assert shown["cost"]["model"] == "demo-1"
    run("override", "demo", "demo-1", "--org", acme, "--end", "--reason", "contract ended")
    run("policy", "fallback", "--fallback", "demo/demo-claude", "--org", acme)
    assert run("show", "demo", "nobody-knows", "--org", acme)["charge"]["model"] == "demo-claude"
    rows = run("terms", "--org", acme)["items"]
    assert [(each["what"], each["value"]) for each in rows] == [
        ("price", "input_tokens 0.50/1M tokens, output_tokens 0.00/1M tokens"),
        ("price", "ended"),
        ("mark-up", "1.25"),
        ("unknown models", "fallback demo/demo-claude"),
    ]
    assert "contract ended" in run("terms", "--org", acme, code=Exit.DONE)


def test_a_model_charged_nothing_by_policy_says_so(run: Run, acme: str) -> None:
    run("policy", "pass", "--org", acme)
    assert run("show", "demo", "nobody-knows", "--org", acme)["basis"] == "unpriced"
    assert "Charged nothing, by policy." in run("show", "demo", "nobody-knows", "--org", acme, code=Exit.DONE)


@pytest.mark.parametrize(
    "arguments",
    [
        ("markup", "free"),
        ("markup", "0"),
        ("markup", "1.0000001"),
        ("markup",),
        ("override", "demo", "demo-1"),
        ("override", "demo", "demo-1", "--price", "input_tokens=1", "--end"),
        ("override", "demo", "demo-1", "--price", "input=1"),
        ("override", "demo", "demo-1", "--price", "input_tokens"),
        ("policy", "fallback"),
        ("policy", "fallback", "--fallback", "demo/nobody-knows"),
        ("policy", "pass", "--fallback", "demo/demo-1"),
        ("markup", "1.2", "--from", "2020-01-01"),
        ("markup", "1.2", "--from", "yesterday"),
    ],
)
def test_wrong_usage_is_refused_and_changes_nothing(run: Run, acme: str, arguments: tuple[str, ...]) -> None:
    run(*arguments, "--org", acme, code=Exit.WRONG_USAGE)
    assert run("terms", "--org", acme) == {"items": []}
