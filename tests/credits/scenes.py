"""One organization on one connection, at instants of the test's choosing: what a rule of the treasury is shown with.

The connection is an admin's; each call is made as the role it is meant for (`set session authorization`), so that a
scene can also be played in a transaction that has taken a guard out.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
from tests.credits.people import INSERT_DEPARTMENT, INSERT_KEY, INSERT_MEMBER, INSERT_ORGANIZATION, INSERT_TEAM

from bursar.clock import uuid7
from bursar.credits.moves import MOVE_BATCH, Action, Move, Outcome, Verdict, as_arguments, as_call, as_verdicts
from bursar.credits.verify import CHECKS
from bursar.db import arrays
from bursar.money import Micros

Connection = psycopg.Connection[tuple[Any, ...]]
NOON = datetime(2026, 6, 10, 12, 0, tzinfo=UTC)  # a Wednesday


@dataclass
class Balance:
    """A balance's row."""

    limit: int
    used: int
    held: int
    excess: int


@dataclass
class Scene:
    """An organization of kind company in UTC, with a gate; `now` moves only when told.

    alone: a single hold or deduction is asked as lanes ask it, of move_one; else it is a batch of one.
    """

    conn: Connection
    zone: str = "UTC"
    now: datetime = NOON
    organization: UUID = field(default_factory=uuid7)
    alone: bool = False

    def __post_init__(self) -> None:
        arrays.register(self.conn)
        self.insert(INSERT_ORGANIZATION, slug=f"s{self.organization.hex}", zone=self.zone)
        self.call("select credits.open_organization(%s)", self.organization)

    # ------------------------------------------------------------------ roles and time

    def admin(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement of the admin's."""
        cursor = self.conn.execute(sql, arguments)
        return cursor.fetchall() if cursor.description else []

    @contextmanager
    def acting_as(self, role: str, organization: UUID | None = None) -> Iterator[None]:
        """Statements inside are another role's, for an organization where one is named."""
        self.conn.execute(f"set session authorization {role}")
        self.conn.execute("select set_config('app.organization_id', %s, false)", [str(organization or "")])
        try:
            yield
        finally:
            if self.conn.info.transaction_status != psycopg.pq.TransactionStatus.INERROR:
                self.conn.execute("reset session authorization")

    def call(self, sql: str, *arguments: Any, role: str = "bursar_simulator") -> Any:
        """First value of a statement of the simulator's, who may date it."""
        with self.acting_as(role):
            row = self.conn.execute(sql, arguments).fetchone()
        return row[0] if row else None

    @contextmanager
    def refusal(self, code: str) -> Iterator[None]:
        """What is inside must be refused with this SQLSTATE, and then nothing has changed."""
        refused: str | None = "nothing"
        try:
            with self.conn.transaction():
                yield
        except psycopg.Error as error:
            refused = error.sqlstate
            self.conn.execute("reset session authorization")
        assert refused == code, f"refused with {refused}, not {code}"

    def later(self, **duration: float) -> datetime:
        """Let time pass: later(hours=3)."""
        self.now += timedelta(**duration)
        return self.now

    # ------------------------------------------------------------------ people

    def insert(self, sql: str, **columns: Any) -> None:
        """A row of this organization and moment."""
        self.conn.execute(sql, {"org": self.organization, "now": self.now, **columns})

    def user(self, *, team: UUID | None = None, department: UUID | None = None) -> UUID:
        """A new active member."""
        user = uuid7()
        self.insert(INSERT_MEMBER, id=user, email=f"{user.hex}@x.example", team=team, department=department)
        return user

    def department(self) -> UUID:
        """A new department."""
        department = uuid7()
        self.insert(INSERT_DEPARTMENT, id=department, name=department.hex)
        return department

    def team(self) -> UUID:
        """A new team."""
        team = uuid7()
        self.insert(INSERT_TEAM, id=team, name=team.hex)
        return team

    def key(
        self, user: UUID | None = None, *, original: UUID | None = None, expires_at: datetime | None = None
    ) -> UUID:
        """A new key of a member or of a service; original: the key whose rotation it is."""
        key = uuid7()
        self.insert(INSERT_KEY, id=key, original=original or key, public=key.hex, user=user, team=None, end=expires_at)
        return key

    def changed(self) -> None:
        """Tell the treasury that somebody's standing changed, as identity does."""
        self.call("select credits.limits_changed(%s)", self.organization)

    # ------------------------------------------------------------------ commands

    def pool(self, kind: str = "shared", *, owner: UUID | None = None, models: str | None = None) -> UUID:
        """A pool."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.open_pool(%s, %s, %s, %s, 'Pool', %s, %s)",
            self.organization, uuid7(), kind, owner, models, self.now,
        )  # fmt: skip

    def open_part(self, pool: UUID) -> UUID:
        """The balance of what no share claims."""
        return self.admin("select open_part_id from credits.pools where pool_id = %s", pool)[0][0]  # type: ignore[no-any-return]

    def grant(
        self,
        pool: UUID,
        amount: int | None,
        *,
        starts: datetime | None = None,
        expires: datetime | None = None,
        priority: int = 100,
        free: bool = False,
        key: str | None = "",
        paid: int = 0,
        rolls: tuple[int, int] | None = None,
        rolls_until: datetime | None = None,
    ) -> UUID:
        """Credits into a pool. paid: nano-dollars; rolls: least and most that goes on at its end, until rolls_until."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.add_grant(%s, %s, %s, 'purchase', %s, %s::smallint, %s, %s, %s, %s, null, null, %s, %s,"
            " %s, %s, %s)",
            self.organization, uuid7(), pool, amount, priority, free, paid, starts, expires,
            uuid7().hex if key == "" else key, self.now, *(rolls or (None, None)), rolls_until,
        )  # fmt: skip

    def schedule(
        self,
        pool: UUID,
        amount: int,
        unit: str = "month",
        *,
        every: int = 1,
        anchor: datetime | None = None,
        zone: str = "UTC",
        lasts: timedelta | None = None,
        is_lasting: bool = False,
        ends: datetime | None = None,
        rolls: tuple[int, int] | None = None,
        paid: int = 0,
        key: str | None = None,
    ) -> UUID:
        """Grants that come again."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.add_schedule(%s, %s, %s, 'plan', %s, 100::smallint, false, %s, %s, %s, %s, %s, %s, %s, %s,"
            " %s, %s, null, null, %s, %s)",
            self.organization, uuid7(), pool, amount, paid, zone, anchor, unit, every, lasts, is_lasting, ends,
            *(rolls or (None, None)), key or uuid7().hex, self.now,
        )  # fmt: skip

    def cancel(self, schedule: UUID) -> None:
        """No more grants of a schedule."""
        self.call("select credits.cancel_schedule(%s, %s, %s)", self.organization, schedule, self.now)

    def transfer(self, from_pool: UUID, to_pool: UUID, amount: int | None, *, key: str | None = None) -> list[UUID]:
        """Credits of one pool go to another; the grants that came of it."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.transfer_credits(%s, %s, %s, %s, null, null, %s, %s)",
            self.organization, from_pool, to_pool, amount, key or uuid7().hex, self.now,
        )  # fmt: skip

    def refund(self, request: UUID, amount: int | None = None, *, key: str | None = None) -> int:
        """What a request was charged goes back; how much that was."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.refund_charge(%s, %s, %s, null, null, %s, %s)",
            self.organization, request, amount, key or uuid7().hex, self.now,
        )  # fmt: skip

    def switch(self, to: str, *, key: str | None = None) -> dict[str, int]:
        """Pools become personal or shared."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.switch_pools(%s, %s, null, %s, %s)",
            self.organization, to, key or uuid7().hex, self.now,
        )  # fmt: skip

    def wake(self) -> None:
        """Whoever takes the gate folds what is due."""
        self.release(uuid7())

    def void(self, grant: UUID, *, key: str | None = None) -> int:
        """Take back what a grant has left; how much that was."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.void_grant(%s, %s, null, null, %s, %s)",
            self.organization, grant, key or uuid7().hex, self.now,
        )  # fmt: skip

    def share(
        self,
        pool: UUID,
        user: UUID,
        amount: int | None,
        *,
        kind: str = "reserved",
        period: str = "none",
        when_empty: str = "stops",
        oversubscribe: bool = False,
        carry: int = 0,
    ) -> UUID:
        """A user's share of a pool."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.allocate(%s, %s, %s, %s, %s, %s, %s, %s, %s, null, %s, %s, %s)",
            self.organization, uuid7(), pool, user, kind, period, amount, when_empty, oversubscribe, uuid7().hex,
            self.now, carry,
        )  # fmt: skip

    def reallocate(self, share: UUID, to: UUID | None, amount: int | None = None, *, key: str | None = None) -> int:
        """Give away what a share has left; how much that was."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.reallocate(%s, %s, %s, %s, %s, %s)",
            self.organization, share, to, amount, key or uuid7().hex, self.now,
        )  # fmt: skip

    def end_share(self, share: UUID) -> None:
        """End a share."""
        self.call("select credits.end_allocation(%s, %s, %s)", self.organization, share, self.now)

    def limit(
        self,
        amount: int | None,
        *,
        scope: str = "organization",
        of: UUID | None = None,
        metric: str = "credits",
        period: str = "none",
        models: str | None = None,
        action: str = "stops",
        strict: bool = False,
        each: bool = False,
        within: tuple[str | None, UUID | None] = (None, None),
    ) -> UUID:
        """A cap; each: a default for each one of the scope, or of a team or department."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.set_limit(%s, %s, %s, %s, %s, %s, %s, %s, %s, null, %s, %s, %s, %s, %s)",
            self.organization, uuid7(), scope, of, metric, models, period, amount, action, self.now, strict, each,
            *within,
        )  # fmt: skip

    def end_limit(self, limit: UUID) -> None:
        """Lift a cap."""
        self.call("select credits.end_limit(%s, %s, %s)", self.organization, limit, self.now)

    def raise_(
        self,
        limit: UUID,
        amount: int,
        *,
        of: UUID | None = None,
        starts: datetime | None = None,
        ends: datetime | None = None,
        key: str | None = None,
    ) -> UUID:
        """More than a limit gives; for a day where no end is told."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.raise_limit(%s, %s, %s, %s, %s, %s, %s, null, null, %s, %s)",
            self.organization, uuid7(), limit, of, amount, starts, ends or self.now + timedelta(days=1),
            key or uuid7().hex, self.now,
        )  # fmt: skip

    def request(
        self, limit: UUID, user: UUID, amount: int, *, of: UUID | None = None, until: datetime | None = None
    ) -> UUID:
        """A member asks for more, for a day where no end is told."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.request_raise(%s, %s, %s, %s, %s, %s, %s, 'why not', %s, %s)",
            self.organization, uuid7(), limit, of, user, amount, until or self.now + timedelta(days=1), uuid7().hex,
            self.now,
        )  # fmt: skip

    def decide(self, request: UUID, *, approve: bool, amount: int | None = None) -> UUID | None:
        """Decide a request; the raise."""
        return self.call(  # type: ignore[no-any-return]
            "select credits.decide_request(%s, %s, %s, %s, %s, null, null, null, %s)",
            self.organization, request, approve, uuid7(), amount, self.now,
        )  # fmt: skip

    def fold(self) -> None:
        """Nothing but time passes."""
        self.call("select credits.fold(%s, %s)", self.organization, self.now)

    # ------------------------------------------------------------------ moves

    def asked(self, action: Action, request: UUID | None = None, amount: int = 0, **rest: Any) -> Move:
        """A move of this organization; lease 10 minutes, model m1."""
        defaults: dict[str, Any] = {"model": "m1", "lease_seconds": 600}
        return Move(action, self.organization, request or uuid7(), amount_micros=Micros(amount), **{**defaults, **rest})

    def move(self, *moves: Move) -> list[Verdict]:
        """Verdicts on one batch."""
        with self.acting_as("bursar_simulator"):
            call = as_call(moves, self.now) if self.alone else (MOVE_BATCH, as_arguments(moves, self.now))
            cursor = self.conn.execute(*call, binary=True)
            return as_verdicts(sorted(cursor.fetchall(), key=lambda row: row[0]))

    def authorize(self, amount: int, user: UUID | None, request: UUID | None = None, **rest: Any) -> Verdict:
        """Hold for a new request."""
        return self.move(self.asked(Action.AUTHORIZE, request, amount, user_id=user, **rest))[0]

    def hold(self, amount: int, user: UUID | None, **rest: Any) -> UUID:
        """The request of a hold that must be granted."""
        verdict = self.authorize(amount, user, **rest)
        assert verdict.outcome is Outcome.ACCEPTED, verdict
        return verdict.request_id

    def extend(self, request: UUID, amount: int, **rest: Any) -> Verdict:
        """Hold more."""
        return self.move(self.asked(Action.EXTEND, request, amount, **rest))[0]

    def settle(self, request: UUID, amount: int, user: UUID | None = None, **rest: Any) -> Verdict:
        """Charge."""
        return self.move(self.asked(Action.SETTLE, request, amount, user_id=user, **rest))[0]

    def release(self, request: UUID, **rest: Any) -> Verdict:
        """Give back."""
        return self.move(self.asked(Action.RELEASE, request, **rest))[0]

    def deduct(self, amount: int, user: UUID | None, request: UUID | None = None, **rest: Any) -> Verdict:
        """Charge at once."""
        return self.move(self.asked(Action.DEDUCT, request, amount, user_id=user, **rest))[0]

    def expire(self) -> int:
        """End the holds of this organization whose lease is over; how many there were."""
        holds = self.admin(
            "select count(*) from credits.holds where organization_id = %s and lease_expires_at <= %s",
            self.organization, self.now,
        )  # fmt: skip
        self.call("select credits.expire_holds(null, %s)", self.now)
        return int(holds[0][0])

    # ------------------------------------------------------------------ looking

    def balance(self, balance: UUID) -> Balance:
        """The balance's row of the period around now."""
        rows = self.admin(
            "select limit_amount, used_amount, held_amount, excess_amount from credits.balances "
            "where organization_id = %s and balance_id = %s and period_start <= %s and period_end > %s",
            self.organization, balance, self.now, self.now,
        )  # fmt: skip
        assert rows, f"balance {balance} has no row now"
        return Balance(*rows[0])

    def used(self, balance: UUID) -> tuple[int, int]:
        """(used, held) of a balance."""
        row = self.balance(balance)
        return row.used, row.held

    def grants(self, pool: UUID) -> list[tuple[Any, ...]]:
        """(source, amount, left, state) of the grants of a pool, in burn order."""
        return self.admin(
            "select g.source, g.amount_micros, s.left_micros, s.state from credits.grants g "
            "join credits.grant_states s using (organization_id, grant_id) "
            "where g.organization_id = %s and g.pool_id = %s "
            "order by g.priority, g.expires_at, g.is_free desc, g.effective_at, g.created_at, g.grant_id",
            self.organization, pool,
        )  # fmt: skip

    def entries(self, *kinds: str) -> list[tuple[Any, ...]]:
        """(kind, amount, value) of the ledger's lines of these kinds, as they happened."""
        return self.admin(
            "select kind, amount, value_nano_usd from ledger.entries where organization_id = %s and kind = any (%s) "
            "order by happened_at, booked_at, kind, amount",
            self.organization, list(kinds),
        )  # fmt: skip

    def charges(self, request: UUID) -> list[tuple[Any, ...]]:
        """(kind, charged, pool, flags) of the attribution rows of a request, in the order of booking."""
        return self.admin(
            "select kind, charged_micros, pool_id, flags from ledger.attribution "
            "where organization_id = %s and request_id = %s order by booked_at",
            self.organization, request,
        )  # fmt: skip

    def findings(self) -> list[tuple[Any, ...]]:
        """Offences against any invariant by this organization."""
        return [
            (name, *row)
            for name, check in CHECKS.items()
            for row in self.admin(f"select * from ({check}) offences where organization_id = %s", self.organization)
        ]


def outcomes(verdicts: Sequence[Verdict]) -> list[Outcome]:
    """Their outcomes, in order."""
    return [verdict.outcome for verdict in verdicts]
