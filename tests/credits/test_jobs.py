"""Periodic work of the treasury: what cannot be done for one organization is done for the others."""

from datetime import timedelta

import psycopg
import pytest
from tests.credits.conftest import scratch_database
from tests.credits.scenes import Balance, Scene

from bursar import clock, db
from bursar.credits import jobs
from bursar.credits.moves import Outcome
from bursar.settings import Settings


async def test_an_organization_whose_holds_cannot_be_ended_keeps_no_other_waiting(
    database: db.Database, admin_dsn: str, settings: Settings
) -> None:
    """The balances of two are falsified, so that what is due there fails whoever moves their credits."""
    async with scratch_database(admin_dsn, settings, "stuck") as stuck:
        with psycopg.connect(stuck.dsn("admin"), autocommit=True) as conn:
            scenes = [Scene(conn, now=clock.now() - timedelta(days=1)) for _ in range(5)]
            caps = []
            for scene in scenes:
                user = scene.user()
                scene.grant(scene.pool(), 100)
                caps.append(scene.limit(10))
                scene.raise_(caps[-1], 50, ends=scene.now + timedelta(hours=1))
                scene.hold(30, user, lease_seconds=60)
            for place in (0, 3):
                conn.execute("update credits.balances set limit_amount = 30 where balance_id = %s", [caps[place]])
            with pytest.raises(psycopg.errors.CheckViolation):
                await jobs.expire_holds(stuck)
            held = [scene.balance(cap) for scene, cap in zip(scenes, caps, strict=True)]
            free, kept = Balance(10, 0, 0, 0), Balance(30, 0, 30, 0)
            assert held == [kept, free, free, kept, free]


COMMANDS = "select idempotency_key from credits.commands where organization_id = %s order by 1"


@pytest.mark.parametrize("at_once", [1, 500])
async def test_stored_results_are_forgotten_when_nobody_may_ask_for_them_any_more(
    database: db.Database, admin_dsn: str, settings: Settings, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(jobs, "FORGOTTEN_AT_ONCE", at_once)
    async with scratch_database(admin_dsn, settings, f"forget{at_once}") as books:
        with psycopg.connect(books.dsn("admin"), autocommit=True) as conn:
            scenes = [Scene(conn, now=clock.now() - timedelta(days=36)) for _ in range(2)]
            for scene in scenes:
                user, pool = scene.user(), scene.pool()
                scene.grant(pool, 50, key="old grant")
                scene.deduct(10, user, idempotency_key="old charge", body_hash=b"1")
                scene.later(days=34)
                scene.grant(pool, 50, key="late grant")
                scene.deduct(900, user, idempotency_key="old refusal", body_hash=b"1")
                charged = scene.deduct(20, user, idempotency_key="late charge", body_hash=b"1")
                scene.now = clock.now()
                scene.deduct(900, user, idempotency_key="late refusal", body_hash=b"1")
            assert await jobs.forget_commands(books) == 6
            for scene in scenes:
                assert scene.admin(COMMANDS, scene.organization) == [
                    ("late charge",),
                    ("late grant",),
                    ("late refusal",),
                ]
            again = scene.deduct(20, user, idempotency_key="late charge", body_hash=b"1")
            assert (again.outcome, again.request_id) == (Outcome.KNOWN, charged.request_id)
            assert scene.balance(pool).used == 30
            assert await jobs.forget_commands(books) == 0
