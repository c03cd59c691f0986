"""Rows as frozen dataclasses: a column goes to the field of its name."""

import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields
from enum import Enum
from functools import cache
from typing import Any, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

import psycopg
from psycopg.rows import TupleRow

Connection: TypeAlias = psycopg.AsyncConnection[TupleRow]
Row = TypeVar("Row")


class NoRow(LookupError):
    """A query that must find one row found none."""


async def fetch_one(conn: Connection, cls: type[Row], sql: str, /, **params: Any) -> Row:
    """The one row.

    Raises:
        NoRow: there is none.
    """
    row = await fetch_optional(conn, cls, sql, **params)
    if row is None:
        raise NoRow(cls.__name__)
    return row


async def fetch_optional(conn: Connection, cls: type[Row], sql: str, /, **params: Any) -> Row | None:
    """The one row or None; more than one is a fault of the query."""
    rows = await fetch_all(conn, cls, sql, **params)
    assert len(rows) <= 1, f"{len(rows)} rows of {cls.__name__} where one was expected"
    return rows[0] if rows else None


async def fetch_all(conn: Connection, cls: type[Row], sql: str, /, **params: Any) -> list[Row]:
    """Every row, in the query's order."""
    async with conn.cursor(row_factory=_factory_for(cls)) as cursor:
        await cursor.execute(sql, params)
        return await cursor.fetchall()


async def fetch_value(conn: Connection, sql: str, /, **params: Any) -> Any:
    """First column of the first row; None when there is no row."""
    async with conn.cursor() as cursor:
        await cursor.execute(sql, params)
        row = await cursor.fetchone()
        return None if row is None else row[0]


async def fetch_values(conn: Connection, sql: str, /, **params: Any) -> list[Any]:
    """First column of every row, in the query's order."""
    async with conn.cursor() as cursor:
        await cursor.execute(sql, params)
        return [row[0] for row in await cursor.fetchall()]


async def execute(conn: Connection, sql: str, /, **params: Any) -> int:
    """Run a statement; the number of rows it touched."""
    async with conn.cursor() as cursor:
        await cursor.execute(sql, params)
        return cursor.rowcount


def _factory_for(cls: type[Row]) -> Callable[[psycopg.AsyncCursor[Any]], Callable[[Sequence[Any]], Row]]:
    """A psycopg row factory that builds `cls` by column names, with enums and tuples made from text and arrays."""

    def for_cursor(cursor: psycopg.AsyncCursor[Any]) -> Callable[[Sequence[Any]], Row]:
        names = [column.name for column in cursor.description or ()]
        converters = _converters(cast(Hashable, cls))
        unknown = set(names) - converters.keys()
        assert not unknown, f"{cls.__name__} has no field for {sorted(unknown)}"

        def build(values: Sequence[Any]) -> Row:
            arguments = dict(zip(names, values, strict=True))
            for name in names:
                convert = converters[name]
                if convert is not None and arguments[name] is not None:
                    arguments[name] = convert(arguments[name])
            return cls(**arguments)

        return build

    return for_cursor


@cache
def _converters(cls: Hashable) -> dict[str, Callable[[Any], Any] | None]:
    """For each field: what makes its type from the driver's value; None where they are the same."""
    assert isinstance(cls, type)
    hints = get_type_hints(cls)
    return {each.name: _converter(hints[each.name]) for each in fields(cls)}


def _converter(hint: Any) -> Callable[[Any], Any] | None:
    if get_origin(hint) in (Union, types.UnionType):
        present = [each for each in get_args(hint) if each is not type(None)]
        return _converter(present[0]) if len(present) == 1 else None
    if get_origin(hint) is tuple:
        inner = _converter(get_args(hint)[0])
        return tuple if inner is None else lambda values: tuple(inner(value) for value in values)
    if get_origin(hint) is frozenset:
        return frozenset
    return hint if isinstance(hint, type) and issubclass(hint, Enum) else None
