"""Batches, as the official clients make them: held before, settled after, each request once, at the batch price."""

from collections.abc import AsyncIterator
from typing import Any

import anthropic
import openai
import pytest
from tests.conftest import Org
from tests.gateway.conftest import Payer

from bursar import db
from bursar.gateway import demo_provider
from bursar.gateway.batch_keeper import Keeper
from bursar.gateway.batches import Places
from bursar.gateway.provider_keys import KeyFinder
from bursar.gateway.sealing import Keyring
from bursar.gateway.upstream import Upstream

HELLO: Any = [{"role": "user", "content": "hello there"}]
INPUT_TOKENS = {"demo-1": 10, "demo-claude": 7}


class Worker:
    """A worker that looks at one organization's batches when it is told to."""

    def __init__(self, database: db.Database, demo_base_url: str) -> None:
        self._database = database
        finder = KeyFinder(database, Keyring(database.settings.master_key))
        self.upstream = Upstream()
        self.keeper = Keeper(database, self.upstream, Places(database, finder, demo_base_url=demo_base_url))

    async def look(self, org: Org) -> None:
        """Look at everything, due or not."""
        async with org.tenant() as conn, conn.cursor() as cursor:
            await cursor.execute("update gateway.batches set next_look_at = clock_timestamp() where ended_at is null")
            await cursor.execute("select batch_id from gateway.batches where ended_at is null")
            found = [row[0] for row in await cursor.fetchall()]
        for batch_id in found:
            await self.keeper.look(org.organization_id, batch_id)


@pytest.fixture
async def worker(priced: db.Database) -> AsyncIterator[Worker]:
    async with demo_provider.running(folder=demo_provider.folder_of(priced.settings)) as base_url:
        made = Worker(priced, base_url)
        yield made
        await made.upstream.close()


def claude(payer: Payer) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=payer.base_url, api_key=payer.key, max_retries=0)


def chat(payer: Payer) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{payer.base_url}/v1", api_key=payer.key, max_retries=0)


def requests(count: int, *, max_tokens: int = 20) -> Any:
    return [
        {"custom_id": f"r-{n}", "params": {"model": "demo-claude", "max_tokens": max_tokens, "messages": HELLO}}
        for n in range(count)
    ]


def directed(**directions: int) -> dict[str, str]:
    return {"Bursar-Demo": "; ".join(f"{name}={value}" for name, value in directions.items())}


async def attributed(payer: Payer) -> list[Any]:
    return await payer.rows(
        "select charged_micros, hold_micros, input_tokens, output_tokens, flags from ledger.attribution "
        "order by request_id"
    )


async def test_a_message_batch_is_held_at_the_batch_price_and_charged_request_by_request(
    payer: Payer, worker: Worker
) -> None:
    client = claude(payer)
    made = await client.messages.batches.create(requests=requests(3), extra_headers=directed(batch_ms=0))
    assert made.id.startswith("msgbatch_")
    assert (made.processing_status, made.results_url, made.request_counts.processing) == ("in_progress", None, 3)
    print(await payer.pool())
    await worker.look(payer.org)
    ended = await client.messages.batches.retrieve(made.id)
    assert ended.processing_status == "ended"
    assert ended.request_counts.succeeded == 3
    results = [each async for each in await client.messages.batches.results(made.id)]
    assert [each.custom_id for each in results] == ["r-0", "r-1", "r-2"]
    print(await attributed(payer), await payer.pool())
