"""Days and months of a zone, also where clocks change."""

from datetime import UTC, date, datetime, timedelta
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.usage.days import Periods, Segments, Span, midnight

ZONES = ["UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/New_York", "America/Havana", "Europe/Paris", "Africa/Cairo"]
instants = st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - naive bounds


def day_of(periods: Periods, day: date) -> Span:
    return next(each for each in periods.days if each.first == day)


def test_a_day_on_which_clocks_change_has_23_or_25_hours() -> None:
    autumn = Periods.at(datetime(2026, 11, 20, 12, tzinfo=UTC), "America/New_York")
    assert day_of(autumn, date(2026, 11, 1)).hours == 25
    assert day_of(autumn, date(2026, 11, 2)).hours == 24
    spring = Periods.at(datetime(2026, 3, 20, 12, tzinfo=UTC), "America/New_York")
    assert day_of(spring, date(2026, 3, 8)).hours == 23


def test_the_first_of_two_midnights_begins_the_day() -> None:
    # Havana sets clocks back from 1:00 to 0:00 on 1 November 2026: that midnight, and with it a month, begins twice.
    assert midnight(date(2026, 11, 1), ZoneInfo("America/Havana")) == datetime(2026, 11, 1, 4, tzinfo=UTC)


def test_a_day_whose_midnight_is_skipped_begins_when_clocks_jump() -> None:
    # Cairo goes from 24 April 2026 0:00 straight to 1:00, which is 22:00 UTC.
    assert midnight(date(2026, 4, 24), ZoneInfo("Africa/Cairo")) == datetime(2026, 4, 23, 22, tzinfo=UTC)


def test_a_half_hour_zone_begins_its_day_at_half_past() -> None:
    periods = Periods.at(datetime(2026, 11, 20, 18, 29, tzinfo=UTC), "Asia/Kolkata")
    assert periods.days[-1].first == date(2026, 11, 20)
    assert periods.days[-1].ends_at == datetime(2026, 11, 20, 18, 30, tzinfo=UTC)
    later = Periods.at(datetime(2026, 11, 20, 18, 30, tzinfo=UTC), "Asia/Kolkata")
    assert later.days[-1].first == date(2026, 11, 21)


def test_the_month_is_compared_with_as_much_of_the_month_before() -> None:
    periods = Periods.at(datetime(2026, 11, 20, 13, 2, tzinfo=UTC), "Europe/Paris")
    assert (periods.month.first, periods.month.last) == (date(2026, 11, 1), date(2026, 11, 20))
    assert (periods.before.first, periods.before.last) == (date(2026, 10, 1), date(2026, 10, 20))
    # 14:02 on the clock in Paris, which was an hour further from UTC then.
    assert periods.before.ends_at == datetime(2026, 10, 20, 12, 2, tzinfo=UTC)


def test_a_longer_month_is_compared_with_all_of_a_shorter_one() -> None:
    periods = Periods.at(datetime(2026, 3, 30, 9, tzinfo=UTC), "UTC")
    assert (periods.before.first, periods.before.last) == (date(2026, 2, 1), date(2026, 2, 28))
    assert periods.before.ends_at == periods.month.starts_at


@given(now=instants, zone=st.sampled_from(ZONES))
def test_thirty_days_follow_each_other_without_gap_and_end_today(now: datetime, zone: str) -> None:
    periods = Periods.at(now, zone)
    assert len(periods.days) == 30
    assert all(one.ends_at == other.starts_at for one, other in pairwise(periods.days))
    assert all(day.hours in (23, 24, 25) for day in periods.days)
    assert periods.days[-1].starts_at <= now < periods.days[-1].ends_at
    assert periods.month.ends_at == periods.days[-1].ends_at
    assert periods.before.ends_at <= periods.month.starts_at


@given(now=instants, zone=st.sampled_from(ZONES), offset=st.integers(-70 * 86400, 86400))
def test_an_instant_is_in_a_span_exactly_when_its_segment_is(now: datetime, zone: str, offset: int) -> None:
    periods = Periods.at(now, zone)
    spans = [periods.month, periods.before, *periods.days]
    segments = Segments(spans)
    instant = now + timedelta(seconds=offset)
    for span in spans:
        assert (segments.at(instant) in segments.of(span)) == (span.starts_at <= instant < span.ends_at)


@pytest.mark.parametrize("zone", ZONES)
def test_segments_do_not_overlap_and_cover_their_spans(zone: str) -> None:
    periods = Periods.at(datetime(2026, 3, 30, 9, tzinfo=UTC), zone)
    segments = Segments([periods.month, periods.before, *periods.days])
    assert segments.edges == sorted(set(segments.edges))
    of_days = [number for day in periods.days for number in segments.of(day)]
    assert of_days == segments.of(periods.range)
