"""The audit's events: recording one, and reading them newest first."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, Literal
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import clock, db

QUERIES = db.load_queries("bursar.audit")

ActorKind = Literal["user", "api_key", "operator", "system"]
PERSONAL_FIELDS: Final = frozenset({"email", "display_name", "address"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """Who acts, and from where. id: the user's or key's; None for the operator's command line and for jobs."""

    kind: ActorKind
    id: UUID | None = None
    request_id: str | None = None
    address_hash: bytes | None = None

    @property
    def user_id(self) -> UUID | None:
        """The person who acts, where one does."""
        return self.id if self.kind == "user" else None


OPERATOR: Final = Actor(kind="operator")
SYSTEM: Final = Actor(kind="system")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One row of audit.events."""

    organization_id: UUID
    event_id: UUID
    at: datetime
    actor_kind: ActorKind
    actor_id: UUID | None
    action: str
    object_kind: str
    object_id: UUID
    old_value: dict[str, Any] | None
    new_value: dict[str, Any] | None
    reason: str | None
    request_id: str | None
    address_hash: bytes | None


async def record(
    conn: db.Connection,
    *,
    organization_id: UUID,
    by: Actor,
    action: str,
    object_id: UUID,
    old: Mapping[str, Any] | None = None,
    new: Mapping[str, Any] | None = None,
    reason: str | None = None,
) -> UUID:
    """Write one event; returns its id.

    action: 'object.verb' in the past ('api_key.revoked'); what stands before the dot is the object's kind.
    old, new: the changed fields only. Of personal fields and secrets not even the names belong here.
    """
    for value in (old, new):
        assert value is None or not PERSONAL_FIELDS & value.keys(), f"personal data in {action}"
    event_id = clock.uuid7()
    await db.execute(
        conn,
        QUERIES.record,
        organization_id=organization_id,
        event_id=event_id,
        actor_kind=by.kind,
        actor_id=by.id,
        action=action,
        object_kind=action.partition(".")[0],
        object_id=object_id,
        old_value=_as_json(old),
        new_value=_as_json(new),
        reason=reason,
        request_id=by.request_id,
        address_hash=by.address_hash,
    )
    return event_id


async def list_events(
    conn: db.Connection, *, organization_id: UUID, before: UUID | None = None, limit: int = 50
) -> list[Event]:
    """The newest events before one (all when None), newest first."""
    return await db.fetch_all(conn, Event, QUERIES.events, organization_id=organization_id, before=before, limit=limit)


async def events_of_object(
    conn: db.Connection,
    *,
    organization_id: UUID,
    object_kind: str,
    object_id: UUID,
    before: UUID | None = None,
    limit: int = 50,
) -> list[Event]:
    """What was done to one object, newest first."""
    return await db.fetch_all(
        conn,
        Event,
        QUERIES.events_of_object,
        organization_id=organization_id,
        object_kind=object_kind,
        object_id=object_id,
        before=before,
        limit=limit,
    )


def _as_json(value: Mapping[str, Any] | None) -> Jsonb | None:
    return None if value is None else Jsonb({name: _plain(each) for name, each in value.items()})


def _plain(value: Any) -> Any:
    """What JSON has no type for, as text; collections as sorted lists of text, so that equal sets read alike."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, frozenset | set | tuple | list):
        return sorted(str(each) for each in value)
    return value.isoformat() if isinstance(value, datetime) else str(value)
