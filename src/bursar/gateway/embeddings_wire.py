"""OpenAI's embeddings, read as far as metering needs them.

Source: the OpenAI API reference, "Create embeddings"; the types of the official Python client.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from bursar.gateway import openai_wire, tokens, wire
from bursar.gateway.wire import JSON, WireRequest
from bursar.pricing.usage import Usage

PATH: Final = "/embeddings"

refusal = openai_wire.refusal
stream_refusal = openai_wire.stream_refusal

_METERED: Final = frozenset(("model", "input"))
_NULL: Final = msgspec.Raw(b"null")


def read_request(body: bytes, content_type: str = JSON) -> WireRequest:
    """Read what metering needs of a request for embeddings.

    Raises:
        UnreadableRequest: the body is no JSON object, or a field that metering needs is of the wrong kind.
    """
    fields = wire.read_fields(body, _METERED)
    return WireRequest(
        model=wire.read_text(fields, "model"),
        stream=False,
        max_output_tokens=0,
        choices=1,
        estimate=Usage(input_tokens=_input_tokens(wire.read_anything(fields, "input"))),
        wants_usage=True,
        service_tier="",
        fields=fields,
        has_output=False,
    )


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name; all else as the client wrote it."""
    return wire.spliced(request.fields, model=model)


def _input_tokens(given: object) -> int:
    """Tokens of a text, a list of texts, a list of tokens or a list of such lists; tokens are counted exactly.

    At least one: what a provider takes for an input at all is never free by accident.
    """
    if not isinstance(given, str | list):
        raise wire.unreadable("input", "a text, a list of texts or lists of tokens are required")
    units = 0
    for each in [given] if isinstance(given, str) else given:
        if isinstance(each, str):
            units += tokens.text_units(each)
        elif isinstance(each, int):
            units += tokens.UNITS_PER_TOKEN
        elif isinstance(each, list) and all(isinstance(token, int) for token in each):
            units += len(each) * tokens.UNITS_PER_TOKEN
        else:
            units += _other_units(each)
    return max(1, tokens.whole_tokens(units))


def _other_units(value: object) -> int:
    """Units of what other providers embed, such as images."""
    try:
        return tokens.nested_units(value)
    except tokens.TooDeep:
        raise wire.too_deep("input") from None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    total_tokens: int | None = None  # all that some providers report


class _Answer(msgspec.Struct):
    """The vectors, of which there may be a hundred megabytes, are skipped."""

    usage: msgspec.Raw = _NULL
    model: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_ANSWER: Final = msgspec.json.Decoder(_Answer)


class UsageMeter(wire.PlainMeter):
    """Meter of embeddings."""

    def __init__(self, request: WireRequest) -> None:
        super().__init__(request)
        self._reported = 0

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        answer: _Answer | None = wire.decoded(body, _ANSWER)
        if answer is None:
            self.unread += 1
            return
        self.completed = True
        if isinstance(answer.model, str):
            self.model = answer.model
        usage = wire.decoded(bytes(answer.usage), _USAGE)
        if usage is not None:
            self._reported = usage.prompt_tokens or usage.total_tokens or 0

    def usage(self) -> Usage | None:
        """The provider's count; None where there is none that can be true."""
        return wire.believable(Usage(input_tokens=max(0, self._reported)))

    def counted(self) -> Usage:
        """Our own count of the input."""
        return self.request.estimate
