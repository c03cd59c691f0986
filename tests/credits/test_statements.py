"""Statements: what a pool had, what moved, what it has; by when it was booked, with the month of use beside it."""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.credits.scenes import Scene

from bursar import db
from bursar.credits.as_of import NotPast, grants_at, limits_at, pools_at, shares_at
from bursar.credits.moves import Flag, Outcome
from bursar.credits.statements import NotAPeriod, Statement, month_of, statements

PARIS = "Europe/Paris"
JUNE_ENDS = datetime(2026, 6, 30, 22, 0, tzinfo=UTC)  # midnight in Paris
MINUTE = timedelta(minutes=1)


@pytest.fixture
def paris(books: db.Database) -> Any:
    """A company in Paris, on 29 June."""
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        yield Scene(conn, zone=PARIS, now=JUNE_ENDS - timedelta(days=1))


async def of_month(books: db.Database, scene: Scene, month: str) -> Statement:
    """The statement of the only pool there is."""
    first, after = month_of(month)
    async with books.tenant(scene.organization) as conn:
        _, [found] = await statements(conn, organization_id=scene.organization, first=first, after=after)
    return found


def lines(found: Statement) -> list[tuple[str, str | None, bool, int]]:
    return [(line.what, line.month, line.is_inside, line.micros) for line in found.lines]


async def test_what_is_settled_late_is_dated_at_its_use_and_booked_when_it_came(
    books: db.Database, paris: Scene
) -> None:
    pool, user = paris.pool(), paris.user()
    paris.grant(pool, 100)
    paris.now = JUNE_ENDS - MINUTE
    paris.deduct(5, user, used_at=paris.now)
    request = paris.hold(30, user)
    paris.now = JUNE_ENDS + MINUTE
    assert paris.settle(request, 20, used_at=JUNE_ENDS - MINUTE).outcome is Outcome.ACCEPTED
    paris.deduct(7, user, used_at=paris.now)

    june, july = await of_month(books, paris, "2026-06"), await of_month(books, paris, "2026-07")
    assert (june.opening_micros, june.closing_micros, june.used_later_micros) == (0, 95, 20)
    assert lines(june) == [("grant", None, True, 100), ("usage", "2026-06", True, -5)]
    assert (july.opening_micros, july.closing_micros, july.used_later_micros) == (95, 68, 0)
    assert lines(july) == [("usage", "2026-06", False, -20), ("usage", "2026-07", True, -7)]
    by_use = paris.admin(
        "select to_char(used_at at time zone 'Europe/Paris', 'YYYY-MM'), sum(charged_micros)::int"
        " from reporting.credit_usage_attribution where organization_id = %s group by 1 order by 1",
        paris.organization,
    )
    assert by_use == [("2026-06", 25), ("2026-07", 7)], "figures of use go by use"


async def test_a_month_that_is_over_never_changes(books: db.Database, paris: Scene) -> None:
    pool, user = paris.pool(), paris.user()
    paris.grant(pool, 100, expires=JUNE_ENDS - MINUTE)
    paris.grant(pool, 100)
    request = paris.hold(30, user, flags=Flag.SENT)
    paris.now = JUNE_ENDS - 2 * MINUTE
    paris.expire()  # charges its estimate
    paris.now = JUNE_ENDS + MINUTE  # nothing has booked the expiry yet
    june = await of_month(books, paris, "2026-06")
    assert lines(june) == [
        ("expiry", None, True, -70), ("grant", None, True, 200), ("usage", "2026-06", True, -30),
    ]  # fmt: skip
    assert paris.settle(request, 12).outcome is Outcome.ACCEPTED
    paris.refund(request, 2)
    assert lines(await of_month(books, paris, "2026-06")) == lines(june)
    july = await of_month(books, paris, "2026-07")
    assert july.opening_micros == june.closing_micros == 100
    # What came back to the expired grant expired too.
    assert ("correction", "2026-06", False, 18) in lines(july)
    assert july.closing_micros == 100


async def test_instants_and_periods_to_come_are_refused(books: db.Database, paris: Scene) -> None:
    paris.pool()
    to_come = datetime(2999, 1, 1, tzinfo=UTC)
    async with books.tenant(paris.organization) as conn:
        for asked in (pools_at, grants_at, limits_at, shares_at):
            with pytest.raises(NotPast):
                await asked(conn, organization_id=paris.organization, at=to_come)  # type: ignore[operator]
        for first, after in ((date(2999, 1, 1), date(2999, 2, 1)), (date(2026, 6, 1), date(2026, 6, 1))):
            with pytest.raises(NotAPeriod):
                await statements(conn, organization_id=paris.organization, first=first, after=after)
    for text in ("2026", "2026-13", "June", ""):
        with pytest.raises(NotAPeriod):
            month_of(text)


async def test_asking_about_the_past_keeps_nobody_waiting(books: db.Database, paris: Scene) -> None:
    """The gate is let go at once where nothing is due."""
    pool = paris.pool()
    paris.grant(pool, 100)
    async with books.tenant(paris.organization) as conn:
        await pools_at(conn, organization_id=paris.organization, at=paris.now)
        assert await _can_be_locked(paris.conn, paris.organization)


async def _can_be_locked(conn: psycopg.Connection[tuple[Any, ...]], organization: UUID) -> bool:
    ask = "select count(*) from (select from credits.gates where organization_id = %s for no key update skip locked) g"
    row: Sequence[Any] | None = conn.execute(ask, [organization]).fetchone()
    return row is not None and row[0] == 1
