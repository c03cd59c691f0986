"""An HTTP client without a server: requests go into an application object."""

from collections.abc import AsyncIterator
from typing import Annotated

import httpx2
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from bursar import db
from bursar.identity import api
from bursar.identity.guards import CurrentPrincipal, OrgMember, Tx, needs
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.problems import Problem


@pytest.fixture
def app(database: db.Database) -> FastAPI:
    """The sign-in routes, and a route for each guard."""
    application = FastAPI()
    application.state.database = database
    application.include_router(api.router)

    async def refused(_: Request, problem: Exception) -> JSONResponse:
        assert isinstance(problem, Problem)
        return JSONResponse(problem.body(), status_code=problem.status)

    application.add_exception_handler(Problem, refused)

    @application.get("/me")
    async def me(principal: CurrentPrincipal) -> str:
        return str(principal.organization_id)

    @application.api_route("/o/{org}", methods=["GET", "POST"])
    async def organization(principal: OrgMember, tx: Tx) -> dict[str, str]:
        set_to = await db.fetch_value(tx, "select current_setting('app.organization_id')")
        return {"acts_in": str(principal.organization_id), "transaction": set_to}

    @application.get("/o/{org}/limits")
    async def limits(principal: Annotated[Principal, needs(Permission.LIMITS_WRITE)]) -> list[str]:
        return sorted(principal.roles)

    return application


@pytest.fixture
async def browser(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A browser on this machine: keeps cookies, says where its requests come from."""
    transport = httpx2.ASGITransport(app=app)
    headers = {"sec-fetch-site": "same-origin"}
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        yield client
