"""Programs that call models themselves: authorize, extend, settle, release and deduct over HTTP."""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import aiohttp
import httpx2
import pytest
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import base_url, fund, payer, priced, two_servers

from bursar.clock import uuid7
from bursar.credits import jobs
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.limits import Scope, set_limit
from bursar.credits.pools import Pool, list_pools, pool_for
from bursar.identity.roles import Role
from bursar.identity.roles import Scope as KeyScope
from bursar.money import Micros

__all__ = ["base_url", "payer", "priced", "two_servers"]

ONE = {"amount": {"amount": "1", "unit": "credit"}}
# 10 input tokens at 1 USD and 20 output tokens at 4 USD a million: 0.009 credits.
USED = {"input_tokens": 10, "output_tokens": 20}
DEMO = {"provider": "demo", "model": "demo-1"}


def worth(text: str, unit: str = "credit") -> dict[str, Any]:
    """An amount as the API writes it."""
    return {"amount": text, "unit": unit}


def without_available(answer: dict[str, Any]) -> dict[str, Any]:
    """What stays the same however often a command is sent: what is available is as of each answer."""
    return {name: value for name, value in answer.items() if name != "available"}


@dataclass(frozen=True, slots=True)
class Program:
    """A service key's program and its organization."""

    org: Org
    key: str
    base_url: str

    async def ask(self, operation: str, body: Any, *, key: str | None = None, **headers: str) -> httpx2.Response:
        """One request. key: whose, its own when None."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx2.AsyncClient(base_url=self.base_url, timeout=30) as client:
            return await client.post(
                f"/api/v1/credits/{operation}",
                json=body,
                headers={"authorization": f"Bearer {key or self.key}", **names},
            )

    async def done(self, operation: str, body: Any, **headers: str) -> dict[str, Any]:
        """The answer of a request that succeeds."""
        answer = await self.ask(operation, body, **headers)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-request-id"].startswith("req_")
        document: dict[str, Any] = answer.json()
        return document

    async def pool(self) -> Pool:
        async with self.org.tenant() as conn:
            return (await list_pools(conn, organization_id=self.org.organization_id))[0]

    async def rows(self, sql: str) -> list[Any]:
        async with self.org.tenant() as conn:
            return await (await conn.execute(sql)).fetchall()  # type: ignore[arg-type]


@pytest.fixture
async def program(org: Org, base_url: str) -> Program:
    await fund(org, Micros(1_000_000_000))
    return Program(org, (await org.key()).text, base_url)


async def test_a_hold_is_settled_at_what_was_used_and_the_rest_is_free_again(program: Program) -> None:
    held = await program.done("authorize", {**ONE, **DEMO})
    assert (held["state"], held["held"], held["charged"]) == ("held", worth("1"), worth("0"))
    assert held["available"] == worth("999")
    pool = await program.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 1_000_000)
    charged = await program.done("settle", {"request_id": held["request_id"], "amount": worth("0.25")})
    assert charged == {
        "request_id": held["request_id"],
        "state": "charged",
        "held": worth("0"),
        "charged": worth("0.25"),
        "available": worth("999.75"),
    }
    pool = await program.pool()
    assert (pool.used_micros, pool.held_micros) == (250_000, 0)
    [row] = await program.rows("select charged_micros, hold_micros, provider, model, flags from ledger.attribution")
    assert row == (250_000, 1_000_000, "demo", "demo-1", 4096)
    again = await program.done("settle", {"request_id": held["request_id"], "amount": worth("7")})
    assert without_available(again) == without_available(charged)
    assert await program.rows("select count(*) from ledger.attribution") == [(1,)]


async def test_usage_is_priced_by_the_price_book_and_held_rounded_up(program: Program) -> None:
    held = await program.done("authorize", {**DEMO, "usage": {"input_tokens": 10, "output_tokens": 2000}})
    assert held["held"] == worth("0.801")
    charged = await program.done("settle", {"request_id": held["request_id"], "usage": USED})
    assert charged["charged"] == worth("0.009")
    deducted = await program.done("deduct", {**DEMO, "usage": USED, "conversation_id": f"conv_{uuid7().hex}"})
    assert (deducted["state"], deducted["charged"]) == ("charged", worth("0.009"))
    rows = await program.rows(
        "select charged_micros, provider_cost_nano_usd, input_tokens, output_tokens, requests,"
        " price_version_id is not null, conversation_id is not null from ledger.attribution order by booked_at"
    )
    assert rows == [(9000, 90_000, 10, 20, 1, True, False), (9000, 90_000, 10, 20, 1, True, True)]


async def test_the_price_is_that_of_the_hold_also_for_a_process_that_did_not_place_it(
    program: Program, two_servers: list[str]
) -> None:
    here, there = (Program(program.org, program.key, url) for url in two_servers)
    held = await here.done("authorize", {**DEMO, "usage": {"output_tokens": 100}})
    charged = await there.done("settle", {"request_id": held["request_id"], "usage": USED})
    assert charged["charged"] == worth("0.009")
    again = await here.done("settle", {"request_id": held["request_id"], "usage": USED})
    assert without_available(again) == without_available(charged)
    [row] = await program.rows("select provider, model, price_version_id is not null from ledger.attribution")
    assert row == ("demo", "demo-1", True)


async def test_a_programs_feature_is_kept_and_paid_by_its_pool_also_when_it_settles_late_elsewhere(
    program: Program, two_servers: list[str]
) -> None:
    here, there = (Program(program.org, program.key, url) for url in two_servers)
    async with program.org.tenant() as conn:
        pool_id = await pool_for(conn, organization_id=program.org.organization_id, model_filter="#support-%")
        await add_grant(
            conn,
            organization_id=program.org.organization_id,
            pool_id=pool_id,
            amount_micros=Micros(3_000_000),
            source=GrantSource.PURCHASE,
            idempotency_key="for support",
        )
    for feature, amount in (("support-bot", "1"), ("chat", "2"), (None, "4")):
        body = {"amount": worth(amount)} | ({} if feature is None else {"feature": feature})
        assert (await here.done("deduct", body))["charged"] == worth(amount)
    held = await here.done("authorize", {**ONE, "feature": "support-bot"})
    await here.done("release", {"request_id": held["request_id"]})
    await there.done("settle", {"request_id": held["request_id"], "amount": worth("1")})
    rows = await program.rows(
        "select feature, charged_micros, pool_id from ledger.attribution order by charged_micros, booked_at"
    )
    assert [row[:2] for row in rows] == [
        ("support-bot", 1_000_000), ("support-bot", 1_000_000), ("chat", 2_000_000), (None, 4_000_000)
    ]  # fmt: skip
    assert [row[2] == pool_id for row in rows] == [True, True, False, False]


@pytest.mark.parametrize("feature", ["", "#images", "Images", "a b", "x" * 64])
async def test_a_feature_that_is_no_word_is_refused(program: Program, feature: str) -> None:
    refused = await program.ask("deduct", {**ONE, "feature": feature})
    assert refused.status_code == 422
    assert refused.json()["errors"][0]["pointer"] == "#/feature"


async def test_an_amount_beside_usage_is_charged_as_it_is_and_the_usage_is_kept(program: Program) -> None:
    body = {**ONE, "usage": {"output_tokens": 7}, "provider_cost": {"amount": "0.002", "unit": "USD"}, "model": "ours"}
    assert (await program.done("deduct", body))["charged"] == worth("1")
    [row] = await program.rows(
        "select charged_micros, provider_cost_nano_usd, output_tokens, model from ledger.attribution"
    )
    assert row == (1_000_000, 2_000_000, 7, "ours")
    assert (await program.done("deduct", {"amount": worth("250000", "micro")}))["charged"] == worth("0.25")


async def test_a_settle_above_the_hold_is_charged_in_full_and_blocks_what_comes_after(org: Org, base_url: str) -> None:
    await fund(org, Micros(2_000_000))
    program = Program(org, (await org.key()).text, base_url)
    held = await program.done("authorize", ONE)
    charged = await program.done("settle", {"request_id": held["request_id"], "amount": worth("5")})
    assert (charged["charged"], charged["available"]) == (worth("5"), worth("0"))
    pool = await program.pool()
    assert (pool.used_micros, pool.excess_micros) == (5_000_000, 3_000_000)
    refused = await program.ask("deduct", {"amount": worth("0.1")})
    assert (refused.status_code, refused.json()["code"]) == (402, "pool_exhausted")


async def test_a_refusal_is_402_with_the_why_and_is_not_to_be_repeated(program: Program) -> None:
    refused = await program.ask("authorize", {"amount": worth("1000.000001")})
    assert refused.status_code == 402
    assert refused.headers["content-type"] == "application/problem+json"
    assert refused.headers["x-should-retry"] == "false"
    assert refused.headers["bursar-binding-limit"] == "Shared credits"
    problem = refused.json()
    assert (problem["code"], problem["request_id"]) == ("pool_exhausted", refused.headers["x-request-id"])
    assert problem["why"]["available"] == worth("1000")
    assert problem["why"]["request_url"] == f"/o/{program.org.slug}"
    assert await program.rows("select outcome from credits.unbilled_requests") == [("refused",)]
    # What was refused cannot be settled afterwards.
    answer = await program.ask("settle", {"request_id": problem["request_id"], "amount": worth("1")})
    assert (answer.status_code, answer.json()["code"]) == (404, "hold_not_found")


async def test_a_released_hold_costs_nothing_and_releasing_again_answers_the_same(program: Program) -> None:
    held = await program.done("authorize", ONE)
    released = await program.done("release", {"request_id": held["request_id"]})
    assert (released["state"], released["held"], released["charged"]) == ("released", worth("0"), worth("0"))
    again = await program.done("release", {"request_id": held["request_id"]})
    assert (again["state"], again["request_id"]) == ("released", held["request_id"])
    pool = await program.pool()
    assert (pool.used_micros, pool.held_micros) == (0, 0)
    late = await program.ask("extend", {"request_id": held["request_id"]})
    assert (late.status_code, late.json()["code"]) == (409, "hold_ended")


async def test_what_was_charged_is_not_released(program: Program) -> None:
    held = await program.done("authorize", ONE)
    await program.done("settle", {"request_id": held["request_id"], **ONE})
    answer = await program.ask("release", {"request_id": held["request_id"]})
    assert (answer.status_code, answer.json()["code"]) == (409, "hold_ended")
    assert (await program.pool()).used_micros == 1_000_000


async def test_extend_holds_more_until_there_is_no_room_and_keeps_what_was_used_so_far(org: Org, base_url: str) -> None:
    await fund(org, Micros(3_000_000))
    program = Program(org, (await org.key()).text, base_url)
    held = await program.done("authorize", {**ONE, **DEMO, "stream": True})
    request_id = held["request_id"]
    more = await program.done(
        "extend", {"request_id": request_id, "amount": worth("2"), "so_far": {"amount": worth("0.8")}}
    )
    assert (more["state"], more["held"], more["available"]) == ("held", worth("2"), worth("1"))
    unchanged = await program.done("extend", {"request_id": request_id, "lease_seconds": 3600})
    assert unchanged["held"] == worth("2")
    refused = await program.ask(
        "extend", {"request_id": request_id, "amount": worth("3.5"), "so_far": {"amount": worth("1.9")}}
    )
    assert (refused.status_code, refused.json()["code"]) == (402, "pool_exhausted")
    [row] = await program.rows(
        "select amount_micros, progress_micros, is_sent, flags,"
        " extract(epoch from lease_expires_at - placed_at) > 3500 from credits.holds"
    )
    assert row == (2_000_000, 1_900_000, True, 4096 | 8, True)
    assert (await program.done("settle", {"request_id": request_id, "usage": USED}))["charged"] == worth("0.009")


@pytest.mark.parametrize(
    ("fields", "state", "charged"),
    [
        ({}, "expired", 0),
        ({"sent": True}, "charged", 1_000_000),
        ({"sent": True, "stream": True}, "charged", 300_000),
    ],
)
async def test_a_hold_whose_program_died_ends_by_itself(
    program: Program, fields: dict[str, Any], state: str, charged: int
) -> None:
    """Never sent: free. Sent: its whole amount, or of a stream what it had told."""
    held = await program.done("authorize", {**ONE, **DEMO, **fields, "lease_seconds": 1})
    if "stream" in fields:
        so_far = {"amount": worth("0.3")}
        await program.done("extend", {"request_id": held["request_id"], "so_far": so_far, "lease_seconds": 1})
    for _ in range(100):
        await jobs.expire_holds(program.org.database)
        if await program.rows("select count(*) from credits.holds") == [(0,)]:
            break
        await asyncio.sleep(0.1)
    pool = await program.pool()
    assert (pool.used_micros, pool.held_micros) == (charged, 0)
    # A late settle corrects what was estimated, and charges what had been let go.
    late = await program.done("settle", {"request_id": held["request_id"], "amount": worth("0.5")})
    assert late["charged"] == worth("0.5")
    assert (await program.pool()).used_micros == 500_000
    again = await program.done("settle", {"request_id": held["request_id"], "amount": worth("0.5")})
    assert again["charged"] == worth("0.5")
    assert (await program.pool()).used_micros == 500_000


async def test_ten_times_the_same_command_at_once_is_one_effect_and_one_answer(
    program: Program, two_servers: list[str]
) -> None:
    programs = [Program(program.org, program.key, url) for url in two_servers]

    async def ten(operation: str, body: Any, key: str) -> dict[str, Any]:
        answers = await asyncio.gather(*(programs[n % 2].done(operation, body, idempotency_key=key) for n in range(10)))
        told = [without_available(answer) for answer in answers]
        assert all(each == told[0] for each in told), told
        return told[0]

    assert (await ten("deduct", ONE, "a deduction"))["charged"] == worth("1")
    held = await ten("authorize", {**ONE, **DEMO}, "a hold")
    assert (await ten("extend", {"request_id": held["request_id"], "amount": worth("2")}, "more"))["held"] == worth("2")
    assert (await program.pool()).held_micros == 2_000_000
    settle = {"request_id": held["request_id"], "amount": worth("1.5")}
    assert (await ten("settle", settle, "its end"))["charged"] == worth("1.5")
    pool = await program.pool()
    assert (pool.used_micros, pool.held_micros) == (2_500_000, 0)
    assert await program.rows("select count(*) from ledger.attribution") == [(2,)]
    other = await program.ask("deduct", {"amount": worth("2")}, idempotency_key="a deduction")
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_refusal_is_kept_under_its_key_and_a_released_hold_leaves_its_key_free(org: Org, base_url: str) -> None:
    program = Program(org, (await org.key()).text, base_url)
    refused = await program.ask("deduct", ONE, idempotency_key="k")
    assert refused.status_code == 402
    await fund(org, Micros(5_000_000))
    still = await program.ask("deduct", ONE, idempotency_key="k")
    assert (still.status_code, still.json()["code"]) == (402, refused.json()["code"])
    first = await program.done("authorize", ONE, idempotency_key="h")
    await program.done("release", {"request_id": first["request_id"]}, idempotency_key="of no effect")
    second = await program.done("authorize", ONE, idempotency_key="h")
    assert second["request_id"] != first["request_id"]
    assert (await program.pool()).held_micros == 1_000_000


async def test_of_200_deductions_at_once_through_two_processes_exactly_those_that_fit_are_charged(
    org: Org, two_servers: list[str]
) -> None:
    await fund(org, Micros(100_000_000))
    key = (await org.key()).text

    async def ask(client: aiohttp.ClientSession, n: int) -> int:
        body = {**ONE, **DEMO}
        url = f"{two_servers[n % 2]}/api/v1/credits/"
        if n % 4 < 2:
            async with client.post(url + "deduct", json=body) as answer:
                return answer.status
        async with client.post(url + "authorize", json=body) as answer:
            status, document = answer.status, await answer.json(content_type=None)
        if status == 200:
            settle = {"request_id": document["request_id"], **ONE}
            async with client.post(f"{two_servers[(n + 1) % 2]}/api/v1/credits/settle", json=settle) as answer:
                status = answer.status
        return status

    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as client:
        statuses = Counter(await asyncio.gather(*(ask(client, n) for n in range(200))))
    assert statuses == {200: 100, 402: 100}
    pool = await Program(org, key, two_servers[0]).pool()
    assert (pool.available_micros, pool.used_micros, pool.held_micros) == (0, 100_000_000, 0)


async def test_foreign_unknown_and_metered_holds_answer_alike(
    program: Program, make_org: MakeOrg, base_url: str
) -> None:
    """What the gateway holds is metered: nobody settles it at another price."""
    foreign = await make_org()
    await fund(foreign, Micros(10_000_000))
    stranger = Program(foreign, (await foreign.key()).text, base_url)
    held = await program.done("authorize", ONE)
    settled = (await program.done("deduct", ONE))["request_id"]
    key = await program.org.key(await program.org.member())
    call = {"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello there"}]}
    async with httpx2.AsyncClient(base_url=base_url, timeout=30) as client:
        metered = await client.post("/v1/chat/completions", json=call, headers={"authorization": f"Bearer {key.text}"})
        slow = asyncio.create_task(
            client.post(
                "/v1/chat/completions",
                json=call,
                headers={"authorization": f"Bearer {key.text}", "bursar-demo": "delay_ms=1500"},
            )
        )
        running: list[Any] = []
        while not running:
            await asyncio.sleep(0.02)
            running = await program.rows("select request_id from credits.holds where flags & 4096 = 0")
        theirs = [f"req_{running[0][0].hex}", metered.headers["x-request-id"]]
        asked = [(stranger, each) for each in (held["request_id"], settled, *theirs)]
        asked += [(program, each) for each in (*theirs, f"req_{uuid7().hex}", f"req_{UUID(int=0).hex}")]
        for who, request_id in asked:
            for operation, body in (("settle", {"amount": worth("0")}), ("release", {}), ("extend", {})):
                answer = await who.ask(operation, {"request_id": request_id, **body})
                document = answer.json()
                assert document.pop("request_id") == answer.headers["x-request-id"]
                assert (answer.status_code, document) == (
                    404,
                    {
                        "type": "/problems/hold_not_found",
                        "title": "No such hold",
                        "status": 404,
                        "code": "hold_not_found",
                    },
                ), (operation, request_id)
        assert (await slow).headers["bursar-charged"] == "0.009"
    assert (await program.pool()).held_micros == 1_000_000


async def test_who_may_charge(program: Program) -> None:
    """Administrators for themselves and service keys for any member; nobody else, and no key without the scope."""
    org = program.org
    member, admin = await org.member(), org.admin
    for key in (
        await org.key(member),
        await org.key(await org.member(Role.FINANCE)),
        await org.key(admin, scopes=[KeyScope.INFERENCE]),
        await org.key(scopes=[KeyScope.READ]),
    ):
        answer = await program.ask("deduct", ONE, key=key.text)
        assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted")
    own = await org.key(admin)
    for user in (None, f"usr_{admin.hex}"):
        assert (await program.ask("deduct", {**ONE, "user_id": user}, key=own.text)).status_code == 200
    refused = await program.ask("deduct", {**ONE, "user_id": f"usr_{member.hex}"}, key=own.text)
    assert (refused.status_code, refused.json()["code"]) == (403, "not_for_others")
    assert (await program.ask("deduct", {**ONE, "user_id": f"usr_{member.hex}"})).status_code == 200
    users = await program.rows("select user_id from ledger.attribution order by booked_at")
    assert [row[0] for row in users] == [admin, admin, member]


async def test_a_named_members_own_caps_count_and_strangers_leave_no_trace(program: Program, make_org: MakeOrg) -> None:
    org = program.org
    member = await org.member()
    async with org.tenant() as conn:
        await set_limit(conn, organization_id=org.organization_id, scope=Scope.USER, scope_id=member, amount=1_500_000)
    assert (await program.ask("deduct", {**ONE, "user_id": f"usr_{member.hex}"})).status_code == 200
    refused = await program.ask("deduct", {**ONE, "user_id": f"usr_{member.hex}"})
    assert (refused.status_code, refused.json()["code"]) == (402, "cap_reached")
    assert refused.json()["why"]["binding_limit"]["scope"] == "user"
    before = await program.rows("select count(*) from credits.chains")
    stranger = await (await make_org()).member()
    answers = [await program.ask("deduct", {**ONE, "user_id": f"usr_{each.hex}"}) for each in (stranger, uuid7())]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.json()["code"] for answer in answers}) == 1
    assert await program.rows("select count(*) from credits.chains") == before


@pytest.mark.parametrize(
    ("operation", "body", "status", "pointer"),
    [
        ("authorize", {}, 422, "#"),
        ("authorize", [], 422, "#"),
        ("authorize", {"amount": "1"}, 422, "#/amount"),
        ("authorize", {"amount": {"amount": 1, "unit": "credit"}}, 422, "#/amount/amount"),
        ("authorize", {"amount": worth("-1")}, 422, "#/amount"),
        ("authorize", {"amount": worth("0.0000001")}, 422, "#/amount"),
        ("authorize", {"amount": worth("1000000000.000001")}, 422, "#/amount"),
        ("authorize", {"amount": worth("1.5", "micro")}, 422, "#/amount"),
        ("authorize", {"amount": worth("٣", "micro")}, 422, "#/amount"),
        ("authorize", {"amount": worth("1", "EUR")}, 422, "#/amount/unit"),
        ("authorize", {"usage": USED}, 422, "#/usage"),
        ("authorize", {**DEMO, "usage": {"tokens": 1}}, 422, "#/usage"),
        ("authorize", {**DEMO, "usage": {"input_tokens": -1}}, 422, "#/usage"),
        ("authorize", {**DEMO, "usage": {"input_tokens": 2**40}}, 422, "#/usage"),
        ("authorize", {**DEMO, "usage": {"reasoning_tokens": 1}}, 422, "#/usage"),
        ("authorize", {**DEMO, "usage": USED, "provider_cost": {"amount": "1", "unit": "USD"}}, 422, "#/provider_cost"),
        ("authorize", {**ONE, "provider_cost": {"amount": "1e9", "unit": "USD"}}, 422, "#/provider_cost"),
        ("authorize", {**ONE, "model": "a\0b"}, 422, "#/model"),
        ("authorize", {**ONE, "model": "a" * 201}, 422, "#/model"),
        ("authorize", {**ONE, "user_id": "dana"}, 422, "#/user_id"),
        ("authorize", {**ONE, "conversation_id": "conv_1"}, 422, "#/conversation_id"),
        ("authorize", {**ONE, "lease_seconds": 0}, 422, "#/lease_seconds"),
        ("authorize", {**ONE, "lease_seconds": 3601}, 422, "#/lease_seconds"),
        ("authorize", {**ONE, "organization_id": "x"}, 422, "#"),
        ("deduct", {**ONE, "lease_seconds": 5}, 422, "#"),
        ("settle", ONE, 422, "#"),
        ("settle", {"request_id": "x", **ONE}, 422, "#/request_id"),
        ("release", {"request_id": "req_" + "0" * 32, **ONE}, 422, "#"),
    ],
)
async def test_a_body_that_is_not_as_it_should_be_is_refused_by_its_place(
    program: Program, operation: str, body: Any, status: int, pointer: str
) -> None:
    answer = await program.ask(operation, body)
    assert (answer.status_code, answer.json()["code"]) == (status, "invalid_request"), answer.text
    assert answer.json()["errors"][0]["pointer"] == pointer
    assert await program.rows("select count(*) from credits.holds") == [(0,)]


async def test_what_is_no_json_too_deep_or_too_large_is_refused(program: Program) -> None:
    async with httpx2.AsyncClient(base_url=program.base_url, timeout=30) as client:
        for content, status, code in (
            (b"", 400, "malformed_body"),
            (b"{", 400, "malformed_body"),
            (b"\xff", 400, "malformed_body"),
            (b'{"model": "\\ud800"}', 400, "malformed_body"),
            (b"[" * 100_000, 400, "malformed_body"),
            (json.dumps({"model": "a" * 1_000_001}).encode(), 413, "body_too_large"),
        ):
            answer = await client.post(
                "/api/v1/credits/deduct", content=content, headers={"authorization": f"Bearer {program.key}"}
            )
            assert (answer.status_code, answer.json()["code"]) == (status, code)
        got = await client.get("/api/v1/credits/deduct", headers={"authorization": f"Bearer {program.key}"})
        assert (got.status_code, got.json()["code"]) == (405, "method_not_allowed")
        for headers in ({}, {"cookie": "session_token=x"}, {"x-api-key": ""}):
            nobody = await client.post("/api/v1/credits/deduct", json=ONE, headers=headers)
            assert (nobody.status_code, nobody.json()["code"]) == (401, "not_signed_in")
    for key in ("", "x" * 256):
        answer = await program.ask("deduct", ONE, idempotency_key=key)
        assert answer.status_code == 422, key


async def test_a_model_without_a_price_is_refused(program: Program) -> None:
    answer = await program.ask("deduct", {"provider": "demo", "model": "no-such-model", "usage": USED})
    assert (answer.status_code, answer.json()["code"]) == (400, "model_not_priced")
    held = await program.done("authorize", ONE)
    answer = await program.ask("settle", {"request_id": held["request_id"], "usage": USED})
    assert (answer.status_code, answer.json()["errors"][0]["pointer"]) == (422, "#/usage")


async def test_the_price_goes_by_the_conditions_that_are_told(program: Program) -> None:
    """A thousand tokens put out of a model with a cheaper tier: 8 and 4 USD a million."""
    body = {"provider": "demo", "model": "demo-1-long", "usage": {"output_tokens": 1000}}
    assert (await program.done("deduct", body))["charged"] == worth("0.8")
    flex = {"context": {"service_tier": "flex"}}
    assert (await program.done("deduct", {**body, **flex}))["charged"] == worth("0.4")
    held = await program.done("authorize", {**body, **flex})
    assert held["held"] == worth("0.4")
    # The tier that was used is said when it is known.
    settle = {"request_id": held["request_id"], "usage": body["usage"]}
    assert (await program.done("settle", settle))["charged"] == worth("0.8")
