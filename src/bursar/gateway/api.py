"""Routes of the gateway's own: why would a model request be let through, and the rules about models."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, Field

from bursar import db
from bursar.credits import why as asking
from bursar.credits.api import InvalidQuery, read_id
from bursar.gateway import allowances
from bursar.gateway.allowances import InvalidModelRule, ModelRule, ModelRuleNotFound
from bursar.gateway.desk import why_not
from bursar.identity.api_keys import ApiKeyNotFound, get_api_key
from bursar.identity.guards import NotPermitted, OrgMember, Tx, actor_of, database_of, needs
from bursar.identity.memberships import get_membership
from bursar.identity.organizations import get_organization
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.identity.teams import TeamNotFound, get_team
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


class ModelRuleAnswer(BaseModel):
    """A rule about models. scope: organization, team or key; set_by: null for the operator."""

    id: str
    scope: str
    scope_name: str | None
    effect: str
    pattern: str
    set_by: str | None
    created_at: datetime

    @classmethod
    def of(cls, rule: ModelRule) -> "ModelRuleAnswer":
        """What of a rule is shown."""
        return cls(**rule.as_json(), set_by=rule.set_by, created_at=rule.created_at)


class ModelRulesAnswer(BaseModel):
    """Every rule of an organization."""

    items: list[ModelRuleAnswer]


class AddModelRule(BaseModel):
    """A new rule. pattern: '%' stands for anything. team, key: whose calls it is about; without, all of them."""

    effect: Literal["allow", "deny"]
    pattern: str = Field(min_length=1, max_length=allowances.LONGEST_NAME)
    team: str | None = None
    key: str | None = None


@router.get("/organizations/{org}/model-rules", responses=documents(NotPermitted), tags=["models"])
async def get_model_rules(principal: Annotated[Principal, needs(Permission.LIMITS_READ)], tx: Tx) -> ModelRulesAnswer:
    """Which models the organization, its teams and its keys may use."""
    rules = await allowances.list_model_rules(tx, organization_id=principal.organization_id)
    return ModelRulesAnswer(items=[ModelRuleAnswer.of(rule) for rule in rules])


@router.post(
    "/organizations/{org}/model-rules",
    status_code=201,
    responses=documents(NotPermitted, InvalidQuery, InvalidModelRule, TeamNotFound, ApiKeyNotFound),
    tags=["models"],
)
async def add_model_rule(
    body: AddModelRule, request: Request, principal: Annotated[Principal, needs(Permission.LIMITS_WRITE)], tx: Tx
) -> ModelRuleAnswer:
    """Allow or deny models. The same rule again changes nothing, and is answered as it is."""
    scope, scope_id = await _scope(tx, principal.organization_id, body)
    rule = await allowances.add_model_rule(
        tx,
        organization_id=principal.organization_id,
        effect=body.effect,
        pattern=body.pattern,
        scope=scope,
        scope_id=scope_id,
        by=actor_of(request, principal),
        created_by=principal.user_id,
    )
    return ModelRuleAnswer.of(rule)


@router.delete(
    "/organizations/{org}/model-rules/{rule_id}",
    status_code=204,
    responses=documents(NotPermitted, InvalidQuery, ModelRuleNotFound),
    tags=["models"],
)
async def remove_model_rule(
    rule_id: str, request: Request, principal: Annotated[Principal, needs(Permission.LIMITS_WRITE)], tx: Tx
) -> None:
    """Take a rule away."""
    await allowances.remove_model_rule(
        tx,
        organization_id=principal.organization_id,
        rule_id=read_id(rule_id, "rule", "rule_id"),
        by=actor_of(request, principal),
    )


async def _scope(
    conn: db.Connection, organization_id: UUID, body: AddModelRule
) -> tuple[allowances.Scope, UUID | None]:
    if body.team is not None and body.key is not None:
        raise InvalidQuery("a rule is about a team or a key", errors=[FieldError("#/key", "not together with team")])
    if body.team is not None:
        team = await get_team(conn, organization_id=organization_id, team_id=read_id(body.team, "team", "#/team"))
        return "team", team.team_id
    if body.key is not None:
        key = await get_api_key(conn, organization_id=organization_id, api_key_id=read_id(body.key, "key", "#/key"))
        return "key", key.original_api_key_id
    return "organization", None


def _credits(text: str) -> Micros:
    try:
        amount = parse_credits(text)
    except NotAnAmount as error:
        raise InvalidQuery(str(error), errors=[FieldError("amount", str(error))]) from error
    if amount < 0:
        raise InvalidQuery("an amount is not negative", errors=[FieldError("amount", "zero or more is required")])
    return amount
