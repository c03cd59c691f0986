"""Rules of alerts: which levels of what are told, and to whom."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.identity.addresses import normalize_email
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.alerts")
READERS: Final = ("concerned", "lead", "admins", "finance")
MOST: Final = 20
COLLECT_MINUTES: Final = 5
LONGEST_COLLECT_MINUTES: Final = 1_440

Measure = Literal["percent", "left"]


class Watches(StrEnum):
    """What a rule is about: pools, members' shares of one, or caps."""

    POOL = "pool"
    ALLOCATION = "allocation"
    LIMIT = "limit"


class InvalidRule(Problem):
    """A rule has up to 20 levels (1 to 100 %, or amounts left), readers that exist, and up to 20 addresses."""

    status, code, title = 422, "invalid_alert_rule", "This rule cannot be set"


class UnknownSubject(Problem):
    """No such pool, share or limit in this organization."""

    status, code, title = 404, "alert_subject_not_found", "There is no such pool, share or limit"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One rule. thresholds: percent used, or what is left in micros or counts; is_default: nobody has set it."""

    rule_id: UUID
    watches: Watches
    object_id: UUID | None
    measure: str
    thresholds: tuple[int, ...]
    readers: tuple[str, ...]
    addresses: tuple[str, ...]
    collect_minutes: int
    created_at: datetime | None
    is_default: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreseen:
    """How often a level would have been told, and of how many balances."""

    threshold: int
    times: int
    balances: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Alert:
    """What was told."""

    event_id: UUID
    kind: str
    object_kind: str
    object_id: UUID
    sequence: int
    payload: dict[str, Any]
    happened_at: datetime

    @property
    def title(self) -> str:
        return str(self.payload.get("title", self.kind))


async def list_rules(conn: db.Connection, *, organization_id: UUID) -> list[Rule]:
    """What is in force, the defaults included where nothing is set."""
    return await db.fetch_all(conn, Rule, QUERIES.rules, organization_id=organization_id)


async def set_rule(
    conn: db.Connection,
    *,
    organization_id: UUID,
    watches: Watches,
    thresholds: Sequence[int],
    by: Actor,
    object_id: UUID | None = None,
    measure: Measure = "percent",
    readers: Sequence[str] = ("concerned",),
    addresses: Sequence[str] = (),
    collect_minutes: int = COLLECT_MINUTES,
) -> UUID:
    """Set what is told of one pool, share or limit, or of all that have no rule of their own (object_id None).

    It takes the place of the rule with the same measure. No thresholds: nothing is told. Levels that are reached are
    told at once, since the rule is new.

    Raises:
        InvalidRule, UnknownSubject, InvalidEmail
    """
    _check(thresholds, measure, readers, addresses, collect_minutes)
    place: dict[str, Any] = {"organization_id": organization_id, "watches": watches, "object_id": object_id}
    if object_id is not None:
        place["object_id"] = object_id = await _balance_of(conn, place)
    await db.execute(conn, QUERIES.end_rule, **place, measure=measure)
    rule_id = uuid7()
    await db.execute(
        conn,
        QUERIES.add_rule,
        **place,
        rule_id=rule_id,
        measure=measure,
        thresholds=sorted(set(thresholds)),
        readers=list(dict.fromkeys(readers)),
        addresses=[normalize_email(each) for each in addresses],
        collect_minutes=collect_minutes,
        created_by=by.user_id,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="alert_rule.set",
        object_id=rule_id,
        new={
            "watches": watches,
            "of": object_id,
            "measure": measure,
            "thresholds": thresholds,
            "readers": readers,
            "collect_minutes": collect_minutes,
        },
    )
    return rule_id


async def end_rules(
    conn: db.Connection, *, organization_id: UUID, watches: Watches, by: Actor, object_id: UUID | None = None
) -> int:
    """Take back what was set, so that the more general rule or the default is in force again; how many rules."""
    place: dict[str, Any] = {"organization_id": organization_id, "watches": watches, "object_id": object_id}
    if object_id is not None:
        place["object_id"] = await _balance_of(conn, place)
    ended = await db.fetch_values(conn, QUERIES.end_rule, **place, measure=None)
    for rule_id in ended:
        await record(conn, organization_id=organization_id, by=by, action="alert_rule.ended", object_id=rule_id)
    return len(ended)


async def list_alerts(conn: db.Connection, *, organization_id: UUID, most: int = 50) -> list[Alert]:
    """What was told, newest first."""
    return await db.fetch_all(conn, Alert, QUERIES.told, organization_id=organization_id, most=most)


async def preview(
    conn: db.Connection,
    *,
    organization_id: UUID,
    watches: Watches,
    thresholds: Sequence[int],
    since: datetime,
    measure: Measure = "percent",
    object_id: UUID | None = None,
) -> list[Foreseen]:
    """How often each level would have been told since an instant.

    Of what has periods, each period counts by how full it was in the end; of what has none (pools, shares given once),
    what it is now counts once.
    """
    _check(thresholds, measure, (), (), 0)
    found = await db.fetch_all(
        conn,
        _Row,
        QUERIES.preview,
        organization_id=organization_id,
        watches=watches,
        thresholds=list(thresholds),
        measure=measure,
        since=since,
        object_id=object_id,
    )
    by_threshold = {row.threshold: row for row in found}
    ordered = sorted(set(thresholds), reverse=measure == "left")
    rows = [(each, by_threshold.get(each)) for each in ordered]
    return [
        Foreseen(threshold=each, times=row.times if row else 0, balances=row.balances if row else 0)
        for each, row in rows
    ]


async def _balance_of(conn: db.Connection, place: dict[str, Any]) -> UUID:
    """What a rule goes by: the balance of a pool, share or limit.

    Raises:
        UnknownSubject
    """
    found = await db.fetch_value(conn, QUERIES.balance_of, **place)
    if found is None:
        raise UnknownSubject("Those there are: bursar credits show, bursar credits allocations, bursar caps list")
    assert isinstance(found, UUID)
    return found


@dataclass(frozen=True, slots=True)
class _Row:
    watches: str
    threshold: int
    times: int
    balances: int


def _check(
    thresholds: Sequence[int], measure: str, readers: Sequence[str], addresses: Sequence[str], collect_minutes: int
) -> None:
    """Raises InvalidRule."""
    lowest, highest = (1, 100) if measure == "percent" else (0, 2**62)
    if len(thresholds) > MOST or any(not lowest <= each <= highest for each in thresholds):
        raise InvalidRule(f"Up to {MOST} levels, each from 1 to 100 percent or an amount left.")
    unknown = [each for each in readers if each not in READERS]
    if unknown:
        raise InvalidRule(f"“{unknown[0][:50]}” is nobody. Readers are {', '.join(READERS)}.")
    if len(addresses) > MOST:
        raise InvalidRule(f"Up to {MOST} addresses.")
    if not 0 <= collect_minutes <= LONGEST_COLLECT_MINUTES:
        raise InvalidRule("E-mails collect for 0 minutes to a day.")
