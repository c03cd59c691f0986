"""Which limit is told as the nearest, and how often that is read."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from bursar.clock import uuid7
from bursar.gateway import nearest
from bursar.gateway.nearest import MOST_READINGS_A_SECOND, Nearest
from bursar.identity.principals import Principal


def somebody() -> Principal:
    return cast(Principal, SimpleNamespace(organization_id=uuid7(), user_id=uuid7(), api_key_id=uuid7()))


async def test_thousands_of_new_keys_at_once_are_no_load_on_the_database(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Any] = []
    at = 1_000.0

    async def note(self: Nearest, known: Any, *asker: Any) -> None:
        read.append(asker)
        known.fresh_until, known.reading = at + 5, None

    monkeypatch.setattr(Nearest, "_read", note)
    monkeypatch.setattr(nearest, "monotonic", lambda: at)
    limits = Nearest(cast(Any, None))
    for _ in range(5_000):
        limits.look(somebody(), "m")
    await asyncio.sleep(0)
    assert len(read) == MOST_READINGS_A_SECOND
    at += 0.5
    for _ in range(5_000):
        limits.look(somebody(), "m")
    await asyncio.sleep(0)
    assert len(read) == MOST_READINGS_A_SECOND * 1.5
    assert await limits.headers(somebody(), "m", micros=1, tokens=1) == [], "and nobody waits for what is not read"


async def test_what_is_old_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    at = 1_000.0
    monkeypatch.setattr(nearest, "monotonic", lambda: at)
    limits, asker = Nearest(cast(Any, None)), somebody()
    known = limits._of(asker, "m")
    known.choices, known.fresh_until = (nearest._Choice("credits", 5, 5, [(b"x", b"y")]),), at + 5
    limits.look(asker, "m")
    at += 60
    assert await limits.headers(asker, "m", micros=1, tokens=1) == [(b"x", b"y")], "as of when the call was held"
    limits._may_read = -1_000.0
    limits.look(asker, "m")
    assert await limits.headers(asker, "m", micros=1, tokens=1) == []
