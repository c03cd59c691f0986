"""A served application beside the tests, and organizations with credits and keys that call it."""

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx2
import pytest
import uvicorn
from tests.conftest import MASTER_KEY, Org

from bursar import db
from bursar.app import create_app
from bursar.asgi import Protocol
from bursar.clock import uuid7
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.pools import Pool, list_pools, pool_for
from bursar.money import Micros
from bursar.pricing.importing import import_shipped
from bursar.settings import Settings


@pytest.fixture(scope="session")
async def priced(database: db.Database) -> db.Database:
    """The run's database with the shipped prices."""
    async with database.platform() as conn:
        await import_shipped(conn)
    return database


@pytest.fixture(scope="session")
async def base_url(priced: db.Database, settings: Settings) -> AsyncIterator[str]:
    """The application, served on this event loop."""
    app = create_app(priced, settings)
    config = uvicorn.Config(app, port=0, log_config=None, access_log=False, http=Protocol, ws="none")
    server = uvicorn.Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
        assert not task.done(), "the server ended"
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    await task


@dataclass(frozen=True, slots=True, kw_only=True)
class Payer:
    """An organization with credits, and a member's key that calls the gateway."""

    org: Org
    user_id: UUID
    api_key_id: UUID
    key: str
    base_url: str

    async def pool(self) -> Pool:
        """The shared pool as it is now."""
        async with self.org.tenant() as conn:
            return (await list_pools(conn, organization_id=self.org.organization_id))[0]

    async def rows(self, sql: str) -> list[Any]:
        """Rows of a query over this organization."""
        async with self.org.tenant() as conn, conn.cursor() as cursor:
            await cursor.execute(sql)  # type: ignore[arg-type]
            return await cursor.fetchall()

    async def post(
        self, body: dict[str, Any], *, path: str = "/v1/chat/completions", **headers: str
    ) -> httpx2.Response:
        """One call with plain HTTP."""
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        async with httpx2.AsyncClient(base_url=self.base_url, timeout=30) as client:
            return await client.post(path, json=body, headers={"authorization": f"Bearer {self.key}", **names})


async def fund(org: Org, amount: Micros, *, owner: UUID | None = None) -> None:
    """Add credits to the organization's pool, or a member's."""
    async with org.tenant() as conn:
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=await pool_for(conn, organization_id=org.organization_id, owner_user_id=owner),
            amount_micros=amount,
            source=GrantSource.PURCHASE,
            idempotency_key=uuid7().hex,
        )


@pytest.fixture
async def payer(org: Org, base_url: str) -> Payer:
    """A member of a company with 1,000 credits."""
    await fund(org, Micros(1_000_000_000))
    user_id = await org.member()
    key = await org.key(user_id)
    return Payer(org=org, user_id=user_id, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)


@pytest.fixture(scope="module")
def two_servers(priced: db.Database, admin_dsn: str, run_dir: Path) -> Iterator[list[str]]:
    """Base URLs of two server processes on the run's database."""
    ports = [free_port(), free_port()]
    environment = {
        **os.environ,
        "DATABASE_URL": admin_dsn,
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(run_dir),
        "BURSAR_LOG_LEVEL": "error",
    }
    servers = [subprocess.Popen(serve_beside_tests(port), env=environment) for port in ports]
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    try:
        for url, server in zip(urls, servers, strict=True):
            wait_until_ready(url, server)
        yield urls
    finally:
        for server in servers:
            server.terminate()
        for server in servers:
            server.wait(timeout=40)


BESIDE_TESTS = """
import runpy
from bursar import worker
from bursar.credits.jobs import forget_commands
from bursar.gateway import jobs as batches
from bursar.outbox import jobs as outbox

look_at_all = batches._look_at_all

async def look_at_own(keeper, due):
    await look_at_all(keeper, [each for each in due if str(each.organization_id) == {organization!r}])

batches._look_at_all = look_at_own
worker.JOBS = tuple(job for job in worker.JOBS if job not in outbox.JOBS and job[1] is not forget_commands)
runpy.run_module("bursar", run_name="__main__")
"""


def serve_beside_tests(port: int, *options: str, organization: UUID | None = None) -> list[str]:
    """A command that serves as `bursar serve` does, but leaves to other tests on the same database what is theirs:
    e-mails and webhooks that they send and batches that they look at themselves, results stored at instants long past.

    options: of Python itself. organization: whose batches it looks after.
    """
    program = BESIDE_TESTS.format(organization=str(organization))
    return [sys.executable, *options, "-c", program, "serve", "--port", str(port)]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_ready(url: str, server: "subprocess.Popen[bytes]") -> None:
    """Until the server's database answers; fails when the process ends, and after a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server ended with {server.returncode}"
        try:
            if httpx2.get(f"{url}/readyz", timeout=5).status_code == 200:
                return
        except httpx2.TransportError:
            time.sleep(0.1)
    raise AssertionError("the server is not ready after 60 s")
