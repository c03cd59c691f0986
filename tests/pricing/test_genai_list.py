"""The imported list prices and names exactly as the library itself does."""

import random
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from uuid import UUID

import pytest
from genai_prices import Usage as LibraryUsage
from genai_prices import types
from genai_prices.data_snapshot import DataSnapshot, get_snapshot

from bursar.pricing import genai_list
from bursar.pricing.lists import ListedModel, PriceList, prices_at
from bursar.pricing.models import NameIndex
from bursar.pricing.prices import PriceVersion, exact_nano_usd
from bursar.pricing.usage import Usage

TODAY = date(2026, 11, 20)
NANO_USD_PER_USD = 1_000_000_000


@pytest.fixture(scope="module")
def snapshot() -> DataSnapshot:
    return get_snapshot()


@pytest.fixture(scope="module")
def listed() -> PriceList:
    return genai_list.load(TODAY)


def as_library_usage(usage: Usage) -> LibraryUsage:
    """The library counts cached, audio and image tokens inside input and output."""
    return LibraryUsage(
        input_tokens=usage.total_input_tokens,
        cache_read_tokens=usage.cache_read_tokens,
        cache_audio_read_tokens=0,
        cache_image_read_tokens=0,
        cache_write_tokens=usage.cache_write_5m_tokens + usage.cache_write_1h_tokens,
        cache_write_1h_tokens=usage.cache_write_1h_tokens,
        output_tokens=usage.total_output_tokens,
        output_reasoning_tokens=usage.reasoning_tokens,
        input_audio_tokens=usage.audio_input_tokens,
        output_audio_tokens=usage.audio_output_tokens,
        input_image_tokens=usage.image_input_tokens,
        output_image_tokens=usage.image_output_tokens,
        web_searches=usage.web_searches,
        storage_searches=usage.file_searches,
        audio_seconds=Decimal(usage.audio_milliseconds) / 1000,
        input_audio_seconds=Decimal(usage.audio_milliseconds) / 1000,
        input_characters=usage.characters,
    )


def random_usage(chance: random.Random) -> Usage:
    """Sizes from nothing to beyond every long-context threshold."""

    def some(most: int) -> int:
        return chance.choice(
            [0, chance.randrange(20), chance.randrange(most), chance.choice([99_999, 200_000, 272_001])]
        )

    output = some(100_000)
    return Usage(
        input_tokens=some(400_000),
        cache_read_tokens=some(300_000),
        cache_write_5m_tokens=some(50_000),
        cache_write_1h_tokens=some(50_000),
        output_tokens=output,
        reasoning_tokens=chance.randrange(output + 1),
        audio_input_tokens=some(9_000),
        audio_output_tokens=some(9_000),
        image_input_tokens=some(9_000),
        image_output_tokens=some(9_000),
        web_searches=chance.randrange(4),
        file_searches=chance.randrange(4),
        audio_milliseconds=chance.choice([0, 1, 9_999, 10_000, chance.randrange(10_000_000)]),
        characters=some(100_000),
    )


def versions(model: ListedModel, at: datetime) -> Iterator[PriceVersion]:
    prices = prices_at(model.segments, at)
    if prices is not None:
        yield PriceVersion(UUID(int=1), "genai-prices", model.provider, model.model, at, prices.rates, prices.variants)


def instants(chance: random.Random, model: ListedModel) -> list[datetime]:
    """Any moment, and the edges of every segment."""
    edges = [each.effective_from for each in model.segments if each.effective_from.year > 1970]
    moment = datetime(2024, 1, 1, tzinfo=UTC) + timedelta(minutes=chance.randrange(3 * 525_600))
    return [moment, *edges, *(edge - timedelta(microseconds=1) for edge in edges)]


def contexts(model: types.ModelInfo) -> list[dict[str, str]]:
    return [
        {},
        *(dict(each.when) for each in model.price_variants or ()),
        {"service_tier": "flex", "processing": "batch"},
    ]


def test_every_model_costs_what_the_library_says_before_rounding(snapshot: DataSnapshot, listed: PriceList) -> None:
    chance = random.Random(20261120)
    rounded = set(listed.not_represented["rounded to nine decimal places"])
    of_library = {(p.id, m.id): (p, m) for p in snapshot.providers for m in p.models}
    compared = 0
    for model in listed.models:
        if f"{model.provider}/{model.model}" in rounded:
            continue
        provider, theirs = of_library[model.key]
        for at in instants(chance, model):
            for version in versions(model, at):
                for context in contexts(theirs):
                    usage = random_usage(chance)
                    expected = theirs.calc_price(
                        as_library_usage(usage), provider, genai_request_timestamp=at, price_context=context
                    ).total_price
                    ours = exact_nano_usd(version, usage, context=context, at=at)
                    # The library divides decimals of 28 digits; a price per hour need not end there.
                    off = abs(ours - Fraction(expected) * NANO_USD_PER_USD)
                    assert off < Fraction(1, 10**9), (model.key, at, context, usage)
                    compared += 1
    assert compared > 3000


def test_a_rounded_price_differs_by_less_than_a_nano_dollar_per_million_tokens(
    snapshot: DataSnapshot, listed: PriceList
) -> None:
    chance = random.Random(7)
    by_name = {f"{each.provider}/{each.model}": each for each in listed.models}
    of_library = {f"{p.id}/{m.id}": (p, m) for p in snapshot.providers for m in p.models}
    now = datetime(2026, 11, 20, 12, tzinfo=UTC)
    for name in listed.not_represented["rounded to nine decimal places"]:
        provider, theirs = of_library[name]
        for version in versions(by_name[name], now):
            usage = random_usage(chance)
            expected = theirs.calc_price(as_library_usage(usage), provider, genai_request_timestamp=now).total_price
            off = abs(exact_nano_usd(version, usage, at=now) - Fraction(expected) * NANO_USD_PER_USD)
            assert off <= Fraction(usage.total_tokens, 1_000_000)


def probes(model: types.ModelInfo) -> set[str]:
    """Names that a client may send for a model: its id, each text in its rules, and dated forms of them."""
    texts = {model.id}
    waiting: list[object] = [model.match]
    while waiting:
        for value in vars(waiting.pop()).values():
            if isinstance(value, list):
                waiting.extend(value)
            elif "\\" not in value and "^" not in value:
                texts.add(value)
    dated = {
        f"{text}{date}" for text in texts for date in ("-2026-02-03", "-20260203", "-latest", ":batch", "-20269999")
    }
    return texts | dated | {text.upper() for text in texts} | {f"us.{text}-v1:0" for text in texts}


def test_every_name_means_the_model_that_the_library_finds(snapshot: DataSnapshot, listed: PriceList) -> None:
    index = NameIndex(listed.providers, listed.model_names())
    asked = 0
    for provider in snapshot.providers:
        for model in provider.models:
            for name in probes(model):
                theirs = provider.find_model(name, all_providers=snapshot.providers)
                ours = index.find(provider.id, name)
                assert (ours and ours.model) == (theirs and theirs.id), (provider.id, name)
                asked += 1
    assert asked > 20_000


@pytest.mark.parametrize("name", ["OpenAI", "vertex-ai", "bedrock", "azure", "together_ai", "xai", "  groq ", "nobody"])
def test_providers_are_known_by_the_librarys_other_names(snapshot: DataSnapshot, listed: PriceList, name: str) -> None:
    from genai_prices.data_snapshot import find_provider_by_id

    index = NameIndex(listed.providers, listed.model_names())
    theirs = find_provider_by_id(snapshot.providers, name)
    ours = index._find_provider(name.lower().strip())
    assert (ours and ours.provider) == (theirs and theirs.id)


def test_what_we_cannot_hold_is_named_and_nothing_is_free_by_accident(listed: PriceList) -> None:
    reasons = listed.not_represented
    assert "mistral/mistral-ocr-2503" in reasons["unit input_document_kpages"]
    assert "mistral/mistral-ocr-2503" in reasons["no price that we can hold"]
    assert "unit storage_searches_kcount" not in reasons
    assert not [
        rate
        for model in listed.models
        for segment in model.segments
        if segment.prices
        for rate in segment.prices.rates
        if rate.free
    ]


@pytest.mark.parametrize(
    ("provider", "memory", "dollars"),
    [("openai", "", "0.03"), ("openai", "4g", "0.12"), ("openai", "64g", "1.92"), ("anthropic", "", "0.05")],
)
def test_code_has_a_price_where_searches_have_one(listed: PriceList, provider: str, memory: str, dollars: str) -> None:
    now = datetime(2026, 11, 20, 12, tzinfo=UTC)
    used = Usage(requests=0, code_sessions=1)
    context = {"memory_limit": memory, "service_tier": "flex"} if memory else {}
    found = 0
    for version in (version for model in listed.models for version in versions(model, now)):
        if version.provider != provider:
            continue
        if version.unpriced_kinds(Usage(web_searches=1)):
            assert version.unpriced_kinds(used, context=context, at=now) == ["code_sessions"]
        else:
            assert exact_nano_usd(version, used, context=context, at=now) == Decimal(dollars) * NANO_USD_PER_USD
            found += 1
    assert found > 15


def test_loading_gives_the_librarys_memory_back(listed: PriceList) -> None:
    import sys

    genai_list.load(TODAY)
    assert "genai_prices.data" not in sys.modules
