"""The texts that people and programs present: `bk_…` API keys and `bl_…` one-time sign-in links.

    bk_ AAAAAAAAAAAAAAAAAAAAAA KKKKKKKKKKK _ SSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSSS CCCCCC
        organization's id      8 random      256 random bits: the secret                 CRC-32 of
        (the route)            octets                                                    all before

All in base 62. The part before the second `_` is the public id, which may be shown and logged. The checksum catches a
mistyped or cut text before any database is asked; it keeps nobody out. Stored is the SHA-256 of the whole text.
"""

import hashlib
import secrets
import zlib
from dataclasses import dataclass, field
from typing import Final, Literal
from uuid import UUID

from bursar.identity import base62

Prefix = Literal["bk_", "bl_"]
API_KEY: Final[Prefix] = "bk_"
SIGN_IN_LINK: Final[Prefix] = "bl_"

_ROUTE = base62.width(16)
_RANDOM = base62.width(8)
_SECRET = base62.width(32)
_CHECKSUM = base62.width(4)
LENGTH: Final = len(API_KEY) + _ROUTE + _RANDOM + 1 + _SECRET + _CHECKSUM


class Malformed(ValueError):
    """The text was not made here, or not copied whole."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SecretText:
    """A well-formed text; whether it opens anything, the database knows. Only the public id is in its repr."""

    organization_id: UUID
    public_id: str
    text: str = field(repr=False)

    @property
    def digest(self) -> bytes:
        """SHA-256 of the whole text: what is stored. The secret is random, so no slow hash is needed."""
        return hashlib.sha256(self.text.encode()).digest()

    @property
    def last4(self) -> str:
        """What a list shows to recognize it by."""
        return self.text[-4:]


def new_secret_text(prefix: Prefix, organization_id: UUID) -> SecretText:
    """A new text whose route is the organization."""
    public_id = base62.encode(organization_id.bytes) + base62.encode(secrets.token_bytes(8))
    body = f"{prefix}{public_id}_{base62.encode(secrets.token_bytes(32))}"
    return SecretText(organization_id=organization_id, public_id=public_id, text=body + checksum(body))


def parse_secret_text(prefix: Prefix, text: str) -> SecretText:
    """The parts of a presented text.

    Raises:
        Malformed: length, prefix, an impossible part or the checksum is wrong; any single wrong character is found.
    """
    if len(text) != LENGTH or not text.startswith(prefix) or not text.isascii():
        raise Malformed("not of this kind")
    body, found = text[:-_CHECKSUM], text[-_CHECKSUM:]
    if checksum(body) != found:
        raise Malformed("mistyped or cut")
    public_id, separator, secret = body[len(prefix) :].partition("_")
    try:
        organization_id = UUID(bytes=base62.decode(public_id[:_ROUTE], 16))
        base62.decode(public_id[_ROUTE:], 8)
        base62.decode(secret, 32)
    except ValueError as error:
        raise Malformed("impossible") from error
    assert separator
    return SecretText(organization_id=organization_id, public_id=public_id, text=text)


def parse_public_id(prefix: Prefix, text: str) -> tuple[UUID, str]:
    """(organization, public id) of a public part (`bk_` + public id, as lists show it) or of a whole text.

    Raises:
        Malformed
    """
    public_id = text.removeprefix(prefix).partition("_")[0]
    try:
        base62.decode(public_id[_ROUTE:], 8)
        return UUID(bytes=base62.decode(public_id[:_ROUTE], 16)), public_id
    except ValueError as error:
        raise Malformed("not of this kind") from error


def checksum(body: str) -> str:
    """CRC-32 in base 62; it finds every change of up to 32 adjacent bits."""
    return base62.encode(zlib.crc32(body.encode()).to_bytes(4))
