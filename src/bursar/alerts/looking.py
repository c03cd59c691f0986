"""Looking for what is to be told, from behind the path of requests.

A look reads whose requests were booked since the one before (the attribution, by its index), weighs the balances that
those requests passed, and tells what they reached. What is told is written in one transaction with the event, and only
by whoever changes what was told before: another worker that saw the same finds it changed and tells nothing. A worker
that dies leaves `looked_until` where it was. Once an hour every balance is weighed, moved or not: after a standstill,
and for use that was booked long after it happened.
"""

from collections.abc import Awaitable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from typing import Any, Final
from uuid import UUID

from prometheus_client import Counter

from bursar import db
from bursar.alerts.telling import Subject, grant_payload, level_payload, refusal_payload
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.outbox.endpoints import post_event

QUERIES: Final = db.load_queries("bursar.alerts")
PAUSE_SECONDS: Final = 1.5
LEASE_SECONDS: Final = 30
SWEEP_AT_ONCE: Final = 100
EXPIRING_DAYS: Final = 7
FULL_KINDS: Final = {"pool": "pool.exhausted", "allocation": "allocation.exhausted", "limit": "limit.reached"}
LEVEL_KINDS: Final = {"pool": "pool.low", "allocation": "allocation.threshold", "limit": "limit.threshold"}

TOLD = Counter("bursar_alerts_total", "Alerts that were told", ["kind"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossed:
    """A balance that is further than was told, or of which less was told since its limit was raised.

    level: thresholds reached now; base: those of them that count as told. limit, used, filled and left in the balance's
    unit; filled is what 100 % is.
    """

    organization_id: UUID
    rule_id: UUID
    balance_id: UUID
    period_start: str
    watches: str
    measure: str
    thresholds: tuple[int, ...]
    readers: tuple[str, ...]
    addresses: tuple[str, ...]
    collect_minutes: int
    limit_amount: int
    used_amount: int
    filled_amount: int
    left_amount: int
    period_end: datetime | None
    stops: bool
    level: int
    told_level: int | None
    told_limit: int | None
    base_level: int

    @property
    def in_order(self) -> list[int]:
        """The thresholds as they are reached, one after the other."""
        return sorted(self.thresholds, reverse=self.measure == "left")


@dataclass(frozen=True, slots=True)
class _Look:
    since: datetime
    now: datetime
    is_sweep_due: bool


@dataclass(frozen=True, slots=True)
class _Refused:
    organization_id: UUID
    balance_id: UUID
    at: datetime
    refusals: int


@dataclass(frozen=True, slots=True)
class _Ending:
    organization_id: UUID
    grant_id: UUID
    pool_id: UUID
    source: str
    amount_micros: int
    left_micros: int
    expires_at: datetime


async def look(database: db.Database) -> int:
    """Tell what was reached since the last look, whoever made it; how many alerts. Nothing while another one looks.

    Looks that take long come less often, but no more than 15 s apart.
    """
    if database.space.is_short():
        return 0  # nothing can be written; what is reached now is found when there is room again
    place = {"organization_id": PLATFORM_ORGANIZATION_ID}
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        await db.execute(conn, QUERIES.begin_looks, **place)
        mine = await db.fetch_optional(
            conn, _Look, QUERIES.claim_look, **place, pause_seconds=PAUSE_SECONDS, lease_seconds=LEASE_SECONDS
        )
    if mine is None:
        return 0
    async with database.platform() as conn:
        await db.execute(conn, QUERIES.plan_by_index)
        crossed = await db.fetch_all(conn, Crossed, QUERIES.crossed_by_use, since=mine.since, now=mine.now)
        refused = await db.fetch_all(conn, _Refused, QUERIES.refused_now, since=mine.since, now=mine.now)
    try:
        told = await _all(
            chain((tell(database, each) for each in crossed), (_tell_refused(database, each) for each in refused))
        )
        async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
            await db.execute(conn, QUERIES.note_look, **place, now=mine.now)
    finally:
        if mine.is_sweep_due:
            await _note_sweep(database, mine.now - timedelta(minutes=55))  # again soon, where this one is broken off
            await sweep(database)
            await _note_sweep(database, mine.now)
    return told


async def sweep(database: db.Database) -> int:
    """Weigh every balance of every organization; how many alerts."""
    told, after = 0, UUID(int=0)
    fault: Exception | None = None
    while True:
        async with database.platform() as conn:
            organization_ids = await db.fetch_values(conn, QUERIES.organizations_after, after=after, most=SWEEP_AT_ONCE)
        if not organization_ids:
            break
        try:
            told += await sweep_some(database, organization_ids)
        except Exception as error:
            fault = error
        after = organization_ids[-1]
    if fault is not None:
        raise fault
    return told


async def sweep_some(database: db.Database, organization_ids: Sequence[UUID]) -> int:
    """As `sweep`, of some organizations."""
    async with database.platform() as conn:
        await db.execute(conn, QUERIES.plan_by_index)
        crossed = await db.fetch_all(
            conn, Crossed, QUERIES.crossed_of_organizations, organization_ids=list(organization_ids)
        )
    return await _all(tell(database, each) for each in crossed)


async def _all(tellings: Iterable[Awaitable[bool]]) -> int:
    """Tell one after the other; how many were told. What cannot be told to one organization keeps no other waiting: the
    fault is raised in the end.
    """
    told, fault = 0, None
    for each in tellings:
        try:
            told += await each
        except Exception as error:
            fault = error
    if fault is not None:
        raise fault
    return told


async def look_at_grants(database: db.Database) -> int:
    """Tell which grants end within days, and which have; how many alerts."""
    if database.space.is_short():
        return 0
    async with database.platform() as conn:
        expiring = await db.fetch_all(conn, _Ending, QUERIES.expiring, days=EXPIRING_DAYS)
        expired = await db.fetch_all(conn, _Ending, QUERIES.expired)
    return await _all(
        chain(
            (_tell_grant(database, each, has_expired=False) for each in expiring),
            (_tell_grant(database, each, has_expired=True) for each in expired),
        )
    )


async def tell(database: db.Database, found: Crossed) -> bool:
    """Tell one level, unless somebody has; in one transaction with the note that it is told."""
    place: dict[str, Any] = {"organization_id": found.organization_id}
    async with database.tenant(found.organization_id) as conn:
        taken = await db.fetch_value(
            conn,
            QUERIES.take,
            **place,
            rule_id=found.rule_id,
            balance_id=found.balance_id,
            period_start=found.period_start,
            level=found.level,
            limit_amount=found.limit_amount,
            used_amount=found.used_amount,
            told_level=found.told_level,
            told_limit=found.told_limit,
        )
        if taken is None or found.level <= found.base_level:
            return False
        subject = await _subject(conn, found.organization_id, found.balance_id)
        passed = found.in_order[found.base_level : found.level]
        payload = level_payload(
            subject,
            rule_id=found.rule_id,
            measure=found.measure,
            threshold=passed[-1],
            passed=passed,
            used=found.filled_amount - found.left_amount,
            limit=found.filled_amount,
            left=found.left_amount,
            period_end=found.period_end,
        )
        is_full = (found.measure, passed[-1]) in (("percent", 100), ("left", 0))
        kind = (FULL_KINDS if is_full else LEVEL_KINDS)[found.watches]
        event_id = await post_event(
            conn,
            **place,
            kind=kind,
            object_kind=found.watches,
            object_id=found.balance_id,
            payload=payload,
        )
        whom = (found.readers, found.addresses)
        await _mail(conn, found.organization_id, event_id, subject, *whom, found.collect_minutes)
    TOLD.labels(kind).inc()
    return True


async def _tell_refused(database: db.Database, refused: _Refused) -> bool:
    """Programs are told; the caller has been told by the refusal, and people by the limit that is reached."""
    async with database.tenant(refused.organization_id) as conn:
        if not await _take_notice(conn, refused.organization_id, "deduction.refused", refused.balance_id, refused.at):
            return False
        subject = await _subject(conn, refused.organization_id, refused.balance_id)
        await post_event(
            conn,
            organization_id=refused.organization_id,
            kind="deduction.refused",
            object_kind=subject.kind,
            object_id=refused.balance_id,
            payload=refusal_payload(subject, refusals=refused.refusals),
        )
    TOLD.labels("deduction.refused").inc()
    return True


async def _tell_grant(database: db.Database, ending: _Ending, *, has_expired: bool) -> bool:
    kind = "grant.expired" if has_expired else "grant.expiring"
    async with database.tenant(ending.organization_id) as conn:
        if not await _take_notice(conn, ending.organization_id, kind, ending.grant_id, ending.expires_at):
            return False
        subject = await _subject(conn, ending.organization_id, ending.pool_id)
        event_id = await post_event(
            conn,
            organization_id=ending.organization_id,
            kind=kind,
            object_kind="grant",
            object_id=ending.grant_id,
            payload=grant_payload(
                subject,
                has_expired=has_expired,
                grant_id=ending.grant_id,
                source=ending.source,
                amount=ending.amount_micros,
                left=ending.left_micros,
                expires_at=ending.expires_at,
            ),
        )
        await _mail(conn, ending.organization_id, event_id, subject, ["concerned"], [], 5)
    TOLD.labels(kind).inc()
    return True


async def _take_notice(conn: db.Connection, organization_id: UUID, kind: str, object_id: UUID, at: datetime) -> bool:
    params = {"organization_id": organization_id, "kind": kind, "object_id": object_id, "at": at}
    return await db.fetch_value(conn, QUERIES.take_notice, **params) is not None


async def _subject(conn: db.Connection, organization_id: UUID, balance_id: UUID) -> Subject:
    return await db.fetch_one(conn, Subject, QUERIES.subject, organization_id=organization_id, balance_id=balance_id)


async def _mail(
    conn: db.Connection,
    organization_id: UUID,
    event_id: UUID,
    subject: Subject,
    readers: Sequence[str],
    addresses: Sequence[str],
    collect_minutes: int,
) -> None:
    user_ids = await _readers(conn, organization_id, subject, readers)
    if not user_ids and not addresses and readers:
        user_ids = await _with_role(conn, organization_id, "org_admin")  # somebody has to know
    await db.execute(
        conn,
        QUERIES.mail_event,
        organization_id=organization_id,
        event_id=event_id,
        user_ids=sorted(user_ids),
        addresses=list(addresses),
        collect_minutes=collect_minutes,
    )


async def _readers(conn: db.Connection, organization_id: UUID, subject: Subject, readers: Sequence[str]) -> set[UUID]:
    """concerned: whose it is; of a team its lead; of all else (an organization, a service key) administrators."""
    found: set[UUID | None] = set()
    for reader in readers:
        if reader == "concerned":
            nearest = subject.user_id or (subject.lead_user_id if subject.scope == "team" else None)
            found |= {nearest} if nearest else await _with_role(conn, organization_id, "org_admin")
        elif reader == "lead":
            found.add(subject.lead_user_id)
        else:
            role = {"admins": "org_admin", "finance": "finance"}[reader]
            found |= await _with_role(conn, organization_id, role)
    return {each for each in found if each is not None}


async def _with_role(conn: db.Connection, organization_id: UUID, role: str) -> set[UUID]:
    return set(await db.fetch_values(conn, QUERIES.members_with, organization_id=organization_id, roles=[role]))


async def _note_sweep(database: db.Database, at: datetime) -> None:
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        await db.execute(conn, QUERIES.note_sweep, organization_id=PLATFORM_ORGANIZATION_ID, at=at)
