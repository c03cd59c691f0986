"""Days and months of a zone as spans of instants, and the segments into which their edges cut time."""

import calendar
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from zoneinfo import ZoneInfo

DAYS_OF_TREND = 30


@dataclass(frozen=True, slots=True)
class Span:
    """Local days from `first` to `last`, inclusive; as instants [starts_at, ends_at), in UTC."""

    first: date
    last: date
    starts_at: datetime
    ends_at: datetime

    @property
    def hours(self) -> int:
        """Length in whole hours: 24 for most days, 23 or 25 where clocks change."""
        return round((self.ends_at - self.starts_at) / timedelta(hours=1))


@dataclass(frozen=True, slots=True)
class Periods:
    """The spans an overview is about, as of one instant.

    month: from the first of the month to the end of today. before: as much of the month before, to the same day and
    time on the clock (all of it, when it is shorter). days: the last 30, the last of them being today.
    """

    now: datetime
    zone: ZoneInfo
    month: Span
    before: Span
    days: tuple[Span, ...]

    @classmethod
    def at(cls, now: datetime, zone_name: str) -> "Periods":
        """The periods at an instant, which is aware."""
        zone = ZoneInfo(zone_name)
        today = now.astimezone(zone).date()
        first = today.replace(day=1)
        month = _span(first, today, zone)
        days = tuple(
            _span(each, each, zone) for each in (today - timedelta(days=n) for n in reversed(range(DAYS_OF_TREND)))
        )
        return cls(now=now, zone=zone, month=month, before=_elapsed_before(now, month, zone), days=days)

    @property
    def range(self) -> Span:
        """The 30 days as one span."""
        return Span(self.days[0].first, self.days[-1].last, self.days[0].starts_at, self.days[-1].ends_at)


class Segments:
    """Time cut at every edge of some spans, so that each segment lies wholly inside or outside each of them.

    Rows are summed by segment once, and any span is a sum of segments. Numbers are those of PostgreSQL's
    width_bucket(instant, edges): segment n is [edges[n - 1], edges[n]).
    """

    def __init__(self, spans: Iterable[Span]) -> None:
        self.edges = sorted({edge for span in spans for edge in (span.starts_at, span.ends_at)})

    def of(self, span: Span) -> list[int]:
        """The segments of a span that was given at the start."""
        return [n for n, edge in enumerate(self.edges[:-1], 1) if span.starts_at <= edge < span.ends_at]

    def at(self, instant: datetime) -> int:
        """The segment of an instant; 0 before the first, len(edges) after the last."""
        return bisect_right(self.edges, instant)


def midnight(day: date, zone: ZoneInfo) -> datetime:
    """The first instant of a local day, in UTC.

    Where clocks skip midnight it is the instant they do; where midnight comes twice it is the first.
    """
    return datetime.combine(day, time.min, tzinfo=zone).astimezone(UTC)


def _span(first: date, last: date, zone: ZoneInfo) -> Span:
    return Span(first, last, midnight(first, zone), midnight(last + timedelta(days=1), zone))


def _elapsed_before(now: datetime, month: Span, zone: ZoneInfo) -> Span:
    """The month before, up to the day and clock time that `now` has in its own month."""
    local = now.astimezone(zone)
    last_day = month.first - timedelta(days=1)
    first = last_day.replace(day=1)
    if local.day > calendar.monthrange(first.year, first.month)[1]:
        return _span(first, last_day, zone)
    until = datetime.combine(first.replace(day=local.day), local.time(), tzinfo=zone).astimezone(UTC)
    return Span(first, first.replace(day=local.day), midnight(first, zone), min(until, month.starts_at))
