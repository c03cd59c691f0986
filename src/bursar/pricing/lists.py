"""A price list as a plain value, and what importing it would change.

A list says for each of its models what it costs from which instant on. The book keeps, for each list, everything that
list ever said. Importing compares the two from one instant on; what lies before it does not move.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime
from typing import Final, Literal

from bursar.pricing.models import ModelName, ProviderName, Rule
from bursar.pricing.prices import Rate, Variant, check_rates

ALWAYS: Final = datetime(1970, 1, 1, tzinfo=UTC)
"""Effective from here: the list knows no earlier price."""

Key = tuple[str, str]
"""(provider, model)"""


@dataclass(frozen=True, slots=True)
class Prices:
    """What a model costs: standard rates and conditional ones. Two with equal contents compare equal."""

    rates: tuple[Rate, ...]
    variants: tuple[Variant, ...] = ()

    def __post_init__(self) -> None:
        if not any((self.rates, *(variant.rates for variant in self.variants))):
            raise ValueError("no price at all")
        for rates in (self.rates, *(variant.rates for variant in self.variants)):
            check_rates(rates)

    @classmethod
    def of(cls, rates: Iterable[Rate], variants: Iterable[Variant] = ()) -> Prices:
        """In canonical order: rates sorted; variants keep their order, which decides."""
        return cls(
            tuple(sorted(rates)),
            tuple(Variant(tuple(sorted(each.when)), tuple(sorted(each.rates))) for each in variants),
        )


@dataclass(frozen=True, slots=True)
class Segment:
    """From an instant on; prices None: the list has no price any more."""

    effective_from: datetime
    prices: Prices | None
    source: str = field(default="", compare=False)


Timeline = Sequence[Segment]
"""Ascending by effective_from, one segment per instant."""


@dataclass(frozen=True, slots=True)
class ListedModel:
    """One model of a list. segments: ascending."""

    provider: str
    model: str
    rule: Rule
    segments: tuple[Segment, ...]
    context_window: int | None = None

    @property
    def key(self) -> Key:
        return (self.provider, self.model)


@dataclass(frozen=True, slots=True)
class PriceList:
    """A whole list. not_represented: what the source says and we cannot hold, by reason: ('provider/model', ...).

    tells_history: its dates in the past are true for models of which the book knows nothing yet (the shipped lists).
    """

    name: str
    title: str
    version: str
    date: date | None
    rank: int
    providers: tuple[ProviderName, ...]
    models: tuple[ListedModel, ...]
    not_represented: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    tells_history: bool = False

    def model_names(self) -> list[ModelName]:
        return [
            ModelName(each.provider, each.model, place, each.rule, each.context_window)
            for place, each in enumerate(self.models)
        ]

    def digest(self) -> bytes:
        """SHA-256 of what it says."""
        return hashlib.sha256(repr((self.providers, self.models)).encode()).digest()


@dataclass(frozen=True, slots=True)
class Difference:
    """One unit price that changes; None: there is none. when: the conditions of a conditional price."""

    kind: str
    above_input_tokens: int
    when: tuple[tuple[str, str], ...]
    old_nano_usd: int | None
    new_nano_usd: int | None


@dataclass(frozen=True, slots=True)
class Change:
    """What importing does to one model. segments: versions to add, ascending; empty when nothing changes."""

    provider: str
    model: str
    outcome: Literal["added", "changed", "unchanged"]
    segments: tuple[Segment, ...] = ()
    differences: tuple[Difference, ...] = ()


@dataclass(frozen=True, slots=True)
class Preview:
    """What importing a list changes. missing: models of the book that the list no longer names; they stay."""

    list_name: str
    effective_from: datetime
    changes: tuple[Change, ...]
    missing: tuple[Key, ...]
    not_represented: Mapping[str, tuple[str, ...]]

    def of(self, outcome: str) -> list[Change]:
        return [change for change in self.changes if change.outcome == outcome]

    @property
    def changes_prices(self) -> bool:
        return any(change.segments for change in self.changes)


def preview(
    listed: PriceList, own: Mapping[Key, Timeline], *, known: frozenset[Key], effective_from: datetime
) -> Preview:
    """Compare a list with what the book holds of it. own: this list's timelines; known: models of any list."""
    changes = []
    for model in listed.models:
        takes_past = listed.tells_history and model.key not in known
        start = ALWAYS if takes_past else effective_from
        changes.append(_compare(model, own.get(model.key, ()), start, effective_from))
    named = {model.key for model in listed.models}
    return Preview(
        list_name=listed.name,
        effective_from=effective_from,
        changes=tuple(changes),
        missing=tuple(sorted(own.keys() - named)),
        not_represented=listed.not_represented,
    )


def _compare(model: ListedModel, old: Timeline, start: datetime, effective_from: datetime) -> Change:
    new = tuple(segments_to_add(old, model.segments, start))
    if not new:
        return Change(model.provider, model.model, "unchanged")
    # What people compare is the price at the instant of the import, or the first that comes later.
    instant = (
        max(effective_from, new[0].effective_from) if old else max(effective_from, model.segments[0].effective_from)
    )
    before = prices_at(old, instant)
    after = prices_at(model.segments, instant)
    return Change(model.provider, model.model, "changed" if old else "added", new, tuple(differences(before, after)))


def segments_to_add(old: Timeline, new: Timeline, start: datetime) -> Iterator[Segment]:
    """Versions that make the book say what the list says, from `start` on; none where it does already.

    Where the list says nothing yet (its first segment begins later), the book stays as it is.
    """
    instants = {start} | {each.effective_from for each in (*old, *new) if each.effective_from > start}
    olds = {each.effective_from for each in old}
    current = prices_at(old, start)
    for instant in sorted(instants):
        if instant in olds:
            current = prices_at(old, instant)
        wanted = _segment_at(new, instant)
        if wanted is not None and wanted.prices != current:
            yield Segment(instant, wanted.prices, wanted.source)
            current = wanted.prices


def prices_at(timeline: Timeline, instant: datetime) -> Prices | None:
    """What a timeline says at an instant."""
    segment = _segment_at(timeline, instant)
    return None if segment is None else segment.prices


def _segment_at(timeline: Timeline, instant: datetime) -> Segment | None:
    found = None
    for segment in timeline:
        if segment.effective_from > instant:
            break
        found = segment
    return found


def differences(old: Prices | None, new: Prices | None) -> Iterator[Difference]:
    """Unit prices that differ, standard ones first."""
    before, after = _unit_prices(old), _unit_prices(new)
    for place in sorted(before.keys() | after.keys()):
        if before.get(place) != after.get(place):
            when, kind, above = place
            yield Difference(kind, above, when, before.get(place), after.get(place))


_Place = tuple[tuple[tuple[str, str], ...], str, int]


def _unit_prices(prices: Prices | None) -> dict[_Place, int]:
    """By (conditions, kind, threshold); of two variants with the same conditions the first counts."""
    if prices is None:
        return {}
    found: dict[_Place, int] = {((), rate.kind, rate.above_input_tokens): rate.price_nano_usd for rate in prices.rates}
    for variant in reversed(prices.variants):
        for rate in variant.rates:
            found[variant.when, rate.kind, rate.above_input_tokens] = rate.price_nano_usd
    return found
