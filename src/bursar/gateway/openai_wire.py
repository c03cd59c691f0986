"""OpenAI's chat completions, read as far as metering needs them.

Source: the OpenAI API reference, "Create chat completion" and "Streaming"; the types of the official Python client.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from bursar.gateway import sse, tokens, tools, wire
from bursar.gateway.wire import Fields, WireRequest
from bursar.pricing.usage import Usage
from bursar.problems import Problem

PATH: Final = "/chat/completions"

# Estimates of what is not text. Sources: OpenAI, "Images and vision" (85 tokens in low detail; 85 + 170 for each of at
# most eight tiles in high detail), "Audio" (ten tokens a second of input), and its notes on counting chat messages.
LOW_DETAIL_IMAGE_TOKENS: Final = 85
HIGH_DETAIL_IMAGE_TOKENS: Final = 1_445
AUDIO_CHARACTERS_PER_TOKEN: Final = 1_000
TOKENS_PER_MESSAGE: Final = 4
TOKENS_PER_ANSWER: Final = 3

_NULL: Final = msgspec.Raw(b"null")
# Searches by prices of their own, asked for by a field (OpenRouter, xAI, Alibaba) or by the model's name (OpenRouter).
PRICED_APART: Final = ("plugins", "search_parameters", "enable_search")
OTHER_MODELS: Final = ("models", "route", "preset")
"""By which a request names further models that may answer it. Source: OpenRouter, "Model Fallbacks" and "Presets"."""
_SEARCHES_TOO: Final = ":online"
_METERED: Final = frozenset(
    (
        "model",
        "stream",
        "stream_options",
        "max_tokens",
        "max_completion_tokens",
        "n",
        "messages",
        "tools",
        "functions",
        "response_format",
        "modalities",
        "service_tier",
        "web_search_options",
        *PRICED_APART,
        *OTHER_MODELS,
    )
)
_COUNTED_WHOLE: Final = ("tools", "functions", "response_format")
_TEXT_DELTAS: Final = ("content", "refusal")
_REASONING_DELTAS: Final = ("reasoning_content", "reasoning")  # DeepSeek, vLLM; OpenRouter, Groq
_SEARCH_MODELS: Final = ("-search-preview", "-search-api")


def read_request(body: bytes, content_type: str = wire.JSON) -> WireRequest:
    """Read what metering needs of a chat completion request.

    Raises:
        UnreadableRequest: the body is no JSON object, or a field that metering needs is of the wrong kind.
        OtherModelsNotMetered
    """
    fields = wire.read_fields(body, _METERED)
    model = wire.read_text(fields, "model")
    wire.refuse_other_models(fields, OTHER_MODELS)
    stream = wire.read_switch(fields, "stream")
    return WireRequest(
        model=model,
        stream=stream,
        max_output_tokens=_max_output_tokens(fields),
        choices=wire.read_count(fields, "n", least=1, most=wire.MAX_CHOICES) or 1,
        estimate=_estimate(fields, model),
        wants_usage=not stream or _wants_usage(fields),
        service_tier=wire.read_optional_text(fields, "service_tier"),
        fields=fields,
        output_kind="audio_output_tokens" if _speaks(fields) else "output_tokens",
        unpriced_tools=_unpriced_tools(fields, model),
    )


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name, and usage asked for in streams; all else as the client wrote it.

    asks_for_usage: false for the few providers that refuse `stream_options`.
    """
    changes: dict[str, object] = {"model": model}
    if request.stream and not request.wants_usage and asks_for_usage:
        options = wire.read_anything(request.fields, "stream_options")
        changes["stream_options"] = {**options, "include_usage": True} if isinstance(options, dict) else _ASK_FOR_USAGE
    return wire.spliced(request.fields, **changes)


_ASK_FOR_USAGE: Final = {"include_usage": True}


def _max_output_tokens(fields: Fields) -> int | None:
    """The larger of the two names of the limit, as providers differ in which one they obey."""
    limits = [
        wire.read_count(fields, name, least=0, most=wire.MAX_OUTPUT_TOKENS)
        for name in ("max_completion_tokens", "max_tokens")
    ]
    return max((limit for limit in limits if limit is not None), default=None)


def _speaks(fields: Fields) -> bool:
    asked = wire.read_anything(fields, "modalities")
    return isinstance(asked, list) and "audio" in asked


def _wants_usage(fields: Fields) -> bool:
    options = wire.read_anything(fields, "stream_options")
    return isinstance(options, dict) and options.get("include_usage") is True


def _unpriced_tools(fields: Fields, model: str) -> tuple[str, ...]:
    """What a provider does and bills by itself, and no chat completion reports."""
    offered = wire.read_anything(fields, "tools")
    found = tools.of_chat(offered) if isinstance(offered, list) else ()
    return found + priced_apart(fields, model)


def priced_apart(fields: Fields, model: str) -> tuple[str, ...]:
    """What providers other than OpenAI do and bill beside tokens, where a request asks for it outside of its tools."""
    found = tuple([name for name in PRICED_APART if name in fields and wire.read_anything(fields, name)])
    return (*found, _SEARCHES_TOO) if model.endswith(_SEARCHES_TOO) else found


def _estimate(fields: Fields, model: str) -> Usage:
    messages = wire.read_anything(fields, "messages")
    if not isinstance(messages, list):
        raise wire.unreadable("messages", "a list of messages is required")
    units = audio_tokens = 0
    try:
        for message in messages:
            message_units, message_audio = _message_units(message)
            units += message_units
            audio_tokens += message_audio
    except tokens.TooDeep:
        raise wire.too_deep("messages") from None
    units += sum([wire.field_units(fields, name) for name in _COUNTED_WHOLE if name in fields])
    searches = "web_search_options" in fields or any(mark in model for mark in _SEARCH_MODELS)
    return Usage(
        input_tokens=TOKENS_PER_ANSWER + tokens.whole_tokens(units),
        audio_input_tokens=audio_tokens,
        web_searches=int(searches),
    )


def _message_units(message: object) -> tuple[int, int]:
    """Units and audio tokens of one message."""
    if not isinstance(message, dict):
        raise wire.unreadable("messages", "each message must be an object")
    units = TOKENS_PER_MESSAGE * tokens.UNITS_PER_TOKEN
    audio_tokens = 0
    for name, value in message.items():
        if name == "content" and isinstance(value, list):
            for part in value:
                part_units, part_audio = _part_units(part)
                units += part_units
                audio_tokens += part_audio
        elif name == "content" and isinstance(value, str):
            units += tokens.text_units(value)
        elif name != "role":
            units += tokens.nested_units(value)
    return units, audio_tokens


def _part_units(part: object) -> tuple[int, int]:
    """Units and audio tokens of one part of a message's content."""
    match part:
        case {"type": "text", "text": str(text)}:
            return tokens.text_units(text), 0
        case {"type": "image_url", "image_url": {"detail": "low"}}:
            return LOW_DETAIL_IMAGE_TOKENS * tokens.UNITS_PER_TOKEN, 0
        case {"type": "image_url"}:
            return HIGH_DETAIL_IMAGE_TOKENS * tokens.UNITS_PER_TOKEN, 0
        case {"type": "input_audio", "input_audio": {"data": str(data)}}:
            return 0, len(data) // AUDIO_CHARACTERS_PER_TOKEN + 1
        case {"type": "file", "file": {"file_data": str(data)}}:
            return tokens.file_units(data), 0
    return tokens.nested_units(part), 0


class InputDetails(msgspec.Struct):
    """Parts of the input that are priced apart."""

    cached_tokens: int | None = None
    cache_write_tokens: int | None = None
    audio_tokens: int | None = None
    image_tokens: int | None = None


class OutputDetails(msgspec.Struct):
    """Parts of the output that are priced or shown apart."""

    reasoning_tokens: int | None = None
    audio_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int | None = None
    prompt_tokens_details: InputDetails | None = None
    completion_tokens_details: OutputDetails | None = None
    cached_tokens: int | None = None  # Moonshot
    prompt_cache_hit_tokens: int | None = None  # DeepSeek


class _Answer(msgspec.Struct):
    """A plain answer or one chunk of a stream. Untyped where providers differ: what is odd must not stop the stream."""

    choices: Any = None
    usage: msgspec.Raw = _NULL
    error: Any = None
    model: Any = None
    service_tier: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_ANSWER: Final = msgspec.json.Decoder(_Answer)


def read_usage(data: bytes) -> Usage | None:
    """Convert OpenAI's `usage` object (JSON) to the canonical, disjoint kinds; None where it is null or unusable.

    OpenAI counts cached, cache-writing, audio and image tokens inside `prompt_tokens`, reasoning and audio inside
    `completion_tokens`. Providers that keep reasoning outside (xAI, Gemini) show it in `total_tokens`: what the total
    has beyond its two parts is output.
    """
    reported = wire.decoded(data, _USAGE)
    if reported is None or reported.prompt_tokens + reported.completion_tokens <= 0:
        return None
    completion, reasoning, spoken = _output_kinds(reported)
    details = reported.prompt_tokens_details or InputDetails()
    cached = details.cached_tokens or reported.cached_tokens or reported.prompt_cache_hit_tokens
    return disjoint(
        reported.prompt_tokens,
        (cached, details.cache_write_tokens, details.audio_tokens, details.image_tokens),
        completion,
        reasoning,
        spoken,
    )


def disjoint(
    prompt: int, of_prompt: tuple[int | None, ...], completion: int, reasoning: int, spoken: int = 0
) -> Usage | None:
    """OpenAI's counts, of which some are parts of others, as the disjoint kinds; None where they cannot be true.

    of_prompt: tokens of the prompt that were cached, written to the cache, heard and seen.
    """
    rest = max(0, prompt)
    parts = []
    for part in of_prompt:
        # Parts may overlap or, as reports show, exceed the whole; together they are never more than the whole.
        parts.append(min(max(0, part or 0), rest))
        rest -= parts[-1]
    return wire.believable(
        Usage(
            input_tokens=rest,
            cache_read_tokens=parts[0],
            cache_write_5m_tokens=parts[1],
            audio_input_tokens=parts[2],
            image_input_tokens=parts[3],
            output_tokens=completion - spoken,
            reasoning_tokens=min(reasoning, completion - spoken),
            audio_output_tokens=spoken,
        )
    )


def _output_kinds(reported: _Usage) -> tuple[int, int, int]:
    """Output tokens in all; how many of them are reasoning; how many are audio."""
    details = reported.completion_tokens_details or OutputDetails()
    completion = max(0, reported.completion_tokens)
    outside = max(0, (reported.total_tokens or 0) - reported.prompt_tokens - completion)
    reasoning = max(0, details.reasoning_tokens or 0, outside)
    completion += outside
    return completion, reasoning, min(max(0, details.audio_tokens or 0), completion)


class UsageMeter(wire.UsageMeter):
    """Meter of a chat completion, plain or streamed."""

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._reported: Usage | None = None

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        answer = self._read(body)
        self.completed = answer is not None and not self.error

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        if not data:
            return False
        if data == b"[DONE]":
            self.completed = True
            return False
        answer = self._read(data)
        # Only a chunk that has nothing but usage is extra: an unasked usage beside a choice stays where it is.
        return answer is not None and _is_only_usage(answer) and not self.request.wants_usage

    def _read(self, data: bytes) -> _Answer | None:
        answer: _Answer | None = wire.decoded(data, _ANSWER)
        if answer is None:
            self.unread += 1
            return None
        self._reported = read_usage(bytes(answer.usage)) or self._reported
        if isinstance(answer.model, str):
            self.model = answer.model
        if isinstance(answer.service_tier, str):
            self.tier = answer.service_tier
        if answer.error:
            self.error = error_type(answer.error)
        if isinstance(answer.choices, list):
            self._units += sum(map(_choice_units, answer.choices))
        return answer

    def usage(self) -> Usage | None:
        """The provider's last count, with the searches of a search model, which it does not report.

        A count without output is not believed where output was seen.
        """
        reported = self._reported
        if reported is None or (reported.total_output_tokens == 0 and self._units > 0):
            return None
        return reported + Usage(web_searches=self.request.estimate.web_searches, requests=0)

    def counted(self) -> Usage:
        """The estimated input, and the output seen so far."""
        estimate = self.request.estimate
        return estimate + Usage(output_tokens=self.output_so_far, requests=0)


def _is_only_usage(answer: _Answer) -> bool:
    return answer.choices == [] and bytes(answer.usage) != b"null"


def error_type(error: object) -> str:
    """What an error object of OpenAI's shape calls itself."""
    if isinstance(error, dict):
        return str(error.get("type") or error.get("code") or "error")
    return "error"


def _choice_units(choice: object) -> int:
    """Units of the output in one choice of an answer or of a chunk."""
    if not isinstance(choice, dict):
        return 0
    message = choice.get("delta") or choice.get("message")
    if not isinstance(message, dict):
        return 0
    if len(message) == 1 and isinstance(text := message.get("content"), str):
        return tokens.text_units(text)  # nearly every chunk
    units = sum(_output_units(message[name]) for name in _TEXT_DELTAS if message.get(name))
    # Some providers send the same thought under both names.
    thought = next((message[name] for name in _REASONING_DELTAS if message.get(name)), None)
    units += _output_units(thought)
    calls = [*_objects(message.get("tool_calls")), message]
    return units + sum(_call_units(call) for call in calls)


def _call_units(holder: dict[str, Any]) -> int:
    """Units of a tool call: the function's name and arguments."""
    call = holder.get("function") or holder.get("function_call") or holder.get("custom")
    if not isinstance(call, dict):
        return 0
    return sum(_output_units(call.get(name)) for name in ("name", "arguments", "input"))


def _objects(value: object) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def _output_units(value: object) -> int:
    if isinstance(value, str):
        return tokens.text_units(value)
    # Mistral sends thoughts as a list of parts; only their texts count.
    return sum(_output_units(part.get("text") or part.get("thinking")) for part in _objects(value))


_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    403: "permission_error",
    404: "not_found_error",
    413: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
}


def refusal(problem: Problem, *, request_id: str = "") -> bytes:
    """The JSON body of our own refusal in OpenAI's error shape; `code` and `why` are ours."""
    return msgspec.json.encode({"error": error_object(problem, request_id)})


def stream_refusal(problem: Problem, *, request_id: str = "") -> bytes:
    """The same as the last event of a stream that has begun; the official client raises APIError on it."""
    return sse.event_bytes(refusal(problem, request_id=request_id))


def error_object(problem: Problem, request_id: str) -> dict[str, Any]:
    """What stands under `error` in OpenAI's shape."""
    return {
        "message": problem.detail or problem.title,
        "type": _ERROR_TYPES.get(problem.status, "server_error" if problem.status >= 500 else "invalid_request_error"),
        "param": problem.errors[0].pointer.removeprefix("#/") if problem.errors else None,
        **wire.refusal_details(problem, request_id),
    }
