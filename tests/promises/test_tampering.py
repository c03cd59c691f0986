"""R24: whatever a hand changes in the record is found and named, and nothing else is."""

import asyncio
import os
import random
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from tests.audit.tampering import TAMPERINGS, Tamperer, seal_everything, used_scene
from tests.conftest import SERVER_OPTIONS
from tests.credits.racing import Lane, Traffic, lanes
from tests.credits.scenes import Scene
from tests.promises.figures import SEED, figure, tell
from tests.promises.sites import open_folder

from bursar import db
from bursar.audit import anchors, seals, tampering
from bursar.clock import now
from bursar.db.embedded import EmbeddedServer
from bursar.db.postgres import find_postgres
from bursar.db.roles import ensure_roles

KINDS = [*TAMPERINGS, "tail cut"]
CHARGES = 12


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where anchors are kept."""
    return tmp_path


def anchored(crooked: db.Database, folder: Path) -> db.Database:
    """The same database, with anchors."""
    return db.Database(replace(crooked.settings, anchor_dir=folder), crooked.dsn("admin"))


@asynccontextmanager
async def keeping_anchors(crooked: db.Database, folder: Path) -> AsyncIterator[db.Database]:
    """With pools of its own."""
    database = anchored(crooked, folder)
    await database.open()
    try:
        yield database
    finally:
        await database.close()


def cut_tail(tamperer: Tamperer, scene: Scene) -> None:
    """Remove the newest rows with their seal, as if they had never been."""
    org = scene.organization
    number = scene.admin("select max(from_number) from audit.seals where organization_id = %s", org)[0][0]
    for table in ("ledger.attribution", "ledger.entries", "credits.grants", "audit.events"):
        tamperer.do(f"delete from {table} where organization_id = %(org)s and write_number >= %(n)s", org=org, n=number)
    cut = "delete from audit.seals where organization_id = %(org)s and from_number = %(n)s"
    assert tamperer.do(cut, org=org, n=number) == 1


async def test_each_kind_of_tampering_is_found_and_named(
    crooked: db.Database, admin: psycopg.Connection[Any], tamperer: Tamperer, folder: Path
) -> None:
    dice = random.Random(SEED)
    kinds = [KINDS[n % len(KINDS)] for n in range(figure("tamperings"))]
    scenes = [used_scene(admin, CHARGES) for _ in kinds]
    other = used_scene(admin, CHARGES)
    await seal_everything(crooked)
    for scene in scenes:
        scene.deduct(3, scene.user())
    await seal_everything(crooked)
    async with keeping_anchors(crooked, folder) as database:
        assert await anchors.anchor(database) == [str(folder / anchors.FILE_NAME)]
    for kind, scene in zip(kinds, scenes, strict=True):
        if kind == "tail cut":
            cut_tail(tamperer, scene)
            continue
        first, second = dice.sample(range(CHARGES), 2)
        asked = TAMPERINGS[kind].replace("{first}", pick(first)).replace("{second}", pick(second))
        touched = tamperer.do(asked, org=scene.organization, other=other.organization, at=first)
        assert touched == (2 if kind == "rows swapped" else 1), kind

    async with crooked.platform() as conn:
        outside = await anchors.check(conn, folder / anchors.FILE_NAME)
    for kind, scene in zip(kinds, scenes, strict=True):
        inside = await tampering.check(crooked, organization_id=scene.organization)
        if kind == "tail cut":
            assert inside == []
            [found] = [each for each in outside if each.organization_id == scene.organization]
            assert (found.subject.split(",")[0], found.found) == ("seal 2", "no such seal; the newest is 1")
            continue
        [found] = inside
        assert found.subject.startswith("ledger.attribution in seal 1 (rows written at any time and before 20"), kind
        assert found.found.startswith(FOUND[kind]), (kind, found)
    [found, *_] = await tampering.check(crooked, organization_id=other.organization)
    assert "inserted (request_id " in found.found
    tell(f"{len(kinds)} tamperings of {len(KINDS)} kinds, all found")


FOUND = {
    "text changed": "12 rows: 1 changed (request_id ",
    "time changed": "12 rows: 1 changed (request_id ",
    "actor changed": "12 rows: 1 changed (request_id ",
    "row removed": "11 rows: 1 removed",
    "rows swapped": "12 rows: 2 changed (request_id ",
    "row moved to another organization": "11 rows: 1 removed",
    "row inserted": "13 rows: 1 inserted (request_id ",
}


def pick(at: int) -> str:
    """SQL of the request at a place among an organization's."""
    return (
        "(select request_id from ledger.attribution where organization_id = %(org)s order by booked_at, request_id "
        f"offset {at} limit 1)"
    )


async def test_sealed_rows_raise_no_alarm_while_others_are_written_and_after_vacuum_dump_and_restore(
    crooked: db.Database, admin: psycopg.Connection[Any]
) -> None:
    busy = Scene(admin, now=now())
    users = [busy.user() for _ in range(3)]
    busy.grant(busy.pool(), 10**9)
    many = [used_scene(admin, 0) for _ in range(5)]
    stop = threading.Event()

    def drive(lane: Lane, seed: int) -> int:
        traffic, steps = Traffic(busy, lane, users, random.Random(SEED + seed)), 0
        while not stop.is_set():
            traffic.step()
            steps += 1
        traffic.end()
        return steps

    rounds = 0
    with lanes(crooked, 2) as connected, ThreadPoolExecutor(3) as threads:
        driving = [threads.submit(drive, lane, n) for n, lane in enumerate(connected)]
        filling = threads.submit(fill, crooked, many, figure("sealed rows"))
        while not filling.done() or rounds < 3:
            async with crooked.platform() as conn:
                await seals.seal(conn)
            rounds += 1
            assert await tampering.check(crooked, organization_id=busy.organization) == []
            await asyncio.sleep(0.2)
        stop.set()
        steps = sum(each.result() for each in driving)
    await seal_everything(crooked)
    organizations = [busy.organization, *(scene.organization for scene in many)]
    await none_is_found(crooked, organizations)
    admin.execute("vacuum (freeze) ledger.attribution")
    await none_is_found(crooked, organizations)
    tell(f"{figure('sealed rows')} rows and {steps} steps, sealed in {rounds} rounds, no alarm")

    folder = open_folder("restored")
    with another_cluster(folder) as dsn:
        settings = replace(crooked.settings, database_url=dsn)
        async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
            await ensure_roles(conn, settings.master_key)
        copy_database(crooked.dsn("admin"), dsn)
        async with db.opened(settings, migrate=True) as restored:
            await none_is_found(restored, organizations)
            with psycopg.connect(dsn, autocommit=True) as conn:
                scene = used_scene(conn, 5)
                busy_again = Scene.__new__(Scene)
                busy_again.__dict__ |= {**busy.__dict__, "conn": conn, "now": now()}
                busy_again.deduct(1, users[0])
            await seal_everything(restored)
            await none_is_found(restored, [*organizations, scene.organization])
            with psycopg.connect(dsn, autocommit=True) as conn:
                assert conn.execute("select array_agg(epoch order by epoch) from audit.epochs").fetchone() == ([1, 2],)


async def none_is_found(database: db.Database, organizations: list[Any]) -> None:
    """No alarm in any of them."""
    for each in organizations:
        assert await tampering.check(database, organization_id=each) == []


def fill(database: db.Database, scenes: list[Scene], rows: int) -> None:
    """Rows of several organizations, some transactions at once, some of which take their time or are rolled back."""
    insert = """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, provider, model,
            charged_micros, hold_micros, provider_cost_nano_usd, input_tokens)
        select %s, gen_random_uuid(), clock_timestamp(), clock_timestamp(), 'openai', 'gpt-5', 0, 0, 9000, n
        from generate_series(1, %s) n"""
    with psycopg.connect(database.dsn("admin")) as one, psycopg.connect(database.dsn("admin")) as two:
        done, turn = 0, 0
        while done < rows:
            turn += 1
            count = min(2_000, rows - done)
            for conn in (one, two):
                conn.execute(insert, [scenes[turn % len(scenes)].organization, max(1, count // 2)])
            if turn % 7 == 0:
                one.rollback()
            two.commit()
            one.commit()
            done += count


@contextmanager
def another_cluster(folder: Path) -> Iterator[str]:
    """The admin's connection string of a new server of its own."""
    given = os.environ.get("BURSAR_PG_BIN")
    server = EmbeddedServer(folder, pg_bin=Path(given) if given else None, options=SERVER_OPTIONS)
    server.start()
    try:
        with psycopg.connect(server.dsn, autocommit=True) as conn:
            conn.execute(
                sql.SQL("create database {} template template0 encoding 'UTF8' lc_collate 'C' lc_ctype 'C'").format(
                    sql.Identifier("restored")
                )
            )
        yield make_conninfo("", **{**conninfo_to_dict(server.dsn), "dbname": "restored"})
    finally:
        server.stop()
        server.remove()


def copy_database(source: str, target: str) -> None:
    """pg_dump | psql, with the programs of the server's own version."""
    given = os.environ.get("BURSAR_PG_BIN")
    bin_folder = find_postgres(Path(given) if given else None).bin
    dump = subprocess.Popen([bin_folder / "pg_dump", "--dbname", source], stdout=subprocess.PIPE)
    restore = subprocess.run(
        [bin_folder / "psql", "--quiet", "--set", "ON_ERROR_STOP=1", "--dbname", target],
        stdin=dump.stdout, stdout=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    assert (dump.wait(), restore.returncode) == (0, 0)
