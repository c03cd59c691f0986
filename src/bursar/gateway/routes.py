"""Which provider serves a model: by a route, by the prefix of its name, or by who has it in the price book."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.gateway.providers import DEMO, QUERIES, Provider, get_provider, list_providers
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.problems import Problem

Format = Literal["openai", "anthropic"]
Knows = Callable[[str, str], bool]
"""(provider, model) -> whether the price book has this model at this provider."""


class ModelNotFound(Problem):
    """No provider serves the model in the format of the call."""

    status, code, title = 404, "model_not_found", "No such model"


class InvalidModelRoute(Problem):
    """A route needs a name and a provider's model, each of 1 to 200 characters."""

    status, code, title = 422, "invalid_model_route", "This route cannot be added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """A public model name and what it stands for. enabled: false refuses the name."""

    model: str
    route_id: UUID
    provider: str
    upstream_model: str
    enabled: bool = True


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes. model: the provider's name of the model, by which it is priced."""

    provider: Provider
    model: str


class RouteTable:
    """All providers and routes at one moment; pure, so that a call is routed without the database."""

    def __init__(self, providers: Sequence[Provider], routes: Sequence[ModelRoute]) -> None:
        """providers: in the order in which they are asked; those that are off or without an address are left out."""
        usable = [provider for provider in providers if provider.enabled and provider.base_url is not None]
        self.providers = {provider.name: provider for provider in usable}
        self.routes = {route.model: route for route in routes}

    def resolve(self, model: str, format: Format, knows: Knows) -> Route:
        """Where a call for a model goes. The first of these that applies decides:

        1. a route of exactly this name; 2. 'provider/model', where a provider of that name is enabled; 3. the first
        provider, by position, that has the name in the price book.

        Raises:
            ModelNotFound: none applies, the route is off, or its provider is off or does not speak the format.
        """
        route = self.routes.get(model)
        if route is not None:
            provider = self.providers.get(route.provider)
            if not route.enabled or provider is None or not provider.speaks(format):
                raise not_found(model, format)
            return Route(provider, route.upstream_model)
        prefix, _, rest = model.partition("/")
        provider = self.providers.get(prefix)
        if provider is not None and rest and provider.speaks(format):
            return Route(provider, rest)
        for provider in self.providers.values():
            if provider.speaks(format) and knows(provider.name, model):
                return Route(provider, model)
        raise not_found(model, format)


def not_found(model: str, format: Format) -> ModelNotFound:
    """The refusal of a name that nobody serves."""
    path = "/v1/chat/completions" if format == "openai" else "/v1/messages"
    return ModelNotFound(
        f"No provider serves {model[:200]!r} at {path}.",
        why={
            "reason": "model_not_found",
            "model": model[:200],
            "next_step": "GET /v1/models lists the models; the operator adds providers with `bursar providers add`.",
        },
    )


async def load_routes(conn: db.Connection, *, demo_base_url: str | None) -> RouteTable:
    """Read providers and routes. demo_base_url: where this process finds the provider demo; None: nowhere."""
    providers = [
        replace(provider, base_url=demo_base_url) if provider.name == DEMO else provider
        for provider in await list_providers(conn)
    ]
    return RouteTable(providers, await list_model_routes(conn))


async def list_model_routes(conn: db.Connection) -> list[ModelRoute]:
    """Every route, by name."""
    return await db.fetch_all(conn, ModelRoute, QUERIES.model_routes)


async def put_model_route(
    conn: db.Connection, *, model: str, provider: str, upstream_model: str, by: Actor, enabled: bool = True
) -> ModelRoute:
    """Let a public name stand for a provider's model, from now on. conn: as bursar_platform.

    Raises:
        ProviderNotFound, InvalidModelRoute
    """
    for name in (model, upstream_model):
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise InvalidModelRoute("A model's name has 1 to 200 printable characters.")
    await get_provider(conn, name=provider)
    old = {route.model: route for route in await list_model_routes(conn)}.get(model)
    new = await db.fetch_one(
        conn,
        ModelRoute,
        QUERIES.put_model_route,
        model=model,
        route_id=uuid7() if old is None else old.route_id,
        provider=provider,
        upstream_model=upstream_model,
        enabled=enabled,
    )
    if new != old:
        await record(
            conn,
            organization_id=PLATFORM_ORGANIZATION_ID,
            by=by,
            action="model_route.added" if old is None else "model_route.changed",
            object_id=new.route_id,
            old=None if old is None else _audited(old),
            new=_audited(new),
        )
    return new


def _audited(route: ModelRoute) -> dict[str, str | bool]:
    return {
        "model": route.model,
        "provider": route.provider,
        "upstream_model": route.upstream_model,
        "enabled": route.enabled,
    }
