"""A provider that does what a test wrote down, and a cable to the database that can be cut; behind an application.

The provider stands in the place of the provider demo. The header `Bursar-Demo: script=name` picks a script; every other
call is the demo provider's.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import uvicorn
from aiohttp import web
from fastapi import FastAPI
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bursar import db
from bursar.app import create_app
from bursar.asgi import Protocol
from bursar.credits.batcher import Batcher
from bursar.gateway import demo_provider
from bursar.gateway.upstream import Limits, Upstream
from bursar.settings import Settings

Script = Callable[[web.Request], Awaitable[web.StreamResponse]]
HURRIED = Limits(connect_seconds=1.0, first_byte_seconds=1.5, idle_seconds=1.0, total_seconds=60.0)


class Provider:
    """Scripts by name, and what was called."""

    def __init__(self) -> None:
        self.scripts: dict[str, Script] = {}
        self.calls = 0
        self.cut = 0

    def script(self, handler: Script) -> str:
        """Register a script; the value of the header that picks it."""
        self.scripts[handler.__name__] = handler
        return f"script={handler.__name__}"

    @web.middleware
    async def _middleware(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.calls += 1
        name = request.headers.get("Bursar-Demo", "").removeprefix("script=")
        try:
            return await self.scripts.get(name, handler)(request)
        except (asyncio.CancelledError, ConnectionError):
            self.cut += 1
            raise

    @asynccontextmanager
    async def running(self, *, folder: Path | None = None) -> AsyncIterator[str]:
        """As demo_provider.running."""
        app = demo_provider.application(folder)
        app.middlewares.append(self._middleware)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.2, handler_cancellation=True)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        finally:
            await runner.cleanup()


class Cable:
    """What lies between the lanes and the database.

    loses_next: the next answer of the database is lost, and the connection with it. answers_after: seconds by which
    answers are late. After `cut` every connection is broken or refused until `mend`.
    """

    def __init__(self, dsn: str) -> None:
        self._parts = conninfo_to_dict(dsn)
        self._is_cut = False
        self._ends: set[asyncio.StreamWriter] = set()
        self.loses_next = False
        self.lost = 0
        self.answers_after = 0.0

    def cut(self) -> None:
        """From now on there is no database."""
        self._is_cut = True
        for end in list(self._ends):
            end.transport.abort()

    def mend(self) -> None:
        """There is a database again."""
        self._is_cut = False

    @asynccontextmanager
    async def laid(self) -> AsyncIterator[str]:
        """Gives the connection string of this end."""
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        try:
            port = server.sockets[0].getsockname()[1]
            yield make_conninfo("", **{**self._parts, "host": "127.0.0.1", "port": port})
        finally:
            self.cut()
            server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_cut:
            writer.transport.abort()
            return
        host, port = str(self._parts["host"]), int(self._parts.get("port") or 5432)
        if host.startswith("/"):
            far_reader, far_writer = await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port}")
        else:
            far_reader, far_writer = await asyncio.open_connection(host, port)
        both = {writer, far_writer}
        self._ends |= both
        asked: list[bytes] = []
        there = asyncio.create_task(self._pass(reader, far_writer, asked))
        back = asyncio.create_task(self._pass_back(far_reader, writer, asked))
        await asyncio.wait({there, back}, return_when=asyncio.FIRST_COMPLETED)
        for task in (there, back):
            task.cancel()
        await asyncio.gather(there, back, return_exceptions=True)
        self._ends -= both
        for end in both:
            end.transport.abort()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes]) -> None:
        while data := await reader.read(65_536):
            if self.loses_next:
                asked.append(data)
            writer.write(data)

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: list[bytes]) -> None:
        while data := await reader.read(65_536):
            if self.loses_next and asked:
                self.loses_next = False
                self.lost += 1
                return
            await asyncio.sleep(self.answers_after)
            writer.write(data)


@asynccontextmanager
async def served(
    database: db.Database, settings: Settings, provider: Provider, cable: Cable, *, send_seconds: float = 1.5
) -> AsyncIterator[tuple[str, FastAPI]]:
    """The application with this provider and cable, on this event loop: its base URL and itself."""
    async with cable.laid() as dsn:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("bursar.gateway.opening.Batcher", lambda _, **options: Batcher(dsn, **options))
            patch.setattr(
                "bursar.gateway.opening.demo_provider",
                SimpleNamespace(running=provider.running, folder_of=demo_provider.folder_of),
            )
            patch.setattr("bursar.gateway.opening.Upstream", lambda: Upstream(HURRIED))
            patch.setattr("bursar.gateway.exchange.MOST_SEND_SECONDS", send_seconds)
            app = create_app(database, settings)
            config = uvicorn.Config(app, port=0, log_config=None, access_log=False, http=Protocol, ws="none")
            server = uvicorn.Server(config)
            task = asyncio.create_task(server.serve())
            while not server.started:
                await asyncio.sleep(0.01)
                assert not task.done(), "the server ended"
            try:
                yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", app
            finally:
                server.should_exit = True
                await task
