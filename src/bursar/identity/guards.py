"""Who may pass: FastAPI dependencies that turn a request into a principal in an organization, or refuse it.

They look for `database` (db.Database) in `request.app.state`. Use them as types of parameters:

    async def add_credits(body: AddCredits, admin: Annotated[Principal, needs(Permission.CREDITS_BUY)], tx: Tx): ...
"""

import hashlib
import hmac
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from ipaddress import ip_address
from typing import Annotated, Any, Final
from urllib.parse import urlsplit

from fastapi import Depends, Request, Response

from bursar import db
from bursar.audit.events import Actor
from bursar.identity.organizations import (
    PLATFORM_ORGANIZATION_ID,
    OrganizationNotFound,
    find_organization_id,
    get_organization,
)
from bursar.identity.principals import (
    InvalidApiKey,
    Principal,
    chosen_place,
    principal_at,
    principal_of_key,
)
from bursar.identity.roles import PERMISSIONS, Permission, Role
from bursar.identity.sessions import MEMBER_LIFE, NotSignedIn, SignedIn, read_session
from bursar.problems import Problem
from bursar.settings import Settings

COOKIE: Final = "session_token"
ORGANIZATION_HEADER: Final = "bursar-organization"
_SAFE_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS"})


class NotPermitted(Problem):
    """The caller belongs to the organization, but their roles or their key's scopes do not allow this."""

    status, code, title = 403, "not_permitted", "Your role does not allow this"


class CrossSiteRequest(Problem):
    """A change that came with a cookie alone, and not from our own pages."""

    status, code, title = 403, "cross_site_request", "This change did not come from this site's own page"


def database_of(request: Request) -> db.Database:
    """The application's database."""
    database = request.app.state.database
    assert isinstance(database, db.Database)
    return database


def key_text_of(headers: Mapping[str, str]) -> str | None:
    """The API key that a request presents, as `Authorization: Bearer …` (OpenAI) or `x-api-key: …` (Anthropic).

    headers: with names that are found in lower case. None: it presents none.

    Raises:
        InvalidApiKey: an Authorization of another kind.
    """
    authorization = headers.get("authorization")
    if authorization is None:
        return headers.get("x-api-key")
    kind, _, text = authorization.partition(" ")
    if kind.lower() != "bearer":
        raise InvalidApiKey("Send it as: Authorization: Bearer bk_…")
    return text.strip()


async def signed_in(request: Request) -> SignedIn:
    """The person of the session cookie.

    Raises:
        NotSignedIn
        CrossSiteRequest: a change from a page of another site.
    """
    cookie = request.cookies.get(COOKIE)
    if cookie is None:
        raise NotSignedIn
    check_same_origin(request)
    return await read_session(database_of(request), cookie)


async def current_principal(request: Request) -> Principal:
    """Who asks, in the organization that the header chooses, else the session, else the default rule.

    Raises:
        InvalidApiKey, NotSignedIn, CrossSiteRequest, OrganizationNotFound
    """
    chosen = request.headers.get(ORGANIZATION_HEADER)
    key_text = key_text_of(request.headers)
    if key_text is not None:
        return await principal_of_key(database_of(request), key_text, chosen=chosen)
    return principal_of_session(await signed_in(request), chosen=chosen)


def principal_of_session(person: SignedIn, *, chosen: str | None) -> Principal:
    """A signed-in person where they chose to be, for this request or this session, or where the rule puts them.

    Raises:
        OrganizationNotFound
    """
    session = person.session
    in_session = [each for each in person.places if each.organization_id == session.chosen_organization_id]
    if chosen is None and in_session:
        place = in_session[0]
    else:
        place = chosen_place(person.places, chosen=chosen, user=person.user)
    return principal_at(place, user_id=person.user.user_id, session_id=session.session_id)


async def org_member(request: Request, org: str) -> Principal:
    """Who asks, in the organization of the path (slug or id); a system admin is let into every one.

    Raises:
        InvalidApiKey, NotSignedIn, CrossSiteRequest
        OrganizationNotFound: unknown and foreign alike.
    """
    database = database_of(request)
    key_text = key_text_of(request.headers)
    person = None if key_text is not None else await signed_in(request)
    try:
        return await _principal(database, key_text, person, org)
    except OrganizationNotFound:
        # Not theirs; but whoever may act for the platform may act for every organization on it.
        admin = await _principal(database, key_text, person, str(PLATFORM_ORGANIZATION_ID))
        if Role.SYSTEM_ADMIN not in admin.roles:
            raise
        return await _let_in(database, admin, org)


async def _principal(db_: db.Database, key_text: str | None, person: SignedIn | None, chosen: str) -> Principal:
    if person is not None:
        return principal_of_session(person, chosen=chosen)
    assert key_text is not None
    return await principal_of_key(db_, key_text, chosen=chosen)


async def _let_in(database: db.Database, admin: Principal, org: str) -> Principal:
    async with database.platform() as conn:
        organization_id = await find_organization_id(conn, org)
        organization = await get_organization(conn, organization_id=organization_id)
    return replace(
        admin,
        organization_id=organization_id,
        organization_slug=organization.slug,
        organization_kind=organization.kind,
        organization_status=organization.status,
        zone=organization.zone,
        team_id=None,
        department_id=None,
        roles=frozenset({Role.SYSTEM_ADMIN}),
        permissions=admin.permissions & PERMISSIONS[Role.SYSTEM_ADMIN],
    )


def needs(permission: Permission) -> Any:
    """A dependency on `org_member` that also asks for a permission.

    Raises:
        NotPermitted: 403, since a member knows the organization anyway.
    """

    async def check(principal: OrgMember) -> Principal:
        if not principal.may(permission):
            able = ", ".join(role for role in Role if permission in PERMISSIONS[role])
            raise NotPermitted(f"This needs {permission}. Roles that have it: {able or 'none'}")
        return principal

    return Depends(check)


async def transaction(request: Request, principal: "OrgMember") -> AsyncIterator[db.Connection]:
    """One transaction that acts for the organization of the path; committed before the answer goes out."""
    async with database_of(request).tenant(principal.organization_id) as conn:
        yield conn


def actor_of(request: Request, principal: Principal) -> Actor:
    """How the audit names who asks, with the request's id and the hash of its address."""
    return principal.actor(request_id=request_id_of(request), address_hash=address_hash_of(request))


def request_id_of(request: Request) -> str | None:
    """The request's id, where the application's middleware has given it one."""
    request_id = getattr(request.state, "request_id", None)
    return None if request_id is None else str(request_id)


def address_hash_of(request: Request) -> bytes | None:
    """Keyed hash of the caller's network address: tells two apart, and names none."""
    if request.client is None:
        return None
    return hash_address(database_of(request).settings, request.client.host)


def hash_address(settings: Settings, address: str) -> bytes:
    """HMAC-SHA256 under a key of its own."""
    return hmac.new(settings.derive("identity network address"), address.encode(), hashlib.sha256).digest()


def check_same_origin(request: Request) -> None:
    """A cookie is sent along by any page; a change needs the browser's word that one of ours asks.

    Source: W3C Fetch Metadata (Sec-Fetch-Site); browsers without it send Origin with every POST.

    Raises:
        CrossSiteRequest
    """
    if request.method in _SAFE_METHODS:
        return
    site = request.headers.get("sec-fetch-site")
    if site is not None:
        same = site == "same-origin"
    else:
        origin = urlsplit(request.headers.get("origin", "null"))
        same = origin.netloc != "" and origin.netloc == request.headers.get("host")
    if not same:
        raise CrossSiteRequest


def set_session_cookie(request: Request, response: Response, value: str) -> None:
    """Hand out a session. Over plain http a Secure cookie would be dropped, so on the own machine it goes without."""
    response.set_cookie(
        COOKIE,
        value,
        max_age=int(MEMBER_LIFE.total_seconds()),
        path="/",
        httponly=True,
        samesite="lax",
        secure=not (request.url.scheme == "http" and is_loopback(request.url.hostname)),
    )


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address is this very machine."""
    if host is None:
        return False
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


OrgMember = Annotated[Principal, Depends(org_member)]
CurrentPrincipal = Annotated[Principal, Depends(current_principal)]
Tx = Annotated[db.Connection, Depends(transaction, scope="function")]
