"""P1: a company is switched between shared and personal pools while calls go on; no micro is lost or doubled."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import psycopg
from tests.credits.racing import Traffic, lanes, race
from tests.credits.scenes import Scene
from tests.promises.figures import SEED, figure, tell
from tests.promises.test_races import today  # noqa: F401 - the fixture

from bursar import db
from bursar.clock import uuid7
from bursar.credits.moves import Outcome

GRANTS = 1, 9_999, 7_000, 3_000


def test_switches_under_load_lose_and_double_nothing(books: db.Database, today: Scene) -> None:  # noqa: F811
    users = [today.user() for _ in range(3)]
    pool = today.pool()
    times = figure("steps") // 2_000
    granted = sum(GRANTS) * times
    for amount in GRANTS:
        today.grant(pool, amount * times, paid=amount * 3 + 1)
    today.share(pool, users[0], 5_000 * times)
    with lanes(books, 6) as connected:
        traffic = [Traffic(today, lane, users, random.Random(SEED + n)) for n, lane in enumerate(connected[:5])]
        stop = threading.Event()

        def drive(each: Traffic) -> None:
            for _ in range(figure("steps") // 4 // len(traffic)):
                each.step()
            each.end()

        def switch() -> int:
            turns = 0
            with psycopg.connect(books.dsn("bursar_app"), autocommit=True) as app:
                app.execute("select set_config('app.organization_id', %s, false)", [str(today.organization)])
                while not stop.is_set():
                    to = "personal" if turns % 2 == 0 else "shared"
                    command = "select credits.switch_pools(%s, %s, null, %s)"
                    app.execute(command, [today.organization, to, uuid7().hex])
                    connected[5].conn.execute("select credits.expire_holds()")
                    turns += 1
            return turns

        with ThreadPoolExecutor(1) as switching:
            background = switching.submit(switch)
            race([partial(drive, each) for each in traffic])
            stop.set()
            turns = background.result()
    today.admin("update credits.holds set lease_expires_at = placed_at where organization_id = %s", today.organization)
    today.call("select credits.expire_holds(100000)")
    last = today.asked(2, None)  # an extension of nothing: whoever moves credits folds what is due
    today.now = today.admin("select clock_timestamp()")[0][0]
    today.move(last)
    charged = sum(sum(each.true.values()) + sum(each.lost.values()) for each in traffic)
    rows = today.admin(
        "select sum(b.limit_amount)::int, sum(b.used_amount)::int, sum(b.held_amount)::int, "
        "sum(b.limit_amount - b.used_amount) filter (where p.closed_at is not null)::int from credits.pools p "
        "join credits.balances b on b.organization_id = p.organization_id and b.balance_id = p.pool_id "
        "where p.organization_id = %s",
        today.organization,
    )
    assert rows == [(granted, charged, 0, 0)]
    accepted = sum(n for each in traffic for (_, outcome), n in each.outcomes.items() if outcome is Outcome.ACCEPTED)
    assert today.findings() == []
    assert turns > 2
    tell(f"{turns} switches during {accepted} moves of 5 threads; {charged} micros charged, {granted - charged} left")
