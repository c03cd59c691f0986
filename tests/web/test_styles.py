"""The style sheet's tokens keep their contrast in both themes, and no file reaches for another host."""

import re
from itertools import combinations
from pathlib import Path

import pytest

import bursar.web

FOLDER = Path(bursar.web.__file__).parent
STYLE = (FOLDER / "static" / "bursar.css").read_text()
TOKENS = dict(re.findall(r"--([a-z0-9-]+): light-dark\((#[0-9a-f]{6}, #[0-9a-f]{6})\)", STYLE))


def color(token: str, theme: str) -> str:
    light, dark = TOKENS[token].split(", ")
    return light if theme == "light" else dark


def luminance(hexadecimal: str) -> float:
    """Relative luminance. Source: WCAG 2.2, definition of contrast ratio."""
    channels = [int(hexadecimal[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    red, green, blue = (each / 12.92 if each <= 0.04045 else ((each + 0.055) / 1.055) ** 2.4 for each in channels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    lower, higher = sorted((luminance(one), luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(
    ("token", "least"),
    [
        *((text, 4.5) for text in ("text", "muted", "accent", "ok", "warn", "bad")),
        *((mark, 3.0) for mark in ("control", "others", "series-1", "series-2", "series-3", "series-4", "series-5")),
    ],
)
def test_every_token_stands_out_from_what_it_lies_on(theme: str, token: str, least: float) -> None:
    grounds = ["page", "card", "quiet"] if token in ("text", "muted") else ["card"]
    for ground in grounds:
        assert contrast(color(token, theme), color(ground, theme)) >= least, (token, ground)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_on_the_accent_can_be_read(theme: str) -> None:
    assert contrast(color("on-accent", theme), color("accent", theme)) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_two_series_share_a_color(theme: str) -> None:
    colors = [color(f"series-{number}", theme) for number in range(1, 6)]
    assert all(one != other for one, other in combinations(colors, 2))


def test_no_file_reaches_for_another_host() -> None:
    for path in FOLDER.rglob("*.*"):
        if path.suffix in (".css", ".js", ".html", ".svg"):
            text = path.read_text().replace("http://www.w3.org/2000/svg", "")
            assert not re.search(r"https?://|@import|//[a-z]+\.[a-z]", text), path


def test_templates_have_nothing_inline() -> None:
    for path in (FOLDER / "templates").iterdir():
        assert not re.search(r"\sstyle=|<style|\son[a-z]+=|javascript:|\|\s*safe", path.read_text()), path
