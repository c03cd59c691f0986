"""Which provider serves a model: by a route, by the prefix of its name, or by who has it in the price book."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import now, uuid7
from bursar.gateway.allowances import Names
from bursar.gateway.providers import DEMO, QUERIES, Provider, get_provider, list_providers
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.pricing.versions import prices_in_force
from bursar.problems import Problem

Format = Literal["openai", "anthropic"]
MOST_RETRIES: Final = 3
MOST_FALLBACKS: Final = 5
Knows = Callable[[str, str], bool]
"""(provider, model) -> whether the price book has this model at this provider."""


class ModelNotFound(Problem):
    """No provider serves the model in the format of the call."""

    status, code, title = 404, "model_not_found", "No such model"


class ModelRouteNotFound(Problem):
    """No route of this name."""

    status, code, title = 404, "model_route_not_found", "No such route"


class InvalidModelRoute(Problem):
    """A route needs a name and a provider's model, each of 1 to 200 characters, and few retries and fallbacks."""

    status, code, title = 422, "invalid_model_route", "This route cannot be added"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoute:
    """A public model name and what it stands for.

    enabled: false refuses the name. retries: how often the provider is asked again when it fails. fallbacks: who is
    asked then, in turn, each as 'provider/model'.
    """

    model: str
    route_id: UUID
    provider: str
    upstream_model: str
    enabled: bool = True
    retries: int = 0
    fallbacks: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Where a call goes.

    model: the provider's name of the model, by which it is priced. retries: how often it is asked again when it fails
    before an answer began. fallbacks: who is asked after that, in turn.
    """

    provider: Provider
    model: str
    retries: int = 0
    fallbacks: tuple[Route, ...] = ()


class RouteTable:
    """All providers and routes at one moment; pure, so that a call is routed without the database."""

    def __init__(self, providers: Sequence[Provider], routes: Sequence[ModelRoute]) -> None:
        """providers: in the order in which they are asked; those that are off or without an address are left out."""
        usable = [
            provider
            for provider in providers
            if provider.enabled and (provider.base_url is not None or provider.kind == "litellm")
        ]
        self.providers = {provider.name: provider for provider in usable}
        self.routes = {route.model: route for route in routes}

    def resolve(self, model: str, format: Format, knows: Knows) -> Route:
        """Where a call for a model goes. The first of these that applies decides:

        1. a route of exactly this name; 2. 'provider/model', where a provider of that name is enabled; 3. the first
        provider, by position, that has the name in the price book.

        Of a route, a provider that is off or does not speak the format is passed over for the next fallback.

        Raises:
            ModelNotFound: none applies, the route is off, or its providers are off or do not speak the format.
        """
        route = self.routes.get(model)
        if route is not None:
            return self._by_route(route, format)
        prefix, _, rest = model.partition("/")
        provider = self.providers.get(prefix)
        if provider is not None and rest and provider.speaks(format):
            return Route(provider, rest)
        for provider in self.providers.values():
            if provider.speaks(format) and knows(provider.name, model):
                return Route(provider, model)
        raise not_found(model, format)

    def names(self, asked: tuple[str, ...], route: Route) -> Names:
        """What rules about models are put to; asked: as `Allowances.asked_names`."""
        named = self.routes.get(asked[-1])
        stands_in = named is not None and (named.provider, named.upstream_model) != (route.provider.name, route.model)
        return Names(asked, route.provider.name, route.model, stands_in=stands_in)

    def _by_route(self, route: ModelRoute, format: Format) -> Route:
        named = [(route.provider, route.upstream_model), *map(split_fallback, route.fallbacks)]
        usable = [
            Route(provider, model)
            for name, model in named
            if (provider := self.providers.get(name)) is not None and provider.speaks(format)
        ]
        if not route.enabled or not usable:
            raise not_found(route.model, format)
        return replace(usable[0], retries=route.retries, fallbacks=tuple(usable[1:]))


def split_fallback(text: str) -> tuple[str, str]:
    """'provider/model' in its two parts; names of providers have no slash.

    Raises:
        InvalidModelRoute
    """
    provider, slash, model = text.partition("/")
    if not slash or not provider or not 1 <= len(model) <= 200 or not model.isprintable():
        raise InvalidModelRoute(f"A fallback is written provider/model, as in azure/gpt-4o; {text[:200]!r} is not.")
    return provider, model


def not_found(model: str, format: Format) -> ModelNotFound:
    """The refusal of a name that nobody serves."""
    vendor = "OpenAI" if format == "openai" else "Anthropic"
    return ModelNotFound(
        f"No provider serves {model[:200]!r} in the format of {vendor}.",
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
    conn: db.Connection,
    *,
    model: str,
    provider: str,
    upstream_model: str,
    by: Actor,
    enabled: bool = True,
    retries: int = 0,
    fallbacks: Sequence[str] = (),
) -> ModelRoute:
    """Let a public name stand for a provider's model, from now on. conn: as bursar_platform.

    fallbacks: in the place of those that it has, each as 'provider/model'.

    Raises:
        ProviderNotFound, InvalidModelRoute
    """
    for name in (model, upstream_model):
        if not 1 <= len(name) <= 200 or not name.isprintable():
            raise InvalidModelRoute("A model's name has 1 to 200 printable characters.")
    if not 0 <= retries <= MOST_RETRIES or len(fallbacks) > MOST_FALLBACKS:
        raise InvalidModelRoute(f"A route has at most {MOST_RETRIES} retries and {MOST_FALLBACKS} fallbacks.")
    targets = [split_fallback(each) for each in fallbacks]
    for name in (provider, *(name for name, _ in targets)):
        await get_provider(conn, name=name)
    for name, target in ((provider, upstream_model), *targets):
        await _refuse_chain(conn, model, name, target)
    old = await _model_route(conn, model)
    await db.execute(
        conn,
        QUERIES.put_model_route,
        model=model,
        route_id=uuid7() if old is None else old.route_id,
        provider=provider,
        upstream_model=upstream_model,
        enabled=enabled,
        retries=retries,
    )
    await db.execute(conn, QUERIES.remove_route_fallbacks, model=model)
    for position, (name, target) in enumerate(targets, 1):
        await db.execute(
            conn, QUERIES.add_route_fallback, model=model, position=position, provider=name, upstream_model=target
        )
    new = await _model_route(conn, model)
    assert new is not None
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


async def _refuse_chain(conn: db.Connection, model: str, provider: str, target: str) -> None:
    """Refuse a route to what is a name of ours itself, which its provider would not know.

    A vendor's own name may have a route too, as when gpt-4o goes to azure and `direct` to openai's gpt-4o.

    Raises:
        InvalidModelRoute
    """
    onward = await _model_route(conn, target)
    if onward is None or target in (model, onward.upstream_model):
        return
    if target not in {each.model for each in await prices_in_force(conn, at=now(), provider=provider)}:
        raise InvalidModelRoute(
            f"{target!r} is a route itself, to {onward.provider}/{onward.upstream_model}: name that model instead."
        )


async def remove_model_route(conn: db.Connection, *, model: str, by: Actor) -> None:
    """Take a route away; the name goes by its prefix or the price book again. conn: as bursar_platform.

    Raises:
        ModelRouteNotFound
    """
    old = await _model_route(conn, model)
    if old is None:
        raise ModelRouteNotFound(f"There is no route {model[:100]!r}. Those there are: bursar providers routes")
    await db.execute(conn, QUERIES.remove_model_route, model=model)
    await record(
        conn,
        organization_id=PLATFORM_ORGANIZATION_ID,
        by=by,
        action="model_route.removed",
        object_id=old.route_id,
        old=_audited(old),
    )


async def _model_route(conn: db.Connection, model: str) -> ModelRoute | None:
    return {route.model: route for route in await list_model_routes(conn)}.get(model)


def _audited(route: ModelRoute) -> dict[str, str | bool | int | list[str]]:
    return {
        "model": route.model,
        "provider": route.provider,
        "upstream_model": route.upstream_model,
        "enabled": route.enabled,
        "retries": route.retries,
        "fallbacks": list(route.fallbacks),
    }
