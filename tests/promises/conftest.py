"""What the promises are tried on: the served application, an organization that calls it, and a client."""

from collections.abc import AsyncIterator

import httpx2
import pytest
from tests.gateway.conftest import base_url, payer, priced

__all__ = ["base_url", "http", "payer", "priced"]


@pytest.fixture
async def http(base_url: str) -> AsyncIterator[httpx2.AsyncClient]:
    """Speaks to the application as nobody."""
    async with httpx2.AsyncClient(base_url=base_url, timeout=30) as client:
        yield client
