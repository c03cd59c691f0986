"""R6, the bank test: whatever adds up to something that never changes does so in each answer, while calls go on."""

import asyncio
import random
import time
from decimal import Decimal
from typing import Any
from uuid import UUID

import httpx2
from tests.conftest import Org
from tests.gateway.conftest import fund
from tests.promises.figures import SEED, figure, tell

from bursar.clock import uuid7
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action, Move
from bursar.money import Micros

FUNDED = Micros(10**10)
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello there"}]}
MODELS = ("demo-1", "demo-1-mini", "demo-1-long")


def credits_of(amount: dict[str, str]) -> Decimal:
    assert amount["unit"] == "credit"
    return Decimal(amount["amount"])


def torn(overview: dict[str, Any]) -> list[str]:
    """What does not add up in an overview of an organization all of whose calls are of this month."""
    [pool] = overview["pools"]
    whole = Decimal(FUNDED) / 1_000_000
    used, held = credits_of(pool["used"]), credits_of(pool["held"])
    cost = overview["cost"]
    trend = overview["trend"]
    sums = {
        "available, used and held are what was granted": (credits_of(pool["available"]) + used + held, whole),
        "used is what was charged": (credits_of(cost["charged"]), used),
        "the days": (sum(credits_of(day["charged"]) for day in trend["days"]), used),
        "the series": (sum(credits_of(each["charged"]) for each in trend["series"]), used),
        "requests of the days": (sum(day["requests"] for day in trend["days"]), cost["requests"]),
    }
    for name in ("people", "keys", "models", "departments"):
        rows = overview[name]["rows"]
        sums[name] = (sum(credits_of(row["charged"]) for row in rows), used)
        sums[f"requests of {name}"] = (sum(row["requests"] for row in rows), cost["requests"])
    return [f"{name}: {found}, not {expected}" for name, (found, expected) in sums.items() if found != expected]


async def test_every_sum_that_is_shown_is_of_one_moment(org: Org, base_url: str) -> None:
    await fund(org, FUNDED)
    keys = [await org.key(await org.member()) for _ in range(4)]
    reader = await org.key(org.admin)
    stop = asyncio.Event()
    calls = 0

    async def call_on(http: httpx2.AsyncClient, key: str, rng: random.Random) -> None:
        nonlocal calls
        while not stop.is_set():
            body = {**CALL, "model": rng.choice(MODELS), "stream": rng.random() < 0.5}
            tokens = rng.choice([1, 20, 300])
            how = rng.choice(["delay_ms=1", "delay_ms=5", "fail=500", "break_after=5"])
            headers = {"authorization": f"Bearer {key}", "bursar-demo": f"output_tokens={tokens}; piece_ms=1; {how}"}
            await http.post("/v1/chat/completions", json={**body, "max_tokens": tokens}, headers=headers)
            calls += 1

    async def deduct_on(batcher: Batcher, user_id: UUID) -> None:
        """Far more often than calls of models would move credits."""
        nonlocal calls
        while not stop.is_set():
            move = Move(Action.DEDUCT, org.organization_id, uuid7(), user_id, amount_micros=Micros(7), model="demo-1")
            assert (await batcher.move(move._replace(provider="demo"))).accepted
            calls += 1

    rng = random.Random(SEED)
    reads = 0
    seen: set[str] = set()
    async with (
        httpx2.AsyncClient(base_url=base_url, timeout=30) as http,
        Batcher(org.database.dsn("bursar_lane")) as batcher,
    ):
        work = [asyncio.create_task(call_on(http, key.text, random.Random(rng.random()))) for key in keys]
        work += [asyncio.create_task(deduct_on(batcher, org.admin)) for _ in range(2)]
        try:
            until = time.monotonic() + figure("seconds") / 2
            while time.monotonic() < until:
                path = f"/api/v1/organizations/{org.slug}/overview"
                answer = await http.get(path, headers={"authorization": f"Bearer {reader.text}"})
                assert answer.status_code == 200, answer.text
                assert torn(answer.json()) == []
                seen.add(answer.json()["pools"][0]["used"]["amount"])
                reads += 1
        finally:
            stop.set()
            await asyncio.gather(*work)
    tell(f"{reads} reads during {calls} calls, {len(seen)} different sums, none torn")
    assert len(seen) > 5, "something went on meanwhile"
