"""`bursar teams`: members who work together."""

from typing import Annotated

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_rows, with_database
from bursar.cli.scope import OrgOption, department_id_of, member_of, org_of, team_of
from bursar.identity.memberships import set_team_lead
from bursar.identity.teams import Team, archive_team, create_team, list_teams, rename_team

app = typer.Typer(help="Teams: create, list, lead, rename, archive.", no_args_is_help=True)

TeamArgument = Annotated[str, typer.Argument(help="Its name or id.", show_default=False)]
COLUMNS = [
    Column("name", "Name"),
    Column("department_id", "Department"),
    Column("lead_user_id", "Lead"),
    Column("team_id", "Id"),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="Its name.")],
    org: OrgOption,
    department: Annotated[str | None, typer.Option(help="Department it belongs to: its name or id.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Create a team.

    Examples: `bursar teams create Data --org acme`, `bursar teams create Data --org acme --department Engineering`
    """

    async def run(database: db.Database) -> Team:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            department_id = await department_id_of(conn, organization_id, department)
            return await create_team(
                conn, organization_id=organization_id, name=name, department_id=department_id, by=OPERATOR
            )

    print_fields(with_database(run), as_json=as_json)


@app.command("list")
def list_(
    org: OrgOption,
    archived: Annotated[bool, typer.Option("--archived", help="Also those that are archived.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List teams by name.

    Examples: `bursar teams list --org acme`, `bursar teams list --org acme --archived --json`
    """

    async def run(database: db.Database) -> list[Team]:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await list_teams(conn, organization_id=organization_id, with_archived=archived)

    print_rows(with_database(run), COLUMNS, as_json=as_json)


@app.command()
def lead(
    team: TeamArgument,
    org: OrgOption,
    user: Annotated[str | None, typer.Argument(help="Member's address or id; nobody when left out.")] = None,
) -> None:
    """Name the member who leads a team; what they may do is up to their roles.

    Examples: `bursar teams lead Data dana@acme.example --org acme`, `bursar teams lead Data --org acme`
    """

    async def run(database: db.Database) -> Team:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await team_of(conn, organization_id, team)
            user_id = None if user is None else (await member_of(conn, database, organization_id, user)).user_id
            return await set_team_lead(
                conn, organization_id=organization_id, team_id=found.team_id, user_id=user_id, by=OPERATOR
            )

    changed = with_database(run)
    typer.echo(f"{changed.name} is led by {user or 'nobody'}.")


@app.command()
def rename(team: TeamArgument, name: Annotated[str, typer.Argument(help="Its new name.")], org: OrgOption) -> None:
    """Give a team another name.

    Examples: `bursar teams rename Data "Data platform" --org acme`, `bursar teams rename A B --org acme`
    """

    async def run(database: db.Database) -> Team:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await team_of(conn, organization_id, team)
            return await rename_team(
                conn, organization_id=organization_id, team_id=found.team_id, name=name, by=OPERATOR
            )

    typer.echo(f"It is called {with_database(run).name} now.")


@app.command()
def archive(team: TeamArgument, org: OrgOption) -> None:
    """Put nobody new into a team; who is in it stays.

    Examples: `bursar teams archive Data --org acme`, `bursar teams archive Growth --org acme`
    """

    async def run(database: db.Database) -> Team:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await team_of(conn, organization_id, team)
            return await archive_team(conn, organization_id=organization_id, team_id=found.team_id, by=OPERATOR)

    typer.echo(f"{with_database(run).name} is archived.")
