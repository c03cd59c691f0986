"""A few companies written for real: their numbers are the stories', and the books agree."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from bursar import db
from bursar.credits.grants import list_grants
from bursar.credits.limits import list_allocations
from bursar.credits.pools import list_pools
from bursar.credits.verify import verify
from bursar.identity.principals import principal_of_key
from bursar.money import MICROS_PER_CREDIT, NANO_USD_PER_USD, credits
from bursar.usage.figures import Overview, overview, snapshot

from .conftest import AS_OF, SEEDED, SmallDemo


async def _overview(demo: SmallDemo, slug: str) -> Overview:
    organization_id = demo.seeded[slug].organization_id
    async with snapshot(demo.database, organization_id) as conn:
        return await overview(conn, organization_id=organization_id, now=AS_OF, with_margin=True, top=18)


@asynccontextmanager
async def _tenant(demo: SmallDemo, slug: str) -> AsyncIterator[db.Connection]:
    async with demo.database.tenant(demo.seeded[slug].organization_id) as conn:
        yield conn


async def test_acme_shows_the_numbers_of_the_mock_up(demo: SmallDemo) -> None:
    acme = await _overview(demo, "acme-corp")
    assert acme.cost.charged_micros == credits(250_000)
    assert acme.cost.change.permille == 124
    assert acme.margin is not None
    assert acme.margin.provider_cost_nano_usd == 1_250 * NANO_USD_PER_USD
    assert (acme.margin.margin_permille, acme.margin.priced_permille) == (500, 1000)
    assert (acme.active_users.active, acme.active_users.with_access, acme.active_users.change.difference) == (15, 18, 2)
    (pool,) = acme.pools
    assert (pool.available_micros, pool.held_micros, pool.overage_micros) == (credits(61_250), 0, 0)


async def test_acme_is_broken_down_as_in_the_mock_up(demo: SmallDemo) -> None:
    acme = await _overview(demo, "acme-corp")
    keys = {row.name: (row.charged_micros // MICROS_PER_CREDIT, row.share_permille) for row in acme.keys.rows}
    assert keys == {"OpenAI Prod": (150_000, 600), "Anthropic Prod": (80_000, 320), "Staging": (20_000, 80)}
    people = [(row.name.split()[0], row.charged_micros) for row in acme.people.rows]
    assert people[:3] == [("Alice", credits(45_000)), ("Bob", credits(38_000)), ("Charlie", credits(32_000))]
    assert len(people) == 15
    assert sum(amount for _, amount in people[3:]) == credits(135_000)
    departments = {row.name: row.charged_micros for row in acme.departments.rows}
    assert departments["Unattributed"] == 0
    assert sum(departments.values()) == credits(250_000)


async def test_every_key_of_a_provider_asked_that_provider_only(demo: SmallDemo) -> None:
    async with _tenant(demo, "acme-corp") as conn:
        cursor = await conn.execute(
            "select distinct k.name, a.provider from ledger.attribution a join identity.api_keys k using (api_key_id)"
            " where k.name like '%% Prod' order by 1"
        )
        assert await cursor.fetchall() == [("Anthropic Prod", "anthropic"), ("OpenAI Prod", "openai")]


async def test_requests_are_priced_by_the_price_that_was_in_force(demo: SmallDemo) -> None:
    async with demo.database.platform() as conn:
        cursor = await conn.execute(
            "select count(*) from ledger.attribution a left join pricing.versions v using (price_version_id)"
            " where v.price_version_id is null or v.model <> a.model or v.effective_from > a.used_at"
        )
        assert await cursor.fetchone() == (0,)


async def test_history_goes_back_thirteen_months_and_not_beyond_the_day(demo: SmallDemo) -> None:
    async with _tenant(demo, "acme-corp") as conn:
        cursor = await conn.execute(
            "select count(distinct date_trunc('month', used_at at time zone 'Europe/Paris')), max(used_at),"
            " max(booked_at), bool_and(used_at <= booked_at) from ledger.attribution"
        )
        row = await cursor.fetchone()
        assert row is not None
        months, last_use, last_booking, in_order = row
    assert (months, in_order) == (13, True)
    assert last_use <= last_booking <= AS_OF


async def test_nothing_lies_in_the_partition_of_no_month(demo: SmallDemo) -> None:
    async with demo.database.platform() as conn:
        assert await db.fetch_value(conn, "select count(*) from ledger.attribution_rest") == 0


async def test_lumen_has_one_share_at_96_and_one_at_4_percent(demo: SmallDemo) -> None:
    async with _tenant(demo, "lumen-loop") as conn:
        shares = await list_allocations(conn, organization_id=demo.seeded["lumen-loop"].organization_id)
    used = sorted(share.used_micros // MICROS_PER_CREDIT for share in shares)
    assert [share.amount_micros for share in shares] == 5 * [credits(1_000)]
    assert used == [40, 230, 455, 610, 960]


async def test_quill_has_used_98_4_percent_and_an_expired_grant(demo: SmallDemo) -> None:
    organization_id = demo.seeded["quill-co"].organization_id
    async with _tenant(demo, "quill-co") as conn:
        (pool,) = await list_pools(conn, organization_id=organization_id)
        grants = await list_grants(conn, organization_id=organization_id)
        cursor = await conn.execute("select detail, count(*) from credits.unbilled_requests group by 1 order by 1")
        refused = await cursor.fetchall()
    assert 1000 * pool.used_micros == 984 * pool.limit_micros == 984 * credits(120_000)
    expired = [grant for grant in grants if grant.expires_at is not None and grant.expires_at < AS_OF]
    assert [(grant.state, grant.left_micros) for grant in expired] == [("ended", 0)]
    assert refused == [("allocation_exhausted", 13), ("cap_reached", 24)]


async def test_quill_has_one_conversation_that_ran_away(demo: SmallDemo) -> None:
    async with _tenant(demo, "quill-co") as conn:
        largest = await db.fetch_value(
            conn,
            "select sum(charged_micros)::bigint from ledger.attribution group by conversation_id"
            " order by 1 desc limit 1",
        )
    assert largest == credits(4_600)


async def test_the_last_days_of_acme_were_held_and_settled(demo: SmallDemo) -> None:
    async with _tenant(demo, "acme-corp") as conn:
        held = await db.fetch_value(conn, "select count(*) from ledger.attribution where hold_micros > charged_micros")
        released = await db.fetch_value(
            conn, "select count(*) from credits.unbilled_requests where outcome = 'released'"
        )
        open_holds = await db.fetch_value(conn, "select count(*) from credits.holds")
    assert held > 100
    assert released > 1
    assert open_holds == 0


async def test_nothing_is_there_of_a_blank_canvas_but_its_people(demo: SmallDemo) -> None:
    blank = await _overview(demo, "blank-canvas")
    assert blank.is_unused
    assert blank.pools[0].granted_micros == 0
    assert blank.active_users.with_access == 2


async def test_a_company_that_pays_less_than_it_costs_has_a_negative_margin(demo: SmallDemo) -> None:
    async with demo.database.platform() as conn:
        charged, cost = await _sums(conn, demo.seeded["gable-works"].organization_id)
    assert charged * 10 < cost


async def _sums(conn: db.Connection, organization_id: object) -> tuple[int, int]:
    cursor = await conn.execute(
        "select sum(charged_micros)::bigint, sum(provider_cost_nano_usd)::bigint from ledger.attribution"
        " where organization_id = %s",
        [organization_id],
    )
    row = await cursor.fetchone()
    assert row is not None
    return row


async def test_an_individual_spends_credits_of_their_own(demo: SmallDemo) -> None:
    async with demo.database.platform() as conn:
        cursor = await conn.execute(
            "select o.kind, sum(a.charged_micros)::bigint from ledger.attribution a"
            " join identity.organizations o using (organization_id) where o.kind = 'individual' group by 1"
        )
        assert await cursor.fetchall() == [("individual", credits(180))]


async def test_the_keys_that_are_handed_out_act_in_their_company(demo: SmallDemo) -> None:
    for company in demo.seeded.values():
        for access in (company.admin, company.member):
            principal = await principal_of_key(demo.database, access.api_key, chosen=None)
            assert principal.organization_id == company.organization_id
            assert principal.user_id == access.user_id


async def test_the_books_agree(demo: SmallDemo) -> None:
    async with demo.database.platform() as conn:
        assert await verify(conn) == []


async def test_progress_is_told_to_the_last_unit(demo: SmallDemo) -> None:
    assert sorted(demo.told.ended) == sorted(SEEDED)
    assert demo.told.units == demo.told.sizes
    async with demo.database.platform() as conn:
        rows = await db.fetch_value(conn, "select count(*) from ledger.attribution where kind = 0")
    people = 18 + 5 + 24 + 2 + 1 + 2
    assert abs(sum(demo.told.units.values()) - rows - people) <= 1


async def test_only_the_simulator_may_date_money(demo: SmallDemo) -> None:
    async with _tenant(demo, "acme-corp") as conn:
        statement = (
            "select credits.open_pool(%s, gen_random_uuid(), 'shared', null, 'x', null, now() - interval '1 day')"
        )
        with pytest.raises(psycopg.Error) as refused:
            await conn.execute(statement, [demo.seeded["acme-corp"].organization_id])
        await conn.rollback()
    assert refused.value.sqlstate == "BR403"
