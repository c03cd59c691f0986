"""Seals: a chain for each organization over all of its rows, which shows what a hand in the database did."""

import asyncio
import hashlib
from typing import Any

import psycopg
import pytest
from tests.audit.tampering import Tamperer, add_event, seal_everything, used_scene, write_number

from bursar import db
from bursar.audit import hashes, seals, tampering

Admin = psycopg.Connection[Any]
NOT_SEALED = {
    "audit.seals": "contains itself",
    "outbox.events": "tells of what is sealed, and goes when it was told",
    "pricing.markups": "each change is an event of the audit, and each charge names its price",
    "pricing.override_rates": "as markups",
    "pricing.overrides": "as markups",
    "pricing.policies": "as markups",
}


async def findings(crooked: db.Database, scene: Any) -> list[str]:
    found = await tampering.check(crooked, organization_id=scene.organization)
    return [f"{each.subject}: {each.found}" for each in found]


async def test_what_is_as_it_was_sealed_is_not_complained_of(crooked: db.Database, admin: Admin) -> None:
    scene = used_scene(admin)
    done = await seal_everything(crooked)
    assert done.rows >= 12 + 3
    assert await findings(crooked, scene) == []
    scene.deduct(5, scene.user())
    add_event(admin, scene.organization)
    assert await findings(crooked, scene) == []  # not sealed yet
    await seal_everything(crooked)
    assert await findings(crooked, scene) == []
    assert scene.admin(
        "select array_agg(seal_number order by seal_number), sum((select sum(c) from unnest(row_counts) c)) "
        "from audit.seals where organization_id = %s",
        scene.organization,
    ) == [([1, 2], 12 + 3 + 2)]  # fmt: skip


async def test_a_transaction_that_runs_keeps_back_only_what_it_writes_late(crooked: db.Database, admin: Admin) -> None:
    before = used_scene(admin, 1)
    with psycopg.connect(crooked.dsn("admin")) as slow:
        add_event(slow, before.organization)
        after = used_scene(admin, 1)
        number = write_number(admin)
        async with crooked.platform() as conn:
            done = await seals.seal(conn)
        assert done.until_number < number
        assert not (await seals.seal_all(crooked, seconds=0)).is_all
        slow.commit()
    await seal_everything(crooked)
    for scene in (before, after):
        assert await findings(crooked, scene) == []
        assert len(scene.admin("select 1 from audit.seals where organization_id = %s", scene.organization)) >= 1


async def test_of_two_rounds_at_once_the_second_waits_and_goes_on_behind_the_first(
    crooked: db.Database, admin: Admin
) -> None:
    scene = used_scene(admin)
    # What ran elsewhere in the cluster when the last row was written keeps it from being sealed.
    began = admin.execute("select pg_snapshot_xmax(pg_current_snapshot())").fetchone()
    oldest = "select pg_snapshot_xmin(pg_current_snapshot())::text::bigint >= %s::text::bigint"
    while admin.execute(oldest, began).fetchone() == (False,):
        await asyncio.sleep(0.01)

    async def second_round() -> seals.Sealed:
        async with crooked.platform() as conn:
            return await seals.seal(conn)

    async with crooked.platform() as first:
        done = await seals.seal(first)
        again = asyncio.create_task(second_round())
        waits = "select exists (select from pg_locks where not granted and %s = any (pg_blocking_pids(pid)))"
        while not again.done() and admin.execute(waits, [first.info.backend_pid]).fetchone() == (False,):
            await asyncio.sleep(0.01)
    assert done.rows >= 12 + 3
    assert (await again).rows == 0
    assert await findings(crooked, scene) == []


async def test_what_is_sealed_is_never_taken_for_new_again(crooked: db.Database, admin: Admin) -> None:
    used_scene(admin, 1)
    done = await seal_everything(crooked)
    async with crooked.platform() as conn:
        await conn.execute("select audit.end_round(1)")
        assert (await seals.seal(conn)).rows == 0
        row = await (await conn.execute("select horizon from audit.sealing")).fetchone()
    assert row is not None
    assert row[0] >= done.until_number


@pytest.mark.parametrize(
    ("table", "change"),
    [
        ("audit.events", "reason = 'another'"),
        ("audit.events", "at = at + interval '1 microsecond'"),
        ("audit.events", "actor_kind = 'system'"),
        ("audit.events", "new_value = '{}'"),
        ("ledger.entries", "amount = amount + 1"),
        ("ledger.entries", "happened_at = happened_at - interval '1 day'"),
        ("ledger.entries", "actor_id = gen_random_uuid()"),
        ("credits.grants", "expires_at = now()"),
        ("ledger.attribution", "department_name = ''"),  # null is not the empty text
        ("ledger.attribution", "write_number = write_number - 1"),
    ],
)
async def test_any_column_of_any_table_is_sealed(
    crooked: db.Database, admin: Admin, tamperer: Tamperer, table: str, change: str
) -> None:
    scene = used_scene(admin, 3)
    await seal_everything(crooked)
    tamperer.do(f"update {table} set {change} where organization_id = %(org)s", org=scene.organization)
    [found, *_] = await findings(crooked, scene)
    assert found.startswith(f"{table} ")
    assert "changed" in found or "in no seal" in found or "inserted" in found


async def test_a_finding_names_the_row(crooked: db.Database, admin: Admin, tamperer: Tamperer) -> None:
    scene = used_scene(admin)
    await seal_everything(crooked)
    tamperer.do(
        "update ledger.attribution set charged_micros = 0, pool_id = null where {one}", org=scene.organization, at=4
    )
    [request] = scene.admin(
        "select request_id from ledger.attribution where organization_id = %s and pool_id is null", scene.organization
    )
    [found] = await findings(crooked, scene)
    assert "12 rows: 1 changed" in found
    assert f"request_id {request[0]}" in found


async def test_a_row_that_comes_where_no_seal_is_any_more_is_found(
    crooked: db.Database, admin: Admin, tamperer: Tamperer
) -> None:
    scene, silent = used_scene(admin, 2), used_scene(admin, 0)
    await seal_everything(crooked)
    scene.deduct(1, scene.user())
    await seal_everything(crooked)
    number = scene.admin("select max(until_number) - 1 from audit.seals")[0][0]
    insert = """
        insert into audit.events (organization_id, event_id, actor_kind, action, object_kind, object_id, write_number)
        values (%(org)s, gen_random_uuid(), 'operator', 'cap.changed', 'cap', gen_random_uuid(), %(number)s)"""
    tamperer.do(insert, org=silent.organization, number=number)
    [found] = await findings(crooked, silent)
    assert "audit.events after seal 1: 1 rows" in found
    assert await findings(crooked, scene) == []


async def test_seals_that_are_removed_or_made_anew_break_the_chain(
    crooked: db.Database, admin: Admin, tamperer: Tamperer
) -> None:
    scene = used_scene(admin, 2)
    for _ in range(3):
        await seal_everything(crooked)
        scene.deduct(1, scene.user())
    assert await findings(crooked, scene) == []
    tamperer.do("update audit.seals set sealed_at = now() where organization_id = %(org)s and seal_number = 2",
                org=scene.organization)  # fmt: skip
    [found] = await findings(crooked, scene)
    assert found.startswith("seal 2: ")
    tamperer.do("delete from audit.seals where organization_id = %(org)s and seal_number = 2", org=scene.organization)
    found_all = await findings(crooked, scene)
    assert "seal 2: the next one is seal 3" in found_all
    assert any("ledger.attribution after seal 1: 1 rows" in each for each in found_all)


async def test_a_column_that_is_added_later_leaves_old_seals_as_they_are(
    crooked: db.Database, admin: Admin, tamperer: Tamperer
) -> None:
    scene = used_scene(admin, 2)
    await seal_everything(crooked)
    admin.execute("alter table audit.events add column mood text")
    add_event(admin, scene.organization)
    await seal_everything(crooked)
    assert await findings(crooked, scene) == []
    tamperer.do("update audit.events set mood = 'bad' where organization_id = %(org)s", org=scene.organization)
    assert len(await findings(crooked, scene)) == 1  # only what was sealed with it
    tamperer.do("update audit.forms set column_names = column_names[1:9] where table_name = 'audit.events'")
    assert "changed or gone" in (await findings(crooked, scene))[0]
    tamperer.do("delete from audit.forms where table_name = 'audit.events' and 'mood' <> all (column_names)")
    admin.execute("alter table audit.events drop column mood")


async def test_every_append_only_table_of_organizations_is_sealed_or_has_a_reason_not_to_be(admin: Admin) -> None:
    rows = admin.execute(
        "select c.oid::regclass::text, t.table_name is not null from pg_trigger g join pg_class c on c.oid = g.tgrelid"
        " join pg_attribute a on a.attrelid = c.oid and a.attname = 'organization_id'"
        " left join audit.sealed_tables t on t.table_name = c.oid::regclass::text"
        " where g.tgname = 'append_only' and not c.relispartition"
    ).fetchall()
    assert {name for name, is_sealed in rows if not is_sealed} == set(NOT_SEALED)
    assert len(rows) > len(NOT_SEALED)


async def test_sealing_many_rows_ends_seals_between_transactions(
    crooked: db.Database, admin: Admin, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seals, "MOST_ROWS", 4)
    monkeypatch.setattr(seals, "ROWS_AT_ONCE", 3)
    monkeypatch.setattr(tampering, "MOST_ROWS", 5)
    scene = used_scene(admin, 12)
    await seal_everything(crooked)
    counts = scene.admin(
        "select (select sum(c) from unnest(row_counts) c) from audit.seals where organization_id = %s order by "
        "seal_number",
        scene.organization,
    )
    assert [row[0] for row in counts] == [4, 4, 4, 3]
    assert await findings(crooked, scene) == []
    with admin.transaction():  # of one write number, which is in one seal whatever comes of its size
        for _ in range(9):
            add_event(admin, scene.organization)
    add_event(admin, scene.organization)
    await seal_everything(crooked)
    assert await findings(crooked, scene) == []


def test_a_tree_is_that_of_rfc_6962() -> None:
    leaves = [bytes([n]) * 32 for n in range(7)]

    def expected(some: list[bytes]) -> bytes:
        if len(some) == 1:
            return some[0]
        split = 1 << ((len(some) - 1).bit_length() - 1)
        return hashlib.sha256(b"\x01" + expected(some[:split]) + expected(some[split:])).digest()

    for count in range(1, 8):
        tree = hashes.Tree()
        for leaf in leaves[:count]:
            tree.add(leaf)
        assert tree.root() == expected(leaves[:count])


async def test_the_index_finds_new_rows_without_reading_the_old(crooked: db.Database, admin: Admin) -> None:
    with admin.transaction(force_rollback=True):
        admin.execute(
            "insert into ledger.attribution (organization_id, request_id, booked_at, used_at, charged_micros, "
            "hold_micros, provider_cost_nano_usd) select gen_random_uuid(), gen_random_uuid(), now(), now(), 0, 0, 0 "
            "from generate_series(1, 30000)"
        )
        admin.execute("analyze ledger.attribution")
        plan = admin.execute(
            "explain select from ledger.attribution where write_number >= %s and write_number < %s",
            [2**50, 2**50 + 1000],
        ).fetchall()
    assert any("Bitmap Index Scan" in row[0] for row in plan), plan
