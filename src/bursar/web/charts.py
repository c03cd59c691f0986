"""Charts as plain geometry: percentages of a box, from exact integers. The drawing is in the templates."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from bursar.money import Micros, divide_half_up, divide_up
from bursar.usage.figures import Day, PoolFigures, Trend
from bursar.web.numbers import Unit, day_text, short_day_text

_TICKS: Final = 4
_WHOLE: Final = 100_00  # hundredths of a percent
_GAP: Final = 20  # percent of a column's place that stays empty


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a column or bar: where it starts and how long it is, in percent of the box. style: its CSS class."""

    start: str
    length: str
    style: str


@dataclass(frozen=True, slots=True)
class Column:
    """One day. x, width: of the column; place: of its whole share of the box (for pointing). label: below the axis."""

    day: Day
    title: str
    place: str
    x: str
    width: str
    blocks: tuple[Block, ...]
    label: str | None
    middle: str


@dataclass(frozen=True, slots=True)
class Tick:
    """A line across the chart. y: in percent from the top."""

    y: str
    text: str


@dataclass(frozen=True, slots=True)
class Columns:
    """The columns of a trend, with the lines behind them."""

    columns: tuple[Column, ...]
    ticks: tuple[Tick, ...]
    place_width: str


def series_style(index: int, is_others: bool) -> str:
    """The CSS class of a series: one of five colours, or the hatched neutral."""
    return "others" if is_others else f"series-{index + 1}"


def columns_of(trend: Trend, unit: Unit) -> Columns:
    """A column per day, stacked by model from the largest at the bottom."""
    top, step = scale(max((day.charged_micros for day in trend.days), default=0))
    places = len(trend.days)
    styles = [series_style(index, series.is_others) for index, series in enumerate(trend.series)]
    columns = []
    for index, day in enumerate(trend.days):
        left = index * _WHOLE // places
        columns.append(
            Column(
                day=day,
                title=f"{day_text(day.span.first)}: {unit.amount(day.charged_micros)}",
                place=_percent(left),
                x=_percent(left + _WHOLE * _GAP // (200 * places)),
                width=_percent(_WHOLE * (100 - _GAP) // (100 * places)),
                blocks=tuple(_stacked(day.parts_micros, styles, top)),
                label=_label(trend.days, index),
                middle=_percent(left + _WHOLE // (2 * places)),
            )
        )
    ticks = [
        Tick(_percent(_WHOLE - _WHOLE * level // top), unit.exact(Micros(level))) for level in range(0, top + 1, step)
    ]
    return Columns(tuple(columns), tuple(ticks), _percent(_WHOLE // places))


def bar(part: int, whole: int, style: str = "series-1") -> tuple[Block, ...]:
    """One bar from the left; a part above nothing is always to be seen."""
    if part <= 0 or whole <= 0:
        return ()
    return (Block("0%", _percent(max(30, divide_half_up(min(part, whole) * _WHOLE, whole))), style),)


def pool_bar(pools: PoolFigures) -> tuple[Block, ...]:
    """Used, held and overage of all that was granted or taken; what stays empty is available."""
    whole = pools.granted_micros + pools.overage_micros
    taken = pools.used_micros + pools.held_micros
    within = max(0, taken - pools.overage_micros)
    used = min(pools.used_micros, within)
    parts = ((used, "used"), (within - used, "held"), (pools.overage_micros, "overage"))
    return tuple(_in_line(parts, whole))


def scale(largest: int) -> tuple[int, int]:
    """(end of the axis, distance of its lines): the largest value fits under round steps of 1, 2 or 5 tens.

    Lines stand at 0, step … end, at most four steps; an axis of nothing ends at one credit.
    """
    step = 1_000_000
    while step > 1 and largest and largest <= step:
        step //= 10
    while _TICKS * step < largest:
        step = _next_round(step)
    return max(step, divide_up(largest, step) * step), step


def _next_round(step: int) -> int:
    """1, 2, 5, 10, 20 …"""
    power = int(10 ** (len(str(step)) - 1))
    return {1: 2, 2: 5, 5: 10}[step // power] * power


def _stacked(parts: Sequence[Micros], styles: Sequence[str], top: int) -> Iterable[Block]:
    """Blocks from the bottom up. Edges are rounded, not heights, so that no gap opens. Below zero there is no block."""
    reached = 0
    for part, style in zip(parts, styles, strict=True):
        if part <= 0:
            continue
        low, reached = reached, reached + part
        bottom, upper = _edge(low, top), _edge(reached, top)
        yield Block(_percent(_WHOLE - upper), _percent(upper - bottom), style)


def _in_line(parts: Iterable[tuple[int, str]], whole: int) -> Iterable[Block]:
    """Blocks from the left to the right."""
    reached = 0
    for part, style in parts:
        if part <= 0:
            continue
        low, reached = reached, reached + part
        start, end = _edge(low, whole), _edge(reached, whole)
        yield Block(_percent(start), _percent(max(end - start, 30)), style)


def _edge(value: int, whole: int) -> int:
    return min(_WHOLE, divide_half_up(value * _WHOLE, whole))


def _label(days: Sequence[Day], index: int) -> str | None:
    """Every seventh day backwards from today has its date below the axis."""
    return short_day_text(days[index].span.first) if (len(days) - 1 - index) % 7 == 0 else None


def _percent(hundredths: int) -> str:
    """1234 -> '12.34%'."""
    whole, part = divmod(hundredths, 100)
    return f"{whole}.{part:02d}".rstrip("0").rstrip(".") + "%"
