"""One HTTP request and its answer, in the manners of the vendor whose client it is."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar
from urllib.parse import parse_qsl
from uuid import UUID

from bursar.asgi import Message, Protocol, Receive, Scope, Send, read_body
from bursar.gateway.wire import JSON, Wire
from bursar.problems import Problem

Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

PIECE_BYTES: Final = 1024 * 1024
MOST_SEND_SECONDS: Final = 120.0
"""A client that has not taken a piece by then has gone: its hold and the provider's connection do not wait for it."""


class NotMetered(Problem):
    """The path is none that is metered; nothing is ever passed through unmetered."""

    status, code, title = 404, "not_metered", "This path is not served here"


class ClientGone(Exception):
    """The client hung up."""


class Exchange:
    """One HTTP request and its answer, in the vendor's manners.

    status: of the answer, 0 until it begins. is_events: false once an answer of raw bytes has begun, in which nothing
    of ours can follow.
    """

    def __init__(self, scope: Scope, headers: dict[bytes, str], wire: Wire, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.headers = headers
        self.wire = wire
        self.request_id: str = scope["state"]["request_id"]
        self.request_uuid: UUID = scope["state"]["request_uuid"]
        self.status = 0
        self.is_events = True
        self._scope = scope
        self._receive = receive
        self._send_message = send
        # The connection, where the server is ours; else a task that reads what comes.
        self._connection: Protocol | None = scope["state"].get("connection")
        self._watch: asyncio.Task[None] | None = None
        self._is_watched = False
        self._is_gone = False
        self._working: asyncio.Task[Any] | None = None

    @property
    def content_type(self) -> str:
        """Of the request's body, as the client names it."""
        return self.headers.get(b"content-type", JSON)

    @property
    def query(self) -> dict[str, str]:
        """Parameters behind the path; of one that comes twice the last."""
        return dict(parse_qsl(self._scope.get("query_string", b"").decode("latin-1")))

    async def body(self, most: int) -> bytes:
        """The whole body, of at most so many bytes.

        Raises:
            BodyTooLarge, ClientGone
        """
        body = await read_body(self._scope, self._receive, most)
        if body is None:
            raise ClientGone
        return body

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What work gives; it is cancelled when the client hangs up first. Only after the body was read.

        Raises:
            ClientGone
        """
        self._watch_client()
        task = asyncio.current_task()
        assert task is not None
        if self._is_gone:
            work.close()
            raise ClientGone
        cancelled_before = task.cancelling()
        self._working = task
        try:
            result = await work
        except asyncio.CancelledError:
            # Ours, if the client has gone and nobody else cancelled it too.
            if self._is_gone and task.uncancel() <= cancelled_before:
                raise ClientGone from None
            raise
        else:
            if self._is_gone and task.cancelling() > cancelled_before:
                task.uncancel()
            return result
        finally:
            self._working = None

    def _watch_client(self) -> None:
        if self._is_watched:
            return
        self._is_watched = True
        if self._connection is not None:
            self._connection.when_lost(self._has_gone)
        else:
            self._watch = asyncio.create_task(self._wait_until_gone())

    def _has_gone(self) -> None:
        self._is_gone = True
        if self._working is not None:
            self._working.cancel()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_gone()

    @property
    def is_gone(self) -> bool:
        """Whether the client is known to have hung up."""
        return self._is_gone

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self._watch is not None:
            self._watch.cancel()
        if self._is_watched and self._connection is not None:
            self._connection.forget(self._has_gone)

    async def start(self, status: int, headers: Headers) -> None:
        """Status and headers of an answer."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_piece(self, piece: bytes) -> None:
        """A piece of the body; an empty one is left out, as it would end the answer."""
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end_stream(self, comment: bytes) -> None:
        """The proper end, with a comment where one can be."""
        await self._send({"type": "http.response.body", "body": comment if self.is_events else b"", "more_body": False})

    async def break_stream(self, problem: Problem, comment: bytes = b"") -> None:
        """The answer ends before its time: with an error event, or, where that cannot be, without a proper end.

        The server closes the connection of an answer that has no end, and the client sees that it is cut.
        """
        if self.is_events:
            refusal = self.wire.stream_refusal(problem, request_id=self.request_id)
            await self._send({"type": "http.response.body", "body": refusal + comment, "more_body": False})

    async def _send(self, message: Message) -> None:
        """Hand a message to the server, which waits while the client does not read.

        Raises:
            ClientGone: it has not read for MOST_SEND_SECONDS.
        """
        if self._connection is not None and not self._connection.is_held_up:
            await self._send_message(message)
            return
        try:
            async with asyncio.timeout(MOST_SEND_SECONDS):
                await self._send_message(message)
        except TimeoutError:
            raise ClientGone from None

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """An answer in one piece."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        # What is handed over at once is copied at once; a large answer goes as the client takes it.
        last = max(0, len(body) - 1) // PIECE_BYTES * PIECE_BYTES
        for place in range(0, last, PIECE_BYTES):
            await self.send_piece(body[place : place + PIECE_BYTES])
        await self._send({"type": "http.response.body", "body": body[last:], "more_body": False})

    async def refuse(self, problem: Problem) -> None:
        """Our own refusal in the vendor's error shape; after the answer has begun, as the last event of the stream."""
        if self.status:
            await self.break_stream(problem)
            return
        headers = [(b"content-type", b"application/json")]
        named = {"x-should-retry": "false"} if problem.status in (401, 402, 403, 404, 422) else {}
        headers += [(name.lower().encode(), value.encode()) for name, value in {**named, **problem.headers}.items()]
        await self.send_whole(problem.status, headers, self.wire.refusal(problem, request_id=self.request_id))
