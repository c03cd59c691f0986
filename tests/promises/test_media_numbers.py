"""Embeddings, images, speech and sound: each charge worked out anew, and no input that breaks the path.

As in test_numbers: the expected price is worked out with fractions from what the client sees of an answer and the list
in the package. Where an answer tells no usage, what is charged is worked out from the request and the sound itself, by
the rule that docs/gateway.md states.
"""

import json
import random
from collections import Counter
from fractions import Fraction
from math import ceil
from typing import Any

import httpx2
import pytest
from hypothesis import strategies as st
from tests.gateway import sounds
from tests.gateway.conftest import Payer
from tests.promises.figures import SEED, figure
from tests.promises.test_inputs import OTHER_REQUESTS, assert_well_answered, json_values, try_each
from tests.promises.test_numbers import LIST, half_up

from bursar.money import Micros, format_credits

CALLS = figure("priced calls")
PER = {"images": 1, "characters": 1_000_000, "audio_milliseconds": 3_600_000}
COLUMNS = (
    *("input_tokens", "output_tokens", "audio_input_tokens", "audio_output_tokens", "image_output_tokens"),
    *("images", "audio_milliseconds", "characters"),
)
WORDS = "the company may measure any request and the balance has its account "


def dollars(model: str, counts: dict[str, int], conditions: dict[str, str]) -> Fraction:
    """The provider's price, exactly."""
    [rates] = [each["rates"] for each in LIST["models"] if (each["provider"], each["model"]) == ("demo", model)]
    total = Fraction(0)
    for kind, count in counts.items():
        of_kind = [each for each in rates if each["kind"] == kind]
        special = [each for each in of_kind if each.get("when") and each["when"].items() <= conditions.items()]
        plain = [each for each in of_kind if not each.get("when")]
        if count:
            total += Fraction((special or plain)[0]["price_usd"]) * count / PER.get(kind, 1_000_000)
    return total


class ACall:
    """A call, and what its answer must be charged."""

    path: str
    model: str
    directions = ""

    def __init__(self, rng: random.Random) -> None:
        self.conditions: dict[str, str] = {}
        self.fields = self.draw(rng)

    def draw(self, rng: random.Random) -> dict[str, Any]:
        """What is sent, by the names that the client library has for it."""
        raise NotImplementedError

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        """Counts by kind, from what the client sees."""
        raise NotImplementedError

    is_estimated = False


class Embeddings(ACall):
    path, model = "/v1/embeddings", "demo-embedding"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        given = [WORDS[: rng.randrange(1, 60)], [1] * rng.randrange(1, 500), [WORDS, WORDS * rng.randrange(1, 9)]]
        return {"json": {"model": self.model, "input": rng.choice(given), "dimensions": rng.randrange(1, 50)}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        return {"input_tokens": answer.json()["usage"]["prompt_tokens"]}


class ImagesByPiece(ACall):
    path, model = "/v1/images/generations", "demo-image"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        quality = rng.choice(["hd", "standard", "auto", None])
        self.conditions = {"quality": quality or ""}
        asked = {"n": rng.randrange(1, 9), "quality": quality, "size": rng.choice(["256x256", "auto"])}
        return {"json": {"model": self.model, "prompt": WORDS, "stream": rng.random() < 0.4, **asked}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        if answer.headers["content-type"].startswith("application/json"):
            return {"images": len(answer.json()["data"])}
        return {"images": answer.text.count("event: image_generation.completed")}


class ImagesByTokens(ACall):
    path, model = "/v1/images/generations", "demo-image-tokens"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        self.directions = rng.choice(["", f"output_tokens={rng.randrange(1, 9_999)}"])
        asked: dict[str, Any] = {"n": rng.randrange(1, 4), "quality": rng.choice(["low", "medium", "high", "max"])}
        asked |= {"stream": True, "partial_images": rng.randrange(4)} if rng.random() < 0.5 else {}
        return {"json": {"model": self.model, "prompt": WORDS * rng.randrange(1, 40), **asked}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        usages = [answer.json()["usage"]] if answer.text.startswith("{") else list(usages_in(answer))
        return {
            "input_tokens": sum(each["input_tokens_details"]["text_tokens"] for each in usages),
            "image_output_tokens": sum(each["output_tokens"] for each in usages),
        }


class SpeechByCharacters(ACall):
    path, model = "/v1/audio/speech", "demo-speech"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        self.text = rng.choice([WORDS * rng.randrange(1, 30), "für alle Fälle: 日本語 🎉"])
        form = rng.choice(["mp3", "wav", "pcm"])
        return {"json": {"model": self.model, "input": self.text, "voice": "alloy", "response_format": form}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        return {"characters": len(self.text)}


class SpeechAsEvents(ACall):
    path, model = "/v1/audio/speech", "demo-speech-tokens"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        self.directions = rng.choice(["", f"output_tokens={rng.randrange(1, 2_000)}"])
        text = WORDS * rng.randrange(1, 20)
        return {"json": {"model": self.model, "input": text, "voice": "alloy", "stream_format": "sse"}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        [usage] = usages_in(answer)
        return {"input_tokens": usage["input_tokens"], "audio_output_tokens": usage["output_tokens"]}


class SpeechAsSound(ACall):
    path, model, is_estimated = "/v1/audio/speech", "demo-speech-tokens", True

    def draw(self, rng: random.Random) -> dict[str, Any]:
        self.words = rng.randrange(1, 200)
        text = "able " * self.words  # five letters and blanks each, four of which make a token
        return {"json": {"model": self.model, "input": text, "voice": "alloy", "response_format": "pcm"}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        made = ceil(Fraction(len(answer.content) * 1_000 // 48_000 * 1_250, 60_000))
        return {"input_tokens": ceil(Fraction(self.words * 5, 4)), "audio_output_tokens": made}


class SoundByTime(ACall):
    path, model = "/v1/audio/transcriptions", "demo-transcribe"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        self.path = rng.choice(["/v1/audio/transcriptions", "/v1/audio/translations"])
        form = rng.choice(["json", "verbose_json", "text", "srt"])
        self.samples = rng.randrange(1, 400_000)
        self.is_estimated = form in ("text", "srt")
        file = ("a.wav", sounds.wav(self.samples / 8_000))
        return {"data": {"model": self.model, "response_format": form}, "files": {"file": file}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        if self.is_estimated:
            return {"audio_milliseconds": ceil(Fraction(self.samples, 8))}
        return {"audio_milliseconds": half_up(Fraction(str(answer.json()["usage"]["seconds"])) * 1_000)}


class SoundByTokens(ACall):
    path, model = "/v1/audio/transcriptions", "demo-transcribe-tokens"

    def draw(self, rng: random.Random) -> dict[str, Any]:
        fields = {"model": self.model, "stream": rng.choice(["true", "false"])}
        self.directions = rng.choice(["", f"output_tokens={rng.randrange(500)}"])
        return {"data": fields, "files": {"file": ("a.mp3", sounds.mp3(rng.randrange(1, 3_000)))}}

    def used(self, answer: httpx2.Response) -> dict[str, int]:
        [usage] = [answer.json()["usage"]] if answer.text.startswith("{") else usages_in(answer)
        heard = usage["input_token_details"]["audio_tokens"]
        return {"audio_input_tokens": heard, "output_tokens": usage["output_tokens"]}


def usages_in(answer: httpx2.Response) -> list[Any]:
    """The usage of each event that has one."""
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    return [each["usage"] for each in events if "usage" in each]


KINDS = (
    *(Embeddings, ImagesByPiece, ImagesByTokens, SpeechByCharacters, SpeechAsEvents, SpeechAsSound),
    *(SoundByTime, SoundByTokens),
)


@pytest.mark.parametrize("kind", KINDS)
async def test_for_random_media_every_figure_agrees(payer: Payer, kind: type[ACall]) -> None:
    rng = random.Random(SEED)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=60) as http:
        for number in range(CALLS // 4):
            call = kind(rng)
            label = f"seed {SEED}, call {number}: {str(call.fields)[:200]} {call.directions}"
            await _check(payer, http, call, label)


async def _check(payer: Payer, http: httpx2.AsyncClient, call: ACall, label: str) -> None:
    before = await payer.pool()
    key = {"authorization": f"Bearer {payer.key}"}
    answer = await http.post(call.path, headers={**key, "bursar-demo": call.directions}, **call.fields)
    assert answer.status_code == 200, f"{label}: {answer.text[:300]}"
    counts = call.used(answer)
    price = dollars(call.model, counts, call.conditions)
    wanted = half_up(price * 100_000_000)
    request_id = answer.headers["x-request-id"].removeprefix("req_")
    after = await payer.pool()
    [row] = await payer.rows(
        f"select charged_micros, provider_cost_nano_usd, flags & 4 > 0, {', '.join(COLUMNS)} from ledger.attribution"
        f" where request_id = '{request_id}'"
    )
    assert dict(zip(COLUMNS, row[3:], strict=True)) == {name: counts.get(name, 0) for name in COLUMNS}, label
    assert row[:3] == (wanted, half_up(price * 1_000_000_000), call.is_estimated), label
    assert (after.used_micros - before.used_micros, after.held_micros) == (wanted, 0), label
    told = answer.headers.get("bursar-charged") or _in_comment(answer)
    assert told in (format_credits(Micros(wanted)), None), label
    document = (await http.get(f"/api/v1/requests/{request_id}", headers=key)).json()
    assert document["charged"]["amount"] == format_credits(Micros(wanted)), label


def _in_comment(answer: httpx2.Response) -> str | None:
    """The charge at the end of a stream of events; None in sound."""
    text = answer.content[-300:].decode("latin-1")
    return text.rsplit("bursar-charged=", 1)[1].split()[0] if "bursar-charged=" in text else None


# ------------------------------------------------------------------------------------------------------ odd input

JSON_CALLS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "demo-embedding", "input": "hello there"},
    "/v1/images/generations": {"model": "demo-image", "prompt": "a cat"},
    "/v1/audio/speech": {"model": "demo-speech", "input": "hello there", "voice": "alloy"},
}
NAMES = (
    *("model", "input", "prompt", "n", "size", "quality", "stream", "partial_images", "output_format", "svg"),
    *("instructions", "response_format", "stream_format", "speed", "dimensions", "encoding_format", "user", "", "é"),
)


@pytest.mark.parametrize("path", JSON_CALLS)
async def test_no_body_breaks_a_path_of_media_and_each_that_is_answered_is_charged(payer: Payer, path: str) -> None:
    example = st.dictionaries(st.sampled_from(NAMES), json_values, max_size=3)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def content(fields: dict[str, Any]) -> dict[str, Any]:
            return {"content": json.dumps({**JSON_CALLS[path], **fields}).encode()}

        await _assert_nothing_breaks(payer, http, path, example, content)


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
async def test_no_form_breaks_a_path_of_media_and_each_that_is_answered_is_charged(payer: Payer, path: str) -> None:
    whole = httpx2.Request(
        "POST", "http://x", data={"model": "demo-transcribe"}, files={"file": ("a.wav", sounds.wav(0.1))}
    )
    body, kind = whole.read(), whole.headers["content-type"]
    damages = st.lists(
        st.tuples(
            st.integers(0, len(body)), st.integers(0, 9), st.binary(max_size=9) | st.sampled_from([b"\r\n", b"--"])
        ),
        max_size=3,
    )
    example = st.tuples(damages, st.sampled_from([kind, kind, kind, "multipart/form-data", kind + "; boundary=x", ""]))
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def content(drawn: tuple[list[tuple[int, int, bytes]], str]) -> dict[str, Any]:
            damaged = body
            for place, length, junk in drawn[0]:
                damaged = damaged[:place] + junk + damaged[place + length :]
            return {"content": damaged, "headers": {"content-type": drawn[1]}}

        await _assert_nothing_breaks(payer, http, path, example, content)


async def _assert_nothing_breaks(
    payer: Payer, http: httpx2.AsyncClient, path: str, example: st.SearchStrategy[Any], content: Any
) -> None:
    answered: set[str] = set()
    statuses: Counter[int] = Counter()

    async def call(drawn: Any) -> None:
        asked = await content(drawn)
        headers = {**asked.pop("headers", {}), "authorization": f"Bearer {payer.key}"}
        answer = await http.post(path, headers=headers, **asked)
        assert_well_answered(answer, drawn)
        statuses[answer.status_code] += 1
        if answer.status_code == 200:
            answered.add(answer.headers["x-request-id"])

    await try_each(example, max(100, OTHER_REQUESTS // 8), call)
    charged = await payer.rows("select request_id, charged_micros from ledger.attribution")
    assert {f"req_{row[0].hex}" for row in charged} == answered
    assert all(row[1] > 0 for row in charged), "never free by accident"
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (sum(row[1] for row in charged), 0)
    assert statuses[200] > 0
    assert sum(count for status, count in statuses.items() if status >= 400) > 10
