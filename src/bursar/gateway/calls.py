"""One metered call on its way: hold an estimate, mark progress, settle the truth or release. No HTTP here."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from hashlib import sha256
from time import monotonic
from typing import Any, Final
from uuid import UUID

import structlog

from bursar import db
from bursar.clock import now
from bursar.credits import explain, why
from bursar.credits.batcher import Batcher, Unavailable
from bursar.credits.grants import KeyReused
from bursar.credits.moves import Action, Flag, Move, Outcome, Verdict
from bursar.gateway.nearest import Nearest
from bursar.gateway.outputs import PRIOR_OUTPUT_TOKENS, Kind, Outputs, kind_of
from bursar.gateway.upstream import Target
from bursar.gateway.wire import UsageMeter, WireRequest
from bursar.identity.principals import Principal
from bursar.money import Micros, NanoUsd
from bursar.pricing.book import Quote
from bursar.pricing.prices import Context, Priced, Rounding
from bursar.pricing.usage import Usage
from bursar.problems import Problem

UNKNOWN_CEILING_TOKENS: Final = 200_000
"""The most that a model is taken to put out in one answer where the price list does not tell its context window."""

STRICT_SECONDS: Final = 60.0
"""How long a strict limit is remembered, so that most calls under it are held by the ceiling at once."""

MOST_STRICT: Final = 10_000
MOST_SIZES: Final = 100
"""A call is sized anew some ten times at most; more often than this only by a fault, which must not go on for ever."""

PROGRESS_SECONDS: Final = 2.0
MOST_ASKED: Final = 3
PROGRESS_A_LEASE: Final = 4
"""A lease is renewed at least so often before it ends."""

EXTEND_AT_PERCENT: Final = 80
TWIN_SECONDS: Final = 10.0
DRAIN_SECONDS: Final = 10.0
"""How long calls that were told to stop may take to end; what is held then is ended by its lease."""

log = structlog.get_logger(__name__)


class AlreadyAnswered(Problem):
    """A call with this idempotency key was answered before; its answer is not kept."""

    status, code, title = 422, "already_answered", "This request was answered before"


class TwinInFlight(Problem):
    """A call with this idempotency key is still running."""

    status, code, title = 503, "twin_in_flight", "The same request is still running"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A provider that may answer a call: whom to ask, by which name of the model, with whose key, at which price.

    request: in the kinds that this price is for.
    """

    target: Target
    model: str
    quote: Quote
    request: WireRequest
    provider_key_id: UUID | None = None


@dataclass(slots=True, eq=False)
class Call:
    """A metered call: who pays, by which price, and how far it is.

    attempts: who is asked, in turn, until one answers; one that is to be asked again is there twice.
    attempt         who is asked at the moment
    request         what is asked, in the kinds of that one's price
    quote, target   its price; whom to call
    own_key         the key at the provider is the customer's own: tracked, not charged
    is_unlimited    the client names no limit of output, so that what is held for it is a guess
    flags           the bits that every move of this call has
    feature         what it is for: that of its endpoint
    """

    principal: Principal
    attempts: tuple[Attempt, ...]
    body_hash: bytes
    request_id: UUID
    tried: int = 0
    context: Context = field(default_factory=dict)
    opened_at: datetime = field(default_factory=now)
    conversation_id: UUID | None = None
    feature: str | None = None
    idempotency_key: str | None = None
    held_micros: Micros = Micros(0)  # noqa: RUF009 - an int
    held_tokens: int = 0
    available_micros: Micros | None = None
    meter: UsageMeter | None = None
    stopped_by: Verdict | None = None
    limit_headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    attempt: Attempt = field(init=False)
    request: WireRequest = field(init=False)
    quote: Quote = field(init=False)
    target: Target = field(init=False)
    own_key: bool = field(init=False)
    is_unlimited: bool = field(init=False)
    flags: Flag = field(init=False)

    def __post_init__(self) -> None:
        """The first is asked first."""
        self.turn(0)

    def turn(self, place: int) -> None:
        """Another attempt. What follows from it is read dozens of times a call, and so not worked out each time."""
        self.tried = place
        self.attempt = self.attempts[place]
        self.request, self.quote, self.target = self.attempt.request, self.attempt.quote, self.attempt.target
        self.own_key = self.target.is_own_key
        self.is_unlimited = self.request.has_output and self.request.max_output_tokens is None
        self.flags = (
            (Flag.OWN_KEY if self.own_key else Flag.NONE)
            | (Flag.STREAMED if self.request.stream else Flag.NONE)
            | (Flag.UNPRICED if self.quote.is_unpriced else Flag.NONE)
        )

    def skip_same(self) -> None:
        """Ask who is asked now no more: it wants to be left alone for longer than anybody waits here."""
        while self.tried + 1 < len(self.attempts) and self.attempts[self.tried + 1] is self.attempt:
            self.turn(self.tried + 1)

    @property
    def ceiling_tokens(self) -> int:
        """The most that an answer can have: no model puts out more than its context window, which lists tell."""
        return self.quote.context_window or UNKNOWN_CEILING_TOKENS

    def price(self, usage: Usage, rounding: Rounding = Rounding.HALF_UP) -> Priced:
        """What this usage comes to at the price pinned when the call was opened."""
        return self.quote.price(usage, context=self.context, at=self.opened_at, rounding=rounding)

    def tell_tier(self) -> None:
        """The price goes by the service tier and speed that the provider used, where it says so."""
        if self.meter is not None:
            self.context = {**self.context, **self.meter.told}

    def charge(self, priced: Priced) -> Micros:
        """What the customer pays: nothing where the key at the provider is the customer's own."""
        return Micros(0) if self.own_key else priced.charged_micros

    def move(self, action: Action, **fields: Any) -> Move:
        """A move of this call."""
        fields.setdefault("flags", self.flags)
        return Move(
            action,
            self.principal.organization_id,
            self.request_id,
            self.principal.user_id,
            self.principal.api_key_id,
            provider=self.quote.provider,
            model=self.quote.model,
            price_version_id=self.quote.price_version_id,
            provider_key_id=self.attempt.provider_key_id,
            conversation_id=self.conversation_id,
            feature=self.feature,
            **fields,
        )


@dataclass(frozen=True, slots=True)
class _Size:
    """Output that each answer of a call is held for. flags: what kind of guess that is, if it is one.

    is_ceiling: no guess at all, as a strict limit wants it.
    """

    tokens: int
    flags: Flag = Flag.NONE
    is_ceiling: bool = False

    @property
    def is_final(self) -> bool:
        """A refusal of it is the answer."""
        return not self.flags & Flag.MAY_RESIZE


def _grown(held: int, used: int, floor: int) -> int:
    """What shall be held where so much is used: once most of what is held for output is, twice that, so that it is
    asked seldom. floor: the input, which was there from the beginning and does not grow.
    """
    held_for_output, output = held - floor, used - floor
    if output * 100 <= held_for_output * EXTEND_AT_PERCENT:
        return held
    return floor + 2 * max(held_for_output, output)


class NotBooked(Exception):
    """The books did not take a settle or release: a fault of ours. The hold ends by itself."""


def _booked(verdict: Verdict) -> Verdict:
    """The verdict on a settle or release. One without a hold was released by its lease already."""
    if not verdict.accepted and verdict.outcome != Outcome.NO_HOLD:
        raise NotBooked(f"{verdict.request_id}: {verdict.outcome.name}, {verdict.detail}")
    return verdict


def body_hash(path: str, body: bytes) -> bytes:
    """Hash of a call, to tell a repetition from another call under the same key."""
    return sha256(path.encode() + b"\0" + body).digest()


class Till:
    """Where calls are held, kept alive and settled. One per process; `run` renews what is running."""

    def __init__(self, database: db.Database, batcher: Batcher) -> None:
        self._database = database
        self._batcher = batcher
        self._lease_seconds = database.settings.lease_seconds
        self._outputs = Outputs(database)
        self._nearest = Nearest(database)
        self._strict: dict[Kind, float] = {}  # until when, by the monotonic clock
        self._running: dict[int, Call] = {}  # by request, whose number is hashed faster than the UUID
        self._idle = asyncio.Event()
        self._idle.set()
        self._closing: set[asyncio.Future[Verdict]] = set()

    async def hold(self, call: Call) -> None:
        """Hold the estimate, or refuse.

        Raises:
            InsufficientCredits, AllocationExhausted, CapReached, …: refused; `why` says which limit and what to do.
            AlreadyAnswered, TwinInFlight, KeyReused: a call with the same idempotency key.
            Unavailable: the books cannot be reached.
        """
        asked_at = monotonic()
        try:
            move, verdict = await self._authorized(call)
            if verdict.accepted:
                await self._make_sure(call, asked_at)
        except (asyncio.CancelledError, Unavailable):
            # The client has gone, or no answer came: the hold may be placed all the same, and nobody would end it.
            self._soon(self._batcher.ask(self._release(call)))
            raise
        if not verdict.accepted:
            raise await self._refusal(call, verdict, move.amount_micros)
        call.held_micros = verdict.held_micros
        call.held_tokens = move.tokens
        call.available_micros = verdict.available_micros
        self._running[call.request_id.int] = call
        self._idle.clear()
        self._nearest.look(call.principal, call.quote.model, call.feature)

    async def _make_sure(self, call: Call, asked_at: float) -> None:
        """Where the answer took so long that the lease may be over (this process may have stood still): hold it anew.

        A hold that has ended was released, its key is free, and a twin may be on its way: this call must not go out.

        Raises:
            Unavailable: the hold has ended, or answers take too long to keep one.
        """
        for _ in range(MOST_ASKED):
            if monotonic() - asked_at < self._lease_seconds / 2:
                return
            asked_at = monotonic()
            verdict = await self._batcher.move(call.move(Action.EXTEND, lease_seconds=self._lease_seconds))
            if verdict.outcome is Outcome.NO_HOLD:
                break
        raise Unavailable("The hold ended before the call went out", headers={"Retry-After": "1"})

    async def _authorized(self, call: Call) -> tuple[Move, Verdict]:
        """What was asked for in the end, and what was decided. A guess is made anew for as long as that may help."""
        size = self._size(call)
        move = self._authorize(call, size)
        arrived_at = monotonic()

        def resized() -> Move:
            nonlocal size, move
            if not size.is_final:
                self._outputs.read_soon(call.principal.organization_id)
            known = self._size(call)
            if known.tokens < size.tokens:
                size, move = known, self._authorize(call, known)
            return move

        for _ in range(MOST_SIZES):
            verdict = await self._batcher.move(
                move, resized=resized if call.is_unlimited else None, arrived_at=arrived_at
            )
            verdict = await self._settled_twin(move, verdict)
            if verdict.outcome is not Outcome.RESIZE:
                return move, verdict
            size = await self._better_size(call, size, verdict)
            move = self._authorize(call, size)
        raise AssertionError(f"{call.request_id}: no size is the last")

    def _size(self, call: Call) -> _Size:
        """By the client's limit; without one by what is known of such calls, or the ceiling under a strict limit."""
        if not (call.is_unlimited or call.request.is_guessed):
            return _Size(call.request.max_output_tokens or 0)
        if self._strict.get(kind_of(call.principal, call.quote.model), 0.0) > monotonic():
            return self._ceiling(call)
        if not call.is_unlimited:
            return _Size(call.request.max_output_tokens or 0, Flag.UNLIMITED)
        guess = self._outputs.guess(call.principal, call.quote.model)
        flags = Flag.UNLIMITED | Flag.MAY_RESIZE if guess.may_be_better_known else Flag.UNLIMITED
        return _Size(guess.tokens if guess.seen else min(guess.tokens, call.ceiling_tokens), flags)

    def _ceiling(self, call: Call) -> _Size:
        return _Size(call.ceiling_tokens if call.is_unlimited else call.request.max_output_tokens or 0, is_ceiling=True)

    async def _better_size(self, call: Call, size: _Size, verdict: Verdict) -> _Size:
        """After RESIZE: the ceiling under a strict limit; half, where nothing is known; else what is known by now, and
        where that is no less, as before and for good.
        """
        if verdict.detail == "strict":
            if len(self._strict) >= MOST_STRICT:
                self._strict.clear()
            self._strict[kind_of(call.principal, call.quote.model)] = monotonic() + STRICT_SECONDS
            return self._ceiling(call)
        guess = self._outputs.guess(call.principal, call.quote.model)
        if not guess.seen and size.tokens > PRIOR_OUTPUT_TOKENS:
            return replace(size, tokens=max(PRIOR_OUTPUT_TOKENS, size.tokens // 2))
        await self._outputs.read(call.principal.organization_id)
        known = self._size(call)
        return known if known.tokens < size.tokens else replace(size, flags=size.flags & ~Flag.MAY_RESIZE)

    def _authorize(self, call: Call, size: _Size) -> Move:
        held = call.request
        usage = held.at_most(size.tokens, call.ceiling_tokens) if size.is_ceiling else held.hold_for(size.tokens)
        estimate = call.price(usage, Rounding.UP)
        return call.move(
            Action.AUTHORIZE,
            amount_micros=call.charge(estimate),
            tokens=usage.total_tokens,
            cost_nano_usd=estimate.provider_cost_nano_usd,
            mark_micros=call.charge(call.price(call.request.estimate, Rounding.UP)),
            lease_seconds=self._lease_seconds,
            flags=call.flags | size.flags | Flag.MAY_WAIT,
            idempotency_key=call.idempotency_key,
            body_hash=call.body_hash if call.idempotency_key else None,
        )

    def sent(self, call: Call) -> None:
        """The provider call goes out: from here an expired hold is charged. Not waited for; it is in the next batch."""
        self._soon(
            self._batcher.ask(call.move(Action.EXTEND, flags=call.flags | Flag.SENT, lease_seconds=self._lease_seconds))
        )

    async def turn_to_next(self, call: Call) -> bool:
        """Hold for the next attempt in place of the last one, which failed and costs nothing.

        Another provider's model has another price and passes other limits, so it has a hold of its own. One that the
        books refuse is passed over. False: there is none that may be asked, and nothing is held any more.

        Raises:
            Unavailable: the books cannot be reached; nothing is held.
        """
        while call.tried + 1 < len(call.attempts):
            failed = call.attempt
            call.turn(call.tried + 1)
            if call.attempt is failed and self.is_running(call):
                return True
            if self.is_running(call):
                await self.release(call)
            try:
                await self.hold(call)
            except Unavailable:
                raise
            except Problem as refusal:
                log.warning("a fallback was refused", request_id=str(call.request_id), code=refusal.code)
            else:
                self.sent(call)
                return True
        return False

    async def settle(self, call: Call, usage: Usage, *, estimated: bool) -> Verdict:
        """Charge what was used; committed when it returns, and done even when the caller is cancelled meanwhile."""
        self._end(call)
        call.tell_tier()
        self._note_output(call, usage, estimated=estimated)
        priced = call.price(usage)
        move = call.move(
            Action.SETTLE,
            amount_micros=call.charge(priced),
            tokens=usage.total_tokens,
            cost_nano_usd=priced.provider_cost_nano_usd,
            usage=usage.as_array(),
            flags=call.flags
            | (Flag.UNLIMITED if call.is_unlimited else Flag.NONE)
            | (Flag.ESTIMATED if estimated else Flag.NONE)
            | (Flag.UNPRICED if priced.unpriced_kinds else Flag.NONE),
        )
        return _booked(await asyncio.shield(self._soon(self._batcher.ask(move))))

    def _note_output(self, call: Call, usage: Usage, *, estimated: bool) -> None:
        """Before the settle frees what others wait for, so that they are sized by it. A cut answer tells nothing."""
        if call.is_unlimited and (not estimated or (call.meter is not None and call.meter.completed)):
            tokens = usage.output_tokens + usage.audio_output_tokens + usage.image_output_tokens
            self._outputs.note(call.principal, call.quote.model, -(-tokens // call.request.choices))

    async def tell_nearest(self, call: Call) -> None:
        """Note on the call which limit such calls come to first, as of seconds ago."""
        call.limit_headers = await self._nearest.headers(
            call.principal, call.quote.model, call.feature, micros=call.held_micros, tokens=call.held_tokens
        )

    async def release(self, call: Call) -> Verdict:
        """Free the hold and charge nothing: the provider did nothing."""
        self._end(call)
        return _booked(await asyncio.shield(self._soon(self._batcher.ask(self._release(call)))))

    def _release(self, call: Call) -> Move:
        """The move that frees a hold and its idempotency key."""
        key = call.idempotency_key
        return call.move(Action.RELEASE, idempotency_key=key, body_hash=call.body_hash if key else None)

    def _end(self, call: Call) -> None:
        """Renew its lease no more: it is on its way to be settled or released."""
        self._running.pop(call.request_id.int, None)
        if not self._running:
            self._idle.set()

    def is_running(self, call: Call) -> bool:
        """Whether the call is held and neither settled nor released."""
        return call.request_id.int in self._running

    async def run(self) -> None:
        """Every 2 s, or more often where leases are short: renew the leases of what runs, mark progress, and hold more
        where a stream outgrows its hold.
        """
        while True:
            await asyncio.sleep(min(PROGRESS_SECONDS, self._lease_seconds / PROGRESS_A_LEASE))
            await asyncio.gather(*(self._progress(call) for call in list(self._running.values())))

    async def drain(self) -> None:
        """Wait until the calls that were told to stop have ended, and every settle that went out is committed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self._idle.wait()
        while self._closing:
            await asyncio.gather(*self._closing, return_exceptions=True)
        await self._outputs.close()
        await self._nearest.close()

    async def _progress(self, call: Call) -> None:
        try:
            await self._report(call)
        except Unavailable:
            log.warning("progress not recorded", request_id=str(call.request_id))
        except Exception:
            # What is wrong with one call must not end the renewal of all others' leases.
            log.exception("progress not recorded", request_id=str(call.request_id))

    async def _report(self, call: Call) -> None:
        """Renew the lease, mark what was used so far, hold more where that outgrows the hold.

        A stream that cannot have as much again gets what there is; only one that has used up that too is stopped.
        """
        counted = call.meter.counted() if call.meter is not None else call.request.estimate
        so_far = call.price(counted, Rounding.UP)
        mark, tokens = call.charge(so_far), counted.total_tokens
        refused: Verdict | None = None
        wanted = (call.held_micros, call.held_tokens)
        if call.request.stream and call.request.has_output:
            floor = call.charge(call.price(call.request.estimate, Rounding.UP))
            wanted = (
                Micros(_grown(call.held_micros, mark, floor)),
                _grown(call.held_tokens, tokens, call.request.estimate.total_tokens),
            )
        for _ in range(3):
            verdict = await self._batcher.move(self._extend(call, so_far, *wanted))
            if verdict.outcome is Outcome.ACCEPTED:
                call.held_micros, call.held_tokens = wanted
            if verdict.outcome is not Outcome.REFUSED:
                break
            left = 0 if refused is not None else verdict.available_micros or 0
            wanted = (Micros(min(wanted[0], call.held_micros + left)), max(call.held_tokens, tokens))
            refused = verdict
        if refused is not None and (mark > call.held_micros or tokens > call.held_tokens):
            call.stopped_by = refused

    def _extend(self, call: Call, so_far: Priced, micros: Micros, tokens: int) -> Move:
        """Renew the lease, note what was used, and hold so much in all, so that asking again holds nothing twice."""
        more = Flag.IN_ALL if micros > call.held_micros or tokens > call.held_tokens else Flag.NONE
        cost, mark = so_far.provider_cost_nano_usd, call.charge(so_far)
        return call.move(
            Action.EXTEND,
            amount_micros=micros if more else Micros(0),
            tokens=tokens if more else 0,
            cost_nano_usd=NanoUsd((cost * micros // mark if mark else cost) if more else 0),
            mark_micros=mark,
            lease_seconds=self._lease_seconds,
            flags=call.flags | Flag.SENT | more,
        )

    async def stop_reason(self, call: Call) -> Problem:
        """The refusal that ends a stream whose hold could not be extended."""
        assert call.stopped_by is not None
        return await self._refusal(call, call.stopped_by, call.held_micros)

    def _soon(self, verdict: asyncio.Future[Verdict]) -> asyncio.Future[Verdict]:
        """Waited for at the end of the process, whatever happens to the caller."""
        self._closing.add(verdict)
        verdict.add_done_callback(self._closed)
        return verdict

    def _closed(self, verdict: asyncio.Future[Verdict]) -> None:
        self._closing.discard(verdict)
        if not verdict.cancelled() and verdict.exception() is not None:
            log.error("a settle, release or mark failed; its hold will expire", error=str(verdict.exception()))

    async def _settled_twin(self, move: Move, verdict: Verdict) -> Verdict:
        """Where the key is known: wait for the twin, then say how it ended; a released one leaves the key free.

        A request that is its own twin was placed before the connection broke: it is accepted.
        """
        deadline = asyncio.get_running_loop().time() + TWIN_SECONDS
        while verdict.outcome == Outcome.KNOWN and verdict.request_id != move.request_id:
            if not await self._is_held(move.organization_id, verdict.request_id):
                again = await self._batcher.move(move)
                if again.outcome == Outcome.KNOWN and again.request_id == verdict.request_id:
                    raise AlreadyAnswered(
                        f"It was answered as request req_{verdict.request_id.hex}",
                        headers={"Bursar-Original-Request": f"req_{verdict.request_id.hex}", "x-should-retry": "false"},
                    )
                verdict = again
                continue
            if asyncio.get_running_loop().time() > deadline:
                raise TwinInFlight("Ask again when it has ended", headers={"Retry-After": "5"})
            await asyncio.sleep(0.1)
        return verdict

    async def _is_held(self, organization_id: UUID, request_id: UUID) -> bool:
        async with self._database.tenant(organization_id) as conn:
            return await explain.is_held(conn, organization_id=organization_id, request_id=request_id)

    async def _refusal(self, call: Call, verdict: Verdict, wanted: Micros) -> Problem:
        """What the caller is told: the decision, and every limit as it is now."""
        if verdict.outcome == Outcome.KEY_REUSED:
            return KeyReused(headers={"x-should-retry": "false"})
        async with self._database.tenant(call.principal.organization_id) as conn:
            answer = await why.why(
                conn,
                organization_id=call.principal.organization_id,
                user_id=call.principal.user_id,
                api_key_id=call.principal.api_key_id,
                model=call.quote.model,
                feature=call.feature,
                wanted_micros=wanted,
            )
        answer = why.decided(answer, code=verdict.detail or "pool_exhausted", binding_id=verdict.binding_id)
        return why.refusal(answer, organization=call.principal.organization_slug)
