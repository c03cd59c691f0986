"""Do the books agree? Every balance recomputed from ledger, attribution and holds, by one query per invariant; and is
every row still as it was sealed?
"""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from importlib.resources import files
from pathlib import Path
from typing import Final
from uuid import UUID

import psycopg

from bursar import db
from bursar.audit import anchors, tampering
from bursar.audit.findings import Finding as Finding
from bursar.db.queries import parse_queries

CHECKS: Final = parse_queries(files("bursar.credits").joinpath("verify.sql").read_text(encoding="utf-8"))
"""SQL by the invariant's name; each row is one offence."""

BOOKS: Final = {
    name: " ".join(re.findall(r"^-- (.*)$", sql.split("\nselect", 1)[0].split("\nwith", 1)[0], re.MULTILINE))
    for name, sql in CHECKS.items()
}
INVARIANTS: Final = {**BOOKS, **tampering.INVARIANTS, **anchors.INVARIANTS}
"""What each invariant says, in words, by its name."""

Step = Callable[[int], None]
"""Told how many more steps there are to do, or, as a negative number, how many were done."""


async def verify_all(
    database: db.Database,
    *,
    organization_id: UUID | None = None,
    anchor_file: Path | None = None,
    on_step: Step = lambda steps: None,
) -> list[Finding]:
    """Books, seals and anchors of all organizations or of one. No finding: all is as it was booked.

    Raises:
        AnchorsUnreadable: the file of anchors itself is not whole.
    """
    on_step(len(CHECKS) + (anchor_file is not None))
    async with database.platform() as conn:
        findings = await verify(conn, organization_id=organization_id, on_step=on_step)
        known = [organization_id] if organization_id else await tampering.organizations(conn)
    on_step(len(known))
    for each in known:
        findings += await tampering.check(database, organization_id=each)
        on_step(-1)
    if anchor_file is not None:
        async with database.platform() as conn:
            found = await anchors.check(conn, anchor_file)
        findings += [each for each in found if organization_id in (None, each.organization_id)]
        on_step(-1)
    return findings


async def verify_in_turn(database: db.Database, *, rest: float = 1.0) -> AsyncIterator[tuple[UUID, list[Finding]]]:
    """Each organization with its findings, one after the other, each query in a transaction of its own.

    rest: how long to do nothing after each, in multiples of the time that it took, so that customers notice nothing.
    """
    async with database.platform() as conn:
        known = set(await tampering.organizations(conn))
        known |= set(await db.fetch_values(conn, "select organization_id from credits.gates"))
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_platform"), autocommit=True) as conn:
        for organization_id in sorted(known):
            began = time.monotonic()
            findings: list[Finding] = []
            for name, check in CHECKS.items():
                findings += await _offences(conn, name, check, organization_id)
            findings += await tampering.check(database, organization_id=organization_id)
            yield organization_id, findings
            await asyncio.sleep(rest * (time.monotonic() - began))


async def verify(
    conn: db.Connection, *, organization_id: UUID | None = None, on_step: Step = lambda steps: None
) -> list[Finding]:
    """Recompute every balance of all organizations, or of one. No finding: the books agree.

    conn: a transaction as bursar_platform that has read nothing yet; all invariants see the same instant.
    """
    await conn.execute("set transaction isolation level repeatable read, read only")
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        findings += await _offences(conn, name, check, organization_id)
        on_step(-1)
    return findings


async def _offences(conn: db.Connection, name: str, check: str, organization_id: UUID | None) -> list[Finding]:
    sql = f"select '{name}' as invariant, organization_id, subject, expected, found from ({check}) offences"
    if organization_id is None:
        return await db.fetch_all(conn, Finding, sql)
    return await db.fetch_all(
        conn, Finding, f"{sql} where organization_id = %(organization_id)s", organization_id=organization_id
    )
