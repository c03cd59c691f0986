"""Periodic work of the outbox: webhooks and e-mails that are due, and gauges. No rules here."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from prometheus_client import Gauge

from bursar import db
from bursar.outbox.deliveries import Sender
from bursar.outbox.endpoints import QUERIES
from bursar.outbox.mails import MailServer, Postman
from bursar.outbox.outside import Allowed, Outside
from bursar.sealing import Keyring

MOST_ROUNDS: Final = 50

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


Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = ((1.0, send_webhooks), (1.0, send_mails), (15.0, measure_outbox))
"""Seconds between runs, and what runs."""
