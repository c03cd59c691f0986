"""Periodic work of the outbox: webhooks and e-mails that are due, gauges, and the end of what is old. No rules here."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from prometheus_client import Gauge

from bursar import db
from bursar.audit import jobs as audit_jobs
from bursar.outbox.deliveries import Sender
from bursar.outbox.endpoints import QUERIES
from bursar.outbox.mails import MailServer, Postman
from bursar.outbox.outside import Allowed, Outside
from bursar.sealing import Keyring

MOST_ROUNDS: Final = 50
PURGE_LOCK: Final = 0x6275_7273_0004
PURGED_AT_ONCE: Final = 1_000

DELIVERIES_PENDING = Gauge("bursar_webhooks_pending", "Deliveries of events to webhooks that are still to be made")
OLDEST_DELIVERY = Gauge("bursar_webhooks_oldest_seconds", "Age of the oldest delivery that is still to be made")
FAILING_ENDPOINTS = Gauge("bursar_webhooks_failing", "Webhooks whose last attempt failed")
MAILS_PENDING = Gauge("bursar_mails_pending", "E-mails that are still to be handed over")


@dataclass(frozen=True, slots=True)
class Waiting:
    """What is still to be sent, of all organizations."""

    deliveries: int
    failing_endpoints: int
    oldest_seconds: int
    mails: int


async def send_webhooks(database: db.Database) -> None:
    """Send what is due; what that makes due (the next event of the same object) too."""
    if database.space.is_short():
        return  # nothing can be noted: it would be sent again and again
    settings = database.settings
    sender = Sender(database, Outside(Allowed.by(settings)), Keyring(settings.master_key))
    for _ in range(MOST_ROUNDS):
        if await sender.send_due() == 0:
            return


async def send_mails(database: db.Database) -> None:
    """Hand over what is due."""
    if database.space.is_short():
        return
    await Postman(database, MailServer.of(database.settings)).send_due()


async def measure_outbox(database: db.Database) -> None:
    """Set the gauges."""
    async with database.platform() as conn:
        found = await db.fetch_one(conn, Waiting, QUERIES.waiting)
    DELIVERIES_PENDING.set(found.deliveries)
    OLDEST_DELIVERY.set(found.oldest_seconds)
    FAILING_ENDPOINTS.set(found.failing_endpoints)
    MAILS_PENDING.set(found.mails)


async def purge_outbox(database: db.Database) -> int:
    """End what was told longer ago than the settings keep it, a few rows at a time; how many rows."""
    days = database.settings.events_days
    if not days:
        return 0
    async with audit_jobs.alone(database, PURGE_LOCK) as is_mine:
        if not is_mine:
            return 0
        async with database.platform() as conn:
            organization_ids = await db.fetch_values(conn, QUERIES.organizations_to_purge, days=days)
        return await audit_jobs.in_turn(organization_ids, lambda each: purge(database, each, days=days))


async def purge(database: db.Database, organization_id: UUID, *, days: int, most: int = PURGED_AT_ONCE) -> int:
    """As `purge_outbox`, of one organization. most: rows of a kind in one transaction."""
    gone = 0
    while True:
        async with database.tenant(organization_id) as conn:
            some = int(await db.fetch_value(conn, QUERIES.purge, organization_id=organization_id, days=days, most=most))
        gone += some
        if some == 0:
            return gone


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = (
    (1.0, send_webhooks),
    (1.0, send_mails),
    (15.0, measure_outbox),
    (3600.0, purge_outbox),
)
"""Seconds between runs, and what runs."""
