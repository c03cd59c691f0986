"""Opens the gateway of one process: its lanes, caches, connections and, where it is enabled, the provider demo."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final

from bursar import db
from bursar.credits import front as credits_front
from bursar.credits.batcher import Batcher
from bursar.credits.charges import Charges
from bursar.gateway import adapter_process, demo_provider
from bursar.gateway.batch_front import BatchFront
from bursar.gateway.batches import Batches, Places
from bursar.gateway.calls import Till
from bursar.gateway.desk import Desk
from bursar.gateway.front import Front
from bursar.gateway.provider_keys import KeyFinder
from bursar.gateway.relay import Relay
from bursar.gateway.upstream import Upstream
from bursar.identity.principals import KeyCache
from bursar.pricing.book import PriceBook
from bursar.sealing import Keyring

LAST_USE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class Opened:
    """What answers past FastAPI: the paths under /v1, and the hot ones under /api/v1/credits. One batcher for both."""

    gateway: Front
    credits: credits_front.Front


@asynccontextmanager
async def opened(database: db.Database) -> AsyncIterator[Opened]:
    """The gateway, ready to answer; leaving drains what runs and waits until every settle is committed."""
    keys = KeyCache(database)
    async with AsyncExitStack() as stack:
        demo_base_url = await stack.enter_async_context(
            demo_provider.running(folder=demo_provider.folder_of(database.settings))
        )
        waits = database.settings.wait_seconds
        batcher = await stack.enter_async_context(
            Batcher(database.dsn("bursar_lane"), wait_seconds=waits, space=database.space)
        )
        adapter = await stack.enter_async_context(adapter_process.running(database.settings.litellm_python))
        upstream = Upstream()
        stack.push_async_callback(upstream.close)
        till = Till(database, batcher)
        stack.push_async_callback(till.drain)
        stack.push_async_callback(_stop, asyncio.create_task(till.run(), name="progress of running calls"))
        stack.push_async_callback(_stop, asyncio.create_task(_note_last_use(database, keys), name="last use of keys"))
        finder = KeyFinder(database, Keyring(database.settings.master_key))
        book = PriceBook(database)
        desk = Desk(database, book, finder, adapter, demo_base_url=demo_base_url)
        places = Places(database, finder, demo_base_url=demo_base_url)
        batches = BatchFront(database, Batches(database, desk, upstream, places), upstream, places)
        yield Opened(
            Front(keys, desk, till, Relay(till, upstream), batches),
            credits_front.Front(keys, Charges(database, batcher, book)),
        )


async def _note_last_use(database: db.Database, keys: KeyCache) -> None:
    while True:
        await asyncio.sleep(LAST_USE_SECONDS)
        await keys.last_use.write(database)


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
