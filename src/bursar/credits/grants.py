"""Grants: credits that are added to a pool, and the order in which they burn."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.clock import uuid7
from bursar.money import Micros, NanoUsd
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")
USUAL_PRIORITY: Final = 100


class GrantSource(StrEnum):
    """Where credits came from."""

    PURCHASE = "purchase"
    PLAN = "plan"
    COMPLIMENTARY = "complimentary"
    CODE = "code"
    ROLL_OVER = "roll_over"
    ADJUSTMENT = "adjustment"
    CREDIT_LINE = "credit_line"
    TRANSFER = "transfer"
    OPENING = "opening"
    TOP_UP = "top_up"
    FORGIVENESS = "forgiveness"
    REFUND = "refund"


OF_THEIR_OWN: Final = frozenset({GrantSource.TOP_UP, GrantSource.FORGIVENESS, GrantSource.REFUND})
"""Sources of grants that only their own commands make: purchases by themselves, forgiven debts, refunds."""


class InvalidGrant(Problem):
    """The grant could never be spent."""

    status, code, title = 400, "invalid_grant", "This grant cannot be made"
    sqlstate = "BR400"


class KeyReused(Problem):
    """The idempotency key was used with another body."""

    status, code, title = 422, "idempotency_key_reused", "This idempotency key was used with another body"
    sqlstate = "BR422"


@dataclass(frozen=True, slots=True)
class Grant:
    """One grant and what is left of it now; amounts in micros.

    Burn order: priority, soonest expiry, free before paid, effective, created, id. burns_before_next: which of these
    puts it before the next one that can be spent (`only`: there is none); None where it cannot be spent.
    parent: the grant it rolled over or was transferred from.
    """

    grant_id: UUID
    pool_id: UUID
    source: GrantSource
    amount_micros: Micros
    left_micros: Micros
    state: str
    priority: int
    is_free: bool
    cost_basis_nano_usd: NanoUsd
    effective_at: datetime
    expires_at: datetime | None
    reason: str | None
    created_at: datetime
    parent_grant_id: UUID | None
    burns_before_next: str | None


def require_given(source: GrantSource) -> None:
    """Refuse a source of grants that only a command of its own makes.

    Raises:
        InvalidGrant
    """
    if source in OF_THEIR_OWN:
        raise InvalidGrant(f"Grants of the source {source.value} come of commands of their own")


async def add_grant(
    conn: db.Connection,
    *,
    organization_id: UUID,
    pool_id: UUID,
    amount_micros: Micros,
    source: GrantSource,
    idempotency_key: str,
    priority: int = USUAL_PRIORITY,
    is_free: bool = False,
    cost_basis_nano_usd: NanoUsd = NanoUsd(0),  # noqa: B008 - an int
    effective_at: datetime | None = None,
    expires_at: datetime | None = None,
    reason: str | None = None,
    created_by: UUID | None = None,
    min_rollover_micros: Micros | None = None,
    max_rollover_micros: Micros | None = None,
    rollover_expires_at: datetime | None = None,
) -> UUID:
    """Add credits to a pool, spendable on [effective, expires). Returns the grant's id.

    Calling again with the same key returns the first grant and adds nothing more. At its end
    min(max_rollover, max(min_rollover, left)) goes on as a grant of its own until rollover_expires_at; without bounds
    all that is left expires.

    Raises:
        NotFound: no such open pool. InvalidGrant: it would have expired already, or comes of another command.
        KeyReused: another body.
    """
    require_given(source)
    grant_id = await db.fetch_value(
        conn,
        QUERIES.add_grant,
        organization_id=organization_id,
        grant_id=uuid7(),
        pool_id=pool_id,
        source=source,
        amount_micros=amount_micros,
        priority=priority,
        is_free=is_free,
        cost_basis_nano_usd=cost_basis_nano_usd,
        effective_at=effective_at,
        expires_at=expires_at,
        reason=reason,
        created_by=created_by,
        idempotency_key=idempotency_key,
        min_rollover_micros=min_rollover_micros,
        max_rollover_micros=max_rollover_micros,
        rollover_expires_at=rollover_expires_at,
    )
    assert isinstance(grant_id, UUID)
    return grant_id


async def void_grant(
    conn: db.Connection,
    *,
    organization_id: UUID,
    grant_id: UUID,
    reason: str,
    created_by: UUID | None,
    idempotency_key: str,
) -> Micros:
    """Take back what a grant has left and no open hold needs; returns the micros taken back."""
    taken = await db.fetch_value(
        conn,
        QUERIES.void_grant,
        organization_id=organization_id,
        grant_id=grant_id,
        reason=reason,
        created_by=created_by,
        idempotency_key=idempotency_key,
    )
    return Micros(int(taken))


async def list_grants(conn: db.Connection, *, organization_id: UUID) -> list[Grant]:
    """Every grant, in burn order within its pool."""
    return await db.fetch_all(conn, Grant, QUERIES.grants, organization_id=organization_id)
