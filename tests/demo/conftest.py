"""Prices of the shipped lists without a database, and a small demo in a database of its own."""

from bisect import bisect_right
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from uuid import UUID, uuid5

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from bursar import db
from bursar.demo.companies import companies
from bursar.demo.requests import Model, Quotes
from bursar.demo.seeding import SeededCompany, seed
from bursar.demo.stories import Company
from bursar.pricing.book import Quote
from bursar.pricing.importing import load_shipped
from bursar.pricing.lists import ListedModel
from bursar.pricing.prices import PriceVersion
from bursar.settings import Settings

AS_OF = datetime(2026, 10, 20, 14, 2, tzinfo=UTC)  # a Tuesday
SEEDED = ("acme-corp", "lumen-loop", "quill-co", "blank-canvas", "individual-ximena", "gable-works")


@cache
def _listed() -> dict[tuple[str, str], ListedModel]:
    return {model.key: model for name in ("genai-prices", "bursar") for model in load_shipped(name).models}


@pytest.fixture(scope="session")
def list_quotes() -> Callable[[int], Quotes]:
    """Quotes at a mark-up (parts per million), from the lists as they are shipped."""

    def at_markup(markup_ppm: int) -> Quotes:
        @cache
        def of_model(model: Model) -> tuple[list[datetime], list[Quote]]:
            quotes = [
                Quote(
                    provider=model.provider,
                    model=model.name,
                    basis="list",
                    charge=version,
                    cost=version,
                    markup_ppm=markup_ppm,
                    passes_unpriced=False,
                    has_context=True,
                    context_window=None,
                    valid_from=version.effective_from,
                    valid_until=None,
                )
                for version in _versions(model)
            ]
            return [quote.valid_from for quote in quotes], quotes

        def quote(model: Model, at: datetime) -> Quote:
            starts, quotes = of_model(model)
            return quotes[bisect_right(starts, at) - 1]

        return quote

    return at_markup


def _versions(model: Model) -> list[PriceVersion]:
    found = []
    for segment in _listed()[model.provider, model.name].segments:
        assert segment.prices is not None
        found.append(
            PriceVersion(
                price_version_id=uuid5(UUID(int=0), f"{model} {segment.effective_from}"),
                list_name="list",
                provider=model.provider,
                model=model.name,
                effective_from=segment.effective_from,
                rates=segment.prices.rates,
                variants=segment.prices.variants,
            )
        )
    return found


@pytest.fixture(scope="session")
def stories() -> dict[str, Company]:
    """All companies of the fixed day, by slug."""
    return {company.slug: company for company in companies(AS_OF)}


@dataclass(slots=True)
class Told:
    """A progress that keeps what it is told: units by slug, and who has ended."""

    sizes: dict[str, int] = field(default_factory=dict)
    units: dict[str, int] = field(default_factory=dict)
    ended: list[str] = field(default_factory=list)

    def begin(self, company: Company) -> None:
        self.units[company.slug] = 0

    def size(self, company: Company, total: int) -> None:
        self.sizes[company.slug] = total

    def advance(self, company: Company, units: int) -> None:
        self.units[company.slug] += units

    def end(self, company: Company) -> None:
        self.ended.append(company.slug)


@dataclass(frozen=True, slots=True)
class SmallDemo:
    """A few companies of the demo, seeded; all ids by slug."""

    database: db.Database
    told: Told
    seeded: dict[str, SeededCompany]


@pytest.fixture(scope="session")
async def demo(
    settings: Settings, run_id: str, worker_id: str, stories: dict[str, Company]
) -> AsyncIterator[SmallDemo]:
    """A few companies, as of the fixed day, in a database of this worker's own."""
    name = f"bursar_demo_{run_id}_{worker_id}"
    admin = str(settings.database_url)
    async with await psycopg.AsyncConnection.connect(admin, autocommit=True) as conn:
        await conn.execute(sql.SQL("create database {} template template0").format(sql.Identifier(name)))
    own = replace(settings, database_url=make_conninfo("", **{**conninfo_to_dict(admin), "dbname": name}))
    told = Told()
    async with db.opened(own, migrate=True) as database:
        seeded = await seed(database, [stories[slug] for slug in SEEDED], as_of=AS_OF, progress=told)
        yield SmallDemo(database, told, {company.slug: company for company in seeded})
    async with await psycopg.AsyncConnection.connect(admin, autocommit=True) as conn:
        await conn.execute(sql.SQL("drop database {} with (force)").format(sql.Identifier(name)))
