"""Refunds, transfers, schedules, roll-over and switches in any order, beside calls of every kind: the books agree."""

import random
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
from tests.credits.scenes import Scene
from tests.promises.figures import SEED, figure

from bursar import db
from bursar.credits.moves import Flag, Outcome

VALUES = """
    select (select coalesce(sum(value_nano_usd), 0)::bigint from credits.stretches(%s)),
        (select coalesce(sum(value_nano_usd), 0)::bigint from ledger.entries
         where organization_id = %s and from_kind = 'usage'),
        (select coalesce(sum(revenue_nano_usd), 0)::bigint
         from credits.revenue_of_requests(%s, '-infinity', 'infinity'))"""


class Walk:
    """One organization, and whoever does something to it next by chance."""

    def __init__(self, scene: Scene, dice: random.Random) -> None:
        self.scene, self.dice = scene, dice
        self.users = [scene.user() for _ in range(3)]
        self.held: list[UUID] = []
        self.charged: list[UUID] = []
        self.schedules: list[UUID] = []
        self.is_shared = True
        scene.pool()
        scene.share(self._pools()[0], self.users[0], 40, oversubscribe=True)
        scene.limit(300, scope="user", of=self.users[1], period="day")

    def step(self) -> None:
        """One of all commands; a refusal is an answer too."""
        dice, scene = self.dice, self.scene
        scene.now += timedelta(seconds=dice.choice((0, 0, 1, 60, 3600, 40_000, 90_000)))
        what = dice.choice(
            [self._grant] * 4 + [self._call] * 9 + [self._end] * 6 + [self._refund] * 4
            + [self._transfer, self._transfer, self._schedule, self._cancel, self._void, self._expire, self._switch]
        )  # fmt: skip
        try:
            with scene.conn.transaction():
                what()
        except psycopg.Error as error:
            scene.conn.execute("reset session authorization")
            if not (error.sqlstate or "").startswith("BR"):
                raise

    def _pools(self) -> list[UUID]:
        rows = self.scene.admin(
            "select pool_id from credits.pools where organization_id = %s and closed_at is null order by pool_id",
            self.scene.organization,
        )
        # After a switch of nothing there is none: members' pools come with their first credits.
        return [row[0] for row in rows] or [self.scene.pool("personal", owner=self.users[0])]

    def _grant(self) -> None:
        dice, life = self.dice, self.dice.choice((None, 600, 50_000, 200_000))
        expires = None if life is None else self.scene.now + timedelta(seconds=life)
        rolls = dice.choice((None, (0, 20), (15, 40))) if expires else None
        self.scene.grant(
            dice.choice(self._pools()), dice.choice((1, 7, 50, 300)), expires=expires, rolls=rolls,
            priority=dice.choice((50, 100)), free=dice.random() < 0.3, paid=dice.randrange(1000),
        )  # fmt: skip

    def _call(self) -> None:
        amount, user = self.dice.randrange(1, 30), self.dice.choice(self.users)
        if self.dice.random() < 0.5:
            verdict = self.scene.deduct(amount, user)
            if verdict.outcome is Outcome.ACCEPTED:
                self.charged.append(verdict.request_id)
            return
        flags = self.dice.choice((Flag.NONE, Flag.SENT))
        lease = self.dice.choice((30, 100_000))
        verdict = self.scene.authorize(amount, user, flags=flags, lease_seconds=lease)
        if verdict.outcome is Outcome.ACCEPTED:
            self.held.append(verdict.request_id)

    def _end(self) -> None:
        if not self.held:
            return
        request = self.held.pop(self.dice.randrange(len(self.held)))
        if self.dice.random() < 0.2:
            self.scene.release(request)
        else:
            self.scene.settle(request, self.dice.randrange(45), self.dice.choice(self.users))
        self.charged.append(request)

    def _refund(self) -> None:
        if self.charged:
            amount = self.dice.choice((None, 1, 5, 12))
            self.scene.refund(self.dice.choice(self.charged[-12:]), amount)

    def _transfer(self) -> None:
        pools = self._pools()
        self.scene.transfer(self.dice.choice(pools), self.dice.choice(pools), self.dice.choice((None, 3, 40)))

    def _schedule(self) -> None:
        rolls = self.dice.choice((None, (0, 10), (5, 10)))
        unit = self.dice.choice(("day", "week"))
        self.schedules.append(self.scene.schedule(self.dice.choice(self._pools()), 25, unit, paid=99, rolls=rolls))

    def _cancel(self) -> None:
        if self.schedules:
            self.scene.cancel(self.schedules.pop())

    def _void(self) -> None:
        rows = self.scene.admin(
            "select grant_id from credits.grants where organization_id = %s order by grant_id", self.scene.organization
        )
        if rows:
            self.scene.void(self.dice.choice(rows)[0])

    def _expire(self) -> None:
        self.scene.call("select credits.expire_holds_of(%s, %s)", self.scene.organization, self.scene.now)

    def _switch(self) -> None:
        self.scene.switch("personal" if self.is_shared else "shared")
        self.is_shared = not self.is_shared


@pytest.mark.parametrize("shard", range(2))
def test_whatever_happens_to_grants_the_books_agree(books: db.Database, shard: int) -> None:
    for n in range(shard, max(4, figure("histories") // 50), 2):
        with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
            walk = Walk(Scene(conn), random.Random(SEED + n))
            for number in range(80):
                walk.step()
                if number % 10 == 9:
                    assert walk.scene.findings() == [], f"BURSAR_TEST_SEED={SEED + n} after {number} steps"
            for request in list(walk.held):
                walk.scene.release(request)
            walk.scene.wake()
            assert walk.scene.findings() == [], f"BURSAR_TEST_SEED={SEED + n}"
            burnt, returned, revenue = walk.scene.admin(VALUES, *[walk.scene.organization] * 3)[0]
            assert revenue == burnt - returned, f"BURSAR_TEST_SEED={SEED + n}"
