"""Shares of a pool: what may be set, changed and given away, and when each is renewed."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tests.credits.scenes import Balance, Scene

from bursar.clock import uuid7
from bursar.credits.moves import Outcome

ACCEPTED, REFUSED = Outcome.ACCEPTED, Outcome.REFUSED


def set_share(scene: Scene, pool: UUID, user: UUID, amount: int, key: str) -> UUID:
    """A lump under a key of the test's choosing."""
    return scene.call(  # type: ignore[no-any-return]
        "select credits.allocate(%s, %s, %s, %s, 'reserved', 'none', %s, 'stops', false, null, %s, %s)",
        scene.organization, uuid7(), pool, user, amount, key, scene.now,
    )  # fmt: skip


def test_a_share_is_set_once_under_one_key(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = set_share(scene, pool, user, 60, "k")
    scene.share(pool, user, 70)
    assert set_share(scene, pool, user, 60, "k") == share
    with scene.refusal("BR422"):
        set_share(scene, pool, user, 61, "k")
    assert scene.balance(share).limit == 70


def test_only_shared_pools_have_shares(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 100)
    for pool in (own, uuid7()):
        with scene.refusal("BR404"):
            scene.share(pool, user, 10)
    shared = scene.pool()
    for carry in (-1, 10**15 + 1):
        with scene.refusal("BR400"):
            scene.share(shared, user, 0, period="month", carry=carry)
    shares = "select count(*) from credits.allocations where organization_id = %s"
    assert scene.admin(shares, scene.organization) == [(0,)]


def test_everything_may_be_reserved_and_nothing_more(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    scene.share(pool, user, 100)
    scene.share(pool, user, 40)
    with scene.refusal("BR430"):
        scene.share(pool, other, 61)
    scene.share(pool, other, 60)
    assert scene.balance(scene.open_part(pool)).limit == 0
    assert scene.findings() == []


def test_a_share_of_a_pool_that_has_too_little_can_be_made_smaller(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.deduct(30, scene.user())
    share = scene.share(pool, user, 100, oversubscribe=True)
    scene.share(pool, user, 90)
    assert scene.balance(share).limit == 90
    with scene.refusal("BR430"):
        scene.share(pool, user, 91)
    assert scene.findings() == []


def test_a_share_of_another_kind_or_period_takes_the_place_of_the_one_there_was(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.pool(models="gpt%")
    scene.grant(pool, 100)
    first = scene.share(pool, user, 80)
    scene.deduct(10, user)
    monthly = scene.share(pool, user, 90, period="month")  # what the first one had left is free for it
    assert monthly != first
    assert (scene.balance(first), scene.balance(monthly)) == (Balance(0, 10, 0, 10), Balance(90, 0, 0, 0))
    capped = scene.share(pool, user, 200, kind="capped", period="month")
    assert capped not in (first, monthly)
    assert scene.balance(scene.open_part(pool)).limit == 90
    assert scene.deduct(90, user).outcome is ACCEPTED
    scene.end_share(capped)
    assert scene.share(pool, user, 200, kind="capped", period="month") != capped
    with scene.refusal("BR404"):
        scene.end_share(capped)
    assert scene.findings() == []


def test_a_new_share_holds_for_who_has_spent_before(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.deduct(1, user)
    share = scene.share(pool, user, 10)
    assert scene.deduct(11, user).outcome is REFUSED
    scene.end_share(share)
    assert scene.deduct(99, user).outcome is ACCEPTED


# ---------------------------------------------------------------------------------------------- given away


def test_only_what_a_reserved_share_has_left_is_given_to_another_reserved_one(scene: Scene) -> None:
    pool, gpt = scene.pool(), scene.pool(models="gpt%")
    users = [scene.user() for _ in range(5)]
    scene.grant(pool, 200)
    scene.grant(gpt, 200)
    one, two, ended = (scene.share(pool, user, 30) for user in users[:3])
    capped = scene.share(pool, users[3], 30, kind="capped")
    elsewhere = scene.share(gpt, users[4], 30)
    scene.deduct(0, users[3])
    scene.end_share(ended)
    for share, to in (
        (capped, two), (ended, two), (uuid7(), two), (capped, None), (ended, None), (uuid7(), None),
        (one, capped), (one, ended), (one, elsewhere), (one, one), (one, uuid7()),
    ):  # fmt: skip
        with scene.refusal("BR404"):
            scene.reallocate(share, to, 0)
    with scene.refusal("BR400"):
        scene.reallocate(one, two, -5)
    with scene.refusal("BR460"):
        scene.reallocate(one, two, 31)
    assert scene.reallocate(one, two, 30, key="k") == 30
    assert scene.reallocate(one, two, 30, key="k") == 30
    assert [scene.balance(each).limit for each in (one, two, elsewhere)] == [0, 60, 30]
    assert scene.findings() == []


def test_a_share_that_is_overdrawn_gives_nothing_away(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 10)
    scene.settle(scene.hold(10, user), 25)
    assert scene.reallocate(share, None) == 0
    assert scene.balance(share) == Balance(10, 25, 0, 15)


def test_what_is_given_can_be_spent_at_once(scene: Scene) -> None:
    shared, giver, user = scene.pool(), scene.user(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    one, two = scene.share(shared, giver, 50), scene.share(shared, user, 0)
    scene.deduct(1, user)  # by a chain without the empty share
    scene.reallocate(one, two, 20)
    assert scene.deduct(29, user).outcome is ACCEPTED


# ---------------------------------------------------------------------------------------------- renewed


def periods(scene: Scene, share: UUID) -> list[tuple[Any, ...]]:
    """(start, end, what was used before, carried, lapsed, adjusted) of each period of a share."""
    return scene.admin(
        "select period_start, period_end, opening_micros, carried_micros, lapsed_micros, adjusted_micros"
        " from credits.allocation_periods where allocation_id = %s order by period_start", share,
    )  # fmt: skip


def midnight(month: int, day: int) -> datetime:
    return datetime(2026, month, day, tzinfo=UTC)


def test_each_share_is_renewed_when_its_own_period_is_over(scene: Scene) -> None:
    pool, one, two = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 500)
    daily = scene.share(pool, one, 60, period="day", carry=15)
    monthly = scene.share(pool, two, 60, period="month")
    begun = scene.now
    for user in (one, two):
        scene.deduct(50, user)
    scene.now = midnight(6, 13) + timedelta(hours=5)
    scene.fold()
    assert (scene.balance(daily), scene.balance(monthly)) == (Balance(125, 50, 0, 0), Balance(60, 50, 0, 0))
    assert periods(scene, daily) == [
        (begun, midnight(6, 11), 0, 0, 0, 0),
        (midnight(6, 13), midnight(6, 14), 50, 15, 115, 0),
    ]
    assert periods(scene, monthly) == [(begun, midnight(7, 1), 0, 0, 0, 0)]
    scene.now = midnight(7, 1)
    scene.fold()
    assert scene.balance(monthly) == Balance(110, 50, 0, 0)
    assert scene.findings() == []


def test_what_is_left_is_carried_and_no_more(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 500)
    share = scene.share(pool, user, 60, period="day", carry=50)
    scene.deduct(40, user)
    scene.now = midnight(6, 11)
    scene.fold()
    assert periods(scene, share)[-1][2:] == (40, 20, 0, 0)
    assert scene.balance(share) == Balance(120, 40, 0, 0)
    assert scene.findings() == []


def test_what_was_overdrawn_is_no_part_of_the_next_period(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 500)
    share = scene.share(pool, user, 60, period="day", carry=50)
    scene.settle(scene.hold(60, user), 90)
    scene.now = midnight(6, 11)
    scene.fold()
    assert scene.balance(share) == Balance(150, 90, 0, 0)
    assert scene.findings() == []


def test_in_a_new_zone_a_period_begins_where_the_one_before_it_ended(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 500)
    share = scene.share(pool, user, 60, period="day")
    scene.admin("update identity.organizations set zone = 'Asia/Tokyo' where organization_id = %s", scene.organization)
    scene.changed()
    scene.now = midnight(6, 11)
    scene.fold()
    assert periods(scene, share)[-1][:2] == (midnight(6, 11), midnight(6, 11) + timedelta(hours=15))
    scene.now = midnight(6, 11) + timedelta(hours=15)
    scene.fold()
    assert periods(scene, share)[-1][:2] == (scene.now, scene.now + timedelta(days=1))
    assert scene.findings() == []


def test_what_is_given_away_changes_the_period_of_today(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 500)
    share = scene.share(pool, user, 60, period="day")
    scene.now = midnight(6, 11)
    scene.reallocate(share, None, 25)
    assert [adjusted for *_, adjusted in periods(scene, share)] == [0, -25]
    assert scene.balance(share).limit == 35
    scene.now = midnight(6, 12)
    scene.fold()
    assert scene.balance(share).limit == 60
    assert scene.findings() == []


def test_grants_end_at_their_instant_while_a_raise_is_awaited(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    limit = scene.limit(1_000)
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    scene.raise_(limit, 5, ends=scene.now + timedelta(hours=2))
    scene.later(hours=1)
    assert scene.deduct(1, user).outcome is REFUSED
