from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.gateway.providers import (
    KNOWN,
    InvalidBaseUrl,
    InvalidProvider,
    Provider,
    ProviderNotFound,
    check_base_url,
    get_provider,
    list_providers,
    put_provider,
)
from bursar.gateway.routes import (
    InvalidModelRoute,
    ModelNotFound,
    ModelRoute,
    RouteTable,
    load_routes,
    put_model_route,
)


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "https://gateway.internal:8443/openai/v1",
        "https://10.1.2.3/v1",
        "http://127.0.0.1:8000/v1",
        "http://localhost:11434/v1",
        "http://[::1]:8000/v1",
    ],
)
def test_https_is_taken_and_plain_http_on_this_machine(url: str) -> None:
    check_base_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.openai.com",
        "ftp://api.openai.com/v1",
        "file:///etc/passwd",
        "http://api.openai.com/v1",
        "http://10.1.2.3/v1",
        "http://localhost.evil.example/v1",
        "https://169.254.169.254/latest",
        "https://[fe80::1]/v1",
        "https://[::ffff:169.254.169.254]/v1",
        "http://0.0.0.0:8000/v1",
        "https://224.0.0.1/v1",
        "http://0x7f000001/v1",
        "http://2130706433/v1",
        "http://127.1/v1",
        "https://user:secret@api.openai.com/v1",
        "https://api.openai.com/v1?x=1",
        "https://api.openai.com/v1#x",
        "https://api.openai.com/v1/",
        "https://api.openai.com/v1\nHost: evil",
        "https://api openai.com/v1",
        "https:///v1",
        "https://api.openai.com:99999/v1",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidBaseUrl):
        check_base_url(url)


# -- the list


async def test_the_demo_provider_is_there_from_the_start(database: db.Database) -> None:
    async with database.untenanted() as conn:
        demo = await get_provider(conn, name="demo")
    assert (demo.kind, demo.base_url, demo.auth, demo.enabled) == ("both", None, "none", True)


async def test_a_public_provider_needs_only_its_name_and_changes_keep_the_rest(database: db.Database) -> None:
    async with database.platform() as conn:
        moonshot = await put_provider(conn, name="moonshotai", by=OPERATOR)
        assert (moonshot.base_url, moonshot.asks_for_usage) == ("https://api.moonshot.ai/v1", True)
        moved = await put_provider(conn, name="moonshotai", base_url="https://eu.moonshot.example/v1", by=OPERATOR)
        assert moved == replace(moonshot, base_url="https://eu.moonshot.example/v1")
        off = await put_provider(conn, name="moonshotai", enabled=False, by=OPERATOR)
        assert off == replace(moved, enabled=False)
        assert off in await list_providers(conn)


def test_mistral_refuses_to_be_asked_for_usage() -> None:
    assert not KNOWN["mistral"].asks_for_usage


@pytest.mark.parametrize(
    "values",
    [
        {"name": "Name With Blanks"},
        {"name": "unknown-vendor", "base_url": "https://x.example/v1"},
        {"name": "unknown-vendor", "kind": "gemini", "base_url": "https://x.example/v1"},
        {"name": "openai", "auth": "basic"},
        {"name": "demo", "base_url": "https://x.example/v1"},
    ],
)
async def test_a_provider_that_cannot_be_called_is_refused(database: db.Database, values: dict[str, Any]) -> None:
    with pytest.raises(InvalidProvider):
        async with database.platform() as conn:
            await put_provider(conn, by=OPERATOR, **values)


async def test_an_organization_cannot_change_providers_or_routes(org: Any) -> None:
    for statement in (
        "update gateway.providers set enabled = false",
        "insert into gateway.model_routes (model, route_id, provider, upstream_model) "
        "values ('m', gen_random_uuid(), 'demo', 'x')",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            async with org.tenant() as conn:
                await conn.execute(statement)


def test_the_page_about_providers_names_every_one_that_is_known_with_its_address() -> None:
    page = (Path(__file__).parents[2] / "docs" / "providers.md").read_text()
    for name, known in KNOWN.items():
        assert f"`{name}`" in page
        assert known.base_url is None or f"`{known.base_url}`" in page


@pytest.mark.parametrize("name", ["aws", "vertex", "databricks"])
async def test_what_only_litellm_speaks_needs_only_its_name_too(database: db.Database, name: str) -> None:
    async with database.platform() as conn:
        made = await put_provider(conn, name=name, by=OPERATOR, enabled=False)
        assert (made.kind, made.base_url, made.litellm_provider) == ("litellm", None, KNOWN[name].litellm_provider)
        direct = await put_provider(
            conn, name=name, kind="openai", base_url="https://x.example/v1", by=OPERATOR, enabled=False
        )
        assert (direct.kind, direct.litellm_provider) == ("openai", None)
        back = await put_provider(conn, name=name, kind="litellm", by=OPERATOR, enabled=False)
        assert (back.kind, back.base_url, back.litellm_provider) == ("litellm", None, made.litellm_provider)


# -- routes


def provider(name: str, kind: Any = "openai", **columns: Any) -> Provider:
    return Provider(name=name, provider_id=uuid7(), kind=kind, **{"base_url": f"https://{name}.example/v1", **columns})


def route(model: str, to: str, upstream_model: str, **columns: Any) -> ModelRoute:
    return ModelRoute(model=model, route_id=uuid7(), provider=to, upstream_model=upstream_model, **columns)


TABLE = RouteTable(
    [
        provider("openai"),
        provider("anthropic", "anthropic"),
        provider("openrouter"),
        provider("off", enabled=False),
        provider("both", "both"),
        provider("demo", "both", base_url=None),
    ],
    [
        route("fast", "openai", "gpt-4o-mini"),
        route("openai/special", "openrouter", "openai/gpt-4o"),
        route("retired", "openai", "gpt-3", enabled=False),
        route("nowhere", "off", "x"),
    ],
)
BOOK = {
    ("openai", "gpt-4o"),
    ("openrouter", "gpt-4o"),
    ("openrouter", "openai/gpt-4o"),
    ("openrouter", "meta/llama"),
    ("anthropic", "claude-x"),
    ("both", "claude-x"),
    ("off", "only-there"),
    ("demo", "demo-1"),
}


def knows(provider: str, model: str) -> bool:
    return (provider, model) in BOOK


@pytest.mark.parametrize(
    ("model", "format", "expected"),
    [
        ("fast", "openai", ("openai", "gpt-4o-mini")),
        ("openai/special", "openai", ("openrouter", "openai/gpt-4o")),
        ("openai/gpt-4o", "openai", ("openai", "gpt-4o")),
        ("openai/never-heard-of", "openai", ("openai", "never-heard-of")),
        ("openrouter/openai/gpt-4o", "openai", ("openrouter", "openai/gpt-4o")),
        ("meta/llama", "openai", ("openrouter", "meta/llama")),
        ("gpt-4o", "openai", ("openai", "gpt-4o")),
        ("claude-x", "openai", ("both", "claude-x")),
        ("claude-x", "anthropic", ("anthropic", "claude-x")),
        ("anthropic/claude-x", "anthropic", ("anthropic", "claude-x")),
        ("both/claude-x", "anthropic", ("both", "claude-x")),
    ],
)
def test_a_model_goes_to_its_route_its_prefix_or_who_prices_it(
    model: str, format: Any, expected: tuple[str, str]
) -> None:
    found = TABLE.resolve(model, format, knows)
    assert (found.provider.name, found.model) == expected


@pytest.mark.parametrize(
    ("model", "format"),
    [
        ("fast", "anthropic"),
        ("retired", "openai"),
        ("nowhere", "openai"),
        ("gpt-4o", "anthropic"),
        ("openai/", "openai"),
        ("anthropic/claude-x", "openai"),
        ("off/x", "openai"),
        ("only-there", "openai"),
        ("demo-1", "openai"),
        ("demo/demo-1", "openai"),
        ("never-heard-of", "openai"),
    ],
)
def test_a_model_that_nobody_serves_is_refused_by_name(model: str, format: Any) -> None:
    with pytest.raises(ModelNotFound) as refused:
        TABLE.resolve(model, format, knows)
    assert (refused.value.status, refused.value.code) == (404, "model_not_found")


async def test_routes_are_read_with_the_address_of_this_process_s_demo_provider(database: db.Database) -> None:
    name = f"alias-{uuid7().hex}"
    async with database.platform() as conn:
        added = await put_model_route(conn, model=name, provider="demo", upstream_model="demo-1", by=OPERATOR)
        again = await put_model_route(conn, model=name, provider="demo", upstream_model="demo-1-mini", by=OPERATOR)
    assert (again.route_id, again.upstream_model) == (added.route_id, "demo-1-mini")
    async with database.untenanted() as conn:
        table = await load_routes(conn, demo_base_url="http://127.0.0.1:9/v1")
        assert "demo" not in (await load_routes(conn, demo_base_url=None)).providers
    found = table.resolve(name, "anthropic", knows)
    assert (found.provider.base_url, found.model) == ("http://127.0.0.1:9/v1", "demo-1-mini")


async def test_a_route_needs_a_provider_and_names(database: db.Database) -> None:
    with pytest.raises(ProviderNotFound):
        async with database.platform() as conn:
            await put_model_route(conn, model="x", provider="nobody", upstream_model="x", by=OPERATOR)
    for model in ("", "x" * 201, "two\nlines"):
        with pytest.raises(InvalidModelRoute):
            async with database.platform() as conn:
                await put_model_route(conn, model=model, provider="demo", upstream_model="x", by=OPERATOR)
