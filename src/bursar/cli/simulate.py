"""`bursar simulate`: a scenario through the real money functions, of which nothing stays."""

from pathlib import Path
from typing import Annotated

import typer

from bursar import db
from bursar.cli.output import print_json, with_database
from bursar.cli.prices import text_of
from bursar.simulation.playing import Played, play
from bursar.simulation.report import as_json
from bursar.simulation.scenario import read_scenario, schema


def simulate(
    file: Annotated[Path, typer.Argument(help="The scenario, JSON; - reads it from the standard input.")] = Path("-"),
    show_schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of a scenario.")] = False,
) -> None:
    """Play a scenario of grants, usage, holds and limits, and print what comes of it. No real figure changes.

    Examples: `bursar simulate scenario.json`, `bursar simulate - < scenario.json`, `bursar simulate --schema`
    """
    if show_schema:
        print_json(schema())
        return
    scenario = read_scenario(text_of(file))

    async def work(database: db.Database) -> Played:
        return await play(database, scenario)

    print_json(as_json(with_database(work)))
