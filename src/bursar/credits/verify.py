"""Do the books agree? Every balance recomputed from ledger, attribution and holds: a query per invariant (verify.sql)."""

from dataclasses import dataclass
from typing import Final
from uuid import UUID

from bursar import db

INVARIANTS: Final = db.load_queries("bursar.credits", "verify.sql")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where an invariant does not hold; amounts in the unit of the balance."""

    organization_id: UUID
    subject: UUID
    expected: int
    found: int


@dataclass(frozen=True, slots=True)
class Finding:
    """A difference and the invariant that it breaks."""

    invariant: str
    organization_id: UUID
    subject: UUID
    expected: int
    found: int


async def verify(conn: db.Connection) -> list[Finding]:
    """Every difference in the books; empty when they agree.

    conn: as bursar_platform, at the start of its transaction: all is read from one snapshot, while requests go on.
    """
    await db.execute(conn, "set transaction isolation level repeatable read, read only")
    findings: list[Finding] = []
    for name in INVARIANTS.names:
        for found in await db.fetch_all(conn, Difference, getattr(INVARIANTS, name)):
            findings.append(Finding(name, found.organization_id, found.subject, found.expected, found.found))
    return findings
