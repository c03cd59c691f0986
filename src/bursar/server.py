"""A server process: the application and the worker on one database, from start to stop."""

import asyncio
import gc
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress

import structlog
from fastapi import FastAPI

from bursar import db, worker
from bursar.app import PARTS, create_app
from bursar.asgi import Message, Receive, Scope, Send
from bursar.logs import configure_logs
from bursar.pricing.importing import import_shipped
from bursar.settings import Settings

log = structlog.get_logger(__name__)


def from_environment() -> "ServedApp":
    """What a server process runs (`uvicorn --factory bursar.server:from_environment`)."""
    settings = Settings.from_environment()
    configure_logs(settings.log_format, settings.log_level)
    return ServedApp(settings)


class ServedApp:
    """The application of one server process: opens the database when the server starts, closes it when it ends.

    is_demo: pages say that the data is invented.
    """

    def __init__(self, settings: Settings, *, is_demo: bool = False) -> None:
        self._settings = settings
        self._is_demo = is_demo
        self._app: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(scope, receive, send)
            return
        assert self._app is not None
        await self._app(scope, receive, send)

    async def _live(self, scope: Scope, receive: Receive, send: Send) -> None:
        """From start to stop; "stopped" is said last, since the process may be ended as soon as it is said."""
        last: list[Message] = []

        async def keep_last(message: Message) -> None:
            if message["type"].startswith("lifespan.shutdown"):
                last.append(message)
            else:
                await send(message)

        with _ends_with_supervisor():
            await self._serve(scope, receive, keep_last)
        for message in last:
            await send(message)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with db.opened(self._settings, migrate=True) as database:
            await _import_prices(database)
            self._app = create_app(database, self._settings, parts=(*PARTS, _worker, _spared_collector))
            self._app.state.is_demo = self._is_demo
            await self._app(scope, receive, send)


@contextmanager
def _ends_with_supervisor() -> Iterator[None]:
    """Stop as SIGTERM would when the process that started this one (`--workers`) is killed.

    Otherwise it would keep the port, and nobody would stop it or start it again.
    """
    supervisor = multiprocessing.parent_process()
    if supervisor is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def stop() -> None:
        log.warning("the supervisor is gone; this process stops too")
        loop.remove_reader(supervisor.sentinel)
        os.kill(os.getpid(), signal.SIGTERM)

    loop.add_reader(supervisor.sentinel, stop)
    try:
        yield
    finally:
        loop.remove_reader(supervisor.sentinel)


@asynccontextmanager
async def _spared_collector(_: FastAPI) -> AsyncIterator[None]:
    """What is there at start stays; and a request leaves few cycles, so that looking for them now and then is enough.

    Left alone, the garbage collector takes a seventh of a busy server's time (benchmarks/gateway).
    """
    usual = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    try:
        yield
    finally:
        gc.set_threshold(*usual)
        gc.unfreeze()


async def _import_prices(database: db.Database) -> None:
    """The price list that comes with this version; nothing is done where it is in the book already."""
    async with database.platform() as conn:
        await import_shipped(conn)


@asynccontextmanager
async def _worker(app: FastAPI) -> AsyncIterator[None]:
    """Periodic work in the server's own process; any number of processes may do it."""
    task = asyncio.create_task(worker.run(app.state.database), name="worker")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
