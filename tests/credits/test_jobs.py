"""Periodic work of the treasury: what cannot be done for one organization is done for the others."""

from datetime import timedelta

import psycopg
import pytest
from tests.credits.conftest import scratch_database
from tests.credits.scenes import Balance, Scene

from bursar import clock, db
from bursar.credits import jobs
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
