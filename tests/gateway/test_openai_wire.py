import contextlib
import itertools
import json
from typing import Any

import msgspec
import openai.types
import openai.types.chat
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import openai_wire, tokens, wire
from bursar.pricing.usage import Usage
from bursar.problems import Problem

BODY = b'{"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello there"}], "stream": true}'


class PoolExhausted(Problem):
    status, code, title = 402, "test_openai_pool_exhausted", "Not enough credits"


def request_of(**fields: Any) -> wire.WireRequest:
    body = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Hello there"}], **fields}
    return openai_wire.read_request(json.dumps(body).encode())


def messages(*contents: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": content} for content in contents]


# -- requests


def test_a_request_is_read_as_far_as_metering_needs() -> None:
    request = request_of(stream=True, max_tokens=100, n=3, service_tier="priority")
    assert (request.model, request.stream, request.max_output_tokens, request.choices) == ("gpt-4o", True, 100, 3)
    assert (request.wants_usage, request.output_kind, request.service_tier) == (False, "output_tokens", "priority")
    assert request.hold_for(100) == Usage(input_tokens=request.input_tokens, output_tokens=300)


def test_of_two_names_of_the_limit_the_larger_is_held_for() -> None:
    assert request_of(max_tokens=10, max_completion_tokens=500).max_output_tokens == 500
    assert request_of(max_tokens=10, max_completion_tokens=None).max_output_tokens == 10
    assert request_of(max_tokens=None).max_output_tokens is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"messages": messages("twelve chars")}, 3 + 4 + 3),
        ({"messages": messages("twelve chars", "twelve chars")}, 3 + 2 * (4 + 3)),
        ({"messages": messages([{"type": "text", "text": "twelve chars"}])}, 3 + 4 + 3),
        ({"messages": messages([{"type": "image_url", "image_url": {"url": "data:" + "A" * 99_999}}])}, 3 + 4 + 1_445),
        ({"messages": messages([{"type": "image_url", "image_url": {"url": "x", "detail": "low"}}])}, 3 + 4 + 85),
        ({"messages": messages([{"type": "file", "file": {"file_data": "A" * 90_000}}])}, 3 + 4 + 3_000),
        ({"messages": messages(None)}, 3 + 4),
        (
            {"messages": messages("data:text/plain;base64,abc d")},
            3 + 4 + tokens.count_tokens("data:text/plain;base64,abc d"),
        ),
        ({"messages": []}, 3),
    ],
)
def test_the_input_is_estimated_by_our_own_rule(fields: dict[str, Any], expected: int) -> None:
    assert request_of(**fields).input_tokens == expected


def test_tools_and_answer_formats_are_part_of_the_input() -> None:
    plain = request_of().input_tokens
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    assert request_of(tools=[tool]).input_tokens > plain
    assert request_of(response_format={"type": "json_schema", "json_schema": {"name": "answer"}}).input_tokens > plain


def test_audio_is_held_for_as_audio_in_both_directions() -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 50_000, "format": "wav"}}
    request = request_of(messages=messages([sound]), modalities=["text", "audio"])
    assert request.estimate.audio_input_tokens == 51
    assert request.hold_for(200).audio_output_tokens == 200
    escaped = request.fields | {"modalities": msgspec.Raw(b'["text", "\\u0061udio"]')}
    assert openai_wire.read_request(msgspec.json.encode(escaped)).output_kind == "audio_output_tokens"


def test_searches_that_a_provider_bills_by_prices_of_its_own_have_no_price() -> None:
    assert request_of(plugins=[], search_parameters=None).unpriced_tools == ()
    assert request_of(plugins=[{"id": "web"}]).unpriced_tools == ("plugins",)
    assert request_of(search_parameters={"mode": "on"}).unpriced_tools == ("search_parameters",)
    assert request_of(enable_search=True).unpriced_tools == ("enable_search",)
    assert request_of(model="openai/gpt-4o:online").unpriced_tools == (":online",)
    assert request_of(tools=[{"type": "browser_search"}]).unpriced_tools == ("browser_search",)


@pytest.mark.parametrize("fields", [{"models": ["a", "b"]}, {"route": "fallback"}, {"preset": "@mine"}])
def test_no_provider_chooses_another_model_by_itself(fields: dict[str, Any]) -> None:
    with pytest.raises(wire.OtherModelsNotMetered) as refusal:
        request_of(**fields)
    assert refusal.value.errors[0].pointer == f"#/{next(iter(fields))}"
    assert request_of(**dict.fromkeys(fields)).model
    with pytest.raises(wire.UnreadableRequest):
        request_of(**{name.title(): value for name, value in fields.items()})


def test_a_tier_that_price_lists_have_for_batches_is_none_of_a_single_call() -> None:
    assert request_of(service_tier="batch").price_context == {}
    assert request_of(service_tier="flex").price_context == {"service_tier": "flex"}


def test_a_search_model_is_held_for_one_search() -> None:
    assert request_of(model="gpt-4o-search-preview").estimate.web_searches == 1
    assert request_of(web_search_options={}).estimate.web_searches == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"{",
        b"nonsense",
        b"\xff\xfe",
        b'{"model": "m"}',
        b'{"model": "", "messages": []}',
        b'{"model": 7, "messages": []}',
        b'{"model": "m", "messages": "hi"}',
        b'{"model": "m", "messages": ["hi"]}',
        b'{"model": "m", "messages": [], "stream": "yes"}',
        b'{"model": "m", "messages": [], "max_tokens": -1}',
        b'{"model": "m", "messages": [], "max_tokens": 1.5}',
        b'{"model": "m", "messages": [], "max_tokens": true}',
        b'{"model": "m", "messages": [], "max_completion_tokens": 99999999999999999999}',
        b'{"model": "m", "messages": [], "n": 0}',
        b'{"model": "m", "messages": [], "n": 129}',
        b'{"model": "cheap", "MODEL": "dear", "messages": []}',
        b'{"model": "m", "messages": [], "max_token\xc5\xbf": 5}',  # a long s, which Go's JSON reads as an s
        b'{"model": "m", "messages": [{"role": "user", "content": "\xff"}]}',
        b'{"model": "m", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "m", "messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"model": "m", "messages": [{"role": "user", "content": ' + b"[" * 200 + b"]" * 200 + b"}]}",
        b'{"model": "m", "messages": [], "tools": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_a_body_that_metering_cannot_read_is_refused_by_name(body: bytes) -> None:
    with pytest.raises(wire.UnreadableRequest) as refused:
        openai_wire.read_request(body)
    assert refused.value.status == 400


@given(
    st.binary()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: (
            st.lists(inner)
            | st.dictionaries(
                st.sampled_from(["model", "messages", "role", "content", "type", "text", "n", "stream", "tools"]), inner
            )
        ),
    )
)
def test_no_body_makes_the_reader_fail_in_another_way(body: Any) -> None:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with contextlib.suppress(wire.UnreadableRequest):
        request = openai_wire.read_request(data)
        assert request.choices > 0
        assert request.estimate.total_tokens >= 0


# -- the body for the provider


def test_every_other_field_reaches_the_provider_as_it_was_written() -> None:
    odd = (
        b'"seed": 123456789012345678901234567890, "temperature": 0.10, "top_p": 1E-2, "vendor": {"b":1, "a" : [ 1.0 ]}'
    )
    request = openai_wire.read_request(BODY[:-1] + b", " + odd + b"}")
    sent = openai_wire.upstream_body(request, model="gpt-4o-2024-11-20")
    for written in (b"123456789012345678901234567890", b"0.10", b"1E-2", b'{"b":1, "a" : [ 1.0 ]}', b'"Hello there"'):
        assert written in sent
    read = json.loads(sent)
    assert read["model"] == "gpt-4o-2024-11-20"
    assert read["stream_options"] == {"include_usage": True}
    assert set(read) == {"model", "messages", "stream", "stream_options", "seed", "temperature", "top_p", "vendor"}


def test_usage_is_asked_for_only_in_streams_that_did_not_ask_themselves() -> None:
    def options(**fields: Any) -> Any:
        sent = openai_wire.upstream_body(request_of(**fields), model="m")
        return json.loads(sent).get("stream_options")

    assert options() is None
    assert options(stream=True) == {"include_usage": True}
    assert options(stream=True, stream_options=None) == {"include_usage": True}
    assert options(stream=True, stream_options={"include_usage": True}) == {"include_usage": True}
    assert options(stream=True, stream_options={"include_usage": False, "include_obfuscation": False}) == {
        "include_usage": True,
        "include_obfuscation": False,
    }


def test_a_provider_that_refuses_the_option_is_not_asked() -> None:
    sent = openai_wire.upstream_body(request_of(stream=True), model="m", asks_for_usage=False)
    assert "stream_options" not in json.loads(sent)


def test_a_name_that_comes_twice_reaches_the_provider_once_and_as_we_read_it() -> None:
    request = openai_wire.read_request(
        b'{"model": "dear", "max_tokens": 9, "model": "cheap", "max_tokens": 1, "messages": []}'
    )
    sent = openai_wire.upstream_body(request, model=request.model)
    assert sent.count(b'"model"') == sent.count(b'"max_tokens"') == 1
    assert json.loads(sent) == {"model": "cheap", "max_tokens": 1, "messages": []}


# -- usage

# Shapes as the vendors document them; see the docstring of openai_wire.read_usage.
USAGES: list[tuple[str, dict[str, Any], Usage | None]] = [
    (
        "OpenAI",
        {
            "prompt_tokens": 2006,
            "completion_tokens": 300,
            "total_tokens": 2306,
            "prompt_tokens_details": {"cached_tokens": 1920, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": 192,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        },
        Usage(input_tokens=86, cache_read_tokens=1920, output_tokens=300, reasoning_tokens=192),
    ),
    (
        "OpenAI with cache writes",
        {
            "prompt_tokens": 5000,
            "completion_tokens": 10,
            "total_tokens": 5010,
            "prompt_tokens_details": {"cached_tokens": 1024, "cache_write_tokens": 2048},
        },
        Usage(input_tokens=1928, cache_read_tokens=1024, cache_write_5m_tokens=2048, output_tokens=10),
    ),
    (
        "OpenAI audio",
        {
            "prompt_tokens": 120,
            "completion_tokens": 80,
            "total_tokens": 200,
            "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 100, "text_tokens": 20, "image_tokens": 0},
            "completion_tokens_details": {"audio_tokens": 60, "text_tokens": 20, "reasoning_tokens": 0},
        },
        Usage(input_tokens=20, audio_input_tokens=100, output_tokens=20, audio_output_tokens=60),
    ),
    (
        "vLLM, Ollama",
        {"prompt_tokens": 7, "total_tokens": 20, "completion_tokens": 13},
        Usage(input_tokens=7, output_tokens=13),
    ),
    (
        "xAI keeps reasoning outside of the completion",
        {
            "prompt_tokens": 32,
            "completion_tokens": 9,
            "total_tokens": 135,
            "prompt_tokens_details": {"text_tokens": 32, "audio_tokens": 0, "image_tokens": 0, "cached_tokens": 6},
            "completion_tokens_details": {"reasoning_tokens": 94, "audio_tokens": 0},
        },
        Usage(input_tokens=26, cache_read_tokens=6, output_tokens=103, reasoning_tokens=94),
    ),
    (
        "Gemini shows thoughts in the total only",
        {"prompt_tokens": 2181, "completion_tokens": 57, "total_tokens": 2518},
        Usage(input_tokens=2181, output_tokens=337, reasoning_tokens=280),
    ),
    (
        "DeepSeek",
        {
            "prompt_tokens": 90,
            "completion_tokens": 5,
            "total_tokens": 95,
            "prompt_cache_hit_tokens": 64,
            "prompt_cache_miss_tokens": 26,
        },
        Usage(input_tokens=26, cache_read_tokens=64, output_tokens=5),
    ),
    (
        "Moonshot",
        {"prompt_tokens": 90, "completion_tokens": 5, "total_tokens": 95, "cached_tokens": 64},
        Usage(input_tokens=26, cache_read_tokens=64, output_tokens=5),
    ),
    (
        "more cached than there was",
        {
            "prompt_tokens": 5136,
            "completion_tokens": 201,
            "total_tokens": 5337,
            "prompt_tokens_details": {"cached_tokens": 10192},
        },
        Usage(cache_read_tokens=5136, output_tokens=201),
    ),
    (
        "nulls everywhere",
        {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": None, "prompt_tokens_details": None},
        Usage(input_tokens=5, output_tokens=1),
    ),
    ("zeros are no count", {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, None),
    ("a negative count is none", {"prompt_tokens": -5, "completion_tokens": 2}, None),
    ("texts are no count", {"prompt_tokens": "5", "completion_tokens": 1}, None),
    ("empty", {}, None),
]


@pytest.mark.parametrize(("reported", "expected"), [each[1:] for each in USAGES], ids=[each[0] for each in USAGES])
def test_usage_becomes_the_disjoint_kinds(reported: dict[str, Any], expected: Usage | None) -> None:
    assert openai_wire.read_usage(json.dumps(reported).encode()) == expected


def test_a_null_usage_is_none() -> None:
    assert openai_wire.read_usage(b"null") is None


COUNT = st.none() | st.integers(-10, 10**6)


@given(COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT, COUNT)
def test_whatever_a_provider_reports_the_kinds_are_disjoint_and_complete(
    prompt: int | None,
    completion: int | None,
    total: int | None,
    cached: int | None,
    written: int | None,
    audio: int | None,
    reasoning: int | None,
    spoken: int | None,
) -> None:
    reported = openai.types.CompletionUsage.model_construct(
        prompt_tokens=prompt,
        completion_tokens=completion,
        total_tokens=total,
        prompt_tokens_details={"cached_tokens": cached, "cache_write_tokens": written, "audio_tokens": audio},
        completion_tokens_details={"reasoning_tokens": reasoning, "audio_tokens": spoken},
    )
    usage = openai_wire.read_usage(json.dumps(reported.model_dump(warnings=False)).encode())
    if usage is not None and prompt is not None and completion is not None:
        assert usage.total_input_tokens == max(0, prompt)
        assert usage.total_output_tokens == max(max(0, completion), (total or 0) - prompt, 0)


# -- answers


def chunk(delta: dict[str, Any] | None = None, **more: Any) -> bytes:
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": None}]
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "gpt-4o-x", "choices": choices, **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


REPORTED = {"prompt_tokens": 10, "completion_tokens": 4, "total_tokens": 14}
SPOKEN = [
    chunk({"role": "assistant", "content": ""}, usage=None),
    chunk({"content": "Hello "}),
    chunk({"content": "world"}),
]
USAGE_CHUNK = chunk(usage=REPORTED)
DONE = b"data: [DONE]\n\n"


def fed(meter: wire.UsageMeter, stream: bytes, size: int = 7) -> bytes:
    pieces = [stream[start : start + size] for start in range(0, len(stream), size)]
    return b"".join(map(meter.feed, pieces)) + meter.finish()


def test_a_usage_chunk_that_the_client_did_not_ask_for_is_only_for_us() -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    seen = fed(meter, b"".join([*SPOKEN, USAGE_CHUNK, DONE]))
    assert seen == b"".join([*SPOKEN, DONE])
    assert meter.measure() == wire.Measured(Usage(input_tokens=10, output_tokens=4), estimated=False)
    assert (meter.completed, meter.model, meter.unread, meter.output_so_far) == (True, "gpt-4o-x", 0, 3)


def test_a_client_that_asked_for_usage_gets_every_byte() -> None:
    stream = b": hi\n\n" + b"".join([*SPOKEN, USAGE_CHUNK, DONE])
    meter = openai_wire.UsageMeter(request_of(stream=True, stream_options={"include_usage": True}))
    assert fed(meter, stream) == stream


def test_usage_beside_a_choice_stays_where_it_is_and_the_last_one_counts() -> None:
    stream = (
        chunk({"content": "Hello"}, usage={"prompt_tokens": 10, "completion_tokens": 1})
        + chunk({}, usage=REPORTED)
        + DONE
    )
    meter = openai_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, stream) == stream
    assert meter.usage() == Usage(input_tokens=10, output_tokens=4)


def test_an_empty_chunk_without_usage_is_the_clients() -> None:
    azure = chunk(prompt_filter_results=[{"prompt_index": 0}])
    meter = openai_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, azure + USAGE_CHUNK) == azure


def test_without_usage_we_count_ourselves_and_say_so() -> None:
    request = request_of(stream=True)
    meter = openai_wire.UsageMeter(request)
    fed(meter, b"".join([*SPOKEN, DONE]))
    assert meter.measure() == wire.Measured(Usage(input_tokens=request.input_tokens, output_tokens=3), estimated=True)


def test_a_count_without_output_is_not_believed_where_output_was_seen() -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    fed(meter, b"".join([*SPOKEN, chunk(usage={"prompt_tokens": 10, "completion_tokens": 0}), DONE]))
    assert meter.measure().estimated


def test_a_cut_stream_is_counted_as_far_as_it_came_and_ends_between_events() -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    seen = fed(meter, b"".join(SPOKEN) + USAGE_CHUNK[:30])
    assert seen == b"".join(SPOKEN)
    assert (meter.completed, meter.measure().usage.output_tokens) == (False, 3)


def test_a_last_event_without_a_blank_line_is_passed_on() -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, SPOKEN[1] + b"data: [DONE]") == SPOKEN[1] + b"data: [DONE]"
    assert meter.completed


@pytest.mark.parametrize(
    ("delta", "counted"),
    [
        ({"content": "four"}, 1),
        ({"refusal": "four"}, 1),
        ({"reasoning_content": "four"}, 1),
        ({"reasoning": "four", "reasoning_details": [{"text": "four"}]}, 1),
        ({"reasoning": "four", "reasoning_content": "four"}, 1),
        ({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "four"}]}]}, 1),
        ({"tool_calls": [{"index": 0, "function": {"name": "four", "arguments": "four"}}]}, 2),
        ({"function_call": {"name": "four", "arguments": "four"}}, 2),
        ({"content": None, "role": "assistant"}, 0),
        ({"content": 5, "tool_calls": "odd"}, 0),
    ],
)
def test_everything_that_the_model_puts_out_counts(delta: dict[str, Any], counted: int) -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    fed(meter, chunk(delta))
    assert meter.output_so_far == counted


def test_an_error_inside_a_stream_is_seen_and_passed_on() -> None:
    error = b'data: {"error": {"message": "The server had an error", "type": "server_error"}}\n\n'
    meter = openai_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, SPOKEN[1] + error) == SPOKEN[1] + error
    assert (meter.error, meter.completed) == ("server_error", False)


def test_what_is_no_json_is_passed_on_and_noted() -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    assert fed(meter, b"data: what\n\n" + DONE) == b"data: what\n\n" + DONE
    assert meter.unread == 1


def test_a_plain_answer_is_read_whole() -> None:
    message = {"role": "assistant", "content": "Hello world"}
    answer = {"model": "gpt-4o-x", "choices": [{"index": 0, "message": message}], "service_tier": "default"}
    meter = openai_wire.UsageMeter(request_of())
    meter.read_body(json.dumps({**answer, "usage": REPORTED}).encode())
    assert (meter.measure().estimated, meter.tier, meter.completed) == (False, "default", True)
    meter = openai_wire.UsageMeter(request_of())
    meter.read_body(json.dumps(answer).encode())
    assert meter.measure() == wire.Measured(
        Usage(input_tokens=request_of().input_tokens, output_tokens=3), estimated=True
    )


@given(st.lists(st.integers(0, 2_000), max_size=30))
def test_any_cut_of_a_stream_gives_the_same_answer_and_the_same_usage(cuts: list[int]) -> None:
    stream = b"".join([*SPOKEN, USAGE_CHUNK, DONE]).replace(b"\n", b"\r\n")
    places = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    meter = openai_wire.UsageMeter(request_of(stream=True))
    seen = b"".join(meter.feed(stream[a:b]) for a, b in itertools.pairwise(places)) + meter.finish()
    assert seen == b"".join([*SPOKEN, DONE]).replace(b"\n", b"\r\n")
    assert meter.usage() == Usage(input_tokens=10, output_tokens=4)


@given(
    st.lists(st.binary() | st.sampled_from([b"data: ", b"{", b'"choices"', b":", b"[", b"]", b"}", b"\n\n", b"null"]))
)
def test_no_stream_makes_the_meter_fail(pieces: list[bytes]) -> None:
    meter = openai_wire.UsageMeter(request_of(stream=True))
    fed(meter, b"".join(pieces))
    assert meter.measure().usage.total_tokens >= 0


# -- refusals


def test_a_refusal_has_openais_shape_with_our_code_and_why() -> None:
    problem = PoolExhausted("The pool is empty", why={"binding": "pool"})
    error = json.loads(openai_wire.refusal(problem, request_id="req_1"))["error"]
    assert error == {
        "message": "The pool is empty",
        "type": "insufficient_quota",
        "param": None,
        "code": "test_openai_pool_exhausted",
        "why": {"binding": "pool"},
        "request_id": "req_1",
    }
    assert json.loads(openai_wire.stream_refusal(problem)[6:])["error"]["code"] == problem.code


def test_a_refusal_names_the_wrong_field() -> None:
    with pytest.raises(wire.UnreadableRequest) as refused:
        request_of(n=0)
    error = json.loads(openai_wire.refusal(refused.value))["error"]
    assert (error["param"], error["type"], error["code"]) == ("n", "invalid_request_error", "unreadable_request")
