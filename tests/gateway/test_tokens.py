import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway.tokens import TooDeep, count_tokens, nested_units, text_units, whole_tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a", 1),
        ("four", 1),
        ("fours", 2),
        ("123", 1),
        ("1234", 2),
        ("{}", 1),
        ("{}}", 2),
        ("The quick brown fox jumps over the lazy dog.", 12),  # 10 by OpenAI's o200k_base
        ("你好", 2),
        ("👋", 1),
    ],
)
def test_the_published_rule_counts(text: str, tokens: int) -> None:
    assert count_tokens(text) == tokens


@given(st.text(), st.text())
def test_units_of_parts_add_up_to_the_units_of_the_whole(left: str, right: str) -> None:
    assert text_units(left + right) == text_units(left) + text_units(right)


@given(st.text(alphabet=st.characters(codec=None, categories=None)))
def test_any_text_has_a_count_also_with_lone_surrogates(text: str) -> None:
    assert (count_tokens(text) == 0) == (text == "")


def test_all_texts_inside_a_value_count() -> None:
    assert nested_units({"name": ["four", 123, None, True]}) == text_units("namefour123True")


def test_a_file_counts_by_its_size_and_not_as_text() -> None:
    page = "data:application/pdf;base64," + "A" * 99_972
    assert whole_tokens(nested_units(page)) == 100_000 // 30
    assert whole_tokens(nested_units("A/b+" * 1_000)) == 1_500
    assert whole_tokens(nested_units("four " * 1_000)) == 1_250


def test_a_value_that_nests_too_deep_is_refused() -> None:
    value: object = "x"
    for _ in range(65):
        value = [value]
    with pytest.raises(TooDeep):
        nested_units(value)
