"""More than a limit gives, for a time: raises, and what members ask for."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.credits.limits import Metric, Period, Scope
from bursar.identity.memberships import get_membership
from bursar.identity.roles import Permission, permissions_of
from bursar.identity.teams import get_team
from bursar.problems import NotFound, Problem

QUERIES: Final = db.load_queries("bursar.credits")


class RequestState(StrEnum):
    """lapsed: nobody decided it in time."""

    OPEN = "open"
    APPROVED = "approved"
    DENIED = "denied"
    LAPSED = "lapsed"


class NotAskable(Problem):
    """Only a limit with the action `asks` may be asked about."""

    status, code, title = 409, "limit_does_not_ask", "No more can be asked for on this limit"
    sqlstate = "BR461"


class AlreadyAsked(Problem):
    """The same member has an open request for the same limit."""

    status, code, title = 409, "already_asked", "This was asked for already"
    sqlstate = "BR462"


class RequestDecided(Problem):
    """Somebody decided it, or it has lapsed."""

    status, code, title = 409, "request_decided", "This request is not open any more"
    sqlstate = "BR463"


class EndsTooEarly(Problem):
    """It would be over before it begins."""

    status, code, title = 422, "raise_ends_too_early", "This raise would be over before it begins"
    sqlstate = "BR464"


class NotTheirsToDecide(Problem):
    """Administrators decide; a team's lead decides what is about the team or one of its members or keys."""

    status, code, title = 403, "not_theirs_to_decide", "This request is for somebody else to decide"


class RequestNotFound(Problem):
    """No such request in this organization."""

    status, code, title = 404, "request_not_found", "No such request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Raise:
    """An amount on top of a limit from an instant until another; amount in micros for credits, else a count.

    subject_id: whose limit it is, None for the organization's. ends_at: when it ends, or was ended before.
    """

    raise_id: UUID
    balance_id: UUID
    limit_id: UUID
    limit_request_id: UUID | None
    metric: Metric
    scope: Scope
    subject_id: UUID | None
    amount: int
    starts_at: datetime
    ends_at: datetime
    reason: str | None
    created_at: datetime
    created_by: UUID | None
    state: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LimitRequest:
    """What a member asks for; amounts in micros for credits, else counts. team_id: the member's team now."""

    limit_request_id: UUID
    balance_id: UUID
    limit_id: UUID
    metric: Metric
    period: Period
    model_filter: str | None
    scope: Scope
    subject_id: UUID | None
    user_id: UUID
    team_id: UUID | None
    amount: int
    until_at: datetime
    reason: str
    created_at: datetime
    lapses_at: datetime
    state: RequestState
    decided_at: datetime | None
    decided_by: UUID | None
    note: str | None
    granted_amount: int | None
    granted_until: datetime | None


async def metric_of(conn: db.Connection, *, organization_id: UUID, limit_id: UUID) -> Metric:
    """What a limit, or a balance that `why` names, counts.

    Raises:
        NotFound
    """
    found = await db.fetch_value(conn, QUERIES.metric_of_limit, organization_id=organization_id, limit_id=limit_id)
    if found is None:
        raise NotFound("No such limit")
    return Metric(found)


async def raise_limit(
    conn: db.Connection,
    *,
    organization_id: UUID,
    limit_id: UUID,
    subject_id: UUID | None,
    amount: int,
    ends_at: datetime,
    idempotency_key: str,
    by: Actor,
    starts_at: datetime | None = None,
    reason: str | None = None,
) -> UUID:
    """Give more than a limit does, for a time; it ends by itself at its instant. Returns the raise's id.

    limit_id: of a limit, of a default (then subject_id says whose), or of a balance that `why` names. starts_at: now
    where it is None or past.

    Raises:
        NotFound: no such limit or subject. EndsTooEarly, KeyReused.
    """
    raise_id = await db.fetch_value(
        conn,
        QUERIES.raise_limit,
        organization_id=organization_id,
        raise_id=uuid7(),
        limit_id=limit_id,
        subject_id=subject_id,
        amount=amount,
        starts_at=starts_at,
        ends_at=ends_at,
        reason=reason,
        created_by=by.user_id,
        idempotency_key=idempotency_key,
    )
    assert isinstance(raise_id, UUID)
    new = {"limit_id": limit_id, "subject_id": subject_id, "amount": amount, "starts_at": starts_at, "ends_at": ends_at}
    await record(
        conn, organization_id=organization_id, by=by, action="raise.given", object_id=raise_id, new=new, reason=reason
    )
    return raise_id


async def end_raise(conn: db.Connection, *, organization_id: UUID, raise_id: UUID, by: Actor) -> None:
    """End a raise before its time; it stays as history.

    Raises:
        NotFound: no such raise, or it has ended.
    """
    await db.execute(conn, QUERIES.end_raise, organization_id=organization_id, raise_id=raise_id)
    await record(conn, organization_id=organization_id, by=by, action="raise.ended", object_id=raise_id)


async def list_raises(conn: db.Connection, *, organization_id: UUID) -> list[Raise]:
    """Every raise that was ever given, oldest first."""
    return await db.fetch_all(conn, Raise, QUERIES.raises, organization_id=organization_id)


async def request_raise(
    conn: db.Connection,
    *,
    organization_id: UUID,
    limit_id: UUID,
    subject_id: UUID | None,
    user_id: UUID,
    amount: int,
    until: datetime,
    reason: str,
    idempotency_key: str,
    by: Actor,
) -> UUID:
    """Ask for more on a limit that asks. Returns the request's id; it lapses after 14 days, or when `until` comes.

    Raises:
        NotFound: no such limit, subject or member. NotAskable, AlreadyAsked, EndsTooEarly, KeyReused.
    """
    request_id = await db.fetch_value(
        conn,
        QUERIES.request_raise,
        organization_id=organization_id,
        limit_request_id=uuid7(),
        limit_id=limit_id,
        subject_id=subject_id,
        user_id=user_id,
        amount=amount,
        until_at=until,
        reason=reason,
        idempotency_key=idempotency_key,
    )
    assert isinstance(request_id, UUID)
    new = {"limit_id": limit_id, "user_id": user_id, "amount": amount, "until_at": until}
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="limit_request.created",
        object_id=request_id,
        new=new,
        reason=reason,
    )
    return request_id


async def list_requests(conn: db.Connection, *, organization_id: UUID) -> list[LimitRequest]:
    """All requests, oldest first."""
    return await db.fetch_all(
        conn, LimitRequest, QUERIES.limit_requests, organization_id=organization_id, limit_request_id=None
    )


async def get_request(conn: db.Connection, *, organization_id: UUID, limit_request_id: UUID) -> LimitRequest:
    """One request.

    Raises:
        RequestNotFound
    """
    found = await db.fetch_optional(
        conn, LimitRequest, QUERIES.limit_requests, organization_id=organization_id, limit_request_id=limit_request_id
    )
    if found is None:
        raise RequestNotFound
    return found


async def decide_request(
    conn: db.Connection,
    *,
    organization_id: UUID,
    limit_request_id: UUID,
    is_approved: bool,
    by: Actor,
    amount: int | None = None,
    until: datetime | None = None,
    note: str | None = None,
) -> UUID | None:
    """Approve (as asked, or another amount or end) or deny. Returns the raise's id; None: denied.

    by: the operator, or a person who may: an administrator, or the lead of the team that it is about.

    Raises:
        RequestNotFound, RequestDecided, NotTheirsToDecide, EndsTooEarly
    """
    request = await get_request(conn, organization_id=organization_id, limit_request_id=limit_request_id)
    if by.kind != "operator":
        await _require_decider(conn, organization_id, by, request)
    raise_id = await db.fetch_value(
        conn,
        QUERIES.decide_request,
        organization_id=organization_id,
        limit_request_id=limit_request_id,
        is_approved=is_approved,
        raise_id=uuid7(),
        amount=amount,
        until_at=until,
        note=note,
        decided_by=by.user_id,
    )
    assert raise_id is None or isinstance(raise_id, UUID)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="limit_request.approved" if is_approved else "limit_request.denied",
        object_id=limit_request_id,
        new={"raise_id": raise_id, "amount": amount, "until_at": until},
        reason=note,
    )
    return raise_id


async def _require_decider(conn: db.Connection, organization_id: UUID, by: Actor, request: LimitRequest) -> None:
    """Nobody decides what they asked for themselves, unless they may decide everything.

    Raises:
        NotTheirsToDecide
    """
    if by.user_id is None:
        raise NotTheirsToDecide
    decider = await get_membership(conn, organization_id=organization_id, user_id=by.user_id)
    may = permissions_of(decider.roles) if decider.status == "active" else frozenset[Permission]()
    if Permission.REQUESTS_DECIDE in may:
        return
    team_id = request.subject_id if request.scope is Scope.TEAM else request.team_id
    if (
        Permission.REQUESTS_TEAM not in may
        or team_id is None
        or request.scope in (Scope.ORGANIZATION, Scope.DEPARTMENT)
        or request.user_id == by.user_id
    ):
        raise NotTheirsToDecide
    team = await get_team(conn, organization_id=organization_id, team_id=team_id)
    if team.lead_user_id != by.user_id:
        raise NotTheirsToDecide
