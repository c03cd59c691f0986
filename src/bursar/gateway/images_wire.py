"""OpenAI's generation of images, read as far as metering needs it.

Images are billed by the piece (by size and quality) or by tokens, as the model's price is. A provider that makes images
by the piece reports no usage: the images in its answer are the count.

Source: the OpenAI API reference, "Create image" and its streaming events, and the guide "Image generation", which has
the tokens of an image; the types of the official Python client.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from bursar.gateway import openai_wire, sse, tokens, wire
from bursar.gateway.wire import JSON, Fields, WireRequest
from bursar.pricing.usage import Usage

PATH: Final = "/images/generations"

# Output tokens of an image of 1024 x 1024 by the first family; other sizes in proportion to their pixels, which is what
# is published for 1024 x 1536 (408, 1,584, 6,240).
_FIRST_FAMILY: Final = "gpt-image-1"
_FIRST_TOKENS: Final = {"low": 272, "medium": 1_056, "high": 4_160}
_FIRST_PIXELS: Final = 1024 * 1024
_FIRST_LARGEST: Final = (1024, 1536)
# Of later families an image has so many patches along its long edge, and their number grows slowly with its pixels:
# the calculator of the guide gives 7,024 tokens for 1024 x 1024, 5,488 for 1536 x 1024, 12,329 for 3584 x 2048.
_PATCHES: Final = {"low": 16, "medium": 48, "high": 96}
# Not published; assumed to go on in the steps before.
_ASSUMED_PATCHES: Final = {"xhigh": 144, "max": 192}
_OFFSET_PIXELS: Final = 2_000_000
_PIXELS_PER_UNIT: Final = 4_000_000
_LATER_USUAL: Final = (1024, 1024)
TOKENS_PER_PARTIAL_IMAGE: Final = 100
FRAMES_OF_A_GIF: Final = 9

MOST_IMAGES: Final = wire.MAX_CHOICES
_DEFAULT_SIZE: Final = "1024x1024"
_DEFAULT_QUALITY: Final = "standard"
_SIZE: Final = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,3})", re.ASCII)
_METERED: Final = frozenset(
    (
        *("model", "prompt", "n", "size", "quality", "stream", "partial_images"),
        *("output_format", "frame_count", "svg"),
    )
)
_NULL: Final = msgspec.Raw(b"null")

refusal = openai_wire.refusal
stream_refusal = openai_wire.stream_refusal


@dataclass(frozen=True, slots=True)
class ImageRequest(WireRequest):
    """A request for images. tokens_per_image: what each is taken for where the provider does not count."""

    tokens_per_image: int = 0

    @property
    def is_by_piece(self) -> bool:
        """Whether the model's price is for an image."""
        return not self.has_output


def read_request(body: bytes, content_type: str = JSON) -> ImageRequest:
    """Read what metering needs of a request for images.

    Raises:
        UnreadableRequest: the body is no JSON object, a field that metering needs is of the wrong kind, or the images
            are to be authored by a second model.
    """
    fields = wire.read_fields(body, _METERED)
    model = wire.read_text(fields, "model")
    count = wire.read_count(fields, "n", least=1, most=MOST_IMAGES) or 1
    size, quality = _choice(fields, "size", _DEFAULT_SIZE), _choice(fields, "quality", _DEFAULT_QUALITY)
    output_format = wire.read_optional_text(fields, "output_format")
    if output_format == "svg" or wire.read_anything(fields, "svg") is not None:
        raise wire.unreadable("output_format", "svg is written by a second model, whose use is not metered here")
    each = image_tokens(model, size=size, quality=quality)
    if output_format == "gif":
        each *= wire.read_count(fields, "frame_count", least=0, most=1_000) or FRAMES_OF_A_GIF
    partial = wire.read_count(fields, "partial_images", least=0, most=100) or 0
    by_tokens = ImageRequest(
        model=model,
        stream=wire.read_switch(fields, "stream"),
        max_output_tokens=each + partial * TOKENS_PER_PARTIAL_IMAGE,
        choices=count,
        estimate=Usage(input_tokens=tokens.whole_tokens(wire.field_units(fields, "prompt"))),
        wants_usage=True,
        service_tier=wire.read_optional_text(fields, "service_tier"),
        fields=fields,
        context={"size": size, "quality": quality},
        output_kind="image_output_tokens",
        tokens_per_image=each,
    )
    return replace(by_tokens, estimate=Usage(images=count), has_output=False, otherwise=by_tokens)


def upstream_body(request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
    """The body for the provider: its own model name; all else as the client wrote it."""
    return wire.spliced(request.fields, model=model)


def _choice(fields: Fields, name: str, default: str) -> str:
    """A choice that the provider makes where the client leaves it open; in small letters, as price lists have it."""
    value = wire.read_optional_text(fields, name).strip().lower()
    return default if value in ("", "auto") else value


def image_tokens(model: str, *, size: str, quality: str) -> int:
    """Output tokens of one image; a quality that the client leaves open counts as high."""
    read = _SIZE.fullmatch(size)
    pixels = (int(read[1]), int(read[2])) if read is not None else None
    if _FIRST_FAMILY in model:
        width, height = pixels or _FIRST_LARGEST
        of_square = _FIRST_TOKENS.get(quality, _FIRST_TOKENS["high"])
        return -(-of_square * width * height // _FIRST_PIXELS)
    width, height = pixels or _LATER_USUAL
    patches = {**_PATCHES, **_ASSUMED_PATCHES}.get(quality, _PATCHES["high"])
    long, short = max(width, height), min(width, height)
    across = (2 * patches * short + long) // (2 * long)
    return max(1, -(-patches * across * (_OFFSET_PIXELS + width * height) // _PIXELS_PER_UNIT))


class _Details(msgspec.Struct):
    text_tokens: int | None = None
    image_tokens: int | None = None


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    input_tokens_details: _Details | None = None
    output_tokens_details: _Details | None = None


class _Answer(msgspec.Struct):
    """A plain answer or one event. The images, of which there may be a hundred megabytes, are not decoded."""

    type: str = ""
    data: list[msgspec.Raw] | None = None
    usage: msgspec.Raw = _NULL
    error: Any = None


_USAGE: Final = msgspec.json.Decoder(_Usage | None)
_ANSWER: Final = msgspec.json.Decoder(_Answer)


def read_usage(data: bytes) -> Usage | None:
    """Convert the `usage` object of images (JSON) to the canonical kinds; None where it is null or unusable.

    What of the input is not said to be images is text; what of the output is not said to be text is images.
    """
    reported = wire.decoded(data, _USAGE)
    if reported is None:
        return None
    given = reported.input_tokens_details or _Details()
    made = reported.output_tokens_details or _Details()
    total_in, total_out = max(0, reported.input_tokens), max(0, reported.output_tokens)
    images_in = min(max(0, given.image_tokens or 0), total_in)
    text_out = min(max(0, made.text_tokens or 0), total_out)
    return wire.believable(
        Usage(
            input_tokens=total_in - images_in,
            image_input_tokens=images_in,
            output_tokens=text_out,
            image_output_tokens=total_out - text_out,
        )
    )


class UsageMeter(wire.UsageMeter):
    """Meter of images, plain or streamed. In a stream each finished image has a usage of its own."""

    request: ImageRequest

    def __init__(self, request: WireRequest) -> None:
        assert isinstance(request, ImageRequest)
        super().__init__(request)
        self._reported: Usage | None = None
        self._images = 0
        self._partial = 0

    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""
        answer = self._decode(body)
        if answer is not None and answer.data is not None:
            self._images = len(answer.data)
            self._reported = read_usage(bytes(answer.usage))
            self.completed = True

    def _read_event(self, event: sse.Event) -> bool:
        data = event.data.strip()
        if not data or data == b"[DONE]":
            return False
        answer = self._decode(data)
        if answer is None:
            return False
        if answer.error is not None:
            self.error = openai_wire.error_type(answer.error)
        elif answer.type.endswith(".partial_image"):
            self._partial += 1
        elif answer.type.endswith(".completed"):
            self._images += 1
            self.completed = True
            usage = read_usage(bytes(answer.usage))
            if usage is not None:
                self._reported = usage if self._reported is None else self._reported + usage.but(requests=0)
        return False

    def _decode(self, data: bytes) -> _Answer | None:
        answer: _Answer | None = wire.decoded(data, _ANSWER)
        if answer is None:
            self.unread += 1
        return answer

    def usage(self) -> Usage | None:
        """The provider's count: of a price by the piece the images that came, else the tokens that it reports."""
        if self.request.is_by_piece:
            return Usage(images=self._images) if self.completed else None
        return self._reported

    def counted(self) -> Usage:
        """What came so far, by the published tokens of an image; of an answer that cannot be read all it was to be."""
        request = self.request
        images = self._images if self.completed or request.stream else request.choices
        if request.is_by_piece:
            return Usage(images=images)
        made = images * request.tokens_per_image + self._partial * TOKENS_PER_PARTIAL_IMAGE
        return request.estimate.but(image_output_tokens=made)
