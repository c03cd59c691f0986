"""Do the books agree? Every balance recomputed from ledger, attribution and holds, by one query per invariant."""

import re
from dataclasses import dataclass
from importlib.resources import files
from typing import Final
from uuid import UUID

from bursar import db
from bursar.db.queries import parse_queries

CHECKS: Final = parse_queries(files("bursar.credits").joinpath("verify.sql").read_text(encoding="utf-8"))
"""SQL by the invariant's name; each row is one offence."""

INVARIANTS: Final = {
    name: " ".join(re.findall(r"^-- (.*)$", sql.split("\nselect", 1)[0].split("\nwith", 1)[0], re.MULTILINE))
    for name, sql in CHECKS.items()
}
"""What each invariant says, in words, by its name."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One offence. subject: which balance, pool, grant or request; expected and found: as the invariant has them."""

    invariant: str
    organization_id: UUID
    subject: str
    expected: str
    found: str


async def verify(conn: db.Connection, *, organization_id: UUID | None = None) -> list[Finding]:
    """Recompute every balance of all organizations, or of one. No finding: the books agree.

    conn: a transaction as bursar_platform that has read nothing yet; all invariants see the same instant.
    """
    await conn.execute("set transaction isolation level repeatable read, read only")
    findings: list[Finding] = []
    for name, check in CHECKS.items():
        findings += await _offences(conn, name, check, organization_id)
    return findings


async def _offences(conn: db.Connection, name: str, check: str, organization_id: UUID | None) -> list[Finding]:
    sql = f"select '{name}' as invariant, organization_id, subject, expected, found from ({check}) offences"
    if organization_id is None:
        return await db.fetch_all(conn, Finding, sql)
    return await db.fetch_all(
        conn, Finding, f"{sql} where organization_id = %(organization_id)s", organization_id=organization_id
    )
