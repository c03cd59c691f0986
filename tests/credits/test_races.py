"""Real threads and connections at one organization's credits: whatever the interleaving, the sums are exact.

BURSAR_TEST_RACES=50 plays fifty times as many steps.
"""

import asyncio
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.credits.scenes import Scene

from bursar import db
from bursar.clock import now, uuid7
from bursar.credits.moves import MOVE_BATCH, Action, Flag, Move, Outcome, Verdict, as_arguments, as_verdicts
from bursar.credits.verify import verify
from bursar.db import arrays

TIMES = int(os.environ.get("BURSAR_TEST_RACES", "1"))
ACCEPTED, REFUSED, KNOWN, KEY_REUSED = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.KNOWN, Outcome.KEY_REUSED


class Lane:
    """A lane's connection; one thread at a time."""

    def __init__(self, conn: psycopg.Connection[tuple[Any, ...]]) -> None:
        arrays.register(conn)
        self.conn = conn

    def move(self, *moves: Move) -> list[Verdict]:
        """Verdicts after the commit."""
        cursor = self.conn.execute(MOVE_BATCH, as_arguments(moves), prepare=True, binary=True)
        return as_verdicts(sorted(cursor.fetchall(), key=lambda row: row[0]))


@contextmanager
def lanes(books: db.Database, count: int) -> Iterator[list[Lane]]:
    """So many lanes, all connected."""
    with ExitStack() as stack:
        connect = [psycopg.connect(books.dsn("bursar_lane"), autocommit=True) for _ in range(count)]
        yield [Lane(stack.enter_context(conn)) for conn in connect]


@pytest.fixture
def today(books: db.Database) -> Iterator[Scene]:
    """An organization of now."""
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        yield Scene(conn, now=now())


def race(work: Sequence[Callable[[], Any]]) -> list[Any]:
    """Start all at once, each in its own thread; what they return. The first error is raised."""
    start = threading.Barrier(len(work))

    def run(each: Callable[[], Any]) -> Any:
        start.wait()
        return each()

    with ThreadPoolExecutor(len(work)) as threads:
        return [future.result() for future in [threads.submit(run, each) for each in work]]


def accepted(verdicts: Sequence[Verdict]) -> int:
    """How many were."""
    return sum(1 for verdict in verdicts if verdict.outcome is ACCEPTED)


# ---------------------------------------------------------------------------------------------- room for so many


def test_of_500_deductions_from_100_connections_exactly_the_100_that_fit_are_accepted(
    books: db.Database, today: Scene
) -> None:
    pool, user = today.pool(), today.user()
    today.grant(pool, 100)

    def deduct_five_times(lane: Lane) -> list[Verdict]:
        return [lane.move(_deduct(today, user))[0] for _ in range(5 * TIMES)]

    with lanes(books, 100) as connected:
        work = [partial(deduct_five_times, lane) for lane in connected]
        verdicts = [verdict for each in race(work) for verdict in each]
    assert accepted(verdicts) == 100
    assert {verdict.outcome for verdict in verdicts} == {ACCEPTED, REFUSED}
    assert today.used(pool) == (100, 0)
    assert today.findings() == []


def test_of_500_holds_from_100_connections_exactly_the_100_that_fit_are_settled(
    books: db.Database, today: Scene
) -> None:
    pool, user = today.pool(), today.user()
    today.grant(pool, 100)

    def hold_and_settle(lane: Lane) -> int:
        settled = 0
        for _ in range(5 * TIMES):
            verdict = lane.move(today.asked(Action.AUTHORIZE, None, 1, user_id=user))[0]
            if verdict.outcome is ACCEPTED:
                settled += accepted(lane.move(today.asked(Action.SETTLE, verdict.request_id, 1)))
        return settled

    with lanes(books, 100) as connected:
        assert sum(race([partial(hold_and_settle, lane) for lane in connected])) == 100
    assert today.used(pool) == (100, 0)
    assert today.findings() == []


def _deduct(scene: Scene, user: UUID, amount: int = 1, **rest: Any) -> Move:
    return scene.asked(Action.DEDUCT, None, amount, user_id=user, **rest)


# ---------------------------------------------------------------------------------------------- all at once


@dataclass
class Traffic:
    """Calls of one thread: each is held, perhaps extended, and ends in one of all ways.

    Those that were sent have leases of a second, so that expiry races with everything else. true: what each call is
    charged in the end; open: what each open call holds; lost: sent calls that nobody asked about again.
    """

    scene: Scene
    lane: Lane
    users: list[UUID]
    dice: random.Random
    true: dict[UUID, int] = field(default_factory=dict)
    open: dict[UUID, int] = field(default_factory=dict)
    sent: set[UUID] = field(default_factory=set)
    lost: dict[UUID, int] = field(default_factory=dict)
    outcomes: Counter[tuple[Action, Outcome]] = field(default_factory=Counter)

    def step(self) -> None:
        """One move."""
        if not self.open or self.dice.random() < 0.45:
            self._begin()
            return
        request = self.dice.choice(list(self.open))
        ways = [self._extend, self._settle, self._settle, self._release, self._forget]
        self.dice.choice(ways)(request)

    def end(self) -> None:
        """Settle what is open."""
        for request in list(self.open):
            self._settle(request)

    def _move(self, action: Action, request: UUID | None, amount: int = 0, **rest: Any) -> Verdict:
        verdict = self.lane.move(self.scene.asked(action, request, amount, **rest))[0]
        self.outcomes[action, verdict.outcome] += 1
        return verdict

    def _begin(self) -> None:
        amount, user = self.dice.randrange(1, 8), self.dice.choice(self.users)
        if self.dice.random() < 0.3:
            verdict = self._move(Action.DEDUCT, None, amount, user_id=user)
            if verdict.outcome is ACCEPTED:
                self.true[verdict.request_id] = amount
            return
        is_sent = self.dice.random() < 0.5
        flags, lease = (Flag.SENT, 1) if is_sent else (Flag.NONE, 600)
        verdict = self._move(Action.AUTHORIZE, None, amount, user_id=user, lease_seconds=lease, flags=flags)
        if verdict.outcome is ACCEPTED:
            self.open[verdict.request_id] = amount
            if is_sent:
                self.sent.add(verdict.request_id)

    def _extend(self, request: UUID) -> None:
        if self._move(Action.EXTEND, request, 2, lease_seconds=1).outcome is ACCEPTED:
            self.open[request] += 2

    def _settle(self, request: UUID) -> None:
        amount = self.dice.randrange(self.open.pop(request) + 1)
        verdict = self._move(Action.SETTLE, request, amount, user_id=self.users[0])
        assert verdict.outcome is ACCEPTED, verdict
        self.true[request] = amount

    def _release(self, request: UUID) -> None:
        held = self.open.pop(request)
        if self._move(Action.RELEASE, request).outcome is Outcome.NO_HOLD:
            assert request in self.sent
            self.true[request] = held  # expiry had charged it by estimate

    def _forget(self, request: UUID) -> None:
        """The process died."""
        held = self.open.pop(request)
        if request in self.sent:
            self.lost[request] = held


def test_caps_budget_and_pool_are_kept_together_while_calls_begin_grow_and_end_in_every_way(
    books: db.Database, today: Scene
) -> None:
    team = today.team()
    users = [today.user(team=team) for _ in range(4)]
    own = today.pool("personal", owner=users[0])
    pool = today.pool()
    today.grant(pool, 400 * TIMES)
    today.grant(own, 60)
    today.share(pool, users[1], 80, when_empty="open_part")
    caps = [today.limit(90 * TIMES, scope="user", of=user) for user in users]
    budget = today.limit(300 * TIMES, scope="team", of=team, period="month")
    with lanes(books, 9) as connected:
        traffic = [Traffic(today, lane, users, random.Random(n)) for n, lane in enumerate(connected[:8])]
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
            for _ in range(250 * TIMES):
                each.step()
            each.end()

        with ThreadPoolExecutor(1) as expiry:
            background = expiry.submit(expire)
            race([partial(drive, each) for each in traffic])
            stop.set()
            background.result()
    time.sleep(1.1)
    _end_what_was_forgotten(books, today)
    for balance in (pool, own, budget, *caps):
        row = today.balance(balance)
        assert (row.held, row.excess) == (0, 0)
        assert row.used <= row.limit
    spent = sum(sum(each.true.values()) + sum(each.lost.values()) for each in traffic)
    assert today.balance(budget).used == spent == today.balance(pool).used + today.balance(own).used
    assert today.findings() == []
    kinds = sum((each.outcomes for each in traffic), Counter[tuple[Action, Outcome]]())
    assert kinds[Action.AUTHORIZE, REFUSED] > 0
    assert kinds[Action.RELEASE, Outcome.NO_HOLD] + kinds[Action.EXTEND, Outcome.NO_HOLD] > 0


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
        for n in range(30 * TIMES):
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
    assert today.used(pool) == (7 * 4 * 30 * TIMES, 0)
    assert today.findings() == []


# ---------------------------------------------------------------------------------------------- many organizations


def test_batches_over_overlapping_organizations_never_deadlock(books: db.Database, today: Scene) -> None:
    scenes = [today, *(Scene(today.conn, now=now()) for _ in range(5))]
    users = {scene.organization: scene.user() for scene in scenes}
    pools = {scene.organization: scene.pool() for scene in scenes}
    for scene in scenes:
        scene.grant(pools[scene.organization], 300)

    def drive(lane: Lane, seed: int) -> Counter[UUID]:
        dice, spent = random.Random(seed), Counter[UUID]()
        for _ in range(60 * TIMES):
            chosen = dice.sample(scenes, dice.randrange(2, 7)) * 3
            dice.shuffle(chosen)
            moves = [_deduct(scene, users[scene.organization], dice.randrange(1, 5)) for scene in chosen]
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
            moves = [_deduct(scene, user, n % 7) for n, (scene, user) in enumerate(chosen)]
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


def test_of_ten_parallel_twins_one_has_the_effect_and_all_have_its_answer(books: db.Database, today: Scene) -> None:
    pool, user = today.pool(), today.user()
    today.grant(pool, 1000)
    with lanes(books, 11) as connected:
        for n in range(20 * TIMES):
            twins = [_deduct(today, user, 3, idempotency_key=f"key {n}", body_hash=b"same") for _ in range(10)]
            other = _deduct(today, user, 4, idempotency_key=f"key {n}", body_hash=b"other")
            work = [partial(lane.move, twin) for lane, twin in zip(connected, [*twins, other], strict=True)]
            *verdicts, stranger = [answer for (answer,) in race(work)]
            if stranger.outcome is ACCEPTED:  # it came first, and then the ten are the others
                assert {verdict.outcome for verdict in verdicts} == {KEY_REUSED}
                continue
            assert Counter(verdict.outcome for verdict in verdicts) == {ACCEPTED: 1, KNOWN: 9}
            assert len({(verdict.request_id, verdict.charged_micros) for verdict in verdicts}) == 1
            assert stranger.outcome is KEY_REUSED
    spent = today.admin("select sum(charged_micros), count(*) from ledger.attribution where pool_id = %s", pool)
    assert spent[0][1] == 20 * TIMES
    assert today.used(pool)[0] == spent[0][0]


def test_twins_of_a_refusal_are_refused_alike(books: db.Database, today: Scene) -> None:
    pool, user = today.pool(), today.user()
    with lanes(books, 10) as connected:
        twins = [_deduct(today, user, 3, idempotency_key="key", body_hash=b"same") for _ in range(10)]
        work = [partial(lane.move, twin) for lane, twin in zip(connected, twins, strict=True)]
        verdicts = [answer for (answer,) in race(work)]
        today.grant(pool, 100)
        verdicts += connected[0].move(_deduct(today, user, 3, idempotency_key="key", body_hash=b"same"))
    assert Counter(verdict.outcome for verdict in verdicts) == {REFUSED: 1, Outcome.KNOWN_REFUSED: 10}


# ---------------------------------------------------------------------------------------------- one moment


async def test_any_sum_is_from_one_moment_while_calls_go_on(books: db.Database, today: Scene) -> None:
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
        traffic = Traffic(today, lane, users, random.Random(seed))
        steps = 0
        while not stop.is_set():
            traffic.step()
            steps += 1
        traffic.end()
        return steps

    with lanes(books, 3) as connected, ThreadPoolExecutor(3) as threads:
        driving = [threads.submit(drive, lane, n) for n, lane in enumerate(connected)]
        looks = 0
        until = time.monotonic() + 4 * TIMES
        while time.monotonic() < until:
            async with books.platform() as conn:
                assert await verify(conn, organization_id=today.organization) == []
            looks += 1
            await asyncio.sleep(0.01)
        stop.set()
        steps = [future.result() for future in driving]
    assert looks > 3
    assert min(steps) > 10
    assert today.findings() == []


def test_a_key_spends_nothing_after_the_moment_it_was_revoked(books: db.Database, today: Scene) -> None:
    user = today.user()
    key = today.key(user)
    today.grant(today.pool(), 10**6)
    revoked = threading.Event()

    def spend(lane: Lane) -> list[Outcome]:
        outcomes = [lane.move(_deduct(today, user, api_key_id=key))[0].outcome for _ in range(20)]
        while not revoked.is_set():
            outcomes.append(lane.move(_deduct(today, user, api_key_id=key))[0].outcome)
        return [*outcomes, *(lane.move(_deduct(today, user, api_key_id=key))[0].outcome for _ in range(5))]

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
