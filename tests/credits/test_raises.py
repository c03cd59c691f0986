"""Who may ask for more and who decides, what is recorded of it, and what `why` says."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund

from bursar import clock, db
from bursar.audit.events import OPERATOR, Actor
from bursar.clock import uuid7
from bursar.credits import raises
from bursar.credits.limits import LimitAction, NotALimit, Scope, set_limit
from bursar.credits.raises import NotTheirsToDecide, RequestState
from bursar.credits.why import Why, why
from bursar.identity.memberships import place_member, set_roles, set_team_lead
from bursar.identity.roles import Role
from bursar.identity.teams import create_team
from bursar.money import Micros

CREDIT = 1_000_000


async def ask(org: Org, user: UUID, amount: int = 0) -> Why:
    async with org.tenant() as conn:
        return await why(
            conn,
            organization_id=org.organization_id,
            user_id=user,
            api_key_id=None,
            model="m",
            wanted_micros=Micros(amount),
        )


async def default(org: Org, amount: int | None = 10 * CREDIT, **rest: Any) -> UUID:
    async with org.tenant() as conn:
        return await set_limit(
            conn,
            organization_id=org.organization_id,
            scope=Scope.USER,
            scope_id=None,
            amount=amount,
            action=LimitAction.ASKS,
            is_default=True,
            **rest,
        )


async def request(org: Org, limit: UUID, user: UUID, subject: UUID | None) -> UUID:
    async with org.tenant() as conn:
        return await raises.request_raise(
            conn,
            organization_id=org.organization_id,
            limit_id=limit,
            subject_id=subject,
            user_id=user,
            amount=5 * CREDIT,
            until=clock.now() + timedelta(days=1),
            reason="Release",
            idempotency_key=uuid7().hex,
            by=Actor(kind="user", id=user),
        )


async def decide(org: Org, request_id: UUID, by: UUID | None, *, approve: bool = True) -> UUID | None:
    async with org.tenant() as conn:
        return await raises.decide_request(
            conn,
            organization_id=org.organization_id,
            limit_request_id=request_id,
            is_approved=approve,
            by=Actor(kind="user", id=by) if by else OPERATOR,
        )


async def test_why_names_the_default_its_team_and_the_raise(org: Org) -> None:
    await fund(org, 100 * CREDIT)
    async with org.tenant() as conn:
        team = await create_team(conn, organization_id=org.organization_id, name="Research", by=OPERATOR)
        await place_member(
            conn,
            organization_id=org.organization_id,
            user_id=org.admin,
            team_id=team.team_id,
            department_id=None,
            by=OPERATOR,
        )
    await default(org)
    narrow = await default(org, 4 * CREDIT, within_scope=Scope.TEAM, within_id=team.team_id)
    told = await ask(org, org.admin, 5 * CREDIT)
    assert told.binding is not None
    assert (told.code, told.binding.limit_id) == ("cap_reached", narrow)
    assert told.binding.origin == "default for every member of team Research"
    document = told.as_json()
    assert document["may_ask"] is True
    assert document["next_step"].startswith("Ask for more")
    assert [each["does"] for each in document["limits"]] == ["stops", "stops", "asks"]
    asked = await request(org, told.binding.balance_id or uuid7(), org.admin, None)
    assert await decide(org, asked, None) is not None
    raised = (await ask(org, org.admin, 9 * CREDIT)).limits[-1]
    assert (raised.limit_amount, raised.raised_amount) == (9 * CREDIT, 5 * CREDIT)
    assert raised.as_json(binding=False)["raised"] == {"amount": "5", "unit": "credit"}
    async with org.tenant() as conn:
        found = await raises.list_requests(conn, organization_id=org.organization_id)
        given = await raises.list_raises(conn, organization_id=org.organization_id)
    assert [(each.state, each.granted_amount) for each in found] == [(RequestState.APPROVED, 5 * CREDIT)]
    assert [(each.limit_request_id, each.state, each.subject_id) for each in given] == [(asked, "active", org.admin)]


async def test_a_lead_decides_for_their_team_and_nobody_for_themselves(org: Org) -> None:
    await fund(org, 100 * CREDIT)
    lead, member, other = [await org.member() for _ in range(3)]
    async with org.tenant() as conn:
        team = await create_team(conn, organization_id=org.organization_id, name="Research", by=OPERATOR)
        for user in (lead, member):
            await place_member(
                conn,
                organization_id=org.organization_id,
                user_id=user,
                team_id=team.team_id,
                department_id=None,
                by=OPERATOR,
            )
        roles = frozenset({Role.MEMBER, Role.TEAM_LEAD})
        await set_roles(conn, organization_id=org.organization_id, user_id=lead, roles=roles, by=OPERATOR)
        await set_team_lead(conn, organization_id=org.organization_id, team_id=team.team_id, user_id=lead, by=OPERATOR)
        everybody = await set_limit(
            conn,
            organization_id=org.organization_id,
            scope=Scope.ORGANIZATION,
            scope_id=None,
            amount=50 * CREDIT,
            action=LimitAction.ASKS,
        )
    limit = await default(org)
    for asker, decider in ((member, member), (member, other), (other, lead), (lead, lead)):
        asked = await request(org, limit, asker, asker)
        with pytest.raises(NotTheirsToDecide):
            await decide(org, asked, decider)
        await decide(org, asked, org.admin, approve=False)
    asked = await request(org, everybody, member, None)
    with pytest.raises(NotTheirsToDecide):
        await decide(org, asked, lead)  # it is not about the team
    assert await decide(org, await request(org, limit, member, member), lead) is not None


async def test_requests_and_raises_are_audited_and_told_of(org: Org) -> None:
    limit = await default(org)
    asked = await request(org, limit, org.admin, org.admin)
    await decide(org, asked, org.admin)
    async with org.tenant() as conn:
        rows = await conn.execute("select kind, payload ->> 'user_id' from outbox.events order by sequence")
        told = await rows.fetchall()
        rows = await conn.execute("select action from audit.events where object_id = %s order by at, event_id", [asked])
        recorded = [row[0] for row in await rows.fetchall()]
    assert told == [(kind, f"usr_{org.admin.hex}") for kind in ("request.created", "request.decided")]
    assert recorded == ["limit_request.created", "limit_request.approved"]


async def test_what_makes_no_limit_is_refused_with_words(org: Org) -> None:
    wrong: list[dict[str, Any]] = [
        {"scope": Scope.USER, "scope_id": None},
        {"scope": Scope.ORGANIZATION, "scope_id": org.admin},
        {"scope": Scope.ORGANIZATION, "scope_id": None, "is_default": True},
        {"scope": Scope.TEAM, "scope_id": None, "is_default": True, "within_scope": Scope.TEAM, "within_id": uuid7()},
        {"scope": Scope.USER, "scope_id": org.admin, "within_scope": Scope.TEAM, "within_id": uuid7()},
        {"scope": Scope.ORGANIZATION, "scope_id": None, "amount": None},
        {"scope": Scope.USER, "scope_id": None, "is_default": True, "amount": None},
    ]
    for arguments in wrong:
        with pytest.raises(NotALimit):
            async with org.tenant() as conn:
                await set_limit(conn, organization_id=org.organization_id, **{"amount": 1, **arguments})


async def test_nobody_elses_request_is_known(org: Org, database: db.Database) -> None:
    async with org.tenant() as conn:
        with pytest.raises(raises.RequestNotFound):
            await raises.get_request(conn, organization_id=org.organization_id, limit_request_id=uuid7())
