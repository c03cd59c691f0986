"""`bursar alerts`: what is told when credits run low, to whom, and what was."""

from datetime import timedelta
from typing import Annotated, Any, TypeAlias
from uuid import UUID

import typer

from bursar import db
from bursar.alerts.rules import (
    COLLECT_MINUTES,
    LONGEST_COLLECT_MINUTES,
    Alert,
    Foreseen,
    InvalidRule,
    Measure,
    Rule,
    Watches,
    end_rules,
    list_alerts,
    list_rules,
    preview,
    set_rule,
)
from bursar.audit.events import OPERATOR
from bursar.cli.credits import credits_of
from bursar.cli.output import Column, DryRunOption, JsonOption, print_rows
from bursar.cli.scope import OrgOption, as_id, within
from bursar.clock import now
from bursar.identity.organizations import Organization
from bursar.money import Micros, format_credits
from bursar.outbox.letters import Person, people_in, with_names
from bursar.outbox.mails import people_of

app = typer.Typer(help="Alerts: rules, set, list, preview.", no_args_is_help=True)

WatchesArgument = Annotated[Watches, typer.Argument(help="What: pool, allocation (shares) or limit (caps).")]
AtOption = Annotated[list[int] | None, typer.Option("--at", help="Percent used; may be given again.", min=1, max=100)]
LeftOption = Annotated[
    list[str] | None,
    typer.Option("--left", help="What is left: 500cr, or a count for caps on calls or tokens; may be given again."),
]
OfOption = Annotated[str | None, typer.Option("--of", help="One pool, share or cap by its id; all otherwise.")]
DEFAULT_PERCENTS = (50, 80, 90, 100)
People: TypeAlias = dict[UUID, Person]


def _levels(rule: dict[str, Any]) -> str:
    if not rule["thresholds"]:
        return "nothing"
    if rule["measure"] == "percent":
        return ", ".join(f"{each} %" for each in rule["thresholds"])
    return ", ".join(f"{format_credits(Micros(each))} left" for each in reversed(rule["thresholds"]))


RULE_COLUMNS = [
    Column("watches", "Of"),
    Column("object_id", "One", show=lambda value: "all" if value is None else str(value)),
    Column("levels", "Told at"),
    Column("whom", "Mailed to"),
    Column("collect_minutes", "Collects", right=True, show=lambda minutes: f"{minutes} min"),
    Column("is_default", "Set", show=lambda is_default: "default" if is_default else "here"),
]
ALERT_COLUMNS = [
    Column("happened_at", "When (UTC)", show=lambda at: f"{at:%Y-%m-%d %H:%M}"),
    Column("kind", "Event"),
    Column("title", "What"),
]
FORESEEN_COLUMNS = [
    Column("level", "Level"),
    Column("times", "Times", right=True),
    Column("balances", "Of how many", right=True),
]


@app.command()
def rules(org: OrgOption, as_json: JsonOption = False) -> None:
    """Show what is told, the defaults included.

    Examples: `bursar alerts rules --org acme`, `bursar alerts rules --org acme --json`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> list[Rule]:
        return await list_rules(conn, organization_id=organization.organization_id)

    _print_rules(within(org, run), as_json)


@app.command("set")
def set_(
    watches: WatchesArgument,
    org: OrgOption,
    at: AtOption = None,
    left: LeftOption = None,
    of: OfOption = None,
    to: Annotated[
        list[str] | None, typer.Option("--to", help="concerned, lead, admins or finance; may be given again.")
    ] = None,
    mail: Annotated[list[str] | None, typer.Option("--mail", help="A further address; may be given again.")] = None,
    collect: Annotated[
        int, typer.Option(help="Minutes for which an e-mail collects; 0: at once.", min=0, max=LONGEST_COLLECT_MINUTES)
    ] = COLLECT_MINUTES,
    off: Annotated[bool, typer.Option("--off", help="Tell nothing of these.")] = False,
    default: Annotated[bool, typer.Option("--default", help="Take back what was set.")] = False,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Set at which levels is told, by percent used or by what is left, and to whom.

    Examples: `bursar alerts set pool --org acme --at 80 --at 95 --to admins --to finance`,
    `bursar alerts set limit --org acme --off`, `bursar alerts set limit --org acme --default`
    """
    if sum([bool(at or left), off, default]) != 1:
        raise InvalidRule("Say one of: levels (--at or --left), --off, --default.")
    measure, thresholds = _thresholds(watches, at, left)

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> list[Rule]:
        place: dict[str, Any] = {"organization_id": organization.organization_id, "object_id": _object(of)}
        if off or default:
            await end_rules(conn, watches=watches, by=OPERATOR, **place)
        if not default:
            await set_rule(
                conn,
                watches=watches,
                measure=measure,
                thresholds=thresholds,
                readers=to if to is not None else ([] if mail else ["concerned"]),
                addresses=mail or [],
                collect_minutes=collect,
                by=OPERATOR,
                **place,
            )
        return await list_rules(conn, organization_id=organization.organization_id)

    _print_rules(within(org, run, dry_run=dry_run), as_json, dry_run=dry_run)


@app.command("list")
def list_(
    org: OrgOption,
    most: Annotated[int, typer.Option(help="How many.", min=1, max=1000)] = 50,
    as_json: JsonOption = False,
) -> None:
    """List what was told, newest first.

    Examples: `bursar alerts list --org acme`, `bursar alerts list --org acme --most 200 --json`
    """

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> tuple[list[Alert], People]:
        place = {"organization_id": organization.organization_id}
        found = await list_alerts(conn, most=most, **place)
        return found, await people_of(conn, user_ids=people_in(each.title for each in found), **place)

    found, people = within(org, run)
    rows = [
        {
            "event_id": f"evt_{each.event_id.hex}",
            "happened_at": each.happened_at,
            "kind": each.kind,
            "title": with_names(each.title, people),
            "object": {"kind": each.object_kind, "id": each.object_id, "sequence": each.sequence},
            "payload": each.payload,
        }
        for each in found
    ]
    print_rows(rows, ALERT_COLUMNS, as_json=as_json, empty="Nothing was told yet.")


@app.command("preview")
def preview_(
    watches: WatchesArgument,
    org: OrgOption,
    at: AtOption = None,
    left: LeftOption = None,
    of: OfOption = None,
    days: Annotated[int, typer.Option(help="How many days back.", min=1, max=3660)] = 60,
    as_json: JsonOption = False,
) -> None:
    """Say how often levels would have been told in the last days.

    Examples: `bursar alerts preview limit --org acme`, `bursar alerts preview limit --org acme --at 75 --days 30`
    """
    measure, thresholds = _thresholds(watches, at or (None if left else list(DEFAULT_PERCENTS)), left)

    async def run(conn: db.Connection, _: db.Database, organization: Organization) -> list[Foreseen]:
        return await preview(
            conn,
            organization_id=organization.organization_id,
            watches=watches,
            measure=measure,
            thresholds=thresholds,
            since=now() - timedelta(days=days),
            object_id=_object(of),
        )

    rows = [
        {
            "level": _levels({"measure": measure, "thresholds": [each.threshold]}),
            "threshold": each.threshold,
            "times": each.times,
            "balances": each.balances,
        }
        for each in within(org, run)
    ]
    print_rows(rows, FORESEEN_COLUMNS, as_json=as_json)


def _thresholds(watches: Watches, at: list[int] | None, left: list[str] | None) -> tuple[Measure, list[int]]:
    """Raises InvalidRule for both."""
    if at and left:
        raise InvalidRule("A rule goes by --at or by --left. Set two rules for both.")
    if not left:
        return "percent", at or []
    counts = watches is Watches.LIMIT and all(each.isdigit() for each in left)
    return "left", [int(each) if counts else credits_of(each) for each in left]


def _object(reference: str | None) -> Any:
    """Raises InvalidRule."""
    if reference is None:
        return None
    for prefix in ("pool_", "lim_", "alloc_", "bal_"):
        found = as_id(reference, prefix)
        if found is not None:
            return found
    raise InvalidRule(f"“{reference[:50]}” is no id. Those there are: bursar credits show --json, bursar caps list")


def _print_rules(found: list[Rule], as_json: bool, *, dry_run: bool = False) -> None:
    rows = [
        {
            "rule_id": f"rul_{each.rule_id.hex}",
            "watches": each.watches,
            "object_id": each.object_id,
            "measure": each.measure,
            "thresholds": each.thresholds,
            "readers": each.readers,
            "addresses": each.addresses,
            "collect_minutes": each.collect_minutes,
            "is_default": each.is_default,
        }
        for each in found
    ]
    if not as_json:
        rows = [{**row, "levels": _levels(row), "whom": _whom(row)} for row in rows]
    print_rows(rows, RULE_COLUMNS, as_json=as_json, dry_run=dry_run)


def _whom(row: dict[str, Any]) -> str:
    return ", ".join([*row["readers"], *row["addresses"]])
