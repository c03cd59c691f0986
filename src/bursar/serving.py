"""The server processes, and the one that watches over them; as a program of its own (`python -m bursar.serving`) for
`bursar serve` with more than one.

It imports little: that process, and what every server process inherits from it, would have it in memory for nothing.
"""

import contextlib
import fcntl
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import uvicorn

from bursar import db
from bursar.logs import configure_logs
from bursar.settings import Settings

GRACE_SECONDS: Final = 30
"""How long requests under way may take once the server is told to stop."""

_METRICS: Final = "bursar-metrics-"


def run_server(settings: Settings) -> None:
    """Serve until a signal comes. Requests under way are finished, for at most GRACE_SECONDS.

    This process holds the database meanwhile: the embedded server outlives each server process, and a fault at start
    is told here.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it has stopped
    with db.held(settings), contextlib.ExitStack() as kept:
        if settings.workers > 1:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = kept.enter_context(metrics_folder())
        print(f"Bursar listens on http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            _run_uvicorn(settings)


@contextlib.contextmanager
def metrics_folder() -> Iterator[str]:
    """A folder for the metrics of several processes, locked for as long as this one lives; those of dead ones go."""
    for left in Path(tempfile.gettempdir()).glob(f"{_METRICS}*"):
        _remove_if_dead(left)
    with tempfile.TemporaryDirectory(prefix=_METRICS) as folder, _locked(Path(folder)):
        yield folder


def _remove_if_dead(folder: Path) -> None:
    """Remove a folder of ours whose process was killed. An empty one may be somebody's who is about to lock it."""
    with contextlib.suppress(OSError):  # another's, in use, or gone meanwhile
        if folder.is_symlink() or folder.stat().st_uid != os.geteuid():
            return
        with _locked(folder, fcntl.LOCK_NB):
            if any(folder.iterdir()):
                shutil.rmtree(folder)


@contextlib.contextmanager
def _locked(folder: Path, how: int = 0) -> Iterator[None]:
    """Locked until it is left, also by being killed. how: with LOCK_NB, OSError where somebody else has locked it."""
    place = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(place, fcntl.LOCK_EX | how)
        yield
    finally:
        os.close(place)


def _run_uvicorn(settings: Settings) -> None:
    uvicorn.run(
        "bursar.server:from_environment",
        factory=True,
        host=settings.host,
        port=settings.port,
        workers=settings.workers,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        http="bursar.asgi:Protocol",
        ws="none",  # nothing here speaks it; uvicorn would leave a POST that asks for it without an answer
        timeout_graceful_shutdown=GRACE_SECONDS,
        timeout_keep_alive=75,
    )


def main() -> int:
    """Serve as the environment says; the exit code."""
    try:
        settings = Settings.from_environment()
        configure_logs(settings.log_format, settings.log_level)
        run_server(settings)
    except Exception as error:
        # In the words of the command line, which is needed for nothing else.
        exits = importlib.import_module("bursar.cli.exits")
        exits.explain(error)
        return int(exits.exit_code_of(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
