"""The commands about organizations, people, teams, departments and keys, run as an operator runs them."""

import asyncio
import json
from uuid import UUID, uuid4

import pytest

from bursar import cli, db
from bursar.cli.exits import Exit
from bursar.identity.principals import InvalidApiKey, principal_of_key
from bursar.identity.sessions import sign_in


class Operator:
    """Runs commands on the tests' database."""

    def __init__(self, settings, capsys) -> None:
        self.settings, self._capsys = settings, capsys

    def run(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        code = cli.run(list(arguments))
        printed = self._capsys.readouterr()
        return code, printed.out, printed.err

    def json(self, *arguments: str):
        code, out, err = self.run(*arguments, "--json")
        assert code == Exit.DONE, err
        return json.loads(out)

    def ask(self, work):
        async def run():
            async with db.opened(self.settings) as database:
                return await work(database)

        return asyncio.run(run())


@pytest.fixture
def operator(database: db.Database, settings, monkeypatch, capsys) -> Operator:
    monkeypatch.setenv("DATABASE_URL", settings.database_url)
    monkeypatch.setenv("BURSAR_MASTER_KEY", settings.given_master_key)
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))
    return Operator(settings, capsys)


@pytest.fixture
def acme(operator: Operator) -> str:
    """The slug of a new organization."""
    return operator.json("orgs", "create", f"Acme {uuid4().hex[:12]}", "--zone", "Europe/Paris")["slug"]


def test_an_organization_is_created_listed_shown_and_changed(operator: Operator, acme: str) -> None:
    assert acme in [each["slug"] for each in operator.json("orgs", "list")["items"]]
    shown = operator.json("orgs", "show", acme)
    assert (shown["zone"], shown["members"], shown["status"]) == ("Europe/Paris", 0, "active")
    assert operator.json("orgs", "change", acme, "--zone", "Asia/Kolkata", "--shows-margin")["shows_margin"] is True
    assert operator.json("orgs", "set-status", acme, "frozen", "--reason", "unpaid")["status"] == "frozen"
    code, out, _ = operator.run("orgs", "list")
    assert code == Exit.DONE
    assert acme in out


def test_people_are_created_placed_and_removed(operator: Operator, acme: str) -> None:
    email = f"{uuid4().hex}@acme.example"
    operator.json("departments", "create", "Engineering", "--org", acme)
    operator.json("teams", "create", "Data", "--org", acme, "--department", "engineering")
    operator.json("users", "create", email, "--org", acme, "--name", "Dana", "--role", "team_lead", "--team", "data")
    assert operator.run("teams", "lead", "Data", email, "--org", acme)[0] == Exit.DONE
    assert operator.run("users", "roles", email, "org_admin", "finance", "--org", acme)[0] == Exit.DONE
    assert operator.run("users", "move", email, "--org", acme, "--department", "Engineering")[0] == Exit.DONE
    (row,) = operator.json("users", "list", "--org", acme)["items"]
    assert (row["roles"], row["team"], row["department"]) == (["finance", "org_admin"], "", "Engineering")
    for verb, status in (("suspend", "suspended"), ("resume", "active"), ("remove", "left")):
        assert operator.run("users", verb, email, "--org", acme, "--reason", "a test")[0] == Exit.DONE
        assert operator.json("users", "list", "--org", acme)["items"][0]["status"] == status


def test_a_printed_link_signs_in(operator: Operator, acme: str) -> None:
    email = f"{uuid4().hex}@acme.example"
    user_id = operator.json("users", "create", email, "--org", acme)["user_id"]
    code, out, _ = operator.run("users", "link", email, "--base-url", "https://bursar.example/")
    assert code == Exit.DONE
    base, _, token = out.strip().rpartition("/")
    assert base == "https://bursar.example/sign-in"
    assert operator.ask(lambda database: sign_in(database, token)).user.user_id == UUID(user_id.removeprefix("usr_"))


def test_ids_are_told_with_what_they_are_of_and_taken_back_so(operator: Operator, acme: str) -> None:
    person = operator.json("users", "create", f"{uuid4().hex}@acme.example", "--org", acme)
    assert (person["user_id"][:4], len(person["user_id"])) == ("usr_", 36)
    department = operator.json("departments", "create", uuid4().hex, "--org", acme)["department_id"]
    team = operator.json("teams", "create", uuid4().hex, "--org", acme, "--department", department)
    assert (team["team_id"][:5], department[:4], team["department_id"]) == ("team_", "dep_", department)
    organization = next(each for each in operator.json("orgs", "list")["items"] if each["slug"] == acme)
    members = operator.json("users", "list", "--org", organization["organization_id"])["items"]
    assert organization["organization_id"].startswith("org_")
    assert person["user_id"] in {each["user_id"] for each in members}


def test_keys_are_created_rotated_and_revoked_and_their_text_is_alone_on_stdout(operator: Operator, acme: str) -> None:
    email = f"{uuid4().hex}@acme.example"
    operator.json("users", "create", email, "--org", acme)
    code, out, err = operator.run("keys", "create", "Laptop", "--org", acme, "--user", email)
    text = out.strip()
    assert (code, text[:3], "cannot be shown again" in err) == (Exit.DONE, "bk_", True)
    (listed,) = operator.json("keys", "list", "--org", acme)["items"]
    assert text.startswith(listed["key"])
    rotated = operator.json("keys", "rotate", listed["key"], "--overlap-hours", "0")["text"]
    assert operator.json("keys", "revoke", rotated, "--reason", "leaked")["state"] == "revoked"
    for each in (text, rotated):
        with pytest.raises(InvalidApiKey):
            operator.ask(lambda database, each=each: principal_of_key(database, each, chosen=None))
    personal = operator.json("keys", "create", "Mine", "--personal", "--user", email)["text"]
    principal = operator.ask(lambda database: principal_of_key(database, personal, chosen=None))
    assert principal.organization_slug == acme


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["orgs", "show", "no-such-organization"], Exit.NOT_FOUND),
        (["users", "list", "--org", "no-such-organization"], Exit.NOT_FOUND),
        (["orgs", "create", "X", "--slug", "{acme}"], Exit.CONFLICT),
        (["orgs", "create", "東京"], Exit.WRONG_USAGE),
        (["orgs", "create", "X Y", "--zone", "Mars/Olympus"], Exit.WRONG_USAGE),
        (["users", "create", "not an address", "--org", "{acme}"], Exit.WRONG_USAGE),
        (["users", "create", "x@y.example", "--org", "{acme}", "--role", "emperor"], Exit.WRONG_USAGE),
        (["users", "create", "x@y.example", "--org", "{acme}", "--role", "system_admin"], Exit.WRONG_USAGE),
        (["users", "create", "x@y.example", "--org", "{acme}", "--team", "none"], Exit.NOT_FOUND),
        (["users", "link", "nobody@nowhere.example"], Exit.NOT_FOUND),
        (["keys", "create", "X"], Exit.WRONG_USAGE),
        (["keys", "create", "X", "--org", "{acme}", "--personal"], Exit.WRONG_USAGE),
        (["keys", "create", "X", "--org", "{acme}", "--user", "nobody@nowhere.example"], Exit.NOT_FOUND),
        (["keys", "revoke", "bk_nonsense"], Exit.NOT_FOUND),
        (["teams", "archive", "none", "--org", "{acme}"], Exit.NOT_FOUND),
    ],
)
def test_every_refusal_has_its_exit_code_and_says_why(
    operator: Operator, acme: str, arguments: list[str], code: Exit
) -> None:
    found, out, err = operator.run(*[each.format(acme=acme) for each in arguments])
    assert (found, out) == (code, "")
    assert err.strip()
