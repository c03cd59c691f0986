"""`bursar serve`: the server processes."""

import contextlib
import os
import signal
import tempfile
from pathlib import Path
from typing import Annotated, Final

import typer
import uvicorn

from bursar import db
from bursar.settings import Settings

GRACE_SECONDS: Final = 30
"""How long requests under way may take once the server is told to stop."""


def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on (BURSAR_HOST).")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on (BURSAR_PORT).", min=0, max=65535)] = None,
    workers: Annotated[int | None, typer.Option(help="Server processes (BURSAR_WORKERS).", min=1, max=256)] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Folder of the embedded database (BURSAR_DATA_DIR).")] = None,
) -> None:
    """Migrate the database and serve API, pages and gateway until SIGINT or SIGTERM.

    Examples: `bursar serve`, `bursar serve --host 0.0.0.0 --port 8080 --workers 2`
    """
    if data_dir is not None:
        os.environ["BURSAR_DATA_DIR"] = str(data_dir.absolute())  # the server processes read the environment too
    settings = Settings.from_environment(host=host, port=port, workers=workers)
    run_server(settings)


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
        typer.echo(f"Bursar listens on http://{settings.host}:{settings.port}", err=True)
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
