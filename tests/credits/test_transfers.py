"""Transfers, refunds, schedules and the switch as the application asks: recorded, previewed, refused by name."""

import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund, move

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import refunds, schedules, transfers
from bursar.credits.batcher import Batcher
from bursar.credits.explain import explain, margin_of
from bursar.credits.grants import GrantSource
from bursar.credits.moves import Action
from bursar.credits.pools import PoolKind, list_pools, pool_for
from bursar.credits.schedules import Unit
from bursar.credits.transfers import Sharing
from bursar.identity.organizations import get_organization
from bursar.money import Micros
from bursar.problems import NotFound, translated


async def _recorded(conn: db.Connection, org: Org) -> list[str]:
    rows = await (
        await conn.execute(
            "select action from audit.events where organization_id = %s order by at, event_id", [org.organization_id]
        )
    ).fetchall()
    return [str(row[0]) for row in rows]


async def test_a_preview_of_the_switch_shows_what_would_be_and_changes_nothing(org: Org) -> None:
    await fund(org, 100)
    where = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        async with conn.transaction(force_rollback=True):
            shown = await transfers.switch_pools(conn, **where, to=Sharing.PERSONAL, idempotency_key="s")  # type: ignore[arg-type]
        assert [each.kind for each in await list_pools(conn, organization_id=org.organization_id)] == [PoolKind.SHARED]
        assert "organization.pools_switched" not in await _recorded(conn, org)
        done = await transfers.switch_pools(conn, **where, to=Sharing.PERSONAL, idempotency_key="s")  # type: ignore[arg-type]
        assert done == shown
        assert await transfers.switch_pools(conn, **where, to=Sharing.PERSONAL, idempotency_key="s") == done  # type: ignore[arg-type]
        with pytest.raises(transfers.AlreadySwitched):
            await transfers.switch_pools(conn, **where, to=Sharing.PERSONAL, idempotency_key="t")  # type: ignore[arg-type]
        assert not (await get_organization(conn, organization_id=org.organization_id)).is_shared_token_pool
        assert (await _recorded(conn, org)).count("organization.pools_switched") == 1


async def test_transfers_refunds_and_schedules_are_recorded_and_refused_by_name(org: Org) -> None:
    await fund(org, 100)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        verdict = await batcher.move(move(org, Action.DEDUCT, 7))
    where = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        shared = await pool_for(conn, organization_id=org.organization_id)
        own = await pool_for(conn, organization_id=org.organization_id, owner_user_id=org.admin)
        schedule = await schedules.add_schedule(
            conn, organization_id=org.organization_id, pool_id=own, amount_micros=Micros(5), source=GrantSource.PLAN,
            unit=Unit.MONTH, zone="Europe/Paris", by=OPERATOR, idempotency_key="plan",
        )  # fmt: skip
        await schedules.cancel_schedule(conn, **where, schedule_id=schedule)  # type: ignore[arg-type]
        listed = await schedules.list_schedules(conn, organization_id=org.organization_id)
        assert [(each.schedule_id, each.next_at) for each in listed] == [(schedule, None)]
        await transfers.transfer_credits(
            conn, organization_id=org.organization_id, from_pool_id=shared, to_pool_id=own, amount_micros=Micros(10),
            by=OPERATOR, idempotency_key="t",
        )  # fmt: skip
        given = await refunds.refund_charge(
            conn, organization_id=org.organization_id, request_id=verdict.request_id, amount_micros=Micros(3),
            reason="half", by=OPERATOR, idempotency_key="r",
        )  # fmt: skip
        assert given == 3
        story = await explain(conn, organization_id=org.organization_id, request_id=verdict.request_id)
        assert (story.charged_micros, story.refunded_micros) == (4, 3)
        assert [row["kind"] for row in story.as_json()["rows"]] == ["charge", "refund"]
        assert [burn.reason for burn in story.burns] == ["only"]
        assert margin_of(story)["revenue"]["unit"] == "USD"
        recorded = await _recorded(conn, org)
        assert {"schedule.added", "schedule.canceled", "pool.transferred", "request.refunded"} <= set(recorded)
    for refusal, work in (
        (refunds.RefundTooLarge, {"request_id": verdict.request_id, "amount_micros": Micros(5)}),
        (NotFound, {"request_id": uuid7(), "amount_micros": None}),
    ):
        with pytest.raises(refusal), translated():
            async with org.tenant() as conn:
                await refunds.refund_charge(
                    conn, **where, **work, reason="no", idempotency_key=uuid7().hex  # type: ignore[arg-type]
                )  # fmt: skip
    with pytest.raises(transfers.NothingToSpare), translated():
        async with org.tenant() as conn:
            await transfers.transfer_credits(
                conn, organization_id=org.organization_id, from_pool_id=shared, to_pool_id=own,
                amount_micros=Micros(1000), by=OPERATOR, idempotency_key="u",
            )  # fmt: skip
