"""What the API answers: every figure of an overview, amounts with their unit, ids with their prefix."""

from datetime import date, datetime
from typing import Final, Literal
from uuid import UUID

from pydantic import BaseModel

from bursar.money import MICROS_PER_CREDIT, Micros, NanoUsd, format_usd, nano_usd_at_list_price
from bursar.usage.breakdowns import Breakdown, Row
from bursar.usage.days import Span
from bursar.usage.figures import Overview, PoolFigures, Trend

_ID_PREFIXES: Final = {"people": "usr_", "keys": "key_", "departments": "dep_"}


class Amount(BaseModel):
    """A decimal number and its unit: `credit`, or a currency's code."""

    amount: str
    unit: str

    @classmethod
    def credits(cls, micros: int) -> "Amount":
        """Credits, with all six places."""
        return cls(amount=exact_credits(Micros(micros)), unit="credit")

    @classmethod
    def usd(cls, nano_usd: int) -> "Amount":
        """Dollars, exact."""
        return cls(amount=format_usd(NanoUsd(nano_usd)), unit="USD")

    @classmethod
    def list_price(cls, micros: int) -> "Amount":
        """Credits in dollars at list price."""
        return cls.usd(nano_usd_at_list_price(Micros(micros)))


class PeriodAnswer(BaseModel):
    """Local days, both included, and the same as instants: from starts_at up to, not including, ends_at."""

    first: date
    last: date
    starts_at: datetime
    ends_at: datetime

    @classmethod
    def of(cls, span: Span, like: datetime) -> "PeriodAnswer":
        """like: an instant in the zone to give the instants in."""
        return cls(
            first=span.first,
            last=span.last,
            starts_at=span.starts_at.astimezone(like.tzinfo),
            ends_at=span.ends_at.astimezone(like.tzinfo),
        )


class OrganizationAnswer(BaseModel):
    """Whose figures they are; days and months are those of its zone."""

    id: str
    slug: str
    name: str
    kind: str
    zone: str
    status: str


class PoolsAnswer(BaseModel):
    """The open pools of one kind. Kinds are never added up; used is counted since the pools were opened."""

    as_of: datetime
    kind: str
    model_filter: str | None
    pools: int
    available: Amount
    used: Amount
    held: Amount
    overage: Amount
    granted: Amount

    @classmethod
    def of(cls, pools: PoolFigures, as_of: datetime) -> "PoolsAnswer":
        """Amounts in credits."""
        return cls(
            as_of=as_of,
            kind=pools.kind,
            model_filter=pools.model_filter,
            pools=pools.pools,
            available=Amount.credits(pools.available_micros),
            used=Amount.credits(pools.used_micros),
            held=Amount.credits(pools.held_micros),
            overage=Amount.credits(pools.overage_micros),
            granted=Amount.credits(pools.granted_micros),
        )


class CostChangeAnswer(BaseModel):
    """Against the same days of the month before. percent: one decimal; null where nothing was charged then."""

    period: PeriodAnswer
    charged: Amount
    difference: Amount
    percent: str | None


class CostAnswer(BaseModel):
    """What was charged in the month so far."""

    as_of: datetime
    period: PeriodAnswer
    charged: Amount
    money: Amount
    requests: int
    change: CostChangeAnswer


class MarginAnswer(BaseModel):
    """Charged against provider cost in the month so far. priced_percent: requests whose price is known."""

    as_of: datetime
    charged: Amount
    provider_cost: Amount
    profit: Amount
    percent: str | None
    unpriced_requests: int
    priced_percent: str


class ActiveUsersAnswer(BaseModel):
    """People with a settled request in the month so far; not additive over days or models."""

    as_of: datetime
    active: int
    active_with_access: int
    with_access: int
    before: int
    difference: int


class RowAnswer(BaseModel):
    """A row of a breakdown. kind: `one`, `others`, or a remainder that has a name (`deleted`, `unattributed` …)."""

    kind: str
    id: str | None
    name: str
    detail: str | None
    state: str
    count: int
    charged: Amount
    money: Amount
    requests: int
    share_percent: str | None


class BreakdownAnswer(BaseModel):
    """Rows that sum to the total, which is that of `cost`."""

    as_of: datetime
    charged: Amount
    money: Amount
    requests: int
    rows: list[RowAnswer]

    @classmethod
    def of(cls, breakdown: Breakdown, as_of: datetime) -> "BreakdownAnswer":
        """Ids get their prefix."""
        return cls(
            as_of=as_of,
            charged=Amount.credits(breakdown.charged_micros),
            money=Amount.list_price(breakdown.charged_micros),
            requests=breakdown.requests,
            rows=[row_answer(breakdown.table, row) for row in breakdown.rows],
        )


class SeriesAnswer(BaseModel):
    """One model of the trend, or what the others have together."""

    name: str
    provider: str | None
    is_others: bool
    charged: Amount


class DayAnswer(BaseModel):
    """One local day. parts: by series, in their order; they sum to charged."""

    day: date
    starts_at: datetime
    ends_at: datetime
    is_partial: bool
    charged: Amount
    money: Amount
    requests: int
    parts: list[Amount]


class TrendAnswer(BaseModel):
    """Thirty days, oldest first; the last is today and partial."""

    as_of: datetime
    period: PeriodAnswer
    charged: Amount
    money: Amount
    series: list[SeriesAnswer]
    days: list[DayAnswer]

    @classmethod
    def of(cls, trend: Trend, as_of: datetime) -> "TrendAnswer":
        """Instants are given in the zone of `as_of`."""
        return cls(
            as_of=as_of,
            period=PeriodAnswer.of(trend.span, as_of),
            charged=Amount.credits(trend.charged_micros),
            money=Amount.list_price(trend.charged_micros),
            series=[
                SeriesAnswer(
                    name=each.name,
                    provider=each.provider,
                    is_others=each.is_others,
                    charged=Amount.credits(each.charged_micros),
                )
                for each in trend.series
            ],
            days=[
                DayAnswer(
                    day=each.span.first,
                    starts_at=each.span.starts_at.astimezone(as_of.tzinfo),
                    ends_at=each.span.ends_at.astimezone(as_of.tzinfo),
                    is_partial=each.is_partial,
                    charged=Amount.credits(each.charged_micros),
                    money=Amount.list_price(each.charged_micros),
                    requests=each.requests,
                    parts=[Amount.credits(part) for part in each.parts_micros],
                )
                for each in trend.days
            ],
        )


class OverviewAnswer(BaseModel):
    """All figures of an organization as of one instant. margin: null for whoever may not see it."""

    organization: OrganizationAnswer
    as_of: datetime
    source: Literal["ledger"] = "ledger"
    credits_per_usd: str = "100"
    pools: list[PoolsAnswer]
    cost: CostAnswer
    margin: MarginAnswer | None
    active_users: ActiveUsersAnswer
    people: BreakdownAnswer
    keys: BreakdownAnswer
    models: BreakdownAnswer
    departments: BreakdownAnswer
    trend: TrendAnswer

    @classmethod
    def of(cls, found: Overview) -> "OverviewAnswer":
        """Instants are given in the organization's zone."""
        as_of = found.local_as_of
        organization = found.organization
        return cls(
            organization=OrganizationAnswer(
                id=prefixed("org_", organization.organization_id),
                slug=organization.slug,
                name=organization.name,
                kind=organization.kind,
                zone=organization.zone,
                status=organization.status,
            ),
            as_of=as_of,
            pools=[PoolsAnswer.of(each, as_of) for each in found.pools],
            cost=_cost_answer(found, as_of),
            margin=_margin_answer(found, as_of),
            active_users=_active_users_answer(found, as_of),
            people=BreakdownAnswer.of(found.people, as_of),
            keys=BreakdownAnswer.of(found.keys, as_of),
            models=BreakdownAnswer.of(found.models, as_of),
            departments=BreakdownAnswer.of(found.departments, as_of),
            trend=TrendAnswer.of(found.trend, as_of),
        )


def exact_credits(micros: Micros) -> str:
    """Credits as a decimal with all six places: 1_250_000_000 -> '1250.000000'."""
    whole, part = divmod(abs(micros), MICROS_PER_CREDIT)
    return f"{'-' if micros < 0 else ''}{whole}.{part:06d}"


def percent(permille: int | None) -> str | None:
    """A percentage with one decimal: 124 -> '12.4'."""
    if permille is None:
        return None
    whole, tenth = divmod(abs(permille), 10)
    return f"{'-' if permille < 0 else ''}{whole}.{tenth}"


def prefixed(prefix: str, identifier: UUID) -> str:
    """An id as it is shown: usr_ and 32 hex digits."""
    return f"{prefix}{identifier.hex}"


def row_answer(table: str, row: Row) -> RowAnswer:
    return RowAnswer(
        kind=row.kind,
        id=prefixed(_ID_PREFIXES[table], row.id) if row.id is not None else None,
        name=row.name,
        detail=row.detail,
        state=row.state,
        count=row.count,
        charged=Amount.credits(row.charged_micros),
        money=Amount.list_price(row.charged_micros),
        requests=row.requests,
        share_percent=percent(row.share_permille),
    )


def _cost_answer(found: Overview, as_of: datetime) -> CostAnswer:
    change = found.cost.change
    return CostAnswer(
        as_of=as_of,
        period=PeriodAnswer.of(found.month, as_of),
        charged=Amount.credits(found.cost.charged_micros),
        money=Amount.list_price(found.cost.charged_micros),
        requests=found.cost.requests,
        change=CostChangeAnswer(
            period=PeriodAnswer.of(found.before, as_of),
            charged=Amount.credits(change.before),
            difference=Amount.credits(change.difference),
            percent=percent(change.permille),
        ),
    )


def _margin_answer(found: Overview, as_of: datetime) -> MarginAnswer | None:
    if found.margin is None:
        return None
    return MarginAnswer(
        as_of=as_of,
        charged=Amount.list_price(found.margin.charged_micros),
        provider_cost=Amount.usd(found.margin.provider_cost_nano_usd),
        profit=Amount.usd(found.margin.profit_nano_usd),
        percent=percent(found.margin.margin_permille),
        unpriced_requests=found.margin.unpriced_requests,
        priced_percent=percent(found.margin.priced_permille) or "",
    )


def _active_users_answer(found: Overview, as_of: datetime) -> ActiveUsersAnswer:
    users = found.active_users
    return ActiveUsersAnswer(
        as_of=as_of,
        active=users.active,
        active_with_access=users.active_with_access,
        with_access=users.with_access,
        before=users.change.before,
        difference=users.change.difference,
    )
