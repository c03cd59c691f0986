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
import io
import re
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from types import TracebackType
from typing import Final, Self
from urllib.parse import quote

import aiohttp
from yarl import URL

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
_LARGE_BODY: Final = 512 * 1024


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

    def url(self, path: str) -> URL:
        """The address of a path."""
        assert self.provider.base_url is not None
        return _url(self.provider.base_url, self.model, self.provider.query, path)

    def credentials(self, path: str) -> dict[str, str]:
        """The header that opens the provider."""
        auth = self.provider.auth
        if self.secret is None or auth == "none":
            return {}
        if auth == "vendor":
            auth = "x-api-key" if path.startswith(_MESSAGES_PATH) else "bearer"  # type: ignore[assignment]
        return {"Authorization": f"Bearer {self.secret}"} if auth == "bearer" else {auth: self.secret}


@lru_cache(maxsize=4_096)
def _url(base_url: str, model: str, query: str, path: str) -> URL:
    if MODEL_PLACE in base_url:
        # Encoded whole: a name is one segment, whatever is in it, and leads nowhere else.
        base_url = base_url.replace(MODEL_PLACE, quote(model, safe=""))
    return URL(f"{base_url}{path}{f'?{query}' if query else ''}", encoded=True)


class Answer:
    """A provider's answer whose head has come. Close it, read or not."""

    def __init__(self, response: aiohttp.ClientResponse, target: Target, limits: Limits, deadline: float) -> None:
        self.status = response.status
        self.headers = _returned(response)
        self._response = response
        self._target = target
        self._limits = limits
        self._deadline = deadline

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
        # One buffer: the pieces of an image of tens of megabytes would stay in the memory after it is gone.
        buffer = bytearray()
        async for piece in self.pieces():
            buffer += piece
            if len(buffer) > MOST_ANSWER_BYTES:
                raise UpstreamBroken(f"The answer of {self._target.provider.name} is too large.")
        body = bytes(buffer)
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
        content = self._response.content
        if content.exception() is None:
            if content.at_eof():
                return b""
            here = content.read_nowait(-1)
            if here:
                return here
        until = min(self._deadline, asyncio.get_running_loop().time() + self._limits.idle_seconds)
        with _translated(self._target):
            async with asyncio.timeout_at(until):
                content = self._response.content
                # A stream that has broken gives only its error, but what came before is used, and paid for, too.
                if content.exception() is not None and (rest := content._read_nowait(-1)):
                    return rest
                return await content.readany()

    async def close(self) -> None:
        """Give the connection back; one whose answer was not read to its end is closed, which ends the call."""
        if self._response.content.at_eof():
            self._response.release()
        else:
            self._response.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Upstream:
    """The connections to all providers. One for each event loop; ended by `close`."""

    def __init__(self, limits: Limits | None = None) -> None:
        self._limits = limits or Limits()
        self._session: aiohttp.ClientSession | None = None

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
        if self._session is not None:
            await self._session.close()

    async def _request(
        self, method: str, target: Target, path: str, headers: dict[str, str], body: bytes | None
    ) -> Answer:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._limits.total_seconds
        # aiohttp writes large bytes in one go, which would hold up every other call; files it writes in pieces.
        data = io.BytesIO(body) if body is not None and len(body) > _LARGE_BODY else body
        with _translated(target):
            async with asyncio.timeout(self._limits.first_byte_seconds):
                response = await self._open_session().request(
                    method, target.url(path), headers=headers, data=data, allow_redirects=False
                )
        if 300 <= response.status < 400:
            response.close()
            raise UpstreamBroken(f"{target.provider.name} answered with a redirect, which is not followed.")
        if response.status >= 600:
            response.close()
            raise UpstreamBroken(f"{target.provider.name} answered with a status that HTTP does not have.")
        return Answer(response, target, self._limits, deadline)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            limits = self._limits
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=limits.connections, keepalive_timeout=15),
                # Waiting for the head and for each piece has its own limits, above.
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=limits.connect_seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                headers={"User-Agent": "bursar", "Accept-Encoding": "identity"},
                trust_env=False,
                auto_decompress=True,
            )
        return self._session


def _forwarded(target: Target, path: str, client_headers: Mapping[bytes, str]) -> dict[str, str]:
    headers = {name.decode(): client_headers[name] for name in FORWARDED if name in client_headers}
    if path.startswith(_MESSAGES_PATH):
        headers.setdefault("anthropic-version", ANTHROPIC_VERSION)
    directions = client_headers.get(DIRECTIONS_HEADER.lower().encode())
    if directions is not None and target.provider.name == DEMO:
        headers[DIRECTIONS_HEADER] = directions
    return headers | dict(target.provider.headers) | target.credentials(path)


def _returned(response: aiohttp.ClientResponse) -> list[tuple[bytes, bytes]]:
    """Headers for the client, names in lower case; without those that could not be passed on as they are."""
    raw = {name.lower(): value for name, value in reversed(response.raw_headers) if not _CONTROLS.search(value)}
    headers: list[tuple[bytes, bytes]] = [(name, raw[name]) for name in RETURNED if name in raw]
    request_id = raw.get(b"x-request-id") or raw.get(b"request-id")
    if request_id is not None:
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
    except (TimeoutError, aiohttp.ServerTimeoutError) as error:
        if isinstance(error, aiohttp.ConnectionTimeoutError):
            raise ProviderUnreachable(f"{name} did not take the connection in time.") from error
        raise ProviderTimeout(f"{name} did not answer in time.") from error
    except aiohttp.ClientConnectorError as error:
        raise ProviderUnreachable(f"No connection to {name}.") from error
    except (aiohttp.ClientError, OSError) as error:
        raise UpstreamBroken(f"{name} broke off.") from error
