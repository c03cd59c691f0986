"""Teams: members with a lead. A team, like a department, is archived and never deleted."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.identity.departments import get_department
from bursar.identity.names import clean_name, one_of_a_name
from bursar.identity.organizations import QUERIES
from bursar.problems import Problem


class TeamNotFound(Problem):
    """No such team in this organization."""

    status, code, title = 404, "team_not_found", "No such team"


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """Members who work together. archived_at: since when nobody new is put into it."""

    organization_id: UUID
    team_id: UUID
    name: str
    department_id: UUID | None
    lead_user_id: UUID | None
    created_at: datetime
    archived_at: datetime | None


async def create_team(
    conn: db.Connection,
    *,
    organization_id: UUID,
    name: str,
    by: Actor,
    department_id: UUID | None = None,
    at: datetime | None = None,
) -> Team:
    """A new team, perhaps of a department.

    Raises:
        InvalidName, DepartmentNotFound
        NameTaken: a team in use bears the name, whatever the case.
    """
    name = clean_name(name)
    if department_id is not None:
        await get_department(conn, organization_id=organization_id, department_id=department_id)
    with one_of_a_name(name):
        team = await db.fetch_one(
            conn,
            Team,
            QUERIES.insert_team,
            organization_id=organization_id,
            team_id=clock.uuid7(),
            name=name,
            department_id=department_id,
            at=at,
        )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="team.created",
        object_id=team.team_id,
        new={"name": name, "department_id": department_id},
    )
    return team


async def get_team(conn: db.Connection, *, organization_id: UUID, team_id: UUID) -> Team:
    """Raises TeamNotFound for an unknown and for another organization's alike."""
    found = await db.fetch_optional(conn, Team, QUERIES.team, organization_id=organization_id, team_id=team_id)
    if found is None:
        raise TeamNotFound
    return found


async def list_teams(conn: db.Connection, *, organization_id: UUID, with_archived: bool = False) -> list[Team]:
    """The organization's teams by name."""
    return await db.fetch_all(conn, Team, QUERIES.teams, organization_id=organization_id, with_archived=with_archived)


async def rename_team(conn: db.Connection, *, organization_id: UUID, team_id: UUID, name: str, by: Actor) -> Team:
    """Give it another name.

    Raises:
        InvalidName, NameTaken, TeamNotFound
    """
    old = await get_team(conn, organization_id=organization_id, team_id=team_id)
    name = clean_name(name)
    with one_of_a_name(name):
        team = await db.fetch_one(
            conn, Team, QUERIES.rename_team, organization_id=organization_id, team_id=team_id, name=name
        )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="team.renamed",
        object_id=team_id,
        old={"name": old.name},
        new={"name": name},
    )
    return team


async def archive_team(conn: db.Connection, *, organization_id: UUID, team_id: UUID, by: Actor) -> Team:
    """Put nobody new into it; who is in it stays. Doing it again changes nothing.

    Raises:
        TeamNotFound
    """
    old = await get_team(conn, organization_id=organization_id, team_id=team_id)
    if old.archived_at is not None:
        return old
    team = await db.fetch_one(conn, Team, QUERIES.archive_team, organization_id=organization_id, team_id=team_id)
    await record(conn, organization_id=organization_id, by=by, action="team.archived", object_id=team_id)
    return team
