"""Quotes of the price book for the whole of a demo's past, at hand without waiting."""

from bisect import bisect_right
from collections.abc import Iterable
from datetime import datetime
from typing import Self
from uuid import UUID

from bursar.demo.requests import Model
from bursar.pricing.book import PriceBook, Quote


class PastQuotes:
    """How each model was priced for one organization, from an instant until another."""

    def __init__(self, quotes: dict[Model, list[Quote]]) -> None:
        self._quotes = quotes
        self._starts = {model: [quote.valid_from for quote in of_model] for model, of_model in quotes.items()}

    @classmethod
    async def load(
        cls, book: PriceBook, *, organization_id: UUID, models: Iterable[Model], since: datetime, until: datetime
    ) -> Self:
        """Read them all.

        Raises:
            ModelNotPriced
        """
        quotes: dict[Model, list[Quote]] = {}
        for model in models:
            at: datetime | None = since
            of_model = quotes[model] = []
            while at is not None and at <= until:
                quote = await book.quote(
                    organization_id=organization_id, provider=model.provider, model=model.name, at=at
                )
                of_model.append(quote)
                at = quote.valid_until
        return cls(quotes)

    def __call__(self, model: Model, at: datetime) -> Quote:
        quote = self._quotes[model][bisect_right(self._starts[model], at) - 1]
        assert quote.holds(at), f"no quote of {model} was loaded for {at}"
        return quote
