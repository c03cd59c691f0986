"""Refunds: what a request was charged goes back to the grants that paid it."""

from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")


class RefundTooLarge(Problem):
    """All refunds of a request together are at most what it was charged."""

    status, code, title = 409, "refund_too_large", "More than is left of the charge"
    sqlstate = "BR432"


async def refund_charge(
    conn: db.Connection,
    *,
    organization_id: UUID,
    request_id: UUID,
    amount_micros: Micros | None,
    reason: str,
    by: Actor,
    idempotency_key: str,
) -> Micros:
    """Give back what a request was charged, or part of it (None: all that is left). Returns the micros refunded.

    It returns to the grants that paid, last first; what comes back to one that has expired meanwhile expires. Caps and
    shares that the request took have that much more room again. The calls and tokens stay counted.

    Raises:
        NotFound: nothing was charged for such a request. RefundTooLarge: not so much is left of it.
        KeyReused: another body.
    """
    refunded = await db.fetch_value(
        conn,
        QUERIES.refund_charge,
        organization_id=organization_id,
        request_id=request_id,
        amount_micros=amount_micros,
        reason=reason,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="request.refunded",
        object_id=request_id,
        new={"refunded_micros": int(refunded)},
        reason=reason,
    )
    return Micros(int(refunded))
