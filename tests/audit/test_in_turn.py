"""Work for one organization after the other."""

from uuid import UUID

import pytest

from bursar.audit import jobs
from bursar.clock import uuid7


async def test_what_is_wrong_in_some_organizations_keeps_no_other_waiting_and_is_all_told() -> None:
    ids, done = [uuid7() for _ in range(5)], []

    async def work(organization_id: UUID) -> int:
        if organization_id in (ids[0], ids[3]):
            raise ValueError(f"no {ids.index(organization_id)}")
        done.append(organization_id)
        return 2

    with pytest.raises(ExceptionGroup) as told:
        await jobs.in_turn(ids, work)
    assert done == [ids[1], ids[2], ids[4]]
    assert [str(each) for each in told.value.exceptions] == ["no 0", "no 3"]
    assert [each.__notes__ for each in told.value.exceptions] == [[f"in the organization {ids[n]}"] for n in (0, 3)]
    assert await jobs.in_turn([ids[1], ids[4]], work) == 4
