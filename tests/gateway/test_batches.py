"""Batches, as the official clients make them: held before, settled after, each request once, at the batch price."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

import anthropic
import httpx2
import openai
import psycopg
import pytest
from tests.conftest import MASTER_KEY, Org
from tests.gateway.conftest import Payer, free_port, fund, serve_beside_tests, wait_until_ready

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import now, uuid7
from bursar.credits.limits import Metric, Scope, set_limit
from bursar.credits.verify import verify
from bursar.gateway import batch_front, batch_keeper, demo_provider
from bursar.gateway.allowances import add_model_rule
from bursar.gateway.batch_keeper import Keeper
from bursar.gateway.batches import Places
from bursar.gateway.provider_keys import KeyFinder, add_provider_key
from bursar.gateway.providers import Provider, put_provider
from bursar.gateway.upstream import Target, Upstream
from bursar.identity.roles import Role
from bursar.identity.roles import Scope as KeyScope
from bursar.money import Micros
from bursar.sealing import Keyring
from bursar.settings import Settings

HELLO: Any = [{"role": "user", "content": "hello there"}]
CLAUDE_MICROS = 16_050  # half of 7 tokens of input at 300 micros and 20 of output at 1,500
CHAT_MICROS = 4_500  # half of 10 tokens of input at 100 micros and 20 of output at 400
BATCH_FLAG = 8192


class Worker:
    """A worker that looks at one organization's batches when it is told to."""

    def __init__(self, database: db.Database, demo_base_url: str) -> None:
        self.database = database
        finder = KeyFinder(database, Keyring(database.settings.master_key))
        self.upstream = Upstream()
        self.keeper = Keeper(database, self.upstream, Places(database, finder, demo_base_url=demo_base_url))

    async def look(self, org: Org) -> None:
        """Look at everything, due or not."""
        for batch_id in await self.due(org):
            await self.keeper.look(org.organization_id, batch_id)

    async def due(self, org: Org) -> list[Any]:
        """Ids of batches that have not ended, all of them due now."""
        async with org.tenant() as conn, conn.cursor() as cursor:
            await cursor.execute(
                "update gateway.batches set next_look_at = clock_timestamp() where ended_at is null returning batch_id"
            )
            return [row[0] for row in await cursor.fetchall()]


@pytest.fixture
async def worker(priced: db.Database) -> AsyncIterator[Worker]:
    async with demo_provider.running(folder=demo_provider.folder_of(priced.settings)) as base_url:
        made = Worker(priced, base_url)
        yield made
        await made.upstream.close()


def claude(payer: Payer, key: str | None = None) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=payer.base_url, api_key=key or payer.key, max_retries=0)


def chat(payer: Payer, key: str | None = None) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{payer.base_url}/v1", api_key=key or payer.key, max_retries=0)


def messages(count: int, *, max_tokens: int = 20, **params: Any) -> Any:
    body = {"model": "demo-claude", "max_tokens": max_tokens, "messages": HELLO, **params}
    return [{"custom_id": f"r-{n}", "params": body} for n in range(count)]


def lines(count: int, *, url: str = "/v1/chat/completions", **body: Any) -> bytes:
    asked = {"model": "demo-1", "max_tokens": 20, "messages": HELLO, **body}
    return b"".join(
        json.dumps({"custom_id": f"r-{n}", "method": "POST", "url": url, "body": asked}).encode() + b"\n"
        for n in range(count)
    )


def directed(**directions: int) -> dict[str, str]:
    return {"Bursar-Demo": "; ".join(f"{name}={value}" for name, value in directions.items())}


async def chat_batch(payer: Payer, content: bytes, **directions: int) -> Any:
    """Uploaded and made."""
    client = chat(payer)
    file = await client.files.create(file=("asked.jsonl", content), purpose="batch")
    return await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "blue"},
        extra_headers=directed(**directions),
    )


async def rows(payer: Payer) -> list[tuple[int, int, int, int, int]]:
    """Of the attribution: charged, held before, input, output, flags."""
    return await payer.rows(
        "select charged_micros, hold_micros, input_tokens, output_tokens, flags from ledger.attribution "
        "order by request_id"
    )


async def agree(payer: Payer) -> None:
    """Nothing is held, and every invariant holds."""
    pool = await payer.pool()
    charged = await payer.rows("select coalesce(sum(charged_micros), 0)::bigint from ledger.attribution")
    assert (pool.held_micros, pool.used_micros) == (0, charged[0][0])
    assert await payer.rows("select count(*) from credits.holds") == [(0,)]
    async with payer.org.database.platform() as conn:
        assert await verify(conn, organization_id=payer.org.organization_id) == []


# ---------------------------------------------------------------------------------------------- the official clients


async def test_a_message_batch_is_held_at_the_batch_price_and_charged_request_by_request(
    payer: Payer, worker: Worker
) -> None:
    client = claude(payer)
    raw = await client.messages.batches.with_raw_response.create(
        requests=messages(3), extra_headers=directed(batch_ms=0)
    )
    made = await raw.parse()
    assert raw.headers["bursar-held"] == "0.04815"
    assert made.id.startswith("msgbatch_")
    assert (made.processing_status, made.results_url, made.request_counts.processing) == ("in_progress", None, 3)
    assert ((await payer.pool()).held_micros, await rows(payer)) == (3 * CLAUDE_MICROS, [])
    # The provider has ended by now. Nobody is told before everything is charged.
    early = await client.messages.batches.retrieve(made.id)
    assert (early.processing_status, early.results_url, early.request_counts.processing) == ("in_progress", None, 3)
    with pytest.raises(anthropic.AnthropicError):
        await client.messages.batches.results(made.id)
    await worker.look(payer.org)
    ended = await client.messages.batches.retrieve(made.id)
    assert (ended.processing_status, ended.request_counts.succeeded) == ("ended", 3)
    results = [each async for each in await client.messages.batches.results(made.id)]
    assert [(each.custom_id, each.result.type) for each in results] == [(f"r-{n}", "succeeded") for n in range(3)]
    assert all(each.result.type == "succeeded" and each.result.message.usage.output_tokens == 20 for each in results)
    assert await rows(payer) == [(CLAUDE_MICROS, CLAUDE_MICROS, 7, 20, BATCH_FLAG)] * 3
    assert await payer.rows("select distinct feature from ledger.attribution") == [("messages",)]
    await agree(payer)
    deleted = await client.messages.batches.delete(made.id)
    assert (deleted.id, deleted.type) == (made.id, "message_batch_deleted")
    with pytest.raises(anthropic.NotFoundError):
        await client.messages.batches.retrieve(made.id)


async def test_a_batch_of_a_file_is_held_charged_and_written_to_a_file(payer: Payer, worker: Worker) -> None:
    client = chat(payer)
    content = lines(3)
    file = await client.files.create(file=("asked.jsonl", content), purpose="batch")
    assert (file.bytes, file.filename, file.purpose, file.status) == (len(content), "asked.jsonl", "batch", "processed")
    assert await client.files.retrieve(file.id) == file
    assert (await payer.pool()).held_micros == 0
    made = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/chat/completions",
        completion_window="24h",
        metadata={"team": "blue"},
        extra_headers=directed(batch_ms=0),
    )
    assert (made.status, made.input_file_id, made.metadata) == ("finalizing", file.id, {"team": "blue"})
    assert (await payer.pool()).held_micros == 3 * CHAT_MICROS
    assert await payer.rows("select distinct feature from credits.holds") == [("chat",)]
    await worker.look(payer.org)
    ended = await client.batches.retrieve(made.id)
    assert ended.status == "completed"
    assert ended.request_counts is not None
    assert (ended.request_counts.total, ended.request_counts.completed) == (3, 3)
    assert ended.output_file_id is not None
    assert ended.error_file_id is None
    assert (await client.files.retrieve(ended.output_file_id)).purpose == "batch_output"
    answered = [json.loads(line) for line in (await client.files.content(ended.output_file_id)).text.splitlines()]
    assert [each["custom_id"] for each in answered] == ["r-0", "r-1", "r-2"]
    assert {each["response"]["body"]["usage"]["total_tokens"] for each in answered} == {30}
    assert await rows(payer) == [(CHAT_MICROS, CHAT_MICROS, 10, 20, BATCH_FLAG)] * 3
    await agree(payer)
    assert (await client.files.content(file.id)).content.count(b"\n") == 3
    assert (await client.files.delete(file.id)).deleted
    with pytest.raises(openai.NotFoundError):
        await client.files.retrieve(file.id)


async def test_what_is_told_before_the_charge_is_booked_is_finalizing(payer: Payer, worker: Worker) -> None:
    made = await chat_batch(payer, lines(2), batch_ms=0)
    [batch_id] = await worker.due(payer.org)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Keeper, "_settle", _killed)
        with pytest.raises(asyncio.CancelledError):
            await worker.keeper.look(payer.org.organization_id, batch_id)
    told = await chat(payer).batches.retrieve(made.id)
    assert (told.status, told.output_file_id, told.completed_at) == ("finalizing", None, None)
    await worker.look(payer.org)
    assert (await chat(payer).batches.retrieve(made.id)).status == "completed"


async def _killed(*_: object, **__: object) -> None:
    raise asyncio.CancelledError


async def test_the_synchronous_clients_page_through_their_batches(payer: Payer) -> None:
    made = [(await claude(payer).messages.batches.create(requests=messages(1))).id for _ in range(5)]
    client = anthropic.Anthropic(base_url=payer.base_url, api_key=payer.key, max_retries=0)
    chats = openai.OpenAI(base_url=f"{payer.base_url}/v1", api_key=payer.key, max_retries=0)
    listed = await asyncio.to_thread(lambda: [each.id for each in client.messages.batches.list(limit=2)])
    assert listed == made[::-1]
    before = await asyncio.to_thread(lambda: client.messages.batches.list(limit=2, before_id=made[1]))
    assert [each.id for each in before.data] == [made[3], made[2]]
    assert (before.has_more, before.first_id, before.last_id) == (True, made[3], made[2])
    assert await asyncio.to_thread(lambda: list(chats.batches.list())) == []
    files = [(await chat_batch(payer, lines(1))).id for _ in range(3)]
    assert await asyncio.to_thread(lambda: [each.id for each in chats.batches.list(limit=2)]) == files[::-1]


async def test_a_batch_of_embeddings_costs_its_input(payer: Payer, worker: Worker) -> None:
    client = chat(payer)
    content = b"".join(
        json.dumps(
            {
                "custom_id": f"e-{n}",
                "method": "POST",
                "url": "/v1/embeddings",
                "body": {"model": "demo-embedding", "input": "hello there"},
            }
        ).encode()
        + b"\n"
        for n in range(2)
    )
    file = await client.files.create(file=("asked.jsonl", content), purpose="batch")
    made = await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/embeddings",
        completion_window="24h",
        extra_headers=directed(batch_ms=0),
    )
    held = (await payer.pool()).held_micros
    await worker.look(payer.org)
    assert (await client.batches.retrieve(made.id)).status == "completed"
    charged = await rows(payer)
    assert held == sum(each[0] for each in charged) == 2 * 3  # 3 tokens each at half of 2 micros
    await agree(payer)


async def test_tools_of_the_provider_cost_in_a_batch_what_they_cost_anywhere(payer: Payer, worker: Worker) -> None:
    client = chat(payer)
    offered = [
        {"type": "web_search"},
        {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "4g"}},
    ]
    asked = {"model": "demo-1", "max_output_tokens": 20, "input": "hello there", "tools": offered}
    line = {"custom_id": "one", "method": "POST", "url": "/v1/responses", "body": asked}
    file = await client.files.create(file=("asked.jsonl", json.dumps(line).encode()), purpose="batch")
    await client.batches.create(
        input_file_id=file.id,
        endpoint="/v1/responses",
        completion_window="24h",
        extra_headers=directed(batch_ms=0, searches=3, code_sessions=1),
    )
    held = (await payer.pool()).held_micros
    await worker.look(payer.org)
    [(charged, tokens_in, tokens_out, searches, sessions)] = await payer.rows(
        "select charged_micros, input_tokens, output_tokens, web_searches, code_sessions from ledger.attribution"
    )
    assert (searches, sessions) == (3, 1)
    # Half of the tokens; 10 USD for a thousand searches and 0.12 USD for a large container, in full.
    assert charged == tokens_in * 50 + tokens_out * 200 + 3 * 1_000_000 + 12_000_000
    assert held > charged
    await agree(payer)
    unknown = {**line, "body": {**asked, "tools": [{"type": "image_generation"}]}}
    with pytest.raises(openai.BadRequestError, match="image_generation"):
        await client.files.create(file=("asked.jsonl", json.dumps(unknown).encode()), purpose="batch")


async def test_code_that_anthropic_runs_in_a_batch_is_charged_by_the_container(payer: Payer, worker: Worker) -> None:
    offered = [{"type": "code_execution_20250825", "name": "code_execution"}]
    await claude(payer).messages.batches.create(
        requests=messages(1, tools=offered), extra_headers=directed(batch_ms=0, code_sessions=1)
    )
    await worker.look(payer.org)
    [(charged, tokens_in, tokens_out, sessions)] = await payer.rows(
        "select charged_micros, input_tokens, output_tokens, code_sessions from ledger.attribution"
    )
    assert sessions == 1
    assert charged == tokens_in * 150 + tokens_out * 750 + 5_000_000
    await agree(payer)


# ---------------------------------------------------------------------------------------------- what is not answered


async def test_errored_and_expired_requests_cost_nothing_and_their_hold_is_freed(payer: Payer, worker: Worker) -> None:
    made = await claude(payer).messages.batches.create(
        requests=messages(5), extra_headers=directed(batch_ms=0, batch_errored=1, batch_expired=2)
    )
    await worker.look(payer.org)
    counts = (await claude(payer).messages.batches.retrieve(made.id)).request_counts
    assert (counts.succeeded, counts.errored, counts.expired) == (2, 1, 2)
    assert [row[0] for row in await rows(payer)] == [CLAUDE_MICROS] * 2
    await agree(payer)
    chats = await chat_batch(payer, lines(5), batch_ms=0, batch_errored=1, batch_expired=2)
    await worker.look(payer.org)
    told = await chat(payer).batches.retrieve(chats.id)
    assert told.status == "expired"
    assert told.error_file_id is not None
    errors = [json.loads(line) for line in (await chat(payer).files.content(told.error_file_id)).text.splitlines()]
    assert [each["custom_id"] for each in errors] == ["r-0", "r-1", "r-2"]
    assert [row[0] for row in await rows(payer)][2:] == [CHAT_MICROS] * 2
    await agree(payer)
    states = await payer.rows("select state, count(*) from gateway.batch_requests group by 1 order by 1")
    assert states == [("charged", 4), ("freed", 6)]


async def test_a_cancelled_batch_is_freed_when_the_provider_has_stopped(payer: Payer, worker: Worker) -> None:
    made = await claude(payer).messages.batches.create(requests=messages(3), extra_headers=directed(batch_ms=600_000))
    chats = await chat_batch(payer, lines(3), batch_ms=600_000)
    await worker.look(payer.org)
    assert (await payer.pool()).held_micros == 3 * (CLAUDE_MICROS + CHAT_MICROS)
    assert (await claude(payer).messages.batches.retrieve(made.id)).processing_status == "in_progress"
    canceling = await claude(payer).messages.batches.cancel(made.id)
    assert (canceling.processing_status, canceling.ended_at) == ("canceling", None)
    await chat(payer).batches.cancel(chats.id)
    assert (await payer.pool()).held_micros == 3 * (CLAUDE_MICROS + CHAT_MICROS)
    await worker.look(payer.org)
    assert (await claude(payer).messages.batches.retrieve(made.id)).request_counts.canceled == 3
    assert (await chat(payer).batches.retrieve(chats.id)).status == "cancelled"
    assert await rows(payer) == []
    await agree(payer)


async def test_answers_beyond_what_was_held_are_charged_in_full(payer: Payer, worker: Worker) -> None:
    await claude(payer).messages.batches.create(
        requests=messages(2), extra_headers=directed(batch_ms=0, output_tokens=100)
    )
    await worker.look(payer.org)
    assert [row[0] for row in await rows(payer)] == [(7 * 300 + 100 * 1500) // 2] * 2
    await agree(payer)


async def test_an_answer_without_usage_is_counted_by_our_rule_and_marked(payer: Payer, worker: Worker) -> None:
    made = await claude(payer).messages.batches.create(requests=messages(1), extra_headers=directed(batch_ms=0))
    # What the demo says of its usage is written into its file when it is made.
    folder = demo_provider.folder_of(worker.database.settings)
    [provider_id] = (await payer.rows("select provider_batch_id from gateway.batches"))[0]
    path = folder / f"{provider_id}.json"
    path.write_text(path.read_text().replace("batch_ms=0", "batch_ms=0; usage=missing"))
    await worker.look(payer.org)
    assert (await claude(payer).messages.batches.retrieve(made.id)).processing_status == "ended"
    assert await rows(payer) == [(CLAUDE_MICROS, CLAUDE_MICROS, 7, 20, BATCH_FLAG | 4)]


# ---------------------------------------------------------------------------------------------- refusals


async def test_a_batch_without_room_is_refused_as_a_whole_and_never_sent(org: Org, base_url: str) -> None:
    await fund(org, Micros(2 * CLAUDE_MICROS + CLAUDE_MICROS // 2))
    user_id = await org.member()
    key = await org.key(user_id)
    payer = Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)
    with pytest.raises(anthropic.APIStatusError) as refused:
        await claude(payer).messages.batches.create(requests=messages(3))
    body: Any = refused.value.body
    assert refused.value.status_code == 402
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert body["error"]["why"]["wanted"]["amount"] == "0.04815"
    assert body["error"]["why"]["binding_limit"]["kind"] == "pool"
    assert (await payer.pool()).held_micros == 0
    assert await payer.rows("select outcome, wanted_micros from credits.unbilled_requests") == [
        ("refused", 3 * CLAUDE_MICROS)
    ]
    assert await payer.rows("select count(*) from gateway.batches") == [(0,)]
    assert (await claude(payer).messages.batches.create(requests=messages(2))).request_counts.processing == 2


async def test_a_cap_on_calls_counts_each_request_of_a_batch(payer: Payer, worker: Worker) -> None:
    async with payer.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.ORGANIZATION,
            scope_id=None,
            metric=Metric.CALLS,
            amount=5,
        )
    with pytest.raises(openai.APIStatusError) as refused:
        await chat_batch(payer, lines(6))
    body: Any = refused.value.body
    assert (refused.value.status_code, body["code"]) == (402, "cap_reached")
    # It was noted already when it was refused; it has failed, and nobody sees it.
    assert await payer.rows("select state from gateway.batches") == [("failed",)]
    assert [each async for each in chat(payer).batches.list()] == []
    # Five of the six would have fitted. They were not held and released again: they never were.
    assert await payer.rows("select count(*) from credits.unbilled_requests where outcome = 'released'") == [(0,)]
    await agree(payer)
    await chat_batch(payer, lines(5), batch_ms=0)
    with pytest.raises(openai.APIStatusError):
        await chat_batch(payer, lines(1))
    await worker.look(payer.org)
    await agree(payer)


async def test_of_a_batch_whose_second_model_has_no_room_nothing_is_held_for_the_first(payer: Payer) -> None:
    async with payer.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.ORGANIZATION,
            scope_id=None,
            model_filter="demo-1-mini",
            amount=1,
        )
    mini = lines(1, model="demo-1-mini").replace(b"r-0", b"mini")
    with pytest.raises(openai.APIStatusError) as refused:
        await chat_batch(payer, lines(2) + mini)
    body: Any = refused.value.body
    assert body["code"] == "cap_reached"
    assert (await payer.pool()).held_micros == 0
    await agree(payer)


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ([], "1 to 50000 requests"),
        (messages(1) * 2, "comes twice"),
        (messages(1, stream=True), "nothing is streamed"),
        (messages(1, messages="hello"), "requests[0]"),
        ([{"custom_id": "", "params": messages(1)[0]["params"]}], "custom_id"),
        (messages(1, model="nobody-serves-this"), "No provider serves"),
    ],
)
async def test_a_message_batch_that_cannot_be_metered_is_refused(payer: Payer, asked: Any, says: str) -> None:
    with pytest.raises(anthropic.APIStatusError) as refused:
        await claude(payer).messages.batches.create(requests=asked)
    assert refused.value.status_code in (400, 404)
    assert says in str(refused.value)
    assert await payer.rows("select count(*) from gateway.batches") == [(0,)]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "1 to 50000 requests"),
        (b"no json\n", "Line 1"),
        (lines(1) + lines(1), "comes twice"),
        (lines(1) + lines(1, url="/v1/embeddings").replace(b"r-0", b"r-1"), "every line is a POST to the same path"),
        (lines(1, url="/v1/audio/speech"), "cannot be called in batches"),
        (lines(1, url="/v1/messages"), "cannot be called in batches"),
        (lines(2, stream=True), "Line 1: nothing is streamed"),
        (lines(1, messages="hello"), "Line 1"),
    ],
)
async def test_a_file_that_cannot_be_metered_is_refused(payer: Payer, content: bytes, says: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        await chat(payer).files.create(file=("asked.jsonl", content), purpose="batch")
    assert refused.value.status_code == 400
    assert says in str(refused.value)


async def test_only_files_for_batches_are_taken_and_only_for_their_path(payer: Payer) -> None:
    with pytest.raises(openai.BadRequestError, match="purpose=batch"):
        await chat(payer).files.create(file=("x.jsonl", lines(1)), purpose="user_data")
    file = await chat(payer).files.create(file=("x.jsonl", lines(1)), purpose="batch")
    with pytest.raises(openai.BadRequestError, match="are for /v1/chat/completions"):
        await chat(payer).batches.create(input_file_id=file.id, endpoint="/v1/embeddings", completion_window="24h")


async def test_the_demo_refuses_a_form_that_it_cannot_read(payer: Payer) -> None:
    async with httpx2.AsyncClient(base_url=payer.base_url, headers={"authorization": f"Bearer {payer.key}"}) as http:
        parts: Any = [("purpose", (None, "batch")), ("note", (None, b"\xff")), ("file", ("a.jsonl", lines(1)))]
        assert (await http.post("/v1/files", files=parts)).status_code == 400


async def test_a_model_that_is_not_allowed_is_not_allowed_in_batches(payer: Payer) -> None:
    async with payer.org.tenant() as conn:
        await add_model_rule(
            conn,
            organization_id=payer.org.organization_id,
            effect="deny",
            pattern="demo-1-mini",
            by=OPERATOR,
        )
    mixed = lines(1) + lines(1, model="demo-1-mini").replace(b"r-0", b"r-1")
    for _ in range(100):  # running servers follow within seconds
        try:
            await chat(payer).files.create(file=("asked.jsonl", mixed), purpose="batch")
        except openai.PermissionDeniedError:
            break
        await asyncio.sleep(0.1)
    else:
        raise AssertionError("the rule is not followed")
    assert await chat(payer).files.create(file=("asked.jsonl", lines(1)), purpose="batch")


async def test_a_batch_that_the_provider_refuses_is_freed_at_once(payer: Payer) -> None:
    with pytest.raises(anthropic.BadRequestError, match="demo provider was told"):
        await claude(payer).messages.batches.create(requests=messages(3), extra_headers=directed(fail=400))
    assert await rows(payer) == []
    assert await payer.rows("select state from gateway.batches") == [("failed",)]
    await agree(payer)


# ---------------------------------------------------------------------------------------------- whose it is


async def test_members_see_their_own_batches_administrators_see_all_and_texts_are_for_who_wrote_them(
    payer: Payer, worker: Worker
) -> None:
    made = (await claude(payer).messages.batches.create(requests=messages(1), extra_headers=directed(batch_ms=0))).id
    chats = await chat_batch(payer, lines(1), batch_ms=0)
    await worker.look(payer.org)
    output = (await chat(payer).batches.retrieve(chats.id)).output_file_id
    assert output is not None
    colleague = (await payer.org.key(await payer.org.member())).text
    twin = (await payer.org.key(payer.user_id)).text
    admin = (await payer.org.key(payer.org.admin)).text
    finance = (await payer.org.key(await payer.org.member(Role.FINANCE))).text
    blunt = (await payer.org.key(payer.org.admin, scopes=[KeyScope.INFERENCE])).text
    service = (await payer.org.key()).text
    for key, sees in ((twin, 1), (colleague, 0), (admin, 1), (finance, 1), (blunt, 0), (service, 1)):
        assert len((await claude(payer, key).messages.batches.list()).data) == sees
        assert len((await chat(payer, key).batches.list()).data) == sees
        if sees:
            assert (await claude(payer, key).messages.batches.retrieve(made)).id == made
            continue
        with pytest.raises(anthropic.NotFoundError):
            await claude(payer, key).messages.batches.retrieve(made)
        with pytest.raises(openai.NotFoundError):
            await chat(payer, key).files.content(output)
    assert [each async for each in await claude(payer, twin).messages.batches.results(made)]
    for key in (admin, finance, service):
        with pytest.raises(anthropic.PermissionDeniedError):
            await claude(payer, key).messages.batches.results(made)
        for file_id in (output, chats.input_file_id):
            with pytest.raises(openai.PermissionDeniedError):
                await chat(payer, key).files.content(file_id)
    with pytest.raises(anthropic.PermissionDeniedError):
        await claude(payer, finance).messages.batches.delete(made)
    assert (await claude(payer, admin).messages.batches.delete(made)).id == made


async def test_a_services_batches_are_those_of_its_key(payer: Payer, worker: Worker) -> None:
    scopes = [KeyScope.INFERENCE]
    first, second = (await payer.org.key(scopes=scopes)).text, (await payer.org.key(scopes=scopes)).text
    made = (await claude(payer, first).messages.batches.create(requests=messages(1))).id
    assert [each.id for each in (await claude(payer, first).messages.batches.list()).data] == [made]
    assert (await claude(payer, second).messages.batches.list()).data == []
    with pytest.raises(anthropic.NotFoundError):
        await claude(payer, second).messages.batches.cancel(made)
    with pytest.raises(anthropic.NotFoundError):
        await claude(payer).messages.batches.cancel(made)


async def test_the_same_idempotency_key_makes_one_batch(payer: Payer) -> None:
    headers = {"Idempotency-Key": "nightly"}
    client = claude(payer)
    made = await client.messages.batches.create(requests=messages(2), extra_headers=headers)
    again = await client.messages.batches.create(requests=messages(2), extra_headers=headers)
    assert again.id == made.id
    assert (await payer.pool()).held_micros == 2 * CLAUDE_MICROS
    with pytest.raises(anthropic.UnprocessableEntityError):
        await client.messages.batches.create(requests=messages(3), extra_headers=headers)
    other = {"Idempotency-Key": "refused"}
    with pytest.raises(anthropic.BadRequestError):
        await client.messages.batches.create(requests=messages(1), extra_headers={**other, **directed(fail=400)})
    assert await client.messages.batches.create(requests=messages(1), extra_headers=other)


async def test_with_the_customers_own_key_the_batch_price_of_the_list_is_noted_and_nothing_charged(
    payer: Payer, worker: Worker
) -> None:
    """The list's batch price of this model is four fifths of its usual one, not half."""
    org = payer.org
    async with demo_provider.running(folder=demo_provider.folder_of(worker.database.settings)) as address:
        async with worker.database.platform() as conn:
            await put_provider(conn, name="x-ai", kind="openai", base_url=address, auth="bearer", by=OPERATOR)
        async with org.tenant() as conn:
            key = await add_provider_key(
                conn,
                Keyring(worker.database.settings.master_key),
                organization_id=org.organization_id,
                provider="x-ai",
                secret="xai-a-key-of-the-customers-own",
                by=OPERATOR,
            )
        made = await once_known(payer, lines(2, model="x-ai/grok-4.3"))
        assert (await payer.pool()).held_micros == 0
        assert (await chat(payer).files.content(made.input_file_id)).content.count(b'"grok-4.3"') == 2
        # A key that was revoked meanwhile makes no new batch, and is still asked for what it began.
        async with org.tenant() as conn:
            await db.execute(conn, "update gateway.provider_keys set revoked_at = clock_timestamp()")
        await asyncio.sleep(1.1)
        await worker.look(org)
        assert (await chat(payer).batches.retrieve(made.id)).status == "completed"
    noted = await payer.rows(
        "select charged_micros, provider_cost_nano_usd, customer_cost_nano_usd, flags, provider_key_id, model "
        "from ledger.attribution"
    )
    assert noted == [(0, 0, 10 * 1_000 + 20 * 2_000, BATCH_FLAG | 2, key.provider_key_id, "grok-4.3")] * 2
    await agree(payer)


async def once_known(payer: Payer, content: bytes) -> Any:
    """A batch, as soon as the running server knows its provider."""
    for _ in range(150):
        try:
            return await chat_batch(payer, content)
        except openai.NotFoundError:
            await asyncio.sleep(0.1)
    raise AssertionError("the provider is not known")


def test_errors_in_results_tell_nothing_of_the_platforms_account_and_answers_stay_as_they_are() -> None:
    provider = Provider(name="x", provider_id=uuid7(), kind="both", base_url="https://x.example/v1")
    target = Target(provider, "secret-of-the-platform")
    account = "org-abcdefghijkl1234 and secret-of-the-platform"
    failed = {"custom_id": "user-abcdefghijkl1234", "response": None, "error": {"message": f"Limit of {account}"}}
    line = batch_front._line_without_account(json.dumps(failed).encode(), "openai", target)
    assert json.loads(line) == {**failed, "error": {"message": "Limit of [removed] and [removed]"}}
    answered = {"custom_id": "one", "response": {"status_code": 200, "body": {"text": account}}, "error": None}
    text = json.dumps(answered).encode()
    assert batch_front._line_without_account(text, "openai", target) == text
    errored = {"custom_id": "one", "result": {"type": "errored", "error": {"message": account}}}
    assert b"org-" not in batch_front._line_without_account(json.dumps(errored).encode(), "anthropic", target)
    assert b"org-" not in batch_front._line_without_account(account.encode(), "anthropic", target)


# ---------------------------------------------------------------------------------------------- whatever breaks


async def test_a_batch_that_the_provider_made_without_being_heard_is_found_and_charged(
    payer: Payer, worker: Worker
) -> None:
    file = await chat(payer).files.create(file=("asked.jsonl", lines(2)), purpose="batch")
    with pytest.raises(openai.APIStatusError) as broken:
        await chat(payer).batches.create(
            input_file_id=file.id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            extra_headers=directed(break_after=0, batch_ms=0),
        )
    assert broken.value.status_code == 502
    assert (await payer.pool()).held_micros == 2 * CHAT_MICROS
    await worker.look(payer.org)
    [found] = (await chat(payer).batches.list()).data
    await worker.look(payer.org)
    assert (await chat(payer).batches.retrieve(found.id)).status == "completed"
    assert [row[0] for row in await rows(payer)] == [CHAT_MICROS] * 2
    await agree(payer)


async def test_a_batch_that_the_provider_never_made_is_freed_when_that_is_known(payer: Payer, worker: Worker) -> None:
    with pytest.raises(openai.InternalServerError):
        await chat_batch(payer, lines(2), fail=500)
    assert (await payer.pool()).held_micros == 2 * CHAT_MICROS
    await worker.look(payer.org)
    assert await payer.rows("select state from gateway.batches") == [("failed",)]
    await agree(payer)


async def test_a_message_batch_that_may_be_there_keeps_its_holds_until_they_run_out(
    payer: Payer, worker: Worker, admin_dsn: str
) -> None:
    with pytest.raises(anthropic.APIStatusError):
        await claude(payer).messages.batches.create(
            requests=messages(7), extra_headers=directed(break_after=0, batch_ms=0)
        )
    await worker.look(payer.org)
    assert (await payer.pool()).held_micros == 7 * CLAUDE_MICROS
    await run_out(payer, admin_dsn)
    await worker.look(payer.org)
    assert await payer.rows("select state from gateway.batches") == [("failed",)]
    assert [(row[0], row[4]) for row in await rows(payer)] == [(CLAUDE_MICROS, BATCH_FLAG | 64 | 4)] * 7
    await agree(payer)


async def run_out(payer: Payer, admin_dsn: str) -> None:
    """All leases of the organization are over, and expiry has run."""
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as conn:
        organization = [payer.org.organization_id]
        await conn.execute("set role bursar_owner")
        await conn.execute(
            "update credits.holds set lease_expires_at = clock_timestamp() - interval '1 s' where organization_id = %s",
            organization,
        )
        await conn.execute(
            "update gateway.batches set lease_until = clock_timestamp() - interval '1 s' where organization_id = %s",
            organization,
        )
    async with await psycopg.AsyncConnection.connect(payer.org.database.dsn("bursar_lane"), autocommit=True) as lane:
        await lane.execute("select credits.expire_holds(500)")


async def test_what_expiry_charged_by_estimate_is_corrected_when_the_results_come(
    payer: Payer, worker: Worker, admin_dsn: str
) -> None:
    """Workers were away for longer than the leases last. What failed comes back whole."""
    await claude(payer).messages.batches.create(
        requests=messages(3, max_tokens=40), extra_headers=directed(batch_ms=0, batch_errored=1, output_tokens=20)
    )
    await run_out(payer, admin_dsn)
    held = (7 * 300 + 40 * 1500) // 2
    assert [row[0] for row in await rows(payer)] == [held] * 3
    await worker.look(payer.org)
    assert (await payer.pool()).used_micros == 2 * CLAUDE_MICROS
    charges = await payer.rows(
        "select sum(charged_micros)::bigint from ledger.attribution group by request_id order by 1"
    )
    assert charges == [(0,), (CLAUDE_MICROS,), (CLAUDE_MICROS,)]
    await agree(payer)


async def test_leases_are_renewed_while_a_batch_runs(payer: Payer, worker: Worker) -> None:
    await claude(payer).messages.batches.create(requests=messages(2), extra_headers=directed(batch_ms=600_000))
    async with payer.org.tenant() as conn:
        await db.execute(conn, "update gateway.batches set lease_until = %(at)s", at=now() + timedelta(hours=1))
    before = await payer.rows("select min(lease_expires_at) from credits.holds")
    await worker.look(payer.org)
    after = await payer.rows("select min(lease_expires_at) from credits.holds")
    assert after > before
    assert (await payer.rows("select lease_until > clock_timestamp() + interval '25 h' from gateway.batches"))[0][0]


async def test_a_provider_that_fails_is_asked_again_and_nothing_is_freed_meanwhile(
    payer: Payer, worker: Worker
) -> None:
    await claude(payer).messages.batches.create(requests=messages(2), extra_headers=directed(batch_ms=0))
    folder = demo_provider.folder_of(worker.database.settings)
    [provider_id] = (await payer.rows("select provider_batch_id from gateway.batches"))[0]
    path = folder / f"{provider_id}.json"
    hidden = path.rename(path.with_suffix(".hidden"))
    for failed in (1, 2):
        await worker.look(payer.org)
        assert await payer.rows("select failed_looks from gateway.batches") == [(failed,)]
    assert (await payer.pool()).held_micros == 2 * CLAUDE_MICROS
    hidden.rename(path)
    await worker.look(payer.org)
    assert [row[0] for row in await rows(payer)] == [CLAUDE_MICROS] * 2
    await agree(payer)


async def test_results_that_are_fewer_than_the_provider_says_free_nothing(payer: Payer, worker: Worker) -> None:
    await claude(payer).messages.batches.create(requests=messages(3), extra_headers=directed(batch_ms=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_keeper, "read_result", _one_of_three(batch_keeper.read_result))
        await worker.look(payer.org)
    assert (await payer.pool()).held_micros == 2 * CLAUDE_MICROS
    await worker.look(payer.org)
    assert [row[0] for row in await rows(payer)] == [CLAUDE_MICROS] * 3
    await agree(payer)


def _one_of_three(read: Any) -> Any:
    return lambda format, line: read(format, line) if b'"r-1"' in line else None


class Killed(BaseException):
    """The process ends here."""


class Steps:
    """Counts transactions and calls to the provider, and kills the worker at one of them, before or after it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.steps = 0
        self.kill_at = 0
        for owner, name in (
            (batch_keeper.records, "execute"),
            (batch_keeper.records, "held_requests"),
            (batch_keeper.together, "book"),
            (batch_keeper.together, "free"),
            (Upstream, "get"),
        ):
            patch.setattr(owner, name, self._step(getattr(owner, name)))

    def _step(self, real: Any) -> Any:
        async def stepped(*arguments: Any, **parameters: Any) -> Any:
            self._count()
            result = await real(*arguments, **parameters)
            self._count()
            return result

        return stepped

    def _count(self) -> None:
        self.steps += 1
        if self.steps == self.kill_at:
            raise Killed


@pytest.mark.parametrize("format", ["anthropic", "openai"])
async def test_a_worker_that_is_killed_at_any_step_is_followed_by_one_that_books_everything_once(
    payer: Payer, worker: Worker, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    monkeypatch.setattr(batch_keeper.together, "PORTION", 2)
    asked = {"batch_ms": 0, "batch_errored": 1, "batch_expired": 1}
    micros = CLAUDE_MICROS if format == "anthropic" else CHAT_MICROS

    async def make() -> None:
        if format == "anthropic":
            await claude(payer).messages.batches.create(requests=messages(7), extra_headers=directed(**asked))
        else:
            await chat_batch(payer, lines(7), **asked)

    batches = kill_at = 0
    while True:
        kill_at += 1
        await make()
        batches += 1
        with pytest.MonkeyPatch.context() as patch:
            steps = Steps(patch)
            steps.kill_at = kill_at
            try:
                await worker.look(payer.org)
            except Killed:
                pass
            else:
                break
        await worker.look(payer.org)
        assert len(await rows(payer)) == 5 * batches, f"killed at step {kill_at}"
    assert [row[0] for row in await rows(payer)] == [micros] * 5 * batches
    assert kill_at > 30, "there are many steps"
    written = await payer.rows("select count(*) from gateway.batch_files where batch_id is not null")
    assert written == [(2 * batches if format == "openai" else 0,)]
    await agree(payer)


@contextmanager
def _server(settings: Settings, admin_dsn: str, org: Org) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """A server process with its worker, which looks after the batches of this organization."""
    port = free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": admin_dsn,
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(settings.data_dir),
        "BURSAR_LOG_LEVEL": "error",
    }
    server = subprocess.Popen(serve_beside_tests(port, organization=org.organization_id), env=environment)
    try:
        wait_until_ready(f"http://127.0.0.1:{port}", server)
        yield f"http://127.0.0.1:{port}", server
    finally:
        server.kill()
        server.wait(timeout=30)


async def test_a_server_that_is_killed_leaves_its_batches_to_the_next_one(
    payer: Payer, settings: Settings, admin_dsn: str
) -> None:
    with _server(settings, admin_dsn, payer.org) as (address, server):
        first = replace(payer, base_url=address)
        made = (await claude(first).messages.batches.create(requests=messages(40))).id
        chats = (await chat_batch(first, lines(40))).id
        server.kill()
    assert (await payer.pool()).held_micros == 40 * (CLAUDE_MICROS + CHAT_MICROS)
    with _server(settings, admin_dsn, payer.org) as (address, _):
        second = replace(payer, base_url=address)
        for _ in range(600):
            messages_told = await claude(second).messages.batches.retrieve(made)
            chat_told = await chat(second).batches.retrieve(chats)
            if (messages_told.processing_status, chat_told.status) == ("ended", "completed"):
                break
            await asyncio.sleep(0.1)
        client = claude(second)  # one that nobody keeps closes its connection
        assert len([each async for each in await client.messages.batches.results(made)]) == 40
    assert len(await rows(payer)) == 80
    await agree(payer)


async def test_any_number_of_workers_that_look_at_once_book_everything_once(
    payer: Payer, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them claim it, as if each had taken longer than a claim lasts."""
    monkeypatch.setattr(batch_keeper.together, "PORTION", 3)
    await chat_batch(payer, lines(20), batch_ms=0, batch_errored=3)
    [batch_id] = await worker.due(payer.org)
    await worker.keeper.look(payer.org.organization_id, payer.org.organization_id)  # none of this name
    async with payer.org.tenant() as conn:
        batch = await db.fetch_one(
            conn,
            batch_keeper.Batch,
            batch_keeper.records.QUERIES.batch,
            organization_id=payer.org.organization_id,
            batch_id=batch_id,
        )
    await asyncio.gather(*(worker.keeper._follow(batch) for _ in range(6)))
    assert [row[0] for row in await rows(payer)] == [CHAT_MICROS] * 17
    assert await payer.rows("select count(*) from gateway.batch_files where batch_id is not null") == [(2,)]
    await agree(payer)
    assert await worker.due(payer.org) == []
