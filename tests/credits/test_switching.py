"""The switch of pools, and what turns up in pools that are closed: each credit goes where it belongs, once."""

from datetime import timedelta
from typing import Any
from uuid import UUID

from tests.credits.scenes import Balance, Scene

from bursar.clock import uuid7
from bursar.credits.moves import Action, Flag, Outcome

ACCEPTED = Outcome.ACCEPTED


def own_of(scene: Scene, user: UUID, models: str | None = None) -> Balance:
    """The personal pool of a user, as it is now."""
    [(pool,)] = scene.admin(
        "select pool_id from credits.pools where organization_id = %s and owner_user_id = %s and kind = 'personal'"
        " and model_filter is not distinct from %s", scene.organization, user, models,
    )  # fmt: skip
    return scene.balance(pool)


def unsettled(scene: Scene) -> int:
    """How many running requests and members are awaited in closed pools."""
    tables = ("sweeps", "closed_accounts")
    found = [
        scene.admin(f"select 1 from credits.{name} where organization_id = %s", scene.organization) for name in tables
    ]
    return sum(map(len, found))


def test_only_a_companys_pools_are_switched(scene: Scene) -> None:
    scene.grant(scene.pool(), 100)
    for to in ("individual", None):
        with scene.refusal("BR400"):
            scene.switch(to)  # type: ignore[arg-type]
    kind = "update identity.organizations set kind = %s where organization_id = %s"
    scene.admin(kind, "individual", scene.organization)
    with scene.refusal("BR400"):
        scene.switch("personal")
    scene.admin(kind, "company", scene.organization)
    assert scene.switch("personal")["moved_micros"] == 100


def test_each_pool_is_divided_by_its_own_shares(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    gpt = scene.pool(models="gpt%")
    scene.grant(pool, 1_000)
    scene.grant(gpt, 100)
    ended = scene.share(pool, two, 200)
    scene.deduct(20, two)
    scene.end_share(ended)
    scene.share(pool, one, 70)
    scene.deduct(20, one)
    scene.share(gpt, one, 40, kind="capped")
    scene.share(gpt, two, 30)
    scene.share(pool, two, 300, kind="capped")
    scene.deduct(0, two)
    assert scene.switch("personal")["moved_micros"] == 960 + 100
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (50 + 455, 455)
    assert (own_of(scene, one, "gpt%").limit, own_of(scene, two, "gpt%").limit) == (35, 65)
    left = "select count(*) from credits.allocations where organization_id = %s and ended_at is null"
    assert scene.admin(left, scene.organization) == [(0,)]
    assert scene.findings() == []


def test_a_share_that_is_overdrawn_claims_nothing_of_what_is_divided(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    scene.share(pool, one, 10)
    scene.settle(scene.hold(10, one), 30)
    scene.switch("personal")
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (35, 35)
    assert scene.findings() == []


def test_who_is_suspended_gets_no_part(scene: Scene) -> None:
    one, two = scene.user(), scene.user()
    scene.grant(scene.pool(), 100)
    scene.admin("update identity.memberships set status = 'suspended' where user_id = %s", two)
    assert scene.switch("personal")["residual_micros"] == 0
    assert own_of(scene, one).limit == 100
    assert scene.findings() == []


def test_what_was_switched_is_not_switched_again(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    assert scene.switch("personal", key="k") == scene.switch("personal", key="k")
    assert scene.switch("shared")["moved_micros"] == 100
    assert scene.switch("shared") == {"moved_micros": 0, "residual_micros": 0, "held_micros": 0, "pools": 0}
    assert scene.deduct(100, user).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_closed_pool_or_none_takes_nothing(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.switch("personal")
    own = scene.pool("personal", owner=user)
    for closed in (pool, uuid7()):
        for command in (
            lambda closed=closed: scene.grant(closed, 1),
            lambda closed=closed: scene.schedule(closed, 1),
            lambda closed=closed: scene.transfer(closed, own, 1),
            lambda closed=closed: scene.transfer(own, closed, 1),
            lambda closed=closed: scene.share(closed, user, 1),
        ):
            with scene.refusal("BR404"):
                command()
    assert scene.balance(own).limit == 100


def test_what_a_hold_on_two_pools_frees_goes_to_its_user_in_each(scene: Scene) -> None:
    one, other, gpt, pool = scene.user(), scene.user(), scene.pool(models="gpt%"), scene.pool()
    scene.grant(gpt, 20)
    scene.grant(pool, 100)
    request = scene.hold(30, one, model="gpt-4")
    kept = scene.hold(5, other)
    assert scene.switch("personal") == {"moved_micros": 85, "residual_micros": 1, "held_micros": 35, "pools": 2}
    noted = "select kept_micros from credits.sweeps where organization_id = %s order by kept_micros"
    assert scene.admin(noted, scene.organization) == [(0,), (5,), (10,), (20,)]
    scene.settle(request, 24, model="gpt-4")
    scene.wake()
    assert own_of(scene, one).limit == 42 + 6
    assert scene.admin(noted, scene.organization) == [(0,), (5,)], "what still runs is waited for"
    assert (scene.balance(gpt), scene.balance(pool)) == (Balance(20, 20, 0, 0), Balance(9, 4, 5, 0))
    scene.settle(kept, 5)
    scene.wake()
    assert scene.admin(noted, scene.organization) == []
    assert scene.findings() == []


def test_a_call_that_the_customers_own_key_pays_keeps_nothing_waiting(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    scene.grant(pool, 100)
    scene.hold(0, user, flags=Flag.OWN_KEY)
    assert scene.switch("personal")["held_micros"] == 0
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_what_was_used_beyond_what_the_new_pool_has_the_closed_one_owes(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 100)
    requests = [scene.hold(20, user) for user in users]
    scene.switch("personal")
    scene.settle(requests[0], 65)
    scene.wake()
    assert own_of(scene, users[0]).limit == 0
    assert own_of(scene, users[1]).limit == 30
    assert scene.balance(pool) == Balance(70, 65, 20, 15)
    scene.settle(requests[1], 5)
    scene.wake()
    assert scene.findings() == []


def test_a_hold_on_one_pool_keeps_nothing_of_anothers_expired_grants(scene: Scene) -> None:
    user, shared = scene.user(), scene.pool()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 10, expires=scene.now + timedelta(minutes=5))
    scene.grant(shared, 50, expires=scene.now + timedelta(minutes=5))
    first = scene.hold(10, user)
    scene.hold(20, user)
    scene.release(first)
    scene.deduct(0, scene.user())  # by a chain whose first pool is the shared one
    split = scene.hold(14, user)  # 10 of their own, 4 of the shared
    scene.later(minutes=6)
    scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(10, 0, 10, 0), Balance(24, 0, 24, 0))
    scene.release(split)
    scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(0, 0, 0, 0), Balance(20, 0, 20, 0))
    assert scene.findings() == []


def test_bounds_of_a_roll_over_go_along_with_what_is_gathered(scene: Scene) -> None:
    users, end = [scene.user() for _ in range(3)], scene.now + timedelta(days=1)
    for user, rolls in zip(users, ((20, 40), None, (30, 50)), strict=True):
        until = end + timedelta(days=1) if rolls else None
        scene.grant(scene.pool("personal", owner=user), 80, expires=end, rolls=rolls, rolls_until=until)
    scene.deduct(60, users[0])
    scene.deduct(10, users[1])
    assert scene.switch("shared")["moved_micros"] == 170
    shared = scene.pool()
    bounds = "select amount_micros, min_rollover_micros, max_rollover_micros from credits.grants where pool_id = %s"
    found = sorted(scene.admin(bounds, shared), key=str)
    assert found == [(20, 0, 10), (70, None, None), (80, 30, 50)], "what was begun has its part of the most alone"
    scene.now = end
    scene.wake()
    assert scene.balance(shared).limit == 10 + 50
    assert scene.findings() == []


def test_what_starts_in_a_closed_personal_pool_goes_to_the_shared_one_for_the_same_models(scene: Scene) -> None:
    user, tomorrow = scene.user(), scene.now + timedelta(days=1)
    for models, now, later in ((None, 10, 40), ("gpt%", 20, 80)):
        own = scene.pool("personal", owner=user, models=models)
        scene.grant(own, now)
        scene.grant(own, later, starts=tomorrow)
    assert scene.switch("shared")["moved_micros"] == 30
    shared, gpt = scene.pool(), scene.pool(models="gpt%")
    assert (scene.balance(shared).limit, scene.balance(gpt).limit) == (10, 20)
    scene.now = tomorrow
    scene.wake()
    assert (scene.balance(shared).limit, scene.balance(gpt).limit) == (50, 100)
    assert scene.findings() == []


def test_what_comes_while_calls_still_run_is_divided_at_once(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 40)
    scene.grant(pool, 60, starts=scene.now + timedelta(hours=1))
    requests = [scene.hold(20, user, lease_seconds=90_000) for user in (one, two)]
    scene.switch("personal")
    scene.later(hours=1)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (30, 30)
    scene.settle(requests[0], 12)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (38, 30)
    assert scene.findings() == []


def test_what_a_hold_frees_is_known_from_its_own_request_alone(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    scene.deduct(10, one)
    scene.release(scene.hold(5, one))
    requests = [scene.hold(20, user) for user in (one, two)]
    scene.switch("personal")
    scene.settle(requests[0], 30)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (15, 25)
    scene.release(requests[1])
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (15, 45)
    assert scene.findings() == []


def test_what_a_hold_frees_goes_on_from_a_pool_that_has_closed_meanwhile(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 20)
    request = scene.hold(20, user)
    assert scene.switch("shared")["moved_micros"] == 0
    shared = scene.pool()
    assert scene.switch("personal") == {"moved_micros": 0, "residual_micros": 0, "held_micros": 0, "pools": 1}
    scene.settle(request, 15)
    scene.wake()
    assert scene.balance(shared) == Balance(0, 0, 0, 0)
    assert scene.balance(own) == Balance(20, 15, 0, 0)
    assert scene.deduct(5, user).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_request_that_is_held_anew_frees_what_it_held_when_it_was_charged_before(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    request = scene.hold(10, one, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.hold(20, two, request=request)
    scene.switch("personal")
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (35, 35)
    scene.later(minutes=1)
    scene.settle(request, 5, two)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (35, 50)
    assert scene.findings() == []


def test_a_correction_is_settled_with_who_was_charged_what_is_corrected(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    request = scene.hold(10, one, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.hold(20, two, request=request, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.switch("personal")
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (35, 35)
    scene.settle(request, 5, one)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (35, 50)
    assert scene.findings() == []


def test_what_a_closed_pool_is_owed_is_paid_by_the_next_credits_of_who_used_it(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 40)
    requests = [scene.hold(20, user) for user in users]
    scene.switch("personal")
    scene.settle(requests[0], 35)
    scene.settle(requests[1], 12)
    scene.wake()
    assert scene.balance(pool) == Balance(40, 47, 0, 7), "one used 15 of another's, who left 8"
    own, others = own_of(scene, users[0]), own_of(scene, users[1])
    assert (own, others) == (Balance(0, 0, 0, 0), Balance(0, 0, 0, 0))
    pools = [scene.pool("personal", owner=user) for user in users]
    scene.grant(pools[0], 10)
    assert [scene.balance(each) for each in (pool, *pools)] == [
        Balance(47, 47, 0, 0),
        Balance(0, 0, 0, 0),
        Balance(3, 0, 0, 0),
    ]
    scene.grant(pools[0], 100, starts=scene.now + timedelta(hours=1))
    scene.later(hours=1)
    scene.wake()
    assert [scene.balance(each).limit for each in (pool, *pools)] == [47, 95, 8]
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_of_what_is_there_the_first_pool_gets_its_rest_first(scene: Scene) -> None:
    users, shared = [scene.user() for _ in range(3)], scene.pool()
    own = sorted((scene.pool("personal", owner=user), user) for user in users)
    scene.grant(shared, 60)
    requests = [scene.hold(20, user) for _, user in own]
    scene.switch("personal")
    used = zip(requests, (35, 12, 12), strict=True)
    scene.move(*(scene.asked(Action.SETTLE, request, micros) for request, micros in used))
    scene.wake()
    assert [scene.balance(pool).limit for pool, _ in own] == [0, 1, 0]
    assert scene.findings() == []


def test_who_owes_pays_their_own_part_alone(scene: Scene) -> None:
    users = [scene.user() for _ in range(3)]
    pools = [scene.pool("personal", owner=user) for user in users]
    shared = scene.pool()
    scene.grant(shared, 60)
    scene.grant(shared, 30, starts=scene.now + timedelta(hours=1))
    requests = [scene.hold(20, user) for user in users]
    scene.switch("personal")
    for request, used in zip(requests, (35, 35, 0), strict=True):
        scene.settle(request, used)
    scene.wake()
    assert scene.balance(shared) == Balance(60, 70, 0, 10), "two owe 15 each; one left 20, of which they used 20"
    scene.grant(pools[0], 10)
    scene.grant(pools[1], 5)
    assert [scene.balance(each).limit for each in (shared, *pools)] == [70, 0, 0, 5]
    scene.grant(pools[0], 100)
    assert [scene.balance(each).limit for each in (shared, *pools)] == [70, 95, 0, 10], "not for the other one"
    scene.later(hours=1)
    scene.wake()
    assert [scene.balance(each).limit for each in (shared, *pools)] == [70, 101, 6, 26], "10 first, then 6 for each"
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_a_debt_that_is_settled_otherwise_is_not_paid_twice(scene: Scene) -> None:
    users = sorted(scene.user() for _ in range(2))
    pool = scene.pool()
    scene.grant(pool, 20)
    scene.grant(pool, 50, starts=scene.now + timedelta(hours=1))
    request = scene.hold(20, users[0])
    scene.switch("personal")
    scene.settle(request, 35)
    scene.wake()
    assert scene.balance(pool) == Balance(20, 35, 0, 15)
    scene.later(hours=1)
    scene.wake()
    assert scene.balance(pool) == Balance(35, 35, 0, 0)
    assert [own_of(scene, user).limit for user in users] == [17, 17]
    own = scene.pool("personal", owner=users[0])
    scene.grant(own, 10)
    assert (scene.balance(own).limit, scene.balance(pool)) == (27, Balance(35, 35, 0, 0))
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_what_has_expired_is_owed_to_nobody(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 40, expires=scene.now + timedelta(hours=1))
    requests = [scene.hold(20, user, lease_seconds=90_000) for user in (one, two)]
    scene.switch("personal")
    scene.later(hours=2)
    scene.release(requests[0])
    scene.wake()
    assert unsettled(scene) == 1
    scene.release(requests[1])
    scene.wake()
    assert scene.balance(pool) == Balance(0, 0, 0, 0)
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_a_shared_pool_that_was_empty_is_there_again_when_credits_are_shared_again(scene: Scene) -> None:
    user, gpt = scene.user(), scene.pool(models="gpt%")
    scene.grant(scene.pool(), 10)
    for to in ("personal", "shared"):
        scene.switch(to)
    scene.grant(gpt, 100)
    assert scene.deduct(50, user, model="gpt-4").outcome is ACCEPTED
    assert scene.balance(gpt) == Balance(100, 50, 0, 0)
    assert scene.findings() == []


def test_what_has_ended_where_a_user_spends_now_pays_no_debt(scene: Scene) -> None:
    user, pool = scene.user(), scene.pool()
    own = scene.pool("personal", owner=user)  # what is due in it comes after what is due in the shared one
    scene.grant(pool, 20)
    request = scene.hold(20, user)
    scene.switch("personal")
    scene.grant(own, 30, expires=scene.now + timedelta(hours=1))
    scene.settle(request, 35)
    scene.later(hours=2)
    scene.wake()
    assert (scene.balance(own), scene.balance(pool)) == (Balance(0, 0, 0, 0), Balance(20, 35, 0, 15))
    assert scene.findings() == []


def test_a_closed_pool_that_opens_while_it_is_settled_is_awaited_at_its_own_instants(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 20)
    request = scene.hold(20, user, lease_seconds=90_000)
    scene.switch("shared")
    shared = scene.pool()
    scene.grant(shared, 30, starts=scene.now + timedelta(hours=1), expires=scene.now + timedelta(hours=2))
    scene.switch("personal")
    scene.later(minutes=50)
    scene.settle(request, 15)
    scene.later(minutes=10)
    scene.wake()
    assert scene.findings() == []
    scene.later(hours=1)
    scene.wake()
    assert scene.balance(own) == Balance(20, 15, 0, 0)


def test_who_owes_a_pool_that_opens_again_owes_it_nothing_apart(scene: Scene) -> None:
    user = scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 20)
    request = scene.hold(20, user, lease_seconds=90_000)
    scene.switch("shared")
    shared = scene.pool()
    for hours, amount in ((1, 30), (2, 40)):
        scene.grant(shared, amount, starts=scene.now + timedelta(hours=hours))
    scene.switch("personal")
    scene.later(minutes=50)
    scene.settle(request, 60)
    for _ in range(2):
        scene.later(minutes=60)
        scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(90, 60, 0, 0), Balance(0, 0, 0, 0))
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_what_somebody_left_themselves_pays_what_they_used_too_much_and_no_rest_is_lost(scene: Scene) -> None:
    one, two, shared = scene.user(), scene.user(), scene.pool()
    scene.grant(shared, 60)
    requests = sorted(scene.hold(20, one) for _ in range(2))
    theirs = scene.hold(20, two)
    scene.switch("personal")
    scene.settle(requests[0], 35)
    scene.wake()
    scene.move(scene.asked(Action.SETTLE, requests[1], 18), scene.asked(Action.SETTLE, theirs, 5))
    scene.wake()
    scene.grant(scene.pool("personal", owner=one), 100)
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (87, 15)
    assert scene.findings() == []


def test_a_request_that_is_held_anew_elsewhere_owes_all_the_same(scene: Scene) -> None:
    one, two, shared = scene.user(), scene.user(), scene.pool()
    scene.grant(shared, 40)
    first, second = scene.hold(20, one), scene.hold(20, two)
    scene.switch("personal")
    scene.settle(first, 35)
    scene.wake()
    own = scene.pool("personal", owner=one)
    scene.grant(own, 5)
    scene.authorize(0, one, request=first)
    scene.grant(own, 20)
    scene.settle(second, 5)
    scene.wake()
    assert (own_of(scene, one).limit, own_of(scene, two).limit) == (10, 15)
    assert scene.findings() == []


def test_who_owes_and_is_owed_settles_with_themselves_in_one_go(scene: Scene) -> None:
    one, two, three = (scene.user() for _ in range(3))
    shared = scene.pool()
    scene.grant(shared, 8_000)
    requests = [scene.hold(2_000, user) for user in (one, one, two, three)]
    scene.switch("personal")
    for request, used in zip(requests, (3_500, 500, 3_500, 500), strict=True):
        scene.settle(request, used)
    scene.wake()
    count = "select count(*) from ledger.entries where organization_id = %s"
    [(before,)] = scene.admin(count, scene.organization)
    scene.grant(scene.pool("personal", owner=two), 2)
    [(after,)] = scene.admin(count, scene.organization)
    assert after - before < 10
    assert own_of(scene, three).limit == 2
    assert scene.findings() == []


def test_what_has_expired_of_a_rest_is_not_paid_by_what_comes_to_all(scene: Scene) -> None:
    users, shared = [scene.user() for _ in range(3)], scene.pool()
    scene.grant(shared, 60, expires=scene.now + timedelta(hours=1))
    scene.grant(shared, 30, starts=scene.now + timedelta(hours=3))
    requests = [scene.hold(20, user, lease_seconds=900_000) for user in users]
    scene.switch("personal")
    scene.settle(requests[0], 25)
    scene.wake()
    scene.later(hours=2)
    scene.wake()
    scene.release(requests[1])  # of its 20 are 15 expired, and 5 were used by the first
    scene.wake()
    scene.later(hours=1)
    scene.wake()
    assert [own_of(scene, user).limit for user in users] == [8, 13, 8]
    assert scene.findings() == []


def test_a_debt_that_others_paid_is_not_asked_for_when_something_expires_later(scene: Scene) -> None:
    one, two, three = (scene.user() for _ in range(3))
    shared = scene.pool()
    scene.grant(shared, 60, expires=scene.now + timedelta(hours=2))
    scene.grant(shared, 15, starts=scene.now + timedelta(hours=1))
    requests = [scene.hold(20, user, lease_seconds=90_000) for user in (one, two, three)]
    scene.switch("personal")
    scene.settle(requests[0], 35)
    scene.settle(requests[1], 20)
    scene.wake()
    scene.later(hours=1)
    scene.wake()
    scene.later(hours=1, minutes=1)
    scene.release(requests[2])
    scene.wake()
    scene.grant(scene.pool("personal", owner=one), 100)
    assert (own_of(scene, one).limit, own_of(scene, three).limit) == (100, 15)
    assert scene.findings() == []


def test_nobody_pays_more_than_is_missing(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 20)
    scene.grant(pool, 5, starts=scene.now + timedelta(hours=1))
    request = scene.hold(20, one)
    scene.switch("personal")
    scene.grant(scene.pool("personal", owner=one), 100)
    scene.settle(request, 35)
    scene.later(hours=1)
    scene.wake()
    assert own_of(scene, one).limit == 90
    assert scene.balance(scene.pool("personal", owner=two)) == Balance(0, 0, 0, 0)
    assert scene.balance(pool) == Balance(35, 35, 0, 0)
    assert unsettled(scene) == 0
    assert scene.findings() == []


def owing(scene: Scene, **terms: Any) -> tuple[UUID, UUID, UUID]:
    """Who owes 15 to a pool that is closed, the pool of their own, which has 10 that are used, and the closed one."""
    user, shared = scene.user(), scene.pool()
    own = scene.pool("personal", owner=user)
    assert own > shared, "pools fold in the order of their ids: by the time that the own one has, the closed one did"
    scene.grant(shared, 20)
    request = scene.hold(20, user)
    scene.switch("personal")
    scene.grant(own, 10, **terms)
    scene.deduct(10, user)
    scene.settle(request, 35)
    scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(10, 10, 0, 0), Balance(20, 35, 0, 15))
    return user, own, shared


def test_what_comes_to_a_member_who_owes_a_closed_pool_is_told_as_what_is_left_after_the_debt(scene: Scene) -> None:
    _, own, shared = owing(scene)
    scene.grant(own, 10)
    assert (scene.balance(own), scene.balance(shared)) == (Balance(10, 10, 0, 0), Balance(30, 35, 0, 5))
    assert scene.findings() == []
    scene.grant(own, 10)
    assert (scene.balance(own), scene.balance(shared)) == (Balance(15, 10, 0, 0), Balance(35, 35, 0, 0))
    assert unsettled(scene) == 0
    assert scene.findings() == []


def test_what_time_brings_to_who_owes_a_closed_pool_pays_at_once(scene: Scene) -> None:
    _, own, shared = owing(scene)
    scene.grant(own, 40, starts=scene.now + timedelta(hours=1))
    scene.later(hours=1)
    scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(35, 10, 0, 0), Balance(35, 35, 0, 0))
    assert scene.findings() == []


def test_what_a_schedule_grants_at_once_to_who_owes_a_closed_pool_pays_it(scene: Scene) -> None:
    _, own, shared = owing(scene)
    scene.schedule(own, 40)
    assert (scene.balance(own), scene.balance(shared)) == (Balance(35, 10, 0, 0), Balance(35, 35, 0, 0))
    assert scene.findings() == []


def test_what_is_transferred_to_who_owes_a_closed_pool_pays_it(scene: Scene) -> None:
    _, own, shared = owing(scene)
    giver = scene.pool("personal", owner=scene.user())
    scene.grant(giver, 40)
    assert len(scene.transfer(giver, own, 30)) == 1
    assert (scene.balance(own), scene.balance(shared)) == (Balance(25, 10, 0, 0), Balance(35, 35, 0, 0))
    assert scene.findings() == []


def test_what_is_refunded_to_who_owes_a_closed_pool_pays_it(scene: Scene) -> None:
    user, own, shared = owing(scene)
    find = "select request_id from ledger.attribution where organization_id = %s and user_id = %s and pool_id = %s"
    [(charged,)] = scene.admin(find, scene.organization, user, own)
    assert scene.refund(charged) == 10
    assert (scene.balance(own), scene.balance(shared)) == (Balance(10, 10, 0, 0), Balance(30, 35, 0, 5))
    assert scene.findings() == []


def test_what_is_gathered_by_a_switch_pays_what_the_shared_pool_owes_a_closed_one(scene: Scene) -> None:
    user, other = scene.user(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 20)
    request = scene.hold(20, user)
    scene.switch("shared")
    shared = scene.pool()
    scene.settle(request, 35)
    scene.wake()
    scene.switch("personal")  # there is nothing to divide, so nobody's pool opens again
    scene.grant(scene.pool("personal", owner=other), 50)
    assert scene.switch("shared")["moved_micros"] == 50
    assert (scene.balance(own), scene.balance(shared)) == (Balance(35, 35, 0, 0), Balance(35, 0, 0, 0))
    assert scene.findings() == []


def test_what_is_not_settled_at_once_is_awaited_by_the_gate(scene: Scene) -> None:
    _, own, shared = owing(scene, expires=scene.now + timedelta(days=1), rolls=(4, 4))
    grants = [row[0] for row in scene.admin("select grant_id from credits.grants where pool_id = %s", own)]
    scene.later(hours=1)
    reset = "select credits.reset_pool(%s, %s, %s, %s, %s, false, 'reset', %s)"
    assert scene.call(reset, scene.organization, own, grants, [4], [4], scene.now) == 4
    assert scene.findings() == []
    scene.wake()
    assert (scene.balance(own), scene.balance(shared)) == (Balance(10, 10, 0, 0), Balance(24, 35, 0, 11))
    assert scene.findings() == []
