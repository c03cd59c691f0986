"""What `bursar verify` finds."""

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class Finding:
    """One offence. subject: which balance, pool, row or seal; expected and found: as the invariant has them."""

    invariant: str
    organization_id: UUID
    subject: str
    expected: str
    found: str
