"""What commands are about: the organization of --org, and its members, teams and departments by name or id."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Protocol, TypeAlias, TypeVar
from uuid import UUID

import typer

from bursar import db
from bursar.cli.output import Answer, with_database
from bursar.identity.addresses import Address
from bursar.identity.api_keys import ApiKey, ApiKeyNotFound, list_api_keys
from bursar.identity.departments import Department, DepartmentNotFound, get_department, list_departments
from bursar.identity.memberships import Membership, find_membership_by_email, get_membership, list_memberships
from bursar.identity.organizations import Organization, OrganizationNotFound, find_organization_id, get_organization
from bursar.identity.teams import Team, TeamNotFound, get_team, list_teams
from bursar.identity.users import User, UserNotFound, find_user_by_email, get_user

OrgOption: TypeAlias = Annotated[
    str, typer.Option("--org", envvar="BURSAR_ORG", help="Organization: its slug or id.", show_default=False)
]
PAGE = 100
Item = TypeVar("Item")


def within(
    reference: str,
    work: Callable[[db.Connection, db.Database, Organization], Awaitable[Answer]],
    *,
    dry_run: bool = False,
) -> Answer:
    """Run work in one transaction of the organization that --org names; dry_run: nothing of it stays."""

    async def run(database: db.Database) -> Answer:
        organization_id = await org_of(database, reference)
        async with database.tenant(organization_id) as conn, conn.transaction(force_rollback=dry_run):
            return await work(conn, database, await get_organization(conn, organization_id=organization_id))

    return with_database(run)


async def key_of(conn: db.Connection, organization_id: UUID, reference: str) -> ApiKey:
    """A key by id, public id or name.

    Raises:
        ApiKeyNotFound: none, or several of this name.
    """
    key_id = as_id(reference, "key_")
    keys = await list_api_keys(conn, organization_id=organization_id)
    found = [key for key in keys if key_id == key.api_key_id or reference in (key.public_id, key.name)]
    if len(found) != 1:
        raise ApiKeyNotFound(f"{len(found)} keys are called “{reference}”. Those there are: bursar keys list")
    return found[0]


class _Named(Protocol):
    @property
    def name(self) -> str: ...


Thing = TypeVar("Thing", bound=_Named)


async def org_of(database: db.Database, reference: str) -> UUID:
    """The id of an organization that exists.

    Raises:
        OrganizationNotFound
    """
    try:
        async with database.platform() as conn:
            organization_id = await find_organization_id(conn, reference)
            return (await get_organization(conn, organization_id=organization_id)).organization_id
    except OrganizationNotFound:
        raise OrganizationNotFound(f"“{reference}”. Those there are: bursar orgs list") from None


async def user_of(conn: db.Connection, database: db.Database, reference: str) -> User:
    """A person of the installation, by address or id.

    Raises:
        UserNotFound, InvalidEmail
    """
    user_id = as_id(reference, "usr_")
    if user_id is not None:
        return await get_user(conn, user_id=user_id)
    user = await find_user_by_email(conn, Address.of(reference, database.settings))
    if user is None:
        raise UserNotFound(f"“{reference}”")
    return user


async def member_of(conn: db.Connection, database: db.Database, organization_id: UUID, reference: str) -> Membership:
    """A member of the organization, by address or id.

    Raises:
        MemberNotFound, InvalidEmail
    """
    user_id = as_id(reference, "usr_")
    if user_id is not None:
        return await get_membership(conn, organization_id=organization_id, user_id=user_id)
    email = Address.of(reference, database.settings).email
    return await find_membership_by_email(conn, organization_id=organization_id, email=email)


async def team_of(conn: db.Connection, organization_id: UUID, reference: str) -> Team:
    """A team in use, by name or id.

    Raises:
        TeamNotFound
    """
    team_id = as_id(reference, "team_")
    if team_id is not None:
        return await get_team(conn, organization_id=organization_id, team_id=team_id)
    found = named(await list_teams(conn, organization_id=organization_id), reference)
    if found is None:
        raise TeamNotFound(f"“{reference}”. Those there are: bursar teams list")
    return found


async def department_of(conn: db.Connection, organization_id: UUID, reference: str) -> Department:
    """A department in use, by name or id.

    Raises:
        DepartmentNotFound
    """
    department_id = as_id(reference, "dep_")
    if department_id is not None:
        return await get_department(conn, organization_id=organization_id, department_id=department_id)
    found = named(await list_departments(conn, organization_id=organization_id), reference)
    if found is None:
        raise DepartmentNotFound(f"“{reference}”. Those there are: bursar departments list")
    return found


async def team_id_of(conn: db.Connection, organization_id: UUID, reference: str | None) -> UUID | None:
    """As `team_of`; None for None."""
    return None if reference is None else (await team_of(conn, organization_id, reference)).team_id


async def department_id_of(conn: db.Connection, organization_id: UUID, reference: str | None) -> UUID | None:
    """As `department_of`; None for None."""
    return None if reference is None else (await department_of(conn, organization_id, reference)).department_id


async def every_page(page: Callable[[UUID | None], Awaitable[list[Item]]], id_of: Callable[[Item], UUID]) -> list[Item]:
    """All items of a list that is read page by page. page: given the id that it starts after."""
    items: list[Item] = []
    while True:
        found = await page(id_of(items[-1]) if items else None)
        items += found
        if len(found) < PAGE:
            return items


async def all_names_of(conn: db.Connection, organization: Organization) -> dict[UUID, str]:
    """What users, keys, teams and departments are called."""
    names = await names_of(conn, organization)
    organization_id = organization.organization_id
    names |= {each.api_key_id: each.name for each in await list_api_keys(conn, organization_id=organization_id)}
    names |= {each.team_id: each.name for each in await list_teams(conn, organization_id=organization_id)}
    departments = await list_departments(conn, organization_id=organization_id)
    return names | {each.department_id: each.name for each in departments}


async def names_of(conn: db.Connection, organization: Organization) -> dict[UUID, str]:
    """The e-mail of every member."""

    def page(after: UUID | None) -> Awaitable[list[Membership]]:
        return list_memberships(conn, organization_id=organization.organization_id, after=after)

    return {member.user_id: member.email for member in await every_page(page, lambda member: member.user_id)}


def as_id(reference: str, prefix: str) -> UUID | None:
    """The id in a plain or prefixed id; None for anything else."""
    try:
        return UUID(reference.removeprefix(prefix))
    except ValueError:
        return None


def given_id(text: str, prefix: str) -> UUID:
    """An id as it is listed, or a plain one.

    Raises:
        typer.BadParameter
    """
    found = as_id(text, prefix)
    if found is None:
        raise typer.BadParameter(f"{text!r} is no id; it looks like {prefix}…")
    return found


def named(things: list[Thing], name: str) -> Thing | None:
    """The one with this name, whatever the case."""
    return next((each for each in things if each.name.lower() == name.strip().lower()), None)
