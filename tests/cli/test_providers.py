import io
import json
from typing import Any

import pytest

from bursar import db
from bursar.cli import run
from bursar.cli.exits import Exit
from bursar.clock import uuid7
from bursar.settings import Settings

SECRET = "sk-typed-by-the-operator-9876"


@pytest.fixture
def cli(database: db.Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs a command against the tests' database; gives exit code, JSON document and stderr."""
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))

    def call(*arguments: str, stdin: str = "") -> tuple[int, Any, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        code = run(["providers", *arguments, "--json"])
        printed = capsys.readouterr()
        assert SECRET not in printed.out + printed.err
        return code, json.loads(printed.out) if printed.out else None, printed.err

    return call


def test_a_provider_is_added_listed_and_switched_off(cli: Any) -> None:
    name = f"c-{uuid7().hex}"
    code, added, _ = cli("add", name, "--kind", "openai", "--base-url", "https://provider.example/v1")
    assert (code, added["base_url"], added["enabled"]) == (Exit.DONE, "https://provider.example/v1", True)
    _, changed, _ = cli("add", name, "--off")
    assert (changed["base_url"], changed["enabled"]) == ("https://provider.example/v1", False)
    _, listed, _ = cli("list")
    assert {"demo", name} <= {each["name"] for each in listed["items"]}


def test_an_address_that_cannot_be_used_is_wrong_usage(cli: Any) -> None:
    code, printed, said = cli("add", f"c-{uuid7().hex}", "--kind", "openai", "--base-url", "http://provider.example/v1")
    assert (code, printed) == (Exit.WRONG_USAGE, None)
    assert "invalid_base_url" in said


def test_a_key_is_entered_listed_and_revoked_without_being_shown(cli: Any) -> None:
    name = f"c-{uuid7().hex}"
    cli("add", name, "--kind", "openai", "--base-url", "https://provider.example/v1")
    code, key, _ = cli("key", name, stdin=SECRET + "\n")
    assert (code, key["last4"], key["is_own"]) == (Exit.DONE, "9876", False)
    _, listed, _ = cli("keys")
    assert key["provider_key_id"] in {each["provider_key_id"] for each in listed["items"]}
    code, revoked, _ = cli("revoke", key["provider_key_id"])
    assert (code, revoked["revoked_at"] is not None) == (Exit.DONE, True)
    code, _, _ = cli("revoke", key["provider_key_id"])
    assert code == Exit.NOT_FOUND


def test_an_organizations_own_key_is_the_organizations(cli: Any, org: Any) -> None:
    code, key, _ = cli("key", "demo", "--org", org.slug, stdin=SECRET)
    assert (code, key["is_own"], key["organization_id"]) == (Exit.DONE, True, f"org_{org.organization_id.hex}")
    _, listed, _ = cli("keys", "--org", org.slug)
    assert [each["provider_key_id"] for each in listed["items"]] == [key["provider_key_id"]]


def test_a_model_name_is_routed(cli: Any) -> None:
    name = f"alias-{uuid7().hex}"
    code, added, _ = cli("route", name, "demo", "demo-1")
    assert (code, added["upstream_model"]) == (Exit.DONE, "demo-1")
    _, listed, _ = cli("routes")
    assert name in {each["model"] for each in listed["items"]}
    code, _, said = cli("route", name, "nobody", "x")
    assert (code, "provider_not_found" in said) == (Exit.NOT_FOUND, True)
