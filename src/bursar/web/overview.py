"""What the overview page says beside the figures: titles, sentences, notices. The figures are the handler's own."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bursar.credits.filters import features_of
from bursar.usage.breakdowns import ONE, Breakdown, Row
from bursar.usage.figures import Overview, PoolFigures, Trend
from bursar.web.charts import Block, bar, columns_of, pool_bar, series_style
from bursar.web.numbers import (
    Unit,
    count_text,
    credits_text,
    date_text,
    day_text,
    percent_text,
    requests_text,
    short_day_text,
    time_text,
)

Notice = tuple[str, str, str]
"""(kind: info, warn or bad; word; sentence)"""

EXPORTS: Final = (
    ("days", "Days"),
    ("people", "People"),
    ("keys", "API keys"),
    ("models", "Models"),
    ("departments", "Departments"),
)
_LOW_PERMILLE: Final = 100  # as the first warning of a pool: nine tenths are used
_POOL_TITLES: Final = {
    "shared": "Shared credits",
    "personal": "Personal credits",
    "individual": "Your credits",
    "residual": "Remaining credits",
}


@dataclass(frozen=True, slots=True)
class PoolGroup:
    """A card of pools of one kind. key: its name in the page; status: what is to be done, if anything."""

    key: str
    title: str
    subtitle: str
    note: str
    figures: PoolFigures
    bar: tuple[Block, ...]
    status: Notice | None


@dataclass(frozen=True, slots=True)
class Card:
    """A card with a breakdown. rows: each with its bar."""

    title: str
    column: str
    detail_prefix: str
    breakdown: Breakdown
    rows: tuple[tuple[Row, tuple[Block, ...]], ...]


def describe(found: Overview, unit: Unit) -> dict[str, Any]:
    """Everything that the template overview.html shows of an overview."""
    legend = [(series, series_style(index, series.is_others)) for index, series in enumerate(found.trend.series)]
    return {
        "found": found,
        "unit": unit,
        "pools": [_pool_group(pools) for pools in found.pools],
        "notices": list(_notices(found)),
        "former": found.active_users.active - found.active_users.active_with_access,
        "compared": compared(found),
        "chart": columns_of(found.trend, unit),
        "legend": legend,
        "sentence": sentence(found.trend, unit),
        "cards": _cards(found, {(each.name, each.provider): style for each, style in legend}),
        "exports": EXPORTS,
    }


def compared(found: Overview) -> str:
    """Until when the month before is compared: '20 Oct, 21:26', or '28 Feb' where it was shorter and counts whole."""
    before = found.before
    day = short_day_text(before.last)
    return day if before.ends_at == found.month.starts_at else f"{day}, {time_text(found.local_as_of)}"


def sentence(trend: Trend, unit: Unit) -> str:
    """What the chart shows, in words: the highest day and what it went to, and today so far."""
    if trend.requests == 0:
        return f"Nothing was used from {short_day_text(trend.span.first)} to {short_day_text(trend.span.last)}."
    highest = max(trend.days, key=lambda day: day.charged_micros)
    largest, part = max(zip(trend.series, highest.parts_micros, strict=True), key=lambda each: each[1])
    mostly = f", mostly {largest.label}" if len(trend.series) > 1 and 2 * part > highest.charged_micros else ""
    today = trend.days[-1]
    return (
        f"The highest day was {day_text(highest.span.first)} with {unit.amount(highest.charged_micros)}{mostly}. "
        f"Today so far: {unit.amount(today.charged_micros)} in {requests_text(today.requests)}."
    )


def _pool_group(pools: PoolFigures) -> PoolGroup:
    title = _POOL_TITLES[pools.kind]
    if pools.model_filter is not None:
        pattern = features_of(pools.model_filter) or pools.model_filter
        title += f" for {pattern.replace('%', '*')}"
    return PoolGroup(
        key=f"{pools.kind}-{pools.model_filter}" if pools.model_filter else pools.kind,
        title=title,
        subtitle=_subtitle(pools),
        note=f"{credits_text(pools.granted_micros)} granted. Used counts from the opening of the pool.",
        figures=pools,
        bar=pool_bar(pools),
        status=_status(pools),
    )


def _subtitle(pools: PoolFigures) -> str:
    if pools.kind == "personal":
        whose = f"{count_text(pools.pools)} people, each with a balance of their own"
        return whose if pools.pools != 1 else "one person's own balance"
    if pools.kind == "residual":
        return "not spendable"
    return "one balance for the organization" if pools.kind == "shared" else "spendable in your own name"


def _status(pools: PoolFigures) -> Notice | None:
    if pools.kind == "residual" or pools.granted_micros == 0:
        return None
    if pools.overage_micros > 0:
        text = f"{credits_text(pools.overage_micros)} went beyond what was granted; "
        return ("bad", "Overage", f"{text}new requests on {_it(pools)} are refused until credits are added.")
    if pools.available_micros == 0:
        return ("bad", "Exhausted", f"New requests on {_it(pools)} are refused until credits are added.")
    left = 1000 * pools.available_micros // pools.granted_micros
    if left < _LOW_PERMILLE:
        return ("warn", "Low", f"{percent_text(left)} of what was granted is left.")
    return None


def _it(pools: PoolFigures) -> str:
    return "the balances concerned" if pools.pools > 1 else "this balance"


def _notices(found: Overview) -> Iterable[Notice]:
    organization = found.organization
    if organization.status == "frozen":
        yield ("warn", "Frozen", "Everything can be read here, and nothing can be spent until it is thawed.")
    if found.trend.requests == 0 and found.last_used_at is not None:
        last = found.last_used_at.astimezone(found.local_as_of.tzinfo).date()
        yield ("info", "Quiet", f"Nothing was used in these thirty days. The last request was on {date_text(last)}.")


def _cards(found: Overview, styles: dict[tuple[str, str | None], str]) -> Sequence[Card]:
    """styles: of the models in the chart; a model has the same colour here."""
    return (
        _card("Top spenders", "Person", found.people, {}),
        _card("API keys", "Key", found.keys, {}, detail_prefix="…"),
        _card("Models", "Model", found.models, styles, detail_prefix="at "),
        _card("Departments", "Department", found.departments, {}),
    )


def _card(
    title: str,
    column: str,
    breakdown: Breakdown,
    styles: dict[tuple[str, str | None], str],
    detail_prefix: str = "",
) -> Card:
    largest = max((row.charged_micros for row in breakdown.rows), default=0)
    rows = []
    for row in breakdown.rows:
        usual = "others" if styles and row.kind == ONE else "neutral"
        style = styles.get((row.name, row.detail), usual) if row.kind == ONE else "others"
        rows.append((row, bar(row.charged_micros, largest, style)))
    return Card(title, column, detail_prefix, breakdown, tuple(rows))
