"""The paths under /v1 that are metered, and how each is read. A path that is not here is refused."""

from dataclasses import dataclass
from typing import Final

from bursar.gateway import anthropic_wire, openai_wire
from bursar.gateway.routes import Format
from bursar.gateway.wire import Wire


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path for POST. format: the family of calls that a provider must speak to serve it."""

    path: str
    wire: Wire
    format: Format


ENDPOINTS: Final = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", openai_wire, "openai"),
        Endpoint("/v1/messages", anthropic_wire, "anthropic"),
    )
}
