"""A server process: what it does for itself from start to stop."""

import asyncio
import gc

import pytest

from bursar import server
from bursar.asgi import Message
from bursar.db import Database
from bursar.settings import Settings


async def test_the_collector_is_spared_as_long_as_a_server_runs(
    settings: Settings, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def no_work(_: Database) -> None:
        await asyncio.Event().wait()

    monkeypatch.setattr(server, "PARTS", ())
    monkeypatch.setattr(server.worker, "run", no_work)
    usual = gc.get_threshold()
    coming = iter(("lifespan.startup", "lifespan.shutdown"))
    seen: list[tuple[str, bool, tuple[int, int, int]]] = []

    async def receive() -> Message:
        return {"type": next(coming)}

    async def send(message: Message) -> None:
        seen.append((message["type"], gc.get_freeze_count() > 0, gc.get_threshold()))

    await server.ServedApp(settings)({"type": "lifespan", "state": {}}, receive, send)
    assert seen == [
        ("lifespan.startup.complete", True, (20_000, 20, 50)),
        ("lifespan.shutdown.complete", False, usual),
    ]
