"""Hands in the database: a superuser's, past every trigger, each of which the seals must show."""

import asyncio
from typing import Any
from uuid import UUID

import psycopg
from tests.credits.scenes import Scene

from bursar import db
from bursar.audit import seals

# By what is done: SQL for one organization (%(org)s) that has at least twelve sealed charges; `other` is another one.
TAMPERINGS = {
    "text changed": "update ledger.attribution set model = 'another' where {one}",
    "time changed": "update ledger.attribution set used_at = used_at - interval '1 second' where {one}",
    "actor changed": "update ledger.attribution set user_id = gen_random_uuid() where {one}",
    "row removed": "delete from ledger.attribution where {one}",
    "rows swapped": """
        update ledger.attribution a set user_id = b.user_id, charged_micros = b.charged_micros, used_at = b.used_at
        from ledger.attribution b where a.organization_id = b.organization_id and a.organization_id = %(org)s
        and (a.request_id = {first} and b.request_id = {second}
             or a.request_id = {second} and b.request_id = {first})""",
    "row moved to another organization": "update ledger.attribution set organization_id = %(other)s where {one}",
    "row inserted": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, charged_micros, hold_micros,
            provider_cost_nano_usd, write_number)
        select organization_id, gen_random_uuid(), booked_at, used_at, 0, 0, 0, write_number
        from ledger.attribution where {one}""",
}
OLDEST = "audit.as_write_number(pg_snapshot_xmin(pg_current_snapshot()))"
ONE = """
    organization_id = %(org)s and request_id = (
        select request_id from ledger.attribution where organization_id = %(org)s order by booked_at, request_id
        offset %(at)s limit 1)"""


class Tamperer:
    """A superuser for whom no trigger and no foreign key counts."""

    def __init__(self, conn: psycopg.Connection[Any]) -> None:
        self.conn = conn

    def do(self, sql: str, **params: Any) -> int:
        """Rows that it touched."""
        with self.conn.transaction():
            self.conn.execute("set local session_replication_role = replica")
            return self.conn.execute(sql.replace("{one}", ONE), params).rowcount


def write_number(conn: psycopg.Connection[Any]) -> int:
    """A number above that of every row there is."""
    row = conn.execute("select audit.write_number()").fetchone()
    assert row is not None
    return int(row[0])


async def seal_everything(database: db.Database) -> seals.Sealed:
    """In one round, all that is committed by now; the transactions of other tests would keep it back."""
    with psycopg.connect(database.dsn("admin"), autocommit=True) as conn:
        number = write_number(conn)
        while conn.execute(f"select {OLDEST} <= %s", [number]).fetchone() == (True,):
            await asyncio.sleep(0.02)
    async with database.platform() as conn:
        return await seals.seal(conn)


def used_scene(conn: psycopg.Connection[Any], charges: int = 12) -> Scene:
    """An organization with a grant, an audit event and charges."""
    scene = Scene(conn)
    user = scene.user()
    scene.grant(scene.pool(), 10**6)
    add_event(conn, scene.organization)
    for amount in range(1, charges + 1):
        scene.deduct(amount, user)
        scene.later(minutes=1)
    return scene


def add_event(conn: psycopg.Connection[Any], organization: UUID) -> None:
    """One event of the audit."""
    conn.execute(
        "insert into audit.events (organization_id, event_id, actor_kind, action, object_kind, object_id, reason) "
        "values (%s, gen_random_uuid(), 'operator', 'cap.changed', 'cap', gen_random_uuid(), 'because')",
        [organization],
    )
