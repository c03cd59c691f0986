"""R20: a full disk refuses new work cleanly, what runs is booked, reads go on; with room again all goes on."""

import asyncio
import os
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import pytest
from tests.conftest import MakeOrg
from tests.gateway.conftest import fund
from tests.promises.figures import SEED, figure, tell
from tests.promises.sites import Client, Site, Tally, built, open_folder, until

from bursar import db
from bursar.db.space import RESERVE_BYTES
from bursar.money import Micros

DISK_BYTES = 4 * RESERVE_BYTES
CALLERS = 4


@pytest.fixture(scope="module")
def disk() -> Iterator[Path]:
    """A small file system of its own."""
    folder = open_folder("disk")
    options = f"size={DISK_BYTES},mode=0711"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        folder.rmdir()
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
    folder.rmdir()


@pytest.fixture(scope="module")
async def site(disk: Path) -> AsyncIterator[Site]:
    async with built(disk / "data") as site:
        yield site


@pytest.fixture(scope="module")
def database(site: Site) -> db.Database:
    """The fixtures that make organizations make them here."""
    return site.database


@pytest.fixture
async def client(make_org: MakeOrg) -> AsyncIterator[Client]:
    org = await make_org()
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    headers = {"authorization": f"Bearer {key.text}"}
    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as http:
        yield Client(org, key.text, http)


def left_on(disk: Path) -> int:
    found = os.statvfs(disk)
    return found.f_bavail * found.f_frsize


def fill(disk: Path, *, leave: int) -> None:
    """Another program's file, so large that so many bytes are left."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, left_on(disk) - leave))


async def read(site: Site, client: Client, seen: list[int]) -> None:
    """Figures of the organization, again and again."""
    while True:
        async with client.http.get(f"{site.single.url}/api/v1/organizations/{client.org.slug}/overview") as answer:
            seen.append(answer.status)
            await answer.read()
        await asyncio.sleep(0.02)


async def refusal(site: Site, client: Client) -> tuple[int, Any, str | None]:
    """(status, code, Retry-After) of a call."""
    async with client.post(site.single.url) as answer:
        document = await answer.json()
        return answer.status, document.get("error", {}).get("code"), answer.headers.get("retry-after")


async def test_a_full_disk_refuses_new_work_and_nothing_else_and_is_used_again_by_itself(
    site: Site, client: Client, disk: Path
) -> None:
    rng, tally, stop = random.Random(SEED), Tally(), asyncio.Event()
    work = [
        asyncio.create_task(client.keep_calling([site.single.url], tally, random.Random(rng.random()), stop))
        for _ in range(CALLERS)
    ]
    reads: list[int] = []
    reading = asyncio.create_task(read(site, client, reads))
    try:
        for _ in range(figure("fills")):
            await asyncio.sleep(rng.random())
            running = asyncio.create_task(plain_call(site, client))

            async def is_held() -> bool:
                [held] = await client.rows("select count(*) from credits.holds where model = 'demo-1-mini' and is_sent")
                return bool(held[0])

            await until(is_held)
            fill(disk, leave=rng.randrange(RESERVE_BYTES // 3, RESERVE_BYTES))

            async def is_refused() -> bool:
                return (await refusal(site, client))[0] != 200

            await until(is_refused, 5)
            for _ in range(5):
                assert await refusal(site, client) == (503, "disk_full", "5")
            assert await running == "0.0009", "what ran is settled"
            keys, looks = tally.keys, len(reads)
            await asyncio.sleep(0.5)
            assert tally.keys <= keys + CALLERS, "nothing new was taken on"
            assert len(reads) > looks
            async with client.http.post(f"{site.single.url}/sign-out") as answer:
                assert answer.status < 500 or answer.headers["retry-after"]
            await site.assert_books_agree()
            (disk / "filler").unlink()

            async def serves_again(keys: int = tally.keys) -> bool:
                return tally.keys >= keys + CALLERS

            await until(serves_again, 60)
            await site.assert_books_agree()
    finally:
        (disk / "filler").unlink(missing_ok=True)
        stop.set()
        reading.cancel()
        await asyncio.wait([*work, reading], timeout=60)
    for task in work:
        task.result()
    await client.until_no_hold_is_left()
    told = {status: reads.count(status) for status in set(reads)}
    tell(f"{figure('fills')} fills: {tally}; reads {told}")
    assert set(told) == {200}, "reads go on"
    # The calls of this test itself have no key.
    rows = await client.charges()
    tally.keys = len(rows)
    await client.assert_exactly_once(site, tally)


async def plain_call(site: Site, client: Client) -> str:
    """A call that takes a while, of a model that nobody else calls; what it was charged."""
    async with client.post(site.single.url, "delay_ms=1500", model="demo-1-mini") as answer:
        assert answer.status == 200
        return str(answer.headers["bursar-charged"])


async def test_a_disk_that_is_full_to_the_last_byte_ends_the_database_which_comes_back_when_there_is_room(
    site: Site, client: Client, disk: Path
) -> None:
    """Nobody holds back here: another session writes until PostgreSQL cannot go on."""
    fill(disk, leave=0)
    before = site.server.pid

    async def is_refused() -> bool:
        return (await refusal(site, client))[0] == 503

    await until(is_refused)
    with pytest.raises(psycopg.OperationalError):
        async with await psycopg.AsyncConnection.connect(site.database.dsn("admin"), autocommit=True) as conn:
            for _ in range(1000):
                await conn.execute("create table if not exists t (n int); drop table t; select pg_switch_wal()")

    async def has_gone() -> bool:
        return site.server.pid != before

    await until(has_gone, 60)
    async with client.post(site.single.url) as answer:
        assert (answer.status, "retry-after" in answer.headers) == (503, True)
    (disk / "filler").unlink()

    async def serves() -> bool:
        async with client.post(site.single.url) as answer:
            return answer.status == 200

    await until(serves, 60)
    await site.assert_books_agree()
    tell(f"PostgreSQL {before} ended, {site.server.pid} serves")
