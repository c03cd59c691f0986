"""Webhooks: where they go, what for, and what they are signed with."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.outbox.outside import Allowed, checked_url
from bursar.outbox.signing import new_secret
from bursar.problems import Problem
from bursar.sealing import Keyring, Sealed

QUERIES: Final = db.load_queries("bursar.outbox")
PURPOSE: Final = "outbox.endpoint_secrets"
MOST_ENDPOINTS: Final = 20
OVERLAP: Final = timedelta(hours=24)
"""How long the secret before a rotation signs too."""
TEST_KIND: Final = "webhook.test"
_KIND: Final = re.compile(r"\*|[a-z_]+\.(\*|[a-z_]+)", re.ASCII)


class WebhookNotFound(Problem):
    """No such webhook in this organization, or it was removed."""

    status, code, title = 404, "webhook_not_found", "No such webhook"


class EventNotFound(Problem):
    """No such event in this organization."""

    status, code, title = 404, "event_not_found", "No such event"


class InvalidEventKinds(Problem):
    """What a webhook asks for are kinds of events: *, pool.*, limit.reached."""

    status, code, title = 422, "invalid_event_kinds", "These are no kinds of events"


class TooManyWebhooks(Problem):
    """An organization has a bounded number of webhooks."""

    status, code, title = 409, "too_many_webhooks", "There are too many webhooks"


class WebhookDisabled(Problem):
    """It failed for too long, or said that it is gone; nothing is sent to it until it is enabled."""

    status, code, title = 409, "webhook_disabled", "This webhook is disabled"


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A webhook. state: active, or disabled after days of failures; the counts are of a list only."""

    organization_id: UUID
    endpoint_id: UUID
    url: str
    kinds: tuple[str, ...]
    state: str
    failing_since: datetime | None
    created_at: datetime
    pending: int = 0
    failed: int = 0
    delivered: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivered:
    """One line of a webhook's log: an event, and what became of it there."""

    event_id: UUID
    kind: str
    object_kind: str
    object_id: UUID
    sequence: int
    state: str
    attempts: int
    answer: str | None
    posted_at: datetime
    next_attempt_at: datetime
    ended_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _SealedRow:
    organization_id: UUID
    secret_id: UUID
    sealing_key_id: str
    nonce: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)

    def opened(self, keyring: Keyring) -> str:
        sealed = Sealed(self.sealing_key_id, self.nonce, self.ciphertext)
        return keyring.open(sealed, purpose=PURPOSE, organization_id=self.organization_id, row_id=self.secret_id)


async def add_endpoint(
    conn: db.Connection,
    keyring: Keyring,
    allowed: Allowed,
    *,
    organization_id: UUID,
    url: str,
    kinds: Sequence[str] = ("*",),
    by: Actor,
) -> tuple[Endpoint, str]:
    """Send events of these kinds to an address from now on. Returns the webhook and its secret, which is shown once.

    Raises:
        AddressNotAllowed, InvalidEventKinds, TooManyWebhooks
    """
    checked_url(url, allowed)
    wrong = [kind for kind in kinds if not _KIND.fullmatch(kind)]
    if wrong or not kinds:
        raise InvalidEventKinds(f"“{(wrong or [''])[0][:100]}”. Kinds are like pool.low, pool.* or *.")
    if int(await db.fetch_value(conn, QUERIES.count_endpoints, organization_id=organization_id)) >= MOST_ENDPOINTS:
        raise TooManyWebhooks(f"An organization has at most {MOST_ENDPOINTS}. Remove one: bursar webhooks remove")
    endpoint = await db.fetch_one(
        conn,
        Endpoint,
        QUERIES.add_endpoint,
        organization_id=organization_id,
        endpoint_id=uuid7(),
        url=url,
        kinds=list(dict.fromkeys(kinds)),
        created_by=by.user_id,
    )
    secret = await _add_secret(conn, keyring, organization_id, endpoint.endpoint_id)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="webhook.added",
        object_id=endpoint.endpoint_id,
        new={"url": url, "kinds": endpoint.kinds},
    )
    return endpoint, secret


async def get_endpoint(conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID) -> Endpoint:
    """A webhook that was not removed.

    Raises:
        WebhookNotFound
    """
    found = await db.fetch_optional(
        conn, Endpoint, QUERIES.endpoint, organization_id=organization_id, endpoint_id=endpoint_id
    )
    if found is None:
        raise WebhookNotFound("Those there are: bursar webhooks list")
    return found


async def list_endpoints(conn: db.Connection, *, organization_id: UUID) -> list[Endpoint]:
    """Webhooks in the order in which they were added, with counts of their deliveries."""
    return await db.fetch_all(conn, Endpoint, QUERIES.endpoints, organization_id=organization_id)


async def rotate_secret(
    conn: db.Connection,
    keyring: Keyring,
    *,
    organization_id: UUID,
    endpoint_id: UUID,
    by: Actor,
    overlap: timedelta = OVERLAP,
) -> str:
    """A new secret; until the end of `overlap` the one before signs too, each delivery by both.

    Raises:
        WebhookNotFound
    """
    await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
    await db.execute(
        conn,
        QUERIES.end_secrets,
        organization_id=organization_id,
        endpoint_id=endpoint_id,
        overlap_seconds=overlap.total_seconds(),
    )
    secret = await _add_secret(conn, keyring, organization_id, endpoint_id)
    await record(conn, organization_id=organization_id, by=by, action="webhook.rotated", object_id=endpoint_id)
    return secret


async def remove_endpoint(conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID, by: Actor) -> None:
    """Send nothing there any more; what had not been delivered is given up.

    Raises:
        WebhookNotFound
    """
    await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
    await _end(conn, organization_id, endpoint_id, "removed", by, "removed")


async def disable_endpoint(
    conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID, by: Actor, reason: str
) -> None:
    """Stop sending there until somebody enables it, and tell administrators. Nothing when it is not active."""
    if await _end(conn, organization_id, endpoint_id, "disabled", by, reason):
        endpoint = await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
        slug = await db.fetch_value(conn, QUERIES.organization_slug, organization_id=organization_id)
        webhook = f"whk_{endpoint_id.hex} --org {slug}"
        next_step = f"bursar webhooks log {webhook}, then bursar webhooks enable {webhook}"
        await post_event(
            conn,
            organization_id=organization_id,
            kind="webhook.disabled",
            object_kind="webhook",
            object_id=endpoint_id,
            payload={
                "title": f"The webhook to {endpoint.url} was disabled",
                "text": [f"Reason: {reason}.", "Nothing is sent there until it is enabled.", f"Next: {next_step}"],
                "url": endpoint.url,
                "reason": reason,
                "next_step": next_step,
            },
        )


async def enable_endpoint(conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID, by: Actor) -> Endpoint:
    """Send there again; what was missed meanwhile is sent by a replay only.

    Raises:
        WebhookNotFound
    """
    params = {"organization_id": organization_id, "endpoint_id": endpoint_id}
    if await db.fetch_value(conn, QUERIES.enable_endpoint, **params) is not None:
        await record(conn, organization_id=organization_id, by=by, action="webhook.enabled", object_id=endpoint_id)
    return await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)


async def replay(
    conn: db.Connection,
    *,
    organization_id: UUID,
    endpoint_id: UUID,
    by: Actor,
    event_id: UUID | None = None,
    since: datetime | None = None,
    only_failed: bool = False,
) -> int:
    """Send one event, or those since an instant that the webhook asks for, once more under their ids; how many.

    Raises:
        WebhookNotFound, WebhookDisabled, EventNotFound
    """
    endpoint = await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
    if endpoint.state != "active":
        raise WebhookDisabled("Enable it first: bursar webhooks enable")
    params: dict[str, Any] = {"organization_id": organization_id, "endpoint_id": endpoint_id}
    if event_id is not None:
        again = await db.execute(conn, QUERIES.replay_one, **params, event_id=event_id)
        if again == 0:
            raise EventNotFound("Those there are: bursar webhooks log")
    else:
        assert since is not None
        again = await db.execute(conn, QUERIES.replay_since, **params, since=since, only_failed=only_failed)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="webhook.replayed",
        object_id=endpoint_id,
        new={"events": again, "event_id": event_id, "since": since},
    )
    return again


async def post_test(conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID) -> UUID:
    """An event for one webhook alone, whatever it asks for; its id.

    Raises:
        WebhookNotFound, WebhookDisabled
    """
    endpoint = await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
    if endpoint.state != "active":
        raise WebhookDisabled("Enable it first: bursar webhooks enable")
    event_id = await post_event(
        conn,
        organization_id=organization_id,
        kind=TEST_KIND,
        object_kind="webhook",
        object_id=endpoint_id,
        payload={"title": "This is a test", "text": ["Nothing happened."]},
    )
    await db.execute(
        conn, QUERIES.replay_one, organization_id=organization_id, endpoint_id=endpoint_id, event_id=event_id
    )
    return event_id


async def post_event(
    conn: db.Connection,
    *,
    organization_id: UUID,
    kind: str,
    object_kind: str,
    object_id: UUID,
    payload: dict[str, Any],
) -> UUID:
    """Write down what happened and who is to be told, in the transaction of the deed; the event's id."""
    event_id = await db.fetch_value(
        conn,
        QUERIES.post_event,
        organization_id=organization_id,
        kind=kind,
        object_kind=object_kind,
        object_id=object_id,
        payload=Jsonb(payload),
    )
    assert isinstance(event_id, UUID)
    return event_id


async def list_deliveries(
    conn: db.Connection, *, organization_id: UUID, endpoint_id: UUID, most: int = 50
) -> list[Delivered]:
    """A webhook's log, newest first.

    Raises:
        WebhookNotFound
    """
    await get_endpoint(conn, organization_id=organization_id, endpoint_id=endpoint_id)
    return await db.fetch_all(
        conn, Delivered, QUERIES.deliveries, organization_id=organization_id, endpoint_id=endpoint_id, most=most
    )


async def secrets_in_force(
    conn: db.Connection, keyring: Keyring, *, organization_id: UUID, endpoint_id: UUID
) -> list[str]:
    """What a delivery is signed with, the newest first; two during a rotation."""
    rows = await db.fetch_all(
        conn, _SealedRow, QUERIES.secrets_in_force, organization_id=organization_id, endpoint_id=endpoint_id
    )
    return [row.opened(keyring) for row in rows]


async def reseal_secrets(database: db.Database, keyring: Keyring) -> int:
    """Seal every secret that was sealed under another master key anew under the newest; how many. Safe to run again.

    Raises:
        SealBroken: a secret was sealed under a master key that the keyring does not know.
    """
    async with database.platform() as conn:
        organization_ids = await db.fetch_values(
            conn, QUERIES.organizations_with_secrets_sealed_otherwise, sealing_key_id=keyring.newest_id
        )
    total = 0
    for organization_id in organization_ids:
        async with database.tenant(organization_id) as conn:
            total += await reseal_some(conn, keyring, organization_id)
    return total


async def reseal_some(conn: db.Connection, keyring: Keyring, organization_id: UUID) -> int:
    """As `reseal_secrets`, of one organization."""
    params = {"organization_id": organization_id, "sealing_key_id": keyring.newest_id}
    rows = await db.fetch_all(conn, _SealedRow, QUERIES.secrets_sealed_otherwise, **params)
    for row in rows:
        sealed = _seal(keyring, row.opened(keyring), organization_id, row.secret_id)
        await db.execute(conn, QUERIES.reseal_secret, **sealed)
    return len(rows)


async def _add_secret(conn: db.Connection, keyring: Keyring, organization_id: UUID, endpoint_id: UUID) -> str:
    secret = new_secret()
    sealed = _seal(keyring, secret, organization_id, uuid7())
    await db.execute(conn, QUERIES.add_secret, endpoint_id=endpoint_id, **sealed)
    return secret


def _seal(keyring: Keyring, secret: str, organization_id: UUID, secret_id: UUID) -> dict[str, Any]:
    sealed = keyring.seal(secret, purpose=PURPOSE, organization_id=organization_id, row_id=secret_id)
    return {
        "organization_id": organization_id,
        "secret_id": secret_id,
        "sealing_key_id": sealed.sealing_key_id,
        "nonce": sealed.nonce,
        "ciphertext": sealed.ciphertext,
    }


async def _end(
    conn: db.Connection, organization_id: UUID, endpoint_id: UUID, state: str, by: Actor, reason: str
) -> bool:
    params = {"organization_id": organization_id, "endpoint_id": endpoint_id}
    if await db.fetch_value(conn, QUERIES.end_endpoint, **params, state=state) is None:
        return False
    await db.execute(conn, QUERIES.give_up_all, **params, answer=f"given up: {reason}")
    action = f"webhook.{state}"
    await record(conn, organization_id=organization_id, by=by, action=action, object_id=endpoint_id, reason=reason)
    return True
