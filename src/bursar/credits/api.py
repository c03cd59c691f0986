"""Routes of the treasury: why may this be spent, and where did this charge come from."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Request

from bursar.credits import explain as explaining
from bursar.credits import front
from bursar.credits import why as asking
from bursar.identity.api_keys import get_api_key
from bursar.identity.guards import CurrentPrincipal, NotPermitted, OrgMember, Tx, database_of
from bursar.identity.memberships import get_membership
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.money import Micros, NotAnAmount, parse_credits
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


@router.get("/organizations/{org}/why", responses=documents(NotFound, NotPermitted, InvalidQuery))
async def get_why(
    principal: OrgMember,
    tx: Tx,
    user: str | None = None,
    key: str | None = None,
    model: Annotated[str, Query(max_length=200)] = "",
    amount: Annotated[str, Query(max_length=40)] = "0",
) -> dict[str, Any]:
    """Would a request of this user and key be allowed now, and which limit decides.

    amount: credits. user: of a key alone, the key's owner; of neither, the caller with the key they came with.
    """
    user_id = read_id(user, "usr", "user") if user else principal.user_id
    key_id = read_id(key, "key", "key") if key else principal.api_key_id
    if key_id is not None and key_id != principal.api_key_id:
        owner_id = (await get_api_key(tx, organization_id=principal.organization_id, api_key_id=key_id)).user_id
        user_id = user_id if user else owner_id
    if user_id != principal.user_id and not principal.may(Permission.LIMITS_READ):
        raise NotPermitted(f"This needs {Permission.LIMITS_READ}")
    if user_id is not None and user_id != principal.user_id:  # of somebody who never was here nothing is kept
        await get_membership(tx, organization_id=principal.organization_id, user_id=user_id)
    answer = await asking.why(
        tx,
        organization_id=principal.organization_id,
        user_id=user_id,
        api_key_id=key_id,
        model=model,
        wanted_micros=_credits(amount),
    )
    return answer.as_json(organization=principal.organization_slug)


def read_id(text: str, prefix: str, name: str) -> UUID:
    """An id as the API writes it ('req_…'), or a plain UUID.

    Raises:
        InvalidQuery
    """
    try:
        return UUID(text.removeprefix(f"{prefix}_"))
    except ValueError:
        raise InvalidQuery(f"{name} is no id", errors=[FieldError(name, f"{prefix}_… is required")]) from None


def _credits(text: str) -> Micros:
    try:
        amount = parse_credits(text)
    except NotAnAmount as error:
        raise InvalidQuery(str(error), errors=[FieldError("amount", str(error))]) from error
    if amount < 0:
        raise InvalidQuery("an amount is not negative", errors=[FieldError("amount", "zero or more is required")])
    return amount


def _may_read(principal: Principal, story: explaining.Story) -> bool:
    """All with `usage:read`, one's own with `usage:own`, and what came through the very key that asks."""
    if principal.may(Permission.USAGE_READ):
        return True
    people, keys = story.askers
    of_person = principal.user_id in people and principal.may(Permission.USAGE_OWN)
    return of_person or principal.api_key_id in keys
