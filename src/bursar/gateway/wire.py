"""What all wire formats share: the request as metering sees it, the splice of its body, and the meter of an answer.

Every `…_wire` module has the same functions (`Wire`), so that the caller picks one by path (`endpoints`):

    request = wire.read_request(body, content_type)       refuses with UnreadableRequest
    sent = wire.upstream_body(request, model=…)           the body for the provider
    meter = wire.UsageMeter(request)
    piece_for_the_client = meter.feed(piece)              streams; `meter.read_body(body)` for plain answers
    measured = meter.measure()                            usage, and whether the provider or we counted it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, Protocol

import msgspec

from bursar.gateway import sse, tokens
from bursar.pricing.usage import NO_USAGE, Usage
from bursar.problems import FieldError, Problem

Fields = dict[str, msgspec.Raw]
OutputKind = Literal["output_tokens", "audio_output_tokens", "image_output_tokens"]

JSON: Final = "application/json"

MAX_OUTPUT_TOKENS: Final = 10_000_000
MAX_CHOICES: Final = 128
MAX_COUNT: Final = MAX_OUTPUT_TOKENS * MAX_CHOICES
"""The most of anything that one request can use, and well within what the books hold."""
_BATCH_TIER: Final = "batch"
"""How price lists name the price of batches. A single call has no such tier, whatever its client writes."""

_FIELDS: Final = msgspec.json.Decoder(Fields)
_ANYTHING: Final = msgspec.json.Decoder()


class OtherModelsNotMetered(Problem):
    """Another model than the one asked for could answer, at a price and under rules that nobody here would look at."""

    status, code, title = 400, "other_models_not_metered", "A request names one model here"


class UnreadableRequest(Problem):
    """The body is not what the endpoint takes, as far as metering must understand it."""

    status, code, title = 400, "unreadable_request", "The request body cannot be read"


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A request as metering sees it.

    model              the public name that the client asked for
    max_output_tokens  the client's limit for each choice; None where it gave none
    choices            answers asked for at once (OpenAI's `n`)
    estimate           input by our own counting rule, output 0; of the provider's tools what is billed in any case
    wants_usage        whether the client asked for a usage chunk in its stream (always true outside of OpenAI streams)
    service_tier       as asked for ('priority', 'flex', …); '' where nothing was asked
    fields             every top-level field of a JSON body as it was written; empty for a form
    context            conditions of the price beside the service tier: {'size': '1024x1024', 'quality': 'hd'}
    content_type       of the body for the provider; a form keeps its boundary
    has_output         false: `estimate` is all that there is to hold for (embeddings, images by piece)
    output_kind        the kind that output is held for as
    is_events          false: a stream of this call is raw bytes, and nothing of ours can follow in it
    may_ignore_stream  some models answer whole though a stream was asked for, also in plain text
    otherwise          the same request in other kinds, for models whose price is for those: tokens, not characters
    permitted          what the provider's own tools may use beside `estimate`
    unpriced_tools     tools of the provider that nobody here knows to price
    guessed            calls of those tools beyond `permitted`, where the request names no limit to them
    guesses_context    a part of the input is kept by the provider, and is in `estimate` by a prior
    """

    model: str
    stream: bool
    max_output_tokens: int | None
    choices: int
    estimate: Usage
    wants_usage: bool
    service_tier: str
    fields: Fields
    context: Mapping[str, str] = field(default_factory=dict)
    content_type: str = JSON
    has_output: bool = True
    output_kind: OutputKind = "output_tokens"
    is_events: bool = True
    may_ignore_stream: bool = False
    otherwise: WireRequest | None = None
    permitted: Usage = NO_USAGE
    unpriced_tools: tuple[str, ...] = ()
    guessed: Usage = NO_USAGE
    guesses_context: bool = False

    def as_priced(self, lacks: Callable[[Usage], bool]) -> WireRequest:
        """This request in the first kinds that a model has prices for, or as it is where it has none for any.

        lacks: whether the model has no price for some kind of a usage.
        """
        form: WireRequest | None = self
        while form is not None:
            if not lacks(form.hold_for(1)):
                return form
            form = form.otherwise
        return self

    def identity(self, body: bytes) -> bytes:
        """What tells this request from another under the same idempotency key: its body."""
        return body

    @property
    def input_tokens(self) -> int:
        """Estimated input of all kinds."""
        return self.estimate.total_input_tokens

    def hold_for(self, output_tokens: int) -> Usage:
        """The usage to hold for when each choice puts out at most `output_tokens`."""
        if not self.has_output:
            return self.estimate
        held = self.estimate.but(**{self.output_kind: output_tokens * self.choices})
        return held if self.permitted is NO_USAGE else held + self.permitted

    @property
    def is_guessed(self) -> bool:
        """What is held is a guess, also where the request limits its output."""
        return self.guesses_context or self.guessed != NO_USAGE

    def at_most(self, output_tokens: int, window: int) -> Usage:
        """The usage to hold for without any guess of ours. window: the longest input of the model."""
        held = self.hold_for(output_tokens) + self.guessed
        return held.but(input_tokens=max(held.input_tokens, window)) if self.guesses_context else held

    @property
    def price_context(self) -> dict[str, str]:
        """What of the request its price depends on."""
        tier = {} if self.service_tier in ("", _BATCH_TIER) else {"service_tier": self.service_tier}
        return {**self.context, **tier}


@dataclass(frozen=True, slots=True)
class Measured:
    """What an answer used. `estimated` is true where the provider's own count did not come and we counted."""

    usage: Usage
    estimated: bool


class UsageMeter(ABC):
    """Reads an answer on its way to the client and keeps what it used; holds no text of it.

    Made anew for each attempt. `feed` and `finish` are for streams, `read_body` for plain answers.

    model      the model that the provider says it used; '' until it said so
    tier       the service tier that the provider says it used; '' where it does not say
    completed  whether the answer came to its proper end; a stream that ends without it was cut
    error      type of the error that the provider sent inside the stream; '' if none
    unread     events or bodies that were no JSON of the expected kind, and so were passed on uncounted
    """

    def __init__(self, request: WireRequest) -> None:
        self.request = request
        self.model = ""
        self.tier = ""
        self.completed = False
        self.error = ""
        self.unread = 0
        self._units = 0
        self._parser = sse.EventParser()

    def feed(self, data: bytes) -> bytes:
        """Take a piece of the stream, cut anywhere; return what the client gets of it now.

        The client gets whole events only, so that an event of ours can follow at any time.

        Raises:
            sse.EventTooLong: the provider sends an event without end.
        """
        return b"".join([event.raw for event in self._parser.feed(data) if not self._read_event(event)])

    def finish(self) -> bytes:
        """The provider's stream has ended; return what the client still gets, which is no cut event."""
        event = self._parser.finish()
        if event is None:
            return b""
        hidden = self._read_event(event)
        return event.raw if self.completed and not hidden else b""

    @abstractmethod
    def read_body(self, body: bytes) -> None:
        """Take a whole plain answer."""

    @abstractmethod
    def _read_event(self, event: sse.Event) -> bool:
        """Count one event; return whether it is only for us and not for the client."""

    @abstractmethod
    def usage(self) -> Usage | None:
        """The provider's own final count; None where it has not come or cannot be true."""

    @abstractmethod
    def counted(self) -> Usage:
        """Our own count: the estimated (or reported) input and the output seen so far; what a cut stream is charged."""

    def measure(self) -> Measured:
        """The provider's count where there is one, else ours."""
        usage = self.usage()
        return Measured(usage, estimated=False) if usage is not None else Measured(self.counted(), estimated=True)

    @property
    def told(self) -> dict[str, str]:
        """Conditions of the price as the provider says that they were; they go before what was asked for."""
        return {"service_tier": self.tier} if self.tier else {}

    @property
    def output_so_far(self) -> int:
        """Output tokens seen so far, by our own counting rule."""
        return tokens.whole_tokens(self._units)


class PlainMeter(UsageMeter):
    """Meter of answers that are never streamed."""

    def _read_event(self, event: sse.Event) -> bool:
        self.unread += 1
        return False


class Wire(Protocol):
    """What each `…_wire` offers as a module."""

    PATH: str
    """The provider's path of the call, after its base URL."""

    @property
    def UsageMeter(self) -> type[UsageMeter]:  # noqa: N802
        """The meter of this format."""

    def read_request(self, body: bytes, content_type: str = JSON) -> WireRequest:
        """Read what metering needs; raises UnreadableRequest. content_type: of the client, for forms."""

    def upstream_body(self, request: WireRequest, *, model: str, asks_for_usage: bool = True) -> bytes:
        """The body for the provider: the client's fields as written, with the provider's model name."""

    def refusal(self, problem: Problem, *, request_id: str = "") -> bytes:
        """The JSON body of our own refusal in the vendor's error shape."""

    def stream_refusal(self, problem: Problem, *, request_id: str = "") -> bytes:
        """The same as the last event of a stream that has begun."""


def read_fields(body: bytes, metered: frozenset[str]) -> Fields:
    """Split a JSON object into its top-level fields, each as it was written.

    A name that comes twice keeps its last value, here and, because the body is spliced from these fields, at the
    provider. A name that differs from a metered one only by case is refused: some providers would take it for that one.
    """
    try:
        body.decode()
        fields = _FIELDS.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise UnreadableRequest(f"The body is not a JSON object: {error}") from error
    for name in fields:
        if name not in metered and name.casefold() in metered:
            raise unreadable(name, f"write it as {name.casefold()!r}")
    return fields


def unreadable(field: str, detail: str) -> UnreadableRequest:
    """The refusal that names one field."""
    return UnreadableRequest(f"{field}: {detail}", errors=[FieldError(f"#/{field}", detail)])


def read_text(fields: Fields, name: str) -> str:
    """A required, non-empty text."""
    value = read_anything(fields, name)
    if not isinstance(value, str) or not value:
        raise unreadable(name, "a text is required")
    return value


def read_optional_text(fields: Fields, name: str) -> str:
    """A text; '' where the field is absent, null or something else, which is the provider's to judge."""
    value = read_anything(fields, name)
    return value if isinstance(value, str) else ""


def read_switch(fields: Fields, name: str) -> bool:
    """A boolean that is false where absent or null."""
    value = read_anything(fields, name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise unreadable(name, "true or false is required")


def read_count(fields: Fields, name: str, *, least: int, most: int) -> int | None:
    """An integer within bounds; None where absent or null."""
    value = read_anything(fields, name)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise unreadable(name, f"an integer from {least} to {most} is required")
    return value


def read_anything(fields: Fields, name: str) -> Any:
    """A field decoded; None where absent."""
    raw = fields.get(name)
    if raw is None:
        return None
    try:
        return _ANYTHING.decode(raw)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise unreadable(name, f"cannot be read: {error}") from error


def field_units(fields: Fields, name: str) -> int:
    """Units of all texts in a field that we have no closer reading of; 0 where absent."""
    try:
        return tokens.nested_units(read_anything(fields, name))
    except tokens.TooDeep:
        raise too_deep(name) from None


def refuse_other_models(fields: Fields, names: Iterable[str]) -> None:
    """A provider may not choose another model by itself, which has another price and may not be allowed.

    names: the fields that would let it.

    Raises:
        OtherModelsNotMetered
    """
    for name in names:
        if read_anything(fields, name):
            pointer = FieldError(f"#/{name}", "leave it out; the route of a model says who else may answer")
            raise OtherModelsNotMetered(f"{name}: another model could answer, at another price", errors=[pointer])


def too_deep(field: str) -> UnreadableRequest:
    """The refusal of a body that nests too deep."""
    return unreadable(field, f"nests deeper than {tokens.MAX_DEPTH} levels")


def spliced(fields: Fields, **changes: object) -> bytes:
    """The body again, with some fields set; every other field exactly as the client wrote it."""
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in changes.items()}
    return msgspec.json.encode({**fields, **raw})


def decoded(data: bytes, kind: msgspec.json.Decoder[Any]) -> Any | None:
    """A provider's JSON as `kind`; None where it is not that, which a meter counts as unread."""
    try:
        return kind.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def believable(usage: Usage) -> Usage | None:
    """A provider's count; None where it is nothing at all, or more than can be true."""
    return usage if usage.total_tokens > 0 and max(usage.as_array()) <= MAX_COUNT else None


def refusal_details(problem: Problem, request_id: str) -> dict[str, Any]:
    """What we add to a vendor's error object: our code, the `why`, the wrong places, the request id."""
    details: dict[str, Any] = {"code": problem.code}
    if problem.why is not None:
        details["why"] = problem.why
    if problem.errors:
        details["errors"] = [{"pointer": each.pointer, "detail": each.detail} for each in problem.errors]
    if request_id:
        details["request_id"] = request_id
    return details
