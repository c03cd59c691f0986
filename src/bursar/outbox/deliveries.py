"""Sending events to webhooks: at least once each, in the order of their object, for three days.

Whoever sends a delivery has claimed it for the time of a lease. Who dies while sending reports nothing, the lease ends,
and it is sent again under the same webhook-id: a receiver that knows an id has had it.
"""

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from prometheus_client import Counter

from bursar import __version__, clock, db
from bursar.audit.events import SYSTEM
from bursar.outbox.endpoints import QUERIES, disable_endpoint, secrets_in_force
from bursar.outbox.outside import SECONDS, AddressNotAllowed, Outside, Unreachable
from bursar.outbox.signing import headers
from bursar.sealing import Keyring

LEASE_SECONDS: Final = 3 * SECONDS
MOST_A_RUN: Final = 200
MOST_EACH: Final = 20
"""Of one webhook in a run."""
AT_ONCE: Final = 32
GIVE_UP_AFTER: Final = timedelta(days=3)
DISABLE_AFTER: Final = timedelta(days=5)
"""Of failures and no success in between."""
FIRST_WAIT_SECONDS: Final = 5
LONGEST_WAIT_SECONDS: Final = 12 * 3600
GONE: Final = 410

OUTCOMES = Counter(
    "bursar_webhook_attempts_total", "Webhooks sent, by what came of it: delivered, failed, given_up", ["outcome"]
)
log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Due:
    """A delivery whose time has come."""

    organization_id: UUID
    endpoint_id: UUID
    event_id: UUID


@dataclass(frozen=True, slots=True)
class _Claim:
    """The right to send a delivery until the lease ends."""

    attempts: int
    first_attempt_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """An event as it is told."""

    event_id: UUID
    kind: str
    object_kind: str
    object_id: UUID
    sequence: int
    payload: dict[str, Any]
    happened_at: datetime
    url: str = ""
    state: str = ""

    @property
    def public_id(self) -> str:
        return f"evt_{self.event_id.hex}"


@dataclass(frozen=True, slots=True)
class Result:
    """What came of an attempt."""

    is_delivered: bool
    answer: str
    is_gone: bool = False


class Sender:
    """Sends what is due. lease_seconds: how long a claim lasts; tests of crashes make it short."""

    def __init__(
        self, database: db.Database, outside: Outside, keyring: Keyring, *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._database = database
        self._outside = outside
        self._keyring = keyring
        self._lease_seconds = lease_seconds

    async def send_due(self) -> int:
        """Send what is due now, a few at once; how many there were."""
        async with self._database.platform() as conn:
            due = await db.fetch_all(conn, Due, QUERIES.due_deliveries, most=MOST_A_RUN, most_each=MOST_EACH)
        free = asyncio.Semaphore(AT_ONCE)

        async def one(each: Due) -> None:
            async with free:
                try:
                    await self.send(each)
                except Exception:
                    # What is wrong with one must not keep the others waiting; it is due again when its lease ends.
                    log.exception("a webhook cannot be sent", event=str(each.event_id))

        await asyncio.gather(*(one(each) for each in due))
        return len(due)

    async def send(self, due: Due) -> Result | None:
        """Claim one, send it and note what came of it; None where another one had claimed it."""
        place = _place(due)
        async with self._database.tenant(due.organization_id) as conn:
            claim = await db.fetch_optional(
                conn, _Claim, QUERIES.claim_delivery, **place, lease_seconds=self._lease_seconds
            )
            if claim is None:
                return None
            event = await db.fetch_one(conn, Event, QUERIES.what_to_send, **place)
            secrets = await secrets_in_force(
                conn, self._keyring, organization_id=due.organization_id, endpoint_id=due.endpoint_id
            )
        result = await self._post(due, event, secrets)
        async with self._database.tenant(due.organization_id) as conn:
            await self._note(conn, due, claim, result)
        return result

    async def _post(self, due: Due, event: Event, secrets: list[str]) -> Result:
        body = body_of(due.organization_id, event)
        signed = headers(event.public_id, int(clock.now().timestamp()), body, secrets)
        plain = {"Content-Type": "application/json", "User-Agent": f"bursar/{__version__}"}
        try:
            status = await self._outside.post(event.url, body, {**plain, **signed})
        except (Unreachable, AddressNotAllowed) as error:
            return Result(False, str(error))
        return Result(200 <= status < 300, f"answered {status}", status == GONE)

    async def _note(self, conn: db.Connection, due: Due, claim: _Claim, result: Result) -> None:
        place = _place(due)
        if result.is_delivered:
            OUTCOMES.labels("delivered").inc()
            await db.execute(conn, QUERIES.note_delivered, **place, answer=result.answer)
            await db.execute(conn, QUERIES.note_working, **place, lease_seconds=self._lease_seconds)
            return
        wait, is_last = next_wait(claim.attempts, clock.now() - claim.first_attempt_at)
        OUTCOMES.labels("given_up" if is_last else "failed").inc()
        noted = {"attempts": claim.attempts, "answer": result.answer, "wait_seconds": wait, "is_last": is_last}
        await db.execute(conn, QUERIES.note_failed, **place, **noted)
        failing_since = await db.fetch_value(conn, QUERIES.note_failing, **place)
        reason = "it answered 410 Gone" if result.is_gone else f"every attempt failed for {DISABLE_AFTER.days} days"
        if result.is_gone or (failing_since is not None and clock.now() - failing_since >= DISABLE_AFTER):
            await disable_endpoint(
                conn, organization_id=due.organization_id, endpoint_id=due.endpoint_id, by=SYSTEM, reason=reason
            )


def body_of(organization_id: UUID, event: Event) -> bytes:
    """What is posted; the same bytes at each attempt."""
    document = {
        "type": event.kind,
        "timestamp": event.happened_at.isoformat().replace("+00:00", "Z"),
        "data": {
            **event.payload,
            "organization_id": f"org_{organization_id.hex}",
            "object": {"kind": event.object_kind, "id": str(event.object_id), "sequence": event.sequence},
        },
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def next_wait(attempts: int, since_first: timedelta) -> tuple[float, bool]:
    """Seconds until the next attempt, and whether there is none any more.

    5 s, 20 s, 80 s … up to 12 h, each shorter or longer by a fifth at random so that what failed together does not come
    back together; the last one at three days.
    """
    rest = (GIVE_UP_AFTER - since_first).total_seconds()
    if rest <= 0:
        return 0, True
    wait = min(LONGEST_WAIT_SECONDS, FIRST_WAIT_SECONDS * 4 ** min(attempts - 1, 10))
    return min(wait * random.uniform(0.8, 1.2), rest), False


def _place(due: Due) -> Mapping[str, UUID]:
    return {"organization_id": due.organization_id, "endpoint_id": due.endpoint_id, "event_id": due.event_id}
