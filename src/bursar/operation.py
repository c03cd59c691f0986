"""What whoever runs the server asks it: is it alive, is it ready, how is it doing."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import Any, Final

import prometheus_client
import structlog
from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from prometheus_client import multiprocess

from bursar import db
from bursar.problems import Problem

READY_SECONDS: Final = 2.0
Refresh = Callable[[db.Database], Awaitable[None]]

REFRESHERS: list[Refresh] = []
"""Called before each scrape, to set gauges that are read from the database (open holds, say)."""

router = APIRouter(tags=["operation"], include_in_schema=False)
log = structlog.get_logger(__name__)


class NotReady(Problem):
    """The server is alive but cannot serve yet, or not at the moment."""

    status, code, title = 503, "not_ready", "Not ready"


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """Alive: the process answers. Asks nothing of the database, so that a restart is not its cure."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> JSONResponse:
    """Ready: the database answers, within two seconds."""
    try:
        async with asyncio.timeout(READY_SECONDS), request.app.state.database.untenanted() as conn:
            await db.fetch_value(conn, "select 1")
    except Exception as error:
        log.warning("not ready", error=str(error))
        raise NotReady("The database does not answer", headers={"Retry-After": "2"}) from error
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Prometheus text; with several server processes, of all of them together."""
    for refresh in REFRESHERS:
        try:
            await refresh(request.app.state.database)
        except Exception:
            log.exception("metrics could not be read from the database")
    return Response(prometheus_client.generate_latest(_registry()), media_type=prometheus_client.CONTENT_TYPE_LATEST)


def _registry() -> Any:
    if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
        return prometheus_client.REGISTRY
    registry = prometheus_client.CollectorRegistry()
    multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry
