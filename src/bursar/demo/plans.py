"""From a story to a timeline: every grant, limit, move and request of a company with its instant, in order. Pure."""

import random
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import groupby
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar.clock import uuid7_at
from bursar.demo.requests import Generator, Model, Quotes, Request, close, shares, table
from bursar.demo.rhythm import Calendar, instants
from bursar.demo.stories import Cap, Company, Grant, Move, Refusals, Share, Stray, Use
from bursar.money import MICROS_PER_CREDIT, Micros, credits

DENSE_DAYS = 92
MOST_IN_A_BATCH = 1_000
LEAST_REQUESTS = 3
"""Who asks at all asks so often."""

PAUSE = timedelta(minutes=25)
"""After so long a silence people begin another conversation."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request, who made it and through which key. key: its name, None for a session."""

    request: Request
    person: str
    key: str | None
    conversation_id: UUID

    @property
    def at(self) -> datetime:
        return self.request.used_at


@dataclass(frozen=True, slots=True)
class Batch:
    """Calls of one stretch of time, oldest first, which are booked together at the instant of the last."""

    calls: tuple[Call, ...]

    @property
    def at(self) -> datetime:
        return self.calls[-1].at


@dataclass(frozen=True, slots=True)
class Refused:
    """One request that a limit refuses."""

    at: datetime
    refusals: Refusals


@dataclass(frozen=True, slots=True)
class Strayed:
    """A request of nobody, through a key that is none of ours."""

    request: Request

    @property
    def at(self) -> datetime:
        return self.request.used_at


@dataclass(frozen=True, slots=True)
class Dated:
    """Anything else of a story, at its instant."""

    at: datetime
    what: Grant | Share | Cap | Move


Other = Refused | Strayed | Dated
Step = Batch | Other


@dataclass(frozen=True, slots=True)
class Closing:
    """Models that close a sum, the first that can."""

    models: tuple[Model, ...]

    def of(self, provider: str | None) -> tuple[Model, ...]:
        return tuple(each for each in self.models if provider in (None, each.provider))


def plan(company: Company, as_of: datetime, quotes: Quotes, closing: Closing) -> list[Step]:
    """All steps in order. Its calls come to exactly what the story tells.

    Raises:
        ValueError: the story asks for an amount that no request can come to.
    """
    calendar = Calendar(as_of, ZoneInfo(company.zone))
    calls = sorted(
        (
            call
            for place, use in enumerate(company.uses)
            for call in _calls(company, place, use, calendar, quotes, closing)
        ),
        key=lambda call: call.at,
    )
    strays = [_stray(stray, calendar, quotes) for stray in company.strays]
    requests = [*(call.request for call in calls), *(stray.request for stray in strays)]
    used = Micros(sum(request.priced.charged_micros for request in requests))
    dated: list[Grant | Share | Cap | Move] = [*_grants(company, used), *company.shares, *company.caps, *company.moves]
    others: list[Other] = [Dated(calendar.start(each.at), each) for each in dated]
    others += [*strays, *(each for refusals in company.refusals for each in _refused(company, refusals, calendar))]
    others.sort(key=lambda step: step.at)
    # The long tail's few requests are booked together: one by one they would take longer than all the others.
    dense = calendar.as_of if company.is_small else calendar.day_start(DENSE_DAYS)
    return list(_in_order(calls, others, calendar, dense))


def models_of(companies: Iterable[Company], closing: Closing) -> set[Model]:
    """Every model that is priced."""
    uses = {choice.model for company in companies for use in company.uses for choice in use.mix}
    return uses | set(closing.models) | {stray.model for company in companies for stray in company.strays}


# ------------------------------------------------------------------------------------------------ calls


@dataclass(frozen=True, slots=True)
class _Cell:
    """What one person used through one key."""

    person: str
    key: str | None
    credits: int


def _calls(
    company: Company, place: int, use: Use, calendar: Calendar, quotes: Quotes, closing: Closing
) -> Iterator[Call]:
    span = calendar.span(use.when)
    assert span is not None, f"{company.slug}: nothing lies in {use.when}"
    rng = random.Random(f"{company.slug} {place}")
    providers: dict[str | None, str | None] = {None: None, **{key.name: key.provider for key in company.keys}}
    generators: dict[str | None, tuple[Generator, float]] = {}
    for cell in _cells(company, use, rng):
        provider = providers[cell.key]
        if provider not in generators:
            generator = Generator(
                rng=rng,
                quotes=quotes,
                mix=[choice for choice in use.mix if provider in (None, choice.model.provider)],
                closing=closing.of(provider),
                months_ago=calendar.months_ago,
                is_exact=use.is_exact,
            )
            generators[provider] = generator, generator.size(credits(use.credits), use.requests, span.start)
        generator, size = generators[provider]
        made = generator.requests(credits(cell.credits), instants(rng, calendar, span), size)
        yield from _talks(rng, cell, sorted(made, key=lambda each: each.used_at), whole=use.is_one_conversation)


def _cells(company: Company, use: Use, rng: random.Random) -> Iterator[_Cell]:
    """Who used how much through which key; exactly the story's sums."""
    people = use.people or _by_weight(company, use, rng)
    assert sum(people.values()) == use.credits, (
        f"{company.slug}: people come to {sum(people.values())} of {use.credits}"
    )
    if use.keys is None:
        own = {person.email: person.key for person in company.people}
        yield from (_Cell(person, own[person], amount) for person, amount in people.items() if amount)
        return
    cells = table(rng, list(people.values()), list(use.keys.values()))
    for person, row in zip(people, cells, strict=True):
        for key, amount in zip(use.keys, row, strict=True):
            if amount:
                yield _Cell(person, key, amount)


def _by_weight(company: Company, use: Use, rng: random.Random) -> Mapping[str, int]:
    """By the weights of its people, which differ from time to time; of few requests not everybody has one."""
    weights = {each.email: each.weight * rng.randrange(40, 160) for each in company.people if each.weight}
    busiest = sorted(weights, key=lambda email: -weights[email])[: max(1, use.requests // LEAST_REQUESTS)]
    return dict(zip(busiest, shares(use.credits, [weights[email] for email in busiest]), strict=True))


def _talks(rng: random.Random, cell: _Cell, requests: Sequence[Request], *, whole: bool) -> Iterator[Call]:
    """The requests of one cell with their conversations: a new one after a pause, or by chance."""
    current, last = uuid7_at(requests[0].used_at), requests[0].used_at
    for request in requests:
        if not whole and (request.used_at - last > PAUSE or rng.random() < 0.08):
            current = uuid7_at(request.used_at)
        last = request.used_at
        yield Call(request, cell.person, cell.key, current)


# ------------------------------------------------------------------------------------------------ the rest


def _grants(company: Company, used: Micros) -> Iterator[Grant]:
    """The story's grants; one whose amount is open gets what makes the company's available credits come out."""
    told = sum(grant.credits or 0 for grant in company.grants) * MICROS_PER_CREDIT
    for grant in company.grants:
        if grant.credits is not None:
            yield grant
            continue
        assert company.available is not None, f"{company.slug}: an open grant needs what shall be available"
        amount, odd = divmod(credits(company.available) + used - told, MICROS_PER_CREDIT)
        assert amount > 0, f"{company.slug}: the other grants leave {amount} for the open one"
        assert odd == 0, f"{company.slug}: {odd} micros are no whole credit"
        yield replace(grant, credits=amount)


def _stray(stray: Stray, calendar: Calendar, quotes: Quotes) -> Strayed:
    return Strayed(close(quotes, [stray.model], credits(stray.credits), calendar.start(stray.at)))


def _refused(company: Company, refusals: Refusals, calendar: Calendar) -> Iterator[Refused]:
    span = calendar.span(refusals.when)
    assert span is not None, f"{company.slug}: nothing lies in {refusals.when}"
    times = instants(random.Random(f"{company.slug} {refusals.detail}"), calendar, span)
    yield from (Refused(next(times), refusals) for _ in range(refusals.count))


def _in_order(calls: Sequence[Call], others: Sequence[Other], calendar: Calendar, dense: datetime) -> Iterator[Step]:
    """Calls in batches between what else happens, which comes before the calls of its instant."""
    done = 0
    for step in others:
        until = bisect_left(calls, step.at, lo=done, key=lambda call: call.at)
        yield from _batches(calls[done:until], calendar, dense)
        done = until
        yield step
    yield from _batches(calls[done:], calendar, dense)


def _batches(calls: Sequence[Call], calendar: Calendar, dense: datetime) -> Iterator[Batch]:
    """One for each local day since `dense`, before that for each quarter of a month."""

    def stretch(call: Call) -> tuple[int, int, int]:
        day = call.at.astimezone(calendar.zone)
        return day.year, day.month, day.day if call.at >= dense else -(day.day // 8)

    for _, together in groupby(calls, key=stretch):
        found = tuple(together)
        for start in range(0, len(found), MOST_IN_A_BATCH):
            yield Batch(found[start : start + MOST_IN_A_BATCH])
