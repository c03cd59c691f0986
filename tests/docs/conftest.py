"""For each page a database of its own with prices in it, and the application served on it."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg
import pytest
import uvicorn
from psycopg import sql
from psycopg.conninfo import make_conninfo
from tests.docs.shell import Shell

from bursar import db, worker
from bursar.app import create_app
from bursar.clock import uuid7
from bursar.pricing.importing import import_shipped
from bursar.settings import Settings


@pytest.fixture(scope="session")
async def template(settings: Settings, database: db.Database) -> AsyncIterator[str]:
    """Name of a migrated and priced database that nobody is connected to; the pages' databases are copies of it.

    database: the run's own comes first, since two that are set up at once on a new cluster race for its roles.
    """
    with _new_database(settings, "template0") as name:
        async with db.opened(_on(settings, name), migrate=True) as database, database.platform() as conn:
            await import_shipped(conn)
        yield name


@pytest.fixture
def page_settings(settings: Settings, template: str) -> Iterator[Settings]:
    """Settings of a new database."""
    with _new_database(settings, template) as name:
        yield _on(settings, name)


@pytest.fixture
async def shell(page_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Shell]:
    """A terminal beside a running server."""
    monkeypatch.setenv("DATABASE_URL", str(page_settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", str(page_settings.given_master_key))
    monkeypatch.setenv("BURSAR_DATA_DIR", str(page_settings.data_dir))
    monkeypatch.setenv("BURSAR_LOG_LEVEL", "error")
    handlers = logging.getLogger().handlers
    async with db.opened(page_settings) as database, _served(database) as base_url:
        yield Shell(tmp_path, base_url, monkeypatch)
    logging.getLogger().handlers = handlers  # each command of the line has set them anew


@contextmanager
def _new_database(settings: Settings, template: str) -> Iterator[str]:
    name = f"bursar_docs_{uuid7().hex[-12:]}"
    create = "create database {} template {} encoding 'UTF8' lc_collate 'C' lc_ctype 'C'"
    with psycopg.connect(str(settings.database_url), autocommit=True) as conn:
        conn.execute(sql.SQL(create).format(sql.Identifier(name), sql.Identifier(template)))
    yield name
    with psycopg.connect(str(settings.database_url), autocommit=True) as conn:
        conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))


def _on(settings: Settings, name: str) -> Settings:
    return replace(settings, database_url=make_conninfo(str(settings.database_url), dbname=name))


@asynccontextmanager
async def _served(database: db.Database) -> AsyncIterator[str]:
    server = uvicorn.Server(uvicorn.Config(create_app(database, database.settings), port=0, log_config=None))
    task = asyncio.create_task(server.serve())
    work = asyncio.create_task(worker.run(database))
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done(), "the server ended"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    work.cancel()
    await asyncio.wait([work])  # a job that went on would find its database closed
    server.should_exit = True
    await task
