"""The price that counts for an organization: list, own price, mark-up, policy; at exact instants; its own only."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest

from bursar import clock, db
from bursar.audit.events import OPERATOR, list_events
from bursar.pricing.book import ModelNotPriced, PriceBook, Quote
from bursar.pricing.files import ReadList
from bursar.pricing.importing import accepted, import_list
from bursar.pricing.lists import Prices
from bursar.pricing.prices import Priced, Rate, Rounding, Variant
from bursar.pricing.terms import (
    InvalidMarkup,
    InvalidScope,
    UnknownModelPolicy,
    load_terms,
    scope_fits,
    set_markup,
    set_override,
    set_policy,
)
from bursar.pricing.usage import Usage
from bursar.pricing.versions import PriceNotFound, find_version

OwnList = Callable[..., ReadList]
HOUR = timedelta(hours=1)
MICROSECOND = timedelta(microseconds=1)
MILLION_IN = Usage(input_tokens=1_000_000)


def input_price(usd_per_million: int) -> Prices:
    return Prices.of([Rate("input_tokens", usd_per_million * 1_000_000_000)])


async def charged(book: PriceBook, org: Any, model: str = "demo-1", at: datetime | None = None) -> int:
    """Micros for a million input tokens."""
    quote = await book.quote(organization_id=org.organization_id, provider="demo", model=model, at=at)
    return quote.price(MILLION_IN).charged_micros


async def mark_up(org: Any, markup_ppm: int | None, **scope: Any) -> None:
    async with org.database.platform() as conn:
        await set_markup(
            conn, organization_id=org.organization_id, markup_ppm=markup_ppm, reason="a test", by=OPERATOR, **scope
        )


async def override(org: Any, prices: Prices | None, model_pattern: str = "demo-1", **more: Any) -> UUID:
    async with org.database.platform() as conn:
        found = await set_override(
            conn,
            organization_id=org.organization_id,
            provider=more.pop("provider", "demo"),
            model_pattern=model_pattern,
            prices=prices,
            reason="a test",
            by=OPERATOR,
            **more,
        )
    return found.price_version_id


async def policy(org: Any, unknown_model: UnknownModelPolicy, fallback: tuple[str, str] | None = None) -> None:
    async with org.database.platform() as conn:
        await set_policy(
            conn,
            organization_id=org.organization_id,
            unknown_model=unknown_model,
            fallback=fallback,
            reason="a test",
            by=OPERATOR,
        )


async def test_the_demo_provider_has_prices(book: PriceBook, org: Any) -> None:
    async def cost(model: str, usage: Usage, **context: str) -> Priced:
        quote = await book.quote(organization_id=org.organization_id, provider="demo", model=model)
        quote.require_priced(usage, context=context)
        return quote.price(usage, context=context)

    assert await cost("demo-1", Usage(input_tokens=1000, output_tokens=1000)) == Priced(500_000, 5_000_000)
    assert await cost("demo-1-2026-11-20", Usage(cache_read_tokens=1000)) == Priced(10_000, 100_000)
    assert await cost("demo-fixed", Usage(input_tokens=9, output_tokens=9)) == Priced(1_000_000, 10_000_000)
    assert await cost("demo-image", Usage(images=2)) == Priced(8_000_000, 80_000_000)
    assert await cost("demo-image", Usage(images=2), quality="hd") == Priced(16_000_000, 160_000_000)
    assert await cost("demo-1-mini", MILLION_IN) == Priced(10_000_000, 100_000_000)
    assert await cost("demo-claude", MILLION_IN) == Priced(300_000_000, 3_000_000_000)


async def test_an_unknown_model_is_refused_by_default(book: PriceBook, org: Any) -> None:
    for _ in range(2):
        with pytest.raises(ModelNotPriced) as refusal:
            await book.quote(organization_id=org.organization_id, provider="demo", model="nobody-knows")
        assert refusal.value.status == 400
        assert refusal.value.why is not None
        assert refusal.value.why["model"] == "nobody-knows"


async def test_an_unknown_model_passes_only_by_a_named_policy_and_says_so(book: PriceBook, org: Any) -> None:
    await policy(org, UnknownModelPolicy.PASS)
    quote = await book.quote(organization_id=org.organization_id, provider="demo", model="nobody-knows")
    assert (quote.basis, quote.is_unpriced, quote.price_version_id) == ("unpriced", True, None)
    assert quote.price(MILLION_IN) == Priced(0, 0, ("input_tokens",))
    await policy(org, UnknownModelPolicy.REFUSE)
    with pytest.raises(ModelNotPriced):
        await book.quote(organization_id=org.organization_id, provider="demo", model="nobody-knows")


async def test_an_unknown_model_takes_the_price_of_a_named_fallback(book: PriceBook, org: Any) -> None:
    await policy(org, UnknownModelPolicy.FALLBACK, ("demo", "demo-claude"))
    await mark_up(org, 2_000_000)
    quote = await book.quote(organization_id=org.organization_id, provider="elsewhere", model="nobody-knows")
    assert (quote.basis, quote.provider, quote.model) == ("fallback", "elsewhere", "nobody-knows")
    assert quote.charge is not None
    assert quote.charge.model == "demo-claude"
    assert quote.price(MILLION_IN) == Priced(600_000_000, 3_000_000_000)


async def test_a_fallback_without_a_price_refuses(book: PriceBook, org: Any) -> None:
    await policy(org, UnknownModelPolicy.FALLBACK, ("demo", "gone"))
    with pytest.raises(ModelNotPriced):
        await book.quote(organization_id=org.organization_id, provider="demo", model="nobody-knows")


async def test_a_known_model_is_refused_what_it_has_no_price_for(book: PriceBook, org: Any) -> None:
    asked = {"organization_id": org.organization_id, "provider": "demo", "model": "demo-1"}
    quote = await book.quote(**asked)
    with pytest.raises(ModelNotPriced, match="images"):
        quote.require_priced(Usage(images=1))
    assert quote.price(Usage(images=1)).unpriced_kinds == ("images",)
    await policy(org, UnknownModelPolicy.PASS)
    (await book.quote(**asked)).require_priced(Usage(images=1))


@pytest.mark.parametrize(
    ("key", "usual", "dearer"),
    [
        ("service_tier", "auto", "priority"),
        ("speed", "standard", "fast"),
        ("inference_geo", "global", "us"),
        ("memory_limit", "1g", "64g"),
    ],
)
async def test_what_may_be_dearer_than_the_standard_price_is_refused_until_it_has_its_own(
    book: PriceBook, org: Any, key: str, usual: str, dearer: str
) -> None:
    asked = {"organization_id": org.organization_id, "provider": "demo", "model": "demo-1-mini"}
    usage = Usage(input_tokens=1)
    quote = await book.quote(**asked)
    quote.require_priced(usage, context={key: usual})
    with pytest.raises(ModelNotPriced, match=f"{key}={dearer}"):
        quote.require_priced(usage, context={key: dearer})
    assert quote.charge is not None
    variant = Variant(((key, dearer),), (Rate("input_tokens", 7),))
    dear = replace(quote, charge=replace(quote.charge, variants=(variant,)))
    dear.require_priced(usage, context={key: dearer})
    with pytest.raises(ModelNotPriced):  # a price that was borrowed from another provider knows nothing of this one's
        replace(dear, has_context=False).require_priced(usage, context={key: dearer})


async def test_the_most_exact_mark_up_counts(book: PriceBook, org: Any) -> None:
    await mark_up(org, 1_100_000)
    assert await charged(book, org) == 110_000_000
    await mark_up(org, 1_200_000, provider="demo")
    await mark_up(org, 1_300_000, provider="demo", model_pattern="demo-*")
    assert await charged(book, org) == 130_000_000
    await mark_up(org, 900_000, provider="demo", model_pattern="demo-1")
    assert await charged(book, org) == 90_000_000
    assert await charged(book, org, "demo-1-2026-01-01") == 90_000_000
    assert await charged(book, org, "demo-claude") == 390_000_000
    await mark_up(org, None, provider="demo", model_pattern="demo-1")
    assert await charged(book, org) == 130_000_000


async def test_a_mark_up_does_not_touch_the_provider_cost(book: PriceBook, org: Any) -> None:
    await mark_up(org, 1_333_333)
    quote = await book.quote(organization_id=org.organization_id, provider="demo", model="demo-1")
    assert quote.price(MILLION_IN) == Priced(133_333_300, 1_000_000_000)
    assert quote.price(Usage(input_tokens=1), rounding=Rounding.UP) == Priced(134, 1000)


async def test_a_price_of_ones_own_is_charged_as_it_stands(book: PriceBook, org: Any) -> None:
    await mark_up(org, 3_000_000)
    price_version_id = await override(org, input_price(7))
    quote = await book.quote(organization_id=org.organization_id, provider="demo", model="demo-1")
    assert (quote.basis, quote.price_version_id, quote.model) == ("override", price_version_id, "demo-1")
    assert quote.price(MILLION_IN) == Priced(700_000_000, 1_000_000_000)
    await override(org, None)
    assert await charged(book, org) == 300_000_000


async def test_a_price_of_ones_own_may_be_for_a_model_that_no_list_knows(book: PriceBook, org: Any) -> None:
    await override(org, input_price(7), "house-*", provider="vllm")
    quote = await book.quote(organization_id=org.organization_id, provider="vllm", model="house-70b")
    assert quote.price(MILLION_IN) == Priced(700_000_000, 7_000_000_000)


async def test_terms_take_effect_at_their_very_instant(book: PriceBook, org: Any) -> None:
    at = clock.now() + HOUR
    await mark_up(org, 2_000_000, effective_from=at)
    await override(org, input_price(5), effective_from=at + HOUR)
    instants = (at - MICROSECOND, at, at + HOUR - MICROSECOND, at + HOUR)
    assert [await charged(book, org, at=each) for each in instants] == [
        100_000_000, 200_000_000, 200_000_000, 500_000_000,
    ]  # fmt: skip
    quote = await book.quote(organization_id=org.organization_id, provider="demo", model="demo-1")
    assert quote.valid_until == at
    assert quote.holds(at - MICROSECOND)
    assert not quote.holds(at)


async def test_a_cached_quote_ends_at_its_instant_without_asking_the_database(shipped: db.Database, org: Any) -> None:
    at = clock.now() + HOUR
    await mark_up(org, 2_000_000, effective_from=at)
    book = PriceBook(shipped, refresh_seconds=3600)
    asked = {"organization_id": org.organization_id, "provider": "demo", "model": "demo-1"}
    assert book.cached(**asked) is None
    quote = await book.quote(**asked)
    assert book.cached(**asked) is quote
    assert book.cached(**asked, at=at) is None
    assert (await book.quote(**asked, at=at)).markup_ppm == 2_000_000


async def test_a_change_is_seen_after_the_refresh_and_not_before(
    shipped: db.Database, org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    book = PriceBook(shipped, refresh_seconds=3600)
    assert await charged(book, org) == 100_000_000
    await mark_up(org, 2_000_000)
    assert await charged(book, org) == 100_000_000
    monkeypatch.setattr(book, "_refresh_seconds", 0)
    assert await charged(book, org) == 200_000_000


async def test_a_model_that_gets_a_price_is_known_after_the_refresh(
    shipped: db.Database, book: PriceBook, org: Any, own_list: OwnList
) -> None:
    listed = own_list(large="2")
    asked = {"organization_id": org.organization_id, "provider": listed.prices.name, "model": "large"}
    with pytest.raises(ModelNotPriced):
        await book.quote(**asked)
    async with shipped.platform() as conn:
        await import_list(conn, accepted(listed), by=OPERATOR)
    assert (await book.quote(**asked)).price(MILLION_IN).charged_micros == 200_000_000


class Watched(db.Database):
    """Another opening of a database, which notes who looks into it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.looks: list[str] = []

    def tenant(self, organization_id: UUID) -> AbstractAsyncContextManager[db.Connection]:
        self.looks.append("tenant")
        return super().tenant(organization_id)

    def untenanted(self) -> AbstractAsyncContextManager[db.Connection]:
        self.looks.append("untenanted")
        return super().untenanted()


async def test_many_who_ask_at_once_share_one_look(shipped: db.Database, org: Any) -> None:
    watched = Watched(shipped.settings, shipped.dsn("admin"))  # others look into `shipped` meanwhile
    await watched.open()
    book = PriceBook(watched, refresh_seconds=3600)
    asked = {"organization_id": org.organization_id, "provider": "openai", "model": "gpt-5"}
    quotes: list[Quote] = await asyncio.gather(*(book.quote(**asked) for _ in range(200)))
    assert len({quote.price_version_id for quote in quotes}) == 1
    assert sorted(watched.looks) == ["tenant", "untenanted", "untenanted", "untenanted"]  # revision, names, versions
    await asyncio.gather(*(book.quote(**asked) for _ in range(200)))
    assert len(watched.looks) == 4
    await watched.close()


async def test_names_that_nobody_prices_do_not_fill_the_memory(
    shipped: db.Database, org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bursar.pricing.book.MOST_ANSWERS", 10)
    book = PriceBook(shipped, refresh_seconds=3600)
    for number in range(50):
        with pytest.raises(ModelNotPriced):
            await book.quote(organization_id=org.organization_id, provider="demo", model=f"invented-{number}")
    assert len(book._answers) <= 10
    with pytest.raises(ModelNotPriced):
        await book.quote(organization_id=org.organization_id, provider="demo", model="x" * 100_000)
    assert not any(len(model) > 200 for _, _, model in book._answers)


async def test_another_organizations_terms_are_neither_seen_nor_used(
    book: PriceBook, org: Any, make_org: Callable[..., Any]
) -> None:
    other = await make_org()
    await mark_up(org, 2_000_000)
    await policy(org, UnknownModelPolicy.PASS)
    price_version_id = await override(org, input_price(7), "demo-claude")
    assert await charged(book, other) == 100_000_000
    async with other.tenant() as conn:
        for table in ("overrides", "override_rates", "markups", "policies"):
            # Without a filter of the application's: row-level security alone.
            assert await db.fetch_value(conn, f"select count(*) from pricing.{table}") == 0
        assert await load_terms(conn, organization_id=org.organization_id) == await load_terms(
            conn, organization_id=other.organization_id
        )
        with pytest.raises(PriceNotFound):
            await find_version(conn, price_version_id=price_version_id)
    async with org.tenant() as conn:
        assert (await find_version(conn, price_version_id=price_version_id)).rates == input_price(7).rates


async def test_an_organization_cannot_set_its_own_prices(org: Any) -> None:
    statement = (
        "insert into pricing.markups (organization_id, markup_id, provider, model_pattern, markup_ppm, effective_from,"
        " revision, reason) values (%s, %s, '*', '*', 1, now(), 1, '')"
    )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await conn.execute(statement, [org.organization_id, clock.uuid7()])


async def test_terms_are_never_changed(org: Any) -> None:
    await mark_up(org, 2_000_000)
    with pytest.raises(psycopg.Error) as refusal:
        async with await psycopg.AsyncConnection.connect(org.database.dsn("admin")) as conn:
            await conn.execute(
                "update pricing.markups set markup_ppm = 1 where organization_id = %s", [org.organization_id]
            )
    assert refusal.value.sqlstate == "BR409"


async def test_what_the_operator_sets_stands_in_the_organizations_audit(org: Any) -> None:
    await mark_up(org, 1_500_000)
    await override(org, input_price(7))
    await policy(org, UnknownModelPolicy.PASS)
    async with org.tenant() as conn:
        found = await list_events(conn, organization_id=org.organization_id, limit=3)
    assert [each.action for each in found] == ["price_policy.set", "price_override.set", "price_markup.set"]
    assert found[2].new_value is not None
    assert found[2].new_value["markup_ppm"] == 1_500_000


@pytest.mark.parametrize("markup_ppm", [0, -1, 1_000_000_001])
async def test_a_mark_up_of_nothing_is_refused(org: Any, markup_ppm: int) -> None:
    with pytest.raises(InvalidMarkup):
        await mark_up(org, markup_ppm)


@pytest.mark.parametrize(
    ("provider", "pattern"), [("", "m"), ("Demo", "m"), ("de*", "m"), ("demo", ""), ("demo", "a*b")]
)
async def test_a_scope_is_a_name_or_a_beginning(org: Any, provider: str, pattern: str) -> None:
    with pytest.raises(InvalidScope):
        await mark_up(org, 1_000_000, provider=provider, model_pattern=pattern)


def test_patterns_fit_without_regard_to_case() -> None:
    assert scope_fits("*", "*", "demo", ["x"])
    assert scope_fits("demo", "GPT-*", "demo", ["gpt-5"])
    assert scope_fits("demo", "gpt-5", "demo", ["gpt-5-2025-08-07", "gpt-5"])
    assert not scope_fits("demo", "gpt-5", "openai", ["gpt-5"])
    assert not scope_fits("demo", "gpt-5", "demo", ["gpt-5-mini"])
