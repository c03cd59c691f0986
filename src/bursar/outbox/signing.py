"""Signatures of webhooks, so that a receiver knows who sent what, and when.

Source: Standard Webhooks. Signed is "id.timestamp.body" by HMAC-SHA256 under the secret's bytes; the header holds one
"v1,<base64>" for each secret that is in force, so that a receiver may change over in its own time.
"""

import base64
import hmac
import secrets
from collections.abc import Sequence
from typing import Final

PREFIX: Final = "whsec_"
_SECRET_BYTES: Final = 32


def new_secret() -> str:
    """256 random bits, as receivers' libraries take them."""
    return PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(webhook_id: str, timestamp: int, body: bytes, in_force: Sequence[str]) -> dict[str, str]:
    """The headers of a webhook. timestamp: of this attempt, seconds since 1970; in_force: one secret or more."""
    assert in_force
    assert "." not in webhook_id
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(
            _signature(f"{webhook_id}.{timestamp}.".encode() + body, each) for each in in_force
        ),
    }


def _signature(signed: bytes, secret: str) -> str:
    key = base64.b64decode(secret.removeprefix(PREFIX), validate=True)
    return "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
