"""`bursar models` and `bursar providers unroute`, run as an operator runs them."""

import json
from typing import Any

import pytest

from bursar import cli, db
from bursar.cli.exits import Exit
from bursar.clock import uuid7
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


def test_rules_are_made_listed_asked_about_and_forgotten(run: Any, org: Any) -> None:
    at = ("--org", org.slug)
    run("teams", "create", "Data", *at)
    assert run("keys", "create", "ci", *at)[0] == Exit.DONE
    assert run("models", "list", *at)[1] == "Every model is allowed.\n"
    code, out, _ = run("models", "allow", "demo-1%", *at, "--json")
    rule = json.loads(out)
    assert (code, rule["effect"], rule["pattern"], rule["set_by"]) == (Exit.DONE, "allow", "demo-1%", "operator")
    assert run("models", "deny", "demo-1-long", *at, "--team", "data")[0] == Exit.DONE
    assert run("models", "deny", "%-preview", *at, "--key", "ci")[0] == Exit.DONE
    assert run("models", "deny", "x", *at, "--key", "ci", "--team", "data")[0] == Exit.WRONG_USAGE
    listed = json.loads(run("models", "list", *at, "--json")[1])["items"]
    assert [(each["scope"], each["scope_name"], each["effect"], each["pattern"]) for each in listed] == [
        ("organization", "Test Corp", "allow", "demo-1%"),
        ("team", "Data", "deny", "demo-1-long"),
        ("key", "ci", "deny", "%-preview"),
    ]
    code, out, _ = run("why", *at, "--model", "gpt-4o")
    assert code == Exit.REFUSED
    assert "Refused (model_not_allowed)" in out
    assert "the organization allows demo-1% only" in out
    asked = json.loads(run("why", *at, "--model", "demo-1-preview", "--key", "ci", "--json")[1])
    assert (asked["allowed"], asked["rule"]["scope_name"]) == (False, "ci")
    assert run("models", "forget", rule["rule"], *at)[0] == Exit.DONE
    assert run("models", "forget", rule["rule"], *at)[0] == Exit.NOT_FOUND
    assert run("models", "forget", "nonsense", *at)[0] == Exit.NOT_FOUND


def test_aliases_are_made_listed_and_taken_away(run: Any, org: Any) -> None:
    at = ("--org", org.slug)
    assert json.loads(run("models", "alias", "house", "demo-1", *at, "--json")[1]) == {
        "alias": "house",
        "model": "demo-1",
    }
    code, _, said = run("models", "alias", "home", "house", *at)
    assert (code, "is an alias itself" in said) == (Exit.WRONG_USAGE, True)
    assert [each["alias"] for each in json.loads(run("models", "aliases", *at, "--json")[1])["items"]] == ["house"]
    assert run("models", "unalias", "house", *at)[0] == Exit.DONE
    assert run("models", "unalias", "house", *at)[0] == Exit.NOT_FOUND


def test_a_route_is_taken_away(run: Any) -> None:
    name = f"alias-{uuid7().hex}"
    assert run("providers", "route", name, "demo", "demo-1")[0] == Exit.DONE
    assert run("providers", "unroute", name)[0] == Exit.DONE
    assert run("providers", "unroute", name)[0] == Exit.NOT_FOUND


def test_a_provider_is_added_with_query_and_headers(run: Any) -> None:
    name = f"c-{uuid7().hex}"
    code, out, _ = run(
        *("providers", "add", name, "--kind", "openai", "--auth", "api-key", "--query", "api-version=2024-10-21"),
        *("--base-url", "https://acme.openai.azure.com/openai/deployments/{model}"),
        *("--header", "X-Title: Acme", "--header", "X-Team: a: b", "--json"),
    )
    made = json.loads(out)
    assert (code, made["query"], made["headers"]) == (
        Exit.DONE,
        "api-version=2024-10-21",
        {"x-title": "Acme", "x-team": "a: b"},
    )
    assert json.loads(run("providers", "add", name, "--header", "", "--json")[1])["headers"] == {}
    assert run("providers", "add", name, "--header", "nonsense")[0] == Exit.WRONG_USAGE
