"""People who move into an organization with their credits: nothing is lost or doubled, wherever a process ends."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb
from tests.credits.scenes import Balance, Scene
from tests.credits.test_switching import owing

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import moving
from bursar.credits.grants import Grant, GrantSource, add_grant, list_grants
from bursar.credits.moving import Into
from bursar.credits.pools import PoolKind, list_pools, pool_for
from bursar.credits.transfers import PoolOwes, Sharing, switch_pools
from bursar.identity.organizations import OrganizationNotFound
from bursar.money import Micros
from bursar.problems import translated

CREDIT = 1_000_000


class Person:
    """A member of an organization with credits of their own at home."""

    def __init__(self, org: Any, user: UUID, home: UUID) -> None:
        self.org, self.user, self.home, self.database = org, user, home, org.database

    async def grant(self, credits: int, **terms: Any) -> None:
        async with self.database.tenant(self.home) as conn:
            await add_grant(
                conn,
                organization_id=self.home,
                pool_id=await pool_for(conn, organization_id=self.home),
                amount_micros=Micros(credits * CREDIT),
                source=GrantSource.PURCHASE,
                idempotency_key=uuid7().hex,
                **terms,
            )

    async def grants(self, organization: UUID) -> list[Grant]:
        async with self.database.tenant(organization) as conn:
            return await list_grants(conn, organization_id=organization)

    async def available(self, organization: UUID) -> dict[PoolKind, int]:
        async with self.database.tenant(organization) as conn:
            return {
                each.kind: each.available_micros // CREDIT
                for each in await list_pools(conn, organization_id=organization)
            }

    async def call(self, sql: str, *values: Any) -> Any:
        async with self.database.tenant(self.home) as conn:
            row = await (await conn.execute(sql, values)).fetchone()
        return row[0] if row else None

    async def move(self, **terms: Any) -> moving.Move:
        asked = {
            "user_id": self.user,
            "organization_id": self.org.organization_id,
            "into": Into.PERSONAL,
            "by": OPERATOR,
        }
        with translated():
            return await moving.move_in(self.database, **{**asked, **terms})


async def person_in(org: Any, database: db.Database) -> Person:
    user = await org.member()
    async with database.untenanted() as conn:
        home = await db.fetch_value(conn, "select home_organization_id from route.find_user(%(user)s)", user=user)
    return Person(org, user, home)


@pytest.fixture
async def person(org: Any, database: db.Database) -> Person:
    return await person_in(org, database)


async def test_grants_go_along_with_priority_time_and_what_was_paid(person: Person) -> None:
    end = clock.now() + timedelta(days=30)
    await person.grant(10, priority=5, expires_at=end, cost_basis_nano_usd=1_000_000_001)
    await person.grant(4, is_free=True)
    await person.call("select credits.deduct_credits(%s, %s, 3000000, 'm', 'k')", person.home, person.user)
    move = await person.move()
    assert (move.amount_micros, move.held_micros) == (11 * CREDIT, 0)
    assert await person.available(person.home) == {PoolKind.INDIVIDUAL: 0}
    assert await person.available(person.org.organization_id) == {PoolKind.PERSONAL: 11, PoolKind.SHARED: 0}
    before, after = await person.grants(person.home), await person.grants(person.org.organization_id)
    assert [(each.amount_micros // CREDIT, each.priority, each.expires_at, each.is_free) for each in after] == [
        (7, 5, end, False),
        (4, 100, None, True),
    ]
    assert {each.source for each in after} == {GrantSource.TRANSFER}
    assert sum(each.left_micros for each in before) == 0
    # Three tenths were burnt at home; the value of the rest went along, to the last nano-dollar.
    burnt = await person.call(
        "select sum(value_nano_usd)::bigint from credits.burns where organization_id = %s", person.home
    )
    assert (burnt, after[0].cost_basis_nano_usd) == (300_000_000, 700_000_001)
    async with person.org.tenant() as conn:
        [arrival] = await moving.list_arrivals(conn, organization_id=person.org.organization_id)
    assert (arrival.user_id, arrival.from_organization_id, arrival.amount_micros) == (
        person.user,
        person.home,
        11 * CREDIT,
    )


async def test_what_running_requests_hold_stays_and_can_be_brought_later(person: Person) -> None:
    await person.grant(10)
    request = uuid7()
    await person.call("select credits.authorize(%s, %s, %s, null, 4000000, 'm')", person.home, request, person.user)
    move = await person.move(into=Into.SHARED)
    assert (move.amount_micros // CREDIT, move.held_micros // CREDIT) == (6, 4)
    assert (await person.available(person.org.organization_id))[PoolKind.SHARED] == 6
    await person.call("select credits.settle(%s, %s, %s, null, 1000000, 'm')", person.home, request, person.user)
    assert (await person.move(into=Into.SHARED)).amount_micros == 3 * CREDIT
    assert (await person.available(person.org.organization_id))[PoolKind.SHARED] == 9


async def test_a_move_whose_process_ended_arrives_once(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    await person.grant(10)
    transfer = await left_behind(person, monkeypatch)
    assert (await person.available(person.home), await person.grants(person.org.organization_id)) == (
        {PoolKind.INDIVIDUAL: 0},
        [],
    )
    for _ in range(2):
        await moving.finish_moves(person.database, older_than=timedelta(0))
    again = await person.move(transfer_id=transfer)
    assert again.amount_micros == 10 * CREDIT
    assert [each.amount_micros for each in await person.grants(person.org.organization_id)] == [10 * CREDIT]


async def left_behind(person: Person, monkeypatch: pytest.MonkeyPatch, **terms: Any) -> UUID:
    """A move whose process ended before it arrived."""
    transfer = uuid7()

    async def die(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(moving, "_arrive", die)
        await person.move(transfer_id=transfer, **terms)
    return transfer


async def test_what_was_meant_for_a_shared_pool_that_was_divided_meanwhile_becomes_the_persons_own(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    await person.grant(10)
    await left_behind(person, monkeypatch, into=Into.SHARED)
    organization_id = person.org.organization_id
    async with person.org.tenant() as conn:
        await switch_pools(
            conn, organization_id=organization_id, to=Sharing.PERSONAL, by=OPERATOR, idempotency_key=uuid7().hex
        )
    await moving.finish_moves(person.database, older_than=timedelta(0))
    assert await person.available(organization_id) == {PoolKind.PERSONAL: 10}


async def test_a_move_that_cannot_be_finished_keeps_no_other_waiting(
    person: Person, make_org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    await person.grant(10)
    other = await person_in(await make_org(), person.database)
    await other.grant(7)
    stuck = await left_behind(person, monkeypatch)
    await left_behind(other, monkeypatch)
    arrive = moving._arrive

    async def arrive_but_one(database: db.Database, move: moving.Move, by: Any) -> None:
        if move.transfer_id == stuck:
            raise ConnectionError
        await arrive(database, move, by)

    with monkeypatch.context() as patched:
        patched.setattr(moving, "_arrive", arrive_but_one)
        await moving.finish_moves(person.database, older_than=timedelta(0))
    assert await person.grants(person.org.organization_id) == []
    assert (await other.available(other.org.organization_id))[PoolKind.PERSONAL] == 7
    await moving.finish_moves(person.database, older_than=timedelta(0))
    assert (await person.available(person.org.organization_id))[PoolKind.PERSONAL] == 10


async def test_moves_at_the_same_time_as_charges_lose_and_double_nothing(person: Person) -> None:
    await person.grant(100)

    async def spend(number: int) -> int:
        charge = "select (credits.deduct_credits(%s, %s, 1000000, 'm', %s)).outcome"
        return int(await person.call(charge, person.home, person.user, f"k{number}") == 0)

    spent = sum(await asyncio.gather(*[spend(number) for number in range(20)], return_exceptions=False))
    moves = await asyncio.gather(*[person.move() for _ in range(3)], *[spend(number) for number in range(20, 40)])
    moved = sum(each.amount_micros for each in moves if isinstance(each, moving.Move)) // CREDIT
    spent += sum(each for each in moves if isinstance(each, int))
    assert moved + spent + (await person.available(person.home))[PoolKind.INDIVIDUAL] == 100
    assert (await person.available(person.org.organization_id))[PoolKind.PERSONAL] == moved


async def test_who_owes_or_does_not_belong_moves_nothing(person: Person, make_org: Any) -> None:
    elsewhere = await make_org()
    with pytest.raises(OrganizationNotFound):
        await person.move(organization_id=elsewhere.organization_id)
    with pytest.raises(moving.NoSuchPlace, match="company"):
        await person.move(organization_id=person.home)
    apart = await make_org(is_shared_token_pool=False)
    await apart.member(email=f"{uuid7().hex}@x.example")
    await person.grant(1)
    request = uuid7()
    await person.call("select credits.authorize(%s, %s, %s, null, 1000000, 'm')", person.home, request, person.user)
    await person.call("select credits.settle(%s, %s, %s, null, 2000000, 'm')", person.home, request, person.user)
    with pytest.raises(PoolOwes):
        await person.move()


# ---------------------------------------------------------------------------------------------- rules, scene by scene


def depart(home: Scene, user: UUID, into: UUID | None = None, *, transfer: UUID | None = None) -> tuple[Any, ...]:
    """(how much left, how much is held, the parts) of a move out of a home."""
    return home.admin(
        "select amount_micros, held_micros, parts from credits.departures where transfer_id = %s",
        home.call(
            "select (credits.depart(%s, %s, %s, %s, 'personal', null, %s)).transfer_id",
            home.organization, transfer or uuid7(), user, into or uuid7(), home.now,
        ),
    )[0]  # fmt: skip


def arrive(there: Scene, parts: Any, user: UUID, kind: str = "personal", *, transfer: UUID | None = None) -> int:
    return there.call(  # type: ignore[no-any-return]
        "select credits.arrive(%s, %s, %s, %s, %s, %s, null, %s)",
        there.organization, transfer or uuid7(), user, uuid7(), kind, Jsonb(parts), there.now,
    )  # fmt: skip


def at_home(scene: Scene) -> tuple[UUID, UUID]:
    """A person and the pool of their home."""
    user = scene.user()
    return user, scene.pool("individual")


def test_everything_that_nothing_holds_leaves_a_home_once(scene: Scene) -> None:
    user, pool = at_home(scene)
    other = scene.pool("individual", models="gpt%")
    first, into, transfer = scene.grant(pool, 100, paid=1_000, priority=7), uuid7(), uuid7()
    scene.grant(other, 10, free=True, expires=scene.now + timedelta(days=9))
    scene.deduct(30, user)
    amount, held, parts = depart(scene, user, into, transfer=transfer)
    assert (amount, held) == (80, 0)
    assert [(each["amount_micros"], each["value_nano_usd"], each["model_filter"]) for each in parts] == [
        (70, 700, None),
        (10, 0, "gpt%"),
    ]
    assert (parts[0]["grant_id"], parts[0]["priority"], parts[0]["is_free"]) == (str(first), 7, False)
    assert (scene.balance(pool), scene.balance(other)) == (Balance(30, 30, 0, 0), Balance(0, 0, 0, 0))
    assert scene.grants(pool) == [("purchase", 100, 0, "ended")]
    scene.grant(pool, 5)
    assert depart(scene, user, into, transfer=transfer) == (amount, held, parts), "the same move is one"
    assert scene.balance(pool).limit == 35
    assert scene.entries("transfer_out") == [("transfer_out", 10, 0), ("transfer_out", 70, 700)]
    assert scene.findings() == []


def test_what_is_held_stays_at_home_with_the_grants_that_it_burns(scene: Scene) -> None:
    user, pool = at_home(scene)
    scene.grant(pool, 10, expires=scene.now + timedelta(hours=1))
    scene.grant(pool, 20, expires=scene.now + timedelta(days=1))
    scene.grant(pool, 100)
    request = scene.hold(25, user)
    amount, held, parts = depart(scene, user)
    assert (amount, held, [each["amount_micros"] for each in parts]) == (105, 25, [5, 100])
    assert [left for _, _, left, _ in scene.grants(pool)] == [10, 15, 0]
    assert scene.settle(request, 25).charged_micros == 25
    assert scene.balance(pool) == Balance(25, 25, 0, 0)
    assert scene.findings() == []


def test_what_an_expired_grant_keeps_for_a_hold_goes_nowhere_else(scene: Scene) -> None:
    user, pool = at_home(scene)
    scene.grant(pool, 30, expires=scene.now + timedelta(minutes=5))
    request = scene.hold(20, user)
    scene.later(minutes=6)
    scene.grant(pool, 10)
    amount, held, parts = depart(scene, user)
    assert (amount, held, len(parts)) == (10, 20, 1), "the hold needs nothing of the new one"
    scene.grant(pool, 15, priority=1)  # burns first, so that the hold needs 5 of the old one
    assert depart(scene, user)[0] == 0
    scene.settle(request, 0)
    assert depart(scene, user)[0] == 15
    assert scene.findings() == []


def test_only_what_is_at_home_leaves_it(scene: Scene) -> None:
    user, pool = at_home(scene)
    shared = scene.pool()
    scene.grant(pool, 10)
    scene.grant(shared, 20)
    scene.grant(pool, 40, starts=scene.now + timedelta(days=1))
    assert depart(scene, user)[0] == 10
    assert scene.balance(shared).limit == 20
    scene.later(days=1)
    scene.wake()
    assert scene.balance(pool).limit == 40, "what was to come then comes here"
    assert scene.findings() == []


def test_who_owes_at_home_takes_nothing_along(scene: Scene) -> None:
    user, pool = at_home(scene)
    other = scene.pool("individual", models="gpt%")
    scene.grant(pool, 10)
    scene.grant(other, 10)
    scene.settle(scene.hold(5, user, model="gpt-4"), 25)
    assert scene.balance(pool).excess == 5
    with scene.refusal("BR433"):
        depart(scene, user)
    assert scene.balance(other).limit == 10


def test_what_left_arrives_once_with_its_priority_time_and_money(scene: Scene) -> None:
    home, user, transfer = Scene(scene.conn), scene.user(), uuid7()
    pool = home.pool("individual")
    home.grant(pool, 100, paid=1_001, priority=7, expires=scene.now + timedelta(days=9))
    home.grant(pool, 10, free=True)
    _, _, parts = depart(home, user, transfer=transfer)
    shared = scene.pool()
    scene.grant(shared, 50)
    assert scene.deduct(1, user).accepted  # by a chain without a pool of their own
    assert arrive(scene, [], user) == 0
    for _ in range(2):
        assert arrive(scene, parts, user, transfer=transfer) == 110
    own = scene.admin("select pool_id from credits.pools where owner_user_id = %s and kind = 'personal'", user)[0][0]
    columns = "select amount_micros, priority, is_free, cost_basis_nano_usd, isfinite(expires_at) from credits.grants"
    assert scene.admin(f"{columns} where pool_id = %s order by amount_micros", own) == [
        (10, 100, True, 0, False),
        (100, 7, False, 1_001, True),
    ]
    assert scene.entries("transfer_in") == [("transfer_in", 10, 0), ("transfer_in", 100, 1_001)]
    assert scene.deduct(10, user).accepted
    assert (scene.used(own), scene.used(shared)) == ((10, 0), (1, 0)), "spent at once, before what is everybody's"
    assert scene.findings() == home.findings() == []


def test_what_was_used_before_credits_arrived_is_paid_by_the_grants_there_were(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.settle(scene.hold(40, user), 40)
    part = {
        "grant_id": str(uuid7()), "model_filter": None, "amount_micros": 50, "value_nano_usd": 0, "priority": 1,
        "is_free": True, "effective_at": scene.now.isoformat(), "expires_at": "infinity",
    }  # fmt: skip
    scene.later(hours=1)
    arrive(scene, [part], user, "shared")
    assert scene.grants(pool) == [("transfer", 50, 50, "active"), ("purchase", 100, 60, "active")]
    assert scene.balance(pool) == Balance(150, 40, 0, 0)
    assert scene.findings() == []


def test_what_expires_on_the_way_expires_where_it_arrives(scene: Scene) -> None:
    home, user = Scene(scene.conn), scene.user()
    pool = home.pool("individual")
    home.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    home.grant(pool, 10)
    _, _, parts = depart(home, user)
    scene.later(hours=2)
    assert arrive(scene, parts, user) == 110
    own = scene.admin("select pool_id from credits.pools where owner_user_id = %s and kind = 'personal'", user)[0][0]
    assert scene.balance(own) == Balance(10, 0, 0, 0)
    assert scene.entries("expiry") == [("expiry", 100, 0)]
    assert scene.findings() == []


def test_what_a_member_brings_along_pays_what_they_owe_a_closed_pool(scene: Scene) -> None:
    user, own, shared = owing(scene)
    home = Scene(scene.conn)
    home.grant(home.pool("individual"), 40)
    _, _, parts = depart(home, user)
    assert arrive(scene, parts, user) == 40
    assert (scene.balance(own), scene.balance(shared)) == (Balance(35, 10, 0, 0), Balance(35, 35, 0, 0))
    assert scene.findings() == []


def test_when_a_move_arrived_is_noted_once(scene: Scene) -> None:
    user, _ = at_home(scene)
    transfers = [uuid7(), uuid7()]
    for transfer in transfers:
        depart(scene, user, transfer=transfer)
    for transfer in (transfers[0], transfers[0]):
        scene.call("select credits.note_arrival(%s, %s, %s)", scene.organization, transfer, scene.now)
        scene.later(hours=1)
    noted = "select arrived_at from credits.departures where transfer_id = %s"
    assert [scene.admin(noted, each)[0][0] for each in transfers] == [scene.now - timedelta(hours=2), None]


def test_what_members_brought_along_stays_apart_when_it_is_shared(scene: Scene) -> None:
    users, end = [scene.user(), scene.user()], scene.now + timedelta(days=9)
    for user, paid in zip(users, (1_000_000, 3_000_000), strict=True):
        home = Scene(scene.conn)
        home.grant(home.pool("individual"), 100, expires=end, paid=paid)
        arrive(scene, depart(home, user)[2], user)
    pool = scene.pool()
    scene.switch("shared")
    shared = """
        select g.amount_micros, g.cost_basis_nano_usd, g.parent_grant_id = any (array(
            select b.grant_id from credits.grants b
            where b.organization_id = g.organization_id and b.pool_id <> g.pool_id))
        from credits.grants g where g.organization_id = %s and g.pool_id = %s order by 2"""
    assert scene.admin(shared, scene.organization, pool) == [(100, 1_000_000, True), (100, 3_000_000, True)]
    assert scene.findings() == []
