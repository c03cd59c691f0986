"""What a request permits the provider's own tools to do."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import tools
from bursar.pricing.usage import Usage

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=20) | st.sampled_from(["web_search", "auto", "type"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12) | st.just("type"), inner),
    max_leaves=10,
)


def of_openai(*offered: Any, **limits: Any) -> tools.Permitted:
    return tools.of_openai(offered, **limits)


@pytest.mark.parametrize("version", ["", "_2025_08_26", "_preview", "_preview_2025_03_11"])
def test_a_tool_is_known_in_all_its_versions(version: str) -> None:
    assert of_openai({"type": f"web_search{version}"}).most == Usage(requests=0, web_searches=tools.PRIOR_CALLS)


def test_calls_are_held_for_up_to_the_limit_of_the_request() -> None:
    both = ({"type": "web_search"}, {"type": "file_search", "vector_store_ids": ["vs_1"]})
    assert of_openai(*both).most == Usage(requests=0, web_searches=5, file_searches=5)
    assert of_openai(*both).guessed == Usage(requests=0, web_searches=995, file_searches=995)
    assert of_openai(*both, most_calls=2).guessed == Usage(requests=0)
    assert of_openai(*both, most_calls=2).most == Usage(requests=0, web_searches=2, file_searches=2)
    assert of_openai(*both, most_calls=0).most == Usage(requests=0)
    assert of_openai(*both, most_calls=10**6).most.web_searches == tools.MOST_CALLS


@pytest.mark.parametrize(
    ("container", "sure", "more"),
    [
        ({"type": "auto"}, 1, 0),
        ("cntr_1", 0, 1),
        (None, 0, 1),
        (7, 0, 1),
    ],
)
def test_a_container_of_its_own_is_billed_and_another_may_be(container: Any, sure: int, more: int) -> None:
    permitted = of_openai({"type": "code_interpreter", "container": container})
    assert (permitted.sure.code_sessions, permitted.most.code_sessions) == (sure, more)


def test_a_shell_is_billed_where_the_provider_runs_it() -> None:
    def shell(environment: str) -> Usage:
        permitted = of_openai({"type": "shell", "environment": {"type": environment}})
        return permitted.sure + permitted.most

    assert shell("container_auto").code_sessions == shell("container_reference").code_sessions == 1
    assert shell("local") == Usage(requests=0)


def test_the_price_goes_by_the_largest_container() -> None:
    def code(memory: str | None) -> dict[str, Any]:
        return {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": memory}}

    assert of_openai(code(None)).context == of_openai(code("1g")).context == {}
    assert of_openai(code("4g"), code("16g"), code("1g")).context == {"memory_limit": "16g"}


def test_what_bills_tokens_alone_permits_nothing_and_what_nobody_knows_has_no_price() -> None:
    free = [
        {"type": name} for name in ("function", "custom", "mcp", "computer_use_preview", "apply_patch", "namespace")
    ]
    assert of_openai(*free) == tools.Permitted(sure=Usage(requests=0), most=Usage(requests=0))
    unknown = of_openai({"type": "image_generation"}, {"type": "programmatic_tool_calling"}, {"type": "x" * 99})
    assert unknown.unpriced == ("image_generation", "programmatic_tool_calling", "x" * 60)


def test_in_chat_completions_only_functions_are_known() -> None:
    assert tools.of_chat([{"type": "function"}, {"type": "custom"}, {}, "odd"]) == ()
    assert tools.of_chat([{"type": "browser_search"}, {"type": "web_search"}]) == ("browser_search", "web_search")


def test_an_advisor_has_a_price_only_where_it_is_the_model_that_is_asked_for() -> None:
    def unpriced(advisor: object, model: str) -> tuple[str, ...]:
        return tools.of_anthropic([{"type": "advisor_20260301", "name": "advisor", "model": advisor}], model).unpriced

    assert unpriced("claude-x", "claude-x") == unpriced("claude-x", "anthropic/claude-x") == ()
    for other in ("claude-y", None, ["claude-x"]):
        assert unpriced(other, "claude-x") == ("advisor of another model",)


@given(st.lists(anything, max_size=5), st.none() | st.integers(0, 10**9))
def test_nothing_that_a_client_writes_raises(offered: list[Any], most_calls: int | None) -> None:
    for permitted in (tools.of_openai(offered, most_calls=most_calls), tools.of_anthropic(offered, "m")):
        assert max((permitted.sure + permitted.most).as_array()) <= tools.MOST_CALLS
    tools.of_chat(offered)
