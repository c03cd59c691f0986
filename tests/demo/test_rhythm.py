"""Spans of calendars, and instants inside them."""

import random
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from zoneinfo import ZoneInfo

import pytest

from bursar.demo.rhythm import Calendar, Days, Elapsed, Month, Rest, Span, day_weight, instants

PARIS = ZoneInfo("Europe/Paris")


def _calendar(text: str, zone: str = "Europe/Paris") -> Calendar:
    return Calendar(datetime.fromisoformat(text).replace(tzinfo=UTC), ZoneInfo(zone))


def test_this_month_ends_now() -> None:
    calendar = _calendar("2026-11-20T14:02")
    assert calendar.span(Month(0)) == Span(datetime(2026, 10, 31, 23, tzinfo=UTC), calendar.as_of)


def test_a_month_is_the_zones() -> None:
    assert _calendar("2026-11-20T14:02", "Asia/Kolkata").span(Month(1)) == Span(
        datetime(2026, 9, 30, 18, 30, tzinfo=UTC), datetime(2026, 10, 31, 18, 30, tzinfo=UTC)
    )


def test_what_elapsed_of_last_month_and_its_rest_do_not_meet() -> None:
    calendar = _calendar("2026-11-20T14:02")
    elapsed, rest = calendar.span(Elapsed()), calendar.span(Rest())
    assert elapsed == Span(datetime(2026, 9, 30, 22, tzinfo=UTC), datetime(2026, 10, 20, 13, 2, tzinfo=UTC))
    # The comparison of a page moves on through today: the same day of last month stays as it was told.
    assert rest == Span(datetime(2026, 10, 20, 22, tzinfo=UTC), datetime(2026, 10, 31, 23, tzinfo=UTC))


def test_on_the_last_day_of_a_longer_month_nothing_is_left_of_the_one_before() -> None:
    assert _calendar("2026-10-31T12:00").span(Rest()) is None


def test_months_to_come_have_a_beginning() -> None:
    assert _calendar("2026-12-05T12:00").start(Month(-1)) == datetime(2026, 12, 31, 23, tzinfo=UTC)


@pytest.mark.parametrize("when", [Month(0), Month(7), Elapsed(), Rest(), Days(30), Days(90, 30), Days(2, 1)])
@pytest.mark.parametrize("text", ["2026-11-20T14:02", "2026-03-29T01:30", "2026-11-01T00:30", "2026-10-31T23:30"])
def test_instants_lie_in_their_span(when: Month | Elapsed | Rest | Days, text: str) -> None:
    calendar = _calendar(text)
    span = calendar.span(when)
    if span is not None:
        found = list(islice(instants(random.Random(7), calendar, span), 300))
        assert all(span.start <= instant < span.end for instant in found)


def test_weekends_and_holidays_are_quiet() -> None:
    monday, sunday, christmas = date(2026, 11, 16), date(2026, 11, 22), date(2026, 12, 25)
    assert day_weight(monday) > 5 * day_weight(sunday) > day_weight(christmas) > 0


def test_most_is_done_in_working_hours() -> None:
    calendar = _calendar("2026-11-20T14:02")
    span = calendar.span(Days(60))
    assert span is not None
    hours = [instant.astimezone(PARIS).hour for instant in islice(instants(random.Random(7), calendar, span), 1_000)]
    assert sum(8 <= hour < 19 for hour in hours) > 750


def test_a_span_has_a_length() -> None:
    instant = datetime(2026, 11, 1, tzinfo=UTC)
    with pytest.raises(AssertionError):
        Span(instant, instant)
    assert Span(instant, instant + timedelta(seconds=1))
