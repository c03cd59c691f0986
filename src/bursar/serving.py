"""The server processes, and the one that watches over them; as a program of its own (`python -m bursar.serving`) for
`bursar serve` with more than one.

It imports little: that process, and what every server process inherits from it, would have it in memory for nothing.
"""

import contextlib
import importlib
import os
import signal
import sys
import tempfile
from typing import Final

import uvicorn

from bursar import db
from bursar.logs import configure_logs
from bursar.settings import Settings

GRACE_SECONDS: Final = 30
"""How long requests under way may take once the server is told to stop."""


def run_server(settings: Settings) -> None:
    """Serve until a signal comes. Requests under way are finished, for at most GRACE_SECONDS.

    This process holds the database meanwhile: the embedded server outlives each server process, and a fault at start
    is told here.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises it again when it has stopped
    with db.held(settings), contextlib.ExitStack() as kept:
        if settings.workers > 1:
            metrics = kept.enter_context(tempfile.TemporaryDirectory(prefix="bursar-metrics-"))
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics
        print(f"Bursar listens on http://{settings.host}:{settings.port}", file=sys.stderr, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            _run_uvicorn(settings)


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
