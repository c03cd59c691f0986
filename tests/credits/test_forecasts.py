"""Forecasts of plain series: what is told, and when nothing is."""

from datetime import date, timedelta

import psycopg
import pytest
from tests.credits.scenes import Scene

from bursar import db
from bursar.credits.forecasts import Credit, Expected, Forecast, forecast, forecast_budgets

TODAY = date(2026, 6, 15)  # a Monday
WORKING_WEEK = (100, 100, 100, 100, 100, 0, 0)


def weeks(count: int, week: tuple[int, ...] = WORKING_WEEK) -> list[int]:
    """The same week again and again, until yesterday."""
    return list(week) * count


def test_a_steady_use_is_told_to_the_week() -> None:
    told = forecast(weeks(8), [Credit(2250)], today=TODAY)
    assert told.first is not None
    assert told.likely is not None
    assert told.last is not None
    assert told.first <= told.likely <= told.last
    assert abs((told.likely - (TODAY + timedelta(days=30))).days) <= 3  # four weeks of 500, then two and a half days
    assert (told.last - told.first).days <= 14
    assert told.per_day == 71


def test_the_same_past_gives_the_same_dates() -> None:
    assert forecast(weeks(6), [Credit(3000)], today=TODAY) == forecast(weeks(6), [Credit(3000)], today=TODAY)


def test_nothing_is_used_up_on_a_weekend_on_which_nobody_works() -> None:
    told = forecast(weeks(8), [Credit(900)], today=TODAY)
    days = {day.weekday() for day in (told.first, told.likely, told.last) if day}
    assert days <= {0, 1, 2, 3, 4}


def test_an_uneven_past_gives_a_wider_interval() -> None:
    uneven = [used * (4 if n // 7 % 2 else 1) for n, used in enumerate(weeks(8))]
    wide, narrow = (forecast(days, [Credit(8000)], today=TODAY) for days in (uneven, weeks(8)))
    assert _relative_width(wide) > 2 * _relative_width(narrow)


def _relative_width(told: Forecast) -> float:
    assert told.first is not None
    assert told.last is not None
    return (told.last - told.first) / (told.first - TODAY)


def test_growth_brings_the_end_nearer() -> None:
    growing = [used * (10 + n // 7) for n, used in enumerate(weeks(8))]
    level = [used * 27 // 2 for used in weeks(8)]  # as much in all
    sooner, later = (forecast(days, [Credit(60_000)], today=TODAY).likely for days in (growing, level))
    assert sooner is not None
    assert later is not None
    assert sooner < later


def test_credits_that_end_or_begin_are_counted() -> None:
    ends = forecast(weeks(8), [Credit(10**9, ends=10)], today=TODAY)
    assert (ends.first, ends.last) == (TODAY + timedelta(days=10),) * 2
    gap = forecast(weeks(8), [Credit(500), Credit(10**6, begins=21)], today=TODAY)
    assert gap.likely is not None
    assert gap.likely < TODAY + timedelta(days=21)
    no_gap = forecast(weeks(8), [Credit(500, ends=30), Credit(10**9, begins=3)], today=TODAY)
    assert no_gap.first is None
    assert no_gap.reason == "lasts"


def test_a_budget_that_begins_anew_first_has_no_date() -> None:
    assert forecast(weeks(8), [Credit(5000)], today=TODAY, resets_on=TODAY + timedelta(days=7)).reason == "reset_first"
    soon = forecast(weeks(8), [Credit(250)], today=TODAY, resets_on=TODAY + timedelta(days=7))
    assert soon.likely == TODAY + timedelta(days=2)


def test_what_is_used_up_already_is_used_up_today() -> None:
    assert forecast(weeks(8), [Credit(0)], today=TODAY).likely == TODAY


@pytest.mark.parametrize(
    ("days", "reason"),
    [
        ([], "too_short"),
        (weeks(3), "too_short"),
        (weeks(8, (100, 0, 0, 0, 0, 0, 0)), "too_thin"),
        (weeks(6) + [0] * 14, "silent"),
    ],
)
def test_nothing_is_told_from_a_past_that_says_nothing(days: list[int], reason: str) -> None:
    told = forecast(days, [Credit(1000)], today=TODAY)
    assert (told.likely, told.first, told.last, told.reason) == (None, None, None, reason)


async def _budgets(books: db.Database, scene: Scene) -> list[Expected]:
    async with books.tenant(scene.organization) as conn:
        return await forecast_budgets(conn, organization_id=scene.organization)


async def test_a_renewed_share_has_what_is_left_of_its_period_also_where_nobody_has_renewed_it_yet(
    books: db.Database,
) -> None:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        scene = Scene(conn)
        now = scene.admin("select clock_timestamp()")[0][0]
        scene.now = now - timedelta(days=3)
        user, pool = scene.user(), scene.pool()
        scene.grant(pool, 1000)
        scene.share(pool, user, 10, period="month", carry=2)
        scene.share(pool, scene.user(), 7, period="day", carry=15)
        for _ in range(2):
            scene.deduct(2, user)
        lump, daily = await _budgets(books, scene)
        assert lump.available in (6, 12)  # a month may have begun in between
        assert (daily.available, lump.resets_on, daily.resets_on) == (
            7 + 15,
            (now.date().replace(day=1) + timedelta(days=31)).replace(day=1),
            now.date() + timedelta(days=1),
        )
        scene.now = now
        scene.fold()
        assert [each.available for each in await _budgets(books, scene)] == [lump.available, daily.available]


async def test_a_raised_cap_has_the_raise_too(books: db.Database) -> None:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        scene = Scene(conn)
        scene.now = scene.admin("select clock_timestamp()")[0][0]
        user = scene.user()
        scene.grant(scene.pool(), 1000)
        scene.raise_(scene.limit(100), 50)
        assert [each.available for each in await _budgets(books, scene)] == [150]
        scene.deduct(30, user)
        assert [each.available for each in await _budgets(books, scene)] == [120]


@pytest.mark.parametrize("period", ["none", "day", "week", "month", "cycle"])
async def test_a_cap_of_any_period_is_told(books: db.Database, period: str) -> None:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        scene = Scene(conn)
        scene.now = scene.admin("select clock_timestamp()")[0][0]
        scene.limit(100, period=period)
        [told] = await _budgets(books, scene)
    per = "" if period == "none" else f" per {period}"
    assert (told.name, told.available, told.resets_on is None) == (
        f"organization cap on credits{per}", 100, period == "none",
    )  # fmt: skip
