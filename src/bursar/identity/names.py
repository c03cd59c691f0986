"""What people call things: one line of text, unique among those of its kind in use."""

import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import psycopg

from bursar.problems import FieldError, Problem

LONGEST_NAME: Final = 200


class InvalidName(Problem):
    """A name is empty, longer than 200 characters, or holds characters that cannot be shown."""

    status, code, title = 422, "invalid_name", "This name cannot be used"


class NameTaken(Problem):
    """Another object of this kind in the organization bears the name."""

    status, code, title = 409, "name_taken", "This name is in use"


def clean_name(text: str, *, field: str = "name") -> str:
    """The name in Unicode's composed form, with single spaces and none around it.

    Raises:
        InvalidName
    """
    name = " ".join(unicodedata.normalize("NFC", text).split())
    if not 1 <= len(name) <= LONGEST_NAME or any(unicodedata.category(each) in ("Cc", "Cs") for each in name):
        detail = f"1 to {LONGEST_NAME} printable characters"
        raise InvalidName(detail, errors=[FieldError(f"#/{field}", detail)])
    return name


@contextmanager
def one_of_a_name(name: str) -> Iterator[None]:
    """Around a write that a unique index may refuse.

    Raises:
        NameTaken
    """
    try:
        yield
    except psycopg.errors.UniqueViolation as error:
        raise NameTaken(f"“{name}” is in use here") from error
