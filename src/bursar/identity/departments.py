"""Departments: cost centers. Usage keeps the department it had at its time, so none is ever deleted."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.identity.names import clean_name, one_of_a_name
from bursar.identity.organizations import QUERIES, touch_limits
from bursar.problems import Problem


class DepartmentNotFound(Problem):
    """No such department in this organization."""

    status, code, title = 404, "department_not_found", "No such department"


@dataclass(frozen=True, slots=True, kw_only=True)
class Department:
    """A cost center. archived_at: since when nobody new is put into it."""

    organization_id: UUID
    department_id: UUID
    name: str
    created_at: datetime
    archived_at: datetime | None


async def create_department(
    conn: db.Connection, *, organization_id: UUID, name: str, by: Actor, at: datetime | None = None
) -> Department:
    """A new department.

    Raises:
        InvalidName
        NameTaken: a department in use bears the name, whatever the case.
    """
    name = clean_name(name)
    with one_of_a_name(name):
        department = await db.fetch_one(
            conn,
            Department,
            QUERIES.insert_department,
            organization_id=organization_id,
            department_id=clock.uuid7(),
            name=name,
            at=at,
        )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="department.created",
        object_id=department.department_id,
        new={"name": name},
    )
    return department


async def get_department(conn: db.Connection, *, organization_id: UUID, department_id: UUID) -> Department:
    """Raises DepartmentNotFound for an unknown and for another organization's alike."""
    found = await db.fetch_optional(
        conn, Department, QUERIES.department, organization_id=organization_id, department_id=department_id
    )
    if found is None:
        raise DepartmentNotFound
    return found


async def list_departments(
    conn: db.Connection, *, organization_id: UUID, with_archived: bool = False
) -> list[Department]:
    """The organization's departments by name."""
    return await db.fetch_all(
        conn, Department, QUERIES.departments, organization_id=organization_id, with_archived=with_archived
    )


async def rename_department(
    conn: db.Connection, *, organization_id: UUID, department_id: UUID, name: str, by: Actor
) -> Department:
    """Give it another name from now on; usage that happened keeps the name of its time.

    Raises:
        InvalidName, NameTaken, DepartmentNotFound
    """
    old = await get_department(conn, organization_id=organization_id, department_id=department_id)
    name = clean_name(name)
    with one_of_a_name(name):
        department = await db.fetch_one(
            conn,
            Department,
            QUERIES.rename_department,
            organization_id=organization_id,
            department_id=department_id,
            name=name,
        )
    await touch_limits(conn, organization_id)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="department.renamed",
        object_id=department_id,
        old={"name": old.name},
        new={"name": name},
    )
    return department


async def archive_department(
    conn: db.Connection, *, organization_id: UUID, department_id: UUID, by: Actor
) -> Department:
    """Put nobody new into it; who is in it stays. Doing it again changes nothing.

    Raises:
        DepartmentNotFound
    """
    old = await get_department(conn, organization_id=organization_id, department_id=department_id)
    if old.archived_at is not None:
        return old
    department = await db.fetch_one(
        conn, Department, QUERIES.archive_department, organization_id=organization_id, department_id=department_id
    )
    await record(conn, organization_id=organization_id, by=by, action="department.archived", object_id=department_id)
    return department
