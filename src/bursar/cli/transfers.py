"""`bursar credits transfer` and `refund`, `bursar orgs pools`: credits that go on elsewhere, or back."""

from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.credits import KeyOption, credits_of
from bursar.cli.output import Column, DryRunOption, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.questions import request_id_of
from bursar.cli.scope import OrgOption, as_id, member_of, names_of, org_of, within
from bursar.clock import uuid7
from bursar.credits import explain as explaining
from bursar.credits import pools, refunds, transfers
from bursar.credits.pools import NoPool, PoolKind
from bursar.credits.transfers import Sharing, Switch
from bursar.identity.organizations import Organization, get_organization
from bursar.money import format_credits

PoolText = "shared, residual, a member's e-mail (their personal credits), or a pool's id."


def transfer(
    org: OrgOption,
    amount: Annotated[str, typer.Argument(help="Credits, or all.")],
    from_: Annotated[str, typer.Option("--from", help=f"Out of: {PoolText}")],
    to: Annotated[str, typer.Option(help=f"Into: {PoolText}")],
    reason: Annotated[str | None, typer.Option(help="Why, in words.")] = None,
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move unspent credits from one pool of an organization to another, grant by grant in burn order.

    Examples: `bursar credits transfer 500 --org acme --from shared --to dana@acme.example`,
    `bursar credits transfer all --org kestrel --from residual --to dana@kestrel.example`
    """
    micros = None if amount == "all" else credits_of(amount)

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        from_pool = await _pool_of(conn, database, organization, from_)
        to_pool = await _pool_of(conn, database, organization, to)
        made = await transfers.transfer_credits(
            conn,
            organization_id=organization.organization_id,
            from_pool_id=from_pool,
            to_pool_id=to_pool,
            amount_micros=micros,
            by=OPERATOR,
            idempotency_key=idempotency_key or uuid7().hex,
            reason=reason,
        )
        return {
            "from": f"pool_{from_pool.hex}",
            "to": f"pool_{to_pool.hex}",
            "credits": amount,
            "grants": " ".join(f"grt_{each.hex}" for each in made),
        }

    print_fields(within(org, work, dry_run=dry_run), dry_run=dry_run, as_json=as_json)


async def _pool_of(conn: db.Connection, database: db.Database, organization: Organization, reference: str) -> UUID:
    """A pool by its id, its kind or its owner; a member's personal one is opened where it is missing.

    Raises:
        NoPool
    """
    if "@" in reference:
        member = await member_of(conn, database, organization.organization_id, reference)
        return await pools.pool_for(conn, organization_id=organization.organization_id, owner_user_id=member.user_id)
    found = await pools.list_pools(conn, organization_id=organization.organization_id)
    pool_id = as_id(reference, "pool_")
    for pool in found:
        if pool.pool_id == pool_id or (pool.kind == reference and pool.model_filter is None and not pool.owner_user_id):
            return pool.pool_id
    raise NoPool(f"“{reference}”. Those there are: bursar credits show")


def refund(
    request: Annotated[str, typer.Argument(help="The request's id.")],
    reason: Annotated[str, typer.Option(help="Why, in words.")],
    amount: Annotated[str, typer.Option(help="Credits; all that is left of the charge otherwise.")] = "all",
    dry_run: DryRunOption = False,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give back what a request was charged, to the grants that paid it.

    Examples: `bursar credits refund req_0192… --reason "wrong answer"`,
    `bursar credits refund req_0192… --amount 2.5 --reason "half of it"`
    """
    micros = None if amount == "all" else credits_of(amount)
    request_id = request_id_of(request)

    async def work(database: db.Database) -> dict[str, Any]:
        async with database.platform() as conn:
            organization_id = await explaining.find_organization(conn, request_id=request_id)
        async with database.tenant(organization_id) as conn, conn.transaction(force_rollback=dry_run):
            given = await refunds.refund_charge(
                conn,
                organization_id=organization_id,
                request_id=request_id,
                amount_micros=micros,
                reason=reason,
                by=OPERATOR,
                idempotency_key=idempotency_key or uuid7().hex,
            )
        return {"request": f"req_{request_id.hex}", "refunded": format_credits(given)}

    print_fields(with_database(work), dry_run=dry_run, as_json=as_json)


def switch_pools(
    org: Annotated[str, typer.Argument(help="Its slug or id.", show_default=False)],
    switch: Annotated[Sharing, typer.Option(help="What its pools shall be.")],
    dry_run: DryRunOption = False,
    reason: Annotated[str | None, typer.Option(help="Why, for the audit.")] = None,
    idempotency_key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Move an organization's credits from its shared pool to personal ones, or back, to the micro-credit.

    Examples: `bursar orgs pools acme --switch personal --dry-run`, `bursar orgs pools acme --switch shared`
    """

    async def run(database: db.Database) -> tuple[Switch, dict[UUID, str]]:
        organization_id = await org_of(database, org)
        async with database.tenant(organization_id) as conn:
            names = await names_of(conn, await get_organization(conn, organization_id=organization_id))
            async with conn.transaction(force_rollback=dry_run):
                done = await transfers.switch_pools(
                    conn,
                    organization_id=organization_id,
                    to=switch,
                    by=OPERATOR,
                    idempotency_key=idempotency_key or uuid7().hex,
                    reason=reason,
                )
        return done, names

    done, names = with_database(run)
    _print_switch(done, names, dry_run=dry_run, as_json=as_json)


def _print_switch(done: Switch, names: dict[UUID, str], *, dry_run: bool, as_json: bool) -> None:
    rows = [
        {
            "kind": each.kind.value,
            "owner": names.get(each.owner_user_id, str(each.owner_user_id)) if each.owner_user_id else None,
            "available": format_credits(each.available_micros),
            "held": format_credits(each.held_micros),
        }
        for each in done.pools
        if each.kind is not PoolKind.RESIDUAL or each.available_micros
    ]
    sums = {
        "moved": format_credits(done.moved_micros),
        "residual": format_credits(done.residual_micros),
        "held": format_credits(done.held_micros),
    }
    if as_json:
        print_json({"dry_run": dry_run, **sums, "pools": rows})
        return
    verb = "Would move" if dry_run else "Moved"
    typer.echo(f"{verb} {sums['moved']} credits; {sums['held']} stay with running requests until they end.")
    columns = [Column("kind", "Pool"), Column("owner", "Owner"), Column("available", "Available", right=True)]
    print_rows(rows, [*columns, Column("held", "Held", right=True)], as_json=False)
