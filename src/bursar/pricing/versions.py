"""Price versions as they are stored: the way between rows and values, and finding one by its id."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby
from typing import Any
from uuid import UUID

from bursar import db
from bursar.pricing.lists import Prices, Segment
from bursar.pricing.prices import PriceVersion, Rate, Variant
from bursar.problems import Problem

QUERIES = db.load_queries("bursar.pricing")

RateRow = tuple[int, str, int, dict[str, str], int, int, bool]
"""place, kind, above_input_tokens, condition, price_nano_usd, minimum, free"""


class PriceNotFound(Problem):
    """No price with this id, or for this model."""

    status, code, title = 404, "price_not_found", "No such price"


@dataclass(frozen=True, slots=True)
class VersionRow:
    """A row of pricing.versions (or an override in that form) with its rates."""

    price_version_id: UUID
    list_name: str
    provider: str
    model: str
    effective_from: datetime
    revision: int
    withdrawn: bool
    source: str
    rates: list[Any]

    @property
    def prices(self) -> Prices | None:
        """None where it says that there is no price any more."""
        return None if self.withdrawn else prices_of_rows(self.rates)

    def as_version(self) -> PriceVersion | None:
        """The price itself; None where it was withdrawn."""
        prices = self.prices
        if prices is None:
            return None
        return PriceVersion(
            price_version_id=self.price_version_id,
            list_name=self.list_name,
            provider=self.provider,
            model=self.model,
            effective_from=self.effective_from,
            rates=prices.rates,
            variants=prices.variants,
            source=self.source,
        )


def timeline(rows: Iterable[VersionRow]) -> list[Segment]:
    """rows: of one list and model, ascending by instant and revision. Of one instant the last revision counts."""
    by_instant = {row.effective_from: row for row in rows}
    return [Segment(row.effective_from, row.prices, row.source) for row in by_instant.values()]


def prices_of_rows(rows: Iterable[Any]) -> Prices:
    """rows: as pricing.rates_of returns them, ordered by place."""
    standard: list[Rate] = []
    variants: list[Variant] = []
    for place, of_place in groupby(rows, key=lambda row: row[0]):
        conditional = list(of_place)
        rates = tuple(
            Rate(kind, nano_usd, above, minimum, free) for _, kind, above, _, nano_usd, minimum, free in conditional
        )
        if place == 0:
            standard.extend(rates)
        else:
            variants.append(Variant(tuple(conditional[0][3].items()), rates))
    return Prices.of(standard, variants)


def rows_of_prices(prices: Prices) -> Iterator[RateRow]:
    """The rows of pricing.rates that hold these prices."""
    conditional = [((), prices.rates), *((variant.when, variant.rates) for variant in prices.variants)]
    for place, (when, rates) in enumerate(conditional):
        for rate in rates:
            yield place, rate.kind, rate.above_input_tokens, dict(when), rate.price_nano_usd, rate.minimum, rate.free


async def find_version(conn: db.Connection, *, price_version_id: UUID) -> PriceVersion:
    """The price that a request was priced with; also an override, for the organization that is set.

    Raises:
        PriceNotFound
    """
    row = await db.fetch_optional(conn, VersionRow, QUERIES.version, price_version_id=price_version_id)
    if row is None:
        row = await db.fetch_optional(conn, VersionRow, QUERIES.override_version, price_version_id=price_version_id)
    version = None if row is None else row.as_version()
    if version is None:
        raise PriceNotFound(f"There is no price {price_version_id}.")
    return version


async def prices_in_force(
    conn: db.Connection, *, at: datetime, provider: str | None = None, begins: str | None = None
) -> list[PriceVersion]:
    """The list price of every model at an instant, by provider and model; begins: how the model's name begins."""
    like = None if begins is None else begins.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
    rows = await db.fetch_all(conn, VersionRow, QUERIES.prices_in_force, at=at, provider=provider, like=like)
    return [version for row in rows if (version := row.as_version()) is not None]
