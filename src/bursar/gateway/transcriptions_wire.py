"""OpenAI's transcriptions of sound, read as far as metering needs them. The request is a form with a file.

Sound is billed by its length, or by tokens (audio in, text out), as the model's price is; a few models bill both. The
length is known before the call where the file's headers say it (`sound`). A provider reports the length or the tokens
in JSON and in events; plain text and subtitles report nothing, and the row is marked estimated.

Source: the OpenAI API reference, "Create transcription" and its streaming events; the types of the official client.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Final

import msgspec

from bursar.gateway import multipart, openai_wire, sound, sse, tokens, wire
from bursar.gateway.wire import JSON, WireRequest
from bursar.pricing.usage import Usage

PATH: Final = "/audio/transcriptions"

AUDIO_TOKENS_PER_SECOND: Final = 10
"""OpenAI, "Realtime costs": a token of what a user says is 100 ms."""
TEXT_TOKENS_PER_MINUTE: Final = 480
"""What is held for the text: people speak 100 to 200 words a minute, and a word is about 1.3 tokens; at most 300."""

_METERED: Final = ("model", "file", "stream", "prompt", "response_format")
_SWITCH: Final = {"": False, "false": False, "0": False, "true": True, "1": True}
_MS_PER_MINUTE: Final = 60_000
# The end of a cue in SRT and in WebVTT, which leaves hours out.
_CUE: Final = re.compile(rb"--> *(?:(\d+):)?(\d\d):(\d\d)[.,](\d{3})")
# Lines of subtitles that nobody spoke: cue numbers, times, the name of the format.
_NO_TEXT: Final = re.compile(rb"^(?:\d+|.*-->.*|WEBVTT)\s*$", re.MULTILINE)

refusal = openai_wire.refusal
stream_refusal = openai_wire.stream_refusal


@dataclass(frozen=True, slots=True)
class SoundRequest(WireRequest):
    """A request about a sound.

    form       as the client wrote it
    likely_ms  how long the sound is where the provider does not say
    """

    form: multipart.Form | None = None
    likely_ms: int = 0

    @property
    def is_by_time(self) -> bool:
        """Whether the model's price is for time."""
        return self.estimate.audio_milliseconds > 0

    def identity(self, body: bytes) -> bytes:
        """What is asked, without the boundary, which is another each time that a client writes the same form."""
        assert self.form is not None
        digest = sha256()
        for part in self.form.parts:
            content = self.form.content(part)
            digest.update(f"{part.name!r} {part.filename!r} {len(content)}\n".encode("utf-8", "surrogatepass"))
            digest.update(content)
        return digest.digest()


def read_request(body: bytes, content_type: str = JSON) -> SoundRequest:
    """Read what metering needs of a form with a sound.

    The first form of the request is for models with a price for time and for text, the second for time alone, the third
    for tokens.

    Raises:
        UnreadableRequest: the body is no form of a kind that has but one reading, or a field is of the wrong kind.
    """
    form = multipart.read_form(body, content_type, metered=_METERED)
    model, file = form.text("model"), form.part("file")
    if not model:
        raise wire.unreadable("model", "a text is required")
    if file is None or file.filename is None or file.start == file.end:
        raise wire.unreadable("file", "a file is required")
    stream = _SWITCH.get((form.text("stream") or "").lower())
    if stream is None:
        raise wire.unreadable("stream", "true or false is required")
    most_ms = sound.most_milliseconds(form.content(file))
    by_tokens = SoundRequest(
        model=model,
        stream=stream,
        max_output_tokens=_up(most_ms * TEXT_TOKENS_PER_MINUTE, _MS_PER_MINUTE),
        choices=1,
        estimate=Usage(
            input_tokens=sum(map(tokens.count_tokens, form.texts("prompt"))),
            audio_input_tokens=_up(most_ms * AUDIO_TOKENS_PER_SECOND, 1000),
        ),
        wants_usage=True,
        service_tier="",
        fields={},
        content_type=form.content_type,
        may_ignore_stream=True,
        form=form,
        likely_ms=sound.likely_milliseconds(form.content(file)),
    )
    by_time = replace(by_tokens, estimate=Usage(audio_milliseconds=most_ms), otherwise=by_tokens, has_output=False)
    return replace(by_time, has_output=True, otherwise=by_time)


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The form for the provider: its own model name; every other byte as the client wrote it."""
    assert isinstance(request, SoundRequest)
    assert request.form is not None
    return request.form.with_text("model", model)


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


class _InputDetails(msgspec.Struct):
    audio_tokens: int | None = None
    text_tokens: int | None = None


class _Usage(msgspec.Struct):
    seconds: float | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    input_token_details: _InputDetails | None = None
    prompt_audio_seconds: float | None = None  # Mistral
    prompt_tokens: int | None = None  # Mistral
    completion_tokens: int | None = None  # Mistral


class _Answer(msgspec.Struct):
    """A plain answer or one event. Untyped where providers differ."""

    type: str = ""
    text: Any = None
    delta: Any = None
    duration: Any = None
    usage: msgspec.Raw = msgspec.Raw(b"null")
    error: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_ANSWER: Final = msgspec.json.Decoder(_Answer)


class UsageMeter(wire.UsageMeter):
    """Meter of a transcription: JSON, plain text, subtitles or a stream of events."""

    request: SoundRequest

    def __init__(self, request: WireRequest) -> None:
        assert isinstance(request, SoundRequest)
        super().__init__(request)
        self._reported: _Usage | None = None
        self._reported_ms: int | None = None
        self._cue_ms: int | None = None

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        answer: _Answer | None = wire.decoded(body, _ANSWER) if body.lstrip()[:1] == b"{" else None
        self.completed = True
        if answer is not None:
            self._take(answer)
        elif not body.lstrip().startswith((b"data:", b"event:")):  # events that nobody asked for are no spoken text
            self._units = tokens.text_units(_NO_TEXT.sub(b"", body).strip().decode("utf-8", "replace"))
            self._cue_ms = _last_cue(body)

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        if not data or data == b"[DONE]":
            return False
        answer: _Answer | None = wire.decoded(data, _ANSWER)
        if answer is None:
            self.unread += 1
        elif answer.error is not None:
            self.error = openai_wire.error_type(answer.error)
        elif answer.type == "transcript.text.delta" and isinstance(answer.delta, str):
            self._units += tokens.text_units(answer.delta)
        elif answer.type == "transcript.text.done":
            self.completed = True
            self._take(answer)
        return False

    def _take(self, answer: _Answer) -> None:
        """A whole text and what is reported with it."""
        if isinstance(answer.text, str):
            self._units = tokens.text_units(answer.text)
        if isinstance(answer.duration, int | float | str):
            self._reported_ms = _milliseconds(answer.duration)
        self._reported = wire.decoded(bytes(answer.usage), _USAGE)

    def usage(self) -> Usage | None:
        """The provider's count in the kinds that the model's price is for; None where it reports others or none."""
        if self.request.is_by_time:
            return self._time()
        return self._tokens()

    def _time(self) -> Usage | None:
        reported = self._reported or _Usage()
        length = _milliseconds(reported.seconds or reported.prompt_audio_seconds) or self._reported_ms
        if not length:
            return None
        if not self.request.has_output:
            return Usage(audio_milliseconds=length)
        text = reported.output_tokens or reported.completion_tokens
        if text is None:
            return None
        given = 0 if reported.prompt_tokens is None else max(0, reported.prompt_tokens)
        return wire.believable(Usage(audio_milliseconds=length, input_tokens=given, output_tokens=max(0, text)))

    def _tokens(self) -> Usage | None:
        reported = self._reported
        if reported is None or reported.input_tokens is None:
            return None
        total = max(0, reported.input_tokens)
        details = reported.input_token_details or _InputDetails()
        text = min(max(0, details.text_tokens or 0), total)
        return wire.believable(
            Usage(
                input_tokens=text,
                audio_input_tokens=total - text,
                output_tokens=max(0, reported.output_tokens or 0),
            )
        )

    def counted(self) -> Usage:
        """The sound by its headers, the end of its subtitles or its size; and the text so far by our own rule.

        Headers are the client's, and it may have put in whatever it liked: no sound is shorter than its text takes.
        """
        request = self.request
        spoken_ms = self.output_so_far * _MS_PER_MINUTE // TEXT_TOKENS_PER_MINUTE
        length = self._reported_ms or self._cue_ms or max(request.likely_ms, spoken_ms)
        made = {"output_tokens": self.output_so_far} if request.has_output else {}
        if request.is_by_time:
            return request.estimate.but(audio_milliseconds=length, **made)
        return request.estimate.but(audio_input_tokens=_up(length * AUDIO_TOKENS_PER_SECOND, 1000), **made)


def _milliseconds(seconds: float | str | None) -> int | None:
    """A provider's seconds, rounded half-up; None where they cannot be true."""
    try:
        value = float(seconds or 0)
    except (ValueError, OverflowError):
        return None
    return int(value * 1000 + 0.5) if 0 < value * 1000 <= sound.LONGEST_MS else None


def _last_cue(body: bytes) -> int | None:
    """Where the last subtitle ends."""
    cues = _CUE.findall(body)
    if not cues:
        return None
    hours, minutes, seconds, milliseconds = (int(each or 0) for each in cues[-1])
    total = ((hours * 60 + minutes) * 60 + seconds) * 1000 + milliseconds
    return total if total <= sound.LONGEST_MS else None
