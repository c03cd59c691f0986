"""Routes of the treasury: where did this charge come from, and codes that become credits."""

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field

from bursar.credits import codes, front
from bursar.credits import explain as explaining
from bursar.credits.codes import CodeEnded, CodeNotForYou, CodeUnknown, CodeUsedUp, Redemption, TooManyTries
from bursar.identity.guards import CurrentPrincipal, NotPermitted, actor_of, address_hash_of, database_of
from bursar.identity.organizations import OrganizationNotFound, find_organization_id
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.money import format_credits
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
        answer |= explaining.margin_of(story)
    return answer


class RedeemCode(BaseModel):
    """A code to redeem. into: organization (slug or id) in which one's balance is; null: the code's, or one's own."""

    model_config = ConfigDict(extra="forbid")
    code: str = Field(min_length=1, max_length=100, examples=["7Q2KD-0000A-1111B-2222C"])
    into: str | None = Field(None, max_length=100)


class RedemptionAnswer(BaseModel):
    """What a code became. is_again: it had been redeemed before, and nothing was granted now."""

    grant_id: str
    organization_id: str
    credits: dict[str, str] = Field(examples=[{"amount": "500", "unit": "credit"}])
    campaign: str
    redeemed_at: datetime
    expires_at: datetime | None
    is_again: bool

    @classmethod
    def of(cls, redemption: Redemption) -> "RedemptionAnswer":
        """What of a redemption is shown."""
        assert redemption.grant_id is not None
        return cls(
            grant_id=f"grt_{redemption.grant_id.hex}",
            organization_id=f"org_{redemption.into_organization_id.hex}",
            credits={"amount": format_credits(redemption.amount_micros), "unit": "credit"},
            campaign=redemption.campaign,
            redeemed_at=redemption.claimed_at,
            expires_at=redemption.credits_expire_at,
            is_again=redemption.is_again,
        )


@router.post(
    "/codes/redeem",
    status_code=201,
    responses=documents(
        CodeUnknown, OrganizationNotFound, CodeEnded, CodeUsedUp, CodeNotForYou, NotPermitted, TooManyTries
    ),
)
async def redeem_code(body: RedeemCode, request: Request, principal: CurrentPrincipal) -> RedemptionAnswer:
    """Turn a code into credits of one's own, never into shared ones. The same code again is the same redemption."""
    if principal.user_id is None or not principal.may(Permission.CODES_REDEEM):
        raise NotPermitted(f"This needs {Permission.CODES_REDEEM} and a person")
    database = database_of(request)
    into = None
    if body.into is not None:
        async with database.untenanted() as conn:
            into = await find_organization_id(conn, body.into)
    redemption = await codes.redeem(
        database,
        text=body.code,
        user_id=principal.user_id,
        into=into,
        by=actor_of(request, principal),
        address_hash=address_hash_of(request),
    )
    return RedemptionAnswer.of(redemption)


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
