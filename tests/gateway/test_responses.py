"""Responses through the whole path, as the official client and plain HTTP see them."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from typing import Any

import aiohttp
import openai
import pydantic
import pytest
from aiohttp import web
from tests.conftest import Org
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import Cable, Provider, served
from tests.gateway.test_front import settled, streamed_charge

from bursar import db
from bursar.credits.limits import Scope, set_limit
from bursar.gateway import responses_wire, tools
from bursar.money import Micros, format_credits
from bursar.settings import Settings

CALL: dict[str, Any] = {"model": "demo-1", "max_output_tokens": 20, "input": "hello there"}
# 10 input tokens at 1 USD and 20 output tokens at 4 USD a million: 90 micro-dollars, which are 0.009 credits.
CALL_MICROS = Micros(9_000)
SEARCH_MICROS = 1_000_000  # at 10 USD a thousand
PATH = "/v1/responses"
FUNCTION: Any = {"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": False}


@pytest.fixture
def client(payer: Payer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1", max_retries=0)


@pytest.fixture
async def scripted(priced: db.Database, settings: Settings, payer: Payer) -> AsyncIterator[tuple[Payer, Provider]]:
    """The payer before an application whose provider follows scripts."""
    provider = Provider()
    async with served(priced, settings, provider, Cable(priced.dsn("bursar_lane"))) as (base_url, _):
        yield replace(payer, base_url=base_url), provider


def directed(directions: str) -> dict[str, str]:
    return {"bursar-demo": directions}


async def usage_row(payer: Payer) -> tuple[int, ...]:
    """Charge and counts of the only request."""
    [row] = await payer.rows(
        "select charged_micros, flags & 4, input_tokens, output_tokens, web_searches, file_searches, code_sessions"
        " from ledger.attribution"
    )
    return tuple(row)


# -- what the official client does


async def test_the_official_client_gets_a_response_and_headers_ledger_and_pool_agree(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    raw = await client.responses.with_raw_response.create(**CALL)
    response = raw.parse()
    assert response.usage is not None
    assert (response.usage.input_tokens, response.usage.output_tokens) == (10, 20)
    assert response.output_text
    assert raw.headers["bursar-charged"] == format_credits(CALL_MICROS)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (CALL_MICROS, 0)
    assert raw.headers["bursar-available"] == format_credits(pool.available_micros)
    assert await usage_row(payer) == (CALL_MICROS, 0, 10, 20, 0, 0, 0)


async def test_the_synchronous_client_gets_the_same(payer: Payer) -> None:
    whole = {**CALL, "max_output_tokens": 1_000}

    def ask() -> tuple[str, str]:
        client = openai.OpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1")
        with client, client.responses.stream(**whole) as stream:
            return client.responses.create(**whole).output_text, stream.get_final_response().output_text

    plain, streamed = await asyncio.to_thread(ask)
    assert plain == streamed != ""


async def test_the_official_client_streams_the_same_response(payer: Payer, client: openai.AsyncOpenAI) -> None:
    whole = {**CALL, "max_output_tokens": 1_000}
    plain = await client.responses.create(**whole)
    events = [event async for event in await client.responses.create(**whole, stream=True)]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == plain.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    last = events[-1]
    assert last.type == "response.completed"
    assert last.response.output_text == plain.output_text
    assert last.response.usage == plain.usage
    rows = await settled(payer, 2)
    assert rows[0][0] == rows[1][0] > 0


async def test_the_stream_helper_follows_text_and_tool_calls(payer: Payer, client: openai.AsyncOpenAI) -> None:
    whole: dict[str, Any] = {**CALL, "max_output_tokens": 1_000}
    async with client.responses.stream(**whole) as stream:
        final = await stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text
    async with client.responses.stream(
        **whole, tools=[FUNCTION], extra_headers=directed("tool_calls=2; output_tokens=5")
    ) as stream:
        called = await stream.get_final_response()
    calls = [item for item in called.output if item.type == "function_call"]
    assert [call.name for call in calls] == ["look_up", "look_up"]
    assert all("text" in json.loads(call.arguments) for call in calls)
    assert len(await settled(payer, 2)) == 2


async def test_a_response_that_its_limit_cuts_is_incomplete_and_settled(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    plain = await client.responses.create(**CALL)
    assert (plain.status, plain.incomplete_details and plain.incomplete_details.reason) == (
        *("incomplete", "max_output_tokens"),
    )
    events = [event async for event in await client.responses.create(**CALL, stream=True)]
    assert events[-1].type == "response.incomplete"
    assert [row[0] for row in await settled(payer, 2)] == [CALL_MICROS] * 2


async def test_reasoning_and_cache_are_what_the_provider_reports(payer: Payer, client: openai.AsyncOpenAI) -> None:
    response = await client.responses.create(
        **CALL, reasoning={"effort": "low"}, extra_headers=directed("reasoning=7; cached=4; cache_write=3")
    )
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 7
    [row] = await payer.rows(
        "select input_tokens, cache_read_tokens, cache_write_5m_tokens, output_tokens, reasoning_tokens"
        " from ledger.attribution"
    )
    assert row == (3, 4, 3, 27, 7)


async def test_images_files_and_earlier_turns_go_through(payer: Payer, client: openai.AsyncOpenAI) -> None:
    first = await client.responses.create(**CALL)
    content: Any = [
        {"type": "input_text", "text": "What is this?"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"},
        {"type": "input_file", "filename": "a.pdf", "file_data": "data:application/pdf;base64,AAAA"},
    ]
    turns: Any = [*[item.model_dump() for item in first.output], {"role": "user", "content": content}]
    answer = await client.responses.create(model="demo-1", max_output_tokens=20, input=turns, store=False)
    assert answer.usage is not None
    assert 85 + 1_500 < answer.usage.input_tokens < 85 + 1_500 + 100


class Invoice(pydantic.BaseModel):
    number: int
    paid: bool


async def test_structured_outputs_are_parsed(scripted: tuple[Payer, Provider]) -> None:
    """The provider demo does not follow schemas: a script stands in for one that does."""
    payer, provider = scripted
    message = {"type": "output_text", "text": '{"number": 17, "paid": true}', "annotations": []}

    async def structured(request: web.Request) -> web.StreamResponse:
        asked = await request.json()
        assert asked["text"]["format"]["type"] == "json_schema"
        item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [message]}
        usage = {"input_tokens": 40, "output_tokens": 12, "total_tokens": 52}
        return web.json_response({"id": "resp_1", "object": "response", "status": "completed", "output": [item],
                                  "model": "demo-1", "usage": usage})  # fmt: skip

    async with openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1") as client:
        response = await client.responses.parse(
            model="demo-1", input="Read it", text_format=Invoice, extra_headers=directed(provider.script(structured))
        )
    assert response.output_parsed == Invoice(number=17, paid=True)
    assert (await usage_row(payer))[:4] == (40 * 100 + 12 * 400, 0, 40, 12)


async def test_a_context_is_compacted_and_charged(payer: Payer, client: openai.AsyncOpenAI) -> None:
    compact = await client.responses.compact(
        model="demo-1", input="hello there", extra_headers=directed("output_tokens=30")
    )
    assert compact.usage is not None
    assert (compact.object, compact.usage.output_tokens) == ("response.compaction", 30)
    assert await usage_row(payer) == (10 * 100 + 30 * 400, 0, 10, 30, 0, 0, 0)
    streamed = await payer.post({**CALL, "stream": True}, path=f"{PATH}/compact")
    assert (streamed.status_code, streamed.json()["error"]["code"]) == (400, "unreadable_request")


# -- holds and refusals


async def test_context_that_the_provider_keeps_is_held_for(payer: Payer, client: openai.AsyncOpenAI) -> None:
    raw = await client.responses.with_streaming_response.create(
        **CALL, previous_response_id="resp_1", stream=True
    ).__aenter__()
    held = Micros((10 + responses_wire.PRIOR_CONTEXT_TOKENS) * 100 + 20 * 400)
    assert raw.headers["bursar-held"] == format_credits(held)
    await raw.close()


async def test_under_a_strict_limit_neither_context_nor_calls_of_tools_are_guessed(payer: Payer) -> None:
    async with payer.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.KEY,
            scope_id=payer.api_key_id,
            amount=Micros(100_000_000),
            is_strict=True,
        )
    body = {**CALL, "stream": True}
    kept = await payer.post({**body, "previous_response_id": "resp_1"}, path=PATH)
    # demo-1 takes 200,000 tokens of input.
    assert kept.headers["bursar-held"] == format_credits(Micros(200_000 * 100 + 20 * 400))
    searching = {**body, "tools": [{"type": "web_search"}]}
    refused = await payer.post(searching, path=PATH)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "cap_reached"), "a thousand searches"
    limited = await payer.post({**searching, "max_tool_calls": 1}, path=PATH)
    assert limited.status_code == 200
    assert Decimal(limited.headers["bursar-held"]) < 2


async def test_a_response_in_the_background_is_refused_and_none_can_be_fetched(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await client.responses.create(**CALL, background=True)
    assert (refused.value.code, refused.value.param) == ("background_not_metered", "background")
    for work in (client.responses.retrieve("resp_1"), client.responses.cancel("resp_1")):
        with pytest.raises(openai.NotFoundError) as missing:
            await work
        assert missing.value.code == "not_metered"
    assert (await payer.pool()).held_micros == 0


async def test_a_refusal_is_402_in_openais_shape(payer: Payer, client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await client.responses.create(**{**CALL, "max_output_tokens": 9_000_000})
    assert (refused.value.status_code, refused.value.code) == (402, "pool_exhausted")


async def test_a_tool_without_a_price_is_refused_like_a_model_without_one(payer: Payer) -> None:
    image = await payer.post({**CALL, "tools": [{"type": "image_generation"}]}, path=PATH)
    assert (image.status_code, image.json()["error"]["code"]) == (400, "model_not_priced")
    assert "image_generation" in image.json()["error"]["message"]
    # demo-1-mini has no price for searches.
    search = await payer.post({**CALL, "model": "demo-1-mini", "tools": [{"type": "web_search"}]}, path=PATH)
    assert (search.status_code, search.json()["error"]["code"]) == (400, "model_not_priced")
    chat = {"model": "demo-1", "messages": [], "tools": [{"type": "browser_search"}]}
    assert (await payer.post(chat)).json()["error"]["code"] == "model_not_priced"
    claude = {"model": "demo-claude", "max_tokens": 9, "messages": [], "tools": [{"type": "dream_20270101"}]}
    answer = await payer.post(claude, path="/v1/messages", anthropic_version="2023-06-01")
    assert answer.json()["error"]["code"] == "model_not_priced"
    assert (await payer.pool()).used_micros == 0


# -- tools


@pytest.mark.parametrize("stream", [False, True])
async def test_searches_files_and_containers_are_charged_as_they_were_used(payer: Payer, stream: bool) -> None:
    offered = [{"type": "web_search"}, {"type": "file_search", "vector_store_ids": ["vs_1"]},
               {"type": "code_interpreter", "container": "cntr_1"}]  # fmt: skip
    answer = await payer.post(
        {**CALL, "tools": offered, "stream": stream},
        path=PATH,
        bursar_demo="searches=3; file_searches=2; code_sessions=1",
    )
    assert answer.status_code == 200, answer.text
    charged, estimated, tokens_in, tokens_out, *calls = await usage_row(payer)
    assert calls == [3, 2, 1]
    # 10 USD and 2.5 USD a thousand, and 0.03 USD a container.
    assert charged == tokens_in * 100 + tokens_out * 400 + 3 * SEARCH_MICROS + 2 * 250_000 + 3_000_000
    assert estimated == 0
    assert (await payer.pool()).held_micros == 0


async def test_what_tools_may_use_is_held_for(payer: Payer) -> None:
    body = {**CALL, "tools": [{"type": "web_search"}], "stream": True}
    first = await payer.post(body, path=PATH)
    second = await payer.post({**body, "max_tool_calls": 2}, path=PATH)
    held = [Decimal(answer.headers["bursar-held"]) * 1_000_000 for answer in (first, second)]
    assert held[0] - held[1] == (tools.PRIOR_CALLS - 2) * SEARCH_MICROS


async def test_code_that_anthropic_runs_is_charged_by_the_container(payer: Payer) -> None:
    body = {
        "model": "demo-claude",
        "max_tokens": 20,
        "messages": [{"role": "user", "content": "hello there"}],
        "tools": [{"type": "code_execution_20250825", "name": "code_execution"}],
    }
    answer = await payer.post(body, path="/v1/messages", bursar_demo="code_sessions=1", anthropic_version="2023-06-01")
    assert answer.status_code == 200, answer.text
    charged, _, tokens_in, tokens_out, *calls = await usage_row(payer)
    assert calls == [0, 0, 1]
    assert charged == tokens_in * 300 + tokens_out * 1_500 + 5_000_000


# -- failures


@pytest.mark.parametrize("directions", ["fail=500", "fail=429", "fail=400"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_fails_is_passed_on_and_costs_nothing(
    payer: Payer, directions: str, stream: bool
) -> None:
    answer = await payer.post({**CALL, "stream": stream}, path=PATH, bursar_demo=directions)
    assert answer.status_code == int(directions.removeprefix("fail="))
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)


async def test_a_plain_answer_that_breaks_off_costs_nothing(payer: Payer) -> None:
    answer = await payer.post(CALL, path=PATH, bursar_demo="break_after=1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    assert (await payer.pool()).used_micros == 0


async def test_a_stream_that_breaks_off_is_charged_what_was_seen_and_the_client_raises(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    seen = []
    with pytest.raises(openai.APIError) as broken:
        async for event in await client.responses.create(
            **CALL, stream=True, extra_headers=directed("break_after=3; searches=1; piece_ms=20")
        ):
            seen.append(event.type)
    assert broken.value.code == "provider_broke_off"
    assert seen.count("response.output_text.delta") == 3
    await settled(payer, 1)
    charged, estimated, tokens_in, tokens_out, *calls = await usage_row(payer)
    assert (estimated, tokens_in, tokens_out, calls) == (4, 10, 3, [1, 0, 0])
    assert charged == 10 * 100 + 3 * 400 + SEARCH_MICROS


async def test_an_error_event_goes_on_and_what_came_before_it_is_charged(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    stream = await client.responses.create(**CALL, stream=True, extra_headers=directed("error_after=4"))
    events = [event async for event in stream]
    assert events[-1].type == "error"
    assert events[-1].code == "server_error"
    await settled(payer, 1)
    assert (await usage_row(payer))[:4] == (10 * 100 + 4 * 400, 4, 10, 4)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("usage", ["missing", "zero"])
async def test_missing_usage_is_counted_by_us_and_marked(payer: Payer, stream: bool, usage: str) -> None:
    answer = await payer.post({**CALL, "stream": stream}, path=PATH, bursar_demo=f"usage={usage}")
    assert answer.status_code == 200
    await settled(payer, 1)
    assert (await usage_row(payer))[:4] == (CALL_MICROS, 4, 10, 20)


async def test_a_client_that_hangs_up_in_mid_stream_pays_for_what_was_streamed(payer: Payer) -> None:
    headers = {"authorization": f"Bearer {payer.key}", "bursar-demo": "piece_ms=50; output_tokens=200"}
    body = {**CALL, "stream": True, "max_output_tokens": 200}
    async with aiohttp.ClientSession() as session:
        answer = await session.post(f"{payer.base_url}{PATH}", json=body, headers=headers)
        while b"output_text.delta" not in await answer.content.readline():
            pass
        answer.close()
    [row] = await settled(payer, 1)
    assert 1_000 < row[0] < 81_000, "more than its input, less than all of it"
    assert row[1] & 4


async def test_a_stream_outgrows_its_hold_and_is_ended_where_a_limit_stops_it(org: Org, base_url: str) -> None:
    await fund(org, Micros(450_000))
    key = await org.key(await org.member())
    payer = Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)
    body = {"model": "demo-1", "stream": True, "input": "hello there"}
    answer = await payer.post(body, path=PATH, bursar_demo="output_tokens=20000; piece_ms=1")
    assert answer.status_code == 200
    assert "event: error\n" in answer.text
    assert "pool_exhausted" in answer.text
    [row] = await settled(payer, 1)
    assert row[2] < 20_000
    assert streamed_charge(answer.text) == format_credits(Micros(row[0]))


async def test_a_response_that_failed_before_it_began_costs_nothing(scripted: tuple[Payer, Provider]) -> None:
    payer, provider = scripted

    async def failing(request: web.Request) -> web.StreamResponse:
        error = {"code": "server_error", "message": "Sorry"}
        failed = {"id": "resp_1", "status": "failed", "error": error, "output": [], "usage": None}
        if not (await request.json()).get("stream"):
            return web.json_response(failed)
        event = json.dumps({"type": "response.failed", "sequence_number": 0, "response": failed})
        return web.Response(body=f"event: response.failed\ndata: {event}\n\n", content_type="text/event-stream")

    for stream in (False, True):
        answer = await payer.post({**CALL, "stream": stream}, path=PATH, bursar_demo=provider.script(failing))
        assert answer.status_code == 200
    assert [row[0] for row in await settled(payer, 1)] == [0]  # the stream; the plain call is released
    assert await payer.rows("select outcome from credits.unbilled_requests") == [("released",)]
