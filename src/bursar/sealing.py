"""Secrets at rest: AES-256-GCM under keys derived from the master key, sealed to their organization and row.

The sealing key is HKDF-SHA256 of the master key; its id stands in the row, so that rows under an older master key can
still be opened and sealed anew. The associated data is purpose, organization and row: a ciphertext that is moved to
another row or another tenant cannot be opened there.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Final
from uuid import UUID

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from bursar.errors import BursarError

_KEY_BYTES: Final = 32
_NONCE_BYTES: Final = 12


class SealBroken(BursarError):
    """A sealed secret cannot be opened: it was changed, moved, or sealed under a master key that is not given."""


@dataclass(frozen=True, slots=True)
class Sealed:
    """A secret as it is stored."""

    sealing_key_id: str
    nonce: bytes = field(repr=False)
    ciphertext: bytes = field(repr=False)


class Keyring:
    """Seals under the newest master key and opens under any that is given."""

    def __init__(self, master_key: bytes, *older_master_keys: bytes) -> None:
        """master_key: 32 bytes, `Settings.master_key`."""
        keys = [_sealing_key(master) for master in (master_key, *older_master_keys)]
        self.newest_id = _key_id(keys[0])
        self._ciphers = {_key_id(key): AESGCM(key) for key in keys}

    def seal(self, secret: str, *, purpose: str, organization_id: UUID, row_id: UUID) -> Sealed:
        """Encrypt a secret for one row."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        place = _place(purpose, organization_id, row_id)
        return Sealed(self.newest_id, nonce, self._ciphers[self.newest_id].encrypt(nonce, secret.encode(), place))

    def open(self, sealed: Sealed, *, purpose: str, organization_id: UUID, row_id: UUID) -> str:
        """Decrypt a row's secret.

        Raises:
            SealBroken
        """
        cipher = self._ciphers.get(sealed.sealing_key_id)
        if cipher is None:
            raise SealBroken(
                f"The secret of row {row_id} was sealed under another master key",
                why=f"Its sealing key is {sealed.sealing_key_id}, ours is {self.newest_id}",
                next_step="Give the master key that it was sealed under, or enter the secret anew",
            )
        try:
            return cipher.decrypt(sealed.nonce, sealed.ciphertext, _place(purpose, organization_id, row_id)).decode()
        except InvalidTag:
            raise SealBroken(
                f"The secret of row {row_id} cannot be opened",
                why="It was changed, or moved here from another row or organization",
                next_step="Enter the secret anew",
            ) from None


def _sealing_key(master_key: bytes) -> bytes:
    assert len(master_key) == _KEY_BYTES
    return HKDF(algorithm=SHA256(), length=_KEY_BYTES, salt=None, info=b"bursar sealing v1").derive(master_key)


def _key_id(sealing_key: bytes) -> str:
    """Names a key without telling anything about it."""
    return sha256(b"bursar sealing key id" + sealing_key).hexdigest()[:16]


def _place(purpose: str, organization_id: UUID, row_id: UUID) -> bytes:
    return purpose.encode() + b"\0" + organization_id.bytes + row_id.bytes
