"""`bursar keys`: API keys of people and services."""

from dataclasses import asdict
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.scope import (
    PAGE,
    department_id_of,
    every_page,
    member_of,
    org_of,
    team_id_of,
    user_of,
)
from bursar.identity.api_keys import (
    ApiKey,
    ApiKeyNotFound,
    NewApiKey,
    create_api_key,
    find_api_key,
    list_api_keys,
    revoke_api_key,
    rotate_api_key,
)
from bursar.identity.roles import Scope
from bursar.identity.secret_text import API_KEY, Malformed, parse_public_id

app = typer.Typer(help="API keys: create, list, rotate, revoke.", no_args_is_help=True)

KeyArgument = Annotated[str, typer.Argument(help="The key's text or the part of it that lists show.")]
UserOption = Annotated[str | None, typer.Option("--user", help="Owner: their address or id; a service otherwise.")]
PersonalOption = Annotated[
    bool, typer.Option("--personal", help="The user's own key, made at home: it acts where they belong.")
]
MaybeOrgOption = Annotated[str | None, typer.Option("--org", envvar="BURSAR_ORG", help="Organization: its slug or id.")]
COLUMNS = [
    Column("key", "Key"),
    Column("name", "Name"),
    Column("owner", "Owner"),
    Column("scopes", "Scopes", show=", ".join),
    Column("state", "State"),
    Column("last_used_at", "Last used"),
]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What it is for.")],
    org: MaybeOrgOption = None,
    user: UserOption = None,
    personal: PersonalOption = False,
    scope: Annotated[list[Scope] | None, typer.Option(help="May be repeated; inference otherwise.")] = None,
    team: Annotated[str | None, typer.Option(help="Team its usage counts for; the owner's otherwise.")] = None,
    department: Annotated[str | None, typer.Option(help="Department its usage counts for, likewise.")] = None,
    expires_in_days: Annotated[int | None, typer.Option(help="Days until it stops by itself.", min=1, max=3650)] = None,
    as_json: JsonOption = False,
) -> None:
    """Create a key and print its text, which is shown this once.

    Examples: `bursar keys create Laptop --org acme --user dana@acme.example`,
    `bursar keys create "Night batch" --org acme --department Engineering --expires-in-days 90`
    """

    async def run(database: db.Database) -> NewApiKey:
        organization_id, user_id = await _owner(database, org, user, personal)
        async with database.tenant(organization_id) as conn:
            return await create_api_key(
                conn,
                organization_id=organization_id,
                user_id=user_id,
                name=name,
                by=OPERATOR,
                scopes=scope or [Scope.INFERENCE],
                team_id=await team_id_of(conn, organization_id, team),
                department_id=await department_id_of(conn, organization_id, department),
                expires_at=None if expires_in_days is None else clock.now() + timedelta(days=expires_in_days),
            )

    _print_new(with_database(run), as_json)


@app.command("list")
def list_(
    org: MaybeOrgOption = None, user: UserOption = None, personal: PersonalOption = False, as_json: JsonOption = False
) -> None:
    """List keys, of one member with --user; their texts are not stored.

    Examples: `bursar keys list --org acme`, `bursar keys list --personal --user dana@acme.example --json`
    """

    async def run(database: db.Database) -> list[ApiKey]:
        organization_id, user_id = await _owner(database, org, user, personal)
        async with database.tenant(organization_id) as conn:
            return await every_page(
                lambda after: list_api_keys(
                    conn, organization_id=organization_id, user_id=user_id, after=after, limit=PAGE
                ),
                lambda each: each.api_key_id,
            )

    print_rows([_row(each) for each in with_database(run)], COLUMNS, as_json=as_json)


@app.command()
def rotate(
    key: KeyArgument,
    overlap_hours: Annotated[
        float, typer.Option(help="How long the old text goes on working; 0 stops it at once.", min=0, max=2160)
    ] = 24,
    as_json: JsonOption = False,
) -> None:
    """Make a new key in a key's place and print its text, which is shown this once.

    Examples: `bursar keys rotate bk_7N42…`, `bursar keys rotate bk_7N42… --overlap-hours 0`
    """

    async def run(database: db.Database) -> NewApiKey:
        organization_id, public_id = _named_by(key)
        async with database.tenant(organization_id) as conn:
            found = await find_api_key(conn, organization_id=organization_id, public_id=public_id)
            return await rotate_api_key(
                conn,
                organization_id=organization_id,
                api_key_id=found.api_key_id,
                overlap=timedelta(hours=overlap_hours),
                by=OPERATOR,
            )

    _print_new(with_database(run), as_json)


@app.command()
def revoke(
    key: KeyArgument,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Stop a key for good, at once. Doing it again changes nothing.

    Examples: `bursar keys revoke bk_7N42…`, `bursar keys revoke bk_7N42… --reason "found in a log"`
    """

    async def run(database: db.Database) -> ApiKey:
        organization_id, public_id = _named_by(key)
        async with database.tenant(organization_id) as conn:
            found = await find_api_key(conn, organization_id=organization_id, public_id=public_id)
            return await revoke_api_key(
                conn, organization_id=organization_id, api_key_id=found.api_key_id, by=OPERATOR, reason=reason
            )

    print_fields(_row(with_database(run)), as_json=as_json)


def _named_by(key: str) -> tuple[UUID, str]:
    """(organization, public id) of a key's whole text or its public part, which carries the route."""
    try:
        return parse_public_id(API_KEY, key)
    except Malformed:
        raise ApiKeyNotFound("Give its whole text, or the part that `bursar keys list` shows") from None


async def _owner(database: db.Database, org: str | None, user: str | None, personal: bool) -> tuple[UUID, UUID | None]:
    """(organization, owner): the home and its person for a personal key, else the company and a member or a service."""
    if personal == (org is not None) or (personal and user is None):
        raise typer.BadParameter("Give either --org, or --personal with --user.")
    if org is not None:
        organization_id = await org_of(database, org)
        if user is None:
            return organization_id, None
        async with database.tenant(organization_id) as conn:
            return organization_id, (await member_of(conn, database, organization_id, user)).user_id
    async with database.untenanted() as conn:
        person = await user_of(conn, database, str(user))
    return person.home_organization_id, person.user_id


def _print_new(made: NewApiKey, as_json: bool) -> None:
    """The text alone on stdout, so that a script can take it."""
    if as_json:
        print_json(_row(made.key) | {"text": made.text})
        return
    typer.echo(made.text)
    typer.echo("Keep it now: it is not stored and cannot be shown again.", err=True)


def _row(key: ApiKey) -> dict[str, Any]:
    return asdict(key) | {
        "key": f"{API_KEY}{key.public_id}",
        "owner": key.user_id or "service",
        "state": _state(key),
    }


def _state(key: ApiKey) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.is_usable_at(clock.now()):
        return "expired"
    return "being replaced" if key.replaced_by is not None else "active"
