"""Sums that come out to the micro."""

import random
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.demo.companies import CODE, EVERYTHING, GPT_MINI, HAIKU, TALK
from bursar.demo.requests import (
    LARGEST_REST,
    LONGEST_INPUT,
    SMALLEST_REST,
    Generator,
    Mix,
    Quotes,
    close,
    shares,
    table,
)
from bursar.money import Micros, credits

AT = datetime(2026, 10, 20, 9, 30, tzinfo=UTC)


def _generator(quotes: Quotes, mix: Mix, seed: int = 1) -> Generator:
    return Generator(
        rng=random.Random(seed), quotes=quotes, mix=mix, closing=(GPT_MINI, HAIKU), months_ago=lambda at: 0
    )


@pytest.mark.parametrize("mix", [EVERYTHING, TALK, CODE])
@pytest.mark.parametrize("markup_ppm", [1_000_000, 2_000_000])
@pytest.mark.parametrize("whole_credits", [1, 3, 40, 999, 12_345])
def test_requests_come_to_exactly_the_amount(
    list_quotes: Callable[[int], Quotes], mix: Mix, markup_ppm: int, whole_credits: int
) -> None:
    generator = _generator(list_quotes(markup_ppm), mix)
    amount = credits(whole_credits)
    made = generator.requests(amount, repeat(AT), generator.size(amount, 20, AT))
    assert sum(request.priced.charged_micros for request in made) == amount
    assert all(request.usage.total_input_tokens <= LONGEST_INPUT for request in made)
    assert all(request.priced.unpriced_kinds == () for request in made)


def test_with_a_markup_of_two_the_provider_cost_is_exactly_half(list_quotes: Callable[[int], Quotes]) -> None:
    generator = _generator(list_quotes(2_000_000), EVERYTHING)
    made = generator.requests(credits(5_000), repeat(AT), 2.0)
    assert sum(request.priced.provider_cost_nano_usd for request in made) == 5_000 * 10_000_000 // 2


@given(
    amount=st.integers(SMALLEST_REST // 20, LARGEST_REST // 20).map(lambda n: 20 * n),
    model=st.sampled_from([GPT_MINI, HAIKU]),
)
def test_a_closing_request_meets_every_rest(list_quotes: Callable[[int], Quotes], amount: int, model: object) -> None:
    assert model in (GPT_MINI, HAIKU)
    made = close(list_quotes(1_000_000), [GPT_MINI if model == GPT_MINI else HAIKU], Micros(amount), AT)
    assert made.priced.charged_micros == amount


def test_an_amount_that_no_price_divides_is_refused(list_quotes: Callable[[int], Quotes]) -> None:
    with pytest.raises(ValueError, match="can come to 1000001 micros"):
        close(list_quotes(1_000_000), [HAIKU], Micros(1_000_001), AT)


@given(total=st.integers(0, 10_000), weights=st.lists(st.integers(0, 50), min_size=1, max_size=40).filter(any))
def test_shares_sum_to_the_whole_and_nobody_who_counts_goes_empty(total: int, weights: list[int]) -> None:
    parts = shares(total, weights)
    assert sum(parts) == total
    assert min(parts) >= 0
    assert all(part == 0 for part, weight in zip(parts, weights, strict=True) if weight == 0)
    if total >= 2 * len(weights):
        assert all(part > 0 for part, weight in zip(parts, weights, strict=True) if weight)


@given(st.lists(st.lists(st.integers(0, 900), min_size=3, max_size=3), min_size=1, max_size=9), st.integers())
def test_a_table_has_the_sums_of_its_rows_and_columns(cells: list[list[int]], seed: int) -> None:
    rows = [sum(row) for row in cells]
    columns = [sum(column) for column in zip(*cells, strict=True)]
    made = table(random.Random(seed), rows, columns)
    assert [sum(row) for row in made] == rows
    assert [sum(column) for column in zip(*made, strict=True)] == columns
    assert all(cell >= 0 for row in made for cell in row)
