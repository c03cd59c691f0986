"""A story told once, and then many times over: every table gets thousands of rows like those that one tenant has.

A copy of a row gets new ids, the same in every table, so that copies of a person keep their keys, chains, charges and
limits. What an organization has few of (pools, teams, campaigns, webhooks) keeps its id.
"""

from typing import Any, Final
from uuid import UUID

import psycopg
from psycopg import sql

KEPT: Final = frozenset(
    {
        "organization_id",
        "pool_id",
        "open_part_id",
        "team_id",
        "department_id",
        "campaign_id",
        "endpoint_id",
        "home_organization_id",
        "into_organization_id",
        "default_organization_id",
        "chosen_organization_id",
        "price_version_id",
        "provider_key_id",
    }
)
"""Ids that copies share with the row that they are copies of."""

SHIFTED: Final = {"start_micros", "end_micros"}
"""Numbers that must differ, together."""

SPREAD: Final = {"used_at", "booked_at", "happened_at", "posted_at", "at", "answered_at"}
"""Instants that go back by 20 minutes a copy, over most of a year."""

NAMES: Final = {"email", "name", "public_id", "idempotency_key", "custom_id", "provider_batch_id"}
"""Texts that copies must not share. Where another unique text is the same, a copy is left out."""

FEW: Final = frozenset(
    {
        "alerts.looks",
        "credits.code_campaigns",
        "credits.gates",
        "credits.pools",
        "credits.top_up_policies",
        "credits.top_ups",
        "gateway.model_aliases",
        "gateway.provider_keys",
        "identity.departments",
        "identity.organizations",
        "identity.teams",
        "outbox.endpoints",
        "pricing.overrides",
    }
)
"""Tables in which one organization has a row or a few."""


def tenant_tables(conn: psycopg.Connection[Any]) -> list[str]:
    """Every table with organization_id but partitions, as schema.name."""
    rows = conn.execute("""
        select c.oid::regclass::text from pg_class c
        join pg_attribute a on a.attrelid = c.oid and a.attname = 'organization_id'
        join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'p') and not c.relispartition and n.nspname not in ('route', 'pg_catalog')
        order by 1""")
    return [name for (name,) in rows]


def fabricate(conn: psycopg.Connection[Any], organization_id: UUID, table: str) -> None:
    """A row in a table of which the story has none, with values of the right kinds. The table's checks go."""
    checks = conn.execute(
        "select conname from pg_constraint where conrelid = %s::regclass and contype = 'c'", [table]
    ).fetchall()
    for (name,) in checks:
        conn.execute(sql.SQL("alter table {} drop constraint {}").format(sql.SQL(table), sql.Identifier(name)))  # type: ignore[arg-type]
    columns = conn.execute(
        """
        select attname, format_type(atttypid, null) from pg_attribute
        where attrelid = %s::regclass and attnum > 0 and not attisdropped and attgenerated = '' and not atthasdef""",
        [table],
    ).fetchall()
    values = [
        sql.Literal(organization_id) if name == "organization_id" else _fabricated(kind) for name, kind in columns
    ]
    conn.execute(
        sql.SQL("insert into {} ({}) values ({})").format(
            sql.SQL(table),  # type: ignore[arg-type]
            sql.SQL(", ").join(sql.Identifier(name) for name, _ in columns),
            sql.SQL(", ").join(values),
        )
    )


def _fabricated(kind: str) -> sql.Composable:
    if kind.endswith("[]"):
        return sql.SQL("'{}'")
    plain = {
        "uuid": "gen_random_uuid()", "text": "'x'", "boolean": "true", "jsonb": "'{}'", "bytea": "sha256('x')",
        "timestamp with time zone": "clock_timestamp()", "interval": "'1 month'", "date": "current_date",
    }  # fmt: skip
    return sql.SQL(plain.get(kind, "1"))  # type: ignore[arg-type]


def multiply(conn: psycopg.Connection[Any], organization_id: UUID, table: str, copies: int) -> int:
    """Add copies of an organization's rows in a table; returns how many were added. conn: an admin's."""
    columns = conn.execute(
        """
        select a.attname, format_type(a.atttypid, null), coalesce(u.is_unique, false)
        from pg_attribute a
        left join lateral (
            select true as is_unique from pg_index i
            where i.indrelid = a.attrelid and i.indisunique and a.attnum = any (i.indkey) limit 1
        ) u on true
        where a.attrelid = %s::regclass and a.attnum > 0 and not a.attisdropped and a.attgenerated = ''
        order by a.attnum""",
        [table],
    ).fetchall()
    names = sql.SQL(", ").join(sql.Identifier(name) for name, _, _ in columns)
    values = sql.SQL(", ").join(_copied(*column) for column in columns)
    statement = sql.SQL("""
        insert into {table} ({names}) select {values}
        from (select * from {table} where organization_id = {org} limit 20) b, generate_series(1, {copies}) g
        on conflict do nothing""").format(
        table=sql.SQL(table),  # type: ignore[arg-type]
        names=names,
        values=values,
        org=sql.Literal(organization_id),
        copies=sql.Literal(copies),
    )
    return conn.execute(statement).rowcount


def _copied(name: str, kind: str, is_unique: bool) -> sql.Composable:
    column = sql.Identifier("b", name)
    if name in KEPT:
        return column
    if name in SHIFTED:
        return sql.SQL("{} + g * 1000000000000::bigint").format(column)
    if kind == "uuid":
        zero = sql.SQL("'00000000-0000-0000-0000-000000000000'")
        return sql.SQL("case when {0} = {1} then {0} else md5({0}::text || g)::uuid end").format(column, zero)
    if name in SPREAD:
        return sql.SQL("{} - g * interval '20 minutes'").format(column)
    if not is_unique:
        return column
    if name in NAMES:
        return sql.SQL("g || '-' || {}").format(column)
    match kind:
        case "bytea":
            return sql.SQL("sha256({} || g::text::bytea)").format(column)
        case "bigint" | "integer" | "smallint":
            return sql.SQL("{} + g").format(column)
    return column
