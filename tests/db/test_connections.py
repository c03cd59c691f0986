"""Who sees what on which connection, and what happens to a transaction that goes wrong."""

from uuid import UUID

import psycopg
import pytest
from psycopg import AsyncConnection

from bursar import db
from bursar.clock import uuid7

CURRENT = "select nullif(current_setting('app.organization_id', true), '')::uuid"


async def test_the_organization_is_set_inside_the_transaction_and_gone_after_it(database: db.Database) -> None:
    organization_id = uuid7()
    async with database.tenant(organization_id) as conn:
        assert await db.fetch_value(conn, CURRENT) == organization_id
    async with database.untenanted() as conn:
        assert await db.fetch_value(conn, CURRENT) is None


async def test_each_kind_of_transaction_has_its_own_role(database: db.Database) -> None:
    async with database.tenant(uuid7()) as conn:
        assert await db.fetch_value(conn, "select current_user") == "bursar_app"
    async with database.platform() as conn:
        assert await db.fetch_value(conn, "select current_user") == "bursar_platform"
    for role in ("bursar_lane", "bursar_simulator"):
        async with await AsyncConnection.connect(database.dsn(role)) as conn:
            assert await db.fetch_value(conn, "select current_user") == role


async def test_sessions_speak_utc(database: db.Database) -> None:
    async with database.untenanted() as conn:
        assert await db.fetch_value(conn, "show timezone") == "UTC"


async def test_a_block_that_raises_is_rolled_back(database: db.Database) -> None:
    with pytest.raises(RuntimeError, match="broken off"):
        async with database.untenanted() as conn:
            await conn.execute("create temporary table kept_nothing (x integer) on commit preserve rows")
            raise RuntimeError("broken off")
    async with database.untenanted() as conn:
        assert await db.fetch_value(conn, "select to_regclass('pg_temp.kept_nothing')") is None


async def test_an_error_that_was_swallowed_does_not_pass_for_a_commit(database: db.Database) -> None:
    with pytest.raises(AssertionError, match="swallowed"):
        async with database.untenanted() as conn:
            with pytest.raises(psycopg.errors.DivisionByZero):
                await conn.execute("select 1 / 0")


async def test_a_connection_that_broke_in_the_pool_is_replaced(database: db.Database, admin_dsn: str) -> None:
    own = db.Database(database.settings, admin_dsn)
    await own.open()
    async with own.untenanted() as first, own.untenanted() as second:
        pids = [await db.fetch_value(conn, "select pg_backend_pid()") for conn in (first, second)]
    async with await AsyncConnection.connect(admin_dsn) as admin:
        await admin.execute("select pg_terminate_backend(pid, 5000) from unnest(%s::int[]) pid", [pids])
    async with own.untenanted() as conn:
        assert await db.fetch_value(conn, "select pg_backend_pid()") not in pids
    await own.close()


async def test_only_a_uuid_can_be_a_tenant(database: db.Database) -> None:
    with pytest.raises(AssertionError):
        async with database.tenant("'; drop table x; --"):  # type: ignore[arg-type]
            pass
    assert isinstance(uuid7(), UUID)
