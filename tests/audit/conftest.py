"""A database of this worker's own that is tampered with; nobody asks in the end whether its books agree."""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import psycopg
import pytest
from tests.audit.tampering import Tamperer
from tests.credits.conftest import scratch_database

from bursar import db
from bursar.settings import Settings


@pytest.fixture(scope="session")
async def crooked(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """After `database`, which made the roles."""
    async with scratch_database(admin_dsn, settings, "crooked") as opened:
        yield opened


@pytest.fixture
def admin(crooked: db.Database) -> Iterator[psycopg.Connection[Any]]:
    """A superuser's connection to it."""
    with psycopg.connect(crooked.dsn("admin"), autocommit=True) as conn:
        yield conn


@pytest.fixture
def tamperer(admin: psycopg.Connection[Any]) -> Tamperer:
    """Whom nothing stops."""
    return Tamperer(admin)
