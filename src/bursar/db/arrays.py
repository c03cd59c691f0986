"""Python lists as PostgreSQL arrays in the binary format, packed at once.

The money path binds some twenty arrays a batch; the driver's own list adaptation asks the type of every element. Each
function here takes a list with None for null and gives a value that psycopg binds as that array type. Those of columns
that are mostly absent can be told that nothing but nulls is no array at all (`or_null`), which costs nothing to read.

Source: PostgreSQL, array_send: dimensions, has-null flag, element type, then (length, lower bound), then each element
as its length (-1: null) and bytes.
"""

import struct
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

import psycopg
from psycopg import postgres
from psycopg.adapt import Buffer, Dumper
from psycopg.pq import Format

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_NULL: Final = b"\xff\xff\xff\xff"
_SIXTEEN: Final = b"\x00\x00\x00\x10"


class BinaryArray:
    """An array value, ready to send; None: null of this type."""

    __slots__ = ("data",)

    def __init__(self, data: bytes | None) -> None:
        self.data = data


class UuidArray(BinaryArray):
    """uuid[]"""


class Int2Array(BinaryArray):
    """smallint[]"""


class Int4Array(BinaryArray):
    """integer[]"""


class Int8Array(BinaryArray):
    """bigint[]"""


class TextArray(BinaryArray):
    """text[]"""


class ByteaArray(BinaryArray):
    """bytea[]"""


class TimestamptzArray(BinaryArray):
    """timestamptz[]"""


class Uuid(BinaryArray):
    """uuid. These are no arrays, but may be null too: of a None of Python the driver knows no type, and would prepare a
    statement anew for each place in which one stands.
    """


class Text(BinaryArray):
    """text"""


class Bytea(BinaryArray):
    """bytea"""


class Timestamptz(BinaryArray):
    """timestamptz"""


_SCALARS: Final = {Uuid: "uuid", Text: "text", Bytea: "bytea", Timestamptz: "timestamptz"}
_ELEMENTS: Final = {
    UuidArray: "uuid",
    Int2Array: "int2",
    Int4Array: "int4",
    Int8Array: "int8",
    TextArray: "text",
    ByteaArray: "bytea",
    TimestamptzArray: "timestamptz",
}


def _oid(name: str) -> int:
    return postgres.types[name].oid


_HEADS: Final = {cls: struct.Struct(">iiiii") for cls in _ELEMENTS}
_OIDS: Final = {cls: _oid(name) for cls, name in _ELEMENTS.items()}


def _head(cls: type[BinaryArray], length: int) -> bytes:
    """The array's header; the has-null flag is always set, which PostgreSQL takes for 'may have nulls'."""
    return _HEADS[cls].pack(1, 1, _OIDS[cls], length, 1)


def uuids(values: Sequence[UUID | None], *, or_null: bool = False) -> UuidArray:
    """uuid[]"""
    if or_null and _is_empty(values):
        return UuidArray(None)
    parts = [_NULL if value is None else _SIXTEEN + value.int.to_bytes(16, "big") for value in values]
    return UuidArray(_head(UuidArray, len(values)) + b"".join(parts))


def uuid(value: UUID | None) -> Uuid:
    """uuid or null"""
    return Uuid(None if value is None else value.bytes)


def text(value: str | None) -> Text:
    """text or null"""
    return Text(None if value is None else value.encode())


def bytea(value: bytes | None) -> Bytea:
    """bytea or null"""
    return Bytea(value)


def timestamp(value: datetime | None) -> Timestamptz:
    """timestamptz or null; aware."""
    return Timestamptz(None if value is None else _since_epoch(value))


def int2s(values: Sequence[int]) -> Int2Array:
    """smallint[]; no nulls."""
    return Int2Array(_head(Int2Array, len(values)) + _integers("h", 2, values))


def int4s(values: Sequence[int]) -> Int4Array:
    """integer[]; no nulls."""
    return Int4Array(_head(Int4Array, len(values)) + _integers("i", 4, values))


def int8s(values: Sequence[int]) -> Int8Array:
    """bigint[]; no nulls."""
    return Int8Array(_head(Int8Array, len(values)) + _integers("q", 8, values))


def texts(values: Sequence[str | None], *, or_null: bool = False) -> TextArray:
    """text[]"""
    if or_null and _is_empty(values):
        return TextArray(None)
    return TextArray(
        _head(TextArray, len(values)) + _sized([None if value is None else value.encode() for value in values])
    )


def byteas(values: Sequence[bytes | None], *, or_null: bool = False) -> ByteaArray:
    """bytea[]"""
    if or_null and _is_empty(values):
        return ByteaArray(None)
    return ByteaArray(_head(ByteaArray, len(values)) + _sized(values))


def timestamps(values: Sequence[datetime | None], *, or_null: bool = False) -> TimestamptzArray:
    """timestamptz[]; values are aware."""
    if or_null and _is_empty(values):
        return TimestamptzArray(None)
    microseconds = [None if value is None else _since_epoch(value) for value in values]
    return TimestamptzArray(_head(TimestamptzArray, len(values)) + _sized(microseconds))


def _since_epoch(value: datetime) -> bytes:
    return struct.pack(">q", (value - _EPOCH) // timedelta(microseconds=1))


def _is_empty(values: Sequence[object]) -> bool:
    return values.count(None) == len(values)


def _integers(code: str, size: int, values: Sequence[int]) -> bytes:
    """Each integer with its length before it, in one pack."""
    flat = [size] * (2 * len(values))
    flat[1::2] = values
    return struct.pack(">" + ("i" + code) * len(values), *flat)


def _sized(values: Sequence[bytes | None]) -> bytes:
    return b"".join([_NULL if value is None else len(value).to_bytes(4, "big") + value for value in values])


class _ArrayDumper(Dumper):
    format = Format.BINARY

    def dump(self, obj: BinaryArray) -> Buffer | None:
        return obj.data


def register(connection: psycopg.AsyncConnection[object] | psycopg.Connection[object]) -> None:
    """Let this connection bind the arrays of this module."""
    for cls, name in _ELEMENTS.items():
        dumper = type(f"{cls.__name__}Dumper", (_ArrayDumper,), {"oid": postgres.types[name].array_oid})
        connection.adapters.register_dumper(cls, dumper)
    for cls, name in _SCALARS.items():
        dumper = type(f"{cls.__name__}Dumper", (_ArrayDumper,), {"oid": postgres.types[name].oid})
        connection.adapters.register_dumper(cls, dumper)
