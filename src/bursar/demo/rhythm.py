"""When people work: spans of a company's calendar, and instants that follow the rhythm of its days."""

import random
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from functools import cached_property
from itertools import accumulate
from zoneinfo import ZoneInfo

from bursar.usage.days import Periods, midnight

# From Monday on; the weekend is not quite silent.
_BY_WEEKDAY = (100, 108, 112, 106, 84, 12, 8)
# From 0 o'clock on: two humps with lunch between them, and a few who cannot sleep.
_BY_HOUR = (2, 1, 1, 1, 1, 2, 6, 16, 46, 84, 100, 92, 52, 64, 94, 98, 86, 60, 30, 16, 12, 10, 7, 4)
_HOLIDAYS = {(12, 24): 10, (12, 25): 3, (12, 26): 5, (12, 31): 14, (1, 1): 3, (5, 1): 12}
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Span:
    """Instants [start, end), in UTC."""

    start: datetime
    end: datetime

    def __post_init__(self) -> None:
        assert self.start < self.end, f"{self.start} is not before {self.end}"


@dataclass(frozen=True, slots=True)
class Month:
    """A calendar month, `back` months ago; the present one ends now."""

    back: int


@dataclass(frozen=True, slots=True)
class Elapsed:
    """As much of last month as has passed of this one, to the same day and clock time."""


@dataclass(frozen=True, slots=True)
class Rest:
    """Last month from the day after `Elapsed`'s last one on."""


@dataclass(frozen=True, slots=True)
class Days:
    """From the beginning of the day `first` days ago to that of `last` days ago; `last` 0 is now."""

    first: int
    last: int = 0


When = Month | Elapsed | Rest | Days


@dataclass(frozen=True)
class Calendar:
    """A zone's days and months as of one instant, which is aware. Nothing lies after it."""

    as_of: datetime
    zone: ZoneInfo

    @cached_property
    def today(self) -> date:
        return self.as_of.astimezone(self.zone).date()

    def month_start(self, back: int) -> datetime:
        """The beginning of a month; negative: of one to come."""
        months = self.today.year * 12 + self.today.month - 1 - back
        return midnight(date(months // 12, months % 12 + 1, 1), self.zone)

    def day_start(self, back: int) -> datetime:
        """The beginning of a day."""
        return midnight(self.today - timedelta(days=back), self.zone)

    def start(self, when: When) -> datetime:
        """Where a span begins; of a month to come too."""
        match when:
            case Month(back):
                return self.month_start(back)
            case Days(first, _):
                return self.day_start(first)
            case _:
                return self.month_start(1)

    def months_ago(self, instant: datetime) -> int:
        """In which month an instant lies, counted back from the present one."""
        day = instant.astimezone(self.zone)
        return (self.today.year - day.year) * 12 + self.today.month - day.month

    def span(self, when: When) -> Span | None:
        """The instants that are meant; None where there are none (last month had no more days)."""
        match when:
            case Month(back):
                start, end = self.month_start(back), self.month_start(back - 1)
            case Elapsed():
                before = Periods.at(self.as_of, self.zone.key).before
                start, end = before.starts_at, before.ends_at
            case Rest():
                last = Periods.at(self.as_of, self.zone.key).before.last
                start, end = midnight(last + timedelta(days=1), self.zone), self.month_start(0)
            case Days(first, last_back):
                start, end = self.day_start(first), self.day_start(last_back) if last_back else self.as_of
        end = min(end, self.as_of)
        return Span(start, end) if start < end else None

    def days(self, span: Span) -> Iterator[date]:
        """The local days that a span touches."""
        day = span.start.astimezone(self.zone).date()
        while day <= (span.end - _TICK).astimezone(self.zone).date():
            yield day
            day += timedelta(days=1)


def day_weight(day: date) -> int:
    """How much is done on a day, in hundredths of a Monday."""
    weight = _HOLIDAYS.get((day.month, day.day), _BY_WEEKDAY[day.weekday()])
    if day.month == 8 or (day.month == 12 and 27 <= day.day <= 30):
        weight = max(1, weight * 7 // 10)
    return weight


def instants(rng: random.Random, calendar: Calendar, span: Span) -> Iterator[datetime]:
    """Instants of a span in no order and without end, by the rhythm of weeks and days."""
    days = list(calendar.days(span))
    by_day = list(accumulate(day_weight(day) for day in days))
    by_hour = list(accumulate(_BY_HOUR))
    while True:
        day = days[bisect_right(by_day, rng.randrange(by_day[-1]))]
        second = 3600 * bisect_right(by_hour, rng.randrange(by_hour[-1])) + rng.randrange(3600)
        clock = time(second // 3600, second // 60 % 60, second % 60, rng.randrange(1_000_000))
        instant = datetime.combine(day, clock, tzinfo=calendar.zone).astimezone(UTC)
        yield instant if span.start <= instant < span.end else _within(rng, calendar, span, day)


def _within(rng: random.Random, calendar: Calendar, span: Span, day: date) -> datetime:
    """Some instant of a day of which a part only is in the span."""
    start = max(span.start, midnight(day, calendar.zone))
    end = min(span.end, midnight(day + timedelta(days=1), calendar.zone))
    return start + _TICK * rng.randrange((end - start) // _TICK)
