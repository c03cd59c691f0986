"""`bursar users move-in` and `arrivals`: people who bring their own credits into an organization."""

from typing import Annotated, Any

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_rows, with_database
from bursar.cli.scope import OrgOption, org_of, user_of, within
from bursar.credits import moving
from bursar.credits.moving import Into
from bursar.identity.organizations import Organization
from bursar.money import format_credits


def move_in(
    user: Annotated[str, typer.Argument(help="Who: an e-mail address or id of a member.")],
    org: OrgOption,
    into: Annotated[Into, typer.Option(help="Their own balance there, or the shared one.")] = Into.PERSONAL,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Bring a member's own credits into the organization, grant by grant. What they used before stays at their home.

    Examples: `bursar users move-in dana@acme.example --org acme --dry-run`,
    `bursar users move-in dana@acme.example --org acme --into shared`
    """

    async def work(database: db.Database) -> dict[str, Any]:
        organization_id = await org_of(database, org)
        async with database.untenanted() as conn:
            person = await user_of(conn, database, user)
        if dry_run:
            free, held = await moving.preview(database, user_id=person.user_id)
            return {"would_move": format_credits(free), "stays_with_running_requests": format_credits(held)}
        move = await moving.move_in(
            database, user_id=person.user_id, organization_id=organization_id, into=into, by=OPERATOR
        )
        return {
            "moved": format_credits(move.amount_micros),
            "stays_with_running_requests": format_credits(move.held_micros),
            "grants": len(move.parts),
            "from": f"org_{move.home_organization_id.hex}",
            "transfer_id": f"trf_{move.transfer_id.hex}",
        }

    print_fields(with_database(work), as_json=as_json)


def arrivals(org: OrgOption, as_json: JsonOption = False) -> None:
    """List the credits that members brought along, and the homes where their history is.

    Examples: `bursar users arrivals --org acme`, `bursar users arrivals --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await moving.list_arrivals(conn, organization_id=organization.organization_id)
        return [
            {
                "user": each.email,
                "credits": format_credits(each.amount_micros),
                "arrived_at": each.arrived_at,
                "home": f"org_{each.from_organization_id.hex}",
                "transfer_id": f"trf_{each.transfer_id.hex}",
            }
            for each in found
        ]

    columns = [Column("user", "User"), Column("credits", "Credits", right=True), Column("arrived_at", "Arrived")]
    print_rows(within(org, work), [*columns, Column("home", "Home")], as_json=as_json)
