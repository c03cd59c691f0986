"""No query of the product reads through a tenant's large table: tried on a database where one tenant is large.

Every statement of every queries.sql is run with values of that tenant, in a transaction that is rolled back, and the
rows that it made PostgreSQL read are counted, in tables and indexes, also inside of functions. It may read some for
each row that it answers, and a little beside; what reads more stands in READS_MORE with the reason.
"""

import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import psycopg
import pytest
from psycopg.types.json import Jsonb
from tests.credits.conftest import scratch_database
from tests.db import filling
from tests.db.telling import tell

import bursar
from bursar import db
from bursar.clock import uuid7
from bursar.settings import Settings

COPIES: Final = 1_500
A_LITTLE: Final = 1_200
FOR_EACH: Final = 12

MODULES: Final = {
    "audit": ("bursar.audit", "queries.sql"),
    "credits": ("bursar.credits", "queries.sql"),
    "gateway": ("bursar.gateway", "queries.sql"),
    "batches": ("bursar.gateway", "batches.sql"),
    "identity": ("bursar.identity", "queries.sql"),
    "outbox": ("bursar.outbox", "queries.sql"),
    "usage": ("bursar.usage", "queries.sql"),
    "alerts": ("bursar.alerts", "queries.sql"),
}
STATEMENTS: Final = {
    f"{name}.{query}": getattr(db.load_queries(*where), query)
    for name, where in MODULES.items()
    for query in db.load_queries(*where).names
}

NOT_RUN: Final = {
    "usage.snapshot": "sets the transaction",
    "audit.form_of": "writes what the tables look like",
    "audit.add_seal": "writes one row of the sealer's own",
}
"""Statements that are not measured, and why."""

READS_MORE: Final = {
    "usage.usage_parts": "sums the days that are asked for; daily sums come with analytics",
    "credits.open_holds": "a gauge over all open holds",
    "credits.with_holds_to_expire": "looks at all open holds, after a run that failed",
    "credits.campaigns": "sums every redemption of every campaign",
    "credits.end_allocation": "a pool's open part is what no share claims, so a changed share asks all of them",
    "usage.people_with_access": "counts members",
    "credits.burns_of_request": "pours what was used since the last time event over every active grant of its pool",
    "credits.revenue_of_request": "pours what was used since the last time event over every active grant of its pool",
    "credits.depart": "takes every grant of a home along",
    "credits.switch_pools": "moves every grant of an organization",
    "credits.decide_top_up": "writes to every administrator, of whom there are copies here",
    "credits.raises": "lists every raise; the copies here have no limit to be listed with",
    "alerts.crossed_by_use": "looks at every balance that was used, by design, away from the path of requests",
    "alerts.crossed_of_organizations": "looks at every balance of some organizations, by design, now and then",
    "alerts.expiring": "looks at every active grant, once an hour",
    "alerts.expired": "looks at the ends of grants of a day",
    "credits.forecast_pool_use": "reads the use that it forecasts from",
    "outbox.waiting": "a gauge over what waits",
    "outbox.organizations_to_purge": "looks at old events until one may end, once an hour",
    "outbox.purge": "looks at every old event, once an hour",
    "outbox.note_working": "all that waits for a webhook that works again",
    "audit.first_use_of_forms": "reads every seal, for a verification of all of them",
}
"""Statements that read more than a little for each row of their answer, and why."""

NO_TENANTS: Final = {
    "pricing/queries.sql": "the price book is one for all; an organization's own prices are few",
    "db/queries.sql": "records of the migration runner",
    "demo/queries.sql": "fills an empty database",
    "simulation/queries.sql": "works in an organization of its own that is rolled back",
    "credits/verify.sql": "recomputes everything, by design",
    "credits/repair.sql": "recomputes everything, by design",
    "credits/as_of.sql": "adds up all that was booked until an instant, by design",
}
"""Files of statements that are not tried, and why."""

AS_PLATFORM: Final = frozenset({"audit"})


OTHERS: Final[dict[str, Any]] = {
    **dict.fromkeys(("seconds", "lease_seconds", "overlap_seconds", "wait_seconds", "look_after_seconds"), 60),
    **dict.fromkeys(("days", "months", "retries", "attempts", "until_number", "seal_number"), 1),
    **dict.fromkeys(
        (
            "with_archived",
            "with_unsettled",
            "succeeded",
            "sees_all",
            "oversubscribe",
            "only_failed",
            "is_over",
            "is_last",
        ),
        False,
    ),
    **dict.fromkeys(("window", "older_than", "valid_for"), timedelta(hours=1)),
    **dict.fromkeys(("made_at", "overlap_until", "sealed_at"), datetime.now(UTC)),
    **dict.fromkeys(("url", "upstream_model", "answer", "table_name"), "x"),
    **dict.fromkeys(("feature", "model_filter", "alias", "reference", "effect", "form", "stopped_at"), "x"),
    **dict.fromkeys(("is_own", "enabled"), True),
    **dict.fromkeys(("told", "headers", "old_value", "holds"), Jsonb({})),
    **dict.fromkeys(("position", "paid_nano_usd", "anchor_number", "key"), 1),
    "seal_numbers": [1],
    **dict.fromkeys(("terms", "anchor", "differences"), Jsonb({})),
    **dict.fromkeys(("within_scope", "pattern", "base_url", "note"), "x"),
    **dict.fromkeys(("until_at", "now", "anchored_at"), datetime.now(UTC)),
    **dict.fromkeys(("told_level", "pause_seconds", "collect_minutes", "batch_price_ppm"), 1),
    **dict.fromkeys(("watches", "findings"), Jsonb([])),
    **dict.fromkeys(("measure", "addresses", "auth", "readers", "litellm_provider"), "x"),
    **dict.fromkeys(("level", "told_limit", "horizon", "asks_for_usage", "organizations", "every"), 1),
    **dict.fromkeys(("credits_days", "most_per_domain", "most_per_organization", "most_per_day", "most_in_all"), 1),
    "started_at": datetime.now(UTC),
    "is_approved": True,
    "is_lasting": True,
    "parts": Jsonb([]),
    **dict.fromkeys(("into_kind", "to", "query"), "personal"),
    **dict.fromkeys(("lasts", "anchor_at", "ends_at", "min_rollover_micros", "max_rollover_micros"), None),
    "thresholds": [80],
    "roles_with_access": ["member"],
    "codes": Jsonb({}),
    "campaign": Jsonb({}),
}


@dataclass(frozen=True)
class Large:
    """A database in which one organization is large, and values of that organization by parameter name."""

    database: db.Database
    organization_id: UUID
    values: dict[str, Any]


@pytest.fixture(scope="session")
async def large(database: db.Database, admin_dsn: str, settings: Settings) -> AsyncIterator[Large]:
    async with scratch_database(admin_dsn, settings, "reads") as opened:
        org = await tell(opened, "large")
        await tell(opened, "small")
        with psycopg.connect(opened.dsn("admin"), autocommit=True) as conn:
            values = _values(conn, org.organization_id)
            conn.execute("set session_replication_role = replica")  # copies of charges are not charged
            tables = set(filling.tenant_tables(conn)) - filling.FEW
            small = {table for table in tables if _fill(conn, org.organization_id, table) < COPIES // 2}
            assert not small, f"add to filling.FEW, or let them be copied: {sorted(small)}"
            conn.execute("vacuum analyze")
        yield Large(opened, org.organization_id, values)


def _fill(conn: psycopg.Connection[Any], organization_id: UUID, table: str) -> int:
    """How many rows the organization has in a table when it was filled."""
    count = f"select count(*) from {table} where organization_id = %s"
    if conn.execute(count, [organization_id]).fetchone() == (0,):
        filling.fabricate(conn, organization_id, table)
    filling.multiply(conn, organization_id, table, COPIES)
    return (conn.execute(count, [organization_id]).fetchone() or [0])[0]


def _values(conn: psycopg.Connection[Any], organization_id: UUID) -> dict[str, Any]:
    """For each column name a value of this organization, as text: PostgreSQL knows which type it needs."""
    values: dict[str, Any] = {}
    for table in filling.tenant_tables(conn):
        rows = conn.execute(
            f"select f.key, f.value from (select * from {table} where organization_id = %s limit 1) t, "
            "json_each_text(to_json(t)) f where f.value is not null",
            [organization_id],
        )
        for name, value in rows:
            values.setdefault(name, value)
    now = datetime.now(UTC)
    return values | {
        "limit": 50, "most": 50, "most_each": 50, "after": None, "before": None, "at": None, "start": 0, "end": 10**9,
        "since": now - timedelta(days=30), "starts_at": now - timedelta(days=30), "ends_at": now,
        "edges": [now - timedelta(days=30), now], "periods": [0, 1, 0],
    }  # fmt: skip


def test_every_file_of_statements_is_tried_or_left_out_with_a_reason() -> None:
    package = Path(bursar.__file__).parent
    files = {str(path.relative_to(package)) for path in package.glob("*/*.sql") if "-- name:" in path.read_text()}
    tried = {f"{where.removeprefix('bursar.')}/{file}" for where, file in MODULES.values()}
    assert files == tried | set(NO_TENANTS)


COUNTED: Final = """
    select coalesce(sum(greatest(r.returned, r.fetched)), 0)::bigint,
        (array_agg(r.relname || ' ' || r.returned order by r.returned desc))[1:3]::text
    from (
        select c.relname, pg_stat_get_xact_tuples_returned(c.oid) as returned,
            pg_stat_get_xact_tuples_fetched(c.oid) as fetched
        from pg_class c join pg_namespace n on n.oid = c.relnamespace
        where c.relkind in ('r', 'i') and n.nspname !~ '^(pg_|information)'
    ) r
"""


def _reads(large: Large, statement: str, role: str) -> tuple[int, int, str]:
    """(rows read, rows answered, where most were read) by a statement; (0, 0, why) where it cannot be run."""
    names = set(re.findall(r"%\((\w+)\)s", statement))
    with psycopg.connect(large.database.dsn(role)) as conn:
        conn.execute("select set_config('app.organization_id', %s, true)", [str(large.organization_id)])
        before = conn.execute(COUNTED).fetchone()
        answered, why = 0, ""
        try:
            with conn.transaction():
                cursor = conn.execute(statement, {name: _value(large, name) for name in names})
                answered = max(cursor.rowcount, 0)
                raise psycopg.Rollback
        except psycopg.Error as error:
            why = f"{error}".splitlines()[0]
        after = conn.execute(COUNTED).fetchone()
        conn.rollback()
    assert before is not None
    assert after is not None
    return after[0] - before[0], answered, why or after[1]


def _value(large: Large, name: str) -> Any:
    """What a parameter is given: what the tenant has under that name, else something of its kind that nobody has."""
    singular = name.removesuffix("s")
    if name in large.values:
        return large.values[name]
    if name.endswith("s") and singular in large.values:
        return [large.values[singular]]
    if name.endswith(("_id", "_by")):
        return uuid7()
    if name.endswith(("_hash", "nonce", "ciphertext")):
        return bytes(32)
    if name.endswith(("_hashes", "subjects")):
        return [bytes(32)]
    if name in OTHERS:
        return OTHERS[name]
    raise AssertionError(f"say in OTHERS what %({name})s is")


@pytest.mark.parametrize("name", sorted(set(STATEMENTS) - set(NOT_RUN)))
def test_a_statement_reads_little_beside_what_it_answers(large: Large, name: str) -> None:
    role = "bursar_platform" if name.split(".")[0] in AS_PLATFORM else "bursar_app"
    read, answered, where = _reads(large, STATEMENTS[name], role)
    print(f"READS {name}: {read} {answered} {where}")
    if name not in READS_MORE:
        assert read <= A_LITTLE + FOR_EACH * answered, f"{read:,} rows read, {answered} answered; {where}"
