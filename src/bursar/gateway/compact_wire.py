"""OpenAI's compaction of a response's context: one plain call of a model, read as a response is.

Source: the OpenAI API reference, "Compact a response"; the types of the official Python client.
"""

from __future__ import annotations

from typing import Final

from bursar.gateway import responses_wire, wire
from bursar.gateway.responses_wire import UsageMeter, refusal, stream_refusal, upstream_body
from bursar.gateway.wire import WireRequest

__all__ = ["PATH", "UsageMeter", "read_request", "refusal", "stream_refusal", "upstream_body"]

PATH: Final = "/responses/compact"


def read_request(body: bytes, content_type: str = wire.JSON) -> WireRequest:
    """As a request for a response; none of these is streamed.

    Raises:
        UnreadableRequest, BackgroundNotMetered
    """
    request = responses_wire.read_request(body)
    if request.stream:
        raise wire.unreadable("stream", "a compaction is not streamed")
    return request
