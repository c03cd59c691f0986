"""R12 on the gateway's paths that are no talk: embeddings, images, sound, counts, files and batches."""

import json
import random
from collections import Counter
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import strategies as st
from tests.gateway import sounds
from tests.gateway.conftest import Payer
from tests.promises.figures import figure
from tests.promises.test_inputs import CALL, assert_well_answered, json_values, some_headers, texts, try_each

from bursar.gateway.endpoints import ENDPOINTS

MODELS = {
    "/v1/embeddings": "demo-embedding",
    "/v1/images/generations": "demo-image",
    "/v1/audio/speech": "demo-speech",
    "/v1/responses/compact": "demo-1",
    "/v1/messages/count_tokens": "demo-claude",
    "/v1/batches": "demo-1",
    "/v1/messages/batches": "demo-claude",
}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"input": "hello there"},
    "/v1/images/generations": {"prompt": "a cat"},
    "/v1/audio/speech": {"input": "hello there", "voice": "alloy"},
    "/v1/responses/compact": {"input": "hello there"},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/batches": {"input_file_id": "file-1", "endpoint": "/v1/chat/completions", "completion_window": "24h"},
    "/v1/messages/batches": {
        "requests": [
            {
                "custom_id": "one",
                "params": {"model": "demo-claude", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]},
            }
        ]
    },
}
LINES = b"".join(
    json.dumps({"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}).encode() + b"\n"
    for name, body in (("one", CALL), ("two", CALL))
)
FORMS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/v1/files")
FIELDS = (
    *("model", "input", "prompt", "n", "size", "quality", "stream", "voice", "speed", "instructions", "dimensions"),
    *("encoding_format", "response_format", "stream_format", "partial_images", "background", "output_format", "user"),
    *("messages", "tools", "system", "requests", "custom_id", "params", "endpoint", "input_file_id", "metadata"),
    *("completion_window", "purpose", "language", "temperature", "timestamp_granularities[]", "include[]", "é", ""),
)
AREAS = ("/v1/files", "/v1/batches", "/v1/messages/batches", "/v1/models", "/v1/responses")
FREE = ("/v1/messages/count_tokens", "/v1/files", "/v1/batches", "/v1/messages/batches")


def changed(rng: random.Random, body: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """One to three places that are wrong, or may be; also below the top."""
    whole: dict[str, Any] = json.loads(json.dumps(body))
    for value in values:
        place: Any = whole
        while rng.random() < 0.5:
            inside = [each for each in (place.values() if isinstance(place, dict) else place) if each]
            deeper = [each for each in inside if isinstance(each, dict | list)]
            if not deeper:
                break
            place = rng.choice(deeper)
        if isinstance(place, list):
            place[rng.randrange(len(place))] = value
        elif place and rng.random() < 0.5:
            place[rng.choice(list(place))] = value
        elif place and rng.random() < 0.3:
            place.pop(rng.choice(list(place)))
        else:
            place[rng.choice(FIELDS)] = value
    return whole


async def assert_booked_as_answered(payer: Payer, answered: dict[str, Any], *, is_free: bool) -> None:
    """What was answered is charged, and nothing else."""
    rows = await payer.rows("select request_id, charged_micros from ledger.attribution")
    if not is_free:
        assert {f"req_{row[0].hex}" for row in rows} == set(answered)
        free = {f"req_{row[0].hex}" for row in rows if row[1] == 0}
        empty = ("[]", '""', "[[]]", '[""]')  # nothing was asked for
        assert [answered[each] for each in free if json.dumps(answered[each]["input"]) not in empty] == []
        assert (await payer.pool()).held_micros == 0
    assert (await payer.pool()).used_micros == sum(row[1] for row in rows)


@pytest.mark.parametrize("path", BODIES)
async def test_no_body_of_other_work_breaks_the_gateway(payer: Payer, path: str) -> None:
    answered: dict[str, Any] = {}
    statuses: Counter[int] = Counter()
    examples = st.tuples(st.lists(json_values, min_size=1, max_size=3), st.integers(0, 2**32), some_headers)
    whole = {**BODIES[path], **({"model": MODELS[path]} if "batches" not in path else {})}
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[list[Any], int, dict[str, str]]) -> None:
            values, seed, headers = example
            body = changed(random.Random(seed), whole, values)
            raw = {name: value.strip().encode("latin-1") for name, value in headers.items() if name != "bursar-demo"}
            raw["authorization"] = b"Bearer " + payer.key.encode()
            answer = await http.post(path, content=json.dumps(body).encode(), headers=raw)
            assert_well_answered(answer, body)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                answered[answer.headers["x-request-id"]] = body

        await try_each(examples, max(60, figure("requests") // 16), call)
    await assert_booked_as_answered(payer, answered, is_free=path in FREE)
    assert sum(count for status, count in statuses.items() if status >= 400) > 10
    print(path, statuses)


@pytest.mark.parametrize("path", FORMS)
async def test_no_form_breaks_the_gateway(payer: Payer, path: str) -> None:
    answered: dict[str, Any] = {}
    statuses: Counter[int] = Counter()
    good = LINES if path == "/v1/files" else sounds.wav(1)
    content = st.one_of(st.just(good), st.binary(max_size=200), st.integers(0, len(good)).map(lambda n: good[:n]))
    fields = st.dictionaries(st.sampled_from(FIELDS), texts, max_size=3)
    examples = st.tuples(content, texts, fields, st.booleans(), st.binary(max_size=60))
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[bytes, str, dict[str, str], bool, bytes]) -> None:
            file, name, others, whole, noise = example
            form = {"model": "demo-transcribe", "purpose": "batch", **others}
            parts: list[tuple[str, Any]] = [
                (key, (None, value.encode("utf-8", "replace"))) for key, value in form.items()
            ]
            request = http.build_request("POST", path, files=[*parts, ("file", (name or "a.wav", file))])
            body = await request.aread()
            if not whole:  # something in its middle is not as it was
                place = len(body) // 2
                body = body[:place] + noise + body[place + len(noise) // 2 :]
            headers = {"authorization": f"Bearer {payer.key}", "content-type": request.headers["content-type"]}
            answer = await http.post(path, content=body, headers=headers)
            assert_well_answered(answer, (name, others, noise))
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                answered[answer.headers["x-request-id"]] = body

        await try_each(examples, max(60, figure("requests") // 16), call)
    await assert_booked_as_answered(payer, answered, is_free=path in FREE)
    assert statuses[200] > 5 or path in FREE
    print(path, statuses)


async def test_no_id_and_no_method_breaks_the_gateway(payer: Payer) -> None:
    statuses: Counter[int] = Counter()
    methods = st.sampled_from(["GET", "POST", "DELETE", "PUT", "PATCH"])
    ends = st.sampled_from(["", "/content", "/cancel", "/results", "/x", "//", "/.."])
    examples = st.tuples(methods, st.sampled_from(AREAS), texts, ends, st.dictionaries(texts, texts, max_size=2))
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[str, str, str, str, dict[str, str]]) -> None:
            method, area, identifier, end, query = example
            path = f"{area}/{quote(identifier, safe='')}{end}"
            headers = {"authorization": f"Bearer {payer.key}"}
            answer = await http.request(method, path, params=query, headers=headers)
            assert_well_answered(answer, example)
            statuses[answer.status_code] += 1

        await try_each(examples, max(200, figure("requests") // 4), call)
    await assert_booked_as_answered(payer, {}, is_free=True)
    print(statuses)


def test_no_path_is_left_out() -> None:
    talk = {"/v1/chat/completions", "/v1/messages", "/v1/responses"}
    assert ENDPOINTS.keys() <= talk | BODIES.keys() | set(FORMS)
