"""Rows of a breakdown sum to its total, and what nobody owns has a name."""

from uuid import UUID

from hypothesis import given
from hypothesis import strategies as st

from bursar.money import Micros
from bursar.usage.breakdowns import NAMED_REMAINDERS, Share, break_down

shares = st.builds(
    Share,
    id=st.uuids(),
    name=st.text(max_size=5),
    detail=st.none(),
    state=st.sampled_from(["active", "left", *NAMED_REMAINDERS]),
    charged_micros=st.integers(-(10**9), 10**15).map(Micros),
    requests=st.integers(0, 1000),
)


def share(name: str, charged: int, state: str = "active") -> Share:
    return Share(UUID(int=abs(hash(name))), name, None, state, Micros(charged), 1)


def rows(
    *given: Share, top: int = 5, always: tuple[str, ...] = (), table: str = "keys"
) -> list[tuple[str, int, int | None]]:
    total = Micros(sum(each.charged_micros for each in given))
    breakdown = break_down(table, given, charged_micros=total, requests=len(given), top=top, always=always)
    return [(row.name, row.charged_micros, row.share_permille) for row in breakdown.rows]


@given(given_shares=st.lists(shares, max_size=30), top=st.integers(1, 10))
def test_rows_sum_to_the_total_to_the_micro(given_shares: list[Share], top: int) -> None:
    total = Micros(sum(each.charged_micros for each in given_shares))
    requests = sum(each.requests for each in given_shares)
    breakdown = break_down("people", given_shares, charged_micros=total, requests=requests, top=top)
    assert sum(row.charged_micros for row in breakdown.rows) == total
    assert sum(row.count for row in breakdown.rows) == len(given_shares)
    named = [row for row in breakdown.rows if row.kind == "one"]
    assert len(named) <= top + 1
    assert named == sorted(named, key=lambda row: -row.charged_micros)


def test_what_is_not_named_is_one_row_with_its_number() -> None:
    shown = rows(*(share(name, amount) for name, amount in zip("abcdefgh", range(80, 0, -10), strict=True)))
    assert [name for name, _, _ in shown] == ["a", "b", "c", "d", "e", "3 other keys"]
    assert shown[-1][1] == 30 + 20 + 10


def test_a_single_one_left_over_is_named_rather_than_counted() -> None:
    assert [name for name, _, _ in rows(*(share(name, 10) for name in "abcdef"))] == list("abcdef")


def test_nobodys_use_stands_below_with_its_name() -> None:
    shown = rows(
        share("Prod", 700), share("old", 200, "deleted"), share("older", 50, "deleted"), share("?", 50, "unknown")
    )
    assert shown == [("Prod", 700, 700), ("Deleted key", 250, 250), ("Unknown key", 50, 50)]


def test_unattributed_is_always_listed_where_asked() -> None:
    shown = rows(share("Sales", 10), always=("unattributed",), table="departments")
    assert shown == [("Sales", 10, 1000), ("Unattributed", 0, 0)]


def test_a_share_is_rounded_once_from_exact_values() -> None:
    # 1/3 and 2/3 of the total, and half a permille rounds up.
    assert [share for _, _, share in rows(share("a", 2), share("b", 1))] == [667, 333]
    assert [share for _, _, share in rows(share("a", 1999), share("b", 1))] == [1000, 1]


def test_there_is_no_share_of_nothing() -> None:
    assert rows(share("a", 5), share("b", -5)) == [("a", 5, None), ("b", -5, None)]
