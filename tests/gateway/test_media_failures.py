"""Speech, images and sound when clients hang up, providers fail, and others answer in their place."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from aiohttp import web
from fastapi import FastAPI
from tests.conftest import Org
from tests.gateway import sounds
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import Cable, Provider, served

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.gateway.calls import Call, Till
from bursar.gateway.front import Front
from bursar.gateway.providers import put_provider
from bursar.gateway.routes import put_model_route
from bursar.money import Micros
from bursar.settings import Settings

HELLO = "hello there"
SPEECH = "/v1/audio/speech"
IMAGES = "/v1/images/generations"
SOUND = "/v1/audio/transcriptions"
ESTIMATED = 4


@dataclass(frozen=True)
class Scene:
    """An application with a provider that follows scripts."""

    provider: Provider
    base_url: str
    app: FastAPI
    database: db.Database

    @property
    def front(self) -> Front:
        front: Front = self.app.state.gateway
        return front

    @property
    def till(self) -> Till:
        return self.front._till


@pytest.fixture(scope="module")
async def scene(priced: db.Database, settings: Settings) -> AsyncIterator[Scene]:
    provider = Provider()
    async with served(priced, settings, provider, Cable(priced.dsn("bursar_lane"))) as (base_url, app):
        yield Scene(provider, base_url, app, priced)


@pytest.fixture
async def client(org: Org, scene: Scene) -> Payer:
    """A member of a company with 1,000 credits, who calls the scene's application."""
    await fund(org, Micros(1_000_000_000))
    user_id = await org.member()
    key = await org.key(user_id)
    return Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=scene.base_url)


async def ended(payer: Payer, columns: str = "images, characters") -> tuple[Any, ...]:
    """The one row, once nothing is held: what was charged, whether it is estimated, and some of its counts."""
    for _ in range(200):
        rows = await payer.rows(f"select charged_micros, flags & {ESTIMATED} > 0, {columns} from ledger.attribution")
        if rows and await payer.rows("select count(*) from credits.holds") == [(0,)]:
            [row] = rows
            assert (await payer.pool()).used_micros == row[0]
            return tuple(row)
        await asyncio.sleep(0.05)
    raise AssertionError("no row, or still held")


async def running(scene: Scene, payer: Payer) -> Call:
    """The payer's call, once its meter is there."""
    for _ in range(100):
        for call in list(scene.till._running.values()):
            if call.principal.organization_id == payer.org.organization_id and call.meter is not None:
                return call
        await asyncio.sleep(0.05)
    raise AssertionError("no call is running")


async def hang_up(payer: Payer, path: str, body: dict[str, Any], directions: str) -> None:
    """Send a request and go when the provider is at it."""
    host, port = payer.base_url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {payer.key}\r\nBursar-Demo: {directions}\r\n"
    writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    await writer.drain()
    await asyncio.sleep(0.5)
    writer.close()


async def test_who_hangs_up_while_an_image_is_made_pays_for_it(client: Payer, scene: Scene) -> None:
    await hang_up(client, IMAGES, {"model": "demo-image", "prompt": "a cat", "n": 2}, "delay_ms=1000")
    assert await ended(client) == (8_000_000, False, 2, 0)


async def test_who_hangs_up_before_speech_begins_pays_for_its_text(client: Payer, scene: Scene) -> None:
    await hang_up(client, SPEECH, {"model": "demo-speech", "input": HELLO, "voice": "alloy"}, "delay_ms=60000")
    assert await ended(client) == (16_500, False, 0, 11)


async def test_a_call_that_is_held_in_full_asks_for_no_more_while_it_runs(client: Payer, scene: Scene) -> None:
    """Its mark is its whole hold from the beginning, which must not be taken for outgrowing it."""
    asked = asyncio.create_task(
        client.post(
            {"model": "demo-speech", "input": HELLO * 50, "voice": "alloy"}, path=SPEECH, bursar_demo="piece_ms=60"
        )
    )
    call = await running(scene, client)
    held = call.held_micros
    await scene.till._progress(call)
    assert (call.held_micros, (await client.pool()).held_micros) == (held, held)
    await asked
    assert (await ended(client))[0] == held == 550 * 1_500


async def test_speech_by_tokens_that_outgrows_its_hold_holds_more(client: Payer, scene: Scene) -> None:
    async def speaks_slowly(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "audio/pcm"})
        await response.prepare(request)
        for _ in range(20):
            await response.write(bytes(480_000))  # ten seconds
            await asyncio.sleep(0.1)
        return response

    body = {"model": "demo-speech-tokens", "input": HELLO, "voice": "alloy", "response_format": "pcm"}
    asked = asyncio.create_task(client.post(body, path=SPEECH, bursar_demo=scene.provider.script(speaks_slowly)))
    call = await running(scene, client)
    first = call.held_micros
    assert first == 3 * 60 + 24 * 1_200
    await asyncio.sleep(0.7)
    await scene.till._progress(call)
    assert call.held_micros > first
    assert len((await asked).content) == 20 * 480_000
    tokens = -(-200 * 1_250 // 60)
    assert await ended(client, "audio_output_tokens") == (3 * 60 + tokens * 1_200, True, tokens)


@pytest.mark.parametrize("kind", ["text/html", "application/json", ""])
async def test_an_answer_of_another_kind_than_asked_for_is_passed_on_and_charged(
    client: Payer, scene: Scene, kind: str
) -> None:
    async def answers_oddly(request: web.Request) -> web.StreamResponse:
        return web.Response(body=b"{}", headers={"Content-Type": kind} if kind else None)

    script = scene.provider.script(answers_oddly)
    answer = await client.post({"model": "demo-image", "prompt": "x", "n": 3}, path=IMAGES, bursar_demo=script)
    assert (answer.status_code, answer.content) == (200, b"{}")
    assert await ended(client) == (12_000_000, True, 3, 0)


@pytest.mark.parametrize("stream", ["true", "false"])
async def test_a_provider_that_sends_events_unasked_or_none_when_asked_is_charged_for(
    client: Payer, scene: Scene, stream: str
) -> None:
    events = b'data: {"type":"transcript.text.done","text":"hi","usage":{"type":"duration","seconds":3}}\n\n'

    async def sends_events(request: web.Request) -> web.StreamResponse:
        return web.Response(body=events, headers={"Content-Type": "text/event-stream"})

    async with httpx2.AsyncClient(base_url=client.base_url) as plain:
        answer = await plain.post(
            SOUND,
            data={"model": "demo-transcribe", "stream": stream},
            files={"file": ("a.wav", sounds.wav(2.0))},
            headers={"authorization": f"Bearer {client.key}", "bursar-demo": scene.provider.script(sends_events)},
        )
    assert answer.content.startswith(events)
    if stream == "true":
        assert await ended(client, "audio_milliseconds") == (30_000, False, 3_000)
    else:
        assert await ended(client, "audio_milliseconds") == (20_000, True, 2_000)


# ---------------------------------------------------------------------------------- others answer in their place

# A provider that no other test uses, with list prices for tokens alone.
OTHER, OTHER_MODEL = "avian", "Meta-Llama-3.1-8B-Instruct"


@pytest.fixture(scope="module")
async def failing(scene: Scene) -> AsyncIterator[str]:
    """A provider with prices for tokens, which always fails."""
    other = Provider()

    async def fails(request: web.Request) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no"}}, status=500)

    other.scripts[""] = fails
    async with other.running() as address:
        async with scene.database.platform() as conn:
            await put_provider(conn, name=OTHER, kind="openai", base_url=address, auth="none", by=OPERATOR)
        yield OTHER


async def test_a_fallback_is_held_and_charged_in_the_kinds_of_its_own_price(
    client: Payer, scene: Scene, failing: str
) -> None:
    name = f"route-{uuid7().hex}"
    async with scene.database.platform() as conn:
        await put_model_route(
            conn, model=name, provider=failing, upstream_model=OTHER_MODEL, fallbacks=("demo/demo-image",), by=OPERATOR
        )
    scene.front._desk._loaded_at = float("-inf")
    answer = await client.post({"model": name, "prompt": "a cat", "n": 2}, path=IMAGES)
    assert (answer.status_code, answer.headers["bursar-provider"]) == (200, "demo")
    assert await ended(client, "images, image_output_tokens") == (8_000_000, False, 2, 0)
