"""Breakdowns: a total, the largest of what makes it up, and named rows for all the rest."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from bursar.money import Micros, divide_half_up

TOP: Final = 5

ONE: Final = "one"
OTHERS: Final = "others"

# What is summed up under one name because nobody can be named; the order is that of the rows, below `others`.
NAMED_REMAINDERS: Final[Mapping[str, str]] = {
    "personal": "Personal keys",
    "service": "Service keys",
    "deleted": "Deleted key",
    "unknown": "Unknown",
    "none": "Without a key",
    "unattributed": "Unattributed",
}
# More exact names in one table.
_NAMES: Final[Mapping[tuple[str, str], str]] = {
    ("people", "unknown"): "Deleted person",
    ("keys", "unknown"): "Unknown key",
    ("models", "unknown"): "Unknown model",
    ("departments", "unknown"): "Unknown department",
}
_OTHERS: Final[Mapping[str, str]] = {
    "people": "other people",
    "keys": "other keys",
    "models": "other models",
    "departments": "other departments",
}


@dataclass(frozen=True, slots=True)
class Share:
    """One thing's part of a total, before ranking. state: active, another worth telling, or a remainder's."""

    id: UUID | None
    name: str | None
    detail: str | None
    state: str
    charged_micros: Micros
    requests: int


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a breakdown. kind: `one` thing, `others` or a named remainder, of `count` things.

    share_permille: of the total, rounded; None where the total is not positive, so that there is no share.
    """

    kind: str
    id: UUID | None
    name: str
    detail: str | None
    state: str
    count: int
    charged_micros: Micros
    requests: int
    share_permille: int | None


@dataclass(frozen=True, slots=True)
class Breakdown:
    """A total and its rows, which sum to it exactly: the largest, `others`, then named remainders."""

    table: str
    charged_micros: Micros
    requests: int
    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        assert sum(row.charged_micros for row in self.rows) == self.charged_micros, self.table
        assert sum(row.requests for row in self.rows) == self.requests, self.table


def permille(part: int, whole: int) -> int | None:
    """part / whole in thousandths, rounded half-up; None when the whole is not positive."""
    return divide_half_up(1000 * part, whole) if whole > 0 else None


def break_down(
    table: str,
    shares: Iterable[Share],
    *,
    charged_micros: Micros,
    requests: int,
    top: int = TOP,
    always: Sequence[str] = (),
) -> Breakdown:
    """Rank shares by what they were charged, then name.

    charged_micros, requests: the total as known from elsewhere. always: remainders that have a row also when empty.
    """
    ranked: list[Share] = []
    remainders: dict[str, list[Share]] = {state: [] for state in NAMED_REMAINDERS}
    for share in shares:
        remainders.get(share.state, ranked).append(share)
    ranked.sort(
        key=lambda share: (-share.charged_micros, -share.requests, share.name or "", str(share.id), share.detail or "")
    )
    # A single one left over is named; `1 other` would take the same room and say less.
    shown = top if len(ranked) > top + 1 else top + 1
    rows = [_row_of_one(share, charged_micros) for share in ranked[:shown]]
    if others := ranked[shown:]:
        rows.append(_row_of_many(OTHERS, f"{len(others)} {_OTHERS[table]}", others, charged_micros))
    for state, name in NAMED_REMAINDERS.items():
        if remainders[state] or state in always:
            rows.append(_row_of_many(state, _NAMES.get((table, state), name), remainders[state], charged_micros))
    return Breakdown(table, charged_micros, requests, tuple(rows))


def _row_of_one(share: Share, total: Micros) -> Row:
    return Row(
        kind=ONE,
        id=share.id,
        name=share.name or "",
        detail=share.detail,
        state=share.state,
        count=1,
        charged_micros=share.charged_micros,
        requests=share.requests,
        share_permille=permille(share.charged_micros, total),
    )


def _row_of_many(kind: str, name: str, shares: Sequence[Share], total: Micros) -> Row:
    charged = Micros(sum(share.charged_micros for share in shares))
    return Row(
        kind=kind,
        id=None,
        name=name,
        detail=None,
        state=kind,
        count=len(shares),
        charged_micros=charged,
        requests=sum(share.requests for share in shares),
        share_permille=permille(charged, total),
    )
