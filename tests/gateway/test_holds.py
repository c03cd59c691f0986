"""What a call is held for, how it waits, and what becomes of streams that outgrow their hold."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import aiohttp
import psycopg
import pytest
from fastapi import FastAPI
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import Cable, Provider, served

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.credits import why
from bursar.credits.limits import LimitAction, Metric, NotStrict, Scope, end_limit, set_limit
from bursar.gateway.calls import Call, Till
from bursar.gateway.front import Front
from bursar.gateway.outputs import FIRST_OUTPUT_TOKENS, MARGIN_PERCENT, PRIOR_OUTPUT_TOKENS, Recent
from bursar.money import Micros, format_credits
from bursar.pricing.lists import Prices
from bursar.pricing.prices import Rate
from bursar.pricing.terms import set_override
from bursar.settings import Settings

HELLO = [{"role": "user", "content": "hello there"}]
CALL: dict[str, Any] = {"model": "demo-1", "messages": HELLO}
CEILING = 200_000  # demo-1's context window in the price list


def micros_of(output_tokens: int) -> Micros:
    """What a call with 10 input tokens and so much output costs on demo-1."""
    return Micros(1_000 + 400 * output_tokens)


@dataclass(frozen=True)
class Scene:
    """A server process of its own: what it knows of outputs, it has seen itself or read from the ledger."""

    cable: Cable
    base_url: str
    app: FastAPI

    @property
    def till(self) -> Till:
        front: Front = self.app.state.gateway
        return front._till


@pytest.fixture(scope="module")
async def scene(base_url: str, priced: db.Database, settings: Settings) -> AsyncIterator[Scene]:
    """Opened after the run's application, which would otherwise be opened on this one's cable."""
    cable = Cable(priced.dsn("bursar_lane"))
    async with served(priced, settings, Provider(), cable) as (base_url, app):
        yield Scene(cable, base_url, app)


async def paying(org: Org, base_url: str, amount: int) -> Payer:
    """A member of an organization with so many micros."""
    await fund(org, Micros(amount))
    user_id = await org.member()
    key = await org.key(user_id)
    return Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)


async def running(scene: Scene, payer: Payer) -> Call:
    """The one call of this payer that runs."""
    async with asyncio.timeout(10):
        while True:
            for call in scene.till._running.values():
                if call.principal.organization_id == payer.org.organization_id:
                    return call
            await asyncio.sleep(0.01)


async def held(scene: Scene, payer: Payer, body: dict[str, Any]) -> int:
    """What such a call holds while it runs."""
    asked = asyncio.create_task(payer.post(body, bursar_demo="delay_ms=300; output_tokens=5"))
    micros = (await running(scene, payer)).held_micros
    assert (await payer.pool()).held_micros == micros
    assert (await asked).status_code == 200
    return micros


async def strict(payer: Payer, amount: int, **columns: Any) -> Any:
    """A strict cap on the key."""
    async with payer.org.tenant() as conn:
        return await set_limit(
            conn,
            organization_id=payer.org.organization_id,
            scope=Scope.KEY,
            scope_id=payer.api_key_id,
            amount=amount,
            **{"is_strict": True, **columns},
        )


# -- sizes


async def test_a_call_is_held_by_its_limit_else_by_the_prior_else_by_what_such_calls_put_out(
    scene: Scene, org: Org
) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    assert await held(scene, payer, {**CALL, "max_tokens": 20}) == micros_of(20)
    assert await held(scene, payer, CALL) == micros_of(FIRST_OUTPUT_TOKENS)
    recent = Recent()
    recent.note(5)
    assert await held(scene, payer, CALL) == micros_of(recent.guess().tokens) < micros_of(PRIOR_OUTPUT_TOKENS)
    recent.note(5)
    assert await held(scene, payer, {**CALL, "n": 3}) == micros_of(3 * recent.guess().tokens)
    assert await held(scene, payer, {**CALL, "max_tokens": 20}) == micros_of(20)


async def test_a_cut_stream_and_an_answer_within_a_limit_tell_nothing(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    await payer.post({**CALL, "stream": True}, bursar_demo="break_after=3")
    await payer.post({**CALL, "max_tokens": 20})
    assert await held(scene, payer, CALL) == micros_of(FIRST_OUTPUT_TOKENS)


@pytest.mark.parametrize(("room", "tokens"), [(15_999, 8_000), (3_999, 2_000), (1_999, 1_000), (1_000, 1_000)])
async def test_where_nothing_is_known_a_call_takes_the_largest_half_that_there_is_room_for(
    scene: Scene, org: Org, room: int, tokens: int
) -> None:
    payer = await paying(org, scene.base_url, micros_of(room))
    assert await held(scene, payer, CALL) == micros_of(tokens)
    assert await payer.rows("select count(*) from credits.unbilled_requests") == [(0,)]


async def test_a_burst_of_first_calls_whose_answers_are_long_does_not_outspend_its_budget(
    scene: Scene, base_url: str, org: Org
) -> None:
    """Sixty calls of 3,000 tokens at once, of which nothing was known, into room for thirty: through two processes."""
    payer = await paying(org, scene.base_url, 30 * micros_of(3_000))
    there = replace(payer, base_url=base_url)
    demo = "output_tokens=3000; delay_ms=200"
    answers = await asyncio.gather(*(each.post(CALL, bursar_demo=demo) for each in [payer, there] * 30))
    served = Counter(answer.status_code for answer in answers)
    pool = await payer.pool()
    assert served[200] <= 30
    assert served[200] + served[402] == 60
    assert (pool.held_micros, pool.used_micros) == (0, served[200] * micros_of(3_000))
    assert served[200] >= 28, "and little is left unused"


async def test_what_would_be_refused_is_held_by_what_another_process_has_seen(
    scene: Scene, base_url: str, org: Org
) -> None:
    payer = await paying(org, base_url, 10**9)
    here = replace(payer, base_url=scene.base_url)
    assert (await here.post(CALL, bursar_demo="output_tokens=50")).status_code == 200
    for _ in range(6):
        assert (await payer.post(CALL, bursar_demo="output_tokens=50")).status_code == 200
    little, much = Recent(), Recent()
    little.note(50)
    for _ in range(7):
        much.note(50)
    await strict(payer, micros_of(150), is_strict=False)
    assert micros_of(much.guess().tokens) <= micros_of(150) < micros_of(little.guess().tokens)
    assert (await here.post(CALL, bursar_demo="output_tokens=50")).status_code == 200
    assert await payer.rows("select count(*) from credits.unbilled_requests") == [(0,)]


async def test_who_has_no_room_for_what_is_known_is_refused_once_and_for_good(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, micros_of(PRIOR_OUTPUT_TOKENS) - 1)
    refused = await payer.post(CALL, idempotency_key="once")
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "pool_exhausted")
    assert refused.json()["error"]["why"]["wanted"]["amount"] == format_credits(micros_of(PRIOR_OUTPUT_TOKENS))
    assert await payer.rows("select outcome from credits.unbilled_requests") == [("refused",)]
    assert (await payer.post(CALL, idempotency_key="once")).status_code == 402


async def test_calls_that_wait_are_sized_by_what_comes_out_meanwhile_here_or_elsewhere(
    scene: Scene, base_url: str, org: Org
) -> None:
    """Room for one prior; the first to end tells all others that they need little."""
    payer = await paying(org, base_url, micros_of(PRIOR_OUTPUT_TOKENS) + 40 * micros_of(10))
    here = replace(payer, base_url=scene.base_url)
    demo = "output_tokens=10; delay_ms=300"
    answers = await asyncio.gather(*(each.post(CALL, bursar_demo=demo) for each in [payer, here] * 20))
    assert Counter(answer.status_code for answer in answers) == {200: 40}
    assert (await payer.pool()).used_micros == 40 * micros_of(10)


# -- strict limits


async def test_under_a_strict_limit_a_call_without_a_limit_is_held_by_the_ceiling_of_its_model(
    scene: Scene, org: Org
) -> None:
    payer = await paying(org, scene.base_url, 10**12)
    assert await held(scene, payer, CALL) == micros_of(FIRST_OUTPUT_TOKENS)
    limit = await strict(payer, micros_of(CEILING))
    assert await held(scene, payer, CALL) == micros_of(CEILING), "whatever this process thought of its limits"
    # 5 tokens are used of it: the ceiling does not fit any more, though a guess would.
    refused = await payer.post(CALL)
    assert (refused.status_code, refused.json()["error"]["code"]) == (402, "cap_reached")
    assert [each["strict"] for each in refused.json()["error"]["why"]["limits"]] == [False, False, True]
    assert (await payer.post({**CALL, "max_tokens": 20})).status_code == 200
    async with payer.org.tenant() as conn:
        await end_limit(conn, organization_id=payer.org.organization_id, limit_id=limit)
    scene.till._strict.clear()  # it is remembered for a minute
    assert await held(scene, payer, CALL) < micros_of(PRIOR_OUTPUT_TOKENS)


async def test_a_strict_limit_is_asked_about_once_and_then_remembered(
    scene: Scene, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = await paying(org, scene.base_url, 10**12)
    await strict(payer, 10**11)
    asked: list[Any] = []
    real = scene.till._batcher.move

    async def move(move: Any, **options: Any) -> Any:
        asked.append(move.action.name)
        return await real(move, **options)

    monkeypatch.setattr(scene.till._batcher, "move", move)
    for _ in range(3):
        assert (await payer.post(CALL)).status_code == 200
    assert Counter(asked)["AUTHORIZE"] == 4


async def test_a_model_whose_window_no_list_tells_has_a_ceiling_all_the_same(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    await strict(payer, 10**9)
    asked = asyncio.create_task(payer.post({**CALL, "model": "demo-fixed"}, bursar_demo="delay_ms=300"))
    call = await running(scene, payer)
    assert call.quote.context_window is None
    assert call.ceiling_tokens == 200_000 < call.held_tokens
    assert (await asked).status_code == 200


async def test_a_first_call_is_held_for_no_more_than_its_model_can_put_out(
    scene: Scene, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.gateway.calls.UNKNOWN_CEILING_TOKENS", 5_000)
    payer = await paying(org, scene.base_url, 10**9)
    asked = asyncio.create_task(payer.post({**CALL, "model": "demo-fixed"}, bursar_demo="delay_ms=300"))
    call = await running(scene, payer)
    assert call.held_tokens == call.request.input_tokens + 5_000 < FIRST_OUTPUT_TOKENS
    assert (await asked).status_code == 200


async def test_only_a_limit_that_stops_what_output_counts_for_can_be_strict(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    for columns in ({"action": LimitAction.WARNS}, {"metric": Metric.CALLS}):
        with pytest.raises(NotStrict):
            await strict(payer, 100, **columns)


# -- streams that outgrow their hold


async def test_a_stream_that_cannot_have_as_much_again_goes_on_with_what_is_left(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, micros_of(1_500))
    asked = asyncio.create_task(
        payer.post({**CALL, "stream": True}, bursar_demo="output_tokens=1490; piece_ms=1; delay_ms=1")
    )
    call = await running(scene, payer)
    async with asyncio.timeout(20):
        while not asked.done():
            await scene.till._progress(call)
            await asyncio.sleep(0.02)
    answer = await asked
    assert "pool_exhausted" not in answer.text
    assert (await payer.pool()).used_micros == micros_of(1_490)


@pytest.mark.parametrize("metric", [Metric.CREDITS, Metric.TOKENS])
@pytest.mark.parametrize("action", list(LimitAction))
async def test_a_limit_that_stops_ends_a_stream_and_one_that_warns_lets_it_go_on(
    scene: Scene, org: Org, metric: Metric, action: LimitAction
) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    amount = micros_of(1_100) if metric is Metric.CREDITS else 1_110
    await strict(payer, amount, metric=metric, action=action, is_strict=False)
    asked = asyncio.create_task(payer.post({**CALL, "stream": True}, bursar_demo="output_tokens=4000; piece_ms=1"))
    call = await running(scene, payer)
    async with asyncio.timeout(30):
        while not asked.done():
            await scene.till._progress(call)
            await asyncio.sleep(0.02)
    answer = await asked
    [(tokens, charged)] = await payer.rows("select output_tokens, charged_micros from ledger.attribution")
    if action is LimitAction.WARNS:
        assert "cap_reached" not in answer.text
        assert tokens == 4_000
    else:
        assert answer.text.count('data: {"error"') == 1
        assert '"code":"cap_reached"' in answer.text
        assert 1_000 < tokens < 4_000
    assert charged == (await payer.pool()).used_micros == micros_of(tokens)
    assert await payer.rows("select count(*) from credits.holds") == [(0,)]


async def test_a_long_input_is_no_reason_to_hold_more_for_the_output(scene: Scene, org: Org) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    body = {**CALL, "stream": True, "messages": [{"role": "user", "content": "hello there " * 5_000}]}
    asked = asyncio.create_task(payer.post(body, bursar_demo="output_tokens=300; piece_ms=1"))
    call = await running(scene, payer)
    before = call.held_micros
    async with asyncio.timeout(20):
        while call.meter is None or call.meter.output_so_far < 100:
            await asyncio.sleep(0.01)
    await scene.till._report(call)
    assert call.held_micros == before, "all but a tenth of it is used, and little of its output"
    assert (await asked).status_code == 200


def known_for_the_prior(scene: Scene, payer: Payer) -> None:
    """The next call without a limit is held for the prior, by what is known of such calls."""
    recent = Recent()
    recent.note(PRIOR_OUTPUT_TOKENS * 100 // MARGIN_PERCENT)
    assert recent.guess().tokens == PRIOR_OUTPUT_TOKENS
    scene.till._outputs._recent[payer.org.organization_id, payer.api_key_id, str(CALL["model"])] = recent


async def test_an_extension_whose_answer_was_lost_is_asked_again_and_holds_nothing_twice(
    scene: Scene, org: Org
) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    known_for_the_prior(scene, payer)
    asked = asyncio.create_task(payer.post({**CALL, "stream": True}, bursar_demo="output_tokens=2500; piece_ms=1"))
    call = await running(scene, payer)
    async with asyncio.timeout(20):
        while call.meter is None or call.meter.output_so_far < 900:
            await asyncio.sleep(0.01)
    lost = scene.cable.lost
    scene.cable.loses_next = True
    await scene.till._report(call)
    assert scene.cable.lost == lost + 1
    assert await payer.rows("select amount_micros, tokens from credits.holds") == [(call.held_micros, call.held_tokens)]
    assert (await payer.pool()).held_micros == call.held_micros == micros_of(2 * PRIOR_OUTPUT_TOKENS)
    assert (await asked).status_code == 200


async def test_many_streams_at_a_limit_use_what_there_is_and_end_one_after_another(scene: Scene, org: Org) -> None:
    """Four streams of 1,500 tokens into room for about 5,200: whoever cannot go on is stopped and charged."""
    payer = await paying(org, scene.base_url, micros_of(5_200))
    known_for_the_prior(scene, payer)
    asked = [
        asyncio.create_task(payer.post({**CALL, "stream": True}, bursar_demo="output_tokens=1500; piece_ms=1"))
        for _ in range(4)
    ]
    async with asyncio.timeout(60):
        while not all(task.done() for task in asked):
            calls = [c for c in scene.till._running.values() if c.principal.organization_id == org.organization_id]
            await asyncio.gather(*(scene.till._progress(call) for call in calls))
            await asyncio.sleep(0.05)
    stopped = sum("pool_exhausted" in task.result().text for task in asked)
    assert 0 < stopped < 4
    pool = await payer.pool()
    assert pool.held_micros == 0
    rows = await payer.rows("select sum(charged_micros), count(*) from ledger.attribution")
    assert rows == [(pool.used_micros, 4)]
    assert pool.used_micros > micros_of(4_300), "three until they had used their first hold, and one all it wanted"


# -- which limit comes next


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_name_the_limit_that_such_calls_come_to_first(scene: Scene, org: Org, stream: bool) -> None:
    payer = await paying(org, scene.base_url, 100 * micros_of(20))
    body = {**CALL, "max_tokens": 20, "stream": stream}
    answer = await payer.post(body)
    assert answer.headers["bursar-binding-limit"] == "Shared credits"
    assert "bursar-resets-at" not in answer.headers
    await strict(payer, 20, metric=Metric.CALLS, is_strict=False)  # nearer than 99 more calls that can be paid
    await strict(payer, 1, action=LimitAction.WARNS, is_strict=False)  # stops nobody
    scene.till._nearest._known.clear()  # what is known is kept for seconds
    answer = await payer.post(body)
    assert answer.headers["bursar-binding-limit"] == "Key cap on calls per month"
    told = (await payer.post({**body, "max_tokens": 10**6})).json()["error"]["why"]
    [cap] = [each for each in told["limits"] if each["name"] == "Key cap on calls per month"]
    assert answer.headers["bursar-resets-at"] == cap["resets_at"]
    assert (await payer.post(body, bursar_demo="fail=400")).headers["bursar-binding-limit"] == cap["name"]


async def test_the_next_limit_is_read_beside_the_call_once_in_a_while_and_never_locks_the_gate(
    scene: Scene, org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    payer = await paying(org, scene.base_url, 10**9)
    read: list[str] = []
    real = why.limits_passed

    async def limits_passed(conn: db.Connection, **asker: Any) -> Any:
        read.append("read")
        return await real(conn, **asker)

    monkeypatch.setattr(why, "limits_passed", limits_passed)
    monkeypatch.setattr("bursar.gateway.nearest.FRESH_SECONDS", 60)
    async with await psycopg.AsyncConnection.connect(org.database.dsn("admin")) as conn:
        await payer.post(CALL)
        await conn.execute("select from credits.gates where organization_id = %s for update", [org.organization_id])
        blocked = await asyncio.wait_for(limits_of(payer), 10)
        assert {each.name for each in blocked} == {"Shared credits", "Shared credits: what nobody reserved"}
        await conn.rollback()
    read.clear()
    scene.till._nearest._known.clear()
    for _ in range(5):
        assert (await payer.post(CALL)).headers["bursar-binding-limit"] == "Shared credits"
    assert read == ["read"]


async def limits_of(payer: Payer) -> tuple[why.LimitState, ...]:
    async with payer.org.tenant() as conn:
        return await why.limits_passed(
            conn,
            organization_id=payer.org.organization_id,
            user_id=payer.user_id,
            api_key_id=payer.api_key_id,
            model="demo-1",
        )


# -- a burst into a budget


async def burst(
    urls: list[str], key: str, body: dict[str, Any], demo: str, path: str = "/v1/chat/completions"
) -> Counter[bool]:
    """200 calls at once over all servers: how many were served and how many refused."""
    headers = {"authorization": f"Bearer {key}", "bursar-demo": demo}
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), headers=headers) as client:

        async def call(number: int) -> bool:
            url = f"{urls[number % len(urls)]}{path}"
            async with client.post(url, json=body) as answer:
                text = await answer.text()
                assert answer.status in (200, 402), text
                return answer.status == 200 and '"why"' not in text

        return Counter(await asyncio.gather(*(call(number) for number in range(200))))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("output_tokens", "delay_ms", "is_named"),
    [(250, 200, True), (250, 200, False), (10, 0, False), (900, 1000, False)],
)
async def test_of_200_calls_at_once_into_a_budget_for_100_those_are_served_that_fit(
    make_org: MakeOrg, two_servers: list[str], output_tokens: int, delay_ms: int, is_named: bool, stream: bool
) -> None:
    """With a limit exactly 100; without one at least 95, although nothing was known of such calls."""
    cost = micros_of(output_tokens)
    payer = await paying(await make_org(), two_servers[0], 100 * cost)
    body = {**CALL, "stream": stream, **({"max_tokens": output_tokens} if is_named else {})}
    demo = f"output_tokens={output_tokens}; delay_ms={delay_ms}"
    served = (await burst(two_servers, payer.key, body, demo))[True]
    assert served == 100 if is_named else 95 <= served <= 100
    assert (await payer.pool()).used_micros == served * cost
    again = (await burst(two_servers, payer.key, body, demo))[True]
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == ((served + again) * cost, 0)
    assert served + again <= 100


CENT = Micros(1_000_000)
A_CENTS_OUTPUT = 2_497
"""Tokens of demo-1 that cost a little less than a cent: a dollar has room for a hundred such calls."""


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("kind", ["plain", "streamed", "images"])
async def test_a_dollar_serves_a_hundred_of_200_calls_of_a_cent_at_once_and_none_afterwards(
    make_org: MakeOrg, two_servers: list[str], kind: str, servers: int
) -> None:
    org = await make_org()
    payer = await paying(org, two_servers[0], 100 * CENT)
    path, body = "/v1/chat/completions", {**CALL, "model": "demo-fixed", "stream": kind == "streamed"}
    if kind == "images":
        path, body = "/v1/images/generations", {"model": "demo-image", "prompt": "a coin"}
        async with org.database.platform() as conn:
            await set_override(
                conn,
                organization_id=org.organization_id,
                provider="demo",
                model_pattern="demo-image",
                prices=Prices.of([Rate("images", 10_000_000)]),
                reason="a test",
                by=OPERATOR,
            )
    for wanted in (100, 0):
        served = (await burst(two_servers[:servers], payer.key, body, "delay_ms=200", path))[True]
        pool = await payer.pool()
        assert (served, pool.used_micros, pool.held_micros) == (wanted, 100 * CENT, 0)


@pytest.mark.parametrize("servers", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_dollar_serves_nearly_a_hundred_calls_of_a_cent_that_name_no_limit(
    make_org: MakeOrg, two_servers: list[str], stream: bool, servers: int
) -> None:
    payer = await paying(await make_org(), two_servers[0], 100 * CENT)
    demo = f"output_tokens={A_CENTS_OUTPUT}; delay_ms=200; piece_ms=0"
    served = []
    for _ in range(2):
        served.append((await burst(two_servers[:servers], payer.key, {**CALL, "stream": stream}, demo))[True])
        pool = await payer.pool()
        assert (pool.used_micros, pool.held_micros) == (sum(served) * micros_of(A_CENTS_OUTPUT), 0)
    print(f"BURST stream={stream} servers={servers}: {served}")
    assert 95 <= served[0] <= sum(served) <= 100
