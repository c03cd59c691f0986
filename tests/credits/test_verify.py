"""The books agree, and `verify` says so of the sound and not of the broken."""

import psycopg
import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund, move

from bursar import db
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action
from bursar.credits.verify import CHECKS, INVARIANTS, Finding, verify

# What is broken by hand, and the invariant that must notice. The organization has one grant, one charge, one open hold.
FAULTS = {
    "pool_limit_is_the_ledger": "update credits.balances set limit_amount = limit_amount + 5 where kind = 'pool'",
    "pool_use_is_the_attribution": "update credits.balances set used_amount = used_amount + 1 where kind = 'pool'",
    "positions_tile": "update credits.balances set used_amount = used_amount + 1 where kind = 'pool'",
    "holds_fit_their_chain": "update credits.holds set leg = 7 where true",
    "held_is_the_open_holds": "delete from credits.holds where true",
    "limit_use_is_the_attribution": "update credits.balances set used_amount = 0 where kind = 'limit'",
    "parts_add_up_to_their_pool": "update credits.balances set used_amount = used_amount - 1 where kind = 'open'",
    "open_part_is_what_nobody_claims": "update credits.balances set limit_amount = 90 where kind = 'open'",
    "grants_add_up": "update credits.grant_states set left_micros = left_micros - 1 where true",
    "burns_tile": "update credits.pools set poured_micros = poured_micros + 1 where true",
    "events_are_awaited": "update credits.pools set next_event_at = '2020-01-01' where true",
    "one_current_chain": "update credits.chains set limits_version = limits_version + 9 where true",
}


async def findings_of(org: Org) -> list[Finding]:
    async with org.database.platform() as conn:
        return await verify(conn, organization_id=org.organization_id)


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
        cursor = await admin.execute(f"select organization_id from ({CHECKS[invariant]}) offences")  # type: ignore[arg-type]
        offended = {row[0] for row in await cursor.fetchall()}
        await admin.rollback()
    assert org.organization_id in offended
    assert await findings_of(org) == []


def test_every_invariant_says_what_it_means() -> None:
    assert set(FAULTS) <= set(CHECKS)
    assert all(INVARIANTS[name].endswith(".") for name in CHECKS)
