"""What the promises are tried on: the served application, an organization that calls it, a client, and books apart."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from tests.audit.conftest import admin, tamperer
from tests.credits.conftest import scratch_database
from tests.gateway.conftest import base_url, payer, priced, two_servers

from bursar import db
from bursar.credits.verify import verify
from bursar.settings import Settings

__all__ = ["admin", "base_url", "http", "payer", "priced", "tamperer", "two_servers"]


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Speaks to the application as nobody."""
    async with httpx2.AsyncClient(base_url=base_url, timeout=30) as client:
        yield client


@pytest.fixture(scope="session")
async def books(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database of this worker's own where holds of every organization may be expired; its books agree in the end."""
    async with scratch_database(admin_dsn, settings, "promises") as opened:
        yield opened
        async with opened.platform() as conn:
            assert await verify(conn) == []


@pytest.fixture(scope="session")
async def crooked(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database of this worker's own that is tampered with."""
    async with scratch_database(admin_dsn, settings, "forged") as opened:
        yield opened
