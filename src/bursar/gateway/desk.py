"""Opens a call: which provider serves the model, with whose key, at what price."""

import asyncio
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final
from uuid import UUID

import structlog

from bursar import db
from bursar.clock import now
from bursar.gateway.calls import Attempt, Call
from bursar.gateway.provider_keys import KeyFinder, UsableKey
from bursar.gateway.routes import Format, ModelNotFound, Route, RouteTable, load_routes, not_found
from bursar.gateway.sealing import SealBroken
from bursar.gateway.upstream import Target
from bursar.gateway.wire import WireRequest
from bursar.identity.principals import Principal
from bursar.pricing.book import LONGEST_NAME, ModelNotPriced, PriceBook
from bursar.pricing.versions import prices_in_force
from bursar.problems import Problem

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
        self, database: db.Database, book: PriceBook, keys: KeyFinder, *, demo_base_url: str | None = None
    ) -> None:
        self._database = database
        self._book = book
        self._keys = keys
        self._demo_base_url = demo_base_url
        self._table = RouteTable([], [])
        self._loaded_at = float("-inf")
        self._resolved: dict[tuple[str, Format], _Resolved] = {}
        self._loading = asyncio.Lock()

    async def open(self, principal: Principal, request: WireRequest, format: Format, body_hash: bytes) -> Call:
        """A call with who may answer it, by which keys and prices; nothing is held yet.

        Raises:
            ModelNotFound, ModelNotPriced, NoProviderKey: of who is asked first.
        """
        route = await self._route(request.model, format)
        first = await self._attempt(principal.organization_id, request, route)
        attempts: tuple[Attempt, ...] = (first,)
        if route.retries or route.fallbacks:
            attempts = (first,) * (1 + route.retries) + await self._fallbacks(principal, request, route, first)
        return Call(
            principal=principal,
            attempts=attempts,
            body_hash=body_hash,
            context=request.price_context,
        )

    async def _attempt(self, organization_id: UUID, request: WireRequest, route: Route) -> Attempt:
        quote = await self._book.quote(organization_id=organization_id, provider=route.provider.name, model=route.model)
        request = request.as_priced(lambda usage: bool(quote.unpriced_kinds(usage, context=request.price_context)))
        quote.require_priced(request.hold_for(1), context=request.price_context)
        key = await self._key(organization_id, route)
        if key is None:
            return Attempt(Target(route.provider, model=route.model), route.model, quote, request)
        target = Target(route.provider, key.secret, key.is_own, route.model)
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
        found: dict[str, str] = {}
        for provider in table.providers.values():
            if not await self._can_call(principal.organization_id, provider.auth, provider.name):
                continue
            for model in await self._priced_models(provider.name):
                found.setdefault(model, provider.name)
        for route in table.routes.values():
            if route.enabled and route.provider in table.providers:
                found[route.model] = route.provider
            else:
                found.pop(route.model, None)
        return [{"id": model, "object": "model", "created": 0, "owned_by": found[model]} for model in sorted(found)]

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
        knowing = {name for name in table.providers if await self._is_listed(name, model)}
        try:
            return _Resolved(table.resolve(model, format, lambda provider, _: provider in knowing), None)
        except ModelNotFound as refusal:
            return _Resolved(None, refusal)

    async def _is_listed(self, provider: str, model: str) -> bool:
        try:
            await self._book.list_price(provider=provider, model=model)
        except ModelNotPriced:
            return False
        return True

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
                self._loaded_at = asked_at
        return self._table
