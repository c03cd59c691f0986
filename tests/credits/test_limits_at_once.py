"""Limits of all scopes at once, under calls that race: never over, never under."""

import random
from datetime import timedelta
from functools import partial
from uuid import UUID

import psycopg
from tests.credits.racing import Lane, lanes, race
from tests.credits.scenes import Scene

from bursar import clock, db
from bursar.credits.moves import Action, Outcome

MODEL_CAP, TEAM_CAP, KEY_CAP, RAISE = 1300, 700, 260, 20
STEPS = 150


def spend(scene: Scene, lane: Lane, user: UUID, key: UUID, seed: int) -> int:
    """Holds, extensions, settles at most at what is held, releases and deductions; what was charged."""
    dice, charged = random.Random(seed), 0
    who = {"user_id": user, "api_key_id": key}
    for _ in range(STEPS):
        amount = dice.randrange(1, 5)
        if dice.random() < 0.4:
            accepted = lane.move(scene.asked(Action.DEDUCT, None, amount, **who))[0].outcome is Outcome.ACCEPTED
            charged += amount if accepted else 0
            continue
        hold = lane.move(scene.asked(Action.AUTHORIZE, None, amount, **who))[0]
        if hold.outcome is not Outcome.ACCEPTED:
            continue
        more = lane.move(scene.asked(Action.EXTEND, hold.request_id, 2))[0]
        amount = dice.randrange(amount + (3 if more.outcome is Outcome.ACCEPTED else 1))
        if dice.random() < 0.2:
            lane.move(scene.asked(Action.RELEASE, hold.request_id))
        else:
            lane.move(scene.asked(Action.SETTLE, hold.request_id, amount, **who))
            charged += amount
    return charged


def empty(scene: Scene, lane: Lane, user: UUID, key: UUID) -> int:
    """Single credits until none fits; how many did."""
    charged = 0
    while lane.move(scene.asked(Action.DEDUCT, None, 1, user_id=user, api_key_id=key))[0].accepted:
        charged += 1
    return charged


def change(dsn: str, scene: Scene, team_cap: UUID, shares: list[UUID]) -> int:
    """Meanwhile a default is changed, a cap raised and lowered again, and idle shares are given to and fro."""
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("select set_config('app.organization_id', %s, false)", [str(scene.organization)])
        raise_limit = "select credits.raise_limit(%s, gen_random_uuid(), %s, null, %s, null, %s, null, null, 'moment')"
        raised = conn.execute(
            raise_limit, [scene.organization, team_cap, RAISE, clock.now() + timedelta(hours=1)]
        ).fetchone()
        assert raised is not None
        default = (
            "select credits.set_limit(%s, gen_random_uuid(), 'user', null, 'credits', null, 'none', %s, 'stops', null,"
            " null, false, true)"
        )
        give = "select credits.reallocate(%s, %s, %s, 10, gen_random_uuid()::text)"
        for n in range(40):
            conn.execute(default, [scene.organization, 1000 + n])
            conn.execute(give, [scene.organization, *(shares if n % 2 else reversed(shares))])
        conn.execute("select credits.end_raise(%s, %s)", [scene.organization, raised[0]])
    return 0


def test_limits_of_all_scopes_are_kept_to_the_credit_while_they_change(books: db.Database) -> None:
    with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
        scene = Scene(conn, now=clock.now())
        teams, department = (scene.team(), scene.team()), scene.department()
        users = [scene.user(team=teams[n % 2], department=department) for n in range(6)]
        keys = [scene.key(user) for user in users]
        pool = scene.pool()
        scene.grant(pool, 10_000)
        idle = [scene.share(pool, scene.user(), 500, period="month", carry=100) for _ in range(2)]
        model = scene.limit(MODEL_CAP, models="m%")
        team = scene.limit(TEAM_CAP, scope="team", of=teams[0], action="asks")
        wide = [scene.limit(5_000), scene.limit(4_000, scope="department", each=True, period="day")]
        per_key = scene.limit(KEY_CAP, scope="key", each=True)
        scene.limit(1_000, scope="user", each=True)
        with lanes(books, len(users)) as connected:
            work = [
                partial(spend, scene, lane, user, key, seed)
                for seed, (lane, user, key) in enumerate(zip(connected, users, keys, strict=True))
            ]
            *spent, _ = race([*work, partial(change, books.dsn("bursar_app"), scene, team, idle)])
            for n, (user, key) in enumerate(zip(users, keys, strict=True)):
                spent[n] += empty(scene, connected[n], user, key)
        scene.now = clock.now()
        scene.fold()
        for cap in (model, wide[0]):
            row = scene.balance(cap)
            assert (row.used, row.held, row.excess) == (sum(spent), 0, 0)
        for_keys = "select balance_id from credits.counters where limit_id = %s and subject_id = %s"
        by_key = [scene.balance(scene.admin(for_keys, per_key, key)[0][0]) for key in keys]
        assert [row.used for row in by_key] == spent
        assert all(row.used <= KEY_CAP and row.held == row.excess == 0 for row in by_key)
        in_team = scene.balance(team)
        assert in_team.used == sum(spent[::2]) <= TEAM_CAP + RAISE
        assert in_team.excess == max(0, in_team.used - TEAM_CAP)
        assert sum(spent) == MODEL_CAP, "nobody stopped before the narrowest limit was used up"
        assert scene.balance(idle[0]).limit + scene.balance(idle[1]).limit == 1_000
        assert scene.findings() == []
