"""Units of money, as integers: micro-credits for what is charged, nano-dollars for what a provider costs.

1 credit = 1,000,000 micros = 0.01 USD at list price; 1 USD = 1,000,000,000 nano-dollars, so 1 micro = 10 nano-dollars.
Floats are never used. Text amounts are plain decimals ("12.5"), exact in both directions.
"""

import re
from typing import Final, NewType

Micros = NewType("Micros", int)
"""Micro-credits: 1 credit = 1,000,000."""

NanoUsd = NewType("NanoUsd", int)
"""Nano-dollars: 1 USD = 1,000,000,000."""

MICROS_PER_CREDIT: Final = 1_000_000
NANO_USD_PER_USD: Final = 1_000_000_000
NANO_USD_PER_MICRO: Final = 10
MICROS_PER_USD: Final = 100_000_000
LARGEST: Final = 2**63 - 1
"""What a bigint column holds."""

_DECIMAL = re.compile(r"(?P<sign>[+-]?)(?P<whole>\d{1,19})(?:\.(?P<part>\d{1,18}))?", re.ASCII)


class NotAnAmount(ValueError):
    """The text is no decimal amount, has more places than the unit, or does not fit a bigint."""


def credits(whole: int) -> Micros:
    """Whole credits as micros."""
    return Micros(whole * MICROS_PER_CREDIT)


def divide_half_up(numerator: int, denominator: int) -> int:
    """numerator / denominator, rounded to the nearest integer, a half away from zero. denominator > 0."""
    assert denominator > 0
    quotient = (2 * abs(numerator) + denominator) // (2 * denominator)
    return quotient if numerator >= 0 else -quotient


def divide_up(numerator: int, denominator: int) -> int:
    """numerator / denominator, rounded up (what a hold uses). denominator > 0."""
    assert denominator > 0
    return -(-numerator // denominator)


def micros_at_list_price(cost: NanoUsd) -> Micros:
    """What a provider cost is charged at mark-up 1.0, rounded half-up."""
    return Micros(divide_half_up(cost, NANO_USD_PER_MICRO))


def nano_usd_at_list_price(amount: Micros) -> NanoUsd:
    """The list price of credits; exact."""
    return NanoUsd(amount * NANO_USD_PER_MICRO)


def format_credits(amount: Micros) -> str:
    """Micros as a decimal number of credits without needless zeros: 12_500_000 -> '12.5'."""
    if amount < 0:
        return "-" + format_credits(Micros(-amount))
    whole, part = divmod(amount, MICROS_PER_CREDIT)
    return f"{whole}.{part:06d}".rstrip("0") if part else str(whole)


def format_usd(amount: NanoUsd) -> str:
    """Nano-dollars as a decimal number of dollars with at least two places: 12_500_000_000 -> '12.50'."""
    whole, part = divmod(abs(amount), NANO_USD_PER_USD)
    digits = f"{part:09d}".rstrip("0").ljust(2, "0")
    return f"{'-' if amount < 0 else ''}{whole}.{digits}"


def parse_credits(text: str) -> Micros:
    """A decimal number of credits with at most six places.

    Raises:
        NotAnAmount
    """
    return Micros(_parse(text, places=6))


def parse_usd(text: str) -> NanoUsd:
    """A decimal number of dollars with at most nine places.

    Raises:
        NotAnAmount
    """
    return NanoUsd(_parse(text, places=9))


def _parse(text: str, *, places: int) -> int:
    match = _DECIMAL.fullmatch(text)
    if match is None:
        raise NotAnAmount(f"not a decimal amount such as 12.5: {text[:40]!r}")
    part = (match["part"] or "").rstrip("0")
    if len(part) > places:
        raise NotAnAmount(f"more than {places} decimal places: {text[:40]!r}")
    amount = int(match["whole"]) * int(10**places) + int(part.ljust(places, "0"))
    if amount > LARGEST:
        raise NotAnAmount(f"too large: {text[:40]!r}")
    return -amount if match["sign"] == "-" else amount
