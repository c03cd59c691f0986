"""The command line: nouns, then verbs; one file per noun.

A noun's file has `app = typer.Typer(...)` and is registered in NOUNS below; a command of its own is a line at the end.
Commands call domain functions, never SQL. Every list takes --json. Exit codes are in `bursar.cli.exits`.
"""

import sys
from functools import cache
from typing import Annotated, Any

import typer

from bursar import __version__
from bursar.cli import (
    alerts,
    caps,
    codes,
    credits,
    db,
    demo,
    departments,
    keys,
    models,
    moving,
    opening,
    orgs,
    past,
    prices,
    providers,
    questions,
    schedules,
    seal,
    serve,
    simulate,
    teams,
    top_ups,
    transfers,
    users,
    webhooks,
    whatif,
)
from bursar.cli.exits import Exit, exit_code_of, explain
from bursar.logs import configure_logs
from bursar.settings import Settings

NOUNS = {
    "db": db.app,
    "providers": providers.app,
    "prices": prices.app,
    "models": models.app,
    "orgs": orgs.app,
    "users": users.app,
    "teams": teams.app,
    "departments": departments.app,
    "keys": keys.app,
    "credits": credits.app,
    "caps": caps.app,
    "schedules": schedules.app,
    "codes": codes.app,
    "top-ups": top_ups.app,
    "seal": seal.app,
    "alerts": alerts.app,
    "webhooks": webhooks.app,
}

app = typer.Typer(
    name="bursar",
    help="A treasurer for a company's AI usage.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
credits.app.command("transfer")(transfers.transfer)
credits.app.command("refund")(transfers.refund)
credits.app.command("statement")(past.statement)
credits.app.command("import")(opening.import_balances)
users.app.command("move-in")(moving.move_in)
users.app.command("arrivals")(moving.arrivals)
orgs.app.command("pools")(transfers.switch_pools)
for noun, commands in NOUNS.items():
    app.add_typer(commands, name=noun)
app.command("demo")(demo.demo)
app.command("serve")(serve.serve)
app.command("why")(questions.why)
app.command("explain")(questions.explain)
app.command("verify")(questions.verify)
app.command("repair")(questions.repair)
app.command("simulate")(simulate.simulate)
app.command("whatif")(whatif.whatif)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _everywhere(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    settings = Settings.from_environment()
    configure_logs(settings.log_format, settings.log_level)


def main(arguments: list[str] | None = None) -> None:
    """Run a command and end the process with its exit code; faults are explained on stderr."""
    sys.exit(run(arguments))


@cache
def _command() -> Any:
    """All commands. To build them takes longer than most of them take, so it is done once."""
    return typer.main.get_command(app)


def run(arguments: list[str] | None = None) -> int:
    """Run a command; its exit code."""
    try:
        result = _command()(arguments, standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        typer.echo("Interrupted.", err=True)
        return Exit.INTERRUPTED
    except Exception as error:
        explain(error)
        return exit_code_of(error)
    return result if isinstance(result, int) else Exit.DONE
