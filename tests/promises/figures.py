"""How much of each promise is tried: a little with every change (quick), much before a release (full).

    BURSAR_TEST_FULL=1                       the full form; `make promises` sets it
    BURSAR_TEST_FIGURES="kills=25 fills=3"   single figures, whatever the form
    BURSAR_TEST_SEED=7                       begins at this seed; without it every run draws another one

docs/promises.md has the same figures in a table; tests/promises/test_table.py compares them.
"""

import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Figure:
    """How often something is tried in the quick and in the full form."""

    quick: int
    full: int


FIGURES: Final[Mapping[str, Figure]] = {
    "deductions": Figure(500, 20_000),  # R1
    "steps": Figure(2_000, 100_000),  # R2
    "kills": Figure(5, 1_000),  # R3: of a server
    "database kills": Figure(5, 500),  # R4
    "other kills": Figure(3, 500),  # R5: of each kind
    "first starts": Figure(2, 25),  # R5: killed while the database is made and migrated
    "seconds": Figure(20, 600),  # R6
    "histories": Figure(200, 10_000),  # R8
    "steps of a history": Figure(40, 200),
    "chronicles": Figure(20, 2_000),  # R8: what was so at past instants
    "steps of a chronicle": Figure(40, 100),
    "keys": Figure(1_000, 50_000),  # R9
    "gateway keys": Figure(20, 1_000),
    "requests": Figure(5_000, 200_000),  # R12
    "other requests": Figure(1_200, 200_000),  # to the gateway and the hot paths
    "faults": Figure(20, 200),  # R18: of each kind, on each path, plain and streamed
    "fills": Figure(4, 50),  # R20
    "calls": Figure(1_000, 10_000),  # R21
    "targets": Figure(300, 50_000),  # R17: hostile addresses
    "worker kills": Figure(25, 500),  # R17: in the middle of deliveries
    "jumps": Figure(5, 50),  # R19
    "instants": Figure(60, 3_000),
    "tamperings": Figure(8, 800),  # R24: eight kinds in turn
    "sealed rows": Figure(20_000, 1_000_000),
    "priced calls": Figure(40, 5_000),
}


def _set_by_hand(text: str) -> dict[str, int]:
    """ "kills=25 database-kills=3" -> numbers by name."""
    found = {}
    for each in text.split():
        name, _, number = each.partition("=")
        name = name.replace("-", " ")
        assert name in FIGURES, f"BURSAR_TEST_FIGURES: {name} is none of {', '.join(FIGURES)}"
        found[name] = int(number)
    return found


IS_FULL: Final = os.environ.get("BURSAR_TEST_FULL", "") not in ("", "0")
SET: Final = _set_by_hand(os.environ.get("BURSAR_TEST_FIGURES", ""))
SEED: Final = int(os.environ.get("BURSAR_TEST_SEED") or random.SystemRandom().randrange(10**9))


def figure(name: str) -> int:
    """How often, in this run."""
    return SET.get(name, FIGURES[name].full if IS_FULL else FIGURES[name].quick)


def tell(what: str) -> None:
    """A line of what was done and seen; shown of a test that fails, and by `make promises` of each."""
    print(f"BURSAR_TEST_SEED={SEED}: {what}")
