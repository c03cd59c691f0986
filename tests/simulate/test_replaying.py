"""What if: a real past under the same terms comes to the same figures, and under others to what they say."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.conftest import Org, Simulate

from bursar import db
from bursar.clock import uuid7
from bursar.credits.limits import Metric, Period
from bursar.credits.moves import Action, Move
from bursar.credits.pools import list_pools
from bursar.money import Micros, credits
from bursar.pricing import files
from bursar.pricing.book import PriceBook
from bursar.pricing.importing import import_shipped
from bursar.pricing.usage import Usage
from bursar.simulation.replaying import CannotBeReplayed, Change, NewCap, NewGrant, Replayed, replay

MODEL = ("openai", "gpt-5-mini")
START = datetime(2026, 3, 2, 9, tzinfo=UTC)  # a Monday
END = START + timedelta(days=28)


@dataclass
class History:
    """An organization with four weeks behind it: two members, each ten requests a working day."""

    org: Org
    dana: UUID
    eli: UUID
    pool_id: UUID
    charged: Micros
    requests: int

    async def replay(self, **change: Any) -> Replayed:
        return await replay(
            self.org.database,
            organization_id=self.org.organization_id,
            since=change.pop("since", START),
            until=END,
            change=Change(**change),
        )


@pytest.fixture
async def history(org: Org, simulate: Simulate) -> History:
    """Charged at list price, with a cap that refused one request."""
    async with org.database.platform() as conn:
        await import_shipped(conn)
    dana, eli = await org.member(), await org.member()
    async with org.tenant() as conn:
        [pool] = await list_pools(conn, organization_id=org.organization_id)
    quote = await PriceBook(org.database).quote(
        organization_id=org.organization_id, provider=MODEL[0], model=MODEL[1], at=START
    )
    usage = Usage(input_tokens=100_000, output_tokens=20_000)
    charge = quote.price(usage, at=START).charged_micros
    dsn = org.database.dsn("bursar_simulator")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(
            "select credits.add_grant(%s, %s, %s, 'purchase', %s, 100::smallint, false, 0, null, null, null, null, "
            "%s, %s)",
            [org.organization_id, uuid7(), pool.pool_id, credits(10_000), uuid7().hex, START],
        )
        await conn.execute(
            "select credits.set_limit(%s, %s, 'user', %s, 'credits', null, 'day', %s, 'stops', null, %s)",
            [org.organization_id, uuid7(), eli, charge * 10, START],
        )
    count = 0
    for day in range(28):
        if (START + timedelta(days=day)).weekday() > 4:
            continue
        for number in range(10):
            at = START + timedelta(days=day, minutes=10 * number)
            moves = [_deduct(org, user, charge, usage, at) for user in (dana, eli)]
            assert all(each.accepted for each in await simulate(moves, at=at))
            count += 2
    beyond = _deduct(org, eli, charge, usage, START + timedelta(hours=5))
    late = START + timedelta(days=25, hours=5)
    [refused] = await simulate([beyond._replace(used_at=late)], at=late)
    assert refused.detail == "cap_reached"
    return History(org, dana, eli, pool.pool_id, charge, count)


def _deduct(org: Org, user: UUID, charge: Micros, usage: Usage, at: datetime) -> Move:
    return Move(
        Action.DEDUCT, org.organization_id, uuid7(), user_id=user, amount_micros=charge, usage=usage.as_array(),
        provider=MODEL[0], model=MODEL[1], used_at=at,
    )  # fmt: skip


async def test_under_the_same_terms_all_is_as_it_was(history: History) -> None:
    answer = await history.replay()
    assert (answer.total.requests, answer.total.refused) == (400, 0)
    assert answer.total.charged == answer.total.new_charged == history.charged * 400
    assert answer.first_refusal is None
    assert (answer.once_refused, answer.let_through) == (1, 0)
    assert {name: sums.requests for name, sums in answer.days.items()}["2026-03-02"] == 20
    async with history.org.tenant() as conn:
        [real] = await list_pools(conn, organization_id=history.org.organization_id)
    assert answer.end is not None
    [told] = answer.end.pools
    assert (told.available, told.used) == (real.available_micros, real.used_micros)


async def test_what_was_before_the_first_day_counts_for_what_is_left(history: History) -> None:
    answer = await history.replay(since=START + timedelta(days=21))
    assert answer.total.requests == 100
    assert answer.end is not None
    assert answer.end.pools[0].used == history.charged * 400


async def test_a_cap_refuses_what_goes_beyond_it_and_is_named(history: History) -> None:
    cap = NewCap(
        scope="user", scope_id=history.dana, metric=Metric.CREDITS, amount=history.charged * 7, period=Period.DAY,
        model_filter="gpt-%",
    )  # fmt: skip
    answer = await history.replay(caps=[cap])
    assert answer.total.refused == 3 * 20  # three of ten, on twenty days
    assert answer.total.new_charged == history.charged * (400 - 60)
    assert answer.first_refusal is not None
    assert answer.first_refusal.at == START + timedelta(minutes=70)
    assert answer.first_refusal.code == "cap_reached"
    [binding] = answer.bindings
    assert binding.startswith("tried: user")
    assert answer.bindings[binding].refused == 60


async def test_a_cap_that_is_tried_stays_whatever_became_of_one_of_its_kind(history: History) -> None:
    organization_id, day, limit_id = history.org.organization_id, timedelta(days=1), uuid7()
    dsn = history.org.database.dsn("bursar_simulator")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute(
            "select credits.set_limit(%s, %s, 'user', %s, 'credits', null, 'day', %s, 'stops', null, %s)",
            [organization_id, limit_id, history.dana, history.charged * 100, START + 8 * day],
        )
        await conn.execute("select credits.end_limit(%s, %s, %s)", [organization_id, limit_id, START + 15 * day])
    for since, days in ((START, 20), (START + 14 * day, 10)):
        cap = NewCap(
            scope="user", scope_id=history.dana, metric=Metric.CREDITS, amount=history.charged * 7, period=Period.DAY,
            model_filter=None,
        )  # fmt: skip
        answer = await history.replay(caps=[cap], since=since)
        assert answer.total.refused == 3 * days
        assert all(name.startswith("tried: user") for name in answer.bindings)


async def test_without_caps_what_was_refused_is_let_through(history: History) -> None:
    answer = await history.replay(without_caps=None)
    assert (answer.once_refused, answer.let_through, answer.let_through_micros) == (1, 1, history.charged)


async def test_another_price_charges_by_it_at_the_time_of_use(history: History) -> None:
    twice = "provider,model,kind,price_usd,unit,effective_from\n"
    twice += "openai,gpt-5-mini,input_tokens,1000,1M tokens,2026-03-09\n"
    twice += "openai,gpt-5-mini,output_tokens,0,1M tokens,2026-03-09\n"
    answer = await history.replay(prices=files.read(twice).prices)
    new = credits(10_000)  # 100,000 tokens at 1,000 USD a million
    assert answer.days["2026-03-06"].new_charged == history.charged * 20
    assert answer.first_refusal is not None
    assert answer.first_refusal.amount == new
    assert answer.first_refusal.code in ("cap_reached", "pool_exhausted")


async def test_another_mark_up_charges_in_proportion(history: History) -> None:
    answer = await history.replay(markup_ppm=500_000)
    assert answer.total.refused == 0
    assert abs(2 * answer.total.new_charged - answer.total.charged) <= 400


async def test_grants_are_taken_away_and_tried(history: History) -> None:
    async with history.org.database.platform() as conn:
        found = await db.fetch_value(
            conn, "select grant_id from credits.grants where organization_id = %(o)s", o=history.org.organization_id
        )
    half = NewGrant(amount_micros=Micros(history.charged * 200))
    answer = await history.replay(without_grants=frozenset([found]), grants=[half])
    assert answer.total.requests - answer.total.refused == 200
    assert set(answer.bindings) == {"Shared credits"}


async def test_no_real_figure_changes(history: History) -> None:
    query = """
        select (select jsonb_agg(b order by balance_id, period_start) from credits.balances b
                where organization_id = %(o)s),
            (select count(*) from ledger.attribution where organization_id = %(o)s),
            (select jsonb_agg(c order by built_at, chain_id) from credits.chains c where organization_id = %(o)s)"""
    async with history.org.database.platform() as conn:
        before = await (await conn.execute(query, {"o": history.org.organization_id})).fetchall()
    await history.replay(without_caps=None)
    async with history.org.database.platform() as conn:
        assert await (await conn.execute(query, {"o": history.org.organization_id})).fetchall() == before


async def test_a_past_that_ends_before_it_begins_is_refused(history: History) -> None:
    with pytest.raises(CannotBeReplayed):
        await history.replay(since=END)
