"""R12: no input of any kind is answered with a 5xx, a stack trace or SQL; and what is refused changes nothing."""

import asyncio
import json
import os
import random
import re
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from tests.conftest import Org
from tests.gateway.conftest import Payer, fund
from tests.promises.figures import IS_FULL, SEED, figure, tell

from bursar import asgi
from bursar.app import ROUTERS, create_app
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.pools import PoolKind, open_pool
from bursar.gateway import opening
from bursar.money import Micros
from bursar.settings import Settings

REQUESTS, OTHER_REQUESTS = figure("requests"), figure("other requests")
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 5, "messages": [{"role": "user", "content": "hi"}]}
TELLTALES = re.compile(r"Traceback|psycopg|\.py\b|relation \"|SELECT |select \w+ from|/home/|/root/|errcode|plpgsql")

NASTY = [
    *(
        "",
        " ",
        "\0",
        "a\0b",
        "\r\nX-Injected: yes",
        "%",
        "%00",
        "_",
        "'",
        '"',
        "\\",
        "';drop table x;--",
        "../../etc/passwd",
    ),
    *("null", "true", "NaN", "Infinity", "-0", "1e400", "0x10", "９", "1_000", "9" * 40, "-1", "0.0000001", "1.5"),
    *(
        "é",
        "ÿ",
        "\u202e",
        "\u2028",
        "𝕏",
        "👩‍👩‍👧‍👦",
        "\ufeff",
        "ß" * 300,
        "a" * 5000,
        "{}",
        "[]",
        "{{7*7}}",
        "${7*7}",
        "<script>",
    ),
    *(
        "00000000-0000-0000-0000-000000000000",
        "f" * 32,
        "req_" + "0" * 32,
        "usr_",
        "urn:uuid:" + "1" * 32,
        "{" + "a" * 32 + "}",
    ),
]
texts = st.one_of(st.sampled_from(NASTY), st.text(max_size=60), st.integers().map(str), st.floats().map(str))
json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(texts, inner, max_size=4)),
    max_leaves=8,
)
header_text = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=80)
OWN_HEADERS = (
    "accept",
    "bursar-organization",
    "bursar-conversation",
    "idempotency-key",
    "bursar-demo",
    "content-type",
    "x-request-id",
    "cookie",
    "anthropic-version",
    "anthropic-beta",
    "openai-beta",
    "accept-encoding",
    "origin",
    "x-forwarded-for",
    "content-language",
    "range",
    "if-none-match",
)
some_headers = st.dictionaries(
    st.sampled_from(OWN_HEADERS),
    st.one_of(header_text, st.sampled_from(["text/html", "text/csv", "gzip", "session_token=x"])),
    max_size=3,
)
quick = settings(
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@dataclass(frozen=True, slots=True)
class Asker:
    """An administrator who may do everything in an organization, and the application in this process."""

    org: Org
    http: httpx2.AsyncClient
    document: dict[str, Any]


@pytest.fixture
async def asker(org: Org, settings: Settings) -> AsyncIterator[Asker]:
    app: FastAPI = create_app(org.database, settings, parts=())
    key = await org.key(org.admin)
    headers = {"authorization": f"Bearer {key.text}"}
    transport = httpx2.ASGITransport(app=app)
    async with (
        opening.opened(org.database) as opened,
        httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as http,
    ):
        app.state.credits = opened.credits
        # What the first question builds is there before anything is counted.
        assert (await http.get(f"/api/v1/organizations/{org.slug}/why")).status_code == 200
        yield Asker(org, http, app.openapi())


async def counted(org: Org) -> list[Any]:
    """What must not change: rows of each table of the organization, and its balances."""
    tables = (
        *("identity.memberships", "identity.api_keys", "identity.teams", "identity.sessions", "audit.events"),
        *("credits.chains", "credits.holds", "credits.grants", "credits.limits", "ledger.attribution"),
    )
    sums = ", ".join(f"(select count(*) from {table})" for table in tables)
    async with org.tenant() as conn:
        cursor = await conn.execute(f"select {sums}, (select sum(used_amount + held_amount) from credits.balances)")  # type: ignore[arg-type]
        return await cursor.fetchall()


def assert_well_answered(answer: httpx2.Response, what: object) -> None:
    """A 2xx or 3xx, or a refusal with a name; nothing of our insides in either."""
    assert answer.status_code < 500, (what, answer.text[:500])
    told = answer.text + str(answer.headers)
    assert "x-injected" not in answer.headers
    if answer.status_code >= 400:
        assert TELLTALES.search(told) is None, (what, told[:2000])
    if answer.status_code >= 400 and "json" in answer.headers.get("content-type", ""):
        document = answer.json()
        refusal = document.get("error", document)
        assert re.fullmatch(r"[a-z][a-z0-9_]*", refusal.get("code") or refusal.get("type")), (what, document)


OPERATIONS = sorted(
    {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
)


def parameters_of(document: dict[str, Any], operation: str) -> list[tuple[str, str]]:
    """(name, place) of each parameter: from the document; of a page, which is not in it, what pages take."""
    method, template = operation.split(" ")
    described = document["paths"].get(template, {}).get(method.lower())
    if described is not None:
        return [(each["name"], each["in"]) for each in described.get("parameters", [])]
    return [(name, "path") for name in re.findall(r"\{(\w+)\}", template)] + [
        (name, "query") for name in ("unit", "view", "next")
    ]


async def try_each(given_by: st.SearchStrategy[Any], most: int, one: Callable[[Any], Awaitable[None]]) -> None:
    """Hypothesis finds and shortens examples in a thread of its own; each is tried on this event loop."""
    loop = asyncio.get_running_loop()

    @seed(SEED if IS_FULL or "BURSAR_TEST_SEED" in os.environ else 0)
    @settings(quick, max_examples=most)
    @given(given_by)
    def fuzz(example: Any) -> None:
        asyncio.run_coroutine_threadsafe(one(example), loop).result()

    await asyncio.to_thread(fuzz)
    tell(f"{most} requests")


@st.composite
def asked(draw: st.DrawFn, operation: str, parameters: list[tuple[str, str]], slug: str) -> dict[str, Any]:
    """Arguments of one request: some of its names and values right, most wrong."""
    method, path = operation.split(" ")
    query: list[tuple[str, str]] = []
    for name, place in parameters:
        value = slug if name == "org" and draw(st.booleans()) else draw(texts)
        if place == "path":
            path = path.replace(f"{{{name}}}", quote(value, safe=""))
        elif draw(st.booleans()):
            query += [(name, value)] * draw(st.sampled_from([1, 1, 2]))
    headers = {name: value.encode("latin-1") for name, value in draw(some_headers).items()}
    body = draw(st.one_of(st.binary(max_size=50), json_values.map(json.dumps).map(str.encode)))
    content = {} if method == "GET" else {"content": body}
    return {"method": method, "url": path, "params": query, "headers": headers, **content}


@pytest.mark.parametrize("operation", OPERATIONS)
async def test_no_parameter_header_or_body_breaks_an_operation(asker: Asker, operation: str) -> None:
    before = await counted(asker.org)

    async def ask(arguments: dict[str, Any]) -> None:
        assert_well_answered(await asker.http.request(**arguments), arguments)

    examples = asked(operation, parameters_of(asker.document, operation), asker.org.slug)
    await try_each(examples, max(20, REQUESTS // len(OPERATIONS)), ask)
    assert await counted(asker.org) == before, "something changed"


def _changed(rng: random.Random, body: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """A call with one to three places that are wrong, or may be."""
    names = [
        *(
            "model",
            "messages",
            "max_tokens",
            "stream",
            "n",
            "tools",
            "functions",
            "response_format",
            "modalities",
            "stop",
        ),
        *(
            "service_tier",
            "web_search_options",
            "stream_options",
            "system",
            "cache_control",
            "speed",
            "Model",
            "MAX_TOKENS",
        ),
        *("max_completion_tokens", "temperature", "metadata", "user", "", "\0", "é"),
    ]
    changed = json.loads(json.dumps(body))
    for value in values:
        where = rng.choice(["top", "top", "top", "message", "content", "missing"])
        if where == "top":
            changed[rng.choice(names)] = value
        elif where == "missing":
            changed.pop(rng.choice(["model", "messages", "max_tokens"]), None)
        elif where == "message":
            changed["messages"] = [{"role": rng.choice(["user", value]), "content": value}]
        else:
            part = {
                "type": rng.choice(
                    ["text", "image_url", "input_audio", "file", "image", "document", "tool_result", value]
                )
            }
            part |= {
                name: value
                for name in ("text", "image_url", "source", "content", "input_audio", "file")
                if rng.random() < 0.4
            }
            changed["messages"] = [{"role": "user", "content": [part]}]
    return changed


def _changed_response(rng: random.Random, body: dict[str, Any], values: list[Any]) -> dict[str, Any]:
    """A request for a response with places that are wrong, or may be."""
    names = (
        *("model", "input", "instructions", "max_output_tokens", "max_tool_calls", "stream", "tools", "text", "prompt"),
        *("previous_response_id", "conversation", "background", "service_tier", "reasoning", "store", "Input", "é"),
    )
    items = ("message", "function_call_output", "item_reference", "additional_tools", "computer_call_output")
    parts = ("input_text", "input_image", "input_file", "input_audio", "output_text", "refusal")
    changed = json.loads(json.dumps(body))
    for value in values:
        match rng.choice(["top", "top", "item", "part", "tool"]):
            case "top":
                changed[rng.choice(names)] = value
            case "item":
                item = {"type": rng.choice(items), "content": value, "output": value, "id": value, "tools": [value]}
                changed["input"] = [item, {"role": "user", "content": "hi"}]
            case "part":
                part = {"type": rng.choice(parts), "text": value, "image_url": value, "file_data": value}
                changed["input"] = [{"role": "user", "content": [part, value]}]
            case "tool":
                tool = {"type": rng.choice(["web_search", "code_interpreter", "shell", "function", value])}
                changed["tools"] = [{**tool, "container": value, "environment": value, "name": value}, value]
    return changed


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
async def test_no_call_of_a_model_breaks_the_gateway_and_each_that_is_answered_is_charged(
    payer: Payer, path: str
) -> None:
    answered: set[str] = set()
    statuses: Counter[int] = Counter()
    examples = st.tuples(
        st.lists(json_values, min_size=1, max_size=3), st.integers(0, 2**32), some_headers, st.booleans()
    )
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as http:

        async def call(example: tuple[list[Any], int, dict[str, str], bool]) -> None:
            values, seed, headers, stream = example
            if path == RESPONSES:
                whole = {"model": "demo-1", "max_output_tokens": 5, "input": "hi", "stream": stream}
                body = _changed_response(random.Random(seed), whole, values)
            else:
                body = _changed(random.Random(seed), {**CALL, "stream": stream}, values)
            # The client itself refuses values with blanks around them.
            raw = {name: value.strip().encode("latin-1") for name, value in headers.items() if name != "bursar-demo"}
            raw["authorization"] = b"Bearer " + payer.key.encode()
            answer = await http.post(path, content=json.dumps(body).encode(), headers=raw)
            assert_well_answered(answer, body)
            statuses[answer.status_code] += 1
            if answer.status_code == 200:
                answered.add(answer.headers["x-request-id"])

        await try_each(examples, max(100, OTHER_REQUESTS // 8), call)
    charged = await payer.rows("select request_id, charged_micros from ledger.attribution")
    assert {f"req_{row[0].hex}" for row in charged} == answered
    assert all(row[1] > 0 for row in charged), "never free by accident"
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (sum(row[1] for row in charged), 0)
    assert statuses[200] > 5
    assert sum(count for status, count in statuses.items() if status >= 400) > 20
    print(statuses)


CHARGE: dict[str, Any] = {
    "amount": {"amount": "0.01", "unit": "credit"},
    "usage": {"input_tokens": 3},
    "context": {"service_tier": "flex"},
    "provider_cost": {"amount": "0.00001", "unit": "USD"},
    "provider": "demo",
    "model": "demo-1",
    "conversation_id": "conv_" + "0" * 32,
}
# What no caller says: whose it is, who decided, what became of it (mass assignment).
NOBODY_SAYS = (
    *("organization_id", "api_key_id", "price_version_id", "pool_id", "charged", "charged_micros", "held", "available"),
    *("flags", "state", "created_at", "used_at", "idempotency_key", "limit", "role"),
)


@pytest.mark.parametrize("operation", ["authorize", "extend", "settle", "release", "deduct"])
async def test_no_charge_breaks_and_each_that_is_accepted_is_booked_as_it_was_answered(
    payer: Payer, operation: str
) -> None:
    key = (await payer.org.key()).text
    headers = {"authorization": f"Bearer {key}"}
    statuses: Counter[int] = Counter()
    places = st.sampled_from([*CHARGE, "request_id", "lease_seconds", "stream", "sent", "so_far", "user_id", "", "\0"])
    inner = st.sampled_from(["amount", "unit", "input_tokens", "requests", "service_tier", "é"])
    changes = st.lists(st.tuples(places, st.one_of(st.none(), inner), json_values), max_size=3)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30, headers=headers) as http:

        async def hold() -> str:
            answer = await http.post("/api/v1/credits/authorize", json={"amount": CHARGE["amount"]})
            if answer.status_code == 402:  # what was settled or deducted has used everything up
                await fund(payer.org, Micros(10**15))
                return await hold()
            return str(answer.json()["request_id"])

        async def charge(change: list[tuple[str, str | None, Any]]) -> None:
            held = await hold()
            body = json.loads(json.dumps(CHARGE))
            if operation in ("extend", "settle", "release"):
                body = {"request_id": held, **({} if operation == "release" else {"amount": body["amount"]})}
            for place, part, value in change:
                if part is None or not isinstance(body.get(place), dict):
                    body[place] = value
                else:
                    body[place][part] = value
            answer = await http.post(f"/api/v1/credits/{operation}", content=json.dumps(body).encode())
            assert_well_answered(answer, body)
            statuses[answer.status_code] += 1
            released = await http.post("/api/v1/credits/release", json={"request_id": held})
            assert released.status_code in (200, 409), answer.text[:900]
            if answer.status_code == 200 and answer.json()["state"] == "held":
                await http.post("/api/v1/credits/release", json={"request_id": answer.json()["request_id"]})

        await try_each(changes, max(30, OTHER_REQUESTS // 40), charge)
        for name in NOBODY_SAYS:
            for value in (None, CHARGE["amount"]):
                answer = await http.post(f"/api/v1/credits/{operation}", json={"request_id": held_of(0), name: value})
                assert answer.status_code == 422, (name, answer.text)
    pool = await payer.pool()
    booked = await payer.rows("select coalesce(sum(charged_micros), 0)::bigint from ledger.attribution")
    assert (pool.used_micros, pool.held_micros) == (booked[0][0], 0)
    assert statuses[200] > 0
    assert sum(count for status, count in statuses.items() if status >= 400) > 5
    print(statuses)


def held_of(number: int) -> str:
    """The id of a hold that nobody placed."""
    return f"req_{number:032x}"


# -- what the document says


@pytest.mark.skipif(not IS_FULL, reason="takes a quarter of an hour: make promises")
async def test_every_answer_is_one_that_the_document_describes(payer: Payer, tmp_path: Path) -> None:
    """As schemathesis makes them of the document: wanted and unwanted values, alone and one after another."""
    config = tmp_path / "schemathesis.toml"
    config.write_text(f'[parameters]\norg = "{payer.org.slug}"\n')
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(config)),
        *("run", f"{payer.base_url}/api/openapi.json", "--checks", checks, "--max-examples", "1000"),
        *("--seed", str(SEED), "--no-color", "--continue-on-failure", "--generation-database", "none"),
        *("--header", f"Authorization: Bearer {(await payer.org.key(payer.org.admin)).text}"),
        cwd=tmp_path,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    said, _ = await process.communicate()
    tell(said.decode()[-600:])
    assert process.returncode == 0, said.decode()


# -- what a client library never sends


async def wired(base_url: str, data: bytes, *, seconds: float = 10) -> bytes:
    """Bytes as they are, and what comes back until the server is done with us or with them."""
    host, port = base_url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        async with asyncio.timeout(seconds):
            head = await reader.readuntil(b"\r\n\r\n")
            while head.startswith(b"HTTP/1.1 100"):
                head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"content-length: (\d+)", head)
            return head + (await reader.readexactly(int(length[1])) if length and not data.startswith(b"HEAD") else b"")
    except (ConnectionError, asyncio.IncompleteReadError) as error:
        return b"closed: " + repr(error).encode()
    finally:
        writer.transport.abort()


def request(
    payer: Payer,
    *lines: bytes,
    method: bytes = b"POST",
    path: bytes = CHAT.encode(),
    body: bytes | None = None,
    length: bool = True,
) -> bytes:
    body = json.dumps(CALL).encode() if body is None else body
    head = [method + b" " + path + b" HTTP/1.1", b"Host: x", b"Authorization: Bearer " + payer.key.encode(), *lines]
    if length:
        head.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(head) + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.1 ") else 0


@pytest.mark.parametrize(
    "method", ["HEAD", "OPTIONS", "GET", "PUT", "PATCH", "DELETE", "TRACE", "CONNECT", "QUERY", "FOO", "post"]
)
async def test_other_methods_are_refused_and_no_model_is_called(payer: Payer, method: str) -> None:
    for path in (CHAT, MESSAGES, "/v1/models", "/v1/nothing", "/api/v1/requests/x", "/sign-out", "/healthz"):
        if method == "GET" and path in ("/v1/models", "/api/v1/requests/x", "/healthz"):
            continue
        answer = await wired(payer.base_url, request(payer, method=method.encode(), path=path.encode()))
        assert status_of(answer) in (400, 404, 405), (path, answer[:300])
    assert await payer.rows("select count(*) from ledger.attribution") == [(0,)]


@pytest.mark.parametrize(
    "path",
    [
        *("//v1/chat/completions", "/v1//chat/completions", "/v1/../v1/chat/completions", "/v1/./chat/completions"),
        *("/v1/chat/completions/", "/v1/chat/completions/.", "/V1/chat/completions", "/v1/Chat/completions"),
        *(
            "/v1/chat/completions;x",
            "/v1/chat/completions%00",
            "/v1/chat/completions%0d%0aX:y",
            "/v1%2f%2fchat/completions",
        ),
        *(
            "/v1/chat/completions%20",
            "/v1/chat/completions%2f",
            "/v2/chat/completions",
            "/v1/images/edits",
            "/v1",
            "/v1/",
        ),
        *(
            "/v1/%ff",
            "/%ff",
            "*",
            "/v1/responses/x",
            "/v1/responses/",
            "/openai/v1/chat/completions",
            "/api/v1/chat/completions",
        ),
    ],
)
async def test_no_trick_with_the_path_reaches_a_provider_unmetered(payer: Payer, path: str) -> None:
    answer = await wired(payer.base_url, request(payer, path=path.encode()))
    assert status_of(answer) in (400, 404, 405), answer[:300]
    assert await payer.rows("select count(*) from ledger.attribution") == [(0,)]


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat%2Fcompletions",
        "/%76%31/chat/completions",
        "/v1/chat/completions?x=%00",
        "http://evil/v1/chat/completions",
    ],
)
async def test_other_spellings_of_the_same_path_are_metered_all_the_same(payer: Payer, path: str) -> None:
    answer = await wired(payer.base_url, request(payer, path=path.encode()))
    assert status_of(answer) == 200, answer[:300]
    assert await payer.rows("select count(*) from ledger.attribution") == [(1,)]


@pytest.mark.parametrize(
    ("lines", "statuses"),
    [
        ([b"Content-Encoding: gzip"], {200}),
        ([b"Content-Type: text/plain"], {200}),
        ([b"Content-Type: \xe9\xff"], {200}),
        ([b"Expect: 100-continue"], {200}),
        ([b"Expect: something else"], {200}),
        ([b"Authorization: Bearer other"], {401}),
        ([b"x-api-key: other"], {200}),
        ([b"Bursar-Organization: \xff"], {404}),
        ([b"Bursar-Organization: "], {404}),
        ([b"Bursar-Organization: " + b"a" * 60_000], {404}),
        ([b"Bursar-Conversation: x"], {400}),
        ([b"Bursar-Conversation: \xb2" + b"1" * 31], {400}),
        ([b"Idempotency-Key: "], {400}),
        ([b"Idempotency-Key: " + b"k" * 256], {400}),
        ([b"Idempotency-Key: \xe9\xff"], {200}),
        ([b"Idempotency-Key: a", b"Idempotency-Key: b"], {200}),
        ([b"Idempotency-Key: a\x01"], {400}),
        ([b"anthropic-version: \xe9"], {200}),
        ([b"OpenAI-Beta: a\tb"], {200}),
        ([b"Bursar-Demo: \xe9"], {400}),
        ([b"Bursar-Demo: fail=999"], {502}),
        ([b"Bursar-Demo: delay_ms=" + b"9" * 400], {400}),
        ([b"Bursar-Demo: output_tokens=" + b"9" * 12], {400}),
        ([b"Bursar-Demo: output_tokens=100000; tool_calls=100000"], {400}),
        ([b"Cookie: session_token=\xff; a=\xe9"], {200}),
        ([b"Host: y"], {200, 400}),
        ([b"X-Forwarded-For: \xff, 1", b"Forwarded: for=\xff"], {200}),
        ([b"Content-Length: 5"], {400}),
        ([b"Content-Length: -1"], {400}),
        ([b"Content-Length: 1e3"], {400}),
        ([b"Content-Length: " + b"9" * 30], {400, 413}),
        ([b"Transfer-Encoding: gzip"], {400}),
        ([b"Transfer-Encoding: chunked"], {400}),
        ([b" folded: header"], {400}),
        ([b"no colon"], {400}),
        ([b"Na me: x"], {400}),
        ([b"X-Nul: a\0b"], {400}),
        ([b"Upgrade: websocket", b"Connection: Upgrade", b"Sec-WebSocket-Version: 13"], {200, 400}),
        ([b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAMAAABk"], {200, 400}),
        ([b"X-Long: " + b"a" * 60_000], {200}),
        ([b"X-Long: " + b"a" * 400_000], {431}),
        ([b"X-%d: a" % n for n in range(40_000)], {431}),
    ],
)
async def test_no_header_breaks_a_call(payer: Payer, lines: list[bytes], statuses: set[int]) -> None:
    answer = await wired(payer.base_url, request(payer, *lines))
    if b"closed" in answer[:7]:
        assert statuses & {400, 413, 431}, answer
    else:
        assert status_of(answer) in statuses, answer[:400]
    rows = await payer.rows("select count(*) from ledger.attribution")
    assert rows == [(1 if status_of(answer) == 200 else 0,)]
    assert (await payer.pool()).held_micros == 0
    assert status_of(await wired(payer.base_url, request(payer))) == 200, "it still serves"


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\x1f\x8b\x08\x00" + b"\0" * 40, 400),
        (b"\xff\xfe{\0}\0", 400),
        (b"\xef\xbb\xbf" + json.dumps(CALL).encode(), 400),
        (json.dumps(CALL).encode() + b"garbage", 400),
        (json.dumps(CALL).encode() * 2, 400),
        (b"[" * 1_000_000, 400),
        (b'{"a":' * 200_000, 400),
        (b'{"model":"demo-1","max_tokens":5,"messages":[{"role":"user","content":"\\ud800"}]}', 400),
        (b'{"model":"demo-1","max_tokens":5,"messages":[{"role":"user","content":"\\u0000"}]}', 200),
        (b'{"model":"demo-1\\u0000","max_tokens":5,"messages":[]}', 404),
        (b'{"model":"demo-1\\n","max_tokens":5,"messages":[]}', 404),
        (b'{"model":"%b","max_tokens":5,"messages":[]}' % (b"m" * 1_000_000), 404),
        (b'{"model":"demo-1","max_tokens":5,"messages":[],"x":%b}' % (b"9" * 100_000), 200),
        (b'{"model":"demo-1","max_tokens":%b,"messages":[]}' % (b"9" * 100_000), 400),
        (b'{"model":"demo-1","max_tokens":1e400,"messages":[]}', 400),
        (b'{"model":"demo-1","max_tokens":NaN,"messages":[]}', 400),
        (b'{"model":"no","model":"demo-1","max_tokens":5,"messages":[]}', 200),
        (b'{"model":"demo-1","Model":"demo-1-long","max_tokens":5,"messages":[]}', 400),
        (b" " * 1_000_000 + json.dumps(CALL).encode(), 200),
        (b"", 400),
    ],
)
async def test_no_body_breaks_a_call(payer: Payer, body: bytes, status: int) -> None:
    answer = await wired(payer.base_url, request(payer, body=body))
    assert status_of(answer) == status, answer[:400]
    assert len(answer) < 3_000, "what was sent is not sent back"
    rows = await payer.rows("select count(*) from ledger.attribution")
    assert rows == [(1 if status == 200 else 0,)]
    assert (await payer.pool()).held_micros == 0


async def test_a_body_without_end_is_refused_by_size_and_holds_nothing(payer: Payer) -> None:
    for path, most in ((CHAT, 20 * 1024 * 1024), ("/sign-out", asgi.LARGEST_BODY)):
        host, port = payer.base_url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        head = request(payer, b"Transfer-Encoding: chunked", path=path.encode(), body=b"", length=False)
        writer.write(head)
        chunk = b"%x\r\n%b\r\n" % (100_000, b"a" * 100_000)
        answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        size = 0
        try:
            while not answer.done() and size < 2 * most:
                writer.write(chunk)
                await writer.drain()
                size += 100_000
        except ConnectionError:
            pass
        assert (await answer).startswith(b"HTTP/1.1 413"), path
        assert size <= most + 10_000_000
        writer.transport.abort()
    assert (await payer.pool()).held_micros == 0


async def test_a_head_without_end_is_cut_by_size_and_by_time(payer: Payer, monkeypatch: pytest.MonkeyPatch) -> None:
    host, port = payer.base_url.removeprefix("http://").split(":")
    for line in (b"X-A: " + b"a" * 100_000 + b"\r\n", b"a" * 100_000):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nX-B: b")
        sent = 0
        try:
            while sent < 50_000_000:
                writer.write(line)
                await writer.drain()
                sent += len(line)
        except ConnectionError:
            pass
        assert sent < 20_000_000, "it was read to its end"
        writer.transport.abort()
    monkeypatch.setattr(asgi, "HEAD_SECONDS", 0.2)
    for start in (b"", b"GET /healthz HT", b"GET /healthz HTTP/1.1\r\nHost: x\r\n"):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(start)
        assert await asyncio.wait_for(reader.read(), 5) == b"", "closed without an answer"
        writer.close()
    # A connection that is kept for its next request has the server's own, longer time.
    reader, writer = await asyncio.open_connection(host, int(port))
    for pause in (0.0, 0.5):
        await asyncio.sleep(pause)
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await reader.readuntil(b"}")).startswith(b"HTTP/1.1 200")
        await asyncio.sleep(0.4)
    writer.close()


@pytest.mark.parametrize("name", ["Sales\r\nX-Injected: yes", "Équipe Zürich 研究", "tab\tand\x7f", "x" * 3_000])
async def test_names_that_people_give_cannot_break_a_header(org: Org, base_url: str, name: str) -> None:
    """The limit that refuses is named in a header."""
    async with org.tenant() as conn:
        pool_id = await open_pool(
            conn, organization_id=org.organization_id, kind=PoolKind.SHARED, name=name, model_filter="demo-%"
        )
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=pool_id,
            amount_micros=Micros(1),
            source=GrantSource.PURCHASE,
            idempotency_key="one",
        )
    key = await org.key(org.admin)
    async with httpx2.AsyncClient(base_url=base_url, headers={"authorization": f"Bearer {key.text}"}) as http:
        for path in (CHAT, MESSAGES):
            answer = await http.post(path, json=CALL)
            assert answer.status_code == 402, answer.text
            assert "x-injected" not in answer.headers
            limit = answer.headers["bursar-binding-limit"]
            assert limit.isascii()
            assert limit.isprintable()
            assert len(limit) <= 200
            assert answer.json()["error"]["why"]["binding_limit"]["name"] == f"{name}: demo-% only"
