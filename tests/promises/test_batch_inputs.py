"""R12 on the gateway's paths of batches and files."""

import json
import random
from collections import Counter
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from hypothesis import strategies as st
from tests.gateway.conftest import Payer
from tests.promises.figures import figure
from tests.promises.test_inputs import CALL, assert_well_answered, json_values, some_headers, texts, try_each

BODIES: dict[str, dict[str, Any]] = {
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
FIELDS = (
    *("model", "input", "prompt", "n", "size", "quality", "stream", "voice", "speed", "instructions", "dimensions"),
    *("encoding_format", "response_format", "stream_format", "partial_images", "background", "output_format", "user"),
    *("messages", "tools", "system", "requests", "custom_id", "params", "endpoint", "input_file_id", "metadata"),
    *("completion_window", "purpose", "language", "temperature", "timestamp_granularities[]", "include[]", "é", ""),
)
AREAS = ("/v1/files", "/v1/batches", "/v1/messages/batches", "/v1/models", "/v1/responses")


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


async def assert_nothing_is_charged(payer: Payer) -> None:
    """Batches are charged when they end; what they hold is held."""
    assert await payer.rows("select * from ledger.attribution") == []
    assert (await payer.pool()).used_micros == 0


@pytest.mark.parametrize("path", BODIES)
async def test_no_batch_breaks_the_gateway(payer: Payer, path: str) -> None:
    statuses: Counter[int] = Counter()
    examples = st.tuples(st.lists(json_values, min_size=1, max_size=3), st.integers(0, 2**32), some_headers)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[list[Any], int, dict[str, str]]) -> None:
            values, seed, headers = example
            body = changed(random.Random(seed), BODIES[path], values)
            raw = {name: value.strip().encode("latin-1") for name, value in headers.items() if name != "bursar-demo"}
            raw["authorization"] = b"Bearer " + payer.key.encode()
            answer = await http.post(path, content=json.dumps(body).encode(), headers=raw)
            assert_well_answered(answer, body)
            statuses[answer.status_code] += 1

        await try_each(examples, max(60, figure("other requests") // 16), call)
    await assert_nothing_is_charged(payer)
    assert sum(count for status, count in statuses.items() if status >= 400) > 10
    print(path, statuses)


async def test_no_file_breaks_the_gateway(payer: Payer) -> None:
    statuses: Counter[int] = Counter()
    content = st.one_of(st.just(LINES), st.binary(max_size=200), st.integers(0, len(LINES)).map(lambda n: LINES[:n]))
    fields = st.dictionaries(st.sampled_from(FIELDS), texts, max_size=3)
    examples = st.tuples(content, texts, fields, st.booleans(), st.binary(max_size=60))
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[bytes, str, dict[str, str], bool, bytes]) -> None:
            file, name, others, whole, noise = example
            form = {"purpose": "batch", **others}
            parts: list[tuple[str, Any]] = [
                (key, (None, value.encode("utf-8", "replace"))) for key, value in form.items()
            ]
            request = http.build_request("POST", "/v1/files", files=[*parts, ("file", (name or "a.jsonl", file))])
            body = await request.aread()
            if not whole:  # something in its middle is not as it was
                place = len(body) // 2
                body = body[:place] + noise + body[place + len(noise) // 2 :]
            headers = {"authorization": f"Bearer {payer.key}", "content-type": request.headers["content-type"]}
            answer = await http.post("/v1/files", content=body, headers=headers)
            assert_well_answered(answer, (name, others, noise))
            statuses[answer.status_code] += 1

        await try_each(examples, max(60, figure("other requests") // 16), call)
    await assert_nothing_is_charged(payer)
    assert statuses[200] > 0
    print(statuses)


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

        await try_each(examples, max(200, figure("other requests") // 4), call)
    await assert_nothing_is_charged(payer)
    print(statuses)
