"""OpenAI's speech from text, read as far as metering needs it. The answer is passed on piece by piece.

Speech is billed by the characters of its text or by tokens (text in, audio out), as the model's price is. Characters
are known beforehand and exact. Tokens are reported in a stream of events only: where the answer is the sound itself,
they are worked out from how long it is, and the row is marked estimated.

Source: the OpenAI API reference, "Create speech" and its streaming events; the types of the official Python client.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from bursar.gateway import openai_wire, sound, sse, tokens, wire
from bursar.gateway.wire import JSON, WireRequest
from bursar.pricing.usage import Usage

PATH: Final = "/audio/speech"

AUDIO_TOKENS_PER_MINUTE: Final = 1_250
"""OpenAI's price page puts a minute of gpt-4o-mini-tts at 0.015 USD, a million of its tokens at 12 USD."""
AUDIO_TOKENS_PER_TEXT_TOKEN: Final = 5
"""A token of ours is four letters, and speech has about sixteen letters a second."""
HELD_AUDIO_TOKENS_PER_TEXT_TOKEN: Final = 8
"""Slow voices and pauses."""
PCM_BYTES_PER_SECOND: Final = 48_000
"""`pcm` has no header: 24 kHz, 16 bits, one channel."""

_METERED: Final = frozenset(("model", "input", "instructions", "response_format", "stream_format"))
_NULL: Final = msgspec.Raw(b"null")

refusal = openai_wire.refusal
stream_refusal = openai_wire.stream_refusal


@dataclass(frozen=True, slots=True)
class SpeechRequest(WireRequest):
    """A request for speech. text_tokens: of what is to be spoken. is_pcm: whether the sound comes without a header."""

    text_tokens: int = 0
    is_pcm: bool = False

    @property
    def is_by_characters(self) -> bool:
        """Whether the model's price is for characters."""
        return not self.has_output


def read_request(body: bytes, content_type: str = JSON) -> SpeechRequest:
    """Read what metering needs of a request for speech.

    Raises:
        UnreadableRequest: the body is no JSON object, or a field that metering needs is of the wrong kind.
    """
    fields = wire.read_fields(body, _METERED)
    text = wire.read_text(fields, "input")
    spoken = tokens.count_tokens(text)
    by_tokens = SpeechRequest(
        model=wire.read_text(fields, "model"),
        stream=True,
        max_output_tokens=spoken * HELD_AUDIO_TOKENS_PER_TEXT_TOKEN,
        choices=1,
        estimate=Usage(input_tokens=spoken + tokens.whole_tokens(wire.field_units(fields, "instructions"))),
        wants_usage=True,
        service_tier="",
        fields=fields,
        output_kind="audio_output_tokens",
        is_events=wire.read_optional_text(fields, "stream_format") == "sse",
        text_tokens=spoken,
        is_pcm=wire.read_optional_text(fields, "response_format") == "pcm",
    )
    return replace(by_tokens, estimate=Usage(characters=len(text)), has_output=False, otherwise=by_tokens)


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name; all else as the client wrote it."""
    return wire.spliced(request.fields, model=model)


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0


class _Event(msgspec.Struct):
    type: str = ""
    audio: Any = None
    usage: msgspec.Raw = _NULL
    error: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_EVENT: Final = msgspec.json.Decoder(_Event)


class UsageMeter(wire.UsageMeter):
    """Meter of speech, as sound or as events. Of the sound it keeps the first and last pieces, to read its length."""

    request: SpeechRequest

    def __init__(self, request: WireRequest) -> None:
        assert isinstance(request, SpeechRequest)
        super().__init__(request)
        self._reported: Usage | None = None
        self._size = 0
        self._head = b""
        self._tail = b""

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream; sound is passed on as it is."""
        if self.request.is_events:
            return super().feed(data)
        self._hear(data)
        return data

    def finish(self) -> bytes:
        """The provider's stream has ended; return what the client still gets."""
        return super().finish() if self.request.is_events else b""

    def read_body(self, body: bytes) -> None:
        """Take a whole answer, which a provider gave in one piece."""
        self._hear(body)

    def _hear(self, data: bytes) -> None:
        self._size += len(data)
        if len(self._head) < sound.HEAD_BYTES:
            self._head += data[: sound.HEAD_BYTES - len(self._head)]
        self._tail = (self._tail + data[-sound.HEAD_BYTES :])[-sound.HEAD_BYTES :]

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        if not data or data == b"[DONE]":
            return False
        answer: _Event | None = wire.decoded(data, _EVENT)
        if answer is None:
            self.unread += 1
        elif answer.error is not None:
            self.error = openai_wire.error_type(answer.error)
        elif answer.type == "speech.audio.delta" and isinstance(answer.audio, str):
            self._hear(_decoded(answer.audio))
        elif answer.type == "speech.audio.done":
            self.completed = True
            self._reported = _usage(bytes(answer.usage))
        return False

    def usage(self) -> Usage | None:
        """The characters of the text, or the provider's count of tokens."""
        return self.request.estimate if self.request.is_by_characters else self._reported

    def counted(self) -> Usage:
        """The characters of the text, or its tokens and those of the sound so far."""
        request = self.request
        if request.is_by_characters:
            return request.estimate
        return request.estimate.but(audio_output_tokens=self._audio_tokens())

    def _audio_tokens(self) -> int:
        """By the length of the sound so far; where it has none that can be read, by its text."""
        if not self._size:
            return 0
        length = self._size * 1000 // PCM_BYTES_PER_SECOND if self.request.is_pcm else self._milliseconds()
        if length is None:
            return self.request.text_tokens * AUDIO_TOKENS_PER_TEXT_TOKEN
        return -(-length * AUDIO_TOKENS_PER_MINUTE // 60_000)

    def _milliseconds(self) -> int | None:
        return sound.milliseconds(self._head, self._tail, self._size)


def _usage(data: bytes) -> Usage | None:
    reported = wire.decoded(data, _USAGE)
    if reported is None:
        return None
    return wire.believable(
        Usage(input_tokens=max(0, reported.input_tokens), audio_output_tokens=max(0, reported.output_tokens))
    )


def _decoded(text: str) -> bytes:
    """A piece of sound; what is no base64 is none."""
    try:
        return binascii.a2b_base64(text)
    except (binascii.Error, ValueError):
        return b""
