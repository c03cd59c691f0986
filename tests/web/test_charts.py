"""Charts are drawn to scale, within their box."""

import itertools
from datetime import UTC, datetime

from hypothesis import given
from hypothesis import strategies as st

from bursar.money import Micros
from bursar.usage.days import Periods
from bursar.usage.figures import Day, PoolFigures, Series, Trend
from bursar.web.charts import bar, columns_of, pool_bar, scale
from bursar.web.numbers import Unit

amounts = st.integers(0, 10**15)


def percent(text: str) -> float:
    assert text.endswith("%")
    return float(text[:-1])


def trend(parts_of_days: list[list[int]]) -> Trend:
    spans = Periods.at(datetime(2026, 11, 20, 12, tzinfo=UTC), "UTC").days[-len(parts_of_days) :]
    days = [
        Day(
            span=span,
            is_partial=False,
            charged_micros=Micros(sum(parts)),
            requests=1,
            parts_micros=tuple(Micros(part) for part in parts),
        )
        for span, parts in zip(spans, parts_of_days, strict=True)
    ]
    sums = [Micros(sum(column)) for column in zip(*parts_of_days, strict=True)]
    return Trend(
        span=spans[0],
        charged_micros=Micros(sum(sums)),
        requests=len(days),
        series=tuple(
            Series(name=f"m{at}", label=f"m{at}", provider="p", is_others=at == 5, charged_micros=total)
            for at, total in enumerate(sums)
        ),
        days=tuple(days),
    )


@given(largest=amounts)
def test_an_axis_holds_the_largest_value_in_at_most_four_round_steps(largest: int) -> None:
    end, step = scale(largest)
    assert end >= largest
    assert end % step == 0
    assert 1 <= end // step <= 4
    assert str(step).strip("0") in ("1", "2", "5")


@given(st.lists(st.lists(amounts, min_size=6, max_size=6), min_size=1, max_size=30))
def test_blocks_of_a_column_stand_on_each_other_and_end_where_the_day_does(parts_of_days: list[list[int]]) -> None:
    drawn = trend(parts_of_days)
    top, _ = scale(max(day.charged_micros for day in drawn.days))
    for column in columns_of(drawn, Unit.MONEY).columns:
        floor = 100.0
        for block in column.blocks:
            assert abs(percent(block.start) + percent(block.length) - floor) < 0.001
            floor = percent(block.start)
        assert floor >= 0
        assert abs((100 - floor) - 100 * column.day.charged_micros / top) <= 0.011


def test_columns_lie_side_by_side_within_the_box() -> None:
    columns = columns_of(trend([[1, 2, 3, 4, 5, 6]] * 30), Unit.CREDITS).columns
    edges = [(percent(column.x), percent(column.x) + percent(column.width)) for column in columns]
    assert all(one[1] < other[0] for one, other in itertools.pairwise(edges))
    assert edges[0][0] >= 0
    assert edges[-1][1] <= 100
    assert [column.label for column in columns][-1] == "20 Nov"


@given(part=amounts, whole=amounts)
def test_a_bar_stays_in_its_track_and_shows_whatever_is_there(part: int, whole: int) -> None:
    blocks = bar(part, whole)
    assert bool(blocks) == (part > 0 and whole > 0)
    assert all(0 < percent(block.length) <= 100 for block in blocks)


@given(used=amounts, held=amounts, limit=amounts)
def test_the_bar_of_a_pool_divides_what_was_granted_or_taken(used: int, held: int, limit: int) -> None:
    pools = PoolFigures(
        kind="shared",
        model_filter=None,
        pools=1,
        available_micros=Micros(max(0, limit - used - held)),
        used_micros=Micros(used),
        held_micros=Micros(held),
        overage_micros=Micros(max(0, used + held - limit)),
        granted_micros=Micros(limit),
    )
    styles = [block.style for block in pool_bar(pools)]
    assert styles == sorted(styles, key=["used", "held", "overage"].index)
    assert ("overage" in styles) == (used + held > limit)
    assert all(percent(block.start) <= 100 for block in pool_bar(pools))
