"""Which level is told when: once a period, again when a raised limit is reached again, whoever looks."""

import asyncio
from datetime import timedelta
from typing import Any

import psycopg
import pytest
from tests.alerts.conftest import House
from tests.conftest import Org

from bursar import db
from bursar.alerts import looking
from bursar.alerts.rules import InvalidRule, UnknownSubject, Watches, end_rules, list_rules, preview, set_rule
from bursar.audit.events import OPERATOR, list_events
from bursar.clock import now, uuid7
from bursar.credits.limits import LimitAction, Metric, Period, Scope, set_limit
from bursar.credits.pools import open_credits
from bursar.identity.memberships import set_team_lead
from bursar.identity.organizations import create_organization
from bursar.identity.roles import Role
from bursar.identity.teams import create_team


async def test_each_level_of_a_cap_is_told_once_and_says_what_follows(house: House) -> None:
    await house.fund(1000)
    cap = await house.cap(100, period=Period.DAY)
    for amount in (49, 1, 10, 25, 5):
        await house.spend(amount)
        await house.look()
        await house.look()
    told = await house.told("limit")
    assert [each.level for each in told] == [
        ("limit.threshold", "50"),
        ("limit.threshold", "80"),
        ("limit.threshold", "90"),
    ]
    last = told[-1]
    assert last.object_id == cap
    assert [each.sequence for each in told] == [1, 2, 3]
    assert (last.payload["used"], last.payload["limit"], last.payload["left"]) == ("90", "100", "10")
    assert (last.payload["unit"], last.payload["at_100"]) == ("credits", "stops")
    assert last.payload["resets_at"] is not None
    text = "\n".join(last.payload["text"])
    assert "90 of 100 credits are used, 10 are left." in text
    assert "At 100 % calls that go beyond it are refused." in text
    assert "It begins anew on" in text
    assert "bursar caps set" in text
    assert f"usr_{house.user.hex}" in last.payload["title"]
    assert await house.mailed() == {house.user}


async def test_a_leap_over_several_levels_is_told_once_with_the_highest(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(95)
    await house.look()
    [told] = await house.told("limit")
    assert told.level == ("limit.threshold", "90")
    assert told.payload["passed"] == ["50", "80", "90"]


async def test_a_full_limit_is_reached_and_a_refusal_with_a_hundredth_left_counts_as_full(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(99.5)
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "90")]
    assert await house.spend(1) != 0
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "90"), ("limit.reached", "100")]
    assert (await house.told("limit"))[-1].payload["title"].endswith("used up")


async def test_a_raised_limit_is_told_again_when_it_is_reached_again_and_a_lowered_one_is_not(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(80)
    await house.look()
    await house.cap(200, period=Period.DAY)
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "80")]
    await house.spend(80)
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "80"), ("limit.threshold", "80")]
    await house.cap(190, period=Period.DAY)
    await house.look()
    assert len(await house.told("limit")) == 2


async def test_a_raise_and_use_between_two_looks_lose_no_level(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(92)
    await house.look()
    await house.cap(200, period=Period.DAY)
    await house.spend(90)
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "90"), ("limit.threshold", "90")]


async def test_a_new_period_is_told_anew(house: House) -> None:
    await house.fund(1000)
    cap = await house.cap(100, period=Period.DAY)
    await house.spend(85)
    await house.look()
    async with await _admin(house) as conn:  # yesterday's, as if the day had passed
        await conn.execute(
            "update credits.balances set period_start = period_start - interval '1 day', period_end = period_start"
            " where balance_id = %s",
            [cap],
        )
        await conn.execute(
            "update alerts.reached set period_start = period_start - interval '1 day' where balance_id = %s", [cap]
        )
        await conn.execute(
            "update credits.gates set limits_version = limits_version + 1 where organization_id = %s",
            [house.org.organization_id],
        )
    await house.spend(82)
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "80"), ("limit.threshold", "80")]


async def test_a_pool_counts_from_its_present_grants_and_new_credits_arm_it_again(house: House) -> None:
    await house.fund(100)
    for amount in (60, 22):
        await house.spend(amount)
        await house.look()
    assert await house.levels("pool") == [("pool.low", "50"), ("pool.low", "80")]
    await house.fund(900)  # 1000 in its grants, 918 left
    await house.look()
    assert len(await house.told("pool")) == 2
    await house.spend(900)
    await house.look()
    assert (await house.levels("pool"))[2:] == [("pool.low", "90")]
    assert await house.mailed() == {house.org.admin}
    await house.spend(18)
    await house.look()
    told = (await house.told("pool"))[-1]
    assert told.kind == "pool.exhausted"
    assert "Now calls are refused until credits are added." in told.payload["text"]


async def test_a_share_is_told_to_its_member_at_90_percent(house: House) -> None:
    await house.fund(1000)
    await house.share(100)
    await house.spend(89)
    await house.look()
    assert await house.told("allocation") == []
    await house.spend(2)
    await house.look()
    await house.spend(9)
    await house.look()
    assert await house.levels("allocation") == [("allocation.threshold", "90"), ("allocation.exhausted", "100")]
    assert house.user in await house.mailed()


async def test_a_limit_that_only_warns_says_so(house: House) -> None:
    await house.fund(1000)
    await house.cap(10, Scope.ORGANIZATION, action=LimitAction.WARNS, period=Period.MONTH)
    await house.spend(20)
    await house.look()
    [told] = await house.told("limit")
    assert told.kind == "limit.reached"
    assert "nothing is refused: this limit only warns" in told.payload["text"][1]
    assert await house.mailed() == {house.org.admin}


async def test_calls_are_counted_in_calls(house: House) -> None:
    await house.fund(1000)
    async with house.org.tenant() as conn:
        await set_limit(
            conn, scope=Scope.USER, scope_id=house.user, amount=2, metric=Metric.CALLS, period=Period.DAY, **house.place
        )
    await house.spend(1)
    await house.look()
    [told] = await house.told("limit")
    assert (told.payload["used"], told.payload["unit"]) == ("1", "calls")


async def test_a_level_is_told_once_however_many_look_while_charges_race(house: House) -> None:
    await house.fund(1000)
    await house.cap(200, period=Period.DAY)

    async def spend() -> None:
        for _ in range(25):
            await house.spend(2)

    async def watch() -> None:
        for _ in range(15):
            await house.look()

    await asyncio.gather(*(spend() for _ in range(4)), *(watch() for _ in range(4)))
    await house.look()
    passed = [each for told in await house.told("limit") for each in told.payload["passed"]]
    assert passed == ["50", "80", "90", "100"]
    assert [each.sequence for each in await house.told("limit")] == list(range(1, 1 + len(await house.told("limit"))))


async def test_of_workers_that_saw_the_same_one_tells_it(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    for amount in (55, 30):  # the first level of a balance, and a later one
        await house.spend(amount)
        async with house.org.database.platform() as conn:
            ids = [house.org.organization_id]
            seen = await db.fetch_all(
                conn, looking.Crossed, looking.QUERIES.crossed_of_organizations, organization_ids=ids
            )
        [found] = [each for each in seen if each.watches == "limit"]
        told = await asyncio.gather(*(looking.tell(house.org.database, found) for _ in range(4)))
        assert sum(told) == 1
        assert not await looking.tell(house.org.database, found)
    assert await house.levels("limit") == [("limit.threshold", "50"), ("limit.threshold", "80")]


async def test_an_alert_that_was_broken_off_is_told_by_the_next_look(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(85)

    async def dies(*_: Any, **__: Any) -> None:
        raise ConnectionError

    with monkeypatch.context() as patch:
        patch.setattr(looking, "post_event", dies)
        with pytest.raises(ConnectionError):
            await house.look()
    assert await house.told() == []
    await house.look()
    assert await house.levels("limit") == [("limit.threshold", "80")]


async def test_what_cannot_be_told_to_one_organization_keeps_no_other_waiting(
    alone: db.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    houses = [await _house_in(alone) for _ in range(2)]
    for house in houses:
        await house.fund(1000)
        await house.cap(100, period=Period.DAY)
        await house.spend(85)
    stuck = min(house.org.organization_id for house in houses)
    post_event = looking.post_event

    async def fails(conn: db.Connection, *, organization_id: Any, **rest: Any) -> Any:
        if organization_id == stuck:
            raise ConnectionError
        return await post_event(conn, organization_id=organization_id, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(looking, "post_event", fails)
        with pytest.raises(ConnectionError):
            await looking.look(alone)
        with pytest.raises(ConnectionError):
            await looking.sweep(alone)
    for house in houses:
        is_stuck = house.org.organization_id == stuck
        assert await house.levels("limit") == ([] if is_stuck else [("limit.threshold", "80")])


async def test_refusals_are_told_once_an_hour_for_each_balance(alone: db.Database) -> None:
    house = await _house_in(alone)
    await house.fund(1000)
    await house.cap(10, period=Period.DAY)
    await house.spend(9)
    for _ in range(3):
        await house.spend(5)
    assert await looking.look(alone) >= 1
    await _later(alone)
    await house.spend(5)
    await looking.look(alone)
    refused = [each for each in await house.told() if each.kind == "deduction.refused"]
    assert [each.payload["refusals"] for each in refused] == [3]


async def test_a_look_finds_what_requests_passed_and_two_at_once_look_once(alone: db.Database) -> None:
    house = await _house_in(alone)
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(85)
    told = await asyncio.gather(*(looking.look(alone) for _ in range(4)))
    assert sum(told) == 1
    await _later(alone)
    await house.spend(10)
    assert await looking.look(alone) == 1
    assert await house.levels("limit") == [("limit.threshold", "80"), ("limit.threshold", "90")]


async def test_a_sweep_finds_what_no_look_saw(alone: db.Database) -> None:
    house = await _house_in(alone)
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(85)
    async with await _admin(house) as conn:  # as if it had been used an hour before it was booked
        await conn.execute("set session_replication_role = replica")
        await conn.execute("update ledger.attribution set used_at = used_at - interval '1 hour'")
        await conn.execute(
            "insert into alerts.looks"
            " values (%s, clock_timestamp() - interval '1 minute', '-infinity', clock_timestamp())",
            [looking.PLATFORM_ORGANIZATION_ID],
        )
    assert await looking.look(alone) == 0
    await _later(alone)
    async with await _admin(house) as conn:
        await conn.execute("update alerts.looks set swept_at = swept_at - interval '61 minutes'")
    await looking.look(alone)
    assert await house.levels("limit") == [("limit.threshold", "80")]


async def test_a_grant_is_told_before_its_end_and_after(alone: db.Database) -> None:
    house = await _house_in(alone)
    await house.fund(100, expires_in=timedelta(days=30))
    assert await looking.look_at_grants(alone) == 0
    await house.spend(40)
    async with await _admin(house) as conn:  # until three days before its end
        await conn.execute("alter table credits.grants disable trigger user")
        await conn.execute(
            "update credits.grants set expires_at = expires_at - interval '27 days',"
            " effective_at = effective_at - interval '27 days'"
        )
    assert await looking.look_at_grants(alone) == 1
    assert await looking.look_at_grants(alone) == 0
    [told] = await house.told("grant")
    assert told.kind == "grant.expiring"
    assert told.payload["left"] == "60"
    assert "Up to 60 of 100 credits expire on" in told.payload["text"][0]


async def test_what_expired_is_told_with_what_was_lost(alone: db.Database) -> None:
    house = await _house_in(alone)
    await house.fund(100, expires_in=timedelta(seconds=1))
    await house.spend(40)
    await asyncio.sleep(1.1)
    await house.fund(5)  # whoever moves credits next books the end
    assert await looking.look_at_grants(alone) == 1
    [told] = [each for each in await house.told("grant") if each.kind == "grant.expired"]
    assert told.payload["left"] == "60"
    assert await looking.look_at_grants(alone) == 0


async def test_a_rule_of_ones_own_takes_the_place_of_the_default(house: House) -> None:
    await house.fund(1000)
    cap = await house.cap(100, period=Period.DAY)
    other = await house.cap(200, Scope.ORGANIZATION, period=Period.DAY)
    async with house.org.tenant() as conn:
        await set_rule(
            conn,
            watches=Watches.LIMIT,
            object_id=cap,
            thresholds=[25],
            readers=["admins"],
            addresses=["budget@acme.example"],
            by=OPERATOR,
            **house.place,
        )
        await set_rule(conn, watches=Watches.POOL, thresholds=[], by=OPERATOR, **house.place)
    await house.spend(99)
    await house.look()
    found = {each.object_id: each for each in await house.told()}
    assert found[cap].payload["passed"] == ["25"]
    assert other not in found
    assert await house.mailed() == {house.org.admin}
    async with house.org.tenant() as conn:
        rules = await list_rules(conn, **house.place)
        assert [(each.watches, each.is_default) for each in rules] == [
            ("allocation", True),
            ("limit", True),
            ("limit", False),
            ("pool", False),
        ]
        await end_rules(conn, watches=Watches.LIMIT, object_id=cap, by=OPERATOR, **house.place)
    await house.look()
    assert len(await house.told("limit")) == 2, "by the default again"


async def test_what_is_left_can_be_watched_too(house: House) -> None:
    await house.fund(1000)
    async with house.org.tenant() as conn:
        await set_rule(
            conn,
            watches=Watches.POOL,
            measure="left",
            thresholds=[500_000_000, 100_000_000, 0],
            by=OPERATOR,
            **house.place,
        )
    for amount in (500, 450, 50):
        await house.spend(amount)
        await house.look()
    assert await house.levels("pool") == [("pool.low", "500"), ("pool.low", "100"), ("pool.exhausted", "0")]


async def test_a_teams_cap_is_told_to_its_lead(house: House) -> None:
    async with house.org.tenant() as conn:
        team = await create_team(conn, name="Search", by=OPERATOR, **house.place)
    lead = await house.org.member(Role.TEAM_LEAD, team_id=team.team_id)
    async with house.org.tenant() as conn:
        await set_team_lead(conn, team_id=team.team_id, user_id=lead, by=OPERATOR, **house.place)
    member = await house.org.member(team_id=team.team_id)
    of_team = House(house.org, member)
    await of_team.fund(1000)
    await of_team.cap(100, Scope.TEAM, team.team_id, period=Period.MONTH)
    await of_team.spend(85)
    await of_team.look()
    [told] = await of_team.told("limit")
    assert told.payload["title"] == "Team cap on credits per month of “Search”: 80 % used"
    assert await of_team.mailed() == {lead}


async def test_a_rule_that_makes_no_sense_is_refused(house: House) -> None:
    async def attempt(**rule: Any) -> None:
        async with house.org.tenant() as conn:
            await set_rule(conn, **{"watches": Watches.POOL, "by": OPERATOR, **house.place, **rule})

    for rule in (
        {"thresholds": [0]},
        {"thresholds": [101]},
        {"measure": "left", "thresholds": [-1]},
        {"thresholds": [50], "readers": ["everybody"]},
        {"thresholds": list(range(1, 30))},
        {"thresholds": [50], "collect_minutes": -1},
    ):
        with pytest.raises(InvalidRule):
            await attempt(**rule)
    with pytest.raises(UnknownSubject):
        await attempt(thresholds=[50], object_id=uuid7())


async def test_rules_are_audited_and_a_preview_counts_what_would_have_been_told(house: House) -> None:
    await house.fund(1000)
    await house.cap(100, period=Period.DAY)
    await house.spend(85)
    async with house.org.tenant() as conn:
        found = await preview(
            conn, watches=Watches.LIMIT, thresholds=[50, 80, 90], since=now() - timedelta(days=60), **house.place
        )
        assert [(each.threshold, each.times) for each in found] == [(50, 1), (80, 1), (90, 0)]
        await set_rule(conn, watches=Watches.LIMIT, thresholds=[75], by=OPERATOR, **house.place)
        newest, *_ = await list_events(conn, **house.place)
    assert newest.action == "alert_rule.set"


async def test_a_preview_takes_a_renewed_share_by_what_its_period_began_with(house: House) -> None:
    await house.fund(1000)
    share = await house.share(10, period=Period.DAY)
    await house.spend(2)
    async with await _admin(house) as admin:  # as if 90 had been used on the days before
        await admin.execute(
            "update credits.balances set limit_amount = limit_amount + 90000000, used_amount = used_amount + 90000000"
            " where balance_id = %s", [share],
        )  # fmt: skip
        opened = "update credits.allocation_periods set opening_micros = 90000000 where allocation_id = %s"
        await admin.execute(opened, [share])
    async with house.org.tenant() as conn:
        found = await preview(
            conn, watches=Watches.ALLOCATION, thresholds=[20, 50], since=now() - timedelta(days=60), **house.place
        )
    assert [(each.threshold, each.times) for each in found] == [(20, 1), (50, 0)]


async def _admin(house: House) -> psycopg.AsyncConnection[Any]:
    return await psycopg.AsyncConnection.connect(house.org.database.dsn("admin"))


async def _house_in(database: db.Database) -> House:
    """A house in another database than the run's."""
    organization_id = uuid7()
    slug = f"t-{organization_id.hex[8:]}"
    async with database.tenant(organization_id) as conn:
        made = await create_organization(
            conn, organization_id=organization_id, slug=slug, name="Test Corp", by=OPERATOR
        )
        await open_credits(conn, made)
    org = Org(database=database, organization_id=organization_id, slug=slug, admin=uuid7())
    return House(org, await org.member())


async def _later(database: db.Database) -> None:
    """Time for another look."""
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        await conn.execute(
            "update alerts.looks set looked_until = looked_until - interval '2 seconds', leased_until = '-infinity'"
        )


async def test_a_default_is_told_for_each_one_that_it_counts_for(house: House) -> None:
    await house.fund(1000)
    other = House(house.org, await house.org.member())
    async with house.org.tenant() as conn:
        await set_limit(
            conn,
            scope=Scope.USER,
            scope_id=None,
            amount=100_000_000,
            period=Period.DAY,
            is_default=True,
            **house.place,
        )
    await house.spend(85)
    await other.spend(95)
    await house.look()
    told = await house.told("limit")
    assert {(each.payload["user_id"], each.payload["threshold"]) for each in told} == {
        (f"usr_{house.user.hex}", "80"),
        (f"usr_{other.user.hex}", "90"),
    }
    assert await house.mailed() == {house.user, other.user}


async def test_a_renewed_share_counts_from_its_renewal(house: House) -> None:
    await house.fund(1000)
    await house.share(100, period=Period.DAY)
    await house.spend(95)
    await house.look()
    [told] = await house.told("allocation")
    assert (told.payload["used"], told.payload["limit"]) == ("95", "100")
    assert told.payload["resets_at"] is not None
    async with await _admin(house) as conn:  # as if its day had passed
        await conn.execute(
            "update credits.allocation_periods set period_start = period_start - interval '1 day',"
            " period_end = period_end - interval '1 day' where organization_id = %s",
            [house.org.organization_id],
        )
        await conn.execute(
            "update credits.allocations set renews_at = renews_at - interval '1 day' where organization_id = %s",
            [house.org.organization_id],
        )
        await conn.execute(
            "update credits.gates set next_limit_event_at = next_limit_event_at - interval '1 day',"
            " next_event_at = next_event_at - interval '1 day' where organization_id = %s",
            [house.org.organization_id],
        )
        await conn.execute(
            "update alerts.reached set period_start = period_start - interval '1 day' where organization_id = %s",
            [house.org.organization_id],
        )
    await house.spend(91)
    await house.look()
    told = (await house.told("allocation"))[-1]
    assert (told.kind, told.payload["used"], told.payload["limit"]) == ("allocation.threshold", "91", "100")
    assert len(await house.told("allocation")) == 2
