"""`bursar departments`: cost centers."""

from typing import Annotated

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_rows, with_database
from bursar.cli.scope import OrgOption, department_of, org_of
from bursar.identity.departments import (
    Department,
    archive_department,
    create_department,
    list_departments,
    rename_department,
)

app = typer.Typer(help="Departments: create, list, rename, archive.", no_args_is_help=True)

DepartmentArgument = Annotated[str, typer.Argument(help="Its name or id.", show_default=False)]
COLUMNS = [Column("name", "Name"), Column("created_at", "Since"), Column("department_id", "Id")]


@app.command()
def create(name: Annotated[str, typer.Argument(help="Its name.")], org: OrgOption, as_json: JsonOption = False) -> None:
    """Create a department.

    Examples: `bursar departments create Engineering --org acme`, `bursar departments create Sales --org acme --json`
    """

    async def run(database: db.Database) -> Department:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await create_department(conn, organization_id=organization_id, name=name, by=OPERATOR)

    print_fields(with_database(run), as_json=as_json)


@app.command("list")
def list_(
    org: OrgOption,
    archived: Annotated[bool, typer.Option("--archived", help="Also those that are archived.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List departments by name.

    Examples: `bursar departments list --org acme`, `bursar departments list --org acme --archived --json`
    """

    async def run(database: db.Database) -> list[Department]:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await list_departments(conn, organization_id=organization_id, with_archived=archived)

    print_rows(with_database(run), COLUMNS, as_json=as_json)


@app.command()
def rename(
    department: DepartmentArgument, name: Annotated[str, typer.Argument(help="Its new name.")], org: OrgOption
) -> None:
    """Give a department another name from now on; past usage keeps the name of its time.

    Examples: `bursar departments rename Sales "Field sales" --org acme`,
    `bursar departments rename RnD Research --org acme`
    """

    async def run(database: db.Database) -> Department:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await department_of(conn, organization_id, department)
            return await rename_department(
                conn,
                organization_id=organization_id,
                department_id=found.department_id,
                name=name,
                by=OPERATOR,
            )

    typer.echo(f"It is called {with_database(run).name} now.")


@app.command()
def archive(department: DepartmentArgument, org: OrgOption) -> None:
    """Put nobody new into a department; who is in it stays.

    Examples: `bursar departments archive Sales --org acme`, `bursar departments archive RnD --org acme`
    """

    async def run(database: db.Database) -> Department:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await department_of(conn, organization_id, department)
            return await archive_department(
                conn, organization_id=organization_id, department_id=found.department_id, by=OPERATOR
            )

    typer.echo(f"{with_database(run).name} is archived.")
