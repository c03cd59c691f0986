"""Refusals: one declaration serves Python, SQL and HTTP."""

import psycopg
import pytest

from bursar import db, problems
from bursar.problems import FieldError, NotFound, Problem, documents


class TooMuch(Problem):
    """What the tests raise."""

    status, code, title = 402, "test_too_much", "Too much"
    sqlstate = "BR999"


def test_the_document_has_what_is_known_and_nothing_empty() -> None:
    problem = TooMuch("You asked for 5", errors=[FieldError("#/amount", "at most 4")], why={"limit": "4"})
    assert problem.body("req_1") == {
        "type": "/problems/test_too_much",
        "title": "Too much",
        "status": 402,
        "code": "test_too_much",
        "detail": "You asked for 5",
        "request_id": "req_1",
        "errors": [{"pointer": "#/amount", "detail": "at most 4", "code": "invalid"}],
        "why": {"limit": "4"},
    }
    assert set(TooMuch().body()) == {"type", "title", "status", "code"}


def test_a_code_or_sqlstate_is_declared_once() -> None:
    with pytest.raises(TypeError, match="test_too_much"):
        type("Another", (Problem,), {"code": "test_too_much"})
    assert TooMuch in problems.declared()


async def test_a_refusal_in_sql_is_the_same_problem(database: db.Database) -> None:
    raising = """do $$ begin
        raise exception 'No room' using errcode = 'BR999', detail = '{"limit": "user"}';
    end $$"""
    with pytest.raises(TooMuch, match="No room") as caught:
        async with database.untenanted() as conn:
            with problems.translated():
                await conn.execute(raising)
    assert caught.value.why == {"limit": "user"}
    assert isinstance(caught.value.__cause__, psycopg.Error)


async def test_any_other_database_error_stays_what_it_is(database: db.Database) -> None:
    with pytest.raises(psycopg.errors.DivisionByZero):
        async with database.untenanted() as conn:
            with problems.translated():
                await conn.execute("select 1 / 0")


def test_a_route_documents_its_problems_by_status() -> None:
    found = documents(TooMuch, NotFound)
    assert set(found) == {402, 404}
    assert "test_too_much" in found[402]["description"]
