"""`bursar repair` sets what is derived to what ledger, attribution, holds and grants say, and touches nothing else."""

import asyncio
import random
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.credits.conftest import scratch_database
from tests.credits.racing import Lane, Traffic, lanes
from tests.credits.scenes import Scene

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import now
from bursar.credits.repair import Burn, repair
from bursar.credits.verify import verify
from bursar.settings import Settings

# What is corrupted, of one organization. Each is put right to what it was.
GRANTED_OTHERWISE = (
    "(select grant_id from credits.burns b where b.start_micros > 0 and b.organization_id = burns.organization_id)"
)
CORRUPTIONS = {
    "limit of a pool": "update credits.balances set limit_amount = limit_amount + 7 where kind = 'pool'",
    "use of a pool": "update credits.balances set used_amount = used_amount + 7 where kind = 'pool'",
    "less use of a pool": "update credits.balances set used_amount = used_amount - 1 where kind = 'pool'",
    "what a pool holds": "update credits.balances set held_amount = held_amount + 3 where kind = 'pool'",
    "holds of all balances": "update credits.balances set held_amount = 0 where true",
    "limit of an open part": "update credits.balances set limit_amount = 1000 where kind = 'open'",
    "use of an open part": "update credits.balances set used_amount = used_amount + 2 where kind = 'open'",
    "what an open part holds": "update credits.balances set held_amount = held_amount + 2 where kind = 'open'",
    "limit of a share": "update credits.balances set limit_amount = limit_amount - 3 where {reserved}",
    "use of a share": "update credits.balances set used_amount = used_amount + 4 where {reserved}",
    "use of a capped share": "update credits.balances set used_amount = used_amount + 4 where {capped}",
    "use of a cap": "update credits.balances set used_amount = used_amount + 1 where kind = 'limit'",
    "what a cap holds": "update credits.balances set held_amount = 1 where kind = 'limit'",
    "what is left of a grant": "update credits.grant_states set left_micros = left_micros + 5 where {half}",
    "the money left in a grant": "update credits.grant_states set value_left_nano_usd = value_left_nano_usd + 5"
    " where {half}",
    "the money of a stretch": "update credits.burns set value_nano_usd = value_nano_usd + 5 where start_micros > 0",
    "that a grant is active": "update credits.grant_states set state = 'ended', left_micros = 0 where {half}",
    "that a grant is burnt up": "update credits.grant_states set state = 'active', left_micros = 1 where {burnt}",
    "all grants": "update credits.grant_states set left_micros = 3, state = 'active' where state <> 'scheduled'",
    "a stretch": "delete from credits.burns where start_micros > 0",
    "the first stretch": "delete from credits.burns where start_micros = 0",
    "the end of a stretch": "update credits.burns set end_micros = end_micros - 2 where start_micros = 0",
    "the start of a stretch": "update credits.burns set start_micros = start_micros + 2 where start_micros > 0",
    "the grant of a stretch": f"update credits.burns set grant_id = {GRANTED_OTHERWISE} where start_micros = 0",
    "up to where was poured": "update credits.pools set poured_micros = poured_micros + 1 where true",
    "when a pool wakes": "update credits.pools set next_event_at = 'infinity' where true",
    "when the gate wakes": "update credits.gates set next_event_at = 'infinity' where true",
    "when the gate wakes for a raise": "update credits.gates set next_limit_event_at = 'infinity' where true",
    "limit of a raised cap": "update credits.balances set limit_amount = 400 where kind = 'limit'",
    "all of some balances": "update credits.balances set held_amount = 0, limit_amount = 99, used_amount = 3"
    " where kind <> 'allocation'",
}  # fmt: skip
# Charges that are booked while a pool's use is wrong have wrong positions, for good: that is the record itself.
WHILE_CALLS_GO_ON = (
    "limit of a pool",
    "use of a cap",
    "limit of an open part",
    "what an open part holds",
    "use of a share",
)
PLACES = {
    "{reserved}": "balance_id in (select allocation_id from credits.allocations where kind = 'reserved')",
    "{capped}": "balance_id in (select allocation_id from credits.allocations where kind = 'capped')",
    "{half}": "state = 'active' and grant_id in (select b.grant_id from credits.burns b)",
    "{burnt}": "state = 'ended'",
}  # fmt: skip
DERIVED = (
    "select balance_id, period_start::text, limit_amount, used_amount, held_amount, excess_amount "
    "from credits.balances",
    "select grant_id, state, left_micros, value_left_nano_usd from credits.grant_states",
    "select pool_id, start_micros, end_micros, grant_id, grant_from_micros, value_nano_usd from credits.burns",
    "select pool_id, poured_micros, next_event_at::text from credits.pools",
    "select next_event_at::text, next_limit_event_at::text from credits.gates",
)


@pytest.fixture(scope="session")
async def broken(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database whose balances are corrupted. After `database`, which made the roles."""
    async with scratch_database(admin_dsn, settings, "broken") as opened:
        yield opened


def scene_in(database: db.Database) -> Scene:
    """Two grants of which one is burnt up, one to come, shares, caps, charges, open holds and an expiry."""
    scene = Scene(psycopg.connect(database.dsn("admin"), autocommit=True), now=now())
    ann, ben, cem = (scene.user() for _ in range(3))
    pool = scene.pool()
    scene.grant(pool, 20, expires=scene.now.replace(year=2200), priority=1, paid=777)
    scene.grant(pool, 500, paid=10_001)
    scene.grant(pool, 50, starts=scene.now.replace(year=2199))
    scene.share(pool, ann, 100)
    scene.share(pool, ben, 60, kind="capped", period="month")
    scene.raise_(scene.limit(400, period="month"), 30, ends=scene.now.replace(year=2100))
    for user in (ann, ben, cem):
        scene.later(milliseconds=1)
        assert scene.deduct(9, user).accepted
        scene.hold(4, user)
    scene.later(milliseconds=1)
    scene.grant(pool, 30, expires=scene.now.replace(year=2100))  # pours what was used
    scene.later(milliseconds=1)
    scene.deduct(5, cem)
    return scene


def derived(scene: Scene) -> list[Any]:
    return [sorted(scene.admin(f"{sql} where organization_id = %s", scene.organization)) for sql in DERIVED]


def record(scene: Scene) -> list[Any]:
    """The ledger, attribution, grants and holds: what is never touched."""
    tables = ("ledger.entries", "ledger.attribution", "ledger.attribution_takes", "credits.grants", "credits.holds")
    return [
        scene.admin(f"select md5(string_agg(t::text, '' order by t::text)) from {table} t where organization_id = %s",
                    scene.organization) for table in tables
    ]  # fmt: skip


def corrupt(scene: Scene, what: str) -> None:
    """Past the constraints that would not let it be."""
    sql = CORRUPTIONS[what]
    for place, text in PLACES.items():
        sql = sql.replace(place, text)
    if "credits.balances set" in sql:  # a balance is never over its limit but by its excess, corrupt or not
        sets = dict(each.strip().split(" = ") for each in sql.split(" set ")[1].split(" where ")[0].split(","))
        limit, used, held = (sets.get(f"{name}_amount", f"{name}_amount") for name in ("limit", "used", "held"))
        sql = sql.replace(" where ", f", excess_amount = greatest(0, {used} + {held} - ({limit})) where ", 1)
    touched = scene.conn.execute(f"{sql} and organization_id = %s", [scene.organization]).rowcount
    assert touched > 0, what


async def mend(database: db.Database, scene: Scene, *, apply: bool) -> list[Any]:
    return await repair(database, organization_id=scene.organization, by=OPERATOR, apply=apply)


@pytest.mark.parametrize("what", CORRUPTIONS)
async def test_each_derived_value_is_put_right(broken: db.Database, what: str) -> None:
    scene = scene_in(broken)
    assert scene.findings() == []
    before, facts = derived(scene), record(scene)
    corrupt(scene, what)
    found = await mend(broken, scene, apply=False)
    assert found
    assert all(each.repairable and not each.mended for each in found)
    assert derived(scene) != before  # nothing was changed yet

    mended = await mend(broken, scene, apply=True)
    assert mended
    assert all(each.mended for each in mended), mended
    assert derived(scene) == before
    assert record(scene) == facts
    assert scene.findings() == []
    [event] = scene.admin(
        "select action, old_value, new_value from audit.events where organization_id = %s", scene.organization
    )
    assert event[0] == "books.repaired"
    assert event[1].keys() == event[2].keys() != set()
    assert await mend(broken, scene, apply=True) == []


async def test_a_fault_of_the_ledger_itself_is_named_and_left_alone(broken: db.Database) -> None:
    scene = scene_in(broken)
    scene.admin(
        "insert into ledger.attribution_takes (organization_id, request_id, booked_at, pool_id, position_micros,"
        " charged_micros) select organization_id, request_id, booked_at, pool_id, 0, 1 from ledger.attribution"
        " where organization_id = %s limit 1", scene.organization,
    )  # fmt: skip
    facts = record(scene)
    found = await mend(broken, scene, apply=True)
    assert {(each.invariant, each.repairable, each.mended) for each in found} >= {
        ("takes_belong_to_a_request", False, False)
    }
    assert record(scene) == facts


async def test_balances_are_mended_while_calls_go_on(broken: db.Database) -> None:
    scene = scene_in(broken)
    users = [UUID(str(row[0])) for row in scene.admin(
        "select user_id from identity.memberships where organization_id = %s", scene.organization)]  # fmt: skip
    scene.grant(scene.pool(), 10**6)
    stop = threading.Event()

    def drive(lane: Lane, seed: int) -> None:
        traffic = Traffic(scene, lane, users, random.Random(seed))
        while not stop.is_set():
            traffic.step()
        traffic.end()

    dice = random.Random(5)
    with lanes(broken, 2) as connected, ThreadPoolExecutor(2) as threads:
        driving = [threads.submit(drive, lane, n) for n, lane in enumerate(connected)]
        try:
            for _ in range(4):
                for what in dice.sample(WHILE_CALLS_GO_ON, 2):
                    corrupt(scene, what)
                assert [each for each in await mend(broken, scene, apply=True) if not each.mended] == []
                async with broken.platform() as conn:
                    assert await verify(conn, organization_id=scene.organization) == []
        finally:
            stop.set()
        for each in driving:
            each.result()
    assert scene.findings() == []


async def test_a_repair_waits_for_whoever_is_moving_credits(broken: db.Database) -> None:
    scene = scene_in(broken)
    corrupt(scene, "limit of a pool")
    with scene.conn.transaction():
        assert scene.deduct(9, scene.user()).accepted
        mending = asyncio.create_task(mend(broken, scene, apply=True))
        waits = "select exists (select from pg_locks where not granted and %s = any (pg_blocking_pids(pid)))"
        while not mending.done() and scene.admin(waits, scene.conn.info.backend_pid) == [(False,)]:
            await asyncio.sleep(0.01)
    # Nothing but what was wrong: whoever reads an amount while it moves would set it back, and mend that too.
    assert {each.invariant for each in await mending} == {"pool_limit_is_the_ledger"}
    assert scene.findings() == []


def test_a_stretch_of_another_value_is_another_stretch() -> None:
    burn = Burn(0, 5, UUID(int=1))
    assert replace(burn, value_nano_usd=3) != burn
