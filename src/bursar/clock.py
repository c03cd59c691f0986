"""The application's time: UTC, aware. Money is dated by the database, never from here."""

import os
import threading
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, SafeUUID

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_lock = threading.Lock()
_last_tick = 0
_drawn = b""  # random bytes that are still to be used
_used = 0


def now() -> datetime:
    """The present instant, in UTC."""
    return datetime.now(UTC)


def in_utc(instant: datetime | None) -> datetime | None:
    """An instant that was given without zone is in UTC."""
    return instant.replace(tzinfo=UTC) if instant is not None and instant.tzinfo is None else instant


def uuid7() -> UUID:
    """A new id that sorts by time, strictly rising within this process.

    The twelve bits after the version hold the fraction of the millisecond.
    Source: RFC 9562, 5.7 and 6.2 method 3.
    """
    global _last_tick, _drawn, _used
    with _lock:
        _last_tick = tick = max(_last_tick + 1, (time.time_ns() << 12) // 1_000_000)
        if _used == len(_drawn):
            _drawn, _used = os.urandom(2048), 0
        _used += 8
        drawn = _drawn[_used - 8 : _used]
    return _uuid7(tick, drawn)


def uuid7_at(instant: datetime) -> UUID:
    """A new id as if made at an instant (seeding the past); instant is aware."""
    assert instant.tzinfo is not None
    microseconds = (instant - _EPOCH) // timedelta(microseconds=1)
    return _uuid7((microseconds << 12) // 1000, os.urandom(8))


def instant_of(identifier: UUID) -> datetime:
    """When a UUIDv7 was made, to the millisecond."""
    assert identifier.version == 7
    return _EPOCH + timedelta(milliseconds=identifier.int >> 80)


def _uuid7(tick: int, drawn: bytes) -> UUID:
    """tick: milliseconds since 1970 with 12 bits of fraction. drawn: eight random bytes."""
    number = (tick >> 12 << 80) | (tick & 0xFFF | 0x7000) << 64 | (int.from_bytes(drawn, "big") >> 2) | 1 << 63
    made = object.__new__(UUID)  # UUID() looks at each of its six arguments, which takes longer than all this
    object.__setattr__(made, "int", number)
    object.__setattr__(made, "is_safe", SafeUUID.unknown)
    return made


def _draw_anew() -> None:
    """A child of this process must not use what its parent has drawn."""
    global _drawn, _used
    _drawn, _used = b"", 0


os.register_at_fork(after_in_child=_draw_anew)
