"""What metering reads of a batch before it goes out, and of its results when they come. Pure.

Each request of a batch is read by the wire of its path, as a single call is, and written anew with the provider's name
of its model. Sources: the OpenAI API reference, "Batch" (request input and output objects); the Anthropic API
reference, "Message Batches"; the types of the official Python clients.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from bursar.gateway import wire
from bursar.gateway.endpoints import ENDPOINTS
from bursar.gateway.routes import Format
from bursar.gateway.wire import UnreadableRequest, Wire, WireRequest
from bursar.pricing.usage import USAGE_KINDS, Usage

MOST_REQUESTS: Final = 50_000
LONGEST_CUSTOM_ID: Final = 256
MESSAGES: Final = "/v1/messages"
BATCHED: Final = ("/v1/chat/completions", "/v1/responses", "/v1/embeddings")
"""Paths that the lines of an uploaded file may be for, as far as they are served at all."""

ModelNames = Mapping[str, str]
"""Public name of a model -> the provider's."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One request of a batch as metering sees it.

    model           the public name
    estimate        its input by our own rule; most: that, and as much output and work of tools as is held for
    permitted       what the provider's tools may use
    is_guess        it names no limit of its output, so that `most` is a guess
    context         conditions of its price
    unpriced_tools  tools of the provider that nobody here knows to price
    """

    custom_id: str
    model: str
    estimate: Usage
    most: Usage
    permitted: Usage
    is_guess: bool
    context: Mapping[str, str]
    unpriced_tools: tuple[str, ...] = ()

    def as_json(self) -> list[Any]:
        """For storing: counts that are zero are left out."""
        counts = [_counts(each) for each in (self.estimate, self.most, self.permitted)]
        return [self.custom_id, self.model, *counts, self.is_guess, self.context, self.unpriced_tools]

    @classmethod
    def of_json(cls, row: Sequence[Any]) -> Asked:
        """The other way."""
        custom_id, model, estimate, most, permitted, is_guess, context, tools = row
        return cls(
            custom_id=custom_id,
            model=model,
            estimate=Usage(**estimate),
            most=Usage(**most),
            permitted=Usage(**permitted),
            is_guess=is_guess,
            context=context,
            unpriced_tools=tuple(tools),
        )


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """What was read. written: the document for the provider, with its own names of the models."""

    endpoint: str
    asked: tuple[Asked, ...]
    written: Callable[[ModelNames], bytes]


class _Entry(msgspec.Struct):
    """One request of a message batch."""

    custom_id: str
    params: msgspec.Raw


class _Line(msgspec.Struct):
    """One line of an uploaded file."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


_ENTRIES: Final = msgspec.json.Decoder(list[_Entry])
_LINE: Final = msgspec.json.Decoder(_Line)


def wire_of(endpoint: str) -> Wire:
    """The wire that reads the requests of a batch.

    Raises:
        UnreadableRequest: the path is none that can be called in batches.
    """
    known = ENDPOINTS.get(endpoint)
    if known is None or endpoint not in (*BATCHED, MESSAGES):
        raise _not_batched(endpoint)
    return known.wire


def _not_batched(endpoint: str) -> UnreadableRequest:
    served = ", ".join(path for path in BATCHED if path in ENDPOINTS)
    return UnreadableRequest(f"{endpoint[:200]!r} cannot be called in batches; {served} can")


def read_message_batch(body: bytes, prior_output_tokens: int) -> ReadBatch:
    """Read Anthropic's `POST /v1/messages/batches`. prior_output_tokens: held for where a request names no limit.

    Raises:
        UnreadableRequest: of one of its requests too.
    """
    fields = wire.read_fields(body, frozenset({"requests"}))
    try:
        entries = _ENTRIES.decode(fields.get("requests", b"null"))
    except (msgspec.MsgspecError, RecursionError) as error:
        raise wire.unreadable("requests", f"a list of requests is required: {error}") from error
    read = [(each.custom_id, _read(MESSAGES, bytes(each.params), f"requests[{n}]")) for n, each in enumerate(entries)]
    format_wire = wire_of(MESSAGES)

    def written(models: ModelNames) -> bytes:
        requests = [
            {"custom_id": custom_id, "params": msgspec.Raw(format_wire.upstream_body(each, model=models[each.model]))}
            for custom_id, each in read
        ]
        return wire.spliced(fields, requests=requests)

    return ReadBatch(MESSAGES, _asked(read, prior_output_tokens), written)


def read_file(content: bytes, prior_output_tokens: int) -> ReadBatch:
    """Read the lines of a file for OpenAI's `POST /v1/batches`; they are all for one path.

    Raises:
        UnreadableRequest: of one of its lines too.
    """
    lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    read: list[tuple[str, WireRequest]] = []
    endpoint = ""
    for number, text in lines:
        try:
            line = _LINE.decode(text)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise UnreadableRequest(f"Line {number}: {error}") from error
        endpoint = endpoint or line.url
        if endpoint not in BATCHED:
            raise _not_batched(endpoint)
        if line.url != endpoint or line.method != "POST":
            raise UnreadableRequest(f"Line {number}: every line is a POST to the same path, {endpoint[:200]!r} here")
        read.append((line.custom_id, _read(endpoint, bytes(line.body), f"Line {number}")))
    asked = _asked(read, prior_output_tokens)
    format_wire = wire_of(endpoint)

    def written(models: ModelNames) -> bytes:
        return b"".join(
            msgspec.json.encode(
                {
                    "custom_id": custom_id,
                    "method": "POST",
                    "url": endpoint,
                    "body": msgspec.Raw(format_wire.upstream_body(each, model=models[each.model])),
                }
            )
            + b"\n"
            for custom_id, each in read
        )

    return ReadBatch(endpoint, asked, written)


def _read(endpoint: str, body: bytes, place: str) -> WireRequest:
    """One request, by the wire of its path."""
    try:
        request = wire_of(endpoint).read_request(body)
    except UnreadableRequest as refusal:
        raise UnreadableRequest(f"{place}: {refusal.detail}", errors=refusal.errors) from refusal
    if request.stream:
        raise UnreadableRequest(f"{place}: nothing is streamed in a batch")
    return request


def _asked(read: Sequence[tuple[str, WireRequest]], prior_output_tokens: int) -> tuple[Asked, ...]:
    if not 1 <= len(read) <= MOST_REQUESTS:
        raise UnreadableRequest(f"A batch has 1 to {MOST_REQUESTS} requests, not {len(read)}")
    seen: set[str] = set()
    for custom_id, _ in read:
        if not 1 <= len(custom_id) <= LONGEST_CUSTOM_ID or not custom_id.isprintable():
            raise UnreadableRequest(f"A custom_id has 1 to {LONGEST_CUSTOM_ID} printable characters")
        if custom_id in seen:
            raise UnreadableRequest(f"The custom_id {custom_id!r} comes twice")
        seen.add(custom_id)
    return tuple(_as_asked(custom_id, request, prior_output_tokens) for custom_id, request in read)


def _as_asked(custom_id: str, request: WireRequest, prior_output_tokens: int) -> Asked:
    limit = request.max_output_tokens
    most = request.hold_for(prior_output_tokens if limit is None else limit)
    return Asked(
        custom_id=custom_id,
        model=request.model,
        estimate=request.estimate,
        most=most,
        permitted=request.permitted,
        is_guess=limit is None and request.has_output,
        context=request.context,
        unpriced_tools=request.unpriced_tools,
    )


def _counts(usage: Usage) -> dict[str, int]:
    counts = {kind: count for kind, count in zip(USAGE_KINDS, usage.as_array(), strict=True) if count}
    return counts if usage.requests else {**counts, "requests": 0}


# ------------------------------------------------------------------------------------------------ results


@dataclass(frozen=True, slots=True)
class Result:
    """One line of results. body: the provider's answer; None: it failed, expired or was cancelled, and is free."""

    custom_id: str
    body: bytes | None


class _Outcome(msgspec.Struct):
    type: str
    message: msgspec.Raw = msgspec.Raw(b"null")


class _AnthropicLine(msgspec.Struct):
    custom_id: str
    result: _Outcome


class _Response(msgspec.Struct):
    status_code: int = 0
    body: msgspec.Raw = msgspec.Raw(b"null")


class _OpenAILine(msgspec.Struct):
    custom_id: str
    response: _Response | None = None


_ANTHROPIC_LINE: Final = msgspec.json.Decoder(_AnthropicLine)
_OPENAI_LINE: Final = msgspec.json.Decoder(_OpenAILine)


def read_result(format: Format, line: bytes) -> Result | None:
    """One line of a file of results; None where it is not what it should be."""
    if format == "anthropic":
        told: _AnthropicLine | None = wire.decoded(line, _ANTHROPIC_LINE)
        if told is None:
            return None
        return Result(told.custom_id, bytes(told.result.message) if told.result.type == "succeeded" else None)
    said: _OpenAILine | None = wire.decoded(line, _OPENAI_LINE)
    if said is None:
        return None
    answered = said.response is not None and 200 <= said.response.status_code < 300
    return Result(said.custom_id, bytes(said.response.body) if answered and said.response is not None else None)


def measured(endpoint: str, model: str, estimate: Usage, permitted: Usage, body: bytes) -> wire.Measured:
    """What an answer in a batch used, by the meter of a single call."""
    request = WireRequest(
        model=model,
        stream=False,
        max_output_tokens=None,
        choices=1,
        estimate=estimate,
        wants_usage=True,
        service_tier="",
        fields={},
        permitted=permitted,
    )
    meter = wire_of(endpoint).UsageMeter(request)
    meter.read_body(body)
    return meter.measure()


def lines_of(rest: bytes, piece: bytes) -> tuple[Iterable[bytes], bytes]:
    """Whole lines of what came so far, and the beginning of the next one."""
    *whole, rest = (rest + piece).split(b"\n")
    return (line for line in whole if line.strip()), rest
