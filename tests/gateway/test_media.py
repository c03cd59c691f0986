"""Embeddings, images, speech, transcriptions and counts of tokens, as the official clients use them."""

import asyncio
import base64
import hashlib
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.conftest import Org
from tests.gateway import sounds
from tests.gateway.conftest import Payer, fund

from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.limits import Metric, Scope, set_limit
from bursar.credits.pools import pool_for
from bursar.gateway import demo_provider
from bursar.money import Micros, format_credits

HELLO = "hello there"  # 11 letters, 3 tokens by our rule
VOICE = "alloy"
SPEECH: dict[str, Any] = {"input": HELLO, "voice": VOICE}
# demo-speech-tokens: 3 tokens of text; 750 ms of sound are 15.6 tokens, so 16; 0.6 and 12 USD a million.
SPOKEN_MICROS = 3 * 60 + 16 * 1_200
IMAGE_MICROS = 4_000_000
ESTIMATED = 4
COUNT: dict[str, Any] = {"model": "demo-claude", "messages": [{"role": "user", "content": HELLO}]}


@pytest.fixture
async def client(payer: Payer) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
async def provider() -> AsyncIterator[str]:
    """The provider demo by itself: what it says is what the gateway must pass on."""
    async with demo_provider.running() as address:
        yield address


def direct(model: str) -> dict[str, str]:
    """Directions as a header of a client."""
    return {"Bursar-Demo": model}


async def only_row(payer: Payer, columns: str) -> tuple[Any, ...]:
    """The one row of attribution, once nothing is held; what was charged is what the pool has used."""
    for _ in range(200):
        rows = await payer.rows(f"select charged_micros, flags & {ESTIMATED} > 0, {columns} from ledger.attribution")
        pool = await payer.pool()
        if rows and not pool.held_micros:
            assert pool.used_micros == sum(row[0] for row in rows)
            [row] = rows
            return tuple(row)
        await asyncio.sleep(0.05)
    raise AssertionError("no row, or still held")


# ------------------------------------------------------------------------------------------------- embeddings


@pytest.mark.parametrize(
    ("given", "tokens"),
    [(HELLO, 3), ([HELLO, HELLO], 6), ([1, 2, 3, 4, 5], 5), ([[1, 2], [3, 4, 5]], 5)],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
async def test_embeddings_are_charged_by_the_tokens_of_their_input(
    payer: Payer, client: openai.AsyncOpenAI, given: Any, tokens: int
) -> None:
    answer = await client.embeddings.with_raw_response.create(model="demo-embedding", input=given, dimensions=16)
    made = answer.parse()
    assert made.usage.prompt_tokens == tokens
    assert {len(each.embedding) for each in made.data} == {16}
    assert answer.headers["bursar-charged"] == format_credits(Micros(tokens * 2))
    assert await only_row(payer, "input_tokens, output_tokens") == (tokens * 2, False, tokens, 0)


async def test_embeddings_in_base64_are_those_in_floats(client: openai.AsyncOpenAI) -> None:
    by_default = await client.embeddings.create(model="demo-embedding", input=HELLO)  # the client asks for base64
    floats = await client.embeddings.create(model="demo-embedding", input=HELLO, encoding_format="float")
    assert by_default.data[0].embedding == floats.data[0].embedding


@pytest.mark.parametrize("form", ["base64", "float"])
async def test_large_embeddings_pass_unchanged(payer: Payer, provider: str, form: str) -> None:
    count = 2_048 if form == "base64" else 640
    body = {
        "model": "demo-embedding",
        "input": [[number] for number in range(count)],
        "dimensions": 3_072,
        "encoding_format": form,
    }
    answer = await payer.post(body, path="/v1/embeddings")
    async with httpx2.AsyncClient(timeout=60) as plain:
        wanted = (await plain.post(f"{provider}/embeddings", json=body)).content
    assert answer.status_code == 200, answer.text[:200]
    assert len(wanted) > 20_000_000
    assert hashlib.sha256(answer.content).digest() == hashlib.sha256(wanted).digest()
    assert (await only_row(payer, "input_tokens"))[2] == count


@pytest.mark.parametrize("usage", ["missing", "zero"])
async def test_embeddings_without_a_count_are_counted_by_our_own_rule(payer: Payer, usage: str) -> None:
    answer = await payer.post(
        {"model": "demo-embedding", "input": HELLO}, path="/v1/embeddings", bursar_demo=f"usage={usage}"
    )
    assert answer.status_code == 200
    assert await only_row(payer, "input_tokens") == (6, True, 3)


# ----------------------------------------------------------------------------------------------------- images


async def test_images_are_charged_by_the_piece_and_by_their_quality(payer: Payer, client: openai.AsyncOpenAI) -> None:
    answer = await client.images.with_raw_response.generate(model="demo-image", prompt="a cat", quality="hd", n=3)
    data = answer.parse().data
    assert data is not None
    assert [base64.b64decode(each.b64_json or "")[:4] for each in data] == [b"\x89PNG"] * 3
    assert answer.headers["bursar-charged"] == "24"
    assert await only_row(payer, "images, image_output_tokens") == (24_000_000, False, 3, 0)


async def test_images_are_paid_by_a_pool_for_images_and_chats_are_not(payer: Payer, client: openai.AsyncOpenAI) -> None:
    async with payer.org.tenant() as conn:
        pool_id = await pool_for(conn, organization_id=payer.org.organization_id, model_filter="#images")
        await add_grant(
            conn,
            organization_id=payer.org.organization_id,
            pool_id=pool_id,
            amount_micros=Micros(100_000_000),
            source=GrantSource.PURCHASE,
            idempotency_key="images",
        )
    await client.images.generate(model="demo-image", prompt="a cat", quality="hd", n=3)
    await client.embeddings.create(model="demo-embedding", input=HELLO)
    await payer.post({"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello"}]})
    rows = await payer.rows("select feature, pool_id from ledger.attribution order by booked_at")
    assert [(feature, pool == pool_id) for feature, pool in rows] == [
        ("images", True), ("embeddings", False), ("chat", False)
    ]  # fmt: skip


async def test_images_are_charged_by_tokens_where_the_price_is_for_tokens(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    answer = await client.images.with_raw_response.generate(
        model="demo-image-tokens", prompt="a cat", quality="medium", size="1024x1024", n=2
    )
    usage = answer.parse().usage
    assert usage is not None
    assert (usage.input_tokens, usage.output_tokens) == (2, 2 * 1_756)
    charged = 2 * 500 + 2 * 1_756 * 3_000
    assert answer.headers["bursar-charged"] == format_credits(Micros(charged))
    assert await only_row(payer, "images, input_tokens, image_output_tokens") == (charged, False, 0, 2, 3_512)


async def test_images_in_a_stream_come_piece_by_piece_and_their_usage_is_charged(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    stream = await client.images.generate(
        model="demo-image-tokens", prompt="a cat", quality="low", size="1024x1024", stream=True, partial_images=3
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    made = 196 + 3 * 100
    assert await only_row(payer, "image_output_tokens") == (2 * 500 + made * 3_000, False, made)


@pytest.mark.parametrize(
    ("model", "usage", "row"),
    [
        ("demo-image", "missing", (8_000_000, False, 2, 0)),  # the images that came are the count
        ("demo-image-tokens", "missing", (2 * 500 + 2 * 1_756 * 3_000, True, 0, 3_512)),
        ("demo-image-tokens", "zero", (2 * 500 + 2 * 1_756 * 3_000, True, 0, 3_512)),
    ],
)
async def test_images_without_a_count_are_counted(
    payer: Payer, model: str, usage: str, row: tuple[int, bool, int, int]
) -> None:
    body = {"model": model, "prompt": "a cat", "quality": "medium", "size": "1024x1024", "n": 2}
    answer = await payer.post(body, path="/v1/images/generations", bursar_demo=f"usage={usage}")
    assert answer.status_code == 200
    assert await only_row(payer, "images, image_output_tokens") == row


async def test_images_of_tens_of_megabytes_pass_plain_and_streamed(payer: Payer, client: openai.AsyncOpenAI) -> None:
    asked: dict[str, Any] = {"model": "demo-image", "prompt": "a cat", "extra_headers": direct("bytes=26000000")}
    plain = await client.images.generate(**asked, n=3)
    assert plain.data is not None
    assert {len(base64.b64decode(each.b64_json or "")) for each in plain.data} == {26_000_000}
    stream = await client.images.generate(**asked, stream=True)
    [event] = [event async for event in stream]
    assert len(base64.b64decode(event.b64_json)) == 26_000_000
    rows = await payer.rows("select images from ledger.attribution order by 1")
    assert rows == [(1,), (3,)]


async def test_of_200_images_at_once_exactly_the_100_that_fit_are_made(org: Org, two_servers: list[str]) -> None:
    await fund(org, Micros(100 * IMAGE_MICROS))
    key = (await org.key(await org.member())).text
    async with httpx2.AsyncClient(timeout=60, limits=httpx2.Limits(max_connections=200)) as plain:

        async def image(number: int) -> int:
            answer = await plain.post(
                f"{two_servers[number % 2]}/v1/images/generations",
                json={"model": "demo-image", "prompt": "a cat", "stream": number % 3 == 0},
                headers={"authorization": f"Bearer {key}"},
            )
            return answer.status_code

        assert Counter(await asyncio.gather(*map(image, range(200)))) == {200: 100, 402: 100}
    async with org.tenant() as conn, conn.cursor() as cursor:
        await cursor.execute("select count(*), sum(charged_micros), sum(images) from ledger.attribution")
        assert await cursor.fetchone() == (100, 100 * IMAGE_MICROS, 100)


# ----------------------------------------------------------------------------------------------------- speech


@pytest.mark.parametrize("form", ["mp3", "wav", "pcm"])
async def test_speech_is_passed_on_as_it_is_and_charged_by_its_characters(
    payer: Payer, client: openai.AsyncOpenAI, provider: str, form: str
) -> None:
    body = {**SPEECH, "model": "demo-speech", "response_format": form}
    async with client.audio.speech.with_streaming_response.create(**body) as spoken:
        heard = b"".join([piece async for piece in spoken.iter_bytes()])
        headers = spoken.headers
    async with httpx2.AsyncClient() as plain:
        wanted = await plain.post(f"{provider}/audio/speech", json=body)
    assert heard == wanted.content
    assert headers["content-type"] == wanted.headers["content-type"]
    assert headers["bursar-held"] == "0.0165"
    assert await only_row(payer, "characters, audio_output_tokens") == (16_500, False, 11, 0)


@pytest.mark.parametrize("form", ["mp3", "wav", "pcm"])
async def test_speech_by_tokens_is_worked_out_from_the_length_of_its_sound(
    payer: Payer, client: openai.AsyncOpenAI, form: Any
) -> None:
    # 750 ms; an mp3 has whole frames of 24 ms, 768 ms in all, which are as many tokens.
    await client.audio.speech.create(**SPEECH, model="demo-speech-tokens", response_format=form)
    assert await only_row(payer, "input_tokens, audio_output_tokens") == (SPOKEN_MICROS, True, 3, 16)


async def test_speech_as_events_is_charged_by_the_usage_that_comes(payer: Payer, client: openai.AsyncOpenAI) -> None:
    async with client.audio.speech.with_streaming_response.create(
        **SPEECH, model="demo-speech-tokens", stream_format="sse", extra_headers=direct("output_tokens=40")
    ) as spoken:
        lines = [line async for line in spoken.iter_lines()]
    assert sum("speech.audio.delta" in line for line in lines if line.startswith("data:")) > 0
    charged = 3 * 60 + 40 * 1_200
    assert any(f"bursar-charged={format_credits(Micros(charged))}" in line for line in lines)
    assert await only_row(payer, "audio_output_tokens") == (charged, False, 40)


async def test_speech_as_events_without_usage_is_worked_out_too(payer: Payer) -> None:
    body = {**SPEECH, "model": "demo-speech-tokens", "stream_format": "sse", "response_format": "wav"}
    answer = await payer.post(body, path="/v1/audio/speech", bursar_demo="usage=missing")
    assert answer.text.count("speech.audio.done") == 2  # its name and its data
    assert await only_row(payer, "audio_output_tokens") == (SPOKEN_MICROS, True, 16)


@pytest.mark.parametrize(
    ("model", "row"),
    # 2 pieces of 4,800 bytes: 200 ms are 4.2 tokens.
    [("demo-speech", (16_500, False, 11, 0)), ("demo-speech-tokens", (3 * 60 + 5 * 1_200, True, 0, 5))],
)
async def test_speech_that_breaks_off_is_seen_to_be_cut_and_charged_as_far_as_it_came(
    payer: Payer, client: openai.AsyncOpenAI, model: str, row: tuple[Any, ...]
) -> None:
    heard = b""
    with pytest.raises(httpx2.RemoteProtocolError):
        async with client.audio.speech.with_streaming_response.create(
            **SPEECH, model=model, response_format="pcm", extra_headers=direct("break_after=2")
        ) as spoken:
            async for piece in spoken.iter_bytes():
                heard += piece
    assert heard == bytes(9_600), "nothing of ours is in the sound"
    assert await only_row(payer, "characters, audio_output_tokens") == row


async def test_a_client_that_hangs_up_in_mid_speech_pays_for_what_was_made_until_then(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    async with client.audio.speech.with_streaming_response.create(
        input=HELLO * 100,
        voice=VOICE,
        model="demo-speech-tokens",
        response_format="pcm",
        extra_headers=direct("piece_ms=50"),
    ) as spoken:
        async for _ in spoken.iter_bytes(4_800):
            break
    charged, estimated, tokens = await only_row(payer, "audio_output_tokens")
    assert estimated
    assert 0 < tokens < 275 * 1_250 // 240 / 2, "275 tokens of text make 68.75 seconds"
    assert charged == 275 * 60 + tokens * 1_200


async def test_the_synchronous_client_hears_speech_and_writes_it_down(payer: Payer) -> None:
    def use() -> tuple[bytes, str, str]:
        with openai.OpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1") as client:
            with client.audio.speech.with_streaming_response.create(
                **SPEECH, model="demo-speech", response_format="wav"
            ) as spoken:
                heard = b"".join(spoken.iter_bytes(1_000))
            written = client.audio.transcriptions.create(model="demo-transcribe", file=("heard.wav", heard))
            vector = client.embeddings.create(model="demo-embedding", input=written.text)
            client.images.generate(model="demo-image", prompt=written.text)
            stream = client.audio.transcriptions.create(model="demo-transcribe-tokens", file=("a", heard), stream=True)
            texts = [event.delta for event in stream if event.type == "transcript.text.delta"]
            assert len(vector.data) == 1
            return heard, written.text, "".join(texts)

    heard, written, streamed = await asyncio.to_thread(use)
    assert heard.startswith(b"RIFF")
    assert written == streamed != ""
    rows = await payer.rows("select model from ledger.attribution")
    assert len(rows) == 5


# --------------------------------------------------------------------------------------------- transcriptions

FORMS = ("json", "text", "srt", "vtt", "verbose_json")


@pytest.mark.parametrize("form", FORMS)
async def test_a_transcription_is_charged_by_the_length_of_the_sound(
    payer: Payer, client: openai.AsyncOpenAI, form: Any
) -> None:
    answer = await client.audio.transcriptions.with_raw_response.create(
        model="demo-transcribe", file=("a.wav", sounds.wav(2.5), "audio/wav"), response_format=form, language="en"
    )
    assert answer.headers["bursar-charged"] == "0.025"
    wanted = (25_000, form in ("text", "srt", "vtt"), 2_500, 0)
    assert await only_row(payer, "audio_milliseconds, output_tokens") == wanted


@pytest.mark.parametrize("form", FORMS)
async def test_a_transcription_by_tokens_is_charged_by_those_or_by_our_own_count(
    payer: Payer, client: openai.AsyncOpenAI, form: Any
) -> None:
    await client.audio.transcriptions.create(
        model="demo-transcribe-tokens", file=("a.wav", sounds.wav(2.5)), response_format=form
    )
    wanted = (25 * 600 + 7 * 1_000, form in ("text", "srt", "vtt"), 25, 7, 0)
    assert await only_row(payer, "audio_input_tokens, output_tokens, audio_milliseconds") == wanted


async def test_a_transcription_as_events_is_charged_by_the_usage_of_the_last(
    payer: Payer, client: openai.AsyncOpenAI
) -> None:
    stream = await client.audio.transcriptions.create(
        model="demo-transcribe-tokens",
        file=("a.wav", sounds.wav(2.5)),
        stream=True,
        extra_headers=direct("output_tokens=9"),
    )
    events = [event async for event in stream]
    assert [event.type for event in events] == ["transcript.text.delta"] * 9 + ["transcript.text.done"]
    assert await only_row(payer, "audio_input_tokens, output_tokens") == (25 * 600 + 9 * 1_000, False, 25, 9)


@pytest.mark.parametrize(
    ("directions", "tokens"), [("usage=missing", 7), ("break_after=3", 3), ("error_after=2", 2), ("break_after=0", 0)]
)
async def test_a_transcription_as_events_that_is_not_counted_or_cut_is_charged_as_far_as_it_came(
    payer: Payer, client: openai.AsyncOpenAI, directions: str, tokens: int
) -> None:
    stream = await client.audio.transcriptions.create(
        model="demo-transcribe-tokens",
        file=("a.wav", sounds.wav(2.5)),
        stream=True,
        extra_headers=direct(directions),
    )
    try:
        async for _ in stream:
            pass
    except openai.APIError:
        assert directions != "usage=missing"
    assert await only_row(payer, "audio_input_tokens, output_tokens") == (
        25 * 600 + tokens * 1_000,
        True,
        25,
        tokens,
    )


@pytest.mark.parametrize("form", ["srt", "json"])
async def test_a_model_that_ignores_that_events_were_asked_for_answers_whole(payer: Payer, form: str) -> None:
    """As whisper-1 does. Nothing of ours stands in its subtitles."""
    async with httpx2.AsyncClient(base_url=payer.base_url) as plain:
        answer = await plain.post(
            "/v1/audio/transcriptions",
            data={"model": "demo-transcribe", "stream": "true", "response_format": form},
            files={"file": ("a.wav", sounds.wav(2.5))},
            headers={"authorization": f"Bearer {payer.key}"},
        )
    assert answer.headers["bursar-charged"] == "0.025"
    assert "bursar" not in answer.text
    assert await only_row(payer, "audio_milliseconds") == (25_000, form == "srt", 2_500)


async def test_a_translation_is_charged_as_a_transcription(payer: Payer, client: openai.AsyncOpenAI) -> None:
    answer = await client.audio.translations.create(model="demo-transcribe", file=("a.mp3", sounds.mp3(100)))
    assert answer.text
    assert await only_row(payer, "audio_milliseconds") == (24_000, False, 2_400)


async def test_a_sound_of_25_megabytes_reaches_the_provider(payer: Payer, client: openai.AsyncOpenAI) -> None:
    sound = sounds.wav(3_276.0)  # 26,208,000 samples: 25 MB
    async with asyncio.timeout(60):
        answer = await client.audio.transcriptions.with_raw_response.create(
            model="demo-transcribe", file=("a.wav", sound), extra_headers=direct("output_tokens=5")
        )
    assert answer.headers["bursar-charged"] == "32.76"
    with pytest.raises(openai.APIStatusError) as refused:
        await client.audio.transcriptions.create(model="demo-transcribe", file=("a.wav", sound * 2))
    assert refused.value.status_code == 413


async def test_the_same_form_under_the_same_key_is_the_same_call_whatever_its_boundary(payer: Payer) -> None:
    async def ask(content: bytes) -> httpx2.Response:
        async with httpx2.AsyncClient(base_url=payer.base_url) as plain:
            return await plain.post(
                "/v1/audio/transcriptions",
                data={"model": "demo-transcribe"},
                files={"file": ("a.wav", content)},
                headers={"authorization": f"Bearer {payer.key}", "idempotency-key": "once"},
            )

    answers = [await ask(sounds.wav(1.0)), await ask(sounds.wav(1.0)), await ask(sounds.wav(2.0))]
    assert [answer.status_code for answer in answers] == [200, 422, 422]
    codes = [answer.json()["error"]["code"] for answer in answers[1:]]
    assert codes == ["already_answered", "idempotency_key_reused"]
    assert await only_row(payer, "audio_milliseconds") == (10_000, False, 1_000)


HOSTILE = [
    (b"", "multipart/form-data"),
    (b"--b--\r\n", "multipart/form-data; boundary=b"),
    (b"\xff" * 1_000, "multipart/form-data; boundary=b"),
    (b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nx\r\n--b--', "multipart/form-data; boundary=b"),
    (b'{"model": "demo-transcribe"}', "application/json"),
    (b"x", "\xff\xfe"),
]


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
@pytest.mark.parametrize(("body", "kind"), HOSTILE)
async def test_a_hostile_form_is_refused_in_the_shape_of_the_vendor(
    payer: Payer, path: str, body: bytes, kind: str
) -> None:
    async with httpx2.AsyncClient(base_url=payer.base_url) as plain:
        headers = {b"authorization": f"Bearer {payer.key}".encode(), b"content-type": kind.encode("latin-1")}
        answer = await plain.post(path, content=body, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unreadable_request")
    assert await payer.rows("select 1 from ledger.attribution") == []


# -------------------------------------------------------------------------------------------- counts of tokens


async def test_counting_tokens_costs_nothing_and_counts_for_caps_on_calls(payer: Payer) -> None:
    claude = anthropic.AsyncAnthropic(api_key=payer.key, base_url=payer.base_url, max_retries=0)
    async with payer.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.KEY,
            scope_id=payer.api_key_id,
            amount=2,
            metric=Metric.CALLS,
        )
    count = await claude.messages.count_tokens(**COUNT)
    fixed = await claude.messages.count_tokens(**{**COUNT, "model": "demo-fixed"})  # a price for each request
    message = {"max_tokens": 5, **COUNT}
    assert count.input_tokens == fixed.input_tokens == 7
    with pytest.raises(anthropic.APIStatusError) as refused:
        await claude.messages.count_tokens(**COUNT)
    body: Any = refused.value.body
    assert (refused.value.status_code, body["error"]["code"]) == (402, "cap_reached")
    assert (await payer.post(message, path="/v1/messages")).status_code == 402
    assert (await payer.pool()).used_micros == 0
    rows = await payer.rows(
        f"select charged_micros, flags & {ESTIMATED}, input_tokens, requests from ledger.attribution"
    )
    assert rows == [(0, 0, 0, 0)] * 2


async def test_counting_tokens_needs_no_credits(org: Org, base_url: str) -> None:
    await fund(org, Micros(1))
    user_id = await org.member()
    key = await org.key(user_id)
    payer = Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)
    assert (await payer.post({"max_tokens": 5, **COUNT}, path="/v1/messages")).status_code == 402
    answer = await payer.post(COUNT, path="/v1/messages/count_tokens")
    assert (answer.status_code, answer.json()) == (200, {"input_tokens": 7})
    fixed = await payer.post({**COUNT, "model": "demo-fixed"}, path="/v1/messages/count_tokens")
    assert fixed.status_code == 200, "not even the price of a request is held"


# ------------------------------------------------------------------------------------- what holds for all of them

FILE = {"file": ("a.wav", sounds.wav(1.0))}
CALLS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"json": {"model": "demo-embedding", "input": HELLO}},
    "/v1/images/generations": {"json": {"model": "demo-image", "prompt": "a cat"}},
    "/v1/audio/speech": {"json": {"model": "demo-speech", **SPEECH}},
    "/v1/audio/transcriptions": {"data": {"model": "demo-transcribe"}, "files": FILE},
    "/v1/audio/translations": {"data": {"model": "demo-transcribe"}, "files": FILE},
    "/v1/messages/count_tokens": {"json": COUNT},
}


async def call(payer: Payer, path: str, directions: str = "", **changes: Any) -> httpx2.Response:
    given = CALLS[path]
    fields = {name: ({**value, **changes} if name != "files" else value) for name, value in given.items()}
    headers = {"authorization": f"Bearer {payer.key}", "bursar-demo": directions}
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as plain:
        return await plain.post(path, headers=headers, **fields)


@pytest.mark.parametrize("path", CALLS)
async def test_an_error_of_the_provider_passes_and_costs_nothing(payer: Payer, path: str) -> None:
    for status in (400, 404, 429, 500, 529):
        answer = await call(payer, path, f"fail={status}")
        assert (answer.status_code, answer.headers["bursar-charged"]) == (status, "0")
        assert "message" in answer.json()["error"]
    assert await payer.rows("select 1 from ledger.attribution") == []
    assert ((await payer.pool()).used_micros, (await payer.pool()).held_micros) == (0, 0)


@pytest.mark.parametrize("path", [path for path in CALLS if path != "/v1/audio/speech"])
@pytest.mark.parametrize("pieces", [0, 1])
async def test_a_plain_answer_that_breaks_off_costs_nothing(payer: Payer, path: str, pieces: int) -> None:
    answer = await call(payer, path, f"break_after={pieces}")
    assert answer.status_code == 502
    assert "provider_broke_off" in answer.text
    assert await payer.rows("select 1 from ledger.attribution") == []
    assert ((await payer.pool()).used_micros, (await payer.pool()).held_micros) == (0, 0)


@pytest.mark.parametrize("path", [path for path in CALLS if path != "/v1/messages/count_tokens"])
async def test_what_does_not_fit_is_refused_before_the_call(payer: Payer, path: str) -> None:
    async with payer.org.tenant() as conn:
        await set_limit(
            conn, organization_id=payer.org.organization_id, scope=Scope.KEY, scope_id=payer.api_key_id, amount=1
        )
    answer = await call(payer, path, "fail=500")
    assert (answer.status_code, answer.json()["error"]["code"]) == (402, "cap_reached")
    assert answer.headers["x-should-retry"] == "false"


@pytest.mark.parametrize(
    ("path", "model"),
    [
        ("/v1/embeddings", "demo-speech"),
        ("/v1/images/generations", "demo-embedding"),
        ("/v1/audio/speech", "demo-image"),
        ("/v1/audio/transcriptions", "demo-speech"),
        ("/v1/audio/translations", "demo-image"),
        ("/v1/messages/count_tokens", "demo-without-a-price"),
    ],
)
async def test_what_has_no_price_is_refused_before_the_call(payer: Payer, path: str, model: str) -> None:
    answer = await call(payer, path, "fail=500", model=model)
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["error"].get("code") in ("model_not_priced", "model_not_found")


@pytest.mark.parametrize("path", CALLS)
async def test_what_cannot_be_read_is_refused_in_the_shape_of_the_vendor(payer: Payer, path: str) -> None:
    for body in (b"", b"[]", b"{", b'{"model": 5}', b'{"Model": "x"}', b"\xff", b'{"model": "demo-1"}' * 2):
        async with httpx2.AsyncClient(base_url=payer.base_url) as plain:
            answer = await plain.post(path, content=body, headers={"authorization": f"Bearer {payer.key}"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unreadable_request"), body
