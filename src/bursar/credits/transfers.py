"""Transfers between the pools of one organization, and its switch between one shared pool and personal ones."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.credits.pools import PoolKind, list_pools
from bursar.identity.organizations import get_organization, set_pool_sharing
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")


class NothingToSpare(Problem):
    """The pool has less that neither running requests nor reserved shares need."""

    status, code, title = 409, "not_enough_to_transfer", "The pool cannot spare so much"
    sqlstate = "BR431"


class PoolOwes(Problem):
    """More was used of a pool than was granted; add credits or forgive it first."""

    status, code, title = 409, "pool_owes", "A pool owes credits"
    sqlstate = "BR433"


class AlreadySwitched(Problem):
    """The organization's pools are as they shall be."""

    status, code, title = 409, "already_switched", "The pools are of this kind already"


class Sharing(StrEnum):
    """Whose an organization's balances are."""

    SHARED = "shared"
    PERSONAL = "personal"


@dataclass(frozen=True, slots=True)
class Standing:
    """What could be spent of an open pool after a switch, and what running requests hold in it; micros."""

    kind: PoolKind
    owner_user_id: UUID | None
    available_micros: Micros
    held_micros: Micros


@dataclass(frozen=True, slots=True)
class Switch:
    """What a switch did, or would do. moved: from pool to pool; residual: of that what could not be divided;
    held: stays with running requests until they end; pools: the open ones afterwards.
    """

    moved_micros: Micros
    residual_micros: Micros
    held_micros: Micros
    pools: tuple[Standing, ...]


async def transfer_credits(
    conn: db.Connection,
    *,
    organization_id: UUID,
    from_pool_id: UUID,
    to_pool_id: UUID,
    amount_micros: Micros | None,
    by: Actor,
    idempotency_key: str,
    reason: str | None = None,
) -> list[UUID]:
    """Move unspent credits grant by grant in burn order; None: all that can be spared. Returns the new grants.

    Each keeps priority, time and kind of the grant it came from, and its part of the money paid for it.

    Raises:
        NotFound: no such open pool. NothingToSpare: holds and reserved shares need the rest.
        InvalidGrant: into itself, or out of a restricted pool into one for other models. KeyReused: another body.
    """
    grant_ids: list[UUID] = await db.fetch_value(
        conn,
        QUERIES.transfer_credits,
        organization_id=organization_id,
        from_pool_id=from_pool_id,
        to_pool_id=to_pool_id,
        amount_micros=amount_micros,
        reason=reason,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="pool.transferred",
        object_id=from_pool_id,
        new={"to_pool_id": to_pool_id, "amount_micros": amount_micros, "grants": len(grant_ids)},
        reason=reason,
    )
    return grant_ids


async def switch_pools(
    conn: db.Connection,
    *,
    organization_id: UUID,
    to: Sharing,
    by: Actor,
    idempotency_key: str,
    reason: str | None = None,
) -> Switch:
    """Move every credit of a company from its shared pool to its members' personal ones, or back, to the micro.

    A preview is the same in a transaction that is rolled back.

    Raises:
        AlreadySwitched. PoolOwes: a pool has overage. InvalidGrant: not a company. KeyReused: another body.
    """
    organization = await get_organization(conn, organization_id=organization_id)
    done = await db.fetch_value(conn, QUERIES.known_switch, organization_id=organization_id, key=idempotency_key)
    if organization.is_shared_token_pool == (to is Sharing.SHARED) and not done:
        raise AlreadySwitched(f"the pools of {organization.slug} are {to.value}")
    told = await db.fetch_value(
        conn,
        QUERIES.switch_pools,
        organization_id=organization_id,
        to=to,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    if not done:
        await set_pool_sharing(
            conn, organization_id=organization_id, is_shared_token_pool=to is Sharing.SHARED, by=by, reason=reason
        )
    after = await list_pools(conn, organization_id=organization_id)
    return Switch(
        Micros(told["moved_micros"]),
        Micros(told["residual_micros"]),
        Micros(told["held_micros"]),
        tuple(Standing(each.kind, each.owner_user_id, each.available_micros, each.held_micros) for each in after),
    )
