"""`bursar credits`, `codes` and what reads files, run as an operator runs them."""

import asyncio
import json
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.sql import SQL, Identifier
from tests.conftest import Org
from tests.credits.test_batcher import move

from bursar import cli, db
from bursar.cli.exits import Exit
from bursar.clock import uuid7
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action
from bursar.settings import Settings


@pytest.fixture
def run(database: db.Database, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Runs a command against the tests' database; gives exit code and what it printed as JSON, or as text."""
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(settings.given_master_key))
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))

    def call(*arguments: str) -> tuple[int, Any]:
        code = cli.run(list(arguments))
        printed = capsys.readouterr()
        return code, json.loads(printed.out) if "--json" in arguments and printed.out else printed.out + printed.err

    return call


def test_what_is_given_away_under_one_key_moves_once_and_tells_what_is_left_now(run: Any, org: Any) -> None:
    at = ("--org", org.slug)
    mira, noor = f"mira@{org.slug}.example", f"noor@{org.slug}.example"
    assert run("credits", "add", "500", *at)[0] == Exit.DONE
    for email in (mira, noor):
        assert run("users", "create", email, *at)[0] == Exit.DONE
        assert run("credits", "allocate", "100", "--user", email, *at)[0] == Exit.DONE
    give = ("credits", "reallocate", "70", "--from", mira, "--to", noor, *at, "--json")
    told = {"moved": "70", "from_has_left": "30", "to_has_left": "170"}
    assert run(*give, "--dry-run") == (Exit.DONE, told | {"dry_run": True})
    for _ in range(2):
        assert run(*give, "--idempotency-key", "once") == (Exit.DONE, told)
    for more in ((), ("--dry-run",)):
        code, _ = run(*give, *more)
        assert code != Exit.DONE, "thirty are left"
    code, told = run("credits", "take-back", "all", "--from", mira, *at, "--json")
    assert (code, told) == (Exit.DONE, {"moved": "30", "from_has_left": "0"})


TABLES = """
    select c.relnamespace::regnamespace::text, c.relname from pg_attribute a join pg_class c on c.oid = a.attrelid
    where a.attname = 'organization_id' and c.relkind in ('r', 'p') and not c.relispartition
      and c.relnamespace::regnamespace::text in ('credits', 'ledger', 'audit', 'outbox', 'alerts') order by 1, 2"""
SILENT = {"end-share", "end-raise", "end", "cancel"}


def test_a_dry_run_tells_the_same_and_changes_nothing(
    run: Any, org: Any, admin_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BURSAR_WEBHOOKS_LOOPBACK", "1")
    at = ("--org", org.slug)
    mira, noor = f"mira@{org.slug}.example", f"noor@{org.slug}.example"
    for email in (mira, noor):
        assert run("users", "create", email, *at)[0] == Exit.DONE

    def books() -> dict[str, list[Any]]:
        with psycopg.connect(admin_dsn) as conn:
            rows = SQL("select t::text from {} t where organization_id = %s order by 1")
            tables = [Identifier(*each) for each in conn.execute(TABLES)]
            assert len(tables) > 30
            return {str(name): conn.execute(rows.format(name), [org.organization_id]).fetchall() for name in tables}

    def tried(*command: str) -> dict[str, Any]:
        """What the command tells, which it tells with --dry-run, too."""
        before = books()
        code, planned = run(*command, *at, "--dry-run")
        assert (code, planned.endswith("A dry run: nothing was changed.\n")) == (Exit.DONE, True)
        assert books() == before
        if command[1] in SILENT:
            assert (run(*command, *at), books() != before) == ((Exit.DONE, ""), True)
            return {}
        code, planned = run(*command, *at, "--dry-run", "--json")
        assert (code, books()) == (Exit.DONE, before)
        code, told = run(*command, *at, "--json")
        assert (code, books() != before) == (Exit.DONE, True)
        assert planned.pop("dry_run") is True
        made = {name for name in told if name.endswith(("_id", "_at", "secret")) or name in ("grants", "to", "items")}
        assert "secret" not in planned
        assert {k: planned[k] for k in planned if k not in made} == {k: told[k] for k in told if k not in made}
        return dict(told)

    tried("credits", "add", "500")
    grant = tried("credits", "add", "70", "--user", mira)["grant_id"]
    tried("credits", "allocate", "100", "--user", mira)
    tried("credits", "allocate", "100", "--user", noor)
    tried("credits", "reallocate", "30", "--from", mira, "--to", noor)
    tried("credits", "take-back", "20", "--from", noor)
    tried("credits", "end-share", mira)
    tried("credits", "transfer", "5", "--from", "shared", "--to", noor)
    tried("credits", "void", grant, "--reason", "booked twice")
    cap = tried("caps", "set", "--user", mira, "--ask", "5cr", "--per", "day")["limit_id"]
    raised = tried("caps", "raise", cap, "--amount", "5cr", "--until", "2999-01-01")["raise_id"]
    tried("caps", "end-raise", raised)
    ask = ("caps", "request", "--user", mira, "--until", "2999-01-01", "--reason", "a demo", "--amount")
    assert tried("caps", "approve", tried(*ask, "5cr")["request_id"], "--amount", "4cr")["state"] == "approved"
    assert tried("caps", "deny", tried(*ask, "5cr")["request_id"])["state"] == "denied"
    tried("caps", "end", cap)
    schedule = tried("schedules", "add", "10")["schedule_id"]
    tried("schedules", "cancel", schedule)
    tried("credits", "cycle", "--anchor", "2026-01-31")
    pool = tried("top-ups", "set", "--below", "1000", "--amount", "10", "--ceiling", "100")["pool_id"]
    with psycopg.connect(admin_dsn) as conn:
        conn.execute("select set_config('app.organization_id', %s, true)", [str(org.organization_id)])
        begin = "select top_up_id from credits.begin_top_up(%s, %s, %s)"
        [(begun,)] = conn.execute(begin, [org.organization_id, UUID(pool.removeprefix("pool_")), uuid7()])
    top_up = f"top_{begun.hex}"
    told = tried("top-ups", "decline", top_up, "--reason", "card expired")
    assert (told["state"], told["reason"]) == ("failed", "card expired")
    told = tried("top-ups", "confirm", top_up, "--paid", "9.50", "--reference", "INV-1")
    assert (told["state"], told["paid_usd"], told["reference"]) == ("succeeded", "9.50", "INV-1")
    tried("top-ups", "stop")
    assert run("codes", "create", "50", "--campaign", "Spring", *at)[0] == Exit.DONE
    tried("codes", "revoke", "Spring", "--yes")
    webhook = tried("webhooks", "add", "http://127.0.0.1:9/bursar")["webhook_id"]
    tried("webhooks", "rotate", webhook)
    assert tried("webhooks", "replay", webhook, "--hours", "1")["events"] > 0
    with psycopg.connect(admin_dsn) as conn:
        failed = "update outbox.endpoints set state = 'disabled', ended_at = now() where endpoint_id = %s"
        conn.execute(failed, [UUID(webhook.removeprefix("whk_"))])
    assert tried("webhooks", "enable", webhook)["state"] == "active"
    tried("alerts", "set", "pool", "--at", "80", "--mail", "cfo@acme.example")
    before = books()
    assert run("webhooks", "remove", webhook, *at, "--dry-run")[0] == Exit.DONE
    assert books() == before
    assert run("webhooks", "remove", webhook, *at) == (Exit.DONE, "It is removed.\n")


def test_more_codes_of_a_campaign_have_its_terms_or_are_refused(run: Any, org: Any) -> None:
    create = ("codes", "create", "50", "--campaign", "Spring", "--org", org.slug)
    terms = ("--credits-days", "90", "--in-all", "10", "--domain", "a.example", "--domain", "b.example")
    assert run(*create, *terms)[0] == Exit.DONE
    for same in ((), terms, ("--in-all", "10"), ("--domain", "b.example", "--domain", "a.example")):
        code, made = run(*create, *same, "--json")
        assert (code, len(made["codes"])) == (Exit.DONE, 1)
    others = {
        "credits_days": "9", "in_all": "11", "domain": "a.example", "per_code": "2", "per_person": "2",
        "per_domain": "3", "per_organization": "3", "per_day": "3", "valid_from": "2020-01-01",
        "valid_until": "2999-01-01", "credits_until": "2999-01-01",
    }  # fmt: skip
    for term, value in others.items():
        for more in ((), ("--dry-run",)):
            code, said = run(*create, f"--{term.replace('_', '-')}", value, *more)
            assert (code, f"({term})" in said) == (Exit.WRONG_USAGE, True), (term, said)
    code, said = run("codes", "create", "51", "--campaign", "Spring", "--org", org.slug)
    assert (code, "(amount)" in said) == (Exit.WRONG_USAGE, True)
    assert run("codes", "revoke", "Spring", "--org", org.slug, "--yes")[0] == Exit.DONE
    code, planned = run(*create, "--per-day", "3", "--count", "2", "--dry-run", "--json")
    assert (code, planned) == (Exit.DONE, {"codes": 2, "credits_at_most": "100"})
    assert run(*create, "--per-day", "3")[0] == Exit.DONE, "of a new campaign of this name"


def test_a_scenario_that_is_no_text_is_refused(run: Any, tmp_path: Path) -> None:
    file = tmp_path / "scenario.json"
    file.write_bytes(b"\xff\xfe{}")
    assert run("simulate", str(file))[0] == Exit.WRONG_USAGE
    assert run("simulate", str(tmp_path / "none"))[0] == Exit.WRONG_USAGE


def test_what_a_closed_pool_is_owed_is_shown_until_it_is_paid(run: Any, org: Org) -> None:
    at, request = ("--org", org.slug), uuid7()

    async def ask(action: Action, amount: int) -> None:
        async with Batcher(org.database.dsn("bursar_lane")) as batcher:
            assert (await batcher.move(move(org, action, amount * 1_000_000, request))).accepted

    def shown() -> list[tuple[str, bool, str, str, str]]:
        code, rows = run("credits", "show", *at, "--json")
        assert code == Exit.DONE
        keys = ("kind", "is_closed", "available", "held", "overage")
        return [tuple(row[key] for key in keys) for row in rows["items"]]

    assert run("credits", "add", "20", *at)[0] == Exit.DONE
    asyncio.run(ask(Action.AUTHORIZE, 20))
    assert run("orgs", "pools", org.slug, "--switch", "personal")[0] == Exit.DONE
    assert shown() == [("shared", True, "0", "20", "0"), ("personal", False, "0", "0", "0")]
    asyncio.run(ask(Action.SETTLE, 35))
    assert shown() == [("shared", True, "0", "0", "15"), ("personal", False, "0", "0", "0")]
    assert "shared (closed)" in run("credits", "show", *at)[1]
    [email] = [row["email"] for row in run("users", "list", *at, "--json")[1]["items"]]
    assert run("credits", "add", "10", *at, "--user", email)[0] == Exit.DONE
    assert shown() == [("shared", True, "0", "0", "5"), ("personal", False, "0", "0", "0")]
    assert run("credits", "add", "91", *at, "--user", email)[0] == Exit.DONE
    assert shown() == [("personal", False, "86", "0", "0")]
    code, planned = run("credits", "refund", f"req_{request.hex}", "--reason", "a demo", "--dry-run", "--json")
    assert (code, planned["refunded"], planned["dry_run"]) == (Exit.DONE, "35", True)
    assert shown() == [("personal", False, "86", "0", "0")]
