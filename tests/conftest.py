"""One real PostgreSQL for the whole run, shared by all workers; each test makes an organization of its own in it.

Tests commit for real and clean nothing up. BURSAR_TEST_DATABASE_URL (an admin's URL) runs the suite on another server:
a database is made there for the run and dropped at its end. Otherwise the embedded server is started in a temporary
folder by the first worker and stopped by the last. What a killed run left behind is removed by the next.
"""

import fcntl
import gc
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import hypothesis
import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from xdist.scheduler import LoadScopeScheduling

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.moves import MOVE_BATCH, Move, Verdict, as_arguments, as_verdicts
from bursar.credits.pools import open_credits
from bursar.db import arrays
from bursar.db.embedded import EmbeddedServer, ServerInUse
from bursar.identity.addresses import Address
from bursar.identity.api_keys import NewApiKey, create_api_key
from bursar.identity.memberships import add_membership
from bursar.identity.organizations import create_organization
from bursar.identity.roles import Role, Scope
from bursar.identity.users import User, find_or_create_user
from bursar.settings import Settings, make_data_dir

MASTER_KEY = "a master key that only the tests of Bursar use"
FOLDER_PREFIX = "bursar-tests-"
# Crash tests use servers of their own, with everything durable.
FAST_BUT_NOT_DURABLE = {"fsync": "off", "full_page_writes": "off", "synchronous_commit": "off"}
SERVER_OPTIONS = {**FAST_BUT_NOT_DURABLE, "max_connections": "600", "shared_buffers": "256MB"}

# Where nothing waits for a disk. What tests kill is a process, never the machine: a folder in memory outlives it, too.
MEMORY = Path("/dev/shm")
MEMORY_BYTES = 10_000_000_000  # several times what a run needs

# Begun first, the longest at the beginning, so that no worker is left with one while the others have nothing to do.
LONGEST = (
    *("tests/promises/test_kills.py", "tests/promises/test_histories.py", "tests/promises/test_inputs.py"),
    *("tests/promises/test_races.py", "tests/promises/test_provider_faults.py", "tests/docs/", "tests/demo/"),
    *("tests/promises/", "tests/cli/test_serve.py", "tests/db/", "tests/credits/"),
)
# Folders whose tests share a database that takes long to fill: one worker makes it, once.
TOGETHER = ("tests/demo/", "tests/docs/")


# A machine that is busy makes no example wrong.
UNHURRIED = hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.register_profile("unhurried", UNHURRIED)
hypothesis.settings.load_profile("unhurried")


def pytest_configure() -> None:
    """What workers and the processes that tests start find in their environment.

    Temporary files are in memory where there is plenty.
    """
    if "TMPDIR" not in os.environ and _free_memory() > MEMORY_BYTES:
        os.environ["TMPDIR"] = tempfile.tempdir = str(MEMORY)
    # Clients believe one authority, which nobody is. To read the system's takes each client 20 ms, thousands of times.
    os.environ["SSL_CERT_FILE"] = str(Path(__file__).parent / "fakes" / "authority.pem")


def _free_memory() -> int:
    """Bytes that may be written to MEMORY; 0 where there is none, or programs in it may not be run."""
    try:
        folder = os.statvfs(MEMORY)
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    except OSError:
        return 0
    if folder.f_flag & os.ST_NOEXEC or not os.access(MEMORY, os.W_OK):
        return 0
    return min(folder.f_bavail * folder.f_frsize, int(facts["MemAvailable"].split()[0]) * 1024)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((n for n, at in enumerate(LONGEST) if item.nodeid.startswith(at)), len(LONGEST)))


def pytest_collection_finish() -> None:
    """What was imported stays, and the collector need not look at all of it again and again."""
    gc.collect()
    gc.freeze()


class ByFile(LoadScopeScheduling):  # type: ignore[misc]
    """The tests of a file are one worker's, which makes once what they share; files are begun in the order of above.

    In the full form, where each takes minutes or hours, each is by itself.
    """

    def _split_scope(self, nodeid: str) -> str:
        if os.environ.get("BURSAR_TEST_FULL"):
            return nodeid
        return next((folder for folder in TOGETHER if nodeid.startswith(folder)), nodeid.partition("::")[0])

    def remove_node(self, node: Any) -> str | None:
        """The test that ended its worker is not tried again, as LoadScopeScheduling would."""
        workload = self.assigned_work[node]
        ended = next((each for unit in workload.values() for each, is_done in unit.items() if not is_done), None)
        if ended is not None:
            workload[self._split_scope(ended)][ended] = True
        super().remove_node(node)
        return ended


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    config.option.loadscopereorder = False
    return ByFile(config, log)


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


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A new folder that any user can pass through, unlike pytest's own when root runs it."""
    folder = Path(tempfile.mkdtemp(prefix="bursar-own-"))
    folder.chmod(0o711)
    yield folder
    for link in folder.rglob("postgres"):
        if link.is_symlink():
            shutil.rmtree(link.resolve(), ignore_errors=True)
    shutil.rmtree(folder)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Org:
    """A fresh organization of a test's own, with its credits opened, and what a test needs to fill it."""

    database: db.Database
    organization_id: UUID
    slug: str
    admin: UUID  # a member with the role org_admin

    def tenant(self) -> AbstractAsyncContextManager[db.Connection]:
        """One transaction that acts for this organization."""
        return self.database.tenant(self.organization_id)

    async def user(self, email: str | None = None) -> User:
        """A person of the installation, not yet a member of anything but their home."""
        return await find_or_create_user(
            self.database,
            address=Address.of(email or f"{uuid7().hex}@{self.slug}.example", self.database.settings),
            display_name="Dana Test",
            by=OPERATOR,
            on_opening=open_credits,
        )

    async def member(self, *roles: Role, email: str | None = None, **place: Any) -> UUID:
        """A new member with these roles (member when none); their user id. place: team_id, department_id, at."""
        email = email or f"{uuid7().hex}@{self.slug}.example"
        user = await self.user(email)
        async with self.tenant() as conn:
            await add_membership(
                conn,
                organization_id=self.organization_id,
                user_id=user.user_id,
                address=Address.of(email, self.database.settings),
                display_name="Dana Test",
                roles=roles or [Role.MEMBER],
                by=OPERATOR,
                **place,
            )
        return user.user_id

    async def key(
        self, user_id: UUID | None = None, *, scopes: Collection[Scope] = tuple(Scope), **columns: Any
    ) -> NewApiKey:
        """A new key of a member, of a service when None; `.text` is what a client presents."""
        async with self.tenant() as conn:
            return await create_api_key(
                conn,
                organization_id=self.organization_id,
                user_id=user_id,
                name="Test key",
                by=OPERATOR,
                scopes=scopes,
                **columns,
            )


MakeOrg = Callable[..., Awaitable[Org]]


@pytest.fixture
def make_org(database: db.Database) -> MakeOrg:
    """Makes organizations: `await make_org(zone="Asia/Kolkata", is_shared_token_pool=False)`."""

    async def make(**columns: Any) -> Org:
        organization_id = uuid7()
        slug = f"t-{organization_id.hex[8:]}"
        async with database.tenant(organization_id) as conn:
            values = {"slug": slug, "name": "Test Corp", **columns}
            organization = await create_organization(conn, organization_id=organization_id, by=OPERATOR, **values)
            await open_credits(conn, organization)
        bare = Org(database=database, organization_id=organization_id, slug=slug, admin=UUID(int=0))
        return replace(bare, admin=await bare.member(Role.ORG_ADMIN))

    return make


@pytest.fixture
async def org(make_org: MakeOrg) -> Org:
    """A fresh company with a shared pool and one administrator: where most tests start."""
    return await make_org()


Simulate = Callable[..., Awaitable[list[Verdict]]]


@pytest.fixture
async def simulate(database: db.Database) -> AsyncIterator[Simulate]:
    """Moves credits as the simulator, who may date money: `await simulate(moves, at=…)`; one verdict a move."""
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_simulator"), autocommit=True) as conn:
        arrays.register(conn)

        async def move(moves: Sequence[Move], at: datetime | None = None) -> list[Verdict]:
            return as_verdicts(await (await conn.execute(MOVE_BATCH, as_arguments(moves, at))).fetchall())

        yield move


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
