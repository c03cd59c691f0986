"""HTTP as the server processes speak it: heads go out with their bodies, and who hangs up is seen."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import uvicorn

from bursar.asgi import Protocol, Receive, Scope, Send, read_body

App = Callable[[Scope, Receive, Send], Awaitable[None]]
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"


@asynccontextmanager
async def served(app: App) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A connection to a server of this application."""
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, http=Protocol, ws="none", lifespan="off")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    reader, writer = await asyncio.open_connection("127.0.0.1", server.servers[0].sockets[0].getsockname()[1])
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await task


async def answer(send: Send, *pieces: bytes, pause: asyncio.Event | None = None) -> None:
    """A whole answer; pause: what the body waits for."""
    length = str(sum(map(len, pieces))).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
    if pause is not None:
        await pause.wait()
    for n, piece in enumerate(pieces):
        await send({"type": "http.response.body", "body": piece, "more_body": n + 1 < len(pieces)})


async def test_an_answer_comes_in_one_write_and_several_in_their_order() -> None:
    written: list[bytes] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        transport = scope["state"]["connection"].transport
        if not written:
            write = transport.write
            scope["state"]["connection"].cycle.transport._transport = _Noted(write, transport, written)
        await read_body(scope, receive, 100)
        await answer(send, b"one", b"two")

    async with served(app) as (reader, writer):
        writer.write(POST * 2)
        for _ in range(2):
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            assert await reader.readexactly(6) == b"onetwo"
    assert [each.split(b"\r\n\r\n")[-1] for each in written] == [b"one", b"two"]
    assert written[0].startswith(b"HTTP/1.1 200 OK")


class _Noted:
    """A transport whose writes are noted."""

    def __init__(self, write: Callable[[bytes], None], transport: asyncio.Transport, written: list[bytes]) -> None:
        self._write, self._transport, self._written = write, transport, written

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._write(data)

    def close(self) -> None:
        self._transport.close()

    def is_closing(self) -> bool:
        return self._transport.is_closing()


async def test_a_head_does_not_wait_for_a_body_that_is_late() -> None:
    pause = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, 100)
        await answer(send, b"late", pause=pause)

    async with served(app) as (reader, writer):
        writer.write(POST)
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
        pause.set()
        assert await reader.readexactly(4) == b"late"


async def test_answers_without_a_body_and_asked_for_bodies_are_as_ever() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, 100)
        await answer(send, b"")

    async with served(app) as (reader, writer):
        writer.write(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 100")
        writer.write(b"hi")
        assert (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)).startswith(b"HTTP/1.1 200")
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert b"connection: close" in await asyncio.wait_for(reader.read(), 5)


async def test_who_hangs_up_is_seen_also_after_a_large_body_and_also_afterwards() -> None:
    told: list[str] = []
    seen = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await read_body(scope, receive, 10**6)
        connection: Protocol = scope["state"]["connection"]
        connection.when_lost(lambda: told.append("forgotten"))
        connection.forget(connection._watchers[0])

        def lost() -> None:
            told.append("at once")
            connection.when_lost(lambda: told.append("afterwards"))
            seen.set()

        connection.when_lost(lost)
        await seen.wait()

    async with served(app) as (_, writer):
        writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 300000\r\n\r\n" + b"a" * 300_000)
        await writer.drain()
        await asyncio.sleep(0.05)
        writer.close()
        await asyncio.wait_for(seen.wait(), 10)
    assert told == ["at once", "afterwards"]
