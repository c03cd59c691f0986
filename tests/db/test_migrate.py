"""Migrations run once, whole or not at all; roles are made by a superuser and by a mere CREATEROLE admin."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bursar import db
from bursar.db import migrate
from bursar.db.connections import role_dsn
from bursar.db.embedded import EmbeddedServer
from bursar.db.migrate import Migration, Schema, SqlFile
from bursar.db.roles import GROUPS, LOGINS, RolesNotUsable, ensure_roles
from bursar.settings import Settings

SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
LOCK = "set local lock_timeout = '5s';\n"


@pytest.fixture
async def empty(admin_dsn: str) -> AsyncIterator[str]:
    """Admin's connection string of a new, empty database."""
    name = f"bursar_empty_{uuid4().hex[:12]}"
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as conn:
        await conn.execute(sql.SQL("create database {}").format(sql.Identifier(name)))
        yield make_conninfo("", **{**conninfo_to_dict(admin_dsn), "dbname": name})
        await conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture
def key(settings: Settings) -> bytes:
    return settings.master_key


def schema(*texts: str, files: dict[str, str] | None = None) -> Schema:
    """Migrations 1, 2, … with these texts; every one sets a lock_timeout, as it must."""
    migrations = tuple(Migration(number, f"step_{number}", LOCK + text) for number, text in enumerate(texts, 1))
    return Schema(migrations, tuple(SqlFile(path, text) for path, text in (files or {}).items()))


async def exists(dsn: str, relation: str) -> bool:
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        return bool(await db.fetch_value(conn, "select to_regclass(%(relation)s) is not null", relation=relation))


FIRST = "create schema try; create table try.one (x integer);"


async def test_a_migration_runs_once(empty: str, key: bytes) -> None:
    assert (await migrate.migrate(empty, key, schema=schema(FIRST))).migrations == ("0001_step_1",)
    assert (await migrate.migrate(empty, key, schema=schema(FIRST))).migrations == ()
    both = schema(FIRST, "create table try.two (x integer);")
    assert not (await migrate.status(empty, schema=both)).is_current
    assert (await migrate.migrate(empty, key, schema=both)).migrations == ("0002_step_2",)
    assert (await migrate.status(empty, schema=both)).is_current


async def test_what_a_migration_makes_belongs_to_the_owner_role(empty: str, key: bytes) -> None:
    await migrate.migrate(empty, key, schema=schema(FIRST))
    async with await psycopg.AsyncConnection.connect(empty) as conn:
        query = "select relowner::regrole::text from pg_class where oid = 'try.one'::regclass"
        assert await db.fetch_value(conn, query) == "bursar_owner"


async def test_a_migration_that_fails_leaves_nothing_and_the_run_can_be_repeated(empty: str, key: bytes) -> None:
    bad = schema(FIRST, "create table try.two (x integer);\n\nselect 1 / 0;")
    with pytest.raises(migrate.MigrationFailed, match="0002_step_2 failed.*division by zero"):
        await migrate.migrate(empty, key, schema=bad)
    assert await exists(empty, "try.one")
    assert not await exists(empty, "try.two")
    good = schema(FIRST, "create table try.two (x integer);")
    assert (await migrate.migrate(empty, key, schema=good)).migrations == ("0002_step_2",)


async def test_an_error_names_the_line_of_the_file(empty: str, key: bytes) -> None:
    with pytest.raises(migrate.MigrationFailed, match=r"line 4"):
        await migrate.migrate(empty, key, schema=schema("\n\ncreate table nowhere.at_all (x integer);"))


async def test_a_migration_may_not_end_its_own_transaction(empty: str, key: bytes) -> None:
    with pytest.raises(migrate.MigrationFailed, match="ends the transaction itself"):
        await migrate.migrate(empty, key, schema=schema(FIRST + "commit;"))


async def test_a_runner_that_was_killed_is_simply_run_again(empty: str, key: bytes) -> None:
    slow = schema(FIRST, "create table try.two (x integer); select pg_sleep(30);")
    run = asyncio.create_task(migrate.migrate(empty, key, schema=slow))
    async with await psycopg.AsyncConnection.connect(empty, autocommit=True) as conn:
        find = "select pid from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"
        while (pid := await db.fetch_value(conn, find)) is None:
            await asyncio.sleep(0.02)
        await conn.execute("select pg_terminate_backend(%s)", [pid])
    with pytest.raises(migrate.MigrationFailed):
        await run
    assert not await exists(empty, "try.two")
    assert (await migrate.migrate(empty, key, schema=schema(FIRST, "select 1;"))).migrations == ("0002_step_2",)


async def test_runners_at_the_same_time_do_the_work_once(empty: str, key: bytes) -> None:
    reports = await asyncio.gather(*[migrate.migrate(empty, key, schema=schema(FIRST)) for _ in range(4)])
    assert sorted(len(report.migrations) for report in reports) == [0, 0, 0, 1]


async def test_an_edited_migration_is_refused_by_name(empty: str, key: bytes) -> None:
    await migrate.migrate(empty, key, schema=schema(FIRST))
    edited = schema(FIRST + " -- better")
    with pytest.raises(migrate.MigrationEdited, match="0001_step_1 was changed after it was applied"):
        await migrate.migrate(empty, key, schema=edited)
    assert (await migrate.status(empty, schema=edited)).faults


async def test_line_ends_of_a_checkout_are_no_edit(empty: str, key: bytes) -> None:
    two_lines = schema(FIRST)
    await migrate.migrate(empty, key, schema=two_lines)
    windows = Schema(
        tuple(Migration(m.number, m.title, m.text.replace("\n", "\r\n")) for m in two_lines.migrations), ()
    )
    assert (await migrate.status(empty, schema=windows)).is_current


async def test_a_database_of_a_newer_version_is_refused(empty: str, key: bytes) -> None:
    await migrate.migrate(empty, key, schema=schema(FIRST, "select 1;"))
    with pytest.raises(migrate.MigrationEdited, match="a newer version ran here"):
        await migrate.migrate(empty, key, schema=schema(FIRST))


async def test_a_late_number_below_an_applied_one_is_refused(empty: str, key: bytes) -> None:
    late = schema(FIRST, "select 1;", "select 2;")
    without_second = Schema((late.migrations[0], late.migrations[2]), ())
    await migrate.migrate(empty, key, schema=without_second)
    with pytest.raises(migrate.MigrationEdited, match="0002_step_2 comes before 0003"):
        await migrate.migrate(empty, key, schema=late)


async def test_functions_are_applied_again_when_they_change_and_only_then(empty: str, key: bytes) -> None:
    body = "create or replace function try.answer() returns integer language sql as 'select {}';"
    for answer, expected in ((41, 1), (41, 0), (42, 1)):
        files = {"credits/functions.sql": body.format(answer)}
        report = await migrate.migrate(empty, key, schema=schema(FIRST, files=files))
        assert len(report.files) == expected
    async with await psycopg.AsyncConnection.connect(empty) as conn:
        assert await db.fetch_value(conn, "select try.answer()") == 42


async def test_functions_of_all_layers_change_together_or_not_at_all(empty: str, key: bytes) -> None:
    files = {
        "identity/functions.sql": "create function try.answer() returns integer language sql as 'select 1';",
        "credits/functions.sql": "select 1 / 0;",
    }
    with pytest.raises(migrate.MigrationFailed, match="credits/functions.sql"):
        await migrate.migrate(empty, key, schema=schema(FIRST, files=files))
    async with await psycopg.AsyncConnection.connect(empty) as conn:
        assert await db.fetch_value(conn, "select to_regproc('try.answer')") is None


async def test_a_fault_in_a_folder_of_functions_is_told_by_its_part_and_line(empty: str, key: bytes) -> None:
    text = f"{migrate.PART}10_first.sql\nselect 1;\n{migrate.PART}20_second.sql\nselect 1;\nselect from from;\n"
    with pytest.raises(migrate.MigrationFailed) as failed:
        await migrate.migrate(empty, key, schema=schema(FIRST, files={"credits/functions": text}))
    assert "20_second.sql line 2" in str(failed.value.why)


async def test_another_master_key_is_refused(empty: str, key: bytes) -> None:
    await migrate.migrate(empty, key, schema=schema(FIRST))
    async with await psycopg.AsyncConnection.connect(empty, autocommit=True) as conn:
        await conn.execute("update db.installation set fingerprint = 'of another key'")
    with pytest.raises(migrate.WrongMasterKey, match="master key"):
        await migrate.migrate(empty, key, schema=schema(FIRST))


async def test_the_shipped_schema_is_verified_as_current(database: db.Database) -> None:
    found = await migrate.status(database.dsn("admin"))
    assert found.is_current, found


def test_shipped_migrations_are_numbered_without_gaps_and_set_a_lock_timeout() -> None:
    migrations = migrate.load_schema().migrations
    assert [each.number for each in migrations] == list(range(1, len(migrations) + 1))
    assert all("set local lock_timeout" in each.text for each in migrations)


def test_every_sql_file_of_a_capability_is_known_to_the_runner() -> None:
    package = Path(migrate.__file__).parent.parent
    found = {
        str(path.relative_to(package))
        for name in migrate.REPEATABLE
        for path in [*package.glob(f"*/{name}.sql"), *package.glob(f"*/{name}/")]
    }
    assert found == {each.path for each in migrate.load_schema().files}


def test_names_and_numbers_of_migrations_are_checked() -> None:
    with pytest.raises(ValueError, match="NNNN_title"):
        migrate.parse_migrations([("1_x.sql", "")])
    with pytest.raises(ValueError, match="the same number"):
        migrate.parse_migrations([("0001_x.sql", ""), ("0001_y.sql", "")])


# Roles, on clusters of their own: roles belong to a cluster, and these break them.

BINARIES = [pytest.param(None, id="newest"), *([pytest.param(SYSTEM_15, id="15")] if SYSTEM_15.exists() else [])]


@pytest.fixture(params=BINARIES)
def cluster(request: pytest.FixtureRequest, new_server: Callable[..., EmbeddedServer]) -> Iterator[EmbeddedServer]:
    """A cluster where everyone but its superuser needs a password, and an admin who may only make roles."""
    server = new_server(pg_bin=request.param, options={"fsync": "off"})
    server.start()
    with psycopg.connect(server.dsn, autocommit=True) as conn:
        conn.execute("create role installer login createrole password 'installer'")
        conn.execute("create database hosted owner installer")
        hba = Path(str(conn.execute("show hba_file").fetchone()[0]))  # type: ignore[index]
        hba.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        conn.execute("select pg_reload_conf()")
    return server


def as_installer(server: EmbeddedServer) -> str:
    parts = {**conninfo_to_dict(server.dsn), "user": "installer", "password": "installer", "dbname": "hosted"}
    return make_conninfo("", **parts)


async def test_an_admin_who_may_only_make_roles_sets_up_everything(cluster: EmbeddedServer, key: bytes) -> None:
    admin = as_installer(cluster)
    await migrate.migrate(admin, key)
    assert (await migrate.migrate(admin, key)).migrations == ()
    for role in LOGINS:
        async with await psycopg.AsyncConnection.connect(role_dsn(admin, role, key)) as conn:
            assert await db.fetch_value(conn, "select current_user") == role
        with pytest.raises(psycopg.OperationalError, match="password"):
            await psycopg.AsyncConnection.connect(role_dsn(admin, role, b"another key"))


async def test_roles_have_no_rights_beyond_their_own(cluster: EmbeddedServer, key: bytes) -> None:
    await migrate.migrate(cluster.dsn, key, schema=schema(FIRST))
    query = """
        select rolname, rolcanlogin from pg_roles where rolname like 'bursar%%'
        and not (rolsuper or rolcreaterole or rolcreatedb or rolreplication or rolbypassrls) order by rolname
    """
    async with await psycopg.AsyncConnection.connect(cluster.dsn) as conn:
        found = dict(await (await conn.execute(query)).fetchall())
        assert found == dict.fromkeys(GROUPS, False) | dict.fromkeys(LOGINS, True)
        members = "select count(*) from pg_auth_members where member::regrole::text = any(%(roles)s)"
        assert await db.fetch_value(conn, members, roles=[*GROUPS, *LOGINS]) == 0


async def test_passwords_are_never_in_the_log(cluster: EmbeddedServer, key: bytes) -> None:
    async with await psycopg.AsyncConnection.connect(cluster.dsn, autocommit=True) as conn:
        await conn.execute("alter system set log_statement = 'all'")
        await conn.execute("select pg_reload_conf()")
        await asyncio.sleep(0.2)
    await migrate.migrate(cluster.dsn, key, schema=schema(FIRST))
    text = (cluster.home.path / "postgres.log").read_text()
    assert "SCRAM-SHA-256$" in text
    assert all(str(conninfo_to_dict(role_dsn(cluster.dsn, role, key))["password"]) not in text for role in LOGINS)


async def test_roles_of_another_installation_are_not_taken_over_by_accident(
    cluster: EmbeddedServer, key: bytes
) -> None:
    await migrate.migrate(cluster.dsn, b"the first installation's key", schema=schema(FIRST))
    other = as_installer(cluster)
    with psycopg.connect(cluster.dsn, autocommit=True) as conn:
        conn.execute("alter database hosted owner to postgres")
    other = make_conninfo("", **{**conninfo_to_dict(cluster.dsn), "dbname": "hosted"})
    with pytest.raises(RolesNotUsable, match="another master key"):
        await migrate.migrate(other, key, schema=schema(FIRST))
    await migrate.migrate(other, key, schema=schema(FIRST), reset_passwords=True)
    async with await psycopg.AsyncConnection.connect(role_dsn(other, "bursar_app", key)) as conn:
        assert await db.fetch_value(conn, "select 1") == 1


async def test_a_role_that_gets_round_row_level_security_is_refused(cluster: EmbeddedServer, key: bytes) -> None:
    async with await psycopg.AsyncConnection.connect(cluster.dsn, autocommit=True) as conn:
        await ensure_roles(conn, key)
        await conn.execute("alter role bursar_platform bypassrls")
        with pytest.raises(RolesNotUsable, match="bursar_platform"):
            await ensure_roles(conn, key)


async def test_an_admin_without_the_right_to_make_roles_is_told_what_to_ask_for(
    cluster: EmbeddedServer, key: bytes
) -> None:
    async with await psycopg.AsyncConnection.connect(cluster.dsn, autocommit=True) as conn:
        await conn.execute("alter role installer nocreaterole")
    with pytest.raises(RolesNotUsable, match="alter role installer createrole"):
        await migrate.migrate(as_installer(cluster), key, schema=schema(FIRST))
