"""Providers: where calls can go, in which format, and how their addresses are checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.problems import Problem

QUERIES = db.load_queries("bursar.gateway")

Kind = Literal["openai", "anthropic", "both"]
Auth = Literal["vendor", "bearer", "api-key", "none"]

DEMO: Final = "demo"
FIRST_POSITION: Final = 100
USUAL_BATCH_PRICE_PPM: Final = 500_000
"""Half. Source: OpenAI, "Batch API"; Anthropic, "Batch processing"."""
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


class InvalidProvider(Problem):
    """A provider's name, kind or way of authentication is none that is known."""

    status, code, title = 422, "invalid_provider", "This provider cannot be added"


class InvalidBaseUrl(Problem):
    """A provider's address is not https (or http on this machine), or has parts that an address must not have."""

    status, code, title = 422, "invalid_base_url", "This address cannot be used"


class ProviderNotFound(Problem):
    """No provider of this name."""

    status, code, title = 404, "provider_not_found", "No such provider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider of models.

    kind            formats that it speaks
    base_url        what its paths are appended to, '…/v1'; None for `demo` until a process knows where its own runs
    auth            how it takes its key; 'vendor' is a bearer token for OpenAI's format and x-api-key for Anthropic's
    asks_for_usage  whether it takes stream_options.include_usage
    position        of two that serve a model, the lower is called
    batch_price_ppm what a kind without a batch price costs inside a batch, in millionths of its usual price
    """

    name: str
    provider_id: UUID
    kind: Kind
    base_url: str | None
    auth: Auth = "vendor"
    asks_for_usage: bool = True
    position: int = FIRST_POSITION
    batch_price_ppm: int = USUAL_BATCH_PRICE_PPM
    enabled: bool = True

    def speaks(self, format: Literal["openai", "anthropic"]) -> bool:
        """Whether it takes calls of a format."""
        return self.kind in (format, "both")


@dataclass(frozen=True, slots=True)
class Known:
    """What we know of a public provider, so that its name is enough to add it."""

    kind: Kind
    base_url: str
    auth: Auth = "vendor"
    asks_for_usage: bool = True


# Names are those of the price list. Sources: each vendor's API reference.
KNOWN: Final[Mapping[str, Known]] = {
    "openai": Known("openai", "https://api.openai.com/v1"),
    "anthropic": Known("anthropic", "https://api.anthropic.com/v1"),
    "mistral": Known("openai", "https://api.mistral.ai/v1", asks_for_usage=False),
    "deepseek": Known("openai", "https://api.deepseek.com/v1"),
    "groq": Known("openai", "https://api.groq.com/openai/v1"),
    "openrouter": Known("openai", "https://openrouter.ai/api/v1"),
    "together": Known("openai", "https://api.together.xyz/v1"),
    "x-ai": Known("openai", "https://api.x.ai/v1"),
    "moonshotai": Known("openai", "https://api.moonshot.ai/v1"),
    "google": Known("openai", "https://generativelanguage.googleapis.com/v1beta/openai"),
}


async def list_providers(conn: db.Connection) -> list[Provider]:
    """Every provider, by position and name."""
    return await db.fetch_all(conn, Provider, QUERIES.providers)


async def get_provider(conn: db.Connection, *, name: str) -> Provider:
    """One provider.

    Raises:
        ProviderNotFound
    """
    provider = await db.fetch_optional(conn, Provider, QUERIES.provider, name=name)
    if provider is None:
        raise ProviderNotFound(f"There is no provider {name[:100]!r}.")
    return provider


async def put_provider(
    conn: db.Connection,
    *,
    name: str,
    by: Actor,
    kind: str | None = None,
    base_url: str | None = None,
    auth: str | None = None,
    asks_for_usage: bool | None = None,
    position: int | None = None,
    batch_price_ppm: int | None = None,
    enabled: bool = True,
) -> Provider:
    """Add a provider, or change it where it is there already. conn: as bursar_platform.

    What is not given stays as it is; of a new provider it is taken from KNOWN.

    Raises:
        InvalidProvider, InvalidBaseUrl
    """
    if not _NAME.fullmatch(name):
        raise InvalidProvider(f"{name[:100]!r}: a name has lower-case letters, digits, '.', '_' and '-'.")
    old = await db.fetch_optional(conn, Provider, QUERIES.provider, name=name)
    given = {
        "kind": kind,
        "base_url": base_url,
        "auth": auth,
        "asks_for_usage": asks_for_usage,
        "position": position,
        "batch_price_ppm": batch_price_ppm,
    }
    values = {**_defaults(name, old), **{key: value for key, value in given.items() if value is not None}}
    if name == DEMO and values["base_url"] is not None:
        raise InvalidProvider("The provider demo is built in; its address is not set.")
    _check(name, values)
    provider_id = uuid7() if old is None else old.provider_id
    new = await db.fetch_one(
        conn, Provider, QUERIES.put_provider, name=name, provider_id=provider_id, enabled=enabled, **values
    )
    if new != old:
        await record(
            conn,
            organization_id=PLATFORM_ORGANIZATION_ID,
            by=by,
            action="provider.added" if old is None else "provider.changed",
            object_id=provider_id,
            old=None if old is None else _audited(old),
            new=_audited(new),
        )
    return new


def _defaults(name: str, old: Provider | None) -> dict[str, Any]:
    source: Provider | Known | None = old or KNOWN.get(name)
    if source is None:
        return {
            "kind": None,
            "base_url": None,
            "auth": "vendor",
            "asks_for_usage": True,
            "position": FIRST_POSITION,
            "batch_price_ppm": USUAL_BATCH_PRICE_PPM,
        }
    return {
        "kind": source.kind,
        "base_url": source.base_url,
        "auth": source.auth,
        "asks_for_usage": source.asks_for_usage,
        "position": FIRST_POSITION if old is None else old.position,
        "batch_price_ppm": USUAL_BATCH_PRICE_PPM if old is None else old.batch_price_ppm,
    }


def _check(name: str, values: Mapping[str, Any]) -> None:
    if values["kind"] not in ("openai", "anthropic", "both"):
        raise InvalidProvider(f"{name}: the kind is openai, anthropic or both, not {values['kind']!r}.")
    if values["auth"] not in ("vendor", "bearer", "api-key", "none"):
        raise InvalidProvider(f"{name}: auth is vendor, bearer, api-key or none, not {values['auth']!r}.")
    if not 1 <= values["batch_price_ppm"] <= 1_000_000:
        raise InvalidProvider(f"{name}: a batch costs more than nothing and at most the usual price.")
    if name != DEMO:
        check_base_url(values["base_url"] or "")


def _audited(provider: Provider) -> dict[str, Any]:
    names = ("kind", "base_url", "auth", "asks_for_usage", "position", "batch_price_ppm", "enabled")
    return {"provider": provider.name, **{name: getattr(provider, name) for name in names}}


def check_base_url(url: str) -> None:
    """A provider's address: https, or http on this machine; no credentials, query or fragment; no link-local address.

    Addresses are the operator's configuration. This keeps a slip from sending keys in the clear or to the metadata
    service of a cloud.

    Raises:
        InvalidBaseUrl
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidBaseUrl(f"{url[:200]!r}: {error}.") from error
    fault = _fault(parts.scheme, host)
    if parts.username is not None or parts.password is not None:
        raise InvalidBaseUrl("The address must not hold credentials; enter them with `bursar providers key`.")
    if parts.query or parts.fragment or "?" in url or "#" in url:
        fault = "it must have no query and no fragment"
    elif url.endswith("/"):
        fault = "it must not end with a slash"
    elif any(character.isspace() or ord(character) < 32 for character in url) or port == 0:
        fault = "it is no address"
    if fault:
        raise InvalidBaseUrl(f"{url[:200]!r}: {fault}.")


def _fault(scheme: str, host: str) -> str:
    if not host:
        return "it names no host"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        # A name or a number in another notation, such as 0x7f.1, which a resolver may take for an address.
        if host.rsplit(".", 1)[-1].isdigit() or host.startswith("0x"):
            return "its host is no address in the usual notation"
        is_here = host == "localhost"
    else:
        address = getattr(address, "ipv4_mapped", None) or address
        is_here = address.is_loopback
        is_odd = address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
        if is_odd and not is_here:
            return "addresses of this kind are never called"
    if scheme == "https" or (scheme == "http" and is_here):
        return ""
    return "it must be https, or http on this machine"
