"""Opens a call: which provider serves the model, with whose key, at what price."""

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Final, get_args
from uuid import UUID

import structlog

from bursar import db
from bursar.clock import now, uuid7
from bursar.gateway.adapter_process import AdapterProcess, AdapterUnavailable
from bursar.gateway.allowances import (
    AllowanceFinder,
    Allowances,
    Caller,
    ModelNotAllowed,
    Names,
    caller_of,
    load_allowances,
)
from bursar.gateway.calls import Attempt, Call
from bursar.gateway.provider_keys import KeyFinder, UsableKey
from bursar.gateway.routes import Format, ModelNotFound, Route, RouteTable, load_routes, not_found
from bursar.gateway.upstream import Target
from bursar.gateway.wire import WireRequest
from bursar.identity.organizations import Organization
from bursar.identity.principals import Principal
from bursar.pricing.book import LONGEST_NAME, ModelNotPriced, PriceBook
from bursar.pricing.versions import prices_in_force
from bursar.problems import Problem
from bursar.sealing import SealBroken

log = structlog.get_logger(__name__)
REFRESH_SECONDS: Final = 5.0
MOST_RESOLVED: Final = 10_000


@dataclass(frozen=True, slots=True)
class _Resolved:
    """Where calls for a name go; provider None: nobody serves it."""

    route: Route | None
    refusal: ModelNotFound | None


class Desk:
    """Routes, keys and prices from memory, at most seconds old. One per process."""

    def __init__(
        self,
        database: db.Database,
        book: PriceBook,
        keys: KeyFinder,
        adapter: AdapterProcess,
        *,
        demo_base_url: str | None = None,
    ) -> None:
        self._database = database
        self._book = book
        self._keys = keys
        self._adapter = adapter
        self._allowances = AllowanceFinder(database)
        self._demo_base_url = demo_base_url
        self._table = RouteTable([], [])
        self._loaded_at = float("-inf")
        self._resolved: dict[tuple[str, Format], _Resolved] = {}
        self._loading = asyncio.Lock()

    async def open(
        self,
        principal: Principal,
        request: WireRequest,
        format: Format,
        body_hash: bytes,
        *,
        request_id: UUID | None = None,
    ) -> Call:
        """A call with who may answer it, by which keys and prices; nothing is held yet. request_id: a new one if None.

        Raises:
            ModelNotFound, ModelNotAllowed, ModelNotPriced, NoProviderKey, AdapterUnavailable: of who is asked first.
        """
        allowances = await self._allowances.of(principal.organization_id)
        asked = allowances.asked_names(request.model)
        route = await self._route(asked[-1], format)
        if allowances.has_rules:
            route = self._allowed(allowances, _caller(principal), asked, route)
        route, first = await self._first(principal.organization_id, request, route)
        attempts: tuple[Attempt, ...] = (first,)
        if route.retries or route.fallbacks:
            attempts = (first,) * (1 + route.retries) + await self._fallbacks(principal, request, route, first)
        return Call(
            principal=principal,
            attempts=attempts,
            body_hash=body_hash,
            context=request.price_context,
            request_id=request_id or uuid7(),
        )

    async def _first(self, organization_id: UUID, request: WireRequest, route: Route) -> tuple[Route, Attempt]:
        """Who is asked first, and the route from there on. An adapter that is not there is passed over like a provider
        that is down; but what the customer's own key pays never becomes a charge.
        """
        candidates = (route, *route.fallbacks)
        missing: AdapterUnavailable | None = None
        own_only = False
        for place, candidate in enumerate(candidates, 1):
            try:
                attempt = await self._attempt(organization_id, request, candidate)
            except AdapterUnavailable as unavailable:
                missing = missing or unavailable
                key = await self._key(organization_id, candidate)
                own_only = own_only or (key is not None and key.is_own)
                continue
            if attempt.target.is_own_key or not own_only:
                return (route if place == 1 else replace(candidate, fallbacks=candidates[place:])), attempt
        assert missing is not None
        raise missing

    def _allowed(self, allowances: Allowances, caller: Caller, asked: tuple[str, ...], route: Route) -> Route:
        """The route without the fallbacks that a rule keeps from the caller.

        Raises:
            ModelNotAllowed: of who is asked first.
        """
        allowances.require(caller, self._table.names(asked, route))
        fallbacks = [
            each
            for each in route.fallbacks
            if allowances.allows(caller, Names(asked, each.provider.name, each.model, stands_in=True))
        ]
        return replace(route, fallbacks=tuple(fallbacks))

    async def _attempt(self, organization_id: UUID, request: WireRequest, route: Route) -> Attempt:
        quote = await self._book.quote(organization_id=organization_id, provider=route.provider.name, model=route.model)
        request = request.as_priced(lambda usage: bool(quote.unpriced_kinds(usage, context=request.price_context)))
        quote.require_priced(request.hold_for(1), context=request.price_context, tools=request.unpriced_tools)
        key = await self._key(organization_id, route)
        provider = route.provider
        if provider.kind == "litellm":
            provider = await self._adapter.reached(provider)
        if key is None:
            return Attempt(Target(provider, model=route.model), route.model, quote, request)
        target = Target(provider, key.secret, key.is_own, route.model)
        return Attempt(target, route.model, quote, request, key.provider_key_id)

    async def _fallbacks(
        self, principal: Principal, request: WireRequest, route: Route, first: Attempt
    ) -> tuple[Attempt, ...]:
        """Who is asked after the first has failed. What the customer's own key pays never becomes a charge."""
        attempts = []
        for fallback in route.fallbacks:
            try:
                attempt = await self._attempt(principal.organization_id, request, fallback)
            except Problem as refusal:
                log.info("fallback left out", provider=fallback.provider.name, code=refusal.code)
                continue
            if attempt.target.is_own_key or not first.target.is_own_key:
                attempts.append(attempt)
        return tuple(attempts)

    async def models(self, principal: Principal) -> list[dict[str, Any]]:
        """Models that this organization can call by name, in OpenAI's list form, by name."""
        table = await self._current()
        found: dict[str, tuple[str, str]] = {}  # name -> (provider, its name of the model)
        callable_ = [
            each.name
            for each in table.providers.values()
            if not (each.kind == "litellm" and self._adapter.is_missing)
            and await self._can_call(principal.organization_id, each.auth, each.name)
        ]
        for provider in callable_:
            for model in await self._priced_models(provider):
                found.setdefault(model, (provider, model))
        for route in table.routes.values():
            if route.enabled and route.provider in table.providers:
                found[route.model] = (route.provider, route.upstream_model)
            else:
                found.pop(route.model, None)
        allowances = await self._allowances.of(principal.organization_id)
        for alias, real in allowances.aliases.items():
            prefix, _, rest = real.partition("/")
            if real in found or prefix in callable_:
                found[alias] = found.get(real, (prefix, rest))
        caller = _caller(principal)
        return [
            {"id": name, "object": "model", "created": 0, "owned_by": found[name][0]}
            for name in sorted(found)
            if allowances.allows(caller, Names(allowances.asked_names(name), *found[name]))
        ]

    async def _priced_models(self, provider: str) -> list[str]:
        """Models with a price: each can be called at some path."""
        async with self._database.untenanted() as conn:
            versions = await prices_in_force(conn, at=now(), provider=provider)
        return [each.model for each in versions]

    async def _can_call(self, organization_id: UUID, auth: str, provider: str) -> bool:
        if auth == "none":
            return True
        try:
            return await self._keys.find(organization_id, provider) is not None
        except SealBroken as broken:
            # A key that cannot be opened serves nobody; the list of what the others serve goes on.
            log.error("provider key cannot be opened", provider=provider, error=str(broken))
            return False

    async def _key(self, organization_id: UUID, route: Route) -> UsableKey | None:
        if route.provider.auth == "none":
            return None
        return await self._keys.key_for(organization_id, route.provider.name)

    async def _route(self, model: str, format: Format) -> Route:
        if len(model) > LONGEST_NAME or not model.isprintable():  # nobody's, and not kept
            raise not_found(model, format)
        table = await self._current()
        found = self._resolved.get((model, format))
        if found is None:
            found = await self._resolve(table, model, format)
            if len(self._resolved) >= MOST_RESOLVED:
                self._resolved.clear()
            self._resolved[model, format] = found
        if found.route is None:
            assert found.refusal is not None
            raise ModelNotFound(found.refusal.detail, why=found.refusal.why)
        return found.route

    async def _resolve(self, table: RouteTable, model: str, format: Format) -> _Resolved:
        knowing = await _knowing(self._book, table, model)
        try:
            return _Resolved(table.resolve(model, format, lambda provider, _: provider in knowing), None)
        except ModelNotFound as refusal:
            return _Resolved(None, refusal)

    async def _current(self) -> RouteTable:
        """Providers and routes, at most REFRESH_SECONDS old; read once for all who ask."""
        if monotonic() - self._loaded_at < REFRESH_SECONDS:
            return self._table
        async with self._loading:
            if monotonic() - self._loaded_at >= REFRESH_SECONDS:
                asked_at = monotonic()
                async with self._database.untenanted() as conn:
                    self._table = await load_routes(conn, demo_base_url=self._demo_base_url)
                self._resolved = {}
                self._adapter.want(any(each.kind == "litellm" for each in self._table.providers.values()))
                self._loaded_at = asked_at
        return self._table


async def _knowing(book: PriceBook, table: RouteTable, model: str) -> set[str]:
    """The providers that have a model in the price book."""
    found = set()
    for provider in table.providers:
        with suppress(ModelNotPriced):
            await book.list_price(provider=provider, model=model)
            found.add(provider)
    return found


async def why_not(
    database: db.Database, organization: Organization, *, user_id: UUID | None, api_key_id: UUID | None, model: str
) -> ModelNotAllowed | None:
    """The refusal that a call for a model would get by a rule about models, as everything is now; None: none."""
    organization_id = organization.organization_id
    async with database.tenant(organization_id) as conn:
        allowances = await load_allowances(conn, organization_id=organization_id)
        if not allowances.has_rules:
            return None
        table = await load_routes(conn, demo_base_url="")
        caller = await caller_of(conn, organization, user_id=user_id, api_key_id=api_key_id)
    asked = allowances.asked_names(model)
    names = Names(asked)
    knowing = await _knowing(PriceBook(database), table, asked[-1])
    for format in get_args(Format):
        with suppress(ModelNotFound):
            names = table.names(asked, table.resolve(asked[-1], format, lambda provider, _: provider in knowing))
            break
    try:
        allowances.require(caller, names)
    except ModelNotAllowed as refusal:
        return refusal
    return None


def _caller(principal: Principal) -> Caller:
    return Caller(principal.organization_slug, principal.team_id, principal.api_key_id)
