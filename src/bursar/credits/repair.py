"""Mending balances: what is derived from ledger, attribution, holds and grants is set to what these say.

What differs is what `bursar verify` finds; what it expects is what is set, under the gate, so that no credits move
meanwhile. The ledger itself is never touched: where it contradicts itself, that is said and left alone.
"""

import re
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import psycopg

from bursar import db
from bursar.audit.events import Actor, record
from bursar.credits.verify import CHECKS, Finding, verify

SQL: Final = db.load_queries("bursar.credits", "repair.sql")
MOST_TURNS: Final = 50
"""Mends follow from each other (a pool's limit, then its open part's), so that all is looked through again."""


@dataclass(frozen=True, slots=True)
class Difference:
    """A finding, and whether it is mended; of one that is not: whether it can be."""

    invariant: str
    organization_id: UUID
    subject: str
    expected: str
    found: str
    mended: bool
    repairable: bool


@dataclass(frozen=True, slots=True)
class _Balance:
    limit_amount: int
    used_amount: int
    held_amount: int
    excess_amount: int


@dataclass(frozen=True, slots=True)
class _Share:
    balance_id: UUID
    used_amount: int
    held_amount: int | None = None


@dataclass(frozen=True, slots=True)
class _Grant:
    """brought: what ever came into it less what left it otherwise than by use. paid: for its whole amount."""

    grant_id: UUID
    state: str
    left_micros: int
    value_left_nano_usd: int
    is_over: bool
    is_booked: bool
    brought_micros: int
    amount_micros: int
    paid_nano_usd: int
    brought_nano_usd: int


@dataclass(frozen=True, slots=True)
class Burn:
    """A stretch of a pool's running total, the grant that paid it, and from which of its micros on."""

    start_micros: int
    end_micros: int
    grant_id: UUID
    value_nano_usd: int = 0
    grant_from_micros: int = 0
    poured_at: datetime | None = None
    """None: of one that was missing."""
    reason: str = "unknown"


@dataclass(frozen=True, slots=True)
class _Pour:
    poured_micros: int
    limit_amount: int
    used_amount: int


class CannotTell(Exception):
    """What the value should be does not follow from what there is."""


async def repair(database: db.Database, *, organization_id: UUID, by: Actor, apply: bool = False) -> list[Difference]:
    """What differs in one organization; with `apply` it is mended first, in one transaction with an audit event."""
    if not apply:
        async with database.platform() as conn:
            found = await verify(conn, organization_id=organization_id)
        names = {each.invariant for each in found}
        return [_difference(each, mended=False, follows=FOLLOWS.get(each.invariant) in names) for each in found]
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        await conn.execute("set local role bursar_owner")
        await conn.execute("set local lock_timeout = '30s'")
        await db.execute(conn, SQL.lock, organization_id=organization_id)
        mended, left = await _mend_all(conn, organization_id)
        if mended:
            await record(
                conn,
                organization_id=organization_id,
                by=by,
                action="books.repaired",
                object_id=organization_id,
                old={_name(each): each.found for each in mended},
                new={_name(each): each.expected for each in mended},
            )
        await conn.commit()
    return [*(_difference(each, mended=True) for each in mended), *(_difference(each, mended=False) for each in left)]


def _difference(finding: Finding, *, mended: bool, follows: bool = False) -> Difference:
    return Difference(
        finding.invariant,
        finding.organization_id,
        finding.subject,
        finding.expected,
        finding.found,
        mended=mended,
        repairable=follows or finding.invariant in MENDERS,
    )


def _name(finding: Finding) -> str:
    return f"{finding.invariant}: {finding.subject}"


async def _mend_all(conn: db.Connection, organization_id: UUID) -> tuple[list[Finding], list[Finding]]:
    """(what was mended, what is left). The order of MENDERS is that in which one follows from the other."""
    mended: list[Finding] = []
    given_up: set[Finding] = set()
    for _ in range(MOST_TURNS):
        finding = await _next(conn, organization_id, given_up)
        if finding is None:
            break
        for each in finding:
            if await _is_mended(conn, each):
                mended.append(each)
            else:
                given_up.add(each)
    return mended, await _findings(conn, organization_id, CHECKS)


async def _next(conn: db.Connection, organization_id: UUID, given_up: set[Finding]) -> list[Finding] | None:
    """The findings of the first invariant that has some."""
    for name in MENDERS:
        found = [each for each in await _findings(conn, organization_id, [name]) if each not in given_up]
        if found:
            return found
    return None


async def _findings(conn: db.Connection, organization_id: UUID, names: Iterable[str]) -> list[Finding]:
    found: list[Finding] = []
    for name in names:
        if name in CHECKS:
            sql = f"select '{name}' as invariant, organization_id, subject, expected, found from ({CHECKS[name]}) o"
            sql += " where organization_id = %(organization_id)s"
            found += await db.fetch_all(conn, Finding, sql, organization_id=organization_id)
    return found


async def _is_mended(conn: db.Connection, finding: Finding) -> bool:
    """False where it does not follow what the value should be, or where the table refuses it."""
    try:
        async with conn.transaction():
            await MENDERS[finding.invariant](conn, finding)
    except (psycopg.errors.IntegrityError, CannotTell):
        return False
    return True


# ---------------------------------------------------------------------------------------------- balances


def _id_in(subject: str) -> UUID:
    match = re.search(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}", subject)
    assert match is not None, subject
    return UUID(match[0])


def _start_in(subject: str) -> str:
    return subject.partition(" from ")[2] or "-infinity"


async def _set(conn: db.Connection, organization_id: UUID, balance_id: UUID, start: str, **changes: int) -> None:
    where = {"organization_id": organization_id, "balance_id": balance_id, "period_start": start}
    row = await db.fetch_one(conn, _Balance, SQL.balance, **where)
    values = {"limit_amount": row.limit_amount, "used_amount": row.used_amount, "held_amount": row.held_amount}
    await db.execute(conn, SQL.set_balance, **where, **{**values, **changes})


Mender = Callable[[db.Connection, Finding], Awaitable[None]]


def _sets(field: str) -> Mender:
    """One figure of the balance that the finding names is set to what is expected."""

    async def mend(conn: db.Connection, finding: Finding) -> None:
        balance_id, start = _id_in(finding.subject), _start_in(finding.subject)
        await _set(conn, finding.organization_id, balance_id, start, **{field: int(finding.expected)})

    return mend


async def _set_open_limit(conn: db.Connection, finding: Finding) -> None:
    where = {"organization_id": finding.organization_id, "pool_id": _id_in(finding.subject)}
    part = await db.fetch_one(conn, _Share, SQL.open_part, **where)
    await _set(conn, finding.organization_id, part.balance_id, "-infinity", limit_amount=int(finding.expected))


async def _set_parts(conn: db.Connection, finding: Finding) -> None:
    """Shares whose use the attribution tells, then the open part: the rest of its pool."""
    where = {"organization_id": finding.organization_id, "pool_id": _id_in(finding.subject)}
    for share in await db.fetch_all(conn, _Share, SQL.reserved_use, **where):
        await _set(conn, finding.organization_id, share.balance_id, "-infinity", used_amount=share.used_amount)
    part = await db.fetch_one(conn, _Share, SQL.open_part, **where)
    held = part.held_amount or 0
    await _set(
        conn, finding.organization_id, part.balance_id, "-infinity", used_amount=part.used_amount, held_amount=held
    )


# ---------------------------------------------------------------------------------------------- grants


async def _mend_pool(conn: db.Connection, finding: Finding) -> None:
    """Burns, what grants have left, and up to where was poured: each follows from the other two and the ledger."""
    pool_id = _id_in(finding.subject)
    if finding.subject.startswith("grant "):
        pool_id = await db.fetch_value(
            conn, SQL.pool_of_grant, organization_id=finding.organization_id, grant_id=pool_id
        )
    where = {"organization_id": finding.organization_id, "pool_id": pool_id}
    pour = await db.fetch_one(conn, _Pour, SQL.pour, **where)
    grants = await db.fetch_all(conn, _Grant, SQL.grants, **where)
    burns = await db.fetch_all(conn, Burn, SQL.burns, **where)
    true = valued(true_burns(burns, grants, pour), grants)
    await _write_burns(conn, where, burns, true)
    poured = true[-1].end_micros if true else 0
    await db.execute(conn, SQL.set_poured, **where, poured_micros=poured)
    for grant in grants:
        own = [burn for burn in true if burn.grant_id == grant.grant_id]
        await _write_grant(conn, finding.organization_id, grant, own)


def true_burns(burns: list[Burn], grants: list[_Grant], pour: _Pour) -> list[Burn]:
    """The stretches as they must have been.

    Stretches, what the states say is left, and up to where was poured tell the same in three ways; two outvote one.

    Raises:
        CannotTell: stretches are wrong, and what they were does not follow from the states.
    """
    booked = [grant for grant in grants if grant.is_booked]
    burnt = {grant.grant_id: grant.brought_micros - grant.left_micros for grant in booked}
    end, told = max((burn.end_micros for burn in burns), default=0), sum(burnt.values())
    is_sound = _tile(burns) and end <= pour.used_amount and _fits(burns, booked)
    if is_sound and told != end and told != pour.poured_micros:
        return burns
    if is_sound and (end == pour.poured_micros != told or _totals(burns) == _without_zeros(burnt)):
        return burns
    for candidate in _candidates(burns, burnt, told):
        if _tile(candidate) and _totals(candidate) == _without_zeros(burnt):
            return candidate
    if is_sound:
        return burns
    raise CannotTell


def _without_zeros(burnt: dict[UUID, int]) -> dict[UUID, int]:
    return {key: micros for key, micros in burnt.items() if micros}


def _candidates(burns: list[Burn], burnt: dict[UUID, int], end: int) -> Iterable[list[Burn]]:
    """Stretches with their ends, their starts, their grants, or those that are missing put right."""
    starts = [*(burn.start_micros for burn in burns[1:]), end]
    yield [replace(burn, end_micros=to) for burn, to in zip(burns, starts, strict=False)]
    ends = [0, *(burn.end_micros for burn in burns[:-1])]
    yield [replace(burn, start_micros=to) for burn, to in zip(burns, ends, strict=False)]
    for place, burn in enumerate(burns):
        for grant_id in burnt:
            yield [*burns[:place], replace(burn, grant_id=grant_id), *burns[place + 1 :]]
    yield _filled(burns, burnt, end)


def _filled(burns: list[Burn], burnt: dict[UUID, int], end: int) -> list[Burn]:
    """Gaps are paid by the grants of which burnt credits are missing, in burn order."""
    totals = _totals(burns)
    missing = {key: micros - totals.get(key, 0) for key, micros in burnt.items() if micros > totals.get(key, 0)}
    found: list[Burn] = []
    at = 0
    for burn in [*burns, Burn(end, end, UUID(int=0))]:
        while at < burn.start_micros and missing:
            grant_id = next(iter(missing))
            take = min(missing[grant_id], burn.start_micros - at)
            found.append(Burn(at, at + take, grant_id))
            missing[grant_id] -= take
            at += take
            if not missing[grant_id]:
                del missing[grant_id]
        if burn.end_micros > burn.start_micros:
            found.append(burn)
            at = burn.end_micros
    return found


def valued(burns: list[Burn], grants: list[_Grant]) -> list[Burn]:
    """With the money that each stretch took along, where that does not add up with what its grant has left.

    What a grant has left, its stretches, and its price by the micro tell the same; two outvote one. Of stretches that
    were missing the last gets what remains, in nano-dollars, so that nothing is lost to rounding.
    """
    found: dict[Burn, Burn] = {}
    for grant in grants:
        own = [burn for burn in burns if burn.grant_id == grant.grant_id]
        spent = grant.brought_nano_usd - grant.value_left_nano_usd
        at = 0
        priced: list[Burn] = []
        for burn in own:
            start = burn.grant_from_micros if burn.poured_at else at
            at = start + burn.end_micros - burn.start_micros
            value = _value_upto(grant, at) - _value_upto(grant, start)
            priced.append(replace(burn, grant_from_micros=start, value_nano_usd=value))
        missing = [place for place, burn in enumerate(own) if burn.poured_at is None]
        true = own
        if missing:
            true = [each if burn.poured_at is None else burn for burn, each in zip(own, priced, strict=True)]
            rest = spent - sum(burn.value_nano_usd for burn in true)
            last = true[missing[-1]]
            true[missing[-1]] = replace(last, value_nano_usd=max(0, last.value_nano_usd + rest))
        elif sum(burn.value_nano_usd for burn in own) != spent == sum(burn.value_nano_usd for burn in priced):
            true = priced
        found |= dict(zip(own, true, strict=True))
    return [found.get(burn, burn) for burn in burns]


def _value_upto(grant: _Grant, micros: int) -> int:
    """Money paid for the first micros of a grant, as credits.value_upto reckons it: rounded down."""
    return grant.paid_nano_usd * micros // grant.amount_micros


def _tile(burns: list[Burn]) -> bool:
    starts = [burn.start_micros for burn in burns]
    return starts == [0, *(burn.end_micros for burn in burns)][: len(burns)] and all(
        burn.end_micros > burn.start_micros for burn in burns
    )


def _fits(burns: list[Burn], booked: list[_Grant]) -> bool:
    brought = {grant.grant_id: grant.brought_micros for grant in booked}
    return all(micros <= brought.get(key, 0) for key, micros in _totals(burns).items())


def _totals(burns: list[Burn]) -> dict[UUID, int]:
    totals: dict[UUID, int] = {}
    for burn in burns:
        totals[burn.grant_id] = totals.get(burn.grant_id, 0) + burn.end_micros - burn.start_micros
    return totals


async def _write_burns(conn: db.Connection, where: dict[str, Any], found: list[Burn], true: list[Burn]) -> None:
    """Change as little as can be."""
    if found == true:
        return
    kept = set(true)
    for burn in found:
        if burn not in kept:
            await db.execute(conn, SQL.drop_burns, **where, start_micros=burn.start_micros)
    there = set(found)
    for burn in true:
        if burn not in there:
            await db.execute(
                conn,
                SQL.add_burn,
                **where,
                start_micros=burn.start_micros,
                end_micros=burn.end_micros,
                grant_id=burn.grant_id,
                value_nano_usd=burn.value_nano_usd,
                grant_from_micros=burn.grant_from_micros,
                poured_at=burn.poured_at,
                reason=burn.reason,
            )


async def _write_grant(conn: db.Connection, organization_id: UUID, grant: _Grant, burns: list[Burn]) -> None:
    left = grant.brought_micros - sum(burn.end_micros - burn.start_micros for burn in burns)
    state = grant.state
    if not grant.is_booked:
        state = "ended" if grant.state == "ended" else "scheduled"
    elif left:
        state = "lingering" if grant.is_over else "active"
    elif grant.state != "spent":
        state = "ended"
    value = grant.value_left_nano_usd
    if grant.is_booked:
        value = grant.brought_nano_usd - sum(burn.value_nano_usd for burn in burns)
    if (left, state, value) != (grant.left_micros, grant.state, grant.value_left_nano_usd):
        await db.execute(
            conn,
            SQL.set_grant,
            organization_id=organization_id,
            grant_id=grant.grant_id,
            left_micros=left,
            state=state,
            value_left_nano_usd=value,
        )


# ---------------------------------------------------------------------------------------------- events


async def _wake(conn: db.Connection, finding: Finding) -> None:
    where = {"organization_id": finding.organization_id, "at": finding.expected}
    if finding.subject == "gate":
        await db.execute(conn, SQL.wake_gate, **where)
    elif finding.subject.startswith("gate"):
        await db.execute(conn, SQL.wake_gate_for_limits, **where)
    else:
        await db.execute(conn, SQL.wake_pool, **where, pool_id=_id_in(finding.subject))


MENDERS: Final[dict[str, Mender]] = {
    "pool_limit_is_the_ledger": _sets("limit_amount"),
    "shares_have_their_size": _sets("limit_amount"),
    "raises_are_in_their_limits": _sets("limit_amount"),
    "pool_use_is_the_attribution": _sets("used_amount"),
    "limit_use_is_the_attribution": _sets("used_amount"),
    "cap_use_is_the_attribution": _sets("used_amount"),
    "held_is_the_open_holds": _sets("held_amount"),
    "parts_add_up_to_their_pool": _set_parts,
    "open_part_is_what_nobody_claims": _set_open_limit,
    "burns_tile": _mend_pool,
    "grants_add_up": _mend_pool,
    "left_is_the_limit_beyond_the_pour": _mend_pool,
    "money_adds_up": _mend_pool,
    "events_are_awaited": _wake,
}
"""By invariant what mends an offence against it, in the order in which one follows from another."""

FOLLOWS: Final = {"positions_tile": "pool_use_is_the_attribution"}
"""Offences that may be nothing but another one's consequence."""
