"""Numbers as people read them."""

from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.money import Micros, NanoUsd, credits
from bursar.usage.figures import Change
from bursar.web.numbers import (
    Unit,
    change_text,
    credits_text,
    days_text,
    difference_text,
    money_text,
    percent_text,
    requests_text,
    share_text,
    usd_text,
)


@pytest.mark.parametrize(
    ("micros", "text"),
    [
        (0, "0 cr"),
        (1, "<0.01 cr"),
        (9_999, "<0.01 cr"),
        (10_000, "0.01 cr"),
        (9_500_000, "9.5 cr"),
        (9_994_999, "9.99 cr"),
        (9_995_000, "10 cr"),
        (61_250_499_999, "61,250 cr"),
        (61_250_500_000, "61,251 cr"),
        (-3_000_000, "−3 cr"),
        (-1, "−<0.01 cr"),
    ],
)
def test_credits_are_whole_but_for_small_ones(micros: int, text: str) -> None:
    assert credits_text(Micros(micros)) == text


@pytest.mark.parametrize(
    ("nano_usd", "text"),
    [(0, "$0.00"), (1, "<$0.01"), (9_999_999, "<$0.01"), (10_000_000, "$0.01"), (2_500 * 10**9, "$2,500.00")],
)
def test_money_has_two_decimals_and_is_never_nothing_by_rounding(nano_usd: int, text: str) -> None:
    assert usd_text(NanoUsd(nano_usd)) == text


def test_a_hundred_credits_are_a_dollar() -> None:
    assert money_text(credits(100)) == "$1.00"


@given(micros=st.integers(1, 10**18))
def test_something_never_reads_as_nothing(micros: int) -> None:
    for unit in Unit:
        digits = unit.amount(Micros(micros)).strip("$ cr<")
        assert float(digits.replace(",", "")) > 0


@given(micros=st.integers(0, 10**15))
def test_an_exact_amount_can_be_read_back(micros: int) -> None:
    text = Unit.CREDITS.exact(Micros(micros)).removesuffix(" cr").replace(",", "")
    whole, _, decimals = text.partition(".")
    assert int(whole) * 10**6 + int(decimals.ljust(6, "0") or 0) == micros


@pytest.mark.parametrize(
    ("before", "after", "text", "difference"),
    [
        (1000, 1124, "up 12.4%", "up 124"),
        (1000, 970, "down 3.0%", "down 30"),
        (1000, 1000, "no change", "no change"),
        (0, 5, "up", "up 5"),
        (0, 0, "no change", "no change"),
        (100_000, 100_001, "up <0.1%", "up 1"),
        (10**18 + 1, 2 * 10**18 + 2, "up 100.0%", "up 1,000,000,000,000,000,001"),
    ],
)
def test_a_change_is_said_in_words(before: int, after: int, text: str, difference: str) -> None:
    change = Change.between(before, after)
    assert (change_text(change), difference_text(change)) == (text, difference)


def test_a_small_share_is_not_none() -> None:
    assert share_text(0, 1) == "<0.1%"
    assert share_text(0, 0) == "0.0%"
    assert share_text(None, 0) == "–"
    assert percent_text(-124) == "−12.4%"


def test_one_request_is_not_many() -> None:
    assert [requests_text(count) for count in (0, 1, 1204)] == ["0 requests", "1 request", "1,204 requests"]


def test_a_range_of_days_names_the_month_once_where_it_can() -> None:
    assert days_text(date(2026, 11, 1), date(2026, 11, 20)) == "1–20 Nov"
    assert days_text(date(2026, 10, 28), date(2026, 11, 3)) == "28 Oct – 3 Nov"
    assert days_text(date(2026, 11, 1), date(2026, 11, 1)) == "1 Nov"
