"""The reference pages are as the generator writes them from the program that is tested."""

import importlib.util
from types import ModuleType
from typing import Final

import pytest
from tests.docs.pages import ROOT

from bursar import db

FOLDER: Final = ROOT / "docs" / "reference"
STALE: Final = "stale: run make reference"


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


generate: Final = _generator()


@pytest.mark.parametrize("name", sorted(generate.pages()))
def test_a_page_is_as_the_program_says(name: str) -> None:
    assert (FOLDER / name).read_text(encoding="utf-8") == generate.pages()[name], STALE


async def test_the_page_of_the_schema_is_as_the_database_says(database: db.Database) -> None:
    assert (FOLDER / "schema.md").read_text(encoding="utf-8") == await generate.schema_page(database), STALE


def test_no_page_is_left_over() -> None:
    assert {each.name for each in FOLDER.iterdir()} == {*generate.pages(), "schema.md"}
