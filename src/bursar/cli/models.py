"""`bursar models`: which models an organization may use, and its own names for them."""

from typing import Annotated, Any
from uuid import UUID

import typer

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.cli.output import Column, JsonOption, print_fields, print_rows
from bursar.cli.scope import OrgOption, as_id, key_of, team_of, within
from bursar.gateway import allowances
from bursar.gateway.allowances import Effect, ModelRule, ModelRuleNotFound, Scope
from bursar.identity.organizations import Organization

app = typer.Typer(help="Models: allow, deny, and an organization's own names for them.", no_args_is_help=True)

PatternArgument = Annotated[
    str, typer.Argument(help="A model's name or provider/model, with % for anything: gpt-4o%, openai/%.")
]
TeamOption = Annotated[str | None, typer.Option(help="Only calls of this team.")]
KeyOption = Annotated[str | None, typer.Option(help="Only calls with this key, and those that replace it.")]


@app.command()
def allow(
    pattern: PatternArgument,
    org: OrgOption,
    team: TeamOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Allow models, and with the first such rule nothing else; running servers follow within five seconds.

    Examples: `bursar models allow gpt-4o% --org acme`, `bursar models allow anthropic/% --org acme --team Data`
    """
    _add("allow", pattern, org, team, key, as_json)


@app.command()
def deny(
    pattern: PatternArgument,
    org: OrgOption,
    team: TeamOption = None,
    key: KeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Deny models, whatever else is allowed; running servers follow within five seconds.

    Examples: `bursar models deny %-preview --org acme`, `bursar models deny openrouter/% --org acme --key ci`
    """
    _add("deny", pattern, org, team, key, as_json)


def _add(effect: Effect, pattern: str, org: str, team: str | None, key: str | None, as_json: bool) -> None:
    if team is not None and key is not None:
        raise typer.BadParameter("give one of --team, --key")

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        scope, scope_id = await _scope(conn, organization.organization_id, team, key)
        rule = await allowances.add_model_rule(
            conn,
            organization_id=organization.organization_id,
            effect=effect,
            pattern=pattern,
            scope=scope,
            scope_id=scope_id,
            by=OPERATOR,
        )
        return _shown(rule)

    print_fields(within(org, work), as_json=as_json)


async def _scope(
    conn: db.Connection, organization_id: UUID, team: str | None, key: str | None
) -> tuple[Scope, UUID | None]:
    if team is not None:
        return "team", (await team_of(conn, organization_id, team)).team_id
    if key is not None:
        return "key", (await key_of(conn, organization_id, key)).original_api_key_id
    return "organization", None


def _shown(rule: ModelRule) -> dict[str, Any]:
    document = rule.as_json()
    return {"rule": document.pop("id"), **document, "set_by": rule.set_by or "operator"}


@app.command("list")
def list_(org: OrgOption, as_json: JsonOption = False) -> None:
    """List what is allowed and denied.

    Examples: `bursar models list --org acme`, `bursar models list --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        rules = await allowances.list_model_rules(conn, organization_id=organization.organization_id)
        return [_shown(rule) for rule in rules]

    columns = [Column("rule", "Rule"), Column("scope", "Scope"), Column("scope_name", "Of"), Column("effect", "Does")]
    columns += [Column("pattern", "Models"), Column("set_by", "Set by")]
    print_rows(within(org, work), columns, as_json=as_json, empty="Every model is allowed.")


@app.command()
def forget(rule: Annotated[str, typer.Argument(help="The rule's id, as `list` shows it.")], org: OrgOption) -> None:
    """Take a rule away.

    Examples: `bursar models forget rule_… --org acme`, `bursar models forget 0193… --org acme`
    """
    rule_id = as_id(rule, "rule_")
    if rule_id is None:
        raise ModelRuleNotFound(f"“{rule}” is no id. Those there are: bursar models list")

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await allowances.remove_model_rule(
            conn, organization_id=organization.organization_id, rule_id=rule_id, by=OPERATOR
        )

    within(org, work)
    typer.echo("The rule is gone.")


@app.command()
def alias(
    name: Annotated[str, typer.Argument(help="The organization's own name.")],
    model: Annotated[str, typer.Argument(help="The model that it stands for, as everybody can ask for it.")],
    org: OrgOption,
    as_json: JsonOption = False,
) -> None:
    """Let a name of the organization's own stand for a model, or change what it stands for.

    Examples: `bursar models alias house gpt-4o-mini --org acme`, `bursar models alias best openai/gpt-5 --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> dict[str, Any]:
        made = await allowances.put_model_alias(
            conn, organization_id=organization.organization_id, alias=name, model=model, by=OPERATOR
        )
        return {"alias": made.alias, "model": made.model}

    print_fields(within(org, work), as_json=as_json)


@app.command()
def aliases(org: OrgOption, as_json: JsonOption = False) -> None:
    """List the organization's own names of models.

    Examples: `bursar models aliases --org acme`, `bursar models aliases --org acme --json`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> list[dict[str, Any]]:
        found = await allowances.list_model_aliases(conn, organization_id=organization.organization_id)
        return [{"alias": each.alias, "model": each.model, "created_at": each.created_at} for each in found]

    columns = [Column("alias", "Alias"), Column("model", "Stands for"), Column("created_at", "Since")]
    print_rows(within(org, work), columns, as_json=as_json, empty="No aliases.")


@app.command()
def unalias(name: Annotated[str, typer.Argument(help="The organization's own name.")], org: OrgOption) -> None:
    """Take an alias away.

    Examples: `bursar models unalias house --org acme`, `bursar models unalias best --org acme`
    """

    async def work(conn: db.Connection, database: db.Database, organization: Organization) -> None:
        await allowances.remove_model_alias(conn, organization_id=organization.organization_id, alias=name, by=OPERATOR)

    within(org, work)
    typer.echo(f"{name} stands for nothing any more.")
