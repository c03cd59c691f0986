"""The shipped price lists in the run's database, and lists of a test's own."""

from collections.abc import Callable
from typing import Any

import pytest

from bursar import db
from bursar.clock import uuid7
from bursar.pricing.book import PriceBook
from bursar.pricing.files import ReadList, read
from bursar.pricing.importing import import_shipped


@pytest.fixture(scope="session")
async def shipped(database: db.Database) -> db.Database:
    """The run's database with the shipped lists."""
    async with database.platform() as conn:
        await import_shipped(conn)
    return database


@pytest.fixture
def book(shipped: db.Database) -> PriceBook:
    """A book that looks at the database each time, so that a change is seen at once."""
    return PriceBook(shipped, refresh_seconds=0)


OwnList = Callable[..., ReadList]


@pytest.fixture
def own_list() -> OwnList:
    """Makes lists of one provider of the test's own: `own_list(large="2.5")` is dollars per million input tokens."""
    name = f"own-{uuid7().hex}"

    def make(*lines: str, **input_usd: str) -> ReadList:
        head = "provider,model,kind,price_usd,unit,above_input_tokens,when,free,match,effective_from,source,withdrawn\n"
        rows = [f"{name},{model},input_tokens,{usd},1M tokens,,,,,,a test," for model, usd in input_usd.items()]
        more: list[Any] = [f"{name},{line}" for line in lines]
        return read(head + "\n".join([*rows, *more]), list_name=name, version="1")

    return make
