"""Where did this charge come from: the grants it drew from, the limits it passed, the price and the usage behind it."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from bursar import db
from bursar.clock import instant_of
from bursar.credits.grants import Grant
from bursar.credits.why import LimitState
from bursar.money import Micros, NanoUsd, format_credits, format_usd
from bursar.pricing.usage import USAGE_KINDS
from bursar.problems import NotFound

QUERIES: Final = db.load_queries("bursar.credits")
CORRECTION, REFUND = 1, 2
KINDS: Final = {CORRECTION: "correction", REFUND: "refund"}
FLAG_NAMES: Final = {
    2: "own_key",
    4: "estimated",
    8: "streamed",
    64: "booked_by_expiry",
    128: "late",
    256: "unpriced",
    512: "no_output_limit",
    4096: "reported",
    8192: "batch",
}


@dataclass(frozen=True, slots=True)
class Attribution:
    """One row of ledger.attribution; columns and units as commented there."""

    request_id: UUID
    booked_at: datetime
    used_at: datetime
    kind: int
    user_id: UUID | None
    api_key_id: UUID | None
    provider_key_id: UUID | None
    provider: str | None
    model: str | None
    feature: str | None
    team_id: UUID | None
    department_id: UUID | None
    department_name: str | None
    conversation_id: UUID | None
    chain_id: UUID | None
    price_version_id: UUID | None
    pool_id: UUID | None
    position_micros: Micros | None
    charged_micros: Micros
    hold_micros: Micros
    provider_cost_nano_usd: NanoUsd
    customer_cost_nano_usd: NanoUsd
    flags: int
    input_tokens: int
    cache_read_tokens: int
    cache_write_5m_tokens: int
    cache_write_1h_tokens: int
    output_tokens: int
    reasoning_tokens: int
    audio_input_tokens: int
    audio_output_tokens: int
    image_input_tokens: int
    image_output_tokens: int
    images: int
    web_searches: int
    audio_milliseconds: int
    characters: int
    requests: int
    file_searches: int
    code_sessions: int


@dataclass(frozen=True, slots=True)
class Burn:
    """A stretch of a pool's running total that one grant paid; grant_id None: no grant has paid it yet.

    reason: why that grant burnt before the next: priority, expiry, free_before_paid, effective, created, id; only.
    """

    grant_id: UUID | None
    start_micros: Micros
    end_micros: Micros
    reason: str | None


@dataclass(frozen=True, slots=True)
class Returned:
    """What refunds of the request gave back to one grant; has_expired: and it expired there at once."""

    grant_id: UUID
    refunded_micros: Micros
    source: str
    has_expired: bool


@dataclass(frozen=True, slots=True)
class Revenue:
    """The money value of what one row of the request drew: its part of what was paid for the grants."""

    booked_at: datetime
    revenue_nano_usd: NanoUsd


@dataclass(frozen=True, slots=True)
class OpenHold:
    """A request that is still running."""

    request_id: UUID
    chain_id: UUID
    is_sent: bool
    amount_micros: Micros
    progress_micros: Micros
    provider: str | None
    model: str | None
    feature: str | None
    placed_at: datetime
    lease_expires_at: datetime


@dataclass(frozen=True, slots=True)
class Unbilled:
    """A request that cost nothing."""

    request_id: UUID
    happened_at: datetime
    outcome: str
    user_id: UUID | None
    api_key_id: UUID | None
    provider: str | None
    model: str | None
    feature: str | None
    wanted_micros: Micros
    binding_id: UUID | None
    detail: str | None


@dataclass(frozen=True, slots=True)
class Story:
    """All that is known of one request. state: held, charged, refused, released, expired."""

    request_id: UUID
    state: str
    rows: tuple[Attribution, ...] = ()
    burns: tuple[Burn, ...] = ()
    grants: tuple[Grant, ...] = ()
    limits: tuple[LimitState, ...] = ()
    returned: tuple[Returned, ...] = ()
    revenues: tuple[Revenue, ...] = ()
    hold: OpenHold | None = None
    unbilled: Unbilled | None = None

    @property
    def charged_micros(self) -> Micros:
        """What it cost in all, corrections and refunds included."""
        return Micros(sum(row.charged_micros for row in self.rows))

    @property
    def refunded_micros(self) -> Micros:
        """What was given back of it."""
        return Micros(-sum(row.charged_micros for row in self.rows if row.kind == REFUND))

    @property
    def askers(self) -> tuple[set[UUID], set[UUID]]:
        """Users and keys that it came from; of a running request none are told yet."""
        known: list[Attribution | Unbilled] = [*self.rows, *([self.unbilled] if self.unbilled else [])]
        people = {each.user_id for each in known if each.user_id is not None}
        return people, {each.api_key_id for each in known if each.api_key_id is not None}

    def as_json(self) -> dict[str, Any]:
        """As GET /api/v1/requests/{id} and `bursar explain --json` show it."""
        return {
            "request_id": f"req_{self.request_id.hex}",
            "state": self.state,
            "charged": _credits(self.charged_micros),
            "refunded": _credits(self.refunded_micros),
            "rows": [_row_json(row) for row in self.rows],
            "grants": [_burn_json(burn, self.grants) for burn in self.burns],
            "refunds": [_returned_json(each) for each in self.returned],
            "limits_passed": [each.as_json(binding=False) for each in self.limits],
            "hold": _hold_json(self.hold) if self.hold else None,
            "not_charged": _unbilled_json(self.unbilled) if self.unbilled else None,
        }


async def explain(conn: db.Connection, *, organization_id: UUID, request_id: UUID) -> Story:
    """The story of one request of the organization that is set.

    Raises:
        NotFound: no such request in this organization.
    """
    where = {"organization_id": organization_id, "request_id": request_id}
    rows = await db.fetch_all(conn, Attribution, QUERIES.attribution_of_request, **where)
    hold = await db.fetch_optional(conn, OpenHold, QUERIES.hold, **where)
    unbilled = await db.fetch_optional(conn, Unbilled, QUERIES.unbilled_request, **where)
    if rows:
        burns = await db.fetch_all(conn, Burn, QUERIES.burns_of_request, **where)
        grants = await db.fetch_all(
            conn,
            Grant,
            QUERIES.grants_by_id,
            organization_id=organization_id,
            grant_ids=[burn.grant_id for burn in burns if burn.grant_id],
        )
        limits = await _limits_of(conn, organization_id, rows[0].chain_id, rows[0].model, rows[0].feature)
        returned = await db.fetch_all(conn, Returned, QUERIES.refunds_of_request, **where)
        revenues = await db.fetch_all(conn, Revenue, QUERIES.revenue_of_request, **where)
        return Story(
            request_id,
            "charged",
            tuple(rows),
            tuple(burns),
            tuple(grants),
            tuple(limits),
            returned=tuple(returned),
            revenues=tuple(revenues),
        )
    if hold is not None:
        limits = await _limits_of(conn, organization_id, hold.chain_id, hold.model, hold.feature)
        return Story(request_id, "held", limits=tuple(limits), hold=hold)
    if unbilled is not None:
        return Story(request_id, unbilled.outcome, unbilled=unbilled)
    raise NotFound("no such request")


async def find_organization(conn: db.Connection, *, request_id: UUID) -> UUID:
    """Whose request this is. conn: as bursar_platform, since the id alone does not tell.

    Raises:
        NotFound
    """
    # Booked at most a lease after it was made, or corrected soon after; the bounds spare all other partitions.
    made_at = instant_of(request_id) if request_id.version == 7 else None
    found = await db.fetch_value(conn, QUERIES.organization_of_request, request_id=request_id, made_at=made_at)
    if found is None:
        raise NotFound("no such request")
    assert isinstance(found, UUID)
    return found


async def is_held(conn: db.Connection, *, organization_id: UUID, request_id: UUID) -> bool:
    """Whether the request is still running."""
    hold = await db.fetch_optional(conn, OpenHold, QUERIES.hold, organization_id=organization_id, request_id=request_id)
    return hold is not None


async def _limits_of(
    conn: db.Connection, organization_id: UUID, chain_id: UUID | None, model: str | None, feature: str | None
) -> list[LimitState]:
    states = await db.fetch_all(
        conn,
        LimitState,
        QUERIES.chain,
        organization_id=organization_id,
        chain_id=chain_id,
        model=model or "",
        feature=feature,
    )
    return [state for state in states if state.balance_id is not None]


def _credits(amount: Micros) -> dict[str, str]:
    return {"amount": format_credits(amount), "unit": "credit"}


def _id(prefix: str, identifier: UUID | None) -> str | None:
    return f"{prefix}_{identifier.hex}" if identifier else None


def _row_json(row: Attribution) -> dict[str, Any]:
    return {
        "kind": KINDS.get(row.kind, "charge"),
        "used_at": row.used_at.isoformat(),
        "booked_at": row.booked_at.isoformat(),
        "user_id": _id("usr", row.user_id),
        "api_key_id": _id("key", row.api_key_id),
        "provider": row.provider,
        "provider_key_id": _id("pvk", row.provider_key_id),
        "model": row.model,
        "feature": row.feature,
        "team_id": _id("team", row.team_id),
        "department_id": _id("dep", row.department_id),
        "department": row.department_name,
        "conversation_id": _id("conv", row.conversation_id),
        "price_version_id": _id("prc", row.price_version_id),
        "pool_id": _id("pool", row.pool_id),
        "held": _credits(row.hold_micros),
        "charged": _credits(row.charged_micros),
        "marks": [name for bit, name in FLAG_NAMES.items() if row.flags & bit],
        "usage": {kind: getattr(row, kind) for kind in USAGE_KINDS if getattr(row, kind)},
    }


def _burn_json(burn: Burn, grants: Sequence[Grant]) -> dict[str, Any]:
    grant = next((each for each in grants if each.grant_id == burn.grant_id), None)
    return {
        "grant_id": _id("grt", burn.grant_id),
        "source": grant.source if grant else None,
        "reason": grant.reason if grant else "not covered by any grant yet",
        "drawn": _credits(Micros(burn.end_micros - burn.start_micros)),
        "burnt_before_next": burn.reason,
    }


def _returned_json(returned: Returned) -> dict[str, Any]:
    return {
        "grant_id": _id("grt", returned.grant_id),
        "source": returned.source,
        "refunded": _credits(returned.refunded_micros),
        "expired_at_once": returned.has_expired,
    }


def _hold_json(hold: OpenHold) -> dict[str, Any]:
    return {
        "held": _credits(hold.amount_micros),
        "used_so_far": _credits(hold.progress_micros),
        "sent": hold.is_sent,
        "model": hold.model,
        "feature": hold.feature,
        "placed_at": hold.placed_at.isoformat(),
        "ends_by_itself_at": hold.lease_expires_at.isoformat(),
    }


def _unbilled_json(request: Unbilled) -> dict[str, Any]:
    return {
        "outcome": request.outcome,
        "happened_at": request.happened_at.isoformat(),
        "model": request.model,
        "feature": request.feature,
        "wanted": _credits(request.wanted_micros),
        "reason": request.detail,
    }


def margin_of(story: Story) -> dict[str, Any]:
    """What the provider asks for it, and the value of the grants it burnt, in dollars; for who may see margins."""
    cost = NanoUsd(sum(row.provider_cost_nano_usd for row in story.rows))
    revenue = NanoUsd(sum(each.revenue_nano_usd for each in story.revenues))
    return {
        "provider_cost": {"amount": format_usd(cost), "unit": "USD"},
        "revenue": {"amount": format_usd(revenue), "unit": "USD"},
        "margin_on_revenue": {"amount": format_usd(NanoUsd(revenue - cost)), "unit": "USD"},
    }


assert {field.name for field in fields(Attribution)} >= set(USAGE_KINDS)
