"""Why may this be spent: the answer names what the decision would name, and asks on behalf of the right person."""

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund, move

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.batcher import Batcher
from bursar.credits.limits import AllocationKind, Period, Scope, allocate, set_limit
from bursar.credits.moves import Action, Outcome
from bursar.credits.pools import pool_for
from bursar.credits.why import LimitState, Why, may_stop, why
from bursar.identity.organizations import update_organization
from bursar.money import Micros


async def ask(org: Org, amount: int) -> Why:
    async with org.tenant() as conn:
        return await why(
            conn,
            organization_id=org.organization_id,
            user_id=org.admin,
            api_key_id=None,
            model="m",
            wanted_micros=Micros(amount),
        )


async def cap(org: Org, amount: int) -> None:
    async with org.tenant() as conn:
        await set_limit(conn, organization_id=org.organization_id, scope=Scope.USER, scope_id=org.admin, amount=amount)


async def share(org: Org, amount: int, kind: AllocationKind, period: Period = Period.NONE) -> None:
    async with org.tenant() as conn:
        await allocate(
            conn,
            organization_id=org.organization_id,
            pool_id=await pool_for(conn, organization_id=org.organization_id),
            user_id=org.admin,
            amount_micros=Micros(amount),
            idempotency_key=f"share {amount}",
            kind=kind,
            period=period,
        )


@pytest.mark.parametrize("amount", [1, 49, 50, 51, 80, 81, 100, 101])
@pytest.mark.parametrize("rules", ["pool", "cap", "reserved", "capped", "all"])
async def test_what_why_says_is_what_the_decision_is(org: Org, rules: str, amount: int) -> None:
    await fund(org, 100)
    if rules in ("cap", "all"):
        await cap(org, 80)
    if rules in ("reserved", "all"):
        await share(org, 50, AllocationKind.RESERVED)
    if rules == "capped":
        await share(org, 50, AllocationKind.CAPPED, Period.MONTH)
    told = await ask(org, amount)
    async with Batcher(org.database.dsn("bursar_lane")) as batcher:
        verdict = await batcher.move(move(org, Action.AUTHORIZE, amount))
    assert told.allowed is (verdict.outcome is Outcome.ACCEPTED)
    if not told.allowed:
        assert told.code == verdict.detail
        assert told.binding is not None
        assert told.binding.balance_id == verdict.binding_id
        assert told.available_micros == verdict.available_micros


async def test_a_cap_resets_at_the_end_its_period_began_with_although_the_zone_changed(org: Org) -> None:
    await fund(org, 100)
    await cap(org, 10)
    assert (await ask(org, 11)).binding is not None
    async with org.tenant() as conn:
        end = await db.fetch_value(conn, "select period_end from credits.balances where kind = 'limit'")
        await update_organization(conn, organization_id=org.organization_id, by=OPERATOR, zone="Pacific/Auckland")
    told = (await ask(org, 11)).binding
    assert told is not None
    assert told.resets_at == end > datetime.now(UTC)


def state(name: str, leg: int, room: int, *, stops: bool = True) -> LimitState:
    """A balance with so much room."""
    return LimitState(
        None, uuid7(), leg, "credits", "pool", stops, False, 100, 100 - room, 0, 0,
        "organization", None, "none", None, None, None, "UTC", name, None,
    )  # fmt: skip


def test_the_last_way_to_pay_that_has_anything_can_stop_a_call_and_those_before_it_cannot() -> None:
    own, share, shared, empty = state("own", 1, 0), state("share", 2, 50), state("shared", 2, 90), state("empty", 3, 0)
    cap, warning = state("cap", 0, 70), state("warning", 0, 1, stops=False)
    assert may_stop([own, share, shared, empty, cap, warning]) == (share, shared, cap)
    assert may_stop([own, empty]) == (empty,), "where nothing is left the last one refuses"
    assert may_stop([]) == ()


@pytest.mark.parametrize(
    ("of", "told"),
    [
        ({}, "Ask whoever set the cap to raise it."),
        ({"resets_at": datetime.now(UTC)}, "Wait for the reset, or ask whoever set the cap to raise it."),
        ({"scope": "key"}, "Use another key, or ask whoever set the cap to raise it."),
        ({"model_filter": "gpt-%"}, "Use another model, or ask whoever set the cap to raise it."),
        ({"model_filter": "#images"}, "Ask whoever set the cap to raise it."),
        (
            {"resets_at": datetime.now(UTC), "model_filter": "gpt-%", "scope": "key"},
            "Wait for the reset, use another model, use another key, or ask whoever set the cap to raise it.",
        ),
        ({"action": "asks"}, "Ask for more with `bursar caps request`."),
        (
            {"action": "asks", "resets_at": datetime.now(UTC)},
            "Ask for more with `bursar caps request`, or wait for the reset.",
        ),
    ],
)
def test_a_cap_that_is_reached_says_what_helps_and_nothing_else(of: dict[str, Any], told: str) -> None:
    assert replace(state("cap", 0, 0), kind="limit", **of).next_step == told
