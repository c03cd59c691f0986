"""What a request comes to: pure functions of a price and a usage, in exact integers.

A unit price is a whole number of nano-dollars per `PER[kind]`, the amount in which vendors quote that kind: a million
tokens, a thousand searches, one image, one hour of sound. All sums are taken over the one common denominator SCALE, so
nothing is rounded before the end, and each result is rounded once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, time
from enum import Enum
from fractions import Fraction
from functools import cache
from itertools import groupby
from math import lcm
from operator import mul
from typing import Final
from uuid import UUID

from bursar.money import NANO_USD_PER_MICRO, Micros, NanoUsd, divide_half_up, divide_up
from bursar.pricing.usage import (
    AUDIO_INPUT_TOKENS,
    AUDIO_OUTPUT_TOKENS,
    CACHE_READ_TOKENS,
    CACHE_WRITE_1H_TOKENS,
    CACHE_WRITE_5M_TOKENS,
    IMAGE_INPUT_TOKENS,
    IMAGE_OUTPUT_TOKENS,
    INPUT_TOKENS,
    OUTPUT_TOKENS,
    REASONING_TOKENS,
    REQUESTS,
    USAGE_KINDS,
    Usage,
    UsageArray,
)

_MILLION: Final = 1_000_000
PER: Final[Mapping[str, int]] = {
    **{kind: _MILLION for kind in USAGE_KINDS if kind.endswith("_tokens")},
    "images": 1,
    "web_searches": 1000,
    "audio_milliseconds": 3_600_000,
    "characters": _MILLION,
    "requests": 1,
    "file_searches": 1000,
    "code_sessions": 1,
}
"""For how many of a kind its unit price is. The table pricing.kinds holds the same."""

UNITS: Final[Mapping[str, str]] = {
    **{kind: "1M tokens" for kind in USAGE_KINDS if kind.endswith("_tokens")},
    "images": "image",
    "web_searches": "1K searches",
    "audio_milliseconds": "hour",
    "characters": "1M characters",
    "requests": "request",
    "file_searches": "1K searches",
    "code_sessions": "session",
}
"""The same in words, as price files name it."""

SCALE: Final = lcm(*PER.values())
PAR_PPM: Final = 1_000_000
"""Mark-up 1.0, in parts per million."""

BATCH: Final[Mapping[str, str]] = {"processing": "batch", "service_tier": "batch"}
"""Context of a request inside a batch, in the words of every price list."""

_CALLS: Final = frozenset(("requests", "web_searches", "file_searches", "code_sessions"))
"""What costs inside a batch what it costs anywhere. Source: Anthropic, "Web search tool", on batches."""

UTC_TIME: Final = "utc_time"
MOST_CONTEXTS: Final = 256
"""The one condition that the clock decides, not the request: '00:30-16:30', UTC, the end excluded."""

_WINDOW: Final = re.compile(r"((?:[01]\d|2[0-3]):[0-5]\d)-((?:[01]\d|2[0-3]):[0-5]\d)", re.ASCII)

# What a kind is billed as when it has no price of its own, as providers do: cached input is input, thinking is output.
_BILLED_AS: Final = {
    CACHE_READ_TOKENS: INPUT_TOKENS,
    CACHE_WRITE_5M_TOKENS: INPUT_TOKENS,
    CACHE_WRITE_1H_TOKENS: CACHE_WRITE_5M_TOKENS,
    REASONING_TOKENS: OUTPUT_TOKENS,
    AUDIO_INPUT_TOKENS: INPUT_TOKENS,
    IMAGE_INPUT_TOKENS: INPUT_TOKENS,
    AUDIO_OUTPUT_TOKENS: OUTPUT_TOKENS,
    IMAGE_OUTPUT_TOKENS: OUTPUT_TOKENS,
}

Context = Mapping[str, str]
"""What a request asked for that changes its price: {'service_tier': 'flex'}, {'size': '1024x1024', 'quality': 'hd'}."""


class Rounding(Enum):
    """How an exact amount becomes an integer: half-up for what is charged, up for what is held."""

    HALF_UP = "half_up"
    UP = "up"

    def divide(self, numerator: int, denominator: int) -> int:
        return divide_up(numerator, denominator) if self is Rounding.UP else divide_half_up(numerator, denominator)


@dataclass(frozen=True, slots=True, order=True)
class Rate:
    """The unit price of one kind.

    above_input_tokens: the price holds for the whole request when its input, cached or not, is longer than this.
    minimum: a count above zero is billed as at least this many (milliseconds of sound, say).
    free: a price of zero is meant. Nothing costs zero by accident.
    """

    kind: str
    price_nano_usd: int
    above_input_tokens: int = 0
    minimum: int = 0
    free: bool = False

    def __post_init__(self) -> None:
        if self.kind not in PER:
            raise ValueError(f"no such kind: {self.kind!r}")
        if self.price_nano_usd < 0 or self.above_input_tokens < 0 or self.minimum < 0:
            raise ValueError(f"a price of {self.kind} below zero")
        if (self.price_nano_usd == 0) != self.free:
            raise ValueError(f"{self.kind}: a price of zero is marked free, and no other price is")


def check_rates(rates: Iterable[Rate]) -> None:
    """Each kind has one rate per tier, and one that holds for short requests.

    Raises:
        ValueError
    """
    seen: set[tuple[str, int]] = set()
    for rate in rates:
        if (rate.kind, rate.above_input_tokens) in seen:
            raise ValueError(f"two prices of {rate.kind} above {rate.above_input_tokens} input tokens")
        seen.add((rate.kind, rate.above_input_tokens))
    for kind, _ in seen:
        if (kind, 0) not in seen:
            raise ValueError(f"{kind} has a long-context price but none for short requests")


@dataclass(frozen=True, slots=True)
class Variant:
    """Rates that replace the standard ones, kind by kind, where every condition holds."""

    when: tuple[tuple[str, str], ...]
    rates: tuple[Rate, ...]

    def __post_init__(self) -> None:
        if not self.when:
            raise ValueError("a variant without conditions is the standard price")

    @property
    def is_for_batches(self) -> bool:
        """Whether these are prices of batches."""
        return any(condition in BATCH.items() for condition in self.when)

    def holds(self, context: Context, at: datetime | None) -> bool:
        return all(_in_window(value, at) if key == UTC_TIME else context.get(key) == value for key, value in self.when)


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """What one model of one provider costs from one instant on; never changed, only followed by another.

    rates: the standard price. variants: in order of precedence; for each kind the first that holds counts.
    """

    price_version_id: UUID
    list_name: str
    provider: str
    model: str
    effective_from: datetime
    rates: tuple[Rate, ...]
    variants: tuple[Variant, ...] = ()
    source: str = ""
    _compiled: dict[tuple[int, ...], _Table] = field(default_factory=dict, init=False, repr=False, compare=False)
    _has_times: bool = field(default=False, init=False, repr=False, compare=False)
    _by_context: dict[frozenset[tuple[str, str]], tuple[int, ...]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        for rates in (self.rates, *(variant.rates for variant in self.variants)):
            check_rates(rates)
        times = any(key == UTC_TIME for variant in self.variants for key, _ in variant.when)
        object.__setattr__(self, "_has_times", times)

    def tells(self, key: str, value: str) -> bool:
        """Whether some price of this version is for that condition."""
        return any((key, value) in variant.when for variant in self.variants)

    def unpriced_kinds(self, usage: Usage, *, context: Context | None = None, at: datetime | None = None) -> list[str]:
        """Kinds that were used and for which this price says nothing, so that they would come to zero by accident."""
        return self._table(context, at).unpriced(usage.as_array())

    def _table(self, context: Context | None, at: datetime | None) -> _Table:
        """The rates that hold for a request, prepared for multiplying; at: only needed where a time of day matters."""
        active = self._active(context or {}, at) if self.variants else ()
        table = self._compiled.get(active)
        if table is None:
            table = self._compiled[active] = _compile(self.rates, [self.variants[place].rates for place in active])
        return table

    def _batch_table(self, batch_ppm: int, context: Context | None, at: datetime | None) -> _Table:
        """As `_table`, of a request inside a batch: its weights are x PAR_PPM.

        A kind that has a batch price costs that; any other kind of token, sound or image costs batch_ppm of its price.
        """
        active = self._active({**(context or {}), **BATCH}, at) if context is not None else ()
        place = (-batch_ppm, *active)
        table = self._compiled.get(place)
        if table is None:
            overrides = [self.variants[each] for each in active]
            table = self._compiled[place] = _compile(
                _scaled(self.rates, batch_ppm),
                [_scaled(each.rates, PAR_PPM if each.is_for_batches else batch_ppm) for each in overrides],
            )
        return table

    def _active(self, context: Context, at: datetime | None) -> tuple[int, ...]:
        """Places of the variants that hold; remembered, unless one goes by the time of day."""
        if self._has_times:
            return self._holding(context, at)
        if not context:
            return ()  # every variant has a condition
        key = frozenset(context.items())
        found = self._by_context.get(key)
        if found is None:
            if len(self._by_context) >= MOST_CONTEXTS:  # clients write them
                self._by_context.clear()
            found = self._by_context[key] = self._holding(context, at)
        return found

    def _holding(self, context: Context, at: datetime | None) -> tuple[int, ...]:
        return tuple(place for place, variant in enumerate(self.variants) if variant.holds(context, at))


@dataclass(frozen=True, slots=True)
class Priced:
    """What a request comes to. unpriced_kinds: what was used without a price, and so is in neither amount."""

    charged_micros: Micros
    provider_cost_nano_usd: NanoUsd
    unpriced_kinds: tuple[str, ...] = ()


def price(
    version: PriceVersion,
    usage: Usage,
    markup_ppm: int = PAR_PPM,
    *,
    context: Context | None = None,
    at: datetime | None = None,
    rounding: Rounding = Rounding.HALF_UP,
) -> Priced:
    """What the provider asks, and what is charged for it at a mark-up; each rounded once, from the exact amount.

    context, at: what the request asked for and when, where the price depends on that.
    """
    return price_apart(version, version, usage, markup_ppm, context=context, at=at, rounding=rounding)


def exact_nano_usd(
    version: PriceVersion, usage: Usage, *, context: Context | None = None, at: datetime | None = None
) -> Fraction:
    """What the provider asks, in nano-dollars, before any rounding."""
    return Fraction(version._table(context, at).amount(usage.as_array(), usage.total_input_tokens), SCALE)


def price_apart(
    cost: PriceVersion,
    charge: PriceVersion,
    usage: Usage,
    markup_ppm: int = PAR_PPM,
    *,
    context: Context | None = None,
    at: datetime | None = None,
    rounding: Rounding = Rounding.HALF_UP,
) -> Priced:
    """As `price`, where a customer has a price of its own: the cost by one version, the charge by another."""
    counts = usage.as_array()
    charge_table = charge._table(context, at)
    charged = charge_table.amount(counts, usage.total_input_tokens)
    spent = charged if cost is charge else cost._table(context, at).amount(counts, usage.total_input_tokens)
    return Priced(
        charged_micros=Micros(rounding.divide(charged * markup_ppm, SCALE * NANO_USD_PER_MICRO * PAR_PPM)),
        provider_cost_nano_usd=NanoUsd(rounding.divide(spent, SCALE)),
        unpriced_kinds=tuple(charge_table.unpriced(counts)),
    )


def price_in_batch(
    cost: PriceVersion,
    charge: PriceVersion,
    usage: Usage,
    markup_ppm: int = PAR_PPM,
    *,
    batch_ppm: int,
    context: Context | None = None,
    at: datetime | None = None,
    rounding: Rounding = Rounding.HALF_UP,
) -> Priced:
    """As `price_apart`, of a request inside a batch.

    batch_ppm: what a kind without a batch price costs there, in millionths of its usual price; from 1 to PAR_PPM.
    context: None where the price is not the provider's own, so that its conditions say nothing.
    """
    assert 0 < batch_ppm <= PAR_PPM
    counts = usage.as_array()
    charge_table = charge._batch_table(batch_ppm, context, at)
    charged = charge_table.amount(counts, usage.total_input_tokens)
    spent = cost._batch_table(batch_ppm, context, at).amount(counts, usage.total_input_tokens)
    return Priced(
        charged_micros=Micros(rounding.divide(charged * markup_ppm, SCALE * NANO_USD_PER_MICRO * PAR_PPM * PAR_PPM)),
        provider_cost_nano_usd=NanoUsd(rounding.divide(spent, SCALE * PAR_PPM)),
        unpriced_kinds=tuple(charge_table.unpriced(counts)),
    )


@dataclass(frozen=True, slots=True)
class _Table:
    """Rates made ready: one row of weights (nano-dollars x SCALE per unit) for each tier, in the order of USAGE_KINDS.

    tiers: (above_input_tokens, weights), the highest first; the last one is above 0 and always holds.
    without_price: places of kinds that no rate covers. minimums: (place, least count).
    """

    tiers: tuple[tuple[int, tuple[int, ...]], ...]
    without_price: tuple[int, ...]
    minimums: tuple[tuple[int, int], ...]

    def amount(self, counts: UsageArray, total_input_tokens: int) -> int:
        """Exact nano-dollars x SCALE."""
        weights = self.tiers[-1][1]
        for above, dearer in self.tiers[:-1]:
            if total_input_tokens > above:
                weights = dearer
                break
        total: int = sum(map(mul, counts, weights))
        for place, least in self.minimums:
            if 0 < counts[place] < least:
                total += (least - counts[place]) * weights[place]
        return total

    def unpriced(self, counts: UsageArray) -> list[str]:
        return [USAGE_KINDS[place] for place in self.without_price if counts[place]]


def _scaled(rates: Iterable[Rate], ppm: int) -> tuple[Rate, ...]:
    """Rates x PAR_PPM of a batch that costs so many millionths; tools and calls cost what they cost anywhere."""
    return tuple(
        replace(rate, price_nano_usd=rate.price_nano_usd * (PAR_PPM if rate.kind in _CALLS else ppm)) for rate in rates
    )


def _compile(standard: Iterable[Rate], overrides: Iterable[Iterable[Rate]]) -> _Table:
    """Rates by kind, the first override before later ones before the standard; then weights per tier."""
    by_kind: dict[str, list[Rate]] = {}
    for rates in [*overrides, standard]:
        for kind, of_kind in groupby(sorted(rates), key=lambda rate: rate.kind):
            by_kind.setdefault(kind, sorted(of_kind, key=lambda rate: rate.above_input_tokens))
    thresholds = sorted({0} | {rate.above_input_tokens for rates in by_kind.values() for rate in rates}, reverse=True)
    return _Table(
        tiers=tuple((above, _weights(by_kind, above)) for above in thresholds),
        without_price=tuple(
            place for place, rates in enumerate(_rates_by_place(by_kind)) if rates is None and place != REQUESTS
        ),
        minimums=tuple(
            (USAGE_KINDS.index(kind), rates[0].minimum) for kind, rates in by_kind.items() if rates[0].minimum
        ),
    )


def _rates_by_place(by_kind: Mapping[str, list[Rate]]) -> list[list[Rate] | None]:
    """For each kind the rates that it is billed by: its own, else those of the kind it is billed as."""
    found: list[list[Rate] | None] = []
    for place in range(len(USAGE_KINDS)):
        billed_as: int | None = place
        while billed_as is not None and USAGE_KINDS[billed_as] not in by_kind:
            billed_as = _BILLED_AS.get(billed_as)
        found.append(None if billed_as is None else by_kind[USAGE_KINDS[billed_as]])
    return found


def _weights(by_kind: Mapping[str, list[Rate]], above: int) -> tuple[int, ...]:
    """Weights of the tier of requests whose input is longer than `above`."""
    weights = [
        0 if rates is None else _in_tier(rates, above) * (SCALE // PER[rates[0].kind])
        for rates in _rates_by_place(by_kind)
    ]
    # Reasoning is counted inside the output, so its weight is only what it costs more (or less) than output.
    weights[REASONING_TOKENS] -= weights[OUTPUT_TOKENS]
    return tuple(weights)


def _in_tier(rates: list[Rate], above: int) -> int:
    """Nano-dollars of the highest tier that begins at or below `above`; rates: ascending by threshold."""
    return max((rate for rate in rates if rate.above_input_tokens <= above), key=_threshold).price_nano_usd


def _threshold(rate: Rate) -> int:
    return rate.above_input_tokens


def check_window(window: str) -> None:
    """Is this 'HH:MM-HH:MM'?

    Raises:
        ValueError
    """
    _edges(window)


def _in_window(window: str, at: datetime | None) -> bool:
    """Is the instant inside 'HH:MM-HH:MM' UTC? A window may pass midnight."""
    if at is None:
        raise ValueError("this price depends on the time of day; say when")
    start, stop = _edges(window)
    moment = at.astimezone(UTC).time()
    return start <= moment < stop if start <= stop else moment >= start or moment < stop


@cache
def _edges(window: str) -> tuple[time, time]:
    match = _WINDOW.fullmatch(window)
    if match is None:
        raise ValueError(f"not a time of day: {window!r}; write 00:30-16:30")
    return time.fromisoformat(match[1]), time.fromisoformat(match[2])
