"""`bursar db query`: reads, one organization or all, and nothing else."""

import json
from typing import Any

import pytest

from bursar import cli, db
from bursar.settings import Settings


@pytest.fixture
def query(database: db.Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))

    def run(*words: str) -> tuple[int, str, str]:
        code = cli.run(["db", "query", *words])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


NAMES = "select name, 1.50 as amount from identity.organizations"


def test_with_an_organization_only_it_is_seen(query: Any, org: Any, make_org: Any) -> None:
    code, out, _ = query(NAMES, "--org", str(org.organization_id), "--json")
    assert (code, [item["amount"] for item in json.loads(out)["items"]]) == (0, ["1.50"])
    code, out, _ = query(NAMES, "--json")
    assert code == 0
    assert len(json.loads(out)["items"]) > 1


def test_ids_are_told_as_a_statement_can_ask_for_them(query: Any, org: Any) -> None:
    organization = str(org.organization_id)
    statement = f"select organization_id from identity.organizations where organization_id = '{organization}'"
    assert json.loads(query(statement, "--json")[1])["items"] == [{"organization_id": organization}]
    assert organization in query(statement)[1]


@pytest.mark.parametrize(
    ("statement", "why"),
    [
        ("delete from identity.organizations", "read-only transaction"),
        ("commit; delete from identity.organizations", "multiple commands"),
        ("select nothing from nowhere", "does not exist"),
        ("select 1 as a, 2 as a", "Two columns have one name"),
    ],
)
def test_what_is_no_single_reading_query_fails_and_says_why(query: Any, statement: str, why: str) -> None:
    code, out, err = query(statement)
    assert (code, out) == (1, "")
    assert why in err
