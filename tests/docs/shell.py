"""A shell that knows just what the examples need: `bursar` runs in this process, `curl` asks the served application.

Variables, `NAME=$(command)`, `export`, comments, `< file`, `> file`, `cat`, `date -u`, `sleep` and `echo`. Anything
else is a fault of the example.
"""

import asyncio
import contextlib
import io
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import httpx2
import pytest

from bursar import cli

WRITTEN_URL: Final = "http://127.0.0.1:8420"
"""The address that the pages use; the application's own is put in its place."""

_ASSIGNMENT: Final = re.compile(r"(?P<export>export )?(?P<name>[A-Z_]+)=(?:\$\((?P<command>.*)\)|(?P<value>\S*))")
_VARIABLE: Final = re.compile(r"\$(?:\{(?P<braced>[A-Z_]+)\}|(?P<name>[A-Z_]+|\?))")
_SINGLE_QUOTED: Final = re.compile(r"'[^']*'")
_DOLLAR: Final = "\0"


@dataclass
class Shell:
    """One reader's terminal. environment: changed by `export` and undone after the test."""

    folder: Path
    base_url: str
    environment: pytest.MonkeyPatch
    variables: dict[str, str] = field(default_factory=lambda: {"?": "0"})

    async def run(self, line: str) -> str:
        """Run a line; what it prints, stdout before stderr. The exit code is in the variable `?`."""
        assignment = _ASSIGNMENT.fullmatch(line)
        if assignment is None:
            return "".join(await self._command(line))
        if assignment["command"]:
            value, err = await self._command(assignment["command"])
        else:
            value, err = self._filled(assignment["value"]), ""
            if value == ".":  # the reader's folder
                value = str(self.folder)
        self.variables[assignment["name"]] = value.strip()
        if assignment["export"]:
            self.environment.setenv(assignment["name"], value.strip())
        return err

    async def _command(self, line: str) -> tuple[str, str]:
        """(stdout, stderr)"""
        words = [self._filled(word) for word in _words(line)]
        target, source = _taken(words, ">"), _taken(words, "<")
        given = "" if source is None else (self.folder / source).read_text(encoding="utf-8")
        out, err = await self._program(words, given)
        if target is None:
            return out, err
        (self.folder / target).write_text(out, encoding="utf-8")
        return "", err

    async def _program(self, words: list[str], given: str) -> tuple[str, str]:
        match words:
            case ["bursar" | ".venv/bin/bursar", *arguments]:
                code, out, err = await asyncio.to_thread(self._bursar, arguments, given)
                self.variables["?"] = str(code)
                return out, err
            case ["curl", *arguments]:
                return await self._curl(arguments), ""
            case ["echo", *texts]:
                return " ".join(texts) + "\n", ""
            case ["cat", name]:
                return (self.folder / name).read_text(encoding="utf-8"), ""
            case ["date", "-u", form]:
                now = datetime.now(UTC)
                return now.strftime(form.removeprefix("+").replace("%N", f"{now.microsecond:06}000")) + "\n", ""
            case ["sleep", seconds]:
                await asyncio.sleep(float(seconds))
                return "", ""
        raise AssertionError(f"the examples' shell does not know {words[0]!r}")

    def _bursar(self, arguments: list[str], given: str) -> tuple[int, str, str]:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _stdin(given):
            code = cli.run([self._at_home(each) for each in arguments])
        return code, out.getvalue(), err.getvalue()

    def _at_home(self, word: str) -> str:
        """A file that an example names lies in the reader's folder."""
        return str(self.folder / word) if (self.folder / word).is_file() else word

    async def _curl(self, arguments: list[str]) -> str:
        """curl's options as far as the pages use them."""
        method, url, body, headers, shows_head, shown_header = "", "", None, {}, False, None
        form: list[tuple[str, Any]] = []
        written_to = None
        rest = iter(arguments)
        for each in rest:
            match each:
                case "-H":
                    name, _, value = next(rest).partition(":")
                    headers[name.strip()] = value.strip()
                case "-d":
                    body = next(rest)
                case "-X":
                    method = next(rest)
                case "-i":
                    shows_head = True
                case "-o":
                    written_to = next(rest)
                case "-F":
                    name, _, value = next(rest).partition("=")
                    named = value.removeprefix("@")
                    content = (named, (self.folder / named).read_bytes()) if named != value else (None, value)
                    form.append((name, content))
                case "-w":
                    shown_header = next(rest).removeprefix("%header{").removesuffix("}")
                case "-s" | "-N":
                    pass
                case _:
                    assert each.startswith(WRITTEN_URL), f"curl {each}"
                    url = each.replace(WRITTEN_URL, self.base_url)
        method = method or ("GET" if body is None and not form else "POST")
        async with httpx2.AsyncClient(timeout=30) as client:
            answer = await client.request(method, url, content=body, files=form or None, headers=headers)
        self.variables["?"] = "0"
        if written_to not in (None, "/dev/null"):
            (self.folder / str(written_to)).write_bytes(answer.content)
        if shown_header is not None:
            return answer.headers[shown_header]
        head = [f"HTTP/1.1 {answer.status_code} {answer.reason_phrase}"]
        head += [f"{name}: {value}" for name, value in answer.headers.items()]
        shown = "" if written_to is not None else answer.text
        return "\n".join([*head, "", shown] if shows_head else [shown])

    def _filled(self, word: str) -> str:
        filled = _VARIABLE.sub(lambda match: self.variables[match["braced"] or match["name"]], word)
        return filled.replace(_DOLLAR, "$")


def _words(line: str) -> list[str]:
    """Words and redirections; a dollar in single quotes is only that."""
    hidden = _SINGLE_QUOTED.sub(lambda match: match[0].replace("$", _DOLLAR), line)
    lexer = shlex.shlex(hidden, posix=True, punctuation_chars="<>")
    lexer.whitespace_split = True
    return list(lexer)


def _taken(words: list[str], sign: str) -> str | None:
    """The file after a redirection, which is taken out of the words."""
    if sign not in words:
        return None
    place = words.index(sign)
    name = words[place + 1]
    del words[place : place + 2]
    return name


@contextlib.contextmanager
def _stdin(text: str) -> Iterator[None]:
    before, sys.stdin = sys.stdin, io.StringIO(text)
    try:
        yield
    finally:
        sys.stdin = before


def is_as_written(printed: str, written: str) -> bool:
    """Whether output is what a page shows. Blanks and line breaks do not count; '…' stands for anything."""
    pattern = ".*?".join(re.escape("".join(part.split())) for part in written.split("…"))
    return re.fullmatch(pattern, "".join(printed.split()), re.DOTALL) is not None
