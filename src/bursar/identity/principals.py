"""Who is asking, in which organization, and what they may do there."""

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor
from bursar.identity.api_keys import LastUse
from bursar.identity.organizations import QUERIES, OrganizationNotFound, id_of_reference
from bursar.identity.roles import (
    SERVICE_KEY,
    Permission,
    Role,
    Scope,
    permissions_in,
    permissions_of,
)
from bursar.identity.secret_text import API_KEY, Malformed, SecretText, parse_secret_text
from bursar.identity.users import Place, User, get_user, places_of_user
from bursar.problems import Problem


class InvalidApiKey(Problem):
    """Mistyped, unknown, revoked or expired, or its owner or organization is gone: all answer alike."""

    status, code, title = 401, "invalid_api_key", "This API key is not valid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Someone who acts in one organization.

    api_key_id, key_organization_id, scopes, expires_at: of the key they came with; for a session None and no scopes.
    A personal key's organization is its owner's home, not the one it acts in. A service key has no user and no roles.
    """

    organization_id: UUID
    organization_slug: str
    organization_kind: str
    organization_status: str
    zone: str
    user_id: UUID | None
    roles: frozenset[Role]
    team_id: UUID | None
    department_id: UUID | None
    permissions: frozenset[Permission]
    api_key_id: UUID | None = None
    key_organization_id: UUID | None = None
    scopes: frozenset[Scope] = frozenset()
    expires_at: datetime | None = None
    session_id: UUID | None = None

    def may(self, permission: Permission) -> bool:
        """Whether this is allowed here; the rows it is about are still to be looked at for `:own` and `:team`."""
        return permission in self.permissions

    def actor(self, *, request_id: str | None = None, address_hash: bytes | None = None) -> Actor:
        """How the audit names them: the key they came with, else the person."""
        if self.api_key_id is not None:
            return Actor(kind="api_key", id=self.api_key_id, request_id=request_id, address_hash=address_hash)
        return Actor(kind="user", id=self.user_id, request_id=request_id, address_hash=address_hash)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PresentedKey:
    """A usable key, the organization it was made in, and its owner's membership there."""

    api_key_id: UUID
    organization_id: UUID
    user_id: UUID | None
    scopes: tuple[Scope, ...]
    team_id: UUID | None
    department_id: UUID | None
    expires_at: datetime | None
    slug: str
    name: str
    kind: str
    zone: str
    shows_margin: bool
    status: str
    roles: tuple[Role, ...]
    member_team_id: UUID | None
    member_department_id: UUID | None
    owner_is_active: bool

    @property
    def place(self) -> Place:
        """Where a company's key acts: the key's own team and department before its owner's."""
        return Place(
            organization_id=self.organization_id,
            slug=self.slug,
            name=self.name,
            kind=self.kind,
            zone=self.zone,
            shows_margin=self.shows_margin,
            status=self.status,
            roles=self.roles,
            team_id=self.team_id or self.member_team_id,
            department_id=self.department_id or self.member_department_id,
        )


async def principal_of_key(database: db.Database, secret: str, *, chosen: str | None) -> Principal:
    """Who presents this key's text, acting in the organization they chose (slug or id) or that the rule gives.

    The gateway asks through a KeyCache; everything else asks here, so that a revocation counts at once.

    Raises:
        InvalidApiKey
        OrganizationNotFound: unknown, foreign, or not the one a company's key is bound to.
    """
    presented = parse_api_key(secret)
    async with database.tenant(presented.organization_id) as conn:
        key = await db.fetch_optional(
            conn,
            _PresentedKey,
            QUERIES.presented_key,
            organization_id=presented.organization_id,
            key_hash=presented.digest,
        )
        if key is None or not key.owner_is_active or key.status == "closed":
            raise InvalidApiKey
        if key.kind != "individual" or key.user_id is None:
            return _of_key(key, chosen_place([key.place], chosen=chosen, user=None))
        places = await places_of_user(conn, user_id=key.user_id)
        user = await get_user(conn, user_id=key.user_id)
    return _of_key(key, chosen_place(places, chosen=chosen, user=user))


def chosen_place(places: Sequence[Place], *, chosen: str | None, user: User | None) -> Place:
    """Where someone acts: the chosen place, else the default, else the company joined first, else the home.

    places: where they actively belong, first joined first. user: None when there is no default to look at.

    Raises:
        OrganizationNotFound: the chosen one is not among the places, be it unknown or foreign; or there is none.
    """
    if chosen is not None:
        chosen_id = id_of_reference(chosen)
        candidates = [each for each in places if each.organization_id == chosen_id or each.slug == chosen]
    else:
        default_id = user.default_organization_id if user else None
        defaults = [each for each in places if each.organization_id == default_id]
        companies = [each for each in places if each.kind in ("company", "catch_all")]
        candidates = [*defaults, *companies, *places]
    if not candidates:
        raise OrganizationNotFound
    return candidates[0]


def parse_api_key(text: str) -> SecretText:
    """The parts of a key's text; no database is asked.

    Raises:
        InvalidApiKey
    """
    try:
        return parse_secret_text(API_KEY, text)
    except Malformed as error:
        raise InvalidApiKey("This API key was mistyped, or not copied whole") from error


def permissions_at(place: Place) -> frozenset[Permission]:
    """What a person may do at a place. Margin is for where the organization shows it, and for the platform."""
    allowed = permissions_of(place.roles)
    if place.shows_margin or Role.SYSTEM_ADMIN in place.roles:
        return allowed
    return allowed - {Permission.MARGIN_READ}


def principal_at(place: Place, *, user_id: UUID, session_id: UUID | None = None) -> Principal:
    """A person at one of their places."""
    return Principal(
        organization_id=place.organization_id,
        organization_slug=place.slug,
        organization_kind=place.kind,
        organization_status=place.status,
        zone=place.zone,
        user_id=user_id,
        roles=frozenset(place.roles),
        team_id=place.team_id,
        department_id=place.department_id,
        permissions=permissions_at(place),
        session_id=session_id,
    )


def _of_key(key: _PresentedKey, place: Place) -> Principal:
    allowed = SERVICE_KEY if key.user_id is None else permissions_at(place)
    return Principal(
        organization_id=place.organization_id,
        organization_slug=place.slug,
        organization_kind=place.kind,
        organization_status=place.status,
        zone=place.zone,
        user_id=key.user_id,
        roles=frozenset(place.roles),
        team_id=place.team_id,
        department_id=place.department_id,
        permissions=allowed & permissions_in(key.scopes),
        api_key_id=key.api_key_id,
        key_organization_id=key.organization_id,
        scopes=frozenset(key.scopes),
        expires_at=key.expires_at,
    )


class KeyCache:
    """Principals of keys for the gateway: what is answered was read at most SECONDS ago, and never after its expiry.

    A revoked key is let through for at most SECONDS in each process, and spends nothing meanwhile, since the money
    functions read its row under the gate. Requests that miss at one moment share one look-up. Refusals are not kept.
    """

    SECONDS: Final = 5.0

    def __init__(
        self,
        database: db.Database,
        *,
        size: int = 10_000,
        seconds: float = SECONDS,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        assert size > 0
        assert 0 < seconds <= self.SECONDS
        self._database = database
        self._size = size
        self._seconds = seconds
        self._monotonic = monotonic
        # (digest of the text, chosen) -> (when it was asked, the answer or the look-up under way); oldest first.
        self._entries: OrderedDict[tuple[bytes, str | None], tuple[float, asyncio.Task[Principal]]] = OrderedDict()
        self.last_use = LastUse()

    def __len__(self) -> int:
        return len(self._entries)

    async def principal(self, secret: str, *, chosen: str | None) -> Principal:
        """`principal_of_key`, at most SECONDS old.

        Raises:
            InvalidApiKey, OrganizationNotFound
        """
        known = self.known(secret, chosen=chosen)
        if known is not None:
            return known
        lookup = _lookup(secret, chosen)
        entry = self._entries.get(lookup)
        if entry is None or self._is_stale(*entry):
            parse_api_key(secret)
            entry = self._ask(lookup, secret, chosen)
        # One caller that goes away does not take the answer from the others.
        return self._used(await asyncio.shield(entry[1]))

    def known(self, secret: str, *, chosen: str | None) -> Principal | None:
        """The same where nobody need be asked; None: ask `principal`."""
        # Taking a text apart costs ten times its hash, and only well-formed texts are ever entered.
        entry = self._entries.get(_lookup(secret, chosen))
        if entry is None or not entry[1].done() or self._is_stale(*entry):
            return None
        return self._used(entry[1].result())

    def _used(self, principal: Principal) -> Principal:
        assert principal.key_organization_id is not None
        assert principal.api_key_id is not None
        self.last_use.note(principal.key_organization_id, principal.api_key_id)
        return principal

    def _is_stale(self, asked_at: float, task: asyncio.Task[Principal]) -> bool:
        if self._monotonic() - asked_at >= self._seconds:
            return True
        if not task.done():
            return False
        if task.cancelled() or task.exception() is not None:
            return True
        expires_at = task.result().expires_at
        return expires_at is not None and expires_at <= clock.now()

    def _ask(
        self, lookup: tuple[bytes, str | None], secret: str, chosen: str | None
    ) -> tuple[float, asyncio.Task[Principal]]:
        """Start a look-up; its age counts from here, before anything is read."""
        task = asyncio.create_task(principal_of_key(self._database, secret, chosen=chosen))
        entry = (self._monotonic(), task)
        self._entries[lookup] = entry
        self._entries.move_to_end(lookup)
        task.add_done_callback(lambda done: self._forget_refusal(lookup, done))
        while len(self._entries) > self._size:
            self._entries.popitem(last=False)
        return entry

    def _forget_refusal(self, lookup: tuple[bytes, str | None], task: asyncio.Task[Principal]) -> None:
        refused = task.cancelled() or task.exception() is not None
        if refused and lookup in self._entries and self._entries[lookup][1] is task:
            del self._entries[lookup]


def _lookup(secret: str, chosen: str | None) -> tuple[bytes, str | None]:
    return hashlib.sha256(secret.encode(errors="replace")).digest(), chosen
