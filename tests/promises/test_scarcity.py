"""R21: a dry pool, too many connections, statements and locks that time out: 503 with Retry-After, no half charge."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import psycopg
import pytest
from psycopg import sql
from tests.conftest import Org
from tests.credits.conftest import scratch_database
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import Cable, Provider, served
from tests.promises.figures import SEED, figure, tell

from bursar import db
from bursar.credits.verify import verify
from bursar.money import Micros
from bursar.pricing.importing import import_shipped
from bursar.settings import Settings

POOL_SIZE = 4
CALLERS = 2 * POOL_SIZE
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello there"}]}
CALL_MICROS = 9_000


@pytest.fixture(scope="module")
async def database(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database of this module's own, whose connections may be counted and cut."""
    async with scratch_database(admin_dsn, replace(settings, pool_size=POOL_SIZE), "scarce") as opened:
        async with opened.platform() as conn:
            await import_shipped(conn)
        yield opened


@pytest.fixture(scope="module")
async def provider(database: db.Database, settings: Settings) -> AsyncIterator[tuple[Provider, str]]:
    """A provider that counts its calls, and the application in front of it."""
    provider, cable = Provider(), Cable(database.dsn("bursar_lane"))
    async with served(database, settings, provider, cable) as (base_url, _):
        yield provider, base_url


@pytest.fixture
async def payer(org: Org, provider: tuple[Provider, str]) -> Payer:
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    return Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=provider[1])


# -- shortages


PATIENT = "-c statement_timeout=0 -c lock_timeout=0"  # we are not short of anything


async def admin_does(database: db.Database, *statements: str) -> None:
    """Statements about the database itself; `{}` is its name."""
    async with await psycopg.AsyncConnection.connect(database.dsn("admin"), autocommit=True, options=PATIENT) as conn:
        for statement in statements:
            await conn.execute(sql.SQL(statement).format(sql.Identifier(conn.info.dbname)))  # type: ignore[arg-type]


CUT = """
    select pg_terminate_backend(pid) from pg_stat_activity
    where datname = current_database() and usename like 'bursar%'"""


@asynccontextmanager
async def dry_pool(payer: Payer) -> AsyncIterator[None]:
    """Somebody else has every connection of the pool."""
    async with AsyncExitStack() as stack:
        for _ in range(POOL_SIZE):
            try:
                await stack.enter_async_context(payer.org.database.untenanted())
            except psycopg.OperationalError:
                break  # those who call have the others, and give them back to each other
        yield
        await asyncio.sleep(0.3)


@asynccontextmanager
async def too_many_connections(payer: Payer) -> AsyncIterator[None]:
    """PostgreSQL lets nobody in, and those who were in were cut."""
    await admin_does(payer.org.database, "alter database {} with connection limit 0", CUT)
    yield
    await asyncio.sleep(0.3)
    await admin_does(payer.org.database, "alter database {} with connection limit -1")


@asynccontextmanager
async def timeouts(payer: Payer, setting: str) -> AsyncIterator[None]:
    """Somebody holds the organization's gate and its memberships, and nobody may wait for long."""
    await admin_does(payer.org.database, f"alter database {{}} set {setting} = '20ms'", CUT)
    async with await psycopg.AsyncConnection.connect(payer.org.database.dsn("admin"), options=PATIENT) as conn:
        await conn.execute(
            "select 1 from credits.gates where organization_id = %s for update", [payer.org.organization_id]
        )
        yield
        await asyncio.sleep(0.3)
        await conn.rollback()
    await admin_does(payer.org.database, f"alter database {{}} reset {setting}", CUT)


def statement_timeout(payer: Payer) -> AbstractAsyncContextManager[None]:
    return timeouts(payer, "statement_timeout")


def lock_timeout(payer: Payer) -> AbstractAsyncContextManager[None]:
    return timeouts(payer, "lock_timeout")


SHORTAGES = [dry_pool, too_many_connections, statement_timeout, lock_timeout]


# -- callers


@dataclass
class Seen:
    """What the callers were told."""

    left: int
    told: Counter[tuple[str, int]] = field(default_factory=Counter)  # (what, status)
    answered: dict[str, int] = field(default_factory=dict)  # micros charged, by request id
    unknown: list[str] = field(default_factory=list)  # keys of deductions that may have been booked
    deducted: int = 0


async def deduct(http: httpx2.AsyncClient, key: str) -> httpx2.Response:
    """A charge that a program reports."""
    body = {"amount": {"amount": str(CALL_MICROS), "unit": "micro"}}
    return await http.post("/api/v1/credits/deduct", json=body, headers={"idempotency-key": key})


async def call_on(payer: Payer, http: httpx2.AsyncClient, seen: Seen, rng: random.Random) -> None:
    """Calls of models and questions about the books, until all were made."""
    while seen.left > 0:
        seen.left -= 1
        what = rng.choice(["plain", "stream", "read", "deduct"])
        key = f"{rng.random()}"
        if what == "deduct":
            answer = await deduct(http, key)
            seen.deducted += 1
        elif what == "read":
            answer = await http.get(f"/api/v1/organizations/{payer.org.slug}/why?model=demo-1&amount=1")
        else:
            answer = await http.post("/v1/chat/completions", json={**CALL, "stream": what == "stream"})
        seen.told[what, answer.status_code] += 1
        assert answer.status_code in (200, 503), answer.text
        if answer.status_code == 503:
            assert "retry-after" in answer.headers, answer.text
            assert "Traceback" not in answer.text
            seen.unknown += [key] if what == "deduct" else []
            await asyncio.sleep(0.01)
        elif what == "deduct":
            seen.answered[answer.json()["request_id"]] = CALL_MICROS
        elif what == "plain":
            seen.answered[answer.headers["x-request-id"]] = round(float(answer.headers["bursar-charged"]) * 10**6)
        elif what == "stream" and "books_unavailable" not in answer.text:
            told = answer.text.rsplit("bursar-charged=", 1)[1].split()[0]
            seen.answered[answer.headers["x-request-id"]] = round(float(told) * 10**6)


async def quiet(payer: Payer) -> None:
    """Until everything that was sent is booked, and nothing is held."""
    for _ in range(400):
        if await payer.rows("select 1 from credits.holds") == []:
            return
        await asyncio.sleep(0.05)
    raise AssertionError("something stays held")


@pytest.mark.parametrize("shortage", SHORTAGES, ids=lambda each: each.__name__)
async def test_a_shortage_is_told_as_503_and_charges_all_of_a_call_or_nothing(
    payer: Payer, provider: tuple[Provider, str], shortage: Any
) -> None:
    seen, rng = Seen(left=figure("calls") // len(SHORTAGES)), random.Random(SEED)
    calls = provider[0].calls
    headers = {"authorization": f"Bearer {payer.key}"}
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=payer.base_url, headers=headers, timeout=30, limits=limits) as http:
        with pytest.MonkeyPatch.context() as patch:  # nobody waits for ten seconds
            patch.setattr("bursar.db.connections.POOL_TIMEOUT_SECONDS", 0.1)
            patch.setattr("bursar.credits.batcher.GIVE_UP_SECONDS", 0.4)
            work = [
                asyncio.create_task(call_on(payer, http, seen, random.Random(rng.random()))) for _ in range(CALLERS)
            ]
            while not all(task.done() for task in work):
                async with shortage(payer):
                    pass
                await asyncio.sleep(rng.random() * 0.3)
            await asyncio.gather(*work)
        await asyncio.sleep(0.5)
        await admin_does(payer.org.database, CUT)  # who was let in meanwhile has a short patience for ever
        for _ in range(3):
            assert (await http.post("/v1/chat/completions", json=CALL)).status_code == 200, "it serves again"
        for key in seen.unknown:
            answer = await deduct(http, key)
            assert answer.status_code == 200, answer.text
            seen.answered[answer.json()["request_id"]] = CALL_MICROS
    await quiet(payer)
    tell(f"{shortage.__name__}: {dict(sorted(seen.told.items()))}")
    assert sum(count for (_, status), count in seen.told.items() if status == 503) > 0, "the test ran short of nothing"
    rows = await payer.rows("select request_id, charged_micros, kind from ledger.attribution")
    assert {(row[1], row[2]) for row in rows} == {(CALL_MICROS, 0)}, "all of a call"
    booked = {f"req_{row[0].hex}": row[1] for row in rows}
    answered = provider[0].calls - calls
    assert len(booked) == len(rows) == answered + seen.deducted, "each call that was answered and each deduction, once"
    assert seen.answered.items() <= booked.items()
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (len(rows) * CALL_MICROS, 0)
    async with payer.org.database.platform() as conn:
        assert await verify(conn) == []
