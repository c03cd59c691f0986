"""Anthropic's count of a message's tokens, which costs nothing; caps on calls count it.

Source: the Anthropic API reference, "Count tokens in a Message".
"""

from __future__ import annotations

from typing import Final

from bursar.gateway import anthropic_wire, wire
from bursar.gateway.wire import JSON, WireRequest
from bursar.pricing.usage import NO_USAGE, Usage

PATH: Final = "/messages/count_tokens"

refusal = anthropic_wire.refusal
stream_refusal = anthropic_wire.stream_refusal
upstream_body = anthropic_wire.upstream_body

_METERED: Final = frozenset(("model",))


def read_request(body: bytes, content_type: str = JSON) -> WireRequest:
    """Read the model of a request; nothing else of it is metered.

    Raises:
        UnreadableRequest: the body is no JSON object, or names no model.
    """
    fields = wire.read_fields(body, _METERED)
    return WireRequest(
        model=wire.read_text(fields, "model"),
        stream=False,
        max_output_tokens=0,
        choices=1,
        estimate=NO_USAGE,  # not even the price of a request
        wants_usage=True,
        service_tier="",
        fields=fields,
        has_output=False,
    )


class UsageMeter(wire.PlainMeter):
    """Meter of a call that uses nothing, whatever it answers."""

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        self.completed = True

    def usage(self) -> Usage | None:
        """Nothing, and that is certain."""
        return NO_USAGE

    def counted(self) -> Usage:
        """Nothing."""
        return NO_USAGE
