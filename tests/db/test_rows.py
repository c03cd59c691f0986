"""Rows become frozen dataclasses by column name; statements come from queries.sql by name."""

from dataclasses import dataclass
from enum import StrEnum

import pytest

from bursar import db
from bursar.db.queries import Queries, parse_queries


class Color(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Thing:
    name: str
    color: Color | None = None
    tags: tuple[str, ...] = ()
    colors: tuple[Color, ...] = ()
    roles: frozenset[str] = frozenset()


async def test_columns_go_to_the_fields_of_their_names(database: db.Database) -> None:
    query = """
        select %(name)s::text as name, 'red' as color, array['a', 'b'] as tags, array['blue'] as colors,
               array['x', 'x'] as roles
    """
    async with database.untenanted() as conn:
        thing = await db.fetch_one(conn, Thing, query, name="n")
    assert thing == Thing("n", Color.RED, ("a", "b"), (Color.BLUE,), frozenset({"x"}))
    assert isinstance(thing.color, Color)


async def test_null_stays_none_and_missing_columns_take_their_default(database: db.Database) -> None:
    async with database.untenanted() as conn:
        assert await db.fetch_one(conn, Thing, "select 'n' as name, null as color") == Thing("n")


async def test_a_value_that_the_enum_does_not_know_is_a_fault(database: db.Database) -> None:
    with pytest.raises(ValueError, match="green"):
        async with database.untenanted() as conn:
            await db.fetch_one(conn, Thing, "select 'n' as name, 'green' as color")


async def test_a_column_without_a_field_is_a_fault(database: db.Database) -> None:
    with pytest.raises(AssertionError, match="other"):
        async with database.untenanted() as conn:
            await db.fetch_one(conn, Thing, "select 'n' as name, 1 as other")


async def test_no_row_is_none_or_raises_as_asked(database: db.Database) -> None:
    none = "select 'n' as name where false"
    async with database.untenanted() as conn:
        assert await db.fetch_optional(conn, Thing, none) is None
        assert await db.fetch_all(conn, Thing, none) == []
        assert await db.fetch_value(conn, none) is None
        with pytest.raises(db.NoRow):
            await db.fetch_one(conn, Thing, none)


async def test_two_rows_where_one_is_expected_are_a_fault(database: db.Database) -> None:
    with pytest.raises(AssertionError, match="2 rows"):
        async with database.untenanted() as conn:
            await db.fetch_one(conn, Thing, "select x as name from unnest(array['a', 'b']) x")


async def test_execute_answers_with_the_number_of_rows(database: db.Database) -> None:
    async with database.untenanted() as conn:
        await conn.execute("create temporary table three_rows (x integer) on commit drop")
        assert await db.execute(conn, "insert into three_rows select generate_series(1, %(n)s)", n=3) == 3


def test_statements_are_found_by_name() -> None:
    statements = parse_queries(
        "-- about this file\n\n-- name: one\nselect 1;\n\n-- name: two_rows\nselect 2\n-- why\n;\n"
    )
    assert statements == {"one": "select 1", "two_rows": "select 2\n-- why\n"}
    queries = Queries("bursar.x", statements)
    assert queries.one == "select 1"
    with pytest.raises(AttributeError, match=r"bursar\.x/queries\.sql has no '-- name: three'"):
        _ = queries.three


@pytest.mark.parametrize("text", ["select 1;\n-- name: one\nselect 1;", "-- name: a\nselect 1\n-- name: a\nselect 2"])
def test_a_file_with_nameless_or_doubled_statements_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"before the first|two statements"):
        parse_queries(text)
