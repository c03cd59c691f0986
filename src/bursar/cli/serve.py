"""`bursar serve`: the server processes."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from bursar import serving
from bursar.settings import Settings


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
    if settings.workers == 1:
        serving.run_server(settings)
        return
    # Who only watches over others needs nothing of the command line, and neither do those: 60 MB of memory each.
    os.environ |= {
        "BURSAR_HOST": settings.host,
        "BURSAR_PORT": str(settings.port),
        "BURSAR_WORKERS": str(settings.workers),
    }
    os.execv(sys.executable, [sys.executable, "-m", serving.__name__])
