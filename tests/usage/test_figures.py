"""The overview's figures against a plain recomputation from the charges that a test made."""

import random
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
import pytest

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.moves import Action, Flag, Move
from bursar.credits.pools import PoolKind, open_pool, pool_for
from bursar.identity.api_keys import create_api_key, revoke_api_key, rotate_api_key
from bursar.identity.departments import create_department
from bursar.identity.memberships import end_membership, place_member
from bursar.identity.roles import Role
from bursar.identity.users import get_user
from bursar.money import Micros, NanoUsd, credits
from bursar.usage.breakdowns import Breakdown
from bursar.usage.figures import Overview, overview, snapshot

# An hour before the change of clocks ends in New York, and a month in which Kolkata is a day ahead for 10 1/2 hours.
CLOCK_CHANGE = datetime(2026, 11, 1, 5, 30, tzinfo=UTC)
LATE_IN_MARCH = datetime(2026, 3, 30, 20, 15, tzinfo=UTC)
NOVEMBER = datetime(2026, 11, 20, 13, 2, tzinfo=UTC)


@dataclass(frozen=True)
class Charge:
    """What a test made: the plain record that figures are recomputed from."""

    used_at: datetime
    user_id: UUID | None
    api_key_id: UUID | None
    model: str
    department_id: UUID | None
    charged: int
    cost: int


async def fund(org, micros: int = credits(10_000_000), *, owner: UUID | None = None) -> UUID:
    async with org.tenant() as conn:
        pool_id = await pool_for(conn, organization_id=org.organization_id, owner_user_id=owner)
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=pool_id,
            amount_micros=Micros(micros),
            source=GrantSource.PURCHASE,
            idempotency_key=uuid7().hex,
        )
    return pool_id


def deduct(org, user_id, used_at, charged=1_000_000, *, key=None, model="m", cost=0, flags=Flag.NONE) -> Move:
    return Move(
        action=Action.DEDUCT,
        organization_id=org.organization_id,
        request_id=uuid7(),
        user_id=user_id,
        api_key_id=key,
        amount_micros=Micros(charged),
        cost_nano_usd=NanoUsd(cost),
        provider="demo",
        model=model,
        used_at=used_at,
        flags=flags,
    )


async def read(org, now: datetime, *, with_margin: bool = True, top: int = 5) -> Overview:
    async with snapshot(org.database, org.organization_id) as conn:
        return await overview(conn, organization_id=org.organization_id, now=now, with_margin=with_margin, top=top)


def amounts(breakdown: Breakdown) -> dict[str, int]:
    return {row.name: row.charged_micros for row in breakdown.rows}


async def random_history(org, simulate, now: datetime, count: int) -> list[Charge]:
    """Charges of the last 75 days by people and services of two departments and none, many near midnights."""
    picks = random.Random(20261120)
    async with org.tenant() as conn:
        names = {"organization_id": org.organization_id, "by": OPERATOR}
        departments = [(await create_department(conn, name=name, **names)).department_id for name in ("Sales", "Ops")]
    people = [await org.member() for _ in range(7)]
    place = {person: picks.choice([*departments, None]) for person in people}
    for person, department_id in place.items():
        async with org.tenant() as conn:
            await place_member(conn, user_id=person, team_id=None, department_id=department_id, **names)
    keys = {person: (await org.key(person)).key.api_key_id for person in people}
    service = (await org.key()).key.api_key_id
    zone = ZoneInfo((await read(org, now)).organization.zone)
    charges = []
    for _ in range(count):
        at = now - timedelta(seconds=picks.randrange(75 * 86400))
        if picks.random() < 0.3:  # around a local midnight
            day = datetime.combine(at.astimezone(zone).date(), datetime.min.time(), zone)
            at = min(now, day.astimezone(UTC) + timedelta(seconds=picks.randint(-3700, 3700)))
        person = picks.choice([*people, None])
        key = service if person is None else picks.choice([keys[person], None])
        model = f"model-{picks.randrange(8)}"
        charged = picks.randrange(3_000_000)
        charges.append(Charge(at, person, key, model, place.get(person), charged, charged * 6))
    moves = [
        deduct(org, each.user_id, each.used_at, each.charged, key=each.api_key_id, model=each.model, cost=each.cost)
        for each in charges
    ]
    for start in range(0, count, 200):
        assert all(verdict.accepted for verdict in await simulate(moves[start : start + 200]))
    return charges


def sums(charges: list[Charge], what: Callable[[Charge], Hashable]) -> dict[Hashable, int]:
    found: dict[Hashable, int] = defaultdict(int)
    for each in charges:
        found[what(each)] += each.charged
    return dict(found)


@pytest.mark.parametrize(
    ("zone", "now"),
    [
        ("Asia/Kolkata", NOVEMBER),
        ("America/New_York", CLOCK_CHANGE),
        ("America/New_York", NOVEMBER),
        ("America/Havana", CLOCK_CHANGE),
        ("UTC", LATE_IN_MARCH),
    ],
)
async def test_every_figure_equals_a_plain_recomputation_in_any_zone(make_org, simulate, zone: str, now) -> None:
    org = await make_org(zone=zone)
    await fund(org)
    charges = await random_history(org, simulate, now, 600)
    found = await read(org, now, top=100)

    local = now.astimezone(ZoneInfo(zone))
    day_of = {each: each.used_at.astimezone(ZoneInfo(zone)).date() for each in charges}
    month = [each for each in charges if (day_of[each].year, day_of[each].month) == (local.year, local.month)]
    last = local.date().replace(day=1) - timedelta(days=1)
    clock = [each.used_at.astimezone(ZoneInfo(zone)).replace(tzinfo=None) for each in charges]
    before = [
        each
        for each, at in zip(charges, clock, strict=True)
        if (at.year, at.month) == (last.year, last.month) and (at.day, at.time()) < (local.day, local.time())
    ]
    assert found.cost.charged_micros == sum(each.charged for each in month)
    assert found.cost.requests == len(month)
    assert found.cost.change.before == sum(each.charged for each in before)
    assert found.margin is not None
    assert found.margin.provider_cost_nano_usd == sum(each.cost for each in month)
    assert found.active_users.active == len({each.user_id for each in month} - {None})
    assert found.active_users.change.before == len({each.user_id for each in before} - {None})

    by_person = sums(month, lambda each: each.user_id)
    assert {row.id: row.charged_micros for row in found.people.rows} == by_person
    by_key = sums(month, lambda each: each.api_key_id)
    assert {row.id: row.charged_micros for row in found.keys.rows} == by_key
    assert amounts(found.models) == sums(month, lambda each: each.model)
    by_department = {None: 0} | sums(month, lambda each: each.department_id)
    assert {row.id: row.charged_micros for row in found.departments.rows} == by_department

    by_day = sums(charges, lambda each: day_of[each])
    assert {day.span.first: day.charged_micros for day in found.trend.days} == {
        day.span.first: by_day.get(day.span.first, 0) for day in found.trend.days
    }
    by_day_and_model = sums(charges, lambda each: (day_of[each], each.model))
    named = [series for series in found.trend.series if not series.is_others]
    for day in found.trend.days:
        for series, part in zip(named, day.parts_micros, strict=False):
            assert part == by_day_and_model.get((day.span.first, series.name), 0)


async def test_a_short_list_sums_to_the_same_total_as_a_long_one(make_org, simulate) -> None:
    org = await make_org(zone="Asia/Kolkata")
    await fund(org)
    await random_history(org, simulate, NOVEMBER, 200)
    short, long = await read(org, NOVEMBER, top=2), await read(org, NOVEMBER, top=100)
    assert short.models.charged_micros == long.models.charged_micros == long.cost.charged_micros
    assert [row.kind for row in short.models.rows] == ["one", "one", "others"]
    assert short.models.rows[-1].count == len(long.models.rows) - 2


async def test_available_used_held_and_overage_are_the_pools_own(org, simulate) -> None:
    await fund(org, credits(10))
    member = await org.member()
    await simulate([deduct(org, member, NOVEMBER, credits(3))])
    hold = Move(
        action=Action.AUTHORIZE,
        organization_id=org.organization_id,
        request_id=uuid7(),
        user_id=member,
        amount_micros=credits(2),
        model="m",
        lease_seconds=600,
    )
    await simulate([hold])
    (pool,) = (await read(org, NOVEMBER)).pools
    assert (pool.available_micros, pool.used_micros, pool.held_micros, pool.overage_micros) == (
        credits(5),
        credits(3),
        credits(2),
        0,
    )
    settle = Move(
        action=Action.SETTLE, organization_id=org.organization_id, request_id=hold.request_id, amount_micros=credits(9)
    )
    await simulate([settle])
    (pool,) = (await read(org, NOVEMBER)).pools
    assert (pool.available_micros, pool.used_micros, pool.held_micros, pool.overage_micros) == (
        0,
        credits(12),
        0,
        credits(2),
    )


async def test_personal_and_shared_pools_are_not_added_up(org) -> None:
    await fund(org, credits(100))
    for amount in (30, 12):
        await fund(org, credits(amount), owner=await org.member())
    async with org.tenant() as conn:
        await open_pool(
            conn, organization_id=org.organization_id, kind=PoolKind.SHARED, name="Small", model_filter="mini-%"
        )
    found = [
        (each.kind, each.model_filter, each.pools, each.available_micros) for each in (await read(org, NOVEMBER)).pools
    ]
    assert found == [
        ("shared", None, 1, credits(100)),
        ("shared", "mini-%", 1, 0),
        ("personal", None, 2, credits(42)),
    ]


async def test_a_grant_that_ended_is_not_available_though_nothing_moved_since(org) -> None:
    pool_id = await fund(org, credits(100))
    async with org.tenant() as conn:
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=pool_id,
            amount_micros=credits(50),
            source=GrantSource.COMPLIMENTARY,
            idempotency_key="short",
            effective_at=datetime.now(UTC) - timedelta(days=1),
            expires_at=datetime.now(UTC) + timedelta(milliseconds=300),
        )
    before = await read(org, NOVEMBER)
    async with org.tenant() as conn:
        await db.fetch_value(conn, "select pg_sleep(0.3)")
    after = await read(org, NOVEMBER)
    assert (before.pools[0].available_micros, after.pools[0].available_micros) == (credits(150), credits(100))


async def test_keys_that_are_gone_or_not_ours_are_named_rows(org, simulate) -> None:
    await fund(org)
    member = await org.member()
    live, rotated, revoked = [(await org.key(member)).key for _ in range(3)]
    names = {"organization_id": org.organization_id, "by": OPERATOR}
    personal = await _personal_key(org, member)
    moves = [
        deduct(org, member, NOVEMBER, credits(amount), key=key)
        for key, amount in [
            (live.api_key_id, 1),
            (rotated.api_key_id, 2),
            (revoked.api_key_id, 4),
            (personal, 8),
            (None, 16),
        ]
    ]
    assert all(verdict.accepted for verdict in await simulate(moves))
    async with org.tenant() as conn:
        new = await rotate_api_key(conn, api_key_id=rotated.api_key_id, overlap=timedelta(hours=1), **names)
        await revoke_api_key(conn, api_key_id=revoked.api_key_id, **names)
    assert (await simulate([deduct(org, member, NOVEMBER, credits(32), key=new.key.api_key_id)]))[0].accepted

    found = (await read(org, NOVEMBER)).keys
    assert [(row.kind, row.id, row.charged_micros) for row in found.rows] == [
        ("one", rotated.original_api_key_id, credits(34)),
        ("one", live.api_key_id, credits(1)),
        ("personal", None, credits(8)),
        ("deleted", None, credits(4)),
        ("none", None, credits(16)),
    ]
    assert found.rows[0].detail == new.key.last4


async def _personal_key(org, user_id: UUID) -> UUID:
    async with org.tenant() as conn:
        user = await get_user(conn, user_id=user_id)
    async with org.database.tenant(user.home_organization_id) as conn:
        made = await create_api_key(
            conn, organization_id=user.home_organization_id, user_id=user_id, name="Mine", by=OPERATOR
        )
    return made.key.api_key_id


async def test_people_who_left_keep_their_rows_and_are_not_counted_among_those_with_access(org, simulate) -> None:
    await fund(org)
    stays, leaves = await org.member(), await org.member()
    await org.member(Role.AUDITOR)  # may read, not use
    service = (await org.key()).key.api_key_id
    await simulate(
        [
            deduct(org, stays, NOVEMBER, 5),
            deduct(org, leaves, NOVEMBER, 3),
            deduct(org, None, NOVEMBER, 2, key=service),
        ]
    )
    async with org.tenant() as conn:
        await end_membership(conn, organization_id=org.organization_id, user_id=leaves, by=OPERATOR)
    found = await read(org, NOVEMBER)
    assert [(row.kind, row.state, row.charged_micros) for row in found.people.rows] == [
        ("one", "active", 5),
        ("one", "left", 3),
        ("service", "service", 2),
    ]
    users = found.active_users
    assert (users.active, users.active_with_access, users.with_access) == (2, 1, 2)  # the administrator has access too


async def test_a_correction_moves_the_day_of_use_and_every_breakdown_with_it(org, simulate) -> None:
    """A stream whose lease ended is charged its estimate; the true cost that comes days later is less."""
    await fund(org)
    member = await org.member()
    request = {"organization_id": org.organization_id, "request_id": uuid7(), "user_id": member, "model": "m"}
    placed = NOVEMBER - timedelta(days=3)
    hold = Move(action=Action.AUTHORIZE, amount_micros=credits(9), lease_seconds=60, flags=Flag.SENT, **request)
    await simulate([hold], placed)
    async with await _simulator(org) as conn:
        await conn.execute("select credits.expire_holds(500, %s)", [placed + timedelta(minutes=2)])
    assert (await read(org, NOVEMBER)).cost.charged_micros == credits(9)

    await simulate([Move(action=Action.SETTLE, amount_micros=credits(4), **request)], NOVEMBER)
    found = await read(org, NOVEMBER)
    day = next(each for each in found.trend.days if each.charged_micros)
    assert (day.span.first, day.charged_micros) == (date(2026, 11, 17), credits(4))
    assert found.cost.charged_micros == found.people.charged_micros == credits(4)
    assert found.cost.requests == 1


async def _simulator(org):
    return await psycopg.AsyncConnection.connect(org.database.dsn("bursar_simulator"), autocommit=True)


async def test_margin_is_for_those_who_may_see_it_and_says_what_is_not_priced(org, simulate) -> None:
    await fund(org)
    member = await org.member()
    moves = [deduct(org, member, NOVEMBER, credits(2), cost=5_000_000) for _ in range(2)]
    moves.append(deduct(org, member, NOVEMBER, 0, flags=Flag.UNPRICED))
    assert all(verdict.accepted for verdict in await simulate(moves))
    assert (await read(org, NOVEMBER, with_margin=False)).margin is None
    margin = (await read(org, NOVEMBER)).margin
    assert margin is not None
    # 4 cr are 4 cents at list price; providers ask 1 cent.
    assert (margin.profit_nano_usd, margin.margin_permille) == (30_000_000, 750)
    assert (margin.unpriced_requests, margin.priced_permille) == (1, 666)


async def test_an_organization_without_usage_has_zeros_and_says_so(org) -> None:
    found = await read(org, NOVEMBER)
    assert found.is_unused
    assert len(found.trend.days) == 30
    assert found.cost.change.permille is None
    assert [row.name for row in found.departments.rows] == ["Unattributed"]


async def test_usage_before_the_days_shown_is_remembered(org, simulate) -> None:
    await fund(org)
    long_ago = NOVEMBER - timedelta(days=200)
    await simulate([deduct(org, await org.member(), long_ago)])
    found = await read(org, NOVEMBER)
    assert found.trend.charged_micros == 0
    assert not found.is_unused
    assert found.last_used_at == long_ago


async def test_a_snapshot_writes_nothing(org) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        async with snapshot(org.database, org.organization_id) as conn:
            await db.execute(conn, "update identity.organizations set name = 'x'")
