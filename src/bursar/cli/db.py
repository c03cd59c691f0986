"""`bursar db`: what the schema is, and bringing it up to date."""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import psycopg
import typer

from bursar import db
from bursar.cli.exits import Exit
from bursar.cli.output import Answer, Column, JsonOption, print_fields, print_json, print_rows, with_database
from bursar.cli.scope import org_of
from bursar.db import migrate as migrations
from bursar.db.embedded import EmbeddedServer
from bursar.errors import BursarError
from bursar.settings import Settings

app = typer.Typer(help="The database: status, migrations, verification, queries.", no_args_is_help=True)


class QueryFailed(BursarError):
    """The database could not run a query."""


@asynccontextmanager
async def _admin_dsn(settings: Settings) -> AsyncIterator[str]:
    """The admin's connection string; nothing is migrated."""
    if settings.database_url is not None:
        yield settings.database_url
        return
    server = EmbeddedServer(settings.data_dir, pg_bin=settings.pg_bin)
    await asyncio.to_thread(server.start)
    try:
        yield server.dsn
    finally:
        await asyncio.to_thread(server.stop)


def _with_admin(work: Callable[[str, Settings], Coroutine[Any, Any, Answer]]) -> Answer:
    async def run() -> Answer:
        settings = Settings.from_environment()
        async with _admin_dsn(settings) as dsn:
            return await work(dsn, settings)

    return asyncio.run(run())


@app.command()
def status(as_json: JsonOption = False) -> None:
    """Say which server this is, what is applied and what waits.

    Examples: `bursar db status`, `bursar db status --json`
    """
    print_fields(_with_admin(_status), as_json=as_json)


async def _status(dsn: str, settings: Settings) -> dict[str, Any]:
    found = await migrations.status(dsn)
    return {
        "server": "embedded" if settings.database_url is None else "DATABASE_URL",
        "data_dir": settings.data_dir if settings.database_url is None else None,
        "version": await migrations.server_version(dsn),
        "is_current": found.is_current,
        "applied": found.applied,
        "pending": found.pending,
        "changed_files": found.changed_files,
        "faults": found.faults,
    }


@app.command()
def migrate(
    reset_role_passwords: Annotated[
        bool,
        typer.Option(help="Take over roles of this cluster whose passwords come from another master key."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Bring roles and schema up to date. Can be run again at any time, also after an interruption.

    Examples: `bursar db migrate`, `DATABASE_URL=postgresql://… bursar db migrate --json`
    """

    async def run(dsn: str, settings: Settings) -> migrations.Report:
        return await migrations.migrate(dsn, settings.master_key, reset_passwords=reset_role_passwords)

    report = _with_admin(run)
    if as_json:
        print_json(report)
        return
    for name in (*report.migrations, *report.files):
        typer.echo(f"applied {name}")
    typer.echo("The schema is up to date.")


@app.command()
def verify(as_json: JsonOption = False) -> None:
    """Compare what is applied with the files of this version; exit code 1 when they differ.

    Examples: `bursar db verify`, `bursar db verify --json`
    """

    async def run(dsn: str, _: Settings) -> migrations.Status:
        return await migrations.status(dsn)

    found = _with_admin(run)
    if as_json:
        print_json(found)
    else:
        for fault in found.faults:
            typer.echo(f"fault: {fault}")
        for name in (*found.pending, *found.changed_files):
            typer.echo(f"not applied: {name}")
        if found.is_current:
            typer.echo(f"All {len(found.applied)} migrations and their functions are as in this version.")
    if not found.is_current:
        raise typer.Exit(Exit.FAILED)


@app.command()
def query(
    statement: Annotated[str, typer.Argument(help="One SQL query; docs/reporting.md has examples.")],
    org: Annotated[str | None, typer.Option("--org", help="As this organization: nothing of another is seen.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run one query that only reads: over every organization, or with --org within one.

    Examples: `bursar db query "select * from reporting.org_billing_summary"`,
    `bursar db query "select source, quantity from reporting.purchased_consumables" --org acme --json`
    """

    async def work(database: db.Database) -> tuple[list[str], list[dict[str, Any]]]:
        organization_id = await org_of(database, org) if org else None
        async with database.tenant(organization_id) if organization_id else database.platform() as conn:
            return await _rows(conn, statement)

    names, rows = with_database(work)
    numbers = {name for name in names for row in rows if isinstance(row[name], int | Decimal)}
    as_text = (UUID, Decimal) if as_json else UUID  # an id stays what a statement can ask for
    rows = [{name: str(cell) if isinstance(cell, as_text) else cell for name, cell in row.items()} for row in rows]
    print_rows(rows, [Column(name, name, right=name in numbers) for name in names], as_json=as_json, empty="No rows.")


async def _rows(conn: db.Connection, statement: str) -> tuple[list[str], list[dict[str, Any]]]:
    await conn.execute("set transaction read only")
    try:
        # Asked for in binary, it must be one statement: none can end the transaction and begin another.
        cursor = await conn.execute(statement, binary=True)
        names = [column.name for column in cursor.description or ()]
        if len(set(names)) < len(names):
            raise QueryFailed("Two columns have one name", next_step="Name each column apart: select a.name as a, …")
        return names, [dict(zip(names, row, strict=True)) for row in (await cursor.fetchall() if names else [])]
    except psycopg.Error as error:
        await conn.rollback()
        raise QueryFailed("The query failed", why=f"{error}".strip(), next_step="Change the query") from error
