import contextlib
import itertools
import json
from typing import Any

import openai.types.responses
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import responses_wire, tokens, tools, wire
from bursar.pricing.usage import Usage
from bursar.problems import Problem

PRIOR = responses_wire.PRIOR_CONTEXT_TOKENS


class PoolExhausted(Problem):
    status, code, title = 402, "test_responses_pool_exhausted", "Not enough credits"


def request_of(**fields: Any) -> wire.WireRequest:
    body = {"model": "gpt-5", "input": "twelve chars", **fields}
    return responses_wire.read_request(json.dumps(body).encode())


# -- requests


def test_no_provider_chooses_another_model_by_itself() -> None:
    with pytest.raises(wire.OtherModelsNotMetered):
        request_of(models=["gpt-5", "gpt-5-pro"])


def test_a_request_is_read_as_far_as_metering_needs() -> None:
    request = request_of(stream=True, max_output_tokens=100, service_tier="flex", store=False, background=False)
    assert (request.model, request.stream, request.max_output_tokens, request.choices) == ("gpt-5", True, 100, 1)
    assert (request.wants_usage, request.output_kind, request.service_tier) == (True, "output_tokens", "flex")
    assert request.hold_for(100) == Usage(input_tokens=request.input_tokens, output_tokens=100)


def said(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 3 + 4 + 3),
        ({"instructions": "twelve chars"}, 3 + 2 * (4 + 3)),
        ({"input": [{"role": "user", "content": "twelve chars"}]}, 3 + 4 + 3),
        ({"input": said({"type": "input_text", "text": "twelve chars"})}, 3 + 4 + 3),
        ({"input": said({"type": "input_image", "image_url": "data:" + "A" * 99_999})}, 3 + 4 + 1_445),
        ({"input": said({"type": "input_image", "file_id": "file_1", "detail": "low"})}, 3 + 4 + 85),
        ({"input": said({"type": "input_file", "file_data": "A" * 90_000})}, 3 + 4 + 3_000),
        ({"input": said({"type": "input_file", "file_id": "file_1"})}, 3 + 4 + 1_500),
        ({"input": [{"type": "function_call_output", "call_id": "call_1", "output": "twelve chars"}]}, 3 + 4 + 3),
        (
            {"input": [{"type": "function_call_output", "output": [{"type": "input_image", "image_url": "x"}]}]},
            3 + 4 + 1_445,
        ),
        ({"input": [{"type": "computer_call_output", "output": {"type": "computer_screenshot"}}]}, 3 + 4 + 1_445),
        ({"input": None, "prompt": {}}, 3 + PRIOR),
        ({"input": []}, 3),
    ],
)
def test_the_input_is_estimated_by_our_own_rule(fields: dict[str, Any], expected: int) -> None:
    assert request_of(**fields).input_tokens == expected


def test_sound_is_audio_input() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 50_000, "format": "wav"}}
    assert request_of(input=said(sound)).estimate.audio_input_tokens == 51


def test_tools_formats_and_the_variables_of_a_prompt_are_part_of_the_input() -> None:
    plain = request_of().input_tokens
    assert request_of(tools=[{"type": "function", "name": "weather", "parameters": {}}]).input_tokens > plain
    assert request_of(text={"format": {"type": "json_schema", "name": "answer"}}).input_tokens > plain
    prompt = request_of(prompt={"id": "pmpt_1"}).input_tokens
    assert request_of(prompt={"id": "pmpt_1", "variables": {"name": "Dana"}}).input_tokens > prompt


@pytest.mark.parametrize(
    "kept",
    [
        {"previous_response_id": "resp_1"},
        {"conversation": "conv_1"},
        {"conversation": {"id": "conv_1"}},
        {"prompt": {"id": "pmpt_1"}},
        {"input": [{"type": "item_reference", "id": "msg_1"}]},
    ],
)
def test_context_that_the_provider_keeps_is_held_for_by_a_prior(kept: dict[str, Any]) -> None:
    assert PRIOR < request_of(**kept).input_tokens < PRIOR + 50
    assert request_of(previous_response_id=None, conversation=None).input_tokens < PRIOR


def test_permitted_calls_of_tools_are_held_for_and_a_container_is_sure() -> None:
    code = {"type": "code_interpreter", "container": {"type": "auto", "memory_limit": "4g"}}
    request = request_of(tools=[{"type": "web_search"}, code], max_tool_calls=3)
    held = request.hold_for(10)
    assert (held.web_searches, held.code_sessions, held.output_tokens, held.requests) == (3, 1, 10, 1)
    assert (request.estimate.web_searches, request.estimate.code_sessions) == (0, 1)
    assert request.price_context == {"memory_limit": "4g"}
    assert request_of(tools=[{"type": "image_generation"}]).unpriced_tools == ("image_generation",)
    assert request_of(model="x/y:online", plugins=[{"id": "web"}]).unpriced_tools == ("plugins", ":online")


def test_tools_that_the_input_adds_are_tools() -> None:
    added = [{"type": "additional_tools", "role": "developer", "tools": [{"type": "file_search"}]}]
    assert request_of(input=added).hold_for(0).file_searches == tools.PRIOR_CALLS


def test_a_response_in_the_background_is_refused() -> None:
    for more in ({}, {"stream": True}):
        with pytest.raises(responses_wire.BackgroundNotMetered):
            request_of(background=True, **more)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"\xff\xfe",
        b'{"input": "x"}',
        b'{"model": "", "input": "x"}',
        b'{"model": "m"}',
        b'{"model": "m", "messages": []}',
        b'{"model": "m", "input": 7}',
        b'{"model": "m", "input": ["hi"]}',
        b'{"model": "m", "input": {"role": "user"}}',
        b'{"model": "m", "instructions": 7}',
        b'{"model": "m", "input": "x", "stream": "yes"}',
        b'{"model": "m", "input": "x", "background": "yes"}',
        b'{"model": "m", "input": "x", "max_output_tokens": -1}',
        b'{"model": "m", "input": "x", "max_output_tokens": 1.5}',
        b'{"model": "m", "input": "x", "max_output_tokens": 99999999999999999999}',
        b'{"model": "m", "input": "x", "max_tool_calls": -1}',
        b'{"model": "m", "input": "x", "Max_Output_Tokens": 5}',
        b'{"model": "m", "input": [{"content": ' + b"[" * 200 + b"]" * 200 + b"}]}",
        b'{"model": "m", "tools": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_what_cannot_be_read_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(wire.UnreadableRequest):
        responses_wire.read_request(body)


names = st.text(max_size=8) | st.sampled_from(
    ["type", "content", "output", "tools", "input", "model", "id", "delta", "item", "response", "usage", "container"]
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=5),
    max_leaves=20,
)


@given(st.dictionaries(names | st.sampled_from(["max_tool_calls", "text", "prompt", "stream"]), anything))
def test_hostile_input_is_read_or_refused_by_name(fields: dict[str, Any]) -> None:
    body = json.dumps({"model": "m", "input": [], **fields}).encode()
    with contextlib.suppress(wire.UnreadableRequest, responses_wire.BackgroundNotMetered):
        request = responses_wire.read_request(body)
        assert json.loads(responses_wire.upstream_body(request, model="n"))["model"] == "n"


def test_the_provider_gets_the_body_as_written_but_for_the_model() -> None:
    body = b'{"model": "fast", "input": "hi", "stream": true, "temperature": 0.10, "metadata": {"b":1, "a" : [ 1.0 ]}}'
    sent = responses_wire.upstream_body(responses_wire.read_request(body), model="gpt-5-mini")
    assert b"0.10" in sent
    assert b'{"b":1, "a" : [ 1.0 ]}' in sent
    assert json.loads(sent) == {**json.loads(body), "model": "gpt-5-mini"}


# -- usage

USAGES: list[tuple[str, dict[str, Any], Usage | None]] = [
    (
        "OpenAI",
        {
            "input_tokens": 2006,
            "input_tokens_details": {"cached_tokens": 1920},
            "output_tokens": 300,
            "output_tokens_details": {"reasoning_tokens": 192},
            "total_tokens": 2306,
        },
        Usage(input_tokens=86, cache_read_tokens=1920, output_tokens=300, reasoning_tokens=192),
    ),
    (
        "cache writes, with their lives",
        {
            "input_tokens": 5000,
            "input_tokens_details": {
                "cached_tokens": 1024,
                "cache_write_tokens": 2048,
                "cache_write_tokens_details": {"ttl_30m_tokens": 2000, "ttl_12h_tokens": 48},
            },
            "output_tokens": 10,
        },
        Usage(input_tokens=1928, cache_read_tokens=1024, cache_write_5m_tokens=2048, output_tokens=10),
    ),
    ("no details", {"input_tokens": 7, "output_tokens": 13}, Usage(input_tokens=7, output_tokens=13)),
    (
        "more cached than there was",
        {"input_tokens": 10, "output_tokens": 1, "input_tokens_details": {"cached_tokens": 99}},
        Usage(cache_read_tokens=10, output_tokens=1),
    ),
    (
        "more thought than was put out",
        {"input_tokens": 1, "output_tokens": 5, "output_tokens_details": {"reasoning_tokens": 9}},
        Usage(input_tokens=1, output_tokens=5, reasoning_tokens=5),
    ),
    ("zeros are no count", {"input_tokens": 0, "output_tokens": 0}, None),
    ("negative", {"input_tokens": -5, "output_tokens": 2}, None),
    ("beyond belief", {"input_tokens": 10**12, "output_tokens": 2}, None),
    ("texts", {"input_tokens": "5", "output_tokens": 1}, None),
    ("empty", {}, None),
]


@pytest.mark.parametrize(("reported", "expected"), [each[1:] for each in USAGES], ids=[each[0] for each in USAGES])
def test_usage_becomes_the_disjoint_kinds(reported: dict[str, Any], expected: Usage | None) -> None:
    assert responses_wire.read_usage(json.dumps(reported).encode()) == expected


COUNT = st.none() | st.integers(-10, 10**6)


@given(COUNT, COUNT, COUNT, COUNT, COUNT)
def test_whatever_a_provider_reports_the_kinds_are_disjoint_and_complete(
    into: int | None, out: int | None, cached: int | None, written: int | None, reasoning: int | None
) -> None:
    reported = openai.types.responses.ResponseUsage.model_construct(
        input_tokens=into,
        output_tokens=out,
        input_tokens_details={"cached_tokens": cached, "cache_write_tokens": written},
        output_tokens_details={"reasoning_tokens": reasoning},
    )
    usage = responses_wire.read_usage(json.dumps(reported.model_dump(warnings=False)).encode())
    if usage is not None and into is not None and out is not None:
        assert usage.total_input_tokens == max(0, into)
        assert usage.total_output_tokens == max(0, out)


# -- answers

REPORTED = {"input_tokens": 10, "output_tokens": 4, "total_tokens": 14}
MESSAGE = {"id": "msg_1", "type": "message", "content": [{"type": "output_text", "text": "Hello world"}]}


def event(kind: str, **fields: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def end(kind: str = "completed", **fields: Any) -> bytes:
    response = {"model": "gpt-5-x", "status": kind, "output": [MESSAGE], "usage": REPORTED, **fields}
    return event(f"response.{kind}", response=response)


CREATED = event("response.created", response={"id": "resp_1", "status": "in_progress", "output": [], "usage": None})
SPOKEN = [
    event("response.output_item.added", output_index=0, item={**MESSAGE, "content": []}),
    event("response.output_text.delta", delta="Hello ", output_index=0, obfuscation="zzzzzzzz"),
    event("response.output_text.delta", delta="world", output_index=0),
]


def meter_of(stream: bytes, **fields: Any) -> responses_wire.UsageMeter:
    meter = responses_wire.UsageMeter(request_of(stream=True, **fields))
    meter.feed(stream)
    return meter


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
def test_the_last_event_has_the_count(kind: str) -> None:
    stream = b"".join([CREATED, *SPOKEN, end(kind, service_tier="flex")])
    meter = responses_wire.UsageMeter(request_of(stream=True))
    assert meter.feed(stream) + meter.finish() == stream
    assert meter.measure() == wire.Measured(Usage(input_tokens=10, output_tokens=4), estimated=False)
    assert (meter.completed, meter.model, meter.told, meter.unread, meter.output_so_far) == (
        *(True, "gpt-5-x", {"service_tier": "flex"}, 0, 3),
    )


def test_a_cut_stream_is_counted_as_far_as_it_came_and_ends_between_events() -> None:
    meter = responses_wire.UsageMeter(request_of(stream=True))
    stream = b"".join([CREATED, *SPOKEN])
    assert meter.feed(stream + end()[:60]) + meter.finish() == stream
    expected = Usage(input_tokens=request_of().input_tokens, output_tokens=3)
    assert (meter.completed, meter.measure()) == (False, wire.Measured(expected, estimated=True))


@pytest.mark.parametrize("usage", [None, {"input_tokens": 10, "output_tokens": 0}, {}, "odd"])
def test_a_count_that_is_missing_or_cannot_be_true_is_ours(usage: Any) -> None:
    measured = meter_of(b"".join([CREATED, *SPOKEN, end(usage=usage)])).measure()
    assert (measured.usage.output_tokens, measured.estimated) == (3, True)


@pytest.mark.parametrize(
    ("kind", "more", "counted"),
    [
        ("response.output_text.delta", {"delta": "four"}, 1),
        ("response.refusal.delta", {"delta": "four"}, 1),
        ("response.reasoning_text.delta", {"delta": "four"}, 1),
        ("response.reasoning_summary_text.delta", {"delta": "four"}, 1),
        ("response.function_call_arguments.delta", {"delta": "four"}, 1),
        ("response.custom_tool_call_input.delta", {"delta": "four"}, 1),
        ("response.mcp_call_arguments.delta", {"delta": "four"}, 1),
        ("response.code_interpreter_call_code.delta", {"delta": "four"}, 1),
        ("response.shell_call_command.delta", {"delta": "four"}, 1),
        ("response.audio.transcript.delta", {"delta": "four"}, 1),
        ("response.output_item.added", {"item": {"type": "function_call", "name": "four", "arguments": ""}}, 1),
        ("response.shell_call_output_content.delta", {"delta": {"stdout": "four"}}, 0),
        ("response.output_text.done", {"text": "four"}, 0),
        ("response.output_item.done", {"item": {"type": "function_call", "name": "four"}}, 0),
        ("response.output_text.delta", {"delta": None}, 0),
        ("response.output_item.added", {"item": "odd"}, 0),
    ],
)
def test_everything_that_the_model_puts_out_counts_once(kind: str, more: dict[str, Any], counted: int) -> None:
    assert meter_of(event(kind, **more)).output_so_far == counted


def test_sound_that_is_streamed_is_audio_output() -> None:
    sound = event("response.audio.delta", delta="A" * 1_500) * 2
    usage = meter_of(sound).measure().usage
    assert (usage.audio_output_tokens, usage.output_tokens) == (3, 0)


def test_output_that_was_not_streamed_is_found_at_the_end() -> None:
    assert meter_of(CREATED + end(usage=None)).measure().usage.output_tokens == 3


ITEMS: list[tuple[dict[str, Any], int]] = [
    (MESSAGE, 3),
    ({"type": "message", "content": [{"type": "refusal", "refusal": "four"}]}, 1),
    ({"type": "reasoning", "summary": [{"type": "summary_text", "text": "four"}], "encrypted_content": "A" * 999}, 1),
    ({"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "four"}]}, 1),
    ({"type": "function_call", "name": "four", "arguments": "four"}, 2),
    ({"type": "custom_tool_call", "name": "four", "input": "four"}, 2),
    ({"type": "mcp_call", "name": "four", "arguments": "four", "output": "A" * 999}, 2),
    ({"type": "code_interpreter_call", "code": "four", "outputs": [{"type": "logs", "logs": "A" * 999}]}, 1),
    ({"type": "shell_call", "action": {"commands": ["four", "four"]}}, 2),
    ({"type": "apply_patch_call", "operation": {"type": "create_file", "diff": "four", "path": "four"}}, 2),
    ({"type": "web_search_call", "action": {"type": "search", "query": "four", "queries": ["four"]}}, 1),
    ({"type": "file_search_call", "queries": ["four"], "results": [{"text": "A" * 999}]}, 1),
    ({**MESSAGE, "role": "user"}, 0),
    ({"type": "compaction", "encrypted_content": "A" * 90_000}, 3_000),
    ({"type": "image_generation_call", "result": "A" * 999}, 0),
    ({"type": "web_search_call", "action": "odd", "content": "odd", "queries": {"odd": 1}}, 0),
]


@pytest.mark.parametrize(("item", "counted"), ITEMS)
def test_a_plain_answer_without_usage_is_counted_by_what_it_says(item: dict[str, Any], counted: int) -> None:
    meter = responses_wire.UsageMeter(request_of())
    meter.read_body(json.dumps({"status": "completed", "output": [item]}).encode())
    assert meter.output_so_far == counted


def test_a_plain_answer_is_read_whole() -> None:
    meter = responses_wire.UsageMeter(request_of())
    answer = {"model": "gpt-5-x", "status": "completed", "output": [MESSAGE], "usage": REPORTED}
    meter.read_body(json.dumps({**answer, "service_tier": "priority"}).encode())
    assert meter.measure() == wire.Measured(Usage(input_tokens=10, output_tokens=4), estimated=False)
    assert (meter.completed, meter.tier) == (True, "priority")


# -- failures


@pytest.mark.parametrize("plain", [False, True])
def test_a_response_that_failed_before_it_began_costs_nothing(plain: bool) -> None:
    failed = {"status": "failed", "output": [], "usage": None, "error": {"code": "server_error", "message": "Sorry"}}
    meter = responses_wire.UsageMeter(request_of(stream=not plain))
    if plain:
        meter.read_body(json.dumps(failed).encode())
    else:
        meter.feed(CREATED + event("response.failed", response=failed))
    assert (meter.error, meter.measure().usage) == ("server_error", Usage())


def test_a_response_that_failed_later_costs_what_it_reports_or_showed() -> None:
    failed = end("failed", error={"code": "server_error"})
    assert meter_of(b"".join([CREATED, *SPOKEN, failed])).measure().usage == Usage(input_tokens=10, output_tokens=4)
    silent = end("failed", error={"code": "server_error"}, usage=None, output=[])
    assert meter_of(b"".join([CREATED, *SPOKEN, silent])).measure().usage.output_tokens == 3


@pytest.mark.parametrize("more", [{"code": "server_error", "message": "Sorry"}, {"error": {"type": "server_error"}}])
def test_an_error_event_is_seen_and_what_came_before_it_is_charged(more: dict[str, Any]) -> None:
    meter = meter_of(b"".join([CREATED, *SPOKEN, event("error", **more)]))
    assert (meter.error, meter.completed, meter.measure().usage.output_tokens) == ("server_error", False, 3)


# -- tools


def call(kind: str, identity: str = "", **fields: Any) -> dict[str, Any]:
    return {"type": kind, "id": identity, "status": "completed", **fields}


SEARCHES = [
    call("web_search_call", "ws_1", action={"type": "search", "query": "a"}),
    call("web_search_call", "ws_2", action={"type": "open_page", "url": "b"}),
    call("web_search_call", "ws_3", action={"type": "find_in_page", "url": "b", "pattern": "c"}),
    call("web_search_call", "ws_4"),
    {**call("web_search_call", "ws_5"), "status": "failed"},
]
CALLS = [
    *SEARCHES,
    call("file_search_call", "fs_1", queries=["a", "b"]),
    call("file_search_call", "fs_2", queries=["a"]),
    {**call("file_search_call", "fs_3"), "status": "failed"},
    call("code_interpreter_call", "ci_1", container_id="cntr_1"),
    call("code_interpreter_call", "ci_2", container_id="cntr_1"),
    call("shell_call", "sh_1", environment={"type": "container_reference", "container_id": "cntr_2"}),
    call("shell_call", "sh_2", environment={"type": "local"}),
    call("mcp_call", "mcp_1", name="x", arguments=""),
]
BILLED = Usage(requests=0, web_searches=2, file_searches=2, code_sessions=2)


def billed(usage: Usage) -> Usage:
    return Usage(
        requests=0,
        web_searches=usage.web_searches,
        file_searches=usage.file_searches,
        code_sessions=usage.code_sessions,
    )


def test_calls_of_tools_are_counted_once_however_often_they_are_shown() -> None:
    items = b"".join(
        event("response.output_item.added", output_index=place, item={**item, "status": "in_progress"})
        + event("response.output_item.done", output_index=place, item=item)
        for place, item in enumerate(CALLS)
    )
    assert billed(meter_of(CREATED + items).measure().usage) == BILLED
    whole = meter_of(CREATED + items + end(output=[*CALLS, MESSAGE]))
    assert (billed(whole.measure().usage), whole.measure().estimated) == (BILLED, False)
    plain = responses_wire.UsageMeter(request_of())
    plain.read_body(json.dumps({"output": [{**item, "id": None} for item in CALLS], "usage": REPORTED}).encode())
    assert billed(plain.measure().usage) == BILLED


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        ({"web_search": {"num_requests": 7}}, 7),
        ({"web_search": {"num_requests": 0}}, 0),
        ({"web_search": {"num_requests": -1}}, 2),
        ({"web_search": {"num_requests": "7"}}, 2),
        ({"web_search": None}, 2),
        (None, 2),
        ("odd", 2),
    ],
)
def test_the_providers_own_count_of_searches_goes_before_ours(report: Any, expected: int) -> None:
    meter = meter_of(CREATED + end(output=SEARCHES, tool_usage=report))
    assert meter.measure().usage.web_searches == expected


def test_a_container_that_is_made_for_the_request_is_charged_also_unused() -> None:
    code = [{"type": "code_interpreter", "container": {"type": "auto"}}]
    assert meter_of(CREATED + end(), tools=code).measure().usage.code_sessions == 1
    used = end(output=[call("code_interpreter_call", "ci_1", container_id="cntr_1"), MESSAGE])
    assert meter_of(CREATED + used, tools=code).measure().usage.code_sessions == 1


def test_searches_that_were_only_permitted_are_not_charged() -> None:
    offered = [{"type": "web_search"}, {"type": "file_search"}]
    assert billed(meter_of(CREATED + SPOKEN[1], tools=offered).measure().usage) == Usage(requests=0)
    assert billed(meter_of(CREATED + end(), tools=offered).measure().usage) == Usage(requests=0)


# -- any stream


WHOLE = b"".join(
    [
        CREATED,
        *(event("response.output_item.done", output_index=n, item=item) for n, item in enumerate(CALLS)),
        *SPOKEN,
        event("response.reasoning_summary_text.delta", delta="thöughts 漢字"),
        end(output=[*CALLS, MESSAGE]),
        b"data: [DONE]\n\n",
    ]
)


@given(st.lists(st.integers(0, len(WHOLE)), max_size=12), st.integers(0, len(WHOLE)))
def test_any_cut_of_the_stream_gives_the_same_count(cuts: list[int], until: int) -> None:
    stream = WHOLE[:until]
    edges = [0, *sorted(min(cut, until) for cut in cuts), until]
    whole, pieces = (responses_wire.UsageMeter(request_of(stream=True)) for _ in range(2))
    at_once = whole.feed(stream) + whole.finish()
    in_pieces = b"".join(pieces.feed(stream[a:b]) for a, b in itertools.pairwise(edges)) + pieces.finish()
    assert in_pieces == at_once
    assert pieces.measure() == whole.measure()
    assert stream.startswith(at_once)


@given(st.lists(st.binary(max_size=40) | st.builds(lambda data: b"data: " + json.dumps(data).encode(), anything)))
def test_no_stream_raises_and_every_whole_event_goes_on(texts: list[bytes]) -> None:
    stream = b"".join(text + b"\n\n" for text in texts)
    meter = responses_wire.UsageMeter(request_of(stream=True))
    assert stream.startswith(meter.feed(stream) + meter.finish())
    assert meter.measure().usage.total_tokens >= 0


@given(st.sampled_from(["response.output_item.done", "response.completed", "x.delta", "error"]), anything, anything)
def test_no_event_raises_whatever_it_holds(kind: str, one: Any, other: Any) -> None:
    meter = meter_of(event(kind, item=one, response=other, delta=other, error=one, output_index=other, code=other))
    plain = responses_wire.UsageMeter(request_of())
    plain.read_body(json.dumps(one).encode())
    plain.read_body(json.dumps({"output": one, "usage": other, "tool_usage": one, "error": other}).encode())
    assert min(meter.measure().usage.total_tokens, plain.measure().usage.total_tokens) >= 0


# -- refusals


def test_a_refusal_in_a_stream_is_an_error_event_of_this_api_that_the_official_client_raises_too() -> None:
    raw = responses_wire.stream_refusal(PoolExhausted("Nothing left"), request_id="req_1")
    name, data = raw.decode().strip().split("\n")
    read = json.loads(data.removeprefix("data: "))
    assert name == "event: error"
    assert (read["type"], read["code"], read["message"]) == ("error", "test_responses_pool_exhausted", "Nothing left")
    assert (
        read["error"] == json.loads(responses_wire.refusal(PoolExhausted("Nothing left"), request_id="req_1"))["error"]
    )


def test_our_count_of_a_text_is_that_of_its_pieces() -> None:
    text = "Any text, 123 times; 漢字 too."
    pieces = b"".join(event("response.output_text.delta", delta=each) for each in text)
    assert meter_of(pieces).output_so_far == tokens.count_tokens(text)
