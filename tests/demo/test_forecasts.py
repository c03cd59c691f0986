"""How often forecasts of the sample companies' past came true: `pytest -s` prints the table of docs/simulate.md."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from zoneinfo import ZoneInfo

from bursar.credits.forecasts import Credit, forecast
from bursar.demo.plans import Batch, plan
from bursar.demo.requests import Quotes
from bursar.demo.seeding import CLOSING
from bursar.demo.stories import Company

from .conftest import AS_OF

DAYS_OF_CREDIT = (5, 10, 20, 40, 60)
"""How many average days the credits would last of which the end is told."""


@dataclass
class Tally:
    """Forecasts, and of them those whose interval held the day, and those that said too late."""

    told: int = 0
    held: int = 0
    too_late: int = 0

    @property
    def coverage(self) -> float:
        """Percent."""
        return 100 * self.held / self.told


def _daily(company: Company, quotes: Callable[[int], Quotes]) -> tuple[date, list[int]]:
    """First day and what was used on each day from it to yesterday."""
    zone = ZoneInfo(company.zone)
    used: dict[date, int] = {}
    for step in plan(company, AS_OF, quotes(company.markup_ppm or 1_000_000), CLOSING):
        for call in step.calls if isinstance(step, Batch) else ():
            day = call.at.astimezone(zone).date()
            used[day] = used.get(day, 0) + call.request.priced.charged_micros
    first, count = min(used), (AS_OF.astimezone(zone).date() - min(used)).days
    return first, [used.get(first + timedelta(days=n), 0) for n in range(count)]


def _back_tests(first: date, days: list[int]) -> Iterator[tuple[int, bool, bool]]:
    """(days of credit, was in the interval, was before it), asked every second week of the past."""
    for origin in range(28, len(days) - 7, 14):
        past = days[max(0, origin - 60) : origin]
        for lasts in DAYS_OF_CREDIT:
            need = sum(past) * lasts // len(past)
            told = forecast(past, [Credit(need)], today=first + timedelta(days=origin))
            if told.reason in ("too_short", "too_thin", "silent"):
                continue
            total, end = 0, None
            for n, used in enumerate(days[origin:]):
                total += used
                if total > need:
                    end = first + timedelta(days=origin + n)
                    break
            if end is None and len(days) - origin < 3 * lasts:
                continue  # how it ended is not known
            known_until = first + timedelta(days=len(days))
            is_early = told.first is not None and (end or known_until) >= told.first
            is_late = told.last is None or (end or known_until) <= told.last
            yield lasts, is_early and is_late, not is_early


def test_eighty_percent_intervals_hold_about_eighty_percent_of_the_days(
    stories: dict[str, Company], list_quotes: Callable[[int], Quotes]
) -> None:
    tallies = {lasts: Tally() for lasts in DAYS_OF_CREDIT}
    for company in stories.values():
        if sum(use.requests for use in company.uses) < 200:
            continue
        for lasts, is_held, is_late in _back_tests(*_daily(company, list_quotes)):
            tallies[lasts].told += 1
            tallies[lasts].held += is_held
            tallies[lasts].too_late += is_late
    print("\ndays of credit  forecasts  held  came sooner")
    for lasts, tally in tallies.items():
        print(f"{lasts:14}  {tally.told:9}  {tally.coverage:3.0f}%  {100 * tally.too_late / tally.told:10.0f}%")
    whole = Tally(sum(t.told for t in tallies.values()), sum(t.held for t in tallies.values()))
    print(f"{'all':>14}  {whole.told:9}  {whole.coverage:3.0f}%")
    assert whole.told > 800
    assert 75 <= whole.coverage <= 88
    assert all(68 <= tally.coverage <= 93 for tally in tallies.values())
