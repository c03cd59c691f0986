"""The figures of an organization: what its overview shows, in one answer for page, JSON and CSV."""

from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar import db
from bursar.identity.organizations import Organization, get_organization
from bursar.identity.roles import PERMISSIONS, Permission
from bursar.money import Micros, NanoUsd, nano_usd_at_list_price
from bursar.usage.breakdowns import TOP, Breakdown, Share, break_down, permille
from bursar.usage.days import Periods, Segments, Span

QUERIES: Final = db.load_queries("bursar.usage")
SERIES: Final = 5

_ROLES_WITH_ACCESS: Final = sorted(role for role, allowed in PERMISSIONS.items() if Permission.MODELS_USE in allowed)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFigures:
    """The open pools of one kind. The four figures are micros and stand side by side; kinds are never added up.

    kind: shared, personal, individual or residual (not spendable).
    model_filter: LIKE pattern of the models it pays for; None: every one.
    available: spendable now; used: settled since the pools were opened; held: authorized, not settled; overage: used or
    held beyond what was granted. granted + overage = used + held + available.
    """

    kind: str
    model_filter: str | None
    pools: int
    available_micros: Micros
    used_micros: Micros
    held_micros: Micros
    overage_micros: Micros
    granted_micros: Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A figure beside that of an earlier span. permille: the change, rounded; None where there was nothing before."""

    before: int
    difference: int
    permille: int | None

    @classmethod
    def between(cls, before: int, now: int) -> "Change":
        """From `before` to `now`."""
        return cls(before=before, difference=now - before, permille=permille(now - before, before))


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What was charged in the month so far, at list price; `change` compares the same days of the month before."""

    charged_micros: Micros
    requests: int
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Margin:
    """What was charged against what providers ask. margin_permille: None when nothing was charged.

    priced_permille: requests whose price is known, of all, rounded down: 1000 means every one.
    """

    charged_micros: Micros
    provider_cost_nano_usd: NanoUsd
    profit_nano_usd: NanoUsd
    margin_permille: int | None
    unpriced_requests: int
    priced_permille: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ActiveUsers:
    """People with at least one settled request in the month so far.

    active: all of them; active_with_access: those of them who are still members who may use models, of with_access.
    """

    active: int
    active_with_access: int
    with_access: int
    change: Change


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """A model of the trend; the last may be `n other models`. label: its name, with the provider where two share it."""

    name: str
    label: str
    provider: str | None
    is_others: bool
    charged_micros: Micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Day:
    """One local day of the trend. parts_micros: charged by series, in their order; they sum to the day."""

    span: Span
    is_partial: bool
    charged_micros: Micros
    requests: int
    parts_micros: tuple[Micros, ...]

    def __post_init__(self) -> None:
        assert sum(self.parts_micros) == self.charged_micros, self.span


@dataclass(frozen=True, slots=True, kw_only=True)
class Trend:
    """Thirty days, oldest first, the last of them today and partial; stacked by the largest models of these days."""

    span: Span
    charged_micros: Micros
    requests: int
    series: tuple[Series, ...]
    days: tuple[Day, ...]

    def __post_init__(self) -> None:
        assert sum(day.charged_micros for day in self.days) == self.charged_micros
        assert sum(series.charged_micros for series in self.series) == self.charged_micros


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """All figures of one organization as of one instant, from one snapshot.

    margin: None for whoever may not see it. last_used_at: of usage before the days shown, where these are empty.
    """

    organization: Organization
    as_of: datetime
    pools: tuple[PoolFigures, ...]
    month: Span
    before: Span
    cost: Cost
    margin: Margin | None
    active_users: ActiveUsers
    people: Breakdown
    keys: Breakdown
    models: Breakdown
    departments: Breakdown
    trend: Trend
    last_used_at: datetime | None

    @property
    def local_as_of(self) -> datetime:
        """`as_of` on the organization's clock."""
        return self.as_of.astimezone(ZoneInfo(self.organization.zone))

    @property
    def is_unused(self) -> bool:
        """Nothing was ever used here."""
        return self.trend.requests == 0 and self.last_used_at is None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """A row of usage_parts; which fields say something depends on `part`."""

    part: str
    segment: int
    id: UUID | None
    name: str | None
    detail: str | None
    state: str | None
    charged_micros: Micros
    cost_nano_usd: NanoUsd
    requests: int
    unpriced_requests: int
    people: int


@asynccontextmanager
async def snapshot(database: db.Database, organization_id: UUID) -> AsyncIterator[db.Connection]:
    """A read-only transaction for one organization in which every query sees the same instant.

    Grants that began or ended since credits last moved are folded in before, so that Available is right now; not while
    the disk is full, when nothing is written.
    """
    async with database.tenant(organization_id) as conn:
        is_due = await db.fetch_value(conn, QUERIES.due_event, organization_id=organization_id)
        if is_due and not database.space.is_short():
            await db.execute(conn, QUERIES.fold_due_pools, organization_id=organization_id)
    async with database.tenant(organization_id) as conn:
        await db.execute(conn, QUERIES.snapshot)
        await db.execute(conn, QUERIES.plan_for_sums)
        yield conn


async def overview(
    conn: db.Connection, *, organization_id: UUID, now: datetime, with_margin: bool, top: int = TOP
) -> Overview:
    """The overview of an organization as of `now`. conn: a `snapshot`. top: how many rows a breakdown names.

    with_margin: whether the reader may see provider cost.

    Raises:
        OrganizationNotFound
    """
    organization = await get_organization(conn, organization_id=organization_id)
    periods = Periods.at(now, organization.zone)
    segments = Segments([periods.month, periods.before, *periods.days])
    pools = await db.fetch_all(conn, PoolFigures, QUERIES.pool_figures, organization_id=organization_id)
    with_access = await db.fetch_value(
        conn, QUERIES.people_with_access, organization_id=organization_id, roles_with_access=_ROLES_WITH_ACCESS
    )
    parts = await _usage_parts(conn, organization_id, periods, segments)
    month = _Total.of(parts.by_segment, segments.of(periods.month))
    before = _Total.of(parts.by_segment, segments.of(periods.before))
    trend = _trend(parts, periods, segments)
    last_used_at = None
    if trend.requests == 0:
        last_used_at = await db.fetch_value(
            conn, QUERIES.last_use, organization_id=organization_id, before=periods.range.starts_at
        )
    return Overview(
        organization=organization,
        as_of=now,
        pools=tuple(pools),
        month=periods.month,
        before=periods.before,
        cost=Cost(
            charged_micros=month.charged_micros,
            requests=month.requests,
            change=Change.between(before.charged_micros, month.charged_micros),
        ),
        margin=_margin(month) if with_margin else None,
        active_users=_active_users(parts, with_access),
        people=parts.breakdown("people", "person", month, top),
        keys=parts.breakdown("keys", "key", month, top),
        models=parts.breakdown("models", "model", month, top),
        departments=parts.breakdown("departments", "department", month, top, always=("unattributed",)),
        trend=trend,
        last_used_at=last_used_at,
    )


@dataclass(frozen=True, slots=True)
class _Total:
    """Sums over the segments of a span."""

    charged_micros: Micros
    cost_nano_usd: NanoUsd
    requests: int
    unpriced_requests: int

    @classmethod
    def of(cls, by_segment: dict[int, _Part], numbers: Iterable[int]) -> "_Total":
        rows = [by_segment[number] for number in numbers if number in by_segment]
        return cls(
            Micros(sum(row.charged_micros for row in rows)),
            NanoUsd(sum(row.cost_nano_usd for row in rows)),
            sum(row.requests for row in rows),
            sum(row.unpriced_requests for row in rows),
        )


class _Parts:
    """The rows of usage_parts, sorted by what they are parts of."""

    def __init__(self, rows: Iterable[_Part]) -> None:
        self.of: dict[str, list[_Part]] = {}
        for row in rows:
            self.of.setdefault(row.part, []).append(row)
        self.by_segment = {row.segment: row for row in self.of.get("segment", ())}

    def breakdown(self, table: str, part: str, total: _Total, top: int, always: Sequence[str] = ()) -> Breakdown:
        """Of the month's total by one kind of part."""
        return break_down(
            table,
            [_share(row) for row in self.of.get(part, ())],
            charged_micros=total.charged_micros,
            requests=total.requests,
            top=top,
            always=always,
        )


async def _usage_parts(conn: db.Connection, organization_id: UUID, periods: Periods, segments: Segments) -> _Parts:
    month, before = set(segments.of(periods.month)), set(segments.of(periods.before))
    rows = await db.fetch_all(
        conn,
        _Part,
        QUERIES.usage_parts,
        organization_id=organization_id,
        edges=segments.edges,
        starts_at=segments.edges[0],
        ends_at=segments.edges[-1],
        periods=[1 if each in month else 2 if each in before else 0 for each in range(1, len(segments.edges))],
        roles_with_access=_ROLES_WITH_ACCESS,
    )
    return _Parts(rows)


def _share(row: _Part) -> Share:
    assert row.state is not None
    return Share(row.id, row.name, row.detail, row.state, row.charged_micros, row.requests)


def _margin(month: _Total) -> Margin:
    charged = nano_usd_at_list_price(month.charged_micros)
    profit = NanoUsd(charged - month.cost_nano_usd)
    priced = month.requests - month.unpriced_requests
    return Margin(
        charged_micros=month.charged_micros,
        provider_cost_nano_usd=month.cost_nano_usd,
        profit_nano_usd=profit,
        margin_permille=permille(profit, charged),
        unpriced_requests=month.unpriced_requests,
        priced_permille=1000 * priced // month.requests if month.requests else 1000,
    )


def _active_users(parts: _Parts, with_access: int) -> ActiveUsers:
    used = [row for row in parts.of.get("person", ()) if row.people]
    before = sum(row.people for row in parts.of.get("people_before", ()))
    return ActiveUsers(
        active=len(used),
        active_with_access=sum(row.state == "active" for row in used),
        with_access=with_access,
        change=Change.between(before, len(used)),
    )


def _trend(parts: _Parts, periods: Periods, segments: Segments) -> Trend:
    shown = {number for day in periods.days for number in segments.of(day)}
    by_model: dict[tuple[str | None, str | None], dict[int, int]] = {}
    for row in parts.of.get("model_of_segment", ()):
        if row.segment in shown:
            by_model.setdefault((row.name, row.detail), {})[row.segment] = row.charged_micros
    series, columns = _series(by_model)
    days = tuple(_day(day, segments.of(day), parts.by_segment, columns, periods.now) for day in periods.days)
    total = _Total.of(parts.by_segment, segments.of(periods.range))
    return Trend(
        span=periods.range, charged_micros=total.charged_micros, requests=total.requests, series=series, days=days
    )


def _series(
    by_model: dict[tuple[str | None, str | None], dict[int, int]],
) -> tuple[tuple[Series, ...], list[dict[int, int]]]:
    """The largest models by name and provider and the rest as one; beside each its micros by segment."""
    ranked = sorted(by_model, key=lambda model: (-sum(by_model[model].values()), model[0] or "", model[1] or ""))
    shown, rest = ranked[:SERIES], ranked[SERIES:]
    columns = [by_model[model] for model in shown]
    names = [name for name, _ in shown]
    series = [_one_series(model, column, names) for model, column in zip(shown, columns, strict=True)]
    if rest:
        columns.append(_sum_of([by_model[model] for model in rest]))
        name = f"{len(rest)} other models" if len(rest) > 1 else "1 other model"
        total = Micros(sum(columns[-1].values()))
        series.append(Series(name=name, label=name, provider=None, is_others=True, charged_micros=total))
    return tuple(series), columns


def _one_series(model: tuple[str | None, str | None], column: dict[int, int], names: Sequence[str | None]) -> Series:
    name, provider = model
    known = name or "Unknown model"
    label = f"{known} at {provider or 'unknown'}" if names.count(name) > 1 else known
    total = Micros(sum(column.values()))
    return Series(name=known, label=label, provider=provider, is_others=False, charged_micros=total)


def _sum_of(columns: Iterable[dict[int, int]]) -> dict[int, int]:
    total: dict[int, int] = {}
    for column in columns:
        for segment, charged in column.items():
            total[segment] = total.get(segment, 0) + charged
    return total


def _day(
    span: Span, numbers: list[int], by_segment: dict[int, _Part], columns: list[dict[int, int]], now: datetime
) -> Day:
    total = _Total.of(by_segment, numbers)
    return Day(
        span=span,
        is_partial=span.starts_at <= now < span.ends_at,
        charged_micros=total.charged_micros,
        requests=total.requests,
        parts_micros=tuple(Micros(sum(column.get(number, 0) for number in numbers)) for column in columns),
    )
