import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import anthropic
import openai
import pytest

from bursar.gateway import anthropic_wire, demo_provider, openai_wire, responses_wire, tokens, wire

MESSAGES: Any = [{"role": "user", "content": "What does a treasurer do?"}]
TOOL: Any = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


WIRES: dict[str, wire.Wire] = {
    "/chat/completions": openai_wire,
    "/responses": responses_wire,
    "/messages": anthropic_wire,
}
READERS = {path: format.read_usage for path, format in WIRES.items()}  # type: ignore[attr-defined]


def asked(path: str, **body: Any) -> dict[str, Any]:
    """A request in the form of a path."""
    request = {"model": "demo-1", "messages": MESSAGES, "max_tokens": 100, **body}
    if path == "/responses":
        request |= {"input": request.pop("messages"), "max_output_tokens": request.pop("max_tokens")}
    return request


def directed(directions: str) -> dict[str, str]:
    return {"Bursar-Demo": directions}


@pytest.fixture(scope="module")
async def base_url() -> AsyncIterator[str]:
    async with demo_provider.running() as url:
        yield url


@pytest.fixture
async def openai_client(base_url: str) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
async def anthropic_client(base_url: str) -> AsyncIterator[anthropic.AsyncAnthropic]:
    url = base_url.removesuffix("/v1")
    async with anthropic.AsyncAnthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield client


async def post(url: str, path: str, directions: str = "", **body: Any) -> tuple[int, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.post(url + path, json=asked(path, **body), headers=directed(directions)) as answer,
    ):
        return answer.status, await answer.read()


# -- OpenAI's client


async def test_openais_client_gets_a_plain_answer(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(model="demo-1", messages=MESSAGES)
    text = answer.choices[0].message.content
    assert text is not None
    assert answer.usage is not None
    assert answer.usage.completion_tokens == tokens.count_tokens(text)
    assert answer.choices[0].finish_reason == "stop"


async def test_openais_client_gets_the_same_answer_as_a_stream(openai_client: openai.AsyncOpenAI) -> None:
    plain = await openai_client.chat.completions.create(model="demo-1", messages=MESSAGES)
    stream = await openai_client.chat.completions.create(
        model="demo-1", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert chunks[-1].usage == plain.usage
    assert chunks[-1].choices == []


async def test_a_stream_reports_usage_only_when_asked(openai_client: openai.AsyncOpenAI) -> None:
    stream = await openai_client.chat.completions.create(model="demo-1", messages=MESSAGES, stream=True)
    assert all(chunk.usage is None and chunk.choices for chunk in [chunk async for chunk in stream])


async def test_openais_helper_follows_a_tool_call(openai_client: openai.AsyncOpenAI) -> None:
    plain = await openai_client.chat.completions.create(
        model="demo-1", messages=MESSAGES, tools=[TOOL], extra_headers=directed("tool_calls=2; output_tokens=5")
    )
    assert plain.choices[0].finish_reason == "tool_calls"
    calls = plain.choices[0].message.tool_calls
    assert calls is not None
    assert [call.type == "function" and call.function.name for call in calls] == ["weather", "weather"]
    async with openai_client.chat.completions.stream(
        model="demo-1", messages=MESSAGES, tools=[TOOL], extra_headers=directed("tool_calls=2; output_tokens=5")
    ) as stream:
        final = await stream.get_final_completion()
    streamed = final.choices[0].message.tool_calls
    assert streamed is not None
    assert [call.function.arguments for call in streamed] == [
        call.function.arguments for call in calls if call.type == "function"
    ]


async def test_several_choices_are_counted_together(openai_client: openai.AsyncOpenAI) -> None:
    answer = await openai_client.chat.completions.create(
        model="demo-1", messages=MESSAGES, n=3, max_completion_tokens=10
    )
    assert answer.usage is not None
    assert (len(answer.choices), answer.usage.completion_tokens) == (3, 30)
    assert {choice.finish_reason for choice in answer.choices} == {"length"}
    assert len({choice.message.content for choice in answer.choices}) == 3


async def test_openais_client_lists_models(openai_client: openai.AsyncOpenAI) -> None:
    assert {model.id async for model in openai_client.models.list()} == set(demo_provider.MODELS)


# -- Anthropic's client


async def test_anthropics_client_gets_a_plain_answer(anthropic_client: anthropic.AsyncAnthropic) -> None:
    answer = await anthropic_client.messages.create(model="demo-claude", messages=MESSAGES, max_tokens=1_000)
    block = answer.content[0]
    assert block.type == "text"
    assert answer.usage.output_tokens == tokens.count_tokens(block.text)
    assert answer.stop_reason == "end_turn"


async def test_anthropics_client_gets_the_same_answer_as_a_stream(anthropic_client: anthropic.AsyncAnthropic) -> None:
    plain = await anthropic_client.messages.create(model="demo-claude", messages=MESSAGES, max_tokens=1_000)
    async with anthropic_client.messages.stream(model="demo-claude", messages=MESSAGES, max_tokens=1_000) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    block = plain.content[0]
    assert block.type == "text"
    assert text == block.text
    assert (final.usage.input_tokens, final.usage.output_tokens) == (
        plain.usage.input_tokens,
        plain.usage.output_tokens,
    )


async def test_anthropics_helper_follows_a_tool_call(anthropic_client: anthropic.AsyncAnthropic) -> None:
    tool: Any = {"name": "weather", "input_schema": {"type": "object"}}
    async with anthropic_client.messages.stream(
        model="demo-claude", messages=MESSAGES, max_tokens=50, tools=[tool], extra_headers=directed("tool_calls=1")
    ) as stream:
        final = await stream.get_final_message()
    assert final.stop_reason == "tool_use"
    block = final.content[0]
    assert block.type == "tool_use"
    assert (block.name, set(block.input)) == ("weather", {"text"})


async def test_anthropics_client_lists_models(anthropic_client: anthropic.AsyncAnthropic) -> None:
    assert {model.id async for model in anthropic_client.models.list()} == set(demo_provider.MODELS)


# -- directions


@pytest.mark.parametrize("path", WIRES)
async def test_the_same_request_has_the_same_answer(base_url: str, path: str) -> None:
    assert await post(base_url, path) == await post(base_url, path)


@pytest.mark.parametrize("path", WIRES)
async def test_the_output_is_at_most_the_limit_unless_told_otherwise(base_url: str, path: str) -> None:
    async def output(directions: str, limit: int) -> int:
        _, body = await post(base_url, path, directions, max_tokens=limit)
        usage = READERS[path](json.dumps(json.loads(body)["usage"]).encode())
        assert usage is not None
        return int(usage.output_tokens)

    assert await output("", 5) == 5
    assert 16 <= await output("", 1_000) < 256
    assert await output("output_tokens=40", 5) == 40
    assert await output("output_tokens=5000", 5) == 5_000


async def test_it_reports_what_it_is_told_to(base_url: str) -> None:
    told = "cached=5; reasoning=20; output_tokens=10"
    _, body = await post(base_url, "/chat/completions", told)
    usage = openai_wire.read_usage(json.dumps(json.loads(body)["usage"]).encode())
    assert usage is not None
    assert (usage.cache_read_tokens, usage.reasoning_tokens, usage.output_tokens) == (5, 20, 30)
    _, body = await post(base_url, "/messages", told + "; cache_write=2; cache_write_1h=3; searches=4")
    usage = anthropic_wire.read_usage(json.dumps(json.loads(body)["usage"]).encode())
    assert usage is not None
    assert usage.as_array()[1:6] == (5, 2, 3, 30, 20)
    assert usage.web_searches == 4
    _, body = await post(base_url, "/responses", told + "; searches=4; file_searches=3; code_sessions=2")
    meter = responses_wire.UsageMeter(responses_wire.read_request(json.dumps(asked("/responses")).encode()))
    meter.read_body(body)
    found = meter.usage()
    assert found is not None
    assert (found.cache_read_tokens, found.reasoning_tokens, found.output_tokens) == (5, 20, 30)
    assert (found.web_searches, found.file_searches, found.code_sessions) == (4, 3, 2)


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize("stream", [False, True])
async def test_usage_can_be_missing(base_url: str, path: str, stream: bool) -> None:
    _, body = await post(base_url, path, "usage=missing", stream=stream, stream_options={"include_usage": True})
    assert b'"usage":{' not in body


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500, 503, 529])
async def test_failures_have_the_vendors_shape(
    openai_client: openai.AsyncOpenAI, anthropic_client: anthropic.AsyncAnthropic, status: int
) -> None:
    with pytest.raises(openai.APIStatusError) as openais:
        await openai_client.chat.completions.create(
            model="demo-1", messages=MESSAGES, extra_headers=directed(f"fail={status}")
        )
    assert (openais.value.status_code, isinstance(openais.value.body, dict)) == (status, True)
    with pytest.raises(anthropic.APIStatusError) as anthropics:
        await anthropic_client.messages.create(
            model="demo-1", messages=MESSAGES, max_tokens=9, extra_headers=directed(f"fail={status}")
        )
    body: Any = anthropics.value.body
    assert (anthropics.value.status_code, body["type"]) == (status, "error")


@pytest.mark.parametrize("path", WIRES)
@pytest.mark.parametrize(
    ("directions", "stream"), [("break_after=3", True), ("break_after=0", False), ("break_after=1", False)]
)
async def test_the_connection_can_break(base_url: str, path: str, directions: str, stream: bool) -> None:
    with pytest.raises(aiohttp.ClientError):
        await post(base_url, path, directions, stream=stream)


async def test_a_broken_stream_has_the_pieces_before_the_break(base_url: str) -> None:
    request = {"model": "demo-1", "messages": MESSAGES, "stream": True}
    meter = openai_wire.UsageMeter(openai_wire.read_request(json.dumps(request).encode()))
    async with (
        aiohttp.ClientSession(headers=directed("break_after=3")) as session,
        session.post(base_url + "/chat/completions", json=request) as answer,
    ):
        with pytest.raises(aiohttp.ClientPayloadError):
            async for piece in answer.content.iter_any():
                meter.feed(piece)
    assert (meter.output_so_far, meter.completed) == (3, False)


@pytest.mark.parametrize("path", WIRES)
async def test_an_error_can_come_in_the_middle_of_a_stream(base_url: str, path: str) -> None:
    meter = WIRES[path].UsageMeter(WIRES[path].read_request(json.dumps(asked(path, stream=True)).encode()))
    status, body = await post(base_url, path, "error_after=2", stream=True)
    meter.feed(body)
    assert (status, meter.output_so_far, meter.completed, bool(meter.error)) == (200, 2, False, True)


async def test_it_can_be_slow_before_the_first_byte_and_between_pieces(base_url: str) -> None:
    start = time.monotonic()
    await post(base_url, "/chat/completions", "delay_ms=100; piece_ms=20; output_tokens=5", stream=True)
    assert time.monotonic() - start >= 0.2


@pytest.mark.parametrize("directions", ["nonsense", "delay_ms=soon", "fail=-1", "output_tokens=", "Fail=500"])
async def test_a_direction_that_is_not_known_is_refused(base_url: str, directions: str) -> None:
    status, body = await post(base_url, "/chat/completions", directions)
    assert (status, "Bursar-Demo" in json.loads(body)["error"]["message"]) == (400, True)


@pytest.mark.parametrize("path", WIRES)
async def test_the_estimate_of_the_input_is_exact_here(base_url: str, path: str) -> None:
    estimate = WIRES[path].read_request(json.dumps(asked(path, max_tokens=10)).encode())
    _, body = await post(base_url, path, max_tokens=10)
    meter = WIRES[path].UsageMeter(estimate)
    meter.read_body(body)
    assert meter.usage() == estimate.hold_for(10)


async def test_many_calls_at_once_are_all_answered(base_url: str) -> None:
    answers = await asyncio.gather(*(post(base_url, "/chat/completions", "delay_ms=20") for _ in range(50)))
    assert {status for status, _ in answers} == {200}
