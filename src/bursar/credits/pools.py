"""Pools: who shares a balance, and how much is available, used and held in it."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.clock import uuid7
from bursar.identity.organizations import Organization
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")


class PoolKind(StrEnum):
    """Who may spend from a pool."""

    SHARED = "shared"
    PERSONAL = "personal"
    INDIVIDUAL = "individual"
    RESIDUAL = "residual"


class NoPool(Problem):
    """The organization has no such open pool."""

    status, code, title = 404, "pool_not_found", "No such pool"


@dataclass(frozen=True, slots=True)
class Pool:
    """A pool and its balance, in micros. available: spendable now; excess: used or held beyond what was granted.

    is_closed: nobody spends from it since credits were switched to other pools; what it still holds or is owed is
    settled by itself.
    """

    pool_id: UUID
    kind: PoolKind
    owner_user_id: UUID | None
    name: str
    model_filter: str | None
    limit_micros: Micros
    used_micros: Micros
    held_micros: Micros
    excess_micros: Micros
    next_event_at: datetime | None
    is_closed: bool = False

    @property
    def available_micros(self) -> Micros:
        """What can still be authorized from this pool as a whole."""
        return Micros(max(0, self.limit_micros - self.used_micros - self.held_micros))


async def open_account(conn: db.Connection, *, organization_id: UUID, kind: PoolKind) -> UUID:
    """Give an organization its gate and its first pool; calling again changes nothing. Returns the pool's id.

    kind: SHARED for a company that shares, INDIVIDUAL for a person without company. An organization whose members have
    balances of their own calls `open_gate` and opens a PERSONAL pool per member when the first grant arrives.
    """
    await open_gate(conn, organization_id=organization_id)
    name = "Shared credits" if kind is PoolKind.SHARED else "Individual credits"
    return await open_pool(conn, organization_id=organization_id, kind=kind, name=name)


async def open_credits(conn: db.Connection, organization: Organization) -> None:
    """The accounts that a new organization gets, by its kind; whoever creates one composes this with it."""
    if organization.kind == "individual":
        await open_account(conn, organization_id=organization.organization_id, kind=PoolKind.INDIVIDUAL)
    elif organization.is_shared_token_pool:
        await open_account(conn, organization_id=organization.organization_id, kind=PoolKind.SHARED)
    else:
        await open_gate(conn, organization_id=organization.organization_id)


async def open_gate(conn: db.Connection, *, organization_id: UUID) -> None:
    """Let credits of this organization move at all; idempotent."""
    await db.execute(conn, QUERIES.open_organization, organization_id=organization_id)


async def open_pool(
    conn: db.Connection,
    *,
    organization_id: UUID,
    kind: PoolKind,
    name: str,
    owner_user_id: UUID | None = None,
    model_filter: str | None = None,
) -> UUID:
    """The open pool of this kind, owner and filter; made when there is none. Returns its id.

    model_filter: LIKE pattern of the models it may pay for, or after # of features; None: everything.
    """
    pool_id = await db.fetch_value(
        conn,
        QUERIES.open_pool,
        organization_id=organization_id,
        pool_id=uuid7(),
        kind=kind,
        owner_user_id=owner_user_id,
        name=name,
        model_filter=model_filter,
    )
    assert isinstance(pool_id, UUID)
    return pool_id


async def list_pools(conn: db.Connection, *, organization_id: UUID, with_unsettled: bool = False) -> list[Pool]:
    """Open pools of the organization, shared first. with_unsettled: and closed ones that hold or are owed something."""
    return await db.fetch_all(conn, Pool, QUERIES.pools, organization_id=organization_id, with_unsettled=with_unsettled)


async def pool_for(
    conn: db.Connection, *, organization_id: UUID, owner_user_id: UUID | None = None, model_filter: str | None = None
) -> UUID:
    """Where credits for this organization go: the owner's personal pool (opened when missing), else the organization's.

    model_filter: into its pool of that kind that pays for this alone, opened when missing; as of `open_pool`.

    Raises:
        NoPool: the organization has no pool of its own, because its members have balances of their own.
    """
    if owner_user_id is not None:
        return await open_pool(
            conn,
            organization_id=organization_id,
            kind=PoolKind.PERSONAL,
            name="Personal credits",
            owner_user_id=owner_user_id,
            model_filter=model_filter,
        )
    pool_id = await db.fetch_value(conn, QUERIES.own_pool, organization_id=organization_id)
    if pool_id is None:
        raise NoPool("this organization's members have balances of their own: name the member")
    assert isinstance(pool_id, UUID)
    if model_filter is None:
        return pool_id
    own = next(pool for pool in await list_pools(conn, organization_id=organization_id) if pool.pool_id == pool_id)
    return await open_pool(
        conn, organization_id=organization_id, kind=own.kind, name=own.name, model_filter=model_filter
    )
