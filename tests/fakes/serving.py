"""A fake provider on a port of its own, and what it was asked."""

import json
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from aiohttp import web


@dataclass(frozen=True, slots=True)
class Asked:
    """One request that a fake got; names of headers in lower case."""

    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: dict[str, Any]


async def asked(request: web.Request) -> Asked:
    """What a request says."""
    text = await request.text()
    headers = {name.lower(): value for name, value in request.headers.items()}
    return Asked(request.raw_path.partition("?")[0], dict(request.query), headers, json.loads(text) if text else {})


async def events(request: web.Request, pieces: Iterable[str], **headers: str) -> web.StreamResponse:
    """A stream of server-sent events, piece by piece as they are written."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream", **headers})
    response.enable_chunked_encoding()
    await response.prepare(request)
    for piece in pieces:
        await response.write(piece.encode())
    return response


def data(document: Any) -> str:
    """An event that holds a JSON document."""
    return f"data: {json.dumps(document)}\n\n"


@asynccontextmanager
async def serving(app: web.Application) -> AsyncIterator[str]:
    """The address of a fake, without a path."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
