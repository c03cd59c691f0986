"""R9 at the gateway: ten calls at once under one idempotency key are one call, and everything else about keys."""

import asyncio
import random
from collections import Counter
from typing import Any

import httpx2
import pytest
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import Payer, fund
from tests.promises.figures import SEED, figure, tell

from bursar.money import Micros

PATHS = {"/v1/chat/completions": ("demo-1", 9_000), "/v1/messages": ("demo-claude", 32_100)}
HELLO = [{"role": "user", "content": "hello there"}]


async def payer_of(org: Org, base_url: str) -> Payer:
    key = await org.key(org.admin)
    return Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)


@pytest.fixture
async def callers(make_org: MakeOrg, two_servers: list[str]) -> list[Payer]:
    """The same member through two server processes, and one of another organization."""
    org, elsewhere = await make_org(), await make_org()
    for each in (org, elsewhere):
        await fund(each, Micros(10**12))
    first = await payer_of(org, two_servers[0])
    second = Payer(org=org, user_id=org.admin, api_key_id=first.api_key_id, key=first.key, base_url=two_servers[1])
    return [first, second, await payer_of(elsewhere, two_servers[0])]


async def ask(http: httpx2.AsyncClient, payer: Payer, path: str, key: str, **changes: Any) -> httpx2.Response:
    body = {"model": PATHS[path][0], "max_tokens": 20, "messages": HELLO, **changes}
    demo = body.pop("demo", "")
    headers = {"authorization": f"Bearer {payer.key}", "idempotency-key": key, "bursar-demo": demo}
    return await http.post(f"{payer.base_url}{path}", json=body, headers=headers)


def code_of(answer: httpx2.Response) -> str | None:
    """Of a refusal."""
    return None if answer.status_code == 200 else str(answer.json()["error"].get("code"))


async def test_ten_calls_at_once_under_one_key_are_one_call_through_any_server(callers: list[Payer]) -> None:
    here, there, elsewhere = callers
    rng = random.Random(SEED)
    codes: Counter[str | None] = Counter()
    charged = 0
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=40, limits=limits) as http:
        for number in range(figure("gateway keys")):
            key, path, stream = f"key {number}", rng.choice(list(PATHS)), rng.random() < 0.5
            twins = [ask(http, rng.choice([here, there]), path, key, stream=stream) for _ in range(10)]
            foreign = ask(http, elsewhere, path, key, stream=stream)
            *answers, of_another = await asyncio.gather(*twins, foreign)
            assert of_another.status_code == 200, "its key is another one"
            [winner] = [each for each in answers if each.status_code == 200]
            for answer in answers:
                codes[code_of(answer)] += 1
                if answer is not winner:
                    assert (answer.status_code, code_of(answer)) == (422, "already_answered")
                    assert answer.headers["bursar-original-request"] == winner.headers["x-request-id"]
            other = await ask(http, here, path, key, stream=stream, max_tokens=21)
            assert (other.status_code, code_of(other)) == (422, "idempotency_key_reused")
            charged += PATHS[path][1]
    for payer in (here, elsewhere):
        pool = await payer.pool()
        assert (pool.used_micros, pool.held_micros) == (charged, 0)
    tell(f"{figure('gateway keys')} keys: {dict(codes)}")


async def test_a_failure_is_not_kept_and_a_refusal_is(callers: list[Payer], make_org: MakeOrg) -> None:
    poor = await payer_of(await make_org(), callers[0].base_url)
    async with httpx2.AsyncClient(timeout=40) as http:
        for path in PATHS:
            for failure in ("fail=500", "fail=429", "break_after=0"):
                failed = await ask(http, callers[0], path, f"{path} {failure}", demo=failure)
                assert failed.status_code in (500, 429, 502)
                assert (await ask(http, callers[1], path, f"{path} {failure}")).status_code == 200, "its key is free"
            assert (await ask(http, poor, path, path)).status_code == 402
        await fund(poor.org, Micros(10**9))
        for path in PATHS:
            again = await ask(http, poor, path, path)
            assert again.status_code == 402, "the same answer under the same key"
            assert (await ask(http, poor, path, f"new {path}")).status_code == 200
