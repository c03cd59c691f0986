"""How the vendors' own clients take our refusals."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anthropic
import openai
import pytest
from aiohttp import web

from bursar.gateway import anthropic_wire, openai_wire, sse
from bursar.problems import Problem

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
CHUNK = (
    b'data: {"id":"c","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"content":"Hello"},"finish_reason":null}]}\n\n'
)
START = (
    b'event: message_start\ndata: {"type":"message_start","message":{"id":"m","type":"message","role":"assistant",'
    b'"content":[],"model":"m","stop_reason":null,"stop_sequence":null,"usage":{"input_tokens":1,"output_tokens":1}}}\n\n'
)


class Empty(Problem):
    status, code, title = 402, "test_refusals_pool_exhausted", "Not enough credits"


REFUSAL = Empty("The pool is empty.", why={"binding": "pool"})


@asynccontextmanager
async def answering(body: bytes, status: int = 200, content_type: str = "text/event-stream") -> AsyncIterator[Any]:
    """A server with one answer for all; gives its address and the list of the calls that it got."""
    calls: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        calls.append(request.path)
        return web.Response(body=body, status=status, headers={"content-type": content_type, "x-should-retry": "false"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", calls
    finally:
        await runner.cleanup()


async def test_openais_client_sees_code_and_why_and_does_not_try_again() -> None:
    async with answering(openai_wire.refusal(REFUSAL), 402, "application/json") as (url, calls):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k", max_retries=3)
        with pytest.raises(openai.APIStatusError) as refused:
            await client.chat.completions.create(model="m", messages=MESSAGES)
    body: Any = refused.value.body
    assert (refused.value.status_code, refused.value.code, body["why"]) == (402, REFUSAL.code, {"binding": "pool"})
    assert len(calls) == 1


async def test_anthropics_client_sees_code_and_why_and_does_not_try_again() -> None:
    async with answering(anthropic_wire.refusal(REFUSAL), 402, "application/json") as (url, calls):
        client = anthropic.AsyncAnthropic(base_url=url, api_key="k", max_retries=3)
        with pytest.raises(anthropic.APIStatusError) as refused:
            await client.messages.create(model="m", messages=MESSAGES, max_tokens=9)
    body: Any = refused.value.body
    assert (body["error"]["type"], body["error"]["code"]) == ("billing_error", REFUSAL.code)
    assert body["error"]["why"] == {"binding": "pool"}
    assert len(calls) == 1


async def test_openais_client_raises_on_a_refusal_in_the_middle_of_a_stream() -> None:
    async with answering(CHUNK + openai_wire.stream_refusal(REFUSAL) + sse.comment_bytes("bursar-charged=1")) as (
        url,
        _,
    ):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k")
        seen = []
        with pytest.raises(openai.APIError) as refused:
            async for chunk in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True):
                seen.append(chunk.choices[0].delta.content)
    assert (seen, refused.value.code) == (["Hello"], REFUSAL.code)


async def test_anthropics_client_raises_on_a_refusal_in_the_middle_of_a_stream() -> None:
    async with answering(START + anthropic_wire.stream_refusal(REFUSAL) + sse.comment_bytes("bursar-charged=1")) as (
        url,
        _,
    ):
        client = anthropic.AsyncAnthropic(base_url=url, api_key="k")
        seen = []
        with pytest.raises(anthropic.APIStatusError) as refused:
            async for event in await client.messages.create(model="m", messages=MESSAGES, max_tokens=9, stream=True):
                seen.append(event.type)
    assert (seen, REFUSAL.code in str(refused.value)) == (["message_start"], True)


async def test_a_comment_at_the_end_disturbs_neither_client() -> None:
    comment = sse.comment_bytes("bursar-charged=0.000123 available=5")
    async with answering(CHUNK + b"data: [DONE]\n\n" + comment) as (url, _):
        client = openai.AsyncOpenAI(base_url=url + "/v1", api_key="k")
        chunks = [c async for c in await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)]
        assert len(chunks) == 1
    stop = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
    async with answering(START + stop + comment) as (url, _):
        anthropics = anthropic.AsyncAnthropic(base_url=url, api_key="k")
        stream = await anthropics.messages.create(model="m", messages=MESSAGES, max_tokens=9, stream=True)
        assert [event.type async for event in stream] == ["message_start", "message_stop"]
