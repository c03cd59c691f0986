"""`bursar seal`: the chain of hashes over ledger and audit, and its anchors outside the database."""

import typer

from bursar import db
from bursar.audit import anchors, seals
from bursar.cli.output import JsonOption, print_fields, with_database

app = typer.Typer(help="The chain of hashes over ledger and audit.", no_args_is_help=True)


@app.callback()
def _seal() -> None:
    """The chain of hashes over ledger and audit."""


@app.command("now")
def now(as_json: JsonOption = False) -> None:
    """Seal everything that is new, and keep an anchor where the settings say. The worker does both by itself.

    A transaction that runs keeps back what was written since it began; after 30 s of that all_sealed is false.

    Examples: `bursar seal now`, `BURSAR_ANCHOR_DIR=/mnt/safe bursar seal now --json`
    """

    async def work(database: db.Database) -> dict[str, object]:
        done = await seals.seal_all(database)
        kept = await anchors.anchor(database, only_when_due=False)
        return {"seals": done.seals, "rows": done.rows, "all_sealed": done.is_all, "anchored_to": kept}

    print_fields(with_database(work), as_json=as_json)
