"""Memberships: a person in an organization, with roles, team and department. The only rows with personal data."""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.identity.addresses import Address
from bursar.identity.departments import get_department
from bursar.identity.names import clean_name
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, QUERIES, get_organization, touch_limits
from bursar.identity.roles import Role
from bursar.identity.teams import Team, TeamNotFound, get_team
from bursar.problems import FieldError, Problem

MembershipStatus = Literal["active", "suspended", "left"]


class MemberNotFound(Problem):
    """No such member in this organization."""

    status, code, title = 404, "member_not_found", "No such member"


class AlreadyMember(Problem):
    """The person belongs to the organization already."""

    status, code, title = 409, "already_a_member", "This person is a member already"


class OrganizationOfOne(Problem):
    """A home organization has one member, its owner, for as long as it exists."""

    status, code, title = 409, "organization_of_one", "A personal organization has one member"


class RoleNotHere(Problem):
    """No role at all, or the system administrator's outside the platform's own organization."""

    status, code, title = 422, "role_not_here", "This role cannot be given here"


class MemberLeft(Problem):
    """Who has left joins anew and is not resumed."""

    status, code, title = 409, "member_left", "This member has left"


@dataclass(frozen=True, slots=True, kw_only=True)
class Membership:
    """A person in one organization."""

    organization_id: UUID
    user_id: UUID
    email: str
    display_name: str
    roles: tuple[Role, ...]
    team_id: UUID | None
    department_id: UUID | None
    status: MembershipStatus
    joined_at: datetime
    left_at: datetime | None


async def add_membership(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID,
    address: Address,
    display_name: str,
    roles: Collection[Role],
    by: Actor,
    team_id: UUID | None = None,
    department_id: UUID | None = None,
    at: datetime | None = None,
) -> Membership:
    """Make a person a member; who has left joins anew. address: the person's own. at: None is now.

    Raises:
        AlreadyMember, OrganizationOfOne, RoleNotHere, InvalidName, TeamNotFound, DepartmentNotFound
    """
    assert await db.fetch_value(conn, QUERIES.find_user_by_email, email_hash=address.email_hash) == user_id
    await _check_kind(conn, organization_id, user_id)
    _check_roles(organization_id, roles)
    await _check_place(conn, organization_id, team_id, department_id)
    membership = await db.fetch_optional(
        conn,
        Membership,
        QUERIES.insert_membership,
        organization_id=organization_id,
        user_id=user_id,
        email=address.email,
        display_name=clean_name(display_name, field="display_name"),
        roles=sorted(roles),
        team_id=team_id,
        department_id=department_id,
        at=at,
    )
    if membership is None:
        raise AlreadyMember
    await _join_route(conn, membership)
    await touch_limits(conn, organization_id)
    await _record(conn, membership, by, "membership.joined", new=_facts(membership))
    return membership


async def check_new_member(
    conn: db.Connection,
    *,
    organization_id: UUID,
    roles: Collection[Role],
    team_id: UUID | None = None,
    department_id: UUID | None = None,
) -> None:
    """Refuse what `add_membership` would refuse of anybody, before a person is made for it.

    Raises:
        OrganizationOfOne, RoleNotHere, TeamNotFound, DepartmentNotFound
    """
    if (await get_organization(conn, organization_id=organization_id)).kind == "individual":
        raise OrganizationOfOne
    _check_roles(organization_id, roles)
    await _check_place(conn, organization_id, team_id, department_id)


async def get_membership(conn: db.Connection, *, organization_id: UUID, user_id: UUID) -> Membership:
    """Raises MemberNotFound for an unknown person and for another organization's alike."""
    found = await db.fetch_optional(
        conn, Membership, QUERIES.membership, organization_id=organization_id, user_id=user_id
    )
    return _found(found)


async def find_membership_by_email(conn: db.Connection, *, organization_id: UUID, email: str) -> Membership:
    """The member with a normalized address.

    Raises:
        MemberNotFound
    """
    found = await db.fetch_optional(
        conn, Membership, QUERIES.membership_by_email, organization_id=organization_id, email=email
    )
    if found is None:
        raise MemberNotFound(f"“{email}”. Those there are: bursar users list")
    return found


async def list_memberships(
    conn: db.Connection,
    *,
    organization_id: UUID,
    status: MembershipStatus | None = None,
    after: UUID | None = None,
    limit: int = 100,
) -> list[Membership]:
    """Members by id, after one; every status when None."""
    return await db.fetch_all(
        conn,
        Membership,
        QUERIES.memberships,
        organization_id=organization_id,
        status=status,
        after=after,
        limit=limit,
    )


async def set_roles(
    conn: db.Connection, *, organization_id: UUID, user_id: UUID, roles: Collection[Role], by: Actor
) -> Membership:
    """Replace a member's roles; they count from the next request on.

    Raises:
        RoleNotHere, MemberNotFound
    """
    _check_roles(organization_id, roles)
    old = await _lock(conn, organization_id, user_id)
    changed = await db.fetch_one(
        conn, Membership, QUERIES.set_roles, organization_id=organization_id, user_id=user_id, roles=sorted(roles)
    )
    await _record(conn, changed, by, "membership.roles_changed", old={"roles": old.roles}, new={"roles": changed.roles})
    return changed


async def place_member(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID,
    team_id: UUID | None,
    department_id: UUID | None,
    by: Actor,
) -> Membership:
    """Put a member into a team and a department (None: into none), from now on; past usage stays where it was.

    Raises:
        TeamNotFound, DepartmentNotFound, MemberNotFound
    """
    await _check_place(conn, organization_id, team_id, department_id)
    old = await _lock(conn, organization_id, user_id)
    changed = await db.fetch_one(
        conn,
        Membership,
        QUERIES.place_member,
        organization_id=organization_id,
        user_id=user_id,
        team_id=team_id,
        department_id=department_id,
    )
    await touch_limits(conn, organization_id)
    await _record(
        conn,
        changed,
        by,
        "membership.moved",
        old={"team_id": old.team_id, "department_id": old.department_id},
        new={"team_id": team_id, "department_id": department_id},
    )
    return changed


async def suspend_member(
    conn: db.Connection, *, organization_id: UUID, user_id: UUID, by: Actor, reason: str | None = None
) -> Membership:
    """Let a member do nothing here for now; their keys stop and work again when they are resumed.

    Raises:
        MemberNotFound, MemberLeft, OrganizationOfOne
    """
    return await _set_status(conn, organization_id, user_id, "suspended", by, reason)


async def resume_member(
    conn: db.Connection, *, organization_id: UUID, user_id: UUID, by: Actor, reason: str | None = None
) -> Membership:
    """End a suspension.

    Raises:
        MemberNotFound, MemberLeft
    """
    return await _set_status(conn, organization_id, user_id, "active", by, reason)


async def end_membership(
    conn: db.Connection, *, organization_id: UUID, user_id: UUID, by: Actor, reason: str | None = None
) -> Membership:
    """A member leaves: their keys here are revoked for good, teams they led have no lead.

    Raises:
        MemberNotFound, MemberLeft, OrganizationOfOne
    """
    left = await _set_status(conn, organization_id, user_id, "left", by, reason)
    await db.execute(conn, QUERIES.revoke_api_keys_of_user, organization_id=organization_id, user_id=user_id)
    await db.execute(conn, QUERIES.vacate_leads, organization_id=organization_id, user_id=user_id)
    return left


async def set_team_lead(
    conn: db.Connection, *, organization_id: UUID, team_id: UUID, user_id: UUID | None, by: Actor
) -> Team:
    """Make an active member the lead of a team, or leave it without one (None). The role team_lead is given apart.

    Raises:
        TeamNotFound, MemberNotFound
    """
    old = await get_team(conn, organization_id=organization_id, team_id=team_id)
    if user_id is not None and (await _lock(conn, organization_id, user_id)).status != "active":
        raise MemberNotFound
    team = await db.fetch_one(
        conn, Team, QUERIES.set_team_lead, organization_id=organization_id, team_id=team_id, user_id=user_id
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="team.lead_changed",
        object_id=team_id,
        old={"lead_user_id": old.lead_user_id},
        new={"lead_user_id": user_id},
    )
    return team


async def _set_status(
    conn: db.Connection, organization_id: UUID, user_id: UUID, status: MembershipStatus, by: Actor, reason: str | None
) -> Membership:
    """One change of status with all that hangs on it: the route, the limits, the audit."""
    old = await _lock(conn, organization_id, user_id)
    if old.status == "left":
        raise MemberLeft
    if status == "left" and (await get_organization(conn, organization_id=organization_id)).kind == "individual":
        raise OrganizationOfOne
    changed = await db.fetch_one(
        conn,
        Membership,
        QUERIES.set_membership_status,
        organization_id=organization_id,
        user_id=user_id,
        status=status,
    )
    if status == "active":
        await _join_route(conn, changed)
    else:
        await db.execute(conn, QUERIES.leave_organization, organization_id=organization_id, user_id=user_id)
    await touch_limits(conn, organization_id)
    old_value, new_value = {"status": old.status}, {"status": status}
    await _record(conn, changed, by, "membership.status_changed", old=old_value, new=new_value, reason=reason)
    return changed


async def _lock(conn: db.Connection, organization_id: UUID, user_id: UUID) -> Membership:
    found = await db.fetch_optional(
        conn, Membership, QUERIES.lock_membership, organization_id=organization_id, user_id=user_id
    )
    return _found(found)


async def _join_route(conn: db.Connection, membership: Membership) -> None:
    await db.execute(
        conn,
        QUERIES.join_organization,
        organization_id=membership.organization_id,
        user_id=membership.user_id,
        joined_at=membership.joined_at,
    )


async def _record(conn: db.Connection, membership: Membership, by: Actor, action: str, **values: Any) -> None:
    """The object of a membership's event is the person."""
    await record(
        conn,
        organization_id=membership.organization_id,
        by=by,
        action=action,
        object_id=membership.user_id,
        **values,
    )


async def _check_kind(conn: db.Connection, organization_id: UUID, user_id: UUID) -> None:
    organization = await get_organization(conn, organization_id=organization_id)
    if organization.kind != "individual":
        return
    if await db.fetch_value(conn, QUERIES.home_of_user, user_id=user_id) != organization_id:
        raise OrganizationOfOne


async def _check_place(
    conn: db.Connection, organization_id: UUID, team_id: UUID | None, department_id: UUID | None
) -> None:
    """Nobody new is put into an archived team; a stranger's team or department is as good as none."""
    if team_id is not None:
        team = await get_team(conn, organization_id=organization_id, team_id=team_id)
        if team.archived_at is not None:
            raise TeamNotFound("This team is archived")
    if department_id is not None:
        await get_department(conn, organization_id=organization_id, department_id=department_id)


def _check_roles(organization_id: UUID, roles: Collection[Role]) -> None:
    platform_only = Role.SYSTEM_ADMIN in roles and organization_id != PLATFORM_ORGANIZATION_ID
    if not roles or platform_only:
        detail = "system_admin is a role of the platform's own organization" if platform_only else "at least one role"
        raise RoleNotHere(detail, errors=[FieldError("#/roles", detail)])


def _facts(membership: Membership) -> dict[str, Any]:
    """What the audit may know of a member: nothing personal."""
    return {
        "roles": membership.roles,
        "team_id": membership.team_id,
        "department_id": membership.department_id,
    }


def _found(membership: Membership | None) -> Membership:
    if membership is None:
        raise MemberNotFound
    return membership
