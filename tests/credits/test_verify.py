"""The books agree, and `verify` says so of the sound and not of the broken."""

import psycopg
import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund, move

from bursar import db
from bursar.credits.batcher import Batcher
from bursar.credits.moves import Action
from bursar.credits.pools import pool_for
from bursar.credits.verify import CHECKS, INVARIANTS, Finding, verify

# What is broken by hand, and the invariant that must notice. The organization has two grants, of which one will expire,
# a share of 20 for somebody, a cap with a raise to come and a capped share, a charge of 7 and an open hold of 10.
FAULTS = {
    "periods_do_not_overlap": """
        insert into credits.balances (organization_id, balance_id, period_start, period_end, kind, limit_amount)
        select organization_id, balance_id, period_start + interval '1 hour', period_end, kind, 0
        from credits.balances where kind = 'limit'""",
    "pool_limit_is_the_ledger": "update credits.balances set limit_amount = limit_amount + 5 where kind = 'pool'",
    "pool_use_is_the_attribution": "update credits.balances set used_amount = used_amount + 1 where kind = 'pool'",
    "positions_tile": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, pool_id, position_micros,
            charged_micros, hold_micros, provider_cost_nano_usd)
        select organization_id, gen_random_uuid(), booked_at, used_at, pool_id, position_micros + 1,
            charged_micros, 0, 0
        from ledger.attribution where true""",
    "positions_follow_time": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, pool_id, position_micros,
            charged_micros, hold_micros, provider_cost_nano_usd)
        select organization_id, gen_random_uuid(), booked_at - interval '1 hour', used_at, pool_id, position_micros + 7,
            0, 0, 0
        from ledger.attribution where true""",
    "events_are_numbered_without_gaps": """
        insert into outbox.events (organization_id, event_id, kind, object_kind, object_id, sequence, payload,
            happened_at)
        select organization_id, gen_random_uuid(), 'pool.low', 'pool', pool_id, number, '{}', now()
        from credits.pools, unnest(array[4, 6]) number where true""",
    "takes_belong_to_a_request": """
        insert into ledger.attribution_takes (organization_id, request_id, booked_at, pool_id, position_micros,
            charged_micros)
        select organization_id, request_id, booked_at, pool_id, 0, 1 from ledger.attribution where true""",
    "holds_fit_their_chain": "update credits.holds set leg = 7 where true",
    "held_is_the_open_holds": "delete from credits.holds where true",
    "limit_use_is_the_attribution": "update credits.balances set used_amount = 0 where kind = 'limit'",
    "cap_use_is_the_attribution": """
        update credits.balances b set used_amount = used_amount + 1 where kind = 'allocation'
        and exists (select from credits.allocations a where a.allocation_id = b.balance_id and a.kind = 'capped')""",
    "parts_add_up_to_their_pool": "update credits.balances set used_amount = used_amount - 1 where kind = 'open'",
    "open_part_is_what_nobody_claims": "update credits.balances set limit_amount = 90 where kind = 'open'",
    "shares_have_their_size": "update credits.allocations set amount_micros = 21 where kind = 'reserved'",
    "renewals_follow_each_other": """
        insert into credits.allocation_periods (organization_id, allocation_id, period_start, period_end,
            opening_micros)
        select organization_id, allocation_id, now(), now() + interval '1 hour', 0
        from credits.allocations where kind = 'reserved'""",
    "raises_are_in_their_limits": "update credits.raises set state = 'active' where true",
    "raises_follow_their_requests": """
        insert into credits.limit_requests (organization_id, limit_request_id, balance_id, limit_id, user_id, amount,
            until_at, reason, created_at, lapses_at, state, decided_at)
        select organization_id, gen_random_uuid(), balance_id, limit_id, gen_random_uuid(), 1, now(), 'x', now(), now(),
            'approved', now() from credits.raises where true""",
    "grants_add_up": "update credits.grant_states set left_micros = left_micros - 1 where true",
    "money_adds_up": "update credits.grant_states set value_left_nano_usd = value_left_nano_usd + 1 where true",
    "refunds_are_what_came_back": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, kind, charged_micros,
            hold_micros, provider_cost_nano_usd)
        select organization_id, request_id, booked_at + interval '1 second', used_at, 2, -1, 0, 0
        from ledger.attribution where true""",
    "rolled_over_within_bounds": """
        insert into credits.grants (organization_id, grant_id, pool_id, source, amount_micros, effective_at,
            parent_grant_id, created_at)
        select organization_id, gen_random_uuid(), pool_id, 'roll_over', 1, effective_at, grant_id, created_at
        from credits.grants where true""",
    "closed_pools_are_empty": "update credits.pools set closed_at = created_at where true",
    "burns_tile": "update credits.pools set poured_micros = poured_micros + 1 where true",
    "left_is_the_limit_beyond_the_pour": "update credits.grant_states set left_micros = 0 where true",
    "taken_back_was_poured": """
        insert into credits.unburns (organization_id, pool_id, taken_back_at, start_micros, end_micros, grant_id,
            poured_at)
        select organization_id, gen_random_uuid(), now(), 0, 1, grant_id, now() - interval '1 day'
        from credits.grants where true""",
    "limits_are_their_last_change": "update credits.limits set amount = amount + 1 where true",
    "shares_are_their_last_change": "update credits.allocations set carry_micros = 1, period = 'month' "
    "where kind = 'reserved'",
    "closed_accounts_add_up": """
        insert into credits.closed_accounts (organization_id, pool_id, to_pool_id, rest_micros)
        select organization_id, pool_id, pool_id, 5 from credits.pools where true""",
    "events_are_awaited": "update credits.pools set next_event_at = 'infinity' where true",
    "one_current_chain": "update credits.chains set limits_version = limits_version + 1000 where true",
    "estimates_were_charged": """
        insert into credits.estimates (organization_id, request_id, chain_id, leg_micros, tokens, cost_nano_usd, flags,
            booked_at)
        select organization_id, request_id, chain_id, '{5}', 0, 0, 0, placed_at from credits.holds where true""",
    "attribution_names_who_its_chain_is_of": """
        insert into ledger.attribution (organization_id, request_id, booked_at, used_at, chain_id, charged_micros,
            hold_micros, provider_cost_nano_usd)
        select organization_id, gen_random_uuid(), booked_at, used_at, chain_id, 0, 0, 0
        from ledger.attribution where true""",
    "acknowledged_charges_are_booked": """
        insert into credits.commands (organization_id, idempotency_key, body_hash, request_id, outcome, answered_at,
            kept_until)
        select organization_id, 'a key', '', gen_random_uuid(), jsonb '{"outcome": 0, "charged_micros": 5}', now(),
            now()
        from credits.gates where true""",
}
COMMANDS = (
    "select credits.add_grant(%(org)s, gen_random_uuid(), %(pool)s, 'purchase', 50, 100::smallint, false, 0, null,"
    " statement_timestamp() + interval '9 days', null, null, 'a grant that expires')",
    "select credits.set_limit(%(org)s, gen_random_uuid(), 'user', %(user)s, 'credits', null, 'month', 50, 'stops',"
    " null)",
    "select credits.allocate(%(org)s, gen_random_uuid(), %(pool)s, %(user)s, 'capped', 'month', 60, 'stops', false,"
    " null, 'a cap')",
    "select credits.allocate(%(org)s, gen_random_uuid(), %(pool)s, gen_random_uuid(), 'reserved', 'none', 20, 'stops',"
    " false, null, 'a share')",
    "select credits.raise_limit(%(org)s, gen_random_uuid(), limit_id, null, 5, statement_timestamp() + interval"
    " '1 hour', statement_timestamp() + interval '2 hours', null, null, 'a raise') from credits.limits",
)


async def findings_of(org: Org) -> list[Finding]:
    async with org.database.platform() as conn:
        return await verify(conn, organization_id=org.organization_id)


async def used_org(org: Org) -> Org:
    """With what FAULTS needs."""
    await fund(org, 100)
    async with org.tenant() as conn:
        pool = await pool_for(conn, organization_id=org.organization_id)
        for command in COMMANDS:
            await db.execute(conn, command, org=org.organization_id, user=org.admin, pool=pool)
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
        await admin.execute(f"{FAULTS[invariant]} and organization_id = %s", [org.organization_id])
        # Seen inside the transaction that broke it, which is then undone: other tests verify the same database.
        cursor = await admin.execute(f"select organization_id from ({CHECKS[invariant]}) offences")
        offended = {row[0] for row in await cursor.fetchall()}
        await admin.rollback()
    assert org.organization_id in offended
    assert await findings_of(org) == []


def test_every_invariant_that_no_constraint_keeps_has_a_fault_here() -> None:
    assert set(CHECKS) - set(FAULTS) == {"balances_add_up"}
    assert all(INVARIANTS[name].endswith(".") for name in CHECKS)
