"""Grants in full: transfers, refunds, schedules, roll-over, the value of what is burnt, and the switch of pools."""

import re
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.credits.scenes import NOON, Balance, Scene

from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.grants import GrantSource, InvalidGrant, add_grant
from bursar.credits.moves import Flag, Outcome
from bursar.credits.pools import pool_for
from bursar.credits.schedules import Unit, add_schedule
from bursar.money import credits

ACCEPTED, REFUSED = Outcome.ACCEPTED, Outcome.REFUSED


def _value(scene: Scene) -> list[tuple[int, int, int]]:
    """(kind, charged, revenue) of every attribution row."""
    return scene.admin(
        "select kind, charged_micros, revenue_nano_usd from credits.revenue_of_requests(%s, '-infinity', 'infinity')"
        " order by booked_at",
        scene.organization,
    )


# ---------------------------------------------------------------------------------------------- transfers


def test_a_transfer_moves_credits_grant_by_grant_and_keeps_what_they_are(scene: Scene) -> None:
    shared, own = scene.pool(), scene.pool("personal", owner=scene.user())
    first = scene.grant(shared, 30, expires=NOON + timedelta(days=2), paid=300)
    scene.grant(shared, 100, paid=500, priority=120)
    moved = scene.transfer(shared, own, 50)
    assert len(moved) == 2
    assert scene.grants(own) == [("transfer", 30, 30, "active"), ("transfer", 20, 20, "active")]
    assert scene.grants(shared) == [("purchase", 30, 0, "ended"), ("purchase", 100, 80, "active")]
    rows = scene.admin(
        "select parent_grant_id = %s, priority, expires_at = %s, cost_basis_nano_usd from credits.grants"
        " where grant_id = any (%s) order by priority",
        first, NOON + timedelta(days=2), moved,
    )  # fmt: skip
    assert rows == [(True, 100, True, 300), (False, 120, False, 100)]
    assert (scene.balance(shared).limit, scene.balance(own).limit) == (80, 50)
    assert scene.entries("transfer") == [("transfer", 20, 100), ("transfer", 30, 300)]
    assert scene.findings() == []


def test_a_transfer_never_moves_what_is_held_or_reserved(scene: Scene) -> None:
    user = scene.user()
    shared, own = scene.pool(), scene.pool("personal", owner=scene.user())
    soon = scene.grant(shared, 40, expires=NOON + timedelta(days=1))
    scene.grant(shared, 60)
    scene.share(shared, user, 25)
    scene.hold(30, scene.user())
    with scene.refusal("BR431"):
        scene.transfer(shared, own, 46)
    scene.transfer(shared, own, 45)
    # The hold keeps the grant that it would burn.
    assert scene.admin("select left_micros from credits.grant_states where grant_id = %s", soon) == [(30,)]
    assert scene.balance(own).limit == 45
    assert scene.findings() == []


def test_a_transfer_of_everything_takes_what_there_is(scene: Scene) -> None:
    user = scene.user()
    shared, own = scene.pool(), scene.pool("personal", owner=user)
    scene.grant(own, 40)
    scene.hold(10, user)
    assert len(scene.transfer(own, shared, None)) == 1
    assert scene.transfer(own, shared, None) == []
    assert scene.balance(shared).limit == 30
    assert scene.findings() == []


def test_a_transfer_with_the_same_key_moves_once(scene: Scene) -> None:
    shared, own = scene.pool(), scene.pool("personal", owner=scene.user())
    scene.grant(shared, 40)
    first = scene.transfer(shared, own, 10, key="t")
    assert scene.transfer(shared, own, 10, key="t") == first
    with scene.refusal("BR422"):
        scene.transfer(shared, own, 11, key="t")
    assert scene.balance(own).limit == 10


def test_restricted_credits_stay_restricted(scene: Scene) -> None:
    shared, some = scene.pool(), scene.pool(models="gpt%")
    scene.grant(some, 10)
    scene.grant(shared, 10)
    with scene.refusal("BR400"):
        scene.transfer(some, shared, 5)
    with scene.refusal("BR400"):
        scene.transfer(shared, shared, 5)
    with scene.refusal("BR404"):
        scene.transfer(shared, uuid7(), 5)
    scene.transfer(shared, some, 5)
    assert scene.balance(some).limit == 15


def test_what_is_due_in_the_other_pool_happens_before_credits_arrive_there(scene: Scene) -> None:
    user = scene.user()
    shared, own = scene.pool(), scene.pool("personal", owner=user)
    scene.grant(shared, 100, starts=NOON + timedelta(hours=2), priority=1)
    scene.grant(own, 50, expires=NOON + timedelta(hours=1))
    scene.deduct(20, user)
    scene.switch("personal")
    scene.later(hours=3)
    scene.wake()
    assert scene.grants(own) == [("transfer", 100, 100, "active"), ("purchase", 50, 0, "ended")]
    assert scene.entries("expiry") == [("expiry", 30, 0)]
    poured = scene.admin("select poured_at from credits.burns where organization_id = %s", scene.organization)
    assert poured == [(NOON + timedelta(hours=1),)]
    assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- refunds


def test_a_refund_goes_back_to_the_grants_that_paid_last_first(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 30, priority=1, paid=300)
    scene.grant(pool, 30, priority=2)
    request = scene.deduct(50, user).request_id
    assert scene.refund(request, 25) == 25
    assert scene.grants(pool) == [("purchase", 30, 5, "active"), ("purchase", 30, 30, "active")]
    assert scene.balance(pool) == Balance(85, 50, 0, 0)
    assert scene.refund(request, 5) == 5
    assert scene.refund(request) == 20
    assert scene.grants(pool) == [("purchase", 30, 30, "active"), ("purchase", 30, 30, "active")]
    assert sum(row[1] for row in scene.entries("refund")) == 50
    assert sum(row[2] for row in scene.entries("refund")) == 300
    assert [row[:2] for row in scene.charges(request)] == [(0, 50), (2, -25), (2, -5), (2, -20)]
    assert sum(row[2] for row in _value(scene)) == 0
    assert scene.deduct(60, user).outcome is ACCEPTED
    assert scene.findings() == []


def test_no_more_is_refunded_than_was_charged(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100)
    request = scene.deduct(50, user).request_id
    with scene.refusal("BR432"):
        scene.refund(request, 51)
    scene.refund(request, 30)
    with scene.refusal("BR432"):
        scene.refund(request, 21)
    with scene.refusal("BR400"):
        scene.refund(request, 0)
    with scene.refusal("BR404"):
        scene.refund(uuid7())
    assert scene.refund(request, key="rest") == 20
    assert scene.refund(request, key="rest") == 20
    with scene.refusal("BR432"):
        scene.refund(request)
    assert scene.findings() == []


def test_what_comes_back_to_an_expired_grant_expires(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 30, expires=NOON + timedelta(hours=1), paid=30, rolls=(0, 5))
    scene.grant(pool, 30)
    request = scene.deduct(40, user).request_id
    scene.later(hours=2)
    scene.refund(request)
    assert scene.grants(pool) == [("purchase", 30, 0, "ended"), ("purchase", 30, 30, "active")]
    assert scene.entries("expiry") == [("expiry", 30, 30)]
    assert scene.balance(pool) == Balance(70, 40, 0, 0)
    assert scene.findings() == []


def test_caps_and_shares_have_refunded_room_again(scene: Scene) -> None:
    user, other, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 200)
    cap = scene.limit(60, scope="user", of=user, period="day")
    calls = scene.limit(5, metric="calls", period="day")
    share = scene.share(pool, user, 50)
    capped = scene.share(pool, other, 20, kind="capped", period="day")
    requests = [scene.deduct(50, user).request_id, scene.deduct(20, other).request_id]
    assert scene.deduct(1, user).outcome is REFUSED
    for request in requests:
        scene.refund(request, 20)
    assert (scene.used(cap), scene.used(calls), scene.used(capped)) == ((30, 0), (2, 0), (0, 0))
    assert scene.balance(share) == Balance(70, 50, 0, 0)
    assert scene.deduct(21, user).outcome is REFUSED
    assert scene.deduct(20, user).outcome is ACCEPTED
    assert scene.findings() == []
    # A share that is set anew keeps what came back.
    scene.share(pool, user, 60)
    assert scene.balance(share) == Balance(80, 70, 0, 0)
    assert scene.findings() == []


def test_the_open_part_gets_back_what_a_share_that_goes_on_there_took(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 10, when_empty="open_part")
    request = scene.deduct(30, user).request_id
    scene.refund(request)
    assert scene.balance(share).limit == 10
    assert scene.balance(scene.open_part(pool)).limit == 120
    assert scene.findings() == []


def test_a_request_that_several_pools_paid_gets_it_back_in_each(scene: Scene) -> None:
    user = scene.user()
    own, shared = scene.pool("personal", owner=user), scene.pool()
    scene.grant(own, 20)
    scene.grant(shared, 100)
    request = scene.deduct(50, user).request_id
    assert scene.refund(request, 40) == 40
    assert (scene.balance(own), scene.balance(shared)) == (Balance(30, 20, 0, 0), Balance(130, 30, 0, 0))
    assert scene.findings() == []


def test_refunded_debt_is_no_debt(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 10)
    request = scene.settle(scene.hold(10, user), 25).request_id
    assert scene.balance(pool) == Balance(10, 25, 0, 15)
    scene.refund(request, 20)
    assert scene.balance(pool) == Balance(30, 25, 0, 0)
    scene.grant(pool, 1)  # pours
    assert scene.grants(pool)[:2] == [("refund", 15, 0, "ended"), ("purchase", 10, 5, "active")]
    assert scene.findings() == []


def test_a_refund_makes_an_estimate_final(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100)
    request = scene.hold(30, user, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    assert scene.refund(request) == 30
    verdict = scene.settle(request, 12, user)
    assert (verdict.outcome, verdict.charged_micros) == (Outcome.KNOWN, 30)
    assert scene.balance(pool) == Balance(130, 30, 0, 0)
    assert scene.findings() == []


def test_corrections_are_refunded_with_their_request(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100, paid=1000)
    request = scene.hold(30, user, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.deduct(10, user)
    scene.settle(request, 12, user)
    assert scene.refund(request) == 12
    assert scene.balance(pool) == Balance(112, 22, 0, 0)
    assert scene.findings() == []
    assert sum(row[2] for row in _value(scene)) == 100


def test_no_grant_gets_back_more_than_it_paid(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 10, priority=1)
    scene.grant(pool, 10, priority=2)
    first = scene.hold(10, user, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    second = scene.deduct(10, user).request_id
    scene.settle(first, 5, user)  # takes back the last that was burnt, which was the second's
    third = scene.deduct(5, user).request_id
    for request in (first, second, third):
        scene.refund(request)
    assert scene.grants(pool) == [
        ("purchase", 10, 5, "active"),
        ("purchase", 10, 10, "active"),
        ("refund", 5, 5, "active"),
    ]
    assert scene.balance(pool) == Balance(40, 20, 0, 0)
    assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- roll-over


def test_at_its_end_a_grant_rolls_over_within_its_bounds(scene: Scene) -> None:
    for left, expected in ((0, 20), (10, 20), (30, 30), (90, 50)):
        user = scene.user()
        pool = scene.pool("personal", owner=user)
        scene.grant(pool, 100, expires=scene.now + timedelta(days=1), rolls=(20, 50), paid=100)
        scene.deduct(100 - left, user)
        scene.later(days=2)
        scene.wake()
        assert scene.balance(pool) == Balance(100 - left + expected, 100 - left, 0, 0)
        assert ("roll_over", expected, expected, "active") in scene.grants(pool)
        assert scene.admin(
            "select cost_basis_nano_usd from credits.grants where source = 'roll_over' and pool_id = %s", pool
        ) == [(min(left, expected),)]
    assert scene.findings() == []


def test_without_bounds_nothing_rolls_over(scene: Scene) -> None:
    pool = scene.pool()
    scene.grant(pool, 100, expires=NOON + timedelta(days=1))
    scene.later(days=1)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 100, 0, "ended")]


def test_what_a_hold_frees_after_the_end_rolls_over_within_the_same_bounds(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100, expires=NOON + timedelta(days=1), rolls=(0, 50))
    request = scene.hold(70, user, lease_seconds=10**6)
    scene.later(days=1)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 100, 70, "lingering"), ("roll_over", 30, 30, "active")]
    scene.settle(request, 40)
    scene.wake()
    assert sorted((g[1], g[2]) for g in scene.grants(pool)) == [(20, 20), (30, 30), (100, 0)]
    assert scene.entries("expiry") == [("expiry", 10, 0)]
    assert scene.findings() == []


def test_what_rolled_over_expires_at_its_own_end_and_rolls_no_further(scene: Scene) -> None:
    pool = scene.pool()
    scene.grant(pool, 100, expires=NOON + timedelta(days=1), rolls=(0, 50), rolls_until=NOON + timedelta(days=2))
    scene.later(days=3)
    scene.wake()
    assert scene.balance(pool).limit == 0
    assert scene.entries("expiry", "roll_over") == [("expiry", 50, 0), ("roll_over", 50, 0), ("expiry", 50, 0)]
    assert scene.findings() == []


def test_what_is_freed_after_the_time_of_the_roll_over_expires(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100, expires=NOON + timedelta(days=1), rolls=(0, 50), rolls_until=NOON + timedelta(days=2))
    request = scene.hold(100, user, lease_seconds=10**6)
    scene.later(days=3)
    scene.release(request)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 100, 0, "ended")]
    assert scene.findings() == []


def test_what_is_freed_at_the_very_end_of_the_roll_over_expires_too(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100, expires=NOON + timedelta(days=1), rolls=(0, 50), rolls_until=NOON + timedelta(days=2))
    request = scene.hold(100, user, lease_seconds=10**6)
    scene.later(days=2)
    scene.release(request)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 100, 0, "ended")]


def test_a_voided_grant_makes_up_nothing(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    grant = scene.grant(pool, 100, expires=NOON + timedelta(days=1), rolls=(20, 50))
    scene.deduct(100, user)
    scene.wake()
    scene.void(grant)
    scene.later(days=2)
    scene.wake()
    assert scene.balance(pool) == Balance(100, 100, 0, 0)
    assert scene.findings() == []


def test_bounds_must_make_sense(scene: Scene) -> None:
    pool = scene.pool()
    end = NOON + timedelta(days=1)
    for rolls in ((5, 4), (-1, 4)):
        with scene.refusal("BR400"):
            scene.grant(pool, 10, expires=end, rolls=rolls)
    with scene.refusal("BR400"):
        scene.grant(pool, 10, rolls=(1, 4))
    with scene.refusal("BR400"):
        scene.grant(pool, 10, expires=end, rolls=(1, 4), rolls_until=end)
    scene.grant(pool, 10, expires=end, rolls=(4, 4), rolls_until=end + timedelta(microseconds=1))
    assert scene.balance(pool) == Balance(10, 0, 0, 0)


# ---------------------------------------------------------------------------------------------- schedules


def _starts(scene: Scene, schedule: UUID) -> list[datetime]:
    rows = scene.admin("select effective_at from credits.grants where schedule_id = %s order by 1", schedule)
    return [row[0] for row in rows]


def test_a_month_without_the_anchors_day_has_its_last_one_and_nothing_drifts(scene: Scene) -> None:
    pool = scene.pool()
    anchor = datetime(2026, 8, 31, 10, 30, tzinfo=UTC)
    schedule = scene.schedule(pool, 100, anchor=anchor)
    scene.now = datetime(2027, 4, 1, tzinfo=UTC)
    scene.wake()
    days = [(8, 31), (9, 30), (10, 31), (11, 30), (12, 31), (1, 31), (2, 28), (3, 31)]
    assert [(at.month, at.day) for at in _starts(scene, schedule)] == days
    assert {(at.hour, at.minute) for at in _starts(scene, schedule)} == {(10, 30)}
    assert scene.balance(pool) == Balance(100, 0, 0, 0)
    assert len(scene.entries("grant")) == 8
    assert len(scene.entries("expiry")) == 7
    assert scene.findings() == []


def test_occurrences_come_at_their_instant_by_the_clocks_of_the_zone(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.now = datetime(2026, 10, 24, 20, tzinfo=UTC)  # clocks fall back in the night to the 25th
    schedule = scene.schedule(pool, 10, "day", zone="Europe/Paris", anchor=datetime(2026, 10, 24, 4, 30, tzinfo=UTC))
    scene.now = datetime(2026, 10, 25, 5, 30, tzinfo=UTC) - timedelta(microseconds=1)
    assert scene.deduct(1, user).outcome is REFUSED
    scene.later(microseconds=1)
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert _starts(scene, schedule) == [scene.now]
    assert scene.findings() == []


def test_a_schedule_ends_at_its_end_and_when_it_is_canceled(scene: Scene) -> None:
    pool = scene.pool()
    ends = NOON + timedelta(days=2)
    ending = scene.schedule(pool, 10, "day", ends=ends)
    canceled = scene.schedule(pool, 1, "day", every=2)
    scene.later(days=1)
    scene.cancel(canceled)
    scene.cancel(canceled)
    scene.later(days=9)
    scene.wake()
    assert _starts(scene, ending) == [NOON, NOON + timedelta(days=1)]
    assert _starts(scene, canceled) == [NOON]
    assert scene.balance(pool).limit == 0
    with scene.refusal("BR404"):
        scene.cancel(uuid7())
    assert scene.findings() == []


def test_each_occurrence_rolls_over_into_the_time_of_the_next(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.schedule(pool, 100, rolls=(0, 30), anchor=NOON)
    scene.deduct(50, user)
    scene.now = datetime(2026, 7, 10, 12, tzinfo=UTC)
    scene.wake()
    assert scene.balance(pool) == Balance(50 + 130, 50, 0, 0)
    scene.now = datetime(2026, 8, 10, 12, tzinfo=UTC)
    scene.wake()
    assert scene.balance(pool) == Balance(50 + 130, 50, 0, 0)  # what had rolled over is gone, 30 more rolled over
    assert scene.findings() == []


def test_grants_of_a_schedule_may_last_or_have_a_time_of_their_own(scene: Scene) -> None:
    pool = scene.pool()
    scene.schedule(pool, 100, "week", is_lasting=True)
    scene.schedule(pool, 10, "week", lasts=timedelta(days=10))
    scene.later(days=15)
    scene.wake()
    assert scene.balance(pool).limit == 300 + 20
    assert scene.findings() == []


def test_a_grant_of_a_schedule_lasts_no_eternity(scene: Scene) -> None:
    pool = scene.pool()
    add = (
        "select credits.add_schedule(%s, %s, %s, 'plan', 10, 100::smallint, false, 0, 'UTC', %s, 'month', 1,"
        " %s::interval, false, null, null, null, null, null, %s, %s)"
    )
    tomorrow = NOON + timedelta(days=1)
    with scene.refusal("BR400"):
        scene.call(add, scene.organization, uuid7(), pool, tomorrow, "200000 years", "a", scene.now)
    scene.call(add, scene.organization, uuid7(), pool, tomorrow, "1000 years", "b", scene.now)
    scene.now = tomorrow
    scene.wake()
    assert scene.balance(pool).limit == 10


def test_nobody_is_paid_for_a_grant(scene: Scene) -> None:
    pool = scene.pool()
    with scene.refusal("BR400"):
        scene.grant(pool, 10, paid=-1)
    with scene.refusal("BR400"):
        scene.schedule(pool, 10, anchor=NOON + timedelta(days=1), paid=-1)
    scene.grant(pool, 10, paid=0)
    assert scene.balance(pool) == Balance(10, 0, 0, 0)


def test_a_schedule_with_the_same_key_is_one(scene: Scene) -> None:
    pool = scene.pool()
    first = scene.schedule(pool, 100, key="plan")
    assert scene.schedule(pool, 100, key="plan") == first
    with scene.refusal("BR422"):
        scene.schedule(pool, 101, key="plan")
    for wrong in ({"unit": "hour"}, {"every": 0}, {"zone": "Mars"}, {"ends": NOON}, {"lasts": timedelta(0)}):
        with scene.refusal("BR400"):
            scene.schedule(pool, 100, **{"unit": "month", **wrong})  # type: ignore[arg-type]
    assert scene.balance(pool).limit == 100


# ---------------------------------------------------------------------------------------------- money and reasons


def test_the_value_of_what_was_burnt_adds_up_to_the_last_nano_dollar(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 7, priority=1, paid=100)
    scene.grant(pool, 10, priority=2, free=True, paid=55)
    scene.grant(pool, 10, priority=3, paid=7)
    for _ in range(9):
        scene.deduct(3, user)
    values = [row[2] for row in _value(scene)]
    assert values == [42, 43, 15, 0, 0, 0, 2, 2, 3]
    scene.wake()
    scene.grant(pool, 1)  # pours
    assert [row[2] for row in _value(scene)] == values
    assert scene.findings() == []


def test_each_stretch_knows_why_its_grant_burnt_before_the_next(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    for grant in ({"priority": 1}, {"expires": NOON + timedelta(days=1)}, {"free": True}, {}):
        scene.grant(pool, 10, **grant)  # type: ignore[arg-type]
    scene.later(seconds=1)
    scene.grant(pool, 10)
    scene.deduct(45, user)
    reasons = "select reason from credits.stretches(%s) order by start_micros"
    expected = [("priority",), ("expiry",), ("free_before_paid",), ("effective",), ("only",)]
    assert scene.admin(reasons, scene.organization) == expected
    scene.grant(pool, 1)
    assert scene.admin(reasons, scene.organization) == expected


# ---------------------------------------------------------------------------------------------- the switch


def _pools(scene: Scene) -> dict[tuple[str, UUID | None], int]:
    """What can be spent in each open pool."""
    rows = scene.admin(
        "select p.kind, p.owner_user_id, b.limit_amount - b.used_amount - b.held_amount from credits.pools p "
        "join credits.balances b on (b.organization_id, b.balance_id) = (p.organization_id, p.pool_id) "
        "where p.organization_id = %s and p.closed_at is null",
        scene.organization,
    )
    return {(row[0], row[1]): row[2] for row in rows}


def test_to_personal_pools_goes_what_is_left_of_shares_then_the_same_to_each_and_the_rest_aside(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(3))
    pool = scene.pool()
    scene.grant(pool, 60, expires=NOON + timedelta(days=5), paid=600)
    scene.grant(pool, 60)
    scene.share(pool, users[0], 30)
    scene.deduct(10, users[0])
    answer = scene.switch("personal", key="s")
    assert answer == {"moved_micros": 110, "residual_micros": 0, "held_micros": 0, "pools": 1}
    assert scene.switch("personal", key="s") == answer
    assert _pools(scene) == {("personal", users[0]): 50, ("personal", users[1]): 30, ("personal", users[2]): 30}
    # Everybody has their part of every grant.
    rows = scene.admin(
        "select p.owner_user_id, sum(g.amount_micros)::int, sum(g.cost_basis_nano_usd)::int from credits.grants g "
        "join credits.pools p using (organization_id, pool_id) "
        "where g.organization_id = %s and g.expires_at = %s and p.kind = 'personal' group by 1 order by 1",
        scene.organization, NOON + timedelta(days=5),
    )  # fmt: skip
    assert [row[1] for row in rows] == [22, 14, 14]
    assert sum(row[2] for row in rows) == 500
    assert scene.deduct(30, users[1]).outcome is ACCEPTED
    assert scene.deduct(1, users[1]).outcome is REFUSED
    assert scene.findings() == []


def test_what_cannot_be_divided_is_in_the_residual_pool(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(3))
    scene.grant(scene.pool(), 11)
    assert scene.switch("personal")["residual_micros"] == 2
    assert _pools(scene) == {**{("personal", user): 3 for user in users}, ("residual", None): 2}
    assert scene.switch("shared") == {"moved_micros": 11, "residual_micros": 0, "held_micros": 0, "pools": 4}
    assert _pools(scene) == {("shared", None): 11}
    assert scene.findings() == []


def test_shares_larger_than_the_pool_get_their_part_of_it(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 100)
    scene.share(pool, users[0], 150, oversubscribe=True)
    scene.share(pool, users[1], 50, oversubscribe=True)
    scene.switch("personal")
    assert _pools(scene) == {("personal", users[0]): 75, ("personal", users[1]): 25}
    assert scene.findings() == []


def test_what_an_open_hold_frees_after_the_switch_goes_to_who_held_it(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 100)
    one, other, service = (
        scene.hold(20, users[0]),
        scene.hold(20, users[1]),
        scene.hold(10, None, api_key_id=scene.key()),
    )
    assert scene.switch("personal") == {"moved_micros": 50, "residual_micros": 0, "held_micros": 50, "pools": 1}
    assert scene.settle(one, 5).charged_micros == 5
    scene.wake()
    assert _pools(scene) == {("personal", users[0]): 40, ("personal", users[1]): 25, ("residual", None): 0}
    scene.release(other)
    scene.settle(service, 4)
    scene.wake()
    assert _pools(scene) == {("personal", users[0]): 40, ("personal", users[1]): 45, ("residual", None): 6}
    assert scene.balance(pool) == Balance(9, 9, 0, 0)
    assert scene.findings() == []


def test_who_used_more_than_was_held_before_the_switch_pays_it_from_the_new_pool(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 100)
    request = scene.hold(20, users[0])
    scene.switch("personal")
    scene.settle(request, 35)
    scene.wake()
    assert _pools(scene) == {("personal", users[0]): 25, ("personal", users[1]): 40}
    assert scene.balance(pool) == Balance(35, 35, 0, 0)
    assert scene.findings() == []


def test_so_does_who_was_refused_under_that_request_before(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool, request = scene.pool(), uuid7()
    scene.grant(pool, 100)
    assert scene.authorize(101, users[0], request).outcome is Outcome.REFUSED
    scene.hold(20, users[0], request=request)
    scene.switch("personal")
    scene.settle(request, 35)
    scene.wake()
    assert _pools(scene) == {("personal", users[0]): 25, ("personal", users[1]): 40}
    assert scene.balance(pool) == Balance(35, 35, 0, 0)
    assert scene.findings() == []


def test_a_hold_on_a_personal_pool_frees_into_the_shared_one(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 50)
    request = scene.hold(20, user)
    assert scene.switch("shared")["held_micros"] == 20
    assert scene.deduct(30, scene.user()).outcome is ACCEPTED
    scene.settle(request, 5)
    scene.wake()
    assert _pools(scene) == {("shared", None): 15}
    assert scene.findings() == []


def test_what_a_schedule_brings_after_the_switch_is_divided_too(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.schedule(pool, 100, "day")
    scene.grant(pool, 10, starts=NOON + timedelta(hours=30))
    scene.switch("personal")
    scene.later(days=1, hours=7)
    scene.wake()
    assert _pools(scene) == {("personal", user): 55 for user in users}
    assert scene.balance(pool).limit == 0
    assert scene.findings() == []


def test_a_refund_of_a_charge_before_the_switch_goes_to_who_asked(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    scene.grant(scene.pool(), 100)
    request = scene.deduct(20, users[0]).request_id
    scene.switch("personal")
    scene.refund(request)
    assert _pools(scene) == {("personal", users[0]): 60, ("personal", users[1]): 40}
    assert scene.findings() == []


def test_a_correction_of_a_charge_before_the_switch_is_settled_with_who_asked(scene: Scene) -> None:
    users, pool = [scene.user() for _ in range(3)], scene.pool()
    scene.grant(pool, 150)
    requests = [scene.hold(30, user, flags=Flag.SENT) for user in users[:2]]
    scene.later(hours=1)
    scene.expire()
    scene.switch("personal")
    own = [scene.pool("personal", owner=user) for user in users]
    assert [scene.balance(each).limit for each in own] == [30, 30, 30]
    scene.settle(requests[0], 45, users[0])
    scene.settle(requests[1], 10, users[1])
    scene.wake()
    assert [scene.balance(each).limit for each in own] == [15, 50, 30]
    assert scene.balance(pool) == Balance(55, 55, 0, 0)
    assert scene.findings() == []
    scene.switch("shared")
    assert scene.balance(pool) == Balance(150, 55, 0, 0)


def test_a_correction_of_a_personal_charge_is_settled_with_the_shared_pool_after_the_switch(scene: Scene) -> None:
    users = [scene.user() for _ in range(2)]
    own = [scene.pool("personal", owner=user) for user in users]
    for each in own:
        scene.grant(each, 50)
    requests = [scene.hold(30, user, flags=Flag.SENT) for user in users]
    scene.later(hours=1)
    scene.expire()
    scene.switch("shared")
    shared = scene.pool()
    scene.settle(requests[0], 45, users[0])
    scene.settle(requests[1], 10, users[1])
    scene.wake()
    assert [scene.balance(each) for each in own] == [Balance(45, 45, 0, 0), Balance(10, 10, 0, 0)]
    assert scene.balance(shared) == Balance(45, 0, 0, 0)
    assert scene.findings() == []


def test_what_comes_back_to_a_closed_personal_pool_is_its_owners_when_credits_are_shared_no_more(scene: Scene) -> None:
    user, other = scene.user(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 50)
    charged = scene.deduct(20, user).request_id
    scene.switch("shared")
    assert scene.deduct(30, other).outcome is ACCEPTED
    scene.switch("personal")
    assert scene.deduct(1, user).outcome is not ACCEPTED
    assert scene.refund(charged) == 20
    assert scene.findings() == []
    assert scene.deduct(20, user).outcome is ACCEPTED
    assert scene.balance(own) == Balance(40, 40, 0, 0)


def test_what_pays_the_debt_of_a_closed_pool_ends_and_rolls_over_there_at_its_own_instant(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 20)
    request = scene.hold(10, user)
    scene.switch("shared")
    shared = scene.pool()
    scene.grant(shared, 12, priority=1, expires=scene.now + timedelta(hours=2), rolls=(5, 100))
    scene.settle(request, 22)
    scene.wake()
    assert scene.balance(own) == Balance(22, 22, 0, 0), "12 came from the shared credits, as a whole grant"
    assert scene.balance(shared) == Balance(10, 0, 0, 0)
    scene.later(hours=3)
    scene.wake()
    assert scene.balance(shared) == Balance(15, 0, 0, 0), "the least of 5 rolled over and went back"
    assert scene.findings() == []


def test_a_refund_into_a_closed_pool_that_an_expired_grant_lingers_in_is_for_the_running_request(scene: Scene) -> None:
    user = scene.user()
    pool = scene.pool()
    scene.grant(pool, 20, priority=50)
    charged = scene.deduct(20, user).request_id
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    request = scene.hold(8, user, lease_seconds=10**6)
    scene.switch("personal")
    scene.later(hours=2)
    assert scene.refund(charged, 3) == 3
    assert _pools(scene) == {("personal", user): 0}
    assert scene.balance(pool) == Balance(limit=28, used=20, held=8, excess=0), "3 of the 8 that lingered expired"
    scene.settle(request, 8)
    assert scene.findings() == []


def test_an_organization_that_owes_does_not_switch(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 10)
    scene.settle(scene.hold(10, user), 25)
    with scene.refusal("BR433"):
        scene.switch("personal")
    with scene.refusal("BR400"):
        scene.switch("sideways")


def test_back_and_forth_nothing_is_lost(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(3))
    pool = scene.pool()
    scene.grant(pool, 1000, paid=777, expires=NOON + timedelta(days=9))
    scene.grant(pool, 13, free=True)
    held = []
    for turn in range(4):
        held.append(scene.hold(7, users[turn % 3]))
        scene.deduct(11, users[turn % 3])
        scene.switch("personal" if turn % 2 == 0 else "shared")
        scene.wake()
    for request in held:
        scene.settle(request, 3)
    scene.wake()
    assert sum(_pools(scene).values()) == 1013 - 4 * 11 - 4 * 3
    assert sum(row[2] for row in _value(scene)) == sum(
        row[0] for row in scene.admin("select sum(value_nano_usd)::int from credits.stretches(%s)", scene.organization)
    )
    assert scene.findings() == []


def test_sources_that_are_known_are_those_of_the_tables(scene: Scene) -> None:
    """A list of grants reads every source that there may be, and a schedule names one that its grants can have."""
    checks = scene.admin(
        "select pg_get_constraintdef(oid) from pg_constraint"
        " where conname in ('grants_source_known', 'grant_schedules_source_known')"
    )
    assert [set(re.findall(r"'(\w+)'", check)) for (check,) in checks] == [{each.value for each in GrantSource}] * 2


# ---------------------------------------------------------------------------------------------- what was so before


def test_what_a_hold_kept_of_an_expired_grant_expires_when_the_hold_ends(scene: Scene) -> None:
    """Until then it could be paid with: the balance of an instant in between has it."""
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100, expires=NOON + timedelta(hours=1))
    request = scene.hold(30, user, lease_seconds=86400)
    scene.now = NOON + timedelta(hours=3)
    assert scene.settle(request, 20).outcome is ACCEPTED
    scene.now = NOON + timedelta(hours=4)
    scene.fold()
    happened = scene.admin(
        "select amount, happened_at from ledger.entries where organization_id = %s and kind = 'expiry' order by 2",
        scene.organization,
    )
    assert happened == [(70, NOON + timedelta(hours=1)), (10, NOON + timedelta(hours=3))]


def test_what_a_correction_takes_back_from_a_grant_was_burnt_until_then(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    grant = scene.grant(pool, 100)
    request = scene.hold(30, user, flags=Flag.SENT)
    scene.now = NOON + timedelta(hours=1)
    scene.expire()
    poured = scene.now = NOON + timedelta(hours=2)
    scene.grant(pool, 5)  # pours
    taken = scene.now = NOON + timedelta(hours=3)
    scene.settle(request, 12)
    assert scene.admin(
        "select start_micros, end_micros, grant_id, poured_at, taken_back_at from credits.unburns"
        " where organization_id = %s",
        scene.organization,
    ) == [(12, 30, grant, poured, taken)]
    assert scene.findings() == []


def test_what_was_used_before_a_transfer_came_is_paid_by_the_grants_there_were(scene: Scene) -> None:
    user = scene.user()
    shared, own = scene.pool(), scene.pool("personal", owner=user)
    scene.grant(own, 100)
    scene.grant(shared, 50, priority=10)
    scene.deduct(20, user)
    scene.now = NOON + timedelta(hours=1)
    scene.transfer(shared, own, 50)
    scene.fold()
    assert scene.grants(own) == [("transfer", 50, 50, "active"), ("purchase", 100, 80, "active")]


def test_switching_back_and_forth_does_not_grind_grants_to_dust(scene: Scene) -> None:
    for _ in range(5):
        scene.user()
    pool = scene.pool()
    scene.grant(pool, 1000, paid=999, expires=NOON + timedelta(days=9))
    scene.grant(pool, 7, free=True)
    for _ in range(3):
        scene.switch("personal")
        scene.switch("shared")
    spendable = [row[1:3] for row in scene.grants(pool) if row[3] == "active"]
    assert spendable == [(1000, 1000), (7, 7)]
    value = "select sum(value_left_nano_usd)::int from credits.grant_states where organization_id = %s"
    assert scene.admin(value, scene.organization) == [(999,)]
    assert scene.findings() == []


@pytest.mark.parametrize("source", [GrantSource.TOP_UP, GrantSource.FORGIVENESS, GrantSource.REFUND])
async def test_what_comes_of_a_command_of_its_own_is_granted_by_no_other(org: Org, source: GrantSource) -> None:
    place = {"organization_id": org.organization_id}
    async with org.tenant() as conn:
        what = {"pool_id": await pool_for(conn, **place), "source": source, "amount_micros": credits(5), **place}
        with pytest.raises(InvalidGrant, match=source.value):
            await add_grant(conn, **what, idempotency_key="once")
        with pytest.raises(InvalidGrant, match=source.value):
            await add_schedule(conn, **what, unit=Unit.MONTH, zone="UTC", by=OPERATOR, idempotency_key="again")


def test_a_transfer_is_of_some_amount(scene: Scene) -> None:
    pool, own = scene.pool(), scene.pool("personal", owner=scene.user())
    scene.grant(pool, 100)
    for amount in (0, -1):
        with scene.refusal("BR400"):
            scene.transfer(pool, own, amount)
    with scene.refusal("BR400"):
        scene.transfer(pool, pool, 1)
    assert scene.entries("transfer") == []


def test_a_schedule_that_makes_no_sense_is_none(scene: Scene) -> None:
    pool, day = scene.pool(), timedelta(days=1)
    for amount in (0, -1):
        with scene.refusal("BR400"):
            scene.schedule(pool, amount)
    for wrong in (
        {"rolls": (5, 3)},
        {"rolls": (-1, 3)},
        {"lasts": timedelta(0)},
        {"lasts": -day},
        {"lasts": day, "is_lasting": True},
        {"rolls": (1, 2), "is_lasting": True},
        {"anchor": scene.now - 51 * 365.25 * day},
        {"anchor": scene.now + 51 * 365.25 * day},
        {"zone": "Europe/Nowhere"},
        {"every": 0},
        {"every": 1001},
        {"unit": "hour"},
    ):
        with scene.refusal("BR400"):
            scene.schedule(pool, 10, **wrong)  # type: ignore[arg-type]
    assert scene.grants(pool) == []


def test_schedules_of_other_pools_come_at_their_own_time(scene: Scene) -> None:
    one, two = scene.pool(), scene.pool(models="gpt%")
    scene.schedule(one, 10, "day", anchor=scene.now + timedelta(hours=1))
    scene.schedule(two, 20, "day", anchor=scene.now + timedelta(minutes=30))
    scene.later(hours=2)
    scene.wake()
    assert (scene.balance(one).limit, scene.balance(two).limit) == (10, 20)
    assert scene.findings() == []


def test_bounds_of_a_roll_over_are_two_amounts(scene: Scene) -> None:
    pool, end = scene.pool(), scene.now + timedelta(days=1)
    for wrong in ((1, None), (None, 1), (0, 10**15 + 1)):
        with scene.refusal("BR400"):
            scene.grant(pool, 10, expires=end, rolls=wrong, rolls_until=end + timedelta(days=1))  # type: ignore[arg-type]
    scene.grant(pool, 10, expires=end, rolls=(0, 10**15), rolls_until=end + timedelta(days=1))


def test_what_has_ended_ends_once_whatever_ends_later(scene: Scene) -> None:
    pool, day = scene.pool(), timedelta(days=1)
    voided, _, _ = (
        scene.grant(pool, 30, expires=scene.now + nr * day, rolls=(5, 10), rolls_until=scene.now + 9 * day)
        for nr in (1, 1, 2)
    )
    scene.void(voided)
    for _ in range(3):
        scene.later(days=1)
        scene.wake()
    assert [amount for _, amount, _ in scene.entries("roll_over")] == [10, 10]
    assert scene.balance(pool).limit == 20
    assert scene.findings() == []


def test_a_hold_keeps_of_an_expired_grant_no_more_than_it_has(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10, expires=scene.now + timedelta(minutes=5))
    scene.grant(pool, 100)
    scene.hold(15, user)
    scene.later(minutes=5)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 10, 10, "lingering"), ("purchase", 100, 100, "active")]
    assert scene.balance(pool) == Balance(110, 0, 15, 0)
    assert scene.findings() == []


def test_a_hold_that_another_grant_pays_keeps_nothing_of_an_expired_one(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 50, priority=1)
    scene.grant(pool, 10, expires=scene.now + timedelta(minutes=5))
    scene.hold(5, user)
    scene.later(minutes=5)
    scene.wake()
    assert scene.grants(pool) == [("purchase", 50, 50, "active"), ("purchase", 10, 0, "ended")]
    assert scene.balance(pool) == Balance(50, 0, 5, 0)
    assert scene.findings() == []


def test_what_makes_up_a_least_roll_over_is_spent_at_once(scene: Scene) -> None:
    shared, user, end = scene.pool(), scene.user(), scene.now + timedelta(days=1)
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10, expires=end, rolls=(20, 40), rolls_until=end + timedelta(days=1))
    scene.deduct(10, user)
    scene.changed()
    scene.deduct(1, user)  # by a chain without their own pool
    scene.now = end
    scene.deduct(20, user)
    assert (scene.used(own), scene.used(shared)) == ((30, 0), (1, 0))
    assert scene.findings() == []


def test_grants_of_several_pools_that_start_together_each_start_in_their_own(scene: Scene) -> None:
    start = scene.now + timedelta(hours=1)
    pools = [scene.pool(models=models) for models in (None, "a%", "b%")]
    for nr, pool in enumerate(pools, start=1):
        scene.grant(pool, nr * 10, starts=start)
    scene.now = start
    scene.wake()
    assert [scene.balance(pool).limit for pool in pools] == [10, 20, 30]
    assert scene.findings() == []


def test_what_rolls_over_at_one_instant_burns_in_the_order_of_what_it_was(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    end = scene.now + timedelta(days=1)
    made = [scene.grant(pool, 10, expires=end, rolls=(0, 10), rolls_until=end + timedelta(days=1)) for _ in range(6)]
    scene.later(days=1)
    scene.deduct(35, user)
    scene.admin("select credits.pour(%s, %s, %s)", scene.organization, pool, scene.now)
    states = "credits.grants join credits.grant_states using (organization_id, grant_id)"
    of = f"select parent_grant_id, left_micros from {states} where organization_id = %s and source = 'roll_over'"
    rolled = dict(scene.admin(of, scene.organization))
    assert [rolled[grant] for grant in made] == [0, 0, 0, 5, 10, 10]
