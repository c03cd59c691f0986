"""Forecasts: when a pool or a budget is likely to be used up, and between which dates, from what was used lately.

The method is told in docs/simulate.md. A forecast is an estimate, no money: it is computed with floats, begins from
whole micros and ends in dates. It is drawn with a fixed seed, so that the same past always gives the same dates.
"""

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from itertools import pairwise
from typing import Final, Literal
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar import db
from bursar.credits.filters import features_of, on_what
from bursar.money import Micros

QUERIES: Final = db.load_queries("bursar.credits")

WEEK: Final = 7
MOST_WEEKS: Final = 8
FEWEST_WEEKS: Final = 4
FEWEST_DAYS_OF_USE: Final = 20
SILENT_DAYS: Final = 14
HORIZON_DAYS: Final = 730
PATHS: Final = 200
LOW, MIDDLE, HIGH = PATHS // 10, PATHS // 2, PATHS - PATHS // 10 - 1
"""Places of the 10 %, 50 % and 90 % among the sorted paths."""

_RECENT: Final = 0.7  # what a week counts of the next one, in the level of today
_LEAST_DRIFT: Final = 0.08  # how far the level may always move in a week, as the deviation of its logarithm
_DRIFT_SHARE: Final = 0.5  # of the movement that was seen
_TREND_SHARE: Final = 0.5
_TREND_KEEPS: Final = 0.9  # of a week's trend in the next one
_MOST_TREND: Final = 0.1
_MOST_DRIFT: Final = 0.5
_MOST_DOUBT: Final = 0.6

Reason = Literal["too_short", "too_thin", "silent", "lasts", "reset_first", "not_counted"]


@dataclass(frozen=True, slots=True)
class Credit:
    """Something that can be used from day `begins` on and before day `ends`, counted from today; None: for ever."""

    left: int
    begins: int = 0
    ends: int | None = None


@dataclass(frozen=True, slots=True)
class Forecast:
    """The day on which it is used up: between `first` and `last` with 80 %, as likely before `likely` as after it.

    None: not within two years, or not before it begins anew. reason: why there are no dates, or no last one.
    """

    likely: date | None
    first: date | None
    last: date | None
    per_day: int
    reason: Reason | None = None


@dataclass(frozen=True, slots=True)
class _Habit:
    """What weeks look like. weeks: from the oldest to the newest, each of seven days that end yesterday."""

    weeks: tuple[tuple[int, ...], ...]
    level: float
    doubt: float
    drift: float
    trend: float

    @classmethod
    def of(cls, days: Sequence[int]) -> "_Habit":
        count = min(len(days) // WEEK, MOST_WEEKS)
        recent = days[len(days) - count * WEEK :]
        weeks = tuple(tuple(recent[n * WEEK : (n + 1) * WEEK]) for n in range(count))
        sums = [sum(week) for week in weeks]
        least = sum(sums) / count / 20  # a silent week is no endless fall
        logs = [math.log(max(each, least)) for each in sums]
        steps = [later - earlier for earlier, later in pairwise(logs)]
        spread = sum(step * step for step in steps) / len(steps)
        # A level that walks under noise: steps spread by both, and neighbors take each other's noise back.
        shared = sum(a * b for a, b in pairwise(steps)) / max(1, len(steps) - 1)
        walk = max(0.0, spread + 2 * shared)
        noise = (spread - walk) / 2 if spread > walk else spread / 4
        weights = [_RECENT ** (count - 1 - n) for n in range(count)]
        half = count // 2
        growth = math.log(max(sum(sums[-half:]) / half, least) / max(sum(sums[:half]) / half, least)) / (count - half)
        return cls(
            weeks,
            sum(w * each for w, each in zip(weights, sums, strict=True)) / sum(weights) / (sum(sums) / count),
            min(_MOST_DOUBT, math.sqrt(noise * sum(w * w for w in weights)) / sum(weights)),
            min(_MOST_DRIFT, max(_LEAST_DRIFT, _DRIFT_SHARE * math.sqrt(walk))),
            max(-_MOST_TREND, min(_MOST_TREND, _TREND_SHARE * growth)),
        )

    def path(self, dice: random.Random) -> Iterator[float]:
        """One possible future, day by day from today on: past weeks in any order, at a level that moves."""
        level, trend = self.level * math.exp(dice.gauss(0, self.doubt)), self.trend
        while True:
            level *= math.exp(dice.gauss(trend, self.drift))
            trend *= _TREND_KEEPS
            for used in dice.choice(self.weeks):
                yield used * level


def forecast(
    days: Sequence[int],
    credits: Sequence[Credit],
    *,
    today: date,
    rest_of_today: float = 1.0,
    resets_on: date | None = None,
) -> Forecast:
    """When these credits are used up, in the order in which they burn.

    days: what was used on each of the last days, the last of them yesterday; from the first use on, at most 60.
    rest_of_today: which part of today is still to come. resets_on: the day on which it all begins anew.
    """
    reason = _why_none(days)
    per_day = round(sum(days[-4 * WEEK :]) / min(len(days), 4 * WEEK)) if days else 0
    if reason is not None:
        return Forecast(None, None, None, per_day, reason)
    horizon = min(HORIZON_DAYS, (resets_on - today).days) if resets_on else HORIZON_DAYS
    habit, dice = _Habit.of(days), random.Random(0)
    ends = sorted(_used_up(habit.path(dice), credits, rest_of_today, horizon) for _ in range(PATHS))
    likely, first, last = (today + timedelta(days=end) if end < horizon else None for end in _at(ends))
    return Forecast(likely, first, last, per_day, None if last else "reset_first" if resets_on else "lasts")


def _at(ends: Sequence[int]) -> Iterator[int]:
    yield from (ends[MIDDLE], ends[LOW], ends[HIGH])


def _why_none(days: Sequence[int]) -> Reason | None:
    """Why such a past says nothing of the future."""
    if len(days) < FEWEST_WEEKS * WEEK:
        return "too_short"
    if not any(days[-SILENT_DAYS:]):
        return "silent"
    if sum(1 for used in days[-MOST_WEEKS * WEEK :] if used > 0) < FEWEST_DAYS_OF_USE:
        return "too_thin"
    return None


def _used_up(path: Iterator[float], credits: Sequence[Credit], rest_of_today: float, horizon: int) -> int:
    """The day, counted from today, on which a path needs more than there is; the horizon where none is."""
    left = [float(credit.left) for credit in credits]
    for day, used in zip(range(horizon), path, strict=False):
        used = used * rest_of_today if day == 0 else used
        for place, credit in enumerate(credits):
            if left[place] > 0 and credit.begins <= day and (credit.ends is None or day < credit.ends):
                paid = min(used, left[place])
                left[place] -= paid
                used -= paid
        if used > 0:
            return day
        if not any(
            amount > 0 and (c.ends is None or day + 1 < c.ends) for amount, c in zip(left, credits, strict=True)
        ):
            return day + 1 if day + 1 < horizon else horizon
    return horizon


# ---------------------------------------------------------------------------------------------- an organization's


@dataclass(frozen=True, slots=True)
class Expected:
    """A pool or budget and its forecast. available: micros for credits, else a count."""

    kind: Literal["pool", "limit", "allocation"]
    id: UUID
    name: str
    metric: str
    scope: str
    scope_id: UUID | None
    period: str
    available: int
    resets_on: date | None
    forecast: Forecast


@dataclass(frozen=True, slots=True)
class _Used:
    """What was used on one local day by one asker; credits in micros. filters: of caps that take it."""

    day: date
    user_id: UUID | None
    api_key_id: UUID | None
    team_id: UUID | None
    department_id: UUID | None
    credits: int
    calls: int
    filters: Sequence[str]


@dataclass(frozen=True, slots=True)
class _PoolUsed:
    """What a pool paid on one local day, micros."""

    day: date
    pool_id: UUID
    credits: int


@dataclass(frozen=True, slots=True)
class _PoolGrant:
    """What a grant has left, in burn order within its pool."""

    pool_id: UUID
    pool_name: str
    left_micros: Micros
    effective_at: datetime
    expires_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Budget:
    """A cap or share in its current period."""

    kind: Literal["limit", "allocation"]
    id: UUID
    scope: str
    scope_id: UUID | None
    metric: str
    period: str
    model_filter: str | None
    available: int
    resets_at: datetime | None


@dataclass(frozen=True, slots=True)
class _Now:
    """The present by the database's clock."""

    at: datetime
    zone: str


class _Calendar:
    """Days of a zone, counted from today."""

    def __init__(self, now: _Now) -> None:
        self._zone = ZoneInfo(now.zone)
        local = now.at.astimezone(self._zone)
        self.today = local.date()
        self.rest_of_today = 1 - (local.hour * 3600 + local.minute * 60 + local.second) / 86400

    def day(self, at: datetime) -> date:
        return at.astimezone(self._zone).date()

    def series(self, used: Iterable[tuple[date, int]]) -> list[int]:
        """Sums by day from the first use to yesterday, the newest 60 at most."""
        sums: dict[date, int] = {}
        for day, amount in used:
            sums[day] = sums.get(day, 0) + amount
        if not sums:
            return []
        first = max(min(sums), self.today - timedelta(days=60))
        return [max(0, sums.get(first + timedelta(days=n), 0)) for n in range((self.today - first).days)]

    def credit(self, left: int, begins: datetime | None = None, ends: datetime | None = None) -> Credit:
        return Credit(
            left,
            max(0, (self.day(begins) - self.today).days) if begins else 0,
            max(0, (self.day(ends) - self.today).days) if ends else None,
        )


async def forecast_pools(conn: db.Connection, *, organization_id: UUID) -> list[Expected]:
    """When each pool with credits is likely to be used up, counting grants that begin and end by then.

    conn: acts for the organization.
    """
    own = {"organization_id": organization_id}
    calendar = _Calendar(await db.fetch_one(conn, _Now, QUERIES.forecast_now, **own))
    used = await db.fetch_all(conn, _PoolUsed, QUERIES.forecast_pool_use, **own)
    grants = await db.fetch_all(conn, _PoolGrant, QUERIES.forecast_grants, **own)
    found = []
    for pool_id, name in dict.fromkeys((grant.pool_id, grant.pool_name) for grant in grants):
        of_pool = [grant for grant in grants if grant.pool_id == pool_id]
        days = calendar.series((each.day, each.credits) for each in used if each.pool_id == pool_id)
        credits = [calendar.credit(each.left_micros, each.effective_at, each.expires_at) for each in of_pool]
        told = forecast(days, credits, today=calendar.today, rest_of_today=calendar.rest_of_today)
        left = sum(each.left for each in credits if each.begins == 0)
        found.append(Expected("pool", pool_id, name, "credits", "organization", None, "none", left, None, told))
    return found


async def forecast_budgets(conn: db.Connection, *, organization_id: UUID) -> list[Expected]:
    """When each cap that stops, and each share, is likely to be used up before it begins anew."""
    own = {"organization_id": organization_id}
    calendar = _Calendar(await db.fetch_one(conn, _Now, QUERIES.forecast_now, **own))
    budgets = await db.fetch_all(conn, _Budget, QUERIES.forecast_budgets, **own)
    used = await db.fetch_all(conn, _Used, QUERIES.forecast_use, **own) if budgets else []
    return [_expected(budget, used, calendar) for budget in budgets]


def _expected(budget: _Budget, used: Sequence[_Used], calendar: _Calendar) -> Expected:
    resets_on = calendar.day(budget.resets_at) if budget.resets_at else None
    if budget.metric == "tokens":
        told = Forecast(None, None, None, 0, "not_counted")
    else:
        days = calendar.series(
            (each.day, each.calls if budget.metric == "calls" else each.credits)
            for each in used
            if _counts(budget, each)
        )
        told = forecast(
            days,
            [Credit(budget.available)],
            today=calendar.today,
            rest_of_today=calendar.rest_of_today,
            resets_on=resets_on,
        )
    per = "" if budget.period == "none" else f" per {budget.period}"
    what = f"cap on {budget.metric}" if budget.kind == "limit" else "share"
    scope = budget.scope
    if budget.model_filter and scope == "organization":
        scope = "feature" if features_of(budget.model_filter) else "model"
    name = f"{scope} {what}{per}{on_what(budget.model_filter)}"
    return Expected(
        budget.kind, budget.id, name, budget.metric, budget.scope, budget.scope_id, budget.period, budget.available,
        resets_on, told,
    )  # fmt: skip


def _counts(budget: _Budget, used: _Used) -> bool:
    """Whether a budget counts what was used."""
    if budget.model_filter is not None and budget.model_filter not in used.filters:
        return False
    return budget.scope == "organization" or budget.scope_id in {
        "user": (used.user_id,),
        "key": (used.api_key_id,),
        "team": (used.team_id,),
        "department": (used.department_id,),
    }.get(budget.scope, ())
