"""Organizations, the tenants: creating, finding and changing them, and telling credits when who may spend changes."""

import re
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Final, Literal
from uuid import UUID
from zoneinfo import available_timezones

from bursar import db
from bursar.audit.events import Actor, record
from bursar.identity.names import clean_name
from bursar.problems import FieldError, Problem

QUERIES = db.load_queries("bursar.identity")

PLATFORM_ORGANIZATION_ID: Final = UUID("00000000-0000-7000-8000-000000000001")
PLATFORM_SLUG: Final = "platform"

Kind = Literal["company", "individual", "platform", "catch_all"]
Status = Literal["active", "frozen", "closed"]

_SLUG = re.compile(r"[a-z0-9](?:-?[a-z0-9])+", re.ASCII)
_LOOKS_LIKE_AN_ID = re.compile(r"[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.ASCII)


class OrganizationNotFound(Problem):
    """No such organization, or one the caller does not belong to: both answer alike."""

    status, code, title = 404, "organization_not_found", "No such organization"


class InvalidSlug(Problem):
    """A slug is not 2 to 63 lower-case letters, digits and single hyphens, or reads like an id."""

    status, code, title = 422, "invalid_slug", "This slug cannot be used"


class SlugTaken(Problem):
    """Another organization of the installation has the slug."""

    status, code, title = 409, "slug_taken", "This slug is in use"


class InvalidZone(Problem):
    """Not the name of an IANA time zone."""

    status, code, title = 422, "invalid_zone", "No such time zone"


class InvalidCurrency(Problem):
    """Not three capital letters of ISO 4217."""

    status, code, title = 422, "invalid_currency", "No such currency"


class OrganizationClosed(Problem):
    """A closed organization stays closed."""

    status, code, title = 409, "organization_closed", "This organization is closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Organization:
    """One tenant. zone: IANA name; currency: ISO 4217."""

    organization_id: UUID
    slug: str
    name: str
    kind: Kind
    zone: str
    currency: str
    is_shared_token_pool: bool
    shows_margin: bool
    status: Status
    created_at: datetime


async def create_organization(
    conn: db.Connection,
    *,
    organization_id: UUID,
    slug: str,
    name: str,
    by: Actor,
    kind: Kind = "company",
    zone: str = "UTC",
    currency: str = "USD",
    is_shared_token_pool: bool = True,
    shows_margin: bool = False,
    at: datetime | None = None,
) -> Organization:
    """A new organization, with its slug claimed. conn: acts for `organization_id`, a new id.

    Its credits are opened by the caller (credits stands above identity). at: None is now.

    Raises:
        InvalidSlug, InvalidName, InvalidZone, InvalidCurrency
        SlugTaken: of racing claims exactly one wins.
    """
    assert (kind == "platform") == (organization_id == PLATFORM_ORGANIZATION_ID)
    if slug == PLATFORM_SLUG and kind != "platform":
        raise InvalidSlug(f"“{slug}” is the platform's own")
    check_slug(slug)
    check_zone(zone)
    if not re.fullmatch(r"[A-Z]{3}", currency, re.ASCII):
        raise InvalidCurrency(errors=[FieldError("#/currency", "three capital letters of ISO 4217")])
    if not await db.fetch_value(conn, QUERIES.claim_slug, organization_id=organization_id, slug=slug):
        raise SlugTaken(f"“{slug}” is in use")
    organization = await db.fetch_one(
        conn,
        Organization,
        QUERIES.insert_organization,
        organization_id=organization_id,
        slug=slug,
        name=clean_name(name),
        kind=kind,
        zone=zone,
        currency=currency,
        is_shared_token_pool=is_shared_token_pool,
        shows_margin=shows_margin,
        at=at,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="organization.created",
        object_id=organization_id,
        new={"slug": slug, "kind": kind, "zone": zone, "is_shared_token_pool": is_shared_token_pool},
    )
    return organization


async def ensure_platform(conn: db.Connection, *, by: Actor) -> Organization:
    """The platform's own organization, made when there is none yet. conn: acts for PLATFORM_ORGANIZATION_ID."""
    # The claim makes racing callers wait for the first one, whose row they then find.
    await db.fetch_value(conn, QUERIES.claim_slug, organization_id=PLATFORM_ORGANIZATION_ID, slug=PLATFORM_SLUG)
    found = await db.fetch_optional(conn, Organization, QUERIES.organization, organization_id=PLATFORM_ORGANIZATION_ID)
    return found or await create_organization(
        conn,
        organization_id=PLATFORM_ORGANIZATION_ID,
        slug=PLATFORM_SLUG,
        name="Platform",
        kind="platform",
        is_shared_token_pool=False,
        by=by,
    )


async def get_organization(conn: db.Connection, *, organization_id: UUID) -> Organization:
    """The organization that conn acts for (any of them, on a platform connection).

    Raises:
        OrganizationNotFound
    """
    found = await db.fetch_optional(conn, Organization, QUERIES.organization, organization_id=organization_id)
    return _found(found)


async def find_organization_id(conn: db.Connection, reference: str) -> UUID:
    """The id that a slug or an id (`org_…` or plain) names; an id is not looked up. Works without a tenant.

    Raises:
        OrganizationNotFound: no organization has this slug.
    """
    organization_id = id_of_reference(reference)
    if organization_id is None and _SLUG.fullmatch(reference):
        organization_id = await db.fetch_value(conn, QUERIES.find_organization_id, slug=reference)
    if organization_id is None:
        raise OrganizationNotFound
    return organization_id


async def list_organizations(
    conn: db.Connection, *, kind: Kind | None = None, after: UUID | None = None, limit: int = 100
) -> list[Organization]:
    """Organizations in the order they were made, after one. conn: a platform connection."""
    return await db.fetch_all(conn, Organization, QUERIES.organizations, kind=kind, after=after, limit=limit)


async def update_organization(
    conn: db.Connection,
    *,
    organization_id: UUID,
    by: Actor,
    name: str | None = None,
    zone: str | None = None,
    shows_margin: bool | None = None,
    reason: str | None = None,
) -> Organization:
    """Change what is given, keep what is None.

    Raises:
        InvalidName, InvalidZone, OrganizationNotFound
    """
    if zone is not None:
        check_zone(zone)
    old = await get_organization(conn, organization_id=organization_id)
    organization = await db.fetch_one(
        conn,
        Organization,
        QUERIES.update_organization,
        organization_id=organization_id,
        name=None if name is None else clean_name(name),
        zone=zone,
        shows_margin=shows_margin,
    )
    if organization.zone != old.zone:
        await touch_limits(conn, organization_id)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="organization.changed",
        object_id=organization_id,
        old={"name": old.name, "zone": old.zone, "shows_margin": old.shows_margin},
        new={"name": organization.name, "zone": organization.zone, "shows_margin": organization.shows_margin},
        reason=reason,
    )
    return organization


async def set_pool_sharing(
    conn: db.Connection, *, organization_id: UUID, is_shared_token_pool: bool, by: Actor, reason: str | None = None
) -> Organization:
    """Whether the balance belongs to the organization or each member has one of their own. Credits do not move by it:
    who switches pools moves them in the same transaction.

    Raises:
        OrganizationNotFound
    """
    organization = await db.fetch_optional(
        conn,
        Organization,
        QUERIES.set_pool_sharing,
        organization_id=organization_id,
        is_shared_token_pool=is_shared_token_pool,
    )
    if organization is None:
        raise OrganizationNotFound
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="organization.pools_switched",
        object_id=organization_id,
        old={"is_shared_token_pool": not is_shared_token_pool},
        new={"is_shared_token_pool": is_shared_token_pool},
        reason=reason,
    )
    return organization


async def set_organization_status(
    conn: db.Connection, *, organization_id: UUID, status: Status, by: Actor, reason: str | None = None
) -> Organization:
    """Freeze (reads, spends nothing), thaw or close (for good; its keys and pages answer nobody).

    Raises:
        OrganizationNotFound
        OrganizationClosed: it is closed already, and stays so.
    """
    old = await get_organization(conn, organization_id=organization_id)
    organization = await db.fetch_optional(
        conn, Organization, QUERIES.set_organization_status, organization_id=organization_id, status=status
    )
    if organization is None:
        raise OrganizationClosed
    await touch_limits(conn, organization_id)
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="organization.status_changed",
        object_id=organization_id,
        old={"status": old.status},
        new={"status": status},
        reason=reason,
    )
    return organization


async def touch_limits(conn: db.Connection, organization_id: UUID) -> None:
    """Make credits read again who may spend here: after a change of keys, members, teams, zone or status.

    The one place where identity writes above its layer, through a function that bumps a counter and does nothing else.
    """
    await db.execute(conn, QUERIES.touch_limits, organization_id=organization_id)


async def touch_limits_of_key(conn: db.Connection, *, organization_id: UUID, user_id: UUID | None) -> None:
    """`touch_limits` wherever a key acts: where it was made, and for a personal key wherever its owner belongs."""
    await db.execute(conn, QUERIES.touch_limits_of_key, organization_id=organization_id, user_id=user_id)


def check_slug(slug: str) -> None:
    """Raises InvalidSlug unless the slug can name an organization in an address."""
    if not _SLUG.fullmatch(slug) or len(slug) > 63 or _LOOKS_LIKE_AN_ID.fullmatch(slug):
        detail = "2 to 63 lower-case letters, digits and single hyphens; nothing that reads like an id"
        raise InvalidSlug(detail, errors=[FieldError("#/slug", detail)])


def check_zone(zone: str) -> None:
    """Raises InvalidZone unless it is the name of an IANA zone; the table checks that PostgreSQL knows it too."""
    if zone not in _zones():
        raise InvalidZone(f"“{zone[:64]}” is no IANA zone", errors=[FieldError("#/zone", "such as Europe/Paris")])


def id_of_reference(reference: str) -> UUID | None:
    """The id in `org_<32 hex digits>` or in a plain id; None for anything else, such as a slug."""
    text = reference.removeprefix("org_").lower()
    return UUID(text) if _LOOKS_LIKE_AN_ID.fullmatch(text) else None


def slug_from_name(name: str) -> str:
    """A slug to propose for a name: 'Quill & Co' -> 'quill-co'; '' for a name without Latin letters."""
    return "-".join(re.findall(r"[a-z0-9]+", name.lower(), re.ASCII))[:63].strip("-")


@cache
def _zones() -> frozenset[str]:
    return frozenset(available_timezones()) - {"localtime", "posixrules", "Factory"}


def _found(organization: Organization | None) -> Organization:
    if organization is None:
        raise OrganizationNotFound
    return organization
