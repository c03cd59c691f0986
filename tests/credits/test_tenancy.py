"""Of money too: who acts for one organization reaches nothing of another, by any function or table of the treasury."""

import re
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb
from tests.credits.scenes import Scene

from bursar import db
from bursar.clock import uuid7
from bursar.credits.moves import Action

# What the application may call in the schema credits. The second kind only computes, or reads with the caller's rights.
COMMANDS = {
    "add_credits_to_pool",
    "add_codes",
    "add_grant",
    "add_schedule",
    "cancel_schedule",
    "allocate",
    "allocate_credits_to_user",
    "arrive",
    "authorize",
    "available_of",
    "begin_top_up",
    "current_chain",
    "deduct",
    "decide_request",
    "decide_top_up",
    "deduct_credits",
    "depart",
    "end_allocation",
    "end_limit",
    "end_raise",
    "end_top_up",
    "extend",
    "finish_redemption",
    "fold",
    "forget_commands",
    "forgive_debt",
    "grant_code",
    "has_sufficient_credits",
    "limits_changed",
    "move_one",
    "note_arrival",
    "open_campaign",
    "open_organization",
    "open_pool",
    "raise_limit",
    "reallocate",
    "redeem_code",
    "refund_charge",
    "release",
    "request_raise",
    "revoke_codes",
    "set_cycle",
    "set_limit",
    "set_top_up",
    "settle",
    "switch_pools",
    "transfer_credits",
    "void_grant",
}
CALCULATIONS = {
    "admits",
    "burn_reason",
    "calendar_of",
    "draws_of",
    "parts_of",
    "hash_of",
    "no_usage",
    "period_around",
    "period_end",
    "period_start",
    "revenue_of_requests",
    "stretches",
    "tails",
    "value_taken",
    "value_upto",
    "value_within",
}
LANES = {"move_batch", "move_one", "expire_holds", "expire_holds_of"}
IDS_AND_TIMES = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|\d{4}-\d\d-\d\d \d\d:\d\d:[\d.+]+")
TABLES = """
    select n.nspname || '.' || c.relname from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname in ('credits', 'ledger') and c.relkind in ('r', 'p') and not c.relispartition order by 1"""


def _granted(books: db.Database, role: str) -> set[str]:
    with psycopg.connect(books.dsn("admin")) as conn:
        rows = conn.execute(
            "select p.proname from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
            "where n.nspname = 'credits' and has_function_privilege(%s, p.oid, 'execute')",
            [role],
        )
        return {row[0] for row in rows.fetchall()}


def test_each_role_may_call_exactly_what_it_is_meant_to(books: db.Database) -> None:
    assert _granted(books, "bursar_app") == COMMANDS | CALCULATIONS
    assert _granted(books, "bursar_lane") == LANES
    assert _granted(books, "bursar_simulator") >= LANES
    assert _granted(books, "bursar_backup") == set()
    assert _granted(books, "public") == set()


def test_every_command_takes_the_gate_before_anything_else(books: db.Database) -> None:
    ungated = {"available_of", "limits_changed", "move_one", "open_organization"}  # or by themselves, as move_one
    with psycopg.connect(books.dsn("admin")) as conn:
        rows = conn.execute(
            "select p.proname, substring(p.prosrc from 'credits\\.(\\w+)\\s*\\(') from pg_proc p"
            " where p.pronamespace = 'credits'::regnamespace and p.proname = any (%s)",
            [list(COMMANDS - ungated)],
        ).fetchall()
    assert {name for name, first in rows if first != "lock_gate" and first not in COMMANDS} == set()


@pytest.mark.parametrize("role", ["bursar_app", "bursar_platform"])
def test_nobody_but_the_lanes_decides_for_many_organizations(scene: Scene, role: str) -> None:
    for call in (
        "credits.expire_holds()",
        "credits.fold_due_pools(null, now())",
        "credits.set_pool_limit(null, null, 1)",
    ):
        with scene.refusal("42501"), scene.acting_as(role, scene.organization):
            scene.conn.execute(f"select {call}")
    with scene.refusal("42501"), scene.acting_as(role, scene.organization):
        scene.conn.execute("select credits.move_batch(" + ", ".join(["null"] * 22) + ")")
    may = (
        "select has_function_privilege(%s, p.oid, 'execute') from pg_proc p where p.oid = 'credits.move_batch'::regproc"
    )
    assert [scene.admin(may, who) for who in (role, "bursar_lane")] == [[(False,)], [(True,)]]


def test_a_lane_reads_and_changes_no_table_itself(scene: Scene) -> None:
    tables = scene.admin(TABLES)
    assert len(tables) > 30
    for (table,) in tables:
        for statement in (f"select from {table}", f"delete from {table}"):
            with scene.refusal("42501"), scene.acting_as("bursar_lane"):
                scene.conn.execute(statement)


# ---------------------------------------------------------------------------------------------- another's


class Victim(Scene):
    """An organization with one of everything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.someone = self.user()
        self.shared = self.pool()
        self.granted = self.grant(self.shared, 1000)
        self.allocated = self.share(self.shared, self.someone, 100)
        self.limited = self.limit(500, scope="user", of=self.someone)
        self.limit(400)
        # Not due yet: whoever folds what is due asks for the tenant too, and would hide who does not.
        self.scheduled = self.schedule(self.shared, 10, anchor=datetime(2076, 1, 1, tzinfo=UTC))
        self.held = self.hold(20, self.someone)
        self.deduct(10, self.someone)
        chain = "select chain_id from credits.chains where organization_id = %s"
        self.chain = self.admin(chain, self.organization)[0][0]
        self.asked_about = self.limit(400, scope="user", of=self.someone, metric="tokens", action="asks")
        self.asked_for = self.request(self.asked_about, self.someone, 5)
        self.raised = self.raise_(self.limited, 5)
        self.campaign, self.code, self.claimed, self.bought, self.moved = (uuid7() for _ in range(5))
        self.call(
            "select credits.open_campaign(%s, %s, %s, null, %s)",
            self.organization, self.campaign,
            Jsonb({"name": "x", "amount_micros": 1, "priority": 50, "valid_until": "infinity", "is_for_members": False,
                   "credits_expire_at": "infinity", "most_per_code": 2, "most_per_person": 2}), self.now,
        )  # fmt: skip
        codes = Jsonb({str(self.code): "7Q2K"})
        self.call("select credits.add_codes(%s, %s, %s, %s)", self.organization, self.campaign, codes, self.now)
        self.call(
            "select (credits.redeem_code(%s, %s, %s, %s, 'd', %s, %s)).code_id",
            self.organization, self.claimed, self.code, self.someone, self.organization, self.now,
        )  # fmt: skip
        self.call(
            "select credits.set_top_up(%s, %s, 2000, 500, 2000, 3, null, %s)", self.organization, self.shared, self.now
        )
        self.call(
            "select (credits.begin_top_up(%s, %s, %s, %s)).top_up_id",
            self.organization, self.shared, self.bought, self.now,
        )  # fmt: skip
        self.call(
            "select (credits.depart(%s, %s, %s, %s, 'personal', null, %s)).amount_micros",
            self.organization, self.moved, self.someone, uuid7(), self.now,
        )  # fmt: skip
        self.call(
            "select credits.arrive(%s, %s, %s, %s, 'shared', '[]', null, %s)",
            self.organization, self.moved, self.someone, uuid7(), self.now,
        )  # fmt: skip

    def everything(self) -> list[tuple[Any, ...]]:
        """Every row of the treasury that belongs to it, as text."""
        found: list[tuple[Any, ...]] = []
        for (table,) in self.admin(TABLES):
            found += self.admin(
                f"select '{table}', t::text from {table} t where organization_id = %s", self.organization
            )
        return sorted(found)


class Nobody:
    """What a victim has, with ids that nobody has."""

    def __getattr__(self, name: str) -> UUID:
        return uuid7()


def _argument(name: str, kind: str, victim: Victim | Nobody, organization: UUID) -> Any:
    named: dict[str, Any] = {
        "p_organization_id": organization,
        "p_pool_id": victim.shared,
        "p_user_id": victim.someone,
        "p_owner_user_id": None,
        "p_grant_id": victim.granted,
        "p_allocation_id": victim.allocated,
        "p_limit_id": victim.limited,
        "p_request_id": victim.held,
        "p_chain_id": victim.chain,
        "p_api_key_id": None,
        "p_from_pool_id": victim.shared,
        "p_to_pool_id": victim.shared,
        "p_schedule_id": victim.scheduled,
        "p_to_allocation_id": None,
        "p_limit_request_id": victim.asked_for,
        "p_raise_id": victim.raised,
        "p_campaign_id": victim.campaign,
        "p_code_id": victim.code,
        "p_codes": Jsonb({str(uuid7()): "x"}),
        "p_redemption_id": victim.claimed,
        "p_top_up_id": victim.bought,
        "p_transfer_id": victim.moved,
        "p_to": "personal",
        "p_zone": "UTC",
        "p_unit": "month",
        "p_lasts": "1 month",
        "p_kind": "reserved",
        "p_source": "purchase",
        "p_scope": "organization",
        "p_scope_id": None,
        "p_metric": "credits",
        "p_model_filter": None,
        "p_within_scope": None,
        "p_period": "none",
        "p_action": 5 if kind == "smallint" else "stops",
        "p_when_empty": "stops",
        "p_expires_at": None,
        "p_usage": [0] * 14 + [1, 0, 0],
        "p_at": None,
        "p_idempotency_key": uuid7().hex,
        "p_key": None,
    }
    by_type: dict[str, Any] = {
        "jsonb": '{"amount_micros": 1}',
        "boolean": False,
        "text": "x",
        "bytea": b"x",
        "uuid": None,
    }
    return named[name] if name in named else by_type.get(kind, 1 if "time" not in kind else None)


def _calls(scene: Scene) -> list[tuple[str, list[tuple[str, str]]]]:
    """Every command with the names and types of its arguments."""
    rows = scene.admin(
        "select p.proname, p.proargnames, "
        "array(select format_type(t, null) from unnest(p.proargtypes) with ordinality u(t, n) order by n) "
        "from pg_proc p join pg_namespace n on n.oid = p.pronamespace "
        "where n.nspname = 'credits' and p.proname = any(%s)",
        list(COMMANDS),
    )
    return [(name, list(zip(names, kinds, strict=False))) for name, names, kinds in rows]


def _answer(
    scene: Scene,
    name: str,
    arguments: list[tuple[str, str]],
    victim: Victim | Nobody,
    organization: UUID,
    tenant: UUID | None,
    *,
    keep: bool = True,
) -> str:
    """What a call as the application answers: a value or a refusal's code. keep: what it changed."""
    values = [_argument(argument, kind, victim, organization) for argument, kind in arguments]
    if name == "set_limit":  # the id of a new one: only what else it says names the limit that there is
        values[1] = uuid7()
    places = ", ".join(f"%s::{kind}" for _, kind in arguments)
    answer = ""
    try:
        with scene.conn.transaction(force_rollback=not keep), scene.acting_as("bursar_app", tenant):
            row = scene.conn.execute(f"select credits.{name}({places})::text", values).fetchone()
            answer = str(row)
    except psycopg.Error as error:
        answer = f"{error.sqlstate}: {error.diag.message_primary}"
        scene.conn.execute("reset session authorization")
    return answer


def test_no_function_spends_reads_or_changes_what_is_anothers(scene: Scene) -> None:
    victim = Victim(scene.conn)
    before = victim.everything()
    calls = _calls(scene)
    assert {name for name, _ in calls} == COMMANDS
    for name, arguments in calls:
        for tenant in (scene.organization, None):
            foreign = _answer(scene, name, arguments, victim, victim.organization, tenant)
            unknown = _answer(scene, name, arguments, victim, uuid7(), tenant)
            assert foreign == unknown, f"{name} tells a foreign organization from one that does not exist"
            assert foreign.startswith(("BR404", "(None", "('0'", "('f")), f"{name}: {foreign}"
        assert victim.everything() == before, f"{name} changed something of another organization"


def test_ids_of_another_organization_are_unknown_in_ones_own(scene: Scene) -> None:
    victim = Victim(scene.conn)
    before, own = victim.everything(), (scene.organization, scene.organization)
    scene.grant(scene.pool(), 100)
    for name, arguments in _calls(scene):
        unknown = _answer(scene, name, arguments, Nobody(), *own, keep=False)
        foreign = _answer(scene, name, arguments, victim, *own)
        assert victim.everything() == before, f"{name} changed something of another organization"
        answers = {IDS_AND_TIMES.sub("…", each) for each in (unknown, foreign)}
        assert len(answers) == 1, f"{name} tells a foreign id from one that does not exist"
    user = scene.user()
    assert scene.extend(victim.held, 1).outcome.name == "NO_HOLD"
    assert scene.release(victim.held).outcome.name == "NO_HOLD"
    scene.move(scene.asked(Action.SETTLE, victim.held, 5, user_id=user))
    assert victim.everything() == before


def test_the_application_sees_the_rows_of_the_organization_that_is_set_alone(scene: Scene) -> None:
    Victim(scene.conn)
    for (table,) in scene.admin(TABLES):
        for tenant, seen in ((scene.organization, scene.organization), (None, None)):
            with scene.acting_as("bursar_app", tenant):
                rows = scene.conn.execute(f"select distinct organization_id from {table}").fetchall()
            assert all(row == (seen,) for row in rows)


def test_the_application_cannot_move_credits_by_hand(scene: Scene) -> None:
    scene.grant(scene.pool(), 100)
    tables = scene.admin(TABLES)
    assert len(tables) > 30
    for (table,) in tables:
        for statement in (
            f"update {table} set organization_id = organization_id",
            f"delete from {table}",
            f"insert into {table} (organization_id) values ('{scene.organization}')",
            f"truncate {table}",
        ):
            with scene.refusal("42501"), scene.acting_as("bursar_app", scene.organization):
                scene.conn.execute(statement)


def test_a_change_in_somebodys_home_reaches_only_where_they_belong(scene: Scene) -> None:
    person, home, stranger = scene.user(), Scene(scene.conn), Scene(scene.conn)
    scene.admin(
        "insert into route.users (user_id, email_hash, home_organization_id) values (%s, sha256(%s::text::bytea), %s)",
        person, person.hex, home.organization,
    )  # fmt: skip
    scene.admin(
        "insert into route.memberships (user_id, organization_id, joined_at) values (%s, %s, now())",
        person, scene.organization,
    )  # fmt: skip
    versions = "select limits_version from credits.gates where organization_id = %s"
    before = [scene.admin(versions, each.organization)[0][0] for each in (scene, home, stranger)]
    with scene.acting_as("bursar_app", home.organization):
        scene.conn.execute("select credits.limits_changed(%s)", [scene.organization])
    with scene.refusal("BR404"), scene.acting_as("bursar_app", home.organization):
        scene.conn.execute("select credits.limits_changed(%s)", [stranger.organization])
    with scene.refusal("BR404"), scene.acting_as("bursar_app", scene.organization):
        scene.conn.execute("select credits.limits_changed(%s)", [home.organization])
    after = [scene.admin(versions, each.organization)[0][0] for each in (scene, home, stranger)]
    assert [now - then for now, then in zip(after, before, strict=True)] == [1, 0, 0]
