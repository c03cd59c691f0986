"""`bursar users`: people, what they are in an organization, and their one-time sign-in links."""

from dataclasses import asdict
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.scope import PAGE, OrgOption, department_id_of, every_page, member_of, org_of, team_id_of, user_of
from bursar.credits.pools import open_credits
from bursar.identity import memberships
from bursar.identity.addresses import Address
from bursar.identity.departments import list_departments
from bursar.identity.memberships import Membership, list_memberships, place_member, set_roles
from bursar.identity.roles import Role
from bursar.identity.sessions import create_sign_in_link
from bursar.identity.teams import list_teams
from bursar.identity.users import invite
from bursar.settings import Settings

app = typer.Typer(help="People: create, list, roles, places, sign-in links.", no_args_is_help=True)

UserArgument = Annotated[str, typer.Argument(help="Their address or id.", show_default=False)]
TeamOption = Annotated[str | None, typer.Option("--team", help="Team: its name or id.")]
DepartmentOption = Annotated[str | None, typer.Option("--department", help="Department: its name or id.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Why, for the audit.")]

COLUMNS = [
    Column("display_name", "Name"),
    Column("email", "Address"),
    Column("roles", "Roles", show=", ".join),
    Column("team", "Team"),
    Column("department", "Department"),
    Column("status", "Status"),
    Column("user_id", "Id"),
]


@app.command()
def create(
    email: Annotated[str, typer.Argument(help="Their e-mail address.")],
    org: OrgOption,
    name: Annotated[str | None, typer.Option(help="What others see; the address's first part otherwise.")] = None,
    role: Annotated[list[Role] | None, typer.Option(help="Role; may be repeated. member otherwise.")] = None,
    team: TeamOption = None,
    department: DepartmentOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a person a member of an organization; who is not known yet is created with a personal home.

    Examples: `bursar users create dana@acme.example --org acme --role org_admin`,
    `bursar users create sam@acme.example --org acme --name "Sam Lee" --team data`
    """

    async def run(database: db.Database) -> Membership:
        organization_id = await org_of(database, org)
        address = Address.of(email, database.settings)
        display_name = name or address.email.partition("@")[0]
        async with database.tenant(organization_id) as conn:
            team_id, department_id = await _place(conn, organization_id, team, department)
        return await invite(
            database,
            organization_id=organization_id,
            address=address,
            display_name=display_name,
            roles=role or [Role.MEMBER],
            team_id=team_id,
            department_id=department_id,
            by=OPERATOR,
            on_opening=open_credits,
        )

    print_fields(with_database(run), as_json=as_json)


@app.command("list")
def list_(org: OrgOption, as_json: JsonOption = False) -> None:
    """List the members of an organization, also who is suspended or has left.

    Examples: `bursar users list --org acme`, `bursar users list --org acme --json`
    """

    async def run(database: db.Database) -> list[dict[str, Any]]:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            members = await every_page(
                lambda after: list_memberships(conn, organization_id=organization_id, after=after, limit=PAGE),
                lambda each: each.user_id,
            )
            return await _with_names(conn, organization_id, members)

    print_rows(with_database(run), COLUMNS, as_json=as_json, empty="Nobody yet.")


@app.command()
def link(
    user: UserArgument,
    base_url: Annotated[
        str | None, typer.Option(help="Where people reach this installation; http://host:port otherwise.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print a one-time link by which this person signs in, within 24 hours. Who has the link is the person.

    Examples: `bursar users link dana@acme.example`,
    `bursar users link dana@acme.example --base-url https://bursar.acme.example`
    """

    async def run(database: db.Database) -> str:
        async with database.untenanted() as conn:
            person = await user_of(conn, database, user)
        async with database.tenant(person.home_organization_id) as conn:
            token = await create_sign_in_link(conn, user=person, by=OPERATOR)
        return f"{(base_url or default_base_url(database.settings)).rstrip('/')}/sign-in/{token}"

    address = with_database(run)
    if as_json:
        print_json({"link": address})
    else:
        typer.echo(address)


@app.command()
def roles(user: UserArgument, role: Annotated[list[Role], typer.Argument()], org: OrgOption) -> None:
    """Replace a member's roles; they count from the next request on.

    Examples: `bursar users roles dana@acme.example org_admin finance --org acme`,
    `bursar users roles dana@acme.example member --org acme`
    """

    async def run(database: db.Database) -> Membership:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            member = await member_of(conn, database, organization_id, user)
            return await set_roles(
                conn, organization_id=organization_id, user_id=member.user_id, roles=set(role), by=OPERATOR
            )

    changed = with_database(run)
    typer.echo(f"{changed.email}: {', '.join(changed.roles)}")


@app.command()
def move(user: UserArgument, org: OrgOption, team: TeamOption = None, department: DepartmentOption = None) -> None:
    """Put a member into a team and a department, from now on; into none where an option is left out.

    Examples: `bursar users move dana@acme.example --org acme --team data --department Engineering`,
    `bursar users move dana@acme.example --org acme`
    """

    async def run(database: db.Database) -> Membership:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            member = await member_of(conn, database, organization_id, user)
            team_id, department_id = await _place(conn, organization_id, team, department)
            return await place_member(
                conn,
                organization_id=organization_id,
                user_id=member.user_id,
                team_id=team_id,
                department_id=department_id,
                by=OPERATOR,
            )

    typer.echo(f"{with_database(run).email} is moved.")


@app.command()
def suspend(user: UserArgument, org: OrgOption, reason: ReasonOption = None) -> None:
    """Let a member do nothing for now; their keys stop, and work again when they are resumed.

    Examples: `bursar users suspend dana@acme.example --org acme`,
    `bursar users suspend dana@acme.example --org acme --reason "on leave"`
    """
    _set_status(memberships.suspend_member, org, user, reason, "suspended")


@app.command()
def resume(user: UserArgument, org: OrgOption, reason: ReasonOption = None) -> None:
    """End a suspension.

    Examples: `bursar users resume dana@acme.example --org acme`,
    `bursar users resume dana@acme.example --org acme --reason "back again"`
    """
    _set_status(memberships.resume_member, org, user, reason, "active again")


@app.command()
def remove(user: UserArgument, org: OrgOption, reason: ReasonOption = None) -> None:
    """A member leaves: their keys in this organization are revoked for good.

    Examples: `bursar users remove dana@acme.example --org acme`,
    `bursar users remove dana@acme.example --org acme --reason "left the company"`
    """
    _set_status(memberships.end_membership, org, user, reason, "no member any more")


def default_base_url(settings: Settings) -> str:
    """Where a browser on this machine reaches the server of these settings."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, settings.host)
    return f"http://{host}:{settings.port}"


def _set_status(change: Any, org: str, user: str, reason: str | None, becomes: str) -> None:
    async def run(database: db.Database) -> str:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            member = await member_of(conn, database, organization_id, user)
            await change(conn, organization_id=organization_id, user_id=member.user_id, by=OPERATOR, reason=reason)
        return member.email

    typer.echo(f"{with_database(run)} is {becomes}.")


async def _place(
    conn: db.Connection, organization_id: UUID, team: str | None, department: str | None
) -> tuple[UUID | None, UUID | None]:
    """(team, department) by their names or ids."""
    team_id = await team_id_of(conn, organization_id, team)
    return team_id, await department_id_of(conn, organization_id, department)


async def _with_names(conn: db.Connection, organization_id: UUID, members: list[Membership]) -> list[dict[str, Any]]:
    """Members with the names of their team and department beside the ids."""
    teams = await list_teams(conn, organization_id=organization_id, with_archived=True)
    departments = await list_departments(conn, organization_id=organization_id, with_archived=True)
    names: dict[UUID | None, str] = {each.team_id: each.name for each in teams}
    names |= {each.department_id: each.name for each in departments}
    return [
        asdict(each) | {"team": names.get(each.team_id, ""), "department": names.get(each.department_id, "")}
        for each in members
    ]
