"""One request to move credits, the verdict on it, and a batch of them as one call of credits.move_batch."""

from collections.abc import Sequence
from datetime import datetime
from enum import IntEnum, IntFlag
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, NamedTuple
from uuid import UUID

from psycopg.types.numeric import Int2, Int4, Int8

from bursar.db import arrays
from bursar.money import Micros, NanoUsd
from bursar.pricing.usage import Usage

ONE_REQUEST: Final = Usage().as_array()
NOTHING: Final = Micros(0)
NO_COST: Final = NanoUsd(0)


class Action(IntEnum):
    """What is asked, in the numbers of move_batch."""

    AUTHORIZE = 1
    EXTEND = 2
    SETTLE = 3
    RELEASE = 4
    DEDUCT = 5


class Flag(IntFlag):
    """Bits of a move; the stored ones are explained at ledger.attribution.flags.

    Several together are plain integers: to make members of them takes longer than all else that is done with them.
    """

    NONE = 0
    SENT = 1
    OWN_KEY = 2
    ESTIMATED = 4
    STREAMED = 8
    MAY_WAIT = 16
    REPEATED = 32
    UNPRICED = 256
    UNLIMITED = 512  # the request names no limit of output; of an authorize: its amount is a guess
    MAY_RESIZE = 1024  # where an authorize would be refused for want of room: RESIZE, and nothing is final
    IN_ALL = 2048  # of an extend: what shall be held in all, not in addition
    REPORTED = 4096  # by a program that calls models itself
    BATCH = 8192  # answered in a batch of the provider's

    if not TYPE_CHECKING:
        __or__ = __ror__ = int.__or__
        __and__ = __rand__ = int.__and__
        __invert__ = int.__invert__


class Outcome(IntEnum):
    """What was decided, in the numbers of move_batch."""

    ACCEPTED = 0
    REFUSED = 1
    WAIT = 2
    KNOWN = 3
    NO_HOLD = 4
    KEY_REUSED = 5
    NOT_ALLOWED = 6
    KNOWN_REFUSED = 7
    RESIZE = 8


OUTCOMES: Final = tuple(Outcome)  # by number
_ALONE: Final = (Action.AUTHORIZE, Action.SETTLE, Action.DEDUCT)
_IN_FAVOR: Final = (Outcome.ACCEPTED, Outcome.KNOWN)


class Move(NamedTuple):
    """One request to move credits. (A tuple is made in a fifth of the time that a frozen dataclass takes.)

    amount_micros: to hold (authorize), to hold in addition, or in all with Flag.IN_ALL (extend), to charge (settle,
    deduct).
    tokens: the same, for limits that count tokens. cost_nano_usd: provider cost that the amount stands for.
    mark_micros: cost of the input alone (authorize), cost so far (extend).
    feature: what it is for, which pools and limits restricted by feature go by.
    """

    action: Action
    organization_id: UUID
    request_id: UUID
    user_id: UUID | None = None
    api_key_id: UUID | None = None
    amount_micros: Micros = NOTHING
    tokens: int = 0
    cost_nano_usd: NanoUsd = NO_COST
    usage: tuple[int, ...] = ONE_REQUEST
    mark_micros: Micros = NOTHING
    lease_seconds: int = 0
    flags: Flag = Flag.NONE
    provider: str | None = None
    model: str | None = None
    price_version_id: UUID | None = None
    provider_key_id: UUID | None = None
    conversation_id: UUID | None = None
    used_at: datetime | None = None
    idempotency_key: str | None = None
    body_hash: bytes | None = None
    feature: str | None = None

    def repeated(self) -> "Move":
        """The same move, after an answer that never came."""
        return self._replace(flags=self.flags | Flag.REPEATED)

    def impatient(self) -> "Move":
        """The same move, to be refused for good where it would have to wait."""
        return self._replace(flags=self.flags & ~(Flag.MAY_WAIT | Flag.MAY_RESIZE))


class Verdict(NamedTuple):
    """What was decided on a move. held and charged are micros; available is what its user and key could still spend."""

    outcome: Outcome
    request_id: UUID
    held_micros: Micros
    charged_micros: Micros
    available_micros: Micros | None
    binding_id: UUID | None
    detail: str | None

    @property
    def accepted(self) -> bool:
        """Decided in favor, now or earlier under the same key."""
        return self.outcome in _IN_FAVOR


MOVE_BATCH: Final = (
    "select place, outcome, request_id, held_micros, charged_micros, available_micros, binding_id, detail "
    "from credits.move_batch("
    "%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %t)"
)
MOVE_ONE: Final = (
    "select place, outcome, request_id, held_micros, charged_micros, available_micros, binding_id, detail "
    "from credits.move_one(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %t)"
)


def as_arguments(moves: Sequence[Move], at: datetime | None = None) -> list[Any]:
    """The arguments of MOVE_BATCH: one array per field, one place per move."""
    return [
        moves[0].organization_id,
        arrays.uuids([move.organization_id for move in moves]),
        arrays.int2s([move.action for move in moves]),
        arrays.uuids([move.request_id for move in moves]),
        arrays.uuids([move.user_id for move in moves]),
        arrays.uuids([move.api_key_id for move in moves]),
        arrays.int8s([move.amount_micros for move in moves]),
        arrays.int8s([move.tokens for move in moves]),
        arrays.int8s([move.cost_nano_usd for move in moves]),
        arrays.int4s(list(chain.from_iterable([move.usage for move in moves]))),
        arrays.int8s([move.mark_micros for move in moves]),
        arrays.int4s([move.lease_seconds for move in moves]),
        arrays.int4s([move.flags for move in moves]),
        arrays.texts([move.provider for move in moves]),
        arrays.texts([move.model for move in moves]),
        arrays.uuids([move.price_version_id for move in moves], or_null=True),
        arrays.uuids([move.provider_key_id for move in moves], or_null=True),
        arrays.uuids([move.conversation_id for move in moves], or_null=True),
        arrays.timestamps([move.used_at for move in moves], or_null=True),
        arrays.texts([move.idempotency_key for move in moves], or_null=True),
        arrays.byteas([move.body_hash for move in moves], or_null=True),
        arrays.texts([move.feature for move in moves], or_null=True),
        at,
    ]


def as_scalars(move: Move, at: datetime | None = None) -> list[Any]:
    """The arguments of MOVE_ONE."""
    return [
        move.organization_id,
        Int2(move.action),
        move.request_id,
        arrays.uuid(move.user_id),
        arrays.uuid(move.api_key_id),
        Int8(move.amount_micros),
        Int8(move.tokens),
        Int8(move.cost_nano_usd),
        arrays.int4s(move.usage),
        Int8(move.mark_micros),
        Int4(move.lease_seconds),
        Int4(move.flags),
        arrays.text(move.provider),
        arrays.text(move.model),
        arrays.uuid(move.price_version_id),
        arrays.uuid(move.provider_key_id),
        arrays.uuid(move.conversation_id),
        arrays.timestamp(move.used_at),
        arrays.text(move.idempotency_key),
        arrays.bytea(move.body_hash),
        arrays.text(move.feature),
        at,
    ]


def as_call(moves: Sequence[Move], at: datetime | None = None) -> tuple[str, list[Any]]:
    """The statement that decides these moves, with its arguments; its rows are read by `as_verdicts`.

    One alone goes without arrays, which is most of what it costs.
    """
    if len(moves) == 1 and moves[0].action in _ALONE:
        return MOVE_ONE, as_scalars(moves[0], at)
    return MOVE_BATCH, as_arguments(moves, at)


def as_verdicts(rows: Sequence[Sequence[Any]]) -> list[Verdict]:
    """Rows of MOVE_BATCH, in the order of the moves."""
    return [Verdict(OUTCOMES[row[1]], *row[2:]) for row in rows]
