"""The price that counts for a request: for an organization, a provider, a model and an instant.

`PriceBook` answers from memory. It asks the database for the book's revision at most every few seconds, forgets all
that it knows when that has risen, and loads again what is asked for; no list, library or network is ever asked. So a
price that takes effect at once is charged everywhere within those seconds; one that was entered ahead takes effect at
its very instant. A request keeps the quote that it was authorized with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from time import monotonic
from typing import Any, Final, Literal, NoReturn, TypeVar
from uuid import UUID

from bursar import clock, db
from bursar.money import Micros, NanoUsd
from bursar.pricing.models import Candidate, ModelName, NameIndex, ProviderName
from bursar.pricing.prices import PAR_PPM, Context, Priced, PriceVersion, Rounding, price_apart, price_in_batch
from bursar.pricing.terms import Terms, UnknownModelPolicy, load_terms
from bursar.pricing.usage import REASONING_TOKENS, REQUESTS, USAGE_KINDS, Usage
from bursar.pricing.versions import QUERIES, VersionRow
from bursar.problems import Problem

REFRESH_SECONDS: Final = 2.0
LONGEST_NAME: Final = 200
MOST_ANSWERS: Final = 50_000
"""A cache that is full is emptied; names that nobody prices cannot fill the memory."""

_BEGINNING: Final = datetime.min.replace(tzinfo=UTC)

_USUAL: Final[Mapping[str, frozenset[str]]] = {
    "service_tier": frozenset(("auto", "default", "standard", "standard_only", "on_demand", "flex", "batch")),
    "speed": frozenset(("standard",)),
    "inference_geo": frozenset(("global",)),
    "memory_limit": frozenset(("1g",)),
}
"""What costs no more than the standard price, by the condition. Sources: the service tiers of OpenAI, Anthropic and
Groq; Anthropic's price page, "Fast mode pricing" and "Data residency pricing"; OpenAI's prices of containers."""

Basis = Literal["list", "override", "fallback", "unpriced"]


class ModelNotPriced(Problem):
    """The price book has no price for a model, or none for what was asked of it, and no policy lets it pass."""

    status, code, title = 400, "model_not_priced", "This model has no price"


@dataclass(frozen=True, slots=True)
class Quote:
    """How requests of one organization for one model are priced, from one instant until the next change.

    model: as priced. charge: the price that is charged; cost: what the provider asks (the same, unless the
    organization has a price of its own); both None when a policy lets an unpriced model pass.
    valid_until: exclusive; None: nothing is known to change.
    """

    provider: str
    model: str
    basis: Basis
    charge: PriceVersion | None
    cost: PriceVersion | None
    markup_ppm: int
    passes_unpriced: bool
    has_context: bool
    context_window: int | None
    valid_from: datetime
    valid_until: datetime | None

    @property
    def price_version_id(self) -> UUID | None:
        """What a request keeps as the price used."""
        return None if self.charge is None else self.charge.price_version_id

    @property
    def is_unpriced(self) -> bool:
        """Charged nothing by a named policy."""
        return self.charge is None

    def holds(self, at: datetime) -> bool:
        """Is this the quote of an instant?"""
        return _holds(self.valid_from, self.valid_until, at)

    def price(
        self,
        usage: Usage,
        *,
        context: Context | None = None,
        at: datetime | None = None,
        rounding: Rounding = Rounding.HALF_UP,
    ) -> Priced:
        """What a request comes to. at: when it was authorized (now when None), for prices by the time of day."""
        if self.charge is None or self.cost is None:
            return Priced(Micros(0), NanoUsd(0), _used_kinds(usage))
        return price_apart(
            self.cost,
            self.charge,
            usage,
            self.markup_ppm,
            context=context if self.has_context else None,
            at=at or clock.now(),
            rounding=rounding,
        )

    def price_in_batch(
        self,
        usage: Usage,
        *,
        batch_ppm: int,
        at: datetime,
        context: Context | None = None,
        rounding: Rounding = Rounding.HALF_UP,
    ) -> Priced:
        """What a request inside a batch comes to. batch_ppm: for kinds that have no batch price: see `price_in_batch`.

        at: when the batch was made.
        """
        if self.charge is None or self.cost is None:
            return Priced(Micros(0), NanoUsd(0), _used_kinds(usage))
        return price_in_batch(
            self.cost,
            self.charge,
            usage,
            self.markup_ppm,
            batch_ppm=batch_ppm,
            context=(context or {}) if self.has_context else None,
            at=at,
            rounding=rounding,
        )

    def unpriced_kinds(self, usage: Usage, *, context: Context | None = None, at: datetime | None = None) -> list[str]:
        """Kinds of a usage for which the price says nothing; none where a policy lets the model pass without one."""
        if self.charge is None:
            return []
        context = context if self.has_context else None
        return self.charge.unpriced_kinds(usage, context=context, at=at or clock.now())

    def require_priced(
        self, usage: Usage, *, context: Context | None = None, at: datetime | None = None, tools: Sequence[str] = ()
    ) -> None:
        """Refuse what would come to zero, or to too little, because something that it uses has no price.

        tools: those of the provider whose use is none of our kinds, so that nothing can have a price for them.
        context: what may be dearer than the standard price needs one of its own.

        Raises:
            ModelNotPriced
        """
        if self.charge is None or self.passes_unpriced:
            return
        unpriced = [*self.unpriced_kinds(usage, context=context, at=at), *tools]
        for key, value in (context or {}).items():
            if value not in _USUAL.get(key, (value,)) and not (self.has_context and self.charge.tells(key, value)):
                unpriced.append(f"{key}={value[:60]}")
        if unpriced:
            raise _not_priced(self.provider, self.model, f"has no price for {', '.join(unpriced)}")


@dataclass(frozen=True, slots=True)
class _Refusal:
    """There is no price, from one instant until the next change."""

    provider: str
    model: str
    valid_from: datetime
    valid_until: datetime | None

    def holds(self, at: datetime) -> bool:
        return _holds(self.valid_from, self.valid_until, at)

    def refuse(self) -> NoReturn:
        raise _not_priced(self.provider, self.model, "has no price")


def _holds(valid_from: datetime, valid_until: datetime | None, at: datetime) -> bool:
    return valid_from <= at and (valid_until is None or at < valid_until)


def _used_kinds(usage: Usage) -> tuple[str, ...]:
    counts = usage.as_array()
    return tuple(
        kind for place, kind in enumerate(USAGE_KINDS) if counts[place] and place not in (REASONING_TOKENS, REQUESTS)
    )


def _not_priced(provider: str, model: str, what: str) -> ModelNotPriced:
    return ModelNotPriced(
        f"{model[:100]!r} of {provider[:100]} {what}.",
        why={
            "reason": "model_not_priced",
            "provider": provider,
            "model": model,
            "next_step": "The platform's operator can import a price or set a policy for unknown models.",
        },
    )


_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class PriceBook:
    """Quotes, from memory. One for each process; safe for any number of tasks of one event loop."""

    def __init__(self, database: db.Database, *, refresh_seconds: float = REFRESH_SECONDS) -> None:
        self._database = database
        self._refresh_seconds = refresh_seconds
        self._revision: int | None = None
        self._checked_at = float("-inf")
        self._pending: dict[object, asyncio.Future[Any]] = {}
        self._generation = 0
        self._forget()

    def _forget(self) -> None:
        # New dictionaries, not emptied ones: what is being loaded at this moment goes to the old ones and is lost.
        self._generation += 1
        self._answers: dict[tuple[UUID, str, str], Quote | _Refusal] = {}
        self._names: dict[str, _Names] = {}
        self._versions: dict[tuple[str, str], list[VersionRow]] = {}
        self._terms: dict[UUID, Terms] = {}

    def cached(self, *, organization_id: UUID, provider: str, model: str, at: datetime | None = None) -> Quote | None:
        """The quote if it is at hand, without waiting; None: ask `quote`.

        Raises:
            ModelNotPriced: it is at hand that there is none.
        """
        if monotonic() - self._checked_at > self._refresh_seconds:
            return None
        found = self._answers.get((organization_id, provider, model))
        if found is None or not found.holds(at or clock.now()):
            return None
        return found if isinstance(found, Quote) else found.refuse()

    async def quote(self, *, organization_id: UUID, provider: str, model: str, at: datetime | None = None) -> Quote:
        """How a request is priced. at: now when None.

        Raises:
            ModelNotPriced
        """
        if len(model) > LONGEST_NAME or len(provider) > LONGEST_NAME:
            raise _not_priced(provider[:LONGEST_NAME], model[:LONGEST_NAME], "has no price")
        at = at or clock.now()
        found = self.cached(organization_id=organization_id, provider=provider, model=model, at=at)
        if found is None:
            await self._refresh()
            answer = await self._answer(organization_id, provider, model, at)
            found = answer if isinstance(answer, Quote) else answer.refuse()
        return found

    async def list_price(self, *, provider: str, model: str, at: datetime | None = None) -> PriceVersion:
        """What a model costs everybody.

        Raises:
            ModelNotPriced
        """
        await self._refresh()
        listing = await self._listing(provider, model)
        found = listing.version(at or clock.now())
        if found is None:
            raise _not_priced(provider, model, "has no price")
        return found[0]

    async def _answer(self, organization_id: UUID, provider: str, model: str, at: datetime) -> Quote | _Refusal:
        answers = self._answers
        terms = await self._load_terms(organization_id)
        listing = await self._listing(provider, model)
        policy = terms.policy(at)
        fallback = None
        if policy is not None and policy.fallback_provider is not None and policy.fallback_model is not None:
            fallback = await self._listing(policy.fallback_provider, policy.fallback_model)
        answer = answer_for(provider, model, listing, terms, fallback, at)
        if answer.holds(clock.now()):
            if len(answers) >= MOST_ANSWERS:
                answers.clear()
            answers[organization_id, provider, model] = answer
        return answer

    async def _listing(self, provider: str, model: str) -> Listing:
        """All that the lists say about a name."""
        names = await self._load(self._names, "names", self._load_names)
        candidates = names.find(provider, model)
        rows: list[VersionRow] = []
        for candidate in candidates:
            rows += await self._load_versions(candidate.provider, candidate.model)
        return Listing(names.lists, candidates, tuple(rows), names.context_window(candidates))

    async def _refresh(self) -> None:
        """Forget everything if the book has changed; asked at most once in `refresh_seconds`."""
        if monotonic() - self._checked_at > self._refresh_seconds:
            await self._once("revision", self._check_revision)

    async def _check_revision(self) -> None:
        asked_at = monotonic()
        async with self._database.untenanted() as conn:
            revision: int = await db.fetch_value(conn, QUERIES.revision)
        if revision != self._revision:
            self._forget()
            self._revision = revision
        self._checked_at = asked_at

    async def _load_names(self) -> _Names:
        async with self._database.untenanted() as conn:
            lists = [each.list_name for each in await db.fetch_all(conn, _ListRow, QUERIES.lists)]
            providers = {
                name: await db.fetch_all(conn, ProviderName, QUERIES.provider_names_of_list, list_name=name)
                for name in lists
            }
            models = {
                name: await db.fetch_all(conn, ModelName, QUERIES.model_names_of_list, list_name=name) for name in lists
            }
        return _Names.of(lists, providers, models)

    async def _load_versions(self, provider: str, model: str) -> list[VersionRow]:
        async def load() -> list[VersionRow]:
            async with self._database.untenanted() as conn:
                return await db.fetch_all(conn, VersionRow, QUERIES.versions_of_model, provider=provider, model=model)

        return await self._load(self._versions, (provider, model), load)

    async def _load_terms(self, organization_id: UUID) -> Terms:
        async def load() -> Terms:
            async with self._database.tenant(organization_id) as conn:
                return await load_terms(conn, organization_id=organization_id)

        return await self._load(self._terms, organization_id, load)

    async def _load(self, cache: dict[_Key, _Value], key: _Key, load: Callable[[], Awaitable[_Value]]) -> _Value:
        """From the cache, else loaded once for all who ask. What is loaded while the book changes is not kept."""
        if key not in cache:
            cache[key] = await self._once((self._generation, key), load)
        return cache[key]

    async def _once(self, key: object, work: Callable[[], Awaitable[_Value]]) -> _Value:
        """Do some work once for all who wait for it now."""
        future: asyncio.Future[_Value] | None = self._pending.get(key)
        if future is None:
            future = self._pending[key] = asyncio.ensure_future(work())
            future.add_done_callback(lambda _: self._pending.pop(key, None))
        return await asyncio.shield(future)


@dataclass(frozen=True, slots=True)
class _ListRow:
    """A row of pricing.lists."""

    list_name: str
    rank: int


class _Names:
    """The names of all lists, the one with the highest rank first."""

    def __init__(self, lists: tuple[str, ...], indexes: list[NameIndex], windows: dict[tuple[str, str], int]) -> None:
        self.lists = lists
        self._indexes = indexes
        self._windows = windows

    @classmethod
    def of(
        cls, lists: Sequence[str], providers: dict[str, list[ProviderName]], models: dict[str, list[ModelName]]
    ) -> _Names:
        windows: dict[tuple[str, str], int] = {}
        for name in lists:
            for model in models[name]:
                if model.context_window is not None:
                    windows.setdefault((model.provider, model.model), model.context_window)
        return cls(tuple(lists), [NameIndex(providers[name], models[name]) for name in lists], windows)

    def find(self, provider: str, model: str) -> tuple[Candidate, ...]:
        """What each list takes the name for, without repetition."""
        found = (index.find(provider, model) for index in self._indexes)
        return tuple(dict.fromkeys(each for each in found if each is not None))

    def context_window(self, candidates: Sequence[Candidate]) -> int | None:
        found = (self._windows.get((each.provider, each.model)) for each in candidates)
        return next((window for window in found if window is not None), None)


@dataclass(frozen=True, slots=True)
class Listing:
    """What the lists say about one name. lists: by falling rank; rows: of all candidates, ascending by instant."""

    lists: tuple[str, ...]
    candidates: tuple[Candidate, ...]
    rows: tuple[VersionRow, ...]
    context_window: int | None

    def version(self, at: datetime) -> tuple[PriceVersion, Candidate] | None:
        """The price in force: of the list with the highest rank that has one."""
        for list_name in self.lists:
            for candidate in self.candidates:
                version = self._in_force(list_name, candidate, at)
                if version is not None:
                    return version, candidate
        return None

    def _in_force(self, list_name: str, candidate: Candidate, at: datetime) -> PriceVersion | None:
        newest = None
        for row in self.rows:
            if (row.list_name, row.provider, row.model) == (list_name, candidate.provider, candidate.model):
                newest = row if row.effective_from <= at else newest
        return None if newest is None else newest.as_version()

    @property
    def instants(self) -> list[datetime]:
        return [row.effective_from for row in self.rows]


def answer_for(
    provider: str, model: str, listing: Listing, terms: Terms, fallback: Listing | None, at: datetime
) -> Quote | _Refusal:
    """The quote for a name at an instant, from all that is known about it. Pure."""
    instants = [*listing.instants, *terms.instants, *(fallback.instants if fallback is not None else ())]
    valid_from = max((each for each in instants if each <= at), default=_BEGINNING)
    valid_until = min((each for each in instants if each > at), default=None)
    listed = listing.version(at)
    policy = terms.policy(at)
    unknown = UnknownModelPolicy.REFUSE if policy is None else policy.unknown_model
    name = model if listed is None else listed[1].model
    quote = Quote(
        provider=provider,
        model=name,
        basis="list",
        charge=None if listed is None else listed[0],
        cost=None if listed is None else listed[0],
        markup_ppm=terms.markup_ppm(provider, (model, name), at),
        passes_unpriced=unknown is UnknownModelPolicy.PASS,
        has_context=listed is None or not listed[1].borrowed,
        context_window=listing.context_window,
        valid_from=valid_from,
        valid_until=valid_until,
    )
    override = terms.override(provider, (model, name), at)
    if override is not None:
        own = override.as_version()
        return replace(
            quote, basis="override", charge=own, cost=quote.cost or own, markup_ppm=PAR_PPM, has_context=True
        )
    if listed is not None:
        return quote
    return _without_price(quote, unknown, None if fallback is None else fallback.version(at))


def _without_price(
    quote: Quote, unknown: UnknownModelPolicy, fallback: tuple[PriceVersion, Candidate] | None
) -> Quote | _Refusal:
    """What the policy makes of a model without a price. A fallback that has no price itself is a refusal."""
    if unknown is UnknownModelPolicy.PASS:
        return replace(quote, basis="unpriced")
    if unknown is UnknownModelPolicy.FALLBACK and fallback is not None:
        return replace(quote, basis="fallback", charge=fallback[0], cost=fallback[0])
    return _Refusal(quote.provider, quote.model, quote.valid_from, quote.valid_until)
