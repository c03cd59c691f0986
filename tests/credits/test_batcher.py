"""The batcher: one call for all that waits, answers after commit, and nothing lost when connections break."""

import asyncio
from collections import Counter
from uuid import UUID

import psycopg
from tests.conftest import MakeOrg, Org
from tests.gateway.scripted import Cable

from bursar import db
from bursar.clock import uuid7
from bursar.credits.batcher import WAITING, Batcher, Lane, _Flight, _Waiting
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.moves import Action, Flag, Move, Outcome, Verdict
from bursar.credits.pools import Pool, list_pools, pool_for
from bursar.money import Micros


async def fund(org: Org, amount: int) -> None:
    """Credits for the shared pool."""
    async with org.tenant() as conn:
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=await pool_for(conn, organization_id=org.organization_id),
            amount_micros=Micros(amount),
            source=GrantSource.PURCHASE,
            idempotency_key=uuid7().hex,
        )


async def pool_of(org: Org) -> Pool:
    async with org.tenant() as conn:
        return (await list_pools(conn, organization_id=org.organization_id))[0]


def move(org: Org, action: Action, amount: int = 0, request_id: UUID | None = None, flags: Flag = Flag.NONE) -> Move:
    """A move of the organization's administrator."""
    return Move(
        action,
        org.organization_id,
        request_id or uuid7(),
        org.admin,
        None,
        amount_micros=Micros(amount),
        lease_seconds=60,
        flags=flags,
        model="m",
        provider="demo",
    )


async def waiting(calls: int) -> None:
    """Until so many calls are parked in this process."""
    async with asyncio.timeout(30):
        while WAITING._value.get() < calls:
            await asyncio.sleep(0.01)


async def test_a_burst_is_decided_in_few_calls_and_exactly_what_fits_is_accepted(org: Org) -> None:
    await fund(org, 100 * 7)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        verdicts = await asyncio.gather(*(batcher.move(move(org, Action.DEDUCT, 7)) for _ in range(300)))
    assert Counter(verdict.outcome for verdict in verdicts) == {Outcome.ACCEPTED: 100, Outcome.REFUSED: 200}
    pool = await pool_of(org)
    assert (pool.used_micros, pool.held_micros, pool.available_micros) == (700, 0, 0)


async def test_no_charge_is_lost_or_doubled_when_connections_are_cut_under_load(org: Org) -> None:
    await fund(org, 10**12)
    acknowledged: list[Verdict] = []

    async def charge(batcher: Batcher) -> None:
        for _ in range(40):
            acknowledged.append(await batcher.move(move(org, Action.DEDUCT, 3)))
            held = move(org, Action.AUTHORIZE, 10)
            acknowledged.append(await batcher.move(held))
            acknowledged.append(await batcher.move(move(org, Action.SETTLE, 4, held.request_id)))

    async with (
        await psycopg.AsyncConnection.connect(org.database.dsn("admin"), autocommit=True) as admin,
        Batcher(org.database.dsn("bursar_lane"), lanes=2) as batcher,
    ):
        work = asyncio.gather(*(charge(batcher) for _ in range(16)))
        cuts = answered = 0
        while not work.done() and cuts < 15:
            await asyncio.sleep(0.05)
            if len(acknowledged) == answered:
                continue  # on a slow machine a call takes longer than this: cut again once something came through
            answered = len(acknowledged)
            cut = await admin.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity"
                # One in the middle of a call where there is one, else any: lanes reconnect either way.
                " where application_name = 'bursar lane' and datname = current_database() order by state limit 1"
            )
            cuts += cut.rowcount
        await work
    assert cuts > 0, "the test cut nothing"
    assert all(verdict.accepted for verdict in acknowledged)
    pool = await pool_of(org)
    assert (pool.used_micros, pool.held_micros) == (16 * 40 * (3 + 4), 0)
    async with org.tenant() as conn:
        rows = await db.fetch_value(conn, "select count(*) from ledger.attribution")
    assert rows == 16 * 40 * 2


async def test_a_deduction_whose_answer_was_lost_is_asked_again_and_charged_once(org: Org) -> None:
    await fund(org, 100)
    cable = Cable(org.database.dsn("bursar_lane"))
    async with cable.laid() as dsn, Batcher(dsn) as batcher:
        await batcher.move(move(org, Action.DEDUCT, 1))
        cable.loses_next = True
        verdict = await batcher.move(move(org, Action.DEDUCT, 7))
    assert cable.lost == 1
    assert (verdict.accepted, verdict.charged_micros) == (True, 7)
    assert (await pool_of(org)).used_micros == 8


async def test_a_call_that_only_open_holds_block_waits_and_is_served_when_they_end(org: Org) -> None:
    await fund(org, 10)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        first = move(org, Action.AUTHORIZE, 10)
        await batcher.move(first)
        waiting = asyncio.create_task(batcher.move(move(org, Action.AUTHORIZE, 6, flags=Flag.MAY_WAIT)))
        too_large = await batcher.move(move(org, Action.AUTHORIZE, 11, flags=Flag.MAY_WAIT))
        assert too_large.outcome is Outcome.REFUSED, "no hold's end would make room for it"
        impatient = await batcher.move(move(org, Action.AUTHORIZE, 6))
        assert impatient.outcome is Outcome.REFUSED
        await asyncio.sleep(0.2)
        assert not waiting.done()
        await batcher.move(move(org, Action.SETTLE, 4, first.request_id))
        assert (await asyncio.wait_for(waiting, 2)).outcome is Outcome.ACCEPTED


async def test_a_call_waits_for_what_another_process_settles(org: Org) -> None:
    await fund(org, 10)
    async with (
        Batcher(org.database.dsn("bursar_lane")) as here,
        Batcher(org.database.dsn("bursar_lane")) as elsewhere,
    ):
        first = move(org, Action.AUTHORIZE, 10)
        await elsewhere.move(first)
        waiting = asyncio.create_task(here.move(move(org, Action.AUTHORIZE, 6, flags=Flag.MAY_WAIT)))
        await asyncio.sleep(0.2)
        await elsewhere.move(move(org, Action.RELEASE, 0, first.request_id))
        assert (await asyncio.wait_for(waiting, 2)).outcome is Outcome.ACCEPTED


async def test_a_busy_lane_still_tries_what_another_process_may_have_made_room_for(org: Org, make_org: MakeOrg) -> None:
    busy = await make_org()
    await fund(org, 10)
    await fund(busy, 10**9)
    async with (
        Batcher(org.database.dsn("bursar_lane"), lanes=1) as here,
        Batcher(org.database.dsn("bursar_lane")) as elsewhere,
    ):
        first = move(org, Action.AUTHORIZE, 10)
        await elsewhere.move(first)
        waiting = asyncio.create_task(here.move(move(org, Action.AUTHORIZE, 6, flags=Flag.MAY_WAIT)))

        async def keep_busy() -> None:
            while not waiting.done():
                await here.move(move(busy, Action.DEDUCT, 1))

        others = asyncio.gather(*(keep_busy() for _ in range(8)))
        await asyncio.sleep(0.2)
        await elsewhere.move(move(org, Action.RELEASE, 0, first.request_id))
        assert (await asyncio.wait_for(waiting, 3)).outcome is Outcome.ACCEPTED
        await others


async def test_waiting_ends_with_a_refusal(org: Org) -> None:
    await fund(org, 10)
    async with Batcher(org.database.dsn("bursar_lane"), wait_seconds=0.3) as batcher:
        await batcher.move(move(org, Action.AUTHORIZE, 10))
        verdict = await batcher.move(move(org, Action.AUTHORIZE, 6, flags=Flag.MAY_WAIT))
    assert (verdict.outcome, verdict.detail) == (Outcome.REFUSED, "pool_exhausted")


async def test_waiting_calls_are_served_in_the_order_of_their_arrival(org: Org) -> None:
    await fund(org, 10)
    served: list[int] = []
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        blocking = move(org, Action.AUTHORIZE, 10)
        await batcher.move(blocking)

        async def one(number: int) -> None:
            mine = move(org, Action.AUTHORIZE, 10, flags=Flag.MAY_WAIT)
            await batcher.move(mine)
            served.append(number)
            await batcher.move(move(org, Action.RELEASE, 0, mine.request_id))

        tasks = []
        for number in range(5):
            tasks.append(asyncio.create_task(one(number)))
            await waiting(number + 1)
        await batcher.move(move(org, Action.RELEASE, 0, blocking.request_id))
        await asyncio.gather(*tasks)
    assert served == [0, 1, 2, 3, 4]


async def test_many_who_wait_for_one_organizations_credits_keep_no_other_organization_waiting(
    org: Org, make_org: MakeOrg
) -> None:
    other = await make_org()
    await fund(org, 10)
    await fund(other, 1000)
    async with Batcher(org.database.dsn("bursar_lane"), lanes=1, wait_seconds=8) as batcher:
        blocking = move(org, Action.AUTHORIZE, 10)
        await batcher.move(blocking)
        parked = [
            asyncio.create_task(batcher.move(move(org, Action.AUTHORIZE, 6, flags=Flag.MAY_WAIT))) for _ in range(2500)
        ]
        await waiting(len(parked))
        for _ in range(20):
            assert (await batcher.move(move(other, Action.DEDUCT, 1))).outcome is Outcome.ACCEPTED
        assert not any(task.done() for task in parked), "others were served only when these had given up"
        await batcher.move(move(org, Action.RELEASE, 0, blocking.request_id))
        assert (await parked[0]).outcome is Outcome.ACCEPTED
        for task in parked[1:]:
            task.cancel()


async def test_a_large_call_is_passed_by_small_ones_and_refused_when_it_has_waited_long_enough(org: Org) -> None:
    await fund(org, 10)
    async with Batcher(org.database.dsn("bursar_lane"), wait_seconds=1) as batcher:
        small = move(org, Action.AUTHORIZE, 4)
        await batcher.move(small)
        large = asyncio.create_task(batcher.move(move(org, Action.AUTHORIZE, 10, flags=Flag.MAY_WAIT)))
        await waiting(1)
        passed = 0
        while not large.done():  # something is always held, and each of these finds room
            following = move(org, Action.AUTHORIZE, 4, flags=Flag.MAY_WAIT)
            assert (await batcher.move(following)).outcome is Outcome.ACCEPTED
            await batcher.move(move(org, Action.RELEASE, 0, small.request_id))
            small = following
            passed += 1
        assert (await large).outcome is Outcome.REFUSED
        assert passed > 1
        again = asyncio.create_task(batcher.move(move(org, Action.AUTHORIZE, 10, flags=Flag.MAY_WAIT)))
        await waiting(1)
        await batcher.move(move(org, Action.RELEASE, 0, small.request_id))
        assert (await again).outcome is Outcome.ACCEPTED, "it is the first to be tried when nobody else is served"


async def test_what_waits_is_sized_anew_each_time_it_is_tried(org: Org) -> None:
    await fund(org, 10)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        await batcher.move(move(org, Action.AUTHORIZE, 7))
        mine = move(org, Action.AUTHORIZE, 9, flags=Flag.MAY_WAIT)
        sizes = iter((8, 6, 3))
        verdict = await batcher.move(mine, resized=lambda: mine._replace(amount_micros=Micros(next(sizes))))
    assert (verdict.outcome, verdict.held_micros) == (Outcome.ACCEPTED, 3)


async def test_who_may_not_wait_at_all_is_refused_at_once_by_its_newest_size(org: Org) -> None:
    await fund(org, 10)
    async with Batcher(org.database.dsn("bursar_lane"), wait_seconds=0) as batcher:
        await batcher.move(move(org, Action.AUTHORIZE, 7))
        flags = Flag.MAY_WAIT | Flag.UNLIMITED | Flag.MAY_RESIZE
        mine = move(org, Action.AUTHORIZE, 9, flags=flags)
        smaller = await batcher.move(mine, resized=lambda: mine._replace(amount_micros=Micros(2)))
        larger = mine._replace(request_id=uuid7())
        refused = await batcher.move(larger, resized=lambda: larger)
    assert smaller.outcome is Outcome.ACCEPTED
    assert (refused.outcome, refused.detail) == (Outcome.REFUSED, "pool_exhausted"), "for good, after all its patience"


async def test_a_settle_is_booked_although_its_caller_has_gone(org: Org) -> None:
    await fund(org, 100)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        held = move(org, Action.AUTHORIZE, 10)
        await batcher.move(held)
        caller = asyncio.create_task(batcher.move(move(org, Action.SETTLE, 7, held.request_id)))
        await asyncio.sleep(0)
        caller.cancel()
    pool = await pool_of(org)
    assert (pool.used_micros, pool.held_micros) == (7, 0)


async def test_an_authorize_whose_caller_has_gone_before_it_went_out_holds_nothing(org: Org) -> None:
    await fund(org, 100)
    batcher = Batcher(org.database.dsn("bursar_lane"))
    caller = asyncio.create_task(batcher.move(move(org, Action.AUTHORIZE, 10)))
    await asyncio.sleep(0)
    caller.cancel()
    async with batcher:
        pass
    assert (await pool_of(org)).held_micros == 0


async def test_one_move_that_the_database_refuses_does_not_take_the_others_with_it(org: Org) -> None:
    await fund(org, 100)
    async with Batcher(org.database.dsn("bursar_lane"), lanes=1) as batcher:
        # One count is missing: the arrays do not fit.
        bad = move(org, Action.DEDUCT, 5)._replace(usage=(2**31 - 1,) * 16)
        answers = await asyncio.gather(
            batcher.move(move(org, Action.DEDUCT, 5)),
            batcher.move(bad),
            batcher.move(move(org, Action.DEDUCT, 5)),
            return_exceptions=True,
        )
    assert isinstance(answers[0], Verdict)
    assert isinstance(answers[2], Verdict)
    assert not (isinstance(answers[1], Verdict) and answers[1].accepted)
    assert (await pool_of(org)).used_micros == 10


async def test_a_mark_that_the_end_of_its_request_overtakes_goes_out_no_more() -> None:
    """It holds nothing more; only marks that are still in the queue are spared, and of this request alone."""
    lane = Lane("")
    loop = asyncio.get_running_loop()

    def put(action: Action, request_id: UUID, amount: int = 0) -> asyncio.Future[Verdict]:
        move = Move(action, uuid7(), request_id, amount_micros=Micros(amount))
        waiting = _Waiting(move, loop.create_future(), 0.0, 0.0)
        lane.put(waiting)
        return waiting.answer

    one, other = uuid7(), uuid7()
    mark, others, more = put(Action.EXTEND, one), put(Action.EXTEND, other), put(Action.EXTEND, one, amount=5)
    again = put(Action.EXTEND, one)
    put(Action.SETTLE, one)
    assert not others.done()
    assert not more.done()
    assert again.result().outcome is Outcome.NO_HOLD
    lane._take()
    assert [each.answer for each in lane.packed] == [mark, others]
    lane.packed = []
    lane._take()
    assert [each.answer for each in lane.packed] == [more]
    lane.packed = []
    put(Action.RELEASE, other)
    lane._take()
    assert [each.move.action for each in lane.packed] == [Action.SETTLE, Action.RELEASE]
    assert not lane.marks


async def test_what_waits_is_halved_so_that_halves_overlap_unless_another_lane_is_at_work(org: Org) -> None:
    alone, beside, busy = Lane(""), Lane(""), Lane("")
    beside.others = [busy]
    busy.flight = _Flight([], asyncio.get_running_loop().create_task(_nothing()))
    for lane in (alone, beside):
        for _ in range(100):
            answer = asyncio.get_running_loop().create_future()
            lane.put(_Waiting(move(org, Action.DEDUCT, 1), answer, 0, 0))
        lane._take()
    assert (len(alone.packed), len(beside.packed)) == (50, 100)


async def _nothing() -> list[Verdict]:
    return []
