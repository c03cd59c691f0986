"""docs/promises.md names tests that there are, with the figures that they use."""

import ast
import re
from pathlib import Path

from tests.promises.figures import FIGURES

HERE = Path(__file__).parent
ROWS = re.findall(
    r"^\| (?:(R\d+) )?\| (.+?) \| `(\w+\.py)::(\w+)` \| (.*?) ?\| (.*?) ?\|$",
    (HERE.parents[1] / "docs" / "promises.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


def names_in(file: Path) -> set[str]:
    """Names of the tests in a file, without running it."""
    defined = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {each.name for each in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(each, defined)}


def test_each_test_that_the_page_of_promises_names_is_there() -> None:
    assert len(ROWS) > 10
    missing = [f"{file}::{name}" for _, _, file, name, _, _ in ROWS if name not in names_in(HERE / file)]
    assert missing == []


def test_the_figures_of_the_page_are_those_of_the_tests() -> None:
    named = set()
    for _, what, _, _, quick, full in ROWS:
        if not quick:
            assert not full
            continue
        number, _, name = quick.partition(" ")
        assert (int(number), full) == (FIGURES[name].quick, f"{FIGURES[name].full} {name}"), what
        named.add(name)
    assert named == FIGURES.keys() - {"steps of a history", "steps of a chronicle"}
