"""The documentation as its reader has it: pages, and the fenced blocks in them."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))

_FENCE: Final = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE: Final = re.compile(r"`((?:tests|docs|tools|benchmarks|src)/[\w./-]*)`")
_LINK: Final = re.compile(r"\]\((?P<target>[^)#\s]+)(?:#(?P<anchor>[^)\s]+))?\)")


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block. info: what follows the language, such as the name of a file."""

    line: int
    language: str
    info: str
    text: str


@dataclass(frozen=True, slots=True)
class Command:
    """One command of a console block and what the page says it prints; '' where the page does not say."""

    line: int
    text: str
    prints: str


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        language, _, info = match["info"].strip().partition(" ")
        found.append(Block(text.count("\n", 0, match.start()) + 1, language, info.strip(), match["text"]))
    return found


def commands_of(block: Block) -> list[Command]:
    """Commands begin with '$ '; one that ends with a backslash goes on in the next line; the rest is output."""
    found: list[Command] = []
    goes_on = False
    for number, line in enumerate(block.text.splitlines(), block.line + 1):
        if goes_on:
            last = found.pop()
            found.append(Command(last.line, last.text.removesuffix("\\") + line.strip(), ""))
        elif line.startswith("$ "):
            found.append(Command(number, line[2:], ""))
        else:
            assert found, f"line {number}: output before any command"
            last = found.pop()
            found.append(Command(last.line, last.text, f"{last.prints}{line}\n"))
            continue
        goes_on = line.endswith("\\")
    return found


def links_of(page: Path) -> list[tuple[str, str]]:
    """(target, anchor) of every link to a file."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    return [(match["target"], match["anchor"] or "") for match in _LINK.finditer(text) if "://" not in match["target"]]


def anchors_of(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", _FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def files_of(page: Path) -> list[str]:
    """Files and folders of the project that a page names, from the project's root on."""
    return _FILE.findall(page.read_text(encoding="utf-8"))
