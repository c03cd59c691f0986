"""Periodic work of the gateway: batches are looked after until they have ended. No rules here."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import structlog

from bursar import db
from bursar.gateway import demo_provider
from bursar.gateway.batch_keeper import Keeper
from bursar.gateway.batch_records import QUERIES
from bursar.gateway.batches import Places
from bursar.gateway.provider_keys import KeyFinder
from bursar.gateway.providers import DEMO
from bursar.gateway.upstream import Upstream
from bursar.sealing import Keyring

MOST_A_RUN: Final = 100
AT_ONCE: Final = 4

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Due:
    """A batch that is to be looked after now."""

    organization_id: UUID
    batch_id: UUID
    provider: str


async def look_after_batches(database: db.Database) -> int:
    """Look at every batch that is due, a few at once; how many there were."""
    async with database.platform() as conn:
        due = await db.fetch_all(conn, Due, QUERIES.due_batches, most=MOST_A_RUN)
    if not due:
        return 0
    async with AsyncExitStack() as stack:
        demo_base_url = None
        if any(each.provider == DEMO for each in due):
            # Its batches lie in a folder that all processes share, so that any process can serve them.
            folder = demo_provider.folder_of(database.settings)
            demo_base_url = await stack.enter_async_context(demo_provider.running(folder=folder))
        upstream = Upstream()
        stack.push_async_callback(upstream.close)
        finder = KeyFinder(database, Keyring(database.settings.master_key))
        keeper = Keeper(database, upstream, Places(database, finder, demo_base_url=demo_base_url))
        await _look_at_all(keeper, due)
    return len(due)


async def _look_at_all(keeper: Keeper, due: Sequence[Due]) -> None:
    free = asyncio.Semaphore(AT_ONCE)

    async def look(each: Due) -> None:
        async with free:
            try:
                await keeper.look(each.organization_id, each.batch_id)
            except Exception:
                # What is wrong with one batch must not keep the others waiting; it is due again in a while.
                log.exception("a batch cannot be looked after", batch=str(each.batch_id))

    await asyncio.gather(*(look(each) for each in due))


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = ((1.0, look_after_batches),)
"""Seconds between runs, and what runs."""
