"""R19: the application's clock may jump; money is dated by the database, and periods end when they should."""

import asyncio
import os
import random
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import aiohttp
import psycopg
import pytest
from tests.conftest import MakeOrg
from tests.credits.scenes import Scene
from tests.gateway.conftest import fund
from tests.promises.figures import SEED, figure, tell
from tests.promises.sites import Client, Site, Tally, built, survive

from bursar import db
from bursar.money import Micros

HOUR, DAY = 3600, 86_400
JUMPS = (-DAY, -HOUR, 0, HOUR, DAY)
ZONES = (
    "UTC",
    "Europe/Paris",
    "America/New_York",
    "America/Havana",
    "Asia/Kolkata",
    "Pacific/Apia",
    "Australia/Lord_Howe",
)
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
async def site(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Its processes have clocks that are set from here."""
    folder = tmp_path_factory.mktemp("clocks")
    with pytest.MonkeyPatch.context() as patched:
        path = os.pathsep.join([str(HERE / "wrong_clock"), os.environ.get("PYTHONPATH", "")])
        patched.setenv("PYTHONPATH", path.rstrip(os.pathsep))
        patched.setenv("BURSAR_TEST_CLOCK", str(folder / "single"))
        for name in ("single", "double"):
            (folder / name).write_text("0")
        async with built() as site:
            site.double.environment["BURSAR_TEST_CLOCK"] = str(folder / "double")
            yield site


@pytest.fixture(scope="module")
def database(site: Site) -> db.Database:
    """The fixtures that make organizations make them here."""
    return site.database


@pytest.fixture
async def client(site: Site, make_org: MakeOrg) -> AsyncIterator[Client]:
    """A member with a key."""
    await site.start()
    org = await make_org()
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        headers={"authorization": f"Bearer {key.text}"}, connector=connector, timeout=aiohttp.ClientTimeout(total=60)
    ) as http:
        yield Client(org, key.text, http)


async def test_jumps_of_the_applications_clock_change_no_balance_and_no_order(site: Site, client: Client) -> None:
    jumps: list[int] = []

    async def jump(site: Site, tally: Tally, rng: random.Random) -> None:
        for process in site.processes:
            jumps.append(rng.choice(JUMPS))
            await asyncio.to_thread(Path(process.environment["BURSAR_TEST_CLOCK"]).write_text, str(jumps[-1]))

    [(began,)] = await client.rows("select clock_timestamp()")
    tally = await survive(site, client, figure("jumps"), jump, SEED)
    [(ended,)] = await client.rows("select clock_timestamp()")
    rows = await client.rows(
        "select request_id, booked_at, used_at from ledger.attribution where kind = 0 "
        "order by position_micros, booked_at"
    )
    assert all(began <= booked_at <= ended and began <= used_at <= ended for _, booked_at, used_at in rows)
    assert [row[1] for row in rows] == sorted(row[1] for row in rows)
    charged = sorted(tally.charged)
    for request_id in random.Random(SEED).sample(charged, min(20, len(charged))):
        async with client.http.get(f"{site.single.url}/api/v1/requests/{request_id}") as answer:
            assert (answer.status, (await answer.json())["state"]) == (200, "charged")
    tell(f"{len(jumps)} jumps by {sorted(set(jumps))} s while {tally}")


# ---------------------------------------------------------------------------------------------- periods


@pytest.fixture
def admin(database: db.Database) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """To set the scene."""
    with psycopg.connect(database.dsn("admin"), autocommit=True) as conn:
        yield conn


def boundaries(zone: str, period: str, at: datetime) -> tuple[datetime, datetime]:
    """Start and end of the period around an instant, by the calendar of the zone."""
    local = at.astimezone(ZoneInfo(zone)).replace(tzinfo=None)
    start, end = around(period, local)
    if instant(start, zone) > at:  # where midnight comes twice the day begins with the second
        start, end = around(period, start - timedelta(hours=1))
    return instant(start, zone), instant(end, zone)


def around(period: str, local: datetime) -> tuple[datetime, datetime]:
    """The same on a calendar without zone."""
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        return day, day + timedelta(days=1)
    if period == "week":
        monday = day - timedelta(days=day.weekday())
        return monday, monday + timedelta(days=7)
    first = day.replace(day=1)
    return first, (first + timedelta(days=32)).replace(day=1)


def instant(local: datetime, zone: str) -> datetime:
    """Of a local time: the second one where it comes twice, after the gap where it never comes."""
    first, second = (local.replace(tzinfo=ZoneInfo(zone), fold=fold).astimezone(UTC) for fold in (0, 1))
    return max(first, second)


def interesting(dice: random.Random, zone: str) -> datetime:
    """Around a month's end, a change of the clocks, or anywhere."""
    at = datetime(2020, 1, 1, tzinfo=UTC) + timedelta(seconds=dice.randrange(12 * 365 * DAY))
    kind = dice.randrange(3)
    if kind == 0:
        at = instant(at.replace(day=1, hour=0, minute=0, second=0, tzinfo=None), zone)
    elif kind == 1:
        for _ in range(400):
            if (
                at.astimezone(ZoneInfo(zone)).utcoffset()
                != (at + timedelta(days=1)).astimezone(ZoneInfo(zone)).utcoffset()
            ):
                break
            at += timedelta(days=1)
    return at + timedelta(seconds=dice.choice([-DAY, -HOUR, -1, 0, 1, HOUR, DAY]), microseconds=dice.choice([-1, 0, 1]))


def test_periods_begin_and_end_when_the_calendar_says(admin: psycopg.Connection[tuple[object, ...]]) -> None:
    dice = random.Random(SEED)
    for _ in range(figure("instants")):
        zone = dice.choice(ZONES)
        scene = Scene(admin, zone=zone, now=interesting(dice, zone))
        user = scene.user()
        scene.grant(scene.pool(), 1000)
        limits = {period: scene.limit(900, period=period) for period in ("day", "week", "month")}
        assert scene.deduct(3, user).accepted
        for period, limit in limits.items():
            start, end = boundaries(zone, period, scene.now)
            found = scene.admin(
                "select period_start, period_end, used_amount from credits.balances b join credits.limits l"
                " on l.organization_id = b.organization_id and l.balance_id = b.balance_id"
                " where l.organization_id = %s and l.limit_id = %s", scene.organization, limit,
            )  # fmt: skip
            assert found == [(start, end, 3)], f"{period} around {scene.now} in {zone}"
        start, end = boundaries(zone, "day", scene.now)
        for at, used in ((end - timedelta(microseconds=1), 5), (end, 2), (end + timedelta(microseconds=1), 4)):
            scene.now = at
            assert scene.deduct(2, user).accepted
            [(counted,)] = scene.admin(
                "select b.used_amount from credits.balances b join credits.limits l"
                " on l.organization_id = b.organization_id and l.balance_id = b.balance_id"
                " where l.limit_id = %s and period_start <= %s and period_end > %s", limits["day"], at, at,
            )  # fmt: skip
            assert counted == used, f"at {at}, the day that ends {end} in {zone}"
    tell(f"{figure('instants')} instants around month ends and changes of clocks")
