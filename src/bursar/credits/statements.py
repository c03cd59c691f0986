"""Statements: what each pool had when a period began, every movement in it, and what it had in the end.

A period has what was booked in it, so that it never changes once it is over: what was used in one period and settled in
the next stands in the next, under the month in which it was used. A time event (an expiry, a start) counts at its own
instant, however late it was noticed.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Final
from uuid import UUID

from bursar import db
from bursar.credits.as_of import QUERIES, pools_at
from bursar.credits.pools import PoolKind
from bursar.money import Micros
from bursar.problems import Problem

LEAST: Final = timedelta(microseconds=1)
"""The time between two instants that the database tells apart."""


class NotAPeriod(Problem):
    """A statement is of a time that has begun, from one day to a later one."""

    status, code, title = 422, "not_a_period", "There is no statement of this period"


@dataclass(frozen=True, slots=True)
class Line:
    """Movements of one kind. what: grant, forgiveness, expiry, void, transfer_in, transfer_out, refund, usage,
    correction …

    source: of grants. month: of usage and corrections, when it was used, as 2026-10; is_inside: in this period.
    micros: positive into the pool. count: entries or requests.
    """

    what: str
    source: str | None
    month: str | None
    is_inside: bool
    micros: Micros
    count: int


@dataclass(frozen=True, slots=True)
class Statement:
    """One pool in one period, in micros; a balance below zero is a debt. Opening and lines add up to closing.

    used_later: used in this period and booked after it, until now; it is in the statements of later periods.
    """

    pool_id: UUID
    kind: PoolKind
    name: str
    owner_user_id: UUID | None
    opening_micros: Micros
    lines: tuple[Line, ...]
    closing_micros: Micros
    used_later_micros: Micros


@dataclass(frozen=True, slots=True)
class Period:
    """From its first instant to before ends_at, by the clocks of zone. is_over: nothing more is booked in it."""

    starts_at: datetime
    ends_at: datetime
    zone: str
    is_over: bool


@dataclass(frozen=True, slots=True)
class _Bounds:
    starts_at: datetime
    ends_at: datetime
    zone: str
    now: datetime


@dataclass(frozen=True, slots=True)
class _Movement:
    pool_id: UUID
    what: str
    source: str | None
    micros: Micros
    entries: int


@dataclass(frozen=True, slots=True)
class _Use:
    pool_id: UUID
    is_correction: bool
    month: str
    is_inside: bool
    micros: Micros
    requests: int


@dataclass(frozen=True, slots=True)
class _Late:
    pool_id: UUID
    micros: Micros
    requests: int


def month_of(text: str) -> tuple[date, date]:
    """A month such as 2026-10 as its first day and the first of the next.

    Raises:
        NotAPeriod: it is no month.
    """
    try:
        first = date.fromisoformat(f"{text}-01")
    except ValueError:
        raise NotAPeriod(f"“{text}” is no month such as 2026-10") from None
    return first, (first + timedelta(days=31)).replace(day=1)


def day_of(text: str) -> date:
    """A day such as 2026-10-01.

    Raises:
        NotAPeriod: it is no day.
    """
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise NotAPeriod(f"“{text}” is no day such as 2026-10-01") from None


async def statements(
    conn: db.Connection, *, organization_id: UUID, first: date, after: date
) -> tuple[Period, list[Statement]]:
    """What moved in each pool from the first day until before another, by the organization's clocks; as of now where
    the period is not over.

    Raises:
        NotAPeriod: it has no day, or is still to come. NotFound: no such organization.
    """
    if after <= first:
        raise NotAPeriod("It ends before it begins; the day it ends with is named by the next one")
    bounds = await db.fetch_one(
        conn, _Bounds, QUERIES.bounds, organization_id=organization_id, first=first, after=after
    )
    if bounds.starts_at > bounds.now:
        raise NotAPeriod(f"It begins on {first}, which is still to come")
    until = min(bounds.ends_at - LEAST, bounds.now)
    before = {
        pool.pool_id: pool.granted_micros - pool.used_micros
        for pool in await pools_at(conn, organization_id=organization_id, at=bounds.starts_at - LEAST, with_closed=True)
    }
    pools = await pools_at(conn, organization_id=organization_id, at=until, with_closed=True)
    usual = {pool.pool_id for pool in await pools_at(conn, organization_id=organization_id, at=until)}
    period = {
        "organization_id": organization_id,
        "starts_at": bounds.starts_at,
        "ends_at": until + LEAST,
    }
    movements = await db.fetch_all(conn, _Movement, QUERIES.movements, **period)
    uses = await db.fetch_all(conn, _Use, QUERIES.uses, **period, zone=bounds.zone)
    late = {each.pool_id: each.micros for each in await db.fetch_all(conn, _Late, QUERIES.late_uses, **period)}
    lines = {pool.pool_id: tuple(_lines(pool.pool_id, movements, uses)) for pool in pools}
    found = [
        Statement(
            pool_id=pool.pool_id,
            kind=pool.kind,
            name=pool.name,
            owner_user_id=pool.owner_user_id,
            opening_micros=Micros(before.get(pool.pool_id, 0)),
            lines=lines[pool.pool_id],
            closing_micros=Micros(before.get(pool.pool_id, 0) + sum(line.micros for line in lines[pool.pool_id])),
            used_later_micros=late.get(pool.pool_id, Micros(0)),
        )
        for pool in pools
        if pool.pool_id in usual or before.get(pool.pool_id) or lines[pool.pool_id]
    ]
    is_over = bounds.ends_at <= bounds.now
    return Period(bounds.starts_at, bounds.ends_at, bounds.zone, is_over), found


def _lines(pool_id: UUID, movements: Iterable[_Movement], uses: Iterable[_Use]) -> Iterable[Line]:
    for moved in movements:
        if moved.pool_id == pool_id:
            yield Line(moved.what, moved.source, None, True, moved.micros, moved.entries)
    for use in uses:
        if use.pool_id == pool_id:
            what = "correction" if use.is_correction else "usage"
            yield Line(what, None, use.month, use.is_inside, Micros(-use.micros), use.requests)
