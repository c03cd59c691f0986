"""How the application answers: each wrong input with a 4xx that has a name, each bug with a 500 that tells nothing."""

import json
from collections.abc import AsyncIterator
from typing import Annotated, Any

import httpx2
import psycopg
import pytest
from fastapi import APIRouter, FastAPI, Query
from pydantic import BaseModel

from bursar import db
from bursar.app import create_app
from bursar.asgi import DEEPEST_JSON, LARGEST_BODY, nesting
from bursar.operation import router as operation
from bursar.problems import Problem

router = APIRouter(prefix="/try")


class Thing(BaseModel):
    amount: int
    parts: list[dict[str, int]] = []


class Refused(Problem):
    status, code, title = 402, "test_refused_by_route", "Refused"
    sqlstate = "BR998"


@router.post("/things")
async def post_thing(thing: Thing) -> dict[str, int]:
    return {"amount": thing.amount}


@router.get("/things")
async def list_things(limit: Annotated[int, Query(le=100)] = 50) -> dict[str, int]:
    return {"limit": limit}


@router.get("/refused")
async def refused() -> None:
    raise Refused("Not today", why={"limit": "x"}, headers={"x-should-retry": "false"})


@router.get("/bug")
async def bug() -> None:
    raise RuntimeError("the secret is 42")


def sql_route(path: str, statement: str) -> None:
    @router.get(path)
    async def run() -> None:
        async with DATABASE[0].untenanted() as conn:
            await conn.execute(statement)


DATABASE: list[db.Database] = []
sql_route("/sql-refused", "do $$ begin raise exception 'No room' using errcode = 'BR998'; end $$")
sql_route("/sql-bug", "select 1 / 0")
sql_route("/sql-ended", "select pg_terminate_backend(pg_backend_pid())")


@pytest.fixture(scope="module")
def app(database: db.Database) -> FastAPI:
    DATABASE[:] = [database]
    return create_app(database, database.settings, routers=[operation, router], parts=[])


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        yield client


def problem_of(answer: httpx2.Response) -> dict[str, Any]:
    """The document of a refusal, whose form is checked here once for all."""
    assert answer.headers["content-type"] == "application/problem+json"
    body: dict[str, Any] = answer.json()
    assert body["status"] == answer.status_code
    assert body["type"] == f"/problems/{body['code']}"
    assert body["request_id"] == answer.headers["x-request-id"]
    return body


async def test_every_answer_has_a_request_id_of_its_own(client: httpx2.AsyncClient) -> None:
    first, second = await client.get("/healthz"), await client.get("/try/things")
    assert first.headers["x-request-id"].startswith("req_")
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


async def test_alive_ready_and_measured(client: httpx2.AsyncClient) -> None:
    assert (await client.get("/healthz")).json() == {"status": "ok"}
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    await client.get("/try/things")
    text = (await client.get("/metrics")).text
    assert 'bursar_http_requests_total{method="GET",route="/try/things",status="200"}' in text


async def test_without_a_database_it_is_alive_but_not_ready(database: db.Database) -> None:
    closed = db.Database(database.settings, "host=127.0.0.1 port=1 user=x dbname=x")
    await closed.open()
    app = create_app(closed, closed.settings, routers=[operation], parts=[])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://test") as client:
        assert (await client.get("/healthz")).status_code == 200
        answer = await client.get("/readyz")
    await closed.close()
    assert (answer.status_code, problem_of(answer)["code"]) == (503, "not_ready")


async def test_an_unknown_path_and_a_wrong_method_are_named(client: httpx2.AsyncClient) -> None:
    assert problem_of(await client.get("/nowhere"))["code"] == "not_found"
    answer = await client.put("/try/things")
    assert problem_of(answer)["code"] == "method_not_allowed"
    assert "POST" in answer.headers["allow"]


async def test_a_refusal_carries_its_why_and_its_headers(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/try/refused")
    body = problem_of(answer)
    assert (answer.status_code, body["code"], body["detail"], body["why"]) == (
        402,
        "test_refused_by_route",
        "Not today",
        {"limit": "x"},
    )
    assert answer.headers["x-should-retry"] == "false"


async def test_a_refusal_raised_in_sql_is_answered_alike(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/try/sql-refused")
    assert (answer.status_code, problem_of(answer)["detail"]) == (402, "No room")


@pytest.mark.parametrize("path", ["/try/bug", "/try/sql-bug"])
async def test_a_bug_is_answered_without_a_word_about_it(client: httpx2.AsyncClient, path: str) -> None:
    answer = await client.get(path)
    assert answer.status_code == 500
    assert set(problem_of(answer)) == {"type", "title", "status", "code", "request_id"}
    assert "secret" not in answer.text
    assert "zero" not in answer.text


async def test_a_database_that_goes_away_is_503_and_can_be_tried_again(client: httpx2.AsyncClient) -> None:
    answer = await client.get("/try/sql-ended")
    assert (answer.status_code, problem_of(answer)["code"]) == (503, "database_unavailable")
    assert answer.headers["retry-after"]
    assert (await client.get("/readyz")).status_code == 200


async def test_wrong_fields_are_pointed_at(client: httpx2.AsyncClient) -> None:
    answer = await client.post("/try/things", json={"amount": "many", "parts": [{"a/b": "x"}]})
    assert answer.status_code == 422
    assert [each["pointer"] for each in problem_of(answer)["errors"]] == ["#/amount", "#/parts/0/a~1b"]
    assert "many" not in answer.text


async def test_wrong_parameters_are_named(client: httpx2.AsyncClient) -> None:
    body = problem_of(await client.get("/try/things?limit=101"))
    assert (body["code"], body["errors"][0]["pointer"]) == ("invalid_request", "limit")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe", b"{'a': 1}", b'{"amount": 1}}'])
async def test_what_is_no_json_is_refused(client: httpx2.AsyncClient, text: bytes) -> None:
    answer = await client.post("/try/things", content=text, headers={"content-type": "application/json"})
    assert problem_of(answer)["code"] in ("malformed_body", "invalid_request")
    assert answer.status_code in (400, 422)


async def test_a_body_over_a_megabyte_is_refused_with_and_without_its_length(client: httpx2.AsyncClient) -> None:
    async def stream() -> AsyncIterator[bytes]:
        for _ in range(LARGEST_BODY // 100_000 + 1):
            yield b" " * 100_000

    for content in (b" " * (LARGEST_BODY + 1), stream()):
        answer = await client.post("/try/things", content=content)
        assert (answer.status_code, problem_of(answer)["code"]) == (413, "body_too_large")
    full = json.dumps({"amount": 5}).encode().ljust(LARGEST_BODY)
    answer = await client.post("/try/things", content=full, headers={"content-type": "application/json"})
    assert answer.json() == {"amount": 5}


async def test_json_nested_too_deep_is_refused(client: httpx2.AsyncClient) -> None:
    deep = b"[" * (DEEPEST_JSON + 1) + b"]" * (DEEPEST_JSON + 1)
    answer = await client.post("/try/things", content=deep, headers={"content-type": "application/json"})
    assert (answer.status_code, problem_of(answer)["code"]) == (400, "malformed_body")


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        (b"[" * 40 + b"]" * 40, 40),
        (b"[]" * 40, 1),
        (b'{"a": "' + b"[" * 40 + b'"}', 1),
        (rb'{"a": "\"' + b"[" * 40 + b'"}', 1),
        (b'{"a":' * 33, 33),
        (b'"' + b"[" * 40, 0),
    ],
)
def test_nesting_counts_brackets_outside_of_texts(text: bytes, depth: int) -> None:
    assert nesting(text) == depth


async def test_database_errors_that_are_bugs_stay_bugs() -> None:
    from bursar.problems import of_exception

    assert of_exception(psycopg.errors.UndefinedTable()) is None
    assert of_exception(ValueError()) is None
