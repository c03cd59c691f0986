"""R1, R2, R7, R9: threads and connections at one organization's credits; whatever happens when, sums are exact."""

import asyncio
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.credits.racing import Lane, Traffic, accepted, deduct, lanes, race
from tests.credits.scenes import Scene
from tests.promises.figures import IS_FULL, SEED, figure, tell

from bursar import db
from bursar.audit import seals, tampering
from bursar.clock import now, uuid7
from bursar.credits.moves import Action, Flag, Outcome, Verdict
from bursar.credits.verify import verify

CONNECTIONS, ROOMS = (400, 20) if IS_FULL else (100, 1)
TIMES = 20 if IS_FULL else 1
"""How often what has no figure of its own is played."""

ACCEPTED, REFUSED, KNOWN, KEY_REUSED = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.KNOWN, Outcome.KEY_REUSED


@pytest.fixture
def today(books: db.Database) -> Iterator[Scene]:
    """An organization of now."""
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        yield Scene(conn, now=now())


# ---------------------------------------------------------------------------------------------- room for so many


def rooms_for_100(today: Scene, connections: int) -> list[tuple[Scene, UUID, UUID]]:
    """(organization, user, pool) of each connection in turn; each pool has room for 100."""
    rooms = []
    for scene in [today, *(Scene(today.conn, now=now()) for _ in range(ROOMS - 1))]:
        user, pool = scene.user(), scene.pool()
        scene.grant(pool, 100)
        rooms.append((scene, user, pool))
    return [rooms[n % ROOMS] for n in range(connections)]


def test_of_many_deductions_at_once_exactly_the_100_that_fit_are_accepted(books: db.Database, today: Scene) -> None:
    rooms = rooms_for_100(today, CONNECTIONS)
    each = figure("deductions") // CONNECTIONS

    def deduct_some(lane: Lane, scene: Scene, user: UUID) -> list[Verdict]:
        return [lane.move(deduct(scene, user))[0] for _ in range(each)]

    with lanes(books, CONNECTIONS) as connected:
        work = [partial(deduct_some, lane, *room[:2]) for lane, room in zip(connected, rooms, strict=True)]
        verdicts = [verdict for each in race(work) for verdict in each]
    tell(f"{len(verdicts)} deductions from {CONNECTIONS} connections, {ROOMS} rooms")
    assert accepted(verdicts) == 100 * ROOMS
    assert {verdict.outcome for verdict in verdicts} == {ACCEPTED, REFUSED}
    for scene, _, pool in rooms[:ROOMS]:
        assert scene.used(pool) == (100, 0)
        assert scene.findings() == []


def test_of_many_holds_at_once_exactly_the_100_that_fit_are_settled(books: db.Database, today: Scene) -> None:
    rooms = rooms_for_100(today, CONNECTIONS)

    def hold_and_settle(lane: Lane, scene: Scene, user: UUID) -> int:
        settled = 0
        for _ in range(figure("deductions") // CONNECTIONS):
            verdict = lane.move(scene.asked(Action.AUTHORIZE, None, 1, user_id=user))[0]
            if verdict.outcome is ACCEPTED:
                settled += accepted(lane.move(scene.asked(Action.SETTLE, verdict.request_id, 1)))
        return settled

    with lanes(books, CONNECTIONS) as connected:
        work = [partial(hold_and_settle, lane, *room[:2]) for lane, room in zip(connected, rooms, strict=True)]
        assert sum(race(work)) == 100 * ROOMS
    for scene, _, pool in rooms[:ROOMS]:
        assert scene.used(pool) == (100, 0)
        assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- all at once


def test_caps_budget_and_pool_are_kept_together_while_calls_begin_grow_and_end_in_every_way(
    books: db.Database, today: Scene
) -> None:
    team = today.team()
    users = [today.user(team=team) for _ in range(4)]
    own = today.pool("personal", owner=users[0])
    pool = today.pool()
    times = figure("steps") // 2_000
    today.grant(pool, 400 * times)
    today.grant(own, 60)
    today.share(pool, users[1], 80, when_empty="open_part")
    caps = [today.limit(90 * times, scope="user", of=user) for user in users]
    budget = today.limit(300 * times, scope="team", of=team, period="month")
    with lanes(books, 9) as connected:
        traffic = [Traffic(today, lane, users, random.Random(SEED + n)) for n, lane in enumerate(connected[:8])]
        stop = threading.Event()

        def expire() -> None:
            """Now and then the lease of a sent call is over before its second is."""
            overdue = (
                "update credits.holds set lease_expires_at = clock_timestamp() where request_id = ("
                "select request_id from credits.holds where organization_id = %s and is_sent order by random() limit 1)"
            )
            with psycopg.connect(books.dsn("admin"), autocommit=True) as admin:
                while not stop.is_set():
                    admin.execute(overdue, [today.organization])
                    connected[8].conn.execute("select credits.expire_holds()")
                    time.sleep(0.005)

        def drive(each: Traffic) -> None:
            for _ in range(figure("steps") // len(traffic)):
                each.step()
            each.end()

        with ThreadPoolExecutor(1) as expiry:
            background = expiry.submit(expire)
            race([partial(drive, each) for each in traffic])
            stop.set()
            background.result()
        # Chance may spare a run both: a call that finds no room, and the release of one that has expired.
        traffic[0].ask_too_much()
        late = traffic[0].send()
        time.sleep(1.1)
        _end_what_was_forgotten(books, today)
        if late is not None:
            traffic[0].release(late)
    for balance in (pool, own, budget, *caps):
        row = today.balance(balance)
        assert (row.held, row.excess) == (0, 0)
        assert row.used <= row.limit
    spent = sum(sum(each.true.values()) + sum(each.lost.values()) for each in traffic)
    assert today.balance(budget).used == spent == today.balance(pool).used + today.balance(own).used
    assert today.findings() == []
    kinds = sum((each.outcomes for each in traffic), Counter[tuple[Action, Outcome]]())
    assert kinds[Action.AUTHORIZE, REFUSED] > 0
    tell(f"{sum(kinds.values())} moves in 8 threads")


def _end_what_was_forgotten(books: db.Database, scene: Scene) -> None:
    """Sent calls expire into their estimate; the others would be released by expiry, and are now."""
    with lanes(books, 1) as (lane,):
        lane.conn.execute("select credits.expire_holds(100000)")
        query = "select request_id from credits.holds where organization_id = %s"
        for (request,) in scene.admin(query, scene.organization):
            lane.move(scene.asked(Action.RELEASE, request))


def test_a_settle_and_the_expiry_of_its_hold_may_come_in_any_order_and_charge_once(
    books: db.Database, today: Scene
) -> None:
    pool, user = today.pool(), today.user()
    today.grant(pool, 10_000)
    with lanes(books, 2) as (settling, expiring):
        rounds = figure("steps") // 60
        for n in range(rounds):
            sent = Flag.SENT if n % 2 else Flag.NONE
            moves = [today.asked(Action.AUTHORIZE, None, 10, user_id=user, flags=sent) for _ in range(4)]
            requests = [verdict.request_id for verdict in settling.move(*moves)]
            overdue = "update credits.holds set lease_expires_at = clock_timestamp() where request_id = any(%s)"
            today.admin(overdue, requests)
            settles = [today.asked(Action.SETTLE, request, 7, user_id=user) for request in requests]
            verdicts, _ = race(
                [
                    partial(settling.move, *settles),
                    partial(expiring.conn.execute, "select credits.expire_holds()"),
                ]
            )
            assert accepted(verdicts) == 4
            for request in requests:
                assert sum(row[1] for row in today.charges(request)) == 7
    assert today.used(pool) == (7 * 4 * rounds, 0)
    assert today.findings() == []


# ---------------------------------------------------------------------------------------------- many organizations


def test_batches_over_overlapping_organizations_never_deadlock(books: db.Database, today: Scene) -> None:
    scenes = [today, *(Scene(today.conn, now=now()) for _ in range(5))]
    users = {scene.organization: scene.user() for scene in scenes}
    pools = {scene.organization: scene.pool() for scene in scenes}
    for scene in scenes:
        scene.grant(pools[scene.organization], 300)

    def drive(lane: Lane, seed: int) -> Counter[UUID]:
        dice, spent = random.Random(SEED + seed), Counter[UUID]()
        for _ in range(60 * TIMES):
            chosen = dice.sample(scenes, dice.randrange(2, 7)) * 3
            dice.shuffle(chosen)
            moves = [deduct(scene, users[scene.organization], dice.randrange(1, 5)) for scene in chosen]
            for move, verdict in zip(moves, lane.move(*moves), strict=True):
                if verdict.outcome is ACCEPTED:
                    spent[move.organization_id] += move.amount_micros
        return spent

    def administer(seed: int) -> None:
        dice = random.Random(seed)
        with psycopg.connect(books.dsn("bursar_app"), autocommit=True) as conn:
            for _ in range(40 * TIMES):
                scene = dice.choice(scenes)
                organization, pool = scene.organization, pools[scene.organization]
                conn.execute("select set_config('app.organization_id', %s, false)", [str(organization)])
                conn.execute(
                    "select credits.add_credits_to_pool(%s, %s, 1, 'purchase', %s)", [organization, pool, uuid7().hex]
                )
                conn.execute("select credits.limits_changed(%s)", [organization])

    with lanes(books, 4) as connected:
        work: list[Callable[[], Any]] = [partial(drive, lane, n) for n, lane in enumerate(connected)]
        work += [partial(administer, n) for n in range(2)]
        spent = sum((each for each in race(work) if each is not None), Counter[UUID]())
    for scene in scenes:
        assert scene.used(pools[scene.organization]) == (spent[scene.organization], 0)
        assert scene.findings() == []


def test_of_parallel_reservations_that_do_not_fit_together_one_is_made(books: db.Database, today: Scene) -> None:
    sql = "select credits.allocate(%s, %s, %s, %s, 'reserved', 'none', 60, 'stops', false, null, %s)"

    def reserve(conn: psycopg.Connection[tuple[Any, ...]], pool: UUID) -> int:
        conn.execute("select set_config('app.organization_id', %s, false)", [str(today.organization)])
        try:
            conn.execute(sql, [today.organization, uuid7(), pool, uuid7(), uuid7().hex])
        except psycopg.Error as error:
            if error.sqlstate != "BR430":
                raise
            return 0
        return 1

    with ExitStack() as stack:
        app = books.dsn("bursar_app")
        connected = [stack.enter_context(psycopg.connect(app, autocommit=True)) for _ in range(8)]
        for n in range(5 * TIMES):
            pool = today.pool(models=f"m{n}%")
            today.grant(pool, 100)
            assert sum(race([partial(reserve, conn, pool) for conn in connected])) == 1
    assert today.findings() == []


def test_a_full_batch_over_many_organizations_charges_everybody_for_their_own(books: db.Database, today: Scene) -> None:
    scenes = [Scene(today.conn, now=now()) for _ in range(16)]
    callers = [(scene, scene.user()) for scene in scenes for _ in range(4)]
    for n, scene in enumerate(scenes):
        scene.grant(scene.pool(), 1000 if n % 4 else 3)  # some are tight
    dice = random.Random(1)
    with lanes(books, 1) as (lane,):
        for _ in range(3):  # chains are built, then found
            chosen = [dice.choice(callers) for _ in range(128)]
            moves = [deduct(scene, user, n % 7) for n, (scene, user) in enumerate(chosen)]
            verdicts = lane.move(*moves)
            for (scene, user), move, verdict in zip(chosen, moves, verdicts, strict=True):
                row = scene.admin(
                    "select user_id, charged_micros from ledger.attribution "
                    "where organization_id = %s and request_id = %s",
                    scene.organization,
                    move.request_id,
                )
                assert verdict.request_id == move.request_id
                assert row == ([(user, move.amount_micros)] if verdict.outcome is ACCEPTED else [])
    for scene in scenes:
        assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- twins


KEYS_A_ROUND, KEYS_A_BATCH = 50, 10


def test_of_ten_parallel_twins_one_has_the_effect_and_all_have_its_answer(books: db.Database, today: Scene) -> None:
    """Beside them the same key with another body is refused, and in another organization it is free."""
    pool, user = today.pool(), today.user()
    today.grant(pool, 10**6)
    elsewhere = Scene(today.conn, now=now())
    stranger = elsewhere.user()
    elsewhere.grant(elsewhere.pool(), 10**6)
    asked = [(today, user, b"same", 3)] * 10 + [(today, user, b"other", 4), (elsewhere, stranger, b"same", 5)]

    def ask(lane: Lane, keys: list[str], scene: Scene, who: UUID, body: bytes, amount: int) -> dict[str, Verdict]:
        verdicts: dict[str, Verdict] = {}
        shuffled = random.sample(keys, len(keys))
        for start in range(0, len(keys), KEYS_A_BATCH):
            some = shuffled[start : start + KEYS_A_BATCH]
            moves = [deduct(scene, who, amount, idempotency_key=key, body_hash=body) for key in some]
            verdicts |= zip(some, lane.move(*moves), strict=True)
        return verdicts

    rounds = figure("keys") // KEYS_A_ROUND
    with lanes(books, len(asked)) as connected:
        for n in range(rounds):
            keys = [f"key {n} {each}" for each in range(KEYS_A_ROUND)]
            work = [partial(ask, lane, keys, *how) for lane, how in zip(connected, asked, strict=True)]
            *twins, other, foreign = race(work)
            for key in keys:
                assert foreign[key].outcome is ACCEPTED
                outcomes = Counter(each[key].outcome for each in twins)
                if other[key].outcome is ACCEPTED:  # it came first, and then the ten are the others
                    assert outcomes == {KEY_REUSED: 10}
                    continue
                assert outcomes == {ACCEPTED: 1, KNOWN: 9}
                assert len({(each[key].request_id, each[key].charged_micros) for each in twins}) == 1
                assert other[key].outcome is KEY_REUSED
    tell(f"{rounds * KEYS_A_ROUND} keys, each from {len(asked)} connections at once")
    [(spent, rows)] = today.admin(
        "select sum(charged_micros), count(*) from ledger.attribution where pool_id = %s", pool
    )
    assert rows == rounds * KEYS_A_ROUND
    assert today.used(pool)[0] == spent
    assert today.findings() == elsewhere.findings() == []


def test_twins_of_a_refusal_are_refused_alike(books: db.Database, today: Scene) -> None:
    pool, user = today.pool(), today.user()
    with lanes(books, 10) as connected:
        twins = [deduct(today, user, 3, idempotency_key="key", body_hash=b"same") for _ in range(10)]
        work = [partial(lane.move, twin) for lane, twin in zip(connected, twins, strict=True)]
        verdicts = [answer for (answer,) in race(work)]
        today.grant(pool, 100)
        verdicts += connected[0].move(deduct(today, user, 3, idempotency_key="key", body_hash=b"same"))
    assert Counter(verdict.outcome for verdict in verdicts) == {REFUSED: 1, Outcome.KNOWN_REFUSED: 10}


# ---------------------------------------------------------------------------------------------- one moment


async def test_the_books_agree_at_any_moment_while_calls_go_on(books: db.Database, today: Scene) -> None:
    users = [today.user() for _ in range(3)]
    pool = today.pool()
    own = today.pool("personal", owner=users[0])
    today.grant(pool, 10**6)
    today.grant(own, 500)
    today.share(pool, users[1], 500, when_empty="open_part")
    today.share(pool, users[2], 10**5, kind="capped", period="day")
    today.limit(10**6, period="month")
    stop = threading.Event()

    def drive(lane: Lane, seed: int) -> int:
        traffic = Traffic(today, lane, users, random.Random(SEED + seed))
        steps = 0
        while not stop.is_set():
            traffic.step()
            steps += 1
        traffic.end()
        return steps

    with lanes(books, 3) as connected, ThreadPoolExecutor(3) as threads:
        driving = [threads.submit(drive, lane, n) for n, lane in enumerate(connected)]
        looks = 0
        until = time.monotonic() + figure("seconds") / 2
        while time.monotonic() < until:
            async with books.platform() as conn:
                assert await verify(conn, organization_id=today.organization) == []
            async with books.platform() as conn:
                await seals.seal(conn)
            assert await tampering.check(books, organization_id=today.organization) == []
            looks += 1
            await asyncio.sleep(0.01)
        stop.set()
        steps = [future.result() for future in driving]
    tell(f"the books looked through {looks} times during {sum(steps)} steps")
    assert looks > 3
    assert min(steps) > 10
    assert today.findings() == []


def test_a_key_spends_nothing_after_the_moment_it_was_revoked(books: db.Database, today: Scene) -> None:
    user = today.user()
    key = today.key(user)
    today.grant(today.pool(), 10**6)
    revoked = threading.Event()

    def spend(lane: Lane) -> list[Outcome]:
        outcomes = [lane.move(deduct(today, user, api_key_id=key))[0].outcome for _ in range(20)]
        while not revoked.is_set():
            outcomes.append(lane.move(deduct(today, user, api_key_id=key))[0].outcome)
        return [*outcomes, *(lane.move(deduct(today, user, api_key_id=key))[0].outcome for _ in range(5))]

    def revoke() -> datetime:
        time.sleep(0.2)
        with psycopg.connect(books.dsn("admin")) as conn:
            conn.execute("update identity.api_keys set revoked_at = clock_timestamp() where api_key_id = %s", [key])
            conn.execute("select set_config('app.organization_id', %s, true)", [str(today.organization)])
            conn.execute("select credits.limits_changed(%s)", [today.organization])
            row = conn.execute("select clock_timestamp()").fetchone()
        revoked.set()
        assert row is not None
        return row[0]  # type: ignore[no-any-return]

    with lanes(books, 4) as connected:
        *spent, moment = race([*(partial(spend, lane) for lane in connected), revoke])
    assert all(outcomes[-5:] == [Outcome.NOT_ALLOWED] * 5 for outcomes in spent)
    last = today.admin("select max(booked_at) from ledger.attribution where api_key_id = %s", key)[0][0]
    assert last < moment
