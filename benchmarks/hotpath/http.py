"""Deductions over HTTP, against the same server's empty ASGI route.

The server is what `bursar serve` starts, in a process of its own, with one route more that answers at once.
"""

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from benchmarks.hotpath.books import shuffled
from benchmarks.hotpath.companies import open_companies
from benchmarks.hotpath.contenders import AMOUNT, MODEL, PROVIDER
from benchmarks.hotpath.pace import Call
from bursar.asgi import Receive, Scope, Send
from bursar.server import ServedApp, from_environment
from bursar.settings import Settings

EMPTY: Final = "/empty"
DEDUCT: Final = "/api/v1/credits/deduct"
START_SECONDS: Final = 60.0
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class WithEmptyRoute:
    """The application, and before it a route that only takes the body and answers."""

    def __init__(self, app: ServedApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != EMPTY:
            await self._app(scope, receive, send)
            return
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"application/json"), (b"content-length", b"2")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}", "more_body": False})


def application() -> WithEmptyRoute:
    """What the server process runs."""
    return WithEmptyRoute(from_environment())


@dataclass(frozen=True, slots=True)
class Site:
    """A server that is running. key: of an organization with two caps; members: those of `companies`, by company."""

    port: int
    pid: int
    key: str
    members: dict[str, list[str]]


@contextmanager
def served(folder: Path, *, members: int) -> Iterator[Site]:
    """A server with an embedded, durable database, whose organizations have credits. members: of each company."""
    folder.mkdir(mode=0o711)
    port = _free_port()
    environment = {
        **os.environ,
        "BURSAR_DATA_DIR": str(folder),
        "BURSAR_PORT": str(port),
        "BURSAR_LOG_LEVEL": "warning",
    }
    environment.pop("DATABASE_URL", None)
    command = [
        *(sys.executable, "-m", "uvicorn", "--factory", "benchmarks.hotpath.http:application", "--port", str(port)),
        *("--http", "bursar.asgi:Protocol", "--ws", "none", "--no-access-log", "--no-server-header"),
    ]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            _wait(port, process)
            companies = asyncio.run(open_companies(Settings.from_environment(environment), members=members))
            yield Site(port, process.pid, _set_up(environment), companies)
        finally:
            process.send_signal(signal.SIGTERM)


def _set_up(environment: dict[str, str]) -> str:
    """Credits, a user with a cap, a cap of the organization; the key."""

    def run(command: str) -> str:
        words = [sys.executable, "-m", "bursar", *command.split()]
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    run("orgs create Benchmark --slug benchmark")
    run("credits add 1000000000 --org benchmark")
    run("caps set --org benchmark --stop 900000000cr --per month")
    run("caps set --org benchmark --stop 900000000cr --per day")
    return run("keys create Benchmark --org benchmark --scope write")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"the server ended with {process.returncode}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError("the server does not answer")


class Caller(asyncio.Protocol):
    """One connection: a request, its whole answer, the next request."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._buffer = b""
        self._answer: asyncio.Future[bytes] | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(exc or ConnectionError("the server hung up"))

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        end = self._buffer.find(b"\r\n\r\n")
        length = _LENGTH.search(self._buffer, 0, end + 2) if end >= 0 else None
        if length and len(self._buffer) >= end + 4 + int(length[1]):
            answer, self._buffer = self._buffer, b""
            assert self._answer is not None
            self._answer.set_result(answer)

    async def ask(self, request: bytes) -> bytes:
        """The whole answer."""
        assert self._transport is not None
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


@asynccontextmanager
async def callers(port: int, number: int) -> AsyncIterator[list[Caller]]:
    """Connections, one for each caller."""
    loop = asyncio.get_running_loop()
    opened = [(await loop.create_connection(Caller, "127.0.0.1", port))[1] for _ in range(number)]
    try:
        yield opened
    finally:
        for each in opened:
            each.close()


def by_request(
    site: Site, connected: list[Caller], path: str, *, keys: Sequence[str] = (), with_key: bool = False
) -> Call:
    """One POST per request, with the site's key or one drawn from keys. with_key: each under an idempotency key."""
    body: dict[str, Any] = {"amount": {"amount": str(AMOUNT), "unit": "micro"}, "provider": PROVIDER, "model": MODEL}
    raw = json.dumps(body).encode()
    heads = [
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n".encode()
        for key in keys or [site.key]
    ]
    drawn = shuffled([(head, head + b"\r\n" + raw) for head in heads], 1)
    run, numbers = os.urandom(8).hex(), count()

    async def call(number: int) -> bool:
        head, whole = next(drawn)
        key = f"Idempotency-Key: {run}-{next(numbers)}\r\n\r\n"
        answer = await connected[number].ask(head + key.encode() + raw if with_key else whole)
        if not answer.startswith(b"HTTP/1.1 200"):
            raise RuntimeError(answer.decode("latin-1"))
        return True

    return call
