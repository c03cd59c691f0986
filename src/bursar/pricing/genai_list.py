"""The price list of the library genai-prices as a PriceList. Nothing else imports the library; no request ever does.

Vendors bill their own tools alike for all models that may use them. What the library lacks of that is in `tools.json`
beside, and is added to each model of the vendor that the library has a price of searches for.

Source: https://github.com/pydantic/genai-prices (MIT). Its prices are decimal dollars per unit, tiers replace the price
of the whole request above a number of input tokens, conditional prices begin on a UTC date or hold in a daily window
(the last that is active counts), variants hold for a request's context (for each kind the first that fits counts).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from decimal import ROUND_HALF_UP, Decimal
from importlib.metadata import version
from importlib.resources import files as resources
from typing import TYPE_CHECKING, Final

from bursar.pricing import files
from bursar.pricing.lists import ALWAYS, ListedModel, PriceList, Prices, Segment
from bursar.pricing.models import ProviderName, Rule
from bursar.pricing.prices import PER, UTC_TIME, Rate, Variant

if TYPE_CHECKING:
    from genai_prices import types

LIST_NAME: Final = "genai-prices"
RANK: Final = 10
CONVERSION: Final = 2
"""Raised when this file reads the same list differently or tools.json changes, so that the list is imported again."""

# The library's price keys that we can hold, and the kind of each.
_KINDS: Final[Mapping[str, str]] = {
    "input_mtok": "input_tokens",
    "cache_read_mtok": "cache_read_tokens",
    "cache_write_mtok": "cache_write_5m_tokens",
    "cache_write_1h_mtok": "cache_write_1h_tokens",
    "output_mtok": "output_tokens",
    "output_reasoning_mtok": "reasoning_tokens",
    "input_audio_mtok": "audio_input_tokens",
    "output_audio_mtok": "audio_output_tokens",
    "input_image_mtok": "image_input_tokens",
    "output_image_mtok": "image_output_tokens",
    "web_searches_kcount": "web_searches",
    "storage_searches_kcount": "file_searches",
    "audio_hours": "audio_milliseconds",
    "input_audio_hours": "audio_milliseconds",
    "input_mchars": "characters",
    "requests_kcount": "requests",
}
_TOOLS: Final = ("web_searches", "file_searches")
_REQUESTS_PER_PRICE: Final = 1000
_USD: Final = 1_000_000_000
# The library bills these two as ten seconds at least, in its code and not in its data.
_LEAST_MILLISECONDS: Final = {("groq", "whisper-large-v3"): 10_000, ("groq", "whisper-large-v3-turbo"): 10_000}


def list_version() -> str:
    """Version of the installed list, without loading it."""
    return f"{version('genai-prices')}+{CONVERSION}"


def load(today: date) -> PriceList:
    """Read the installed list; takes about half a second, and gives its memory back afterwards."""
    try:
        return _as_price_list(importlib.import_module("genai_prices.data").providers, today)
    finally:
        sys.modules.pop("genai_prices.data", None)


def _as_price_list(providers: Sequence[types.Provider], today: date) -> PriceList:
    notes = _Notes()
    models = tuple(_listed_models(providers, notes))
    begun = [each.effective_from.date() for model in models for each in model.segments]
    return PriceList(
        name=LIST_NAME,
        title="genai-prices, the public list of providers' prices",
        version=list_version(),
        # The library has no date: the newest change that it dates and that has come is the best we know.
        date=max((day for day in begun if day <= today and day > ALWAYS.date()), default=None),
        rank=RANK,
        providers=tuple(_provider_name(each, place) for place, each in enumerate(providers)),
        models=models,
        not_represented=notes.as_mapping(),
        tells_history=True,
    )


@dataclass
class _Notes:
    """What could not be held: reason -> 'provider/model'."""

    found: dict[str, dict[str, None]] = field(default_factory=dict)

    def add(self, reason: str, model: str) -> None:
        self.found.setdefault(reason, {})[model] = None

    def as_mapping(self) -> dict[str, tuple[str, ...]]:
        return {reason: tuple(models) for reason, models in sorted(self.found.items())}


def _provider_name(provider: types.Provider, place: int) -> ProviderName:
    rule = None if provider.provider_match is None else _rule(provider.provider_match)
    return ProviderName(provider.id, place, rule, tuple(provider.fallback_model_providers or ()))


def _listed_models(providers: Iterable[types.Provider], notes: _Notes) -> Iterator[ListedModel]:
    """Every model, in the library's order; also those without a usable price, since names are found in order."""
    tools = _tool_prices()
    for provider in providers:
        source = (provider.pricing_urls or [""])[0]
        for model in provider.models:
            yield ListedModel(
                provider=provider.id,
                model=model.id,
                rule=_rule(model.match),
                segments=tuple(
                    Segment(each.effective_from, _with_tools(each.prices, tools.get(provider.id)), each.source)
                    for each in _segments(provider.id, model, source, notes)
                ),
                context_window=model.context_window,
            )


def _tool_prices() -> dict[str, Prices]:
    """What each vendor asks for its tools, by tools.json."""
    read = files.read(resources("bursar.pricing").joinpath("tools.json").read_text(encoding="utf-8"))
    assert not read.errors, read.errors
    return {each.provider: each.segments[0].prices for each in read.prices.models if each.segments[0].prices}


def _with_tools(prices: Prices | None, tools: Prices | None) -> Prices | None:
    """The price of a model that may use the vendor's tools, with those that the library does not price."""
    if prices is None or tools is None or not any(rate.kind in _TOOLS for rate in prices.rates):
        return prices
    known = {rate.kind for rate in prices.rates}
    lacking = [rate for rate in tools.rates if rate.kind not in known]
    variants = [each for each in tools.variants if not known & {rate.kind for rate in each.rates}]
    return Prices.of([*prices.rates, *lacking], [*prices.variants, *variants])


def _rule(match: types.MatchLogic) -> Rule:
    """The library's clause in its JSON form; a clause has one field, named like its key ('or_' for 'or')."""
    ((name, value),) = vars(match).items()
    return {name.rstrip("_"): [_rule(each) for each in value] if isinstance(value, list) else value}


def _segments(provider: str, model: types.ModelInfo, source: str, notes: _Notes) -> Iterator[Segment]:
    """One segment for each instant at which the price of a model may change."""
    convert = _Conversion(f"{provider}/{model.id}", _LEAST_MILLISECONDS.get((provider, model.id), 0), notes)
    last: Prices | None = None
    for instant in sorted({ALWAYS, *(_midnight(day) for day in _start_dates(model))}):
        prices = _prices_at(model, instant, convert)
        if prices != last:
            yield Segment(instant, prices, source)
            last = prices
    if last is None:
        notes.add("no price that we can hold", f"{provider}/{model.id}")


def _start_dates(model: types.ModelInfo) -> Iterator[date]:
    constrained = [*(model.prices if isinstance(model.prices, list) else ()), *(model.price_variants or ())]
    for each in constrained:
        day = getattr(each.constraint, "start_date", None)
        if day is not None:
            yield day


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), tzinfo=UTC)


def _prices_at(model: types.ModelInfo, instant: datetime, convert: _Conversion) -> Prices | None:
    """The price from an instant (a UTC midnight) on: standard, context variants, then daily windows."""
    standard, windows = _standard_and_windows(model, instant)
    rates = convert.rates(standard)
    if not rates:
        return None
    variants = [
        Variant(when, conditional)
        for when, prices in (*_context_variants(model, instant), *windows)
        if (conditional := convert.rates(prices))
    ]
    return Prices.of(rates, variants)


_Conditional = tuple[tuple[tuple[str, str], ...], "types.ModelPrice"]


def _standard_and_windows(model: types.ModelInfo, instant: datetime) -> tuple[types.ModelPrice, list[_Conditional]]:
    """The price that is active without regard to the time of day, and the daily windows that go before it."""
    if not isinstance(model.prices, list):
        return model.prices, []
    windows: list[_Conditional] = []
    for each in reversed(model.prices):
        window = _window(each.constraint)
        if window is not None:
            windows.append((((UTC_TIME, window),), each.prices))
        elif each.constraint is None or each.constraint.active(instant):
            return each.prices, windows
    return model.prices[0].prices, windows


def _context_variants(model: types.ModelInfo, instant: datetime) -> Iterator[_Conditional]:
    for each in model.price_variants or ():
        window = _window(each.constraint)
        if window is not None:
            yield (*each.when.items(), (UTC_TIME, window)), each.prices
        elif each.constraint is None or each.constraint.active(instant):
            yield tuple(each.when.items()), each.prices


def _window(constraint: object) -> str | None:
    """'00:30-16:30' of a daily window; None for any other constraint."""
    start, end = getattr(constraint, "start_time", None), getattr(constraint, "end_time", None)
    if start is None or end is None:
        return None
    return f"{_utc(start):%H:%M}-{_utc(end):%H:%M}"


def _utc(moment: time) -> time:
    aware = moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)
    return datetime.combine(ALWAYS.date(), aware).astimezone(UTC).time()


@dataclass(frozen=True, slots=True)
class _Conversion:
    """Turns the prices of one model into rates and notes what it has to leave out."""

    model: str
    least_milliseconds: int
    notes: _Notes

    def rates(self, prices: types.ModelPrice) -> tuple[Rate, ...]:
        """One rate per kind and tier, sorted; empty when nothing can be held."""
        found: dict[tuple[str, int], Rate] = {}
        for key, value in vars(prices).items():
            kind = _KINDS.get(key)
            if value is None:
                continue
            if kind is None:
                self.notes.add(f"unit {key}", self.model)
                continue
            for rate in self._tiers(kind, _units_per_price(key), value):
                other = found.setdefault((kind, rate.above_input_tokens), rate)
                if other != rate:
                    raise ValueError(f"{self.model}: two prices of {kind}: {other}, {rate}")
        return tuple(sorted(found.values()))

    def _tiers(self, kind: str, per: int, value: Decimal | types.TieredPrices) -> Iterator[Rate]:
        if isinstance(value, Decimal):
            yield self._rate(kind, per, value, 0)
            return
        yield self._rate(kind, per, value.base, 0)
        for tier in value.tiers:
            yield self._rate(kind, per, tier.price, tier.start)

    def _rate(self, kind: str, per: int, usd: Decimal, above: int) -> Rate:
        exact = usd * _USD * PER[kind] / per
        # Never down to nothing: a price that is not zero stays one.
        nano_usd = max(int(exact.quantize(Decimal(1), ROUND_HALF_UP)), 1 if usd else 0)
        if nano_usd != exact:
            self.notes.add("rounded to nine decimal places", self.model)
        least = self.least_milliseconds if kind == "audio_milliseconds" else 0
        return Rate(kind, nano_usd, above, minimum=least, free=nano_usd == 0)


def _units_per_price(key: str) -> int:
    """For how many of our units the library's price is."""
    return _REQUESTS_PER_PRICE if key == "requests_kcount" else PER[_KINDS[key]]
