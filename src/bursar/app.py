"""The web application: which capabilities it is made of, and how everything that can go wrong is answered.

A capability takes part by a line in ROUTERS (paths) or PARTS (something that runs as long as the application does,
such as the batcher's lanes; it may set `app.state.gateway`, the ASGI application of the paths under /v1, and
`app.state.credits`, that of the hot paths under /api/v1/credits).
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from typing import Any, Final, TypeAlias

import psycopg
import structlog
from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from bursar import __version__, db, operation
from bursar.asgi import Around, BodyLimits, Receive, Scope, Send, around, is_gateway
from bursar.credits import api as credits_api
from bursar.credits.front import OPERATIONS
from bursar.gateway import api as gateway_api
from bursar.gateway import opening
from bursar.identity import api as identity_api
from bursar.identity.organizations import OrganizationNotFound
from bursar.identity.principals import InvalidApiKey
from bursar.identity.sessions import NotSignedIn
from bursar.problems import (
    MEDIA_TYPE,
    BodyTooLarge,
    FieldError,
    InternalError,
    InvalidRequest,
    MalformedBody,
    NotFound,
    Problem,
    WrongMethod,
    documents,
    of_exception,
)
from bursar.settings import Settings
from bursar.usage import api as usage_api
from bursar.web import pages
from bursar.web.rendering import wants_page

ASGI: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]
Part: TypeAlias = Callable[[FastAPI], AbstractAsyncContextManager[None]]


@asynccontextmanager
async def _gateway(app: FastAPI) -> AsyncIterator[None]:
    """The paths under /v1 and the hot ones of the API, and what runs behind them."""
    async with opening.opened(app.state.database) as opened:
        app.state.gateway, app.state.credits = opened.gateway, opened.credits
        try:
            yield
        finally:
            app.state.gateway = app.state.credits = None


# The pages come first: they put a finished page before the bare one that identity signs people in with.
ROUTERS: Final[Sequence[APIRouter]] = (
    operation.router,
    pages.router,
    credits_api.router,
    gateway_api.router,
    usage_api.router,
    identity_api.router,
)
PARTS: Final[Sequence[Part]] = (_gateway,)

log = structlog.get_logger(__name__)


def create_app(
    database: db.Database,
    settings: Settings,
    *,
    routers: Sequence[APIRouter] = ROUTERS,
    parts: Sequence[Part] = PARTS,
) -> FastAPI:
    """The application on a database that is open. Its state: database, settings."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as running:
            for part in parts:
                await running.enter_async_context(part(app))
            yield

    app = App(
        title="Bursar",
        version=__version__,
        lifespan=lifespan,
        openapi_url="/api/openapi.json",
        docs_url=None,
        redoc_url=None,
    )
    app.state.database = database
    app.state.settings = settings
    app.state.gateway = app.state.credits = None
    for router in routers:
        app.include_router(router)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    # The last one added is the outermost.
    app.add_middleware(BodyLimits)
    app.add_middleware(Around)
    return app


class App(FastAPI):
    """The application. Paths under /v1 and the hot ones of the API go past FastAPI and what it wraps around them."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the lifespan."""
        hot = self._of(scope) if scope["type"] == "http" else None
        if hot is None:
            await super().__call__(scope, receive, send)
        else:
            await around(hot, scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        """The document, with what any route of its kind may answer beside the refusals that it names itself."""
        if self.openapi_schema is None:
            for path, operations in super().openapi()["paths"].items():
                for described in operations.values():
                    _add_common_refusals(path, described)
        return super().openapi()

    def _of(self, scope: Scope) -> ASGI | None:
        """What answers a hot path; None: FastAPI does."""
        path = scope["path"]
        if path in OPERATIONS:
            return self.state.credits if scope["method"] == "POST" else None
        return self.state.gateway if is_gateway(path) else None


def _add_common_refusals(path: str, operation: dict[str, Any]) -> None:
    common: list[type[Problem]] = [InvalidRequest]
    if path.startswith("/api/"):
        common += [NotSignedIn, InvalidApiKey]
    if "{org}" in path:
        common.append(OrganizationNotFound)
    if "requestBody" in operation:
        common += [MalformedBody, BodyTooLarge]
    answers = operation["responses"]
    for status, refusals in documents(*common).items():
        # FastAPI's own 422 is in a form that nothing here answers in.
        if MEDIA_TYPE not in answers.get(str(status), {}).get("content", {}):
            answers[str(status)] = refusals


def answer(request: Request, problem: Problem) -> Response:
    """A problem: a page for a browser that navigates, application/problem+json for everyone else."""
    if wants_page(request):
        return pages.problem_page(request, problem)
    return JSONResponse(
        problem.body(getattr(request.state, "request_id", None)),
        status_code=problem.status,
        headers=problem.headers,
        media_type=MEDIA_TYPE,
    )


async def _refusal(request: Request, error: Exception) -> Response:
    """Problems, and database errors that stand for one; any other database error is a bug."""
    problem = of_exception(error)
    if problem is None and isinstance(error, psycopg.DataError) and "NUL" in str(error):
        # The driver itself did not take a value: a text with a NUL character, which no text here has.
        problem = InvalidRequest("A text has a character that no text here has")
    if problem is None:
        return await _fault(request, error)
    return answer(request, problem)


async def _invalid(request: Request, error: Exception) -> Response:
    """What FastAPI found wrong with body and parameters. The values themselves are not repeated: they may be secret."""
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    if any(each["type"] == "json_invalid" for each in found):
        return answer(request, MalformedBody("The body is not valid JSON"))
    fields = [FieldError(_pointer(each["loc"]), each["msg"], each["type"]) for each in found]
    return answer(request, InvalidRequest(errors=fields))


def _pointer(place: Sequence[str | int]) -> str:
    """('body', 'items', 0) -> '#/items/0'; ('query', 'limit') -> 'limit'. Source: RFC 6901 section 6."""
    where, *steps = place
    if where != "body":
        return ".".join(str(step) for step in steps)
    return "#" + "".join(f"/{str(step).replace('~', '~0').replace('/', '~1')}" for step in steps)


async def _http(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: unknown paths, wrong methods, unreadable forms."""
    assert isinstance(error, HTTPException)
    headers = dict(error.headers or {})
    if error.status_code == 404:
        return answer(request, NotFound("There is nothing at this path", headers=headers))
    if error.status_code == 405:
        return answer(request, WrongMethod(f"This path takes {headers.get('Allow', 'other methods')}", headers=headers))
    if error.status_code < 500:
        return answer(request, MalformedBody(str(error.detail), headers=headers))
    return await _fault(request, error)


async def _fault(request: Request, error: Exception) -> Response:
    """A bug: the log has everything, the answer only the request id."""
    log.error("a request ended in a fault", exc_info=error)
    return answer(request, InternalError())


HANDLERS: Final[dict[type[Exception], Callable[[Request, Exception], Any]]] = {
    Problem: _refusal,
    psycopg.Error: _refusal,
    RequestValidationError: _invalid,
    HTTPException: _http,
}
