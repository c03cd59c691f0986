"""Server processes and the database killed under load: nothing acknowledged is lost, nothing is booked twice.

BURSAR_TEST_KILLS=500 plays the full form; BURSAR_TEST_SEED starts it at a seed of one's own.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import psycopg
import pytest
from tests.conftest import MASTER_KEY, MakeOrg, Org
from tests.gateway.conftest import _free_port, _wait_until_ready, fund

from bursar import db
from bursar.clock import now
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action, Flag, Move, Outcome
from bursar.credits.pools import list_pools
from bursar.credits.verify import verify
from bursar.db.embedded import EmbeddedServer
from bursar.money import Micros
from bursar.pricing.usage import Usage
from bursar.settings import Settings

KILLS = int(os.environ.get("BURSAR_TEST_KILLS", "2"))
SEED = int(os.environ.get("BURSAR_TEST_SEED", "20261120"))
PATH = "/v1/chat/completions"
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello there"}]}
CALL_MICROS, INPUT_MICROS, HOLD_MICROS = 9_000, 1_000, 21_000


@dataclass
class Process:
    """A server process that can be killed and started again."""

    environment: dict[str, str]
    port: int = field(default_factory=_free_port)
    child: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "bursar", "serve", "--port", str(self.port)]
        nowhere = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.child = subprocess.Popen(command, env=self.environment, **nowhere)  # type: ignore[call-overload]
        _wait_until_ready(self.url, self.child)

    def end(self, number: int) -> int:
        """Send a signal and wait for the end; its exit status."""
        assert self.child is not None
        self.child.send_signal(number)
        return self.child.wait(timeout=60)


@dataclass
class Site:
    """A durable database of this module's own, and two server processes on it."""

    server: EmbeddedServer
    database: db.Database
    processes: list[Process]

    async def expire(self, seconds: float = 60) -> None:
        """End what nobody renews, as if so much time had passed."""
        async with await psycopg.AsyncConnection.connect(
            self.database.dsn("bursar_simulator"), autocommit=True
        ) as conn:
            await conn.execute("select credits.expire_holds(500, %s)", [now() + timedelta(seconds=seconds)])


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A new folder that any user can pass through."""
    folder = Path(tempfile.mkdtemp(prefix="bursar-kills-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
async def site(folder: Path) -> AsyncIterator[Site]:
    server = EmbeddedServer(folder / "data")
    await asyncio.to_thread(server.start)
    settings = Settings(data_dir=folder / "data", database_url=server.dsn, given_master_key=MASTER_KEY)
    environment = {
        **os.environ,
        "DATABASE_URL": server.dsn,
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(folder / "servers"),
    }
    processes = [Process(environment), Process(environment)]
    try:
        async with db.opened(settings, migrate=True) as database:
            yield Site(server, database, processes)
    finally:
        for process in processes:
            if process.child is not None and process.child.poll() is None:
                await asyncio.to_thread(process.end, signal.SIGKILL)
        await asyncio.to_thread(server.stop)
        server.remove()


@pytest.fixture(scope="module")
def database(site: Site) -> db.Database:
    """The fixtures that make organizations make them here."""
    return site.database


@dataclass(frozen=True)
class Client:
    """A member with a key, and what their organization was charged."""

    org: Org
    key: str
    api_key_id: UUID
    http: aiohttp.ClientSession

    def post(self, url: str, directions: str = "", **changes: Any) -> Any:
        headers = {"bursar-demo": directions} if directions else {}
        key = changes.pop("idempotency_key", None)
        headers |= {"idempotency-key": key} if key else {}
        return self.http.post(url + PATH, json={**CALL, **changes}, headers=headers)

    async def rows(self) -> list[Any]:
        """(request, kind, charged, flags, output) by request."""
        async with self.org.tenant() as conn:
            cursor = await conn.execute(
                "select request_id, kind, charged_micros, flags, output_tokens from ledger.attribution order by 1, 2"
            )
            return await cursor.fetchall()

    async def holds(self) -> list[Any]:
        async with self.org.tenant() as conn:
            cursor = await conn.execute("select request_id, is_sent, progress_micros from credits.holds order by 1")
            return await cursor.fetchall()

    async def held(self) -> int:
        async with self.org.tenant() as conn:
            return (await list_pools(conn, organization_id=self.org.organization_id))[0].held_micros

    async def used(self) -> int:
        async with self.org.tenant() as conn:
            return (await list_pools(conn, organization_id=self.org.organization_id))[0].used_micros


@pytest.fixture
async def client(site: Site, make_org: MakeOrg) -> AsyncIterator[Client]:
    for process in site.processes:
        if process.child is None or process.child.poll() is not None:
            await asyncio.to_thread(process.start)
    org = await make_org()
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    headers = {"authorization": f"Bearer {key.text}"}
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(headers=headers, connector=connector) as http:
        yield Client(org, key.text, key.key.api_key_id, http)


async def assert_books_agree(site: Site) -> None:
    async with site.database.platform() as conn:
        assert await verify(conn) == []


async def until(condition: Any, seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


async def test_a_plain_call_whose_server_is_killed_is_charged_its_estimate_and_a_late_settle_books_the_difference(
    site: Site, client: Client
) -> None:
    process = site.processes[0]

    async def call() -> None:
        async with client.post(process.url, "delay_ms=20000", max_tokens=50) as answer:
            pytest.fail(f"answered {answer.status}")

    calling = asyncio.create_task(unless_killed(call()))

    async def is_sent() -> bool:
        return [hold[1] for hold in await client.holds()] == [True]

    await until(is_sent)
    await asyncio.to_thread(process.end, signal.SIGKILL)
    await calling
    [(request_id, _, _)] = await client.holds()
    await site.expire(20)
    assert len(await client.holds()) == 1, "the lease of 30 seconds is not over"
    await site.expire()
    assert await client.holds() == []
    assert [row[1:3] for row in await client.rows()] == [(0, HOLD_MICROS)]
    assert (await client.rows())[0][3] & (4 | 64) == 4 | 64, "marked as estimated, by expiry"
    await assert_books_agree(site)

    usage = Usage(input_tokens=10, output_tokens=20)
    async with Batcher(site.database.dsn("bursar_lane")) as batcher:
        settle = Move(
            Action.SETTLE,
            client.org.organization_id,
            request_id,
            client.org.admin,
            client.api_key_id,
            amount_micros=Micros(CALL_MICROS),
            tokens=30,
            usage=usage.as_array(),
            provider="demo",
            model="demo-1",
        )
        first, again = await batcher.move(settle), await batcher.move(settle)
    assert (first.outcome, first.charged_micros) == (Outcome.ACCEPTED, CALL_MICROS)
    assert (again.outcome, again.charged_micros) == (Outcome.KNOWN, CALL_MICROS)
    assert [row[2] for row in await client.rows()] == [HOLD_MICROS, CALL_MICROS - HOLD_MICROS]
    assert (await client.used(), await client.held()) == (CALL_MICROS, 0)
    await assert_books_agree(site)


async def test_a_hold_that_was_never_sent_is_released_when_its_process_is_killed(site: Site, client: Client) -> None:
    """As it is between authorize's commit and the provider's call."""

    def hold(number: int, body: bytes) -> Move:
        return Move(
            Action.AUTHORIZE,
            client.org.organization_id,
            UUID(int=number),
            client.org.admin,
            client.api_key_id,
            amount_micros=Micros(HOLD_MICROS),
            mark_micros=Micros(INPUT_MICROS),
            lease_seconds=30,
            flags=Flag.STREAMED,
            model="demo-1",
            idempotency_key="the same",
            body_hash=body,
        )

    async with Batcher(site.database.dsn("bursar_lane")) as batcher:
        assert (await batcher.move(hold(1, b"body"))).accepted
        await site.expire()
        assert (await client.rows(), await client.holds(), await client.held()) == ([], [], 0)
        assert (await batcher.move(hold(2, b"body"))).outcome is Outcome.ACCEPTED, "its key is free again"
        assert (await batcher.move(hold(3, b"other"))).outcome is Outcome.KEY_REUSED
    await site.expire()
    await assert_books_agree(site)


async def test_a_stream_whose_server_is_killed_is_charged_up_to_its_last_progress_mark(
    site: Site, client: Client
) -> None:
    process = site.processes[0]
    seen = 0

    async def read() -> None:
        nonlocal seen
        async with client.post(process.url, "piece_ms=20; output_tokens=2000", stream=True, max_tokens=2000) as answer:
            async for line in answer.content:
                seen += b'"content":"' in line and b'"content":""' not in line

    reading = asyncio.create_task(unless_killed(read()))

    async def has_progress() -> bool:
        return any(hold[2] > INPUT_MICROS for hold in await client.holds())

    await until(has_progress)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(process.end, signal.SIGKILL)
    await reading
    [(_, _, progress)] = await client.holds()
    await site.expire()
    [(_, _, charged, flags, _)] = await client.rows()
    assert charged == progress
    assert INPUT_MICROS < charged <= INPUT_MICROS + 400 * (seen + 10)
    assert flags & (4 | 8 | 64) == 4 | 8 | 64
    assert (await client.used(), await client.held()) == (charged, 0)
    await assert_books_agree(site)


async def unless_killed(work: Coroutine[Any, Any, Any]) -> None:
    """The server may die meanwhile."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        await work


@dataclass
class Tally:
    """What clients that try again know in the end."""

    charged: dict[str, int] = field(default_factory=dict)  # by request id, as acknowledged
    answered: set[str] = field(default_factory=set)  # request ids that are known to be answered, by an earlier try
    statuses: Counter[int] = field(default_factory=Counter)
    unsaid: int = 0  # 503 without Retry-After


async def keep_calling(
    client: Client, urls: list[str], tally: Tally, rng: random.Random, until_set: asyncio.Event
) -> None:
    """Call after call, each with a key of its own, tried again until there is a definite answer."""
    number = 0
    while not until_set.is_set():
        key = f"{rng.random()}-{number}"
        number += 1
        stream = rng.random() < 0.3
        while True:
            try:
                directions = f"delay_ms={rng.choice([0, 5, 50])}"
                post = client.post(rng.choice(urls), directions, stream=stream, idempotency_key=key)
                async with post as answer:
                    text = await answer.text()
            except (aiohttp.ClientError, ConnectionError):
                tally.statuses[0] += 1
                await asyncio.sleep(0.1)
                continue
            tally.statuses[answer.status] += 1
            if answer.status == 200 and "books_unavailable" not in text:
                told = text.rsplit("bursar-charged=", 1)[1].split()[0] if stream else answer.headers["bursar-charged"]
                tally.charged[answer.headers["x-request-id"]] = round(float(told) * 1_000_000)
                break
            if answer.status == 422:
                tally.answered.add(answer.headers["bursar-original-request"])
                break
            assert answer.status in (200, 502, 503, 504), text
            tally.unsaid += answer.status == 503 and "retry-after" not in answer.headers
            await asyncio.sleep(0.1)


async def assert_all_there_once(site: Site, client: Client, tally: Tally) -> None:
    rows = await client.rows()
    booked: Counter[str] = Counter()
    for request_id, _, charged, _, _ in rows:
        booked[f"req_{request_id.hex}"] += charged
    for request_id, charged in tally.charged.items():
        assert booked[request_id] == charged, f"{request_id}: {booked[request_id]} booked, {charged} acknowledged"
    assert tally.answered <= set(booked), "told as answered, and not there"
    firsts = Counter(row[0] for row in rows if row[1] == 0)
    assert set(firsts.values()) <= {1}, "booked twice"
    assert (await client.used(), await client.held()) == (sum(booked.values()), 0)
    await assert_books_agree(site)


async def test_servers_killed_under_load_lose_and_double_nothing(site: Site, client: Client) -> None:
    rng = random.Random(SEED)
    tally, stop = Tally(), asyncio.Event()
    urls = [process.url for process in site.processes]
    work = [asyncio.create_task(keep_calling(client, urls, tally, random.Random(rng.random()), stop)) for _ in range(8)]
    for kill in range(KILLS):
        await asyncio.sleep(rng.random())
        process = site.processes[kill % 2]
        await asyncio.to_thread(process.end, signal.SIGKILL)
        await asyncio.sleep(rng.random() / 2)
        await asyncio.to_thread(process.start)
    stop.set()
    # A key whose call died with its server is held by its lease; ended early here, so that the test need not wait.
    while not all(task.done() for task in work):
        await site.expire(31)
        await asyncio.sleep(0.3)
    await asyncio.gather(*work)
    await site.expire()
    print(f"seed {SEED}, {KILLS} kills: {len(tally.charged)} acknowledged, {tally.statuses}")
    assert len(tally.charged) > 5 * KILLS
    await assert_all_there_once(site, client, tally)


async def test_a_database_killed_under_load_comes_back_by_itself_and_nothing_is_lost_or_doubled(
    site: Site, client: Client
) -> None:
    rng = random.Random(SEED)
    tally, stop = Tally(), asyncio.Event()
    urls = [process.url for process in site.processes]
    work = [asyncio.create_task(keep_calling(client, urls, tally, random.Random(rng.random()), stop)) for _ in range(8)]
    for _ in range(KILLS):
        await asyncio.sleep(0.5 + rng.random())
        pid = site.server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        before = len(tally.charged)

        async def serves_again(before: int = before) -> bool:
            return len(tally.charged) > before + 8

        await until(serves_again, 60)
    stop.set()
    await asyncio.wait_for(asyncio.gather(*work), 60)
    with contextlib.suppress(psycopg.OperationalError):  # the pool's connection may be the one that broke
        await client.held()
    await site.expire()
    print(f"seed {SEED}, {KILLS} kills: {len(tally.charged)} acknowledged, {tally.statuses}")
    assert len(tally.charged) > 20 * KILLS
    assert tally.unsaid == 0, "each 503 says when to try again"
    await assert_all_there_once(site, client, tally)


async def test_a_server_that_is_told_to_stop_ends_its_streams_and_settles_everything(
    site: Site, client: Client
) -> None:
    process = site.processes[1]

    async def stream() -> str:
        async with client.post(process.url, "piece_ms=10; output_tokens=200", stream=True, max_tokens=200) as answer:
            return await answer.text()

    async def plain() -> str:
        async with client.post(process.url, "delay_ms=1500") as answer:
            return str(answer.headers["bursar-charged"])

    streams = [asyncio.create_task(stream()) for _ in range(5)]
    plains = [asyncio.create_task(plain()) for _ in range(5)]

    async def all_run() -> bool:
        return sum(hold[1] for hold in await client.holds()) == 10

    await until(all_run)
    ending = asyncio.create_task(asyncio.to_thread(process.end, signal.SIGTERM))
    texts = await asyncio.gather(*streams)
    assert await asyncio.gather(*plains) == ["0.009"] * 5
    assert await ending == 0
    for text in texts:
        assert text.count('"content":"') == 201
        assert "[DONE]" in text
        assert "bursar-charged=0.081" in text
    rows = await client.rows()
    assert sorted(row[2] for row in rows) == [CALL_MICROS] * 5 + [INPUT_MICROS + 200 * 400] * 5
    assert all(row[3] & 4 == 0 for row in rows), "none by estimate"
    assert (await client.holds(), await client.held()) == ([], 0)
    await assert_books_agree(site)
