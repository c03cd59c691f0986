"""Debt and its forgiveness; purchases that a pool makes by itself: when, how many, and what stops them."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from tests.credits.scenes import Balance, Scene

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import pools, top_ups
from bursar.credits.moves import Outcome
from bursar.credits.top_ups import Bought, Declined, NoSuchDebt, TopUp, Waiting
from bursar.money import Micros, NanoUsd
from bursar.problems import translated

CREDIT = 1_000_000


# ---------------------------------------------------------------------------------------------- debt


def in_debt(scene: Scene, granted: int = 100, used: int = 130) -> UUID:
    """A pool that was charged more than it had."""
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, granted)
    scene.settle(scene.hold(granted, user), used)
    return pool


def forgive(scene: Scene, pool: UUID, amount: int | None, key: str | None = None) -> int:
    return scene.call(  # type: ignore[no-any-return]
        "select credits.forgive_debt(%s, %s, %s, 'our fault', null, %s, %s)",
        scene.organization, pool, amount, key or uuid7().hex, scene.now,
    )  # fmt: skip


def entries(scene: Scene) -> list[tuple[Any, ...]]:
    return scene.admin(
        "select kind, amount from ledger.entries where organization_id = %s order by booked_at, kind, amount",
        scene.organization,
    )


def test_a_debt_blocks_and_the_next_grant_repays_it(scene: Scene) -> None:
    pool, user = in_debt(scene), scene.user()
    assert scene.balance(pool) == Balance(limit=100, used=130, held=0, excess=30)
    assert scene.authorize(1, user).outcome is Outcome.REFUSED
    scene.later(hours=1)
    scene.grant(pool, 50)
    assert scene.balance(pool) == Balance(limit=150, used=130, held=0, excess=0)
    assert scene.hold(20, user)
    assert scene.findings() == []


def test_forgiving_is_a_booked_entry_of_what_is_owed(scene: Scene) -> None:
    pool = in_debt(scene)
    scene.later(hours=1)
    with scene.refusal("BR450"):
        forgive(scene, pool, 31)
    assert forgive(scene, pool, 10, "k") == 10
    assert forgive(scene, pool, 10, "k") == 10, "again is once"
    assert scene.balance(pool) == Balance(limit=110, used=130, held=0, excess=20)
    assert scene.grants(pool)[0] == ("forgiveness", 10, 0, "ended"), "burnt at once"
    assert forgive(scene, pool, 1) == 1
    scene.later(hours=1)
    for _ in range(2):
        assert forgive(scene, pool, None, "rest") == 19
    assert scene.balance(pool) == Balance(limit=130, used=130, held=0, excess=0)
    with scene.refusal("BR404"):
        forgive(scene, uuid7(), None)
    with scene.refusal("BR450"):
        forgive(scene, pool, None)
    assert entries(scene) == [("grant", 100), ("forgiveness", 1), ("forgiveness", 10), ("forgiveness", 19)]
    sums = "select sum(left_micros)::bigint, sum(burnt_micros)::bigint from credits.grant_balances"
    assert scene.admin(f"{sums} where organization_id = %s", scene.organization) == [(0, 130)]
    assert scene.findings() == []


def test_what_is_only_held_is_no_debt(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100, expires=scene.now + timedelta(minutes=5))
    scene.hold(100, user)
    scene.later(minutes=6)
    with scene.refusal("BR450"):
        forgive(scene, pool, None)
    assert scene.balance(pool) == Balance(limit=100, used=0, held=100, excess=0)


def test_what_is_held_beyond_what_there_is_is_no_debt_either(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.hold(60, user)
    scene.settle(scene.hold(40, user), 70)
    assert scene.balance(pool) == Balance(limit=100, used=70, held=60, excess=30)
    with scene.refusal("BR450"):
        forgive(scene, pool, None)


# ---------------------------------------------------------------------------------------------- when it is bought


def set_policy(
    scene: Scene, pool: UUID, *, below: int = 100, amount: int = 500, ceiling: int = 2_000, per_hour: int = 3
) -> None:
    scene.call(
        "select credits.set_top_up(%s, %s, %s, %s, %s, %s, null, %s)",
        scene.organization, pool, below, amount, ceiling, per_hour, scene.now,
    )  # fmt: skip


def begin(scene: Scene, pool: UUID) -> UUID | None:
    """The purchase that must be made now."""
    return scene.call(  # type: ignore[no-any-return]
        "select (credits.begin_top_up(%s, %s, %s, %s)).top_up_id", scene.organization, pool, uuid7(), scene.now
    )


def decide(scene: Scene, top_up: UUID | None, succeeded: bool) -> str:
    return scene.call(  # type: ignore[no-any-return]
        "select (credits.decide_top_up(%s, %s, %s, %s, 'ref', null, %s)).state",
        scene.organization, top_up, succeeded, 5_000_000_000 if succeeded else None, scene.now,
    )  # fmt: skip


def state(scene: Scene) -> str:
    return str(
        scene.admin("select state from credits.top_up_policies where organization_id = %s", scene.organization)[0][0]
    )


def told(scene: Scene) -> list[str]:
    rows = scene.admin(
        "select kind from outbox.events where organization_id = %s and kind like 'topup.%%' order by sequence",
        scene.organization,
    )
    return [kind.removeprefix("topup.") for (kind,) in rows]


def test_a_pool_buys_when_less_than_its_threshold_is_available(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 300)
    set_policy(scene, pool)
    assert begin(scene, pool) is None
    scene.deduct(200, user)
    assert begin(scene, pool) is None, "exactly the threshold is left"
    held = scene.hold(1, user)
    top_up = begin(scene, pool)
    assert top_up is not None
    assert begin(scene, pool) == top_up, "one at a time: the open one counts"
    assert decide(scene, top_up, True) == "succeeded"
    assert decide(scene, top_up, True) == "succeeded", "again is once"
    assert scene.balance(pool).limit == 800
    assert begin(scene, pool) is None
    with scene.refusal("BR451"):
        decide(scene, top_up, False)
    scene.release(held)
    assert told(scene) == ["requested", "succeeded"]
    assert scene.findings() == []


def test_the_ceiling_is_of_the_month_in_the_organizations_zone_and_counts_open_purchases(scene: Scene) -> None:
    scene.admin(
        "update identity.organizations set zone = 'Asia/Kolkata' where organization_id = %s", scene.organization
    )
    scene.now = datetime(2026, 6, 30, 12, tzinfo=UTC)
    pool = scene.pool()
    set_policy(scene, pool, below=10_000, ceiling=1_200)
    for _ in range(2):
        decide(scene, begin(scene, pool), True)
        scene.later(hours=2)
    assert begin(scene, pool) is None
    assert told(scene)[-1] == "failed"
    assert begin(scene, pool) is None
    assert told(scene).count("failed") == 1, "told once"
    scene.now = datetime(2026, 6, 30, 18, 29, tzinfo=UTC)
    assert begin(scene, pool) is None
    scene.later(minutes=1)  # July in Kolkata
    assert begin(scene, pool)


def test_a_decline_waits_longer_each_time_and_the_sixth_stops_it(scene: Scene) -> None:
    pool = scene.pool()
    set_policy(scene, pool)
    for hours in (1, 2, 4, 8, 16):
        top_up = begin(scene, pool)
        assert decide(scene, top_up, False) == "failed"
        scene.later(hours=hours, seconds=-1)
        assert begin(scene, pool) is None
        scene.later(seconds=1)
    decide(scene, begin(scene, pool), False)
    assert state(scene) == "declined"
    scene.later(days=30)
    assert begin(scene, pool) is None
    set_policy(scene, pool)
    assert decide(scene, begin(scene, pool), True) == "succeeded"
    assert decide(scene, top_up, True) == "succeeded", "one that was declined turned out to be paid"
    assert scene.balance(pool).limit == 1_000
    assert scene.findings() == []


def test_too_many_within_an_hour_are_a_runaway(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    set_policy(scene, pool, ceiling=100_000, per_hour=2)
    for _ in range(2):
        decide(scene, begin(scene, pool), True)
        scene.deduct(500, user)
        scene.later(minutes=10)
    assert begin(scene, pool) is None
    assert (state(scene), told(scene)[-1]) == ("runaway", "runaway")
    scene.later(days=1)
    assert begin(scene, pool) is None, "somebody must look at it first"
    set_policy(scene, pool, ceiling=100_000, per_hour=2)
    assert begin(scene, pool)


def test_a_policy_that_ended_buys_no_more_and_an_open_purchase_goes_on(scene: Scene) -> None:
    pool = scene.pool()
    set_policy(scene, pool)
    top_up = begin(scene, pool)
    scene.call("select credits.end_top_up(%s, %s, %s)", scene.organization, pool, scene.now)
    assert begin(scene, pool) == top_up
    decide(scene, top_up, False)
    scene.later(days=2)
    assert begin(scene, pool) is None
    assert state(scene) == "ended"


def test_what_a_pool_had_begun_to_buy_before_it_closed_is_granted_where_its_credits_went(scene: Scene) -> None:
    pool, users = scene.pool(), [scene.user(), scene.user()]
    set_policy(scene, pool, ceiling=10_000)
    top_up = begin(scene, pool)
    scene.switch("personal")
    assert begin(scene, pool) == top_up
    with scene.refusal("BR404"):
        scene.grant(pool, 1)
    assert decide(scene, top_up, True) == "succeeded"
    own = [scene.pool("personal", owner=user) for user in users]
    assert [scene.grants(each) for each in own] == [[("transfer", 250, 250, "active")]] * 2
    assert scene.balance(pool).limit == 0
    assert begin(scene, pool) is None, "a closed pool buys nothing"
    scene.switch("shared")
    scene.deduct(450, users[0])
    assert begin(scene, pool)
    assert scene.findings() == []


def test_amounts_that_cannot_be_are_refused(scene: Scene) -> None:
    pool = scene.pool()
    for below, amount, ceiling in ((-1, 1, 1), (0, 0, 1), (0, 2, 1), (0, 1, 10**16), (10**16, 1, 1)):
        with scene.refusal("BR400"):
            set_policy(scene, pool, below=below, amount=amount, ceiling=ceiling)
    set_policy(scene, pool, below=0, amount=1, ceiling=1)
    set_policy(scene, pool, below=10**15, amount=10**15, ceiling=10**15)
    kept = "select threshold_micros, amount_micros, ceiling_micros from credits.top_up_policies where pool_id = %s"
    assert scene.admin(kept, pool) == [(10**15, 10**15, 10**15)]


def test_the_ceiling_may_be_reached_exactly_and_counts_the_month_alone(scene: Scene) -> None:
    scene.now = datetime(2026, 6, 30, 23, 30, tzinfo=UTC)
    pool = scene.pool()
    set_policy(scene, pool, below=10_000, amount=500, ceiling=1_000, per_hour=9)
    for _ in range(2):
        assert decide(scene, begin(scene, pool), True) == "succeeded"
    scene.later(minutes=40)  # July, and less than an hour
    for _ in range(2):
        assert decide(scene, begin(scene, pool), True) == "succeeded"
    assert begin(scene, pool) is None
    assert told(scene)[-1] == "failed"


def test_an_hour_over_the_end_of_a_month_is_one_hour(scene: Scene) -> None:
    scene.now = datetime(2026, 6, 30, 23, 30, tzinfo=UTC)
    pool = scene.pool()
    set_policy(scene, pool, below=10_000, ceiling=100_000, per_hour=2)
    for _ in range(2):
        decide(scene, begin(scene, pool), True)
        scene.later(minutes=20)
    assert begin(scene, pool) is None
    assert state(scene) == "runaway"


def test_what_was_declined_before_a_purchase_succeeded_does_not_count(scene: Scene) -> None:
    pool = scene.pool()
    set_policy(scene, pool, below=10_000)
    for succeeded in (False, True, False):
        decide(scene, begin(scene, pool), succeeded)
        scene.later(hours=1)
    assert begin(scene, pool), "it waits one hour again, not two"


def test_a_policy_that_was_ended_is_not_ended_by_declines_too(scene: Scene) -> None:
    pool = scene.pool()
    set_policy(scene, pool)
    for hours in (1, 2, 4, 8, 16):
        decide(scene, begin(scene, pool), False)
        scene.later(hours=hours)
    top_up = begin(scene, pool)
    scene.call("select credits.end_top_up(%s, %s, %s)", scene.organization, pool, scene.now)
    decide(scene, top_up, False)
    assert state(scene) == "ended"
    with scene.refusal("BR404"):
        scene.call("select credits.end_top_up(%s, %s, %s)", scene.organization, pool, scene.now)
    with scene.refusal("BR404"):
        decide(scene, uuid7(), True)


def test_each_pool_buys_by_its_own_policy(scene: Scene) -> None:
    one, two = scene.pool(), scene.pool(models="gpt%")

    def policies() -> list[tuple[Any, ...]]:
        return scene.admin(
            "select t.state, declines, next_try_at > %s from credits.top_up_policies t join credits.pools p"
            " using (organization_id, pool_id) where organization_id = %s order by model_filter nulls first",
            scene.now, scene.organization,
        )  # fmt: skip

    for pool in (one, two):
        set_policy(scene, pool, ceiling=500, per_hour=1)
    first, second = begin(scene, one), begin(scene, two)
    assert first != second, "that one is being bought for is no purchase of the other"
    decide(scene, first, False)
    assert policies() == [("active", 1, True), ("active", 0, False)]
    decide(scene, second, False)
    scene.later(hours=1)
    decide(scene, begin(scene, one), True)
    assert policies() == [("active", 0, False), ("active", 1, False)]
    scene.deduct(500, scene.user())
    scene.later(hours=1)
    assert begin(scene, one) is None, "its ceiling is reached"
    assert policies() == [("active", 0, True), ("active", 1, False)]
    decide(scene, begin(scene, two), True)
    set_policy(scene, one, ceiling=5_000, per_hour=1)
    decide(scene, begin(scene, one), True)
    scene.deduct(500, scene.user())
    assert begin(scene, one) is None, "too many within an hour"
    assert [each for each, _, _ in policies()] == ["runaway", "active"]
    scene.call("select credits.end_top_up(%s, %s, %s)", scene.organization, two, scene.now)
    assert [each for each, _, _ in policies()] == ["runaway", "ended"]


# ---------------------------------------------------------------------------------------------- the job, the money


class Bank:
    """Takes money once for each purchase, however often it is asked; answers in the order given, then waits."""

    def __init__(self, *answers: Bought | Declined | Waiting | Exception) -> None:
        self.answers = list(answers)
        self.asked: list[UUID] = []

    async def buy(self, database: db.Database, organization_id: UUID, top_up: TopUp) -> Bought | Declined | Waiting:
        self.asked.append(top_up.top_up_id)
        answer = self.answers.pop(0) if self.answers else Waiting()
        if isinstance(answer, Exception):
            raise answer
        return answer


PAID = Bought(NanoUsd(5_000_000_000), "pi_1")


async def low(org: Any, *, ceiling: int = 2_000) -> UUID:
    """The organization's pool, which is empty and would buy 500 credits."""
    async with org.tenant() as conn:
        pool = await pools.pool_for(conn, organization_id=org.organization_id)
        await top_ups.set_policy(
            conn,
            organization_id=org.organization_id,
            pool_id=pool,
            threshold_micros=Micros(100 * CREDIT),
            amount_micros=Micros(500 * CREDIT),
            ceiling_micros=Micros(ceiling * CREDIT),
            by=OPERATOR,
        )
    return pool


async def bought(org: Any) -> list[tuple[str, int | None]]:
    async with org.tenant() as conn:
        found = await top_ups.list_top_ups(conn, organization_id=org.organization_id)
    return [(each.state, each.paid_nano_usd) for each in reversed(found)]


async def only(org: Any, bank: Bank) -> None:
    """The job, for this organization only: other tests have pools that run low too."""
    async with org.database.platform() as conn:
        low_ones = await db.fetch_all(conn, top_ups._Low, top_ups.QUERIES.pools_to_top_up)
    for each in low_ones:
        if each.organization_id == org.organization_id:
            await top_ups._top_up(org.database, bank, each.organization_id, each.pool_id)


async def test_what_waits_is_asked_about_until_it_is_decided(org: Any) -> None:
    pool, bank = await low(org), Bank(Waiting(), ConnectionError("the bank is away"), PAID)
    await only(org, bank)
    with pytest.raises(ConnectionError):
        await only(org, bank)
    await only(org, bank)
    assert len(bank.asked) == 3
    assert len(set(bank.asked)) == 1
    assert await bought(org) == [("succeeded", 5_000_000_000)]
    async with org.tenant() as conn:
        [found] = await pools.list_pools(conn, organization_id=org.organization_id)
        basis = "select cost_basis_nano_usd from credits.grants where source = 'top_up'"
        assert await db.fetch_value(conn, basis) == 5_000_000_000
    assert (found.pool_id, found.available_micros) == (pool, 500 * CREDIT)
    await only(org, bank)
    assert len(bank.asked) == 3, "nothing is low any more"


async def test_workers_at_the_same_time_buy_once(org: Any) -> None:
    await low(org)
    bank = Bank(*[PAID] * 8)
    await asyncio.gather(*[only(org, bank) for _ in range(8)])
    assert len(set(bank.asked)) == 1
    assert await bought(org) == [("succeeded", 5_000_000_000)]


async def test_the_job_goes_on_with_others_when_one_fails(org: Any, make_org: Any, database: db.Database) -> None:
    other = await make_org()
    await low(org)
    await low(other)

    class Shaky:
        async def buy(self, database: db.Database, organization_id: UUID, top_up: TopUp) -> Any:
            if organization_id == org.organization_id:
                raise ConnectionError("the bank is away")
            return PAID if organization_id == other.organization_id else Waiting()

    await top_ups.top_up_pools(database, Shaky())
    assert (await bought(org), await bought(other)) == ([("pending", None)], [("succeeded", 5_000_000_000)])
    await top_ups.top_up_pools(database)  # without a bank a person decides
    assert await bought(org) == [("pending", None)]


async def test_more_than_is_owed_cannot_be_forgiven(org: Any) -> None:
    pool = await low(org)
    with pytest.raises(NoSuchDebt, match="owes 0"), translated():
        async with org.tenant() as conn:
            await top_ups.forgive_debt(
                conn,
                organization_id=org.organization_id,
                pool_id=pool,
                amount_micros=Micros(1),
                reason="x",
                by=OPERATOR,
                idempotency_key="k",
            )
