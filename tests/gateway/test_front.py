"""The whole path of a model request, as the official clients and plain HTTP see it."""

import asyncio
import json
from collections import Counter
from typing import Any
from uuid import UUID

import aiohttp
import anthropic
import httpx2
import openai
import pytest
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import Payer, fund

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.credits.limits import Scope, set_limit
from bursar.gateway import demo_provider
from bursar.gateway.provider_keys import add_provider_key
from bursar.gateway.providers import put_provider
from bursar.identity.addresses import Address
from bursar.identity.api_keys import create_api_key, revoke_api_key
from bursar.identity.memberships import add_membership, end_membership
from bursar.identity.roles import Role
from bursar.identity.roles import Scope as KeyScope
from bursar.money import Micros, format_credits
from bursar.sealing import Keyring

HELLO = [{"role": "user", "content": "hello there"}]
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": HELLO}
# 10 input tokens at 1 USD and 20 output tokens at 4 USD a million: 90 micro-dollars, which are 0.009 credits.
CALL_MICROS = Micros(9_000)


def streamed_charge(text: str) -> str:
    """The charge in the last comment of a stream."""
    return text.rsplit("bursar-charged=", 1)[1].split()[0]


async def settled(payer: Payer, rows: int) -> list[Any]:
    """The organization's attribution once it has so many rows and nothing is held."""
    for _ in range(200):
        found = await payer.rows("select charged_micros, flags, output_tokens, model, user_id from ledger.attribution")
        if len(found) >= rows and (await payer.pool()).held_micros == 0:
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(f"{len(found)} rows, held {(await payer.pool()).held_micros}")


async def test_headers_ledger_attribution_and_pool_agree_to_the_micro_credit(payer: Payer) -> None:
    client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1")
    answer = await client.chat.completions.with_raw_response.create(**CALL)
    completion = answer.parse()
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (10, 20)
    assert answer.headers["bursar-charged"] == format_credits(CALL_MICROS)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (CALL_MICROS, 0)
    assert answer.headers["bursar-available"] == format_credits(pool.available_micros)
    [row] = await payer.rows(
        "select charged_micros, provider_cost_nano_usd, input_tokens, output_tokens, api_key_id, user_id,"
        " position_micros, request_id from ledger.attribution"
    )
    assert row[:7] == (CALL_MICROS, 90_000, 10, 20, payer.api_key_id, payer.user_id, 0)
    assert answer.headers["x-request-id"] == f"req_{row[7].hex}"


async def test_the_official_openai_client_streams_and_its_own_usage_chunk_is_as_asked(payer: Payer) -> None:
    client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1")
    plain = await client.chat.completions.create(**CALL)
    stream = await client.chat.completions.create(**CALL, stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain.choices[0].message.content
    assert all(chunk.usage is None for chunk in chunks)
    asked = await client.chat.completions.create(**CALL, stream=True, stream_options={"include_usage": True})
    usages = [chunk.usage async for chunk in asked if chunk.usage is not None]
    assert [usage.completion_tokens for usage in usages] == [20]
    rows = await settled(payer, 3)
    assert [row[0] for row in rows] == [CALL_MICROS] * 3


async def test_the_official_anthropic_client_gets_plain_and_streamed_messages(payer: Payer) -> None:
    client = anthropic.AsyncAnthropic(api_key=payer.key, base_url=payer.base_url)
    body: dict[str, Any] = {"model": "demo-claude", "max_tokens": 20, "messages": HELLO}
    message = await client.messages.create(**body)
    async with client.messages.stream(**body) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == message.content[0].text  # type: ignore[union-attr]
    assert (final.usage.input_tokens, final.usage.output_tokens) == (message.usage.input_tokens, 20)
    rows = await settled(payer, 2)
    assert rows[0][0] == rows[1][0] > 0
    assert (await payer.pool()).used_micros == rows[0][0] + rows[1][0]


async def test_models_are_listed_as_both_vendors_clients_expect(payer: Payer) -> None:
    client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1")
    names = [model.id async for model in client.models.list()]
    assert {"demo-1", "demo-claude", "demo-embedding", "demo-image", "demo-speech", "demo-transcribe"} <= set(names)
    assert (await client.models.retrieve("demo-1")).id == "demo-1"
    with pytest.raises(openai.NotFoundError):
        await client.models.retrieve("no-such-model")


async def test_a_refusal_is_402_with_the_why_in_each_vendors_shape_and_is_not_retried(payer: Payer) -> None:
    client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1", max_retries=3)
    with pytest.raises(openai.APIStatusError) as refused:
        await client.chat.completions.create(**{**CALL, "max_tokens": 9_000_000})
    assert refused.value.status_code == 402
    assert refused.value.code == "pool_exhausted"
    assert refused.value.response.headers["x-should-retry"] == "false"
    assert refused.value.response.headers["bursar-binding-limit"] == "Shared credits"
    why = refused.value.response.json()["error"]["why"]
    assert why["available"] == {"amount": "1000", "unit": "credit"}
    assert [limit["binding"] for limit in why["limits"]].count(True) == 1
    claude = anthropic.AsyncAnthropic(api_key=payer.key, base_url=payer.base_url, max_retries=3)
    with pytest.raises(anthropic.APIStatusError) as refused_too:
        await claude.messages.create(model="demo-claude", max_tokens=9_000_000, messages=HELLO, timeout=20)  # type: ignore[arg-type]
    assert refused_too.value.status_code == 402
    body: Any = refused_too.value.body
    assert body["type"] == "error"
    assert body["error"]["why"]["code"] == "pool_exhausted"
    # One refusal each: neither client asked again.
    assert await payer.rows("select count(*) from credits.unbilled_requests where outcome = 'refused'") == [(2,)]
    assert (await payer.pool()).used_micros == 0


async def test_a_cap_of_the_key_refuses_and_names_itself(payer: Payer) -> None:
    async with payer.org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.KEY,
            scope_id=payer.api_key_id,
            amount=CALL_MICROS + 1,
        )
    assert (await payer.post(CALL)).status_code == 200
    refused = await payer.post(CALL)
    assert refused.status_code == 402
    error = refused.json()["error"]
    assert (error["code"], error["why"]["binding_limit"]["scope"]) == ("cap_reached", "key")
    assert refused.headers["bursar-resets-at"] == error["why"]["resets_at"]


async def test_of_500_calls_at_once_through_two_processes_exactly_those_that_fit_are_answered(
    org: Org, two_servers: list[str]
) -> None:
    await fund(org, Micros(100 * CALL_MICROS))
    key = await org.key(await org.member())
    payer = Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=two_servers[0])

    async def call(client: aiohttp.ClientSession, n: int) -> int:
        async with client.post(f"{two_servers[n % 2]}/v1/chat/completions", json=CALL) as answer:
            await answer.read()
            return answer.status

    headers = {"authorization": f"Bearer {key.text}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as client:
        statuses = Counter(await asyncio.gather(*(call(client, n) for n in range(500))))
    assert statuses == {200: 100, 402: 400}
    pool = await payer.pool()
    assert (pool.available_micros, pool.used_micros, pool.held_micros) == (0, 100 * CALL_MICROS, 0)
    assert await payer.rows("select count(*) from credits.holds") == [(0,)]


@pytest.mark.parametrize("directions", ["fail=500", "fail=429", "fail=400", "fail=529"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_provider_that_fails_is_passed_on_and_costs_nothing(
    payer: Payer, directions: str, stream: bool
) -> None:
    answer = await payer.post({**CALL, "stream": stream}, bursar_demo=directions)
    assert answer.status_code == int(directions.removeprefix("fail="))
    assert answer.headers["bursar-charged"] == "0"
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)
    assert await payer.rows("select outcome from credits.unbilled_requests") == [("released",)]


async def test_a_plain_answer_that_breaks_off_costs_nothing(payer: Payer) -> None:
    answer = await payer.post(CALL, bursar_demo="break_after=1")
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "provider_broke_off")
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)


async def test_a_stream_that_breaks_off_is_charged_what_was_seen_and_ends_with_an_error(payer: Payer) -> None:
    answer = await payer.post({**CALL, "stream": True}, bursar_demo="break_after=3")
    assert answer.status_code == 200
    assert "provider_broke_off" in answer.text
    [row] = await settled(payer, 1)
    assert 0 < row[0] < CALL_MICROS
    assert row[1] & 4, "marked estimated"
    assert streamed_charge(answer.text) == format_credits(Micros(row[0]))


@pytest.mark.parametrize("stream", [False, True])
async def test_missing_usage_is_counted_by_us_and_marked(payer: Payer, stream: bool) -> None:
    answer = await payer.post({**CALL, "stream": stream}, bursar_demo="usage=missing")
    assert answer.status_code == 200
    [row] = await settled(payer, 1)
    assert row[0] == CALL_MICROS, "the demo provider counts by our own rule"
    assert row[1] & 4


async def test_a_client_that_hangs_up_in_mid_stream_pays_for_what_was_streamed(payer: Payer) -> None:
    headers = {"authorization": f"Bearer {payer.key}", "bursar-demo": "piece_ms=50; output_tokens=200"}
    async with aiohttp.ClientSession() as client:
        answer = await client.post(
            f"{payer.base_url}/v1/chat/completions", json={**CALL, "stream": True, "max_tokens": 200}, headers=headers
        )
        for _ in range(5):
            await answer.content.readline()
        answer.close()
    [row] = await settled(payer, 1)
    assert 1_000 < row[0] < 81_000, "more than its input, less than all of it"
    assert row[1] & 4


async def test_a_stream_outgrows_its_hold_and_is_ended_where_a_limit_stops_it(org: Org, base_url: str) -> None:
    # Room for the hold of 1,000 output tokens and little more, while the provider puts out 20,000.
    await fund(org, Micros(450_000))
    key = await org.key(await org.member())
    payer = Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)
    body = {"model": "demo-1", "stream": True, "messages": HELLO}
    answer = await payer.post(body, bursar_demo="output_tokens=20000; piece_ms=1")
    assert answer.status_code == 200
    assert "pool_exhausted" in answer.text
    [row] = await settled(payer, 1)
    assert row[2] < 20_000
    assert row[0] > 400_000


async def test_a_call_without_a_limit_is_held_and_charged_by_its_true_usage(payer: Payer) -> None:
    answer = await payer.post({"model": "demo-1", "messages": HELLO}, bursar_demo="output_tokens=3000")
    assert answer.status_code == 200
    [row] = await settled(payer, 1)
    assert row[0] == 1_000 + 3_000 * 400


async def test_paths_that_are_not_metered_are_never_passed_through(payer: Payer) -> None:
    for path in (
        "/v1/images/edits",
        "/v1/files/x/parts",
        "/v1/batches/x/results",
        "/v1/chat/completions/x",
        "/v1",
        "/v1/fine_tuning/jobs",
    ):
        answer = await payer.post(CALL, path=path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_metered")
    claude = await payer.post({}, path="/v1/messages/batches/x/content", anthropic_version="2023-06-01")
    assert (claude.status_code, claude.json()["type"]) == (404, "error")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 400, "unreadable_request"),
        (b"{", 400, "unreadable_request"),
        (b"[]", 400, "unreadable_request"),
        (b'{"model": 1}', 400, "unreadable_request"),
        (b'{"model": "demo-1"}', 400, "unreadable_request"),
        (b'{"model": "demo-1", "max_tokens": -1, "messages": []}', 400, "unreadable_request"),
        (b'{"model": "demo-1", "max_tokens": "9", "messages": []}', 400, "unreadable_request"),
        (b'{"model": "no-such-model", "messages": []}', 404, "model_not_found"),
        (b"[" * 100_000, 400, "unreadable_request"),
        (b'{"model": "demo-1", "messages": ' + b"[" * 5_000 + b"]" * 5_000 + b"}", 400, "unreadable_request"),
        (b'{"model": "\xff"}', 400, "unreadable_request"),
    ],
)
async def test_wrong_input_gets_a_named_code_and_changes_nothing(
    payer: Payer, body: bytes, status: int, code: str
) -> None:
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as client:
        answer = await client.post(
            "/v1/chat/completions", content=body, headers={"authorization": f"Bearer {payer.key}"}
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)


async def test_a_missing_a_wrong_and_a_revoked_key_are_401(payer: Payer) -> None:
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as client:
        assert (await client.post("/v1/chat/completions", json=CALL)).json()["error"]["code"] == "missing_api_key"
        other = payer.key[:-1] + ("y" if payer.key.endswith("x") else "x")
        wrong = await client.post("/v1/chat/completions", json=CALL, headers={"authorization": f"Bearer {other}"})
        assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")
    assert (await payer.post(CALL)).status_code == 200
    async with payer.org.tenant() as conn:
        await revoke_api_key(conn, organization_id=payer.org.organization_id, api_key_id=payer.api_key_id, by=OPERATOR)
    # The key is still in the gateway's cache; the money functions refuse it at once.
    answer = await payer.post(CALL)
    assert (answer.status_code, (await payer.pool()).used_micros) == (401, CALL_MICROS)


async def test_a_member_who_left_spends_nothing_from_that_moment(payer: Payer) -> None:
    assert (await payer.post(CALL)).status_code == 200
    async with payer.org.tenant() as conn:
        await end_membership(conn, organization_id=payer.org.organization_id, user_id=payer.user_id, by=OPERATOR)
    assert (await payer.post(CALL)).status_code in (401, 403)
    assert (await payer.pool()).used_micros == CALL_MICROS


async def test_an_idempotency_key_is_answered_once(payer: Payer) -> None:
    first = await payer.post(CALL, idempotency_key="once")
    again = await payer.post(CALL, idempotency_key="once")
    other = await payer.post({**CALL, "max_tokens": 21}, idempotency_key="once")
    assert first.status_code == 200
    assert (again.status_code, again.json()["error"]["code"]) == (422, "already_answered")
    assert again.headers["bursar-original-request"] == first.headers["x-request-id"]
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
    assert (await payer.pool()).used_micros == CALL_MICROS


async def test_ten_twins_of_one_idempotency_key_are_one_call(payer: Payer) -> None:
    answers = await asyncio.gather(
        *(payer.post(CALL, idempotency_key="twins", bursar_demo="delay_ms=200") for _ in range(10))
    )
    assert Counter(answer.status_code for answer in answers) == {200: 1, 422: 9}
    assert (await payer.pool()).used_micros == CALL_MICROS


async def test_the_key_of_a_failed_call_may_be_used_again(payer: Payer) -> None:
    assert (await payer.post(CALL, idempotency_key="retry", bursar_demo="fail=500")).status_code == 500
    assert (await payer.post(CALL, idempotency_key="retry")).status_code == 200
    assert (await payer.pool()).used_micros == CALL_MICROS


async def test_a_customers_own_provider_key_costs_no_credits_and_is_tracked(payer: Payer, priced: db.Database) -> None:
    async with demo_provider.running() as address:
        async with priced.platform() as conn:
            await put_provider(conn, name="groq", base_url=address, by=OPERATOR)
        async with payer.org.tenant() as conn:
            own = await add_provider_key(
                conn,
                Keyring(priced.settings.master_key),
                organization_id=payer.org.organization_id,
                provider="groq",
                secret="sk-the-customers-own-key",
                by=OPERATOR,
            )
        for _ in range(80):  # the gateway's routes are at most five seconds old
            answer = await payer.post({**CALL, "model": "groq/llama-3.3-70b-versatile"})
            if answer.status_code not in (404, 503):
                break
            await asyncio.sleep(0.1)
    assert (answer.status_code, answer.headers["bursar-charged"]) == (200, "0")
    [row] = await payer.rows(
        "select charged_micros, provider_cost_nano_usd, customer_cost_nano_usd, flags & 2, provider_key_id,"
        " input_tokens from ledger.attribution"
    )
    assert row[:2] == (0, 0)
    assert row[2] > 0
    assert row[3:] == (2, own.provider_key_id, 10)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)


async def test_people_of_no_company_spend_individual_credits_and_of_several_the_chosen(
    make_org: MakeOrg, base_url: str, database: db.Database
) -> None:
    first, second = await make_org(), await make_org()
    email = f"{first.slug}@several.example"
    person = await first.user(email)
    home = Org(database=database, organization_id=person.home_organization_id, slug="", admin=person.user_id)
    async with home.tenant() as conn:
        key = await create_api_key(
            conn,
            organization_id=home.organization_id,
            user_id=person.user_id,
            name="Personal",
            by=OPERATOR,
            scopes=tuple(KeyScope),
        )
    for org in (home, first, second):
        await fund(org, Micros(1_000_000))
    payers = {
        org.organization_id: Payer(
            org=org, user_id=person.user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url
        )
        for org in (home, first, second)
    }

    async def used() -> list[int]:
        return [(await payers[org.organization_id].pool()).used_micros // CALL_MICROS for org in (home, first, second)]

    payer = payers[home.organization_id]
    assert (await payer.post(CALL)).status_code == 200
    assert await used() == [1, 0, 0]
    for org in (first, second):
        await _join(org, person.user_id, email)
    await asyncio.sleep(5.2)  # the gateway knows where a key acts for at most five seconds
    assert (await payer.post(CALL)).status_code == 200
    assert await used() == [1, 1, 0], "the company joined first"
    assert (await payer.post(CALL, bursar_organization=second.slug)).status_code == 200
    assert await used() == [1, 1, 1], "the chosen one"
    assert (await payer.post(CALL, bursar_organization="somebody-elses")).status_code == 404


async def _join(org: Org, user_id: UUID, email: str) -> None:
    async with org.tenant() as conn:
        await add_membership(
            conn,
            organization_id=org.organization_id,
            user_id=user_id,
            address=Address.of(email, org.database.settings),
            display_name="Dana Test",
            roles=[Role.MEMBER],
            by=OPERATOR,
        )


async def test_a_foreign_key_reads_nothing_of_a_request(payer: Payer, make_org: MakeOrg) -> None:
    answer = await payer.post(CALL)
    request_id = answer.headers["x-request-id"]
    stranger = await make_org()
    key = await stranger.key(stranger.admin)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as client:
        own = await client.get(f"/api/v1/requests/{request_id}", headers={"authorization": f"Bearer {payer.key}"})
        foreign = await client.get(f"/api/v1/requests/{request_id}", headers={"authorization": f"Bearer {key.text}"})
        unknown = await client.get(f"/api/v1/requests/req_{'0' * 32}", headers={"authorization": f"Bearer {key.text}"})
    assert own.status_code == 200
    assert own.json()["charged"] == {"amount": "0.009", "unit": "credit"}
    assert own.json()["grants"][0]["drawn"] == {"amount": "0.009", "unit": "credit"}
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    differs = {"instance": "", "request_id": ""}
    assert {**foreign.json(), **differs} == {**unknown.json(), **differs}


async def test_the_demo_directions_of_a_stream_do_not_reach_the_answer(payer: Payer) -> None:
    answer = await payer.post({**CALL, "stream": True})
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert all("usage" not in event or json.loads(event)["usage"] is None for event in events[:-1])


async def test_asked_about_a_key_alone_it_answers_for_the_keys_owner(payer: Payer) -> None:
    admin = await payer.org.key(payer.org.admin)
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as client:
        path = f"/api/v1/organizations/{payer.org.slug}/why"
        answer = await client.get(
            path,
            params={"key": f"key_{payer.api_key_id.hex}", "model": "demo-1"},
            headers={"authorization": f"Bearer {admin.text}"},
        )
        other = await client.get(
            path, params={"user": f"usr_{payer.org.admin.hex}"}, headers={"authorization": f"Bearer {payer.key}"}
        )
    assert (answer.status_code, answer.json()["allowed"]) == (200, True)
    assert other.status_code == 403, "a member asks for themselves only"


async def test_a_role_that_may_not_use_models_spends_nothing(payer: Payer) -> None:
    key = await payer.org.key(await payer.org.member(Role.AUDITOR))
    async with httpx2.AsyncClient(base_url=payer.base_url, timeout=30) as client:
        answer = await client.post(
            "/v1/chat/completions",
            json={"model": "demo-1", "messages": [{"role": "user", "content": "hi"}]},
            headers={"authorization": f"Bearer {key.text}"},
        )
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "models_not_permitted")
    assert (await payer.pool()).used_micros == 0
