"""The application's time: UTC, aware. Money is dated by the database, never from here."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_lock = threading.Lock()
_last_tick = 0


def now() -> datetime:
    """The present instant, in UTC."""
    return datetime.now(UTC)


def uuid7() -> UUID:
    """A new id that sorts by time, strictly rising within this process.

    The twelve bits after the version hold the fraction of the millisecond.
    Source: RFC 9562, 5.7 and 6.2 method 3.
    """
    global _last_tick
    with _lock:
        _last_tick = tick = max(_last_tick + 1, (time.time_ns() << 12) // 1_000_000)
    return _uuid7(tick)


def uuid7_at(instant: datetime) -> UUID:
    """A new id as if made at an instant (seeding the past); instant is aware."""
    assert instant.tzinfo is not None
    microseconds = (instant - _EPOCH) // timedelta(microseconds=1)
    return _uuid7((microseconds << 12) // 1000)


def instant_of(identifier: UUID) -> datetime:
    """When a UUIDv7 was made, to the millisecond."""
    assert identifier.version == 7
    return _EPOCH + timedelta(milliseconds=identifier.int >> 80)


def _uuid7(tick: int) -> UUID:
    """tick: milliseconds since 1970 with 12 bits of fraction."""
    milliseconds, fraction = tick >> 12, tick & 0xFFF
    drawn = int.from_bytes(os.urandom(8), "big") >> 2
    return UUID(int=(milliseconds << 80) | (0x7 << 76) | (fraction << 64) | (0b10 << 62) | drawn)
