"""Complimentary codes: made in campaigns, redeemed into a personal balance, never into a shared one.

A redemption is claimed in the organization of the code first; its grant is booked in the redeemer's, under a key that
names the claim. A process that ends in between leaves a claim that `finish_redemptions` books.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import structlog
from psycopg.types.json import Jsonb

from bursar import clock, db
from bursar.audit.events import SYSTEM, Actor, record
from bursar.clock import uuid7
from bursar.credits.grants import GrantSource
from bursar.credits.pools import open_gate, pool_for
from bursar.identity.memberships import get_membership
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, OrganizationNotFound, get_organization
from bursar.identity.users import Place, get_user, places_of_user
from bursar.money import Micros
from bursar.problems import Problem
from bursar.settings import Settings

QUERIES: Final = db.load_queries("bursar.credits")
ALPHABET: Final = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
"""Crockford's 32 characters: none is taken for another."""
LENGTH: Final = 20
"""Characters of a code: 100 random bits."""
GROUP: Final = 5
MOST_AT_ONCE: Final = 10_000
TRIES: Final = 5
TRIES_WINDOW: Final = timedelta(hours=1)
USUAL_PRIORITY: Final = 50
_MISREAD: Final = str.maketrans("OIL", "011", "- ")

log = structlog.get_logger(__name__)


class CodeUnknown(Problem):
    """No such code; a mistyped one answers alike."""

    status, code, title = 404, "code_unknown", "No such code"


class CodeEnded(Problem):
    """The code was revoked, or its time is over or has not come."""

    status, code, title = 409, "code_ended", "This code cannot be redeemed now"
    sqlstate = "BR441"


class CodeNotForYou(Problem):
    """The code is for members of an organization or for people of an e-mail domain."""

    status, code, title = 403, "code_not_for_you", "This code is for other people"
    sqlstate = "BR442"


class CodeUsedUp(Problem):
    """A limit of the code or of its campaign is reached; the detail says which."""

    status, code, title = 409, "code_used_up", "This code was redeemed as often as it can be"
    sqlstate = "BR443"


class TooManyTries(Problem):
    """Five tries an hour, by person and by network address, that did not succeed."""

    status, code, title = 429, "too_many_tries", "Too many codes were tried"


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What a campaign's codes give. amount_micros: by one redemption. A `most_…` of None is no limit.

    for_members: only members of the campaign's organization, into their balance there. domains: e-mail domains.
    """

    name: str
    amount_micros: Micros
    priority: int = USUAL_PRIORITY
    valid_from: datetime | None = None
    valid_until: datetime | None = None
    credits_expire_at: datetime | None = None
    credits_days: int | None = None
    domains: tuple[str, ...] = ()
    most_per_code: int = 1
    most_per_person: int = 1
    most_per_domain: int | None = None
    most_per_organization: int | None = None
    most_per_day: int | None = None
    most_in_all: int | None = None


@dataclass(frozen=True, slots=True)
class Campaign:
    """A campaign and what came of it; amounts in micros. burnt: of the granted, what was used since."""

    campaign_id: UUID
    name: str
    amount_micros: Micros
    valid_from: datetime
    valid_until: datetime | None
    is_for_members: bool
    most_per_code: int
    most_per_person: int
    created_at: datetime
    revoked_at: datetime | None
    codes: int
    redemptions: int
    people: int
    granted_micros: Micros
    burnt_micros: Micros


@dataclass(frozen=True, slots=True)
class OpenCampaign:
    """A campaign that is not revoked. other_terms: what it gives otherwise than asked for: "amount", "in_all" …"""

    campaign_id: UUID
    other_terms: list[str]


@dataclass(frozen=True, slots=True)
class Code:
    """A code. hint: its last four characters."""

    code_id: UUID
    campaign_id: UUID
    hint: str
    redemptions: int
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, slots=True)
class Redemption:
    """A claim. grant_id: None until the grant is booked. hint: of the code. is_again: it had been redeemed before."""

    redemption_id: UUID
    code_id: UUID
    into_organization_id: UUID
    amount_micros: Micros
    credits_expire_at: datetime | None
    priority: int
    claimed_at: datetime
    grant_id: UUID | None
    campaign: str
    hint: str
    is_again: bool


@dataclass(frozen=True, slots=True)
class _Unfinished(Redemption):
    organization_id: UUID
    user_id: UUID


@dataclass(frozen=True, slots=True)
class _Found:
    organization_id: UUID
    code_id: UUID


def new_code() -> str:
    """A new text, in groups of five: '7Q2KD-…'."""
    text = "".join(secrets.choice(ALPHABET) for _ in range(LENGTH))
    return "-".join(text[at : at + GROUP] for at in range(0, LENGTH, GROUP))


def hash_code(text: str) -> bytes:
    """SHA-256 of a code however it was typed: case, spaces and hyphens do not count, O is 0, I and L are 1.

    Raises:
        CodeUnknown: it can be no code.
    """
    plain = text.upper().translate(_MISREAD)
    if len(plain) != LENGTH or not set(plain) <= set(ALPHABET):
        raise CodeUnknown
    return hashlib.sha256(plain.encode()).digest()


# ---------------------------------------------------------------------------------------------- campaigns


async def open_campaign(
    conn: db.Connection, *, settings: Settings, organization_id: UUID, terms: Terms, created_by: UUID | None, by: Actor
) -> UUID:
    """A new campaign; codes are added with `add_codes`. Of the platform's organization, it is for everybody.

    Raises:
        InvalidGrant: it would be over before it begins, or the amount cannot be granted.
    """
    await open_gate(conn, organization_id=organization_id)
    campaign_id = uuid7()
    row: dict[str, Any] = {name: getattr(terms, name) for name in Terms.__dataclass_fields__ if name != "domains"}
    for name in ("valid_until", "credits_expire_at"):
        row[name] = row[name] or "infinity"
    row |= {
        "is_for_members": organization_id != PLATFORM_ORGANIZATION_ID,
        "domain_hashes": [f"\\x{_domain_hash(settings, each).hex()}" for each in terms.domains] or None,
    }
    await db.execute(
        conn,
        QUERIES.open_campaign,
        organization_id=organization_id,
        campaign_id=campaign_id,
        terms=Jsonb({name: str(each) if isinstance(each, datetime) else each for name, each in row.items()}),
        created_by=created_by,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="code_campaign.opened",
        object_id=campaign_id,
        new={"name": terms.name, "amount_micros": terms.amount_micros},
    )
    return campaign_id


async def find_open_campaign(
    conn: db.Connection, *, settings: Settings, organization_id: UUID, terms: Terms
) -> OpenCampaign | None:
    """The newest open campaign named as `terms` say. What is None there, and the priority, may be anything in it."""
    row = {name: getattr(terms, name) for name in Terms.__dataclass_fields__ if name not in ("domains", "priority")}
    hashes = [_domain_hash(settings, each) for each in terms.domains] or None
    return await db.fetch_optional(
        conn, OpenCampaign, QUERIES.open_campaign_of_name, organization_id=organization_id, domain_hashes=hashes, **row
    )


async def add_codes(
    conn: db.Connection, *, organization_id: UUID, campaign_id: UUID, count: int, by: Actor
) -> dict[UUID, str]:
    """New codes of a campaign: id -> text. The texts are not kept; they are known from this answer only.

    Raises:
        NotFound: no such campaign, or a revoked one.
    """
    assert 1 <= count <= MOST_AT_ONCE
    texts = {uuid7(): new_code() for _ in range(count)}
    claimed = await db.fetch_value(
        conn,
        QUERIES.claim_codes,
        organization_id=organization_id,
        code_ids=list(texts),
        code_hashes=[hash_code(text) for text in texts.values()],
    )
    assert claimed == count, "two codes of 100 random bits are the same"
    await db.execute(
        conn,
        QUERIES.add_codes,
        organization_id=organization_id,
        campaign_id=campaign_id,
        codes=Jsonb({str(code_id): text[-4:] for code_id, text in texts.items()}),
    )
    await record(
        conn, organization_id=organization_id, by=by, action="code_campaign.extended", object_id=campaign_id,
        new={"codes": count},
    )  # fmt: skip
    return texts


async def revoke_codes(
    conn: db.Connection,
    *,
    organization_id: UUID,
    campaign_id: UUID,
    code_id: UUID | None,
    reason: str | None,
    by: Actor,
) -> int:
    """End one code, or with None the whole campaign; what was granted stays. Returns how many codes were ended."""
    ended = await db.fetch_value(
        conn,
        QUERIES.revoke_codes,
        organization_id=organization_id,
        campaign_id=campaign_id,
        code_id=code_id,
        reason=reason,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="code.revoked" if code_id else "code_campaign.revoked",
        object_id=code_id or campaign_id,
        new={"codes": int(ended)},
        reason=reason,
    )
    return int(ended)


async def list_campaigns(conn: db.Connection, *, organization_id: UUID) -> list[Campaign]:
    """Campaigns of an organization, newest first, with what came of them.

    What was burnt is known to who reads every organization: the redeemers' balances are in theirs.
    """
    return await db.fetch_all(conn, Campaign, QUERIES.campaigns, organization_id=organization_id)


async def list_codes(
    conn: db.Connection, *, organization_id: UUID, campaign_id: UUID, after: UUID | None = None, limit: int = 100
) -> list[Code]:
    """Codes of a campaign in the order of making, after one (from the start when None)."""
    return await db.fetch_all(
        conn, Code, QUERIES.codes, organization_id=organization_id, campaign_id=campaign_id, after=after, limit=limit
    )


async def find_code(conn: db.Connection, text: str) -> tuple[UUID, UUID]:
    """(organization, code) of a text. Works without a tenant.

    Raises:
        CodeUnknown
    """
    found = await db.fetch_optional(conn, _Found, QUERIES.find_code, code_hash=hash_code(text))
    if found is None:
        raise CodeUnknown
    return found.organization_id, found.code_id


# ---------------------------------------------------------------------------------------------- redemption


async def redeem(
    database: db.Database, *, text: str, user_id: UUID, into: UUID | None, by: Actor, address_hash: bytes | None = None
) -> Redemption:
    """Redeem a code into a person's own balance: in `into`, where they belong, else in the code's organization, else at
    home. The same person and code again is the first redemption, wherever that went.

    Raises:
        TooManyTries: tries that did not succeed, by person and address, in the last hour.
        CodeUnknown, CodeEnded, CodeNotForYou, CodeUsedUp
        OrganizationNotFound: they do not belong to `into`.
    """
    subjects = _subjects(database.settings, user_id, address_hash)
    await _count_try(database, subjects)
    async with database.untenanted() as conn:
        owner_id, code_id = await find_code(conn, text)
        user = await get_user(conn, user_id=user_id)
        places = await places_of_user(conn, user_id=user_id)
    into_id = _destination(places, into=into, owner_id=owner_id, home_id=user.home_organization_id)
    async with database.tenant(user.home_organization_id) as conn:
        person = await get_membership(conn, organization_id=user.home_organization_id, user_id=user_id)
    async with database.tenant(owner_id) as conn:
        claim = await db.fetch_one(
            conn,
            Redemption,
            QUERIES.redeem_code,
            organization_id=owner_id,
            redemption_id=uuid7(),
            code_id=code_id,
            user_id=user_id,
            domain_hash=_domain_hash(database.settings, person.email.rpartition("@")[2]),
            into_organization_id=into_id,
        )
        if claim.grant_id is None:
            await record(conn, organization_id=owner_id, by=by, action="code.redeemed", object_id=code_id)
    redemption = await _finish(database, owner_id, user_id, claim, by)
    async with database.untenanted() as conn:
        await db.execute(conn, QUERIES.forgive_try, subjects=subjects)
    return redemption


async def finish_redemptions(database: db.Database, *, older_than: timedelta = timedelta(minutes=1)) -> int:
    """Book the grants of claims whose process ended before it did; returns how many. What has expired is none."""
    async with database.platform() as conn:
        left = await db.fetch_all(conn, _Unfinished, QUERIES.unfinished_redemptions, older_than=older_than, most=100)
    done = 0
    for each in left:
        try:
            await _finish(database, each.organization_id, each.user_id, each, SYSTEM)
            done += 1
        except Exception:  # one redemption's fault is not another's; it is tried again
            log.exception("a redemption cannot be finished", redemption_id=str(each.redemption_id))
    return done


async def forget_tries(database: db.Database) -> int:
    """Forget who has not tried for an hour; returns how many."""
    async with database.platform() as conn:
        return int(await db.fetch_value(conn, QUERIES.forget_tries, window=TRIES_WINDOW))


async def _count_try(database: db.Database, subjects: list[bytes]) -> None:
    """In a transaction of its own: what follows may be refused, the try was made all the same."""
    async with database.untenanted() as conn:
        free_at = await db.fetch_value(conn, QUERIES.try_code, subjects=subjects, most=TRIES, window=TRIES_WINDOW)
    if free_at is not None:
        wait = max(1, int((free_at - clock.now()).total_seconds()) + 1)
        raise TooManyTries(
            f"the next one may be tried from {free_at.astimezone(UTC):%H:%M} UTC on", headers={"Retry-After": str(wait)}
        )


def _destination(places: list[Place], *, into: UUID | None, owner_id: UUID, home_id: UUID) -> UUID:
    belongs = {each.organization_id for each in places}
    if into is not None:
        if into not in belongs:
            raise OrganizationNotFound
        return into
    return owner_id if owner_id in belongs and owner_id != PLATFORM_ORGANIZATION_ID else home_id


async def _finish(database: db.Database, owner_id: UUID, user_id: UUID, claim: Redemption, by: Actor) -> Redemption:
    """Book the grant of a claim, and note it there; twice is once."""
    if claim.grant_id is not None:
        return claim
    into = claim.into_organization_id
    async with database.tenant(into) as conn:
        organization = await get_organization(conn, organization_id=into)
        owner = None if organization.kind == "individual" else user_id
        grant_id = await db.fetch_value(
            conn,
            QUERIES.grant_code,
            organization_id=into,
            grant_id=uuid7(),
            pool_id=await pool_for(conn, organization_id=into, owner_user_id=owner),
            redemption_id=claim.redemption_id,
            campaign=claim.campaign,
            hint=claim.hint,
            amount_micros=claim.amount_micros,
            priority=claim.priority,
            expires_at=claim.credits_expire_at,
            created_by=user_id,
        )
        await record(
            conn,
            organization_id=into,
            by=by,
            action="grant.added",
            object_id=grant_id,
            new={"source": GrantSource.CODE.value, "amount_micros": claim.amount_micros},
        )
    async with database.tenant(owner_id) as conn:
        await db.execute(
            conn,
            QUERIES.finish_redemption,
            organization_id=owner_id,
            redemption_id=claim.redemption_id,
            grant_id=grant_id,
        )
    return replace(claim, grant_id=grant_id)


def _subjects(settings: Settings, user_id: UUID, address_hash: bytes | None) -> list[bytes]:
    key = settings.derive("code tries")
    who = [b"user " + user_id.bytes, *([] if address_hash is None else [b"address " + address_hash])]
    return [hmac.new(key, each, hashlib.sha256).digest() for each in who]


def _domain_hash(settings: Settings, domain: str) -> bytes:
    key = settings.derive("e-mail domain")
    return hmac.new(key, domain.strip().lower().removeprefix("@").encode(), hashlib.sha256).digest()
