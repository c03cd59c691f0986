"""What the server's connections write, and in which order."""

import asyncio
from collections.abc import Callable
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from bursar.asgi import Protocol, Receive, Scope, Send

REQUEST = b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: 2\r\n\r\n{}"
ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\ndone"


class Wire(asyncio.Transport):
    """Notes what a connection does, and when."""

    def __init__(self, name: str, notes: list[tuple[str, bytes]]) -> None:
        super().__init__()
        self._name = name
        self._notes = notes
        self._is_closing = False

    def write(self, data: Any) -> None:
        self._notes.append((self._name, bytes(data)))

    def close(self) -> None:
        if not self._is_closing:
            self._is_closing = True
            self._notes.append((self._name, b"closed"))

    def is_closing(self) -> bool:
        return self._is_closing

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Opened:
    """Connections whose requests are all answered when the test says so, in one turn of the loop."""

    def __init__(self) -> None:
        self.notes: list[tuple[str, bytes]] = []
        self.may_answer = asyncio.Event()
        self.pieces: list[bytes] = [b"done"]
        self._after: list[Callable[[], None]] = []

    def connection(self, name: str) -> Protocol:
        config = Config(self._app, interface="asgi3", http=Protocol, server_header=False)
        config.load()
        protocol = Protocol(config, ServerState(), {})
        protocol.connection_made(Wire(name, self.notes))
        return protocol

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await self.may_answer.wait()
        length = b"%d" % sum(map(len, self.pieces))
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]})
        for number, piece in enumerate(self.pieces, 1):
            await send({"type": "http.response.body", "body": piece, "more_body": number < len(self.pieces)})
            if number < len(self.pieces):
                await asyncio.sleep(0.001)
        self.notes.append(("app", b"has answered"))
        for each in self._after:
            each()

    def afterwards(self, act: Callable[[], None]) -> None:
        """In the turn of the answer, when the application is done."""
        self._after.append(act)

    async def answer(self) -> list[tuple[str, bytes]]:
        await asyncio.sleep(0.01)
        self.may_answer.set()
        await asyncio.sleep(0.01)
        return self.notes


async def test_what_is_answered_in_one_turn_goes_out_at_its_end_and_each_in_one_piece() -> None:
    opened = Opened()
    for name in ("a", "b"):
        opened.connection(name).data_received(REQUEST)
    said = ("app", b"has answered")
    assert await opened.answer() == [said, said, ("a", ANSWER), ("b", ANSWER)]


async def test_the_answer_goes_out_before_the_server_ends() -> None:
    opened = Opened()
    connection = opened.connection("a")
    connection.data_received(REQUEST)
    opened.afterwards(connection.shutdown)
    assert (await opened.answer())[1:] == [("a", ANSWER), ("a", b"closed")]


async def test_the_answer_goes_out_before_the_connection_of_a_client_that_says_no_more_is_closed() -> None:
    opened = Opened()
    connection = opened.connection("a")
    connection.data_received(REQUEST)
    opened.afterwards(connection.eof_received)
    opened.afterwards(connection.transport.close)  # as the loop does then
    assert (await opened.answer())[1:] == [("a", ANSWER), ("a", b"closed")]


async def test_the_answer_goes_out_before_that_to_what_is_no_request() -> None:
    opened = Opened()
    connection = opened.connection("a")
    connection.data_received(REQUEST)
    opened.afterwards(lambda: connection.data_received(b"\0"))
    notes = (await opened.answer())[1:]
    assert notes[0] == ("a", ANSWER)
    assert notes[1][1].startswith(b"HTTP/1.1 400")


async def test_what_comes_in_later_turns_is_written_at_once() -> None:
    opened = Opened()
    opened.pieces = [b"do", b"ne"]
    opened.connection("a").data_received(REQUEST)
    assert await opened.answer() == [("a", ANSWER[:-2]), ("a", b"ne"), ("app", b"has answered")]
