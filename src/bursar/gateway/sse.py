"""Server-sent events, read incrementally from raw bytes that may be cut anywhere.

Source: WHATWG HTML, "Server-sent events", interpretation of an event stream: lines end with CR LF, LF or CR; a blank
line ends an event; `data` lines join with LF; lines that begin with a colon are comments.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from bursar.problems import Problem

MAX_EVENT_BYTES: Final = 64 * 1024 * 1024
"""An image of the largest size in base64 is one event of up to 34 MB."""
_LINE_END: Final = re.compile(rb"\r\n|\n|\r")
# Two line ends in a row. The atomic groups keep CR LF from being read as two line ends.
_EVENT_END: Final = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LONGEST_EVENT_END: Final = 4
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"


class EventTooLong(Problem):
    """A provider sent an event of more than MAX_EVENT_BYTES without an end."""

    status, code, title = 502, "provider_event_too_long", "The provider's answer cannot be read"


class Event(NamedTuple):
    """One event: its name ('' where the stream gives none), its data, and the raw bytes it was read from."""

    name: str
    data: bytes
    raw: bytes


class EventParser:
    """Cuts a byte stream into events. The raw bytes of all events, in order, are exactly the bytes that were fed."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0  # no event ends before this position, so a long event is not searched again and again
        self._at_start = True

    def feed(self, data: bytes) -> list[Event]:
        """Return the events that are complete with this piece.

        Raises:
            EventTooLong: an event has no end within MAX_EVENT_BYTES.
        """
        if not self._buffer and data.endswith(b"\n\n") and b"\r" not in data:
            # Nearly every piece is whole events with plain line feeds.
            *texts, rest = data.split(b"\n\n")
            if not rest:
                return [self._event(text + b"\n\n") for text in texts]
        buffer = self._buffer
        buffer += data
        events: list[Event] = []
        start = 0
        while (end := self._event_end(start)) is not None:
            events.append(self._event(bytes(buffer[start:end])))
            start = end
        del buffer[:start]
        self._searched = max(0, len(buffer) - _LONGEST_EVENT_END)
        if len(buffer) > MAX_EVENT_BYTES:
            raise EventTooLong(f"An event of its stream is longer than {MAX_EVENT_BYTES} bytes.")
        return events

    def finish(self) -> Event | None:
        """Return what is left when the stream ends without a last blank line; None if nothing is."""
        raw = bytes(self._buffer)
        self._buffer.clear()
        self._searched = 0
        return self._event(raw) if raw else None

    def _event_end(self, start: int) -> int | None:
        begin = max(start, self._searched)
        if self._buffer.find(b"\r", begin) < 0:
            # Nearly every stream has plain line feeds; an image is one event of tens of megabytes.
            place = self._buffer.find(b"\n\n", begin)
            if place < 0:
                return None
            self._searched = 0
            return place + 2
        match = _EVENT_END.search(self._buffer, begin)
        if match is None:
            return None
        # A CR at the very end may be the first half of a CR LF: the next piece decides.
        if match.end() == len(self._buffer) and self._buffer[-1] == 0x0D:
            return None
        self._searched = 0
        return match.end()

    def _event(self, raw: bytes) -> Event:
        text = raw
        if self._at_start:
            self._at_start = False
            text = raw.removeprefix(_BYTE_ORDER_MARK)
        if text.startswith(b"data: ") and text.find(b"\n") == len(text) - 2 and b"\r" not in text:
            return Event("", text[6:-2], raw)
        return Event(*_fields(text), raw)


def _fields(text: bytes) -> tuple[str, bytes]:
    """Name and data of an event's lines."""
    name = ""
    data: list[bytes] = []
    for line in _LINE_END.split(text) if b"\r" in text else text.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
    return name, b"\n".join(data)


def event_bytes(data: bytes, name: str = "") -> bytes:
    """One event as it goes over the wire; `data` is a single line, such as compact JSON."""
    assert len(data.splitlines()) <= 1
    head = f"event: {name}\n".encode() if name else b""
    return head + b"data: " + data + b"\n\n"


def comment_bytes(text: str) -> bytes:
    """A comment, which every client ignores; begins with a line end, for streams that end without one."""
    assert len(text.splitlines()) <= 1
    return f"\n: {text}\n\n".encode()
