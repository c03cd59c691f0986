"""Anthropic's messages, read as far as metering needs them.

Source: the Anthropic API reference, "Create a Message", "Streaming Messages", "Errors"; the types of the official
Python client.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from bursar.gateway import sse, tokens, tools, wire
from bursar.gateway.wire import Fields, WireRequest
from bursar.pricing.usage import Usage
from bursar.problems import Problem

PATH: Final = "/messages"

# Estimates of what is not text. Sources: Anthropic, "Vision" (an image costs at most about 1,600 tokens) and
# "Tool use" (a system prompt of about 350 tokens where tools are given).
IMAGE_TOKENS: Final = 1_600
TOOL_PROMPT_TOKENS: Final = 350
TOKENS_PER_MESSAGE: Final = 4

_NULL: Final = msgspec.Raw(b"null")
_OTHER_MODELS: Final = ("fallbacks",)
_METERED: Final = frozenset(
    (
        *("model", "stream", "max_tokens", "messages", "system", "tools", "service_tier", "speed", "inference_geo"),
        *("cache_control", *_OTHER_MODELS),
    )
)


def read_request(body: bytes, content_type: str = wire.JSON) -> WireRequest:
    """Read what metering needs of a message request.

    Raises:
        UnreadableRequest: the body is no JSON object, or a field that metering needs is of the wrong kind.
    """
    fields = wire.read_fields(body, _METERED)
    model = wire.read_text(fields, "model")
    stream = wire.read_switch(fields, "stream")
    limit = wire.read_count(fields, "max_tokens", least=0, most=wire.MAX_OUTPUT_TOKENS)
    if limit is None:
        raise wire.unreadable("max_tokens", "an integer is required")
    wire.refuse_other_models(fields, _OTHER_MODELS)
    offered = wire.read_anything(fields, "tools")
    permitted = tools.of_anthropic(offered if isinstance(offered, list) else (), model)
    return WireRequest(
        model=model,
        stream=stream,
        max_output_tokens=limit,
        choices=1,
        estimate=estimate(fields),
        wants_usage=True,
        service_tier=wire.read_optional_text(fields, "service_tier"),
        fields=fields,
        context={
            name: value for name in ("speed", "inference_geo") if (value := wire.read_optional_text(fields, name))
        },
        permitted=permitted.most,
        guessed=permitted.guessed,
        unpriced_tools=permitted.unpriced,
    )


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name; all else as the client wrote it. Usage always comes unasked."""
    return wire.spliced(request.fields, model=model)


def estimate(fields: Fields) -> Usage:
    """Input by our own rule; what is marked for the cache is held for at the price of writing it."""
    messages = wire.read_anything(fields, "messages")
    if not isinstance(messages, list):
        raise wire.unreadable("messages", "a list of messages is required")
    try:
        units = sum(map(_message_units, messages)) + _content_units(wire.read_anything(fields, "system"))
    except tokens.TooDeep:
        raise wire.too_deep("messages") from None
    units += wire.field_units(fields, "tools")
    total = tokens.whole_tokens(units) + (TOOL_PROMPT_TOKENS if "tools" in fields else 0)
    raw = b"".join(bytes(fields[name]) for name in ("messages", "system", "tools", "cache_control") if name in fields)
    if "cache_control" not in fields and b'"cache_control"' not in raw:
        return Usage(input_tokens=total)
    if b'"1h"' in raw:
        return Usage(cache_write_1h_tokens=total)
    return Usage(cache_write_5m_tokens=total)


def _message_units(message: object) -> int:
    if not isinstance(message, dict):
        raise wire.unreadable("messages", "each message must be an object")
    return TOKENS_PER_MESSAGE * tokens.UNITS_PER_TOKEN + _content_units(message.get("content"))


def _content_units(content: object, depth: int = tokens.MAX_DEPTH) -> int:
    """Units of a text or of a list of content blocks."""
    if isinstance(content, list):
        return sum(_block_units(block, depth) for block in content)
    if isinstance(content, str):
        return tokens.text_units(content)
    return tokens.nested_units(content, depth=depth)


def _block_units(block: object, depth: int) -> int:
    if depth == 0:
        raise tokens.TooDeep
    match block:
        case {"type": "text", "text": str(text)}:
            return tokens.text_units(text)
        case {"type": "image"}:
            return IMAGE_TOKENS * tokens.UNITS_PER_TOKEN
        case {"type": "document", "source": {"type": "base64", "data": str(data)}}:
            return tokens.file_units(data)
        case {"type": "document", "source": {"type": "url" | "file"}}:
            return tokens.LEAST_FILE_TOKENS * tokens.UNITS_PER_TOKEN
        case {"type": "tool_result", "content": content}:
            return _content_units(content, depth - 1)
    return tokens.nested_units(block, depth=depth)


class _CacheCreation(msgspec.Struct):
    ephemeral_5m_input_tokens: int | None = None
    ephemeral_1h_input_tokens: int | None = None


class _OutputDetails(msgspec.Struct):
    thinking_tokens: int | None = None


class _ServerTools(msgspec.Struct):
    web_search_requests: int | None = None


class _Iteration(msgspec.Struct):
    type: str = ""
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_creation_input_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation: _CacheCreation | None = None


class _Usage(_Iteration):
    """The usage object of a message, or, with most fields absent, of a message_delta event (cumulative there)."""

    output_tokens_details: _OutputDetails | None = None
    server_tool_use: _ServerTools | None = None
    service_tier: str | None = None
    speed: str | None = None
    iterations: list[_Iteration] | None = None


class _Answer(msgspec.Struct):
    """A plain answer or the data of one event. Untyped where it need not be understood."""

    type: str = ""
    usage: msgspec.Raw = _NULL
    model: Any = None
    content: Any = None
    content_block: Any = None
    delta: Any = None
    error: Any = None
    message: msgspec.Raw = _NULL


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_ANSWER: Final = msgspec.json.Decoder(_Answer)
# Iterations of these kinds are billed beside the top-level counts; those of kind `message` are inside them.
_BILLED_BESIDE: Final = ("compaction", "advisor_message")


def read_usage(data: bytes) -> Usage | None:
    """Convert Anthropic's `usage` object (JSON) to the canonical kinds; None where it is null or unusable.

    Anthropic's input, cache reads and cache writes are disjoint already; thinking is inside `output_tokens`. Tokens of
    compaction and advisor iterations, which the top level leaves out, are added (an advisor at this model's price).
    """
    reported = wire.decoded(data, _USAGE)
    return None if reported is None else _usage(reported)


def _usage(reported: _Usage) -> Usage | None:
    parts = [reported, *(each for each in reported.iterations or () if each.type in _BILLED_BESIDE)]
    total = Usage(requests=1)
    for part in parts:
        total += _tokens(part)
    details = reported.output_tokens_details or _OutputDetails()
    tools = reported.server_tool_use or _ServerTools()
    thought = min(max(0, details.thinking_tokens or 0), total.output_tokens)
    searches = max(0, tools.web_search_requests or 0)
    return wire.believable(total.but(reasoning_tokens=thought, web_searches=searches))


def _tokens(part: _Iteration) -> Usage:
    """Tokens of one usage object or iteration. Cache writes without a split are taken as of five minutes."""
    split = part.cache_creation or _CacheCreation()
    hour = max(0, split.ephemeral_1h_input_tokens or 0)
    five = max(0, split.ephemeral_5m_input_tokens or 0, (part.cache_creation_input_tokens or 0) - hour)
    return Usage(
        input_tokens=max(0, part.input_tokens or 0),
        cache_read_tokens=max(0, part.cache_read_input_tokens or 0),
        cache_write_5m_tokens=five,
        cache_write_1h_tokens=hour,
        output_tokens=max(0, part.output_tokens or 0),
        requests=0,
    )


class UsageMeter(wire.UsageMeter):
    """Meter of a message, plain or streamed.

    A stream reports its input with `message_start` and its final counts, cumulatively, with `message_delta`.
    """

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._reported: _Usage | None = None
        self._is_final = False
        self._searches = 0
        self._ran_code = False

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        answer = self._decode(body)
        if answer is None:
            return
        self._take_message(answer)
        if isinstance(answer.content, list):
            for block in answer.content:
                self._take_block(block)
        self._is_final = self.completed = answer.type == "message"

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        answer = self._decode(data) if data else None
        if answer is None:
            return False
        match answer.type:
            case "message_start":
                message = self._decode(bytes(answer.message))
                if message is not None:
                    self._take_message(message)
            case "content_block_start":
                self._take_block(answer.content_block)
            case "content_block_delta":
                self._units += _delta_output(answer.delta)
            case "message_delta":
                self._is_final = self._take_usage(answer.usage)
            case "message_stop":
                self.completed = True
            case "error":
                self.error = _error_type(answer.error)
        return False

    @property
    def told(self) -> dict[str, str]:
        """The service tier, and the speed, which has a price of its own."""
        speed = self._reported.speed if self._reported is not None else None
        return {**super().told, "speed": speed} if speed else super().told

    def _take_block(self, block: object) -> None:
        """Count a block that begins, and what it shows of the provider's own tools."""
        self._units += _block_output(block)
        match block:
            case {"type": "server_tool_use", "name": "web_search"}:
                self._searches += 1
            case {"type": "server_tool_use", "name": str(name)} if name.endswith("code_execution"):
                self._ran_code = True

    def _decode(self, data: bytes) -> _Answer | None:
        answer: _Answer | None = wire.decoded(data, _ANSWER)
        if answer is None:
            self.unread += 1
        return answer

    def _take_message(self, message: _Answer) -> None:
        if isinstance(message.model, str):
            self.model = message.model
        self._take_usage(message.usage)

    def _take_usage(self, raw: msgspec.Raw) -> bool:
        """Lay a usage object over what was reported before; absent and null counts stay. False where there is none."""
        reported = wire.decoded(bytes(raw), _USAGE)
        if reported is None:
            return False
        before = self._reported or _Usage()
        self._reported = _laid_over(before, reported)
        self.tier = self._reported.service_tier or ""
        return True

    def usage(self) -> Usage | None:
        """The provider's final count; not believed without output where output was seen, nor without any input."""
        if self._reported is None or not self._is_final:
            return None
        usage = _usage(self._reported)
        if usage is None or usage.total_input_tokens == 0 or (usage.output_tokens == 0 and self._units > 0):
            return None
        return usage + self._code()

    def _code(self) -> Usage:
        """A container for code, which the provider does not report; none where the request has it free."""
        return Usage(requests=0, code_sessions=self.request.permitted.code_sessions if self._ran_code else 0)

    def counted(self) -> Usage:
        """The reported input where the stream came so far, else the estimate; and the output seen so far."""
        reported = _usage(self._reported) if self._reported is not None else None
        if reported is None or reported.total_input_tokens == 0:
            reported = self.request.estimate
        return self._code() + reported.but(
            output_tokens=max(reported.output_tokens, self.output_so_far),
            web_searches=max(reported.web_searches, self._searches),
        )


def _laid_over(before: _Usage, newer: _Usage) -> _Usage:
    changes = {name: getattr(newer, name) for name in newer.__struct_fields__ if getattr(newer, name) not in (None, "")}
    return msgspec.structs.replace(before, **changes)


def _error_type(error: object) -> str:
    return str(error.get("type") or "error") if isinstance(error, dict) else "error"


def _block_output(block: object) -> int:
    """Units of a block that the model put out; results of the provider's own tools are its input, not output."""
    if not isinstance(block, dict):
        return 0
    texts = (block.get(name) for name in ("text", "thinking", "name"))
    units = sum(tokens.text_units(text) for text in texts if isinstance(text, str))
    called = block.get("input")
    return units + (tokens.nested_units(called) if called else 0)


def _delta_output(delta: object) -> int:
    if not isinstance(delta, dict):
        return 0
    texts = (delta.get(name) for name in ("text", "thinking", "partial_json"))
    return sum(tokens.text_units(text) for text in texts if isinstance(text, str))


_ERROR_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def refusal(problem: Problem, *, request_id: str = "") -> bytes:
    """The JSON body of our own refusal in Anthropic's error shape; `code` and `why` are ours."""
    kind = _ERROR_TYPES.get(problem.status, "api_error" if problem.status >= 500 else "invalid_request_error")
    details = wire.refusal_details(problem, request_id)
    shape: dict[str, Any] = {"type": "error", "error": {"type": kind, "message": problem.detail or problem.title}}
    request = details.pop("request_id", None)
    shape["error"] |= details
    if request is not None:
        shape["request_id"] = request
    return msgspec.json.encode(shape)


def stream_refusal(problem: Problem, *, request_id: str = "") -> bytes:
    """The same as the last event of a stream that has begun; the official client raises APIStatusError on it."""
    return sse.event_bytes(refusal(problem, request_id=request_id), name="error")
