"""An offline provider: a real HTTP server that speaks OpenAI's and Anthropic's formats, deterministically.

The same request has the same answer, plain or streamed. It counts tokens by our own rule (`tokens`), so that the
estimate of an input is exact here. An answer is as long as the prompt decides (16 to 255 tokens), and at most as long
as the request permits. Every model name is taken. No key is asked for.

The header `Bursar-Demo` directs one call, for example `delay_ms=200; piece_ms=10; break_after=3`:

    delay_ms        wait before the first byte
    piece_ms        wait after each piece of a stream
    fail            answer with this status, in the vendor's shape
    error_after     send an error event after that many pieces of a stream
    break_after     cut the connection after that many pieces (of a plain answer: 0 before it, else in its middle)
    usage           `missing` or `zero`
    output_tokens   put out exactly so many, whatever the limit
    cached          report so many input tokens as read from the cache
    cache_write     report so many input tokens as written to the cache; Anthropic's also cache_write_1h
    reasoning       report so many output tokens of thought, beside what is said
    tool_calls      call so many tools instead of speaking
    searches        report so many web searches (not in chat completions)
    file_searches   search the provider's files so often (in responses)
    code_sessions   run code in so many containers (in responses; in messages in one)
    bytes           make each image at least so large

Directions of batches are in `demo_batches`.

It stands alone too: `python -m bursar.gateway.demo_provider --port 8421`.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from bursar.gateway import (
    anthropic_wire,
    compact_wire,
    demo_anthropic,
    demo_media,
    demo_openai,
    demo_responses,
    openai_wire,
    responses_wire,
    wire,
)
from bursar.gateway.demo_answers import DIRECTIONS_HEADER, PLAIN_DIRECTIONS, Answer, Directions, decide, read_directions
from bursar.gateway.demo_batches import DemoBatches
from bursar.problems import Problem
from bursar.settings import Settings

NAME: Final = "demo"
MODELS: Final = (
    *("demo-1", "demo-1-mini", "demo-1-long", "demo-claude", "demo-embedding"),
    *("demo-image", "demo-image-tokens", "demo-speech", "demo-speech-tokens"),
    *("demo-transcribe", "demo-transcribe-tokens"),
)
_MOST_BYTES: Final = 128 * 1024 * 1024
_encode: Final = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class _Vendor:
    """How one of the two formats reads, answers and fails."""

    format: wire.Wire
    tools: Callable[[wire.WireRequest], list[str]]
    body: Callable[[Answer], bytes]
    events: Callable[[Answer], tuple[list[bytes], list[bytes], list[bytes]]]
    error: Callable[[int], bytes]
    error_event: Callable[[], bytes]


def _vendor(format: wire.Wire, shape: Any) -> _Vendor:
    return _Vendor(format, shape.tools, shape.body, shape.events, shape.error, shape.error_event)


_OPENAI: Final = _vendor(openai_wire, demo_openai)
_RESPONSES: Final = _vendor(responses_wire, demo_responses)
_COMPACT: Final = replace(_vendor(compact_wire, demo_responses), body=demo_responses.compacted)
_ANTHROPIC: Final = _vendor(anthropic_wire, demo_anthropic)


async def _serve(request: web.Request, vendor: _Vendor) -> web.StreamResponse:
    try:
        header = request.headers.get(DIRECTIONS_HEADER)
        directions = read_directions(header) if header else PLAIN_DIRECTIONS
        asked = vendor.format.read_request(await request.read())
        answer = decide(asked, directions, vendor.tools(asked))
    except Problem as problem:
        return _json(vendor.format.refusal(problem), status=problem.status)
    if directions.delay_ms:
        await asyncio.sleep(directions.delay_ms / 1000)
    if directions.fail:
        headers = {"Retry-After": "1"} if directions.fail in (429, 529) else None
        return _json(vendor.error(directions.fail), status=directions.fail, headers=headers)
    if asked.stream:
        return await _stream(request, vendor, answer)
    return await _plain(request, vendor.body(answer), directions)


def _json(body: bytes, *, status: int = 200, headers: Mapping[str, str] | None = None) -> web.Response:
    return web.Response(body=body, status=status, headers=headers, content_type="application/json")


async def _plain(request: web.Request, body: bytes, directions: Directions) -> web.StreamResponse:
    if directions.break_after is None:
        return _json(body)
    response = web.StreamResponse(headers={"Content-Length": str(len(body)), "Content-Type": "application/json"})
    if directions.break_after > 0:
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
    return _cut(request, response)


async def _stream(request: web.Request, vendor: _Vendor, answer: Answer) -> web.StreamResponse:
    first, pieces, last = vendor.events(answer)
    directions = answer.directions
    response = web.StreamResponse(
        headers={"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
    )
    response.enable_chunked_encoding()
    await response.prepare(request)
    if directions.break_after is not None:
        await _write(response, [*first, *pieces[: directions.break_after]], directions.piece_ms)
        return _cut(request, response)
    if directions.error_after is not None:
        failed = [*first, *pieces[: directions.error_after], vendor.error_event()]
        await _write(response, failed, directions.piece_ms)
        return response
    await _write(response, [*first, *pieces, *last], directions.piece_ms)
    return response


async def _write(response: web.StreamResponse, events: Iterable[bytes], pause_ms: int) -> None:
    """Write events one by one with pauses, or, without, all at once."""
    if not pause_ms:
        await response.write(b"".join(events))
        return
    for event in events:
        await response.write(event)
        await asyncio.sleep(pause_ms / 1000)


def _cut(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Close the connection in the middle of the answer; what was written still arrives."""
    if request.transport is not None:
        request.transport.close()
    return response


async def _chat_completions(request: web.Request) -> web.StreamResponse:
    return await _serve(request, _OPENAI)


async def _responses(request: web.Request) -> web.StreamResponse:
    return await _serve(request, _RESPONSES)


async def _compact(request: web.Request) -> web.StreamResponse:
    return await _serve(request, _COMPACT)


async def _messages(request: web.Request) -> web.StreamResponse:
    return await _serve(request, _ANTHROPIC)


async def _models(request: web.Request) -> web.StreamResponse:
    if "anthropic-version" in request.headers:
        data = [
            {"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"} for name in MODELS
        ]
        return _json(_encode({"data": data, "has_more": False, "first_id": MODELS[0], "last_id": MODELS[-1]}))
    models = [{"id": name, "object": "model", "created": demo_openai.CREATED, "owned_by": NAME} for name in MODELS]
    return _json(_encode({"object": "list", "data": models}))


def folder_of(settings: Settings) -> Path:
    """Where files and batches lie: one folder for all processes of an installation."""
    return settings.data_dir / "demo"


def application(folder: Path | None = None) -> web.Application:
    """The server as an aiohttp application. folder: where files and batches lie; None: the system's temporary one."""
    app = web.Application(client_max_size=_MOST_BYTES)
    app.add_routes(DemoBatches(folder or Path(tempfile.gettempdir()) / "bursar-demo").routes())
    app.router.add_post("/v1/chat/completions", _chat_completions)
    app.router.add_post("/v1/responses", _responses)
    app.router.add_post("/v1/responses/compact", _compact)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_get("/v1/models", _models)
    demo_media.add_routes(app.router)
    return app


@asynccontextmanager
async def running(host: str = "127.0.0.1", port: int = 0, *, folder: Path | None = None) -> AsyncIterator[str]:
    """Serve within this event loop; gives the base URL, which ends in `/v1`. Port 0 takes any free one."""
    runner = web.AppRunner(application(folder), access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=1024)
        await site.start()
        bound = runner.addresses[0]
        yield f"http://{bound[0]}:{bound[1]}/v1"
    finally:
        await runner.cleanup()


async def _run(port: int) -> None:
    async with running(port=port) as base_url:
        print(base_url, flush=True)
        await asyncio.Event().wait()


def main() -> None:
    """Run the demo provider alone and print its base URL."""
    parser = argparse.ArgumentParser(description="The offline provider of Bursar")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    try:
        import uvloop

        uvloop.run(_run(arguments.port))
    except ImportError:
        asyncio.run(_run(arguments.port))


if __name__ == "__main__":
    main()
