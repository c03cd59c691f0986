"""Requests to addresses that customers name: to the public internet, and nowhere else.

A customer's address must not reach what only this machine can reach: its own services, its network, the metadata of its
cloud. So a name is resolved once, every address that it has must be public, and the connection goes to those very
addresses, under the name (SNI, Host, certificate): a second answer of the name's server is never asked for. No redirect
is followed, no proxy or cookie is used, and what is read of an answer is bounded.
"""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from typing import Final

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from bursar.problems import Problem
from bursar.settings import Settings

SECONDS: Final = 5.0
"""For all of a request: resolving, connecting, sending, reading."""
LEAVE_SECONDS: Final = 1.0
MOST_ANSWER_BYTES: Final = 64 * 1024
LONGEST_URL: Final = 2_000

# Source: the registries of special-purpose addresses (RFC 6890) and of multicast; 168.63.129.16 is Azure's own host.
_CLOSED_V4: Final = [
    IPv4Network(each)
    for each in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "168.63.129.16/32",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
    )
]
# Global unicast is open, but for: protocol assignments with Teredo, documentation, 6to4.
_OPEN_V6: Final = IPv6Network("2000::/3")
_CLOSED_V6: Final = [IPv6Network(each) for each in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]
# These carry an IPv4 address in their last 32 bits, which is where they lead.
_CARRIES_V4: Final = [IPv6Network(each) for each in ("::ffff:0:0/96", "64:ff9b::/96")]

_PLAIN_V4: Final = re.compile(r"(0|[1-9]\d{0,2})(\.(0|[1-9]\d{0,2})){3}", re.ASCII)
_NUMBER_AT_END: Final = re.compile(r"(^|\.)(\d+|0[xX][0-9a-fA-F]*)\.?$", re.ASCII)
_INSIDE_NAMES: Final = (".local", ".localhost", ".internal", ".intranet", ".lan", ".home.arpa", ".corp", ".home")

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


class AddressNotAllowed(Problem):
    """The address is not one that can be called: not https, another port, credentials in it, or not public."""

    status, code, title = 422, "address_not_allowed", "This address cannot be called"


class Unreachable(Exception):
    """No answer came; says why, without what the other side said."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be called beyond https on port 443 of public addresses."""

    http: bool = False
    """http on port 80."""
    loopback: bool = False
    """This machine too, and http and any port: for tests and development."""

    @classmethod
    def by(cls, settings: Settings) -> "Allowed":
        return cls(http=settings.webhooks_http, loopback=settings.webhooks_loopback)


@cache
def usual_tls() -> ssl.SSLContext:
    """The certificates that this machine trusts; read once, since that takes 30 ms and is asked for every second."""
    return ssl.create_default_context()


class Outside:
    """The client. tls: which certificates are believed; resolve: asks for the addresses of a name."""

    def __init__(self, allowed: Allowed, *, resolve: Resolve | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._allowed = allowed
        self._resolve = resolve or _resolve
        self._tls = tls or usual_tls()

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> int:
        """Post once; the status of the answer.

        Raises:
            AddressNotAllowed: nothing was sent. Unreachable
        """
        where = checked_url(url, self._allowed)
        try:
            async with asyncio.timeout(SECONDS):
                return await self._post(where, body, headers)
        except TimeoutError:
            raise Unreachable(f"no answer within {SECONDS:.0f} seconds") from None
        except socket.gaierror:
            raise Unreachable("the name has no address") from None
        except aiohttp.ClientConnectorCertificateError:
            raise Unreachable("its certificate is not valid for this name") from None
        except (aiohttp.ClientError, OSError, ssl.SSLError, ValueError) as error:
            raise Unreachable(f"no connection, or a broken answer ({type(error).__name__})") from None

    async def _post(self, url: URL, body: bytes, headers: Mapping[str, str]) -> int:
        assert url.raw_host is not None
        assert url.port is not None
        addresses = await self._resolve(url.raw_host, url.port)
        for each in addresses:
            require_public(each, self._allowed)
        connector = aiohttp.TCPConnector(
            resolver=_Known(addresses), ssl=self._tls, force_close=True, use_dns_cache=False
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=SECONDS),
            skip_auto_headers=("User-Agent", "Accept-Encoding"),
        )
        async with session, session.post(url, data=body, headers=headers, allow_redirects=False) as answer:
            # The status is the answer. The rest is taken so that the other side ends in peace; nobody looks at it.
            with suppress(TimeoutError, aiohttp.ClientError):
                async with asyncio.timeout(LEAVE_SECONDS):
                    await _leave(answer.content)
            return answer.status


def checked_url(text: str, allowed: Allowed) -> URL:
    """The address, when it may be called as far as its text tells.

    Raises:
        AddressNotAllowed
    """
    if len(text) > LONGEST_URL or not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise AddressNotAllowed(f"An address has at most {LONGEST_URL} printable ASCII characters, without spaces.")
    try:
        url = URL(text)
        host, port = url.raw_host, url.port
    except ValueError:
        raise AddressNotAllowed("This is no address; write https://hooks.acme.example/bursar.") from None
    if url.scheme not in ("https", "http") or not host:
        raise AddressNotAllowed("An address begins with https:// and has a host.")
    if url.raw_user is not None or url.raw_password is not None or "@" in url.raw_authority:
        raise AddressNotAllowed("An address has no user and no password in it; deliveries are signed instead.")
    if url.raw_fragment:
        raise AddressNotAllowed("An address has no part after #.")
    literal = _literal(host)
    if not allowed.loopback:
        _require_usual(url.scheme, port, allowed)
    if literal is not None:
        require_public(host, allowed)
    elif not allowed.loopback:
        _require_public_name(host)
    return url


def require_public(text: str, allowed: Allowed) -> None:
    """An IP address must lead to the public internet.

    Raises:
        AddressNotAllowed
    """
    address = _literal(text)
    if address is None or not (is_public(address) or (allowed.loopback and _is_loopback(address))):
        raise AddressNotAllowed("This name or address does not lead to the public internet.")


def is_public(address: Address) -> bool:
    """Whether an address leads to the public internet, also where it only carries another."""
    if isinstance(address, IPv4Address):
        return not any(address in each for each in _CLOSED_V4)
    if any(address in each for each in _CARRIES_V4):
        return is_public(IPv4Address(int(address) & 0xFFFF_FFFF))
    return address.scope_id is None and address in _OPEN_V6 and not any(address in each for each in _CLOSED_V6)


def _require_usual(scheme: str, port: int | None, allowed: Allowed) -> None:
    if scheme == "http" and not allowed.http:
        raise AddressNotAllowed("An address begins with https://, since http can be read and changed on its way.")
    if port != (443 if scheme == "https" else 80):
        raise AddressNotAllowed("Only the usual port can be called: 443.")


def _require_public_name(host: str) -> None:
    """A name may not be another way to write a number, nor one that only this network knows."""
    name = host.rstrip(".").lower()
    if _NUMBER_AT_END.search(host) or ":" in host or "%" in host:
        raise AddressNotAllowed("Write an IP address as four plain numbers, or better a name.")
    if "." not in name or name.endswith(_INSIDE_NAMES):
        raise AddressNotAllowed(f"“{name}” is a name of a private network.")


def _literal(host: str) -> Address | None:
    """The IP address that a host is, in its one plain form; None for anything else."""
    try:
        if ":" in host:
            return ip_address(host.strip("[]"))
        return ip_address(host) if _PLAIN_V4.fullmatch(host) else None
    except ValueError:
        return None


def _is_loopback(address: Address) -> bool:
    return address in (IPv4Address("127.0.0.1"), IPv6Address("::1"))


class _Known(AbstractResolver):
    """Answers with addresses that were asked for and checked before."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=each,
                port=port,
                family=socket.AF_INET6 if ":" in each else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST,
            )
            for each in self._addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


async def _resolve(host: str, port: int) -> Sequence[str]:
    """Every address of a name; a literal is its own."""
    literal = _literal(host)
    if literal is not None:
        return [str(literal)]
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


async def _leave(content: aiohttp.StreamReader) -> None:
    """Read an answer's first 64 KB."""
    rest = MOST_ANSWER_BYTES
    while rest > 0 and (piece := await content.read(rest)):
        rest -= len(piece)
