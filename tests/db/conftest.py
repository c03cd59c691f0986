"""Servers of their own for tests that break them, with everything durable."""

import os
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bursar.db.embedded import EmbeddedServer
from bursar.errors import BursarError


@pytest.fixture
def new_server(open_dir: Path) -> Iterator[Callable[..., EmbeddedServer]]:
    """Makes servers in one data folder; whatever still runs at the end is stopped."""
    made: list[EmbeddedServer] = []

    def make(data_dir: Path = open_dir / "data", **arguments: object) -> EmbeddedServer:
        made.append(EmbeddedServer(data_dir, **arguments))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def as_user() -> Callable[[int, Callable[[], object]], str]:
    """Runs a function in a child process with another uid; the text of what it returns or raises. Needs root.

    The child is forked, since the interpreter's files may be closed to that user.
    """

    def run(uid: int, function: Callable[[], object]) -> str:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                answer = str(function())
            except BursarError as error:
                answer = f"{type(error).__name__}: {error}"
            except BaseException:
                answer = traceback.format_exc()
            os.write(writing, answer.encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = pipe.read()
        os.waitpid(child, 0)
        return answer

    return run
