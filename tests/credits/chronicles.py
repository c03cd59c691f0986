"""Histories with what was so after every step noted down, so that it can be asked for afterwards.

The reference of the histories is not asked here: further commands come in that it need not know, and it only helps to
choose what happens. What is noted is what the balances and grants themselves said then.
"""

import contextlib
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from tests.credits import reference as ref
from tests.credits.histories import Cast, Stage, Step, random_steps, real

from bursar.clock import uuid7
from bursar.credits.moves import as_call

MORE = ("transfer", "refund", "raise", "roll", "recurring", "renewed", "reallocate", "end_raise", "correct")
PLAYABLE = frozenset({
    "batch", "grant", "allocate", "limit", "end_limit", "end_allocation", "void", "pool", "expire", "person", "touch",
    "default", "own",
})  # fmt: skip
"""Steps of histories that need no reference that knows all there is; the others come as steps of chronicles."""
MICROSECOND = timedelta(microseconds=1)

# What a step may name, oldest first.
ALL_POOLS = "select pool_id from credits.pools where organization_id = %s order by created_at, pool_id"
SHARED_POOLS = "select pool_id from credits.pools where organization_id = %s and kind = 'shared' order by 1"
CHARGED = (
    "select distinct request_id from ledger.attribution where organization_id = %s and charged_micros > 0 order by 1"
)
ESTIMATED = "select request_id from credits.estimates where organization_id = %s order by 1"
IN_FORCE = "select limit_id from credits.limits where organization_id = %s and ended_at is null order by 1"
RAISED = "select raise_id from credits.raises where organization_id = %s order by 1"
HELD = "select request_id from credits.holds where organization_id = %s"
RESERVED = """
    select allocation_id from credits.allocations
    where organization_id = %s and kind = 'reserved' and ended_at is null order by 1"""

POOLS = """
    select p.pool_id, b.limit_amount, b.used_amount
    from credits.pools p join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id
    where p.organization_id = %s and (p.closed_at is null or b.limit_amount <> b.used_amount)"""
GRANTS = """
    select s.grant_id, case s.state when 'spent' then 'ended' else s.state end, s.left_micros,
        coalesce((select sum(b.end_micros - b.start_micros) from credits.burns b
                  where b.organization_id = s.organization_id and b.grant_id = s.grant_id), 0)::bigint
    from credits.grant_states s where s.organization_id = %s"""
LIMITS = """
    select l.limit_id, l.amount, l.action, b.limit_amount - l.amount,
        coalesce(b.used_amount, 0)
    from credits.limits l
    left join credits.balances b on b.organization_id = l.organization_id and b.balance_id = l.balance_id
        and b.period_start <= %s and b.period_end > %s
    where l.organization_id = %s and l.ended_at is null"""
COUNTERS = """
    select balance_id, used_amount from credits.balances
    where kind = 'limit' and period_start <= %s and period_end > %s and organization_id = %s"""
SHARES = """
    select a.allocation_id, a.amount_micros, a.when_empty, coalesce(b.limit_amount, a.amount_micros),
        coalesce(b.used_amount, 0)
    from credits.allocations a
    left join credits.balances b on b.organization_id = a.organization_id and b.balance_id = a.allocation_id
        and b.period_start <= %s and b.period_end > %s
    where a.organization_id = %s and a.ended_at is null"""


@dataclass
class Note:
    """What was so in an organization at an instant."""

    organization: UUID
    at: datetime
    step: Step
    pools: dict[UUID, Any]
    grants: dict[UUID, Any]
    limits: dict[UUID, Any]
    counters: dict[UUID, Any]
    shares: dict[UUID, Any]


def random_chronicle(seed: int, count: int) -> list[Step]:
    """A history in which every third step is one that only chronicles have."""
    dice = random.Random(seed)
    steps: list[Step] = []
    for step in random_steps(seed, count):
        if step[0] in PLAYABLE:
            steps.append(step)
        if len(steps) > 12 and dice.random() < 0.5:
            name = dice.choice(MORE)
            steps.append((f"also_{name}", dice.randrange(11), *(dice.randrange(1000) for _ in range(5))))
    return steps[:count]


class Chronicle(Stage):
    """Plays a history and notes what is so after every step, two microseconds later: a correction of a request at the
    instant of its charge is dated one later.
    """

    def write(self, steps: list[Step]) -> list[Note]:
        """Play the steps; returns the notes that nothing came before."""
        notes: list[Note] = []
        instants = []
        for step in steps:
            self._pass_time(min(step[1], 9))
            getattr(self, f"_{step[0]}")(*step[2:])
            instants.append(self.now)
            casts = self.cast if step[0] in ("batch", "expire") else [self._cast(step[2])]
            for cast in casts:  # what the note itself would roll over would not stay
                self.simulator.execute("select credits.fold(%s, %s)", [cast.organization, self.now])
            notes += [self._note(cast, self.now + 2 * MICROSECOND, step) for cast in casts]
        self._release_all()
        return [note for note in notes if not any(0 <= (note.at - at) / MICROSECOND < 2 for at in instants)]

    def _note(self, cast: Cast, at: datetime, step: Step) -> Note:
        org = cast.organization
        with self.admin.transaction(force_rollback=True):
            self.admin.execute("set session authorization bursar_simulator")
            self.admin.execute("select credits.bring_up_to_date(%s, %s)", [org, at])
            self.admin.execute("reset session authorization")
            return Note(
                org,
                at,
                step,
                pools=self._rows(POOLS, org),
                grants=self._rows(GRANTS, org),
                limits=self._rows(LIMITS, at, at, org),
                counters=self._rows(COUNTERS, at, at, org),
                shares=self._rows(SHARES, at, at, org),
            )

    def _rows(self, sql: str, *arguments: Any) -> dict[UUID, Any]:
        return {row[0]: row[1:] for row in self.admin.execute(sql, arguments, prepare=True).fetchall()}

    def _release_all(self) -> None:
        """Nothing stays held, for the reason that histories have; it is the database that knows what is held."""
        self._pass_time(0)
        for cast in self.cast:
            holds = self._rows(HELD, cast.organization)
            if holds:
                self._move([ref.Move(cast.organization, ref.RELEASE, request) for request in holds])

    # ------------------------------------------------------------------ commands without reference

    def _command(self, cast: Cast, sql: str, arguments: list[Any], run: Any) -> None:
        if self._try(sql, arguments):
            with contextlib.suppress(ref.Refused):  # it does not know all there is here
                run(self._model(cast))

    def _try(self, sql: str, arguments: list[Any]) -> bool:
        try:
            self.simulator.execute(sql, arguments)
        except psycopg.Error as error:
            if not str(error.sqlstate).startswith("BR"):
                raise
            return False
        return True

    def _move(self, asked: list[ref.Move]) -> None:
        self.world.move(asked, self.now)
        self.simulator.execute(*as_call([real(move) for move in asked], self.now), binary=True)

    def _pick(self, cast: Cast, sql: str, which: int) -> Any:
        rows = self.admin.execute(sql, [cast.organization]).fetchall()
        return rows[which % len(rows)][0] if rows else uuid7()

    def _some_pool(self, cast: Cast, which: int) -> Any:
        return self._pick(cast, ALL_POOLS, which)

    def _also_transfer(self, org: int, a: int, b: int, amount: int, _: int) -> None:
        cast = self.cast[org % 2]
        pools = [self._some_pool(cast, a), self._some_pool(cast, b)]
        micros = (1, 7, 30, 90, None)[amount % 5]
        self._try(
            "select credits.transfer_credits(%s, %s, %s, %s, 'moved', null, %s, %s)",
            [cast.organization, *pools, micros, uuid7().hex, self.now],
        )

    def _also_refund(self, org: int, which: int, amount: int, *_: int) -> None:
        cast = self.cast[org % 2]
        micros = (None, 1, 3, 10)[amount % 4]
        self._try(
            "select credits.refund_charge(%s, %s, %s, 'sorry', null, %s, %s)",
            [cast.organization, self._pick(cast, CHARGED, which), micros, uuid7().hex, self.now],
        )

    def _also_raise(self, org: int, which: int, amount: int, begins: int, lasts: int) -> None:
        cast = self.cast[org % 2]
        starts = (None, self.now + timedelta(hours=5), self.now + timedelta(days=2))[begins % 3]
        ends = (starts or self.now) + timedelta(hours=(1, 30, 100)[lasts % 3])
        limit = self._pick(cast, IN_FORCE, which)
        self._try(
            "select credits.raise_limit(%s, %s, %s, null, %s, %s, %s, 'more', null, %s, %s)",
            [cast.organization, uuid7(), limit, 1 + amount % 50, starts, ends, uuid7().hex, self.now],
        )

    def _also_end_raise(self, org: int, which: int, *_: int) -> None:
        cast = self.cast[org % 2]
        raised = self._pick(cast, RAISED, which)
        self._try("select credits.end_raise(%s, %s, %s)", [cast.organization, raised, self.now])

    def _also_roll(self, org: int, pool: int, amount: int, life: int, bounds: int) -> None:
        cast = self.cast[org % 2]
        pool_id, micros = self._some_pool(cast, pool), (10, 60, 200)[amount % 3]
        expires = self.now + timedelta(hours=(1, 20, 60)[life % 3])
        bounds_and_end = (*((0, 20), (30, 40), (0, 500), (5, 5))[bounds % 4], expires + timedelta(days=2))
        self._try(
            "select credits.add_grant(%s, %s, %s, 'plan', %s, 90::smallint, false, 100, null, %s, null, null, %s, %s,"
            " %s, %s, %s)",
            [cast.organization, uuid7(), pool_id, micros, expires, uuid7().hex, self.now, *bounds_and_end],
        )

    def _also_recurring(self, org: int, pool: int, amount: int, unit: int, _: int) -> None:
        cast = self.cast[org % 2]
        what = [self._some_pool(cast, pool), (5, 25)[amount % 2], ("day", "week")[unit % 2]]
        self._try(
            "select credits.add_schedule(%s, %s, %s, 'plan', %s, 80::smallint, true, 0, 'Europe/Paris', null, %s, 1,"
            " null, false, null, null, null, 'plan', null, %s, %s)",
            [cast.organization, uuid7(), *what, uuid7().hex, self.now],
        )

    def _also_renewed(self, org: int, user: int, period: int, amount: int, empty: int) -> None:
        cast = self.cast[org % 2]
        shared, member = self._pick(cast, SHARED_POOLS, 0), cast.users[user % 3]
        what: list[Any] = [("day", "week", "none")[period % 3], (0, 12, 40)[amount % 3]]
        what.append(("stops", "stops", "open_part")[empty % 3])
        carry = 6 if period % 3 < 2 and amount % 2 else 0
        self._try(
            "select credits.allocate(%s, %s, %s, %s, 'reserved', %s, %s, %s, true, null, %s, %s, %s)",
            [cast.organization, uuid7(), shared, member, *what, uuid7().hex, self.now, carry],
        )

    def _also_reallocate(self, org: int, a: int, b: int, amount: int, _: int) -> None:
        cast = self.cast[org % 2]
        share, to = self._pick(cast, RESERVED, a), self._pick(cast, RESERVED, b) if b % 3 else None
        self._try(
            "select credits.reallocate(%s, %s, %s, %s, %s, %s)",
            [cast.organization, share, to, (None, 1, 4)[amount % 3], uuid7().hex, self.now],
        )

    def _also_correct(self, org: int, which: int, amount: int, *_: int) -> None:
        """The true cost of what was charged by estimate comes: mostly less."""
        cast = self.cast[org % 2]
        request = self._pick(cast, ESTIMATED, which)
        self._move([ref.Move(cast.organization, ref.SETTLE, request, cast.users[0], None, amount % 12, model="gpt-4")])
