"""Which limit a call is nearest to: for the headers of answers that no limit refused.

The limits of a user and key are read beside the provider's call and kept for seconds; what an answer's headers say of
its charge and of what is available is exact, the nearest limit is named as of then. Nothing waits for it but the first
answer of a key and model.
"""

import asyncio
from collections import OrderedDict
from datetime import datetime
from time import monotonic
from typing import Final
from uuid import UUID

import structlog

from bursar import db
from bursar.clock import now
from bursar.credits import why
from bursar.identity.principals import Principal

FRESH_SECONDS: Final = 5.0
MOST_KNOWN: Final = 10_000

log = structlog.get_logger(__name__)
Asker = tuple[UUID, UUID | None, UUID | None, str]
"""Organization, user, key and model as priced."""


class _Known:
    """The limits that an asker passes, as of an instant of the monotonic clock."""

    __slots__ = ("at", "limits", "reading", "until")

    def __init__(self) -> None:
        self.at = float("-inf")
        self.until: datetime | None = None  # some period ends
        self.limits: tuple[why.LimitState, ...] = ()
        self.reading: asyncio.Task[None] | None = None

    @property
    def is_fresh(self) -> bool:
        return monotonic() < self.at + FRESH_SECONDS and (self.until is None or now() < self.until)


class Nearest:
    """The limits of who calls, from memory, at most seconds old. One per process."""

    def __init__(self, database: db.Database) -> None:
        self._database = database
        self._known: OrderedDict[Asker, _Known] = OrderedDict()

    def look(self, principal: Principal, model: str) -> None:
        """Begin to read the limits of a call that was let through, where what is known of them is old."""
        known = self._of(principal, model)
        if known.reading is None and not known.is_fresh:
            known.reading = asyncio.create_task(self._read(known, principal, model), name="nearest limit")

    async def of(self, principal: Principal, model: str, *, micros: int, tokens: int) -> why.LimitState | None:
        """The limit that the fewest further calls of this size fit into; None: none stops them, or none is known."""
        known = self._of(principal, model)
        if known.at == float("-inf") and known.reading is not None:
            await asyncio.shield(known.reading)
        return why.nearest(known.limits, micros=micros, tokens=tokens)

    async def close(self) -> None:
        """Nobody asks any more."""
        reading = [known.reading for known in self._known.values() if known.reading is not None]
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    def _of(self, principal: Principal, model: str) -> _Known:
        asker = (principal.organization_id, principal.user_id, principal.api_key_id, model)
        known = self._known.get(asker)
        if known is None:
            known = self._known[asker] = _Known()
            if len(self._known) > MOST_KNOWN:
                self._known.popitem(last=False)
        else:
            self._known.move_to_end(asker)
        return known

    async def _read(self, known: _Known, principal: Principal, model: str) -> None:
        try:
            async with self._database.tenant(principal.organization_id) as conn:
                known.limits = await why.limits_passed(
                    conn,
                    organization_id=principal.organization_id,
                    user_id=principal.user_id,
                    api_key_id=principal.api_key_id,
                    model=model,
                )
            known.until = min((each.resets_at for each in known.limits if each.resets_at is not None), default=None)
        except Exception as error:
            # An answer without these two headers is better than none.
            log.warning("nearest limit not read", error=str(error))
        finally:
            known.at = monotonic()
            known.reading = None
