"""`bursar demo`: its options, and once as a user runs it."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from http.cookiejar import CookieJar
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bursar import cli
from bursar.cli import demo as command
from bursar.cli.demo import demo_settings, parse_as_of
from bursar.cli.exits import Exit
from bursar.demo import homes
from bursar.errors import BursarError

ELSEWHERE = {"HOME": "/home/dana", "DATABASE_URL": "postgresql://prod.example/bursar", "BURSAR_MASTER_KEY": "k" * 40}


def test_a_demo_never_uses_the_database_of_the_environment() -> None:
    settings = demo_settings(ELSEWHERE, Path("/tmp/demo"))
    assert settings.database_url is None
    assert settings.given_master_key is None


@pytest.mark.parametrize(
    ("environment", "option", "expected"),
    [
        ({"XDG_DATA_HOME": "/data"}, None, "/data/bursar-demo"),
        ({"XDG_DATA_HOME": "/data", "BURSAR_DATA_DIR": "/srv/bursar"}, None, "/srv/bursar/demo"),
        ({"BURSAR_DATA_DIR": "/srv/bursar"}, Path("/tmp/mine"), "/tmp/mine"),
    ],
)
def test_a_demo_has_a_folder_of_its_own(environment: dict[str, str], option: Path | None, expected: str) -> None:
    assert demo_settings(environment, option).data_dir == Path(expected)


def test_a_day_is_its_afternoon_and_an_instant_is_itself() -> None:
    assert parse_as_of("2026-10-20") == datetime(2026, 10, 20, 14, tzinfo=UTC)
    assert parse_as_of("2026-10-20T09:30:00+02:00") == datetime(2026, 10, 20, 7, 30, tzinfo=UTC)


@pytest.mark.parametrize("text", ["yesterday", "2026-13-01", "2999-01-01"])
def test_a_day_that_is_none_or_lies_ahead_is_refused(text: str) -> None:
    with pytest.raises(BursarError):
        parse_as_of(text)


def test_a_port_in_use_is_said_before_anything_is_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code = cli.run(["demo", "--port", str(port), "--data-dir", str(tmp_path / "demo")])
    assert code == Exit.FAILED
    assert f"Port {port}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("option", ["--reset", "--remove", "--no-serve"])
def test_a_folder_that_is_no_demo_is_left_alone(tmp_path: Path, option: str) -> None:
    (tmp_path / "precious").write_text("mine")
    assert cli.run(["demo", "--port", "0", option, "--data-dir", str(tmp_path)]) == Exit.FAILED
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_every_command_on_the_page_can_be_typed_as_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make demo` puts nothing on the PATH."""
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/bursar", "demo"])
    person: Any = SimpleNamespace(email="somebody@acme.example", api_key="bk_x")
    company: Any = SimpleNamespace(name="Acme", story="A story", admin=person, member=person)
    door = command._Door(company=company, role="admin", access=person, url="http://127.0.0.1:8321/sign-in/x")
    doors: Mapping[Any, Any] = defaultdict(lambda: door)
    lines = list(command._page(company, doors, "http://127.0.0.1:8321", demo_settings({}, Path("/tmp/a demo"))))
    commands = [line for line in lines if " users link " in line or " demo --" in line]
    assert len(commands) == 3
    assert all("/somewhere/bin/bursar " in line and "'/tmp/a demo'" in line for line in commands)


# ------------------------------------------------------------------------------------------------ as a user runs it


class _Demo:
    """A running `bursar demo --json` and the document that it printed."""

    def __init__(self, data_dir: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "bursar",
            "demo",
            "--json",
            "--port",
            "0",
            "--data-dir",
            str(data_dir),
            *options,
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("BURSAR_")}
        self.errors = (data_dir.parent / f"log-{time.monotonic_ns()}").open("w+")
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.errors, text=True, env=environment)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.log()
        self.document: dict[str, Any] = json.loads(line)

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def company(self, slug: str) -> dict[str, Any]:
        return next(company for company in self.document["companies"] if company["slug"] == slug)

    def post(self, path: str, body: object, key: str) -> tuple[int, dict[str, Any], Any]:
        request = urllib.request.Request(
            self.document["base_url"] + path,
            data=json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, json.load(answer), answer.headers
        except urllib.error.HTTPError as error:
            return error.code, json.load(error), error.headers

    def end(self, number: signal.Signals = signal.SIGTERM) -> str:
        self.process.send_signal(number)
        assert self.process.stdout is not None
        rest = self.process.stdout.read()
        assert self.process.wait(60) == 0, self.log()
        return rest


CHAT = {"model": "demo-1", "messages": [{"role": "user", "content": "Hello"}]}


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A folder that the database's user can pass through; whatever is left in it is removed."""
    folder = Path(tempfile.mkdtemp(prefix="bursar-demo-"))
    folder.chmod(0o711)
    yield folder
    homes.remove(folder / "demo")
    shutil.rmtree(folder)


@pytest.fixture
def start(open_dir: Path) -> Iterator[Callable[..., _Demo]]:
    """Starts `bursar demo` on the folder `demo` in `open_dir`; what still runs at the end is ended."""
    started: list[_Demo] = []

    def run(*options: str) -> _Demo:
        started.append(_Demo(open_dir / "demo", *options))
        return started[-1]

    yield run
    for each in started:
        if each.process.poll() is None:
            each.end()


@pytest.mark.slow
def test_a_demo_is_made_served_ended_and_found_again(open_dir: Path, start: Callable[..., _Demo]) -> None:
    first = start("--as-of", "2026-10-20")
    _check_document(first.document)
    key = first.company("fernwood-school")["member"]["api_key"]
    status, answer, headers = first.post("/v1/chat/completions", CHAT, key)
    assert (status, answer["object"]) == (200, "chat.completion")
    assert float(headers["bursar-charged"]) > 0
    assert first.post("/v1/chat/completions", CHAT, first.company("blank-canvas")["member"]["api_key"])[0] == 402
    page = _sign_in(first.company("acme-corp")["admin"]["sign_in_url"])
    assert "Acme Corp" in page
    assert "every name is invented" in page
    assert first.end(signal.SIGTERM) == ""  # the document is all there is on stdout
    assert "Acme Corp: " in first.log()

    second = start()
    assert [company["id"] for company in second.document["companies"]] == [
        company["id"] for company in first.document["companies"]
    ]
    assert second.company("fernwood-school")["member"]["api_key"] == key
    assert second.post("/v1/chat/completions", CHAT, key)[0] == 200
    assert "Acme Corp: " not in second.log()  # nothing was seeded again
    assert second.company("acme-corp")["admin"]["sign_in_url"] not in json.dumps(first.document)
    second.end(signal.SIGINT)

    assert cli.run(["demo", "--remove", "--data-dir", str(open_dir / "demo")]) == Exit.DONE
    assert list((open_dir / "demo").iterdir()) == []


def _check_document(document: dict[str, Any]) -> None:
    assert document["base_url"].startswith("http://127.0.0.1:")
    assert document["as_of"] == "2026-10-20T14:00:00+00:00"
    companies = document["companies"]
    assert len(companies) == 72
    for company in companies:
        assert set(company) == {"id", "slug", "name", "admin", "member"}
        for role in ("admin", "member"):
            assert set(company[role]) == {"email", "api_key", "sign_in_url"}
            assert company[role]["api_key"].startswith("bk_")
    links = document["sign_in_links"]
    assert {(link["company"], link["role"]) for link in links} == {
        (company["slug"], role) for company in companies for role in ("admin", "member")
    }
    assert all(set(link) == {"company", "email", "role", "url"} for link in links)


def _sign_in(url: str) -> str:
    """The page that whoever presses the button of a sign-in link comes to."""
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
    pressed = urllib.request.Request(url, data=b"", method="POST", headers={"Origin": url.partition("/sign-in")[0]})
    with opener.open(pressed, timeout=30) as answer:
        return str(answer.read().decode())
