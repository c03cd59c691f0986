"""Anchors: lines outside the database that show what was cut off its end, and that were not changed themselves."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from aiohttp import web
from tests.audit.tampering import Tamperer, add_event, seal_everything, used_scene

from bursar import db
from bursar.audit import anchors
from bursar.audit import jobs as audit_jobs
from bursar.credits import jobs
from bursar.db.migrate import NEW_CLUSTER, SchemaBehind, migrate, require_current, status
from bursar.settings import SettingError, Settings

Admin = psycopg.Connection[Any]


@pytest.fixture
async def anchored(crooked: db.Database, tmp_path: Path) -> AsyncIterator[db.Database]:
    """The database with anchors in a folder of the test's own."""
    database = db.Database(replace(crooked.settings, anchor_dir=tmp_path), crooked.dsn("admin"))
    await database.open()
    yield database
    await database.close()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / anchors.FILE_NAME).read_text().splitlines()]


async def found_by(database: db.Database, folder: Path) -> list[str]:
    async with database.platform() as conn:
        found = await anchors.check(conn, folder / anchors.FILE_NAME)
    return [f"{each.subject.split(',')[0]}: {each.found}" for each in found]


async def test_each_line_names_what_is_new_and_follows_from_the_one_before(
    anchored: db.Database, admin: Admin, tmp_path: Path
) -> None:
    first, second = used_scene(admin, 2), used_scene(admin, 2)
    await seal_everything(anchored)
    await anchors.anchor(anchored)
    assert await anchors.anchor(anchored) == []  # none is due
    add_event(admin, second.organization)
    await seal_everything(anchored)
    await anchors.anchor(anchored, only_when_due=False)
    await anchors.anchor(anchored, only_when_due=False)
    one, two, three = lines(tmp_path)
    assert [one["anchor"], two["anchor"], three["anchor"]] == [1, 2, 3]
    assert {str(first.organization), str(second.organization)} <= one["heads"].keys()
    assert (two["heads"].keys(), three["heads"]) == ({str(second.organization)}, {})
    assert two["root"] == three["root"] != one["root"]
    assert one["organizations"] == three["organizations"] == len(one["heads"])
    assert await found_by(anchored, tmp_path) == []


async def test_seals_that_were_all_made_anew_are_found_and_when_it_began_is_said(
    anchored: db.Database, admin: Admin, tamperer: Tamperer, tmp_path: Path
) -> None:
    scene = used_scene(admin, 2)
    for _ in range(3):
        await seal_everything(anchored)
        await anchors.anchor(anchored, only_when_due=False)
        add_event(admin, scene.organization)
    tamperer.do(
        "update audit.seals set seal_hash = sha256(seal_hash) where organization_id = %(org)s and seal_number >= 2",
        org=scene.organization,
    )
    assert await found_by(anchored, tmp_path) == ["seal 2: a seal with another hash: it was made anew"]
    tamperer.do("delete from audit.seals where organization_id = %(org)s", org=scene.organization)
    assert await found_by(anchored, tmp_path) == ["seal 1: no seal at all"]


@pytest.mark.parametrize("change", ["line changed", "line removed", "line added", "last root"])
async def test_a_file_that_was_changed_itself_is_refused(
    anchored: db.Database, admin: Admin, tmp_path: Path, change: str
) -> None:
    used_scene(admin, 1)
    await seal_everything(anchored)
    for _ in range(3):
        await anchors.anchor(anchored, only_when_due=False)
    file = tmp_path / anchors.FILE_NAME
    written = file.read_text().splitlines()
    if change == "line changed":
        written[1] = written[1].replace('"anchor":2', '"anchor":7')
    elif change == "line removed":
        del written[1]
    elif change == "line added":
        written.insert(1, written[1])
    else:
        written[2] = json.dumps({**json.loads(written[2]), "root": "00" * 32}, separators=(",", ":"))
    file.write_text("\n".join(written) + "\n")
    with pytest.raises(anchors.AnchorsUnreadable):
        await found_by(anchored, tmp_path)


async def test_a_line_that_was_broken_off_is_written_again(anchored: db.Database, admin: Admin, tmp_path: Path) -> None:
    used_scene(admin, 1)
    await seal_everything(anchored)
    await anchors.anchor(anchored)
    file = tmp_path / anchors.FILE_NAME
    whole = file.read_text()
    file.write_text(whole + '{"anchor":2,"at"')
    await anchors.anchor(anchored, only_when_due=False)
    assert file.read_text().startswith(whole)
    assert [line["anchor"] for line in lines(tmp_path)] == [1, 2]
    file.write_text('{"anchor":1')
    await anchors.anchor(anchored, only_when_due=False)
    assert [line["anchor"] for line in lines(tmp_path)] == [1]


async def test_a_database_that_is_behind_its_anchors_gets_no_further_one(
    anchored: db.Database, admin: Admin, tamperer: Tamperer, tmp_path: Path
) -> None:
    used_scene(admin, 1)
    await seal_everything(anchored)
    await anchors.anchor(anchored)
    [horizon] = admin.execute("select horizon from audit.sealing").fetchone() or [0]
    tamperer.do("update audit.sealing set horizon = horizon - 1")
    with pytest.raises(anchors.AnchorFailed, match="behind"):
        await anchors.anchor(anchored, only_when_due=False)
    tamperer.do("update audit.sealing set horizon = %(horizon)s", horizon=horizon)
    assert len(lines(tmp_path)) == 1


@pytest.fixture
async def receive() -> AsyncIterator[Callable[[int], Awaitable[tuple[str, list[str]]]]]:
    """Somebody who keeps anchors: their address, and what they were sent; asked with the status they answer."""
    runners = []

    async def start(status_code: int) -> tuple[str, list[str]]:
        kept: list[str] = []

        async def take(request: web.Request) -> web.Response:
            kept.append(await request.text())
            return web.Response(status=status_code)

        application = web.Application()
        application.router.add_post("/anchors", take)
        runner = web.AppRunner(application)
        await runner.setup()
        runners.append(runner)
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/anchors", kept

    yield start
    for runner in runners:
        await runner.cleanup()


async def test_anchors_are_posted_and_count_when_they_were_taken(
    crooked: db.Database, admin: Admin, tmp_path: Path, receive: Callable[[int], Awaitable[tuple[str, list[str]]]]
) -> None:
    used_scene(admin, 1)
    await seal_everything(crooked)
    sulky, refused = await receive(500)
    willing, kept = await receive(204)
    for url in (sulky, willing):
        database = db.Database(replace(crooked.settings, anchor_url=url), crooked.dsn("admin"))
        await database.open()
        if url == sulky:
            with pytest.raises(anchors.AnchorFailed, match="did not take"):
                await anchors.anchor(database, only_when_due=False)
        else:
            for _ in range(2):
                assert await anchors.anchor(database, only_when_due=False) == ["http://127.0.0.1"]
        await database.close()
    assert json.loads(refused[0])["anchor"] == json.loads(kept[0])["anchor"]
    (tmp_path / anchors.FILE_NAME).write_text("".join(f"{text}\n" for text in kept))
    assert await found_by(crooked, tmp_path) == []


def test_anchors_go_nowhere_unencrypted() -> None:
    with pytest.raises(SettingError, match="BURSAR_ANCHOR_URL"):
        Settings.from_environment({"BURSAR_ANCHOR_URL": "http://elsewhere.example/anchors"})
    assert Settings.from_environment({"BURSAR_ANCHOR_URL": "https://elsewhere.example/a"}).anchor_url


# ---------------------------------------------------------------------------------------------- by themselves


async def test_several_workers_seal_and_anchor_once(anchored: db.Database, admin: Admin, tmp_path: Path) -> None:
    scene = used_scene(admin, 3)
    await asyncio.gather(*(audit_jobs.seal(anchored) for _ in range(4)))
    await seal_everything(anchored)
    await asyncio.gather(*(audit_jobs.anchor(anchored) for _ in range(4)))
    assert len(lines(tmp_path)) == 1
    numbers = admin.execute(
        "select array_agg(seal_number order by seal_number) from audit.seals where organization_id = %s",
        [scene.organization],
    ).fetchone()
    assert numbers is not None
    assert numbers[0] == list(range(1, len(numbers[0]) + 1))


async def test_the_worker_verifies_when_it_is_due_and_tells_what_it_found(
    crooked: db.Database, admin: Admin, tamperer: Tamperer
) -> None:
    scene = used_scene(admin, 1)
    await seal_everything(crooked)
    tamperer.do("update audit.epochs set began_at = now()")
    tamperer.do("delete from audit.verifications")
    assert not await jobs.verify_when_due(crooked)
    tamperer.do("update audit.epochs set began_at = now() - interval '25 hours'")
    tamperer.do("update audit.events set reason = 'x' where organization_id = %(org)s", org=scene.organization)
    assert await jobs.verify_when_due(crooked)
    assert not await jobs.verify_when_due(crooked)
    row = admin.execute("select organizations, differences, findings from audit.verifications").fetchone()
    assert row is not None
    assert row[0] >= 1
    assert row[1] >= 1
    assert str(scene.organization) in str(row[2]) or row[1] > jobs.MOST_KEPT
    assert jobs.DIFFERENCES._value.get() == row[1]


async def test_a_database_from_another_cluster_is_numbered_on_before_anything_is_written(
    crooked: db.Database, admin: Admin, tamperer: Tamperer
) -> None:
    scene = used_scene(admin, 1)
    await seal_everything(crooked)
    dsn, key = crooked.dsn("admin"), crooked.settings.master_key
    assert (await status(dsn)).is_current
    tamperer.do("update audit.epochs set system_identifier = 7 where epoch = (select max(epoch) from audit.epochs)")
    with pytest.raises(SchemaBehind, match="schema"):
        await require_current(dsn)
    before = admin.execute("select audit.write_number()").fetchone()
    assert (await migrate(dsn, key)).files == (NEW_CLUSTER,)
    assert (await migrate(dsn, key)).files == ()
    after = admin.execute("select audit.write_number()").fetchone()
    assert before is not None
    assert after is not None
    assert 2**48 <= after[0] - before[0] < 2**48 + 10**6
    add_event(admin, scene.organization)
    await seal_everything(crooked)
    assert admin.execute(
        "select count(*) from audit.seals where organization_id = %s", [scene.organization]
    ).fetchone() == (2,)
