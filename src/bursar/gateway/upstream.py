"""Calls to providers: one pool of connections, time limits, and what headers pass in each direction.

To a provider go: the body, `content-type`, its own key, the headers that the operator fixed for it, and of the client's
headers only those of FORWARDED. The client's credentials, cookies and addresses do not. `openai-organization` and
`openai-project` do not either: they would choose an account within the key's, which is the operator's to choose.

To the client come: status, body, and of the provider's headers only those of RETURNED. Rate-limit headers and
`openai-organization` do not: they tell of the account at the provider. The provider's own request id comes back as
`bursar-provider-request-id`, since `x-request-id` is ours. Compression is undone here.

Redirects are never followed, no proxy or cookie is taken from the environment, and no call is repeated here (`relay`
asks again, where a route says so).
"""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import quote

from yarl import URL

from bursar.gateway.connections import BrokenOff, Connection, Connections, Headers, NotReached, NotReachedInTime, Place
from bursar.gateway.demo_answers import DIRECTIONS_HEADER
from bursar.gateway.providers import DEMO, MODEL_PLACE, Provider
from bursar.gateway.wire import JSON
from bursar.problems import Problem

FORWARDED: Final = (b"anthropic-version", b"anthropic-beta", b"openai-beta")
RETURNED: Final = (
    b"content-type",
    b"retry-after",
    b"retry-after-ms",
    b"x-should-retry",
    b"openai-processing-ms",
    b"openai-version",
)
PROVIDER_REQUEST_ID: Final = b"bursar-provider-request-id"
ANTHROPIC_VERSION: Final = "2023-06-01"
MOST_ANSWER_BYTES: Final = 256 * 1024 * 1024
"""Ten large images in base64, or 2,048 embeddings of 3,072 dimensions written out, come to half of it."""
_MESSAGES_PATH: Final = "/messages"
_UNPACKED_BYTES: Final = 1024 * 1024
"""Of a compressed answer at once: a few bytes may stand for very many."""

_OUR_HEADERS: Final = {"User-Agent": "bursar", "Accept": "*/*", "Accept-Encoding": "identity"}
_MAY_BE_REPEATED: Final = ("GET", "DELETE")


class UpstreamBroken(Problem):
    """The provider could not be reached, or its answer did not come or broke off."""

    status, code, title = 502, "provider_broke_off", "The provider's answer did not come"


class ProviderUnreachable(UpstreamBroken):
    """No connection to the provider: the call was not made."""

    status, code, title = 502, "provider_unreachable", "The provider cannot be reached"


class ProviderTimeout(UpstreamBroken):
    """The provider took longer than the time limit."""

    status, code, title = 504, "provider_timeout", "The provider took too long"


class ProviderRefusesUs(UpstreamBroken):
    """The provider does not accept the platform's own key, which is nothing that the client can mend."""

    status, code, title = 502, "provider_refuses_us", "The provider does not accept this installation's key"


@dataclass(frozen=True, slots=True)
class Limits:
    """Time limits in seconds; the first byte of a plain answer comes when all of it is made."""

    connect_seconds: float = 5.0
    first_byte_seconds: float = 600.0
    idle_seconds: float = 120.0
    """Longest pause between two pieces of an answer."""
    total_seconds: float = 3_600.0
    connections: int = 4_096
    """Most connections at once, of all providers together."""


@dataclass(frozen=True, slots=True)
class Target:
    """Whom to call, and with which key. secret: None where the provider takes none; model: its name of the model."""

    provider: Provider
    secret: str | None = field(default=None, repr=False)
    is_own_key: bool = False
    model: str = ""

    def address(self, path: str) -> Address:
        """Where a path is."""
        assert self.provider.base_url is not None
        return _address(self.provider.base_url, self.model, self.provider.query, path)

    def credentials(self, path: str) -> dict[str, str]:
        """The header that opens the provider."""
        auth = self.provider.auth
        if self.secret is None or auth == "none":
            return {}
        if auth == "vendor":
            auth = "x-api-key" if path.startswith(_MESSAGES_PATH) else "bearer"  # type: ignore[assignment]
        return {"Authorization": f"Bearer {self.secret}"} if auth == "bearer" else {auth: self.secret}


class Address(NamedTuple):
    """An address, taken apart. line: what follows the method in a request, and its header Host."""

    place: Place
    line: str


@lru_cache(maxsize=4_096)
def _address(base_url: str, model: str, query: str, path: str) -> Address:
    if MODEL_PLACE in base_url:
        # Encoded whole: a name is one segment, whatever is in it, and leads nowhere else.
        base_url = base_url.replace(MODEL_PLACE, quote(model, safe=""))
    url = URL(f"{base_url}{path}{f'?{query}' if query else ''}", encoded=True)
    assert url.raw_host is not None
    assert url.port is not None
    place = Place(url.raw_host, url.port, url.scheme == "https")
    return Address(place, f"{url.raw_path_qs} HTTP/1.1\r\nHost: {url.host_port_subcomponent}\r\n")


class Answer:
    """A provider's answer whose head has come. Close it, read or not."""

    def __init__(
        self, connection: Connection, connections: Connections, target: Target, limits: Limits, deadline: float
    ) -> None:
        self.status = connection.status
        self.headers = _returned(connection.headers)
        self._connection = connection
        self._connections = connections
        self._target = target
        self._limits = limits
        self._deadline = deadline
        self._is_closed = False
        self._packed = _Packed.of(connection.headers)

    @property
    def is_json(self) -> bool:
        """Whether it is one JSON document, whatever was asked for."""
        return self._content_type.startswith(b"application/json")

    @property
    def is_events(self) -> bool:
        """Whether it says that it is a stream of events."""
        return self._content_type.startswith(b"text/event-stream")

    @property
    def _content_type(self) -> bytes:
        return dict(self.headers).get(b"content-type", b"").lower()

    async def read(self) -> bytes:
        """The whole body; of an error, without what identifies the platform's account.

        Raises:
            UpstreamBroken: it broke off, took too long, or is larger than MOST_ANSWER_BYTES.
            ProviderRefusesUs: the provider refuses the platform's key.
        """
        connection = self._connection
        body = connection.here() if self._packed is None else b""
        if not connection.is_at_end or self._packed is not None:
            # One buffer: the pieces of an image of tens of megabytes would stay in the memory after it is gone.
            buffer = bytearray(body)
            async for piece in self.pieces():
                buffer += piece
                if len(buffer) > MOST_ANSWER_BYTES:
                    break
            body = bytes(buffer)
        if len(body) > MOST_ANSWER_BYTES:
            raise UpstreamBroken(f"The answer of {self._target.provider.name} is too large.")
        if self.status < 400 or self._target.is_own_key:
            return body
        if self.status in (401, 402, 403):
            raise ProviderRefusesUs(f"{self._target.provider.name} answered {self.status}. Tell the operator.")
        if self._target.secret is not None:
            body = body.replace(self._target.secret.encode(), b"[removed]")
        return without_account(body)

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body as it comes, cut anywhere, decompressed.

        Raises:
            UpstreamBroken: it broke off or took too long.
        """
        while piece := await self._next_piece():
            yield piece

    async def _next_piece(self) -> bytes:
        if self._packed is None:
            return self._connection.here() or await self._awaited()
        while not (piece := self._packed.more()):
            packed = await self._awaited()
            if not packed:
                break
            self._packed.feed(packed)
        if not piece and self._packed.is_cut:
            raise UpstreamBroken(f"{self._target.provider.name} broke off.")
        return piece

    async def _awaited(self) -> bytes:
        if self._connection.is_at_end:
            return b""
        until = min(self._deadline, asyncio.get_running_loop().time() + self._limits.idle_seconds)
        with _translated(self._target):
            return await self._connection.piece(until)

    async def close(self) -> None:
        """Give the connection back; one whose answer was not read to its end is closed, which ends the call."""
        if not self._is_closed:
            self._is_closed = True
            self._connections.give_back(self._connection)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class _Packed:
    """Undoes the compression of an answer, though none was asked for."""

    def __init__(self, coding: bytes) -> None:
        self._coding = coding
        self._unpacker: zlib._Decompress | None = None
        self._rest = b""

    @classmethod
    def of(cls, headers: Headers) -> _Packed | None:
        """Of an answer with these headers; None: it is not compressed.

        Raises:
            UpstreamBroken: in a way that nobody asked for and nobody here can read.
        """
        codings = b",".join(value for name, value in headers if name == b"content-encoding").strip().lower()
        if codings in (b"", b"identity"):
            return None
        if codings not in (b"gzip", b"x-gzip", b"deflate"):
            raise UpstreamBroken("The provider's answer is compressed in a way that was not asked for.")
        return cls(codings)

    def feed(self, data: bytes) -> None:
        """Compressed bytes."""
        self._rest += data

    def more(self) -> bytes:
        """Some of what they stand for; b'': more must be fed first.

        Raises:
            UpstreamBroken
        """
        while self._rest:
            if self._unpacker is None or self._unpacker.eof:
                self._unpacker = zlib.decompressobj(self._window())
            try:
                piece = self._unpacker.decompress(self._rest, _UNPACKED_BYTES)
            except zlib.error as error:
                raise UpstreamBroken("The provider's answer cannot be unpacked.") from error
            self._rest = self._unpacker.unused_data if self._unpacker.eof else self._unpacker.unconsumed_tail
            if piece:
                return piece
        return b""

    @property
    def is_cut(self) -> bool:
        """Whether what was fed ends in its middle."""
        return self._unpacker is not None and not self._unpacker.eof

    def _window(self) -> int:
        """What zlib calls wbits. Some send 'deflate' without its head, which says in its low bits that it is one."""
        if self._coding != b"deflate":
            return 16 + zlib.MAX_WBITS
        return zlib.MAX_WBITS if self._rest[0] & 0xF == 8 else -zlib.MAX_WBITS


class Upstream:
    """The connections to all providers. One for each event loop; ended by `close`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._connections = Connections(most=self._limits.connections, connect_seconds=self._limits.connect_seconds)

    async def call(
        self,
        target: Target,
        path: str,
        body: bytes,
        client_headers: Mapping[bytes, str],
        *,
        content_type: str = JSON,
    ) -> Answer:
        """POST a body; returns when status and headers have come.

        path: as `wire.PATH`. client_headers: names in lower case.

        Raises:
            ProviderUnreachable: nothing was sent. ProviderTimeout, UpstreamBroken: no answer came; the provider may
                have worked all the same.
        """
        headers = _forwarded(target, path, client_headers)
        headers["Content-Type"] = content_type
        return await self._request("POST", target, path, headers, body)

    async def delete(self, target: Target, path: str) -> Answer:
        """DELETE a path.

        Raises:
            UpstreamBroken
        """
        return await self._request("DELETE", target, path, _forwarded(target, path, {}), None)

    async def get(self, target: Target, path: str) -> Answer:
        """GET a path, such as /models.

        Raises:
            UpstreamBroken
        """
        return await self._request("GET", target, path, _forwarded(target, path, {}), None)

    async def close(self) -> None:
        """Close all connections."""
        await self._connections.close()

    async def _request(
        self, method: str, target: Target, path: str, headers: dict[str, str], body: bytes | None
    ) -> Answer:
        at = asyncio.get_running_loop().time()
        address = target.address(path)
        head = _head(method, address, headers, body)
        with _translated(target):
            connection = await self._asked(
                method, address.place, head, body or b"", at + self._limits.first_byte_seconds
            )
        try:
            if 300 <= connection.status < 400:
                raise UpstreamBroken(f"{target.provider.name} answered with a redirect, which is not followed.")
            if connection.status >= 600:
                raise UpstreamBroken(f"{target.provider.name} answered with a status that HTTP does not have.")
            return Answer(connection, self._connections, target, self._limits, at + self._limits.total_seconds)
        except UpstreamBroken:
            connection.close()
            self._connections.give_back(connection)
            raise

    async def _asked(self, method: str, place: Place, head: bytes, body: bytes, until: float) -> Connection:
        """A connection on which the head of the answer has come.

        Raises:
            NotReached, BrokenOff, TimeoutError
        """
        while True:
            connection = await self._connections.take(place, until)
            try:
                await connection.send(head, body, until)
                await connection.head(until)
            except BaseException as error:
                connection.close()
                self._connections.give_back(connection)
                # One that was open already may have been closed at that very moment.
                was_open = connection.used > 1 and not connection.has_answered
                if not (isinstance(error, BrokenOff) and was_open and method in _MAY_BE_REPEATED):
                    raise
            else:
                return connection


def _head(method: str, address: Address, headers: Mapping[str, str], body: bytes | None) -> bytes:
    """The head of a request.

    Raises:
        ValueError: a header has the end of a line in it.
    """
    lines = [f"{name}: {value}" for name, value in headers.items()]
    text = "\n".join(lines)
    if text.count("\n") != len(lines) - 1 or "\r" in text or "\0" in text:
        raise ValueError("a header has characters that no header has")
    length = "" if body is None else f"\r\nContent-Length: {len(body)}"
    text = text.replace("\n", "\r\n")
    return f"{method} {address.line}{text}{length}\r\n\r\n".encode()


def _forwarded(target: Target, path: str, client_headers: Mapping[bytes, str]) -> dict[str, str]:
    headers = {name.decode(): client_headers[name] for name in FORWARDED if name in client_headers}
    if path.startswith(_MESSAGES_PATH):
        headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
    directions = client_headers.get(DIRECTIONS_HEADER.lower().encode())
    if directions is not None and target.provider.name == DEMO:
        headers[DIRECTIONS_HEADER] = directions
    return _OUR_HEADERS | headers | dict(target.provider.headers) | target.credentials(path)


def _returned(answered: Headers) -> Headers:
    """Headers for the client, names in lower case; without those that could not be passed on as they are."""
    raw = dict(reversed(answered))  # of one that comes twice the first
    headers: Headers = [(name, raw[name]) for name in RETURNED if name in raw and not _CONTROLS.search(raw[name])]
    request_id = raw.get(b"x-request-id") or raw.get(b"request-id")
    if request_id is not None and not _CONTROLS.search(request_id):
        headers.append((PROVIDER_REQUEST_ID, request_id))
    return headers


_CONTROLS: Final = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_ACCOUNT: Final = re.compile(rb"\b(?:(?:org|user)-[A-Za-z0-9]{12,}|proj_[A-Za-z0-9]{12,}|sk-[A-Za-z0-9_*.-]{6,})")


def without_account(body: bytes) -> bytes:
    """An error body without ids of accounts and projects and parts of keys, which vendors put into their messages."""
    return _ACCOUNT.sub(b"[removed]", body)


@contextmanager
def _translated(target: Target) -> Iterator[None]:
    """Faults of the connection as problems, which tell nothing of addresses and keys."""
    name = target.provider.name
    try:
        yield
    except NotReachedInTime as error:
        raise ProviderUnreachable(f"{name} did not take the connection in time.") from error
    except NotReached as error:
        raise ProviderUnreachable(f"No connection to {name}.") from error
    except TimeoutError as error:
        raise ProviderTimeout(f"{name} did not answer in time.") from error
    except (BrokenOff, OSError) as error:
        raise UpstreamBroken(f"{name} broke off.") from error
