"""Connections to providers: HTTP/1.1, one request at a time on each, kept open for the next one.

A call that needs nothing of a client library but its bytes on the way and back costs a third of what the best of them
takes (docs/decisions/0014-calls-to-providers.md). Parsing is httptools', which the server itself runs on; connecting to
whichever address answers first is aiohappyeyeballs'; TLS is Python's, with the system's certificates.

Nothing is repeated, followed or stored here, and no proxy is taken from the environment.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import cache
from typing import Any, Final, NamedTuple

import aiohappyeyeballs
import httptools

IDLE_SECONDS: Final = 15.0
"""A connection that nobody has used for so long is closed: providers and what lies between drop them without a word."""

KNOWN_SECONDS: Final = 10.0
"""How long the addresses of a name are remembered."""

LARGEST_HEAD: Final = 65_536
MOST_WAITING_BYTES: Final = 256 * 1024
"""Of an answer that nobody takes; then the provider has to wait."""

PIECE_BYTES: Final = 64 * 1024
"""What is written at once of a large body, so that its encryption does not hold up every other call."""

NEXT_ADDRESS_SECONDS: Final = 0.25
_LENIENT: Final = {
    "lenient_headers": True,
    "lenient_optional_cr_before_lf": True,
    "lenient_spaces_after_chunk_size": True,
}

Headers = list[tuple[bytes, bytes]]


class NotReached(Exception):
    """There is no connection; nothing was sent."""


class NotReachedInTime(NotReached):
    """The other side did not take the connection within the limit."""


class BrokenOff(Exception):
    """The connection ended before the answer did, or what came is no HTTP."""


class Place(NamedTuple):
    """Where a connection leads."""

    host: str
    port: int
    is_tls: bool


class Connection(asyncio.Protocol):
    """One connection. `send`, then `head`, then `piece` until it is empty; then it is given back.

    status, headers: of the answer once `head` has returned; names in lower case.
    """

    def __init__(self, place: Place, lost: Callable[[Connection], None]) -> None:
        self.place = place
        self.status = 0
        self.headers: Headers = []
        self.used = 0
        self.idle_since = 0.0
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._parser: Any = httptools.HttpResponseParser(self)
        self._parser.set_dangerous_leniencies(**_LENIENT)
        self._waiter: asyncio.Future[None] | None = None
        self._until = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_asked = False
        self._is_reading = True
        self._is_writing = True  # false: what was written waits until the other side takes it
        self._is_lost = False
        self._begin()
        self._is_whole = True

    def _begin(self) -> None:
        self.status = 0
        self.headers = []
        self._has_head = self._is_whole = self._may_stay = self._is_sent = False
        self._ends_with_connection = False
        self._head_size = self._waiting_bytes = 0
        self._pieces: list[bytes] = []
        self._fault: BrokenOff | None = None

    # -- what the event loop tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is open."""
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        """Bytes of an answer; what nobody asked for ends the connection."""
        if not self._is_asked or self._is_whole:
            self._may_stay = False
            self._transport.close()
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            # After a whole answer it is no fault of that one.
            self._may_stay = False
            if not self._is_whole:
                self._break(BrokenOff(f"what came is no answer: {type(error).__name__}"))
        if not self._has_head:
            self._head_size += len(data)
            if self._head_size > LARGEST_HEAD:
                self._break(BrokenOff("its head is too large"))
        if self._waiting_bytes > MOST_WAITING_BYTES and self._is_reading and not self._is_whole:
            self._is_reading = False
            self._transport.pause_reading()
        self._wake()

    def connection_lost(self, error: Exception | None) -> None:
        """It is closed, by whichever side."""
        self._is_lost = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._is_asked and not self._is_whole and self._fault is None:
            if self._has_head and self._ends_with_connection and error is None:
                self._is_whole = True
            else:
                self._fault = BrokenOff("the connection was closed")
        self._parser = None  # they hold each other
        self._wake()
        self._lost(self)

    def pause_writing(self) -> None:
        """The other side takes no more for now."""
        self._is_writing = False

    def resume_writing(self) -> None:
        """It does again."""
        self._is_writing = True
        self._wake()

    # -- what the parser tells

    def on_message_begin(self) -> None:
        """A head begins; after one of 1xx the true one."""
        if not self._has_head:
            self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer, which is left out."""
        if not self._has_head:
            self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        """The head is whole."""
        if self._has_head:
            return
        status = self._parser.get_status_code()
        if status >= 200:
            self.status = status
            self._has_head = True
            self._ends_with_connection = not any(
                name == b"content-length" or (name == b"transfer-encoding" and value.lower().endswith(b"chunked"))
                for name, value in self.headers
            )

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._is_whole:
            self._may_stay = False
            return
        self._pieces.append(body)
        self._waiting_bytes += len(body)

    def on_message_complete(self) -> None:
        """The answer is whole, unless it was one of 1xx."""
        if self._has_head and not self._is_whole:
            self._may_stay = self._parser.should_keep_alive()
            self._is_whole = True
        elif self._is_whole:
            self._may_stay = False

    # -- what a call does

    @property
    def is_open(self) -> bool:
        """Whether a request can be sent on it."""
        return not self._is_lost and not self._transport.is_closing()

    @property
    def has_answered(self) -> bool:
        """Whether any byte of an answer has come."""
        return self._has_head or self._head_size > 0

    @property
    def can_stay(self) -> bool:
        """Whether the next request can go over it."""
        return self._is_whole and self._may_stay and self._is_sent and self.is_open

    async def send(self, head: bytes, body: bytes, until: float) -> None:
        """Send a request. until: of the loop's clock; a large body takes long.

        Raises:
            BrokenOff, TimeoutError
        """
        self._begin()
        self._is_asked = True
        self.used += 1
        if self._is_lost:
            self._fault = BrokenOff("the connection was closed")
            raise self._fault
        if len(body) <= PIECE_BYTES:
            self._transport.write(head + body if body else head)
            self._is_sent = True
            return
        self._transport.write(head)
        view = memoryview(body)
        for place in range(0, len(body), PIECE_BYTES):
            self._transport.write(view[place : place + PIECE_BYTES])
            while not self._is_writing:
                if self._has_head or self._fault is not None:
                    return  # answered before all was sent: whoever refuses need not read
                await self._wait(until)
            await asyncio.sleep(0)
        self._is_sent = True

    async def head(self, until: float) -> None:
        """Until status and headers have come. until: of the loop's clock.

        Raises:
            BrokenOff, TimeoutError
        """
        while not self._has_head:
            if self._fault is not None:
                raise self._fault
            await self._wait(until)

    def here(self) -> bytes:
        """What of the body has come; b'' where nothing has at the moment."""
        pieces = self._pieces
        if not pieces:
            return b""
        self._pieces, self._waiting_bytes = [], 0
        if not self._is_reading:
            self._is_reading = True
            if self.is_open:
                self._transport.resume_reading()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    @property
    def is_at_end(self) -> bool:
        """Whether all of the body has come and was taken."""
        return self._is_whole and not self._pieces

    async def piece(self, until: float) -> bytes:
        """More of the body, as it comes; b'' after its end. What came before a fault is given before it.

        Raises:
            BrokenOff, TimeoutError
        """
        while True:
            if self._pieces:
                return self.here()
            if self._is_whole:
                return b""
            if self._fault is not None:
                raise self._fault
            await self._wait(until)

    def close(self) -> None:
        """End it, whatever is under way."""
        self._may_stay = False
        if not self._is_lost:
            # What waits to be written goes nowhere any more, and the other side is to know at once.
            (self._transport.close if self._is_whole else self._transport.abort)()

    def _break(self, fault: BrokenOff) -> None:
        if self._fault is None:
            self._fault = fault
        self._may_stay = False
        self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _wait(self, until: float) -> None:
        """Until something has happened. One timer serves many waits: it looks at its hour whether it is due."""
        self._until = until
        if self._timer is None or self._timer.when() > until:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self._loop.call_at(until, self._ring)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _ring(self) -> None:
        self._timer = None
        if self._waiter is None or self._waiter.done():
            return
        if self._loop.time() >= self._until:
            self._waiter.set_exception(TimeoutError())
        else:
            self._timer = self._loop.call_at(self._until, self._ring)


class Connections:
    """The connections of one event loop. most: in use at once; whoever comes then waits."""

    def __init__(self, *, most: int, connect_seconds: float) -> None:
        self._connect_seconds = connect_seconds
        self._room = asyncio.Semaphore(most)
        self._open: set[Connection] = set()
        self._idle: dict[Place, dict[Connection, None]] = {}
        self._sweeper: asyncio.TimerHandle | None = None
        self._known: dict[Place, tuple[float, list[Any]]] = {}

    async def take(self, place: Place, until: float) -> Connection:
        """A connection to a place, open already or new. until: of the loop's clock. Give it back.

        Raises:
            NotReached, TimeoutError
        """
        if self._room.locked():
            async with asyncio.timeout_at(until):
                await self._room.acquire()
        else:
            await self._room.acquire()
        try:
            return self._idle_one(place) or await self._connect(place)
        except BaseException:
            self._room.release()
            raise

    def give_back(self, connection: Connection) -> None:
        """It is kept for the next call, or closed where its answer was not read to its end."""
        self._room.release()
        if not (connection.can_stay and connection.is_at_end):
            connection.close()
            return
        loop = asyncio.get_running_loop()
        connection.idle_since = loop.time()
        self._idle.setdefault(connection.place, {})[connection] = None
        if self._sweeper is None:
            self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep)

    async def close(self) -> None:
        """Close all of them."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        for connection in tuple(self._open):
            connection.close()
        await asyncio.sleep(0)

    def _idle_one(self, place: Place) -> Connection | None:
        """The one that was used last."""
        idle = self._idle.get(place)
        while idle:
            connection, _ = idle.popitem()
            if connection.is_open and asyncio.get_running_loop().time() < connection.idle_since + IDLE_SECONDS:
                return connection
            connection.close()
        return None

    def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        at = loop.time()
        for idle in self._idle.values():
            for connection in [each for each in idle if at >= each.idle_since + IDLE_SECONDS]:
                del idle[connection]
                connection.close()
        self._idle = {place: idle for place, idle in self._idle.items() if idle}
        self._sweeper = loop.call_later(IDLE_SECONDS, self._sweep) if self._idle else None

    def _forget(self, connection: Connection) -> None:
        self._open.discard(connection)
        idle = self._idle.get(connection.place)
        if idle is not None:
            idle.pop(connection, None)

    async def _connect(self, place: Place) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            addresses = await self._addresses(place)
            async with _in_time(self._connect_seconds):
                sock = await aiohappyeyeballs.start_connection(
                    addresses, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS, interleave=1, loop=loop
                )
            try:
                async with _in_time(self._connect_seconds):
                    _, connection = await loop.create_connection(
                        lambda: Connection(place, self._forget),
                        sock=sock,
                        ssl=_tls() if place.is_tls else None,
                        server_hostname=place.host if place.is_tls else None,
                    )
            except BaseException:
                sock.close()
                raise
        except (OSError, UnicodeError) as error:
            self._known.pop(place, None)
            raise NotReached(type(error).__name__) from error
        self._open.add(connection)
        return connection

    async def _addresses(self, place: Place) -> list[Any]:
        loop = asyncio.get_running_loop()
        known_until, addresses = self._known.get(place, (0.0, []))
        if loop.time() >= known_until:
            async with _in_time(self._connect_seconds):
                addresses = await loop.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM)
            self._known[place] = loop.time() + KNOWN_SECONDS, addresses
        return addresses


@asynccontextmanager
async def _in_time(seconds: float) -> AsyncIterator[None]:
    """A step of connecting; the system's own limit of a step is the same fault."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError as error:
        raise NotReachedInTime from error


@cache
def _tls() -> ssl.SSLContext:
    context = ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context
