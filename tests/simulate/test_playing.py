"""What a scenario may tell, and that nothing of it stays."""

import json
from typing import Any

import psycopg
import pytest
from tests.conftest import MakeOrg, Org

from bursar import db
from bursar.credits.verify import verify
from bursar.simulation.playing import play
from bursar.simulation.report import as_json
from bursar.simulation.scenario import InvalidScenario, read_scenario, schema

NOON = "2026-03-10T12:00:00Z"


def at(hour: int, minute: int = 0, day: int = 10) -> str:
    """An instant of March 2026."""
    return f"2026-03-{day:02}T{hour:02}:{minute:02}:00Z"


async def played(database: db.Database, **scenario: Any) -> dict[str, Any]:
    """The answer to a scenario."""
    return as_json(await play(database, read_scenario(json.dumps(scenario))))


async def test_nothing_of_a_scenario_stays(database: db.Database, settings: Any) -> None:
    query = """
        select (select count(*) from identity.organizations), (select count(*) from credits.balances),
            (select count(*) from ledger.entries), (select count(*) from ledger.attribution)"""
    async with await psycopg.AsyncConnection.connect(database.dsn("admin"), autocommit=True) as conn:
        await conn.execute("begin isolation level repeatable read")
        others = "select organization_id from identity.organizations where slug like 'stage-%'"
        await conn.execute(query)
        await played(
            database,
            grants=[{"id": "g", "amount": 100}],
            usage=[{"at": NOON, "amount": 30, "user": "dana"}],
            limits=[{"amount": 5, "scope": "user", "of": "dana"}],
            ask=[NOON],
        )
        await conn.execute("commit")
        assert await (await conn.execute(others)).fetchall() == []


async def test_a_scenario_waits_for_no_real_organization(database: db.Database, make_org: MakeOrg) -> None:
    org = await make_org()
    async with await psycopg.AsyncConnection.connect(database.dsn("admin"), autocommit=True) as conn:
        await conn.execute("begin")
        await conn.execute(
            "select from credits.gates where organization_id = %s for no key update", [org.organization_id]
        )
        answer = await played(
            database,
            grants=[{"id": "g", "amount": 10, "expires_at": at(14)}],
            holds=[{"id": "h", "at": NOON, "amount": 4, "expires_at": at(13)}],
            ask=[at(13, 30), at(15)],
        )
        await conn.rollback()
    assert [each["balance"] for each in answer["asked"]] == ["10", "0"]


async def test_a_hold_is_settled_for_less_for_more_released_and_ends_by_itself(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "g", "amount": 100}],
        holds=[
            {"id": "less", "at": at(12), "amount": 20},
            {"id": "more", "at": at(12), "amount": 20},
            {"id": "failed", "at": at(12), "amount": 20},
            {"id": "cut", "at": at(12), "amount": 10, "expires_at": at(13), "sent": True},
            {"id": "lost", "at": at(12), "amount": 10, "expires_at": at(13)},
            {"id": "too much", "at": at(12), "amount": 21},
        ],
        settles=[{"hold": "less", "at": at(12, 1), "amount": 5}, {"hold": "more", "at": at(12, 1), "amount": "25.5"}],
        releases=[{"hold": "failed", "at": at(12, 1)}],
        ask=[at(12), at(12, 1), at(13)],
    )
    before, after, end = answer["asked"]
    assert (before["balance"], before["pools"][0]["held"]) == ("20", "80")
    assert (after["balance"], after["pools"][0]["used"], after["pools"][0]["held"]) == ("49.5", "30.5", "20")
    assert (end["balance"], end["pools"][0]["used"], end["holds"]) == ("59.5", "40.5", [])
    [refusal] = answer["refusals"]
    assert (refusal["id"], refusal["code"], refusal["refused_by"], refusal["available"]) == (
        "too much", "pool_exhausted", "shared", "20",
    )  # fmt: skip


async def test_caps_of_every_scope_refuse_what_is_enforced(database: db.Database) -> None:
    answer = await played(
        database,
        zone="Europe/Paris",
        enforce=True,
        users=[{"id": "dana", "team": "web", "department": "it"}, {"id": "eli", "department": "it"}],
        keys=[{"id": "ci", "user": "eli"}],
        grants=[{"id": "g", "amount": 1000}],
        limits=[
            {"id": "company", "amount": 100},
            {"id": "it", "scope": "department", "of": "it", "amount": 80},
            {"id": "web", "scope": "team", "of": "web", "amount": 50, "period": "day"},
            {"id": "dana", "scope": "user", "of": "dana", "amount": 40, "models": "gpt-%"},
            {"id": "ci", "scope": "key", "of": "ci", "metric": "calls", "amount": 1, "period": "month"},
        ],
        usage=[
            {"id": "1", "at": at(22), "amount": 41, "user": "dana", "model": "gpt-5"},
            {"id": "2", "at": at(22), "amount": 41, "user": "dana", "model": "other"},
            {"id": "3", "at": at(22, 59), "amount": 10, "user": "dana", "model": "other"},
            {"id": "4", "at": at(23), "amount": 10, "user": "dana", "model": "other"},
            {"id": "5", "at": at(23), "amount": 1, "key": "ci"},
            {"id": "6", "at": at(23), "amount": 1, "key": "ci"},
            {"id": "7", "at": at(23), "amount": 29, "user": "eli"},
            {"id": "8", "at": at(23), "amount": 49, "user": "somebody"},
        ],
    )  # fmt: skip
    assert [(each["id"], each["refused_by"]) for each in answer["refusals"]] == [
        ("1", "dana"), ("3", "web"), ("6", "ci"), ("7", "it"), ("8", "company"),
    ]  # fmt: skip
    used = {each["id"]: each["used"] for each in answer["asked"][-1]["limits"]}
    assert used == {"company": "52", "it": "52", "web": "10", "dana": "0", "ci": "1"}


async def test_shares_personal_pools_and_restricted_pools_are_drawn_from_as_in_the_product(
    database: db.Database,
) -> None:
    answer = await played(
        database,
        pools=[{"id": "mine", "kind": "personal", "user": "dana"}, {"id": "gpt", "models": "gpt-%"}],
        grants=[
            {"id": "all", "amount": 100},
            {"id": "own", "amount": 10, "pool": "mine"},
            {"id": "only gpt", "amount": 5, "pool": "gpt"},
        ],
        allocations=[{"id": "eli", "user": "eli", "amount": 60}],
        enforce=True,
        usage=[
            {"id": "split", "at": at(12), "amount": 20, "user": "dana", "model": "gpt-5"},
            {"id": "beyond", "at": at(13), "amount": 36, "user": "dana"},
            {"id": "rest", "at": at(14), "amount": 25, "user": "dana"},
            {"id": "share", "at": at(15), "amount": 61, "user": "eli"},
        ],
        ask=[at(12), at(16)],
    )
    assert answer["asked"][0]["grants"] == {"all": "95", "own": "0", "only gpt": "0"}
    assert answer["asked"][1]["grants"] == {"all": "70", "own": "0", "only gpt": "0"}
    assert [(each["id"], each["refused_by"]) for each in answer["refusals"]] == [
        ("beyond", "mine"), ("share", "eli"),
    ]  # fmt: skip


async def test_a_share_or_cap_that_is_told_again_is_the_same_one_and_ends_once(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "all", "amount": 100}],
        allocations=[
            {"id": "small", "user": "eli", "amount": 10},
            {"id": "large", "user": "eli", "amount": 20, "at": at(13), "ended_at": at(15)},
            {"id": "daily", "user": "eli", "amount": 5, "period": "day", "at": at(14)},
        ],
        limits=[{"id": "high", "amount": 50}, {"id": "low", "amount": 40, "at": at(13), "ended_at": at(15)}],
        usage=[{"at": at(12), "amount": 8, "user": "eli"}],
        ask=[at(12), at(13), at(14), at(16)],
    )
    assert answer["refusals"] == []
    assert [{each["id"]: each["limit"] for each in asked["limits"]} for asked in answer["asked"]] == [
        {"small": "10", "high": "50"}, {"small": "20", "high": "40"}, {"high": "40", "daily": "5"}, {},
    ]  # fmt: skip


async def test_a_renewed_share_tells_what_was_used_of_its_period(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "all", "amount": 100}],
        allocations=[{"id": "eli", "user": "eli", "amount": 10, "period": "day"}],
        usage=[{"at": at(12), "amount": 8, "user": "eli"}, {"at": at(12, day=11), "amount": 3, "user": "eli"}],
        ask=[at(13), at(13, day=11)],
    )
    told = [(each["limit"], each["used"], each["resets_at"]) for asked in answer["asked"] for each in asked["limits"]]
    assert told == [("10", "8", at(0, day=11)), ("10", "3", at(0, day=12))]


async def test_a_late_settle_is_booked_when_it_comes(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "old", "amount": 10, "expires_at": at(13)}, {"id": "new", "amount": 10}],
        usage=[{"at": at(12), "booked_at": at(14), "amount": 4}],
        ask=[at(12, 30), at(15)],
    )
    assert [each["grants"] for each in answer["asked"]] == [{"old": "10", "new": "10"}, {"old": "0", "new": "6"}]


async def test_a_refund_goes_back_to_the_grants_that_paid_the_last_first(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "a", "amount": 10, "priority": 1}, {"id": "b", "amount": 10, "priority": 2}],
        usage=[{"id": "u", "at": at(12), "amount": 15}],
        holds=[{"id": "h", "at": at(12), "amount": 3}],
        settles=[{"hold": "h", "at": at(12, 1), "amount": 2}],
        refunds=[{"of": "u", "at": at(13), "amount": 7}, {"of": "h", "at": at(13)}, {"of": "u", "at": at(14)}],
        ask=[at(12, 1), at(13), at(14)],
    )
    assert [each["grants"] for each in answer["asked"]] == [
        {"a": "0", "b": "3"}, {"a": "2", "b": "10"}, {"a": "10", "b": "10"},
    ]  # fmt: skip
    assert answer["refusals"] == []


async def test_a_transfer_takes_grants_in_burn_order_with_their_end(database: db.Database) -> None:
    answer = await played(
        database,
        pools=[{"id": "mine", "kind": "personal", "user": "dana"}],
        grants=[{"id": "a", "amount": 10, "expires_at": at(15)}, {"id": "b", "amount": 10}],
        usage=[{"at": at(12), "amount": 4, "user": "eli"}],
        transfers=[{"at": at(13), "from": "shared", "to": "mine", "amount": 8}],
        ask=[at(13), at(15)],
    )
    before, after = answer["asked"]
    assert {pool["id"]: pool["available"] for pool in before["pools"]} == {"shared": "8", "mine": "8"}
    assert {pool["id"]: pool["available"] for pool in after["pools"]} == {"shared": "8", "mine": "2"}
    assert before["grants"] == {"a": "6", "b": "10"}
    moved = [each for each in before["grant_details"] if each["pool"] == "mine"]
    assert [(each["id"], each["source"], each["balance"]) for each in moved] == [
        ("a", "transfer", "6"), ("b", "transfer", "2"),
    ]  # fmt: skip


async def test_a_monthly_grant_anchored_to_the_last_day_comes_on_the_last_day_of_each_month(
    database: db.Database,
) -> None:
    asked = ["2026-02-27T12:00:00Z", "2026-02-28T12:00:00Z", "2026-03-30T12:00:00Z", "2026-03-31T12:00:00Z"]
    answer = await played(
        database,
        zone="Europe/Paris",
        grants=[
            {
                "id": "plan", "amount": 100, "effective_at": "2026-01-31T00:00:00+01:00",
                "expires_at": "2026-04-10T00:00:00Z", "recurrence": {"interval": "month"},
            }
        ],
        usage=[{"at": "2026-02-01T12:00:00Z", "amount": 30}, {"at": "2026-03-01T12:00:00Z", "amount": 40}],
        ask=[*asked, "2026-04-09T23:59:59Z", "2026-04-10T00:00:00Z"],
    )  # fmt: skip
    assert [each["grants"]["plan"] for each in answer["asked"]] == ["70", "100", "60", "100", "100", "0"]


async def test_what_open_holds_need_stays_over_a_reset(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[{"id": "g", "amount": 100, "max_rollover": 10}],
        holds=[{"id": "h", "at": at(12), "amount": 30}],
        resets=[at(13)],
        settles=[{"hold": "h", "at": at(14), "amount": 25}],
        ask=[at(13), at(14)],
    )
    assert [(each["balance"], each["pools"][0]["held"]) for each in answer["asked"]] == [("10", "30"), ("15", "0")]


async def test_only_the_simulator_resets_a_pool(org: Org) -> None:
    query = "select credits.reset_pool(%s, %s, '{}', '{}', '{}', true, 'k', null)"
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await conn.execute(query, [org.organization_id] * 2)


async def test_asking_changes_nothing(database: db.Database) -> None:
    scenario: dict[str, Any] = {
        "grants": [
            {"id": "a", "amount": 10, "expires_at": at(14)},
            {"id": "b", "amount": 10, "effective_at": at(13), "priority": 1},
        ],
        "holds": [{"id": "h", "at": at(12), "amount": 5}],
        "usage": [{"at": at(12, 30), "amount": 7}, {"at": at(14, 30), "amount": 8}],
        "settles": [{"hold": "h", "at": at(15), "amount": 6}],
    }
    seldom = await played(database, **scenario, ask=[at(16)])
    often = await played(database, **scenario, ask=[at(hour, minute) for hour in range(12, 17) for minute in (0, 29)])
    assert often["asked"][-2]["at"] == seldom["asked"][0]["at"]
    assert {**often["asked"][-2]} == seldom["asked"][0]


async def test_the_books_agree_after_scenarios(database: db.Database) -> None:
    async with database.platform() as conn:
        found = [each for each in await verify(conn) if "stage" in str(each)]
    assert found == []


@pytest.mark.parametrize(
    ("document", "pointer", "says"),
    [
        ('{"grants": [{"id": "g", "amount": "1.0000001"}]}', "#/grants/0/amount", "six decimal places"),
        ('{"grants": [{"id": "g", "amount": -1}]}', "#/grants/0/amount", "not negative"),
        ('{"grants": [{"id": "g"}]}', "#/grants/0/amount", "required"),
        ('{"usage": [{"at": "2026-03-10T12:00:00", "amount": 1}]}', "#/usage/0/at", "names no zone"),
        ('{"usage": [{"at": 5, "amount": 1}]}', "#/usage/0/at", "write an instant"),
        ('{"useage": []}', "#/useage", "no such field"),
        ('{"zone": "Mars/Base"}', "#/zone", "IANA"),
        ('{"settles": [{"hold": "h", "at": "2026-03-10T12:00:00Z", "amount": 1}]}', "#/settles/0/hold", "no hold"),
        ('{"grants": [{"id": "g", "amount": 1}, {"id": "g", "amount": 1}]}', "#/grants/1/id", "comes twice"),
        ('{"grants": [{"id": "g", "amount": 1, "pool": "p"}]}', "#/grants/0/pool", "no pool"),
        ('{"limits": [{"scope": "user", "amount": 1}]}', "#/limits/0", "names whom"),
        ('{"grants": [{"id": "g", "amount": 1, "min_rollover": 1}]}', "#/grants/0", "needs max_rollover"),
        (
            '{"grants": [{"id": "g", "amount": 1, "recurrence": {"interval": "hour"}}]}',
            "#/grants/0/recurrence/interval",
            "day",
        ),
        ('{"resets": ["yesterday"]}', "#/resets/0/at", "no instant"),
        ('{"refunds": [{"of": "u", "at": "2026-03-10T12:00:00Z"}]}', "#/refunds/0/of", "no usage or hold"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_with_its_place(document: str, pointer: str, says: str) -> None:
    with pytest.raises(InvalidScenario) as caught:
        read_scenario(document)
    assert [(each.pointer, says in each.detail) for each in caught.value.errors] == [(pointer, True)]


def test_what_is_no_json_is_said() -> None:
    with pytest.raises(InvalidScenario, match="no JSON"):
        read_scenario('{"grants": NaN}')


def test_the_schema_names_every_part_of_a_scenario() -> None:
    document = schema()
    assert document["$schema"].endswith("2020-12/schema")
    assert document["additionalProperties"] is False
    assert {"grants", "usage", "ask", "limits", "holds", "settles"} <= document["properties"].keys()


async def test_what_a_hold_kept_over_a_reset_rolls_over_at_its_own_end_too(database: db.Database) -> None:
    answer = await played(
        database,
        grants=[
            {"id": "g", "amount": 10, "effective_at": at(1), "expires_at": at(14), "max_rollover": 10,
             "rolls_over": "at_end", "rollover_expires_at": at(20)},
        ],
        holds=[{"id": "h", "at": at(2), "amount": 5, "expires_at": at(5)}],
        resets=[at(3), at(3)],
        ask=[at(3), at(6), at(15), at(20)],
    )  # fmt: skip
    assert [each["balance"] for each in answer["asked"]] == ["5", "10", "5", "0"]


async def test_grants_that_are_alike_burn_as_they_are_told_also_after_they_rolled_over(database: db.Database) -> None:
    names = [f"g{number}" for number in range(6)]
    bounds = {"max_rollover": 10, "rolls_over": "at_end", "rollover_expires_at": at(20)}
    answer = await played(
        database,
        grants=[{"id": name, "amount": 10, "effective_at": at(1), "expires_at": at(8), **bounds} for name in names],
        usage=[{"at": at(9), "amount": 35}],
        ask=[at(10)],
    )
    left = answer["asked"][0]["grants"]
    assert [sum(int(left[each]) for each in left if each.startswith(name)) for name in names] == [0, 0, 0, 5, 10, 10]
