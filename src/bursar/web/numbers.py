"""Numbers, days and changes as people read them: exact values in, rounded once, never a nonzero shown as nothing."""

from datetime import date, datetime
from enum import StrEnum
from typing import Final

from bursar.money import (
    MICROS_PER_CREDIT,
    NANO_USD_PER_USD,
    Micros,
    NanoUsd,
    divide_half_up,
    format_credits,
    format_usd,
    nano_usd_at_list_price,
)
from bursar.usage.figures import Change

MINUS: Final = "−"
_NANO_USD_PER_CENT: Final = NANO_USD_PER_USD // 100
_MICROS_PER_HUNDREDTH: Final = MICROS_PER_CREDIT // 100
_WEEKDAYS: Final = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_MONTHS: Final = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")


def count_text(count: int) -> str:
    """1234 -> '1,234'."""
    return f"{MINUS if count < 0 else ''}{abs(count):,}"


def requests_text(count: int) -> str:
    """'1 request', '1,234 requests'."""
    return f"{count_text(count)} request{'' if count == 1 else 's'}"


def credits_text(micros: Micros) -> str:
    """Whole credits, below ten with up to two decimals: '61,250 cr', '9.5 cr', '<0.01 cr'."""
    sign, size = (MINUS if micros < 0 else ""), abs(micros)
    if 0 < size < _MICROS_PER_HUNDREDTH:
        return f"{sign}<0.01 cr"
    hundredths = divide_half_up(size, _MICROS_PER_HUNDREDTH)
    if hundredths >= 1000:
        return f"{sign}{divide_half_up(size, MICROS_PER_CREDIT):,} cr"
    whole, part = divmod(hundredths, 100)
    decimals = f".{part:02d}".rstrip("0").rstrip(".")
    return f"{sign}{whole}{decimals} cr"


def usd_text(nano_usd: NanoUsd) -> str:
    """Dollars with two decimals: '$2,500.00', '−$3.10', '<$0.01'."""
    sign, size = (MINUS if nano_usd < 0 else ""), abs(nano_usd)
    if 0 < size < _NANO_USD_PER_CENT:
        return f"{sign}<$0.01"
    cents = divide_half_up(size, _NANO_USD_PER_CENT)
    return f"{sign}${cents // 100:,}.{cents % 100:02d}"


def money_text(micros: Micros) -> str:
    """Credits in dollars at list price."""
    return usd_text(nano_usd_at_list_price(micros))


def is_tiny(micros: Micros) -> bool:
    """Something, but less than a cent: a reader may want to see how much."""
    return 0 < abs(micros) < MICROS_PER_CREDIT


class Unit(StrEnum):
    """What costs are shown in: dollars at list price, or credits."""

    MONEY = "money"
    CREDITS = "credits"

    def amount(self, micros: Micros) -> str:
        """An amount in a card or table."""
        return money_text(micros) if self is Unit.MONEY else credits_text(micros)

    @property
    def sign(self) -> str:
        """What stands in the header of a column of bare amounts."""
        return "$" if self is Unit.MONEY else "cr"

    def bare(self, micros: Micros) -> str:
        """An amount without its unit, for a column whose header has it."""
        return self.amount(micros).replace("$", "").removesuffix(" cr")

    def exact(self, micros: Micros) -> str:
        """An amount with all the decimals it has, as beside an axis: '$50', '$0.002', '20 cr'."""
        size = Micros(abs(micros))
        text = format_credits(size) if self is Unit.CREDITS else format_usd(nano_usd_at_list_price(size))
        whole, _, decimals = text.partition(".")
        number = f"{int(whole):,}.{decimals}" if decimals.strip("0") else f"{int(whole):,}"
        sign = MINUS if micros < 0 else ""
        return f"{sign}{number} cr" if self is Unit.CREDITS else f"{sign}${number}"


def percent_text(permille: int | None) -> str:
    """124 -> '12.4%'; without a share a dash."""
    if permille is None:
        return "–"
    whole, tenth = divmod(abs(permille), 10)
    return f"{MINUS if permille < 0 else ''}{whole}.{tenth}%"


def share_text(permille: int | None, amount: int) -> str:
    """A share of a total; what is there at all is never 0.0%."""
    if permille == 0 and amount > 0:
        return "<0.1%"
    return percent_text(permille)


def direction(change: Change) -> str:
    """up, down or same."""
    return "up" if change.difference > 0 else "down" if change.difference < 0 else "same"


def change_text(change: Change) -> str:
    """'up 12.4%', 'down 3.0%', 'no change'; without a percentage, since there was nothing before, 'up'."""
    if change.difference == 0:
        return "no change"
    if change.permille is None:
        return direction(change)
    if change.permille == 0:
        return f"{direction(change)} <0.1%"
    return f"{direction(change)} {percent_text(abs(change.permille))}"


def difference_text(change: Change) -> str:
    """'up 2', 'down 1', 'no change'."""
    return "no change" if change.difference == 0 else f"{direction(change)} {count_text(abs(change.difference))}"


def day_text(day: date) -> str:
    """'Thu 12 Nov'."""
    return f"{_WEEKDAYS[day.weekday()]} {day.day} {_MONTHS[day.month - 1]}"


def short_day_text(day: date) -> str:
    """'12 Nov'."""
    return f"{day.day} {_MONTHS[day.month - 1]}"


def date_text(day: date) -> str:
    """'12 Nov 2026'."""
    return f"{short_day_text(day)} {day.year}"


def days_text(first: date, last: date) -> str:
    """'1–20 Nov', '28 Oct – 3 Nov', '5 Nov'."""
    if first == last:
        return short_day_text(first)
    if (first.year, first.month) == (last.year, last.month):
        return f"{first.day}–{short_day_text(last)}"
    return f"{short_day_text(first)} – {short_day_text(last)}"


def time_text(instant: datetime) -> str:
    """'14:02', on the clock of the instant's own zone."""
    return f"{instant:%H:%M}"
