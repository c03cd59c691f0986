"""What the demo provider answers beside talk: embeddings, images, speech, transcriptions, counts of tokens.

A model whose name ends with `-tokens` reports tokens, every other one what it is billed by.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any, Final

import msgspec
from aiohttp import web

from bursar.gateway import (
    anthropic_wire,
    count_tokens_wire,
    demo_anthropic,
    demo_openai,
    embeddings_wire,
    images_wire,
    speech_wire,
    sse,
    transcriptions_wire,
    translations_wire,
    wire,
)
from bursar.gateway.demo_answers import (
    DIRECTIONS_HEADER,
    LONGEST_OUTPUT,
    PLAIN_DIRECTIONS,
    WORD_STARTS,
    Directions,
    read_directions,
    text_pieces,
)

_JSON: Final = "application/json"
_EVENTS: Final = "text/event-stream"
_MOST_DIMENSIONS: Final = 4_096
_PIXELS: Final = 16
_SAMPLE_RATE: Final = 24_000
_MS_PER_TEXT_TOKEN: Final = 250
_TEXT_TOKENS_PER_SECOND: Final = 3
_PIECE_BYTES: Final = 4_800
# A frame of MPEG-2 layer III: 64 kbit/s, 24 kHz, one channel, 24 ms; with nothing in it, it is silence.
_MP3_FRAME: Final = b"\xff\xf3\x84\xc4" + bytes(188)
_MP3_FRAME_MS: Final = 24
_encode: Final = msgspec.json.encode


@dataclass(frozen=True, slots=True)
class Made:
    """An answer: pieces of a stream, and those behind them; or one piece that is all of it."""

    content_type: str
    pieces: Sequence[bytes]
    last: Sequence[bytes] = field(default=())
    is_stream: bool = False

    @classmethod
    def document(cls, value: object) -> Made:
        return cls(_JSON, [_encode(value)])

    @classmethod
    def stream(cls, events: Sequence[dict[str, Any]], last: Sequence[dict[str, Any]]) -> Made:
        return cls(_EVENTS, [_event(each) for each in events], [_event(each) for each in last], is_stream=True)


def _event(value: dict[str, Any]) -> bytes:
    return sse.event_bytes(_encode(value), name=value["type"])


Make = Callable[[Any, Directions], Made]


def add_routes(router: web.UrlDispatcher) -> None:
    """Serve these paths too."""
    for format, make in (
        (embeddings_wire, _embeddings),
        (images_wire, _images),
        (speech_wire, _speech),
        (transcriptions_wire, _transcription),
        (translations_wire, _transcription),
        (count_tokens_wire, _count),
    ):
        router.add_post(f"/v1{format.PATH}", _handler(format, make))


def _handler(format: wire.Wire, make: Make) -> Callable[[web.Request], Any]:
    async def handle(request: web.Request) -> web.StreamResponse:
        header = request.headers.get(DIRECTIONS_HEADER)
        try:
            directions = read_directions(header) if header else PLAIN_DIRECTIONS
            asked = format.read_request(await request.read(), request.headers.get("Content-Type", _JSON))
            made = make(asked, directions)
        except wire.UnreadableRequest as problem:
            return web.Response(body=format.refusal(problem), status=problem.status, content_type=_JSON)
        await asyncio.sleep(directions.delay_ms / 1000)
        if directions.fail:
            shape = demo_anthropic if format is count_tokens_wire else demo_openai
            headers = {"Retry-After": "1"} if directions.fail in (429, 529) else None
            body = shape.error(directions.fail)
            return web.Response(body=body, status=directions.fail, headers=headers, content_type=_JSON)
        return await (_stream(request, made, directions) if made.is_stream else _plain(request, made, directions))

    return handle


async def _plain(request: web.Request, made: Made, directions: Directions) -> web.StreamResponse:
    [body] = made.pieces
    response = web.StreamResponse(headers={"Content-Type": made.content_type, "Content-Length": str(len(body))})
    if directions.break_after is None:
        await response.prepare(request)
        await response.write(body)
        return response
    if directions.break_after > 0:
        await response.prepare(request)
        await response.write(body[: len(body) // 2])
    return _cut(request, response)


async def _stream(request: web.Request, made: Made, directions: Directions) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": made.content_type})
    response.enable_chunked_encoding()
    await response.prepare(request)
    stops = [each for each in (directions.break_after, directions.error_after) if each is not None]
    for number, piece in enumerate([*made.pieces, *made.last]):
        if number in stops:
            break
        await response.write(piece)
        await asyncio.sleep(directions.piece_ms / 1000)
    if directions.break_after is not None or (stops and made.content_type != _EVENTS):
        return _cut(request, response)
    if directions.error_after is not None:
        await response.write(demo_openai.error_event())
    return response


def _cut(request: web.Request, response: web.StreamResponse) -> web.StreamResponse:
    """Close the connection in the middle of the answer; what was written still arrives."""
    if request.transport is not None:
        request.transport.close()
    return response


def _told(usage: dict[str, Any], directions: Directions) -> dict[str, Any]:
    """The member `usage`, as directed: as it is, zero, or none."""
    if directions.usage == "missing":
        return {}
    if directions.usage == "zero":
        return {"usage": {name: 0 if isinstance(value, int | float) else value for name, value in usage.items()}}
    return {"usage": usage}


def _embeddings(asked: wire.WireRequest, directions: Directions) -> Made:
    given = wire.read_anything(asked.fields, "input")
    inputs = given if isinstance(given, list) and not all(isinstance(each, int) for each in given) else [given]
    size = wire.read_count(asked.fields, "dimensions", least=1, most=_MOST_DIMENSIONS) or 8
    is_base64 = wire.read_optional_text(asked.fields, "encoding_format") == "base64"
    tokens = asked.input_tokens
    return Made.document(
        {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": _vector(each, size, is_base64)}
                for index, each in enumerate(inputs)
            ],
            "model": asked.model,
            **_told({"prompt_tokens": tokens, "total_tokens": tokens}, directions),
        }
    )


def embeddings(asked: wire.WireRequest, directions: Directions) -> bytes:
    """The plain answer to a request for embeddings."""
    return b"".join(_embeddings(asked, directions).pieces)


def _vector(given: object, size: int, is_base64: bool) -> str | list[float]:
    """The same input has the same vector; floats are exact in 32 bits, so that both encodings say the same."""
    digest = blake2b(_encode(given), digest_size=64).digest()
    values = ([(each - 127.5) / 128 for each in digest] * (size // len(digest) + 1))[:size]
    return b64encode(struct.pack(f"<{size}f", *values)).decode() if is_base64 else values


def _images(asked: images_wire.ImageRequest, directions: Directions) -> Made:
    images = [_image(asked.model, number, directions.bytes) for number in range(asked.choices)]
    partial = wire.read_count(asked.fields, "partial_images", least=0, most=3) or 0
    each = asked.tokens_per_image if directions.output_tokens is None else directions.output_tokens
    if not asked.stream:
        usage = _image_usage(asked, each * asked.choices, directions)
        return Made.document(
            {"created": demo_openai.CREATED, "data": [{"b64_json": image} for image in images], **usage}
        )
    about = {"created_at": demo_openai.CREATED, **asked.context, "background": "opaque", "output_format": "png"}
    return Made.stream(
        [
            {"type": "image_generation.partial_image", "partial_image_index": number, "b64_json": images[0], **about}
            for number in range(partial)
        ],
        [
            {
                "type": "image_generation.completed",
                "b64_json": image,
                **about,
                **_image_usage(asked, each + (0 if number else partial * 100), directions),
            }
            for number, image in enumerate(images)
        ],
    )


def _image_usage(asked: wire.WireRequest, made: int, directions: Directions) -> dict[str, Any]:
    if not asked.model.endswith("-tokens"):
        return {}
    assert asked.otherwise is not None
    prompt = asked.otherwise.input_tokens
    return _told(
        {
            "input_tokens": prompt,
            "output_tokens": made,
            "total_tokens": prompt + made,
            "input_tokens_details": {"text_tokens": prompt, "image_tokens": 0},
        },
        directions,
    )


def _image(model: str, number: int, size: int) -> str:
    """A PNG of one color, in base64; what it is made larger by stands behind its end, where readers do not look."""
    color = blake2b(f"{model} {number}".encode(), digest_size=3).digest()
    header = struct.pack(">IIBBBBB", _PIXELS, _PIXELS, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress((b"\0" + color * _PIXELS) * _PIXELS)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return b64encode(png + bytes(max(0, size - len(png)))).decode()


def _speech(asked: speech_wire.SpeechRequest, directions: Directions) -> Made:
    format = wire.read_optional_text(asked.fields, "response_format") or "mp3"
    milliseconds = asked.text_tokens * _MS_PER_TEXT_TOKEN
    data = _spoken(format, milliseconds)
    pieces = [data[place : place + _PIECE_BYTES] for place in range(0, len(data), _PIECE_BYTES)]
    if not asked.is_events:
        return Made({"mp3": "audio/mpeg", "wav": "audio/wav"}.get(format, "audio/pcm"), pieces, is_stream=True)
    made = -(-milliseconds * speech_wire.AUDIO_TOKENS_PER_MINUTE // 60_000)
    made = made if directions.output_tokens is None else directions.output_tokens
    assert asked.otherwise is not None
    given = asked.otherwise.input_tokens
    usage = {"input_tokens": given, "output_tokens": made, "total_tokens": given + made}
    return Made.stream(
        [{"type": "speech.audio.delta", "audio": b64encode(piece).decode()} for piece in pieces],
        [{"type": "speech.audio.done", **_told(usage, directions)}],
    )


def _spoken(format: str, milliseconds: int) -> bytes:
    """Silence of that length."""
    samples = bytes(milliseconds * _SAMPLE_RATE // 1000 * 2)
    match format:
        case "mp3":
            return _MP3_FRAME * -(-milliseconds // _MP3_FRAME_MS)
        case "pcm":
            return samples
        case "wav":
            about = struct.pack("<HHIIHH", 1, 1, _SAMPLE_RATE, 2 * _SAMPLE_RATE, 2, 16)
            body = b"WAVEfmt " + struct.pack("<I", len(about)) + about + b"data" + struct.pack("<I", len(samples))
            return b"RIFF" + struct.pack("<I", len(body) + len(samples)) + body + samples
    raise wire.UnreadableRequest("The provider demo speaks mp3, wav and pcm")


def _transcription(asked: transcriptions_wire.SoundRequest, directions: Directions) -> Made:
    assert asked.form is not None
    file = asked.form.part("file")
    assert file is not None
    digest = blake2b(asked.form.content(file), digest_size=6).digest()
    length = max(1, asked.likely_ms * _TEXT_TOKENS_PER_SECOND // 1000)
    length = min(LONGEST_OUTPUT, length if directions.output_tokens is None else directions.output_tokens)
    pieces = text_pieces(WORD_STARTS[int.from_bytes(digest, "big") % len(WORD_STARTS)], length)
    text = "".join(pieces)
    usage = _told(_sound_usage(asked, length), directions)
    format = asked.form.text("response_format") or "json"
    if asked.stream and asked.model.endswith("-tokens"):  # whisper-1 ignores it too
        return Made.stream(
            [{"type": "transcript.text.delta", "delta": piece} for piece in pieces],
            [{"type": "transcript.text.done", "text": text, **usage}],
        )
    return _written(format, text, asked.likely_ms, usage)


def _written(format: str, text: str, milliseconds: int, usage: dict[str, Any]) -> Made:
    minutes, rest = divmod(milliseconds, 60_000)
    end = f"{minutes // 60:02}:{minutes % 60:02}:{rest // 1000:02},{rest % 1000:03}"
    match format:
        case "json":
            return Made.document({"text": text, **usage})
        case "verbose_json":
            seconds = milliseconds / 1000
            return Made.document(
                {"task": "transcribe", "language": "english", "duration": seconds, "text": text, **usage}
            )
        case "text":
            return Made("text/plain; charset=utf-8", [f"{text}\n".encode()])
        case "srt":
            return Made("text/plain; charset=utf-8", [f"1\n00:00:00,000 --> {end}\n{text}\n\n".encode()])
        case "vtt":
            cue = f"00:00:00.000 --> {end.replace(',', '.')}"
            return Made("text/plain; charset=utf-8", [f"WEBVTT\n\n{cue}\n{text}\n\n".encode()])
    raise wire.UnreadableRequest("The provider demo writes json, verbose_json, text, srt and vtt")


def _sound_usage(asked: transcriptions_wire.SoundRequest, length: int) -> dict[str, Any]:
    if not asked.model.endswith("-tokens"):
        return {"type": "duration", "seconds": asked.likely_ms / 1000}
    heard = -(-asked.likely_ms * transcriptions_wire.AUDIO_TOKENS_PER_SECOND // 1000)
    return {
        "type": "tokens",
        "input_tokens": heard,
        "input_token_details": {"audio_tokens": heard, "text_tokens": 0},
        "output_tokens": length,
        "total_tokens": heard + length,
    }


def _count(asked: wire.WireRequest, directions: Directions) -> Made:
    return Made.document({"input_tokens": anthropic_wire.estimate(asked.fields).total_input_tokens})
