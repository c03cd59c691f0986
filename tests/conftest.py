"""One real PostgreSQL for the whole run, shared by all workers; each test makes an organization of its own in it.

Tests commit for real and clean nothing up. BURSAR_TEST_DATABASE_URL (an admin's URL) runs the suite on another server:
a database is made there for the run and dropped at its end. Otherwise the embedded server is started in a temporary
folder by the first worker and stopped by the last. What a killed run left behind is removed by the next.
"""

import fcntl
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bursar import db
from bursar.db.embedded import EmbeddedServer, ServerInUse
from bursar.settings import Settings, make_data_dir

MASTER_KEY = "a master key that only the tests of Bursar use"
FOLDER_PREFIX = "bursar-tests-"
# Crash tests use servers of their own, with everything durable.
FAST_BUT_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
SERVER_OPTIONS = {**FAST_BUT_NOT_DURABLE, "max_connections": "400", "shared_buffers": "256MB"}


@pytest.fixture(scope="session")
def run_id() -> str:
    """The same in every worker of this run."""
    return os.environ.get("PYTEST_XDIST_TESTRUNUID", uuid.uuid4().hex)[:12]


@pytest.fixture(scope="session")
def run_dir(run_id: str) -> Path:
    """A folder that all workers share; root's is open to the server's user, unlike pytest's own."""
    folder = Path(tempfile.gettempdir()) / f"{FOLDER_PREFIX}{run_id}"
    make_data_dir(folder)
    return folder


@pytest.fixture(scope="session")
def admin_dsn(run_dir: Path, run_id: str) -> Iterator[str]:
    """Connection string of an admin of the run's database, which is empty."""
    url = os.environ.get("BURSAR_TEST_DATABASE_URL")
    yield from _database_elsewhere(url, run_dir, f"bursar_test_{run_id}") if url else _embedded(run_dir)


@pytest.fixture(scope="session")
def settings(admin_dsn: str, run_dir: Path) -> Settings:
    """Settings of the run's database, for whoever needs a Database, a process or an event loop of their own."""
    return Settings(data_dir=run_dir, database_url=admin_dsn, given_master_key=MASTER_KEY)


@pytest.fixture(scope="session")
async def database(settings: Settings) -> AsyncIterator[db.Database]:
    """The run's database, migrated."""
    async with db.opened(settings, migrate=True) as opened:
        yield opened


def _embedded(run_dir: Path) -> Iterator[str]:
    _remove_left_overs(run_dir)
    pg_bin = os.environ.get("BURSAR_PG_BIN")
    server = EmbeddedServer(run_dir, pg_bin=Path(pg_bin) if pg_bin else None, options=SERVER_OPTIONS)
    server.start()
    yield server.dsn
    if server.stop():
        server.remove()
        shutil.rmtree(run_dir)


def _remove_left_overs(own: Path) -> None:
    """Servers and folders of runs that were killed; the kernel dropped their locks."""
    for folder in own.parent.glob(f"{FOLDER_PREFIX}*"):
        try:
            if folder != own and time.time() - folder.stat().st_mtime > 60:
                EmbeddedServer(folder).remove()
                shutil.rmtree(folder)
        except (ServerInUse, OSError):
            continue  # in use, or another user's, or another run is removing it


def _database_elsewhere(url: str, run_dir: Path, name: str) -> Iterator[str]:
    with (run_dir / "users").open("w") as users:
        fcntl.flock(users, fcntl.LOCK_EX)
        with psycopg.connect(url, autocommit=True) as conn:
            if conn.execute("select from pg_database where datname = %s", [name]).fetchone() is None:
                conn.execute(
                    sql.SQL("create database {} template template0 encoding 'UTF8' lc_collate 'C' lc_ctype 'C'").format(
                        sql.Identifier(name)
                    )
                )
        fcntl.flock(users, fcntl.LOCK_SH)
        yield make_conninfo("", **{**conninfo_to_dict(url), "dbname": name})
        try:
            fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        with psycopg.connect(url, autocommit=True) as conn:
            conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
    shutil.rmtree(run_dir)
