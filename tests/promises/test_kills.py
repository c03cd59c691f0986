"""R3, R4, R5, R7: what is killed under load loses no acknowledged charge, doubles none, and serves again by itself."""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from tests.conftest import MASTER_KEY, MakeOrg
from tests.gateway.conftest import fund
from tests.promises.figures import SEED, figure, tell
from tests.promises.sites import (
    CALL_MICROS,
    INPUT_MICROS,
    LEASE_SECONDS,
    TOKEN_MICROS,
    Client,
    Process,
    Site,
    Strike,
    Tally,
    built,
    open_folder,
    survive,
    until,
)

from bursar import db
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action, Flag, Move, Outcome
from bursar.credits.verify import verify
from bursar.db.embedded import EmbeddedServer
from bursar.money import Micros
from bursar.pricing.usage import Usage
from bursar.settings import Settings

ESTIMATED, STREAMED, BY_EXPIRY = 4, 8, 64
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="finds the processes of a server in /proc")


@pytest.fixture(scope="module")
async def site() -> AsyncIterator[Site]:
    async with built() as site:
        yield site


@pytest.fixture(scope="module")
def database(site: Site) -> db.Database:
    """The fixtures that make organizations make them here."""
    return site.database


@pytest.fixture
async def client(site: Site, make_org: MakeOrg) -> AsyncIterator[Client]:
    await site.start()
    await site.assert_books_agree()  # the pool's connections are those of a database that runs
    org = await make_org()
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    headers = {"authorization": f"Bearer {key.text}"}
    timeout = aiohttp.ClientTimeout(total=60)
    async with aiohttp.ClientSession(headers=headers, connector=connector, timeout=timeout) as http:
        yield Client(org, key.text, http)


# -- strikes


async def kill_a_server(site: Site, tally: Tally, rng: random.Random) -> None:
    await asyncio.to_thread(rng.choice(site.processes).end, signal.SIGKILL)


async def kill_the_database(site: Site, tally: Tally, rng: random.Random) -> None:
    site.kill_database()


async def kill_a_server_and_the_database(site: Site, tally: Tally, rng: random.Random) -> None:
    """In either order, at once or a moment apart; sometimes every server."""
    struck = site.processes if rng.random() < 0.3 else [rng.choice(site.processes)]
    if rng.random() < 0.5:
        site.kill_database()
        await asyncio.sleep(rng.choice([0, 0.05, 0.5]))
    for process in struck:
        await asyncio.to_thread(process.end, signal.SIGKILL)
    if rng.random() < 0.5:
        await asyncio.sleep(rng.choice([0, 0.05, 0.5]))
        site.kill_database()


async def kill_a_worker(site: Site, tally: Tally, rng: random.Random) -> None:
    """One of the processes behind a port; what supervises them starts another one."""

    async def has_some() -> bool:
        return site.double.workers() != []

    await until(has_some)
    os.kill(rng.choice(site.double.workers()), signal.SIGKILL)


async def kill_in_mid_stream(site: Site, tally: Tally, rng: random.Random) -> None:
    async def streams() -> bool:
        return tally.streaming > 1

    await until(streams)
    await kill_a_server(site, tally, rng)


async def kill_while_it_stops(site: Site, tally: Tally, rng: random.Random) -> None:
    process = rng.choice(site.processes)
    process.send(signal.SIGTERM)
    await asyncio.sleep(rng.random())
    await asyncio.to_thread(process.end, signal.SIGKILL)


async def stop_for_longer_than_a_lease(site: Site, tally: Tally, rng: random.Random) -> None:
    """It goes on as if nothing had happened, while its holds have ended and their twins may have been charged."""
    site.single.send(signal.SIGSTOP)
    await asyncio.sleep(LEASE_SECONDS * rng.uniform(0.5, 2))
    site.single.send(signal.SIGCONT)


KINDS: dict[str, tuple[str, Strike]] = {
    "server": ("kills", kill_a_server),
    "database": ("database kills", kill_the_database),
    "both": ("other kills", kill_a_server_and_the_database),
    "worker": ("other kills", kill_a_worker),
    "mid-stream": ("other kills", kill_in_mid_stream),
    "while it stops": ("other kills", kill_while_it_stops),
    "stands still": ("other kills", stop_for_longer_than_a_lease),
}


@pytest.mark.parametrize("what", [pytest.param(what, marks=on_linux) if what == "worker" else what for what in KINDS])
async def test_what_is_killed_under_load_loses_and_doubles_nothing_and_serves_again(
    site: Site, client: Client, what: str
) -> None:
    name, strike = KINDS[what]
    tally = await survive(site, client, figure(name), strike, SEED)
    assert tally.keys >= figure(name), "each strike was followed by calls that were answered"
    tell(f"{figure(name)} kills ({what}): {tally}")


# -- single kills, at chosen moments


async def unless_killed(work: Coroutine[Any, Any, Any]) -> None:
    """The server may die meanwhile."""
    with contextlib.suppress(aiohttp.ClientError, ConnectionError):
        await work


async def test_a_plain_call_whose_server_is_killed_is_charged_its_estimate_and_a_late_settle_books_the_difference(
    site: Site, client: Client
) -> None:
    async def call() -> None:
        async with client.post(site.single.url, "delay_ms=20000", max_tokens=50) as answer:
            pytest.fail(f"answered {answer.status}")

    calling = asyncio.create_task(unless_killed(call()))

    async def is_sent() -> bool:
        return [hold[1] for hold in await client.holds()] == [True]

    await until(is_sent)
    await asyncio.to_thread(site.single.end, signal.SIGKILL)
    await calling
    [(request_id, _, _)] = await client.holds()
    await client.until_no_hold_is_left()
    [(_, kind, charged, flags)] = await client.charges()
    assert (kind, charged) == (0, INPUT_MICROS + 50 * TOKEN_MICROS)
    assert flags & (ESTIMATED | BY_EXPIRY) == ESTIMATED | BY_EXPIRY
    await site.assert_books_agree()

    settle = Move(
        Action.SETTLE,
        client.org.organization_id,
        request_id,
        client.org.admin,
        amount_micros=Micros(CALL_MICROS),
        tokens=30,
        usage=Usage(input_tokens=10, output_tokens=20).as_array(),
        provider="demo",
        model="demo-1",
    )
    async with Batcher(site.database.dsn("bursar_lane")) as batcher:
        first, again = await batcher.move(settle), await batcher.move(settle)
    assert (first.outcome, first.charged_micros) == (Outcome.ACCEPTED, CALL_MICROS)
    assert (again.outcome, again.charged_micros) == (Outcome.KNOWN, CALL_MICROS)
    assert [row[2] for row in await client.charges()] == [charged, CALL_MICROS - charged]
    assert await client.pool() == (CALL_MICROS, 0)
    await site.assert_books_agree()


async def test_a_hold_that_was_never_sent_is_released_and_its_key_is_free_again(site: Site, client: Client) -> None:
    """As it is between authorize's commit and the provider's call."""

    def hold(number: int, body: bytes) -> Move:
        return Move(
            Action.AUTHORIZE,
            client.org.organization_id,
            UUID(int=SEED * 10 + number),
            client.org.admin,
            amount_micros=Micros(CALL_MICROS),
            mark_micros=Micros(INPUT_MICROS),
            lease_seconds=1,
            flags=Flag.STREAMED,
            model="demo-1",
            idempotency_key="the same",
            body_hash=body,
        )

    async with Batcher(site.database.dsn("bursar_lane")) as batcher:
        assert (await batcher.move(hold(1, b"body"))).accepted
        await client.until_no_hold_is_left()
        assert (await client.charges(), await client.pool()) == ([], (0, 0))
        assert (await batcher.move(hold(2, b"body"))).outcome is Outcome.ACCEPTED
        assert (await batcher.move(hold(3, b"other"))).outcome is Outcome.KEY_REUSED
    await client.until_no_hold_is_left()
    await site.assert_books_agree()


async def test_a_stream_whose_server_is_killed_is_charged_up_to_its_last_progress_mark(
    site: Site, client: Client
) -> None:
    seen = 0

    async def read() -> None:
        nonlocal seen
        directions = "piece_ms=20; output_tokens=2000"
        async with client.post(site.single.url, directions, stream=True, max_tokens=2000) as answer:
            async for line in answer.content:
                seen += b'"content":"' in line and b'"content":""' not in line

    reading = asyncio.create_task(unless_killed(read()))

    async def has_progress() -> bool:
        return any(hold[2] > INPUT_MICROS for hold in await client.holds())

    await until(has_progress)
    await asyncio.sleep(0.3)
    await asyncio.to_thread(site.single.end, signal.SIGKILL)
    await reading
    [(_, _, progress)] = await client.holds()
    await client.until_no_hold_is_left()
    [(_, _, charged, flags)] = await client.charges()
    assert charged == progress
    assert INPUT_MICROS < charged <= INPUT_MICROS + TOKEN_MICROS * (seen + 10)
    assert flags & (ESTIMATED | STREAMED | BY_EXPIRY) == ESTIMATED | STREAMED | BY_EXPIRY
    assert await client.pool() == (charged, 0)
    await site.assert_books_agree()


async def test_a_server_that_is_told_to_stop_ends_its_streams_and_settles_everything(
    site: Site, client: Client
) -> None:
    process = site.double

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
    rows = await client.charges()
    assert sorted(row[2] for row in rows) == [CALL_MICROS] * 5 + [INPUT_MICROS + 200 * TOKEN_MICROS] * 5
    assert all(row[3] & ESTIMATED == 0 for row in rows)
    assert (await client.holds(), (await client.pool())[1]) == ([], 0)
    await site.assert_books_agree()


@on_linux
async def test_server_processes_end_when_what_supervises_them_is_killed(site: Site, client: Client) -> None:
    """They would keep the port, and nobody would start or stop them any more."""
    workers = site.double.workers()
    assert len(workers) == 2
    await asyncio.to_thread(site.double.end, signal.SIGKILL)

    async def have_ended() -> bool:
        return not any(os.path.exists(f"/proc/{pid}") for pid in workers)  # noqa: ASYNC240

    await until(have_ended)
    await asyncio.to_thread(site.double.start)


# -- the first start


async def test_a_server_killed_while_it_makes_and_migrates_its_database_starts_the_next_time() -> None:
    rng = random.Random(SEED)
    longest = 0.0
    for _ in range(figure("first starts")):
        folder = open_folder("first")
        environment = {**os.environ, "BURSAR_MASTER_KEY": MASTER_KEY, "BURSAR_DATA_DIR": str(folder / "data")}
        environment.pop("DATABASE_URL", None)
        process, server = Process(environment, folder / "log"), EmbeddedServer(folder / "data")
        try:
            process.launch()
            await asyncio.sleep(rng.random() * (longest or 3.0))
            await asyncio.to_thread(process.end, signal.SIGKILL)
            if rng.random() < 0.3 and (folder / "data" / "postgres").exists() and server.pid is not None:
                os.kill(server.pid, signal.SIGKILL)
            began = time.monotonic()
            await asyncio.to_thread(process.start)
            longest = max(longest, time.monotonic() - began)
            settings = Settings(data_dir=folder / "data", database_url=server.dsn, given_master_key=MASTER_KEY)
            async with db.opened(settings, migrate=False) as opened, opened.platform() as conn:
                assert await verify(conn) == []
        finally:
            if process.is_running:
                await asyncio.to_thread(process.end, signal.SIGTERM)
            await asyncio.to_thread(server.remove)
            shutil.rmtree(folder, ignore_errors=True)
    tell(f"{figure('first starts')} first starts killed")
