"""No secret is ever logged, under whatever name and however deep."""

import asyncio
import json
import logging

import pytest
import structlog

from bursar.logs import WRITE_SECONDS, configure_logs, hidden, hidden_text, log_request

OUR_KEY = "bk_AAAAAAAAAAAAAAAAAAAAAAKKKKKKKKKKK_SSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSCCCCCC"


@pytest.mark.parametrize(
    "text",
    [
        f"key {OUR_KEY} was used",
        "sk-proj-abcdefghijklmnop1234",
        "sk-ant-api03-abcdefghijklmnop1234",
        "Authorization: Bearer abcdefghijklmnop1234",
        "postgresql://bursar:abcdefghijklmnop1234@db.example/bursar",
        "host=x password=abcdefghijklmnop1234 user=y",
        "host=x password='abcdefghijklmnop1234 x' user=y",
    ],
)
def test_what_looks_like_a_secret_is_blanked_inside_any_text(text: str) -> None:
    shown = hidden_text(text)
    assert "abcdefghijklmnop1234" not in shown
    assert "SSSS" not in shown
    assert "[hidden]" in shown


@pytest.mark.parametrize("name", ["authorization", "Cookie", "session_token", "provider_secret", "DATABASE_URL", "dsn"])
def test_what_is_named_like_a_secret_is_blanked(name: str) -> None:
    assert hidden(name, "short") == "[hidden]"
    assert hidden("headers", {"outer": [{name: b"short"}]}) == {"outer": [{name: "[hidden]"}]}


@pytest.mark.parametrize(("name", "value"), [("tokens", 12), ("input_tokens", 5), ("api_key_id", "key_1"), ("n", None)])
def test_what_is_no_secret_is_shown(name: str, value: object) -> None:
    assert hidden(name, value) == value


def test_a_loop_in_what_is_logged_ends() -> None:
    loop: dict[str, object] = {}
    loop["again"] = loop
    assert "[hidden]" in json.dumps(hidden("x", loop))


@pytest.fixture
def json_logs() -> object:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    configure_logs("json", "info")
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.usefixtures("json_logs")
def test_our_lines_and_the_libraries_are_one_kind_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("json", "info")
    structlog.get_logger("bursar.try").info("used", key=OUR_KEY, amount=3)
    logging.getLogger("some.library").warning("failed with %s", OUR_KEY)
    structlog.get_logger("bursar.try").debug("not shown")
    try:
        raise ValueError(f"cannot read {OUR_KEY}")
    except ValueError:
        structlog.get_logger("bursar.try").exception("broken")
    err = capsys.readouterr().err
    lines = [json.loads(line) for line in err.splitlines()]
    assert [line["event"] for line in lines] == ["used", "failed with [hidden]", "broken"]
    assert (lines[0]["amount"], lines[0]["level"], lines[0]["logger"]) == (3, "info", "bursar.try")
    assert "Traceback" in lines[2]["exception"]
    assert "SSSS" not in err


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_the_line_of_a_request_is_as_any_other_line(
    log_format: str, capsys: pytest.CaptureFixture[str], json_logs: object
) -> None:
    """It is made by a shorter way."""
    told = {"method": "POST", "route": "/v1", "status": 200, "ms": 30.2, "request_id": "req_1"}
    configure_logs(log_format, "info")
    log = structlog.get_logger("bursar.asgi")
    log.info("request", **told)
    log_request(log, **told)  # type: ignore[arg-type]
    long, short = capsys.readouterr().err.splitlines()
    if log_format == "json":
        assert json.loads(long).keys() == json.loads(short).keys()
        assert {**json.loads(long), "timestamp": ""} == {**json.loads(short), "timestamp": ""}
    else:
        at = "2026-01-01T00:00:00.000000Z"
        assert len(long) == len(short)
        assert long[len(at) :] == short[len(at) :]
        assert long[:10] == short[:10]
    configure_logs(log_format, "warning")
    log_request(log, **told)  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


async def test_lines_of_requests_are_written_together_a_moment_later(
    capsys: pytest.CaptureFixture[str], json_logs: object
) -> None:
    configure_logs("json", "info")
    for n in range(3):
        log_request(structlog.get_logger(), method="GET", route="/", status=200, ms=1.0, request_id=f"req_{n}")
    assert capsys.readouterr().err == ""
    await asyncio.sleep(3 * WRITE_SECONDS)
    assert [json.loads(line)["request_id"] for line in capsys.readouterr().err.splitlines()] == [
        "req_0",
        "req_1",
        "req_2",
    ]
