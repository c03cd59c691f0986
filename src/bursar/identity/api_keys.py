"""API keys: made (the text is shown once), listed, rotated with an overlap, revoked."""

from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.identity.departments import get_department
from bursar.identity.memberships import MemberNotFound, get_membership
from bursar.identity.names import clean_name
from bursar.identity.organizations import QUERIES, get_organization, touch_limits_of_key
from bursar.identity.roles import Scope
from bursar.identity.secret_text import API_KEY, new_secret_text
from bursar.identity.teams import get_team
from bursar.problems import FieldError, Problem


class ApiKeyNotFound(Problem):
    """No such key in this organization."""

    status, code, title = 404, "api_key_not_found", "No such API key"


class ApiKeyNotUsable(Problem):
    """A key that is revoked, expired or replaced cannot be rotated."""

    status, code, title = 409, "api_key_not_usable", "This API key is no longer in use"


class InvalidExpiry(Problem):
    """An end that is not in the future."""

    status, code, title = 422, "invalid_expiry", "This end is not in the future"


class NoServiceKeyHere(Problem):
    """A personal organization has keys of its owner only, of no team or department."""

    status, code, title = 422, "no_service_key_here", "A personal organization has personal keys only"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A credential; user_id None: of a service. original_api_key_id: the first key of its chain of rotations."""

    organization_id: UUID
    api_key_id: UUID
    original_api_key_id: UUID
    user_id: UUID | None
    name: str
    public_id: str
    last4: str
    scopes: tuple[Scope, ...]
    team_id: UUID | None
    department_id: UUID | None
    expires_at: datetime | None
    revoked_at: datetime | None
    replaced_by: UUID | None
    created_at: datetime
    created_by: UUID | None
    last_used_at: datetime | None

    def is_usable_at(self, instant: datetime) -> bool:
        """Whether it opens anything at an instant (its owner and organization permitting)."""
        return self.revoked_at is None and (self.expires_at is None or instant < self.expires_at)


@dataclass(frozen=True, slots=True, kw_only=True)
class NewApiKey:
    """A key just made. text: the only time that it exists outside its owner's hands; never in a repr."""

    key: ApiKey
    text: str = field(repr=False)


async def create_api_key(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID | None,
    name: str,
    by: Actor,
    scopes: Collection[Scope] = (Scope.INFERENCE,),
    team_id: UUID | None = None,
    department_id: UUID | None = None,
    expires_at: datetime | None = None,
    at: datetime | None = None,
) -> NewApiKey:
    """A new key of a member, or of a service (user_id None); in a home organization a personal key.

    team_id, department_id: where its usage counts; None: where its owner is at the time.

    Raises:
        InvalidName, InvalidExpiry, MemberNotFound, TeamNotFound, DepartmentNotFound, NoServiceKeyHere
    """
    if expires_at is not None and expires_at <= clock.now():
        raise InvalidExpiry(errors=[FieldError("#/expires_at", "an instant in the future")])
    await _check_owner(conn, organization_id, user_id, has_place=team_id is not None or department_id is not None)
    if team_id is not None:
        await get_team(conn, organization_id=organization_id, team_id=team_id)
    if department_id is not None:
        await get_department(conn, organization_id=organization_id, department_id=department_id)
    api_key_id = clock.uuid7()
    made = await _insert(
        conn,
        organization_id=organization_id,
        api_key_id=api_key_id,
        original_api_key_id=api_key_id,
        user_id=user_id,
        name=clean_name(name),
        scopes=sorted(set(scopes)),
        team_id=team_id,
        department_id=department_id,
        expires_at=expires_at,
        created_by=by.user_id,
        at=at,
    )
    facts = {"user_id": user_id, "scopes": made.key.scopes, "expires_at": expires_at}
    await _record(conn, made.key, by, "api_key.created", new=facts)
    return made


async def get_api_key(conn: db.Connection, *, organization_id: UUID, api_key_id: UUID) -> ApiKey:
    """Raises ApiKeyNotFound for an unknown key and for another organization's alike."""
    found = await db.fetch_optional(
        conn, ApiKey, QUERIES.api_key, organization_id=organization_id, api_key_id=api_key_id
    )
    return _found(found)


async def find_api_key(conn: db.Connection, *, organization_id: UUID, public_id: str) -> ApiKey:
    """The key with a public id.

    Raises:
        ApiKeyNotFound
    """
    found = await db.fetch_optional(
        conn, ApiKey, QUERIES.api_key_by_public_id, organization_id=organization_id, public_id=public_id
    )
    return _found(found)


async def list_api_keys(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID | None = None,
    after: UUID | None = None,
    limit: int = 100,
) -> list[ApiKey]:
    """Keys in the order they were made, after one; of one member, or of all and services when None."""
    return await db.fetch_all(
        conn, ApiKey, QUERIES.api_keys, organization_id=organization_id, user_id=user_id, after=after, limit=limit
    )


async def rotate_api_key(
    conn: db.Connection, *, organization_id: UUID, api_key_id: UUID, overlap: timedelta, by: Actor
) -> NewApiKey:
    """A new key in a key's place, alike in all but its text and id. The old one works until the overlap ends.

    overlap: none (zero) stops the old one at once. The new key lives as long from now as the old one was made to live;
    limits and history follow through `original_api_key_id`.

    Raises:
        ApiKeyNotFound, InvalidExpiry (a negative overlap)
        ApiKeyNotUsable: revoked, expired or replaced; of racing rotations exactly one wins.
    """
    if overlap < timedelta(0):
        raise InvalidExpiry(errors=[FieldError("#/overlap", "not negative")])
    await get_api_key(conn, organization_id=organization_id, api_key_id=api_key_id)
    old = await db.fetch_optional(
        conn, ApiKey, QUERIES.lock_usable_api_key, organization_id=organization_id, api_key_id=api_key_id
    )
    if old is None:
        raise ApiKeyNotUsable
    await _check_owner(conn, organization_id, old.user_id)
    now = clock.now()
    made = await _insert(
        conn,
        organization_id=organization_id,
        api_key_id=clock.uuid7(),
        original_api_key_id=old.original_api_key_id,
        user_id=old.user_id,
        name=old.name,
        scopes=list(old.scopes),
        team_id=old.team_id,
        department_id=old.department_id,
        expires_at=None if old.expires_at is None else now + (old.expires_at - old.created_at),
        created_by=by.user_id,
        at=None,
    )
    replaced = await db.fetch_one(
        conn,
        ApiKey,
        QUERIES.replace_api_key,
        organization_id=organization_id,
        api_key_id=api_key_id,
        replaced_by=made.key.api_key_id,
        overlap_until=now + overlap if overlap else None,
    )
    await touch_limits_of_key(conn, organization_id=organization_id, user_id=replaced.user_id)
    facts = {"replaced_by": made.key.api_key_id, "expires_at": replaced.expires_at}
    await _record(conn, replaced, by, "api_key.rotated", old={"expires_at": old.expires_at}, new=facts)
    return made


async def revoke_api_key(
    conn: db.Connection, *, organization_id: UUID, api_key_id: UUID, by: Actor, reason: str | None = None
) -> ApiKey:
    """Stop a key for good: it spends nothing from the commit on. Doing it again changes nothing.

    Raises:
        ApiKeyNotFound
    """
    revoked = await db.fetch_optional(
        conn, ApiKey, QUERIES.revoke_api_key, organization_id=organization_id, api_key_id=api_key_id
    )
    if revoked is None:
        return await get_api_key(conn, organization_id=organization_id, api_key_id=api_key_id)
    await touch_limits_of_key(conn, organization_id=organization_id, user_id=revoked.user_id)
    await _record(conn, revoked, by, "api_key.revoked", reason=reason)
    return revoked


class LastUse:
    """When keys were last used, gathered in memory and written now and then; never on the way of a request."""

    def __init__(self) -> None:
        self._used: dict[tuple[UUID, UUID], datetime] = {}

    def note(self, organization_id: UUID, api_key_id: UUID) -> None:
        """A key of an organization is used at this moment."""
        self._used[organization_id, api_key_id] = clock.now()

    async def write(self, database: db.Database) -> int:
        """Write what was gathered, one transaction an organization; the number of keys written.

        What cannot be written is lost but for the next use: it is a hint for people, not a fact of money.
        """
        used, self._used = self._used, {}
        by_organization: dict[UUID, dict[UUID, datetime]] = {}
        for (organization_id, api_key_id), instant in used.items():
            by_organization.setdefault(organization_id, {})[api_key_id] = instant
        for organization_id, keys in by_organization.items():
            async with database.tenant(organization_id) as conn:
                await db.execute(
                    conn,
                    QUERIES.note_last_use,
                    organization_id=organization_id,
                    api_key_ids=list(keys),
                    used_at=list(keys.values()),
                )
        return len(used)


async def _insert(conn: db.Connection, *, organization_id: UUID, api_key_id: UUID, **columns: object) -> NewApiKey:
    secret = new_secret_text(API_KEY, organization_id)
    claim = {"organization_id": organization_id, "api_key_id": api_key_id, "key_hash": secret.digest}
    claimed = await db.fetch_value(conn, QUERIES.claim_api_key, **claim)
    assert claimed, "256 random bits came twice"
    key = await db.fetch_one(
        conn,
        ApiKey,
        QUERIES.insert_api_key,
        organization_id=organization_id,
        api_key_id=api_key_id,
        public_id=secret.public_id,
        last4=secret.last4,
        **columns,
    )
    return NewApiKey(key=key, text=secret.text)


async def _check_owner(
    conn: db.Connection, organization_id: UUID, user_id: UUID | None, *, has_place: bool = False
) -> None:
    """The owner is an active member; in a home organization there is no other owner than its person."""
    if user_id is not None:
        membership = await get_membership(conn, organization_id=organization_id, user_id=user_id)
        if membership.status != "active":
            raise MemberNotFound("This member is not active")
    if user_id is None or has_place:
        organization = await get_organization(conn, organization_id=organization_id)
        if organization.kind == "individual":
            raise NoServiceKeyHere


async def _record(conn: db.Connection, key: ApiKey, by: Actor, action: str, **values: Any) -> None:
    await record(
        conn,
        organization_id=key.organization_id,
        by=by,
        action=action,
        object_id=key.api_key_id,
        **values,
    )


def _found(key: ApiKey | None) -> ApiKey:
    if key is None:
        raise ApiKeyNotFound
    return key
