"""One move asked alone: where all is plain move_one decides it by itself, else as a batch of one."""

from typing import Any

from tests.credits.scenes import Scene

from bursar.credits.moves import MOVE_ONE, Action, Flag, Outcome, as_scalars, as_verdicts
from bursar.money import Micros, NanoUsd
from bursar.pricing.usage import USAGE_KINDS

EVERY_COUNT = tuple(range(101, 101 + len(USAGE_KINDS)))
"""Another number for each kind of usage, so that none can stand in another's column."""


def test_it_leaves_the_same_rows_as_in_a_batch(scene: Scene) -> None:
    scene.grant(scene.pool(), 1_000)
    key = scene.key(user := scene.user(team=scene.team()))
    left: list[Any] = []
    for scene.alone in (True, False):
        wanted: dict[str, Any] = {
            "user_id": user, "api_key_id": key, "tokens": 11, "cost_nano_usd": NanoUsd(7), "mark_micros": Micros(3),
            "usage": EVERY_COUNT, "provider": "demo", "price_version_id": scene.organization, "used_at": scene.now,
            "provider_key_id": scene.organization, "conversation_id": scene.organization, "flags": Flag.STREAMED,
            "feature": "images",
        }  # fmt: skip
        deducted = scene.move(scene.asked(Action.DEDUCT, None, 20, **wanted))[0]
        held = scene.move(scene.asked(Action.AUTHORIZE, None, 30, **wanted))[0]
        assert (deducted.outcome, held.outcome) == (Outcome.ACCEPTED, Outcome.ACCEPTED)
        rows = [
            scene.admin(
                f"select to_jsonb(t) - 'request_id' - 'position_micros' - 'write_number' from {table} t "
                "where request_id = %s",
                id,
            )
            for table, id in (("ledger.attribution", deducted.request_id), ("credits.holds", held.request_id))
        ]
        assert [len(each) for each in rows] == [1, 1]
        left.append(rows)
        left.append((deducted.charged_micros, deducted.held_micros, held.charged_micros, held.held_micros))
    assert left[0] == left[2]
    assert left[1] == left[3]
    assert tuple(left[0][0][0][0][kind] for kind in USAGE_KINDS) == EVERY_COUNT
    positions = scene.admin(
        "select position_micros from ledger.attribution where organization_id = %s order by 1", scene.organization
    )
    assert positions == [(0,), (20,)]


def test_a_settle_leaves_the_same_rows_as_in_a_batch(scene: Scene) -> None:
    scene.grant(pool := scene.pool(), 1_000)
    key = scene.key(user := scene.user(team=scene.team()))
    left: list[Any] = []
    for scene.alone in (True, False):
        wanted: dict[str, Any] = {
            "user_id": user, "api_key_id": key, "tokens": 11, "cost_nano_usd": NanoUsd(7), "usage": EVERY_COUNT,
            "provider": "demo", "price_version_id": scene.organization, "used_at": scene.now,
            "provider_key_id": scene.organization, "conversation_id": scene.organization, "flags": Flag.ESTIMATED,
            "feature": "images",
        }  # fmt: skip
        for charged in (20, 30, 45, 0):
            request = scene.hold(30, user, api_key_id=key, tokens=13, feature="images")
            verdict = scene.move(scene.asked(Action.SETTLE, request, charged, **wanted))[0]
            left.append(
                scene.admin(
                    "select to_jsonb(a) - 'request_id' - 'position_micros' - 'write_number' "
                    "from ledger.attribution a where request_id = %s",
                    request,
                )
            )
            left.append(verdict[:1] + verdict[2:4])
            assert len(left[-2]) == 1
            assert scene.admin("select 1 from credits.holds where request_id = %s", request) == []
            assert verdict.available_micros == scene.admin(
                "select limit_amount - used_amount - held_amount from credits.balances "
                "where organization_id = %s and balance_id = %s", scene.organization, pool,
            )[0][0]  # fmt: skip
    assert left[:8] == left[8:]
    positions = scene.admin(
        "select position_micros from ledger.attribution where organization_id = %s order by 1", scene.organization
    )
    assert positions == [(0,), (20,), (50,), (95,), (95,), (115,), (145,), (190,)]


def test_a_command_leaves_the_same_rows_as_in_a_batch(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 1_000)
    left: list[Any] = []
    for scene.alone in (True, False):
        named = "alone" if scene.alone else "batch"

        def under(key: str, named: str = named) -> dict[str, Any]:
            return {"idempotency_key": f"{named} {key}", "body_hash": b"body"}

        assert scene.deduct(20, user, **under("deduct")).accepted
        request = scene.hold(30, user, **under("hold"))
        assert scene.settle(request, 25, user, **under("settle")).accepted
        left.append(
            scene.admin(
                "select substr(idempotency_key, 7), body_hash, outcome - 'request_id', answered_at, kept_until, "
                "outcome ->> 'request_id' = request_id::text from credits.commands "
                "where organization_id = %s and idempotency_key like %s order by 1",
                scene.organization, f"{named}%",
            )
        )  # fmt: skip
    assert [row[0] for row in left[0]] == ["deduct", "hold", "settle"]
    assert all(row[-1] for row in left[0])
    assert left[0] == left[1]


def test_of_a_known_key_the_settle_answers_as_it_did(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 100)
    one, other = (scene.hold(10, user) for _ in range(2))
    settles = [
        scene.settle(request, 7, user, idempotency_key="k", body_hash=b"body").outcome for request in (one, other)
    ]
    assert settles == [Outcome.ACCEPTED, Outcome.KNOWN]
    assert scene.used(pool) == (7, 10)


def test_a_settle_goes_on_as_it_was_held(scene: Scene) -> None:
    """On its model; and at no charge where the customer's own key pays, whatever the settle says of either."""
    user = scene.user()
    scene.grant(pool := scene.pool(), 100)
    own = scene.hold(10, user, flags=Flag.OWN_KEY, model="m1")
    assert scene.settle(own, 8, user, model="m1").charged_micros == 0
    ours = scene.hold(10, user, model="m1")
    assert scene.settle(ours, 8, user, model="m2", flags=Flag.OWN_KEY).charged_micros == 8
    other = scene.hold(10, user, model="m1")
    assert scene.settle(other, 1, user, model="m2").charged_micros == 1
    assert scene.used(pool) == (9, 0)
    models = scene.admin("select distinct model from ledger.attribution where organization_id = %s", scene.organization)
    assert models == [("m1",)]


def test_a_settle_counts_where_calls_are_counted(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    calls = scene.limit(5, metric="calls", scope="user", of=user)
    assert scene.settle(scene.hold(10, user), 8, user).accepted
    assert scene.used(calls) == (1, 0)


def test_expiry_ends_no_lease_that_goes_on(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 100)
    request = scene.hold(10, user)
    by_expiry = scene.asked(Action.SETTLE, request, 10, user_id=user)._replace(flags=Flag(64))
    assert scene.move(by_expiry)[0].outcome is Outcome.NO_HOLD
    assert scene.used(pool) == (0, 10)


def test_it_is_told_what_is_left_then(scene: Scene) -> None:
    user = scene.user()
    scene.grant(scene.pool(), 100)
    scene.limit(70, scope="user", of=user)
    scene.limit(5, action="warns")
    assert [scene.deduct(amount, user).available_micros for amount in (10, 20)] == [60, 40]
    assert scene.authorize(10, user).available_micros == 30


def test_what_was_taken_is_given_back_where_another_balance_has_no_room(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 100)
    counted = scene.limit(30, action="warns")
    cap = scene.limit(50, scope="user", of=user)
    assert scene.deduct(40, user).accepted
    before = [scene.balance(each) for each in (pool, counted, cap)]
    for refused in (scene.deduct(11, user), scene.authorize(11, user)):
        assert (refused.outcome, refused.binding_id) == (Outcome.REFUSED, cap)
    assert [scene.balance(each) for each in (pool, counted, cap)] == before
    assert scene.deduct(10, user).accepted


def test_a_request_that_is_held_is_not_deducted_too(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 100)
    request = scene.hold(10, user)
    assert scene.deduct(10, user, request).outcome is Outcome.NOT_ALLOWED
    assert scene.used(pool) == (0, 10)


WITHOUT_SENSE: tuple[tuple[Action, dict[str, Any]], ...] = (
    (Action.DEDUCT, {"amount_micros": -1}),
    (Action.DEDUCT, {"amount_micros": 10**15 + 1}),
    (Action.DEDUCT, {"tokens": -1}),
    (Action.DEDUCT, {"cost_nano_usd": -1}),
    (Action.AUTHORIZE, {"mark_micros": 10**15 + 1}),
    (Action.DEDUCT, {"flags": -1024}),
    (Action.AUTHORIZE, {"lease_seconds": 0}),
    (Action.DEDUCT, {"idempotency_key": "key"}),
    (Action.DEDUCT, {"idempotency_key": "", "body_hash": b"body"}),
)


def test_what_has_no_sense_is_refused(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 10**15)
    scene.grant(pool, 10**15)
    for action, changes in WITHOUT_SENSE:
        verdict = scene.move(scene.asked(action, None, 1, user_id=user)._replace(**changes))[0]
        assert (verdict.outcome, verdict.detail) == (Outcome.NOT_ALLOWED, "request_invalid"), changes
    assert scene.used(pool) == (0, 0)


def test_a_request_without_an_id_is_refused(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 10)
    assert scene.deduct(1, user).accepted
    arguments = as_scalars(scene.asked(Action.DEDUCT, None, 1, user_id=user), scene.now)
    arguments[2] = None
    with scene.acting_as("bursar_simulator"):
        verdict = as_verdicts(scene.conn.execute(MOVE_ONE, arguments).fetchall())[0]
    assert verdict.outcome is Outcome.NOT_ALLOWED
    assert scene.used(pool) == (1, 0)


def test_usage_that_is_no_usage_is_refused(scene: Scene) -> None:
    user = scene.user()
    scene.grant(pool := scene.pool(), 10)
    assert scene.deduct(1, user).accepted
    for usage in ((1,), (-1, *EVERY_COUNT[1:])):
        with scene.refusal("BR400"):
            scene.move(scene.asked(Action.DEDUCT, None, 1, user_id=user, usage=usage))
    assert scene.used(pool) == (1, 0)
