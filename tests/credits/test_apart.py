"""A command on one pool, grant, share or limit leaves every other one of the same organization as it was."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

from tests.credits.scenes import Scene
from tests.credits.test_tenancy import TABLES

from bursar.clock import uuid7


@dataclass
class Side:
    """A pool and what belongs to it: grants (the first partly burnt), a share, a cap, and a request of their member."""

    pool: UUID
    user: UUID
    grants: list[UUID]
    schedule: UUID
    share: UUID
    capped: UUID
    cap: UUID
    raised: UUID
    asked: UUID
    charged: UUID

    def names(self) -> list[str]:
        """Its ids, as they stand in rows."""
        ids = [self.pool, self.user, *self.grants, self.schedule, self.share, self.capped, self.cap, self.raised]
        return [str(each) for each in (*ids, self.asked, self.charged)]


def side_of(scene: Scene, models: str) -> Side:
    pool, user, other = scene.pool(models=f"{models}%"), scene.user(), scene.user()
    grants = [scene.grant(pool, amount, paid=1_000) for amount in (100, 50, 40)]
    share = scene.share(pool, user, 60, period="month")
    capped = scene.share(pool, other, 50, kind="capped", period="month")
    cap = scene.limit(500, scope="user", of=user, action="asks", period="month")
    return Side(
        pool=pool,
        user=user,
        grants=grants,
        schedule=scene.schedule(pool, 5, anchor=scene.now + timedelta(days=20)),
        share=share,
        capped=capped,
        cap=cap,
        raised=scene.raise_(cap, 7),
        asked=scene.request(cap, user, 9),
        charged=scene.settle(scene.hold(30, user, model=models), 20, user, model=models).request_id,
    )


def rows_of(scene: Scene, side: Side) -> list[tuple[Any, ...]]:
    """Every row of the treasury that names something of a side, but chains, which follow every change."""
    found: list[tuple[Any, ...]] = []
    for (table,) in scene.admin(TABLES):
        if table not in ("credits.chains", "credits.commands"):
            found += scene.admin(
                f"select '{table}', t::text from {table} t where organization_id = %s and t::text ~ %s",
                scene.organization, "|".join(side.names()),
            )  # fmt: skip
    part = scene.open_part(side.pool)
    return sorted([*found, ("open part", str(scene.balance(part)))])


def touched(scene: Scene, *commands: Callable[[Side], object]) -> list[int]:
    """Which of these commands on the second of three sides changed anything of the other two, or nothing of its own."""
    scene.grant(scene.pool(), 1_000)
    one, two, three = (side_of(scene, models) for models in ("a", "b", "c"))
    before = [rows_of(scene, each) for each in (one, three)]
    wrong = []
    for nr, command in enumerate(commands):
        scene.later(seconds=1)
        own = rows_of(scene, two)
        command(two)
        if [rows_of(scene, each) for each in (one, three)] != before or rows_of(scene, two) == own:
            wrong.append(nr)
    assert scene.findings() == []
    return wrong


def test_grants_schedules_and_refunds_leave_others_alone(scene: Scene) -> None:
    wrong = touched(
        scene,
        lambda side: scene.grant(side.pool, 10),
        lambda side: scene.refund(side.charged, 5),
        lambda side: scene.transfer(side.pool, scene.pool("personal", owner=side.user, models="b%"), 30),
        lambda side: scene.cancel(side.schedule),
    )
    assert wrong == []


def test_of_a_pools_grants_only_the_one_that_is_meant_is_voided(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    first, second, third = (scene.grant(pool, 100, priority=nr) for nr in (1, 2, 3))
    waiting = [scene.grant(pool, 10, starts=scene.now + timedelta(days=nr)) for nr in (1, 2)]
    scene.deduct(30, user)
    assert scene.void(second) == 100
    assert scene.void(waiting[0]) == 10
    assert [(left, state) for _, _, left, state in scene.grants(pool)] == [
        (70, "active"),
        (0, "ended"),
        (100, "active"),
        (0, "ended"),
        (10, "scheduled"),
    ]
    assert (scene.void(first), scene.void(first), scene.void(third)) == (70, 0, 100)
    with scene.refusal("BR404"):
        scene.void(uuid7())
    assert scene.findings() == []


def test_shares_leave_others_alone(scene: Scene) -> None:
    wrong = touched(
        scene,
        lambda side: scene.share(side.pool, side.user, 70, period="month"),
        lambda side: scene.reallocate(side.share, None, 3),
        lambda side: scene.refund(side.charged, 2),
        lambda side: scene.end_share(side.share),
        lambda side: scene.end_share(side.capped),
    )
    assert wrong == []


def test_limits_raises_and_requests_leave_others_alone(scene: Scene) -> None:
    def lower(side: Side) -> None:
        assert scene.limit(400, scope="user", of=side.user, action="asks", period="month") == side.cap

    wrong = touched(
        scene,
        lower,
        lambda side: scene.call("select credits.end_raise(%s, %s, %s)", scene.organization, side.raised, scene.now),
        lambda side: scene.raise_(side.cap, 8),
        lambda side: scene.decide(side.asked, approve=True, amount=3),
        lambda side: scene.end_limit(side.cap),
    )
    assert wrong == []
