"""Whoever retries on an empty balance: refused at once, named exactly, and in nobody else's way."""

from uuid import UUID

from tests.credits.scenes import Balance, Scene, outcomes

from bursar.credits.moves import Action, Flag, Outcome

ACCEPTED, REFUSED, WAIT = Outcome.ACCEPTED, Outcome.REFUSED, Outcome.WAIT


def hint(scene: Scene, user: UUID) -> UUID | None:
    """The balance where the user's chain looks first."""
    rows = scene.admin("select tight_id from credits.chains where user_id = %s and replaced_at is null", user)
    return rows[0][0]  # type: ignore[no-any-return]


def test_a_refusal_leaves_a_hint_and_the_next_one_is_the_same_refusal(scene: Scene) -> None:
    pool, poor, rich = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=poor)
    scene.deduct(0, rich)  # from now on their chains are known
    first = scene.deduct(11, poor)
    assert hint(scene, poor) == cap
    again, other = scene.move(
        scene.asked(Action.DEDUCT, None, 11, user_id=poor), scene.asked(Action.DEDUCT, None, 990, user_id=rich)
    )
    assert (again.outcome, again.detail, again.binding_id, again.available_micros) == (
        REFUSED,
        "cap_reached",
        cap,
        first.available_micros,
    )
    assert (other.outcome, other.available_micros) == (ACCEPTED, 10), "it had 1000 of the pool, all but what it took"
    assert scene.balance(pool) == Balance(1000, 990, 0, 0)
    rows = scene.admin("select position_micros from ledger.attribution where request_id = %s", other.request_id)
    assert rows == [(0,)], "the pool's running total knows nothing of the refused one"


def test_the_hint_alone_refuses_nobody(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    request = scene.hold(60, user)
    assert scene.authorize(50, user).outcome is REFUSED
    assert hint(scene, user) is not None
    assert scene.authorize(40, user).outcome is ACCEPTED, "a smaller one fits"
    assert scene.authorize(50, user).outcome is REFUSED
    scene.release(request)
    assert hint(scene, user) is not None, "nothing was rebuilt"
    assert scene.authorize(50, user).outcome is ACCEPTED, "what was held is free again"


def test_hopeless_calls_may_wait_for_holds_but_not_for_what_is_used(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    scene.grant(pool, 100)
    scene.hold(80, user)
    waiting = {"user_id": user, "flags": Flag.MAY_WAIT}
    for _ in range(2):  # the second time by the hint
        verdicts = scene.move(
            scene.asked(Action.AUTHORIZE, None, 30, **waiting), scene.asked(Action.AUTHORIZE, None, 101, **waiting)
        )
        assert outcomes(verdicts) == [WAIT, REFUSED]
        assert [verdict.binding_id for verdict in verdicts] == [pool, pool]


def test_beside_a_balance_that_gets_tight_arrival_decides(scene: Scene) -> None:
    pool, poor, rich = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 100)
    scene.limit(10, scope="user", of=poor)
    scene.deduct(0, rich)
    scene.deduct(11, poor)
    moves = [(11, poor), (60, rich), (10, poor), (50, rich), (30, rich)]
    verdicts = scene.move(*(scene.asked(Action.DEDUCT, None, amount, user_id=user) for amount, user in moves))
    assert outcomes(verdicts) == [REFUSED, ACCEPTED, ACCEPTED, REFUSED, ACCEPTED]
    assert scene.balance(pool) == Balance(100, 100, 0, 0)
    assert not scene.findings()


def test_the_hopeless_are_refused_too_where_something_else_is_tight(scene: Scene) -> None:
    pool, poor, other = scene.pool(), scene.user(), scene.user()
    scene.grant(pool, 1000)
    cap = scene.limit(10, scope="user", of=poor)
    scene.limit(50, scope="user", of=other)
    scene.deduct(0, other)
    scene.deduct(11, poor)
    verdicts = scene.move(
        scene.asked(Action.DEDUCT, None, 60, user_id=other), scene.asked(Action.DEDUCT, None, 11, user_id=poor)
    )
    assert outcomes(verdicts) == [REFUSED, REFUSED]
    assert verdicts[1].binding_id == cap
    assert scene.balance(pool) == Balance(1000, 0, 0, 0)
