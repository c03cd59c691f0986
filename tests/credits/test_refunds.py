"""What a refund gives back, where and to whom: of one request alone, in the period in which it was charged."""

from datetime import UTC, datetime
from uuid import UUID

from tests.credits.scenes import Balance, Scene

from bursar.credits.moves import Flag, Outcome

ACCEPTED, REFUSED = Outcome.ACCEPTED, Outcome.REFUSED


def refunded(scene: Scene) -> list[tuple[str, int]]:
    """(kind of pool, micros) of every refund, in the order of booking."""
    return scene.admin(
        "select p.kind, e.amount from ledger.entries e join credits.pools p on p.pool_id = e.to_id"
        " where e.organization_id = %s and e.kind = 'refund' order by e.booked_at, p.kind", scene.organization,
    )  # fmt: skip


def test_of_several_requests_that_drew_on_several_pools_the_one_that_is_meant_is_refunded(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    requests = []
    for amount in (15, 18, 16):
        scene.grant(own, 10)
        requests.append(scene.deduct(amount, user).request_id)
        scene.later(seconds=1)
    assert scene.refund(requests[1]) == 18
    assert refunded(scene) == [("personal", 10), ("shared", 8)]
    assert (scene.balance(own), scene.balance(shared)) == (Balance(40, 30, 0, 0), Balance(108, 19, 0, 0))
    assert scene.findings() == []


def test_a_correction_that_took_back_from_two_pools_leaves_the_rest_to_be_refunded(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    request = scene.hold(15, user, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    other = scene.deduct(20, user).request_id
    scene.settle(request, 8, user)
    assert scene.refund(request) == 8
    assert refunded(scene) == [("personal", 8)]
    assert scene.refund(other) == 20
    assert sorted(refunded(scene)) == [("personal", 8), ("shared", 15)], "5 came back to their grant already"
    assert scene.balance(shared) == Balance(120, 20, 0, 0)
    assert scene.findings() == []


def test_only_caps_on_what_was_asked_have_room_again(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    of_gpt, of_all = scene.limit(50, models="gpt%"), scene.limit(60)
    scene.deduct(20, user, model="gpt-4")
    scene.refund(scene.deduct(30, user, model="claude").request_id, 10)
    assert (scene.used(of_gpt), scene.used(of_all)) == ((20, 0), (40, 0))
    assert scene.findings() == []


def test_a_cap_has_room_again_in_the_period_of_the_charge(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 200)
    cap = scene.limit(50, period="month")
    june = scene.deduct(50, user).request_id
    scene.now = datetime(2026, 7, 1, tzinfo=UTC)
    scene.deduct(20, user)
    scene.refund(june, 40)
    used = "select used_amount from credits.balances where balance_id = %s order by period_start"
    assert scene.admin(used, cap) == [(10,), (20,)]
    assert scene.findings() == []


def test_a_cap_that_is_still_over_its_limit_after_a_refund_still_blocks(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 200)
    cap = scene.limit(100)
    request = scene.deduct(80, user).request_id
    scene.limit(50)
    scene.refund(request, 10)
    assert scene.balance(cap) == Balance(50, 70, 0, 20)
    scene.refund(request, 30)
    assert scene.balance(cap) == Balance(50, 40, 0, 0)


def test_a_cap_on_one_pool_has_room_again_for_what_that_pool_paid(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    capped = scene.share(shared, user, 30, kind="capped")
    request = scene.deduct(25, user).request_id
    assert scene.used(capped) == (15, 0)
    scene.refund(request, 15)
    assert scene.used(capped) == (0, 0)
    scene.refund(request, 10)
    assert scene.used(capped) == (0, 0)
    assert scene.findings() == []


def test_a_share_grows_by_what_it_paid_whatever_other_pools_its_member_has(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    share = scene.share(shared, user, 30)
    scene.grant(own, 10)
    request = scene.deduct(25, user).request_id
    scene.refund(request)
    assert (scene.balance(share), scene.balance(own)) == (Balance(45, 15, 0, 0), Balance(20, 10, 0, 0))
    assert scene.findings() == []


def renewed_share(scene: Scene) -> tuple[UUID, UUID, UUID]:
    """A pool, a share of 60 by month of which 50 were used, and the request."""
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 500)
    share = scene.share(pool, user, 60, period="month")
    scene.later(days=1)
    return pool, share, scene.deduct(50, user).request_id


def test_a_renewed_share_grows_in_the_month_of_the_charge_alone(scene: Scene) -> None:
    _, share, request = renewed_share(scene)
    scene.refund(request, 20)
    assert scene.balance(share) == Balance(80, 50, 0, 0)
    scene.now = datetime(2026, 7, 1, tzinfo=UTC)
    scene.fold()
    assert scene.balance(share) == Balance(110, 50, 0, 0), "60 more than what was used, as ever"
    assert scene.findings() == []


def test_what_a_renewed_share_paid_in_a_month_that_is_over_goes_to_the_open_part(scene: Scene) -> None:
    pool, share, request = renewed_share(scene)
    scene.now = datetime(2026, 7, 1, tzinfo=UTC)
    scene.refund(request, 20)
    assert scene.balance(share) == Balance(110, 50, 0, 0)
    assert scene.balance(scene.open_part(pool)).limit == 520 - 110
    assert scene.findings() == []


def test_a_share_that_ended_gets_nothing_back(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 60)
    request = scene.deduct(50, user).request_id
    scene.end_share(share)
    scene.refund(request)
    assert scene.balance(share).limit == 0
    assert scene.deduct(100, scene.user()).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_refund_to_who_was_without_credits_can_be_spent_at_once(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    request = scene.deduct(10, user).request_id
    scene.changed()
    scene.deduct(1, user)  # by a chain without their own pool
    scene.refund(request)
    scene.deduct(10, user)
    assert (scene.used(own), scene.used(shared)) == ((20, 0), (1, 0))
    scene.now = datetime(2026, 6, 11, tzinfo=UTC)
    assert scene.deduct(99, user).outcome is ACCEPTED
    assert scene.deduct(1, user).outcome is REFUSED


def test_a_request_is_refunded_step_by_step_from_its_end(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    request = scene.deduct(15, user).request_id
    for amount, left in ((3, (10, 12)), (3, (9, 10)), (9, (0, 10))):
        scene.later(seconds=1)
        assert scene.refund(request, amount) == amount
        back = scene.balance(own).limit - 10, scene.balance(shared).limit - 100
        assert (10 - back[0], 15 - back[1]) == left
    with scene.refusal("BR432"):
        scene.refund(request)
    assert scene.findings() == []


def test_each_grant_gets_back_what_the_request_took_of_it_with_its_money(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10, priority=1, paid=1_001)
    scene.grant(pool, 50, priority=2, paid=707)
    request = scene.deduct(30, user).request_id
    scene.deduct(20, user)
    scene.later(seconds=1)
    scene.refund(request, 25)
    assert [(left, state) for _, _, left, state in scene.grants(pool)] == [(5, "active"), (30, "active")]
    assert scene.findings() == []
    scene.refund(request)
    assert [left for _, _, left, _ in scene.grants(pool)] == [10, 30]
    assert scene.findings() == []


def test_no_grant_gets_back_more_money_than_it_gave(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10, priority=1, paid=1_001)
    scene.grant(pool, 10, priority=2, paid=2_003)
    first = scene.hold(10, user, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    second = scene.deduct(10, user).request_id
    scene.settle(first, 5, user)
    for request in (second, first):
        scene.later(seconds=1)
        scene.refund(request)
        assert scene.findings() == []


def test_a_refund_leaves_the_estimates_of_other_requests_to_be_corrected(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    requests = [scene.hold(10, user, flags=Flag.SENT) for _ in range(2)]
    scene.later(hours=1)
    scene.expire()
    scene.refund(requests[0])
    assert scene.settle(requests[1], 4, user).outcome is ACCEPTED
    assert scene.balance(pool) == Balance(110, 14, 0, 0)
    assert scene.findings() == []


def test_of_a_request_that_was_charged_twice_each_charge_gives_room_back_where_it_took_it(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    caps = [scene.limit(50, scope="user", of=user) for user in (one, two)]
    of_gpt = scene.limit(50, models="gpt%")
    request = scene.hold(10, one, flags=Flag.SENT, model="gpt-4")
    scene.later(hours=1)
    scene.expire()
    scene.hold(20, two, request=request, model="m1")
    scene.later(minutes=1)
    scene.settle(request, 20, two)
    scene.later(minutes=1)
    scene.settle(request, 14, one)  # 4 more than the estimate
    assert [scene.used(cap) for cap in (*caps, of_gpt)] == [(14, 0), (20, 0), (14, 0)]
    scene.later(minutes=1)
    assert scene.refund(request, 29) == 29
    assert [scene.used(cap) for cap in (*caps, of_gpt)] == [(5, 0), (0, 0), (5, 0)]
    rows = scene.admin(
        "select user_id, model, charged_micros from ledger.attribution"
        " where request_id = %s and kind = 2 order by booked_at", request,
    )  # fmt: skip
    assert rows == [(one, "gpt-4", -4), (two, "m1", -20), (one, "gpt-4", -5)]
    assert scene.refund(request) == 5
    assert [scene.used(cap) for cap in (*caps, of_gpt)] == [(0, 0)] * 3
    assert scene.balance(pool) == Balance(134, 34, 0, 0)
    assert scene.findings() == []


def test_of_a_request_that_was_charged_twice_each_charge_goes_back_to_who_asked(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 30)
    request = scene.hold(10, one, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.hold(20, two, request=request)
    scene.later(minutes=1)
    scene.settle(request, 20, two)
    scene.switch("personal")
    scene.later(minutes=1)
    assert scene.refund(request) == 30
    own = [scene.pool("personal", owner=user) for user in (one, two)]
    assert [scene.balance(each).limit for each in own] == [10, 20]
    assert scene.findings() == []


def test_a_refund_is_the_use_of_the_share_that_its_own_charge_passed(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    share = scene.share(pool, two, 50, kind="capped")
    request = scene.hold(27, one, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    assert scene.refund(request, 10) == 10
    scene.later(minutes=1)
    scene.hold(20, two, request=request)
    scene.settle(request, 20, two)
    assert scene.balance(share).used == 20
    assert scene.findings() == []


def test_what_was_refunded_before_a_request_was_charged_again_is_not_refunded_twice(scene: Scene) -> None:
    one, two, pool = scene.user(), scene.user(), scene.pool()
    scene.grant(pool, 100)
    caps = [scene.limit(50, scope="user", of=user) for user in (one, two)]
    request = scene.hold(27, one, flags=Flag.SENT)
    scene.later(hours=1)
    scene.expire()
    scene.refund(request, 10)
    scene.later(minutes=1)
    scene.hold(20, two, request=request)
    scene.settle(request, 20, two)
    for amount, left in ((3, [(17, 0), (17, 0)]), (19, [(15, 0), (0, 0)]), (15, [(0, 0), (0, 0)])):
        scene.later(minutes=1)
        assert scene.refund(request, amount) == amount
        assert [scene.used(cap) for cap in caps] == left
    assert scene.balance(pool) == Balance(147, 47, 0, 0)
    assert scene.grants(pool) == [("purchase", 100, 100, "active")]
    assert scene.findings() == []
