"""The paths under /v1 that are metered, and how each is read. A path that is not here is refused."""

from dataclasses import dataclass
from typing import Final

from bursar.gateway import (
    anthropic_wire,
    compact_wire,
    count_tokens_wire,
    embeddings_wire,
    images_wire,
    openai_wire,
    responses_wire,
    speech_wire,
    transcriptions_wire,
    translations_wire,
)
from bursar.gateway.routes import Format
from bursar.gateway.wire import Wire

MOST_BODY_BYTES: Final = 20 * 1024 * 1024
MOST_FORM_BYTES: Final = 26 * 1024 * 1024
"""OpenAI takes files of 25 MB."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A path for POST. format: the family of calls that a provider must speak to serve it; feature: what it is for."""

    path: str
    wire: Wire
    format: Format
    feature: str
    most_body_bytes: int = MOST_BODY_BYTES


ENDPOINTS: Final = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", openai_wire, "openai", "chat"),
        Endpoint("/v1/responses", responses_wire, "openai", "responses"),
        Endpoint("/v1/responses/compact", compact_wire, "openai", "responses"),
        Endpoint("/v1/embeddings", embeddings_wire, "openai", "embeddings"),
        Endpoint("/v1/images/generations", images_wire, "openai", "images"),
        Endpoint("/v1/audio/speech", speech_wire, "openai", "speech"),
        Endpoint("/v1/audio/transcriptions", transcriptions_wire, "openai", "transcriptions", MOST_FORM_BYTES),
        Endpoint("/v1/audio/translations", translations_wire, "openai", "translations", MOST_FORM_BYTES),
        Endpoint("/v1/messages", anthropic_wire, "anthropic", "messages"),
        Endpoint("/v1/messages/count_tokens", count_tokens_wire, "anthropic", "messages"),
    )
}
