"""A database of the money tests' own, where time is simulated and holds of every organization may be expired."""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from tests.credits.scenes import Scene

from bursar import db
from bursar.credits.verify import verify
from bursar.settings import Settings


@asynccontextmanager
async def scratch_database(admin_dsn: str, settings: Settings, purpose: str) -> AsyncIterator[db.Database]:
    """A migrated database of this worker's own, dropped afterwards. The roles must have been made before."""
    parts = conninfo_to_dict(admin_dsn)
    name = f"{parts['dbname']}_{purpose}_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    create = sql.SQL("create database {} template template0 encoding 'UTF8' lc_collate 'C' lc_ctype 'C'")
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(create.format(sql.Identifier(name)))
    dsn = make_conninfo("", **{**parts, "dbname": name})
    async with db.opened(replace(settings, database_url=dsn), migrate=True) as opened:
        yield opened
    with psycopg.connect(admin_dsn, autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


@pytest.fixture(scope="session", autouse=True)
async def the_books_agree_in_the_end(database: db.Database) -> AsyncIterator[None]:
    """Every invariant is put to everything that all tests wrote."""
    yield
    async with database.platform() as conn:
        assert await verify(conn) == []


@pytest.fixture(scope="session")
async def books(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database of this worker's own, whose books agree in the end. After `database`, which made the roles."""
    async with scratch_database(admin_dsn, settings, "books") as opened:
        yield opened
        async with opened.platform() as conn:
            assert await verify(conn) == []


@pytest.fixture(params=["in a batch", "alone"])
def scene(books: db.Database, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """An organization in the database of the money tests' own; its single moves go either way."""
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        yield Scene(conn, alone=request.param == "alone")
