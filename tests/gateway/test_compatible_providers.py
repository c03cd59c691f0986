"""Azure, vLLM, Ollama and OpenRouter behind the gateway, each as it really answers over HTTP (`tests/fakes`)."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import openai
import pytest
from tests.fakes import azure, ollama, openrouter, vllm
from tests.fakes.serving import serving
from tests.gateway.conftest import Payer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.gateway.provider_keys import add_provider_key
from bursar.gateway.providers import InvalidBaseUrl, InvalidProvider, InvalidProviderHeader, put_provider
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.money import format_credits
from bursar.pricing.files import read
from bursar.pricing.importing import accepted, import_list
from bursar.sealing import Keyring

HELLO = [{"role": "user", "content": "hello there"}]
HEAD = "provider,model,kind,price_usd,unit,above_input_tokens,when,free,match,effective_from,source,withdrawn\n"
INPUT_USD, CACHED_USD, OUTPUT_USD = 1, 0.5, 4
"""Dollars a million tokens, so that a token of input is 100 micro-credits."""

Add = Callable[..., Awaitable[str]]


@pytest.fixture
async def add(priced: db.Database, monkeypatch: pytest.MonkeyPatch) -> Add:
    """Adds a provider with priced models and the platform's key: `await add("azure", base_url, ["gpt-4o"], key)`."""
    monkeypatch.setattr("bursar.gateway.desk.REFRESH_SECONDS", 0.0)

    async def make(name: str, base_url: str, models: list[str], key: str | None = None, **columns: Any) -> str:
        name = f"{name}-{uuid7().hex[-12:]}"
        kinds = {"input_tokens": INPUT_USD, "cache_read_tokens": CACHED_USD, "output_tokens": OUTPUT_USD}
        rows = [f"{name},{model},{kind},{usd},1M tokens,,,,,,," for model in models for kind, usd in kinds.items()]
        async with priced.platform() as conn:
            listed = read(HEAD + "\n".join(rows), list_name=name, version="1")
            await import_list(conn, accepted(listed), by=OPERATOR)
            auth = columns.pop("auth", "vendor" if key else "none")
            await put_provider(conn, name=name, kind="openai", base_url=base_url, auth=auth, by=OPERATOR, **columns)
        if key is not None:
            async with priced.tenant(PLATFORM_ORGANIZATION_ID) as conn:
                await add_provider_key(
                    conn,
                    Keyring(priced.settings.master_key),
                    organization_id=PLATFORM_ORGANIZATION_ID,
                    provider=name,
                    secret=key,
                    by=OPERATOR,
                )
        await asyncio.sleep(2.1)  # the price book looks for new names that often
        return name

    return make


def client_of(payer: Payer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1", max_retries=0)


async def charges(payer: Payer, rows: int) -> list[tuple[Any, ...]]:
    """(charged micros, input, cached, output, whether estimated) of each call, once there are so many."""
    found: list[Any] = []
    for _ in range(200):
        found = await payer.rows(
            "select charged_micros, input_tokens, cache_read_tokens, output_tokens, flags & 4 = 4"
            " from ledger.attribution order by booked_at, request_id"
        )
        if len(found) >= rows and (await payer.pool()).held_micros == 0:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(found)


def micros(input_tokens: int, output_tokens: int, cached: int = 0) -> int:
    return int(100 * (INPUT_USD * input_tokens + CACHED_USD * cached + OUTPUT_USD * output_tokens))


# -- Azure


async def test_azures_deployments_are_called_by_their_address_with_version_and_key(payer: Payer, add: Add) -> None:
    resource = azure.Azure()
    async with serving(resource.application()) as address:
        name = await add(
            "azure",
            f"{address}/openai/deployments/{{model}}",
            ["gpt-4o", "team a/gpt 4o"],
            azure.KEY,
            auth="api-key",
            query="api-version=2024-10-21",
        )
        client = client_of(payer)
        answer = await client.chat.completions.create(model=f"{name}/gpt-4o", messages=HELLO, max_tokens=9)
        assert answer.choices[0].message.content == "Good day to you"
        assert answer.model_extra is not None
        assert answer.model_extra["prompt_filter_results"] == azure.PROMPT_FILTER
        stream = await client.chat.completions.create(model=f"{name}/team a/gpt 4o", messages=HELLO, stream=True)
        chunks = [chunk async for chunk in stream]
        assert chunks[0].model_extra is not None
        assert chunks[0].model_extra["prompt_filter_results"] == azure.PROMPT_FILTER, "a chunk without choices passes"
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Good day to you"
        with pytest.raises(openai.BadRequestError) as filtered:
            bad = [{"role": "user", "content": "forbidden"}]
            await client.chat.completions.create(model=f"{name}/gpt-4o", messages=bad, max_tokens=9)
    assert filtered.value.code == "content_filter"
    assert [call.path for call in resource.seen[:2]] == [
        "/openai/deployments/gpt-4o/chat/completions",
        "/openai/deployments/team%20a%2Fgpt%204o/chat/completions",
    ]
    for call in resource.seen:
        assert call.query == {"api-version": "2024-10-21"}
        assert call.headers["api-key"] == azure.KEY
        assert "authorization" not in call.headers
    assert await charges(payer, 2) == [(micros(12, 4), 12, 0, 4, False)] * 2, "what is filtered costs nothing"


async def test_azures_v1_addresses_take_the_deployment_as_the_model(payer: Payer, add: Add) -> None:
    resource = azure.Azure()
    async with serving(resource.application()) as address:
        name = await add("azure", f"{address}/openai/v1", ["gpt-4o"], azure.KEY, auth="api-key")
        client = client_of(payer)
        answer = await client.chat.completions.create(model=f"{name}/gpt-4o", messages=HELLO, max_tokens=9)
        assert answer.choices[0].message.content == "Good day to you"
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model=f"{name}/none-of-ours", messages=HELLO, max_tokens=9)
    assert refused.value.code == "model_not_priced"
    [call] = resource.seen
    assert (call.path, call.query, call.body["model"]) == ("/openai/v1/chat/completions", {}, "gpt-4o")


# -- vLLM


async def test_vllm_needs_no_key_and_counts_in_the_last_chunk_or_in_each(payer: Payer, add: Add) -> None:
    server = vllm.Vllm()
    async with serving(server.application()) as address:
        name = await add("vllm", f"{address}/v1", [vllm.MODEL])
        client = client_of(payer)
        call: dict[str, Any] = {"model": f"{name}/{vllm.MODEL}", "messages": HELLO, "max_tokens": 9}
        answer = await client.chat.completions.create(**call, extra_body={"guided_choice": ["Good day to you"]})
        assert answer.choices[0].message.content == "Good day to you"
        silent = [chunk async for chunk in await client.chat.completions.create(**call, stream=True)]
        assert all(chunk.usage is None for chunk in silent), "usage that only we asked for stays with us"
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        stream = await client.chat.completions.create(**call, stream=True, stream_options=options)
        usages = [chunk.usage async for chunk in stream]
        assert [usage.completion_tokens for usage in usages if usage] == [0, 1, 2, 3, 4, 4, 4]
    assert server.seen[0].body["guided_choice"] == ["Good day to you"]
    assert [each.headers.get("authorization") for each in server.seen] == [None] * 3
    assert await charges(payer, 3) == [(micros(20, 4), 20, 0, 4, False)] * 3


async def test_a_model_that_the_server_does_not_have_costs_nothing(payer: Payer, add: Add) -> None:
    server = vllm.Vllm()
    async with serving(server.application()) as address:
        name = await add("vllm", f"{address}/v1", [vllm.MODEL, "another"])
        with pytest.raises(openai.NotFoundError, match="`another` does not exist"):
            await client_of(payer).chat.completions.create(model=f"{name}/another", messages=HELLO, max_tokens=9)
    assert await charges(payer, 0) == []


# -- Ollama


@pytest.mark.parametrize("counts", [True, False])
async def test_ollamas_streams_are_charged_with_and_without_its_count(payer: Payer, add: Add, counts: bool) -> None:
    server = ollama.Ollama(counts=counts)
    async with serving(server.application()) as address:
        name = await add("ollama", f"{address}/v1", [ollama.MODEL])
        client = client_of(payer)
        call: dict[str, Any] = {"model": f"{name}/{ollama.MODEL}", "messages": HELLO, "max_tokens": 9}
        for _ in range(2):
            stream = await client.chat.completions.create(**call, stream=True, extra_body={"keep_alive": "10m"})
            assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Good day to you"
        assert (await client.chat.completions.create(**call)).usage.total_tokens == 30  # type: ignore[union-attr]
    assert [each.body.get("keep_alive") for each in server.seen] == ["10m", "10m", None]
    assert len(server.connections) == 1, "one connection is used again and again"
    first, second, plain = await charges(payer, 3)
    assert first == second
    assert plain == (micros(26, 4), 26, 0, 4, False)
    assert first == plain if counts else first[4] is True and first[3] > 0, "what is not told is counted by us"


# -- OpenRouter


async def test_openrouters_comments_usage_and_routing_pass_and_its_own_cost_charges_nobody(
    payer: Payer, add: Add
) -> None:
    server = openrouter.OpenRouter()
    async with serving(server.application()) as address:
        name = await add(
            "openrouter",
            f"{address}/api/v1",
            ["meta/llama"],
            openrouter.KEY,
            headers={"HTTP-Referer": "https://acme.example", "X-Title": "Acme"},
        )
        client = client_of(payer)
        call: dict[str, Any] = {"model": f"{name}/meta/llama", "messages": HELLO, "max_tokens": 9}
        routing = {"provider": {"order": ["Together"], "allow_fallbacks": False, "data_collection": "deny"}}
        answer = await client.chat.completions.create(**call, extra_body=routing)
        assert answer.usage is not None
        assert answer.usage.model_extra is not None
        assert answer.usage.model_extra["cost"] == 0.99, "the client sees it"
        stream = await client.chat.completions.create(**call, stream=True, extra_body=routing)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "Good day to you"
        raw = await payer.post({**call, "stream": True})
        assert raw.text.startswith(openrouter.COMMENT)
    for each in server.seen:
        assert each.body["model"] == "meta/llama"
        assert (each.headers["http-referer"], each.headers["x-title"]) == ("https://acme.example", "Acme")
    assert server.seen[0].body["provider"] == routing["provider"]
    assert await charges(payer, 3) == [(micros(30, 4, cached=10), 30, 10, 4, False)] * 3


async def test_openrouters_errors_in_mid_stream_reach_the_client_and_what_came_before_is_charged(
    payer: Payer, add: Add
) -> None:
    server = openrouter.OpenRouter()
    async with serving(server.application()) as address:
        name = await add("openrouter", f"{address}/api/v1", ["meta/llama"], openrouter.KEY)
        client = client_of(payer)
        call: dict[str, Any] = {"model": f"{name}/meta/llama", "max_tokens": 9}
        breaks = [{"role": "user", "content": "it breaks"}]
        got = ""
        with pytest.raises(openai.APIError, match="Provider disconnected"):
            async for chunk in await client.chat.completions.create(**call, messages=breaks, stream=True):
                got += chunk.choices[0].delta.content or ""
        assert got == "Good day "
        [(charged, input_tokens, _, output_tokens, estimated)] = await charges(payer, 1)
        assert estimated
        assert output_tokens > 0
        assert charged == micros(input_tokens, output_tokens)
        failed = await payer.post({**call, "messages": breaks})
        assert failed.json()["error"]["message"] == "Provider returned error"
        assert failed.headers["bursar-charged"] == format_credits(0), "an error that comes with status 200"
        half = await payer.post({**call, "messages": [{"role": "user", "content": "only half"}]})
        assert half.headers["bursar-charged"] != format_credits(0), "but what was put out is charged"
        poor = await payer.post({**call, "messages": [{"role": "user", "content": "no credits"}]})
    assert poor.status_code >= 402
    assert len(await charges(payer, 2)) == 2


# -- what the operator may fix


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"base_url": "https://{model}.example/v1"}, InvalidBaseUrl),
        ({"base_url": "https://x.example/{model}/{model}"}, InvalidBaseUrl),
        ({"base_url": "https://x.example/{deployment}"}, InvalidBaseUrl),
        ({"query": "?api-version=1"}, InvalidBaseUrl),
        ({"query": "api-version=1#x"}, InvalidBaseUrl),
        ({"query": "a=1 b=2"}, InvalidBaseUrl),
        ({"query": "api-version=1&key=AIza"}, InvalidBaseUrl),
        ({"query": "API-KEY=x"}, InvalidBaseUrl),
        ({"headers": {"Authorization": "Bearer x"}}, InvalidProviderHeader),
        ({"headers": {"Api-Key": "x"}}, InvalidProviderHeader),
        ({"headers": {"Host": "x"}}, InvalidProviderHeader),
        ({"headers": {"Content-Length": "1"}}, InvalidProviderHeader),
        ({"headers": {"X-Two": "a\r\nb"}}, InvalidProviderHeader),
        ({"headers": {"bad name": "x"}}, InvalidProviderHeader),
        ({"headers": {"x-empty": ""}}, InvalidProviderHeader),
        ({"headers": {f"x-{n}": "x" for n in range(21)}}, InvalidProviderHeader),
        ({"litellm_provider": "cohere_chat"}, InvalidProvider),
        ({"kind": "litellm", "base_url": None, "litellm_provider": "../x"}, InvalidProvider),
        ({"kind": "litellm", "base_url": None, "query": "a=b"}, InvalidProvider),
    ],
)
async def test_what_would_leak_or_break_a_call_cannot_be_fixed(
    database: db.Database, columns: dict[str, Any], problem: type[Exception]
) -> None:
    values = {"kind": "openai", "base_url": "https://x.example/v1", **columns}
    with pytest.raises(problem):
        async with database.platform() as conn:
            await put_provider(conn, name=f"x-{uuid7().hex}", by=OPERATOR, **values)
