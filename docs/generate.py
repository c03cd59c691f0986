"""Writes the reference pages in docs/reference from the program itself: `make reference`.

Settings, problems, permissions, commands, routes and metrics are read from the code; tables and functions, with their
comments, from a database that was just migrated. A test compares each page with what is written here.
"""

import argparse
import asyncio
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Final, get_args

import prometheus_client
import typer.main
from fastapi import FastAPI

import bursar.server  # noqa: F401 - declares the worker's metrics
from bursar import app, cli, db, problems
from bursar.cli.exits import Exit
from bursar.credits import verify, why
from bursar.db.embedded import EmbeddedServer
from bursar.identity.roles import PERMISSIONS, SCOPES, SERVICE_KEY, Permission, Role, Scope
from bursar.settings import Settings

FOLDER: Final = Path(__file__).with_name("reference")
NOTE: Final = "<!-- Written by `make reference`; a test fails when it is stale. -->"
GROUPS: Final = ("bursar_app", "bursar_platform", "bursar_money", "bursar_lane", "bursar_simulator", "bursar_backup")


def main() -> None:
    """Write every page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    FOLDER.mkdir(exist_ok=True)
    for name, text in {**pages(), "schema.md": _schema_of_new_database()}.items():
        (FOLDER / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """The pages that need no database, by file name."""
    return {
        "api.md": api_page(),
        "cli.md": cli_page(),
        "invariants.md": invariants_page(),
        "metrics.md": metrics_page(),
        "permissions.md": permissions_page(),
        "problems.md": problems_page(),
        "settings.md": settings_page(),
    }


def _schema_of_new_database() -> str:
    with tempfile.TemporaryDirectory(prefix="bursar-reference-") as folder:
        Path(folder).chmod(0o711)  # as root the server runs as another user
        try:
            return asyncio.run(_schema_in(Path(folder)))
        finally:
            EmbeddedServer(Path(folder)).remove()


async def _schema_in(folder: Path) -> str:
    async with db.opened(Settings(data_dir=folder), migrate=True) as database:
        return await schema_page(database)


# ---------------------------------------------------------------------------------------------- settings


def settings_page() -> str:
    """One row per field of Settings."""
    rows = [
        (_code(each.metadata["variable"]), _default(each.name, each.default), each.metadata["help"])
        for each in sorted(fields(Settings), key=lambda each: str(each.metadata["variable"]))
    ]
    return _page(
        "Settings",
        "Everything that is set from outside is read from the environment, once, at the start of a process. Options of "
        "`bursar serve` go before it.",
        _table(("Variable", "Default", "Meaning"), rows),
    )


def _default(name: str, value: object) -> str:
    if name == "data_dir":
        return "`$XDG_DATA_HOME/bursar`, else `~/.local/share/bursar`"
    return "" if value is None or value is MISSING else _code(value)


# ---------------------------------------------------------------------------------------------- problems


def problems_page() -> str:
    """Every refusal by its code, and what a `why` says next."""
    declared = [each for each in problems.declared() if each.__module__.startswith("bursar.")]
    rows = [
        (_code(each.code), str(each.status), each.title, _first_sentence(each.__doc__), _code(each.sqlstate or ""))
        for each in declared
    ]
    steps = [
        (_code(code), _code(why._PROBLEMS.get(code, why.NotAllowedHere).code), step)
        for code, step in sorted(why.NEXT_STEPS.items())
        if code != "model_not_priced"
    ]
    return _page(
        "Problems",
        "Every refusal has a code that does not change. The API answers with `application/problem+json` (RFC 9457); "
        "under `/v1` the same code stands in the vendor's error shape. `SQLSTATE` is what the database's functions "
        "raise.",
        _table(("Code", "Status", "Title", "When", "SQLSTATE"), rows),
        "## Refusals of money\n\nThey carry a `why` object. Its `code` is the exact reason:",
        _table(("`why.code`", "Problem", "`why.next_step`"), steps),
    )


# ---------------------------------------------------------------------------------------------- invariants


def invariants_page() -> str:
    """What `bursar verify` checks."""
    return _page(
        "Invariants",
        "`bursar verify` puts one query per line to the database and prints what it finds. See "
        "[how-money-moves.md](../how-money-moves.md#checking-the-books).",
        _table(("Name", "What holds"), [(_code(name), text) for name, text in verify.INVARIANTS.items()]),
    )


# ---------------------------------------------------------------------------------------------- permissions


def permissions_page() -> str:
    """Roles x permissions, and what the scopes of a key leave of them."""
    roles = _table(
        ("Permission", *(_code(role) for role in Role), "service key"),
        [
            (_code(each), *(_mark(each in PERMISSIONS[role]) for role in Role), _mark(each in SERVICE_KEY))
            for each in Permission
        ],
    )
    scopes = _table(
        ("Permission", *(_code(scope) for scope in Scope)),
        [(_code(each), *(_mark(each in SCOPES[scope]) for scope in Scope)) for each in Permission],
    )
    return _page(
        "Permissions",
        "A permission named `…:own` is about oneself, `…:team` about the teams one leads, any other about the whole "
        "organization. What no role lists is denied to all. Several roles add up. `margin:read` counts only in "
        "organizations that show margin to their own people, and for system administrators.",
        roles,
        "## Scopes of API keys\n\nA key may do what its owner may and its scopes include.",
        scopes,
    )


def _mark(allowed: bool) -> str:
    return "yes" if allowed else ""


# ---------------------------------------------------------------------------------------------- command line


def cli_page() -> str:
    """Every command with its arguments and options."""
    root = typer.main.get_command(cli.app)
    parts = [_command_part(command, path) for path, command in commands(root, ("bursar",))]
    return _page(
        "Command line",
        "`--help` on any command shows the same. `--json` prints one JSON document for scripts. Exit codes: "
        + ", ".join(f"{each.value} {each.name.lower().replace('_', ' ')}" for each in Exit)
        + ".",
        *parts,
    )


def commands(command: Any, path: tuple[str, ...]) -> Iterable[tuple[tuple[str, ...], Any]]:
    """Every command under one, with its path; groups are left out."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name in sorted(command.commands):
        yield from commands(command.commands[name], (*path, name))


def _command_part(command: Any, path: tuple[str, ...]) -> str:
    parameters = [each for each in command.params if not each.hidden]
    arguments = [str(each.name).upper() for each in parameters if each.param_type_name == "argument"]
    usage = " ".join([*path, *arguments, *(["[options]"] if len(parameters) > len(arguments) else [])])
    rows = [(_code(_names(each)), _parameter_help(each)) for each in parameters]
    table = _table(("Argument or option", "Meaning"), rows) if rows else ""
    parts = (f"## {' '.join(path)}", _code(usage), _help_text(command.help), table)
    return "\n\n".join(part for part in parts if part)


def _names(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return str(parameter.name).upper()
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _parameter_help(parameter: Any) -> str:
    """What a parameter is for, what it may be and what it is otherwise."""
    text = [str(parameter.help or "")]
    kind = parameter.type_descriptor.annotation
    kind = next(iter(get_args(kind)), kind)  # of list[Role] the Role
    if isinstance(kind, type) and issubclass(kind, Enum):
        text.append(f"One of {', '.join(_code(each.value) for each in kind)}.")
    default = getattr(parameter.default, "value", parameter.default)
    is_switch = getattr(parameter, "is_flag", False)
    if parameter.required and parameter.param_type_name == "option":
        text.append("Required.")
    elif default not in (None, "", ()) and (not is_switch or parameter.secondary_opts):
        shown = (parameter.opts if default else parameter.secondary_opts)[0] if is_switch else default
        text.append(f"Default: {_code(shown)}.")
    if parameter.envvar:
        text.append(f"Also from the variable {_code(parameter.envvar)}.")
    return " ".join(text).strip()


def _help_text(text: str | None) -> str:
    return "\n\n".join(" ".join(part.split()) for part in (text or "").split("\n\n"))


# ---------------------------------------------------------------------------------------------- routes and metrics


def api_page() -> str:
    """The routes of the API, from its OpenAPI document."""
    application = FastAPI()
    for router in app.ROUTERS:
        application.include_router(router)
    rows = []
    for path, operations in sorted(application.openapi()["paths"].items()):
        for method, operation in operations.items():
            refusals = [
                answer["description"].partition(": ")[2]
                for status, answer in operation["responses"].items()
                if status.isdigit() and int(status) >= 400 and ": " in answer["description"]
            ]
            about = " ".join(operation.get("description", "").split())
            codes = ", ".join(_code(code) for refusal in refusals for code in refusal.split(", "))
            rows.append((_code(f"{method.upper()} {path}"), about, codes))
    return _page(
        "API",
        "The whole document is served at `/api/openapi.json`. Paths under `/v1` are the gateway's: see "
        "[gateway.md](../gateway.md). Every route can also answer `not_signed_in`, `invalid_api_key`, "
        "`invalid_request` and `internal_error`; all codes are in [problems.md](problems.md).",
        _table(("Route", "What it does", "Refusals of its own"), rows),
    )


def metrics_page() -> str:
    """Our own metrics, from the registry that they are declared in."""
    rows = []
    for family in sorted(_collectors(), key=lambda each: str(each._name)):
        name = f"{family._name}_total" if family._type == "counter" else family._name
        rows.append((_code(name), family._type, ", ".join(map(_code, family._labelnames)), family._documentation))
    return _page(
        "Metrics",
        "Served at `/metrics` as Prometheus text. Durations are in seconds.",
        _table(("Metric", "Type", "Labels", "Meaning"), rows),
    )


def _collectors() -> set[Any]:
    collectors: Mapping[Any, Any] = prometheus_client.REGISTRY._collector_to_names
    return {each for each in collectors if getattr(each, "_name", "").startswith("bursar_")}


# ---------------------------------------------------------------------------------------------- schema


@dataclass(frozen=True, slots=True)
class _Table:
    schema: str
    name: str
    kind: str
    comment: str | None
    is_append_only: bool
    grants: list[str]


@dataclass(frozen=True, slots=True)
class _Column:
    schema: str
    table: str
    name: str
    type: str
    may_be_null: bool
    comment: str | None


@dataclass(frozen=True, slots=True)
class _Function:
    schema: str
    name: str
    arguments: str
    result: str | None
    comment: str | None
    is_definer: bool
    callers: list[str]


@dataclass(frozen=True, slots=True)
class _Schema:
    name: str
    comment: str | None


_OURS: Final = "n.nspname !~ '^pg_' and n.nspname not in ('information_schema', 'public')"
SCHEMAS: Final = f"""
    select n.nspname as name, obj_description(n.oid, 'pg_namespace') as comment
    from pg_namespace n where {_OURS} order by n.nspname
"""
# A partition is as its parent, and there are more of them every month.
TABLES: Final = f"""
    select n.nspname as schema, c.relname as name, case when c.relkind = 'v' then 'view' else 'table' end as kind,
        obj_description(c.oid, 'pg_class') as comment,
        exists (select from pg_trigger t where t.tgrelid = c.oid and t.tgname = 'append_only') as is_append_only,
        array(select g.role || ': ' || string_agg(g.privilege, ', ' order by g.privilege)
              from (select a.grantee::regrole::text collate "C" as role, lower(a.privilege_type) as privilege
                    from aclexplode(c.relacl) a
                    union all
                    select a.grantee::regrole::text,
                        lower(a.privilege_type) || ' of ' || string_agg(t.attname, ' and ' order by t.attnum)
                    from pg_attribute t, aclexplode(t.attacl) a
                    where t.attrelid = c.oid group by 1, a.privilege_type) g
              where g.role = any (%(groups)s) group by g.role order by g.role) as grants
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where {_OURS} and c.relkind in ('r', 'p', 'v') and not c.relispartition
    order by n.nspname, c.relname
"""
COLUMNS: Final = f"""
    select n.nspname as schema, c.relname as table, a.attname as name,
        replace(format_type(a.atttypid, a.atttypmod), 'timestamp with time zone', 'timestamptz') as type,
        not a.attnotnull and c.relkind <> 'v' as may_be_null, col_description(c.oid, a.attnum) as comment
    from pg_class c join pg_namespace n on n.oid = c.relnamespace
    join pg_attribute a on a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped
    where {_OURS} and c.relkind in ('r', 'p', 'v') and not c.relispartition
    order by n.nspname, c.relname, a.attnum
"""
FUNCTIONS: Final = f"""
    select n.nspname as schema, p.proname as name, pg_get_function_identity_arguments(p.oid) as arguments,
        pg_get_function_result(p.oid) as result, obj_description(p.oid, 'pg_proc') as comment,
        p.prosecdef as is_definer,
        array(select case a.grantee when 0 then 'everybody' else a.grantee::regrole::text end collate "C"
              from aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) a
              where (a.grantee = 0 or a.grantee::regrole::text = any (%(groups)s)) and a.grantee <> p.proowner
              order by 1) as callers
    from pg_proc p join pg_namespace n on n.oid = p.pronamespace
    where {_OURS} order by n.nspname, p.proname, 3
"""


async def schema_page(database: db.Database) -> str:
    """Schemas, tables, columns and functions with their database comments. database: migrated."""
    async with database.platform() as conn:
        schemas = await db.fetch_all(conn, _Schema, SCHEMAS)
        tables = await db.fetch_all(conn, _Table, TABLES, groups=list(GROUPS))
        columns = await db.fetch_all(conn, _Column, COLUMNS)
        functions = await db.fetch_all(conn, _Function, FUNCTIONS, groups=list(GROUPS))
    parts = []
    for schema in schemas:
        parts.append(f"## {schema.name}\n\n{schema.comment or ''}")
        for table in tables:
            if table.schema == schema.name:
                place = (table.schema, table.name)
                parts.append(_table_part(table, [each for each in columns if (each.schema, each.table) == place]))
        own = [each for each in functions if each.schema == schema.name]
        if own:
            parts.append(f"### Functions of {schema.name}\n\n" + _function_table(own))
    return _page(
        "Schema",
        "Every schema, table, column and function, with the comment that it has in the database. Partitions are as "
        "their table. Row-level security is forced on every table with `organization_id`: "
        "[tenancy.md](../tenancy.md) says who sees what. *Definer* functions run with their owner's rights.",
        *parts,
    )


def _table_part(table: _Table, columns: Sequence[_Column]) -> str:
    facts = [*(["Rows are never changed."] if table.is_append_only else []), "; ".join(table.grants)]
    rows = [
        (_code(each.name), each.type + (" or null" if each.may_be_null else ""), each.comment or "") for each in columns
    ]
    about = f"{table.comment or ''}.".replace("..", ".")
    kind = "" if table.kind == "table" else " (view)"
    return "\n\n".join(
        part
        for part in (
            f"### {table.schema}.{table.name}{kind}",
            about,
            " ".join(fact for fact in facts if fact),
            _table(("Column", "Type", "Meaning"), rows),
        )
        if part
    )


def _function_table(functions: Sequence[_Function]) -> str:
    rows = [
        (
            _code(f"{each.name}({', '.join(_argument_names(each.arguments)) if each.callers else '…'})"),
            each.comment or "",
            ("definer; " if each.is_definer else "") + (", ".join(each.callers) or "nobody but its owner"),
        )
        for each in functions
    ]
    return _table(("Function", "What it does", "Who may call it"), rows)


def _argument_names(arguments: str) -> list[str]:
    """Names of the input arguments: 'p_at timestamp with time zone, OUT n integer' -> ['p_at']."""
    found = [each.strip().removeprefix("IN ").removeprefix("VARIADIC ") for each in arguments.split(",")]
    return [each.split()[0] for each in found if each and not each.startswith(("OUT ", "TABLE"))]


# ---------------------------------------------------------------------------------------------- Markdown


def _page(title: str, *parts: str) -> str:
    return "\n\n".join((f"# {title}", NOTE, *parts)).rstrip() + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _code(text: object) -> str:
    return f"`{text}`" if str(text) else ""


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


if __name__ == "__main__":
    main()
