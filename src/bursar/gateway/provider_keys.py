"""Keys at providers: entered, sealed, found for a call, revoked, sealed anew under another master key.

An organization's own key goes before the platform's. The platform's keys are rows of the platform's organization.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.gateway.providers import QUERIES, get_provider
from bursar.identity.names import clean_name
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.problems import Problem
from bursar.sealing import Keyring, Sealed

PURPOSE: Final = "gateway.provider_keys"
LONGEST_SECRET: Final = 4_096
CACHE_SECONDS: Final = 5.0
MOST_CACHED: Final = 20_000


class InvalidProviderKey(Problem):
    """What was entered cannot be a key: empty, too long, or with characters that no HTTP header takes."""

    status, code, title = 422, "invalid_provider_key", "This is no key"


class ProviderKeyNotFound(Problem):
    """No such key that is still in use, or one of another organization."""

    status, code, title = 404, "provider_key_not_found", "No such provider key"


class NoProviderKey(Problem):
    """Neither the organization nor the platform has a key at the provider."""

    status, code, title = 503, "no_provider_key", "There is no key at this provider"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProviderKey:
    """A key at a provider, without the key itself. is_own: the organization pays the provider (BYOK)."""

    organization_id: UUID
    provider_key_id: UUID
    provider: str
    name: str
    is_own: bool
    last4: str
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class UsableKey:
    """A key opened for calls."""

    provider_key_id: UUID
    is_own: bool
    secret: str = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class _SealedRow:
    organization_id: UUID
    provider_key_id: UUID
    is_own: bool
    sealing_key_id: str
    nonce: bytes
    ciphertext: bytes

    def opened(self, keyring: Keyring) -> str:
        sealed = Sealed(self.sealing_key_id, self.nonce, self.ciphertext)
        return keyring.open(sealed, purpose=PURPOSE, organization_id=self.organization_id, row_id=self.provider_key_id)


async def add_provider_key(
    conn: db.Connection,
    keyring: Keyring,
    *,
    organization_id: UUID,
    provider: str,
    secret: str,
    by: Actor,
    name: str = "",
    is_own: bool | None = None,
) -> ProviderKey:
    """Enter a key; from now on (within seconds in running processes) it is the one that is used.

    One that is a JSON object, as clouds hand them out, is kept on one line.

    is_own: whether the organization pays the provider itself; None: yes, except in the platform's organization.

    Raises:
        ProviderNotFound, InvalidProviderKey, InvalidName
    """
    await get_provider(conn, name=provider)
    secret = _on_one_line(secret.strip())
    if not 1 <= len(secret) <= LONGEST_SECRET or not (secret.isascii() and secret.isprintable()):
        raise InvalidProviderKey(f"A key has 1 to {LONGEST_SECRET} printable ASCII characters.")
    provider_key_id = uuid7()
    sealed = keyring.seal(secret, purpose=PURPOSE, organization_id=organization_id, row_id=provider_key_id)
    key = await db.fetch_one(
        conn,
        ProviderKey,
        QUERIES.add_provider_key,
        organization_id=organization_id,
        provider_key_id=provider_key_id,
        provider=provider,
        name=clean_name(name or f"{provider} key"),
        is_own=organization_id != PLATFORM_ORGANIZATION_ID if is_own is None else is_own,
        sealing_key_id=sealed.sealing_key_id,
        nonce=sealed.nonce,
        ciphertext=sealed.ciphertext,
        # Of a short key, four characters would be a good part.
        last4=secret[-4:] if len(secret) >= 16 else "",
        created_by=by.user_id,
    )
    new = {"provider": provider, "name": key.name, "is_own": key.is_own, "last4": key.last4}
    await record(
        conn, organization_id=organization_id, by=by, action="provider_key.added", object_id=provider_key_id, new=new
    )
    return key


def _on_one_line(secret: str) -> str:
    if secret.startswith("{"):
        with suppress(ValueError):
            return json.dumps(json.loads(secret), separators=(",", ":"))
    return secret


async def list_provider_keys(conn: db.Connection, *, organization_id: UUID) -> list[ProviderKey]:
    """An organization's keys, revoked ones too, by provider, newest first."""
    return await db.fetch_all(conn, ProviderKey, QUERIES.provider_keys, organization_id=organization_id)


async def revoke_provider_key(
    conn: db.Connection, *, organization_id: UUID, provider_key_id: UUID, by: Actor
) -> ProviderKey:
    """Use a key no more (within seconds in running processes). It stays in the list.

    Raises:
        ProviderKeyNotFound
    """
    key = await db.fetch_optional(
        conn,
        ProviderKey,
        QUERIES.revoke_provider_key,
        organization_id=organization_id,
        provider_key_id=provider_key_id,
    )
    if key is None:
        raise ProviderKeyNotFound
    await record(conn, organization_id=organization_id, by=by, action="provider_key.revoked", object_id=provider_key_id)
    return key


async def find_usable_key(
    conn: db.Connection, keyring: Keyring, *, organization_id: UUID, provider: str
) -> UsableKey | None:
    """An organization's newest key at a provider that is not revoked, opened; None where it has none.

    Raises:
        SealBroken
    """
    row = await db.fetch_optional(
        conn, _SealedRow, QUERIES.usable_provider_key, organization_id=organization_id, provider=provider
    )
    return None if row is None else UsableKey(row.provider_key_id, row.is_own, row.opened(keyring))


class KeyFinder:
    """Keys for calls, from memory for at most CACHE_SECONDS, so that a revoked key is soon out of use everywhere."""

    def __init__(self, database: db.Database, keyring: Keyring, *, clock: Callable[[], float] = monotonic) -> None:
        self._database = database
        self._keyring = keyring
        self._clock = clock
        self._found: dict[tuple[UUID, str], tuple[float, UsableKey | None]] = {}

    async def key_for(self, organization_id: UUID, provider: str) -> UsableKey:
        """The organization's own key at a provider, else the platform's.

        Raises:
            NoProviderKey, SealBroken
        """
        key = await self.find(organization_id, provider)
        if key is not None:
            return key
        raise NoProviderKey(
            f"Nobody has entered a key for {provider}.",
            why={
                "reason": "no_provider_key",
                "provider": provider,
                "next_step": f"The platform's operator can enter one with `bursar providers key {provider}`.",
            },
        )

    async def find(self, organization_id: UUID, provider: str) -> UsableKey | None:
        """`key_for`, or None where nobody has one."""
        own = await self._key_of(organization_id, provider)
        return own or await self._key_of(PLATFORM_ORGANIZATION_ID, provider)

    async def kept(self, organization_id: UUID, provider_key_id: UUID) -> UsableKey:
        """The key that something was begun with, the organization's or the platform's, be it revoked since or not.

        Raises:
            ProviderKeyNotFound, SealBroken
        """
        for owner in (organization_id, PLATFORM_ORGANIZATION_ID):
            async with self._database.tenant(owner) as conn:
                row = await db.fetch_optional(
                    conn,
                    _SealedRow,
                    QUERIES.provider_key_by_id,
                    organization_id=owner,
                    provider_key_id=provider_key_id,
                )
            if row is not None:
                return UsableKey(row.provider_key_id, row.is_own, row.opened(self._keyring))
        raise ProviderKeyNotFound

    async def _key_of(self, organization_id: UUID, provider: str) -> UsableKey | None:
        place = (organization_id, provider)
        until, key = self._found.get(place, (0.0, None))
        if self._clock() < until:
            return key
        asked_at = self._clock()
        async with self._database.tenant(organization_id) as conn:
            key = await find_usable_key(conn, self._keyring, organization_id=organization_id, provider=provider)
        if len(self._found) >= MOST_CACHED:
            self._found.clear()
        self._found[place] = (asked_at + CACHE_SECONDS, key)
        return key


async def reseal_provider_keys(database: db.Database, keyring: Keyring) -> int:
    """Seal every key that was sealed under another master key anew under the newest; the number of keys.

    One transaction for each organization; safe to break off and to run again. keyring: knows the older master keys.

    Raises:
        SealBroken: a key was sealed under a master key that the keyring does not know.
    """
    async with database.platform() as conn:
        organization_ids = await db.fetch_values(
            conn, QUERIES.organizations_with_keys_sealed_otherwise, sealing_key_id=keyring.newest_id
        )
    total = 0
    for organization_id in organization_ids:
        async with database.tenant(organization_id) as conn:
            total += await _reseal(conn, keyring, organization_id)
    return total


async def _reseal(conn: db.Connection, keyring: Keyring, organization_id: UUID) -> int:
    rows = await db.fetch_all(
        conn,
        _SealedRow,
        QUERIES.provider_keys_sealed_otherwise,
        organization_id=organization_id,
        sealing_key_id=keyring.newest_id,
    )
    for row in rows:
        sealed = keyring.seal(
            row.opened(keyring), purpose=PURPOSE, organization_id=organization_id, row_id=row.provider_key_id
        )
        await db.execute(
            conn,
            QUERIES.reseal_provider_key,
            organization_id=organization_id,
            provider_key_id=row.provider_key_id,
            sealing_key_id=sealed.sealing_key_id,
            nonce=sealed.nonce,
            ciphertext=sealed.ciphertext,
        )
    return len(rows)
