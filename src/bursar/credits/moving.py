"""People who move into an organization with their credits: out of their home first, then in there, under one id.

A process that ends in between leaves a departure that has not arrived; `finish_moves` brings it in. What a person used
before stays where it was used: the arrival names their home.
"""

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any, Final
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from bursar import db
from bursar.audit.events import SYSTEM, Actor, record
from bursar.clock import uuid7
from bursar.credits.pools import Pool, PoolKind, list_pools
from bursar.identity.organizations import OrganizationNotFound, get_organization
from bursar.identity.users import get_user, places_of_user
from bursar.money import Micros
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")

log = structlog.get_logger(__name__)


class NoSuchPlace(Problem):
    """Credits go into a company that the person belongs to, and into a pool that it has."""

    status, code, title = 422, "cannot_move_there", "These credits cannot go there"


class Into(StrEnum):
    """Whose the credits are in the organization: the member's own still, or everybody's."""

    PERSONAL = "personal"
    SHARED = "shared"


@dataclass(frozen=True, slots=True)
class Move:
    """A departure. held: what running requests held stayed at home. arrived_at: None while it is under way."""

    transfer_id: UUID
    user_id: UUID
    home_organization_id: UUID
    into_organization_id: UUID
    into_kind: Into
    amount_micros: Micros
    held_micros: Micros
    parts: list[Any]
    left_at: datetime
    arrived_at: datetime | None


@dataclass(frozen=True, slots=True)
class Arrival:
    """Credits that a member brought along. from_organization_id: their home, where their history is."""

    transfer_id: UUID
    user_id: UUID
    email: str | None
    from_organization_id: UUID
    amount_micros: Micros
    arrived_at: datetime


async def move_in(
    database: db.Database,
    *,
    user_id: UUID,
    organization_id: UUID,
    into: Into,
    by: Actor,
    transfer_id: UUID | None = None,
) -> Move:
    """Bring everything in a person's home that no running request holds into an organization they belong to.

    Each grant goes on as one with the same priority, time and money paid. transfer_id: to go on with a move that broke
    off; the same id is the same move. What was held can be brought along by a later move, when its requests have ended.

    Raises:
        OrganizationNotFound: they do not belong to it. NoSuchPlace: it is no company, or has no shared pool.
        PoolOwes: their home owes credits.
    """
    async with database.untenanted() as conn:
        user = await get_user(conn, user_id=user_id)
        places = await places_of_user(conn, user_id=user_id)
    if organization_id not in {each.organization_id for each in places}:
        raise OrganizationNotFound
    async with database.tenant(organization_id) as conn:
        organization = await get_organization(conn, organization_id=organization_id)
    if organization.kind not in ("company", "catch_all"):
        raise NoSuchPlace("name a company")
    if into is Into.SHARED and not organization.is_shared_token_pool:
        raise NoSuchPlace("members of this organization have balances of their own")
    home_id = user.home_organization_id
    async with database.tenant(home_id) as conn:
        move = await db.fetch_one(
            conn,
            Move,
            QUERIES.depart,
            organization_id=home_id,
            transfer_id=transfer_id or uuid7(),
            user_id=user_id,
            into_organization_id=organization_id,
            into_kind=into,
            created_by=by.user_id,
        )
        await record(
            conn,
            organization_id=home_id,
            by=by,
            action="credits.moved_out",
            object_id=move.transfer_id,
            new={"amount_micros": move.amount_micros, "into": move.into_organization_id},
        )
    await _arrive(database, move, by)
    return move


async def preview(database: db.Database, *, user_id: UUID) -> tuple[Micros, Micros]:
    """(would go along, is held by running requests and would stay), in micros."""
    async with database.untenanted() as conn:
        user = await get_user(conn, user_id=user_id)
    async with database.tenant(user.home_organization_id) as conn:
        pools: list[Pool] = await list_pools(conn, organization_id=user.home_organization_id)
    own = [each for each in pools if each.kind is PoolKind.INDIVIDUAL]
    return (
        Micros(sum(each.available_micros for each in own)),
        Micros(sum(each.held_micros for each in own)),
    )


async def finish_moves(database: db.Database, *, older_than: timedelta = timedelta(minutes=1)) -> int:
    """Bring in what left and did not arrive, because its process ended; returns how many moves."""
    async with database.platform() as conn:
        left = await db.fetch_all(conn, Move, QUERIES.departures_under_way, older_than=older_than, most=100)
    done = 0
    for move in left:
        try:
            await _arrive(database, move, SYSTEM)
            done += 1
        except Exception:  # one move's fault is not another's; it is tried again
            log.exception("a move cannot be finished", transfer_id=str(move.transfer_id))
    return done


async def list_arrivals(conn: db.Connection, *, organization_id: UUID) -> list[Arrival]:
    """What members brought along, newest first."""
    return await db.fetch_all(conn, Arrival, QUERIES.arrivals, organization_id=organization_id)


async def _arrive(database: db.Database, move: Move, by: Actor) -> None:
    """Into the organization, then noted at home; twice is once."""
    async with database.tenant(move.into_organization_id) as conn:
        await db.fetch_value(
            conn,
            QUERIES.arrive,
            organization_id=move.into_organization_id,
            transfer_id=move.transfer_id,
            user_id=move.user_id,
            from_organization_id=move.home_organization_id,
            kind=move.into_kind,
            parts=Jsonb(move.parts),
            created_by=by.user_id,
        )
        await record(
            conn,
            organization_id=move.into_organization_id,
            by=by,
            action="credits.moved_in",
            object_id=move.transfer_id,
            new={"amount_micros": move.amount_micros, "from": move.home_organization_id},
        )
    async with database.tenant(move.home_organization_id) as conn:
        await db.execute(
            conn, QUERIES.note_arrival, organization_id=move.home_organization_id, transfer_id=move.transfer_id
        )
