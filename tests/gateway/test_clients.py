"""The official clients find at Bursar what they find at the vendor: each scene is played to both and looks alike."""

import asyncio
import email
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import anthropic
import openai
import pydantic
import pytest
from aiohttp import web
from tests.conftest import Org
from tests.gateway.conftest import fund
from tests.gateway.scripted import Cable, Provider, served
from tests.gateway.sounds import wav

from bursar import db
from bursar.money import Micros
from bursar.settings import Settings

HELLO: list[Any] = [{"role": "user", "content": "hello there"}]
CHAT: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": HELLO}
CLAUDE: dict[str, Any] = {"model": "demo-claude", "max_tokens": 20, "messages": HELLO}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
]
RESPONSE: dict[str, Any] = {"model": "demo-1", "max_output_tokens": 20, "input": "hello there"}
RESPONSE_TOOLS: list[Any] = [
    {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}, "strict": False},
    {"type": "web_search"},
]
CLAUDE_TOOLS: list[Any] = [{"name": "weather", "input_schema": {"type": "object", "properties": {}}}]


async def _body(request: web.Request) -> Any:
    """A body of JSON, or the parts of a form: what is asked of each and what it holds, whatever its boundary."""
    raw, kind = await request.read(), request.headers["Content-Type"]
    if not kind.startswith("multipart/"):
        return json.loads(raw)
    form = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + raw)
    return {str(part["Content-Disposition"]): part.get_payload(decode=True) for part in form.walk() if part is not form}


@dataclass
class Recorder(Provider):
    """Keeps the bodies that reach the provider; fails as often as it is told before it answers."""

    scripts: dict[str, Any] = field(default_factory=dict)
    calls: int = 0
    cut: int = 0
    bodies: list[Any] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.bodies.append(await _body(request))
        if self.failures:
            status = self.failures.pop(0)
            error = {"message": f"told to fail with {status}", "type": "told", "param": None, "code": None}
            headers = {"Retry-After": "0"} if status in (429, 503) else {}
            return web.json_response({"type": "error", "error": error}, status=status, headers=headers)
        return await super()._middleware(request, handler)  # type: ignore[no-any-return,operator,arg-type,call-arg]


@dataclass(frozen=True)
class Side:
    """One of the two that a scene is played to."""

    recorder: Recorder
    address: str
    key: str

    def openai(self, **options: Any) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.address}/v1", api_key=self.key, **options)

    def anthropic(self, **options: Any) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.address, api_key=self.key, **options)


@asynccontextmanager
async def direct() -> AsyncIterator[Side]:
    recorder = Recorder()
    async with recorder.running() as address:
        yield Side(recorder, address.removesuffix("/v1"), "sk-the-vendors")


@pytest.fixture(scope="module")
async def through(priced: db.Database, settings: Settings) -> AsyncIterator[tuple[Recorder, str]]:
    recorder = Recorder()
    async with served(priced, settings, recorder, Cable(priced.dsn("bursar_lane"))) as (address, _):
        yield recorder, address


@pytest.fixture
async def sides(org: Org, through: tuple[Recorder, str]) -> AsyncIterator[tuple[Side, Side]]:
    """The provider itself, and Bursar before another of the same."""
    await fund(org, Micros(1_000_000_000))
    key = await org.key(await org.member())
    recorder, address = through
    recorder.bodies, recorder.failures, recorder.calls = [], [], 0
    async with direct() as side:
        yield side, Side(recorder, address, key.text)


Scene = Callable[[Side], Awaitable[Any]]


async def plain_chat(side: Side) -> Any:
    return (await side.openai().chat.completions.create(**CHAT)).model_dump()


async def two_choices(side: Side) -> Any:
    return (await side.openai().chat.completions.create(**CHAT, n=2)).model_dump()


async def streamed_chat(side: Side) -> Any:
    return [chunk.model_dump() async for chunk in await side.openai().chat.completions.create(**CHAT, stream=True)]


async def streamed_chat_with_usage(side: Side) -> Any:
    asked = {"stream": True, "stream_options": {"include_usage": True}}
    return [chunk.model_dump() async for chunk in await side.openai().chat.completions.create(**CHAT, **asked)]


async def stream_helper(side: Side) -> Any:
    whole = {"Bursar-Demo": "output_tokens=12"}  # the helper takes no answer that a limit cut
    async with side.openai().chat.completions.stream(**CHAT, extra_headers=whole) as stream:
        kinds = [event.type async for event in stream]
        return kinds, (await stream.get_final_completion()).model_dump()


async def tool_calls(side: Side) -> Any:
    headers = {"Bursar-Demo": "tool_calls=2"}
    return (await side.openai().chat.completions.create(**CHAT, tools=TOOLS, extra_headers=headers)).model_dump()


async def tool_calls_in_a_stream(side: Side) -> Any:
    headers = {"Bursar-Demo": "tool_calls=2; output_tokens=8"}
    async with side.openai().chat.completions.stream(**CHAT, tools=TOOLS, extra_headers=headers) as stream:
        kinds = [event.type async for event in stream]
        return kinds, (await stream.get_final_completion()).model_dump()


class Forecast(pydantic.BaseModel):
    """What a structured output is parsed to."""

    city: str
    degrees: int


async def forecast(request: web.Request) -> web.StreamResponse:
    message = {"role": "assistant", "content": '{"city": "Oslo", "degrees": -3}', "refusal": None}
    usage = {"prompt_tokens": 60, "completion_tokens": 12, "total_tokens": 72}
    choices = [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}]
    document = {"id": "c", "object": "chat.completion", "created": 1, "model": "demo-1", "choices": choices}
    return web.json_response({**document, "usage": usage})


async def structured_output(side: Side) -> Any:
    headers = {"Bursar-Demo": side.recorder.script(forecast)}
    answer = await side.openai().chat.completions.parse(**CHAT, response_format=Forecast, extra_headers=headers)
    parsed = answer.choices[0].message.parsed
    assert parsed == Forecast(city="Oslo", degrees=-3)
    return answer.model_dump(warnings=False)


async def raw_response(side: Side) -> Any:
    answer = await side.openai().chat.completions.with_raw_response.create(**CHAT)
    assert answer.headers["content-type"].startswith("application/json")
    return answer.http_response.status_code, json.loads(answer.text)


async def streaming_response(side: Side) -> Any:
    async with side.openai().chat.completions.with_streaming_response.create(**CHAT, stream=True) as answer:
        lines = [line async for line in answer.iter_lines() if line and not line.startswith(":")]
        return answer.headers["content-type"].split(";")[0], lines


async def stream_left_early(side: Side) -> Any:
    headers = {"Bursar-Demo": "piece_ms=20; output_tokens=200"}
    body = {**CHAT, "max_tokens": 200, "extra_headers": headers}
    async with await side.openai().chat.completions.create(**body, stream=True) as stream:
        return (await anext(aiter(stream))).model_dump()


async def error_in_a_stream(side: Side) -> Any:
    stream = await side.openai().chat.completions.create(
        **CHAT, stream=True, extra_headers={"Bursar-Demo": "error_after=3"}
    )
    with pytest.raises(openai.APIError) as raised:
        async for _ in stream:
            pass
    return type(raised.value), raised.value.message


async def synchronous_chat(side: Side) -> Any:
    def ask() -> Any:
        with openai.OpenAI(base_url=f"{side.address}/v1", api_key=side.key) as client:
            plain = client.chat.completions.create(**CHAT).model_dump()
            return plain, [chunk.model_dump() for chunk in client.chat.completions.create(**CHAT, stream=True)]

    return await asyncio.to_thread(ask)


async def unusual_fields(side: Side) -> Any:
    extra = {"metadata": {"a": "b"}, "seed": 7, "user": "u", "logit_bias": {"50256": -100}, "stop": ["\n\n", "é"]}
    answer = await side.openai().chat.completions.create(**CHAT, **extra, extra_body={"own": {"deep": [1.50, None]}})
    return answer.model_dump()


async def plain_response(side: Side) -> Any:
    return (await side.openai().responses.create(**RESPONSE, reasoning={"effort": "low"}, store=False)).model_dump()


async def streamed_response(side: Side) -> Any:
    return [event.model_dump() async for event in await side.openai().responses.create(**RESPONSE, stream=True)]


async def response_helper(side: Side) -> Any:
    whole = {"Bursar-Demo": "output_tokens=12; reasoning=5; searches=1"}
    async with side.openai().responses.stream(**RESPONSE, tools=RESPONSE_TOOLS, extra_headers=whole) as stream:
        kinds = [event.type async for event in stream]
        return kinds, (await stream.get_final_response()).model_dump(warnings=False)


async def response_with_tool_calls(side: Side) -> Any:
    headers = {"Bursar-Demo": "tool_calls=2; output_tokens=8"}
    asked: dict[str, Any] = {**RESPONSE, "tools": RESPONSE_TOOLS, "extra_headers": headers}
    async with side.openai().responses.stream(**asked) as stream:
        return (await stream.get_final_response()).model_dump(warnings=False)


async def forecast_response(request: web.Request) -> web.StreamResponse:
    part = {"type": "output_text", "text": '{"city": "Oslo", "degrees": -3}', "annotations": []}
    item = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [part]}
    document = {"id": "resp_1", "object": "response", "created_at": 1, "model": "demo-1", "status": "completed"}
    usage = {"input_tokens": 60, "output_tokens": 12, "total_tokens": 72}
    return web.json_response({**document, "output": [item], "usage": usage})


async def structured_response(side: Side) -> Any:
    headers = {"Bursar-Demo": side.recorder.script(forecast_response)}
    answer = await side.openai().responses.parse(**RESPONSE, text_format=Forecast, extra_headers=headers)
    assert answer.output_parsed == Forecast(city="Oslo", degrees=-3)
    return answer.model_dump(warnings=False)


async def error_in_a_streamed_response(side: Side) -> Any:
    asked = {"stream": True, "extra_headers": {"Bursar-Demo": "error_after=3"}}
    return [event.model_dump() async for event in await side.openai().responses.create(**RESPONSE, **asked)]


async def plain_message(side: Side) -> Any:
    return (await side.anthropic().messages.create(**CLAUDE)).model_dump()


async def streamed_message(side: Side) -> Any:
    async with side.anthropic().messages.stream(**CLAUDE) as stream:
        events = [event.model_dump() async for event in stream]
        return events, (await stream.get_final_message()).model_dump()


async def text_stream(side: Side) -> Any:
    async with side.anthropic().messages.stream(**CLAUDE) as stream:
        return [text async for text in stream.text_stream]


async def tool_use(side: Side) -> Any:
    headers = {"Bursar-Demo": "tool_calls=1"}
    async with side.anthropic().messages.stream(**CLAUDE, tools=CLAUDE_TOOLS, extra_headers=headers) as stream:
        return (await stream.get_final_message()).model_dump()


async def synchronous_message(side: Side) -> Any:
    def ask() -> Any:
        client = anthropic.Anthropic(base_url=side.address, api_key=side.key)
        with client, client.messages.stream(**CLAUDE) as stream:
            return client.messages.create(**CLAUDE).model_dump(), list(stream.text_stream)

    return await asyncio.to_thread(ask)


async def embeddings(side: Side) -> Any:
    client = side.openai()
    asked: dict[str, Any] = {"model": "demo-embedding", "input": ["hello there", "é"], "dimensions": 20}
    return [
        (await client.embeddings.create(**asked, **form)).model_dump() for form in ({}, {"encoding_format": "float"})
    ]


async def images(side: Side) -> Any:
    return (await side.openai().images.generate(model="demo-image", prompt="a cat", n=2)).model_dump()


async def streamed_images(side: Side) -> Any:
    stream = await side.openai().images.generate(
        model="demo-image-tokens", prompt="a cat", stream=True, partial_images=2
    )
    return [event.model_dump() async for event in stream]


async def speech(side: Side) -> Any:
    async with side.openai().audio.speech.with_streaming_response.create(
        model="demo-speech", input="hello there", voice="alloy"
    ) as spoken:
        return spoken.headers["content-type"], b"".join([piece async for piece in spoken.iter_bytes()])


async def transcriptions(side: Side) -> Any:
    client, texts = side.openai(), []
    for form in ("json", "verbose_json", "text", "srt", "vtt"):
        asked: dict[str, Any] = {"response_format": form, "timestamp_granularities": ["word", "segment"]}
        text = await client.audio.transcriptions.create(model="demo-transcribe", file=("é.wav", wav(2.0)), **asked)
        texts.append(text if isinstance(text, str) else text.model_dump())
    return texts


async def streamed_transcription(side: Side) -> Any:
    asked: dict[str, Any] = {"model": "demo-transcribe-tokens", "file": ("a.wav", wav(2.0)), "prompt": "é"}
    stream = await side.openai().audio.transcriptions.create(**asked, stream=True)
    return [event.model_dump() async for event in stream]


async def translation(side: Side) -> Any:
    answer = await side.openai().audio.translations.create(model="demo-transcribe", file=wav(2.0))
    return answer.model_dump()


async def counted_tokens(side: Side) -> Any:
    return (await side.anthropic().messages.count_tokens(model="demo-claude", messages=HELLO)).model_dump()


SCENES: list[Scene] = [
    plain_chat,
    two_choices,
    streamed_chat,
    streamed_chat_with_usage,
    stream_helper,
    tool_calls,
    tool_calls_in_a_stream,
    structured_output,
    raw_response,
    streaming_response,
    stream_left_early,
    error_in_a_stream,
    synchronous_chat,
    unusual_fields,
    plain_response,
    streamed_response,
    response_helper,
    response_with_tool_calls,
    structured_response,
    error_in_a_streamed_response,
    plain_message,
    streamed_message,
    text_stream,
    tool_use,
    synchronous_message,
    embeddings,
    images,
    streamed_images,
    speech,
    transcriptions,
    streamed_transcription,
    translation,
    counted_tokens,
]


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
async def test_a_client_sees_through_the_gateway_what_it_sees_without(sides: tuple[Side, Side], scene: Scene) -> None:
    vendor, bursar = sides
    assert await scene(bursar) == await scene(vendor)
    sent, expected = bursar.recorder.bodies, vendor.recorder.bodies
    for body in sent:
        body.pop("stream_options", None)  # usage is asked for in every stream
    for body in expected:
        body.pop("stream_options", None)
    assert sent == expected, "the provider gets the body as the client wrote it"


@pytest.mark.parametrize("status", [400, 404, 409, 422, 429, 500])
@pytest.mark.parametrize("vendor_client", ["openai", "anthropic"])
async def test_a_failure_is_the_same_exception_after_the_same_number_of_attempts(
    sides: tuple[Side, Side], vendor_client: str, status: int
) -> None:
    seen = []
    for side in sides:
        side.recorder.failures = [status] * 10
        client: Any = side.openai(max_retries=2) if vendor_client == "openai" else side.anthropic(max_retries=2)
        asked = (
            client.chat.completions.create(**CHAT) if vendor_client == "openai" else client.messages.create(**CLAUDE)
        )
        with pytest.raises((openai.APIStatusError, anthropic.APIStatusError)) as raised:
            await asked
        error: Any = raised.value
        seen.append((type(error), error.status_code, error.body, len(side.recorder.bodies)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_tries_again_gets_its_answer_and_pays_once(
    sides: tuple[Side, Side], org: Org, stream: bool
) -> None:
    for side in sides:
        side.recorder.failures = [500, 429]
        answer = await side.openai(max_retries=2).chat.completions.create(**CHAT, stream=stream)
        if stream:
            assert len([chunk async for chunk in answer]) > 20
        assert len(side.recorder.bodies) == 3
    async with org.tenant() as conn:
        rows = await (await conn.execute("select charged_micros from ledger.attribution")).fetchall()
    assert rows == [(9_000,)]


async def test_a_client_that_runs_out_of_time_says_so_and_asks_again_as_it_would_the_vendor(
    sides: tuple[Side, Side],
) -> None:
    for side in sides:
        client = side.openai(max_retries=1, timeout=0.4)
        with pytest.raises(openai.APITimeoutError):
            await client.chat.completions.create(**CHAT, extra_headers={"Bursar-Demo": "delay_ms=1500"})
        assert len(side.recorder.bodies) == 2


async def test_many_clients_at_once_each_get_their_own_answer(sides: tuple[Side, Side]) -> None:
    vendor, bursar = sides

    async def ask(side: Side, number: int) -> str:
        messages: list[Any] = [{"role": "user", "content": f"question {number}"}]
        async with side.openai() as client:
            answer = await client.chat.completions.create(model="demo-1", max_tokens=20, messages=messages)
        return str(answer.choices[0].message.content)

    ours = await asyncio.gather(*(ask(bursar, number) for number in range(40)))
    assert ours == await asyncio.gather(*(ask(vendor, number) for number in range(40)))
    assert len(set(ours)) > 20
