"""R8: any history of batches and commands leaves database and reference with the same balances, holds and grants."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest
from tests.credits.histories import Connection, Disagreement, Stage, Step, random_steps, shrunk
from tests.promises.figures import SEED, figure, tell

from bursar import db

Theater = tuple[Connection, Connection]

SHARDS = 4

# Histories that once failed, as the shrinker printed them.
REGRESSIONS: dict[str, list[Step]] = {
    # A chain of one organization was built because another's was stale.
    "a stale chain elsewhere": [
        ("pool", 1, 897, 434, 665, 874),
        ("limit", 0, 527, 568, 509, 785, 969, 661, 256),
        ("batch", 1, ((882, 173, 511, 748, 24, 326, 406, 84, 609, 255),)),
        (
            "batch",
            2,
            (
                (281, 664, 903, 703, 289, 837, 944, 958, 413, 188),
                (953, 769, 913, 17, 722, 594, 543, 166, 4, 638),
            ),
        ),
    ],
    # A settle by expiry and the settle of the same request met in one batch at one instant.
    "two bookings at one instant": [
        ("pool", 0, 0, 0, 0, 0),
        ("grant", 0, 0, 0, 100, 0, 0, 0, 0),
        (
            "batch",
            5,
            ((993, 305, 238, 97, 74, 724, 542, 688, 816, 218), (911, 503, 266, 318, 588, 405, 501, 368, 460, 935)),
        ),
        ("expire", 9, 0, 0, 0, 0),
        (
            "batch",
            9,
            ((403, 471, 443, 720, 227, 498, 632, 517, 939, 433), (420, 561, 486, 14, 548, 87, 675, 803, 525, 913)),
        ),
    ],
}


@contextmanager
def _theater(books: db.Database) -> Iterator[Theater]:
    """Connections of the simulator and of an admin; kept for many histories, whose plans they remember."""
    with (
        psycopg.connect(books.dsn("bursar_simulator"), autocommit=True) as simulator,
        psycopg.connect(books.dsn("admin"), autocommit=True) as admin,
    ):
        yield simulator, admin


def _play(theater: Theater, steps: list[Step], *, look_every: int = 8) -> str | None:
    """What differs, if anything."""
    try:
        Stage(*theater).play(steps, look_every=look_every)
    except (Disagreement, psycopg.Error) as error:
        return f"{type(error).__name__}: {error}"
    return None


def _check(theater: Theater, steps: list[Step], label: str) -> None:
    what = _play(theater, steps)
    if what is not None:
        short = shrunk(lambda fewer: _play(theater, fewer, look_every=1) is not None, steps, seconds=60)
        pytest.fail(f"{label}: {what}\n\nshortest found:\n{_program(short)}\n\n{_play(theater, short, look_every=1)}")


def _program(steps: list[Any]) -> str:
    return "[\n" + "".join(f"    {step!r},\n" for step in steps) + "]"


@pytest.mark.parametrize("shard", range(SHARDS))
def test_any_history_ends_as_the_reference_says(books: db.Database, shard: int) -> None:
    histories, steps = figure("histories"), figure("steps of a history")
    with _theater(books) as theater:
        for n in range(shard, histories, SHARDS):
            _check(theater, random_steps(SEED + n, steps), f"BURSAR_TEST_SEED={SEED + n}")
    tell(f"{histories // SHARDS} histories of {steps} steps")


@pytest.mark.parametrize("name", REGRESSIONS)
def test_a_history_that_once_failed_does_not_fail_again(books: db.Database, name: str) -> None:
    with _theater(books) as theater:
        _check(theater, REGRESSIONS[name], name)
