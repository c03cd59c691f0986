"""Requests that come to an exact sum: random ones of several kinds, then one whose tokens close what is left.

Every request is priced by the price book; no amount is made up. What is left at the end is met by choosing token counts
of a model whose price per token divides it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

from bursar.money import Micros
from bursar.pricing.book import Quote
from bursar.pricing.prices import Priced
from bursar.pricing.usage import Usage

LONGEST_INPUT: Final = 98_000
"""Under every long-context tier, so that a request's price does not jump with its last token."""
LONGEST_OUTPUT: Final = 32_000
CACHE_BLOCK: Final = 128
"""OpenAI counts cached tokens in blocks of so many; in even blocks every price per token comes to whole micros."""

SMALLEST_REST: Final = 300_000
LARGEST_REST: Final = 4_000_000
_MOST_BLOCKS: Final = 64
_SAMPLES: Final = 32
_SMALLEST: Final = 0.05
_LARGEST: Final = 20.0


@dataclass(frozen=True, slots=True)
class Model:
    """A model and the provider that serves it."""

    provider: str
    name: str

    @property
    def writes_cache(self) -> bool:
        """Whether writing to the cache is billed."""
        return self.provider == "anthropic"

    @property
    def thinks(self) -> bool:
        """Whether part of its output is reasoning."""
        return self.name.startswith("gpt-5")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of work. Token counts are medians; spread is that of a lognormal distribution, in tenths."""

    input_tokens: int
    cached_tokens: int
    output_tokens: int
    spread: int = 6
    is_streamed: bool = True


CHAT: Final = Kind(1_400, 0, 550)
AGENT: Final = Kind(6_000, 52_000, 2_600, spread=5)
REPORT: Final = Kind(38_000, 6_000, 2_200, spread=5)
SORTING: Final = Kind(700, 0, 40, spread=4, is_streamed=False)


@dataclass(frozen=True, slots=True)
class Choice:
    """A model, what it is used for, and how often. Used from `since` to `until` months ago (0: still)."""

    model: Model
    kind: Kind
    weight: int
    since: int = 99
    until: int = 0


Mix = Sequence[Choice]
Quotes = Callable[[Model, datetime], Quote]


@dataclass(frozen=True, slots=True)
class Request:
    """One priced request."""

    used_at: datetime
    model: Model
    usage: Usage
    priced: Priced
    price_version_id: UUID
    is_streamed: bool


@dataclass(slots=True)
class Generator:
    """Draws requests. months_ago: for an instant, how many calendar months ago it was.

    is_exact: False where a mark-up leaves no model whose charges could close a sum; then it is only nearly met.
    """

    rng: random.Random
    quotes: Quotes
    mix: Mix
    closing: Sequence[Model]
    months_ago: Callable[[datetime], int]
    is_exact: bool = True
    _choices: dict[int, list[Choice]] = field(default_factory=dict)

    def size(self, amount: Micros, count: int, at: datetime) -> float:
        """By how much requests are larger than usual, so that `count` of them come to about `amount`."""
        size = 1.0
        for _ in range(2):  # the second time for what the longest requests are cut by
            usual = sum(self._one(at, size).priced.charged_micros for _ in range(_SAMPLES)) / _SAMPLES
            size = min(_LARGEST, max(_SMALLEST, size * amount / count / usual))
        return size

    def requests(self, amount: Micros, instants: Iterator[datetime], size: float) -> list[Request]:
        """Requests at these instants that come to exactly `amount`, in no order.

        amount: at least SMALLEST_REST. instants: as many as are asked for.

        Raises:
            ValueError: no closing model can come to what is left.
        """
        assert amount >= SMALLEST_REST, f"{amount} micros are too few for a request"
        made: list[Request] = []
        left = amount
        while left > LARGEST_REST:
            request = self._draw(next(instants), size, left)
            left = Micros(left - request.priced.charged_micros)
            made.append(request)
        if self.is_exact:
            made.append(close(self.quotes, self.closing, left, next(instants)))
            assert sum(request.priced.charged_micros for request in made) == amount
        return made

    def _draw(self, at: datetime, size: float, left: Micros) -> Request:
        """A request after which there is something left to close; one that is too large is made to fit."""
        request = self._one(at, size)
        charged = request.priced.charged_micros
        if charged > left - SMALLEST_REST:
            usage = _scaled(request.usage, left - LARGEST_REST // 2, charged)
            request = _priced(self.quotes, request.model, usage, at, is_streamed=request.is_streamed)
        assert request.priced.charged_micros <= left - SMALLEST_REST
        return request

    def _one(self, at: datetime, size: float) -> Request:
        months = self.months_ago(at)
        if months not in self._choices:
            self._choices[months] = [each for each in self.mix if each.since >= months >= each.until]
        choices = self._choices[months]
        choice = self.rng.choices(choices, [each.weight for each in choices])[0]
        return _priced(self.quotes, choice.model, self._usage(choice, size), at, is_streamed=choice.kind.is_streamed)

    def _usage(self, choice: Choice, size: float) -> Usage:
        kind = choice.kind
        written = 0
        cached = self._count(kind.cached_tokens, kind, size, LONGEST_INPUT * 3 // 4)
        if cached and choice.model.writes_cache:
            written = cached // 16 // 4 * 4
        output = max(4, self._count(kind.output_tokens, kind, size, LONGEST_OUTPUT))
        return Usage(
            input_tokens=max(8, self._count(kind.input_tokens, kind, size, LONGEST_INPUT // 5)),
            cache_read_tokens=cached // CACHE_BLOCK * CACHE_BLOCK,
            cache_write_5m_tokens=written,
            output_tokens=output,
            reasoning_tokens=output * 2 // 5 if choice.model.thinks else 0,
        )

    def _count(self, median: int, kind: Kind, size: float, most: int) -> int:
        if not median:
            return 0
        return min(most, int(size * median * self.rng.lognormvariate(0, kind.spread / 10)))


def close(quotes: Quotes, models: Sequence[Model], amount: Micros, at: datetime) -> Request:
    """A request that comes to exactly `amount`, of the first model that can.

    Raises:
        ValueError: none can.
    """
    for model in models:
        usage = _closing_usage(quotes(model, at), amount, at)
        if usage is not None:
            request = _priced(quotes, model, usage, at, is_streamed=False)
            assert request.priced.charged_micros == amount
            return request
    raise ValueError(f"no closing model can come to {amount} micros")


def _priced(quotes: Quotes, model: Model, usage: Usage, at: datetime, *, is_streamed: bool) -> Request:
    quote = quotes(model, at)
    assert quote.price_version_id is not None, f"{model} has no price"
    return Request(at, model, usage, quote.price(usage, at=at), quote.price_version_id, is_streamed)


def _scaled(usage: Usage, numerator: int, denominator: int) -> Usage:
    """A part of a usage; its blocks of cached tokens stay whole."""
    output = max(1, usage.output_tokens * numerator // denominator)
    return Usage(
        input_tokens=max(1, usage.input_tokens * numerator // denominator),
        cache_read_tokens=usage.cache_read_tokens * numerator // denominator // CACHE_BLOCK * CACHE_BLOCK,
        cache_write_5m_tokens=usage.cache_write_5m_tokens * numerator // denominator // 4 * 4,
        output_tokens=output,
        reasoning_tokens=min(output, usage.reasoning_tokens * numerator // denominator),
    )


def _closing_usage(quote: Quote, amount: Micros, at: datetime) -> Usage | None:
    """Token counts that come to exactly `amount`: half of it output, the fewest cached blocks that leave whole
    input tokens, and those.
    """
    per_input, per_block, per_output = _unit_charges(quote, at)
    output = max(1, min(LONGEST_OUTPUT, amount // 2 // per_output))
    for blocks in range(_MOST_BLOCKS):
        left = amount - output * per_output - blocks * per_block
        tokens, odd = divmod(left, per_input)
        if left > 0 and odd == 0 and tokens + blocks * CACHE_BLOCK <= LONGEST_INPUT:
            return Usage(input_tokens=tokens, cache_read_tokens=blocks * CACHE_BLOCK, output_tokens=output)
    return None


def _unit_charges(quote: Quote, at: datetime) -> tuple[int, int, int]:
    """Micros per input token, cached block and output token; whole numbers, or closing is impossible."""
    many = 1_000

    def per(**counts: int) -> int:
        charged, odd = divmod(quote.price(Usage(**counts), at=at).charged_micros, many)
        assert odd == 0, f"{quote.model} has no price in whole micros"
        return charged

    return (per(input_tokens=many), per(cache_read_tokens=many * CACHE_BLOCK), per(output_tokens=many))


def shares(total: int, weights: Sequence[int]) -> list[int]:
    """A whole number split by weights; the parts sum to it exactly. Nobody with a weight goes empty if it can be."""
    assert total >= 0
    assert sum(weights) > 0
    done, parts, seen = 0, [], 0
    for weight in weights:
        seen += weight
        parts.append(total * seen // sum(weights) - done)
        done += parts[-1]
    for place, weight in enumerate(weights):
        richest = max(range(len(parts)), key=parts.__getitem__)
        if weight and not parts[place] and parts[richest] > 1:
            parts[place], parts[richest] = 1, parts[richest] - 1
    return parts


def table(rng: random.Random, rows: Sequence[int], columns: Sequence[int]) -> list[list[int]]:
    """Whole numbers with exactly these sums of rows and of columns; near proportional, but not quite."""
    assert sum(rows) == sum(columns)
    total = max(1, sum(rows))
    cells = [[int(row * column * rng.uniform(0.4, 1.0)) // total for column in columns] for row in rows]
    left_of_columns = [column - sum(row[place] for row in cells) for place, column in enumerate(columns)]
    for row, wanted in zip(cells, rows, strict=True):
        left = wanted - sum(row)
        for place, room in enumerate(left_of_columns):
            taken = min(left, room)
            row[place] += taken
            left_of_columns[place] -= taken
            left -= taken
    return cells
