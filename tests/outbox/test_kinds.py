"""What is told: every kind of event says in words what happened, and is in the documentation."""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.credits.test_batcher import fund
from tests.credits.test_codes import make, redeem
from tests.credits.test_raises import decide, default, request
from tests.outbox.test_events import endpoint

import bursar
from bursar import clock, db
from bursar.alerts.looking import FULL_KINDS, LEVEL_KINDS
from bursar.alerts.telling import Subject, grant_payload, level_payload, refusal_payload
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import raises, top_ups
from bursar.credits.pools import pool_for
from bursar.money import Micros, NanoUsd
from bursar.outbox.endpoints import TEST_KIND, disable_endpoint, post_test

CREDIT: Final = 1_000_000
SOURCES: Final = Path(bursar.__file__).parent
PAGE: Final = SOURCES.parents[1] / "docs" / "alerts.md"
KIND: Final = re.compile(r"[a-z]+\.[a-z_]+")
POSTED_IN_SQL: Final = re.compile(r"outbox\.post_event\(p_organization_id, (.{1,120}?), '[a-z_]+', ")
POSTED_IN_PYTHON: Final = re.compile(r'kind="([a-z]+\.[a-z_]+)"|"((?:grant|deduction)\.[a-z]+)"')


@dataclass(frozen=True, slots=True)
class Told:
    """An event as it was posted."""

    kind: str
    payload: dict[str, Any]


Happens = Callable[[Org], Awaitable[None]]


async def purchase(org: Org, *, ceiling: int = 2_000, per_hour: int = 3) -> UUID | None:
    """The purchase that the empty pool makes now; None: it makes none."""
    async with org.tenant() as conn:
        place = {"organization_id": org.organization_id}
        pool = await pool_for(conn, **place)
        await top_ups.set_policy(
            conn,
            pool_id=pool,
            threshold_micros=Micros(2_000 * CREDIT),
            amount_micros=Micros(500 * CREDIT),
            ceiling_micros=Micros(ceiling * CREDIT),
            most_per_hour=per_hour,
            by=OPERATOR,
            **place,
        )
        found = await db.fetch_optional(
            conn, top_ups.TopUp, top_ups.QUERIES.begin_top_up, pool_id=pool, top_up_id=uuid7(), **place
        )
    return found.top_up_id if found else None


async def bought(org: Org, **policy: int) -> None:
    place = {"organization_id": org.organization_id}
    top_up = await purchase(org, **policy)
    assert top_up is not None
    paid = top_ups.Bought(NanoUsd(5_250_000_000), "INV-7")
    async with org.tenant() as conn:
        await top_ups.confirm(conn, top_up_id=top_up, bought=paid, by=OPERATOR, **place)


async def declined(org: Org) -> None:
    top_up = await purchase(org)
    assert top_up is not None
    async with org.tenant() as conn:
        await top_ups.decline(
            conn, organization_id=org.organization_id, top_up_id=top_up, reason="card expired", by=OPERATOR
        )


async def at_the_ceiling(org: Org) -> None:
    await bought(org, ceiling=500)
    assert await purchase(org, ceiling=500) is None


async def too_many(org: Org) -> None:
    await bought(org, per_hour=1)
    assert await purchase(org, per_hour=1) is None


async def asked(org: Org) -> None:
    await request(org, await default(org), org.admin, org.admin)


async def approved(org: Org) -> None:
    await decide(org, await request(org, await default(org), org.admin, org.admin), org.admin)


async def approved_in_part(org: Org) -> None:
    asked = await request(org, await default(org), org.admin, org.admin)
    async with org.tenant() as conn:
        await raises.decide_request(
            conn,
            organization_id=org.organization_id,
            limit_request_id=asked,
            is_approved=True,
            amount=CREDIT,
            by=OPERATOR,
        )


async def denied(org: Org) -> None:
    await decide(org, await request(org, await default(org), org.admin, org.admin), org.admin, approve=False)


async def redeemed(org: Org) -> None:
    [text] = await make(org.database, org.organization_id)
    await redeem(org.database, text, org.admin)


async def disabled(org: Org) -> None:
    webhook = await endpoint(org, "*")
    async with org.tenant() as conn:
        await disable_endpoint(
            conn, organization_id=org.organization_id, endpoint_id=webhook, by=OPERATOR, reason="it answered 410 Gone"
        )


async def tried(org: Org) -> None:
    webhook = await endpoint(org, "*")
    async with org.tenant() as conn:
        await post_test(conn, organization_id=org.organization_id, endpoint_id=webhook)


HAPPENINGS: Final[tuple[tuple[str, Happens, str, str], ...]] = (
    ("topup.requested", bought, "Shared credits: 500 credits are to be bought", "Less than 2000 credits were"),
    ("topup.succeeded", bought, "Shared credits: 500 credits were bought", "Paid: 5.25 USD"),
    ("topup.failed", declined, "Shared credits: 500 credits could not be bought", "Reason: card expired"),
    (
        "topup.failed",
        at_the_ceiling,
        "Shared credits: automatic purchases have reached the ceiling of the month",
        "500 credits were bought this month; 500 credits more would pass the ceiling of 500 credits.",
    ),
    (
        "topup.runaway",
        too_many,
        "Shared credits: automatic purchases were stopped, too many within an hour",
        "Begun within an hour: 1, each of 500 credits; the most allowed: 1.",
    ),
    ("request.created", asked, "usr_{admin} asks for 5 credits more", "Reason: Release"),
    ("request.decided", approved, "What usr_{admin} asked for was approved: 5 credits more", "Reason: Release"),
    ("request.decided", approved_in_part, "What usr_{admin} asked for was approved: 1 credit more", "Asked for: 5 c"),
    ("request.decided", denied, "What usr_{admin} asked for was denied: 5 credits more", "Reason: Release"),
    ("code.redeemed", redeemed, "A code of Spring was redeemed: 5 credits", "By usr_{admin}, the code that ends with "),
    ("webhook.disabled", disabled, "The webhook to https://receiver.example/ was disabled", "Reason: it answered 410"),
    (TEST_KIND, tried, "This is a test", "Nothing happened."),
)  # fmt: skip


@pytest.mark.parametrize(("kind", "happens", "title", "line"), HAPPENINGS)
async def test_an_event_says_what_happened_in_words(
    org: Org, kind: str, happens: Happens, title: str, line: str
) -> None:
    await fund(org, CREDIT)
    await happens(org)
    async with org.tenant() as conn:
        told = await db.fetch_all(
            conn, Told, "select kind, payload from outbox.events order by posted_at desc, sequence desc"
        )
    payload = next(each.payload for each in told if each.kind == kind)
    assert payload["title"] == title.format(admin=org.admin.hex)
    assert any(each.startswith(line.format(admin=org.admin.hex)) for each in payload["text"]), payload["text"]
    if kind != TEST_KIND:
        assert payload["text"][-1] == f"Next: {payload['next_step']}"
        assert f"--org {org.slug}" in payload["next_step"]
    check_fields(payload)


def check_fields(payload: Mapping[str, Any]) -> None:
    """Amounts stand with their unit, ids with what they are of."""
    for name, value in payload.items():
        assert not name.endswith("_micros"), name
        if name in ("amount", "bought", "ceiling") and "unit" not in payload:
            assert set(value) == {"amount", "unit"}
        if name.endswith("_id"):
            assert value is None or re.fullmatch(r"[a-z]+_[0-9a-f]{32}", value), name


SUBJECT: Final = Subject(
    kind="pool", pool_name="Shared credits", pool_kind="shared", when_empty=None, scope="organization",
    metric="credits", model_filter=None, period="none", action="stops", user_id=None, scope_name=None,
    lead_user_id=None, slug="acme", zone="Europe/Paris",
)  # fmt: skip


def test_alerts_say_what_happened_in_words() -> None:
    level = {"used": 5, "limit": 9, "left": 4, "period_end": None}
    at = clock.now() + timedelta(days=1)
    ends = {"grant_id": uuid7(), "source": "plan", "amount": 9, "left": 4, "expires_at": at}
    for payload in (
        level_payload(SUBJECT, rule_id=uuid7(), measure="percent", threshold=50, passed=[50], **level),
        refusal_payload(SUBJECT, refusals=2),
        grant_payload(SUBJECT, has_expired=False, **ends),
        grant_payload(SUBJECT, has_expired=True, **ends),
    ):
        assert payload["title"].startswith("Shared credits: ")
        assert payload["text"][-1] == f"Next: {payload['next_step']}"
        check_fields(payload)


def kinds_in_the_sources() -> set[str]:
    """Kinds that any function or module posts."""
    found = {*FULL_KINDS.values(), *LEVEL_KINDS.values(), TEST_KIND}
    calls = 0
    for file in SOURCES.rglob("functions/*.sql"):
        text = file.read_text()
        calls += text.count("perform outbox.post_event(")
        for named in POSTED_IN_SQL.findall(text):
            calls -= 1
            found |= set(KIND.findall(re.sub(r"p_[a-z]+", "", named)))
    assert calls == 0, "a call whose kind cannot be read"
    for file in (*SOURCES.rglob("outbox/*.py"), *SOURCES.rglob("alerts/*.py")):
        found |= {kind for pair in POSTED_IN_PYTHON.findall(file.read_text()) for kind in pair if kind}
    return found


def test_every_kind_is_tried_here_and_stands_in_the_documentation() -> None:
    table = re.search(r"\| event \| when \|\n(.*?)\n\n", PAGE.read_text(), re.DOTALL)
    assert table is not None
    documented = {kind for row in table[1].splitlines() for kind in KIND.findall(row.split("|")[1])}
    posted = kinds_in_the_sources()
    assert documented == posted
    alerts = {*FULL_KINDS.values(), *LEVEL_KINDS.values(), "deduction.refused", "grant.expiring", "grant.expired"}
    assert posted - alerts == {kind for kind, *_ in HAPPENINGS}
