"""What if: a real past told again under other prices, caps or grants, through the real money functions.

The organization's people, pools, grants, shares and caps are made again on a stage, at the instants at which they were
made. What was used before `since` is charged as it was; from then on each request is asked for with what it cost, or
would cost, and is refused where a limit has no room.
"""

import heapq
from bisect import bisect_right
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import groupby
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar import db
from bursar.clock import uuid7
from bursar.credits.moves import Action, Flag, Move, Outcome, Verdict
from bursar.credits.pools import PoolKind
from bursar.money import Micros, divide_half_up
from bursar.pricing.book import ModelNotPriced, PriceBook, Quote
from bursar.pricing.lists import PriceList
from bursar.pricing.prices import PriceVersion
from bursar.problems import Problem
from bursar.simulation.figures import Figures, look
from bursar.simulation.past import (
    Asker,
    Past,
    PastAllocation,
    PastGrant,
    PastLimit,
    PastRefusal,
    PastRequest,
    PastSum,
    read_past,
    requests_of,
)
from bursar.simulation.stage import QUERIES, Actor, Cast, Stage, opened_stage

MOST_IN_A_BATCH: Final = 500
UNCHARGED: Final = Flag.OWN_KEY | Flag.UNPRICED


class CannotBeReplayed(Problem):
    """The past cannot be told again in this way."""

    status, code, title = 422, "cannot_be_replayed", "This past cannot be told again"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewCap:
    """A cap that is tried; in force from `since` on. It takes the place of a cap of the same kind."""

    scope: str
    scope_id: UUID | None
    metric: str
    amount: int
    period: str
    model_filter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewGrant:
    """Credits that are tried, in the organization's first pool; from `since` on where no instant is named."""

    amount_micros: Micros
    effective_at: datetime | None = None
    expires_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """What is tried. prices: of models that a file names; without_caps: None takes every cap away."""

    prices: PriceList | None = None
    markup_ppm: int | None = None
    caps: Sequence[NewCap] = ()
    without_caps: frozenset[UUID] | None = frozenset()
    grants: Sequence[NewGrant] = ()
    without_grants: frozenset[UUID] = frozenset()


@dataclass(slots=True)
class Sums:
    """Requests, and micros that were charged, would be charged, and would be refused."""

    requests: int = 0
    charged: int = 0
    new_charged: int = 0
    refused: int = 0
    refused_micros: int = 0


@dataclass(frozen=True, slots=True)
class FirstRefusal:
    """The first request that would be refused."""

    request_id: UUID
    at: datetime
    user: str
    model: str
    amount: Micros
    code: str
    binding: str | None


@dataclass(slots=True)
class Replayed:
    """What would have come of it. let_through: of the requests that were refused, those that would have been held."""

    zone: str
    total: Sums = field(default_factory=Sums)
    days: dict[str, Sums] = field(default_factory=dict)
    users: dict[str, Sums] = field(default_factory=dict)
    models: dict[str, Sums] = field(default_factory=dict)
    bindings: dict[str, Sums] = field(default_factory=dict)
    first_refusal: FirstRefusal | None = None
    once_refused: int = 0
    let_through: int = 0
    let_through_micros: int = 0
    end: Figures | None = None
    pool_names: dict[UUID, str] = field(default_factory=dict)
    not_priced: dict[str, int] = field(default_factory=dict)
    untold: tuple[str, ...] = ()


Progress = Callable[[int], None]


async def replay(
    database: db.Database,
    *,
    organization_id: UUID,
    since: datetime,
    until: datetime,
    change: Change,
    progress: Progress = lambda _: None,
) -> Replayed:
    """Tell the past again. progress: called with how many requests more are told.

    Raises:
        CannotBeReplayed: nothing lies between the instants.
    """
    if since >= until:
        raise CannotBeReplayed("`since` must lie before `until`")
    async with database.platform() as conn:
        past = await read_past(conn, organization_id=organization_id, since=since, until=until)
        begins = min(
            [past.told_from, *(each.created_at for each in past.grants), *(each.booked_at for each in past.sums)]
        )
        stand_ins = _StandIns(past)
        async with opened_stage(database, zone=past.zone, at=begins, cast=stand_ins.cast()) as stage:
            teller = _Teller(stage, past, change, stand_ins, _Prices(database, organization_id, change))
            await teller.open(begins)
            await teller.run(requests_of(conn, past), progress)
            return await teller.end()


# ---------------------------------------------------------------------------------------------- who asks


class _StandIns:
    """A key for each user, key, team and department that ever came together, so that caps of teams and departments
    count those of the time of use. A key's caps count all its stand-ins, as they count the keys that it is rotated to.
    """

    def __init__(self, past: Past) -> None:
        self._names = past.names
        self._originals = past.originals
        self._base: dict[UUID, UUID] = {}
        self._keys: dict[Asker, Actor] = {}
        self._users: set[UUID] = {each.user_id for each in past.allocations}
        self._users |= {pool.owner_user_id for pool in past.pools if pool.owner_user_id}
        self._users |= {limit.scope_id for limit in past.limits if limit.scope == "user" and limit.scope_id}
        self._places: dict[str, set[UUID]] = {"team": set(), "department": set()}
        for limit in past.limits:
            if limit.scope in self._places and limit.scope_id:
                self._places[limit.scope].add(limit.scope_id)
            if limit.within_scope in self._places and limit.within_id:
                self._places[limit.within_scope].add(limit.within_id)
        for asker in past.askers:
            self.of(asker)

    def of(self, asker: Asker) -> Actor:
        """The key through which an asker asks on the stage."""
        if asker not in self._keys:
            original = self.base(asker.api_key_id) if asker.api_key_id else None
            for kind, place in (("team", asker.team_id), ("department", asker.department_id)):
                if place:
                    self._places[kind].add(place)
            if asker.user_id:
                self._users.add(asker.user_id)
            self._keys[asker] = Actor(
                id=uuid7(), name="stand-in", team=asker.team_id, department=asker.department_id,
                user=asker.user_id, original=original,
            )  # fmt: skip
        return self._keys[asker]

    def base(self, api_key_id: UUID) -> UUID:
        """What stands in caps for a key and all that it was rotated to."""
        return self._base.setdefault(self._originals.get(api_key_id, api_key_id), uuid7())

    def cast(self) -> Cast:
        """All of them, for the stage; the keys that others were rotated from first."""
        bases = [Actor(id=identifier, name="key") for identifier in self._base.values()]
        return Cast(
            departments={each: self._names.get(each, str(each)) for each in self._places["department"]},
            teams={each: self._names.get(each, str(each)) for each in self._places["team"]},
            users=[Actor(id=each, name=self._names.get(each, str(each))) for each in self._users],
            keys=[*bases, *self._keys.values()],
        )


# ---------------------------------------------------------------------------------------------- what it costs


class _Prices:
    """What a request would cost: by the price of its time of use, unless the change says another."""

    def __init__(self, database: db.Database, organization_id: UUID, change: Change) -> None:
        self._book = PriceBook(database, refresh_seconds=3600)
        self._organization_id = organization_id
        self._markup_ppm = change.markup_ppm
        self._quotes: dict[tuple[str, str], Quote] = {}
        self._new: dict[tuple[str, str], tuple[list[datetime], list[PriceVersion | None]]] = {}
        for model in change.prices.models if change.prices else ():
            versions = [
                PriceVersion(
                    uuid7(), "tried", model.provider, model.model, each.effective_from, each.prices.rates,
                    each.prices.variants,
                )
                if each.prices
                else None
                for each in model.segments
            ]  # fmt: skip
            self._new[model.key] = [each.effective_from for each in model.segments], versions
        self.not_priced: dict[str, int] = {}

    async def charge(self, request: PastRequest) -> Micros:
        """The new price; of a request that did not cost exactly the old one, in proportion. Rounded half-up."""
        is_changed = self._markup_ppm is not None or (request.provider, request.model) in self._new
        if not is_changed or request.flags & UNCHARGED or request.provider is None or request.model is None:
            return request.charged
        key = (request.provider, request.model)
        try:
            quote = await self._quote(key, request.used_at)
        except ModelNotPriced:
            self.not_priced[request.model] = self.not_priced.get(request.model, 0) + 1
            return request.charged
        tried = self._version(key, request.used_at) or quote.charge
        if quote.charge is None or quote.cost is None or tried is None:
            return request.charged
        old = quote.price(request.usage, at=request.used_at).charged_micros
        new = _priced(quote, tried, self._markup_ppm, request)
        if old == request.charged or not old:
            return new
        return Micros(divide_half_up(request.charged * new, old))

    def _version(self, key: tuple[str, str], at: datetime) -> PriceVersion | None:
        starts, versions = self._new.get(key, ([], []))
        place = bisect_right(starts, at) - 1
        return versions[place] if place >= 0 else None

    async def _quote(self, key: tuple[str, str], at: datetime) -> Quote:
        quote = self._quotes.get(key)
        if quote is None or not quote.holds(at):
            quote = self._quotes[key] = await self._book.quote(
                organization_id=self._organization_id, provider=key[0], model=key[1], at=at
            )
        return quote


def _priced(quote: Quote, charge: PriceVersion, markup_ppm: int | None, request: PastRequest) -> Micros:
    tried = replace(quote, charge=charge, markup_ppm=quote.markup_ppm if markup_ppm is None else markup_ppm)
    return tried.price(request.usage, at=request.used_at).charged_micros


# ---------------------------------------------------------------------------------------------- telling it


@dataclass(frozen=True, slots=True, order=True)
class _Event:
    """Something that happened at an instant besides requests. number: the order in which they are told."""

    at: datetime
    number: int
    run: Callable[[datetime], Awaitable[None]] = field(compare=False)


class _Teller:
    """Tells one past on a stage."""

    def __init__(self, stage: Stage, past: Past, change: Change, stand_ins: _StandIns, prices: _Prices) -> None:
        self._stage = stage
        self._past = past
        self._change = change
        self._stand_ins = stand_ins
        self._prices = prices
        self._zone = ZoneInfo(past.zone)
        self._pools: dict[UUID, UUID] = {}
        self._grants: dict[UUID, UUID] = {}
        self._shares: dict[UUID, UUID] = {}
        self._caps: dict[UUID, UUID] = {}
        self._bindings: dict[UUID, str] = {}
        self._events: list[_Event] = []
        self.told = Replayed(past.zone, untold=past.untold)

    async def open(self, at: datetime) -> None:
        """The pools, and everything that happens besides requests in line."""
        await self._stage.fetch(QUERIES.set_cycle, anchor=self._past.anchored_at, at=at)
        for pool in self._past.pools:
            identifier = await self._stage.open_pool(
                name=pool.name, kind=PoolKind(pool.kind), user_id=pool.owner_user_id, models=pool.model_filter, at=at
            )
            self._pools[pool.pool_id] = identifier
            self._bindings[identifier] = self.told.pool_names[identifier] = pool.name
            open_part = await self._stage.fetch(QUERIES.open_part, pool_id=identifier)
            if open_part is not None:
                self._bindings[open_part] = f"{pool.name}: what nobody reserved"
        self._events = [_Event(at, number, run) for number, (at, run) in enumerate(self._line())]
        heapq.heapify(self._events)

    def _line(self) -> Iterator[tuple[datetime, Callable[[datetime], Awaitable[None]]]]:
        past, change = self._past, self._change
        for grant in past.grants:
            if grant.grant_id not in change.without_grants:
                yield grant.created_at, _with(self._grant, grant)
                if grant.voided_at:
                    yield grant.voided_at, _with(self._void, grant)
        for tried in change.grants:
            yield past.since, _with(self._new_grant, tried)
        for share in past.allocations:
            yield share.created_at, _with(self._allocate, share)
            if share.ended_at:
                yield share.ended_at, _with(self._end_share, share)
        tried_kinds = {(*_kind(cap), False, False) for cap in change.caps}
        for limit in past.limits:
            if change.without_caps is None or limit.limit_id in change.without_caps:
                continue
            # From `since` on a cap of a kind that is tried is the tried one, whatever became of it then.
            lasts = (*_kind(limit), limit.is_default, limit.action == "warns") not in tried_kinds
            if lasts or limit.created_at < past.since:
                yield limit.created_at, _with(self._limit, limit)
                if limit.ended_at and (lasts or limit.ended_at <= past.since):
                    yield limit.ended_at, _with(self._end_limit, limit)
        for cap in change.caps:
            yield past.since, _with(self._new_cap, cap)

    # What was granted and limited

    async def _must(self, sql: str, at: datetime, **params: Any) -> None:
        await self._stage.fetch(sql, at=at, **params)

    async def _grant(self, grant: PastGrant, at: datetime) -> None:
        identifier = self._grants[grant.grant_id] = uuid7()
        await self._must(
            QUERIES.add_grant, at, grant_id=identifier, pool_id=self._pools[grant.pool_id], source=grant.source,
            amount=grant.amount_micros, priority=grant.priority, is_free=grant.is_free,
            cost_basis=grant.cost_basis_nano_usd, effective_at=grant.effective_at, expires_at=grant.expires_at,
            name=grant.reason, key=self._stage.new_key(), least=grant.least, most=grant.most,
            rollover_expires_at=grant.rollover_expires_at,
        )  # fmt: skip

    async def _new_grant(self, grant: NewGrant, at: datetime) -> None:
        if not self._pools:
            raise CannotBeReplayed("the organization had no pool yet")
        await self._must(
            QUERIES.add_grant, at, grant_id=uuid7(), pool_id=next(iter(self._pools.values())), source="purchase",
            amount=grant.amount_micros, priority=100, is_free=False, cost_basis=0, effective_at=grant.effective_at,
            expires_at=grant.expires_at, name="tried", key=self._stage.new_key(), least=None, most=None,
            rollover_expires_at=None,
        )  # fmt: skip

    async def _void(self, grant: PastGrant, at: datetime) -> None:
        await self._must(QUERIES.void_grant, at, grant_id=self._grants[grant.grant_id], key=self._stage.new_key())

    async def _allocate(self, share: PastAllocation, at: datetime) -> None:
        identifier = self._shares[share.allocation_id] = uuid7()
        self._bindings[identifier] = f"share of {self._name(share.user_id)}"
        await self._must(
            QUERIES.allocate, at, allocation_id=identifier, pool_id=self._pools[share.pool_id], user_id=share.user_id,
            kind=share.kind, period=share.period, amount=share.amount_micros, when_empty=share.when_empty,
            carry=share.carry_micros, oversubscribe=True, key=self._stage.new_key(),
        )  # fmt: skip

    async def _end_share(self, share: PastAllocation, at: datetime) -> None:
        await self._must(QUERIES.end_allocation, at, allocation_id=self._shares[share.allocation_id])

    async def _limit(self, limit: PastLimit, at: datetime) -> None:
        identifier = self._caps[limit.limit_id] = uuid7()
        scope_id = self._scope_id(limit.scope, limit.scope_id)
        self._bindings[identifier] = self._cap_name(limit.scope, limit.scope_id, limit.metric, limit.period)
        await self._must(
            QUERIES.set_past_limit, at, limit_id=identifier, scope=limit.scope, scope_id=scope_id, metric=limit.metric,
            models=limit.model_filter, period=limit.period, amount=limit.amount, action=limit.action,
            is_default=limit.is_default, within_scope=limit.within_scope, within_id=limit.within_id,
        )  # fmt: skip

    async def _end_limit(self, limit: PastLimit, at: datetime) -> None:
        await self._must(QUERIES.end_limit, at, limit_id=self._caps[limit.limit_id])

    async def _new_cap(self, cap: NewCap, at: datetime) -> None:
        identifier = uuid7()
        name = f"tried: {self._cap_name(cap.scope, cap.scope_id, cap.metric, cap.period)}"
        found = await self._stage.fetch(
            QUERIES.set_past_limit, at=at, limit_id=identifier, scope=cap.scope,
            scope_id=self._scope_id(cap.scope, cap.scope_id), metric=cap.metric, models=cap.model_filter,
            period=cap.period, amount=cap.amount, action="stops", is_default=False, within_scope=None, within_id=None,
        )  # fmt: skip
        self._bindings[found] = name

    def _scope_id(self, scope: str, scope_id: UUID | None) -> UUID | None:
        return self._stand_ins.base(scope_id) if scope == "key" and scope_id else scope_id

    def _cap_name(self, scope: str, scope_id: UUID | None, metric: str, period: str) -> str:
        of = f" {self._name(scope_id)}" if scope_id else ""
        return f"{scope}{of}: {metric}" + ("" if period == "none" else f" per {period}")

    def _name(self, identifier: UUID | None) -> str:
        return "" if identifier is None else self._past.names.get(identifier, str(identifier))

    # What was used

    async def run(self, requests: AsyncIterator[PastRequest], progress: Progress) -> None:
        """All of it, in order."""
        for _, day in groupby(self._past.sums, key=lambda each: each.booked_at.astimezone(self._zone).date()):
            await self._tell_sums(list(day))
        refusals = iter(self._past.refusals)
        refusal = next(refusals, None)
        batch: list[PastRequest] = []
        async for request in requests:
            while refusal is not None and refusal.happened_at <= request.booked_at:
                await self._flush(batch)
                await self._try_refused(refusal)
                refusal = next(refusals, None)
            if batch and (len(batch) == MOST_IN_A_BATCH or self._is_cut(batch[0], request)):
                progress(len(batch))
                await self._flush(batch)
            batch.append(request)
        progress(len(batch))
        await self._flush(batch)
        while refusal is not None:
            await self._try_refused(refusal)
            refusal = next(refusals, None)

    def _is_cut(self, first: PastRequest, request: PastRequest) -> bool:
        """Whether something lies between them that changes what may be spent: a day's end, an event, `since`."""
        a, b = first.booked_at, request.booked_at
        if (a < self._past.since) != (b < self._past.since):
            return True
        if self._events and self._events[0].at <= b:
            return True
        return a.astimezone(self._zone).date() != b.astimezone(self._zone).date()

    async def _until(self, at: datetime) -> None:
        """Everything that happened until an instant, and at it."""
        while self._events and self._events[0].at <= at:
            event = heapq.heappop(self._events)
            await event.run(event.at)

    async def _tell_sums(self, day: list[PastSum]) -> None:
        """What was used on a day, between what else happened on it."""
        while day:
            await self._until(day[0].booked_at)
            count = 1
            while count < len(day) and not (self._events and self._events[0].at <= day[count].booked_at):
                count += 1
            moves = [
                self._move(Action.SETTLE, uuid7(), each.asker, each.model, each.feature, each.charged, each.booked_at)
                for each in day[:count]
            ]
            self._accepted(await self._stage.move(moves, day[count - 1].booked_at))
            del day[:count]

    async def _flush(self, batch: list[PastRequest]) -> None:
        """Tell a batch; it is empty afterwards."""
        if not batch:
            return
        at = batch[-1].booked_at
        await self._until(at)
        is_asked = batch[0].booked_at >= self._past.since
        charges = [await self._prices.charge(each) if is_asked else each.charged for each in batch]
        action = Action.DEDUCT if is_asked else Action.SETTLE
        moves = [
            self._move(action, each.request_id, each.asker, each.model, each.feature, charge, each.used_at, each)
            for each, charge in zip(batch, charges, strict=True)
        ]
        verdicts = await self._stage.move(moves, at)
        if not is_asked:
            self._accepted(verdicts)
        else:
            for each, charge, verdict in zip(batch, charges, verdicts, strict=True):
                self._count(each, charge, verdict)
        batch.clear()

    async def _try_refused(self, refusal: PastRefusal) -> None:
        """Would it be held now? What it would have cost nobody knows, so that it is released at once."""
        at = refusal.happened_at
        await self._until(at)
        self.told.once_refused += 1
        asker = Asker(refusal.user_id, refusal.api_key_id, None, None)
        hold = self._move(
            Action.AUTHORIZE, refusal.request_id, asker, refusal.model, refusal.feature, refusal.wanted_micros, at
        )
        [verdict] = await self._stage.move([hold._replace(lease_seconds=60)], at)
        if verdict.accepted:
            self.told.let_through += 1
            self.told.let_through_micros += refusal.wanted_micros
            await self._stage.move([hold._replace(action=Action.RELEASE)], at)

    def _move(
        self, action: Action, request_id: UUID, asker: Asker, model: str | None, feature: str | None, amount: Micros,
        used_at: datetime, request: PastRequest | None = None,
    ) -> Move:  # fmt: skip
        return Move(
            action, self._stage.organization_id, request_id,
            user_id=asker.user_id, api_key_id=self._stand_ins.of(asker).id, amount_micros=amount, model=model,
            feature=feature, tokens=request.usage.total_tokens if request else 0, used_at=used_at,
            flags=Flag(request.flags & Flag.OWN_KEY) if request else Flag.NONE,
        )  # fmt: skip

    @staticmethod
    def _accepted(verdicts: Sequence[Verdict]) -> None:
        for verdict in verdicts:
            if not verdict.accepted:
                raise CannotBeReplayed(f"what was charged cannot be charged again: {verdict.detail}")

    def _count(self, request: PastRequest, charge: Micros, verdict: Verdict) -> None:
        told = self.told
        day = request.used_at.astimezone(self._zone).date().isoformat()
        user, model = self._name(request.asker.user_id) or "(services)", request.model or "(none)"
        kept = [
            told.total,
            *(g.setdefault(n, Sums()) for g, n in ((told.days, day), (told.users, user), (told.models, model))),
        ]
        if not verdict.accepted:
            binding = self._binding(verdict)
            kept.append(told.bindings.setdefault(binding, Sums()))
            if told.first_refusal is None:
                code = verdict.detail or verdict.outcome.name.lower()
                told.first_refusal = FirstRefusal(
                    request.request_id, request.used_at, user, model, charge, code, binding
                )
        for sums in kept:
            sums.requests += 1
            sums.charged += request.charged
            if verdict.accepted:
                sums.new_charged += charge
            else:
                sums.refused += 1
                sums.refused_micros += charge

    def _binding(self, verdict: Verdict) -> str:
        found = self._bindings.get(verdict.binding_id) if verdict.binding_id else None
        return found or verdict.detail or Outcome(verdict.outcome).name.lower()

    async def end(self) -> Replayed:
        """What came of it."""
        last = self._past.until - timedelta(microseconds=1)
        await self._until(last)
        self.told.end = await look(self._stage, last)
        self.told.not_priced = self._prices.not_priced
        return self.told


def _kind(cap: NewCap | PastLimit) -> tuple[object, ...]:
    """What makes a cap take another one's place, its action aside."""
    return cap.scope, cap.scope_id, cap.metric, cap.period, cap.model_filter


def _with(run: Callable[[Any, datetime], Awaitable[None]], part: Any) -> Callable[[datetime], Awaitable[None]]:
    return lambda at: run(part, at)
