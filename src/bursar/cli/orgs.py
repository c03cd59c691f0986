"""`bursar orgs`: the organizations of this installation."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_rows, with_database
from bursar.cli.scope import PAGE, every_page, org_of
from bursar.credits.pools import open_credits
from bursar.identity.departments import list_departments
from bursar.identity.memberships import list_memberships
from bursar.identity.organizations import (
    PLATFORM_ORGANIZATION_ID,
    Kind,
    Organization,
    create_organization,
    ensure_platform,
    get_organization,
    list_organizations,
    set_organization_status,
    slug_from_name,
    update_organization,
)
from bursar.identity.teams import list_teams

app = typer.Typer(help="Organizations: create, list, show, change, freeze and close.", no_args_is_help=True)


class NewKind(StrEnum):
    """Kinds that an operator makes; an individual's comes with the person."""

    COMPANY = "company"
    CATCH_ALL = "catch_all"
    PLATFORM = "platform"


class AnyKind(StrEnum):
    """What an organization can be, in a filter."""

    COMPANY = "company"
    CATCH_ALL = "catch_all"
    PLATFORM = "platform"
    INDIVIDUAL = "individual"


class Status(StrEnum):
    """What an organization can be."""

    ACTIVE = "active"
    FROZEN = "frozen"
    CLOSED = "closed"


COLUMNS = [
    Column("slug", "Slug"),
    Column("name", "Name"),
    Column("kind", "Kind"),
    Column("zone", "Zone"),
    Column("is_shared_token_pool", "Pool", show=lambda shared: "shared" if shared else "personal"),
    Column("status", "Status"),
    Column("organization_id", "Id"),
]

OrgArgument = Annotated[str, typer.Argument(help="Its slug or id.", show_default=False)]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What people call it.")],
    slug: Annotated[str | None, typer.Option(help="Its name in addresses; made from the name otherwise.")] = None,
    kind: Annotated[NewKind, typer.Option(help="What it is.")] = NewKind.COMPANY,
    zone: Annotated[str, typer.Option(help="IANA zone that cuts its days and months.")] = "UTC",
    currency: Annotated[str, typer.Option(help="ISO 4217 currency in which money is shown.")] = "USD",
    shared: Annotated[
        bool, typer.Option("--shared/--personal", help="One shared pool, or a balance for each member.")
    ] = True,
    shows_margin: Annotated[bool, typer.Option(help="Let its own people see provider cost and margin.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Create an organization with its accounts.

    Examples: `bursar orgs create "Acme Corp"`, `bursar orgs create Sable --zone Asia/Kolkata --personal --json`
    """
    values: dict[str, Any] = {"zone": zone, "currency": currency, "shows_margin": shows_margin}
    values |= {"slug": slug or slug_from_name(name), "name": name, "kind": kind.value, "is_shared_token_pool": shared}

    async def run(database: db.Database) -> Organization:
        if kind is NewKind.PLATFORM:
            return await _platform(database)
        organization_id = clock.uuid7()
        async with database.tenant(organization_id) as conn:
            made = await create_organization(conn, organization_id=organization_id, by=OPERATOR, **values)
            await open_credits(conn, made)
        return made

    print_fields(with_database(run), as_json=as_json)


@app.command("list")
def list_(
    kind: Annotated[AnyKind | None, typer.Option(help="Only those of this kind.")] = None,
    as_json: JsonOption = False,
) -> None:
    """List organizations in the order they were made; personal ones only when asked for.

    Examples: `bursar orgs list`, `bursar orgs list --kind individual --json`
    """

    only: Kind | None = None if kind is None else kind.value

    async def run(database: db.Database) -> list[Organization]:
        async with database.platform() as conn:
            return await every_page(
                lambda after: list_organizations(conn, kind=only, after=after, limit=PAGE),
                lambda each: each.organization_id,
            )

    found = with_database(run)
    rows = [each for each in found if kind is not None or each.kind != "individual"]
    print_rows(rows, COLUMNS, as_json=as_json, empty='None yet. Make one: bursar orgs create "Acme Corp"')


@app.command()
def show(org: OrgArgument, as_json: JsonOption = False) -> None:
    """Show one organization and how many people, teams and departments it has.

    Examples: `bursar orgs show acme`, `bursar orgs show acme --json`
    """

    async def run(database: db.Database) -> dict[str, Any]:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            found = await get_organization(conn, organization_id=organization_id)
            members = await every_page(
                lambda after: list_memberships(
                    conn, organization_id=organization_id, status="active", after=after, limit=PAGE
                ),
                lambda each: each.user_id,
            )
            return _fields(found) | {
                "members": len(members),
                "teams": len(await list_teams(conn, organization_id=organization_id)),
                "departments": len(await list_departments(conn, organization_id=organization_id)),
            }

    print_fields(with_database(run), as_json=as_json)


@app.command()
def change(
    org: OrgArgument,
    name: Annotated[str | None, typer.Option(help="Another name.")] = None,
    zone: Annotated[str | None, typer.Option(help="Another IANA zone.")] = None,
    shows_margin: Annotated[
        bool | None, typer.Option("--shows-margin/--hides-margin", help="Whether its own people may see margin.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Change what is given, keep the rest.

    Examples: `bursar orgs change acme --zone Europe/Paris`, `bursar orgs change acme --shows-margin`
    """

    async def run(database: db.Database) -> Organization:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await update_organization(
                conn, organization_id=organization_id, by=OPERATOR, name=name, zone=zone, shows_margin=shows_margin
            )

    print_fields(with_database(run), as_json=as_json)


@app.command("set-status")
def set_status(
    org: OrgArgument,
    status: Annotated[Status, typer.Argument(help="frozen: reads, spends nothing; closed: for good.")],
    reason: Annotated[str | None, typer.Option(help="Why, for the audit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Freeze an organization, let it go on, or close it for good.

    Examples: `bursar orgs set-status acme frozen --reason "unpaid"`, `bursar orgs set-status acme active`
    """

    async def run(database: db.Database) -> Organization:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            return await set_organization_status(
                conn, organization_id=organization_id, status=status.value, by=OPERATOR, reason=reason
            )

    print_fields(with_database(run), as_json=as_json)


async def _platform(database: db.Database) -> Organization:
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        platform = await ensure_platform(conn, by=OPERATOR)
        await open_credits(conn, platform)
    return platform


def _fields(organization: Organization) -> dict[str, Any]:
    return {name: getattr(organization, name) for name in organization.__dataclass_fields__}
