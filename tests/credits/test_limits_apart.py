"""Limits, their counters, raises and requests of different kinds are apart from each other."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from tests.credits.scenes import Balance, Scene

from bursar.clock import uuid7
from bursar.credits.moves import Outcome

ACCEPTED, REFUSED = Outcome.ACCEPTED, Outcome.REFUSED


def counter(scene: Scene, limit: UUID, subject: UUID) -> UUID:
    """The balance on which a default counts somebody."""
    found = "select balance_id from credits.counters where limit_id = %s and subject_id = %s"
    rows = scene.admin(found, limit, subject)
    assert len(rows) == 1
    return rows[0][0]  # type: ignore[no-any-return]


def own_balance(scene: Scene, limit: UUID) -> UUID:
    return scene.admin("select balance_id from credits.limits where limit_id = %s", limit)[0][0]  # type: ignore[no-any-return]


def kinds(user: UUID, **more: Any) -> list[dict[str, Any]]:
    """A member's limit on credits by the month, and those that differ from it in one way."""
    same = {"scope": "user", "of": user, "period": "month", **more}
    return [
        same,
        *(same | each for each in ({"metric": "tokens"}, {"period": "day"}, {"models": "m%"}, {"action": "warns"})),
    ]


def test_what_differs_in_any_way_is_another_limit(scene: Scene) -> None:
    Scene(scene.conn).limit(40, period="month")
    user, team, department = scene.user(), scene.team(), scene.department()
    asked: list[dict[str, Any]] = [
        *kinds(user),
        {"scope": "user", "of": scene.user(), "period": "month"},
        {"scope": "team", "of": team, "period": "month"},
        {"scope": "organization", "period": "month"},
        *({"scope": "user", "each": True, "period": "month", "within": place}
          for place in ((None, None), ("team", team), ("team", scene.team()), ("department", department))),
        {"scope": "key", "each": True, "period": "month"},
    ]  # fmt: skip
    made = [scene.limit(50, **each) for each in asked]
    assert len(set(made)) == len(made)
    for nr, each in enumerate(asked):
        assert scene.limit(60 + nr, **each) == made[nr]
    amounts = "select amount from credits.limits where limit_id = %s"
    assert [scene.admin(amounts, each)[0][0] for each in made] == [60 + nr for nr in range(len(made))]
    asks = scene.limit(99, scope="user", of=user, period="month", action="asks")
    assert asks == made[0], "whether it may be asked about is no kind of its own"


def test_a_limit_that_was_lifted_is_lifted_once_and_set_again_is_another(scene: Scene) -> None:
    limit = scene.limit(50)
    scene.end_limit(limit)
    ended = "select ended_at from credits.limits where limit_id = %s"
    at = scene.admin(ended, limit)
    scene.later(hours=1)
    for each in (limit, uuid7()):
        with scene.refusal("BR404"):
            scene.end_limit(each)
    assert scene.admin(ended, limit) == at
    assert scene.limit(50) != limit


def test_a_limit_of_ones_own_goes_on_where_a_default_of_its_kind_counted_that_member(scene: Scene) -> None:
    one, two = scene.user(), scene.user()
    scene.grant(scene.pool(), 1_000)
    default = scene.limit(100, scope="user", each=True, period="month")
    scene.deduct(30, one)
    scene.deduct(40, two)
    counters = [counter(scene, default, each) for each in (one, two)]
    limits = [scene.limit(90, **kind) for kind in kinds(one)]
    assert own_balance(scene, limits[0]) == counters[0]
    assert [own_balance(scene, each) for each in limits[1:]] == limits[1:], "of other kinds nothing was counted yet"
    assert own_balance(scene, scene.limit(90, scope="user", of=two, period="month")) == counters[1]
    scene.deduct(5, one, tokens=7)
    assert [scene.used(own_balance(scene, each))[0] for each in limits] == [35, 7, 5, 5, 5]
    assert scene.findings() == []


def test_defaults_of_different_kinds_count_apart(scene: Scene) -> None:
    team = scene.team()
    user = scene.user(team=team)
    key = scene.key(user)
    scene.grant(scene.pool(), 1_000)
    first = scene.limit(500, scope="user", each=True, period="month")
    scene.deduct(30, user, api_key_id=key)
    others = [scene.limit(400, **(kind | {"of": None, "each": True})) for kind in kinds(user)[1:]]
    of_keys = scene.limit(400, scope="key", each=True, period="month")
    scene.deduct(5, user, api_key_id=key, tokens=7)
    assert [scene.used(counter(scene, each, user))[0] for each in (first, *others)] == [35, 7, 5, 5, 5]
    assert scene.used(counter(scene, of_keys, key)) == (5, 0)
    assert scene.findings() == []


def test_a_counter_is_of_the_default_that_holds_now(scene: Scene) -> None:
    team = scene.team()
    one, two = scene.user(team=team), scene.user()
    scene.grant(scene.pool(), 1_000)
    of_all = scene.limit(500, scope="user", each=True, period="month")
    for user in (one, two):
        scene.deduct(30, user)
    balances = [counter(scene, of_all, each) for each in (one, two)]
    of_team = scene.limit(100, scope="user", each=True, period="month", within=("team", team))
    for user in (one, two):
        scene.deduct(5, user)
    assert [counter(scene, of_team, one), counter(scene, of_all, two)] == balances
    assert [scene.balance(each) for each in balances] == [Balance(100, 35, 0, 0), Balance(500, 35, 0, 0)]
    scene.raise_(balances[0], 7)
    assert [scene.balance(each).limit for each in balances] == [107, 500]
    assert scene.findings() == []


# ---------------------------------------------------------------------------------------------- raises


def test_a_raise_that_came_and_went_while_nobody_looked_changes_nothing(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1_000)
    limit, other = scene.limit(100, period="month"), scene.limit(200)
    scene.deduct(10, user)
    scene.raise_(limit, 50, starts=scene.now + timedelta(hours=1), ends=scene.now + timedelta(hours=2))
    scene.raise_(other, 20, starts=scene.now + timedelta(hours=1), ends=scene.now + timedelta(hours=9))
    scene.later(hours=3)
    scene.fold()
    assert (scene.balance(limit).limit, scene.balance(other).limit) == (100, 220)
    scene.later(hours=6)
    scene.fold()
    assert (scene.balance(limit).limit, scene.balance(other).limit) == (100, 200)
    states = "select distinct state from credits.raises where organization_id = %s"
    assert scene.admin(states, scene.organization) == [("ended",)]
    assert scene.findings() == []


def test_the_end_of_a_raise_is_of_the_month_in_which_it_ends(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1_000)
    limit = scene.limit(100, period="month")
    scene.deduct(10, user)
    scene.now = datetime(2026, 7, 1, tzinfo=UTC)
    scene.deduct(10, user)
    scene.raise_(limit, 50, ends=datetime(2026, 8, 1, tzinfo=UTC))
    scene.deduct(1, user)
    limits = "select limit_amount from credits.balances where balance_id = %s order by period_start"
    assert scene.admin(limits, limit) == [(100,), (150,)]
    scene.now = datetime(2026, 8, 1, tzinfo=UTC)
    scene.deduct(1, user)
    assert scene.admin(limits, limit) == [(100,), (150,), (100,)]
    assert scene.findings() == []


def test_only_what_is_a_limit_now_is_raised(scene: Scene) -> None:
    user, other = scene.user(), scene.user()
    ended, default = scene.limit(50), scene.limit(100, scope="user", each=True)
    scene.end_limit(ended)
    scene.limit(70, period="day")
    none = scene.limit(None, scope="user", of=user)
    for limit, of in ((ended, None), (none, None), (default, user), (default, None), (uuid7(), None)):
        with scene.refusal("BR404"):
            scene.raise_(limit, 5, of=of)
    scene.raise_(default, 5, of=other)
    with scene.refusal("BR404"):
        scene.raise_(default, 5, of=uuid7())
    scene.end_limit(default)
    for limit in (default, counter(scene, default, other)):
        with scene.refusal("BR404"):
            scene.raise_(limit, 5, of=other)


def test_a_default_is_raised_for_those_of_its_kind(scene: Scene) -> None:
    subjects = {"user": scene.user(), "team": scene.team(), "department": scene.department()}
    subjects["key"] = scene.key(subjects["user"])
    for scope, subject in subjects.items():
        default = scene.limit(100, scope=scope, each=True)
        for other in (*(each for each in subjects.values() if each != subject), uuid7()):
            with scene.refusal("BR404"):
                scene.raise_(default, 5, of=other)
        scene.raise_(default, 5, of=subject)
        raised = "select balance_id from credits.raises where organization_id = %s and limit_id = %s"
        assert scene.admin(raised, scene.organization, default) == [(counter(scene, default, subject),)]


def test_who_has_a_limit_of_their_own_of_the_same_kind_is_raised_there(scene: Scene) -> None:
    one, two = scene.user(), scene.user()
    scene.grant(scene.pool(), 1_000)
    default = scene.limit(100, scope="user", each=True, period="month")
    for user in (one, two):
        scene.deduct(1, user)
    balances = [counter(scene, default, each) for each in (one, two)]
    for kind in kinds(one)[1:]:
        scene.limit(90, **kind)
    scene.limit(90, scope="user", of=two, period="month")
    scene.deduct(1, one)
    scene.deduct(1, two)
    scene.raise_(default, 5, of=one)
    assert scene.balance(balances[0]).limit == 105
    own = scene.limit(80, scope="user", of=one, period="month")
    scene.raise_(default, 3, of=one)
    raised = "select amount from credits.raises where organization_id = %s and limit_id = %s"
    assert (scene.admin(raised, scene.organization, own), scene.balance(balances[0]).limit) == ([(3,)], 88)
    scene.end_limit(own)
    scene.raise_(balances[0], 1)
    scene.raise_(default, 1, of=one)
    scene.deduct(1, one)
    assert scene.admin(raised, scene.organization, own) == [(3,)]
    assert [scene.balance(each).limit for each in balances] == [110, 90]
    scene.raise_(balances[1], 4)
    assert [scene.balance(each).limit for each in balances] == [110, 94]
    assert scene.findings() == []


def test_a_raise_has_an_end(scene: Scene) -> None:
    limit, user = scene.limit(100, action="asks"), scene.user()
    endless: Any = "infinity"
    with scene.refusal("BR464"):
        scene.raise_(limit, 5, ends=endless)
    with scene.refusal("BR464"):
        scene.request(limit, user, 5, until=endless)
    with scene.refusal("BR464"):
        scene.request(limit, user, 5, until=scene.now)


def test_a_cycle_begins_at_some_instant(scene: Scene) -> None:
    for anchor in ("infinity", "-infinity"):
        with scene.refusal("BR400"):
            scene.call("select credits.set_cycle(%s, %s, %s)", scene.organization, anchor, scene.now)


# ---------------------------------------------------------------------------------------------- requests


def test_a_request_that_is_open_keeps_no_other_from_being_made(scene: Scene) -> None:
    one, two = scene.user(), scene.user()
    limits = [scene.limit(100, action="asks"), scene.limit(100, action="asks", period="day")]
    made = [scene.request(limit, user, 5) for limit in limits for user in (one, two)]
    for limit in limits:
        with scene.refusal("BR462"):
            scene.request(limit, one, 5)
    scene.decide(made[0], approve=False)
    scene.request(limits[0], one, 5)
    with scene.refusal("BR462"):
        scene.request(limits[0], two, 5)
    states = "select state from credits.limit_requests where limit_request_id = any (%s) order by limit_request_id"
    scene.later(days=15)
    scene.request(limits[0], one, 5)
    assert [each for (each,) in scene.admin(states, sorted(made))] == ["denied", "open", "open", "open"], "others' stay"
    noted = "select count(*) from credits.limit_requests where organization_id = %s and note = 'lapsed'"
    assert scene.admin(noted, scene.organization) == [(1,)]


def test_a_request_is_of_an_active_member_for_some_amount_and_made_once(scene: Scene) -> None:
    user, gone = scene.user(), scene.user()
    limit = scene.limit(100, action="asks")
    scene.admin("update identity.memberships set status = 'suspended' where user_id = %s", gone)
    with scene.refusal("BR404"):
        scene.request(limit, gone, 5)
    for amount in (0, -1, 10**15 + 1):
        with scene.refusal("BR400"):
            scene.request(limit, user, amount)
    asked = "select credits.request_raise(%s, %s, %s, null, %s, 5, %s, 'why not', 'k', %s)"
    until = scene.now + timedelta(days=1)
    made = [scene.call(asked, scene.organization, uuid7(), limit, user, until, scene.now) for _ in range(2)]
    assert made[0] == made[1]


def test_a_request_is_decided_once_and_before_it_lapses(scene: Scene) -> None:
    one, two = scene.user(), scene.user()
    scene.grant(scene.pool(), 1_000)
    limit = scene.limit(10, action="asks")
    scene.deduct(1, one)
    first, second = (scene.request(limit, user, 5, until=scene.now + timedelta(days=30)) for user in (one, two))
    scene.later(days=14, microseconds=-1)
    assert scene.decide(first, approve=True)
    with scene.refusal("BR463"):
        scene.decide(first, approve=True)
    scene.later(microseconds=1)
    for request in (first, second):
        with scene.refusal("BR463"):
            scene.decide(request, approve=True)
    with scene.refusal("BR404"):
        scene.decide(uuid7(), approve=True)
    assert scene.balance(limit).limit == 15
    assert scene.findings() == []
