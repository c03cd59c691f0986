"""The rules of the treasury, each shown by the smallest scene in which it matters.

Most of these scenes once went wrong, or would if a guard were taken out (test_guards.py takes them out).
"""

from datetime import UTC, datetime, timedelta

from tests.credits.scenes import NOON, Balance, Scene, outcomes

from bursar.clock import uuid7
from bursar.credits.moves import Action, Flag, Outcome
from bursar.money import Micros

ACCEPTED, REFUSED, WAIT, KNOWN = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.WAIT, Outcome.KNOWN
NO_HOLD, KEY_REUSED, NOT_ALLOWED, KNOWN_REFUSED, RESIZE = (
    Outcome.NO_HOLD,
    Outcome.KEY_REUSED,
    Outcome.NOT_ALLOWED,
    Outcome.KNOWN_REFUSED,
    Outcome.RESIZE,
)


# ---------------------------------------------------------------------------------------------- room


def test_what_fits_is_held_and_one_more_is_not(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    assert scene.authorize(100, user).outcome is ACCEPTED
    verdict = scene.authorize(1, user)
    assert (verdict.outcome, verdict.detail, verdict.binding_id) == (REFUSED, "pool_exhausted", pool)


def test_of_a_batch_that_does_not_fit_the_first_to_arrive_are_served(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    moves = [scene.asked(Action.DEDUCT, None, amount, user_id=user) for amount in (60, 50, 40, 1)]
    assert outcomes(scene.move(*moves)) == [ACCEPTED, REFUSED, ACCEPTED, REFUSED]


def test_a_call_that_only_open_holds_block_may_wait(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.hold(80, user)
    assert scene.authorize(30, user, flags=Flag.MAY_WAIT).outcome is WAIT
    assert scene.authorize(30, scene.user()).outcome is REFUSED
    # No end of any hold makes room for it.
    assert scene.authorize(101, scene.user(), flags=Flag.MAY_WAIT).outcome is REFUSED


def test_who_was_refused_is_judged_anew_each_time(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(80, user)
    for _ in range(3):
        verdict = scene.authorize(30, user)
        assert (verdict.outcome, verdict.binding_id, verdict.available_micros) == (REFUSED, pool, 20)
        assert scene.authorize(30, user, flags=Flag.MAY_WAIT).outcome is WAIT
        assert scene.authorize(101, user, flags=Flag.MAY_WAIT).outcome is REFUSED
    deductions = [scene.asked(Action.DEDUCT, None, amount, user_id=user) for amount in (30, 20, 1)]
    assert outcomes(scene.move(*deductions)) == [REFUSED, ACCEPTED, REFUSED]
    scene.release(request)
    assert scene.authorize(80, user).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_settle_above_its_hold_is_charged_in_full_and_blocks_what_follows(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(90, user)
    assert scene.settle(request, 130).charged_micros == 130
    assert scene.balance(pool) == Balance(100, 130, 0, 30)
    assert scene.authorize(0, user, flags=Flag.MAY_WAIT).outcome is REFUSED
    scene.grant(pool, 10)
    assert scene.balance(pool) == Balance(110, 130, 0, 20)
    scene.grant(pool, 21)
    assert scene.authorize(1, user).outcome is ACCEPTED


def test_a_limit_lowered_below_its_use_blocks_until_it_is_raised_again(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    limit = scene.limit(100, scope="user", of=user)
    scene.deduct(80, user)
    assert scene.limit(50, scope="user", of=user) == limit
    assert scene.balance(limit) == Balance(50, 80, 0, 30)
    assert scene.deduct(0, user).outcome is REFUSED
    scene.limit(90, scope="user", of=user)
    assert outcomes([scene.deduct(11, user), scene.deduct(10, user)]) == [REFUSED, ACCEPTED]


def test_a_limit_that_warns_counts_and_refuses_nothing(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    limit = scene.limit(10, action="warns")
    assert scene.deduct(70, user).outcome is ACCEPTED
    assert scene.balance(limit) == Balance(10, 70, 0, 60)
    holds = [scene.asked(Action.AUTHORIZE, None, amount, user_id=user) for amount in (30, 1)]
    assert outcomes(scene.move(*holds)) == [ACCEPTED, REFUSED]  # also where the pool is decided one by one


def test_waiting_helps_only_where_holds_alone_stand_in_the_way(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    scene.limit(100)
    scene.deduct(50, user)
    scene.hold(30, user)
    assert scene.authorize(50, user, flags=Flag.MAY_WAIT).outcome is WAIT
    assert scene.authorize(51, scene.user(), flags=Flag.MAY_WAIT).outcome is REFUSED


def test_every_limit_must_allow_it_and_the_one_that_does_not_is_named(scene: Scene) -> None:
    team = scene.team()
    user = scene.user(team=team)
    key = scene.key(user)
    scene.grant(scene.pool(), 1000)
    limits = {
        "organization": scene.limit(90),
        "team": scene.limit(80, scope="team", of=team),
        "user": scene.limit(70, scope="user", of=user),
        "key": scene.limit(60, scope="key", of=key),
    }
    for amount, scope in ((61, "key"), (71, "user"), (81, "team"), (91, "organization")):
        verdict = scene.authorize(amount, user, api_key_id=key)
        assert verdict.outcome is REFUSED
        assert verdict.detail == "cap_reached"
        if scope == "key":
            assert verdict.binding_id == limits["key"]
    assert scene.authorize(60, user, api_key_id=key).outcome is ACCEPTED
    assert scene.authorize(10, user).outcome is ACCEPTED  # a session is no key
    assert scene.authorize(1, user).outcome is REFUSED


def test_calls_and_tokens_are_limited_like_credits(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    calls = scene.limit(2, metric="calls")
    tokens = scene.limit(100, metric="tokens", models="big%")
    assert scene.deduct(1, user, model="big-1", tokens=90).outcome is ACCEPTED
    assert scene.deduct(1, user, model="big-1", tokens=11).binding_id == tokens
    assert scene.deduct(1, user, model="small", tokens=11).outcome is ACCEPTED
    assert scene.deduct(1, user, model="small").binding_id == calls


def test_an_extension_needs_no_room_on_what_it_does_not_use(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    for amount in (5, 0):
        scene.limit(amount, metric="calls")
        scene.limit(amount, metric="tokens")
        if amount:
            request = scene.hold(10, user, tokens=5)
    assert scene.extend(request, 5).outcome is ACCEPTED
    too_much = scene.asked(Action.AUTHORIZE, None, 1000, user_id=user)
    assert scene.move(scene.asked(Action.EXTEND, request, 5), too_much)[0].outcome is ACCEPTED  # one by one too
    assert scene.extend(request, 0, tokens=1).outcome is REFUSED


def test_a_chain_that_is_older_than_the_list_of_its_conditions_is_held_to_all_of_them(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.limit(2, metric="calls")
    request = scene.hold(5, user)
    scene.admin(
        "update credits.chains set entry_conditions = null where organization_id = %s returning 1", scene.organization
    )
    assert scene.deduct(1, user).outcome is ACCEPTED
    assert scene.deduct(1, user).detail == "cap_reached"
    assert scene.settle(request, 5).available_micros == 94
    assert scene.findings() == []


def test_what_is_left_is_told_of_what_a_request_passes(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.grant(scene.pool(models="gpt%"), 40)
    scene.limit(3, metric="calls")
    scene.limit(7, models="gpt%")
    request = scene.hold(5, user, model="claude")
    assert scene.settle(request, 5, model="claude").available_micros == 95


# ---------------------------------------------------------------------------------------------- several ways to pay


def test_a_request_may_draw_from_several_pools(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 30)
    request = scene.hold(50, user)
    assert (scene.used(own), scene.used(shared)) == ((0, 30), (0, 20))
    assert scene.settle(request, 45).charged_micros == 45
    assert (scene.used(own), scene.used(shared)) == ((30, 0), (15, 0))
    assert scene.findings() == []


def test_restricted_credit_is_spent_first_and_only_on_its_models(scene: Scene) -> None:
    shared, restricted, user = scene.pool(), scene.pool(models="gpt%"), scene.user()
    scene.grant(shared, 100)
    scene.grant(restricted, 20)
    scene.deduct(15, user, model="gpt-4")
    scene.deduct(15, user, model="claude")
    assert (scene.used(restricted), scene.used(shared)) == ((15, 0), (15, 0))


def test_restricted_credit_alone_refuses_other_models_by_name_or_by_emptiness(scene: Scene) -> None:
    user = scene.user()
    restricted = scene.pool(models="gpt%")
    scene.grant(restricted, 20)
    assert scene.deduct(1, user, model="claude").detail == "no_pool_for_model"
    scene.pool()  # an empty one for everything
    assert scene.deduct(1, user, model="claude").detail == "pool_exhausted"


def test_a_share_and_the_open_part_of_its_pool_pay_one_request_together(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 50, when_empty="open_part")
    assert scene.deduct(100, user).outcome is ACCEPTED
    assert (scene.used(share), scene.used(scene.open_part(pool))) == ((50, 0), (50, 0))
    assert scene.findings() == []


def test_what_is_reserved_nobody_else_can_spend(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 60)
    verdict = scene.deduct(61, user)
    assert (verdict.outcome, verdict.detail, verdict.binding_id) == (REFUSED, "allocation_exhausted", share)
    assert scene.deduct(41, other).outcome is REFUSED
    assert scene.deduct(40, other).outcome is ACCEPTED
    assert scene.deduct(60, user).outcome is ACCEPTED


def test_an_extension_goes_on_in_the_next_pool_when_its_own_is_empty(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 10)
    request = scene.hold(8, user)
    assert scene.extend(request, 7).held_micros == 15
    assert (scene.used(own), scene.used(shared)) == ((0, 10), (0, 5))
    assert scene.extend(request, 5).held_micros == 20
    assert scene.settle(request, 20).outcome is ACCEPTED
    assert (scene.used(own), scene.used(shared)) == ((10, 0), (10, 0))
    assert scene.findings() == []


def test_nobody_spends_from_anothers_personal_pool(scene: Scene) -> None:
    user, other = scene.user(), scene.user()
    scene.grant(scene.pool("personal", owner=user), 100)
    assert scene.deduct(1, other).detail == "no_pool"
    scene.pool()
    assert scene.deduct(1, other).detail == "pool_exhausted"


def test_a_top_up_is_spent_at_once(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.deduct(1, user)  # by a chain without the empty pool
    scene.grant(own, 10)
    scene.deduct(10, user)
    assert scene.used(own) == (10, 0)


def test_a_late_grant_to_a_personal_pool_is_spent_before_the_shared_one(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 50, starts=scene.now + timedelta(hours=1))
    scene.deduct(10, user)
    scene.later(hours=1)
    scene.deduct(10, user)
    assert (scene.used(own), scene.used(shared)) == ((10, 0), (10, 0))


def test_a_settle_above_its_hold_takes_room_elsewhere_before_it_makes_excess(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 10)
    scene.grant(shared, 100)
    request = scene.hold(10, user)
    scene.settle(request, 60)
    assert (scene.used(own), scene.used(shared)) == ((10, 0), (50, 0))
    assert scene.deduct(50, user).outcome is ACCEPTED


def test_excess_of_a_pool_with_two_parts_is_not_made_while_another_pool_has_room(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    restricted = scene.pool(models="gpt%")
    scene.grant(restricted, 30)
    scene.share(restricted, user, 20, when_empty="open_part")
    scene.grant(shared, 100)
    request = scene.hold(1, user, model="gpt-4")
    scene.settle(request, 60)
    assert scene.balance(restricted).excess == 0
    assert scene.used(shared) == (30, 0)


# ---------------------------------------------------------------------------------------------- shares


def test_a_cap_on_a_share_limits_its_pool_only(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.grant(own, 100)
    cap = scene.share(shared, user, 20, kind="capped", period="month")
    assert scene.deduct(100, user).outcome is ACCEPTED
    assert scene.used(cap) == (0, 0)
    verdict = scene.deduct(21, user)
    assert (verdict.detail, verdict.binding_id) == ("pool_exhausted", own)
    assert scene.deduct(20, user).outcome is ACCEPTED
    assert scene.used(cap) == (20, 0)


def test_a_used_up_cap_is_fresh_again_in_the_next_month_also_when_it_was_skipped_before(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(shared, 100)
    scene.share(shared, user, 20, kind="capped", period="month")
    scene.deduct(20, user)
    scene.grant(own, 30)
    scene.deduct(1, user)  # the shared pool is left out of the chain now
    scene.now = datetime(2026, 7, 1, tzinfo=UTC)
    assert scene.deduct(49, user).outcome is ACCEPTED


def test_ending_a_share_gives_its_rest_and_later_its_hold_back_to_the_open_part(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 60)
    request = scene.hold(25, user)
    scene.end_share(share)
    assert scene.balance(scene.open_part(pool)).limit == 75
    assert scene.extend(request, 1).outcome is REFUSED  # nothing more can be held on it
    scene.settle(request, 5)
    assert scene.balance(scene.open_part(pool)).limit == 95
    assert scene.deduct(95, other).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_hold_that_alone_kept_an_ended_share_frees_the_open_part_when_nothing_is_charged(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 60)
    request = scene.hold(25, user)
    scene.end_share(share)
    scene.settle(request, 0)
    assert scene.balance(scene.open_part(pool)).limit == 100
    assert scene.findings() == []


def test_late_use_of_an_ended_share_comes_off_the_open_part(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(pool, 100)
    scene.grant(own, 5)
    share = scene.share(pool, user, 60)
    request = scene.hold(25, user)  # 5 of its own and 20 of its share
    scene.end_share(share)
    scene.settle(request, 15)
    assert scene.balance(scene.open_part(pool)).limit == 90
    assert scene.findings() == []


def test_a_share_over_its_limit_claims_what_it_used(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    scene.share(pool, user, 20)
    scene.settle(scene.hold(20, user), 50)
    assert scene.deduct(51, other).outcome is REFUSED
    assert scene.deduct(50, other).outcome is ACCEPTED
    assert scene.findings() == []


def test_more_than_the_open_part_is_reserved_only_by_an_explicit_switch(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    scene.share(pool, user, 70)
    with scene.refusal("BR430"):
        scene.share(pool, other, 31)
    scene.share(pool, other, 90, oversubscribe=True)
    assert scene.balance(scene.open_part(pool)).limit == 0
    assert outcomes([scene.deduct(70, user), scene.deduct(31, other), scene.deduct(30, other)]) == [
        ACCEPTED,
        REFUSED,
        ACCEPTED,
    ]


# ---------------------------------------------------------------------------------------------- grants and time


def test_grants_are_spendable_from_their_first_instant_until_just_before_their_last(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10, starts=scene.now + timedelta(hours=1), expires=scene.now + timedelta(hours=2))
    scene.later(hours=1, microseconds=-1)
    assert scene.deduct(1, user).outcome is REFUSED
    scene.later(microseconds=1)
    assert scene.deduct(1, user).outcome is ACCEPTED
    scene.later(hours=1, microseconds=-1)
    assert scene.deduct(1, user).outcome is ACCEPTED
    scene.later(microseconds=1)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(pool) == Balance(2, 2, 0, 0)


def test_what_an_expired_grant_holds_for_a_running_call_stays_payable_until_it_ends(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    request = scene.hold(60, user)
    scene.later(hours=2)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(pool).limit == 60
    scene.settle(request, 50)
    assert scene.balance(pool) == Balance(50, 50, 0, 0)
    assert scene.findings() == []


def test_a_hold_placed_after_the_expiry_keeps_nothing_of_the_grant(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    scene.grant(pool, 100)
    before = scene.hold(10, user)
    scene.later(hours=2)
    scene.hold(50, user)
    assert scene.balance(pool).limit == 110
    scene.release(before)
    assert scene.balance(pool).limit == 100


def test_holds_draw_on_what_burns_first_before_they_keep_an_expired_grant(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 30, priority=1)
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    scene.hold(50, user)
    scene.later(hours=2)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(pool).limit == 50


def test_use_is_paid_by_the_grants_there_were_at_the_time(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    old = scene.grant(pool, 100)
    scene.deduct(10, user)
    new = scene.grant(pool, 100, priority=1)
    scene.deduct(10, user)
    scene.admin("select credits.pour(%s, %s, %s)", scene.organization, pool, scene.now)
    rows = scene.admin("select grant_id, end_micros from credits.burns where pool_id = %s order by start_micros", pool)
    assert rows == [(old, 10), (new, 20)]


def test_what_no_grant_covers_is_paid_by_the_next_one(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    first = scene.grant(pool, 10)
    scene.settle(scene.hold(10, user), 25)
    second = scene.grant(pool, 100)
    scene.admin("select credits.pour(%s, %s, %s)", scene.organization, pool, scene.now)
    rows = scene.admin("select grant_id, end_micros from credits.burns where pool_id = %s order by start_micros", pool)
    assert rows == [(first, 10), (second, 25)]
    assert scene.findings() == []


def test_credit_given_back_to_an_expired_grant_cannot_be_spent_again(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    request = scene.hold(60, user, flags=Flag.SENT, lease_seconds=60)
    scene.later(minutes=2)
    assert scene.expire() == 1
    scene.later(hours=2)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.settle(request, 20, user).outcome is ACCEPTED  # 40 less than the estimate
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(pool) == Balance(20, 20, 0, 0)
    assert scene.findings() == []


def test_credit_given_back_to_an_expired_grant_is_gone_with_the_hold_that_ends_in_the_same_batch(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 60, expires=scene.now + timedelta(hours=1))
    scene.grant(pool, 100)
    charged = scene.hold(60, user, flags=Flag.SENT, lease_seconds=60)
    held = scene.hold(30, user, lease_seconds=90_000)
    scene.later(minutes=2)
    assert scene.expire() == 1
    scene.later(hours=2)
    moves = [scene.asked(Action.SETTLE, charged, 20, user_id=user), scene.asked(Action.RELEASE, held)]
    verdicts = scene.move(*moves, scene.asked(Action.DEDUCT, None, 101, user_id=user))
    assert [verdict.outcome for verdict in verdicts] == [ACCEPTED, ACCEPTED, REFUSED]
    assert scene.balance(pool) == Balance(120, 20, 0, 0)
    assert scene.findings() == []


def test_the_grant_that_expires_sooner_burns_first_and_a_free_one_before_a_paid_one(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    paid = scene.grant(pool, 10)
    free = scene.grant(pool, 10, free=True)
    soon = scene.grant(pool, 10, expires=scene.now + timedelta(days=1))
    first = scene.grant(pool, 10, priority=1)
    scene.deduct(35, user)
    scene.admin("select credits.pour(%s, %s, %s)", scene.organization, pool, scene.now)
    rows = scene.admin("select grant_id, end_micros from credits.burns where pool_id = %s order by start_micros", pool)
    assert rows == [(first, 10), (soon, 20), (free, 30), (paid, 35)]


def test_voiding_takes_what_is_left_but_nothing_that_is_held(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    grant = scene.grant(pool, 100)
    scene.deduct(20, user)
    request = scene.hold(30, user)
    assert scene.void(grant, key="void") == 50
    assert scene.void(grant, key="void") == 50  # the same command again: its stored result
    assert scene.balance(pool) == Balance(50, 20, 30, 0)
    scene.release(request)
    assert scene.void(grant) == 30
    assert scene.findings() == []


def test_voiding_sees_what_has_expired(scene: Scene) -> None:
    pool = scene.pool()
    grant = scene.grant(pool, 100, expires=scene.now + timedelta(hours=1))
    scene.later(hours=1)
    assert scene.void(grant) == 0
    assert scene.findings() == []


def test_a_grant_voided_before_it_starts_never_starts(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    grant = scene.grant(pool, 100, starts=scene.now + timedelta(hours=1))
    assert scene.void(grant) == 100
    scene.later(hours=2)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- periods


def test_a_limit_is_fresh_in_the_very_instant_its_period_begins(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    limit = scene.limit(10, scope="user", of=user, period="day")
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.now = datetime(2026, 6, 10, 23, 59, 59, 999999, tzinfo=UTC)
    assert scene.deduct(1, user).outcome is REFUSED
    scene.later(microseconds=1)
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.used(limit) == (10, 0)


def test_a_hold_settles_in_the_period_it_was_placed_in(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    limit = scene.limit(10, scope="user", of=user, period="day")
    request = scene.hold(10, user)
    scene.later(days=1)
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.settle(request, 7)
    assert scene.used(limit) == (10, 0)
    scene.now = NOON
    assert scene.used(limit) == (7, 0)
    assert scene.findings() == []


def test_changing_a_limit_leaves_past_periods_as_they_were(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    limit = scene.limit(10, scope="user", of=user, period="day")
    scene.deduct(10, user)
    scene.later(days=1)
    scene.limit(5, scope="user", of=user, period="day")
    scene.now = NOON
    assert scene.balance(limit) == Balance(10, 10, 0, 0)


def test_a_new_zone_gives_nobody_a_fresh_limit_before_the_period_ends(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    scene.limit(10, scope="user", of=user, period="day")
    scene.deduct(10, user)
    scene.admin("update identity.organizations set zone = 'Asia/Tokyo' where organization_id = %s", scene.organization)
    scene.changed()
    scene.now = datetime(2026, 6, 10, 18, 0, tzinfo=UTC)  # the 11th in Tokyo
    assert scene.deduct(1, user).outcome is REFUSED
    scene.now = datetime(2026, 6, 11, 0, 0, tzinfo=UTC)  # the period ends as it began; the next one ends in Tokyo
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.now = datetime(2026, 6, 11, 15, 0, tzinfo=UTC)
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_day_whose_midnight_comes_twice_begins_once(scene: Scene) -> None:
    # Havana puts clocks back from 1:00 to 0:00 on 1 November 2026, at 5:00 UTC.
    scene.admin(
        "update identity.organizations set zone = 'America/Havana' where organization_id = %s", scene.organization
    )
    user, other = scene.user(), scene.user()
    scene.grant(scene.pool(), 1000)
    scene.now = datetime(2026, 11, 1, 3, 30, tzinfo=UTC)  # 23:30 on 31 October
    scene.limit(10, period="day")
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.now = datetime(2026, 11, 1, 4, 30, tzinfo=UTC)  # 0:30, the first time
    assert outcomes([scene.deduct(10, user), scene.deduct(10, other)]) == [REFUSED, REFUSED]
    scene.now = datetime(2026, 11, 1, 5, 0, tzinfo=UTC)  # 0:00, the second time
    assert outcomes([scene.deduct(10, user), scene.deduct(10, other)]) == [ACCEPTED, REFUSED]


def test_a_limit_first_used_while_midnight_comes_twice_counts_for_the_day_before(scene: Scene) -> None:
    zone = "update identity.organizations set zone = 'America/Havana' where organization_id = %s"
    scene.admin(zone, scene.organization)
    user, other = scene.user(), scene.user()
    scene.grant(scene.pool(), 1000)
    scene.now = datetime(2026, 11, 1, 4, 30, tzinfo=UTC)  # 0:30, the first time
    scene.limit(10, period="day")
    assert outcomes([scene.deduct(10, user), scene.deduct(10, other)]) == [ACCEPTED, REFUSED]
    scene.now = datetime(2026, 11, 1, 5, 0, tzinfo=UTC)
    assert scene.deduct(10, other).outcome is ACCEPTED


# ---------------------------------------------------------------------------------------------- holds


def test_a_hold_that_was_never_sent_is_released_by_expiry(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(40, user, lease_seconds=60)
    scene.later(seconds=60)
    assert scene.expire() == 1
    assert scene.used(pool) == (0, 0)
    assert scene.settle(request, 30, user).charged_micros == 30  # what was used is charged, however late
    assert scene.settle(request, 30, user).outcome is KNOWN
    assert scene.used(pool) == (30, 0)
    assert [row[3] for row in scene.charges(request)] == [128]


def test_an_expired_hold_that_was_sent_is_charged_by_estimate_and_corrected_once(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    tokens = scene.limit(1000, metric="tokens")
    scene.grant(pool, 100)
    request = scene.hold(40, user, tokens=400, flags=Flag.SENT, lease_seconds=60)
    scene.later(seconds=60)
    scene.expire()
    assert (scene.used(pool), scene.used(tokens)) == ((40, 0), (400, 0))
    calls = "select sum(requests) from ledger.attribution where request_id = %s"
    assert scene.admin(calls, request) == [(1,)]
    scene.later(seconds=1)
    assert scene.settle(request, 25, user, tokens=250).charged_micros == 25
    assert (scene.used(pool), scene.used(tokens)) == ((25, 0), (250, 0))
    again = scene.settle(request, 60, user, tokens=600)
    assert (again.outcome, again.charged_micros) == (KNOWN, 25)
    assert [row[:2] for row in scene.charges(request)] == [(0, 40), (1, -15)]
    assert scene.admin(calls, request) == [(1,)]
    assert scene.findings() == []


def test_a_stream_that_expired_is_charged_its_last_progress_and_never_below_its_input(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    streamed = Flag.SENT | Flag.STREAMED
    far = scene.hold(90, user, mark_micros=10, flags=streamed, lease_seconds=60)
    near = scene.hold(90, user, mark_micros=10, flags=streamed, lease_seconds=60)
    scene.extend(far, 0, mark_micros=35, flags=streamed, lease_seconds=60)
    scene.later(seconds=60)
    scene.expire()
    assert [scene.charges(request)[0][1] for request in (far, near)] == [35, 10]


def test_a_correction_goes_back_to_the_pools_that_paid_last_first(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 30)
    scene.grant(shared, 100)
    request = scene.hold(50, user, flags=Flag.SENT, lease_seconds=60)
    scene.later(seconds=60)
    scene.expire()
    assert (scene.used(own), scene.used(shared)) == ((30, 0), (20, 0))
    assert scene.settle(request, 10, user).outcome is ACCEPTED
    assert (scene.used(own), scene.used(shared)) == ((10, 0), (0, 0))
    assert scene.findings() == []


def test_an_authorize_asked_again_finds_its_hold(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(40, user)
    again = scene.authorize(40, user, request)
    assert (again.outcome, again.held_micros) == (KNOWN, 40)
    assert scene.used(pool) == (0, 40)


def test_a_correction_lets_a_pool_be_used_again(scene: Scene) -> None:
    shared, user = scene.pool(), scene.user()
    own = scene.pool("personal", owner=user)
    scene.grant(own, 10)
    scene.grant(shared, 100)
    request = scene.hold(10, user, flags=Flag.SENT, lease_seconds=60)
    scene.later(seconds=60)
    scene.expire()
    scene.deduct(1, user)
    scene.deduct(1, user)  # by a chain without the empty pool
    scene.settle(request, 4, user)
    scene.deduct(6, user)
    assert scene.used(own) == (10, 0)


def test_a_renewed_lease_is_not_expired(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(40, user, lease_seconds=60)
    scene.later(seconds=50)
    scene.extend(request, 0, lease_seconds=60)
    scene.later(seconds=20)
    # As expire_holds would, had it looked before the lease was renewed.
    assert scene.release(request, flags=Flag(64)).outcome is NO_HOLD
    assert scene.used(pool) == (0, 40)


def test_an_extension_and_the_end_of_its_hold_may_meet_in_one_batch(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(20, user)
    verdicts = scene.move(
        scene.asked(Action.EXTEND, request, 10),
        scene.asked(Action.SETTLE, request, 15),
        scene.asked(Action.SETTLE, request, 15),
        scene.asked(Action.RELEASE, request),
    )
    assert outcomes(verdicts) == [NO_HOLD, ACCEPTED, KNOWN, NO_HOLD]
    assert scene.used(pool) == (15, 0)
    assert scene.findings() == []


def test_two_extensions_of_one_hold_in_one_batch_both_count(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(20, user)
    verdicts = scene.move(scene.asked(Action.EXTEND, request, 10), scene.asked(Action.EXTEND, request, 5))
    assert [verdict.held_micros for verdict in verdicts] == [30, 35]
    assert scene.used(pool) == (0, 35)
    assert scene.findings() == []


def test_one_request_asked_twice_in_one_batch_is_answered_once(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.deduct(0, user)
    deduction, hold = uuid7(), uuid7()
    verdicts = scene.move(
        scene.asked(Action.DEDUCT, deduction, 10, user_id=user),
        scene.asked(Action.AUTHORIZE, hold, 20, user_id=user),
        scene.asked(Action.DEDUCT, deduction, 10, user_id=user),
        scene.asked(Action.AUTHORIZE, hold, 20, user_id=user),
        scene.asked(Action.DEDUCT, hold, 20, user_id=user),
    )
    assert outcomes(verdicts) == [ACCEPTED, ACCEPTED, KNOWN, KNOWN, NOT_ALLOWED]
    assert scene.used(pool) == (10, 20)
    assert scene.findings() == []


def test_a_hold_ends_on_the_model_it_was_placed_for(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    limit = scene.limit(50, models="big%")
    request = scene.hold(20, user, model="big-1")
    assert scene.extend(request, 10, model=None).outcome is ACCEPTED
    assert scene.used(limit) == (0, 30)
    assert scene.settle(request, 25, model="small").outcome is ACCEPTED
    assert scene.used(limit) == (25, 0)
    assert scene.findings() == []


def test_whether_the_customers_own_key_pays_is_decided_when_the_hold_is_placed(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    ours, theirs = scene.hold(20, user), scene.hold(20, user, flags=Flag.OWN_KEY)
    assert scene.used(pool) == (0, 20)
    assert scene.settle(ours, 15, flags=Flag.OWN_KEY).charged_micros == 15
    assert scene.settle(theirs, 15).charged_micros == 0
    assert scene.used(pool) == (15, 0)
    assert scene.findings() == []


def test_the_customers_own_key_needs_no_credits_but_passes_limits_on_calls(scene: Scene) -> None:
    user = scene.user()
    scene.limit(1, metric="calls")
    verdict = scene.deduct(5, user, flags=Flag.OWN_KEY, cost_nano_usd=700)
    assert (verdict.outcome, verdict.charged_micros) == (ACCEPTED, 0)
    assert scene.deduct(5, user, flags=Flag.OWN_KEY).detail == "cap_reached"
    scene.limit(9, metric="calls")
    pool = scene.pool()
    assert scene.deduct(0, user, flags=Flag.OWN_KEY).outcome is ACCEPTED
    verdicts = [scene.deduct(5, user, flags=Flag.OWN_KEY), scene.authorize(5, user, flags=Flag.OWN_KEY)]
    assert [(each.outcome, each.held_micros, each.charged_micros) for each in verdicts] == [(ACCEPTED, 0, 0)] * 2
    assert scene.used(pool) == (0, 0)
    assert scene.admin(
        "select customer_cost_nano_usd from ledger.attribution where request_id = %s", verdict.request_id
    ) == [(700,)]


def test_usage_is_charged_late_also_when_the_limits_have_changed_since(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(20, user)
    scene.release(request)
    scene.limit(5)
    assert scene.settle(request, 20, user).outcome is ACCEPTED
    assert scene.used(pool) == (20, 0)


def test_a_settle_that_no_pool_could_pay_harms_nobody_else_in_its_batch(scene: Scene) -> None:
    other = Scene(scene.conn)
    user = other.user()
    pool = other.pool()
    other.grant(pool, 10)
    verdicts = scene.move(
        scene.asked(Action.SETTLE, None, 5, user_id=scene.user()), other.asked(Action.DEDUCT, None, 5, user_id=user)
    )
    assert [(verdict.outcome, verdict.detail) for verdict in verdicts] == [(NOT_ALLOWED, "no_pool"), (ACCEPTED, None)]


# ---------------------------------------------------------------------------------------------- guesses


def test_a_strict_limit_takes_no_guess_and_nothing_of_it_stays(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    guess = {"user_id": user, "flags": Flag.UNLIMITED, "idempotency_key": "once", "body_hash": b"same"}
    for models in (None, "m%"):  # decided set-based, and entry by entry
        limit = scene.limit(90, models=models, strict=True)
        verdict = scene.move(scene.asked(Action.AUTHORIZE, None, 10, **guess))[0]
        assert (verdict.outcome, verdict.detail) == (RESIZE, "strict")
        assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is RESIZE
        assert scene.used(limit) == (0, 0)
        assert scene.limit(90, models=models) == limit, "set again without: no longer strict"
        assert scene.authorize(10, user, scene.hold(10, user), flags=Flag.UNLIMITED).outcome is KNOWN
    assert scene.admin("select 1 from credits.unbilled_requests where organization_id = %s", scene.organization) == []
    assert scene.move(scene.asked(Action.AUTHORIZE, None, 10, **guess))[0].outcome is ACCEPTED, "its key is free"
    assert scene.findings() == []


def test_a_limit_that_becomes_strict_takes_no_guess_from_the_next_batch_on(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.limit(90)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is ACCEPTED
    scene.limit(90, strict=True)
    verdicts = scene.move(
        scene.asked(Action.AUTHORIZE, None, 10, user_id=user, flags=Flag.UNLIMITED),
        scene.asked(Action.AUTHORIZE, None, 10, user_id=user),
        scene.asked(Action.DEDUCT, None, 10, user_id=user),
    )
    assert outcomes(verdicts) == [RESIZE, ACCEPTED, ACCEPTED]


def test_a_strict_limit_on_other_models_or_on_what_the_customers_own_key_does_not_use_takes_guesses(
    scene: Scene,
) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.limit(90, models="big%", strict=True)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is ACCEPTED
    assert scene.authorize(10, user, flags=Flag.UNLIMITED, model="big-1").outcome is RESIZE
    assert scene.authorize(0, user, flags=Flag.UNLIMITED | Flag.OWN_KEY, model="big-1").outcome is ACCEPTED
    scene.limit(90, metric="tokens", strict=True)
    assert scene.authorize(0, user, flags=Flag.UNLIMITED | Flag.OWN_KEY, tokens=1).outcome is RESIZE


def test_a_strict_default_takes_no_guess_from_anybody_and_a_limit_of_ones_own_none_where_the_default_had_counted(
    scene: Scene,
) -> None:
    user, other = scene.user(), scene.user()
    scene.grant(scene.pool(), 100)
    scene.limit(90, scope="user", each=True, strict=True)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is RESIZE
    assert scene.authorize(10, user).outcome is ACCEPTED
    own = scene.limit(80, scope="user", of=user)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is ACCEPTED
    scene.limit(80, scope="user", of=user, strict=True)
    scene.limit(90, scope="user", each=True)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is RESIZE
    assert scene.authorize(10, other, flags=Flag.UNLIMITED).outcome is ACCEPTED
    scene.end_limit(own)
    scene.limit(90, models="big%", strict=True)
    assert scene.authorize(10, user, flags=Flag.UNLIMITED).outcome is ACCEPTED
    assert scene.findings() == []


def test_a_guess_without_room_may_be_made_again_and_its_refusal_is_not_final(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.deduct(80, user)
    guess = {"user_id": user, "idempotency_key": "once", "body_hash": b"same"}
    guesses = Flag.UNLIMITED | Flag.MAY_WAIT | Flag.MAY_RESIZE
    first = scene.move(scene.asked(Action.AUTHORIZE, None, 30, flags=guesses, **guess))[0]
    assert (first.outcome, first.detail, first.binding_id) == (RESIZE, "pool_exhausted", pool)
    assert first.available_micros == 20
    assert scene.admin("select 1 from credits.unbilled_requests where organization_id = %s", scene.organization) == []
    assert scene.move(scene.asked(Action.AUTHORIZE, first.request_id, 20, flags=guesses, **guess))[0].held_micros == 20
    assert scene.authorize(20, user, flags=guesses).outcome is WAIT
    final = [
        scene.asked(Action.AUTHORIZE, None, 21, user_id=user, flags=f) for f in (guesses, guesses & ~Flag.MAY_RESIZE)
    ]
    assert outcomes(scene.move(*final)) == [RESIZE, REFUSED]
    assert scene.findings() == []


def test_an_extension_to_a_total_asked_again_after_an_unknown_answer_holds_nothing_twice(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    limit = scene.limit(90, metric="tokens")
    request = scene.hold(20, user, tokens=5, cost_nano_usd=50)
    wanted = scene.asked(Action.EXTEND, request, 60, tokens=25, cost_nano_usd=150, flags=Flag.IN_ALL)
    for again in (wanted, wanted.repeated(), wanted):
        assert scene.move(again)[0].held_micros == 60
    assert scene.move(wanted, wanted._replace(amount_micros=Micros(70)))[1].held_micros == 70
    assert (scene.used(pool), scene.used(limit)) == ((0, 70), (0, 25))
    held = "select amount_micros, tokens, cost_nano_usd from credits.holds where request_id = %s"
    assert scene.admin(held, request) == [(70, 25, 150)]
    less = scene.move(wanted._replace(amount_micros=Micros(10), tokens=1))[0]
    assert (less.outcome, less.held_micros) == (ACCEPTED, 70), "a hold is never taken down"
    assert scene.extend(request, 101, flags=Flag.IN_ALL).outcome is REFUSED
    assert scene.extend(request, 100, flags=Flag.IN_ALL).held_micros == 100
    assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- who may spend


def test_a_revoked_key_spends_nothing_from_the_next_batch_on(scene: Scene) -> None:
    user = scene.user()
    key = scene.key(user)
    scene.grant(scene.pool(), 100)
    assert scene.deduct(1, user, api_key_id=key).outcome is ACCEPTED
    scene.admin("update identity.api_keys set revoked_at = %s where api_key_id = %s", scene.now, key)
    scene.changed()
    verdict = scene.deduct(1, user, api_key_id=key)
    assert (verdict.outcome, verdict.detail) == (NOT_ALLOWED, "key_revoked")


def test_a_key_expires_in_its_very_instant(scene: Scene) -> None:
    user = scene.user()
    key = scene.key(user, expires_at=scene.now + timedelta(hours=1))
    scene.grant(scene.pool(), 100)
    scene.later(hours=1, microseconds=-1)
    assert scene.deduct(1, user, api_key_id=key).outcome is ACCEPTED
    scene.later(microseconds=1)
    assert scene.deduct(1, user, api_key_id=key).detail == "key_expired"


def test_a_members_key_spends_for_nobody_else(scene: Scene) -> None:
    user, other = scene.user(), scene.user()
    key = scene.key(user)
    scene.grant(scene.pool(), 100)
    assert scene.deduct(1, other, api_key_id=key).detail == "key_unknown"
    assert scene.deduct(1, None, api_key_id=key).detail == "key_unknown"


def test_a_key_of_another_organization_spends_nothing_here(scene: Scene) -> None:
    elsewhere = Scene(scene.conn)
    key = elsewhere.key(None)
    scene.grant(scene.pool(), 100)
    assert scene.deduct(1, None, api_key_id=key).detail == "key_unknown"


def test_who_is_no_active_member_spends_nothing(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    assert scene.deduct(1, user).outcome is ACCEPTED
    scene.admin("update identity.memberships set status = 'suspended' where user_id = %s", user)
    scene.changed()
    assert {scene.deduct(1, user).detail, scene.deduct(1, user).detail} == {"not_a_member"}
    assert scene.deduct(1, uuid7()).detail == "not_a_member"


def test_a_frozen_organization_spends_nothing(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.admin("update identity.organizations set status = 'frozen' where organization_id = %s", scene.organization)
    scene.changed()
    assert scene.deduct(1, user).detail == "organization_closed"


def test_a_rotated_key_stays_under_the_limit_of_the_key_it_replaces(scene: Scene) -> None:
    user = scene.user()
    key = scene.key(user)
    scene.grant(scene.pool(), 100)
    scene.limit(10, scope="key", of=key)
    scene.deduct(8, user, api_key_id=key)
    rotated = scene.key(user, original=key)
    assert outcomes([scene.deduct(3, user, api_key_id=rotated), scene.deduct(2, user, api_key_id=rotated)]) == [
        REFUSED,
        ACCEPTED,
    ]


def test_a_change_of_limits_reaches_every_user_at_once(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.limit(5)
    assert scene.deduct(10, user).outcome is REFUSED


# ---------------------------------------------------------------------------------------------- idempotency


def test_the_same_key_and_body_has_one_effect_and_one_answer(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    first = scene.deduct(10, user, idempotency_key="k", body_hash=b"1")
    again = scene.deduct(10, user, idempotency_key="k", body_hash=b"1")
    assert (again.outcome, again.request_id, again.charged_micros) == (KNOWN, first.request_id, 10)
    assert scene.deduct(10, user, idempotency_key="k", body_hash=b"2").outcome is KEY_REUSED
    assert scene.used(pool) == (10, 0)


def test_twins_in_one_batch_have_one_effect(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    assert scene.deduct(0, user).accepted  # with a chain that stands, a batch is decided in the short way
    twins = [
        scene.asked(Action.DEDUCT, None, 10, user_id=user, idempotency_key="k", body_hash=body)
        for body in (b"1", b"1", b"2")
    ]
    verdicts = scene.move(*twins)
    assert outcomes(verdicts) == [ACCEPTED, KNOWN, KEY_REUSED]
    assert verdicts[1].request_id == verdicts[0].request_id
    assert scene.used(pool) == (10, 0)


def test_what_was_refused_under_a_key_stays_refused(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    assert scene.deduct(10, user, idempotency_key="empty", body_hash=b"").outcome is REFUSED
    assert scene.deduct(10, uuid7(), idempotency_key="stranger", body_hash=b"").outcome is NOT_ALLOWED
    scene.grant(pool, 100)
    assert scene.deduct(10, user, idempotency_key="empty", body_hash=b"").outcome is KNOWN_REFUSED
    assert scene.deduct(10, user, idempotency_key="stranger", body_hash=b"").outcome is KNOWN_REFUSED
    scene.later(hours=24)
    assert scene.deduct(10, user, idempotency_key="empty", body_hash=b"").outcome is ACCEPTED


def test_a_key_of_another_organization_is_free_here(scene: Scene) -> None:
    other = Scene(scene.conn)
    for each in (scene, other):
        user = each.user()
        each.grant(each.pool(), 100)
        assert each.deduct(10, user, idempotency_key="k", body_hash=b"1").outcome is ACCEPTED


def test_a_release_frees_its_key_but_only_when_something_was_released(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    released = scene.hold(10, user, idempotency_key="a", body_hash=b"")
    assert scene.release(released, idempotency_key="a", body_hash=b"").outcome is ACCEPTED
    assert scene.authorize(10, user, idempotency_key="a", body_hash=b"").outcome is ACCEPTED
    settled = scene.hold(10, user, idempotency_key="b", body_hash=b"")
    scene.settle(settled, 10)
    assert scene.release(settled, idempotency_key="b", body_hash=b"").outcome is NO_HOLD
    assert scene.authorize(10, user, idempotency_key="b", body_hash=b"").outcome is KNOWN


def test_a_key_whose_call_came_to_nothing_is_free_again(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(10, user, idempotency_key="k", body_hash=b"", lease_seconds=60)
    scene.later(seconds=60)
    scene.expire()
    again = scene.authorize(10, user, request, idempotency_key="k", body_hash=b"")  # by the same request
    assert again.outcome is ACCEPTED
    scene.release(request)
    other = scene.hold(10, user, idempotency_key="k", body_hash=b"")  # and by another
    assert scene.authorize(10, user, idempotency_key="k", body_hash=b"").request_id == other
    # The very batch that charges the first call after all finds the key free.
    scene.release(other)
    verdicts = scene.move(
        scene.asked(Action.SETTLE, other, 10, user_id=user),
        scene.asked(Action.AUTHORIZE, None, 10, user_id=user, idempotency_key="k", body_hash=b""),
    )
    assert outcomes(verdicts) == [ACCEPTED, ACCEPTED]
    assert scene.used(pool) == (10, 10)


def test_a_request_without_sense_leaves_its_key_as_it_was(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    first = scene.deduct(10, user, idempotency_key="k", body_hash=b"")
    assert scene.deduct(-1, user, idempotency_key="k", body_hash=b"").detail == "request_invalid"
    again = scene.deduct(10, user, idempotency_key="k", body_hash=b"")
    assert (again.outcome, again.request_id) == (KNOWN, first.request_id)
    assert scene.used(pool) == (10, 0)


def test_a_deduction_asked_again_after_an_unknown_answer_is_not_booked_again(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.deduct(10, user).request_id
    scene.later(seconds=1)
    assert scene.deduct(10, user, request, flags=Flag.REPEATED).outcome is KNOWN
    scene.admin("update identity.memberships set status = 'suspended' where user_id = %s", user)
    scene.changed()
    again = scene.deduct(10, user, request, flags=Flag.REPEATED)
    assert (again.outcome, again.charged_micros) == (KNOWN, 10)
    assert scene.used(pool) == (10, 0)


def test_a_command_of_the_same_key_with_another_body_is_refused(scene: Scene) -> None:
    pool = scene.pool()
    grant = scene.grant(pool, 10, key="k")
    assert scene.grant(pool, 10, key="k") == grant
    with scene.refusal("BR422"):
        scene.grant(pool, 11, key="k")
    assert scene.balance(pool).limit == 10


def test_a_key_of_a_command_is_no_key_of_a_request(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10, key="k")
    assert scene.deduct(1, user, idempotency_key="k", body_hash=b"").outcome is KEY_REUSED
    scene.deduct(1, user, idempotency_key="l", body_hash=b"")
    with scene.refusal("BR422"):
        scene.grant(pool, 10, key="l")


# ---------------------------------------------------------------------------------------------- input


def test_a_request_without_sense_is_refused_and_harms_nobody_else_in_its_batch(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    wrong = [
        scene.asked(Action.DEDUCT, None, -1, user_id=user),
        scene.asked(Action.DEDUCT, None, 10**15 + 1, user_id=user),
        scene.asked(Action.DEDUCT, None, 2**63 - 1, user_id=user),
        scene.asked(Action.AUTHORIZE, None, -1, user_id=user),
        scene.asked(Action.AUTHORIZE, None, 1, user_id=user, lease_seconds=0),
        scene.asked(Action.DEDUCT, None, 1, user_id=user, tokens=-1),
        scene.asked(Action.DEDUCT, None, 1, user_id=user, cost_nano_usd=-1),
        scene.asked(Action.AUTHORIZE, None, 1, user_id=user, mark_micros=-1),
        scene.asked(Action.SETTLE, None, -1, user_id=user),
        scene.asked(Action.DEDUCT, None, 1, user_id=user, idempotency_key="", body_hash=b""),
        scene.asked(Action.DEDUCT, None, 1, user_id=user, idempotency_key="k" * 256, body_hash=b""),
        scene.asked(Action.DEDUCT, None, 1, user_id=user, idempotency_key="k", body_hash=None),
    ]
    right = scene.asked(Action.DEDUCT, None, 100, user_id=user)
    verdicts = scene.move(*wrong, right)
    assert {(verdict.outcome, verdict.detail) for verdict in verdicts[:-1]} == {(NOT_ALLOWED, "request_invalid")}
    assert verdicts[-1].outcome is ACCEPTED
    assert scene.used(pool) == (100, 0)


def test_an_extension_cannot_take_a_hold_down(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(40, user)
    assert scene.extend(request, -30).detail == "request_invalid"
    assert scene.used(pool) == (0, 40)


def test_nothing_is_asked_for_nothing(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 10)
    scene.deduct(10, user)
    assert scene.deduct(0, user).outcome is ACCEPTED
    request = scene.hold(0, user)
    assert scene.extend(request, 0).outcome is ACCEPTED
    assert scene.settle(request, 0).charged_micros == 0
    assert scene.findings() == []


def test_arrays_that_do_not_match_are_refused_as_a_whole(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    call = (
        "select count(*) from credits.move_batch(%s, %s, '{5}', %s, %s, '{null}', '{1}', '{0}', '{0}', <usage>, '{0}', "
        "'{0}', '{0}', '{null}', <models>, '{null}', '{null}', <conversations>, '{null}', '{null}', '{null}', "
        "<features>)"
    )
    good = {"usage": "'{0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,0}'", "models": "'{m}'", "conversations": "'{null}'"}
    good["features"] = "'{null}'"

    def count(**other: str) -> int:
        sql = call
        for name, value in (good | other).items():
            sql = sql.replace(f"<{name}>", value)
        return int(scene.call(sql, scene.organization, [scene.organization], [uuid7()], [user]))

    for wrong in (
        {"usage": "'{0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0}'"},
        {"usage": "'{0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,null}'"},
        {"usage": "'{0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,-1}'"},
        {"usage": "null"},
        {"conversations": "'{}'"},
        {"features": "'{f,f}'"},
        {"conversations": "'{null,null}'"},
        {"models": "'{m,m}'"},
        {"models": "null"},
    ):
        with scene.refusal("BR400"):
            count(**wrong)
    assert count() == 1


def test_commands_refuse_amounts_without_sense(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    for amount in (None, 0, -1, 10**15 + 1, 2**63 - 1):
        with scene.refusal("BR400"):
            scene.grant(pool, amount)
    for amount in (None, -1, 2**63 - 1):
        with scene.refusal("BR400"):
            scene.share(pool, user, amount)
        with scene.refusal("BR400"):
            scene.limit(amount)
    assert scene.balance(pool) == Balance(0, 0, 0, 0)


def test_a_command_needs_a_key(scene: Scene) -> None:
    pool = scene.pool()
    for key in (None, "k" * 256):
        with scene.refusal("BR400"):
            scene.grant(pool, 1, key=key)
    scene.grant(pool, 1, key="k" * 255)
    assert scene.balance(pool) == Balance(1, 0, 0, 0)


def test_a_grant_that_ends_before_it_starts_is_refused(scene: Scene) -> None:
    pool = scene.pool()
    for starts, expires in ((None, scene.now), (scene.now + timedelta(days=2), scene.now + timedelta(days=1))):
        with scene.refusal("BR400"):
            scene.grant(pool, 10, starts=starts, expires=expires)
    scene.grant(pool, 10, expires=scene.now + timedelta(microseconds=1))
    assert scene.balance(pool) == Balance(10, 0, 0, 0)


def test_a_pool_that_would_overflow_refuses_the_grant_and_keeps_what_it_had(scene: Scene) -> None:
    pool = scene.pool()
    scene.grant(pool, 10**15)
    size = "update credits.balances set limit_amount = %s where organization_id = %s and balance_id = %s"
    scene.admin(size, 2**63 - 10**15, scene.organization, pool)
    with scene.refusal("22003"):
        scene.grant(pool, 10**15)
    assert scene.balance(pool).limit == 2**63 - 10**15
    assert scene.admin("select count(*) from credits.grants where pool_id = %s", pool) == [(1,)]
    scene.admin(size, 10**15, scene.organization, pool)
    assert scene.findings() == []


def test_a_filter_that_cannot_be_read_is_refused_before_it_can_fail_a_batch(scene: Scene) -> None:
    with scene.refusal("23514"):
        scene.limit(10, models="gpt\\")
    with scene.refusal("23514"):
        scene.pool(models="gpt\\")
    limit, user = scene.limit(10, models="gpt\\_4%"), scene.user()
    scene.grant(scene.pool(), 100)
    for model in ("gpt_4o", "gpt-4o"):  # the underscore is one, not any letter
        scene.deduct(5, user, model=model)
    assert scene.balance(limit).used == 5


# ---------------------------------------------------------------------------------------------- time and tenants


def test_only_the_simulator_dates_money(scene: Scene) -> None:
    pool = scene.pool()
    with scene.refusal("BR403"), scene.acting_as("bursar_app", scene.organization):
        scene.conn.execute(
            "select credits.open_pool(%s, %s, 'shared', null, 'x', null, now())", [scene.organization, pool]
        )
    with scene.refusal("BR403"), scene.acting_as("bursar_lane"):
        scene.conn.execute(
            "select * from credits.move_batch(%(o)s, %(os)s, '{5}', %(rs)s, '{null}', '{null}', '{1}', '{0}', '{0}', "
            "'{0,0,0,0,0,0,0,0,0,0,0,0,0,0,1,0,0}', '{0}', '{0}', '{0}', '{null}', '{m}', '{null}', '{null}', "
            "'{null}', '{null}', '{null}', '{null}', '{null}', now())",
            {"o": scene.organization, "os": [scene.organization], "rs": [uuid7()]},
        )
    scene.now += timedelta(days=99)
    later = scene.pool(models="b")
    assert scene.admin("select created_at from credits.pools where pool_id = %s", later) == [(scene.now,)]


def test_whether_there_is_enough_can_be_asked_before_anything_was_spent(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    with scene.acting_as("bursar_app", scene.organization):
        asked = "select credits.has_sufficient_credits(%s, %s, %s)"
        answers = [scene.conn.execute(asked, [scene.organization, user, amount]).fetchone() for amount in (100, 101)]
    assert answers == [(True,), (False,)]


# ---------------------------------------------------------------------------------------------- features


def test_a_pool_for_a_feature_pays_for_it_first_and_for_nothing_else(scene: Scene) -> None:
    shared, images, user = scene.pool(), scene.pool(models="#images"), scene.user()
    scene.grant(shared, 100)
    scene.grant(images, 100)
    scene.deduct(10, user, feature="images")
    scene.deduct(20, user, feature="chat")
    scene.deduct(30, user)
    assert (scene.balance(images).used, scene.balance(shared).used) == (10, 50)
    request = scene.hold(40, user, feature="images")
    assert (scene.balance(images).held, scene.balance(shared).held) == (40, 0)
    scene.settle(request, 40, user)
    assert (scene.balance(images).used, scene.balance(shared).used) == (50, 50)
    assert scene.findings() == []


def test_where_only_another_features_pool_has_credits_nothing_can_be_held(scene: Scene) -> None:
    images, user = scene.pool(models="#images"), scene.user()
    scene.grant(images, 100)
    assert scene.authorize(1, user, feature="chat").detail == "no_pool_for_model"
    assert scene.authorize(1, user).detail == "no_pool_for_model"
    assert scene.authorize(1, user, model="images").detail == "no_pool_for_model"
    assert scene.authorize(1, user, feature="images").outcome is ACCEPTED


def test_a_limit_on_features_counts_those_alone(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    limit, calls = scene.limit(30, models="#support-%"), scene.limit(3, models="#images", metric="calls")
    scene.deduct(20, user, feature="support-bot")
    for other in ({"feature": "support"}, {"model": "support-bot"}, {}):
        assert scene.deduct(100, user, **other).outcome is ACCEPTED
    assert scene.balance(limit).used == 20
    assert scene.deduct(11, user, feature="support-mail").detail == "cap_reached"
    request = scene.hold(10, user, feature="support-mail")
    assert scene.balance(limit).held == 10
    scene.release(request)
    assert (scene.balance(limit).used, scene.balance(limit).held) == (20, 0)
    for _ in range(3):
        scene.deduct(1, user, feature="images")
    assert scene.deduct(1, user, feature="images").detail == "cap_reached"
    assert scene.balance(calls).used == 3
    assert scene.findings() == []


def test_a_request_goes_on_for_the_feature_that_it_was_held_for(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    limit = scene.limit(50, models="#images")
    request = scene.hold(10, user, feature="images")
    scene.extend(request, 5, feature="chat")
    assert scene.balance(limit).held == 15
    scene.settle(request, 12, user, feature="chat")
    assert (scene.balance(limit).used, scene.balance(limit).held) == (12, 0)
    assert scene.admin("select feature from ledger.attribution where request_id = %s", request) == [("images",)]
    assert scene.findings() == []


def test_a_settle_keeps_the_feature_of_its_hold(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    request = scene.hold(10, user, feature="images")
    scene.settle(request, 10, user, feature="chat")
    assert scene.admin("select feature from ledger.attribution where request_id = %s", request) == [("images",)]


def test_what_costs_more_than_was_held_is_paid_by_pools_of_its_feature(scene: Scene) -> None:
    shared, images, other, user = scene.pool(), scene.pool(models="#images"), scene.pool(models="#chat"), scene.user()
    for pool, amount in ((shared, 100), (images, 10), (other, 100)):
        scene.grant(pool, amount)
    request = scene.hold(8, user, feature="images")
    scene.settle(request, 30, user)
    assert [scene.balance(pool).used for pool in (shared, images, other)] == [20, 10, 0]
    assert scene.findings() == []


def test_a_late_settle_is_paid_and_counted_by_its_feature(scene: Scene) -> None:
    shared, images, user = scene.pool(), scene.pool(models="#images"), scene.user()
    scene.grant(shared, 100)
    scene.grant(images, 10)
    limit = scene.limit(50, models="#images")
    request = scene.hold(5, user, feature="images")
    scene.release(request)
    assert scene.admin("select feature from credits.unbilled_requests where request_id = %s", request) == [("images",)]
    scene.settle(request, 12, user, feature="images")
    assert [scene.balance(each).used for each in (images, shared, limit)] == [10, 2, 12]
    assert scene.findings() == []


def test_a_correction_of_an_estimate_goes_by_the_feature_that_was_held_for(scene: Scene) -> None:
    shared, images, user = scene.pool(), scene.pool(models="#images"), scene.user()
    scene.grant(shared, 100)
    scene.grant(images, 10)
    limit = scene.limit(50, models="#images")
    request = scene.hold(5, user, feature="images", flags=Flag.SENT)
    scene.later(seconds=601)
    scene.expire()
    assert [scene.balance(each).used for each in (images, shared, limit)] == [5, 0, 5]
    scene.settle(request, 20, user)
    assert [scene.balance(each).used for each in (images, shared, limit)] == [10, 10, 20]
    assert scene.findings() == []


def test_a_refund_gives_a_limit_on_its_feature_room_again(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    images, chat = scene.limit(50, models="#images"), scene.limit(50, models="#chat")
    request = uuid7()
    scene.deduct(20, user, request, feature="images")
    scene.refund(request, 5)
    assert [scene.balance(each).used for each in (images, chat)] == [15, 0]
    assert scene.findings() == []
