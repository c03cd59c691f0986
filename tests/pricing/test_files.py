"""Price files: CSV and JSON say the same, numbers are exact, and each bad row is named with its reason."""

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.pricing.files import read
from bursar.pricing.models import NameIndex

CSV = """\
provider,model,kind,price_usd,unit,above_input_tokens,when,free,match,effective_from,source
Acme,acme-large,input_tokens,2.50,1M tokens,,,,acme-large-20*;big,,https://acme.example/pricing
Acme,acme-large,input_tokens,5,1M tokens,200000,,,,,
Acme,acme-large,output_tokens,10,1M tokens,,,,,,
Acme,acme-large,output_tokens,5,1M tokens,,service_tier=flex,,,,

Acme,acme-large,output_tokens,12,1M tokens,,,,,2027-01-01,
Acme,acme-pictures,images,0.04,image,,size=1024x1024;quality=hd,,,,
Acme,acme-pictures,input_tokens,0,1M tokens,,,yes,,,
"""
JSON = {
    "models": [
        {
            "provider": "acme", "model": "acme-large", "match": ["acme-large-20*", "big"],
            "source": "https://acme.example/pricing",
            "rates": [
                {"kind": "input_tokens", "price_usd": 2.50},
                {"kind": "input_tokens", "price_usd": "5", "above_input_tokens": 200000},
                {"kind": "output_tokens", "price_usd": 10, "unit": "1M tokens"},
                {"kind": "output_tokens", "price_usd": "5", "when": {"service_tier": "flex"}},
            ],
        },
        {
            "provider": "acme", "model": "acme-large", "effective_from": "2027-01-01",
            "rates": [{"kind": "output_tokens", "price_usd": 12}],
        },
        {
            "provider": "acme", "model": "acme-pictures",
            "rates": [
                {"kind": "images", "price_usd": "0.04", "when": {"quality": "hd", "size": "1024x1024"}},
                {"kind": "input_tokens", "price_usd": 0, "free": True},
            ],
        },
    ]
}  # fmt: skip
HEAD = "provider,model,kind,price_usd,unit,above_input_tokens,when,free,effective_from,withdrawn\n"


def test_csv_and_json_say_the_same() -> None:
    of_csv, of_json = read(CSV), read(json.dumps(JSON))
    assert of_csv.errors == of_json.errors == ()
    assert of_csv.prices == of_json.prices
    large, pictures = of_csv.prices.models
    assert [each.effective_from.year for each in large.segments] == [1970, 2027]
    assert pictures.segments[0].prices is not None
    assert pictures.segments[0].prices.rates[0].free


def test_a_byte_order_mark_and_other_line_ends_do_no_harm() -> None:
    assert read("\ufeff" + CSV.replace("\n", "\r\n")).prices == read(CSV).prices


def test_the_match_column_names_further_names() -> None:
    listed = read(CSV).prices
    index = NameIndex(listed.providers, listed.model_names())
    for name in ("acme-large", "ACME-LARGE", "acme-large-2026-01-01", "big"):
        found = index.find("acme", name)
        assert found is not None, name
        assert found.model == "acme-large"
    assert index.find("acme", "bigger") is None


def test_numbers_of_json_are_never_floats() -> None:
    text = (
        '{"models": [{"provider": "a", "model": "m", "rates": [{"kind": "input_tokens", "price_usd": 0.000000003}]}]}'
    )
    prices = read(text).prices.models[0].segments[0].prices
    assert prices is not None
    assert prices.rates[0].price_nano_usd == 3


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("acme,m,input_tokens,-1,1M tokens,,,,,", "below zero"),
        ("acme,m,input_tokens,1e3,1M tokens,,,,,", "not a decimal amount"),
        ("acme,m,input_tokens,NaN,1M tokens,,,,,", "not a decimal amount"),
        ("acme,m,input_tokens,0.0000000001,1M tokens,,,,,", "more than 9 decimal places"),
        ("acme,m,input_tokens,10000000000,1M tokens,,,,,", "too large"),
        ("acme,m,input_tokens,,1M tokens,,,,,", "price is missing"),
        ("acme,m,input_tokens,0,1M tokens,,,,,", "marked free"),
        ("acme,m,input_tokens,1,1M tokens,,,yes,,", "marked free"),
        ("acme,m,input_tokens,1,1K tokens,,,,,", "priced per 1M tokens"),
        ("acme,m,input_tokens,1,,,,,,", "unit is missing"),
        ("acme,m,input,1,1M tokens,,,,,", "no such kind"),
        ("acme,,input_tokens,1,1M tokens,,,,,", "model is missing"),
        ("acme,m,input_tokens,1,1M tokens,200000,,,,", "none for short requests"),
        ("acme,m,input_tokens,1,1M tokens,2e5,,,,", "not a whole number"),
        ("acme,m,input_tokens,1,1M tokens,,flex,,,", "not a condition"),
        ("acme,m,input_tokens,1,1M tokens,,utc_time=25:00,,,", "time of day"),
        ("acme,m,input_tokens,1,1M tokens,,utc_time=25:00-26:00,,,", "time of day"),
        ("acme,m,input_tokens,1,1M tokens,,,perhaps,,", "neither true nor false"),
        ("acme,m,input_tokens,1,1M tokens,,,,yesterday,", "not a date or time"),
        ("acme,m,input_tokens,1,1M tokens,,,,2026-12-01T00:00:00,", "without its offset"),
        ("acme,m,input_tokens,1,1M tokens,,,,,\nacme,m,input_tokens,2,1M tokens,,,,,", "two prices"),
        ("acme,m,,,,,,,,true\nacme,m,input_tokens,2,1M tokens,,,,,", "withdrawn"),
        ("acme,m,input_tokens,1,1M tokens", "5 values for 10 columns"),
    ],
)
def test_a_bad_row_is_named_with_its_reason(line: str, reason: str) -> None:
    found = read(f"{HEAD}good,fine,input_tokens,1,1M tokens,,,,,\n{line}\n")
    assert [error for error in found.errors if reason in error.reason], found.errors
    assert [each.model for each in found.prices.models if each.provider == "good"] == ["fine"]
    assert all(error.place in ("line 3", "line 4") for error in found.errors)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "missing columns"),
        ("provider,model,kind,price_usd\n", "missing columns: unit"),
        ("provider,model,kind,price_usd,unit,colour\n", "unknown or repeated columns: colour"),
        ('provider,model,kind,price_usd,unit\n"a', "not CSV"),
        ("{", "not JSON"),
        ("{}", "no list of models"),
        ('{"models": [], "modells": []}', "unknown fields: modells"),
        ('{"models": [], "models": []}', "twice"),
        ('{"models": ' + "[" * 100_000, "deep"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(text: str, reason: str) -> None:
    found = read(text)
    assert [error.place for error in found.errors] == ["file"]
    assert reason in found.errors[0].reason
    assert found.prices.models == ()


def test_a_bad_row_of_json_is_named_by_its_pointer() -> None:
    text = json.dumps(
        {
            "models": [
                {"provider": "a", "model": "m", "rates": [{"kind": "images", "price_usd": True}]},
                {"provider": "a", "model": "n", "rates": [{"kind": "images", "price_usd": 1, "per": 1000}]},
                {"provider": "a", "model": "o", "rates": [], "match": [{"regex": "("}]},
                {"provider": "a", "model": "p"},
                7,
            ]
        }
    )
    assert [error.place for error in read(text).errors] == [
        "#/models/0/rates/0", "#/models/1/rates/0", "#/models/2", "#/models/4", "#/models/3",
    ]  # fmt: skip


@given(st.text(max_size=300) | st.text(max_size=100).map(lambda text: HEAD + text))
def test_any_text_is_read_or_rejected_and_never_raises(text: str) -> None:
    found = read(text)
    assert found.errors or found.prices.models or text.strip().startswith(HEAD.strip())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.floats(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=5,
)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(
                ("provider", "model", "match", "effective_from", "context_window", "withdrawn"), json_values
            ),
            "rates": json_values
            | st.lists(
                st.fixed_dictionaries(
                    {"kind": st.just("images") | json_values},
                    optional=dict.fromkeys(("price_usd", "unit", "when", "free", "above_input_tokens"), json_values),
                ),
                max_size=2,
            ),
        },
    )
)
def test_any_json_is_read_or_rejected_and_never_raises(model: dict[str, object]) -> None:
    read(json.dumps({"models": [{"provider": "a", "model": "b", **model}]}))


def test_the_examples_of_the_documentation_are_read() -> None:
    page = (Path(__file__).parents[2] / "docs" / "prices.md").read_text(encoding="utf-8")
    examples = re.findall(r"```(?:csv|json)[^\n]*\n(.*?)```", page, re.DOTALL)
    of_csv, of_json = (read(example) for example in examples)
    assert of_csv.errors == of_json.errors == ()
    assert of_csv.prices.models == of_json.prices.models
