"""What one organization pays instead of the list price: prices of its own, mark-ups, its policy for unknown models.

All three are dated: a new row takes effect at an instant, and rows of the past stay. They are set by the platform's
operator (role bursar_platform), in a transaction that also writes the organization's audit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Final, Protocol, TypeVar
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.pricing.lists import Prices
from bursar.pricing.prices import PAR_PPM, PriceVersion
from bursar.pricing.versions import QUERIES, RateRow, VersionRow, rows_of_prices
from bursar.problems import Problem

ANY: Final = "*"
OVERRIDE_LIST: Final = "override"
"""What stands in place of a list's name."""
LARGEST_MARKUP_PPM: Final = 1_000 * PAR_PPM


class PriceInThePast(Problem):
    """A price would take effect before now, and so move what was already said about the past."""

    status, code, title = 422, "price_in_the_past", "A price cannot take effect in the past"


class InvalidMarkup(Problem):
    """A mark-up is more than nothing and at most a thousandfold."""

    status, code, title = 422, "invalid_markup", "This mark-up cannot be used"


class InvalidScope(Problem):
    """A provider is a name or *, a model a name, a beginning followed by *, or *; all providers means all models."""

    status, code, title = 422, "invalid_price_scope", "This is no provider or model"


class UnknownModelPolicy(Enum):
    """What happens to a request for a model without a price."""

    REFUSE = "refuse"
    PASS = "pass"
    FALLBACK = "fallback"


@dataclass(frozen=True, slots=True)
class Override:
    """A price of its own; prices None: none any more."""

    price_version_id: UUID
    provider: str
    model_pattern: str
    effective_from: datetime
    revision: int
    prices: Prices | None
    reason: str

    @classmethod
    def of(cls, row: VersionRow) -> Override:
        return cls(
            price_version_id=row.price_version_id,
            provider=row.provider,
            model_pattern=row.model,
            effective_from=row.effective_from,
            revision=row.revision,
            prices=row.prices,
            reason=row.source,
        )

    def as_version(self) -> PriceVersion:
        """In the form of a list price; not for an override that ended."""
        assert self.prices is not None
        return PriceVersion(
            price_version_id=self.price_version_id,
            list_name=OVERRIDE_LIST,
            provider=self.provider,
            model=self.model_pattern,
            effective_from=self.effective_from,
            rates=self.prices.rates,
            variants=self.prices.variants,
            source=self.reason,
        )


@dataclass(frozen=True, slots=True)
class Markup:
    """A multiple of the list price in parts per million; None: none any more."""

    markup_id: UUID
    provider: str
    model_pattern: str
    markup_ppm: int | None
    effective_from: datetime
    revision: int
    reason: str


@dataclass(frozen=True, slots=True)
class Policy:
    """For models without a price; the fallback is named where, and only where, the policy is FALLBACK."""

    policy_id: UUID
    unknown_model: UnknownModelPolicy
    fallback_provider: str | None
    fallback_model: str | None
    effective_from: datetime
    revision: int
    reason: str


class _Dated(Protocol):
    """A row that takes effect at an instant."""

    @property
    def effective_from(self) -> datetime: ...


class _Scoped(_Dated, Protocol):
    """A dated row for some models."""

    @property
    def provider(self) -> str: ...

    @property
    def model_pattern(self) -> str: ...


_DatedRow = TypeVar("_DatedRow", bound=_Dated)
_ScopedRow = TypeVar("_ScopedRow", bound=_Scoped)


@dataclass(frozen=True, slots=True)
class Terms:
    """Everything that was ever agreed with one organization; each sequence ascending by instant and revision."""

    overrides: tuple[Override, ...] = ()
    markups: tuple[Markup, ...] = ()
    policies: tuple[Policy, ...] = ()

    def override(self, provider: str, names: Sequence[str], at: datetime) -> Override | None:
        """The most exact one in force. names: the model as asked for and as priced."""
        return next((each for each in _fitting(self.overrides, provider, names, at) if each.prices is not None), None)

    def markup_ppm(self, provider: str, names: Sequence[str], at: datetime) -> int:
        """Of the most exact mark-up in force; the list price where there is none."""
        in_force = (each.markup_ppm for each in _fitting(self.markups, provider, names, at))
        return next((ppm for ppm in in_force if ppm is not None), PAR_PPM)

    def policy(self, at: datetime) -> Policy | None:
        """None: refuse."""
        return _newest(self.policies, at)

    @property
    def instants(self) -> list[datetime]:
        """When anything of this changes."""
        dated: list[_Dated] = [*self.overrides, *self.markups, *self.policies]
        return [each.effective_from for each in dated]


def _fitting(rows: Iterable[_ScopedRow], provider: str, names: Sequence[str], at: datetime) -> list[_ScopedRow]:
    """For each scope that fits the newest row in force, the most exact scope first."""
    newest: dict[tuple[str, str], _ScopedRow] = {}
    for row in rows:
        if row.effective_from <= at and scope_fits(row.provider, row.model_pattern, provider, names):
            newest[row.provider, row.model_pattern] = row
    return sorted(newest.values(), key=lambda row: _exactness(row.provider, row.model_pattern), reverse=True)


def _newest(rows: Iterable[_DatedRow], at: datetime) -> _DatedRow | None:
    found = None
    for row in rows:
        if row.effective_from <= at:
            found = row
    return found


def scope_fits(provider: str, model_pattern: str, asked_provider: str, names: Sequence[str]) -> bool:
    """Does a scope cover a model of a provider, under any of its names?"""
    if provider not in (ANY, asked_provider):
        return False
    pattern = model_pattern.lower()
    if pattern.endswith(ANY):
        return any(name.lower().startswith(pattern[:-1]) for name in names)
    return any(name.lower() == pattern for name in names)


def _exactness(provider: str, model_pattern: str) -> tuple[bool, bool, int]:
    return provider != ANY, not model_pattern.endswith(ANY), len(model_pattern)


async def load_terms(conn: db.Connection, *, organization_id: UUID) -> Terms:
    """What was agreed with an organization. conn: one that sees it."""
    overrides = await db.fetch_all(conn, VersionRow, QUERIES.overrides, organization_id=organization_id)
    markups = await db.fetch_all(conn, Markup, QUERIES.markups, organization_id=organization_id)
    policies = await db.fetch_all(conn, Policy, QUERIES.policies, organization_id=organization_id)
    return Terms(tuple(Override.of(row) for row in overrides), tuple(markups), tuple(policies))


async def set_override(
    conn: db.Connection,
    *,
    organization_id: UUID,
    provider: str,
    model_pattern: str,
    prices: Prices | None,
    reason: str,
    by: Actor,
    effective_from: datetime | None = None,
    backdate: bool = False,
) -> Override:
    """Give an organization a price of its own from an instant on (now when None); prices None ends it.

    It is charged as it stands, without mark-up. conn: bursar_platform's.

    Raises:
        InvalidScope, PriceInThePast
    """
    check_scope(provider, model_pattern)
    instant = await take_effect(conn, effective_from, backdate=backdate)
    price_version_id = clock.uuid7()
    revision = await db.fetch_value(
        conn,
        QUERIES.add_override,
        organization_id=organization_id,
        price_version_id=price_version_id,
        provider=provider,
        model_pattern=model_pattern,
        effective_from=instant,
        withdrawn=prices is None,
        reason=reason,
        created_by=by.user_id,
    )
    if prices is not None:
        await _add_rates(conn, organization_id, price_version_id, prices)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="price_override.set",
        object_id=price_version_id,
        new={
            "provider": provider,
            "model_pattern": model_pattern,
            "effective_from": instant,
            "prices": None if prices is None else [_as_text(row) for row in rows_of_prices(prices)],
        },
        reason=reason,
    )
    return Override(price_version_id, provider, model_pattern, instant, revision, prices, reason)


async def _add_rates(conn: db.Connection, organization_id: UUID, price_version_id: UUID, prices: Prices) -> None:
    for place, kind, above, condition, nano_usd, minimum, free in rows_of_prices(prices):
        await db.execute(
            conn,
            QUERIES.add_override_rate,
            organization_id=organization_id,
            price_version_id=price_version_id,
            place=place,
            kind=kind,
            above_input_tokens=above,
            condition=Jsonb(condition),
            price_nano_usd=nano_usd,
            minimum=minimum,
            free=free,
        )


def _as_text(row: RateRow) -> str:
    """A unit price in the audit: kind, threshold, conditions, nano-dollars."""
    _, kind, above, condition, nano_usd, _, _ = row
    return f"{kind} above {above} {condition}: {nano_usd}" if condition else f"{kind} above {above}: {nano_usd}"


async def set_markup(
    conn: db.Connection,
    *,
    organization_id: UUID,
    markup_ppm: int | None,
    reason: str,
    by: Actor,
    provider: str = ANY,
    model_pattern: str = ANY,
    effective_from: datetime | None = None,
    backdate: bool = False,
) -> Markup:
    """Charge a multiple of the list price from an instant on (now when None); None ends the mark-up of this scope.

    Raises:
        InvalidMarkup, InvalidScope, PriceInThePast
    """
    check_scope(provider, model_pattern)
    if markup_ppm is not None and not 1 <= markup_ppm <= LARGEST_MARKUP_PPM:
        raise InvalidMarkup(
            f"A mark-up lies between 1 and {LARGEST_MARKUP_PPM} parts per million; this is {markup_ppm}."
        )
    instant = await take_effect(conn, effective_from, backdate=backdate)
    markup_id = clock.uuid7()
    revision = await db.fetch_value(
        conn,
        QUERIES.add_markup,
        organization_id=organization_id,
        markup_id=markup_id,
        provider=provider,
        model_pattern=model_pattern,
        markup_ppm=markup_ppm,
        effective_from=instant,
        reason=reason,
        created_by=by.user_id,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="price_markup.set",
        object_id=markup_id,
        new={
            "provider": provider,
            "model_pattern": model_pattern,
            "markup_ppm": markup_ppm,
            "effective_from": instant,
        },
        reason=reason,
    )
    return Markup(markup_id, provider, model_pattern, markup_ppm, instant, revision, reason)


async def set_policy(
    conn: db.Connection,
    *,
    organization_id: UUID,
    unknown_model: UnknownModelPolicy,
    reason: str,
    by: Actor,
    fallback: tuple[str, str] | None = None,
    effective_from: datetime | None = None,
    backdate: bool = False,
) -> Policy:
    """Say what happens to requests for models without a price. fallback: (provider, model) whose price is taken.

    Whether the fallback has a price is the caller's to check (`book.require_price`); where it has none any more when a
    request comes, the request is refused.

    Raises:
        PriceInThePast
    """
    assert (fallback is not None) == (unknown_model is UnknownModelPolicy.FALLBACK)
    provider, model = fallback or (None, None)
    instant = await take_effect(conn, effective_from, backdate=backdate)
    policy_id = clock.uuid7()
    revision = await db.fetch_value(
        conn,
        QUERIES.add_policy,
        organization_id=organization_id,
        policy_id=policy_id,
        unknown_model=unknown_model.value,
        fallback_provider=provider,
        fallback_model=model,
        effective_from=instant,
        reason=reason,
        created_by=by.user_id,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="price_policy.set",
        object_id=policy_id,
        new={
            "unknown_model": unknown_model.value,
            "fallback_provider": provider,
            "fallback_model": model,
            "effective_from": instant,
        },
        reason=reason,
    )
    return Policy(policy_id, unknown_model, provider, model, instant, revision, reason)


async def take_effect(conn: db.Connection, effective_from: datetime | None, *, backdate: bool) -> datetime:
    """Lock and mark the book as changed; the instant at which the change takes effect, now when none was given.

    backdate: allow an instant in the past, which moves what the book says about it (what was charged stays as it was).

    Raises:
        PriceInThePast
    """
    now: datetime = await db.fetch_value(conn, QUERIES.change_book)
    return instant_of_effect(effective_from, now, backdate=backdate)


def instant_of_effect(effective_from: datetime | None, now: datetime, *, backdate: bool) -> datetime:
    """The instant that was given, else now.

    Raises:
        PriceInThePast
    """
    if effective_from is None:
        return now
    assert effective_from.tzinfo is not None
    if effective_from < now and not backdate:
        raise PriceInThePast(f"{effective_from.isoformat()} is past; it is {now.isoformat()}.")
    return effective_from


def check_scope(provider: str, model_pattern: str) -> None:
    """Is this a scope of overrides and mark-ups?

    Raises:
        InvalidScope
    """
    if not provider or (ANY in provider and provider != ANY) or provider != provider.lower():
        raise InvalidScope(f"{provider!r} is no provider's name in lower case, nor *.")
    if not model_pattern or ANY in model_pattern[:-1]:
        raise InvalidScope(f"{model_pattern!r} is no model's name, no beginning followed by *, nor *.")
