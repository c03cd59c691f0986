"""E-mail addresses: one normal form, and the keyed hash that is all the schema `route` knows of them."""

import hashlib
import hmac
import re
import unicodedata
from dataclasses import dataclass
from typing import Final

from bursar.problems import FieldError, Problem
from bursar.settings import Settings

LONGEST_EMAIL: Final = 254
_LABEL = r"[^\W_](?:[\w-]{0,61}[^\W_])?"
_EMAIL = re.compile(rf"[^\s@\x00-\x1f\x7f]{{1,64}}@(?:{_LABEL}\.)+{_LABEL}")


class InvalidEmail(Problem):
    """Not an address of the form name@domain."""

    status, code, title = 422, "invalid_email", "This e-mail address cannot be used"


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A checked address. email: normalized; email_hash: HMAC-SHA256 under a key derived from the master key."""

    email: str
    email_hash: bytes

    @classmethod
    def of(cls, email: str, settings: Settings) -> "Address":
        """Raises InvalidEmail."""
        normalized = normalize_email(email)
        key = settings.derive("identity e-mail address")
        return cls(email=normalized, email_hash=hmac.new(key, normalized.encode(), hashlib.sha256).digest())


def normalize_email(text: str) -> str:
    """The address in lower case and Unicode's composed form: the same for what people take for the same address.

    Raises:
        InvalidEmail
    """
    # Lower-casing can take a letter apart ('İ'), so it is composed again; the result is a fixed point.
    email = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text.strip()).lower())
    if len(email) > LONGEST_EMAIL or not email.isprintable() or not _EMAIL.fullmatch(email):
        detail = "an address such as dana@meridian.example"
        raise InvalidEmail(detail, errors=[FieldError("#/email", detail)])
    return email
