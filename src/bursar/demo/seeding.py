"""Seeding: all sample companies into a database that has none of them, a few at a time."""

import asyncio
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import psycopg

from bursar import db
from bursar.audit.events import SYSTEM
from bursar.demo import plans
from bursar.demo.companies import GPT_MINI, HAIKU
from bursar.demo.enrolling import Site, delete_keys, enroll, found, move
from bursar.demo.plans import Batch, Closing, Dated, Step
from bursar.demo.quoting import PastQuotes
from bursar.demo.stories import Company, Move
from bursar.demo.telling import QUERIES, Teller, simulator
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, ensure_platform
from bursar.pricing.book import PriceBook
from bursar.pricing.importing import import_shipped

CLOSING: Final = Closing((GPT_MINI, HAIKU))
HISTORY: Final = timedelta(days=430)
AT_ONCE: Final = 3
"""Companies that are written at the same time: while one is planned here, the database books two."""

TURN_SECONDS: Final = 0.0005
"""How long the thread that plans may keep the one that talks to the database waiting; 5 ms are usual."""


class Progress(Protocol):
    """Who is told how far a company is; a unit is a person or a request."""

    def begin(self, company: Company) -> None:
        """It is begun."""

    def size(self, company: Company, total: int) -> None:
        """It will be so many units."""

    def advance(self, company: Company, units: int) -> None:
        """So many more are done."""

    def end(self, company: Company) -> None:
        """It is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """How a person of a company gets in. api_key: the text of a key of theirs in that company."""

    email: str
    user_id: UUID
    home_organization_id: UUID
    api_key: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class SeededCompany:
    """A company that is there now; is_small: of the long tail."""

    organization_id: UUID
    slug: str
    name: str
    story: str
    is_small: bool
    admin: Access
    member: Access


async def seed(
    database: db.Database, companies: Sequence[Company], *, as_of: datetime, progress: Progress
) -> list[SeededCompany]:
    """Write these companies with all their past until `as_of`, which does not lie ahead.

    Returns those that are companies (no individuals), in their order.
    """
    await _prepare(database, as_of)
    sites = [await found(database, company, as_of) for company in companies]
    quotes = await _quotes(database, sites, as_of)
    places = asyncio.Semaphore(AT_ONCE)

    async def write(site: Site) -> None:
        async with places:
            own = site.organization_id if site.company.markup_ppm is not None else None
            await _write(database, site, as_of, quotes[own], progress)

    # The longest first, so that none of them is left alone at the end.
    largest_first = sorted(sites, key=lambda site: -sum(use.requests for use in site.company.uses))
    with _short_turns():
        async with asyncio.TaskGroup() as group:
            for site in largest_first:
                group.create_task(write(site))
    await _analyze(database)
    return [_seeded(site) for site in sites if site.company.kind != "individual"]


async def _prepare(database: db.Database, as_of: datetime) -> None:
    """Prices, the platform's organization, and a partition for every month of the past."""
    async with database.platform() as conn:
        await import_shipped(conn)
        for weeks in range(0, HISTORY.days // 7 + 1, 4):
            await db.execute(conn, QUERIES.ensure_partition, at=as_of - timedelta(weeks=weeks))
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        await ensure_platform(conn, by=SYSTEM)


async def _quotes(database: db.Database, sites: Sequence[Site], as_of: datetime) -> dict[UUID | None, PastQuotes]:
    """By organization where it has a mark-up of its own; under None the list's, which everybody else pays."""
    book = PriceBook(database, refresh_seconds=3600)
    models = plans.models_of([site.company for site in sites], CLOSING)
    found: dict[UUID | None, PastQuotes] = {}
    for site in (None, *(site for site in sites if site.company.markup_ppm is not None)):
        found[site.organization_id if site else None] = await PastQuotes.load(
            book,
            organization_id=site.organization_id if site else PLATFORM_ORGANIZATION_ID,
            models=models,
            since=site.joined if site else as_of - HISTORY,
            until=as_of,
        )
    return found


async def _write(database: db.Database, site: Site, as_of: datetime, quotes: PastQuotes, progress: Progress) -> None:
    """One company, from its people to its last request."""
    company = site.company
    progress.begin(company)
    if company.kind != "individual":
        await enroll(database, site)
    steps = await asyncio.to_thread(plans.plan, company, as_of, quotes, CLOSING)
    progress.size(company, len(company.people) + sum(map(_units, steps)))
    progress.advance(company, len(company.people))
    async with simulator(database) as conn:
        teller = Teller(conn, site, as_of)
        await teller.open()
        for step in steps:
            match step:
                case Dated(_, Move() as moved):
                    await move(database, site, moved)
                case _:
                    await teller.tell(step)
            progress.advance(company, _units(step))
    if company.kind != "individual":
        await delete_keys(database, site)
    progress.end(company)


def _units(step: Step) -> int:
    return len(step.calls) if isinstance(step, Batch) else 0


@contextmanager
def _short_turns() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(TURN_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


async def _analyze(database: db.Database) -> None:
    """Tell the planner what is there now, which it would find out by itself only minutes later."""
    async with await psycopg.AsyncConnection.connect(database.dsn("admin"), autocommit=True) as conn:
        await conn.execute("analyze")


def _seeded(site: Site) -> SeededCompany:
    company = site.company

    def access(email: str) -> Access:
        user = site.users[email]
        return Access(
            email=email,
            user_id=user.user_id,
            home_organization_id=user.home_organization_id,
            api_key=site.texts[email],
        )

    return SeededCompany(
        organization_id=site.organization_id,
        slug=company.slug,
        name=company.name,
        story=company.story,
        is_small=company.is_small,
        admin=access(company.admin),
        member=access(company.member),
    )
