"""Threads and connections that move credits at once: lanes, races, and calls that begin, grow and end in every way."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import psycopg
from tests.credits.scenes import Scene

from bursar import db
from bursar.credits.moves import Action, Flag, Move, Outcome, Verdict, as_call, as_verdicts
from bursar.db import arrays


class Lane:
    """A lane's connection; one thread at a time."""

    def __init__(self, conn: psycopg.Connection[tuple[Any, ...]]) -> None:
        arrays.register(conn)
        self.conn = conn

    def move(self, *moves: Move) -> list[Verdict]:
        """Verdicts after the commit."""
        cursor = self.conn.execute(*as_call(moves), prepare=True, binary=True)
        return as_verdicts(sorted(cursor.fetchall(), key=lambda row: row[0]))


@contextmanager
def lanes(books: db.Database, count: int) -> Iterator[list[Lane]]:
    """So many lanes, all connected."""
    with ExitStack() as stack:
        connect = [psycopg.connect(books.dsn("bursar_lane"), autocommit=True) for _ in range(count)]
        yield [Lane(stack.enter_context(conn)) for conn in connect]


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
    return sum(1 for verdict in verdicts if verdict.outcome is Outcome.ACCEPTED)


def deduct(scene: Scene, user: UUID, amount: int = 1, **rest: Any) -> Move:
    """A charge that is known beforehand."""
    return scene.asked(Action.DEDUCT, None, amount, user_id=user, **rest)


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
        ways = [self._extend, self._settle, self._settle, self.release, self._forget]
        self.dice.choice(ways)(request)

    def end(self) -> None:
        """Settle what is open."""
        for request in list(self.open):
            self._settle(request)

    def ask_too_much(self) -> None:
        """A call that no pool and no cap has room for."""
        verdict = self._move(Action.AUTHORIZE, None, 10**9, user_id=self.users[0])
        assert verdict.outcome is Outcome.REFUSED

    def send(self) -> UUID | None:
        """A call that is sent and then rests for its whole lease; None where nobody has room for it any more."""
        for user in self.users:
            rest = {"user_id": user, "lease_seconds": 1, "flags": Flag.SENT}
            verdict = self._move(Action.AUTHORIZE, None, 1, **rest)
            if verdict.outcome is Outcome.ACCEPTED:
                self.open[verdict.request_id] = 1
                self.sent.add(verdict.request_id)
                return verdict.request_id
        return None

    def _move(self, action: Action, request: UUID | None, amount: int = 0, **rest: Any) -> Verdict:
        verdict = self.lane.move(self.scene.asked(action, request, amount, **rest))[0]
        self.outcomes[action, verdict.outcome] += 1
        return verdict

    def _begin(self) -> None:
        amount, user = self.dice.randrange(1, 8), self.dice.choice(self.users)
        if self.dice.random() < 0.3:
            verdict = self._move(Action.DEDUCT, None, amount, user_id=user)
            if verdict.outcome is Outcome.ACCEPTED:
                self.true[verdict.request_id] = amount
            return
        is_sent = self.dice.random() < 0.5
        flags, lease = (Flag.SENT, 1) if is_sent else (Flag.NONE, 600)
        verdict = self._move(Action.AUTHORIZE, None, amount, user_id=user, lease_seconds=lease, flags=flags)
        if verdict.outcome is Outcome.ACCEPTED:
            self.open[verdict.request_id] = amount
            if is_sent:
                self.sent.add(verdict.request_id)

    def _extend(self, request: UUID) -> None:
        if self._move(Action.EXTEND, request, 2, lease_seconds=1).outcome is Outcome.ACCEPTED:
            self.open[request] += 2

    def _settle(self, request: UUID) -> None:
        amount = self.dice.randrange(self.open.pop(request) + 1)
        verdict = self._move(Action.SETTLE, request, amount, user_id=self.users[0])
        assert verdict.outcome is Outcome.ACCEPTED, verdict
        self.true[request] = amount

    def release(self, request: UUID) -> None:
        """Give back, or learn that expiry came first."""
        held = self.open.pop(request)
        if self._move(Action.RELEASE, request).outcome is Outcome.NO_HOLD:
            assert request in self.sent
            self.true[request] = held  # expiry had charged it by estimate

    def _forget(self, request: UUID) -> None:
        """The process died."""
        held = self.open.pop(request)
        if request in self.sent:
            self.lost[request] = held
