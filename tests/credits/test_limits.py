"""Limits in full: cycles, defaults and what takes their place, limits that ask, raises for a time, renewed shares."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

from tests.credits.scenes import NOON, Balance, Scene

from bursar.clock import uuid7
from bursar.credits.moves import Outcome

ACCEPTED, REFUSED = Outcome.ACCEPTED, Outcome.REFUSED
DAY = timedelta(days=1)


def counter(scene: Scene, default: UUID, subject: UUID) -> UUID:
    """The balance that a default counts one subject on."""
    row = scene.admin(
        "select balance_id from credits.counters where limit_id = %s and subject_id = %s", default, subject
    )
    return row[0][0]  # type: ignore[no-any-return]


def cycle(scene: Scene, anchor: datetime) -> None:
    """The subscription began then."""
    scene.call("select credits.set_cycle(%s, %s, %s)", scene.organization, anchor, scene.now)


# ---------------------------------------------------------------------------------------------- cycles


def test_a_cycle_that_began_on_the_31st_begins_on_each_months_last_day_and_never_drifts(scene: Scene) -> None:
    anchor = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)
    at, starts = anchor, []
    for _ in range(14):
        starts.append(at)
        row = scene.admin("select starts_at, ends_at from credits.period_around('cycle', 'UTC', %s, %s)", anchor, at)
        assert row[0][0] == at
        at = row[0][1]
    days = [each.day for each in starts]
    assert days == [31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 28]
    assert {(each.hour, each.minute) for each in starts} == {(9, 30)}
    before = scene.admin("select starts_at from credits.period_around('cycle', 'UTC', %s, %s)", anchor, starts[1] - DAY)
    assert before == [(starts[0],)]


def test_a_cycle_begins_at_the_same_time_by_the_clocks_of_the_zone(scene: Scene) -> None:
    anchor = datetime(2026, 2, 15, 8, 0, tzinfo=UTC)  # 9:00 in Paris, in winter
    row = scene.admin(
        "select starts_at, ends_at, nr from credits.period_around('cycle', 'Europe/Paris', %s, %s)", anchor, NOON
    )
    assert row == [(datetime(2026, 5, 15, 7, 0, tzinfo=UTC), datetime(2026, 6, 15, 7, 0, tzinfo=UTC), 3)]


def test_a_limit_per_cycle_begins_anew_with_the_subscriptions_month(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cycle(scene, datetime(2026, 1, 11, 0, 0, tzinfo=UTC))
    scene.limit(10, scope="user", of=user, period="cycle")
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.now = datetime(2026, 6, 10, 23, 59, tzinfo=UTC)
    assert scene.deduct(1, user).outcome is REFUSED
    scene.now = datetime(2026, 6, 11, 0, 0, tzinfo=UTC)
    assert scene.deduct(10, user).outcome is ACCEPTED


def test_a_cycle_that_is_moved_gives_nobody_a_fresh_limit(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cycle(scene, datetime(2026, 1, 20, 0, 0, tzinfo=UTC))
    scene.limit(10, scope="user", of=user, period="cycle")
    assert scene.deduct(10, user).outcome is ACCEPTED
    cycle(scene, datetime(2026, 1, 12, 0, 0, tzinfo=UTC))
    scene.now = datetime(2026, 6, 13, 0, 0, tzinfo=UTC)
    assert scene.deduct(1, user).outcome is REFUSED, "the period that began on the 20th ends on the 20th"
    scene.now = datetime(2026, 6, 20, 0, 0, tzinfo=UTC)
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.now = datetime(2026, 7, 12, 0, 0, tzinfo=UTC)
    assert scene.deduct(10, user).outcome is ACCEPTED


# ---------------------------------------------------------------------------------------------- defaults


def test_a_default_counts_each_member_apart_and_makes_no_row_before_they_spend(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    default = scene.limit(10, scope="user", each=True, period="day")
    count = "select count(*) from credits.balances where organization_id = %s and kind = 'limit'"
    assert scene.admin(count, scene.organization) == [(0,)]
    assert scene.deduct(10, one).outcome is ACCEPTED
    assert scene.deduct(1, one).outcome is REFUSED
    assert scene.deduct(9, other).outcome is ACCEPTED
    assert scene.used(counter(scene, default, one)) == (10, 0)
    assert scene.used(counter(scene, default, other)) == (9, 0)
    assert not scene.findings()


def test_a_default_that_is_changed_holds_for_everybody_at_once(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    default = scene.limit(10, scope="user", each=True)
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.limit(30, scope="user", each=True) == default
    assert scene.deduct(20, user).outcome is ACCEPTED
    scene.limit(5, scope="user", each=True)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(counter(scene, default, user)) == Balance(5, 30, 0, 25)


def test_a_limit_of_ones_own_takes_a_defaults_place_and_goes_on_counting(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    default = scene.limit(10, scope="user", each=True)
    assert scene.deduct(8, user).outcome is ACCEPTED
    own = scene.limit(9, scope="user", of=user)
    assert scene.deduct(2, user).outcome is REFUSED, "8 of 9 are used: it begins with what the default had counted"
    assert scene.deduct(1, user).outcome is ACCEPTED
    scene.limit(100, scope="user", of=user)
    assert scene.deduct(50, user).outcome is ACCEPTED, "higher than everybody else's"
    scene.limit(None, scope="user", of=user)
    assert scene.deduct(500, user).outcome is ACCEPTED, "none at all"
    scene.end_limit(own)
    assert scene.deduct(1, user).outcome is REFUSED, "without one of their own the default holds again"
    assert scene.balance(counter(scene, default, user)) == Balance(10, 59, 0, 49)
    assert not scene.findings()


def test_where_a_limit_of_ones_own_ends_the_default_goes_on_counting(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    earlier = scene.limit(50, scope="user", of=other)
    assert scene.deduct(40, other).outcome is ACCEPTED
    scene.later(seconds=1)
    scene.end_limit(earlier)
    scene.later(seconds=1)
    default = scene.limit(10, scope="user", each=True)
    own = scene.limit(30, scope="user", of=user)
    assert scene.deduct(9, user).outcome is ACCEPTED
    scene.end_limit(own)
    assert scene.deduct(2, user).outcome is REFUSED, "of 10 there are 9 used"
    assert scene.deduct(1, user).outcome is ACCEPTED
    assert scene.deduct(10, other).outcome is ACCEPTED, "what ended before there was a default counts for nothing"
    assert scene.limit(40, scope="user", of=user) != own
    assert scene.deduct(30, user).outcome is ACCEPTED
    assert scene.used(counter(scene, default, user)) == (40, 0)
    assert not scene.findings()


def test_a_limit_of_ones_own_of_another_kind_leaves_the_default_in_place(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    scene.limit(10, scope="user", each=True, period="day")
    scene.limit(500, scope="user", of=user, period="month")
    scene.limit(500, scope="user", of=user, period="day", action="warns")
    scene.limit(500, scope="user", of=user, period="day", models="gpt%")
    scene.limit(500, scope="user", of=user, period="day", metric="calls")
    assert scene.deduct(11, user).outcome is REFUSED
    scene.limit(500, scope="user", of=user, period="day", action="asks")  # it stops as well
    assert scene.deduct(11, user).outcome is ACCEPTED


def test_of_several_defaults_the_narrowest_holds(scene: Scene) -> None:
    team, department = scene.team(), scene.department()
    pool = scene.pool()
    scene.grant(pool, 1000)
    scene.limit(10, scope="user", each=True)
    scene.limit(20, scope="user", each=True, within=("department", department))
    scene.limit(30, scope="user", each=True, within=("team", team))
    members = (scene.user(), scene.user(department=department), scene.user(team=team, department=department))
    for amount, user in zip((10, 20, 30), members, strict=True):
        assert scene.deduct(amount + 1, user).outcome is REFUSED
        assert scene.deduct(amount, user).outcome is ACCEPTED
    scene.limit(None, scope="user", each=True, within=("team", team))
    assert scene.deduct(100, members[2]).outcome is ACCEPTED, "of this team nobody has a limit"


def test_who_moves_to_another_team_keeps_what_was_counted(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.team(), scene.team()
    scene.grant(pool, 1000)
    user = scene.user(team=one)
    scene.limit(10, scope="user", each=True, within=("team", one))
    scene.limit(15, scope="user", each=True, within=("team", other))
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.admin("update identity.memberships set team_id = %s where user_id = %s", other, user)
    scene.changed()
    assert scene.deduct(6, user).outcome is REFUSED
    assert scene.deduct(5, user).outcome is ACCEPTED


def test_there_are_defaults_for_each_key_team_and_department(scene: Scene) -> None:
    team, department = scene.team(), scene.department()
    pool, user = scene.pool(), scene.user(team=team, department=department)
    key, other = scene.key(user), scene.key(user)
    rotated = scene.key(user, original=key)
    scene.grant(pool, 1000)
    for_keys = scene.limit(10, scope="key", each=True)
    assert scene.deduct(6, user, api_key_id=key).outcome is ACCEPTED
    refused = scene.deduct(5, user, api_key_id=rotated)
    assert (refused.outcome, refused.binding_id) == (REFUSED, counter(scene, for_keys, key)), "a rotation is the key"
    assert scene.deduct(10, user, api_key_id=other).outcome is ACCEPTED
    assert scene.deduct(50, user).outcome is ACCEPTED, "a session has no key"
    for_teams = scene.limit(100, scope="team", each=True)
    for_departments = scene.limit(200, scope="department", each=True)
    assert scene.deduct(60, user).outcome is ACCEPTED
    assert scene.deduct(60, user).binding_id == counter(scene, for_teams, team)
    assert scene.used(counter(scene, for_departments, department)) == (60, 0)
    assert not scene.findings()


def test_a_service_key_is_no_member(scene: Scene) -> None:
    pool, service = scene.pool(), scene.key()
    scene.grant(pool, 1000)
    scene.limit(1, scope="user", each=True)
    assert scene.deduct(10, None, api_key_id=service).outcome is ACCEPTED


# ---------------------------------------------------------------------------------------------- raises


def test_a_raise_begins_and_ends_at_its_very_instant(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user)
    scene.raise_(cap, 5, starts=NOON + timedelta(hours=1), ends=NOON + timedelta(hours=2))
    assert scene.deduct(11, user).outcome is REFUSED
    scene.now = NOON + timedelta(hours=1, microseconds=-1)
    assert scene.deduct(11, user).outcome is REFUSED
    scene.now = NOON + timedelta(hours=1)
    assert scene.deduct(11, user).outcome is ACCEPTED
    scene.now = NOON + timedelta(hours=2, microseconds=-1)
    assert scene.deduct(1, user).outcome is ACCEPTED
    scene.now = NOON + timedelta(hours=2)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(cap) == Balance(10, 12, 0, 2), "what was used of the raise is beyond the limit now, and blocks"
    assert not scene.findings()


def test_a_raise_that_ended_gives_no_running_call_more(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user)
    scene.raise_(cap, 10, ends=NOON + timedelta(hours=1))
    request = scene.hold(8, user, lease_seconds=86400)
    scene.now = NOON + timedelta(minutes=59)
    assert scene.extend(request, 6).outcome is ACCEPTED
    scene.now = NOON + timedelta(hours=1)
    assert scene.extend(request, 1).outcome is REFUSED
    assert scene.balance(cap) == Balance(10, 0, 14, 4)
    scene.settle(request, 9)
    assert scene.balance(cap) == Balance(10, 9, 0, 0)
    assert not scene.findings()


def test_a_lowered_limit_gives_no_running_call_more(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    scene.limit(10, scope="user", of=user)
    request = scene.hold(4, user, lease_seconds=86400)
    scene.limit(6, scope="user", of=user)
    assert scene.extend(request, 3).outcome is REFUSED
    assert scene.extend(request, 2).outcome is ACCEPTED


def test_a_raise_reaches_into_every_period_of_its_time(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user, period="day")
    scene.raise_(cap, 5, ends=NOON + 2 * DAY)
    for day in range(2):
        scene.now = NOON + day * DAY
        assert scene.deduct(15, user).outcome is ACCEPTED
        assert scene.deduct(1, user).outcome is REFUSED
    scene.now = NOON + 2 * DAY
    assert scene.deduct(11, user).outcome is REFUSED
    assert scene.deduct(10, user).outcome is ACCEPTED


def test_a_raise_from_a_past_instant_begins_now_and_takes_at_its_end_what_it_gave(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1000)
    cap = scene.limit(10, period="day")
    scene.deduct(1, user)
    scene.now = NOON + DAY
    scene.deduct(10, user)
    scene.raise_(cap, 50, starts=NOON, ends=NOON + DAY + timedelta(hours=1))
    assert scene.balance(cap) == Balance(60, 10, 0, 0)
    assert scene.deduct(50, user).outcome is ACCEPTED
    scene.later(hours=1)
    assert scene.deduct(1, user).outcome is REFUSED
    assert scene.balance(cap) == Balance(10, 60, 0, 50)
    rows = scene.admin("select limit_amount from credits.balances where balance_id = %s order by period_start", cap)
    assert rows == [(10,), (10,)]
    assert not scene.findings()


def test_raises_add_up_and_stay_when_the_limit_changes(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user)
    first = scene.raise_(cap, 5)
    scene.raise_(cap, 7)
    assert scene.deduct(22, user).outcome is ACCEPTED
    scene.limit(20, scope="user", of=user)
    assert scene.balance(cap).limit == 32
    scene.call("select credits.end_raise(%s, %s, %s)", scene.organization, first, scene.now)
    assert scene.balance(cap).limit == 27
    with scene.refusal("BR404"):
        scene.call("select credits.end_raise(%s, %s, %s)", scene.organization, first, scene.now)
    rows = scene.admin("select state from credits.raises where balance_id = %s order by state", cap)
    assert rows == [("active",), ("ended",)], "it stays as history"
    assert not scene.findings()


def test_a_raise_is_given_once_for_one_key(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user)
    scene.deduct(1, user)
    ends = NOON + DAY
    assert scene.raise_(cap, 5, ends=ends, key="k") == scene.raise_(cap, 5, ends=ends, key="k")
    assert scene.balance(cap).limit == 15
    with scene.refusal("BR422"):
        scene.raise_(cap, 6, ends=ends, key="k")


def test_a_raise_without_time_or_amount_is_none(scene: Scene) -> None:
    user = scene.user()
    cap = scene.limit(10, scope="user", of=user)
    with scene.refusal("BR464"):
        scene.raise_(cap, 5, ends=NOON)
    with scene.refusal("BR464"):
        scene.raise_(cap, 5, starts=NOON + DAY, ends=NOON + DAY)
    with scene.refusal("BR400"):
        scene.raise_(cap, 0)


def test_one_member_is_raised_above_everybodys_default(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    default = scene.limit(10, scope="user", each=True)
    with scene.refusal("BR404"):
        scene.raise_(default, 5)  # whose?
    with scene.refusal("BR404"):
        scene.raise_(default, 5, of=scene.team())
    scene.raise_(default, 5, of=one)
    assert scene.deduct(15, one).outcome is ACCEPTED
    assert scene.deduct(11, other).outcome is REFUSED
    scene.raise_(counter(scene, default, one), 5)
    assert scene.deduct(5, one).outcome is ACCEPTED, "the balance that why names stands for it too"
    own = scene.limit(30, scope="user", of=one)
    assert scene.deduct(20, one).outcome is ACCEPTED, "30 and both raises"
    scene.raise_(default, 1, of=one)
    assert scene.deduct(1, one).outcome is ACCEPTED, "it means their own limit now"
    raised = "select limit_id from credits.raises where organization_id = %s and amount = 1"
    assert scene.admin(raised, scene.organization) == [(own,)]
    assert not scene.findings()


# ---------------------------------------------------------------------------------------------- asking


def test_a_limit_that_asks_stops_until_somebody_approves(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user, action="asks")
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.deduct(1, user).outcome is REFUSED
    request = scene.request(cap, user, 20)
    assert scene.deduct(1, user).outcome is REFUSED, "asking is not having"
    with scene.refusal("BR462"):
        scene.request(cap, user, 30)
    raised = scene.decide(request, approve=True, amount=5)
    assert raised is not None
    assert scene.deduct(5, user).outcome is ACCEPTED
    assert scene.deduct(1, user).outcome is REFUSED
    with scene.refusal("BR463"):
        scene.decide(request, approve=True)
    assert not scene.findings()


def test_what_is_denied_or_lapsed_changes_nothing(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=user, action="asks")
    assert scene.decide(scene.request(cap, user, 20), approve=False) is None
    assert scene.deduct(11, user).outcome is REFUSED
    lapsing = scene.request(cap, user, 20, until=NOON + 30 * DAY)
    scene.now = NOON + 14 * DAY
    with scene.refusal("BR463"):
        scene.decide(lapsing, approve=True)
    assert scene.deduct(11, user).outcome is REFUSED
    scene.decide(scene.request(cap, user, 20), approve=True)
    assert scene.deduct(11, user).outcome is ACCEPTED
    assert not scene.findings()


def test_only_a_limit_that_asks_is_asked_about_and_only_by_members(scene: Scene) -> None:
    user = scene.user()
    stops = scene.limit(10, scope="user", of=user)
    with scene.refusal("BR461"):
        scene.request(stops, user, 5)
    assert scene.limit(10, scope="user", of=user, action="asks") == stops, "the same limit, which asks from now on"
    with scene.refusal("BR404"):
        scene.request(stops, scene.organization, 5)
    with scene.refusal("BR464"):
        scene.request(stops, user, 5, until=NOON)
    scene.request(stops, user, 5)


# ---------------------------------------------------------------------------------------------- renewed shares


def test_a_reserved_share_is_renewed_at_its_very_instant_and_what_was_left_lapses(scene: Scene) -> None:
    pool, user, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 30, period="day")
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.balance(scene.open_part(pool)).limit == 70
    scene.now = datetime(2026, 6, 10, 23, 59, 59, 999999, tzinfo=UTC)
    assert scene.deduct(21, user).outcome is REFUSED
    scene.now = datetime(2026, 6, 11, tzinfo=UTC)
    assert scene.deduct(31, user).outcome is REFUSED
    assert scene.deduct(30, user).outcome is ACCEPTED, "a fresh share, and none of the 20 that were left"
    assert scene.balance(scene.open_part(pool)).limit == 60, "which nobody reserves any more"
    assert scene.deduct(61, other).outcome is REFUSED
    assert scene.deduct(60, other).outcome is ACCEPTED
    rows = scene.admin(
        "select opening_micros, carried_micros, lapsed_micros from credits.allocation_periods "
        "where allocation_id = %s order by period_start", share,
    )  # fmt: skip
    assert rows == [(0, 0, 0), (10, 0, 20)]
    assert not scene.findings()


def test_a_share_carries_over_what_is_left_up_to_its_bound(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 1000)
    scene.share(pool, user, 30, period="day", carry=12)
    assert scene.deduct(25, user).outcome is ACCEPTED
    scene.now = NOON + DAY
    assert scene.deduct(36, user).outcome is REFUSED
    assert scene.deduct(1, user).outcome is ACCEPTED, "30 and the 5 that were left"
    scene.now = NOON + 2 * DAY
    assert scene.deduct(43, user).outcome is REFUSED
    assert scene.deduct(42, user).outcome is ACCEPTED, "of 34 that were left only 12 are kept"
    assert not scene.findings()


def test_days_that_nobody_looked_at_are_renewed_as_if_somebody_had(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    asleep = scene.share(pool, one, 10, period="day", carry=35)
    scene.share(pool, other, 10, period="day", carry=35)
    for day in range(1, 4):
        scene.now = NOON + day * DAY
        scene.fold()
    watched = scene.balance(asleep)
    again = Scene(scene.conn)
    pool, one = again.pool(), again.user()
    again.grant(pool, 1000)
    share = again.share(pool, one, 10, period="day", carry=35)
    again.now = NOON + 3 * DAY
    again.fold()
    assert again.balance(share) == watched == Balance(40, 0, 0, 0)
    again.now = NOON + 9 * DAY
    again.fold()
    assert again.balance(share) == Balance(45, 0, 0, 0)
    assert not again.findings()


def test_what_runs_over_the_renewal_counts_for_the_period_in_which_it_began(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 30, period="day")
    request = scene.hold(30, user, lease_seconds=2 * 86400)
    scene.now = NOON + DAY
    assert scene.deduct(31, user).outcome is REFUSED
    assert scene.deduct(20, user).outcome is ACCEPTED
    scene.settle(request, 18)
    assert scene.balance(share) == Balance(60, 38, 0, 0)
    assert scene.deduct(23, user).outcome is REFUSED
    assert scene.deduct(22, user).outcome is ACCEPTED, "what it did not use stays in the share"
    assert not scene.findings()


def test_a_renewed_share_that_was_left_out_while_empty_pays_again(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.share(pool, user, 10, period="day", when_empty="open_part")
    assert scene.deduct(10, user).outcome is ACCEPTED
    assert scene.deduct(4, user).outcome is ACCEPTED
    assert scene.deduct(1, user).outcome is ACCEPTED, "of the open part alone: the share is left out"
    scene.now = NOON + DAY
    assert scene.deduct(5, user).outcome is ACCEPTED
    assert scene.used(scene.open_part(pool)) == (5, 0)


def test_a_renewed_share_is_renewed_though_grants_came_later(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.share(pool, user, 10, period="day")
    assert scene.deduct(10, user).outcome is ACCEPTED
    scene.grant(pool, 100)  # the gate goes on waiting for the renewal
    scene.now = NOON + DAY
    assert scene.deduct(10, user).outcome is ACCEPTED


def test_a_renewed_share_changes_its_size_and_ends(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, user, 30, period="day")
    assert scene.deduct(20, user).outcome is ACCEPTED
    scene.now = NOON + DAY
    assert scene.deduct(5, user).outcome is ACCEPTED
    assert scene.share(pool, user, 10, period="day") == share
    assert scene.balance(share) == Balance(30, 25, 0, 0)
    assert scene.deduct(6, user).outcome is REFUSED
    assert scene.deduct(5, user).outcome is ACCEPTED
    scene.end_share(share)
    scene.now = NOON + 3 * DAY
    assert scene.deduct(70, user).outcome is ACCEPTED, "what is left is open to everybody"
    assert scene.admin("select count(*) from credits.allocation_periods where allocation_id = %s", share) == [(2,)]
    assert not scene.findings()


def test_what_a_share_has_left_is_given_to_another_or_back(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    mine, theirs = scene.share(pool, one, 40), scene.share(pool, other, 20)
    assert scene.deduct(10, one).outcome is ACCEPTED
    scene.hold(5, one)
    with scene.refusal("BR460"):
        scene.reallocate(mine, theirs, 26)
    assert scene.reallocate(mine, theirs, 15, key="k") == 15
    assert scene.reallocate(mine, theirs, 15, key="k") == 15, "once"
    assert scene.balance(mine).limit == 25
    assert scene.deduct(35, other).outcome is ACCEPTED
    assert scene.reallocate(mine, None) == 10, "all that is neither used nor held"
    assert scene.balance(scene.open_part(pool)).limit == 50
    for share, to in ((mine, mine), (mine, pool), (pool, mine), (theirs, scene.share(scene.pool(models="x%"), one, 0))):
        with scene.refusal("BR404"):
            scene.reallocate(share, to, 0)
    assert not scene.findings()


def test_of_a_renewed_share_only_this_period_is_given_away(scene: Scene) -> None:
    pool, one, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    mine, theirs = scene.share(pool, one, 40, period="day"), scene.share(pool, other, 20, period="day")
    assert scene.reallocate(mine, theirs) == 40
    assert scene.deduct(1, one).outcome is REFUSED
    assert scene.deduct(60, other).outcome is ACCEPTED
    scene.now = NOON + DAY
    assert scene.deduct(40, one).outcome is ACCEPTED
    assert scene.deduct(21, other).outcome is REFUSED
    assert not scene.findings()


# ---------------------------------------------------------------------------------------------- what was so before


def test_what_a_limit_was_is_kept(scene: Scene) -> None:
    limit = scene.limit(100)
    scene.now = NOON + DAY
    assert scene.limit(70, action="asks", strict=True) == limit
    rows = scene.admin(
        "select nr, changed_at, amount, action, is_strict from credits.limit_changes where organization_id = %s"
        " order by nr",
        scene.organization,
    )
    assert rows == [(1, NOON, 100, "stops", False), (2, NOON + DAY, 70, "asks", True)]
    assert not scene.findings()


def test_what_a_share_was_is_kept(scene: Scene) -> None:
    pool, one = scene.pool(), scene.user()
    scene.grant(pool, 100)
    share = scene.share(pool, one, 40)
    scene.now = NOON + DAY
    scene.reallocate(share, None, 10)
    request = uuid7()
    assert scene.deduct(8, one, request).outcome is ACCEPTED
    scene.now = NOON + 2 * DAY
    scene.refund(request, 3)
    scene.now = NOON + 3 * DAY
    scene.share(pool, one, 50, when_empty="open_part")
    rows = scene.admin(
        "select nr, changed_at, amount_micros, limit_micros, when_empty from credits.share_changes"
        " where organization_id = %s and allocation_id = %s order by nr",
        scene.organization, share,
    )  # fmt: skip
    assert rows == [
        (1, NOON, 40, 40, "stops"),
        (2, NOON + DAY, 30, 30, "stops"),
        (3, NOON + 2 * DAY, 30, 33, "stops"),
        (4, NOON + 3 * DAY, 50, 53, "open_part"),
    ]
    assert not scene.findings()
