"""Header, attribution, pool and the story of a request agree to the micro-credit, for whatever a provider reports.

The expected price is worked out here anew, with fractions, from what the client sees as usage and the list in the
package.
"""

import json
import random
from fractions import Fraction
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.conftest import Org
from tests.gateway.conftest import Payer, fund
from tests.promises.figures import SEED, figure

import bursar.pricing
from bursar import db
from bursar.audit.events import OPERATOR
from bursar.money import Micros, format_credits
from bursar.pricing.terms import set_markup

CALLS = figure("priced calls")
PATHS = {"openai": "/v1/chat/completions", "responses": "/v1/responses", "anthropic": "/v1/messages"}
LIST = json.loads((Path(bursar.pricing.__file__).parent / "shipped.json").read_text())
TOOLS = {
    "openai": [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}],
    "responses": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}}],
    "anthropic": [
        {"name": "look_up", "input_schema": {"type": "object"}},
        {"type": "web_search_20250305", "name": "web_search", "max_uses": 2},
    ],
}
COLUMNS = (
    *("input_tokens", "cache_read_tokens", "cache_write_5m_tokens", "cache_write_1h_tokens", "output_tokens"),
    *("reasoning_tokens", "web_searches", "file_searches", "code_sessions"),
)
# What a kind is billed as where its model has no price for it.
INSTEAD = {
    "cache_read_tokens": "input_tokens",
    "cache_write_5m_tokens": "input_tokens",
    "cache_write_1h_tokens": "cache_write_5m_tokens",
}


def used(vendor: str, usage: dict[str, Any]) -> dict[str, int]:
    """A vendor's usage object as our columns, by what the vendors' documentation says."""
    if vendor == "anthropic":
        split = usage["cache_creation"]
        return {
            "input_tokens": usage["input_tokens"],
            "cache_read_tokens": usage["cache_read_input_tokens"],
            "cache_write_5m_tokens": split["ephemeral_5m_input_tokens"],
            "cache_write_1h_tokens": split["ephemeral_1h_input_tokens"],
            "output_tokens": usage["output_tokens"],
            "reasoning_tokens": usage.get("output_tokens_details", {}).get("thinking_tokens", 0),
            "web_searches": usage.get("server_tool_use", {}).get("web_search_requests", 0),
            "file_searches": 0,
            "code_sessions": 0,
        }
    if vendor == "responses":
        return used_by_response(usage)
    prompt = usage["prompt_tokens"]
    cached = min(prompt, usage["prompt_tokens_details"]["cached_tokens"])
    written = min(prompt - cached, usage["prompt_tokens_details"].get("cache_write_tokens", 0))
    return {
        "input_tokens": prompt - cached - written,
        "cache_read_tokens": cached,
        "cache_write_5m_tokens": written,
        "cache_write_1h_tokens": 0,
        "output_tokens": usage["completion_tokens"],
        "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
        "web_searches": 0,
        "file_searches": 0,
        "code_sessions": 0,
    }


def used_by_response(response: dict[str, Any]) -> dict[str, int]:
    """A response as our columns: tokens as it reports them, tools by the items of its output."""
    usage = response["usage"]
    cached = min(usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"])
    written = min(usage["input_tokens"] - cached, usage["input_tokens_details"]["cache_write_tokens"])
    items = response["output"]
    containers = {item["container_id"] for item in items if item["type"] == "code_interpreter_call"}
    made = sum(tool["type"] == "code_interpreter" for tool in response["tools"])
    return {
        "input_tokens": usage["input_tokens"] - cached - written,
        "cache_read_tokens": cached,
        "cache_write_5m_tokens": written,
        "cache_write_1h_tokens": 0,
        "output_tokens": usage["output_tokens"],
        "reasoning_tokens": usage["output_tokens_details"]["reasoning_tokens"],
        "web_searches": sum(item["type"] == "web_search_call" for item in items),
        "file_searches": sum(item["type"] == "file_search_call" for item in items),
        "code_sessions": max(made, len(containers)),
    }


PER = {"web_searches": 1_000, "file_searches": 1_000, "code_sessions": 1}


def dollars(model: str, counts: dict[str, int], **asked: str) -> Fraction:
    """The provider's price, exactly. asked: what a price may depend on."""
    [rates] = [each["rates"] for each in LIST["models"] if (each["provider"], each["model"]) == ("demo", model)]
    size = sum(count for kind, count in counts.items() if kind.startswith(("input", "cache")))

    def rate(kind: str) -> Fraction:
        of_kind = [each for each in rates if each["kind"] == kind and each.get("above_input_tokens", -1) < size]
        special = [each for each in of_kind if each.get("when", {}).items() & asked.items()]
        plain = [each for each in of_kind if "when" not in each]
        found = max(special or plain, key=lambda each: each.get("above_input_tokens", 0), default=None)
        return rate(INSTEAD[kind]) if found is None else Fraction(found["price_usd"])

    total = Fraction(0)
    for kind, count in counts.items():
        if count and kind != "reasoning_tokens":  # billed within the output
            total += rate(kind) * count / PER.get(kind, 1_000_000)
    return total


def half_up(amount: Fraction) -> int:
    return int(amount + Fraction(1, 2))


def a_call(rng: random.Random, vendor: str) -> tuple[dict[str, Any], str]:
    """A body, and the directions to the provider."""
    models = ["demo-claude", "demo-1"] if vendor == "anthropic" else ["demo-1", "demo-1-mini", "demo-1-long"]
    model = rng.choice(models)
    directions = {"output_tokens": rng.choice([0, 1, 7, 100, 3_000])}
    for name, most in (("cached", 400), ("cache_write", 300), ("reasoning", 2_000)):
        if rng.random() < 0.5:
            directions[name] = rng.randrange(most)
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": rng.choice([1, 50, 4_000]),
        "messages": [{"role": "user", "content": "word " * rng.randrange(1, 1_000)}],
    }
    if vendor == "anthropic":
        directions |= {"cache_write_1h": rng.randrange(50)} if rng.random() < 0.5 else {}
        directions |= {"searches": rng.randrange(5)} if rng.random() < 0.5 else {}
    elif rng.random() < 0.6:
        body["service_tier"] = rng.choice(["flex", "default", "auto", "batch"])
    if rng.random() < 0.3:
        directions["tool_calls"] = rng.choice([1, 3])
        body["tools"] = TOOLS[vendor]
    if vendor == "responses":
        as_response(rng, body, directions)
    return body, "; ".join(f"{name}={value}" for name, value in directions.items())


def as_response(rng: random.Random, body: dict[str, Any], directions: dict[str, int]) -> None:
    """The body in the shape of responses, now and then with tools that the provider bills, which demo-1 prices."""
    body["max_output_tokens"] = body.pop("max_tokens")
    body["input"] = body.pop("messages")
    if body["model"] != "demo-1" or rng.random() < 0.4:
        return
    container = {"type": "auto", "memory_limit": rng.choice(["1g", "4g"])}
    offered = {
        "searches": {"type": "web_search"},
        "file_searches": {"type": "file_search", "vector_store_ids": ["vs_1"]},
        "code_sessions": {"type": "code_interpreter", "container": container},
    }
    for name, tool in offered.items():
        if rng.random() < 0.5:
            directions[name] = rng.randrange(4)
            body["tools"] = [*body.get("tools", ()), tool]


def seen_usage(vendor: str, answer: httpx2.Response, stream: bool) -> dict[str, Any]:
    """The usage that the client gets to see; of a response all of it."""
    if not stream:
        document: dict[str, Any] = answer.json()
        return document if vendor == "responses" else document["usage"]
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if vendor == "openai":
        [usage] = [each["usage"] for each in events if each.get("usage")]
        return usage
    if vendor == "responses":
        return dict(events[-1]["response"])
    [start] = [each["message"]["usage"] for each in events if each["type"] == "message_start"]
    [delta] = [each["usage"] for each in events if each["type"] == "message_delta"]
    return {**start, **delta}


def told(answer: httpx2.Response, stream: bool) -> dict[str, str]:
    """What we say of charge and balance: in headers, of a stream in its last comment."""
    if not stream:
        return {name: answer.headers[f"bursar-{name}"] for name in ("charged", "available")}
    comment = answer.text.rsplit("\n: ", 1)[1].split()
    return {name.removeprefix("bursar-"): value for name, _, value in (each.partition("=") for each in comment)}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("vendor", list(PATHS))
async def test_for_random_usage_every_figure_agrees(
    payer: Payer, http: httpx2.AsyncClient, vendor: str, stream: bool
) -> None:
    rng = random.Random(SEED)
    for number in range(CALLS):
        body, directions = a_call(rng, vendor)
        options = {"stream": True, "stream_options": {"include_usage": True}} if stream and vendor == "openai" else {}
        label = f"seed {SEED}, call {number}: {json.dumps(body)[:200]} {directions}"
        await _check(payer, http, vendor, {**body, "stream": stream, **options}, directions, label=label)


async def _check(
    payer: Payer,
    http: httpx2.AsyncClient,
    vendor: str,
    body: dict[str, Any],
    directions: str,
    *,
    label: str,
    markup: Fraction = Fraction(1),
) -> None:
    before = await payer.pool()
    key = {"authorization": f"Bearer {payer.key}"}
    answer = await http.post(PATHS[vendor], json=body, headers={**key, "bursar-demo": directions})
    assert answer.status_code == 200, f"{label}: {answer.text[:300]}"
    counts = used(vendor, seen_usage(vendor, answer, body["stream"]))
    memory = next((tool["container"]["memory_limit"] for tool in body.get("tools", ()) if "container" in tool), "")
    price = dollars(body["model"], counts, service_tier=body.get("service_tier", ""), memory_limit=memory)
    wanted = half_up(price * markup * 100_000_000)
    request_id = answer.headers["x-request-id"].removeprefix("req_")
    after = await payer.pool()
    [row] = await payer.rows(
        f"select charged_micros, provider_cost_nano_usd, flags & 4, {', '.join(COLUMNS)} from ledger.attribution"
        f" where request_id = '{request_id}'"
    )
    assert dict(zip(COLUMNS, row[3:], strict=True)) == counts, label
    assert row[:3] == (wanted, half_up(price * 1_000_000_000), 0), label
    assert (after.used_micros - before.used_micros, after.held_micros) == (wanted, 0), label
    figures = told(answer, body["stream"])
    assert figures["charged"] == format_credits(Micros(wanted)), label
    assert figures["available"] == format_credits(after.available_micros), label
    document = (await http.get(f"/api/v1/requests/{request_id}", headers=key)).json()
    assert document["charged"]["amount"] == format_credits(Micros(wanted)), label
    drawn = sum(Fraction(each["drawn"]["amount"]) for each in document["grants"])
    assert drawn == Fraction(wanted, 1_000_000), label


@pytest.mark.parametrize("stream", [False, True])
async def test_a_long_context_is_billed_by_its_tier_at_the_border(
    payer: Payer, http: httpx2.AsyncClient, stream: bool
) -> None:
    for words in (159_990, 160_010):  # five letters each, which our rule counts as fifteen units: 200,000 tokens
        content = "word " * words
        body = {"model": "demo-1-long", "max_tokens": 10, "messages": [{"role": "user", "content": content}]}
        options = {"stream": stream, "stream_options": {"include_usage": True}} if stream else {"stream": False}
        await _check(payer, http, "openai", {**body, **options}, "output_tokens=3", label=f"{words} words")
    rows = await payer.rows("select input_tokens, provider_cost_nano_usd from ledger.attribution order by 1")
    assert rows[0][0] <= 200_000 < rows[1][0], rows
    assert rows[1][1] > 1.9 * rows[0][1]


async def test_a_mark_up_is_on_the_charge_and_not_on_the_cost(
    org: Org, http: httpx2.AsyncClient, priced: db.Database
) -> None:
    await fund(org, Micros(1_000_000_000))
    async with priced.platform() as conn:
        await set_markup(
            conn, organization_id=org.organization_id, markup_ppm=1_234_567, reason="as agreed", by=OPERATOR
        )
    user_id = await org.member()
    key = await org.key(user_id)
    payer = Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=str(http.base_url))
    rng = random.Random(SEED)
    for number in range(CALLS // 4):
        vendor = rng.choice(list(PATHS))
        body, directions = a_call(rng, vendor)
        await _check(
            payer,
            http,
            vendor,
            {**body, "stream": False},
            directions,
            label=f"seed {SEED}, call {number}",
            markup=Fraction(1_234_567, 1_000_000),
        )
