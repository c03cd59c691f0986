"""OpenAI's responses, read as far as metering needs them.

Source: the OpenAI API reference, "Create a model response" and "Streaming events"; the types of the official Python
client. A response reports its tokens and its searches itself, in `response.completed`, `response.incomplete` or
`response.failed` where it is streamed; other calls of the provider's tools are counted by the items that they leave.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from bursar.gateway import openai_wire, sse, tokens, tools, wire
from bursar.gateway.openai_wire import InputDetails, OutputDetails, refusal
from bursar.gateway.wire import Fields, WireRequest
from bursar.pricing.usage import NO_USAGE, Usage
from bursar.problems import FieldError, Problem

__all__ = ["PATH", "UsageMeter", "read_request", "refusal", "stream_refusal", "upstream_body"]

PATH: Final = "/responses"

PRIOR_CONTEXT_TOKENS: Final = 8_000
"""Held for, and charged where the provider reports nothing, in place of each context that the provider keeps and the
client does not send: an earlier response, a conversation, a stored prompt, an item by its id."""

_NULL: Final = msgspec.Raw(b"null")
_METERED: Final = frozenset(
    (
        *("model", "stream", "stream_options", "background", "max_output_tokens", "max_tool_calls", "service_tier"),
        *("input", "instructions", "tools", "text", "prompt", "previous_response_id", "conversation"),
        *openai_wire.PRICED_APART,
        *openai_wire.OTHER_MODELS,
    )
)
_KEPT_BY_PROVIDER: Final = ("previous_response_id", "conversation", "prompt")
_ENDS: Final = ("response.completed", "response.incomplete", "response.failed")
_AUDIO_DELTAS: Final = ("response.audio.delta", "response.output_audio.delta")
_MOST_CALLS_SEEN: Final = 100_000


class BackgroundNotMetered(Problem):
    """A response in the background is fetched later, by a path that is not metered: it could not be settled."""

    status, code, title = 400, "background_not_metered", "Responses in the background are not served here"


def read_request(body: bytes, content_type: str = wire.JSON) -> WireRequest:
    """Read what metering needs of a request for a response.

    Raises:
        UnreadableRequest: the body is no JSON object, or a field that metering needs is of the wrong kind.
        BackgroundNotMetered, OtherModelsNotMetered
    """
    fields = wire.read_fields(body, _METERED)
    model = wire.read_text(fields, "model")
    wire.refuse_other_models(fields, openai_wire.OTHER_MODELS)
    if wire.read_switch(fields, "background"):
        pointer = FieldError("#/background", "leave it out, and stream where an answer takes long")
        raise BackgroundNotMetered("background: an answer that comes later cannot be metered", errors=[pointer])
    try:
        items = _items(fields, "input")
        instructions = _items(fields, "instructions")
        permitted = tools.of_openai(
            _offered(fields, items), most_calls=wire.read_count(fields, "max_tool_calls", least=0, most=wire.MAX_COUNT)
        )
        estimate = _estimate(fields, [*instructions, *items])
    except tokens.TooDeep:
        raise wire.too_deep("input") from None
    return WireRequest(
        model=model,
        stream=wire.read_switch(fields, "stream"),
        max_output_tokens=wire.read_count(fields, "max_output_tokens", least=0, most=wire.MAX_OUTPUT_TOKENS),
        choices=1,
        estimate=estimate + permitted.sure,
        wants_usage=True,
        service_tier=wire.read_optional_text(fields, "service_tier"),
        fields=fields,
        context=permitted.context,
        permitted=permitted.most,
        guessed=permitted.guessed,
        guesses_context=_kept(fields, [*instructions, *items]) > 0,
        unpriced_tools=permitted.unpriced + openai_wire.priced_apart(fields, model),
    )


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name; all else as the client wrote it. Usage always comes unasked."""
    return wire.spliced(request.fields, model=model)


def _items(fields: Fields, name: str) -> list[Any]:
    """A field that is one text or a list of items; empty where it is absent."""
    value = wire.read_anything(fields, name)
    if value is None:
        return []
    if isinstance(value, str):
        return [{"content": value}]
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return value
    raise wire.unreadable(name, "a text or a list of items is required")


def _offered(fields: Fields, items: list[Any]) -> Iterator[Any]:
    """Tools of the request, and those that its input adds."""
    offered = wire.read_anything(fields, "tools")
    yield from offered if isinstance(offered, list) else ()
    for item in items:
        if item.get("type") == "additional_tools" and isinstance(item.get("tools"), list):
            yield from item["tools"]


def _estimate(fields: Fields, items: list[Any]) -> Usage:
    """Input by our own rule, and the prior for what the provider keeps."""
    units = heard = 0
    kept = _kept(fields, items)
    if not kept and wire.read_anything(fields, "input") is None:
        raise wire.unreadable("input", "a text or a list of items is required")
    for item in items:
        if item.get("type") != "item_reference":
            item_units, item_heard = _item_units(item)
            units += item_units
            heard += item_heard
    units += sum(wire.field_units(fields, name) for name in ("tools", "text", "prompt"))
    return Usage(
        input_tokens=openai_wire.TOKENS_PER_ANSWER + tokens.whole_tokens(units) + kept * PRIOR_CONTEXT_TOKENS,
        audio_input_tokens=heard,
    )


def _kept(fields: Fields, items: list[Any]) -> int:
    """How many contexts the provider keeps and the client only names."""
    named = [name for name in _KEPT_BY_PROVIDER if wire.read_anything(fields, name) is not None]
    return len(named) + len([item for item in items if item.get("type") == "item_reference"])


def _item_units(item: dict[str, Any]) -> tuple[int, int]:
    """Units and audio tokens of one item of the input."""
    units = openai_wire.TOKENS_PER_MESSAGE * tokens.UNITS_PER_TOKEN
    heard = 0
    for name, value in item.items():
        if name in ("content", "output") and isinstance(value, list):
            for part in value:
                part_units, part_heard = _part_units(part)
                units += part_units
                heard += part_heard
        elif name == "output" and isinstance(value, dict):  # a screenshot
            units += _part_units(value)[0]
        elif name == "content" and isinstance(value, str):
            units += tokens.text_units(value)
        elif name not in ("role", "type", "id", "call_id", "status"):
            units += tokens.nested_units(value)
    return units, heard


def _part_units(part: object) -> tuple[int, int]:
    """Units and audio tokens of one part of an item's content."""
    match part:
        case {"type": "input_text" | "output_text" | "text", "text": str(text)}:
            return tokens.text_units(text), 0
        case {"type": "input_image" | "computer_screenshot", "detail": "low"}:
            return openai_wire.LOW_DETAIL_IMAGE_TOKENS * tokens.UNITS_PER_TOKEN, 0
        case {"type": "input_image" | "computer_screenshot"}:
            return openai_wire.HIGH_DETAIL_IMAGE_TOKENS * tokens.UNITS_PER_TOKEN, 0
        case {"type": "input_file", "file_data": str(data)}:
            return tokens.file_units(data), 0
        case {"type": "input_file"}:
            return tokens.LEAST_FILE_TOKENS * tokens.UNITS_PER_TOKEN, 0
        case {"type": "input_audio", "input_audio": {"data": str(data)}}:
            return 0, len(data) // openai_wire.AUDIO_CHARACTERS_PER_TOKEN + 1
    return tokens.nested_units(part), 0


class _Usage(msgspec.Struct):
    input_tokens: int
    output_tokens: int = 0
    input_tokens_details: InputDetails | None = None
    output_tokens_details: OutputDetails | None = None


class _Response(msgspec.Struct):
    """A response. Untyped where providers differ: what is odd must not stop the stream."""

    usage: msgspec.Raw = _NULL
    status: Any = None
    error: Any = None
    output: Any = None
    model: Any = None
    service_tier: Any = None
    tool_usage: Any = None


class _Event(msgspec.Struct):
    """The data of one event, of whatever type."""

    type: Any = None
    delta: Any = None
    item: Any = None
    output_index: Any = None
    response: msgspec.Raw = _NULL
    error: Any = None
    code: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_RESPONSE: Final = msgspec.json.Decoder(_Response | None)
_EVENT: Final = msgspec.json.Decoder(_Event)


def read_usage(data: bytes) -> Usage | None:
    """Convert the `usage` object of a response (JSON) to the canonical kinds; None where it is null or unusable.

    Cached, cache-writing, audio and image tokens are inside `input_tokens`; reasoning is inside `output_tokens`. A
    write for twelve hours is not told apart from one for half an hour, as no list prices them apart.
    """
    reported = wire.decoded(data, _USAGE)
    if reported is None or reported.input_tokens + reported.output_tokens <= 0:
        return None
    into, out = reported.input_tokens_details or InputDetails(), reported.output_tokens_details or OutputDetails()
    output = max(0, reported.output_tokens)
    return openai_wire.disjoint(
        reported.input_tokens,
        (into.cached_tokens, into.cache_write_tokens, into.audio_tokens, into.image_tokens),
        output,
        max(0, out.reasoning_tokens or 0),
        min(max(0, out.audio_tokens or 0), output),
    )


class UsageMeter(wire.UsageMeter):
    """Meter of a response, plain or streamed."""

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._reported: Usage | None = None
        self._calls = _ToolCalls()
        self._audio_characters = 0
        self._has_failed = False

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        self._take_response(body)

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        if not data or data == b"[DONE]":
            return False
        read: _Event | None = wire.decoded(data, _EVENT)
        if read is None:
            self.unread += 1
        elif isinstance(read.type, str):
            self._take_event(read, read.type)
        return False

    def _take_event(self, event: _Event, kind: str) -> None:
        if kind.endswith(".delta"):
            if isinstance(event.delta, str):
                self._take_delta(kind, event.delta)
        elif kind in ("response.output_item.added", "response.output_item.done"):
            if isinstance(event.item, dict):
                self._calls.see(event.item, event.output_index)
                if kind == "response.output_item.added":
                    self._units += _output_units(event.item)
        elif kind in _ENDS:
            self._take_response(bytes(event.response))
        elif kind == "error":
            self.error = _error_type(event.error) or str(event.code or "error")

    def _take_delta(self, kind: str, delta: str) -> None:
        """A piece of what the model puts out: text, refusal, thought, arguments, code, sound."""
        if kind in _AUDIO_DELTAS:
            self._audio_characters += len(delta)
        else:
            self._units += tokens.text_units(delta)

    def _take_response(self, data: bytes) -> None:
        """Take a whole response, as a plain answer has it and the end of a stream repeats it."""
        response: _Response | None = wire.decoded(data, _RESPONSE)
        if response is None:
            self.unread += 1
            return
        self.completed = True
        self._reported = read_usage(bytes(response.usage)) or self._reported
        if isinstance(response.model, str):
            self.model = response.model
        if isinstance(response.service_tier, str):
            self.tier = response.service_tier
        if response.status == "failed" or response.error:
            self._has_failed = True
            self.error = _error_type(response.error) or "error"
        if isinstance(response.output, list):
            items = [item for item in response.output if isinstance(item, dict)]
            self._units = max(self._units, sum(map(_output_units, items)))
            for place, item in enumerate(items):
                self._calls.see(item, place)
        self._calls.take_report(response.tool_usage)

    def usage(self) -> Usage | None:
        """The provider's count with the calls of its tools; not believed without output where output was seen."""
        reported = self._reported
        if reported is None or (reported.total_output_tokens == 0 and self._has_output):
            return None
        return reported + self._tool_usage()

    def counted(self) -> Usage:
        """The estimated input, and what was seen so far; nothing of a response that failed before it began."""
        if self._has_failed and not self._has_output:
            return Usage() + self._calls.usage()
        estimate = self.request.estimate
        output = Usage(output_tokens=self.output_so_far, audio_output_tokens=self._spoken, requests=0)
        into = Usage(input_tokens=estimate.input_tokens, audio_input_tokens=estimate.audio_input_tokens)
        return into + output + self._tool_usage()

    @property
    def _has_output(self) -> bool:
        return self._units > 0 or self._audio_characters > 0

    @property
    def _spoken(self) -> int:
        return -(-self._audio_characters // openai_wire.AUDIO_CHARACTERS_PER_TOKEN)

    def _tool_usage(self) -> Usage:
        """Calls that were seen, and the containers that were made whether or not they were used."""
        seen = self._calls.usage()
        unseen = max(0, self.request.estimate.code_sessions - seen.code_sessions)
        return seen + Usage(requests=0, code_sessions=unseen)


class _ToolCalls:
    """Billed calls of the provider's tools in one answer; a stream shows each when it begins and when it is done."""

    def __init__(self) -> None:
        self._kinds: dict[object, str] = {}
        self._containers: set[str] = set()
        self._searches: int | None = None

    def see(self, item: dict[str, Any], place: object) -> None:
        """Take an item of the output. place: what it is known by where it has no id."""
        if len(self._kinds) + len(self._containers) >= _MOST_CALLS_SEEN:
            return
        identity = item.get("id")
        key = identity if isinstance(identity, str) and identity else ("", repr(place)[:20])
        match item.get("type"):
            case "web_search_call":
                self._kinds[key] = tools.WEB_SEARCH if _is_search(item) else tools.TOKENS_ALONE
            case "file_search_call":
                self._kinds[key] = tools.FILE_SEARCH if item.get("status") != "failed" else tools.TOKENS_ALONE
            case "code_interpreter_call":
                self._containers.add(str(item.get("container_id") or ""))
            case "shell_call":
                match item.get("environment"):
                    case {"container_id": str(container)}:
                        self._containers.add(container)

    def take_report(self, tool_usage: object) -> None:
        """The provider's own count of billed searches, where it gives one; it leaves out what it does not bill."""
        match tool_usage:
            case {"web_search": {"num_requests": int(count)}} if 0 <= count <= tools.MOST_CALLS:
                self._searches = int(count)

    def usage(self) -> Usage:
        """What they come to."""
        kinds = list(self._kinds.values())
        searches = kinds.count(tools.WEB_SEARCH) if self._searches is None else self._searches
        if not (kinds or searches or self._containers):
            return NO_USAGE
        return Usage(
            requests=0,
            web_searches=searches,
            file_searches=kinds.count(tools.FILE_SEARCH),
            code_sessions=len(self._containers),
        )


def _is_search(item: dict[str, Any]) -> bool:
    """Opening a page and looking through it are not billed, nor is what failed."""
    action = item.get("action")
    done = action.get("type") if isinstance(action, dict) else None
    return done in (None, "search") and item.get("status") != "failed"


def _output_units(item: dict[str, Any]) -> int:
    """Units of what the model put out in an item; results of the provider's own tools are its input, not output.

    So are messages of the user, which a compaction repeats. What it sealed counts as a file.
    """
    if item.get("role") == "user":
        return 0
    if item.get("type") == "compaction" and isinstance(item.get("encrypted_content"), str):
        return tokens.nested_units(item["encrypted_content"])
    return sum(tokens.text_units(text) for text in _output_texts(item) if isinstance(text, str))


def _output_texts(item: dict[str, Any]) -> Iterator[object]:
    yield from (item.get(name) for name in ("name", "arguments", "input", "code"))
    for name in ("content", "summary"):
        for part in _listed(item.get(name)):
            if isinstance(part, dict):
                yield part.get("text")
                yield part.get("refusal")
    yield from _listed(item.get("queries"))
    for name in ("action", "operation"):
        done = item.get(name)
        if isinstance(done, dict):
            yield from (done.get(field) for field in ("diff", "path", "pattern", "text"))
            yield from _listed(done.get("commands"))
            queries = _listed(done.get("queries"))
            yield from queries or [done.get("query")]


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _error_type(error: object) -> str:
    return str(error.get("type") or error.get("code") or "error") if isinstance(error, dict) else ""


def stream_refusal(problem: Problem, *, request_id: str = "") -> bytes:
    """Our own refusal as the last event of a stream that has begun.

    An `error` event of this API, with the error object of the other one beside: the official client raises APIError
    on that, and would pass a bare `error` event on as one event among others.
    """
    error = openai_wire.error_object(problem, request_id)
    event = {"type": "error", **{name: error[name] for name in ("code", "message", "param")}, "error": error}
    return sse.event_bytes(msgspec.json.encode(event), "error")
