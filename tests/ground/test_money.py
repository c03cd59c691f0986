"""Amounts are integers, exact in both directions, and rounded once."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar import money
from bursar.money import LARGEST, Micros, NanoUsd, NotAnAmount

AMOUNTS = st.integers(-LARGEST, LARGEST)


@given(AMOUNTS)
def test_what_is_written_is_read_back_to_the_last_unit(amount: int) -> None:
    assert money.parse_credits(money.format_credits(Micros(amount))) == amount
    assert money.parse_usd(money.format_usd(NanoUsd(amount))) == amount


@given(st.integers(-(10**30), 10**30), st.integers(1, 10**12))
def test_rounding_is_to_the_nearest_with_halves_away_from_zero_and_holds_round_up(top: int, bottom: int) -> None:
    exact = Fraction(top, bottom)
    half_up = money.divide_half_up(top, bottom)
    assert abs(half_up - exact) <= Fraction(1, 2)
    if abs(half_up - exact) == Fraction(1, 2):
        assert abs(half_up) > abs(exact)
    assert 0 <= money.divide_up(top, bottom) - exact < 1


@pytest.mark.parametrize(
    ("micros", "text"),
    [(0, "0"), (1, "0.000001"), (12_500_000, "12.5"), (-1_000_000, "-1"), (-1, "-0.000001")],
)
def test_credits_are_written_without_needless_zeros(micros: int, text: str) -> None:
    assert money.format_credits(Micros(micros)) == text


@pytest.mark.parametrize(("nano", "text"), [(0, "0.00"), (1_500_000_000, "1.50"), (1, "0.000000001")])
def test_dollars_are_written_with_two_places_at_least(nano: int, text: str) -> None:
    assert money.format_usd(NanoUsd(nano)) == text


@pytest.mark.parametrize(
    "text",
    ["", "-", ".5", "5.", "1e3", "NaN", "inf", "1,5", " 1", "1 ", "0x1", "٣", "0.0000001", "9223372036854.775808"],
)
def test_what_is_no_amount_or_too_fine_or_too_large_is_refused(text: str) -> None:
    with pytest.raises(NotAnAmount):
        money.parse_credits(text)


def test_list_price_is_one_credit_for_a_cent() -> None:
    assert money.micros_at_list_price(money.parse_usd("0.01")) == money.credits(1)
    assert money.micros_at_list_price(NanoUsd(5)) == 1
    assert money.micros_at_list_price(NanoUsd(4)) == 0
    assert money.nano_usd_at_list_price(money.credits(1)) == money.parse_usd("0.01")
