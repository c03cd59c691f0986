"""`bursar webhooks`: where events are sent, signed."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.exits import Exit
from bursar.cli.output import (
    Column,
    DryRunOption,
    JsonOption,
    print_fields,
    print_json,
    print_rows,
    tell_dry_run,
    with_database,
)
from bursar.cli.scope import OrgOption, as_id, org_of, within
from bursar.clock import now
from bursar.identity.organizations import Organization
from bursar.outbox.deliveries import Due, Result, Sender
from bursar.outbox.endpoints import (
    Delivered,
    Endpoint,
    EventNotFound,
    WebhookNotFound,
    add_endpoint,
    enable_endpoint,
    list_deliveries,
    list_endpoints,
    post_test,
    remove_endpoint,
    replay,
    rotate_secret,
)
from bursar.outbox.outside import Allowed, Outside
from bursar.sealing import Keyring

app = typer.Typer(help="Webhooks: add, list, log, rotate, test, replay, enable, remove.", no_args_is_help=True)

WebhookArgument = Annotated[str, typer.Argument(help="Its id: whk_…", show_default=False)]
COLUMNS = [
    Column("webhook_id", "Webhook"),
    Column("url", "Address"),
    Column("kinds", "Events", show=", ".join),
    Column("state", "State"),
    Column("delivered", "Delivered", right=True),
    Column("pending", "Pending", right=True),
    Column("failed", "Failed", right=True),
]
LOG_COLUMNS = [
    Column("event_id", "Event"),
    Column("kind", "Kind"),
    Column("state", "State"),
    Column("attempts", "Attempts", right=True),
    Column("answer", "Last answer"),
    Column("posted_at", "Happened", show=lambda at: f"{at:%Y-%m-%d %H:%M:%S}"),
]


@app.command()
def add(
    url: Annotated[str, typer.Argument(help="https://…; a public address, on port 443.")],
    org: OrgOption,
    kind: Annotated[
        list[str] | None, typer.Option("--kind", help="pool.low, pool.* …; may be given again; all otherwise.")
    ] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send events to an address from now on. Prints the secret that they are signed with, once.

    Examples: `bursar webhooks add https://hooks.acme.example/bursar --org acme`,
    `bursar webhooks add https://hooks.acme.example/low --org acme --kind "pool.*" --kind limit.reached --json`
    """

    async def run(conn: db.Connection, database: db.Database, organization: Organization) -> tuple[Endpoint, str]:
        return await add_endpoint(
            conn,
            Keyring(database.settings.master_key),
            Allowed.by(database.settings),
            organization_id=organization.organization_id,
            url=url,
            kinds=kind or ["*"],
            by=OPERATOR,
        )

    endpoint, secret = within(org, run, dry_run=dry_run)
    shown = {"webhook_id": _shown(endpoint.endpoint_id), "url": url, "kinds": endpoint.kinds}
    print_fields(shown | _kept(secret, dry_run), dry_run=dry_run, as_json=as_json)


@app.command("list")
def list_(org: OrgOption, as_json: JsonOption = False) -> None:
    """List webhooks with how many events were delivered, wait, or were given up.

    Examples: `bursar webhooks list --org acme`, `bursar webhooks list --org acme --json`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> list[Endpoint]:
        return await list_endpoints(conn, organization_id=organization.organization_id)

    rows = [
        {
            "webhook_id": _shown(each.endpoint_id),
            "url": each.url,
            "kinds": each.kinds,
            "state": "failing" if each.state == "active" and each.failing_since else each.state,
            "failing_since": each.failing_since,
            "created_at": each.created_at,
            "delivered": each.delivered,
            "pending": each.pending,
            "failed": each.failed,
        }
        for each in within(org, run)
    ]
    print_rows(rows, COLUMNS, as_json=as_json)


@app.command()
def log(
    webhook: WebhookArgument,
    org: OrgOption,
    most: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 50,
    as_json: JsonOption = False,
) -> None:
    """Show what was sent to a webhook and what it answered, newest first.

    Examples: `bursar webhooks log whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme`,
    `bursar webhooks log whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --most 200 --json`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> list[Delivered]:
        return await list_deliveries(
            conn, organization_id=organization.organization_id, endpoint_id=_id(webhook), most=most
        )

    rows = [{**_fields(each), "event_id": f"evt_{each.event_id.hex}"} for each in within(org, run)]
    print_rows(rows, LOG_COLUMNS, as_json=as_json)


@app.command()
def rotate(
    webhook: WebhookArgument,
    org: OrgOption,
    overlap_hours: Annotated[int, typer.Option(help="How long the secret before signs too.", min=0, max=24 * 30)] = 24,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a new secret and print it, once; for a while every delivery is signed with both.

    Examples: `bursar webhooks rotate whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme`,
    `bursar webhooks rotate whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --overlap-hours 0 --json`
    """

    async def run(conn: db.Connection, database: db.Database, organization: Organization) -> str:
        return await rotate_secret(
            conn,
            Keyring(database.settings.master_key),
            organization_id=organization.organization_id,
            endpoint_id=_id(webhook),
            overlap=timedelta(hours=overlap_hours),
            by=OPERATOR,
        )

    secret = within(org, run, dry_run=dry_run)
    print_fields({"webhook_id": webhook} | _kept(secret, dry_run), dry_run=dry_run, as_json=as_json)


@app.command("test")
def send_test(webhook: WebhookArgument, org: OrgOption, as_json: JsonOption = False) -> int:
    """Send an event of the kind webhook.test there, now, and say what came of it.

    Examples: `bursar webhooks test whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme`,
    `bursar webhooks test whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --json`
    """

    async def run(database: db.Database) -> Result | None:
        organization_id = await org_of(database, org)
        endpoint_id = _id(webhook)
        async with database.tenant(organization_id) as conn:
            event_id = await post_test(conn, organization_id=organization_id, endpoint_id=endpoint_id)
        settings = database.settings
        sender = Sender(database, Outside(Allowed.by(settings)), Keyring(settings.master_key))
        return await sender.send(Due(organization_id, endpoint_id, event_id))

    result = with_database(run)
    # A worker of a running server may have taken it up first, or an earlier test still waits.
    answer = result.answer if result else "it is on its way: bursar webhooks log"
    delivered = result.is_delivered if result else None
    if as_json:
        print_json({"delivered": delivered, "answer": answer})
    else:
        typer.echo(f"{'Not delivered' if delivered is False else 'Delivered' if delivered else 'Sent'}: {answer}")
    return Exit.FAILED if delivered is False else Exit.DONE


@app.command("replay")
def replay_(
    webhook: WebhookArgument,
    org: OrgOption,
    event: Annotated[str | None, typer.Option(help="One event: evt_…")] = None,
    hours: Annotated[int | None, typer.Option(help="All of the last hours.", min=1, max=24 * 366)] = None,
    only_failed: Annotated[bool, typer.Option("--only-failed", help="Of those only what was given up.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Send events once more, under their old ids; also those that happened before the webhook was added.

    Examples: `bursar webhooks replay whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --hours 24`,
    `bursar webhooks replay whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --hours 72 --only-failed`
    """
    if (event is None) == (hours is None):
        raise EventNotFound("Say one of --event and --hours.")
    event_id = None if event is None else as_id(event, "evt_")
    if event is not None and event_id is None:
        raise EventNotFound(f"“{event[:50]}” is no event's id.")

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> int:
        return await replay(
            conn,
            organization_id=organization.organization_id,
            endpoint_id=_id(webhook),
            event_id=event_id,
            since=None if hours is None else now() - timedelta(hours=hours),
            only_failed=only_failed,
            by=OPERATOR,
        )

    again = within(org, run, dry_run=dry_run)
    if as_json:
        print_fields({"events": again}, dry_run=dry_run, as_json=True)
    else:
        typer.echo(f"{again} {'event goes' if again == 1 else 'events go'} out again.")
        tell_dry_run(dry_run)


@app.command()
def enable(
    webhook: WebhookArgument, org: OrgOption, dry_run: DryRunOption = False, as_json: JsonOption = False
) -> None:
    """Send to a webhook again that was disabled because it failed for days.

    Examples: `bursar webhooks enable whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme`,
    `bursar webhooks enable whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme --json`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> Endpoint:
        return await enable_endpoint(
            conn, organization_id=organization.organization_id, endpoint_id=_id(webhook), by=OPERATOR
        )

    found = within(org, run, dry_run=dry_run)
    shown = {"webhook_id": webhook, "url": found.url, "state": found.state}
    print_fields(shown, dry_run=dry_run, as_json=as_json)


@app.command()
def remove(webhook: WebhookArgument, org: OrgOption, dry_run: DryRunOption = False) -> None:
    """Send nothing there any more; what waits for it is given up.

    Examples: `bursar webhooks remove whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org acme`,
    `bursar webhooks remove whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f --org meridian`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> None:
        await remove_endpoint(conn, organization_id=organization.organization_id, endpoint_id=_id(webhook), by=OPERATOR)

    within(org, run, dry_run=dry_run)
    typer.echo("It would be removed." if dry_run else "It is removed.")
    tell_dry_run(dry_run)


def _id(reference: str) -> UUID:
    found = as_id(reference, "whk_")
    if found is None:
        raise WebhookNotFound(f"“{reference[:50]}”. Those there are: bursar webhooks list")
    return found


def _kept(secret: str, dry_run: bool) -> dict[str, str]:
    """The secret, where it is one: that of a dry run signs nothing."""
    return {} if dry_run else {"secret": secret}


def _shown(endpoint_id: UUID) -> str:
    return f"whk_{endpoint_id.hex}"


def _fields(row: Delivered) -> Mapping[str, Any]:
    return {name: getattr(row, name) for name in row.__slots__}
