"""Routes of the treasury: where did this charge come from."""

from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request

from bursar.credits import explain as explaining
from bursar.credits import front
from bursar.identity.guards import CurrentPrincipal, database_of
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.problems import FieldError, NotFound, Problem, documents

router = APIRouter(prefix="/api/v1", tags=["credits"])
front.document(router)


class InvalidQuery(Problem):
    """A parameter is not what it should be."""

    status, code, title = 422, "invalid_parameter", "A parameter cannot be read"


@router.get("/requests/{request_id}", responses=documents(NotFound, InvalidQuery))
async def get_request(request_id: str, request: Request, principal: CurrentPrincipal) -> dict[str, Any]:
    """Where a request's charge came from: usage, price, grants drawn, limits passed; a refusal's reason.

    All of the organization's with `usage:read`, else one's own and those of the key that asks.
    """
    async with database_of(request).tenant(principal.organization_id) as conn:
        story = await explaining.explain(
            conn, organization_id=principal.organization_id, request_id=read_id(request_id, "req", "request_id")
        )
    if not _may_read(principal, story):
        raise NotFound("no such request")
    answer = story.as_json()
    if principal.may(Permission.MARGIN_READ):
        answer["provider_cost"] = {"amount": explaining.provider_cost(story), "unit": "USD"}
    return answer


def read_id(text: str, prefix: str, name: str) -> UUID:
    """An id as the API writes it ('req_…'), or a plain UUID.

    Raises:
        InvalidQuery
    """
    try:
        return UUID(text.removeprefix(f"{prefix}_"))
    except ValueError:
        raise InvalidQuery(f"{name} is no id", errors=[FieldError(name, f"{prefix}_… is required")]) from None


def _may_read(principal: Principal, story: explaining.Story) -> bool:
    """All with `usage:read`, one's own with `usage:own`, and what came through the very key that asks."""
    if principal.may(Permission.USAGE_READ):
        return True
    people, keys = story.askers
    of_person = principal.user_id in people and principal.may(Permission.USAGE_OWN)
    return of_person or principal.api_key_id in keys
