"""Providers: where calls can go, in which format, and how their addresses are checked."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.problems import Problem

QUERIES = db.load_queries("bursar.gateway")

Kind = Literal["openai", "anthropic", "both", "litellm"]
Auth = Literal["vendor", "bearer", "api-key", "none"]

DEMO: Final = "demo"
FIRST_POSITION: Final = 100
USUAL_BATCH_PRICE_PPM: Final = 500_000
"""Half. Source: OpenAI, "Batch API"; Anthropic, "Batch processing"."""
MODEL_PLACE: Final = "{model}"
"""In an address: where the name of the model stands, as in Azure's …/openai/deployments/{model}."""
MOST_HEADERS: Final = 20
LONGEST_TEXT: Final = 500
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)


class InvalidProvider(Problem):
    """A provider's name, kind or way of authentication is none that is known."""

    status, code, title = 422, "invalid_provider", "This provider cannot be added"


class InvalidBaseUrl(Problem):
    """A provider's address is not https (or http on this machine), or has parts that an address must not have."""

    status, code, title = 422, "invalid_base_url", "This address cannot be used"


class InvalidProviderHeader(Problem):
    """A fixed header of a provider is none, or one that is not the operator's to fix."""

    status, code, title = 422, "invalid_provider_header", "This header cannot be sent"


class ProviderNotFound(Problem):
    """No provider of this name."""

    status, code, title = 404, "provider_not_found", "No such provider"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A provider of models.

    kind            formats that it speaks; 'litellm': none of ours, it is called through the LiteLLM adapter
    base_url        what its paths are appended to, '…/v1', with MODEL_PLACE for the model; None for `demo` until a
                    process knows where its own runs, and where LiteLLM knows the address itself
    auth            how it takes its key; 'vendor' is a bearer token for OpenAI's format and x-api-key for Anthropic's
    asks_for_usage  whether it takes stream_options.include_usage
    position        of two that serve a model, the lower is called
    batch_price_ppm what a kind without a batch price costs inside a batch, in millionths of its usual price
    query           what stands behind the question mark of every address
    headers         headers that every call has, names in lower case
    litellm_provider  what LiteLLM calls it; None unless the kind is 'litellm'
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
    query: str = ""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    litellm_provider: str | None = None

    def speaks(self, format: Literal["openai", "anthropic"]) -> bool:
        """Whether it takes calls of a format. The LiteLLM adapter speaks OpenAI's."""
        return self.kind in (format, "both") or (self.kind == "litellm" and format == "openai")


@dataclass(frozen=True, slots=True)
class Known:
    """What we know of a provider, so that its name is enough to add it. litellm_provider: as in Provider."""

    kind: Kind
    base_url: str | None
    auth: Auth = "vendor"
    asks_for_usage: bool = True
    litellm_provider: str | None = None


# Names are those of the price list. Sources: each vendor's API reference; of kind litellm, LiteLLM's list of providers.
# vLLM and Ollama run on one's own machine.
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
    "cohere": Known("openai", "https://api.cohere.ai/compatibility/v1"),
    "vllm": Known("openai", "http://127.0.0.1:8000/v1", auth="none"),
    "ollama": Known("openai", "http://127.0.0.1:11434/v1", auth="none"),
    "aws": Known("litellm", None, litellm_provider="bedrock"),
    "databricks": Known("litellm", None, litellm_provider="databricks"),
    "vertex": Known("litellm", None, litellm_provider="vertex_ai"),
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
    query: str | None = None,
    headers: Mapping[str, str] | None = None,
    litellm_provider: str | None = None,
) -> Provider:
    """Add a provider, or change it where it is there already. conn: as bursar_platform.

    What is not given stays as it is; of a new provider it is taken from KNOWN. headers: in the place of all it has.

    Raises:
        InvalidProvider, InvalidBaseUrl, InvalidProviderHeader
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
        "query": query,
        "headers": None if headers is None else {header.lower(): value for header, value in headers.items()},
        "litellm_provider": litellm_provider,
    }
    values = {**_defaults(name, old, kind), **{key: value for key, value in given.items() if value is not None}}
    if name == DEMO and values["base_url"] is not None:
        raise InvalidProvider("The provider demo is built in; its address is not set.")
    _check(name, values)
    provider_id = uuid7() if old is None else old.provider_id
    new = await db.fetch_one(
        conn,
        Provider,
        QUERIES.put_provider,
        name=name,
        provider_id=provider_id,
        enabled=enabled,
        **{**values, "headers": Jsonb(values["headers"])},
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


_NEW: Final[dict[str, Any]] = {
    "kind": None,
    "base_url": None,
    "auth": "vendor",
    "asks_for_usage": True,
    "position": FIRST_POSITION,
    "batch_price_ppm": USUAL_BATCH_PRICE_PPM,
    "query": "",
    "headers": {},
    "litellm_provider": None,
}


def _defaults(name: str, old: Provider | None, kind: str | None) -> dict[str, Any]:
    """What is not given: as it was, as it is known, or as it is with most. kind: as given; it may be a change."""
    source: Provider | Known | None = old or KNOWN.get(name)
    if source is not None and kind is not None and "litellm" in (kind, source.kind) and kind != source.kind:
        # An address of the other way leads nowhere.
        source = KNOWN[name] if name in KNOWN and KNOWN[name].kind == kind else None
    values = {**_NEW, **{key: getattr(source, key) for key in _NEW if hasattr(source, key)}}
    if kind == "litellm" and values["litellm_provider"] is None:
        values["litellm_provider"] = name
    return values


def _check(name: str, values: Mapping[str, Any]) -> None:
    kind, auth = values["kind"], values["auth"]
    if kind not in ("openai", "anthropic", "both", "litellm"):
        raise InvalidProvider(f"{name}: the kind is openai, anthropic, both or litellm, not {kind!r}.")
    if auth not in ("vendor", "bearer", "api-key", "none"):
        raise InvalidProvider(f"{name}: auth is vendor, bearer, api-key or none, not {auth!r}.")
    if (values["litellm_provider"] is not None) != (kind == "litellm"):
        raise InvalidProvider(f"{name}: a name at LiteLLM is for providers of the kind litellm only.")
    if not 1 <= values["batch_price_ppm"] <= 1_000_000:
        raise InvalidProvider(f"{name}: a batch costs more than nothing and at most the usual price.")
    if kind == "litellm":
        _check_litellm(name, values)
    elif name != DEMO:
        check_base_url(values["base_url"] or "")
    check_query(values["query"])
    check_headers(values["headers"])


def _check_litellm(name: str, values: Mapping[str, Any]) -> None:
    if name == DEMO or not _LITELLM_NAME.fullmatch(values["litellm_provider"]):
        raise InvalidProvider(f"{name}: LiteLLM has no provider {values['litellm_provider'][:100]!r}.")
    if values["query"] or values["headers"]:
        raise InvalidProvider(f"{name}: what is called through LiteLLM has no query and no headers of its own.")
    if values["base_url"] is not None:
        check_base_url(values["base_url"])


def check_query(query: str) -> None:
    """What stands behind the question mark of every address: name=value pairs, and no key, which logs would show.

    Raises:
        InvalidBaseUrl
    """
    if not query:
        return
    if len(query) > LONGEST_TEXT or not _QUERY.fullmatch(query):
        raise InvalidBaseUrl(f"{query[:200]!r} is no query: name=value pairs joined by '&', encoded, without '?'.")
    names = {name.lower() for name, _ in parse_qsl(query, keep_blank_values=True)}
    if names & _SECRET_NAMES:
        raise InvalidBaseUrl("The query must not hold a key; enter it with `bursar providers key`.")


def check_headers(headers: Mapping[str, str]) -> None:
    """Headers that every call has: few, short, and none that carries a key or shapes the connection.

    Raises:
        InvalidProviderHeader
    """
    if len(headers) > MOST_HEADERS:
        raise InvalidProviderHeader(f"A provider has at most {MOST_HEADERS} headers.")
    for name, value in headers.items():
        if name in _SECRET_NAMES or name in _OF_THE_CONNECTION:
            raise InvalidProviderHeader(f"{name}: it is not set here; keys are entered with `bursar providers key`.")
        if not _HEADER_NAME.fullmatch(name) or not (value.isascii() and value.isprintable()):
            raise InvalidProviderHeader(f"{name[:100]!r}: a header is a name and a text of printable ASCII characters.")
        if not 1 <= len(value) <= LONGEST_TEXT:
            raise InvalidProviderHeader(f"{name}: its text has 1 to {LONGEST_TEXT} characters.")


_LITELLM_NAME: Final = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}", re.ASCII)
_QUERY: Final = re.compile(r"[A-Za-z0-9._~%+-]+=[A-Za-z0-9._~%+:/,-]*(?:&[A-Za-z0-9._~%+-]+=[A-Za-z0-9._~%+:/,-]*)*")
_HEADER_NAME: Final = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]{1,100}", re.ASCII)
_SECRET_NAMES: Final = frozenset(
    ("authorization", "proxy-authorization", "api-key", "x-api-key", "x-goog-api-key", "ocp-apim-subscription-key")
) | frozenset(("api_key", "apikey", "key", "token", "access_token", "cookie", "sig", "signature"))
_OF_THE_CONNECTION: Final = frozenset(
    ("host", "connection", "keep-alive", "upgrade", "te", "trailer", "transfer-encoding", "expect", "date")
) | frozenset(("content-length", "content-type", "content-encoding", "accept-encoding"))


def _audited(provider: Provider) -> dict[str, Any]:
    return {"provider": provider.name, "enabled": provider.enabled, **{name: getattr(provider, name) for name in _NEW}}


def check_base_url(url: str) -> None:
    """A provider's address: https, or http on this machine; no credentials, query or fragment; no link-local address.

    '{model}' may stand once in its path.

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
        fault = "it must have no query (see --query) and no fragment"
    elif re.search(r"[{}]", url.replace(MODEL_PLACE, "", 1)) or MODEL_PLACE in parts.netloc:
        fault = "'{model}' can stand once in its path, and no other brace"
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
