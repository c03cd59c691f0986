"""Which limit a call is nearest to: for the headers of answers that no limit refused.

The limits of a user and key are read beside the provider's call and kept for seconds; what an answer's headers say of
its charge and of what is available is exact, the nearest limit is named as of then. Nothing waits for it but answers
that come before it is done. A reading costs the database more than the call itself does in a batch, so there are only
so many a second: where thousands of keys call at once, some answers go without.
"""

import asyncio
from collections import OrderedDict
from time import monotonic
from typing import Final, NamedTuple

import structlog

from bursar import db
from bursar.clock import now
from bursar.credits import why
from bursar.identity.principals import Principal

FRESH_SECONDS: Final = 5.0
MOST_KNOWN: Final = 10_000
MOST_READINGS_A_SECOND: Final = 50
"""At a millisecond or two each, a tenth of a core at most. As many may come at once."""

log = structlog.get_logger(__name__)
Headers = list[tuple[bytes, bytes]]
Asker = tuple[int, int | None, int | None, str, str | None]
"""Organization, user and key, by their numbers, which are hashed faster than the ids; model as priced and feature."""


class _Choice(NamedTuple):
    """A limit that may be the nearest: what it counts, its room in all and in millionths of it, and its headers."""

    metric: str
    room: int
    share: int
    headers: Headers


class _Known:
    """The limits that an asker passes. Instants of the monotonic clock."""

    __slots__ = ("choices", "fresh_until", "reading")

    def __init__(self) -> None:
        self.fresh_until = 0.0
        self.choices: tuple[_Choice, ...] = ()
        self.reading: asyncio.Task[None] | None = None


class Nearest:
    """The limits of who calls, from memory, at most seconds old. One per process."""

    def __init__(self, database: db.Database) -> None:
        self._database = database
        self._known: OrderedDict[Asker, _Known] = OrderedDict()
        self._may_read = float(MOST_READINGS_A_SECOND)
        self._counted_at = monotonic()

    def look(self, principal: Principal, model: str, feature: str | None = None) -> None:
        """Begin to read the limits of a call that was let through, where what is known of them is old."""
        known = self._of(principal, model, feature)
        at = monotonic()
        if known.reading is not None or at < known.fresh_until:
            return
        known.choices = ()  # what is old is not told
        if self._has_turn(at):
            known.reading = asyncio.create_task(self._read(known, principal, model, feature), name="nearest limit")

    def _has_turn(self, at: float) -> bool:
        """Whether one more reading may begin now: a bucket that fills with time."""
        filled = self._may_read + (at - self._counted_at) * MOST_READINGS_A_SECOND
        self._may_read, self._counted_at = min(filled, float(MOST_READINGS_A_SECOND)), at
        if self._may_read < 1:
            return False
        self._may_read -= 1
        return True

    async def headers(
        self, principal: Principal, model: str, feature: str | None = None, *, micros: int, tokens: int
    ) -> Headers:
        """The headers that name the limit into which the fewest further calls of this size fit; among equals the one
        that has the least room for its size. None where no limit counts such a call, or none was read yet.
        """
        known = self._of(principal, model, feature)
        if known.reading is not None:
            await asyncio.shield(known.reading)
        nearest: Headers = []
        least: tuple[int, int] | None = None
        for metric, room, share, headers in known.choices:
            need = micros if metric == "credits" else tokens if metric == "tokens" else 1
            if need > 0 and (least is None or (room // need, share) < least):
                least, nearest = (room // need, share), headers
        return nearest

    async def close(self) -> None:
        """Nobody asks any more."""
        reading = [known.reading for known in self._known.values() if known.reading is not None]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    def _of(self, principal: Principal, model: str, feature: str | None = None) -> _Known:
        user_id, api_key_id = principal.user_id, principal.api_key_id
        asker = (
            principal.organization_id.int,
            None if user_id is None else user_id.int,
            None if api_key_id is None else api_key_id.int,
            model,
            feature,
        )
        known = self._known.get(asker)
        if known is None:
            known = self._known[asker] = _Known()
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(asker)
        return known

    async def _read(self, known: _Known, principal: Principal, model: str, feature: str | None) -> None:
        seconds = FRESH_SECONDS
        try:
            async with self._database.tenant(principal.organization_id) as conn:
                limits = await why.limits_passed(
                    conn,
                    organization_id=principal.organization_id,
                    user_id=principal.user_id,
                    api_key_id=principal.api_key_id,
                    model=model,
                    feature=feature,
                )
        except Exception as error:
            # An answer without these two headers is better than none.
            log.warning("nearest limit not read", error=str(error))
        else:
            known.choices = tuple(map(_choice, why.may_stop(limits)))
            resets = [(each.resets_at - now()).total_seconds() for each in limits if each.resets_at is not None]
            seconds = min(seconds, *resets) if resets else seconds
        finally:
            known.fresh_until = monotonic() + seconds
            known.reading = None


def _choice(limit: why.LimitState) -> _Choice:
    headers = [(name.lower().encode(), text.encode()) for name, text in why.limit_headers(limit).items()]
    return _Choice(limit.metric or "", limit.room, limit.room * 1_000_000 // max(1, limit.limit_amount), headers)
