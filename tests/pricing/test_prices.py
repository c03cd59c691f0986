"""Pricing is exact: integers throughout, one rounding at the end."""

from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from math import ceil, floor
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.pricing.prices import (
    PAR_PPM,
    PER,
    Priced,
    PriceVersion,
    Rate,
    Rounding,
    Variant,
    exact_nano_usd,
    price,
    price_apart,
    price_in_batch,
)
from bursar.pricing.usage import NO_USAGE, USAGE_KINDS, Usage

AT = datetime(2026, 11, 20, tzinfo=UTC)
USD = 1_000_000_000


def version(*rates: Rate, variants: tuple[Variant, ...] = ()) -> PriceVersion:
    return PriceVersion(UUID(int=1), "test", "acme", "large", AT, rates, variants)


def tokens(input_usd: str = "2.5", output_usd: str = "10") -> PriceVersion:
    return version(
        Rate("input_tokens", int(Fraction(input_usd) * USD)), Rate("output_tokens", int(Fraction(output_usd) * USD))
    )


def charged(priced: Priced) -> tuple[int, int]:
    return priced.charged_micros, priced.provider_cost_nano_usd


def test_a_million_tokens_cost_their_unit_price() -> None:
    assert charged(price(tokens(), Usage(input_tokens=1_000_000))) == (250_000_000, 2_500_000_000)
    assert charged(price(tokens(), Usage(output_tokens=1_000_000))) == (1_000_000_000, 10_000_000_000)


def test_nothing_used_costs_nothing() -> None:
    assert price(tokens(), NO_USAGE, rounding=Rounding.UP) == Priced(0, 0)


def test_each_amount_is_rounded_once_from_the_exact_amount() -> None:
    # 4.5 nano-dollars are 0.45 micros, which is 0; by way of the rounded cost of 5 they would be 0.5, which is 1.
    assert charged(price(tokens("0.0045"), Usage(input_tokens=1))) == (0, 5)


def test_a_half_is_rounded_up() -> None:
    # 5 nano-dollars are half a micro.
    assert charged(price(tokens("0.005"), Usage(input_tokens=1))) == (1, 5)
    assert charged(price(tokens("0.004999999"), Usage(input_tokens=1))) == (0, 5)
    assert charged(price(tokens("0.0025"), Usage(input_tokens=1))) == (0, 3)


def test_a_hold_rounds_up() -> None:
    assert charged(price(tokens("0.000001"), Usage(input_tokens=1), rounding=Rounding.UP)) == (1, 1)


def test_a_mark_up_is_exact_and_leaves_the_cost_alone() -> None:
    usage = Usage(input_tokens=1_000_000)
    assert charged(price(tokens("1"), usage, 1_200_000)) == (120_000_000, 1_000_000_000)
    assert charged(price(tokens("1"), usage, 1_333_333)) == (133_333_300, 1_000_000_000)
    assert charged(price(tokens("1"), usage, 1)) == (100, 1_000_000_000)


def test_the_cost_does_not_hang_on_the_price_of_ones_own() -> None:
    assert charged(price_apart(tokens("3"), tokens("2"), Usage(input_tokens=1_000_000))) == (200_000_000, 3_000_000_000)


@pytest.mark.parametrize(("size", "expected"), [(199_999, 2), (200_000, 2), (200_001, 4), (500_000, 4), (500_001, 6)])
def test_the_whole_request_is_priced_at_its_long_context_tier(size: int, expected: int) -> None:
    tiered = version(
        Rate("input_tokens", 2 * USD), Rate("input_tokens", 4 * USD, 200_000), Rate("input_tokens", 6 * USD, 500_000),
        Rate("output_tokens", 8 * USD),
    )  # fmt: skip
    assert exact_nano_usd(tiered, Usage(input_tokens=size)) == size * expected * 1000


def test_cached_audio_and_image_input_count_towards_the_tier() -> None:
    tiered = version(Rate("input_tokens", 1 * USD), Rate("input_tokens", 2 * USD, 100))
    parts = Usage(
        input_tokens=20, cache_read_tokens=20, cache_write_5m_tokens=20, cache_write_1h_tokens=20,
        audio_input_tokens=10, image_input_tokens=11,
    )  # fmt: skip
    assert exact_nano_usd(tiered, parts) == 101 * 2000
    assert exact_nano_usd(tiered, parts.but(image_input_tokens=10)) == 100 * 1000


def test_kinds_without_a_price_are_billed_as_what_they_are_part_of() -> None:
    plain = tokens("1", "3")
    for kind in (
        "cache_read_tokens",
        "cache_write_5m_tokens",
        "cache_write_1h_tokens",
        "audio_input_tokens",
        "image_input_tokens",
    ):
        assert exact_nano_usd(plain, Usage(**{kind: 7})) == 7_000, kind
    for kind in ("audio_output_tokens", "image_output_tokens"):
        assert exact_nano_usd(plain, Usage(**{kind: 7})) == 21_000, kind
    five = version(Rate("input_tokens", USD), Rate("cache_write_5m_tokens", 2 * USD))
    assert exact_nano_usd(five, Usage(cache_write_1h_tokens=7)) == 14_000


def test_reasoning_is_billed_as_output_unless_it_has_a_price() -> None:
    usage = Usage(output_tokens=100, reasoning_tokens=40)
    assert exact_nano_usd(tokens("1", "10"), usage) == 100 * 10_000
    cheaper = version(Rate("output_tokens", 10 * USD), Rate("reasoning_tokens", 3 * USD))
    assert exact_nano_usd(cheaper, usage) == 60 * 10_000 + 40 * 3_000


def test_what_has_no_price_is_named_and_not_silently_free() -> None:
    usage = Usage(input_tokens=1, images=2, web_searches=1, characters=5, audio_milliseconds=9)
    assert price(tokens(), usage).unpriced_kinds == ("images", "web_searches", "audio_milliseconds", "characters")
    assert tokens().unpriced_kinds(usage) == ["images", "web_searches", "audio_milliseconds", "characters"]
    free = version(Rate("input_tokens", 0, free=True), Rate("requests", USD // 100))
    assert price(free, Usage(input_tokens=5)) == Priced(1_000_000, 10_000_000)


def test_zero_must_be_said_to_be_free() -> None:
    with pytest.raises(ValueError, match="free"):
        Rate("input_tokens", 0)
    with pytest.raises(ValueError, match="free"):
        Rate("input_tokens", 1, free=True)


def test_rates_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="two prices"):
        version(Rate("input_tokens", 1), Rate("input_tokens", 2))
    with pytest.raises(ValueError, match="short requests"):
        version(Rate("input_tokens", 1, 200_000))


def test_counts_searches_images_requests_hours_and_characters_have_their_own_units() -> None:
    all_units = version(
        Rate("web_searches", 10 * USD), Rate("images", USD // 25), Rate("requests", USD // 100),
        Rate("audio_milliseconds", 37 * USD // 100), Rate("characters", 15 * USD),
    )  # fmt: skip
    assert exact_nano_usd(all_units, Usage(requests=1)) == 10_000_000
    assert exact_nano_usd(all_units, Usage(requests=0, web_searches=3)) == 30_000_000
    assert exact_nano_usd(all_units, Usage(requests=0, images=2)) == 80_000_000
    assert exact_nano_usd(all_units, Usage(requests=0, characters=1000)) == 15_000_000
    # $0.37 an hour does not end in any decimal unit per millisecond, and is exact all the same.
    assert exact_nano_usd(all_units, Usage(requests=0, audio_milliseconds=1)) == Fraction(370_000_000, 3_600_000)


def test_a_minimum_is_billed_only_when_something_was_used() -> None:
    least = version(Rate("audio_milliseconds", 3_600_000, minimum=10_000))
    assert [exact_nano_usd(least, Usage(audio_milliseconds=ms)) for ms in (0, 1, 9_999, 10_000, 10_001)] == [
        0, 10_000, 10_000, 10_000, 10_001,
    ]  # fmt: skip


def test_of_the_conditions_that_hold_the_first_counts_for_each_kind() -> None:
    base = tokens("4", "8")
    variants = (
        Variant((("service_tier", "flex"),), (Rate("input_tokens", 2 * USD),)),
        Variant((("processing", "batch"),), (Rate("input_tokens", 1 * USD), Rate("output_tokens", 3 * USD))),
    )
    conditional = replace(base, variants=variants)
    usage = Usage(input_tokens=1000, output_tokens=1000)

    def cost(**context: str) -> Fraction:
        return exact_nano_usd(conditional, usage, context=context) / 1_000_000

    assert cost() == cost(service_tier="default") == 4 + 8
    assert cost(service_tier="flex") == 2 + 8
    assert cost(processing="batch") == 1 + 3
    assert cost(processing="batch", service_tier="flex") == 2 + 3


def test_in_a_batch_a_kind_costs_its_batch_price_or_else_the_named_share_but_tools_their_full_price() -> None:
    book = version(
        Rate("input_tokens", 4 * USD),
        Rate("output_tokens", 10 * USD),
        Rate("cache_read_tokens", 1 * USD),
        Rate("web_searches", 10 * USD),
        variants=(Variant((("processing", "batch"),), (Rate("input_tokens", 3 * USD),)),),
    )
    half = {"batch_ppm": 500_000}

    def cost(usage: Usage, **options: object) -> int:
        return price_in_batch(book, book, usage, **{**half, "context": {}, **options}).provider_cost_nano_usd  # type: ignore[arg-type]

    assert cost(Usage(input_tokens=1_000_000)) == 3 * USD
    assert cost(Usage(output_tokens=1_000_000)) == 5 * USD
    assert cost(Usage(cache_read_tokens=1_000_000)) == USD // 2
    assert cost(Usage(web_searches=1_000)) == 10 * USD
    assert cost(Usage(output_tokens=1_000_000), batch_ppm=1_000_000) == 10 * USD
    # A price that is borrowed from another provider says nothing of this one's batches.
    assert cost(Usage(input_tokens=1_000_000), context=None) == 2 * USD
    # The standard price is not touched by having been asked for a batch.
    assert price(book, Usage(input_tokens=1_000_000)).provider_cost_nano_usd == 4 * USD


def test_a_batch_is_rounded_once_from_the_exact_amount() -> None:
    # Half of 5 nano-dollars are 2.5, which is 3; at a mark-up of 1.5 half of 5 are 0.375 micros, which is 0, held as 1.
    book = version(Rate("input_tokens", 5_000_000))
    one = Usage(input_tokens=1_000)
    assert charged(price_in_batch(book, book, one, batch_ppm=500_000)) == (250, 2_500)
    tiny = version(Rate("input_tokens", 5 * 1_000_000))
    assert charged(price_in_batch(tiny, tiny, Usage(input_tokens=1), 1_500_000, batch_ppm=500_000)) == (0, 3)
    up = price_in_batch(tiny, tiny, Usage(input_tokens=1), 1_500_000, batch_ppm=500_000, rounding=Rounding.UP)
    assert charged(up) == (1, 3)


def test_an_image_costs_what_its_size_and_quality_cost() -> None:
    images = version(
        Rate("input_tokens", 0, free=True),
        variants=(
            Variant((("quality", "hd"), ("size", "1024x1024")), (Rate("images", 8 * USD // 100),)),
            Variant((("quality", "standard"), ("size", "1024x1024")), (Rate("images", 4 * USD // 100),)),
        ),
    )
    usage = Usage(images=3)
    assert price(images, usage, context={"size": "1024x1024", "quality": "hd"}).provider_cost_nano_usd == 240_000_000
    assert price(images, usage, context={"size": "7x7", "quality": "hd"}).unpriced_kinds == ("images",)


@pytest.mark.parametrize(
    ("moment", "inside"), [("00:29:59", False), ("00:30:00", True), ("16:29:59", True), ("16:30:00", False)]
)
def test_a_time_of_day_counts_in_utc_with_its_end_excluded(moment: str, inside: bool) -> None:
    windowed = replace(
        tokens("1"), variants=(Variant((("utc_time", "00:30-16:30"),), (Rate("input_tokens", 2 * USD),)),)
    )
    at = datetime.fromisoformat(f"2026-11-20T{moment}+00:00")
    assert exact_nano_usd(windowed, Usage(input_tokens=1), at=at) == (2000 if inside else 1000)
    at = at.astimezone(datetime.fromisoformat("2026-01-01T00:00:00+05:30").tzinfo)
    assert exact_nano_usd(windowed, Usage(input_tokens=1), at=at) == (2000 if inside else 1000)


def test_a_window_may_pass_midnight_and_must_know_the_time() -> None:
    night = replace(tokens("2"), variants=(Variant((("utc_time", "22:00-06:00"),), (Rate("input_tokens", USD),)),))
    hours = [exact_nano_usd(night, Usage(input_tokens=1), at=AT.replace(hour=hour)) for hour in (21, 22, 0, 5, 6)]
    assert hours == [2000, 1000, 1000, 1000, 2000]
    with pytest.raises(ValueError, match="say when"):
        price(night, Usage(input_tokens=1))


def test_usage_is_never_negative_and_reasoning_never_more_than_output() -> None:
    with pytest.raises(ValueError, match="negative"):
        Usage(input_tokens=-1)
    with pytest.raises(ValueError, match="part of the output"):
        Usage(output_tokens=1, reasoning_tokens=2)


counts = st.integers(0, 10**9)
amounts = st.integers(1, 10**12)


@given(
    prices=st.fixed_dictionaries(dict.fromkeys(USAGE_KINDS, amounts)),
    used=st.fixed_dictionaries({kind: counts for kind in USAGE_KINDS if kind != "reasoning_tokens"}),
    markup_ppm=st.integers(1, 10**9),
)
def test_any_price_of_any_usage_is_the_exact_sum_rounded_once(
    prices: dict[str, int], used: dict[str, int], markup_ppm: int
) -> None:
    usage = Usage(**used)
    exact = sum(Fraction(prices[kind] * count, PER[kind]) for kind, count in used.items())
    full = version(*(Rate(kind, amount) for kind, amount in prices.items()))
    assert exact_nano_usd(full, usage) == exact
    micros = exact * markup_ppm / PAR_PPM / 10
    assert charged(price(full, usage, markup_ppm)) == (floor(micros + Fraction(1, 2)), floor(exact + Fraction(1, 2)))
    assert charged(price(full, usage, markup_ppm, rounding=Rounding.UP)) == (ceil(micros), ceil(exact))
