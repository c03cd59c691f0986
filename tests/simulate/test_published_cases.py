"""Cases that other credit systems publish, in our own form: every figure equal, or the difference a documented rule.

Each file of `cases` names its source; a case that differs names the rule in docs/simulate.md under `differs`.
"""

import json
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bursar import db
from bursar.simulation.playing import play
from bursar.simulation.report import as_json
from bursar.simulation.scenario import read_scenario

CASES = Path(__file__).parent / "cases"
PAGE = Path(__file__).parents[2] / "docs" / "simulate.md"
FEWEST = 85


def _cases() -> Iterator[Any]:
    for file in sorted(CASES.glob("*.json")):
        for number, case in enumerate(json.loads(file.read_text(encoding="utf-8"))["cases"]):
            yield pytest.param(case, id=f"{file.stem} {number}: {case['name']}")


@pytest.mark.parametrize("case", list(_cases()))
async def test_a_published_case_comes_to_the_published_figures(database: db.Database, case: dict[str, Any]) -> None:
    answer = as_json(await play(database, read_scenario(json.dumps(case["scenario"]))))
    asked = {each["at"]: each for each in answer["asked"]}
    for expected in case["expect"]:
        found = asked[expected["at"]]
        for name in expected.keys() - {"at", "grants"}:
            value = found[name] if name in found else found["pools"][0][name]
            assert Decimal(value) == Decimal(str(expected[name])), f"{name} at {expected['at']}: {value}"
        for grant, balance in expected.get("grants", {}).items():
            assert Decimal(found["grants"][grant]) == Decimal(str(balance)), f"{grant} at {expected['at']}: {found}"
    for expected, segment in zip(case.get("segments", ()), answer["segments"], strict="segments" in case):
        shown = {name: segment[name] for name in expected.keys() - {"grants"}}
        assert shown == {name: expected[name] for name in shown}, segment
        if "grants" in expected:
            assert {each["id"]: each["used"] for each in segment["grants"]} == expected["grants"]
    assert [(each["event"], each["id"], each["code"]) for each in answer["refusals"]] == [
        tuple(each) for each in case.get("refusals", ())
    ]


def test_every_difference_from_a_published_figure_is_a_documented_rule() -> None:
    rules = set(re.findall(r'<a id="([\w-]+)"></a>', PAGE.read_text(encoding="utf-8")))
    named = {case.values[0]["differs"] for case in _cases() if "differs" in case.values[0]}
    assert named <= rules


def test_there_are_as_many_published_cases_as_the_documentation_says() -> None:
    assert len(list(_cases())) >= FEWEST
