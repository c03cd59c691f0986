"""A worker that is killed between a level and its alert loses nothing and doubles nothing."""

import asyncio
import os
import random
import subprocess
import sys

import psycopg
from tests.alerts.conftest import House
from tests.alerts.test_levels import _house_in
from tests.conftest import MASTER_KEY

from bursar import db
from bursar.alerts import looking
from bursar.credits.limits import Period

KILLS = 8
WORKER = """
import asyncio
from bursar import db
from bursar.alerts import looking
from bursar.settings import Settings

looking.PAUSE_SECONDS = 0
looking.LEASE_SECONDS = 0.3

async def work():
    async with db.opened(Settings.from_environment()) as database:
        print("ready", flush=True)
        while True:
            await looking.look(database)

asyncio.run(work())
"""


def started(database: db.Database) -> "subprocess.Popen[bytes]":
    """A process that looks again and again, ready."""
    environment = os.environ | {
        "DATABASE_URL": str(database.settings.database_url),
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(database.settings.data_dir),
    }
    child = subprocess.Popen([sys.executable, "-c", WORKER], env=environment, stdout=subprocess.PIPE)
    assert child.stdout is not None
    assert child.stdout.readline() == b"ready\n"
    return child


async def test_each_level_is_told_once_though_workers_are_killed_while_they_tell(alone: db.Database) -> None:
    houses = [await _house_in(alone) for _ in range(4)]
    for house in houses:
        await house.fund(1000)
        await house.cap(100, period=Period.DAY)

    async def spend(house: House) -> None:
        for _ in range(25):
            await house.spend(4)
            await asyncio.sleep(0.05)

    spending = asyncio.gather(*(spend(house) for house in houses))
    chance = random.Random(17)
    for _ in range(KILLS):
        worker = await asyncio.to_thread(started, alone)
        await asyncio.sleep(chance.random() * 0.3)
        worker.kill()
        await asyncio.to_thread(worker.wait)
    await spending
    async with await psycopg.AsyncConnection.connect(alone.dsn("admin")) as conn:
        await conn.execute(
            "update alerts.looks set leased_until = '-infinity', looked_until = looked_until - '2 s'::interval"
        )
    await looking.look(alone)
    for house in houses:
        told = await house.told("limit")
        assert [each for alert in told for each in alert.payload["passed"]] == ["50", "80", "90", "100"]
        assert [each.sequence for each in told] == list(range(1, len(told) + 1))
