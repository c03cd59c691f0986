"""How much output a call is held for that names no limit of it.

By what the calls without a limit of the same key and model have put out lately: their 95th percentile and a margin. As
long as nothing at all is known, a call is held for a long answer where there is room for one, so that a burst of first
calls cannot outspend a budget that none of them knows; else for half of that, and so on down to the prior. The prior
counts for less with each output that is seen. What is remembered is fed as calls settle here, and read from the ledger
when an organization is first seen, and again where the little that is known here decides about a refusal, since other
processes may know better.
"""

import asyncio
from bisect import bisect_left, insort
from collections import OrderedDict, deque
from dataclasses import dataclass
from time import monotonic
from typing import Final
from uuid import UUID

import structlog

from bursar import db
from bursar.identity.principals import Principal

QUERIES: Final = db.load_queries("bursar.gateway")

FIRST_OUTPUT_TOKENS: Final = 16_000
"""What a call is held for of which nothing is known, where there is room: longer than nearly all answers."""

PRIOR_OUTPUT_TOKENS: Final = 1_000
"""The least that such a call is held for; streams extend their hold."""

PERCENTILE: Final = 95
MARGIN_PERCENT: Final = 125
"""Of the percentile: what comes next may be more than what came."""

RECENT: Final = 64
KNOWN_ENOUGH: Final = 16
"""From so many outputs on, a refusal is final without asking what other processes have seen."""

MOST_KNOWN: Final = 10_000
"""Keys and models that are remembered, and organizations: some ten megabytes. What was unused for longest goes."""

MOST_ROWS: Final = 2_000
MOST_DAYS: Final = 30
READ_AGAIN_SECONDS: Final = 0.25
MOST_READING: Final = 2
"""Organizations whose history is read at once, so that a process which has just started has connections for calls."""

log = structlog.get_logger(__name__)
Kind = tuple[UUID, UUID | None, str]
"""Organization, key (without one, the user) and model as priced."""


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that an answer is held for, and how many outputs that is drawn from."""

    tokens: int
    seen: int

    @property
    def may_be_better_known(self) -> bool:
        """Whether another process may have seen enough to know better."""
        return self.seen < KNOWN_ENOUGH


class Recent:
    """The last outputs of one kind of call."""

    __slots__ = ("_arrived", "_sorted")

    def __init__(self) -> None:
        self._arrived: deque[int] = deque()
        self._sorted: list[int] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def note(self, tokens: int) -> None:
        """One more; the oldest goes when there are too many."""
        if len(self._arrived) == RECENT:
            self._sorted.pop(bisect_left(self._sorted, self._arrived.popleft()))
        self._arrived.append(tokens)
        insort(self._sorted, tokens)

    def guess(self) -> Guess:
        """What the next one is held for. Rounded up.

        The prior fades with the square of what is known: a quarter of its lead counts after one output, a ninth after
        two, less than a hundredth after ten. One short answer is no reason to hold next to nothing for the next, and
        yet whoever waits for room need not wait until all is known.
        """
        seen = len(self._sorted)
        if seen == 0:
            return Guess(FIRST_OUTPUT_TOKENS, 0)
        percentile = self._sorted[-(-seen * PERCENTILE // 100) - 1]
        known = -(-percentile * MARGIN_PERCENT // 100)
        return Guess(known - max(0, PRIOR_OUTPUT_TOKENS - known) // -((seen + 1) ** 2), seen)


@dataclass(frozen=True, slots=True)
class _Row:
    asker_id: UUID | None
    model: str
    tokens: int


NOTHING_KNOWN: Final = Recent().guess()


class Outputs:
    """What calls without a limit put out lately. One per process; answers from memory."""

    def __init__(self, database: db.Database) -> None:
        self._database = database
        self._recent: OrderedDict[Kind, Recent] = OrderedDict()
        self._read_at: OrderedDict[UUID, float] = OrderedDict()
        self._reading: dict[UUID, asyncio.Task[None]] = {}
        self._places = asyncio.Semaphore(MOST_READING)

    def guess(self, principal: Principal, model: str) -> Guess:
        """Tokens to hold for each answer that a call without a limit asks for."""
        if principal.organization_id not in self._read_at:
            self.read_soon(principal.organization_id)
        recent = self._recent.get(kind_of(principal, model))
        return NOTHING_KNOWN if recent is None else recent.guess()

    def note(self, principal: Principal, model: str, tokens: int) -> None:
        """An answer of a call without a limit had so many tokens."""
        kind = kind_of(principal, model)
        recent = self._recent.get(kind)
        if recent is None:
            recent = self._recent[kind] = Recent()
            if len(self._recent) > MOST_KNOWN:
                self._recent.popitem(last=False)
        else:
            self._recent.move_to_end(kind)
        recent.note(tokens)

    def read_soon(self, organization_id: UUID) -> None:
        """Read an organization's history from the ledger beside what goes on; not again within READ_AGAIN_SECONDS."""
        at = monotonic()
        if at < self._read_at.get(organization_id, 0.0) + READ_AGAIN_SECONDS or organization_id in self._reading:
            return
        self._read_at[organization_id] = at
        self._read_at.move_to_end(organization_id)
        if len(self._read_at) > MOST_KNOWN:
            self._read_at.popitem(last=False)
        task = asyncio.create_task(self._read(organization_id), name="history of outputs")
        self._reading[organization_id] = task
        task.add_done_callback(lambda _: self._reading.pop(organization_id, None))

    async def read(self, organization_id: UUID) -> None:
        """Know what the ledger knows now, by a reading that all who ask share."""
        asked_at = monotonic()
        while self._read_at.get(organization_id, 0.0) < asked_at:
            self.read_soon(organization_id)
            reading = self._reading.get(organization_id)
            if reading is None or reading.done():
                # To wait for what is done gives nobody else a turn, not even the one who takes it out of the table.
                await asyncio.sleep(READ_AGAIN_SECONDS / 5)
            else:
                await asyncio.shield(reading)

    async def close(self) -> None:
        """Nobody asks any more."""
        reading = list(self._reading.values())
        for task in reading:
            task.cancel()
        await asyncio.gather(*reading, return_exceptions=True)

    async def _read(self, organization_id: UUID) -> None:
        try:
            async with self._places, self._database.tenant(organization_id) as conn:
                rows = await db.fetch_all(
                    conn,
                    _Row,
                    QUERIES.recent_outputs,
                    organization_id=organization_id,
                    most=MOST_ROWS,
                    days=MOST_DAYS,
                )
        except Exception as error:
            # Calls are held for what is known here, or for the prior; none fails for want of history.
            log.warning("history of outputs not read", organization_id=str(organization_id), error=str(error))
            return
        found: dict[Kind, Recent] = {}
        for row in rows:
            found.setdefault((organization_id, row.asker_id, row.model), Recent()).note(row.tokens)
        for kind, recent in found.items():
            # What settled here is in the ledger too, or will be in a moment: whichever knows more is kept.
            if len(recent) > len(self._recent.get(kind, ())):
                self._recent[kind] = recent
                self._recent.move_to_end(kind)
        while len(self._recent) > MOST_KNOWN:
            self._recent.popitem(last=False)


def kind_of(principal: Principal, model: str) -> Kind:
    """Which calls tell of each other."""
    return principal.organization_id, principal.api_key_id or principal.user_id, model
