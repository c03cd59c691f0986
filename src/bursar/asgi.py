"""What lies around every request, as plain ASGI: its id, the limits of its body, its line in the log, its metrics.

No Starlette middleware classes: those copy streams and hide disconnects. Limits of its head are the protocol's.
"""

import asyncio
import json
import re
import time
import weakref
from array import array
from collections.abc import Awaitable, Callable, MutableMapping
from functools import cache
from itertools import accumulate
from typing import Any, Final

import structlog
from prometheus_client import Counter, Histogram
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from bursar.clock import uuid7
from bursar.logs import REQUEST_ID, log_request
from bursar.problems import MEDIA_TYPE, BodyTooLarge, InternalError, MalformedBody, Problem

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LARGEST_BODY: Final = 1_000_000
LARGEST_HEAD: Final = 65_536
HEAD_SECONDS: Final = 30.0
DEEPEST_JSON: Final = 32
GATEWAY_PREFIX: Final = "/v1/"

REQUESTS = Counter("bursar_http_requests_total", "Requests answered", ["method", "route", "status"])
SECONDS = Histogram("bursar_http_request_seconds", "Time to the end of the answer", ["route"])
_QUIET: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_STRING: Final = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
_STEPS: Final = bytes.maketrans(b"[{]}", b"\x01\x01\xff\xff")  # as signed bytes: one deeper, one less deep
_NO_BRACKETS: Final = bytes(set(range(256)) - set(b"[{]}"))

log = structlog.get_logger(__name__)


def is_gateway(path: str) -> bool:
    """The paths of providers' clients, which are served apart."""
    return path == "/v1" or path.startswith(GATEWAY_PREFIX)


class Around:
    """Gives each request an id, answers our own bugs, and writes one line and one measurement when it is over."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await around(self._app, scope, receive, send)
        else:
            await self._app(scope, receive, send)


async def around(app: App, scope: Scope, receive: Receive, send: Send) -> None:
    """One HTTP request, as Around says. Its id is in the state of the scope: request_uuid, and as text request_id."""
    request_uuid = uuid7()
    request_id = f"req_{request_uuid.hex}"
    state = scope.setdefault("state", {})
    state["request_uuid"], state["request_id"] = request_uuid, request_id
    answer = _Answer(send, request_id)
    began = time.perf_counter()
    bound = REQUEST_ID.set(request_id)
    try:
        await app(scope, receive, answer)
    except Exception:
        log.exception("a request ended in a fault")
        if not answer.status:
            await send_problem(answer, InternalError(), request_id)
    finally:
        _account(scope, answer.status, time.perf_counter() - began, request_id)
        REQUEST_ID.reset(bound)


class _Answer:
    """Passes the answer on, notes its status, and adds the request id."""

    __slots__ = ("_request_id", "_send", "status")

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id.encode()
        self.status = 0

    def __call__(self, message: Message) -> Awaitable[None]:
        """What there is to wait for is the server's own: a coroutine around it would wait for nothing else."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = [*message.get("headers", ()), (b"x-request-id", self._request_id)]
            message = {**message, "headers": headers}
        return self._send(message)


class BodyLimits:
    """Refuses bodies of more than 1 MB and JSON nested deeper than 32; the gateway's paths see to their own."""

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or is_gateway(scope["path"]) or scope["method"] in ("GET", "HEAD", "OPTIONS"):
            await self._app(scope, receive, send)
            return
        try:
            body = await read_body(scope, receive, LARGEST_BODY)
            if body is not None and _is_json(scope) and nesting(body) > DEEPEST_JSON:
                raise MalformedBody(f"The JSON is nested deeper than {DEEPEST_JSON}")
        except Problem as problem:
            await send_problem(send, problem, scope["state"]["request_id"], close=True)
            return
        if body is not None:  # None: the client has gone
            await self._app(scope, _replay(body, receive), send)


async def read_body(scope: Scope, receive: Receive, largest: int) -> bytes | None:
    """The whole body; None when the client hangs up before it is whole.

    Raises:
        BodyTooLarge: by its declared length at once, else as soon as it is seen.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and int(value[:20]) > largest:
            raise BodyTooLarge(f"At most {largest} bytes are taken here")
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > largest:
            raise BodyTooLarge(f"At most {largest} bytes are taken here")
        if not message.get("more_body", False):
            return b"".join(pieces)


def nesting(text: bytes) -> int:
    """How deep arrays and objects of a JSON text are nested; of a text that is no JSON, some number."""
    if text.count(b"[") + text.count(b"{") <= DEEPEST_JSON:
        return 0  # it cannot be deeper than that
    steps = array("b", _STRING.sub(b"", text).translate(_STEPS, _NO_BRACKETS))
    return max(accumulate(steps), default=0)


async def send_problem(send: Send, problem: Problem, request_id: str, *, close: bool = False) -> None:
    """A whole answer. close: the connection too, since the rest of the request is not read."""
    body = json.dumps(problem.body(request_id)).encode()
    headers = [(b"content-type", MEDIA_TYPE.encode()), (b"content-length", str(len(body)).encode())]
    headers += [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": problem.status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _is_json(scope: Scope) -> bool:
    kind = next((value for name, value in scope["headers"] if name.lower() == b"content-type"), b"application/json")
    return b"json" in kind.lower()


def _replay(body: bytes, receive: Receive) -> Receive:
    """A receive that gives the body again, then what the server has to say."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again


def _account(scope: Scope, status: int, seconds: float, request_id: str) -> None:
    """By the route's template, not the path: a path may carry a token, and there are too many."""
    path = scope["path"]
    route = "/v1" if is_gateway(path) else getattr(scope.get("route"), "path", None) or "unmatched"
    method = scope["method"] if scope["method"] in _METHODS else "other"
    requests, times = _metrics(method, route, status)
    requests.inc()
    times.observe(seconds)
    if route not in _QUIET:
        log_request(log, method=method, route=route, status=status, ms=round(seconds * 1000, 1), request_id=request_id)


@cache
def _metrics(method: str, route: str, status: int) -> tuple[Counter, Histogram]:
    """Finding them by their labels takes longer than counting."""
    return REQUESTS.labels(method, route, str(status or "gone")), SECONDS.labels(route)


class Protocol(HttpToolsProtocol):
    """HTTP as the server processes speak it: uvicorn's, with limits of the head, of which it has none.

    A head larger than 64 KB is answered 431, one that does not come within 30 s is cut. The head of an answer goes out
    with what follows in the same turn of the loop, and all that is answered in one turn goes out at its end, together.
    Use it as uvicorn's `http`.
    """

    _head_size = 0
    _is_in_head = True
    _head_timer: asyncio.TimerHandle | None = None
    _is_lost = False
    _joined: "_Joined | None" = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A head is expected from now on."""
        super().connection_made(transport)
        self._outbox = _outbox_of(self.loop)
        self._watchers: list[Callable[[], None]] = []
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._cut)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected any more."""
        self._stop_timer()
        self._is_lost = True
        super().connection_lost(exc)
        for watcher in self._watchers:
            watcher()
        self._watchers = []

    def when_lost(self, watcher: Callable[[], None]) -> None:
        """Call it when the client hangs up; at once, if it has. The whole body must have been read."""
        self.flow.resume_reading()  # or nobody would see it
        if self._is_lost:
            watcher()
        else:
            self._watchers.append(watcher)

    def forget(self, watcher: Callable[[], None]) -> None:
        """Nobody waits for that any more."""
        if watcher in self._watchers:
            self._watchers.remove(watcher)

    @property
    def is_held_up(self) -> bool:
        """Whether what is written has to wait, because the client does not read."""
        return self.flow.write_paused

    def data_received(self, data: bytes) -> None:
        """Bytes of a head or a body."""
        self._flush()  # what is wrong with them is answered past what is joined
        super().data_received(data)
        if self._is_in_head and not self.transport.is_closing():
            self._head_size += len(data)
            if self._head_size > LARGEST_HEAD:
                self._refuse_head()
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_SECONDS, self._cut)

    def on_message_begin(self) -> None:
        """The first bytes of a head."""
        super().on_message_begin()
        self._is_in_head = True
        self._head_size = 0

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._is_in_head = False
        self._stop_timer()
        super().on_headers_complete()

    def eof_received(self) -> None:
        """The client says no more: the connection is closed after this."""
        self._flush()
        super().eof_received()

    def shutdown(self) -> None:
        """The server ends; a connection on which nothing is asked is closed at once."""
        self._flush()
        super().shutdown()

    def _flush(self) -> None:
        if self._joined is not None:
            self._joined.flush()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        cycle.transport = self._joined = _Joined(self.transport, self._outbox)  # type: ignore[assignment]
        cycle.scope["state"]["connection"] = self
        super()._start_asgi_task(cycle, app)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse_head(self) -> None:
        text = b"The head of the request is too large"
        self.transport.write(
            b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-type: text/plain; charset=utf-8\r\n"
            b"content-length: %d\r\nconnection: close\r\n\r\n%b" % (len(text), text)
        )
        self.transport.close()

    def _cut(self) -> None:
        self.transport.close()


class _Outbox:
    """Answers that were begun in this turn of the loop. They go out at its end, one after the other.

    A batch answers a hundred callers in one turn. Whoever writes each answer as it is ready wakes the other side for
    each, which takes as long as all else that is done for it; written together, they find it awake.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = weakref.ref(loop)
        self._waiting: list[_Joined] = []

    def put(self, joined: "_Joined") -> None:
        """Flush it at the end of this turn."""
        loop = self._loop()
        if not self._waiting and loop is not None:
            loop.call_soon(self._flush)
        self._waiting.append(joined)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        for each in waiting:
            each.flush()


_outboxes: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Outbox] = weakref.WeakKeyDictionary()


def _outbox_of(loop: asyncio.AbstractEventLoop) -> _Outbox:
    if loop not in _outboxes:
        _outboxes[loop] = _Outbox(loop)
    return _outboxes[loop]


class _Joined:
    """What one answer writes to. What is written in the turn that begins it goes out at once, by the outbox."""

    __slots__ = ("_begun", "_has_begun", "_outbox", "_transport")

    def __init__(self, transport: asyncio.Transport, outbox: _Outbox) -> None:
        self._transport = transport
        self._outbox = outbox
        self._begun = b""
        self._has_begun = False

    def write(self, data: bytes) -> None:
        """Write; in the turn that begins the answer, at its end."""
        if self._begun:
            self._begun += data
        elif self._has_begun:
            self._transport.write(data)
        else:
            self._has_begun = True
            self._begun = data
            self._outbox.put(self)

    def flush(self) -> None:
        """Write what waits."""
        if self._begun:
            data, self._begun = self._begun, b""
            if not self._transport.is_closing():
                self._transport.write(data)

    def close(self) -> None:
        """Nothing follows."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """Whether nothing can be written any more."""
        return self._transport.is_closing()
