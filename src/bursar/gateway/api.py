"""Routes of the gateway's own: why would a model request be let through, or not."""

from typing import Annotated, Any

from fastapi import APIRouter, Query, Request

from bursar.credits import why as asking
from bursar.credits.api import InvalidQuery, read_id
from bursar.gateway.desk import why_not
from bursar.identity.api_keys import get_api_key
from bursar.identity.guards import NotPermitted, OrgMember, database_of
from bursar.identity.memberships import get_membership
from bursar.identity.organizations import get_organization
from bursar.identity.roles import Permission
from bursar.money import Micros, NotAnAmount, parse_credits
from bursar.problems import FieldError, NotFound, documents

router = APIRouter(prefix="/api/v1", tags=["credits"])


@router.get("/organizations/{org}/why", responses=documents(NotFound, NotPermitted, InvalidQuery))
async def get_why(
    request: Request,
    principal: OrgMember,
    user: str | None = None,
    key: str | None = None,
    model: Annotated[str, Query(max_length=200)] = "",
    amount: Annotated[str, Query(max_length=40)] = "0",
) -> dict[str, Any]:
    """Would a request of this user and key be allowed now, and which limit decides, or which rule about models.

    amount: credits. user: of a key alone, the key's owner; of neither, the caller with the key they came with.
    """
    user_id = read_id(user, "usr", "user") if user else principal.user_id
    key_id = read_id(key, "key", "key") if key else principal.api_key_id
    wanted = _credits(amount)
    database = database_of(request)
    async with database.tenant(principal.organization_id) as tx:
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
            wanted_micros=wanted,
        )
        organization = await get_organization(tx, organization_id=principal.organization_id)
    document = answer.as_json(organization=principal.organization_slug)
    if not model:
        return document
    # Only now: who waits for a second connection while holding one can wait for ever.
    refusal = await why_not(database, organization, user_id=user_id, api_key_id=key_id, model=model)
    return document if refusal is None else document | (refusal.why or {})


def _credits(text: str) -> Micros:
    try:
        amount = parse_credits(text)
    except NotAnAmount as error:
        raise InvalidQuery(str(error), errors=[FieldError("amount", str(error))]) from error
    if amount < 0:
        raise InvalidQuery("an amount is not negative", errors=[FieldError("amount", "zero or more is required")])
    return amount
