import contextlib
import itertools
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import anthropic_wire, tokens, tools, wire
from bursar.pricing.usage import Usage
from bursar.problems import Problem


class PoolExhausted(Problem):
    status, code, title = 402, "test_anthropic_pool_exhausted", "Not enough credits"


def request_of(**fields: Any) -> wire.WireRequest:
    body = {"model": "claude-x", "max_tokens": 100, "messages": [{"role": "user", "content": "Hello there"}], **fields}
    return anthropic_wire.read_request(json.dumps(body).encode())


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


# -- requests


def test_a_request_is_read_as_far_as_metering_needs() -> None:
    request = request_of(stream=True, service_tier="standard_only")
    assert (request.model, request.stream, request.max_output_tokens, request.choices) == ("claude-x", True, 100, 1)
    assert (request.wants_usage, request.service_tier) == (True, "standard_only")
    assert request.hold_for(100) == Usage(input_tokens=request.input_tokens, output_tokens=100)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": messages("twelve chars")}, 4 + 3),
        ({"messages": messages("twelve chars"), "system": "twelve chars"}, 4 + 3 + 3),
        ({"messages": messages("x"), "system": [{"type": "text", "text": "twelve chars"}]}, 4 + 3 + 1),
        ({"messages": messages([{"type": "text", "text": "twelve chars"}])}, 4 + 3),
        ({"messages": messages([{"type": "image", "source": {"type": "base64", "data": "A" * 99_999}}])}, 4 + 1_600),
        ({"messages": messages([{"type": "document", "source": {"type": "base64", "data": "A" * 90_000}}])}, 4 + 3_000),
        ({"messages": messages([{"type": "document", "source": {"type": "url", "url": "https://x"}}])}, 4 + 1_500),
        (
            {"messages": messages([{"type": "tool_result", "content": [{"type": "text", "text": "twelve chars"}]}])},
            4 + 3,
        ),
        ({"messages": messages([{"type": "tool_result", "content": [{"type": "image", "source": {}}]}])}, 4 + 1_600),
    ],
)
def test_the_input_is_estimated_by_our_own_rule(fields: dict[str, Any], expected: int) -> None:
    assert request_of(**fields).input_tokens == expected


def test_tools_are_part_of_the_input_and_permitted_searches_are_held_for() -> None:
    tool = {"name": "weather", "input_schema": {"type": "object"}}
    plain = request_of().input_tokens
    # The two parts are rounded together.
    assert (
        0 <= plain + 350 + tokens.whole_tokens(tokens.nested_units([tool])) - request_of(tools=[tool]).input_tokens <= 1
    )
    searches = [{"type": "web_search_20250305", "name": "web_search", "max_uses": 5}, {"type": "web_search_20260209"}]
    # The second names no limit.
    assert request_of(tools=searches).hold_for(0).web_searches == 5 + tools.PRIOR_CALLS


def test_input_marked_for_the_cache_is_held_for_at_the_price_of_writing_it() -> None:
    text = {"type": "text", "text": "twelve chars", "cache_control": {"type": "ephemeral"}}
    assert request_of(messages=messages([text])).estimate.cache_write_5m_tokens > 0
    text["cache_control"] = {"type": "ephemeral", "ttl": "1h"}
    assert request_of(messages=messages([text])).estimate.cache_write_1h_tokens > 0
    assert request_of(cache_control={"type": "ephemeral"}).estimate.cache_write_5m_tokens > 0


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"model": "m", "messages": []}',
        b'{"model": "m", "max_tokens": null, "messages": []}',
        b'{"model": "m", "max_tokens": -1, "messages": []}',
        b'{"model": "m", "max_tokens": 1}',
        b'{"model": "m", "max_tokens": 1, "messages": [5]}',
        b'{"model": "m", "max_tokens": 1, "Max_Tokens": 9, "messages": []}',
        b'{"model": "m", "max_tokens": 1, "messages": [], "tools": ' + b"[" * 200 + b"]" * 200 + b"}",
        b'{"model": "m", "max_tokens": 1, "messages": [{"content": '
        + b'[{"type": "tool_result", "content": ' * 70
        + b'"x"'
        + b"}]" * 70
        + b"}]}",
    ],
)
def test_a_body_that_metering_cannot_read_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(wire.UnreadableRequest):
        anthropic_wire.read_request(body)


KEYS = st.sampled_from(["model", "messages", "role", "content", "type", "text", "source", "data", "system", "tools"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(KEYS, inner),
)


@given(JSON, JSON)
def test_no_body_makes_the_reader_fail_in_another_way(content: Any, tools: Any) -> None:
    with contextlib.suppress(wire.UnreadableRequest):
        assert request_of(messages=messages(content), system=content, tools=tools).estimate.total_tokens >= 0


def test_only_the_model_changes_on_the_way_to_the_provider() -> None:
    body = b'{"max_tokens": 9, "model": "alias", "messages": [ ], "temperature": 0.10, "metadata": {"user_id": 1e2}}'
    sent = anthropic_wire.upstream_body(anthropic_wire.read_request(body), model="claude-y")
    assert json.loads(sent) == {**json.loads(body), "model": "claude-y"}
    assert b"0.10" in sent
    assert b"1e2" in sent


# -- usage

USAGES: list[tuple[str, dict[str, Any], Usage | None]] = [
    (
        "plain",
        {
            "input_tokens": 2095,
            "cache_creation_input_tokens": None,
            "cache_read_input_tokens": None,
            "output_tokens": 503,
            "service_tier": "standard",
        },
        Usage(input_tokens=2095, output_tokens=503),
    ),
    (
        "caches with their lives",
        {
            "input_tokens": 2048,
            "cache_read_input_tokens": 1800,
            "cache_creation_input_tokens": 248,
            "cache_creation": {"ephemeral_5m_input_tokens": 148, "ephemeral_1h_input_tokens": 100},
            "output_tokens": 503,
        },
        Usage(
            input_tokens=2048,
            cache_read_tokens=1800,
            cache_write_5m_tokens=148,
            cache_write_1h_tokens=100,
            output_tokens=503,
        ),
    ),
    (
        "a cache write without a split lives five minutes",
        {"input_tokens": 3, "cache_creation_input_tokens": 248, "output_tokens": 5},
        Usage(input_tokens=3, cache_write_5m_tokens=248, output_tokens=5),
    ),
    (
        "thinking and searches",
        {
            "input_tokens": 105,
            "output_tokens": 239,
            "output_tokens_details": {"thinking_tokens": 200},
            "server_tool_use": {"web_search_requests": 2, "web_fetch_requests": 1},
        },
        Usage(input_tokens=105, output_tokens=239, reasoning_tokens=200, web_searches=2),
    ),
    (
        "compaction and advisors are billed beside the top level",
        {
            "input_tokens": 100,
            "output_tokens": 10,
            "iterations": [
                {"type": "compaction", "input_tokens": 1000, "output_tokens": 50, "cache_read_input_tokens": 7},
                {"type": "message", "input_tokens": 100, "output_tokens": 10},
                {"type": "advisor_message", "input_tokens": 20, "output_tokens": 3, "model": "claude-z"},
            ],
        },
        Usage(input_tokens=1120, cache_read_tokens=7, output_tokens=63),
    ),
    (
        "all from the cache",
        {"input_tokens": 0, "cache_read_input_tokens": 9, "output_tokens": 1},
        Usage(cache_read_tokens=9, output_tokens=1),
    ),
    ("zeros are no count", {"input_tokens": 0, "output_tokens": 0}, None),
    ("texts are no count", {"input_tokens": "5", "output_tokens": 1}, None),
]


@pytest.mark.parametrize(("reported", "expected"), [each[1:] for each in USAGES], ids=[each[0] for each in USAGES])
def test_usage_becomes_the_canonical_kinds(reported: dict[str, Any], expected: Usage | None) -> None:
    assert anthropic_wire.read_usage(json.dumps(reported).encode()) == expected


# -- answers


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def delta(**fields: Any) -> bytes:
    return event("content_block_delta", index=0, delta=fields)


START = event(
    "message_start",
    message={
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "content": [],
        "model": "claude-x-1",
        "usage": {
            "input_tokens": 25,
            "cache_creation_input_tokens": 30,
            "cache_creation": {"ephemeral_5m_input_tokens": 10, "ephemeral_1h_input_tokens": 20},
            "output_tokens": 1,
            "service_tier": "standard",
        },
    },
)
OPEN = event("content_block_start", index=0, content_block={"type": "text", "text": ""})
SPOKEN = [OPEN, event("ping"), delta(type="text_delta", text="Hello "), delta(type="text_delta", text="world")]
END = event("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 15})
STOP = event("message_stop")
WHOLE = b"".join([START, *SPOKEN, END, STOP])
WHOLE_USAGE = Usage(input_tokens=25, cache_write_5m_tokens=10, cache_write_1h_tokens=20, output_tokens=15)


def fed(meter: wire.UsageMeter, stream: bytes, size: int = 7) -> bytes:
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    return b"".join(map(meter.feed, pieces)) + meter.finish()


def meter_of(stream: bytes) -> wire.UsageMeter:
    meter = anthropic_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, stream) == stream
    return meter


def test_a_stream_reports_its_input_first_and_its_output_last() -> None:
    meter = meter_of(WHOLE)
    assert meter.measure() == wire.Measured(WHOLE_USAGE, estimated=False)
    assert (meter.completed, meter.model, meter.tier, meter.output_so_far) == (True, "claude-x-1", "standard", 3)


def test_cumulative_counts_at_the_end_replace_those_of_the_start() -> None:
    end = event(
        "message_delta", delta={}, usage={"input_tokens": 400, "output_tokens": 15, "cache_read_input_tokens": None}
    )
    assert meter_of(START + end + STOP).measure().usage.input_tokens == 400


def test_a_cut_stream_has_the_reported_input_and_the_output_seen() -> None:
    measured = meter_of(b"".join([START, *SPOKEN])).measure()
    assert measured.estimated
    assert measured.usage == Usage(input_tokens=25, cache_write_5m_tokens=10, cache_write_1h_tokens=20, output_tokens=3)


def test_a_stream_without_any_usage_is_counted_by_us() -> None:
    bare = event("message_start", message={"model": "claude-x-1"})
    measured = meter_of(b"".join([bare, *SPOKEN, event("message_delta", delta={}), STOP])).measure()
    expected = Usage(input_tokens=request_of().input_tokens, output_tokens=3)
    assert measured == wire.Measured(expected, estimated=True)


def test_searches_that_were_only_permitted_are_not_charged() -> None:
    request = request_of(stream=True, tools=[{"type": "web_search_20250305", "max_uses": 5}])
    assert anthropic_wire.UsageMeter(request).counted().web_searches == 0


def server_tool(name: str) -> bytes:
    block = {"type": "server_tool_use", "id": "srvtoolu_1", "name": name, "input": {}}
    return event("content_block_start", index=0, content_block=block)


def test_searches_that_a_cut_stream_showed_are_charged() -> None:
    request = request_of(stream=True, tools=[{"type": "web_search_20250305", "max_uses": 5}])
    meter = anthropic_wire.UsageMeter(request)
    meter.feed(START + server_tool("web_search") * 2)
    assert meter.measure().usage.web_searches == 2


@pytest.mark.parametrize(
    ("tools", "sessions"),
    [
        ([{"type": "code_execution_20250825", "name": "code_execution"}], 1),
        ([{"type": "code_execution_20250825"}, {"type": "web_search_20250305"}], 1),
        ([{"type": "code_execution_20260120"}, {"type": "web_search_20260209"}], 0),
        ([{"type": "code_execution_20260120"}, {"type": "web_fetch_20260318"}], 0),
    ],
)
def test_code_that_the_provider_ran_is_one_container_unless_a_newer_web_tool_makes_it_free(
    tools: list[dict[str, Any]], sessions: int
) -> None:
    request = request_of(stream=True, tools=tools)
    assert request.hold_for(0).code_sessions == sessions
    idle, busy = anthropic_wire.UsageMeter(request), anthropic_wire.UsageMeter(request)
    idle.feed(b"".join([START, *SPOKEN, END, STOP]))
    ran = server_tool("bash_code_execution") + server_tool("text_editor_code_execution")
    busy.feed(b"".join([START, ran, *SPOKEN, END, STOP]))
    assert [meter.measure().usage.code_sessions for meter in (idle, busy)] == [0, sessions]
    assert not busy.measure().estimated


def test_a_tool_that_nobody_knows_has_no_price() -> None:
    known = [
        {"type": "custom", "name": "a"}, {"name": "b"}, {"type": "bash_20250124"}, {"type": "computer_20251124"},
        {"type": "tool_search_tool_bm25_20251119"}, {"type": "mcp_toolset"}, {"type": "web_fetch_20250910"},
    ]  # fmt: skip
    assert request_of(tools=known).unpriced_tools == ()
    assert request_of(tools=[*known, {"type": "dream_20270101"}, {"type": 7}]).unpriced_tools == ("dream_20270101",)


@pytest.mark.parametrize(
    "output",
    [
        delta(type="text_delta", text="four"),
        delta(type="thinking_delta", thinking="four"),
        delta(type="input_json_delta", partial_json="four"),
        event("content_block_start", index=0, content_block={"type": "tool_use", "name": "four", "input": {}}),
    ],
)
def test_everything_that_the_model_puts_out_counts(output: bytes) -> None:
    assert meter_of(output).output_so_far == 1


def test_results_of_the_providers_own_tools_and_signatures_are_no_output() -> None:
    result = {"type": "web_search_tool_result", "content": [{"title": "x", "url": "https://x"}]}
    stream = event("content_block_start", index=0, content_block=result) + delta(
        type="signature_delta", signature="abc"
    )
    assert meter_of(stream).output_so_far == 0


def test_an_error_inside_a_stream_is_seen_and_passed_on() -> None:
    meter = meter_of(START + event("error", error={"type": "overloaded_error", "message": "Overloaded"}))
    assert (meter.error, meter.completed) == ("overloaded_error", False)


@pytest.mark.parametrize("fallbacks", [[{"model": "claude-y", "max_tokens": 9_000}], "default"])
def test_no_provider_falls_back_to_another_model_by_itself(fallbacks: Any) -> None:
    with pytest.raises(wire.OtherModelsNotMetered):
        request_of(fallbacks=fallbacks)
    assert request_of(fallbacks=[]).model == "claude-x"


def test_the_place_of_the_work_is_a_condition_of_its_price() -> None:
    assert request_of(inference_geo="us", speed="fast").price_context == {"speed": "fast", "inference_geo": "us"}


def test_a_fast_answer_says_so() -> None:
    start = event("message_start", message={"usage": {"input_tokens": 1, "output_tokens": 1, "speed": "fast"}})
    assert meter_of(start).told == {"speed": "fast"}
    assert request_of(speed="fast").price_context == {"speed": "fast"}


def test_a_plain_answer_is_read_whole() -> None:
    answer = {"type": "message", "model": "claude-x-1", "content": [{"type": "text", "text": "Hello world"}]}
    meter = anthropic_wire.UsageMeter(request_of())
    meter.read_body(json.dumps({**answer, "usage": {"input_tokens": 9, "output_tokens": 4}}).encode())
    assert meter.measure() == wire.Measured(Usage(input_tokens=9, output_tokens=4), estimated=False)
    meter = anthropic_wire.UsageMeter(request_of())
    meter.read_body(json.dumps(answer).encode())
    expected = Usage(input_tokens=request_of().input_tokens, output_tokens=3)
    assert meter.measure() == wire.Measured(expected, estimated=True)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=30))
def test_any_cut_of_a_stream_gives_the_same_answer_and_the_same_usage(cuts: list[int]) -> None:
    meter = anthropic_wire.UsageMeter(request_of(stream=True))
    places = [0, *sorted(cuts), len(WHOLE)]
    assert b"".join(meter.feed(WHOLE[a:b]) for a, b in itertools.pairwise(places)) + meter.finish() == WHOLE
    assert meter.usage() == WHOLE_USAGE


@given(st.lists(JSON))
def test_no_stream_makes_the_meter_fail(datas: list[Any]) -> None:
    kinds = ["message_start", "content_block_start", "content_block_delta", "message_delta", "error"]
    meter = anthropic_wire.UsageMeter(request_of(stream=True))
    for data, kind in itertools.product(datas, kinds):
        fields = {"message": data, "content_block": data, "delta": data, "usage": data, "error": data}
        fed(meter, event(kind, **fields), size=1000)
    assert meter.measure().usage.total_tokens > 0


# -- refusals


def test_a_refusal_has_anthropics_shape_with_our_code_and_why() -> None:
    problem = PoolExhausted("The pool is empty", why={"binding": "pool"})
    assert json.loads(anthropic_wire.refusal(problem, request_id="req_1")) == {
        "type": "error",
        "error": {
            "type": "billing_error",
            "message": "The pool is empty",
            "code": "test_anthropic_pool_exhausted",
            "why": {"binding": "pool"},
        },
        "request_id": "req_1",
    }
    assert anthropic_wire.stream_refusal(problem).startswith(b"event: error\ndata: {")
