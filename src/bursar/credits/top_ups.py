"""Purchases that a pool makes by itself when it runs low, and debts that are forgiven.

Who takes the money is behind `Purchases`: given a purchase, it says bought, declined or waiting. It is asked again
about a purchase that waits, also after a crash, so it must know it by its id. Without one, a person decides
(`bursar top-ups confirm`).
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol
from uuid import UUID

import structlog

from bursar import db
from bursar.audit.events import SYSTEM, Actor, record
from bursar.clock import uuid7
from bursar.money import Micros, NanoUsd
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")
USUAL_MOST_PER_HOUR: Final = 3

log = structlog.get_logger(__name__)


class NoSuchDebt(Problem):
    """More is to be forgiven than is owed; the detail says how much is."""

    status, code, title = 409, "no_such_debt", "The pool does not owe that much"
    sqlstate = "BR450"


class AlreadyBought(Problem):
    """The purchase succeeded, so it cannot fail any more."""

    status, code, title = 409, "already_bought", "This purchase succeeded already"
    sqlstate = "BR451"


@dataclass(frozen=True, slots=True)
class Policy:
    """When a pool buys more. threshold: when less is available; ceiling: of a calendar month, open ones included.

    state: active; runaway or declined (stopped until it is set again); ended. next_try_at: nothing is bought before.
    """

    pool_id: UUID
    pool: str
    owner_user_id: UUID | None
    threshold_micros: Micros
    amount_micros: Micros
    ceiling_micros: Micros
    most_per_hour: int
    state: str
    declines: int
    next_try_at: datetime | None
    set_at: datetime


@dataclass(frozen=True, slots=True)
class TopUp:
    """A purchase. state: pending, succeeded, failed. paid: nano-dollars, of one that succeeded."""

    top_up_id: UUID
    pool_id: UUID
    amount_micros: Micros
    state: str
    requested_at: datetime
    decided_at: datetime | None
    paid_nano_usd: NanoUsd | None
    reference: str | None
    reason: str | None
    grant_id: UUID | None


@dataclass(frozen=True, slots=True)
class Bought:
    """The money was taken. reference: what who took it calls the payment."""

    paid_nano_usd: NanoUsd
    reference: str


@dataclass(frozen=True, slots=True)
class Declined:
    """It will not be paid; the next purchase waits for a while."""

    reason: str


@dataclass(frozen=True, slots=True)
class Waiting:
    """Not decided; it is asked about again at the next turn."""


class Purchases(Protocol):
    """Who takes the money. `buy` is called with a purchase until it is decided: the same id is the same purchase."""

    async def buy(self, database: db.Database, organization_id: UUID, top_up: TopUp) -> Bought | Declined | Waiting:
        """Take the money for a purchase, or say that it is not decided."""


class ByHand:
    """Nobody takes money here: a person confirms or declines each purchase."""

    async def buy(self, database: db.Database, organization_id: UUID, top_up: TopUp) -> Bought | Declined | Waiting:
        """Waits."""
        return Waiting()


@dataclass(frozen=True, slots=True)
class _Low:
    organization_id: UUID
    pool_id: UUID


async def top_up_pools(database: db.Database, purchases: Purchases | None = None) -> int:
    """Begin what pools must buy now and ask about what is not decided; returns how many purchases are open.

    Safe to run several times at once and to be killed anywhere: a purchase is begun once, and granted once.
    """
    purchases = purchases or ByHand()
    async with database.platform() as conn:
        pools = await db.fetch_all(conn, _Low, QUERIES.pools_to_top_up)
    waiting = 0
    for each in pools:
        try:
            waiting += await _top_up(database, purchases, each.organization_id, each.pool_id)
        except Exception:  # one organization's fault is not another's; what is open is asked about again
            log.exception("top-up failed", organization_id=str(each.organization_id), pool_id=str(each.pool_id))
            waiting += 1
    return waiting


async def _top_up(database: db.Database, purchases: Purchases, organization_id: UUID, pool_id: UUID) -> int:
    async with database.tenant(organization_id) as conn:
        found = await db.fetch_optional(
            conn, TopUp, QUERIES.begin_top_up, organization_id=organization_id, pool_id=pool_id, top_up_id=uuid7()
        )
    if found is None:
        return 0
    answer = await purchases.buy(database, organization_id, found)
    if isinstance(answer, Waiting):
        return 1
    async with database.tenant(organization_id) as conn:
        if isinstance(answer, Bought):
            await confirm(conn, organization_id=organization_id, top_up_id=found.top_up_id, bought=answer, by=SYSTEM)
        else:
            reason = answer.reason
            await decline(conn, organization_id=organization_id, top_up_id=found.top_up_id, reason=reason, by=SYSTEM)
    return 0


async def confirm(conn: db.Connection, *, organization_id: UUID, top_up_id: UUID, bought: Bought, by: Actor) -> TopUp:
    """A purchase was paid: its credits are granted, with the money as their cost basis. Again is once.

    One that was declined may turn out to have been paid.

    Raises:
        NotFound
    """
    done = await _decide(conn, organization_id=organization_id, top_up_id=top_up_id, bought=bought, reason=None)
    new = {"amount_micros": done.amount_micros, "paid_nano_usd": done.paid_nano_usd, "reference": done.reference}
    await record(conn, organization_id=organization_id, by=by, action="top_up.confirmed", object_id=top_up_id, new=new)
    return done


async def decline(
    conn: db.Connection, *, organization_id: UUID, top_up_id: UUID, reason: str | None, by: Actor
) -> TopUp:
    """A purchase was not paid: the next one waits an hour, then two, four … a day at most; six in a row stop it all.

    Raises:
        NotFound, AlreadyBought
    """
    done = await _decide(conn, organization_id=organization_id, top_up_id=top_up_id, bought=None, reason=reason)
    await record(
        conn, organization_id=organization_id, by=by, action="top_up.declined", object_id=top_up_id, reason=reason
    )
    return done


async def _decide(
    conn: db.Connection, *, organization_id: UUID, top_up_id: UUID, bought: Bought | None, reason: str | None
) -> TopUp:
    """bought: None where it was declined."""
    return await db.fetch_one(
        conn,
        TopUp,
        QUERIES.decide_top_up,
        organization_id=organization_id,
        top_up_id=top_up_id,
        succeeded=bought is not None,
        paid_nano_usd=bought.paid_nano_usd if bought else None,
        reference=bought.reference if bought else None,
        reason=reason,
    )


async def set_policy(
    conn: db.Connection,
    *,
    organization_id: UUID,
    pool_id: UUID,
    threshold_micros: Micros,
    amount_micros: Micros,
    ceiling_micros: Micros,
    most_per_hour: int = USUAL_MOST_PER_HOUR,
    by: Actor,
) -> None:
    """Set when a pool buys more; again also ends a stop after declines or a runaway.

    Raises:
        InvalidGrant: an amount that cannot be, or a ceiling below one purchase. NotFound: no such open pool.
    """
    terms = {
        "threshold_micros": threshold_micros,
        "amount_micros": amount_micros,
        "ceiling_micros": ceiling_micros,
        "most_per_hour": most_per_hour,
    }
    place = {"organization_id": organization_id, "pool_id": pool_id, "set_by": by.user_id}
    await db.execute(conn, QUERIES.set_top_up, **place, **terms)
    await record(conn, organization_id=organization_id, by=by, action="top_up_policy.set", object_id=pool_id, new=terms)


async def end_policy(conn: db.Connection, *, organization_id: UUID, pool_id: UUID, by: Actor) -> None:
    """Switch a pool's purchases off; an open one goes on.

    Raises:
        NotFound
    """
    await db.execute(conn, QUERIES.end_top_up, organization_id=organization_id, pool_id=pool_id)
    await record(conn, organization_id=organization_id, by=by, action="top_up_policy.ended", object_id=pool_id)


async def list_policies(conn: db.Connection, *, organization_id: UUID) -> list[Policy]:
    """Policies of an organization's pools, in the order of setting."""
    return await db.fetch_all(conn, Policy, QUERIES.top_up_policies, organization_id=organization_id)


async def list_top_ups(
    conn: db.Connection, *, organization_id: UUID, before: datetime | None = None, limit: int = 50
) -> list[TopUp]:
    """The newest purchases before an instant (all when None), newest first."""
    return await db.fetch_all(conn, TopUp, QUERIES.top_ups, organization_id=organization_id, before=before, limit=limit)


async def forgive_debt(
    conn: db.Connection,
    *,
    organization_id: UUID,
    pool_id: UUID,
    amount_micros: Micros | None,
    reason: str,
    by: Actor,
    idempotency_key: str,
) -> Micros:
    """Forgive what a pool owes, all of it when no amount is given: a booked entry. Returns the micros forgiven.

    Raises:
        NotFound: no such pool. NoSuchDebt: it owes less, or nothing. KeyReused: another body.
    """
    forgiven = await db.fetch_value(
        conn,
        QUERIES.forgive_debt,
        organization_id=organization_id,
        pool_id=pool_id,
        amount_micros=amount_micros,
        reason=reason,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="debt.forgiven",
        object_id=pool_id,
        new={"amount_micros": int(forgiven)},
        reason=reason,
    )
    return Micros(int(forgiven))
