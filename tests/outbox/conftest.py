"""Webhooks of an organization, sent by hand so that a test says when."""

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.fakes.certificates import Authority
from tests.fakes.receiver import Receiver, receiving

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.outbox.deliveries import Due, Result, Sender
from bursar.outbox.endpoints import add_endpoint, post_event
from bursar.outbox.outside import Allowed, Outside
from bursar.sealing import Keyring

RING = Keyring(hashlib.sha256(b"the tests' master key").digest())
HERE = Allowed(http=True, loopback=True)


class Hooks:
    """What a test does with webhooks of its organization."""

    def __init__(self, org: Org, *, lease_seconds: float = 15.0) -> None:
        self.org = org
        self.sender = Sender(org.database, Outside(HERE), RING, lease_seconds=lease_seconds)

    async def add(self, receiver: Receiver, *kinds: str) -> tuple[UUID, str]:
        """A webhook to a receiver; its id and secret."""
        async with self.org.tenant() as conn:
            endpoint, secret = await add_endpoint(
                conn,
                RING,
                HERE,
                organization_id=self.org.organization_id,
                url=receiver.url,
                kinds=kinds or ["*"],
                by=OPERATOR,
            )
        return endpoint.endpoint_id, secret

    async def post(self, object_id: UUID | None = None, kind: str = "pool.low") -> UUID:
        """An event."""
        async with self.org.tenant() as conn:
            return await post_event(
                conn,
                organization_id=self.org.organization_id,
                kind=kind,
                object_kind="pool",
                object_id=object_id or uuid7(),
                payload={"left": "5", "unit": "credit"},
            )

    async def due(self) -> list[Due]:
        """What is due in this organization and may be sent now."""
        async with self.org.tenant() as conn:
            return await db.fetch_all(
                conn,
                Due,
                """
                select organization_id, endpoint_id, event_id from outbox.deliveries d
                where state = 'pending' and next_attempt_at <= clock_timestamp() and not exists (
                    select from outbox.deliveries b where b.endpoint_id = d.endpoint_id and b.object_id = d.object_id
                    and b.sequence < d.sequence and b.state = 'pending') order by created_at
                """,
            )

    async def send(self) -> list[Result]:
        """Send what is due until nothing is; what came of each."""
        results = []
        while due := await self.due():
            results += [result for each in due if (result := await self.sender.send(each)) is not None]
        return results

    async def later(self) -> None:
        """What waits for its next attempt is due."""
        async with self.org.tenant() as conn:
            await conn.execute(
                "update outbox.deliveries set next_attempt_at = clock_timestamp() where state = 'pending'"
            )

    async def ago(self, interval: str) -> None:
        """What was first sent was so this long ago."""
        async with self.org.tenant() as conn:
            await db.execute(
                conn,
                "update outbox.deliveries set first_attempt_at = first_attempt_at - %(i)s::interval"
                " where state = 'pending'",
                i=interval,
            )

    async def states(self) -> list[str]:
        async with self.org.tenant() as conn:
            rows = await (await conn.execute("select state from outbox.deliveries order by created_at")).fetchall()
        return [row[0] for row in rows]


@pytest.fixture
async def hooks(org: Org) -> Hooks:
    return Hooks(org)


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as receiver:
        yield receiver


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.in_folder(tmp_path)
