"""Clients that hang up, providers that misbehave: nothing stays held, and the charge is what was used."""

import asyncio
import json
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import psycopg
import pytest
from aiohttp import web
from fastapi import FastAPI
from structlog.testing import capture_logs
from tests.conftest import Org
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import Cable, Provider, served

from bursar import db
from bursar.credits.limits import Scope, set_limit
from bursar.gateway.calls import Till
from bursar.gateway.front import Front
from bursar.money import Micros
from bursar.settings import Settings

HELLO = [{"role": "user", "content": "hello there"}]
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": HELLO}
CLAUDE: dict[str, Any] = {"model": "demo-claude", "max_tokens": 20, "messages": HELLO}
CALL_MICROS = 9_000  # 10 tokens of input at 100 micros, 20 of output at 400
INPUT_MICROS = 1_000
CLAUDE_INPUT_MICROS = 2_100
RESPONSE: dict[str, Any] = {"model": "demo-1", "max_output_tokens": 20, "input": "hello there"}
PATHS = {"openai": "/v1/chat/completions", "responses": "/v1/responses", "anthropic": "/v1/messages"}
BODIES = {"openai": CALL, "responses": RESPONSE, "anthropic": CLAUDE}
LIMITS = {"openai": "max_tokens", "responses": "max_output_tokens", "anthropic": "max_tokens"}
DELTAS = {"openai": b'"content":"', "responses": b"output_text.delta\n", "anthropic": b"text_delta"}
VENDORS = list(PATHS)


@dataclass(frozen=True)
class Scene:
    """An application with a provider that follows scripts."""

    provider: Provider
    cable: Cable
    base_url: str
    app: FastAPI

    @property
    def till(self) -> Till:
        front: Front = self.app.state.gateway
        return front._till


@pytest.fixture(scope="module")
async def scene(priced: db.Database, settings: Settings) -> AsyncIterator[Scene]:
    provider, cable = Provider(), Cable(priced.dsn("bursar_lane"))
    async with served(priced, settings, provider, cable) as (base_url, app):
        yield Scene(provider, cable, base_url, app)


@pytest.fixture
async def client(org: Org, scene: Scene) -> Payer:
    """A member of a company with 1,000 credits, who calls the scene's application."""
    await fund(org, Micros(1_000_000_000))
    user_id = await org.member()
    key = await org.key(user_id)
    return Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=scene.base_url)


async def ended(payer: Payer, *, rows: int = 0, seconds: float = 10) -> list[Any]:
    """The organization's rows, at least so many, once nothing is held: (charged, flags, output tokens)."""
    wanted = f"select (select count(*) from credits.holds) = 0 and (select count(*) from ledger.attribution) >= {rows}"
    for _ in range(int(seconds / 0.05)):
        if (await payer.pool()).held_micros == 0 and await payer.rows(wanted) == [(True,)]:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError(f"still held: {(await payer.pool()).held_micros}")
    found = await payer.rows("select charged_micros, flags, output_tokens from ledger.attribution order by booked_at")
    assert (await payer.pool()).used_micros == sum(row[0] for row in found)
    return found


async def sent(payer: Payer, body: dict[str, Any], path: str = PATHS["openai"], **headers: str) -> asyncio.StreamWriter:
    """A connection on which the whole request went out."""
    return (await opened(payer, body, path, **headers))[1]


async def opened(
    payer: Payer, body: dict[str, Any], path: str = PATHS["openai"], *, upto: float = 1.0, **headers: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which a part of the request went out."""
    host, port = payer.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**16)
    text = json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {payer.key}",
        f"Content-Length: {len(text)}",
        *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items()),
    ]
    whole = "\r\n".join(lines).encode() + b"\r\n\r\n" + text
    writer.write(whole[: round(len(whole) * upto)])
    await writer.drain()
    return reader, writer


# -- providers that misbehave


def completion(usage: Any, text: str = "Hello") -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {"id": "c", "object": "chat.completion", "choices": [{"index": 0, "message": message}], "usage": usage}


@pytest.mark.parametrize("count", [2**31, 2**63, 10**30])
@pytest.mark.parametrize("place", ["prompt_tokens", "completion_tokens", "total_tokens"])
async def test_a_count_that_cannot_be_true_is_not_believed_and_harms_nobody(
    client: Payer, scene: Scene, place: str, count: int
) -> None:
    async def lies(request: web.Request) -> web.StreamResponse:
        return web.json_response(completion({"prompt_tokens": 10, "completion_tokens": 2, place: count}))

    answer = await client.post(CALL, bursar_demo=scene.provider.script(lies))
    assert answer.status_code == 200
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (charged, output, flags & 4) == (INPUT_MICROS + 2 * 400, 2, 4), "counted by us and marked"
    assert (await client.post(CALL)).status_code == 200, "the lane lives"


@pytest.mark.parametrize(
    "lie",
    [
        {"usage": {"input_tokens": 10, "output_tokens": 10**12}},
        {"usage": {"input_tokens": 2**63, "output_tokens": 2}},
        {"usage": {"input_tokens": -10, "output_tokens": 2}},
        {"usage": [1], "tool_usage": {"web_search": {"num_requests": 10**12}}},
    ],
)
async def test_a_response_that_lies_is_not_believed_either(client: Payer, scene: Scene, lie: dict[str, Any]) -> None:
    async def lies_in_a_response(request: web.Request) -> web.StreamResponse:
        message = {"type": "message", "content": [{"type": "output_text", "text": "Hello"}]}
        return web.json_response({"status": "completed", "output": [message], **lie})

    script = scene.provider.script(lies_in_a_response)
    assert (await client.post(RESPONSE, path=PATHS["responses"], bursar_demo=script)).status_code == 200
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (charged, output, flags & 4) == (INPUT_MICROS + 2 * 400, 2, 4), "counted by us and marked"
    assert (await client.post(RESPONSE, path=PATHS["responses"])).status_code == 200, "the lane lives"


async def test_a_claude_that_lies_is_not_believed_either(client: Payer, scene: Scene) -> None:
    async def lies_about_searches(request: web.Request) -> web.StreamResponse:
        usage = {"input_tokens": 7, "output_tokens": 1, "server_tool_use": {"web_search_requests": 10**12}}
        content = [{"type": "text", "text": "Hi"}]
        return web.json_response({"type": "message", "content": content, "usage": usage})

    script = scene.provider.script(lies_about_searches)
    assert (await client.post(CLAUDE, path=PATHS["anthropic"], bursar_demo=script)).status_code == 200
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (charged, output, flags & 4) == (CLAUDE_INPUT_MICROS + 1_500, 1, 4)


@pytest.mark.parametrize("status", [600, 999])
async def test_a_status_that_http_does_not_have_is_a_fault_of_the_provider(
    client: Payer, scene: Scene, status: int
) -> None:
    answer = await client.post(CALL, bursar_demo=f"fail={status}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    assert await ended(client) == []


async def test_json_where_a_stream_was_asked_for_reaches_the_client_and_is_charged(client: Payer, scene: Scene) -> None:
    async def does_not_stream(request: web.Request) -> web.StreamResponse:
        return web.json_response(completion({"prompt_tokens": 10, "completion_tokens": 20}))

    answer = await client.post({**CALL, "stream": True}, bursar_demo=scene.provider.script(does_not_stream))
    assert answer.json()["choices"][0]["message"]["content"] == "Hello"
    assert answer.headers["bursar-charged"] == "0.009"
    assert [row[0] for row in await ended(client)] == [CALL_MICROS]


async def test_headers_of_a_provider_that_cannot_be_passed_on_are_left_out(client: Payer, scene: Scene) -> None:
    async def answers(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"}]}")
        body = json.dumps(completion({"prompt_tokens": 10, "completion_tokens": 20})).encode()
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nOpenai-Version: a\x01b\r\nX-Request-Id: one\r\n"
        writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        writer.close()

    server = await asyncio.start_server(answers, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]

    async def elsewhere(request: web.Request) -> web.StreamResponse:
        raise web.HTTPTemporaryRedirect(f"http://127.0.0.1:{port}")

    desk = scene.app.state.gateway._desk
    table = await desk._current()
    demo = table.providers["demo"]
    try:
        table.providers["demo"] = replace(demo, base_url=f"http://127.0.0.1:{port}")
        desk._resolved.clear()
        answer = await client.post(CALL)
    finally:
        table.providers["demo"] = demo
        desk._resolved.clear()
        server.close()
    assert answer.status_code == 200
    assert "openai-version" not in answer.headers
    assert answer.headers["bursar-provider-request-id"] == "one"
    assert [row[0] for row in await ended(client)] == [CALL_MICROS]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_never_answers_costs_nothing(client: Payer, scene: Scene, stream: bool) -> None:
    answer = await client.post({**CALL, "stream": stream}, bursar_demo="delay_ms=5000")
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "provider_timeout")
    assert await ended(client) == []


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_stream_that_stands_still_is_ended_and_charged_what_came(
    client: Payer, scene: Scene, vendor: str
) -> None:
    async def stands_still(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        chunk: dict[str, Any] = {
            "openai": {"choices": [{"index": 0, "delta": {"content": "Hell"}}]},
            "responses": {"type": "response.output_text.delta", "delta": "Hell"},
            "anthropic": {"delta": {"type": "text_delta", "text": "Hell"}, "type": "content_block_delta", "index": 0},
        }[vendor]
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await asyncio.sleep(20)
        return response

    script = scene.provider.script(stands_still)
    answer = await client.post({**BODIES[vendor], "stream": True}, path=PATHS[vendor], bursar_demo=script)
    assert answer.status_code == 200
    assert "provider_timeout" in answer.text
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (output, flags & 4) == (1, 4)
    assert charged == (INPUT_MICROS + 400 if vendor != "anthropic" else CLAUDE_INPUT_MICROS + 1_500)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_an_error_inside_a_stream_is_passed_on_and_what_came_is_charged(client: Payer, vendor: str) -> None:
    answer = await client.post(
        {**BODIES[vendor], "stream": True}, path=PATHS[vendor], bursar_demo="error_after=5; piece_ms=1"
    )
    assert "error" in answer.text
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (output, flags & 4) == (5, 4)
    assert charged == (INPUT_MICROS + 5 * 400 if vendor != "anthropic" else CLAUDE_INPUT_MICROS + 5 * 1_500)


async def test_an_event_without_end_ends_the_stream(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.gateway.sse.MAX_EVENT_BYTES", 100_000)

    async def never_ends_its_event(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(100):
            await response.write(b"data: " + b"x" * 10_000)
        return response

    answer = await client.post({**CALL, "stream": True}, bursar_demo=scene.provider.script(never_ends_its_event))
    assert "provider_event_too_long" in answer.text
    assert [row[0] for row in await ended(client)] == [INPUT_MICROS]


async def test_a_fault_of_ours_after_the_hold_leaves_nothing_held_and_nothing_running(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(self: object, body: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("bursar.gateway.openai_wire.UsageMeter.read_body", breaks)
    answer = await client.post(CALL)
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert await ended(client) == []
    assert scene.till._running == {}


async def test_trouble_with_one_calls_progress_does_not_end_the_leases_of_the_others(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.gateway.calls.PROGRESS_SECONDS", 0.05)
    real = Till._report
    reported: list[str] = []

    async def report(self: Till, call: Any) -> None:
        if call.request.max_output_tokens == 21:
            raise ZeroDivisionError
        reported.append("renewed")
        await real(self, call)

    monkeypatch.setattr(Till, "_report", report)
    await asyncio.sleep(2.1)  # the loop still sleeps its former two seconds
    with capture_logs() as logs:
        bad, good = await asyncio.gather(
            client.post({**CALL, "max_tokens": 21}, bursar_demo="delay_ms=700"),
            client.post(CALL, bursar_demo="delay_ms=700"),
        )
    assert {"progress not recorded"} == {each["event"] for each in logs if each["log_level"] == "error"}
    assert (bad.status_code, good.status_code) == (200, 200)
    assert len(reported) > 3
    assert len(await ended(client)) == 2


# -- clients that hang up


async def test_who_hangs_up_before_the_whole_body_holds_nothing(client: Payer, scene: Scene) -> None:
    calls = scene.provider.calls
    for upto in (0.1, 0.5, 0.9, 0.999):
        _, writer = await opened(client, CALL, upto=upto)
        writer.close()
    await asyncio.sleep(0.2)
    assert await ended(client) == []
    assert scene.provider.calls == calls


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_plain_call_whose_client_has_gone_is_seen_to_its_end_and_charged_once(
    client: Payer, vendor: str
) -> None:
    writer = await sent(client, BODIES[vendor], PATHS[vendor], Bursar_Demo="delay_ms=300")
    await asyncio.sleep(0.15)
    writer.transport.abort()
    await asyncio.sleep(0.3)
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (charged, output, flags & 4) == (CALL_MICROS if vendor != "anthropic" else 32_100, 20, 0)


@pytest.mark.parametrize("vendor", VENDORS)
async def test_a_stream_whose_client_goes_before_it_begins_is_cut_and_charged_its_input(
    client: Payer, scene: Scene, vendor: str
) -> None:
    cut = scene.provider.cut
    body = {**BODIES[vendor], "stream": True}
    writer = await sent(client, body, PATHS[vendor], Bursar_Demo="delay_ms=1400")
    await asyncio.sleep(0.2)
    writer.close()
    [(charged, flags, output)] = await ended(client, rows=1, seconds=1)
    assert (charged, output) == (INPUT_MICROS if vendor != "anthropic" else CLAUDE_INPUT_MICROS, 0)
    assert flags & 4
    await asyncio.sleep(0.1)
    assert scene.provider.cut == cut + 1, "the provider works no longer for nobody"


async def test_who_hangs_up_while_waiting_for_room_holds_nothing_and_is_never_called_for(
    org: Org, scene: Scene
) -> None:
    await fund(org, Micros(CALL_MICROS))
    key = await org.key(await org.member())
    payer = Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=scene.base_url)
    calls = scene.provider.calls
    first = asyncio.create_task(payer.post(CALL, bursar_demo="delay_ms=1000; fail=500"))
    await asyncio.sleep(0.3)
    waiting = [await sent(payer, CALL) for _ in range(3)]
    await asyncio.sleep(0.3)
    assert not first.done()
    for writer in waiting:
        writer.close()
    assert (await first).status_code == 500, "which makes room for one of them"
    await asyncio.sleep(0.3)
    assert await ended(payer) == []
    assert scene.provider.calls == calls + 1


async def test_a_hold_that_is_placed_as_its_client_goes_is_released(client: Payer, scene: Scene) -> None:
    assert (await client.post(CALL, bursar_demo="fail=500")).status_code == 500, "the lane is connected"
    calls = scene.provider.calls
    scene.cable.answers_after = 0.4
    try:
        writer = await sent(client, CALL, Idempotency_Key="gone")
        await asyncio.sleep(0.3)
        assert (await client.pool()).held_micros > 0, "committed, and not yet told"
        writer.close()
        await asyncio.sleep(0.05)
    finally:
        scene.cable.answers_after = 0.0
    assert await ended(client) == []
    assert scene.provider.calls == calls
    assert (await client.post(CALL, idempotency_key="gone")).status_code == 200, "its key is free again"


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("pieces", [1, 4, 12])
async def test_who_hangs_up_after_some_pieces_pays_for_about_those(client: Payer, vendor: str, pieces: int) -> None:
    body = {**BODIES[vendor], "stream": True, LIMITS[vendor]: 200}
    reader, writer = await opened(client, body, PATHS[vendor], Bursar_Demo="piece_ms=20; output_tokens=200")
    for _ in range(pieces):
        await reader.readuntil(DELTAS[vendor])
    writer.close()
    [(charged, flags, output)] = await ended(client, rows=1)
    assert pieces - 3 <= output <= pieces + 15
    assert flags & 4
    assert charged == (INPUT_MICROS + 400 * output if vendor != "anthropic" else CLAUDE_INPUT_MICROS + 1_500 * output)


async def test_a_client_that_never_reads_is_given_up_and_pays_for_what_the_provider_put_out(
    client: Payer, scene: Scene
) -> None:
    written = 0

    async def pours(request: web.Request) -> web.StreamResponse:
        nonlocal written
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(20_000):
            # Four characters of text, one token, in an event of 5 kB: 100 MB in all.
            chunk = {"choices": [{"index": 0, "delta": {"content": "word"}}], "padding": "x" * 5_000}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
            written += 1
        return response

    writer = await sent(client, {**CALL, "stream": True}, Bursar_Demo=scene.provider.script(pours))
    [(charged, flags, output)] = await ended(client, rows=1)
    assert flags & 4
    assert 0 < output <= written < 6_000, "a fast provider waits for a slow client; nothing piles up here"
    assert charged == INPUT_MICROS + 400 * output
    writer.close()


async def test_a_slow_reader_gets_everything_and_is_charged_everything(client: Payer) -> None:
    body = {**CALL, "stream": True, "max_tokens": 3000}
    reader, writer = await opened(client, body, Bursar_Demo="output_tokens=3000")
    got = b""
    while not got.endswith(b"0\r\n\r\n"):
        piece = await reader.read(60_000)
        assert piece, "it broke off"
        got += piece
        await asyncio.sleep(0.02)
    writer.close()
    [(charged, flags, output)] = await ended(client, rows=1)
    assert (charged, output, flags & 4) == (INPUT_MICROS + 3000 * 400, 3000, 0)
    assert got.count(b'"content":"') == 3001
    assert b"bursar-charged=1.201" in got


@pytest.mark.parametrize(
    "directions", ["", "fail=500", "fail=429", "error_after=3", "usage=missing", "break_after=2", "fail=999"]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_connection_is_good_for_the_next_call_whatever_became_of_the_last(
    client: Payer, directions: str, stream: bool
) -> None:
    text = json.dumps({**CALL, "stream": stream})
    plain = json.dumps(CALL)
    host, port = client.base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    for body, demo in ((text, directions), (plain, ""), (text, directions), (plain, "")):
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {client.key}\r\n"
        writer.write(f"{head}Bursar-Demo: {demo}\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.readuntil(b"\r\n\r\n")
        if b"chunked" in answer:
            await reader.readuntil(b"\r\n0\r\n\r\n")
        else:
            length = int(answer.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            await reader.readexactly(length)
        if demo == "" and body == plain:
            assert answer.startswith(b"HTTP/1.1 200"), answer
    writer.close()
    await ended(client)


# -- a database that comes and goes under the lanes


@pytest.mark.parametrize("key", [None, "with-a-key"])
async def test_a_hold_whose_answer_was_lost_is_found_again_and_used(
    client: Payer, scene: Scene, key: str | None
) -> None:
    assert (await client.post(CALL, bursar_demo="fail=500")).status_code == 500, "the lane is connected"
    lost = scene.cable.lost
    scene.cable.loses_next = True
    headers = {"idempotency_key": key} if key else {}
    answer = await asyncio.wait_for(client.post(CALL, **headers), 5)
    assert scene.cable.lost == lost + 1
    assert answer.status_code == 200
    assert [row[0] for row in await ended(client)] == [CALL_MICROS]


async def test_a_call_whose_hold_ended_before_its_answer_came_never_goes_out(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the process stood still for longer than a lease: its key is free, and a twin may be answered."""
    assert (await client.post(CALL, bursar_demo="fail=500")).status_code == 500, "the lane is connected"
    monkeypatch.setattr(scene.till, "_lease_seconds", 1)
    calls = scene.provider.calls
    scene.cable.answers_after = 1.5
    try:
        calling = asyncio.create_task(client.post(CALL, idempotency_key="late"))
        await asyncio.sleep(1.2)
        dsn = client.org.database.dsn("bursar_lane")
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
            await conn.execute("select credits.expire_holds()")
        answer = await calling
    finally:
        scene.cable.answers_after = 0.0
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "books_unavailable")
    assert "retry-after" in answer.headers
    assert scene.provider.calls == calls
    assert await ended(client) == []
    assert (await client.post(CALL, idempotency_key="late")).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
async def test_a_settle_is_booked_when_the_database_is_back_although_its_caller_was_told_that_it_is_gone(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.setattr("bursar.credits.batcher.GIVE_UP_SECONDS", 0.3)
    calls = scene.provider.calls
    calling = asyncio.create_task(client.post({**CALL, "stream": stream}, bursar_demo="delay_ms=1000"))
    while scene.provider.calls == calls:  # the hold is placed, and the provider at work
        await asyncio.sleep(0.01)
    scene.cable.cut()
    try:
        answer = await calling
    finally:
        scene.cable.mend()
    if stream:
        assert "books_unavailable" in answer.text
    else:
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "books_unavailable")
        assert answer.headers["retry-after"] == "2"
    assert [(row[0], row[1] & 4) for row in await ended(client)] == [(CALL_MICROS, 0)]


async def test_without_a_database_a_call_is_told_so_soon_and_the_provider_is_not_called(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.credits.batcher.GIVE_UP_SECONDS", 0.3)
    assert (await client.post(CALL)).status_code == 200
    calls = scene.provider.calls
    scene.cable.cut()
    try:
        answers = await asyncio.wait_for(asyncio.gather(*(client.post(CALL) for _ in range(20))), 5)
    finally:
        scene.cable.mend()
    assert {(answer.status_code, answer.headers["retry-after"]) for answer in answers} == {(503, "2")}
    assert scene.provider.calls == calls
    assert (await client.post(CALL)).status_code == 200
    assert len(await ended(client)) == 2


async def test_a_database_that_stands_still_is_left_and_asked_again(
    client: Payer, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.credits.batcher.CALL_SECONDS", 0.5)
    async with await psycopg.AsyncConnection.connect(client.org.database.dsn("admin")) as conn:
        # Whoever moves credits takes the gate first; here somebody holds it for a while.
        await conn.execute(
            "select 1 from credits.gates where organization_id = %s for update", [client.org.organization_id]
        )
        answer = asyncio.create_task(client.post(CALL))
        await asyncio.sleep(1.2)
        assert not answer.done()
        await conn.rollback()
        assert (await answer).status_code == 200
    assert [row[0] for row in await ended(client)] == [CALL_MICROS]


# -- everything at once


MOMENTS = ("head", "body", "sent", "held", "first", "middle", "last", "after")


@pytest.mark.parametrize("seed", [20261120])
async def test_whenever_they_hang_up_nothing_stays_held_and_nobody_pays_twice(
    client: Payer, scene: Scene, seed: int
) -> None:
    rng = random.Random(seed)
    print("seed", seed)
    async with client.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=client.org.organization_id,
            scope=Scope.KEY,
            scope_id=client.api_key_id,
            amount=900_000_000,
        )

    async def one(number: int) -> int:
        """How many pieces the client has surely seen; -1: it cannot have been called."""
        vendor = rng.choice(VENDORS)
        stream = rng.random() < 0.7
        moment = rng.choice(MOMENTS)
        wait = rng.random() * 0.05
        demo = f"piece_ms={rng.choice([1, 3])}; delay_ms={rng.choice([0, 10, 30])}"
        upto = {"head": rng.random() * 0.5, "body": 0.5 + rng.random() * 0.49}.get(moment, 1.0)
        body = {**BODIES[vendor], "stream": stream, LIMITS[vendor]: 30}
        reader, writer = await opened(client, body, PATHS[vendor], upto=upto, Bursar_Demo=demo)
        seen = -1 if upto < 1 else 0
        try:
            if moment == "held":
                await asyncio.sleep(wait)
            elif moment in ("first", "middle", "last", "after"):
                await reader.readuntil(b"\r\n\r\n")
                wanted = {"first": 1, "middle": 8, "last": 15, "after": 0}[moment] if stream else 0
                for _ in range(wanted):
                    await reader.readuntil(DELTAS[vendor])
                if moment == "after":
                    await reader.readuntil(b"bursar-charged" if stream else b"}")
        except asyncio.IncompleteReadError:
            pytest.fail(f"call {number}: {vendor} {stream} {moment} broke off")
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        return seen

    seen = []
    for start in range(0, 120, 20):
        seen += await asyncio.gather(*(one(number) for number in range(start, start + 20)))
    rows = await ended(client)
    reached = sum(each >= 0 for each in seen)
    assert 0 < len(rows) <= reached
    assert (
        await client.rows("select request_id from ledger.attribution group by request_id having count(*) > 1") == []
    ), "charged twice"
    assert (
        await client.rows(
            "select a.request_id from ledger.attribution a join credits.unbilled_requests u using (request_id)"
        )
        == []
    ), "charged and released"
    assert all(row[0] >= INPUT_MICROS for row in rows), "never below its input"
    assert scene.till._running == {}
    assert not scene.till._closing
