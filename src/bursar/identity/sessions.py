"""Signing in by a one-time link, and the server-side sessions that follow.

The cookie `session_token` carries organization (the person's home), session and an HMAC of both, so that it can neither
be guessed nor made from a look at the database; the row it names is asked on every request, so that it can be revoked.
"""

import base64
import binascii
import hashlib
import hmac
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.identity.organizations import QUERIES
from bursar.identity.roles import ADMIN_ROLES, Role
from bursar.identity.secret_text import SIGN_IN_LINK, Malformed, new_secret_text, parse_secret_text
from bursar.identity.users import Place, User, get_user, places_of_user
from bursar.problems import Problem
from bursar.settings import Settings

LINK_LIFE: Final = timedelta(hours=24)
# Source: requirement R26 for administrators; a member's session may lie idle as long as it may live.
ADMIN_IDLE: Final = timedelta(minutes=30)
ADMIN_LIFE: Final = timedelta(hours=12)
MEMBER_LIFE: Final = timedelta(days=7)
SEEN_EVERY: Final = timedelta(minutes=1)

_COOKIE_OCTETS = 16 + 16 + 32


class NotSignedIn(Problem):
    """No session, or one that was ended, lay idle or lived too long: all answer alike."""

    status, code, title = 401, "not_signed_in", "Please sign in"


class LinkNotValid(Problem):
    """A sign-in link that is unknown, used or too old: all answer alike."""

    status, code, title = 410, "link_not_valid", "This sign-in link was used or is too old"


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One signed-in browser. organization_id: the person's home. read_at: the database's clock when it was read."""

    organization_id: UUID
    session_id: UUID
    user_id: UUID
    started_at: datetime
    last_seen_at: datetime
    ended_at: datetime | None
    chosen_organization_id: UUID | None
    address_hash: bytes | None
    read_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    """A person with a living session and where they belong. cookie: the value to hand out; never in a repr."""

    user: User
    session: Session
    places: tuple[Place, ...]
    cookie: str = field(repr=False)

    @property
    def is_administrator(self) -> bool:
        """Whether any company gave them more than a member's role; one's own home does not count."""
        return is_administrator(self.places)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Link:
    organization_id: UUID
    link_id: UUID
    user_id: UUID
    created_at: datetime
    created_by: UUID | None
    expires_at: datetime
    used_at: datetime | None


async def create_sign_in_link(conn: db.Connection, *, user: User, by: Actor, valid_for: timedelta = LINK_LIFE) -> str:
    """The token of a new link, shown once; who has it signs in as the person, once. conn: acts for their home."""
    token = new_secret_text(SIGN_IN_LINK, user.home_organization_id)
    link_id = clock.uuid7()
    keys = {"organization_id": user.home_organization_id, "link_id": link_id}
    claimed = await db.fetch_value(conn, QUERIES.claim_sign_in_link, **keys, token_hash=token.digest)
    assert claimed, "256 random bits came twice"
    link = await db.fetch_one(
        conn,
        _Link,
        QUERIES.insert_sign_in_link,
        **keys,
        user_id=user.user_id,
        created_by=by.user_id,
        valid_for=valid_for,
    )
    await record(
        conn,
        organization_id=user.home_organization_id,
        by=by,
        action="sign_in_link.created",
        object_id=link_id,
        new={"user_id": user.user_id, "expires_at": link.expires_at},
    )
    return token.text


async def sign_in(
    database: db.Database,
    token: str,
    *,
    previous_cookie: str | None = None,
    request_id: str | None = None,
    address_hash: bytes | None = None,
) -> SignedIn:
    """Use a link up and begin a session, always a new one; a session that the browser brought along is ended.

    Raises:
        LinkNotValid: of racing uses exactly one wins.
    """
    try:
        presented = parse_secret_text(SIGN_IN_LINK, token)
    except Malformed as error:
        raise LinkNotValid from error
    async with database.tenant(presented.organization_id) as conn:
        link = await db.fetch_optional(
            conn,
            _Link,
            QUERIES.use_sign_in_link,
            organization_id=presented.organization_id,
            token_hash=presented.digest,
        )
        if link is None:
            raise LinkNotValid
        session = await db.fetch_one(
            conn,
            Session,
            QUERIES.insert_session,
            organization_id=link.organization_id,
            session_id=clock.uuid7(),
            user_id=link.user_id,
            address_hash=address_hash,
        )
        await record(
            conn,
            organization_id=link.organization_id,
            by=Actor(kind="user", id=link.user_id, request_id=request_id, address_hash=address_hash),
            action="session.started",
            object_id=session.session_id,
            new={"link_id": link.link_id},
        )
        cookie = sign_cookie(database.settings, session.organization_id, session.session_id)
        signed_in = await _signed_in(conn, session, cookie)
    if previous_cookie is not None:
        await sign_out(database, previous_cookie)
    return signed_in


async def read_session(database: db.Database, cookie: str) -> SignedIn:
    """Who a cookie stands for, now: roles and memberships are those of this moment.

    Raises:
        NotSignedIn
    """
    organization_id, session_id = check_cookie(database.settings, cookie)
    async with database.tenant(organization_id) as conn:
        session = await db.fetch_optional(
            conn, Session, QUERIES.session, organization_id=organization_id, session_id=session_id
        )
        if session is None:
            raise NotSignedIn
        signed_in = await _signed_in(conn, session, cookie)
        # Who is not active in their own home organization is barred from the installation.
        at_home = any(each.organization_id == organization_id for each in signed_in.places)
        if not at_home or not is_alive(session, signed_in.is_administrator):
            raise NotSignedIn
        if session.read_at - session.last_seen_at >= SEEN_EVERY:
            await db.execute(conn, QUERIES.note_session_seen, organization_id=organization_id, session_id=session_id)
    return signed_in


async def sign_out(database: db.Database, cookie: str) -> None:
    """End the session of a cookie at once; one that is not valid or has ended is no fault."""
    try:
        organization_id, session_id = check_cookie(database.settings, cookie)
    except NotSignedIn:
        return
    async with database.tenant(organization_id) as conn:
        user_id = await db.fetch_value(
            conn, QUERIES.end_session, organization_id=organization_id, session_id=session_id
        )
        if user_id is not None:
            await record(
                conn,
                organization_id=organization_id,
                by=Actor(kind="user", id=user_id),
                action="session.ended",
                object_id=session_id,
            )


async def end_sessions(conn: db.Connection, *, user: User, by: Actor, reason: str | None = None) -> int:
    """End every session of a person at once; how many there were. conn: acts for their home."""
    ended = await db.execute(
        conn, QUERIES.end_sessions_of_user, organization_id=user.home_organization_id, user_id=user.user_id
    )
    await record(
        conn,
        organization_id=user.home_organization_id,
        by=by,
        action="user.sessions_ended",
        object_id=user.user_id,
        new={"ended": ended},
        reason=reason,
    )
    return ended


async def choose_in_session(conn: db.Connection, *, session: Session, organization_id: UUID | None) -> None:
    """Remember where the person acts in this session; None: their default. conn: acts for their home.

    The choice counts only while they belong there (`chosen_place` looks among their places).
    """
    await db.execute(
        conn,
        QUERIES.choose_in_session,
        organization_id=session.organization_id,
        session_id=session.session_id,
        chosen_organization_id=organization_id,
    )


def is_alive(session: Session, of_administrator: bool) -> bool:
    """Whether a session still counts at the instant it was read."""
    if session.ended_at is not None:
        return False
    age, idle = session.read_at - session.started_at, session.read_at - session.last_seen_at
    if of_administrator:
        return age < ADMIN_LIFE and idle < ADMIN_IDLE
    return age < MEMBER_LIFE


def is_administrator(places: tuple[Place, ...]) -> bool:
    """Whether a person holds more than a member's role anywhere but at home."""
    held: set[Role] = set()
    for place in places:
        if place.kind != "individual":
            held |= set(place.roles)
    return bool(held & ADMIN_ROLES)


def sign_cookie(settings: Settings, organization_id: UUID, session_id: UUID) -> str:
    """The cookie's value: both ids and their HMAC-SHA256, in base 64 for addresses."""
    body = organization_id.bytes + session_id.bytes
    return base64.urlsafe_b64encode(body + _mac(settings, body)).decode().rstrip("=")


def check_cookie(settings: Settings, cookie: str) -> tuple[UUID, UUID]:
    """(organization, session) of a cookie's value that was signed here.

    Raises:
        NotSignedIn
    """
    try:
        data = base64.b64decode(cookie + "==", altchars=b"-_", validate=True)
    except (binascii.Error, ValueError) as error:
        raise NotSignedIn from error
    body, mac = data[:32], data[32:]
    if len(data) != _COOKIE_OCTETS or not hmac.compare_digest(mac, _mac(settings, body)):
        raise NotSignedIn
    return UUID(bytes=body[:16]), UUID(bytes=body[16:])


def _mac(settings: Settings, body: bytes) -> bytes:
    return hmac.new(settings.derive("identity session cookie"), body, hashlib.sha256).digest()


async def _signed_in(conn: db.Connection, session: Session, cookie: str) -> SignedIn:
    user = await get_user(conn, user_id=session.user_id)
    places = await places_of_user(conn, user_id=session.user_id)
    return SignedIn(user=user, session=session, places=tuple(places), cookie=cookie)
