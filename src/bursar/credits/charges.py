"""Charges that programs report: holds, settles and deductions of whoever calls models themselves.

The same moves as the gateway's, by the same batcher; they are marked as reported, and nothing else can be settled,
extended or released here: a call of the gateway is metered, and stays so.
"""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, NamedTuple
from uuid import UUID

import msgspec

from bursar import db
from bursar.clock import now
from bursar.credits import why
from bursar.credits.batcher import Batcher
from bursar.credits.filters import FEATURE
from bursar.credits.grants import KeyReused
from bursar.credits.moves import NO_COST, NOTHING, ONE_REQUEST, Action, Flag, Move, Outcome, Verdict
from bursar.identity.memberships import get_membership
from bursar.identity.principals import Principal
from bursar.money import LARGEST, Micros, NanoUsd, NotAnAmount, format_credits, parse_credits, parse_usd
from bursar.pricing.book import LONGEST_NAME, PriceBook, Quote
from bursar.pricing.prices import Rounding
from bursar.pricing.usage import NO_USAGE, USAGE_KINDS, Usage, UsageArray
from bursar.problems import FieldError, InvalidRequest, Problem

QUERIES: Final = db.load_queries("bursar.credits")
MOST_MICROS: Final = 10**15
"""The largest amount of one request: a billion credits, as in credits.most_micros."""

MOST_COUNT: Final = 1_280_000_000
USUAL_LEASE_SECONDS: Final = 60
LONGEST_LEASE_SECONDS: Final = 3_600
MOST_REMEMBERED: Final = 50_000

# To look up members of an enumeration takes longer than what is done with them.
_AUTHORIZE, _EXTEND, _SETTLE, _RELEASE, _DEDUCT = Action
_REPORTED: Final = int(Flag.REPORTED)
_UNPRICED: Final = int(Flag.UNPRICED)
_ESTIMATED: Final = int(Flag.ESTIMATED)
_SENT: Final = int(Flag.SENT)
_STREAMED: Final = int(Flag.STREAMED)
_MAY_WAIT: Final = int(Flag.MAY_WAIT)
_IN_ALL: Final = int(Flag.IN_ALL)

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=LONGEST_NAME)]
Id = Annotated[str, msgspec.Meta(min_length=1, max_length=60)]
Count = Annotated[int, msgspec.Meta(ge=0, le=MOST_COUNT)]
Counts = Annotated[dict[str, Count], msgspec.Meta(extra_json_schema={"propertyNames": {"enum": list(USAGE_KINDS)}})]
Lease = Annotated[int, msgspec.Meta(ge=1, le=LONGEST_LEASE_SECONDS)]
Feature = Annotated[str, msgspec.Meta(pattern=FEATURE)]
Conditions = Annotated[dict[Text, Text], msgspec.Meta(max_length=8)]


class HoldNotFound(Problem):
    """No program placed such a hold in this organization. Those of others and of the gateway answer alike."""

    status, code, title = 404, "hold_not_found", "No such hold"


class HoldEnded(Problem):
    """The hold was settled or released, or its lease was over."""

    status, code, title = 409, "hold_ended", "This hold has ended"


class NotForOthers(Problem):
    """A person's key charges this person; only a service key may name another member."""

    status, code, title = 403, "not_for_others", "This key may not charge somebody else"


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A body: its fields and no others."""


class Credits(_Body, frozen=True, kw_only=True):
    """An amount as answers show it."""

    amount: Annotated[str, msgspec.Meta(max_length=40)]
    unit: Literal["credit", "micro"]


class Dollars(_Body, frozen=True, kw_only=True):
    """What a provider asks."""

    amount: Annotated[str, msgspec.Meta(max_length=40)]
    unit: Literal["USD"]


class Worth(_Body, frozen=True, kw_only=True):
    """An amount, or usage that the price book prices; with both, the amount counts and the usage is kept."""

    amount: Credits | None = None
    usage: Counts | None = None
    context: Conditions | None = None
    provider_cost: Dollars | None = None


class Charge(Worth, frozen=True, kw_only=True):
    """Who pays, and for what."""

    provider: Text | None = None
    model: Text | None = None
    user_id: Id | None = None
    conversation_id: Id | None = None
    feature: Feature | None = None


class Authorize(Charge, frozen=True, kw_only=True):
    """Hold an amount."""

    lease_seconds: Lease = USUAL_LEASE_SECONDS
    stream: bool = False
    sent: bool = False
    wait: bool = True


class Deduct(Charge, frozen=True, kw_only=True):
    """Hold and settle in one."""

    estimated: bool = False


class Extend(Worth, frozen=True, kw_only=True):
    """Renew the lease; hold so much in all; note what was used so far, and that the call went out."""

    request_id: Id
    so_far: Worth | None = None
    lease_seconds: Lease = USUAL_LEASE_SECONDS
    sent: bool = True


class Settle(Worth, frozen=True, kw_only=True):
    """Charge what was used."""

    request_id: Id
    estimated: bool = False


class Release(_Body, frozen=True, kw_only=True):
    """Free the hold and charge nothing."""

    request_id: Id


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What became of it. available: what user and key can still spend on the model; null where it is not known."""

    request_id: str
    state: Literal["held", "charged", "released"]
    held: Credits
    charged: Credits
    available: Credits | None


class Caller(NamedTuple):
    """Who asks, and the command that it is. request_id: of this HTTP request. key: None where none was sent."""

    principal: Principal
    request_id: UUID
    idempotency_key: str | None = None
    body_hash: bytes | None = None

    @classmethod
    def of(cls, principal: Principal, request_id: UUID, key: str | None, path: str, body: bytes) -> "Caller":
        """The hash is of the bytes as they came."""
        digest = None if key is None else sha256(path.encode() + b"\0" + body).digest()
        return cls(principal, request_id, key, digest)


@dataclass(frozen=True, slots=True)
class Placed:
    """A hold that a program placed, as far as its settling goes. state: held, charged, released, expired."""

    organization_id: UUID
    state: str
    user_id: UUID | None
    api_key_id: UUID | None
    provider: str | None
    model: str | None
    price_version_id: UUID | None
    conversation_id: UUID | None
    placed_at: datetime
    feature: str | None


class _Sum(NamedTuple):
    """What something comes to. tokens: what limits on tokens count of it; flags: of the move."""

    micros: Micros
    cost: NanoUsd = NO_COST
    counts: UsageArray = ONE_REQUEST
    tokens: int = 0
    flags: int = _REPORTED


class Charges:
    """The operations. One per process."""

    def __init__(self, database: db.Database, batcher: Batcher, book: PriceBook) -> None:
        self._database = database
        self._batcher = batcher
        self._book = book
        # Holds that were placed here, and members that were asked for: what need not be read again.
        self._placed: OrderedDict[UUID, Placed] = OrderedDict()
        self._members: OrderedDict[tuple[UUID, UUID], None] = OrderedDict()

    async def authorize(self, caller: Caller, body: Authorize) -> Answer:
        """Hold an amount, or refuse.

        Raises:
            InsufficientCredits, AllocationExhausted, CapReached, …: refused; `why` says which limit and what to do.
            InvalidRequest, ModelNotPriced, NotForOthers, MemberNotFound, KeyReused, Unavailable
        """
        user_id = await self._payer(caller.principal, body.user_id)
        quote = None if body.amount is not None else await self._quote(caller.principal.organization_id, body)
        at = now()
        worth = _worth(body, quote, at, Rounding.UP)
        floor = _worth(body, quote, at, Rounding.UP, input_only=True).micros if body.stream and quote else NOTHING
        move = _move(
            caller,
            _AUTHORIZE,
            body,
            user_id,
            quote,
            worth,
            mark_micros=floor,
            lease_seconds=body.lease_seconds,
            flags=worth.flags
            | (_SENT if body.sent else 0)
            | (_STREAMED if body.stream else 0)
            | (_MAY_WAIT if body.wait else 0),
        )
        verdict = await self._accepted(caller, move)
        if verdict.request_id == caller.request_id:
            self._remember(_placed(move, at))
        return _answer("held", verdict)

    async def deduct(self, caller: Caller, body: Deduct) -> Answer:
        """Charge at once, or refuse; as authorize."""
        principal, named = caller.principal, body.user_id
        user_id = principal.user_id if named is None else await self._payer(principal, named)
        quote = None if body.amount is not None else await self._quote(principal.organization_id, body)
        worth = _worth(body, quote, now(), Rounding.HALF_UP)
        flags = worth.flags | _ESTIMATED if body.estimated else worth.flags
        move = _move(caller, _DEDUCT, body, user_id, quote, worth, flags=flags)
        return _answer("charged", await self._accepted(caller, move))

    async def extend(self, caller: Caller, body: Extend) -> Answer:
        """Renew the lease and note progress, which is kept also where holding more is refused.

        Raises:
            HoldNotFound, HoldEnded; refusals as of authorize.
        """
        request_id, placed = await self._find(caller.principal, body.request_id)
        at = placed.placed_at
        quote = await self._pinned(placed, body, body.so_far)
        total = _worth(body, quote, at, Rounding.UP) if body.amount or body.usage else _Sum(NOTHING)
        mark = NOTHING if body.so_far is None else _worth(body.so_far, quote, at, Rounding.UP, "#/so_far").micros
        move = _move_again(
            caller,
            _EXTEND,
            request_id,
            placed,
            total,
            mark_micros=mark,
            lease_seconds=body.lease_seconds,
            flags=total.flags | _IN_ALL | (_SENT if body.sent else 0),
        )
        verdict = await self._accepted(caller, move)
        return _answer("held", verdict)

    async def settle(self, caller: Caller, body: Settle) -> Answer:
        """Charge what was used, whatever was held; a hold that its lease has ended is charged all the same.

        Raises:
            HoldNotFound, InvalidRequest, NoPoolForRequest, Unavailable
        """
        request_id, placed = await self._find(caller.principal, body.request_id)
        worth = _worth(body, await self._pinned(placed, body), placed.placed_at, Rounding.HALF_UP)
        flags = worth.flags | _ESTIMATED if body.estimated else worth.flags
        move = _move_again(caller, _SETTLE, request_id, placed, worth, flags=flags)
        verdict = await self._accepted(caller, move)
        self._placed.pop(request_id, None)
        return _answer("charged", verdict)

    async def release(self, caller: Caller, body: Release) -> Answer:
        """Free the hold and charge nothing; once more, it answers the same. It needs no idempotency key.

        Raises:
            HoldNotFound
            HoldEnded: it was charged.
        """
        request_id, placed = await self._find(caller.principal, body.request_id)
        nothing = _Sum(NOTHING, counts=NO_USAGE.as_array())
        move = _move_again(caller, _RELEASE, request_id, placed, nothing, flags=nothing.flags)
        verdict = await self._batcher.ask(move._replace(idempotency_key=None, body_hash=None))
        self._placed.pop(request_id, None)
        if verdict.outcome == Outcome.NO_HOLD:
            ended = await self._read(placed.organization_id, request_id)
            if ended is not None and ended.state == "charged":
                raise HoldEnded("It was charged", headers={"x-should-retry": "false"})
        return _answer("released", verdict)

    async def _payer(self, principal: Principal, named: str | None) -> UUID | None:
        """Whom to charge: the key's own person, or of a service key whom the body names, or nobody in particular."""
        if named is None:
            return principal.user_id
        user_id = read_id(named, "usr", "#/user_id")
        if user_id == principal.user_id:
            return user_id
        if principal.user_id is not None:
            raise NotForOthers("Use a service key to charge somebody by name", headers={"x-should-retry": "false"})
        # Of somebody who never was here nothing is kept; who was and is no more is refused by the books.
        member = (principal.organization_id, user_id)
        if member not in self._members:
            async with self._database.tenant(principal.organization_id) as conn:
                await get_membership(conn, organization_id=principal.organization_id, user_id=user_id)
            _keep(self._members, member, None)
        return user_id

    async def _quote(self, organization_id: UUID, body: Charge) -> Quote:
        """How usage is priced."""
        if body.usage is None:
            raise _invalid("#", "an amount or usage is required")
        if body.provider is None or body.model is None:
            raise _invalid("#/usage", "usage is priced by provider and model, which are required with it")
        _check_name(body.provider, "#/provider")
        _check_name(body.model, "#/model")
        return await self._book.quote(organization_id=organization_id, provider=body.provider, model=body.model)

    async def _pinned(self, placed: Placed, *bodies: Worth | None) -> Quote | None:
        """The price of the instant at which the hold was placed; None where nothing is to be priced."""
        if not any(body is not None and body.usage and body.amount is None for body in bodies):
            return None
        if placed.provider is None or placed.model is None:
            raise _invalid("#/usage", "it was held without provider and model: give an amount")
        return await self._book.quote(
            organization_id=placed.organization_id, provider=placed.provider, model=placed.model, at=placed.placed_at
        )

    async def _find(self, principal: Principal, text: str) -> tuple[UUID, Placed]:
        """A hold of this organization that a program placed, also one that has ended."""
        request_id = read_id(text, "req", "#/request_id")
        placed = self._placed.get(request_id)
        if placed is None:
            placed = await self._read(principal.organization_id, request_id)
        if placed is None or placed.organization_id != principal.organization_id:
            raise HoldNotFound(headers={"x-should-retry": "false"})
        return request_id, placed

    async def _read(self, organization_id: UUID, request_id: UUID) -> Placed | None:
        async with self._database.tenant(organization_id) as conn:
            return await db.fetch_optional(
                conn, Placed, QUERIES.reported_hold, organization_id=organization_id, request_id=request_id
            )

    def _remember(self, placed: tuple[UUID, Placed]) -> None:
        _keep(self._placed, *placed)

    async def _accepted(self, caller: Caller, move: Move) -> Verdict:
        """The verdict, if it is in favor."""
        verdict = await self._batcher.ask(move)
        if verdict.accepted:
            return verdict
        if verdict.outcome == Outcome.KEY_REUSED:
            raise KeyReused(headers={"x-should-retry": "false"})
        if verdict.outcome == Outcome.NO_HOLD:
            raise HoldEnded("It was settled or released, or its lease was over", headers={"x-should-retry": "false"})
        async with self._database.tenant(move.organization_id) as conn:
            answer = await why.why(
                conn,
                organization_id=move.organization_id,
                user_id=move.user_id,
                api_key_id=move.api_key_id,
                model=move.model or "",
                feature=move.feature,
                wanted_micros=move.amount_micros,
            )
            answer = why.decided(answer, code=verdict.detail or "pool_exhausted", binding_id=verdict.binding_id)
        raise why.refusal(answer, organization=caller.principal.organization_slug)


def read_id(text: str, prefix: str, pointer: str) -> UUID:
    """An id as the API writes it, or a plain UUID.

    Raises:
        InvalidRequest
    """
    try:
        return UUID(text.removeprefix(f"{prefix}_"))
    except ValueError:
        raise _invalid(pointer, f"{prefix}_… is required") from None


def _worth(
    body: Worth, quote: Quote | None, at: datetime, rounding: Rounding, pointer: str = "#", *, input_only: bool = False
) -> _Sum:
    """What a body names or its usage comes to. input_only: without what is put out."""
    if body.amount is not None:
        micros = _micros(body.amount, pointer)
        cost = NO_COST if body.provider_cost is None else _dollars(body.provider_cost, pointer)
        return _Sum(micros, cost) if body.usage is None else _sum(micros, cost, _usage(body.usage, pointer))
    if body.usage is None or quote is None:
        raise _invalid(pointer, "an amount or usage is required")
    usage = _usage(body.usage, pointer)
    if body.provider_cost is not None:
        raise _invalid(f"{pointer}/provider_cost", "comes with an amount; of usage the price book knows it")
    if input_only:
        usage = usage.but(output_tokens=0, reasoning_tokens=0, audio_output_tokens=0, image_output_tokens=0)
    context: Mapping[str, str] = body.context or {}
    quote.require_priced(usage, context=context, at=at)
    priced = quote.price(usage, context=context, at=at, rounding=rounding)
    if priced.charged_micros > MOST_MICROS:
        raise _invalid(f"{pointer}/usage", "comes to more than a billion credits")
    flags = _REPORTED | _UNPRICED if priced.unpriced_kinds else _REPORTED
    return _sum(priced.charged_micros, priced.provider_cost_nano_usd, usage, flags)


def _sum(micros: Micros, cost: NanoUsd, usage: Usage, flags: int = _REPORTED) -> _Sum:
    return _Sum(micros, cost, usage.as_array(), usage.total_tokens, flags)


def _usage(counts: Mapping[str, int], pointer: str) -> Usage:
    """One request, unless it says otherwise."""
    unknown = counts.keys() - _KINDS
    if unknown:
        raise _invalid(f"{pointer}/usage", f"kinds of usage are {', '.join(USAGE_KINDS)}")
    try:
        return Usage(**counts)
    except ValueError as error:
        raise _invalid(f"{pointer}/usage", str(error).partition(":")[0]) from None


_KINDS: Final = frozenset(USAGE_KINDS)


def _micros(amount: Credits, pointer: str) -> Micros:
    try:
        micros = parse_credits(amount.amount) if amount.unit == "credit" else _whole(amount.amount)
    except NotAnAmount as error:
        raise _invalid(f"{pointer}/amount", str(error)) from None
    if not 0 <= micros <= MOST_MICROS:
        raise _invalid(f"{pointer}/amount", "from zero to a billion credits are taken")
    return micros


def _whole(text: str) -> Micros:
    if not (text.isascii() and text.isdigit()):
        raise NotAnAmount(f"not a whole number of micros: {text[:40]!r}")
    return Micros(int(text))


def _dollars(cost: Dollars, pointer: str) -> NanoUsd:
    try:
        nano_usd = parse_usd(cost.amount)
    except NotAnAmount as error:
        raise _invalid(f"{pointer}/provider_cost", str(error)) from None
    if not 0 <= nano_usd <= MOST_MICROS:
        raise _invalid(f"{pointer}/provider_cost", "from zero to a million dollars are taken")
    return nano_usd


def _move(
    caller: Caller,
    action: Action,
    body: Charge,
    user_id: UUID | None,
    quote: Quote | None,
    worth: _Sum,
    **fields: Any,
) -> Move:
    """A move that begins a request."""
    provider, model = (body.provider, body.model) if quote is None else (quote.provider, quote.model)
    if provider is not None:
        _check_name(provider, "#/provider")
    if model is not None:
        _check_name(model, "#/model")
    conversation_id = (
        None if body.conversation_id is None else read_id(body.conversation_id, "conv", "#/conversation_id")
    )
    principal = caller.principal
    return Move(
        action,
        principal.organization_id,
        caller.request_id,
        user_id,
        principal.api_key_id,
        worth.micros,
        worth.tokens,
        worth.cost,
        worth.counts,
        provider=provider,
        model=model,
        price_version_id=None if quote is None else quote.price_version_id,
        conversation_id=conversation_id,
        idempotency_key=caller.idempotency_key,
        body_hash=caller.body_hash,
        feature=body.feature,
        **fields,
    )


def _move_again(caller: Caller, action: Action, request_id: UUID, placed: Placed, worth: _Sum, **fields: Any) -> Move:
    """A further move of a request."""
    return Move(
        action,
        placed.organization_id,
        request_id,
        placed.user_id,
        placed.api_key_id,
        worth.micros,
        worth.tokens,
        worth.cost,
        worth.counts,
        provider=placed.provider,
        model=placed.model,
        price_version_id=placed.price_version_id,
        conversation_id=placed.conversation_id,
        idempotency_key=caller.idempotency_key,
        body_hash=caller.body_hash,
        feature=placed.feature,
        **fields,
    )


def _placed(move: Move, at: datetime) -> tuple[UUID, Placed]:
    placed = Placed(
        move.organization_id,
        "held",
        move.user_id,
        move.api_key_id,
        move.provider,
        move.model,
        move.price_version_id,
        move.conversation_id,
        at,
        move.feature,
    )
    return move.request_id, placed


def _keep(cache: OrderedDict[Any, Any], key: Any, value: Any) -> None:
    cache[key] = value
    if len(cache) > MOST_REMEMBERED:
        cache.popitem(last=False)


def _check_name(text: str, pointer: str) -> None:
    """PostgreSQL takes no NUL, and one such name would spoil a whole batch."""
    if not text.isprintable():
        raise _invalid(pointer, "a name of printable characters is required")


def _invalid(pointer: str, detail: str) -> InvalidRequest:
    return InvalidRequest(errors=[FieldError(pointer, detail)])


def _answer(state: Literal["held", "charged", "released"], verdict: Verdict) -> Answer:
    return Answer(
        request_id=f"req_{verdict.request_id.hex}",
        state=state,
        held=_credits(verdict.held_micros) if state == "held" else _NO_CREDITS,
        charged=_credits(verdict.charged_micros) if state == "charged" else _NO_CREDITS,
        available=None if verdict.available_micros is None else _credits(verdict.available_micros),
    )


def _credits(amount: Micros) -> Credits:
    return Credits(amount=format_credits(amount), unit="credit")


_NO_CREDITS: Final = _credits(NOTHING)


assert MOST_COUNT * 2 < 2**32
assert MOST_MICROS < LARGEST
