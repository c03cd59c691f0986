"""The batcher: whatever waits to move credits is decided by one database call, and answered after its commit.

While one batch is in flight the next collects; there is no timer. Under load a batch is half of what waits: the other
half is packed meanwhile and goes out before the first one's answers are given, so that database and process work at the
same time. A lane is one connection and takes a hash class of organizations, so that two lanes never wait for one
organization's gate. Lanes that are at work together overlap each other, and each takes all that waits for it.

Calls that only open holds of others stand in the way of are parked, and tried again in the order of their arrival: in
the very batch of each settle or release of their organization here, which is decided before them, and every 50 ms,
since other processes settle too. Each time, whoever parked a call may size it anew. A smaller call may pass a larger
one that came earlier, which is refused when it has waited for long enough. Parked calls take no more than half of a
batch from those that have just come, so that many who wait for one organization's credits delay nobody else.
"""

import asyncio
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import psycopg
import structlog
from prometheus_client import Counter, Gauge, Histogram

from bursar import db
from bursar.credits.moves import NOTHING, Action, Move, Outcome, Verdict, as_call, as_verdicts
from bursar.db import arrays
from bursar.problems import Problem

MOST_A_BATCH: Final = 128
LEAST_HALF: Final = 32
"""What waits is not halved below this: small batches cost more each than overlapping them saves."""

GIVE_UP_SECONDS: Final = 10.0
"""How long a database that does not answer is waited for."""

WAIT_SECONDS: Final = 10.0
"""How long a call waits for the holds of others, unless a setting says otherwise."""

RETRY_SECONDS: Final = 0.05
LONGEST_RETRY_SECONDS: Final = 1.0
CALL_SECONDS: Final = 10.0
"""Longest time of one call: a database that stands still is left by then and asked again."""

MUST_BE_BOOKED: Final = (Action.SETTLE, Action.RELEASE)
"""Asked until it is booked, also after its caller was told that the books cannot be reached."""

NEW_WORK: Final = (Action.AUTHORIZE, Action.DEDUCT)

Call = tuple[str, list[Any]]
"""A statement and its arguments."""

log = structlog.get_logger(__name__)
BATCH_SIZES = Histogram("bursar_batch_size", "Moves decided in one call", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
BATCH_SECONDS = Histogram(
    "bursar_batch_seconds", "Time of one call", buckets=(0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5)
)
REFUSALS = Counter("bursar_refusals_total", "Requests that a balance or rule refused", ["reason"])
WAITING = Gauge("bursar_moves_waiting", "Calls that wait for other calls' holds")


class Unavailable(Problem):
    """The database does not answer; the request may be sent again. Nothing was charged that was not acknowledged."""

    status, code, title = 503, "books_unavailable", "The books cannot be reached at the moment"


class DiskFull(Problem):
    """The database's disk is full: what runs is still booked, nothing new is held or charged."""

    status, code, title = 503, "disk_full", "The disk of the database is full"


@dataclass(slots=True, eq=False)
class _Waiting:
    """A move and who waits for its verdict. Instants by the monotonic clock."""

    move: Move
    answer: asyncio.Future[Verdict]
    arrived_at: float
    give_up_at: float
    resized: Callable[[], Move] | None = None  # what to ask instead when it is tried again
    parked: bool = False
    is_idle: bool = False  # a mark that the end of its request has overtaken in the queue


@dataclass(slots=True, eq=False)
class _Flight:
    """A batch that the database decides at the moment."""

    batch: list[_Waiting]
    call: asyncio.Task[list[Verdict]]

    @property
    def tries_again(self) -> bool:
        """Whether parked calls are in it: what comes next must not pass them while they are on their way back."""
        return any(waiting.parked for waiting in self.batch)


@dataclass(slots=True, eq=False)
class Lane:
    """One connection and the moves that wait for it. One task runs `run`."""

    dsn: str
    wait_seconds: float = WAIT_SECONDS
    queue: deque[_Waiting] = field(default_factory=deque)
    flight: _Flight | None = None
    packed: list[_Waiting] = field(default_factory=list)  # taken, to go out when the flight has landed
    parked: deque[_Waiting] = field(default_factory=deque)
    again: deque[_Waiting] = field(default_factory=deque)  # parked ones that are being tried again
    marks: dict[int, _Waiting] = field(default_factory=dict)  # by request: extensions in the queue that hold no more
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    ripe: int = 1  # as many must wait until the next batch is taken
    connection: psycopg.AsyncConnection[tuple[object, ...]] | None = None
    closing: bool = False
    retry_seconds: float = RETRY_SECONDS
    tried_at: float = 0.0  # when all parked calls were last tried, by the monotonic clock
    others: "list[Lane]" = field(default_factory=list)

    def put(self, waiting: _Waiting) -> None:
        """Queue a move; it goes out with the next batch.

        A mark that is still in the queue when its request ends goes out no more: whoever reads it would find no hold.
        """
        move = waiting.move
        if move.action is Action.EXTEND and move.amount_micros == move.tokens == 0:
            self.marks[move.request_id.int] = waiting
        elif move.action in MUST_BE_BOOKED and self.marks:
            mark = self.marks.pop(move.request_id.int, None)
            if mark is not None:
                mark.is_idle = True
                if not mark.answer.done():
                    mark.answer.set_result(
                        Verdict(Outcome.NO_HOLD, move.request_id, NOTHING, NOTHING, None, None, None)
                    )
        self.queue.append(waiting)
        if len(self.queue) >= self.ripe:
            self.wake.set()

    async def run(self) -> None:
        """Decide batch after batch until closed and empty."""
        while self.flight is not None or not (self.closing and not (self.queue or self.parked or self.again)):
            await self._wait_for_work()
            if self.parked and time.monotonic() >= self.tried_at + RETRY_SECONDS:
                self._unpark(None)
            landed = self.flight
            if landed is not None and landed.call.done() and not self.packed and self._has_company():
                if await self._landed(landed):
                    self.flight = None
                    self._answer_all(landed.batch, landed.call.result())
                    await asyncio.sleep(0)  # whoever asks again at once is in the next batch
                continue
            if landed is None or not landed.tries_again:
                self._take()
            call = self._pack()
            if landed is not None and not await self._landed(landed):
                continue
            self.flight = None
            if call is not None:
                if landed is None and len(self.packed) == 1:
                    await self._ask_first(call)
                    continue
                self._start(call)
            if landed is not None:
                if call is not None:
                    await asyncio.sleep(0)  # the next is on its way before these answers are given
                self._answer_all(landed.batch, landed.call.result())
        if self.connection is not None:
            await self.connection.close()

    def _has_company(self) -> bool:
        """Whether another lane keeps the database at work meanwhile: then nothing is halved, since half a batch costs
        more than half, and the lanes overlap each other.
        """
        return any(other.flight is not None for other in self.others)

    async def _wait_for_work(self) -> None:
        """Until there is a batch to take: anything at all, or a ripe one beside a flight; or the flight has landed."""
        if self.flight is None:
            self.ripe = 1
        elif self.parked or self.flight.tries_again:
            self.ripe = sys.maxsize  # what this flight frees belongs to parked calls first
        else:
            least = MOST_A_BATCH if self._has_company() else LEAST_HALF
            self.ripe = min(MOST_A_BATCH, max(least, len(self.flight.batch)))
        if len(self.queue) + len(self.again) >= self.ripe or (self.flight is not None and self.flight.call.done()):
            return
        self.wake.clear()
        if self.flight is not None or not self.parked:
            await self.wake.wait()
            return
        # Parked calls are tried again by the clock too: another process may have settled what blocked them.
        with suppress(TimeoutError):
            async with asyncio.timeout(RETRY_SECONDS):
                await self.wake.wait()

    def _take(self) -> None:
        """The next batch: what is tried again, but no more than half of it where others have come; then what came."""
        if self.parked:
            ends = {each.move.organization_id for each in self.queue if each.move.action in MUST_BE_BOOKED}
            if ends:
                self._unpark(ends)
        requests: set[int] = set()
        known = len(self.queue) + len(self.again) + (len(self.flight.batch) if self.flight is not None else 0)
        most = MOST_A_BATCH if self._has_company() else min(MOST_A_BATCH, max(LEAST_HALF, (known + 1) // 2))
        if self.again:
            self._take_from(self.again, most - min(len(self.queue), most // 2), requests)
        self._take_from(self.queue, most, requests)

    def _take_from(self, line: deque[_Waiting], most: int, requests: set[int]) -> None:
        """Up to `most` in the batch: what arrived first, no request twice, nothing whose caller has gone before it was
        sent. requests: those that are in the batch.
        """
        later: list[_Waiting] = []
        while line and len(self.packed) < most:
            waiting = line.popleft()
            if waiting.answer.cancelled() and waiting.move.action in (Action.AUTHORIZE, Action.DEDUCT):
                self._leave_park(waiting)
                continue
            if waiting.is_idle:
                continue
            request = waiting.move.request_id.int  # hashed faster than the UUID
            if request in requests:
                later.append(waiting)
                continue
            requests.add(request)
            self.packed.append(waiting)
            if waiting.move.action is Action.EXTEND:
                self.marks.pop(request, None)
        line.extendleft(reversed(later))

    def _pack(self) -> Call | None:
        """The call for what was taken; None: there is nothing to ask."""
        if not self.packed:
            return None
        try:
            return as_call([waiting.move for waiting in self.packed])
        except Exception as error:
            # A count that fits no column, say: only its own caller may suffer.
            for waiting in self.packed:
                if not _can_be_packed(waiting.move):
                    self._fail(waiting, error)
            self.packed = [waiting for waiting in self.packed if _can_be_packed(waiting.move)]
            self._put_back()
            return None

    def _put_back(self) -> None:
        """What was taken but did not go out comes first again."""
        self.queue.extendleft(reversed(self.packed))
        self.packed = []

    def _start(self, call: Call) -> None:
        task = asyncio.create_task(self._call(call, len(self.packed)))
        task.add_done_callback(lambda _: self.wake.set())
        self.flight = _Flight(self.packed, task)
        self.packed = []

    async def _ask_first(self, call: Call) -> None:
        """One alone that comes while nothing is under way: without a task of its own, whose switches a single caller
        would wait for. It stays in `packed` meanwhile, where `give_up` finds it; what comes is packed afterwards.
        """
        (waiting,) = self.packed
        try:
            verdicts = await self._call(call, 1)
        except Exception as error:
            self.packed = []
            await self._failed([waiting], error)
            return
        self.packed = []
        self.retry_seconds = RETRY_SECONDS
        self._answer_all([waiting], verdicts)

    async def _landed(self, flight: _Flight) -> bool:
        """Wait for the end of a flight; false: it failed, and its moves have been dealt with."""
        try:
            await flight.call
        except Exception as error:
            self.flight = None
            self._put_back()
            await self._failed(flight.batch, error)
            return False
        self.retry_seconds = RETRY_SECONDS
        return True

    async def _failed(self, batch: list[_Waiting], error: Exception) -> None:
        if isinstance(error, psycopg.OperationalError | psycopg.errors.ReadOnlySqlTransaction | OSError):
            await self._lost(batch, error)
        else:
            # Whatever it is: it must not end the lane for everybody.
            await self._refused_whole(batch, error)

    def _answer_all(self, batch: list[_Waiting], verdicts: list[Verdict]) -> None:
        for waiting, verdict in zip(batch, verdicts, strict=True):
            self._answer(waiting, verdict)

    async def _decide_alone(self, waiting: _Waiting) -> None:
        try:
            verdicts = await self._call(as_call([waiting.move]), 1)
        except Exception as error:
            await self._failed([waiting], error)
        else:
            self._answer_all([waiting], verdicts)

    async def _call(self, call: Call, moves: int) -> list[Verdict]:
        """One call of move_batch or move_one; committed when it returns."""
        connection = await self._connected()
        began = time.perf_counter()
        cursor = connection.cursor(binary=True)
        async with asyncio.timeout(CALL_SECONDS):
            await cursor.execute(*call, prepare=True)
            rows = await cursor.fetchall()
        BATCH_SECONDS.observe(time.perf_counter() - began)
        BATCH_SIZES.observe(moves)
        return as_verdicts(rows)

    async def _connected(self) -> psycopg.AsyncConnection[tuple[object, ...]]:
        if self.connection is None or self.connection.closed:
            self.connection = await psycopg.AsyncConnection.connect(
                self.dsn, autocommit=True, connect_timeout=5, application_name="bursar lane"
            )
            arrays.register(self.connection)
        return self.connection

    async def _lost(self, batch: list[_Waiting], error: Exception) -> None:
        """The connection broke: the answer is unknown, so the same requests are asked again, marked as repeated.

        A repeated settle or deduction finds what was booked, a repeated authorize finds its hold, a repeated extend
        names what shall be held in all (Flag.IN_ALL).
        """
        # A TimeoutError (of a call that took too long) is an OSError too.
        log.warning("lane lost its connection", error=_first_line(error), moves=len(batch))
        if self.connection is not None:
            await self.connection.close()
            self.connection = None
        for waiting in reversed(batch):
            waiting.move = waiting.move.repeated()
            self.queue.appendleft(waiting)
        self.give_up()
        await asyncio.sleep(self.retry_seconds)
        self.retry_seconds = min(2 * self.retry_seconds, LONGEST_RETRY_SECONDS)

    def give_up(self) -> None:
        """Answer whoever has waited long enough. What must be booked stays in the queue, unless the process ends."""
        at = time.monotonic()
        for waiting in (*self.packed, *(self.flight.batch if self.flight is not None else ())):
            if at >= waiting.give_up_at:
                self._fail(waiting, _unavailable())
        for line in (self.again, self.queue):
            for _ in range(len(line)):
                waiting = line.popleft()
                if at >= waiting.give_up_at:
                    self._fail(waiting, _unavailable())
                if at < waiting.give_up_at or (waiting.move.action in MUST_BE_BOOKED and not self.closing):
                    line.append(waiting)

    async def _refused_whole(self, batch: list[_Waiting], error: Exception) -> None:
        """One move made the call fail and nothing was booked: each is asked alone, so that only the culprit fails."""
        if len(batch) == 1:
            self._fail(batch[0], error)
            return
        log.warning("batch failed, asking one by one", error=_first_line(error), moves=len(batch))
        for waiting in batch:
            await self._decide_alone(waiting)

    def _answer(self, waiting: _Waiting, verdict: Verdict) -> None:
        if verdict.outcome is Outcome.WAIT:
            if time.monotonic() < waiting.arrived_at + self.wait_seconds and not self.closing:
                self._park(waiting)
            else:
                self._try_again(waiting)
                waiting.move = waiting.move.impatient()
                self.put(waiting)
            return
        self._leave_park(waiting)
        if verdict.outcome is not Outcome.ACCEPTED and verdict.outcome in (Outcome.REFUSED, Outcome.NOT_ALLOWED):
            REFUSALS.labels(verdict.detail or "unknown").inc()
        if not waiting.answer.done():
            waiting.answer.set_result(verdict)

    def _fail(self, waiting: _Waiting, error: Exception) -> None:
        self._leave_park(waiting)
        if not waiting.answer.done():
            waiting.answer.set_exception(error)

    def _park(self, waiting: _Waiting) -> None:
        if not waiting.parked:
            waiting.parked = True
            WAITING.inc()
        self.parked.append(waiting)

    def _leave_park(self, waiting: _Waiting) -> None:
        if waiting.parked:
            waiting.parked = False
            WAITING.dec()

    def _unpark(self, organizations: set[UUID] | None) -> None:
        """Try parked calls again, first come first; None: those of every organization."""
        if organizations is None:
            self.tried_at = time.monotonic()
        again, still = list(self.again), deque[_Waiting]()
        for each in self.parked:
            if organizations is None or each.move.organization_id in organizations:
                self._try_again(each)
                again.append(each)
            else:
                still.append(each)
        self.parked = still
        if again:
            # By arrival: they were parked as their answers came, and some are on their way already.
            self.again = deque(sorted(again, key=lambda waiting: waiting.arrived_at))
            self.wake.set()

    def _try_again(self, waiting: _Waiting) -> None:
        """Whoever asks may want less by now; and the database has its time to answer anew."""
        if waiting.resized is not None:
            waiting.move = waiting.resized()
        waiting.give_up_at = time.monotonic() + GIVE_UP_SECONDS


class Batcher:
    """Lanes of one process. Start it with `async with`; leaving waits until everything queued is decided.

    wait_seconds: how long a call waits for the holds of others before it is refused.
    """

    def __init__(
        self, dsn: str, *, lanes: int = 2, wait_seconds: float = WAIT_SECONDS, space: db.Space | None = None
    ) -> None:
        self._space = space
        self._lanes = [Lane(dsn, wait_seconds) for _ in range(lanes)]
        for lane in self._lanes:
            lane.others = [other for other in self._lanes if other is not lane]
        self._tasks: list[asyncio.Task[None]] = []
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Batcher":
        self._tasks = [asyncio.create_task(lane.run(), name=f"lane {n}") for n, lane in enumerate(self._lanes)]
        self._watch = asyncio.create_task(self._give_up(), name="lanes' watch")
        return self

    async def __aexit__(self, *_: object) -> None:
        for lane in self._lanes:
            lane.closing = True
            lane._unpark(None)
            lane.wake.set()
        await asyncio.gather(*self._tasks)
        if self._watch is not None:
            self._watch.cancel()

    async def _give_up(self) -> None:
        """Also while a lane is stuck in a call or in connecting, nobody waits for much longer than ten seconds."""
        while True:
            await asyncio.sleep(LONGEST_RETRY_SECONDS)
            for lane in self._lanes:
                lane.give_up()

    async def move(
        self, move: Move, *, resized: Callable[[], Move] | None = None, arrived_at: float | None = None
    ) -> Verdict:
        """The verdict on one move, after its commit.

        resized: of a move that may wait, what to ask instead each time it is tried again. arrived_at: since when it has
        waited, by the monotonic clock; since now where it has not been asked before.

        A settle or release goes out even when its caller is cancelled meanwhile, and is asked until it is booked.

        Raises:
            Unavailable: the database did not answer for 10 s.
            DiskFull: what room is left is for what runs already; nothing was asked.
            psycopg.Error: the database refused the call itself.
        """
        return await self.ask(move, resized=resized, arrived_at=arrived_at)

    def ask(
        self, move: Move, *, resized: Callable[[], Move] | None = None, arrived_at: float | None = None
    ) -> asyncio.Future[Verdict]:
        """As `move`, for whoever does not wait for the verdict at once.

        Raises:
            DiskFull
        """
        if self._space is not None and move.action in NEW_WORK and self._space.is_short():
            raise DiskFull(headers={"Retry-After": "5"})
        answer: asyncio.Future[Verdict] = asyncio.get_running_loop().create_future()
        at = time.monotonic()
        waiting = _Waiting(move, answer, at if arrived_at is None else arrived_at, at + GIVE_UP_SECONDS, resized)
        self._lanes[move.organization_id.int % len(self._lanes)].put(waiting)
        return answer


def _can_be_packed(move: Move) -> bool:
    try:
        as_call([move])
    except Exception:
        return False
    return True


def _first_line(error: Exception) -> str:
    """What went wrong, without the statements that PostgreSQL adds as context."""
    return str(error).partition("\n")[0]


def _unavailable() -> Unavailable:
    return Unavailable("The database does not answer", headers={"Retry-After": "2"})
