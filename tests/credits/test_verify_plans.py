"""A question about one organization's books reads no other's rows, however many there are."""

import re
from typing import Any

import pytest

from bursar import db
from bursar.credits.verify import CHECKS


def read_whole(plan: dict[str, Any]) -> set[str]:
    """Relations that a plan reads without regard to the organization."""
    conditions = " ".join(str(plan.get(key, "")) for key in ("Index Cond", "Filter", "Recheck Cond"))
    name = str(plan.get("Relation Name", ""))
    found = {name} if name and "organization_id" not in conditions else set()
    return found.union(*(read_whole(each) for each in plan.get("Plans", [])))


@pytest.mark.parametrize("invariant", CHECKS)
async def test_one_organization_is_asked_for_itself(database: db.Database, invariant: str) -> None:
    async with database.platform() as conn:
        await conn.execute("set local enable_seqscan = off")
        asked = f"explain (format json) select * from ({CHECKS[invariant]}) o where organization_id = %s"
        cursor = await conn.execute(re.sub(r"%(?!s$)", "%%", asked), ["01920000-0000-7000-8000-000000000001"])
        [[[found]]] = await cursor.fetchall()
    assert read_whole(found["Plan"]) == set()
