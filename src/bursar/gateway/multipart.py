"""Forms in multipart/form-data, read exactly and bounded, so that one field of them can be put anew.

Two readers of the same form must never see different fields: a provider that saw another model than we did would be
paid at the wrong price. So only the plain form that clients write is taken (every delimiter at a line of its own with
CR LF, no preamble and no epilogue, one `Content-Disposition: form-data` a part, no transfer encoding), and whatever
could be read in two ways is refused. The bytes between the delimiters are never touched.

Source: RFC 7578; RFC 2046, section 5.1; WHATWG HTML, "Multipart form data".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from bursar.gateway import wire

MOST_PARTS: Final = 128
MOST_HEADER_BYTES: Final = 8_192
MOST_FIELD_BYTES: Final = 65_536
"""Of a field that metering reads; files may be of any size."""

_MEDIA_TYPE: Final = "multipart/form-data"
_BOUNDARY: Final = re.compile(r"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]", re.ASCII)
_PARAMETER: Final = re.compile(r';[ \t]*([!#$%&*+.^_`|~0-9A-Za-z-]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s";,]+))[ \t]*')
_HEADER_NAME: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", re.ASCII)
_PLAIN_ENCODINGS: Final = ("7bit", "8bit", "binary")


@dataclass(frozen=True, slots=True)
class Part:
    """One part: the name of its field, the name of its file (None where it is no file), and where its content lies."""

    name: str
    filename: str | None
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Form:
    """A form as it was written. content_type: of the whole body, in our own writing."""

    body: bytes
    content_type: str
    parts: tuple[Part, ...]

    def content(self, part: Part) -> memoryview:
        """The bytes of a part; no copy."""
        return memoryview(self.body)[part.start : part.end]

    def part(self, name: str) -> Part | None:
        """The part of a field that comes at most once; None where it is absent.

        Raises:
            UnreadableRequest: it comes twice.
        """
        found = [part for part in self.parts if part.name == name]
        if len(found) > 1:
            raise wire.unreadable(name, "comes more than once")
        return found[0] if found else None

    def text(self, name: str) -> str | None:
        """The value of a field; None where it is absent.

        Raises:
            UnreadableRequest: it comes twice, is a file, no UTF-8 or longer than MOST_FIELD_BYTES.
        """
        part = self.part(name)
        if part is None:
            return None
        if part.filename is not None or part.end - part.start > MOST_FIELD_BYTES:
            raise wire.unreadable(name, f"a text of at most {MOST_FIELD_BYTES} bytes is required")
        try:
            return bytes(self.content(part)).decode()
        except UnicodeDecodeError:
            raise wire.unreadable(name, "is no UTF-8") from None

    def texts(self, name: str) -> list[str]:
        """Every value of a field that may come often; what is no UTF-8 is read with replacements."""
        return [
            bytes(self.content(part)[:MOST_FIELD_BYTES]).decode("utf-8", "replace")
            for part in self.parts
            if part.name == name and part.filename is None
        ]

    def with_text(self, name: str, value: str) -> bytes:
        """The body with another value of one field; every other byte is as it was written.

        Raises:
            UnreadableRequest: the value holds the boundary, which nothing else in the body does.
        """
        part = self.part(name)
        assert part is not None
        new = value.encode()
        if new == self.content(part):
            return self.body
        if self._delimiter in new:
            raise wire.unreadable(name, "holds the boundary of the form")
        body = memoryview(self.body)
        return b"".join((body[: part.start], new, body[part.end :]))

    @property
    def _delimiter(self) -> bytes:
        return self.body[: self.body.index(b"\r\n")]


def read_form(body: bytes, content_type: str, *, metered: Sequence[str]) -> Form:
    """Read a form.

    metered: the fields that metering needs. A name that some readers would take for one of them is refused.

    Raises:
        UnreadableRequest
    """
    boundary = _boundary(content_type)
    delimiter = b"--" + boundary
    places = _delimiters(body, delimiter)
    parts = []
    for begin, end in pairwise(places):
        parts.append(_part(body, begin + len(delimiter) + 2, end - 2))
    for part in parts:
        plain = re.split(r"[\[.]", part.name.strip())[0].casefold()
        if part.name not in metered and plain in metered:
            raise wire.unreadable(part.name[:100], f"write it as {plain!r}")
    return Form(body, f'{_MEDIA_TYPE}; boundary="{boundary.decode()}"', tuple(parts))


def _boundary(content_type: str) -> bytes:
    media_type, parameters = _parameters(content_type)
    if media_type != _MEDIA_TYPE:
        raise wire.UnreadableRequest(f"The body must be {_MEDIA_TYPE}")
    boundary = parameters.get("boundary", "")
    if not _BOUNDARY.fullmatch(boundary):
        raise wire.UnreadableRequest("Content-Type names no boundary")
    return boundary.encode()


def _parameters(header: str) -> tuple[str, dict[str, str]]:
    """A header's value in lower case, and its parameters.

    Raises:
        UnreadableRequest: it does not have that form, or names a parameter twice.
    """
    value, semicolon, _ = header.partition(";")
    found: dict[str, str] = {}
    place = len(value)
    while semicolon and place < len(header):
        match = _PARAMETER.match(header, place)
        name = "" if match is None else match[1].lower()
        if match is None or name in found:
            raise wire.UnreadableRequest("A header of the form cannot be read")
        found[name] = match[2] if match[2] is not None else match[3]
        place = match.end()
    return value.strip().lower(), found


def _delimiters(body: bytes, delimiter: bytes) -> list[int]:
    """Where each delimiter begins; the last one closes the form.

    Every occurrence of the boundary must be a delimiter, so that nobody can find one elsewhere.
    """
    places: list[int] = []
    place = body.find(delimiter)
    if place != 0:
        raise wire.UnreadableRequest("The form does not begin with its boundary")
    while place >= 0:
        if place and body[place - 2 : place] != b"\r\n":
            raise wire.UnreadableRequest("The boundary of the form is inside of a part")
        places.append(place)
        after = place + len(delimiter)
        if body[after : after + 2] != b"\r\n":
            if len(places) > 1 and body[after:] in (b"--", b"--\r\n"):
                return places
            raise wire.UnreadableRequest("The boundary of the form is inside of a part, or the form goes on behind it")
        if len(places) > MOST_PARTS:
            raise wire.UnreadableRequest(f"The form has more than {MOST_PARTS} parts")
        place = body.find(delimiter, after)
    raise wire.UnreadableRequest("The form does not end with its boundary")


def _part(body: bytes, start: int, end: int) -> Part:
    """The part whose headers begin at `start` and whose content ends before `end`."""
    limit = min(end, start + MOST_HEADER_BYTES)
    blank = body.find(b"\r\n\r\n", start, limit)
    if blank < 0:
        raise wire.UnreadableRequest("A part of the form has no headers that could be read")
    disposition = ""
    for line in body[start:blank].split(b"\r\n"):
        name, value = _header(line)
        if name == "content-disposition" and not disposition:
            disposition = value
        elif name == "content-disposition":
            raise wire.UnreadableRequest("A part of the form has two names")
        elif name == "content-transfer-encoding" and value.lower() not in _PLAIN_ENCODINGS:
            raise wire.UnreadableRequest("A part of the form is encoded for transfer, which is not taken")
    kind, parameters = _parameters(disposition)
    name = parameters.get("name", "")
    # A backslash is an escape to some readers and a character to others.
    if kind != "form-data" or not name or "\\" in name or "name*" in parameters:
        raise wire.UnreadableRequest("A part of the form has no plain name")
    is_file = "filename" in parameters or "filename*" in parameters
    return Part(name, parameters.get("filename", "") if is_file else None, blank + 4, end)


def _header(line: bytes) -> tuple[str, str]:
    try:
        text = line.decode()
    except UnicodeDecodeError:
        text = line.decode("latin-1")
    name, colon, value = text.partition(":")
    if not colon or not _HEADER_NAME.fullmatch(name) or any(each in value for each in "\0\r\n"):
        raise wire.UnreadableRequest("A part of the form has a header that cannot be read")
    return name.lower(), value.strip()
