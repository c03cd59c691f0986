"""Pools by role, and the one place where a transaction's tenant is set."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Final
from uuid import UUID

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.pq import TransactionStatus
from psycopg_pool import AsyncConnectionPool

from bursar.db import migrate
from bursar.db.embedded import EmbeddedServer
from bursar.db.roles import LOGINS, role_password
from bursar.db.rows import Connection
from bursar.db.space import Space
from bursar.settings import Settings

ADMIN: Final = "admin"
POOL_TIMEOUT_SECONDS: Final = 10.0


class Database:
    """One database and how to reach it as each role. Made by `connect`, ended by `close`."""

    def __init__(self, settings: Settings, admin_dsn: str, server: EmbeddedServer | None = None) -> None:
        self.settings = settings
        self.server = server
        self.space = Space(server.home.path if server is not None else None)
        self._admin_dsn = admin_dsn
        self._app = self._pool("bursar_app", settings.pool_size)
        self._platform = self._pool("bursar_platform", max(2, settings.pool_size // 2))

    def dsn(self, role: str) -> str:
        """Connection string of a login role ('bursar_app', 'bursar_lane' …) or of 'admin'."""
        if role == ADMIN:
            return self._admin_dsn
        assert role in LOGINS, f"{role} is no login role"
        return role_dsn(self._admin_dsn, role, self.settings.master_key)

    @asynccontextmanager
    async def tenant(self, organization_id: UUID) -> AsyncIterator[Connection]:
        """One transaction as bursar_app that sees and changes one organization only."""
        # One round trip for both; a UUID's text has no quotes, so that nothing can be smuggled in.
        assert isinstance(organization_id, UUID)
        begin = f"{self._begin()}; set local app.organization_id = '{organization_id}'"
        async with _transaction(self._app, begin) as conn:
            yield conn

    @asynccontextmanager
    async def untenanted(self) -> AsyncIterator[Connection]:
        """One transaction as bursar_app without organization: only the definer functions of `route` answer."""
        async with _transaction(self._app, self._begin()) as conn:
            yield conn

    @asynccontextmanager
    async def platform(self) -> AsyncIterator[Connection]:
        """One transaction as bursar_platform, which reads every organization."""
        async with _transaction(self._platform, self._begin()) as conn:
            yield conn

    async def migrate(self) -> migrate.Report:
        """Bring roles and schema up to date; does nothing when they are."""
        return await migrate.migrate(self._admin_dsn, self.settings.master_key)

    async def open(self) -> None:
        """Open the pools; connections are made when first needed."""
        await self._app.open()
        await self._platform.open()

    async def close(self) -> None:
        """Give the connections back and, where this process is its last user, stop the embedded server."""
        await self._app.close()
        await self._platform.close()
        if self.server is not None:
            await asyncio.to_thread(self.server.stop)

    def _begin(self) -> str:
        """Reads go on when the disk is full."""
        return "begin read only" if self.space.is_short() else "begin"

    def _pool(self, role: str, size: int) -> AsyncConnectionPool[Connection]:
        return AsyncConnectionPool(
            self.dsn(role),
            min_size=0,
            max_size=size,
            open=False,
            name=role,
            # Statements begin and end transactions themselves, so that BEGIN and SET LOCAL go out together.
            kwargs={"autocommit": True, "application_name": f"bursar {role}"},
        )


async def connect(settings: Settings, *, migrate: bool | None = None) -> Database:
    """Reach the database of these settings, starting the embedded server when there is no DATABASE_URL.

    migrate: True brings the schema up to date; False only checks; None (default) migrates the embedded database and
    checks any other, whose operator decides when.

    Raises:
        BursarError: the server does not start or answer, or the schema is not up to date.
    """
    server = None
    if settings.database_url is None:
        server = EmbeddedServer(settings.data_dir, pg_bin=settings.pg_bin)
        await asyncio.to_thread(server.start)
    database = Database(settings, server.dsn if server else str(settings.database_url), server)
    try:
        await _prepare(database, server is not None if migrate is None else migrate)
        await database.open()
    except BaseException:
        await database.close()
        raise
    return database


@asynccontextmanager
async def opened(settings: Settings, *, migrate: bool | None = None) -> AsyncIterator[Database]:
    """`connect` and `close` as one block."""
    database = await connect(settings, migrate=migrate)
    try:
        yield database
    finally:
        await database.close()


@contextmanager
def held(settings: Settings) -> Iterator[None]:
    """Hold the database for processes that this one starts: the embedded server runs, the schema is up to date."""
    server = None
    if settings.database_url is None:
        server = EmbeddedServer(settings.data_dir, pg_bin=settings.pg_bin)
        server.start()
    try:
        dsn = server.dsn if server else str(settings.database_url)
        asyncio.run(migrate.migrate(dsn, settings.master_key))
        yield
    finally:
        if server is not None:
            server.stop()


async def _prepare(database: Database, migrate_first: bool) -> None:
    if migrate_first:
        await database.migrate()
    else:
        await migrate.require_current(database.dsn(ADMIN))


@asynccontextmanager
async def _transaction(pool: AsyncConnectionPool[Connection], begin: str) -> AsyncIterator[Connection]:
    """begin … commit; rollback when the block raises."""
    conn = await _begun(pool, begin)
    try:
        yield conn
        # PostgreSQL answers COMMIT of a failed transaction with a silent rollback.
        assert conn.info.transaction_status != TransactionStatus.INERROR, "an error of the database was swallowed"
        await conn.commit()
    except BaseException:
        if not conn.closed:
            await conn.rollback()
        raise
    finally:
        await pool.putconn(conn)


async def _begun(pool: AsyncConnectionPool[Connection], begin: str) -> Connection:
    """A connection in a new transaction. One that broke while it lay in the pool (a restart) is replaced."""
    for _ in range(pool.max_size):
        conn = await pool.getconn(POOL_TIMEOUT_SECONDS)
        try:
            await conn.execute(begin)
        except BaseException as error:
            await pool.putconn(conn)
            if not (isinstance(error, psycopg.OperationalError) and conn.broken):
                raise
        else:
            return conn
    conn = await pool.getconn(POOL_TIMEOUT_SECONDS)
    try:
        await conn.execute(begin)
    except BaseException:
        await pool.putconn(conn)
        raise
    return conn


def role_dsn(admin_dsn: str, role: str, master_key: bytes) -> str:
    """The admin's connection string with another user and password."""
    parts = conninfo_to_dict(admin_dsn)
    return make_conninfo("", **{**parts, "user": role, "password": role_password(master_key, role)})
