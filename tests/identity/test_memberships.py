"""People: one per address, placed in teams and departments of their own organization, never with a role too much."""

import asyncio

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar import clock, db
from bursar.audit.events import OPERATOR, list_events
from bursar.credits.pools import open_credits
from bursar.identity.addresses import Address, InvalidEmail, normalize_email
from bursar.identity.departments import (
    DepartmentNotFound,
    archive_department,
    create_department,
    list_departments,
    rename_department,
)
from bursar.identity.memberships import (
    AlreadyMember,
    MemberLeft,
    MemberNotFound,
    OrganizationOfOne,
    RoleNotHere,
    add_membership,
    end_membership,
    find_membership_by_email,
    get_membership,
    list_memberships,
    place_member,
    resume_member,
    set_roles,
    set_team_lead,
    suspend_member,
)
from bursar.identity.names import InvalidName, NameTaken
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.identity.roles import Role
from bursar.identity.teams import TeamNotFound, archive_team, create_team, get_team, list_teams, rename_team
from bursar.identity.users import (
    EmailTaken,
    NotAMember,
    UserNotFound,
    choose_default,
    create_user,
    find_user_by_email,
    get_user,
    invite,
    places_of_user,
)

LIMITS_VERSION = "select limits_version from credits.gates where organization_id = %(id)s"
# Rows of the route that differ from the active memberships, either way, of some organizations.
ROUTE_DIFFERS = """
with route as (select user_id, organization_id, joined_at from route.memberships where organization_id = any(%(ids)s)),
     here as (select user_id, organization_id, joined_at from identity.memberships
              where status = 'active' and organization_id = any(%(ids)s))
select (select count(*) from (table route except table here) a)
     + (select count(*) from (table here except table route) b)
"""


@pytest.mark.parametrize(
    "text",
    [
        "",
        "dana",
        "@acme.example",
        "dana@",
        "dana@acme",
        "da na@acme.example",
        "dana@acme.example\x00",
        "a@b@c.example",
        "dana@-acme.example",
        "dana@acme..example",
        "x" * 65 + "@acme.example",
        "dana@" + "a." * 130 + "example",
        "\u202edana@acme.example",
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(InvalidEmail):
        normalize_email(text)


@pytest.mark.parametrize("text", ["Dana@Acme.Example", " dana@acme.example ", "DANA@ACME.EXAMPLE\n"])
def test_one_address_in_any_spelling_is_one_address(text: str) -> None:
    assert normalize_email(text) == "dana@acme.example"


@given(st.emails())
def test_normalizing_twice_changes_nothing(email: str) -> None:
    try:
        once = normalize_email(email)
    except InvalidEmail:
        return
    assert normalize_email(once) == once


async def test_of_racing_claims_of_an_address_exactly_one_wins(database: db.Database) -> None:
    address = Address.of(f"{clock.uuid7().hex}@race.example", database.settings)

    async def create() -> bool:
        home_id = clock.uuid7()
        try:
            async with database.tenant(home_id) as conn:
                await create_user(
                    conn, home_organization_id=home_id, address=address, display_name="Racer", by=OPERATOR
                )
        except EmailTaken:
            return False
        return True

    assert sorted(await asyncio.gather(*(create() for _ in range(8)))) == [False] * 7 + [True]


async def test_a_person_invited_by_many_at_once_is_one_person(org) -> None:
    email = f"{clock.uuid7().hex}@race.example"
    people = await asyncio.gather(*(org.user(email.upper() if number % 2 else email) for number in range(8)))
    assert len(set(people)) == 1


async def test_an_invitation_that_is_refused_makes_nobody(org) -> None:
    address = Address.of(f"{clock.uuid7().hex}@x.example", org.database.settings)
    columns = {"address": address, "display_name": "Nobody", "by": OPERATOR, "on_opening": open_credits}
    home = (await org.user()).home_organization_id
    for problem, organization_id, changed in (
        (RoleNotHere, org.organization_id, {"roles": [Role.SYSTEM_ADMIN]}),
        (TeamNotFound, org.organization_id, {"team_id": clock.uuid7()}),
        (DepartmentNotFound, org.organization_id, {"department_id": clock.uuid7()}),
        (InvalidName, org.organization_id, {"display_name": ""}),
        (OrganizationOfOne, home, {}),
    ):
        with pytest.raises(problem):
            values = {"roles": [Role.MEMBER]} | columns | changed
            await invite(org.database, organization_id=organization_id, **values)
    async with org.database.untenanted() as conn:
        assert await find_user_by_email(conn, address) is None
    values = {"roles": [Role.MEMBER]} | columns
    member = await invite(org.database, organization_id=org.organization_id, **values)
    assert member.email == address.email
    with pytest.raises(AlreadyMember):
        await invite(org.database, organization_id=org.organization_id, **values)


async def test_everybody_has_a_home_with_nothing_personal_in_its_name(org) -> None:
    email = f"{clock.uuid7().hex}@home.example"
    user = await org.user(email)
    async with org.database.tenant(user.home_organization_id) as conn:
        places = await places_of_user(conn, user_id=user.user_id)
        (member,) = await list_memberships(conn, organization_id=user.home_organization_id)
    assert [(each.kind, each.organization_id) for each in places] == [("individual", user.home_organization_id)]
    assert "home.example" not in places[0].slug + places[0].name
    assert (member.user_id, member.email) == (user.user_id, email)


async def test_a_home_has_one_member_for_ever(org) -> None:
    user, email = await org.user(), f"{clock.uuid7().hex}@home.example"
    other = await org.user(email)
    home = user.home_organization_id
    async with org.database.tenant(home) as conn:
        with pytest.raises(OrganizationOfOne):
            await add_membership(
                conn,
                organization_id=home,
                user_id=other.user_id,
                address=Address.of(email, org.database.settings),
                display_name="Guest",
                roles=[Role.MEMBER],
                by=OPERATOR,
            )
        with pytest.raises(OrganizationOfOne):
            await end_membership(conn, organization_id=home, user_id=user.user_id, by=OPERATOR)


async def test_who_is_a_member_cannot_join_again_until_they_have_left(org) -> None:
    email = f"{clock.uuid7().hex}@x.example"
    member = await org.member(email=email)
    with pytest.raises(AlreadyMember):
        await org.member(email=email)
    async with org.tenant() as conn:
        first = await get_membership(conn, organization_id=org.organization_id, user_id=member)
        left = await end_membership(conn, organization_id=org.organization_id, user_id=member, by=OPERATOR)
        assert left.left_at is not None
        with pytest.raises(MemberLeft):
            await resume_member(conn, organization_id=org.organization_id, user_id=member, by=OPERATOR)
    assert await org.member(Role.FINANCE, email=email) == member
    async with org.tenant() as conn:
        again = await find_membership_by_email(conn, organization_id=org.organization_id, email=email)
    assert (again.status, again.roles, again.left_at) == ("active", (Role.FINANCE,), None)
    assert again.joined_at > first.joined_at


async def test_the_route_knows_exactly_the_active_memberships(org, admin_dsn: str) -> None:
    async def differs() -> int:
        async with await psycopg.AsyncConnection.connect(admin_dsn) as admin:
            return await db.fetch_value(admin, ROUTE_DIFFERS, ids=[org.organization_id])

    stays, suspended, leaves, returns = [await org.member() for _ in range(4)]
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        await suspend_member(conn, user_id=suspended, **keys)
        await end_membership(conn, user_id=leaves, **keys)
        await suspend_member(conn, user_id=returns, **keys)
    assert await differs() == 0
    async with org.tenant() as conn:
        await resume_member(conn, user_id=returns, **keys)
        await suspend_member(conn, user_id=stays, **keys)
    assert await differs() == 0


async def test_credits_learn_of_every_change_of_who_may_spend(org) -> None:
    member = await org.member()
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        department = await create_department(conn, name="Sales", **keys)
        version = await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id)
        place = {"team_id": None, "department_id": department.department_id}
        await place_member(conn, user_id=member, **place, **keys)
        await rename_department(conn, department_id=department.department_id, name="Field sales", **keys)
        await suspend_member(conn, user_id=member, **keys)
        await resume_member(conn, user_id=member, **keys)
        await end_membership(conn, user_id=member, **keys)
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 5
        await set_roles(conn, user_id=org.admin, roles=[Role.ORG_ADMIN, Role.AUDITOR], **keys)
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 5


async def test_the_audit_tells_all_and_nothing_personal(org) -> None:
    email = f"{clock.uuid7().hex}@secret.example"
    member = await org.member(email=email)
    async with org.tenant() as conn:
        await suspend_member(conn, organization_id=org.organization_id, user_id=member, by=OPERATOR, reason="On leave")
        told = await list_events(conn, organization_id=org.organization_id)
        text = await db.fetch_value(conn, "select string_agg(e::text, '') from audit.events e")
    assert [each.action for each in told[:2]] == ["membership.status_changed", "membership.joined"]
    assert (told[0].old_value, told[0].new_value, told[0].reason) == (
        {"status": "active"},
        {"status": "suspended"},
        "On leave",
    )
    assert email.partition("@")[0] not in text
    assert "Dana" not in text


async def test_nobody_becomes_system_admin_outside_the_platform(org) -> None:
    async with org.tenant() as conn:
        for roles in ([Role.SYSTEM_ADMIN], [Role.ORG_ADMIN, Role.SYSTEM_ADMIN], []):
            with pytest.raises(RoleNotHere):
                await set_roles(conn, organization_id=org.organization_id, user_id=org.admin, roles=roles, by=OPERATOR)
    for roles in (["system_admin"], ["emperor"], []):
        with pytest.raises(psycopg.errors.CheckViolation):
            async with org.tenant() as conn:
                await db.execute(conn, "update identity.memberships set roles = %(roles)s", roles=roles)
    assert org.organization_id != PLATFORM_ORGANIZATION_ID


async def test_places_of_another_organization_are_as_unknown_as_none(org, make_org) -> None:
    foreign = await make_org()
    async with foreign.tenant() as conn:
        keys = {"organization_id": foreign.organization_id, "by": OPERATOR}
        team, department = await create_team(conn, name="A", **keys), await create_department(conn, name="A", **keys)
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        for team_id in (team.team_id, clock.uuid7()):
            with pytest.raises(TeamNotFound):
                await place_member(conn, user_id=org.admin, team_id=team_id, department_id=None, **keys)
        for department_id in (department.department_id, clock.uuid7()):
            with pytest.raises(DepartmentNotFound):
                await place_member(conn, user_id=org.admin, team_id=None, department_id=department_id, **keys)
            with pytest.raises(DepartmentNotFound):
                await create_team(conn, name="B", department_id=department_id, **keys)
        for user_id in (foreign.admin, clock.uuid7()):
            with pytest.raises(MemberNotFound):
                await place_member(conn, user_id=user_id, team_id=None, department_id=None, **keys)
            with pytest.raises(MemberNotFound):
                await set_roles(conn, user_id=user_id, roles=[Role.MEMBER], **keys)
            with pytest.raises(MemberNotFound):
                await suspend_member(conn, user_id=user_id, **keys)
    async with org.database.untenanted() as conn:
        with pytest.raises(UserNotFound):
            await get_user(conn, user_id=clock.uuid7())


async def test_names_are_taken_whatever_their_case_until_they_are_archived(org) -> None:
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        team = await create_team(conn, name="Data", **keys)
        department = await create_department(conn, name="Data", **keys)
        other = await create_team(conn, name="Other", **keys)
    for create in (create_team, create_department):
        with pytest.raises(NameTaken):
            async with org.tenant() as conn:
                await create(conn, name="dATA", **keys)
    with pytest.raises(NameTaken):
        async with org.tenant() as conn:
            await rename_team(conn, team_id=other.team_id, name="data", **keys)
    async with org.tenant() as conn:
        archived = await archive_team(conn, team_id=team.team_id, **keys)
        assert await archive_team(conn, team_id=team.team_id, **keys) == archived
        await archive_department(conn, department_id=department.department_id, **keys)
        await rename_team(conn, team_id=other.team_id, name="data", **keys)
        assert [each.name for each in await list_teams(conn, organization_id=org.organization_id)] == ["data"]
        assert await list_departments(conn, organization_id=org.organization_id) == []
        with pytest.raises(TeamNotFound):
            await place_member(conn, user_id=org.admin, team_id=team.team_id, department_id=None, **keys)


async def test_a_team_is_led_by_an_active_member_until_they_leave(org, make_org) -> None:
    member, foreign = await org.member(Role.TEAM_LEAD), await make_org()
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        team = await create_team(conn, name="Data", **keys)
        led = await set_team_lead(conn, team_id=team.team_id, user_id=member, **keys)
        assert led.lead_user_id == member
        with pytest.raises(MemberNotFound):
            await set_team_lead(conn, team_id=team.team_id, user_id=foreign.admin, **keys)
        await end_membership(conn, user_id=member, **keys)
        assert (await get_team(conn, organization_id=org.organization_id, team_id=team.team_id)).lead_user_id is None
        with pytest.raises(MemberNotFound):
            await set_team_lead(conn, team_id=team.team_id, user_id=member, **keys)


async def test_a_default_must_be_a_place_of_ones_own(org, make_org) -> None:
    stranger = await make_org()
    async with org.database.untenanted() as conn:
        user = await get_user(conn, user_id=org.admin)
    async with org.database.tenant(user.home_organization_id) as conn:
        for organization_id in (stranger.organization_id, clock.uuid7()):
            with pytest.raises(NotAMember):
                await choose_default(conn, user=user, organization_id=organization_id, by=OPERATOR)
        for organization_id in (org.organization_id, user.home_organization_id, None):
            await choose_default(conn, user=user, organization_id=organization_id, by=OPERATOR)
            assert (await get_user(conn, user_id=org.admin)).default_organization_id == organization_id


async def test_members_are_listed_page_by_page(org) -> None:
    everybody = sorted([org.admin] + [await org.member() for _ in range(4)])
    async with org.tenant() as conn:
        first = await list_memberships(conn, organization_id=org.organization_id, limit=2)
        rest = await list_memberships(conn, organization_id=org.organization_id, after=first[-1].user_id)
    assert [each.user_id for each in first + rest] == everybody
