"""Opening balances from a CSV file: checked as a whole first, then granted row by row, each row once.

A row is known by its `reference`, or by its content where it has none (and by how often the same content stood before
it in the file): importing a file again, or going on after an interruption, grants only what was not granted yet.
"""

import csv
import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from bursar import clock, db
from bursar.audit.events import Actor, record
from bursar.credits.grants import OF_THEIR_OWN, USUAL_PRIORITY, GrantSource, InvalidGrant, KeyReused, add_grant
from bursar.credits.pools import NoPool, pool_for
from bursar.identity.addresses import Address, InvalidEmail
from bursar.identity.memberships import MemberNotFound, find_membership_by_email
from bursar.identity.organizations import (
    Organization,
    OrganizationNotFound,
    find_organization_id,
    get_organization,
)
from bursar.money import Micros, NanoUsd, NotAnAmount, parse_credits, parse_usd
from bursar.problems import translated

REQUIRED: Final = ("credits",)
OPTIONAL: Final = (
    "organization",
    "user",
    "paid_usd",
    "free",
    "source",
    "priority",
    "effective_at",
    "expires_at",
    "reason",
    "reference",
)
MOST_MICROS: Final = 10**15
_SOURCES: Final = {each.value: each for each in GrantSource if each not in OF_THEIR_OWN}
_YES: Final = {"yes": True, "true": True, "1": True, "": False, "no": False, "false": False, "0": False}


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be imported. line: of the file, from 1; column: None where it is about the row."""

    line: int
    column: str | None
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """One row. owner: the member whose personal balance it is; None: the organization's own pool."""

    line: int
    organization_id: UUID
    organization: str
    owner_user_id: UUID | None
    amount_micros: Micros
    cost_basis_nano_usd: NanoUsd
    is_free: bool
    source: GrantSource
    priority: int
    effective_at: datetime | None
    expires_at: datetime | None
    reason: str | None
    idempotency_key: str


@dataclass(frozen=True, slots=True)
class Checked:
    """What a file says: rows that can be imported, and the faults of the others."""

    rows: tuple[Opening, ...]
    faults: tuple[Fault, ...]


class _Bad(ValueError):
    def __init__(self, column: str | None, problem: str) -> None:
        super().__init__(problem)
        self.column = column


async def check_file(database: db.Database, lines: Iterable[str], *, default_organization: str | None) -> Checked:
    """Read a CSV file with a head line and look up whom each row is about; nothing is changed.

    default_organization: of rows that name none.
    """
    reader = csv.DictReader(lines, strict=True)
    try:
        faults = list(_faults_of_head(reader.fieldnames))
        if faults:
            return Checked((), tuple(faults))
        places = _Places(database)
        rows: list[Opening] = []
        seen: Counter[bytes] = Counter()
        for cells in reader:
            line = reader.line_num
            try:
                rows.append(await _row(places, line, cells, default_organization, seen))
            except _Bad as bad:
                faults.append(Fault(line, bad.column, str(bad)))
    except csv.Error as error:
        faults.append(Fault(reader.line_num, None, f"this is no CSV: {error}"))
    return Checked(tuple(rows), tuple(faults))


async def import_rows(
    database: db.Database, rows: Sequence[Opening], *, by: Actor, progress: Callable[[int], None]
) -> list[Fault]:
    """Grant row by row, each in a transaction of its own; a row that was granted before changes nothing.

    progress: told how many rows are done. Returns the rows that were refused all the same.
    """
    for organization_id, of_organization in _by_organization(rows).items():
        async with database.tenant(organization_id) as conn:
            new = {"rows": len(of_organization), "amount_micros": sum(each.amount_micros for each in of_organization)}
            await record(
                conn,
                organization_id=organization_id,
                by=by,
                action="balances.imported",
                object_id=organization_id,
                new=new,
            )
    faults = []
    for done, row in enumerate(rows, start=1):
        try:
            with translated():
                await _grant(database, row, by)
        except (KeyReused, NoPool, InvalidGrant) as problem:
            faults.append(Fault(row.line, None, problem.detail or problem.title))
        progress(done)
    return faults


def _by_organization(rows: Sequence[Opening]) -> dict[UUID, list[Opening]]:
    found: dict[UUID, list[Opening]] = {}
    for row in rows:
        found.setdefault(row.organization_id, []).append(row)
    return found


async def _grant(database: db.Database, row: Opening, by: Actor) -> None:
    async with database.tenant(row.organization_id) as conn:
        await add_grant(
            conn,
            organization_id=row.organization_id,
            pool_id=await pool_for(conn, organization_id=row.organization_id, owner_user_id=row.owner_user_id),
            amount_micros=row.amount_micros,
            source=row.source,
            idempotency_key=row.idempotency_key,
            priority=row.priority,
            is_free=row.is_free,
            cost_basis_nano_usd=row.cost_basis_nano_usd,
            effective_at=row.effective_at,
            expires_at=row.expires_at,
            reason=row.reason,
            created_by=by.user_id,
        )


def _faults_of_head(names: Sequence[str] | None) -> Iterable[Fault]:
    for name in REQUIRED:
        if name not in (names or ()):
            yield Fault(1, name, "this column is missing")
    for name in names or ():
        if name not in REQUIRED + OPTIONAL:
            yield Fault(1, name, f"no such column; there are {', '.join(REQUIRED + OPTIONAL)}")
    for name, times in Counter(names or ()).items():
        if times > 1:
            yield Fault(1, name, "this column stands there twice")


async def _row(
    places: "_Places", line: int, cells: dict[Any, Any], default: str | None, seen: Counter[bytes]
) -> Opening:
    if None in cells or None in cells.values():
        raise _Bad(None, "it has more or fewer cells than the head has columns")
    text = {name: cell.strip() for name, cell in cells.items()}
    for name, cell in text.items():
        if "\0" in cell:
            raise _Bad(name, "it has a character of code 0 in it, which no text may have")
    text = dict.fromkeys(REQUIRED + OPTIONAL, "") | text
    organization, owner = await places.find(text["organization"] or default, text["user"])
    effective, expires = _instant("effective_at", text["effective_at"]), _instant("expires_at", text["expires_at"])
    if expires is not None and expires <= max(effective or clock.now(), clock.now()):
        raise _Bad("expires_at", "the credits would have expired before they can be spent")
    return Opening(
        line=line,
        organization_id=organization.organization_id,
        organization=organization.slug,
        owner_user_id=owner,
        amount_micros=_amount(text["credits"]),
        cost_basis_nano_usd=_money(text["paid_usd"]),
        is_free=_choice("free", text["free"].lower(), _YES),
        source=_choice("source", text["source"] or "opening", _SOURCES),
        priority=_priority(text["priority"]),
        effective_at=effective,
        expires_at=expires,
        reason=text["reason"] or None,
        idempotency_key=_key(organization.organization_id, text, seen),
    )


def _key(organization_id: UUID, text: dict[str, str], seen: Counter[bytes]) -> str:
    """By its reference, else by its content and how often the same stood before it."""
    if text["reference"]:
        content = f"reference {text['reference']}"
    else:
        content = "\x1f".join(f"{name}={text[name]}" for name in sorted(text) if text[name])
    digest = hashlib.sha256(f"{organization_id}\x1f{content}".encode()).digest()
    seen[digest] += 1
    if text["reference"] and seen[digest] > 1:
        raise _Bad("reference", f"“{text['reference']}” stands in the file before")
    return f"opening balance {digest.hex()[:40]} {seen[digest]}"


def _amount(text: str) -> Micros:
    try:
        amount = parse_credits(text)
    except NotAnAmount as error:
        raise _Bad("credits", str(error)) from error
    if not 0 < amount <= MOST_MICROS:
        raise _Bad("credits", "more than 0 and at most a billion credits are needed")
    return amount


def _money(text: str) -> NanoUsd:
    try:
        amount = parse_usd(text or "0")
    except NotAnAmount as error:
        raise _Bad("paid_usd", str(error)) from error
    if amount < 0:
        raise _Bad("paid_usd", "an amount is not negative")
    return amount


def _priority(text: str) -> int:
    if not text:
        return USUAL_PRIORITY
    if not (text.isascii() and text.isdigit() and int(text) <= 32767):
        raise _Bad("priority", "a whole number from 0 to 32767 is needed")
    return int(text)


def _instant(column: str, text: str) -> datetime | None:
    try:
        instant = datetime.fromisoformat(text) if text else None
    except ValueError:
        raise _Bad(column, f"“{text}” is no date or time like 2027-01-31 or 2027-01-31T12:00:00Z") from None
    return instant.replace(tzinfo=UTC) if instant is not None and instant.tzinfo is None else instant


def _choice(column: str, text: str, choices: dict[str, Any]) -> Any:
    if text not in choices:
        raise _Bad(column, f"“{text}” is none of {', '.join(each for each in choices if each)}")
    return choices[text]


class _Places:
    """Organizations and members, each looked up once."""

    def __init__(self, database: db.Database) -> None:
        self._database = database
        self._organizations: dict[str, Organization] = {}
        self._members: dict[tuple[UUID, str], UUID] = {}

    async def find(self, slug: str | None, email: str) -> tuple[Organization, UUID | None]:
        """(organization, owner of a personal balance or None)"""
        if not slug:
            raise _Bad("organization", "name an organization here, or for all rows with --org")
        organization = await self._organization(slug)
        if not email or organization.kind == "individual":
            if organization.kind != "individual" and not organization.is_shared_token_pool:
                raise _Bad("user", "members of this organization have balances of their own: name the member")
            return organization, None
        return organization, await self._member(organization, email)

    async def _organization(self, slug: str) -> Organization:
        if slug not in self._organizations:
            try:
                async with self._database.platform() as conn:
                    found = await find_organization_id(conn, slug)
                    self._organizations[slug] = await get_organization(conn, organization_id=found)
            except OrganizationNotFound:
                raise _Bad("organization", f"there is no organization “{slug}”") from None
        return self._organizations[slug]

    async def _member(self, organization: Organization, email: str) -> UUID:
        place = organization.organization_id, email
        if place not in self._members:
            try:
                address = Address.of(email, self._database.settings)
                async with self._database.tenant(organization.organization_id) as conn:
                    member = await find_membership_by_email(
                        conn, organization_id=organization.organization_id, email=address.email
                    )
            except (InvalidEmail, MemberNotFound):
                raise _Bad("user", f"“{email}” is no member of {organization.slug}") from None
            self._members[place] = member.user_id
        return self._members[place]
