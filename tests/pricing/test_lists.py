"""Importing makes the book say what the list says from an instant on, and leaves the past alone."""

from datetime import timedelta

from hypothesis import given
from hypothesis import strategies as st

from bursar.pricing.lists import ALWAYS, Prices, Segment, differences, prices_at, segments_to_add
from bursar.pricing.prices import Rate

DAY = timedelta(days=1)
PRICES = [None, *(Prices((Rate("input_tokens", amount),)) for amount in (1, 2, 3))]


@st.composite
def timelines(draw: st.DrawFn) -> list[Segment]:
    days = draw(st.lists(st.integers(0, 12), unique=True, max_size=6))
    return [Segment(ALWAYS + day * DAY, draw(st.sampled_from(PRICES))) for day in sorted(days)]


def applied(old: list[Segment], added: list[Segment]) -> list[Segment]:
    """The book afterwards: of one instant the newer row counts."""
    return [each for _, each in sorted({each.effective_from: each for each in [*old, *added]}.items())]


@given(old=timelines(), new=timelines(), day=st.integers(0, 13))
def test_from_the_instant_on_the_book_says_what_the_list_says(old: list[Segment], new: list[Segment], day: int) -> None:
    start = ALWAYS + day * DAY
    after = applied(old, list(segments_to_add(old, new, start)))
    begins = new[0].effective_from if new else None
    for hour in range(14 * 24):
        at = ALWAYS + timedelta(hours=hour)
        if at < start or begins is None or at < begins:
            assert prices_at(after, at) == prices_at(old, at)
        else:
            assert prices_at(after, at) == prices_at(new, at)
    assert list(segments_to_add(after, new, start)) == []


def test_differences_name_each_unit_price_that_changes() -> None:
    old = Prices((Rate("input_tokens", 1), Rate("output_tokens", 5)))
    new = Prices((Rate("input_tokens", 2), Rate("input_tokens", 4, 200_000), Rate("output_tokens", 5)))
    assert [
        (each.kind, each.above_input_tokens, each.old_nano_usd, each.new_nano_usd) for each in differences(old, new)
    ] == [
        ("input_tokens", 0, 1, 2),
        ("input_tokens", 200_000, None, 4),
    ]
