"""The books agree, and `verify` says so of the sound and not of the broken."""

import psycopg
import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund, move

from bursar import db
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action
from bursar.credits.verify import INVARIANTS, Difference, Finding, verify

# What is broken by hand, and the invariant that must notice. The organization has one grant, one charge, one open hold.
FAULTS = {
    "used_is_attributed": "update credits.balances set used_amount = used_amount + 1 where kind = 'pool'",
    "held_is_the_sum_of_holds": "delete from credits.holds where true",
    "limit_is_booked": "update credits.balances set limit_amount = limit_amount + 5 where kind = 'pool'",
    "grants_add_up": "update credits.grant_states set left_micros = left_micros - 1 where true",
    "burns_tile": "update credits.pools set poured_micros = poured_micros + 1 where true",
    "left_is_what_the_limit_has_beyond_the_pour": "update credits.grant_states set left_micros = 0 where true",
    "parts_make_the_pool": "update credits.balances set used_amount = used_amount - 1 where kind = 'open'",
    "open_part_is_what_nobody_reserves": "update credits.balances set limit_amount = 90 where kind = 'open'",
    "limits_count_what_was_charged": "update credits.balances set used_amount = 0 where kind = 'limit'",
}


async def findings_of(org: Org) -> list[Finding]:
    async with org.database.platform() as conn:
        return [each for each in await verify(conn) if each.organization_id == org.organization_id]


async def used_org(org: Org) -> Org:
    """With a cap, a charge of 7 and an open hold of 10."""
    await fund(org, 100)
    async with org.tenant() as conn:
        await db.execute(
            conn,
            "select credits.set_limit(%(org)s, gen_random_uuid(), 'user', %(user)s, 'credits', null, 'month', 50,"
            " 'stops', null)",
            org=org.organization_id,
            user=org.admin,
        )
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        assert (await batcher.move(move(org, Action.DEDUCT, 7))).accepted
        assert (await batcher.move(move(org, Action.AUTHORIZE, 10))).accepted
    return org


async def test_sound_books_have_no_findings(org: Org) -> None:
    assert await findings_of(await used_org(org)) == []


@pytest.mark.parametrize("invariant", FAULTS)
async def test_each_broken_invariant_is_found(org: Org, invariant: str) -> None:
    await used_org(org)
    async with await psycopg.AsyncConnection.connect(org.database.dsn("admin")) as admin:
        await admin.execute(f"{FAULTS[invariant]} and organization_id = %s", [org.organization_id])  # type: ignore[arg-type]
        # Seen inside the transaction that broke it, which is then undone: other tests verify the same database.
        broken = await db.fetch_all(admin, Difference, getattr(INVARIANTS, invariant))
        await admin.rollback()
    assert org.organization_id in {row.organization_id for row in broken}
    assert await findings_of(org) == []


def test_every_invariant_that_a_constraint_does_not_keep_has_a_fault_here() -> None:
    # Positions belong to rows that nobody may change; excess is a constraint of the table.
    assert set(INVARIANTS.names) - set(FAULTS) == {"positions_tile", "excess_is_exact"}
