"""`bursar credits import`: opening balances from a CSV file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.exits import Exit
from bursar.cli.output import Column, DryRunOption, JsonOption, print_json, print_rows, with_database
from bursar.cli.progress import bars
from bursar.credits import opening
from bursar.credits.opening import Checked, Fault, Opening
from bursar.money import Micros, format_credits


def import_balances(
    file: Annotated[Path, typer.Argument(help="A CSV file with a head line.", exists=True, dir_okay=False)],
    org: Annotated[
        str | None, typer.Option("--org", envvar="BURSAR_ORG", help="Organization of rows that name none.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Import the good rows though others are bad.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Import opening balances. A file with a bad row imports nothing, and says of each what is wrong with it.

    Importing a file again grants only what was not granted yet.
    Examples: `bursar credits import balances.csv --org acme --dry-run`,
    `bursar credits import all.csv --skip-bad --json`
    """

    async def work(database: db.Database) -> tuple[Checked, list[Fault]]:
        with file.open(encoding="utf-8-sig", newline="") as lines:
            checked = await opening.check_file(database, lines, default_organization=org)
        if dry_run or (checked.faults and not skip_bad):
            return checked, []
        with bars("rows", least_seconds=2) as shown:
            shown.begin(file.name)
            shown.add(file.name, len(checked.rows))
            faults = await opening.import_rows(
                database, checked.rows, by=OPERATOR, progress=lambda _: shown.advance(file.name, 1)
            )
            shown.end(file.name)
        return checked, faults

    try:
        checked, refused = with_database(work)
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{file} is no text in UTF-8: {error}") from error
    faults = [*checked.faults, *refused]
    is_imported = not dry_run and (skip_bad or not checked.faults)
    _show(checked.rows if is_imported or dry_run else (), faults, is_imported=is_imported, as_json=as_json)
    if faults:
        raise typer.Exit(Exit.PARTLY_DONE if is_imported and len(refused) < len(checked.rows) else Exit.WRONG_USAGE)


def _show(rows: Sequence[Opening], faults: Sequence[Fault], *, is_imported: bool, as_json: bool) -> None:
    by_organization: dict[str, list[Opening]] = {}
    for row in rows:
        by_organization.setdefault(row.organization, []).append(row)
    sums: list[dict[str, Any]] = [
        {
            "organization": name,
            "rows": len(found),
            "members": len({each.owner_user_id for each in found} - {None}),
            "credits": format_credits(Micros(sum(each.amount_micros for each in found))),
        }
        for name, found in sorted(by_organization.items())
    ]
    bad = [{"line": each.line, "column": each.column, "problem": each.problem} for each in faults]
    if as_json:
        print_json({"imported": is_imported, "organizations": sums, "faults": bad})
        return
    if sums:
        columns = [Column("organization", "Organization"), Column("rows", "Rows", right=True)]
        columns += [Column("members", "Members", right=True), Column("credits", "Credits", right=True)]
        print_rows(sums, columns, as_json=False)
    for each in bad:
        place = f"line {each['line']}" + (f", {each['column']}" if each["column"] else "")
        typer.echo(f"{place}: {each['problem']}", err=True)
    if not is_imported:
        typer.echo("Nothing was imported." if bad else "Nothing was imported: a dry run.", err=True)
