"""An organization that spends, and what it was told."""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.credits.conftest import scratch_database

from bursar import db
from bursar.alerts.looking import sweep_some
from bursar.clock import now, uuid7
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.limits import Scope, allocate, set_limit
from bursar.credits.pools import pool_for
from bursar.money import Micros, credits
from bursar.settings import Settings

TOLD = """
    select kind, object_kind, object_id, sequence, payload from outbox.events
    where organization_id = %(organization_id)s order by posted_at, sequence"""


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it was posted."""

    kind: str
    object_kind: str
    object_id: UUID
    sequence: int
    payload: dict[str, Any]

    @property
    def level(self) -> tuple[str, str]:
        return self.kind, self.payload["threshold"]


@dataclass(frozen=True, slots=True)
class House:
    """An organization and one of its members."""

    org: Org
    user: UUID

    @property
    def place(self) -> dict[str, UUID]:
        return {"organization_id": self.org.organization_id}

    async def fund(self, amount: int, *, expires_in: timedelta | None = None) -> UUID:
        """Credits into the shared pool."""
        expires: datetime | None = now() + expires_in if expires_in else None
        async with self.org.tenant() as conn:
            pool = await pool_for(conn, **self.place)
            await add_grant(
                conn,
                pool_id=pool,
                amount_micros=credits(amount),
                source=GrantSource.PURCHASE,
                idempotency_key=uuid7().hex,
                expires_at=expires,
                **self.place,
            )
        return pool

    async def cap(self, amount: int, scope: Scope = Scope.USER, scope_id: UUID | None = None, **more: Any) -> UUID:
        async with self.org.tenant() as conn:
            return await set_limit(
                conn,
                scope=scope,
                scope_id=None if scope is Scope.ORGANIZATION else scope_id or self.user,
                amount=credits(amount),
                **more,
                **self.place,
            )

    async def share(self, amount: int, **more: Any) -> UUID:
        async with self.org.tenant() as conn:
            return await allocate(
                conn,
                pool_id=await pool_for(conn, **self.place),
                user_id=self.user,
                amount_micros=credits(amount),
                idempotency_key=uuid7().hex,
                **more,
                **self.place,
            )

    async def spend(self, amount: float) -> int:
        """Charge now; 0 when it was."""
        async with self.org.tenant() as conn:
            outcome: int = await db.fetch_value(
                conn,
                "select outcome from"
                " credits.deduct_credits(%(organization_id)s, %(user)s, %(micros)s, 'demo-1', %(key)s)",
                user=self.user,
                micros=Micros(int(amount * 1_000_000)),
                key=uuid7().hex,
                **self.place,
            )
        return outcome

    async def look(self) -> int:
        """Weigh every balance of this organization."""
        return await sweep_some(self.org.database, [self.org.organization_id])

    async def told(self, object_kind: str | None = None) -> list[Told]:
        async with self.org.tenant() as conn:
            found = await db.fetch_all(conn, Told, TOLD, **self.place)
        return [each for each in found if object_kind in (None, each.object_kind)]

    async def levels(self, object_kind: str) -> list[tuple[str, str]]:
        return [each.level for each in await self.told(object_kind)]

    async def mailed(self) -> set[UUID]:
        async with self.org.tenant() as conn:
            rows = await (await conn.execute("select user_id from outbox.mails where user_id is not null")).fetchall()
        return {row[0] for row in rows}


@pytest.fixture(scope="session")
async def database(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[db.Database]:
    """A database of these tests' own: they move periods into the past, so that its books agree with nothing afterwards.

    database: the run's own comes first, it makes the roles.
    """
    async with scratch_database(admin_dsn, settings, "moved") as own:
        yield own


@pytest.fixture
async def house(org: Org) -> House:
    return House(org, await org.member())


@pytest.fixture
async def alone(admin_dsn: str, settings: Settings, database: db.Database) -> AsyncIterator[db.Database]:
    """A database where nobody else is looked at. database: the run's own comes first, it makes the roles."""
    async with scratch_database(admin_dsn, settings, "alerts") as own:
        yield own
