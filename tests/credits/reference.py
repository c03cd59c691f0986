"""A plain reference of the treasury: integers and dictionaries, one request after another, no SQL and no cleverness.

It says what the money functions must do, not how. Where it looks like them (two passes over a batch, chains that are
remembered until something changes) that order is part of the promise. Amounts are integers of any unit; instants are
aware datetimes; ids are UUIDs; None is "never", "for ever" or "nobody".
"""

import re
from calendar import monthrange
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from hashlib import md5
from itertools import pairwise
from typing import Any
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

AUTHORIZE, EXTEND, SETTLE, RELEASE, DEDUCT = 1, 2, 3, 4, 5
ACCEPTED, REFUSED, WAIT, KNOWN, NO_HOLD, KEY_REUSED, NOT_ALLOWED, KNOWN_REFUSED = range(8)
SENT, OWN_KEY, STREAMED, MAY_WAIT, REPEATED, BY_EXPIRY = 1, 2, 8, 16, 32, 64
CREDITS, CALLS, TOKENS = 0, 1, 2
METRICS = {"credits": CREDITS, "calls": CALLS, "tokens": TOKENS}
MOST = 10**15

EARLIEST = datetime.min.replace(tzinfo=UTC)
LATEST = datetime.max.replace(tzinfo=UTC)
NOBODY = UUID(int=0)


class Refused(Exception):
    """A command that is refused; code is the SQLSTATE."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


# ---------------------------------------------------------------------------------------------- words


@cache
def _pattern(like: str) -> re.Pattern[str]:
    parts = re.findall(r"\\(.)|(.)", like, re.DOTALL)
    plain = (re.escape(escaped) if escaped else {"%": ".*", "_": "."}.get(c, re.escape(c)) for escaped, c in parts)
    return re.compile("".join(plain), re.DOTALL)


What = tuple[str | None, str | None]
"""What a request asks: its model, and the feature it is for."""


def admits(pattern: str | None, what: What) -> bool:
    """A filter (LIKE pattern of models, or after # of features; None: everything) admits a request."""
    if pattern is None:
        return True
    model, feature = what
    name, like = (feature, pattern[1:]) if pattern.startswith("#") else (model, pattern)
    return name is not None and _pattern(like).fullmatch(name) is not None


def _instant(local: datetime, zone: ZoneInfo) -> datetime:
    """A wall-clock time as an instant: the second one where it comes twice, after the gap where it never comes."""
    return local.replace(tzinfo=zone, fold=1 if _comes_twice(local, zone) else 0).astimezone(UTC)


def _comes_twice(local: datetime, zone: ZoneInfo) -> bool:
    first, second = (local.replace(tzinfo=zone, fold=n) for n in (0, 1))
    return second.astimezone(UTC).astimezone(zone).replace(tzinfo=None) == local and first.utcoffset() != (
        second.utcoffset()
    )


def _local(at: datetime, zone: ZoneInfo) -> datetime:
    """What the clocks of a zone show at an instant."""
    return at.astimezone(zone).replace(tzinfo=None)


def occurrence(anchor: datetime, zone: ZoneInfo, unit: str, every: int, number: int) -> datetime:
    """When a schedule comes for the nth time, by the clocks of a zone, always counted from the anchor."""
    if number == 0:
        return anchor
    first = _local(anchor, zone)
    if unit in ("day", "week"):
        return _instant(first + timedelta(days=number * every * (7 if unit == "week" else 1)), zone)
    return _instant(_months_later(first, number * every * (12 if unit == "year" else 1)), zone)


def _floor(period: str, local: datetime) -> datetime:
    day = local.replace(hour=0, minute=0, second=0, microsecond=0)
    return {"day": day, "week": day - timedelta(days=day.weekday()), "month": day.replace(day=1)}[period]


def _months_later(local: datetime, months: int) -> datetime:
    year, month = divmod(local.year * 12 + local.month - 1 + months, 12)
    return local.replace(year=year, month=month + 1, day=min(local.day, monthrange(year, month + 1)[1]))


def period_of(period: str, zone_name: str, now: datetime, anchor: datetime) -> tuple[datetime, datetime]:
    """Start and end of the day, week (from Monday), month or cycle around an instant, by the clocks of a zone."""
    if period == "none":
        return EARLIEST, LATEST
    zone = ZoneInfo(zone_name)
    if period == "cycle":
        first = anchor.astimezone(zone).replace(tzinfo=None)
        cycles = [_instant(_months_later(first, n), zone) for n in range(-30, 31)]
        return next((a, b) for a, b in pairwise(cycles) if a <= now < b)
    this = _floor(period, now.astimezone(zone).replace(tzinfo=None))
    bounds = [
        _instant(each, zone)
        for each in (_floor(period, this - timedelta(days=1)), this, _floor(period, this + timedelta(days=31)))
    ]
    if period != "month":
        bounds[2] = _instant(this + timedelta(days=1 if period == "day" else 7), zone)
    return (bounds[1], bounds[2]) if bounds[1] <= now else (bounds[0], bounds[1])


# ---------------------------------------------------------------------------------------------- what there is


@dataclass
class Balance:
    """What may be used, is used and is held, of one thing in one period."""

    kind: str
    limit: int
    stops: bool = True
    start: datetime = EARLIEST
    end: datetime = LATEST
    used: int = 0
    held: int = 0

    @property
    def room(self) -> int:
        """What is left; negative when it is over."""
        return self.limit - self.used - self.held

    @property
    def excess(self) -> int:
        """By how much it is over."""
        return max(0, -self.room)

    @property
    def is_blocked(self) -> bool:
        """Nothing more may be authorized."""
        return self.stops and self.excess > 0


@dataclass
class Grant:
    """Credits added to a pool."""

    grant_id: UUID
    pool_id: UUID
    amount: int
    priority: int
    is_free: bool
    effective: datetime
    expires: datetime
    created: datetime
    left: int
    state: str = "scheduled"
    burnt: int = 0
    expired: int = 0
    voided: int = 0
    gone: int = 0  # rolled over or transferred
    lapsed: int = 0  # had been left at its end
    rolls: tuple[int, int] | None = None  # least and most that rolls over
    rolls_until: datetime = LATEST
    refunded: int = 0
    parent: UUID | None = None
    is_part: bool = False  # of its parent, since a transfer or a switch

    def rolls_over(self, left: int) -> int:
        """How much goes on at its end."""
        return min(self.rolls[1], max(self.rolls[0], left)) if self.rolls else 0

    @property
    def burn_order(self) -> tuple[Any, ...]:
        """Priority, soonest expiry, free before paid, effective, created, id."""
        return (self.priority, self.expires, not self.is_free, self.effective, self.created, self.grant_id)


@dataclass
class Pool:
    """A pool; its balance has its id."""

    pool_id: UUID
    kind: str
    owner: UUID | None
    filter: str | None
    created: datetime
    open_part: UUID | None
    burns: list[tuple[UUID, int]] = field(default_factory=list)  # in order; their sum is what was poured
    is_closed: bool = False
    leaving: dict[UUID, tuple[int, UUID]] = field(default_factory=dict)
    """Of a closed pool: what each request that was running then may use here, and to which pool goes what it leaves."""
    rests: dict[UUID, int] = field(default_factory=dict)
    """Of those that are over: what the other pool is still to get; negative: owes this one."""
    is_due: bool = False


@dataclass
class Allocation:
    """A user's share of a shared pool."""

    allocation_id: UUID
    pool_id: UUID
    user: UUID
    kind: str
    period: str
    amount: int
    when_empty: str
    is_ended: bool = False
    carry: int = 0
    renews_at: datetime = LATEST
    began: datetime = EARLIEST
    opening: int = 0
    """What was used and held when its period began, with what was carried over and given, taken or refunded since."""


@dataclass
class Limit:
    """A cap or budget. each: a default for those of its scope, within: of a team or department; amount None: none."""

    limit_id: UUID
    scope: str
    scope_id: UUID | None
    metric: str
    filter: str | None
    period: str
    amount: int | None
    action: str
    is_ended: bool = False
    each: bool = False
    within: tuple[str | None, UUID | None] = (None, None)
    balance_id: UUID | None = None
    created: datetime = EARLIEST
    ended: datetime = LATEST

    @property
    def kind(self) -> tuple[Any, ...]:
        """What a default and what takes its place have in common."""
        return (self.scope, self.metric, self.filter, self.period, self.action == "warns")


@dataclass
class Schedule:
    """A grant that comes again and again. lasts: how long each can be spent; None: until the next, or for ever."""

    schedule_id: UUID
    pool_id: UUID
    amount: int
    priority: int
    is_free: bool
    zone: ZoneInfo
    anchor: datetime
    unit: str
    every: int
    lasts: timedelta | None
    is_lasting: bool
    ends: datetime
    rolls: tuple[int, int] | None
    number: int = 0
    next_at: datetime = LATEST

    def comes(self, number: int) -> datetime:
        """When it comes for the nth time."""
        return occurrence(self.anchor, self.zone, self.unit, self.every, number)

    def lasting(self, at: datetime) -> datetime:
        """The end of what begins at an instant and lasts as its grants do."""
        assert self.lasts is not None
        return _instant(_local(at, self.zone) + self.lasts, self.zone)

    def end_of(self, number: int) -> datetime:
        """When the grant of the nth time ends, and what rolled over from the one before it."""
        if self.is_lasting:
            return LATEST
        return self.comes(number + 1) if self.lasts is None else self.lasting(self.comes(number))


@dataclass
class Policy:
    """When a pool buys more by itself."""

    threshold: int
    amount: int
    ceiling: int
    most_per_hour: int
    state: str = "active"
    declines: int = 0
    next_try: datetime = EARLIEST


@dataclass
class Purchase:
    """One that a pool made by itself."""

    pool_id: UUID
    amount: int
    requested: datetime
    state: str = "pending"


@dataclass
class Wish:
    """A member's request for more than a limit gives."""

    balance_id: UUID
    user: UUID
    amount: int
    until: datetime
    lapses: datetime
    state: str = "open"


@dataclass
class Campaign:
    """What its codes give, to whom and how often; None: as often as anybody likes. days: how long the credits last."""

    amount: int
    priority: int
    starts: datetime
    ends: datetime
    credits_end: datetime
    days: int | None
    per_code: int
    per_person: int
    per_day: int | None
    in_all: int | None
    is_revoked: bool = False


@dataclass
class Code:
    """A code, and who redeemed it."""

    campaign_id: UUID
    is_revoked: bool = False
    redeemed: dict[UUID, tuple[UUID, datetime]] = field(default_factory=dict)


@dataclass
class Charge:
    """What a request was charged: from which stretches of which pools' running totals, in order."""

    draws: list[tuple[UUID, int, int]] = field(default_factory=list)
    parts: list["Part"] = field(default_factory=list)
    """Of which charge each is; a request may be charged again after it was by estimate, or refunded."""
    backs: list[int] = field(default_factory=list)
    """How much of the end of each was refunded."""


@dataclass(frozen=True)
class Part:
    """One charge of a request."""

    chain: "Chain"
    what: What
    booked: datetime

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes it another one."""
        return id(self.chain), self.what, self.booked


@dataclass(frozen=True)
class Brought:
    """What left a home of one grant. filter: of the pool in which it was."""

    grant_id: UUID
    filter: str | None
    amount: int
    priority: int
    is_free: bool
    effective: datetime
    expires: datetime


@dataclass
class Departure:
    """A person left their home with credits. kind: into what pool they shall go; held: stayed for open holds."""

    kind: str
    parts: list[Brought]
    held: int
    arrived: datetime | None = None

    @property
    def amount(self) -> int:
        """All that left."""
        return sum(part.amount for part in self.parts)


@dataclass
class Raise:
    """An amount on top of a balance's limit for a time."""

    balance_id: UUID
    amount: int
    starts: datetime
    ends: datetime
    state: str = "scheduled"


@dataclass
class Key:
    """An API key."""

    key_id: UUID
    original: UUID
    user: UUID | None
    team: UUID | None = None
    department: UUID | None = None
    expires: datetime | None = None
    revoked: datetime | None = None


@dataclass
class Member:
    """A person in the organization."""

    status: str = "active"
    team: UUID | None = None
    department: UUID | None = None


@dataclass(frozen=True)
class Entry:
    """A balance that a request must pass."""

    balance: tuple[UUID, datetime]
    metric: int = CREDITS
    filter: str | None = None


@dataclass(frozen=True)
class Leg:
    """One way to pay: a pool, with its part and cap."""

    pool_id: UUID
    filter: str | None
    entries: tuple[Entry, ...]


@dataclass
class Chain:
    """What a user and key must pass, as of when it was built."""

    version: int
    valid_until: datetime
    refusal: str | None
    legs: tuple[Leg, ...]
    always: tuple[Entry, ...]
    user: UUID = NOBODY

    def first_leg(self, what: What) -> int | None:
        """The first leg that may pay for a request."""
        return next((n for n, leg in enumerate(self.legs) if admits(leg.filter, what)), None)


@dataclass
class Hold:
    """Credits reserved for a running request."""

    chain: Chain
    legs: list[int]
    leg: int
    tokens: int
    floor: int
    progress: int
    flags: int
    what: What
    is_sent: bool
    placed: datetime
    expires: datetime
    is_split: bool = False

    @property
    def amount(self) -> int:
        """Held over all legs."""
        return sum(self.legs)


@dataclass
class Estimate:
    """What expiry charged by estimate."""

    part: Part
    legs: list[int]
    tokens: int
    flags: int


@dataclass(frozen=True)
class Move:
    """One request to move credits, as in move_batch."""

    organization: UUID
    action: int
    request: UUID | None
    user: UUID | None = None
    key: UUID | None = None
    amount: int = 0
    tokens: int = 0
    mark: int = 0
    lease: int = 600
    flags: int = 0
    model: str | None = "m"
    idempotency_key: str | None = None
    body: bytes | None = None
    feature: str | None = None

    @property
    def what(self) -> What:
        """Its model and feature."""
        return self.model, self.feature


@dataclass(frozen=True)
class Verdict:
    """What was decided."""

    outcome: int
    request: UUID | None
    held: int = 0
    charged: int = 0
    available: int | None = None
    binding: UUID | None = None
    detail: str | None = None


@dataclass
class Answer:
    """A verdict in the making. held: what the request held before; is_booked: decided before the demands."""

    outcome: int | None = None
    request: UUID | None = None
    held: int = 0
    charged: int = 0
    binding: UUID | None = None
    detail: str | None = None
    chain: Chain | None = None
    elder: int | None = None
    is_booked: bool = False
    paid: list[int] | None = None


@dataclass
class Stored:
    """The stored result of a command."""

    body: bytes
    outcome: int
    request: UUID | None
    held: int
    charged: int
    binding: UUID | None
    detail: str | None
    kept_until: datetime


def _copied(value: Any) -> Any:
    """With its own lists and dictionaries, unless it never changes."""
    if not hasattr(value, "__dict__"):
        return value
    new = object.__new__(type(value))
    new.__dict__.update(value.__dict__)
    for name, each in value.__dict__.items():
        if isinstance(each, list | dict):
            new.__dict__[name] = each.copy()
    return new


Like = tuple[int, bool, datetime, datetime]
"""Of a grant: priority, whether it is free, from when until when it can be spent."""


class Names:
    """Ids that the database draws by itself. Here any will do; whoever plays beside a database asks it."""

    def pool(self, kind: str, owner: UUID | None, pattern: str | None) -> tuple[UUID, UUID | None]:
        """Of a pool that was opened, and of its open part."""
        return uuid4(), uuid4() if kind == "shared" else None

    def grant(
        self, pool_id: UUID, parent: UUID | None, amount: int, like: "Like | None" = None, *, is_swept: bool = False
    ) -> UUID:
        """Of a grant that came of another one, or of none. like, is_swept: what tells several of them apart.

        is_swept: a closed pool sent it on; a command that folds first brings its twin right after it.
        """
        return uuid4()


# ---------------------------------------------------------------------------------------------- one organization


@dataclass
class Organization:
    """Everything of one organization. Whoever changes it folds first."""

    organization_id: UUID
    zone: str = "UTC"
    status: str = "active"
    version: int = 1
    pools: dict[UUID, Pool] = field(default_factory=dict)
    grants: dict[UUID, Grant] = field(default_factory=dict)
    allocations: dict[UUID, Allocation] = field(default_factory=dict)
    limits: dict[UUID, Limit] = field(default_factory=dict)
    members: dict[UUID, Member] = field(default_factory=dict)
    keys: dict[UUID, Key] = field(default_factory=dict)
    balances: dict[tuple[UUID, datetime], Balance] = field(default_factory=dict)
    chains: dict[tuple[UUID, UUID], Chain] = field(default_factory=dict)
    holds: dict[UUID, Hold] = field(default_factory=dict)
    charged: dict[UUID, int] = field(default_factory=dict)
    estimates: dict[UUID, Estimate] = field(default_factory=dict)
    stored: dict[str, Stored] = field(default_factory=dict)
    anchor: datetime = EARLIEST
    counters: dict[tuple[Any, ...], UUID] = field(default_factory=dict)
    counted: dict[UUID, tuple[UUID, UUID | None]] = field(default_factory=dict)
    """For which default a balance counted last, and whom."""
    raises: dict[UUID, Raise] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    schedules: dict[UUID, Schedule] = field(default_factory=dict)
    charges: dict[UUID, Charge] = field(default_factory=dict)
    policies: dict[UUID, Policy] = field(default_factory=dict)
    purchases: dict[UUID, Purchase] = field(default_factory=dict)
    wishes: dict[UUID, Wish] = field(default_factory=dict)
    campaigns: dict[UUID, Campaign] = field(default_factory=dict)
    codes: dict[UUID, Code] = field(default_factory=dict)
    departures: dict[UUID, Departure] = field(default_factory=dict)
    arrivals: dict[UUID, tuple[UUID, int]] = field(default_factory=dict)
    """Who came, and with how much."""
    is_shared: bool = True
    """Its members have one balance together."""
    names: Names = field(default_factory=Names)
    periods: dict[UUID, list[Balance]] = field(default_factory=dict)
    of_pool: dict[UUID, list[Grant]] = field(default_factory=dict)
    """Balances by what they are of, and grants by pool, to find them without looking at all."""

    def copied(self) -> "Organization":
        """Another one like it that commands may change without changing this one; with any ids for what they draw."""
        new = replace(self, names=Names(), periods={}, of_pool={})
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name not in ("periods", "of_pool") and isinstance(value, dict):
                setattr(new, each.name, {key: _copied(one) for key, one in value.items()})
        for (balance_id, _), row in new.balances.items():
            new.periods.setdefault(balance_id, []).append(row)
        for grant in new.grants.values():
            new.of_pool.setdefault(grant.pool_id, []).append(grant)
        return new

    # ------------------------------------------------------------------ balances

    def balance(self, balance_id: UUID) -> Balance:
        """A balance without period."""
        return self.balances[balance_id, EARLIEST]

    def reopen(self) -> None:
        """The open part of each pool is what no share claims: a share claims its limit, or what it has where more."""
        for pool in self.pools.values():
            if pool.open_part is None:
                continue
            claimed = 0
            for each in self.allocations.values():
                if each.pool_id == pool.pool_id and each.kind == "reserved":
                    share = self.balance(each.allocation_id)
                    claimed += max(share.limit, share.used + share.held)
            self.balance(pool.open_part).limit = max(0, self.balance(pool.pool_id).limit - claimed)

    def current(self, balance_id: UUID, now: datetime) -> Balance | None:
        """The balance's row for the period around now."""
        return next(
            (b for b in self.periods.get(balance_id, ()) if b.start <= now < b.end),
            None,
        )

    def open_period(self, balance_id: UUID, kind: str, stops: bool, amount: int, period: str, now: datetime) -> Balance:
        """The row of the current period, made when missing; a period keeps the end it began with."""
        row = self.current(balance_id, now)
        if row is None:
            start, end = period_of(period, self.zone, now, self.anchor)
            start = max([start, *(b.end for b in self.periods.get(balance_id, ()))])
            row = Balance(kind, amount, stops, start, end)
            self._put_balance(balance_id, row)
        return row

    def _put_balance(self, balance_id: UUID, row: Balance) -> None:
        self.balances[balance_id, row.start] = row
        self.periods.setdefault(balance_id, []).append(row)

    # ------------------------------------------------------------------ grants and time

    def _add_grant(self, grant: Grant) -> None:
        self.grants[grant.grant_id] = grant
        self.of_pool.setdefault(grant.pool_id, []).append(grant)

    def _grants_of(self, pool: Pool, *states: str) -> list[Grant]:
        found = (g for g in self.of_pool.get(pool.pool_id, ()) if g.state in states)
        return sorted(found, key=lambda g: g.burn_order)

    def pour(self, pool: Pool, at: datetime) -> None:
        """Use is paid by grants in burn order; what is taken back returns to those that paid last."""
        used = self.balance(pool.pool_id).used
        poured = sum(amount for _, amount in pool.burns)
        while poured > used:
            grant_id, amount = pool.burns.pop()
            back = min(amount, poured - used)
            if back < amount:
                pool.burns.append((grant_id, amount - back))
            grant = self.grants[grant_id]
            grant.left += back
            grant.burnt -= back
            if grant.state in ("ended", "spent"):
                grant.state = "lingering" if grant.expires <= at else "active"
            poured -= back
        for grant in self._grants_of(pool, "active", "lingering"):
            take = min(grant.left, used - poured)
            if take > 0:
                pool.burns.append((grant.grant_id, take))
                grant.left -= take
                grant.burnt += take
                poured += take
            if grant.left == 0:
                has_end_before_it = grant.state == "active" and grant.rolls is not None and grant.rolls[0] > 0
                grant.state = "spent" if has_end_before_it else "ended"

    def _expire(self, pool: Pool, at: datetime) -> None:
        """Grants past their end keep what holds placed before need, in burn order; the rest rolls over or is lost."""
        before, limit = 0, self.balance(pool.pool_id).limit
        for grant in self._grants_of(pool, "active", "lingering", "spent"):
            if grant.expires <= at:
                held = sum(
                    amount
                    for hold in self.holds.values()
                    if hold.placed < grant.expires
                    for leg, amount in zip(hold.chain.legs, hold.legs, strict=True)
                    if leg.pool_id == pool.pool_id
                )
                keep = min(grant.left, max(0, held - before))
                self._lapse(pool, grant, grant.left - keep, at)
            before += grant.left
        if self.balance(pool.pool_id).limit > limit:
            self._came(pool)

    def _lapse(self, pool: Pool, grant: Grant, lapse: int, at: datetime) -> None:
        """Of what a grant had left at its end and no hold keeps, as much rolls over as its bounds say of all of it."""
        earlier = grant.rolls_over(grant.lapsed) if grant.state == "lingering" else 0
        grant.lapsed += lapse
        rolls = grant.rolls_over(grant.lapsed) - earlier if grant.rolls_until > at else 0
        kept = min(lapse, rolls)
        grant.left -= lapse
        grant.gone += kept
        grant.expired += lapse - kept
        grant.state = "lingering" if grant.left else "ended"
        self.balance(pool.pool_id).limit += rolls - lapse
        if rolls > lapse:
            self.version += 1
        if rolls:
            others = sum(g.parent == grant.grant_id and g.pool_id == pool.pool_id for g in self.grants.values())
            name = md5(f"{grant.grant_id} roll-over {others}".encode(), usedforsecurity=False).hexdigest()
            new = UUID(grant.grant_id.hex[:16] + name[16:])
            rolled = Grant(
                new, pool.pool_id, rolls, grant.priority, grant.is_free, at, grant.rolls_until, at, rolls, "active"
            )
            rolled.parent = grant.grant_id
            self._add_grant(rolled)

    def _activate(self, pool: Pool, at: datetime) -> None:
        for grant in self._grants_of(pool, "scheduled"):
            if grant.effective <= at:
                grant.state = "active"
                self.balance(pool.pool_id).limit += grant.amount
                self._came(pool)
                self.version += 1

    def fold(self, now: datetime, is_over: bool = True) -> None:
        """Apply what became due, each event at its own instant; then what no hold needs any more goes."""
        for pool_id in sorted(self.pools):
            self._fold_pool(self.pools[pool_id], now, is_over)
        if is_over:
            self._settle_due(now)
        self._follow_raises(now)
        self._renew_shares(now)

    def _settle_due(self, now: datetime) -> None:
        """Whoever brings credits settles at once what closed pools are owed of them."""
        while due := [p for p in sorted(self.pools) if self.pools[p].is_due]:
            self._fold_pool(self.pools[due[0]], now)

    def _follow_raises(self, now: datetime) -> None:
        """The limit of the period in which a raise starts or ends follows it."""
        for each in self.raises.values():
            before, at = each.state, each.starts
            after = "ended" if each.ends <= now else "active" if each.starts <= now else "scheduled"
            if before == after or before == "ended":
                continue
            each.state = after
            delta = each.amount if after == "active" else 0
            if before == "active":
                at, delta = each.ends, -each.amount
            row = self.current(each.balance_id, at)
            if row is not None:
                row.limit += delta

    def _raised(self, balance_id: UUID) -> int:
        return sum(r.amount for r in self.raises.values() if r.balance_id == balance_id and r.state == "active")

    def _renew_shares(self, now: datetime) -> None:
        """One renewal after the other: what was left stays as far as the share carries it."""
        for share in self.allocations.values():
            while share.renews_at <= now and not share.is_ended:
                row = self.balance(share.allocation_id)
                carried = min(share.carry, max(0, row.room))
                share.opening = row.used + row.held + carried
                share.began = share.renews_at
                row.limit = share.opening + share.amount
                share.renews_at = period_of(share.period, self.zone, share.renews_at, self.anchor)[1]
                self.version += 1
        self.reopen()

    def _fold_pool(self, pool: Pool, now: datetime, is_over: bool = True) -> None:
        """is_over: whatever moved credits before is over; what a batch leaves in a closed pool goes on after it."""
        self.pour(pool, now)
        while True:
            comes = [g.effective for g in self._grants_of(pool, "scheduled")]
            comes += [s.next_at for s in self.schedules.values() if s.pool_id == pool.pool_id]
            ends = [g.expires for g in self._grants_of(pool, "active", "spent")]
            at = min([*comes, *ends, LATEST])
            if at > now or at == LATEST:
                break
            self._expire(pool, at)
            self._make_occurrences(pool, at)
            self._activate(pool, at)
            self.pour(pool, at)
        if self._grants_of(pool, "lingering"):
            self._expire(pool, now)
        self.reopen()
        if pool.is_closed and is_over:
            self._sweep(pool, now)

    def _make_occurrences(self, pool: Pool, at: datetime) -> None:
        """The grants of schedules that come now; each bears the instant at which it should come."""
        for each in self.schedules.values():
            if each.pool_id != pool.pool_id or each.next_at > at:
                continue
            grant_id = UUID(md5(f"{each.schedule_id} {each.number}".encode(), usedforsecurity=False).hexdigest())
            begins, ends = each.next_at, each.end_of(each.number)
            follows_next = each.is_lasting or each.lasts is None
            rolls_until = each.end_of(each.number + 1) if follows_next else each.lasting(ends)
            if ends > begins:
                grant = Grant(
                    grant_id, pool.pool_id, each.amount, each.priority, each.is_free, begins, ends, begins, each.amount
                )
                grant.rolls, grant.rolls_until = each.rolls, rolls_until
                self._add_grant(grant)
            each.number += 1
            upcoming = each.comes(each.number)
            each.next_at = upcoming if upcoming < each.ends else LATEST

    # ------------------------------------------------------------------ commands

    def _begin(self, now: datetime, key: str | None, body: tuple[Any, ...]) -> Stored | None:
        """The stored result of the command, if any; what it was is in `results`."""
        self.fold(now)
        if key is None:
            return None
        stored = self.stored.get(key)
        if stored is None or stored.kept_until <= now:
            return None
        if stored.body != repr(body).encode():
            raise Refused("BR422")
        return stored

    def _end(self, now: datetime, key: str | None, body: tuple[Any, ...], result: Any = None) -> None:
        self.reopen()
        if key is not None:
            until = now + timedelta(days=35)
            self.stored[key] = Stored(repr(body).encode(), 0, None, 0, 0, None, None, until)
            self.results[key] = result

    def open_pool(self, kind: str, owner: UUID | None, pattern: str | None, now: datetime) -> UUID:
        """The pool of a kind, owner and filter; one that was closed is open again."""
        self.fold(now)
        return self._pool_of(kind, owner, pattern, now).pool_id

    def _pool_of(self, kind: str, owner: UUID | None, pattern: str | None, now: datetime) -> Pool:
        for pool in self.pools.values():
            if (pool.kind, pool.owner, pool.filter) == (kind, owner, pattern):
                if pool.is_closed:
                    pool.is_closed = False
                    pool.leaving.clear()
                    pool.rests.clear()
                    pool.is_due = False
                    self.version += 1
                return pool
        pool_id, open_part = self.names.pool(kind, owner, pattern)
        pool = self.pools[pool_id] = Pool(pool_id, kind, owner, pattern, now, open_part)
        self._put_balance(pool_id, Balance("pool", 0))
        if open_part is not None:
            self._put_balance(open_part, Balance("open", 0))
        self.version += 1
        return pool

    def _open_pool_named(self, pool_id: UUID) -> Pool:
        pool = self.pools.get(pool_id)
        if pool is None or pool.is_closed:
            raise Refused("BR404")
        return pool

    def add_grant(
        self,
        grant_id: UUID,
        pool_id: UUID,
        amount: int,
        priority: int,
        is_free: bool,
        effective: datetime | None,
        expires: datetime | None,
        key: str,
        now: datetime,
        rolls: tuple[int, int] | None = None,
        rolls_until: datetime | None = None,
        reason: str | None = None,
    ) -> UUID:
        """Credits into a pool; the id of the grant."""
        body = ("add_grant", pool_id, amount, priority, is_free, effective, expires, rolls, rolls_until, reason)
        if self._begin(now, key, body) is not None:
            return UUID(str(self.results[key]))
        if not 1 <= amount <= MOST:
            raise Refused("BR400")
        self._open_pool_named(pool_id)
        begins, ends = effective or now, expires or LATEST
        if ends <= max(now, begins):
            raise Refused("BR400")
        if rolls and (expires is None or rolls[0] > rolls[1] or (rolls_until or LATEST) <= ends):
            raise Refused("BR400")
        grant = Grant(grant_id, pool_id, amount, priority, is_free, begins, ends, now, amount)
        grant.rolls, grant.rolls_until = rolls, rolls_until or LATEST
        self._add_grant(grant)
        self._fold_pool(self.pools[pool_id], now)
        self._settle_due(now)
        self._end(now, key, body, grant_id)
        return grant_id

    def void_grant(self, grant_id: UUID, key: str, now: datetime, reason: str | None = None) -> int:
        """Take back what a grant has left and its pool does not need; how much that was."""
        body = ("void_grant", grant_id, reason)
        if self._begin(now, key, body) is not None:
            return int(self.results[key])
        if grant_id not in self.grants:
            raise Refused("BR404")
        grant = self.grants[grant_id]
        pool = self.balance(grant.pool_id)
        if grant.state == "scheduled":
            taken = grant.left
        else:
            taken = min(grant.left, max(0, pool.room))
            pool.limit -= taken
        if taken or grant.state == "spent":
            grant.left -= taken
            grant.voided += taken
            grant.state = grant.state if grant.left else "ended"
        self._fold_pool(self.pools[grant.pool_id], now)
        self.version += 1
        self._end(now, key, body, taken)
        return taken

    def transfer(
        self, from_id: UUID, to_id: UUID, amount: int | None, key: str, now: datetime, reason: str | None = None
    ) -> list[UUID]:
        """Unspent credits go to another pool, grant by grant; the grants that come of it."""
        body = ("transfer", from_id, to_id, amount, reason)
        if self._begin(now, key, body) is not None:
            return list(self.results[key])
        if amount is not None and not 1 <= amount <= MOST:
            raise Refused("BR400")
        giver, taker = self._open_pool_named(from_id), self._open_pool_named(to_id)
        if giver is taker or (giver.filter is not None and giver.filter != taker.filter):
            raise Refused("BR400")
        self.reopen()
        room = self._spare(giver)
        if amount is not None and amount > room:
            raise Refused("BR431")
        new = self._divide(giver, [(taker, room if amount is None else amount)], now)
        self._fold_pool(giver, now)
        self._settle_due(now)
        self._end(now, key, body, new)
        return new

    def _spare(self, pool: Pool) -> int:
        """What neither holds nor reserved shares need."""
        room = self.balance(pool.pool_id).room
        if pool.open_part is not None:
            room = min(room, self.balance(pool.open_part).room)
        return max(0, room)

    def _divide(
        self, giver: Pool, shares: list[tuple[Pool, int]], now: datetime, *, is_swept: bool = False
    ) -> list[UUID]:
        """So much to each, in burn order, past what open holds would burn; each gets its part of every grant.

        Parts are rounded so that all of them up to any one are at most what is due to these together.
        """
        total = sum(share for _, share in shares)
        if total == 0:
            return []
        for taker, _ in shares:
            if not taker.is_closed:
                self._fold_pool(taker, now)
            self.pour(taker, now)
        self.pour(giver, now)
        held, new = self.balance(giver.pool_id).held, []
        need, needs = total, [share for _, share in shares]
        for grant in self._grants_of(giver, "active", "lingering"):
            kept = min(grant.left, held)
            held -= kept
            take = min(grant.left - kept, need) if grant.state == "active" else 0
            if take == 0:
                continue
            before = 0
            for n, (taker, _) in enumerate(shares):
                part = take * (before + needs[n]) // need - take * before // need
                before += needs[n]
                if part:
                    new.append(self._move_part(grant, taker, part, is_swept, now))
                    needs[n] -= part
            need -= take
        assert need == 0
        self.balance(giver.pool_id).limit -= total
        for taker, share in shares:
            self.balance(taker.pool_id).limit += share
            if share:
                self._came(taker)
        self.reopen()
        for taker, share in shares:
            if share and not taker.is_closed:
                self._fold_pool(taker, now)
        self.version += 1
        return new

    def _move_part(self, grant: Grant, taker: Pool, part: int, is_swept: bool, now: datetime) -> UUID:
        """Bounds of a roll-over go along with a whole grant; a part takes its share of the most and no least."""
        name = self.names.grant(taker.pool_id, grant.grant_id, part, is_swept=is_swept)
        moved = replace(
            grant, grant_id=name, pool_id=taker.pool_id, amount=part, left=part, created=now, state="active", burnt=0,
            expired=0, voided=0, gone=0, lapsed=0, refunded=0, parent=grant.grant_id, is_part=True,
        )  # fmt: skip
        if grant.rolls:
            least = grant.rolls[0] if part == grant.amount else 0
            moved.rolls = (least, grant.rolls[1] * part // grant.amount)
        self._add_grant(moved)
        grant.left -= part
        grant.gone += part
        if grant.left == 0:
            grant.state = "ended"
        return moved.grant_id

    def allocate(
        self,
        allocation_id: UUID,
        pool_id: UUID,
        user: UUID,
        kind: str,
        period: str,
        amount: int,
        when_empty: str,
        oversubscribe: bool,
        key: str,
        now: datetime,
        carry: int = 0,
    ) -> UUID:
        """Set a user's share of a shared pool; its id."""
        body = ("allocate", pool_id, user, kind, period, amount, when_empty, oversubscribe, carry)
        if self._begin(now, key, body) is not None:
            return UUID(str(self.results[key]))
        if not 0 <= amount <= MOST:
            raise Refused("BR400")
        pool = self._open_pool_named(pool_id)
        if pool.open_part is None:
            raise Refused("BR404")
        old = next(
            (a for a in self.allocations.values() if a.pool_id == pool_id and a.user == user and not a.is_ended), None
        )
        if old is not None and (old.kind, old.period) != (kind, period):
            self._close(old)
            old = None
        grows = amount - (old.amount if old else 0)
        if kind == "reserved" and grows > max(0, self.balance(pool.open_part).room) and not oversubscribe:
            raise Refused("BR430")
        allocation_id = old.allocation_id if old else allocation_id
        if old is None:
            share = Allocation(allocation_id, pool_id, user, kind, period, amount, when_empty, carry=carry)
            self.allocations[allocation_id] = share
            if kind == "reserved":
                self._put_balance(allocation_id, Balance("allocation", amount))
                share.renews_at = period_of(period, self.zone, now, self.anchor)[1]
                share.began = now
        else:
            old.amount, old.when_empty, old.carry = amount, when_empty, carry
            row = self.current(old.allocation_id, now)
            if row is not None:
                row.limit = max(0, amount + old.opening)
        self.version += 1
        self._end(now, key, body, allocation_id)
        return allocation_id

    def _close(self, allocation: Allocation) -> None:
        allocation.is_ended = True
        if allocation.kind == "reserved":
            self.balance(allocation.allocation_id).limit = 0
        self.reopen()

    def end_allocation(self, allocation_id: UUID, now: datetime) -> None:
        """End a share; its open holds settle against it."""
        self.fold(now)
        allocation = self.allocations.get(allocation_id)
        if allocation is None or allocation.is_ended:
            raise Refused("BR404")
        self._close(allocation)
        self.version += 1
        self._end(now, None, ())

    def set_limit(self, limit: Limit, now: datetime) -> None:
        """Set a cap or default, or change the one with the same scope, metric, filter, period and kind of action."""
        self.fold(now)
        if limit.amount is None and limit.scope_id is None and limit.within[1] is None:
            raise Refused("BR400")
        if limit.amount is not None and not 0 <= limit.amount <= MOST:
            raise Refused("BR400")
        same = ("scope_id", "each", "within", "kind")
        for old in self.limits.values():
            if not old.is_ended and all(getattr(old, name) == getattr(limit, name) for name in same):
                old.amount, old.action = limit.amount, limit.action
                limit = old
                break
        else:
            self.limits[limit.limit_id] = limit
            limit.created = now
            if not limit.each:
                limit.balance_id = self.counters.get((*limit.kind, limit.scope_id), limit.limit_id)
        if limit.balance_id is not None and limit.amount is not None:
            row = self.current(limit.balance_id, now)
            if row is not None:
                row.limit = limit.amount + self._raised(limit.balance_id)
        self.version += 1

    def _balance_of(self, limit: Limit, subject: UUID | None) -> UUID:
        """Where a limit is counted; of a default for this one, who goes on where a limit of their own counted."""
        if not limit.each:
            assert limit.balance_id is not None
            return limit.balance_id
        counted = UUID(bytes=md5(f"{limit.limit_id} {subject}".encode()).digest())
        for own in self.limits.values():
            if own.balance_id and (own.kind, own.scope_id) == (limit.kind, subject) and own.ended >= limit.created:
                counted = own.balance_id
        counted = self.counters.setdefault((*limit.kind, subject), counted)
        self.counted[counted] = limit.limit_id, subject
        return counted

    def _meant(self, named: UUID, subject: UUID | None) -> tuple[Limit, UUID | None]:
        """What is named by a limit's id, or by that of a balance, as refusals tell it: what counts there now.

        Of a default: for the one that is named, or what is theirs instead.
        """
        in_force = {x.limit_id: x for x in self.limits.values() if not x.is_ended and x.amount is not None}
        limit = next((x for x in in_force.values() if x.balance_id == named), None)
        if limit is None:
            default, counted = self.counted.get(named, (None, None))
            limit = in_force.get(default or named) or in_force.get(named)
            if limit is not None and limit.limit_id == default:
                subject = subject or counted
        if limit is not None and limit.each:
            own = (x for x in self.limits.values() if not x.is_ended and not x.each and x.kind == limit.kind)
            limit = next((x for x in own if x.scope_id == subject), limit) if subject else None
        if limit is None or limit.amount is None:
            raise Refused("BR404")
        return limit, subject

    def raise_limit(
        self,
        raise_id: UUID,
        limit_id: UUID,
        subject: UUID | None,
        amount: int,
        starts: datetime | None,
        ends: datetime,
        key: str,
        now: datetime,
        reason: str | None = None,
    ) -> UUID:
        """More than a limit gives, for a time. Of a default: for the one that is named, or what is theirs instead."""
        body = ("raise", limit_id, subject, amount, starts, ends, reason)
        if self._begin(now, key, body) is not None:
            return UUID(str(self.results[key]))
        limit, subject = self._meant(limit_id, subject)
        self._give_raise(raise_id, self._balance_of(limit, subject), amount, starts, ends, now)
        self._end(now, key, body, raise_id)
        return raise_id

    def _give_raise(
        self, raise_id: UUID, balance_id: UUID, amount: int, starts: datetime | None, ends: datetime, now: datetime
    ) -> None:
        if not 1 <= amount <= MOST:
            raise Refused("BR400")
        if ends <= max(now, starts or now):
            raise Refused("BR464")
        self.raises[raise_id] = Raise(balance_id, amount, starts or now, ends)
        self._follow_raises(now)

    def ask_for_more(
        self,
        wish_id: UUID,
        limit_id: UUID,
        subject: UUID | None,
        user: UUID,
        amount: int,
        until: datetime,
        reason: str,
        key: str,
        now: datetime,
    ) -> UUID:
        """A member wants more than a limit gives, which asks; nothing changes until somebody decides."""
        body = ("ask_for_more", limit_id, subject, user, amount, until, reason)
        if self._begin(now, key, body) is not None:
            return UUID(str(self.results[key]))
        if not 1 <= amount <= MOST:
            raise Refused("BR400")
        if until <= now:
            raise Refused("BR464")
        if user not in self.members or self.members[user].status != "active":
            raise Refused("BR404")
        limit, subject = self._meant(limit_id, subject)
        if limit.action != "asks":
            raise Refused("BR461")
        balance_id = self._balance_of(limit, subject)
        for wish in self.wishes.values():
            if (wish.balance_id, wish.user, wish.state) == (balance_id, user, "open"):
                if wish.lapses > now:
                    raise Refused("BR462")
                wish.state = "denied"
        lapses = min(now + timedelta(days=14), until)
        self.wishes[wish_id] = Wish(balance_id, user, amount, until, lapses)
        self._end(now, key, body, wish_id)
        return wish_id

    def decide_wish(
        self,
        wish_id: UUID,
        is_approved: bool,
        raise_id: UUID,
        amount: int | None,
        until: datetime | None,
        now: datetime,
    ) -> UUID | None:
        """Approved, as asked or otherwise, it is a raise."""
        self.fold(now)
        wish = self.wishes.get(wish_id)
        if wish is None:
            raise Refused("BR404")
        if wish.state != "open" or wish.lapses <= now:
            raise Refused("BR463")
        wish.state = "approved" if is_approved else "denied"
        if not is_approved:
            return None
        self._give_raise(raise_id, wish.balance_id, amount or wish.amount, None, until or wish.until, now)
        return raise_id

    def end_raise(self, raise_id: UUID, now: datetime) -> None:
        """End a raise before its time."""
        self.fold(now)
        found = self.raises.get(raise_id)
        if found is None or found.state == "ended":
            raise Refused("BR404")
        if found.state == "scheduled":
            found.state = "ended"
        found.ends = now
        self._follow_raises(now)

    def reallocate(self, share_id: UUID, to_id: UUID | None, amount: int | None, key: str, now: datetime) -> int:
        """Give what a reserved share has left to another one, or back to the open part; how much that was."""
        body = ("reallocate", share_id, to_id, amount)
        if self._begin(now, key, body) is not None:
            return int(self.results[key])
        share, to = self.allocations.get(share_id), self.allocations.get(to_id) if to_id else None
        if share is None or share.is_ended or share.kind != "reserved":
            raise Refused("BR404")
        if to_id is not None and (
            to is None or to is share or to.is_ended or to.kind != "reserved" or to.pool_id != share.pool_id
        ):
            raise Refused("BR404")
        left = max(0, self.balance(share_id).room)
        amount = left if amount is None else amount
        if not 0 <= amount <= MOST:
            raise Refused("BR400")
        if amount > left:
            raise Refused("BR460")
        for each, delta in ((share, -amount), (to, amount)):
            if each is not None:
                if each.period == "none":
                    each.amount += delta
                else:
                    each.opening += delta
                self.balance(each.allocation_id).limit = max(0, each.amount + each.opening)
        self.version += 1
        self._end(now, key, body, amount)
        return amount

    def set_cycle(self, anchor: datetime, now: datetime) -> None:
        """Cycles are reckoned from another instant."""
        self.fold(now)
        self.anchor = anchor
        self.version += 1

    def end_limit(self, limit_id: UUID, now: datetime) -> None:
        """Lift a cap."""
        self.fold(now)
        limit = self.limits.get(limit_id)
        if limit is None or limit.is_ended:
            raise Refused("BR404")
        limit.is_ended, limit.ended = True, now
        self.version += 1

    # ------------------------------------------------------------------ schedules and debt

    def add_schedule(self, schedule: Schedule, key: str, now: datetime, reason: str | None = None) -> UUID:
        """Grants that come again, from the first time that is not past; its id."""
        asked = replace(schedule, schedule_id=NOBODY)
        body = ("add_schedule", repr(asked), reason)
        if self._begin(now, key, body) is not None:
            return UUID(str(self.results[key]))
        if not 1 <= schedule.amount <= MOST or (schedule.rolls and schedule.rolls[0] > schedule.rolls[1]):
            raise Refused("BR400")
        self._open_pool_named(schedule.pool_id)
        if schedule.is_lasting and (schedule.lasts is not None or schedule.rolls is not None):
            raise Refused("BR400")
        while schedule.comes(schedule.number) < now:
            schedule.number += 1
        schedule.next_at = schedule.comes(schedule.number)
        if schedule.next_at >= schedule.ends:
            raise Refused("BR400")
        self.schedules[schedule.schedule_id] = schedule
        self._fold_pool(self.pools[schedule.pool_id], now)
        self._settle_due(now)
        self._end(now, key, body, schedule.schedule_id)
        return schedule.schedule_id

    def cancel_schedule(self, schedule_id: UUID, now: datetime) -> None:
        """It comes no more; what it granted stays."""
        self.fold(now)
        if schedule_id not in self.schedules:
            raise Refused("BR404")
        schedule = self.schedules[schedule_id]
        schedule.ends, schedule.next_at = min(schedule.ends, now), LATEST

    def forgive_debt(
        self, pool_id: UUID, amount: int | None, key: str, now: datetime, reason: str | None = None
    ) -> int:
        """A free grant that burns at once, as large as what was used beyond all grants, or a part of it."""
        body = ("forgive", pool_id, amount, reason)
        if self._begin(now, key, body) is not None:
            return int(self.results[key])
        if pool_id not in self.pools:
            raise Refused("BR404")
        row = self.balance(pool_id)
        debt = max(0, row.used - row.limit)
        amount = debt if amount is None else amount
        if not 1 <= amount <= debt:
            raise Refused("BR450")
        self._open_pool_named(pool_id)
        self._grant_now(pool_id, amount, 0, True, now)
        self._end(now, key, body, amount)
        return amount

    def _grant_now(self, pool_id: UUID, amount: int, priority: int, is_free: bool, now: datetime) -> None:
        """Credits that never expire, into a pool that there is."""
        grant_id = self.names.grant(pool_id, None, amount)
        self._add_grant(Grant(grant_id, pool_id, amount, priority, is_free, now, LATEST, now, amount))
        self._fold_pool(self.pools[pool_id], now)
        self._settle_due(now)

    # ------------------------------------------------------------------ top-ups

    def set_top_up(
        self, pool_id: UUID, threshold: int, amount: int, ceiling: int, most_per_hour: int, now: datetime
    ) -> None:
        """When a pool buys by itself; set again, it begins anew after declines and a runaway."""
        self.fold(now)
        if not (0 <= threshold <= MOST and 1 <= amount <= ceiling <= MOST):
            raise Refused("BR400")
        self._open_pool_named(pool_id)
        self.policies[pool_id] = Policy(threshold, amount, ceiling, most_per_hour)

    def end_top_up(self, pool_id: UUID, now: datetime) -> None:
        """It buys no more; an open purchase goes on."""
        self.fold(now)
        if pool_id not in self.policies or self.policies[pool_id].state == "ended":
            raise Refused("BR404")
        self.policies[pool_id].state = "ended"

    def begin_top_up(self, pool_id: UUID, purchase_id: UUID, now: datetime) -> UUID | None:
        """The open purchase of a pool, or a new one where it has less than its threshold and nothing forbids it."""
        self.fold(now)
        for each, purchase in self.purchases.items():
            if (purchase.pool_id, purchase.state) == (pool_id, "pending"):
                return each
        policy, pool = self.policies.get(pool_id), self.pools.get(pool_id)
        if policy is None or policy.state != "active" or policy.next_try > now or pool is None or pool.is_closed:
            return None
        if self.balance(pool_id).room >= policy.threshold:
            return None
        month = period_of("month", self.zone, now, self.anchor)
        counted = [p for p in self.purchases.values() if p.pool_id == pool_id and p.state != "failed"]
        if sum(1 for p in counted if p.requested > now - timedelta(hours=1)) >= policy.most_per_hour:
            policy.state = "runaway"
            return None
        if sum(p.amount for p in counted if p.requested >= month[0]) + policy.amount > policy.ceiling:
            policy.next_try = month[1]
            return None
        self.purchases[purchase_id] = Purchase(pool_id, policy.amount, now)
        return purchase_id

    def decide_top_up(self, purchase_id: UUID, succeeded: bool, now: datetime) -> str:
        """Bought: the credits come, also where the pool has closed. Declined: a pause of an hour, then two, four …"""
        self.fold(now)
        purchase = self.purchases.get(purchase_id)
        if purchase is None:
            raise Refused("BR404")
        state = "succeeded" if succeeded else "failed"
        if purchase.state == state:
            return state
        if purchase.state == "succeeded":
            raise Refused("BR451")
        policy = self.policies[purchase.pool_id]
        if succeeded:
            policy.declines = 0
            self._grant_now(purchase.pool_id, purchase.amount, 100, False, now)
        else:
            policy.next_try = now + min(timedelta(hours=24), timedelta(hours=2**policy.declines))
            policy.declines += 1
            if policy.declines >= 6 and policy.state == "active":
                policy.state = "declined"
        purchase.state = state
        return state

    # ------------------------------------------------------------------ codes

    def open_campaign(self, campaign_id: UUID, campaign: Campaign, now: datetime) -> None:
        """A campaign, whose codes come later."""
        self.fold(now)
        if not 1 <= campaign.amount <= MOST or campaign.ends <= now or campaign.credits_end <= now:
            raise Refused("BR400")
        self.campaigns[campaign_id] = campaign

    def add_code(self, campaign_id: UUID, code_id: UUID, now: datetime) -> int:
        """One more; how many."""
        self.fold(now)
        if campaign_id not in self.campaigns or self.campaigns[campaign_id].is_revoked:
            raise Refused("BR404")
        self.codes[code_id] = Code(campaign_id)
        return 1

    def revoke_codes(self, campaign_id: UUID, code_id: UUID | None, now: datetime) -> int:
        """One code, or the campaign with all of them; how many that ended."""
        self.fold(now)
        ended = [
            code
            for each, code in self.codes.items()
            if code.campaign_id == campaign_id and not code.is_revoked and code_id in (None, each)
        ]
        for code in ended:
            code.is_revoked = True
        if code_id is None and campaign_id in self.campaigns:
            self.campaigns[campaign_id].is_revoked = True
        return len(ended)

    def redeem(self, redemption_id: UUID, code_id: UUID, user: UUID, now: datetime) -> UUID:
        """One redemption for a person; the same person and code again is the same. Its id."""
        self.fold(now)
        if code_id not in self.codes:
            raise Refused("BR404")
        code = self.codes[code_id]
        if user in code.redeemed:
            return code.redeemed[user][0]
        campaign = self.campaigns[code.campaign_id]
        over = now >= min(campaign.ends, campaign.credits_end)
        if code.is_revoked or campaign.is_revoked or over or now < campaign.starts:
            raise Refused("BR441")
        before = [
            (who, at)
            for each in self.codes.values()
            if each.campaign_id == code.campaign_id
            for who, (_, at) in each.redeemed.items()
        ]
        today = sum(1 for _, at in before if at.date() == now.date())
        if (
            len(code.redeemed) >= campaign.per_code
            or sum(1 for who, _ in before if who == user) >= campaign.per_person
            or today >= (campaign.per_day or today + 1)
            or len(before) >= (campaign.in_all or len(before) + 1)
        ):
            raise Refused("BR443")
        code.redeemed[user] = redemption_id, now
        return redemption_id

    def grant_code(self, grant_id: UUID, pool_id: UUID, redemption_id: UUID, code_id: UUID, now: datetime) -> UUID:
        """What a redemption gives, once; it ends with the campaign's credits, or so many days after the redemption."""
        campaign = self.campaigns[self.codes[code_id].campaign_id]
        at = next(at for each, at in self.codes[code_id].redeemed.values() if each == redemption_id)
        last = campaign.credits_end if campaign.days is None else at + timedelta(days=campaign.days)
        ends = min(last, campaign.credits_end)
        expires = None if ends == LATEST else ends
        key = f"code redemption {redemption_id}"
        return self.add_grant(grant_id, pool_id, campaign.amount, campaign.priority, True, None, expires, key, now)

    # ------------------------------------------------------------------ refunds

    def refund(self, request: UUID, amount: int | None, key: str, now: datetime, reason: str | None = None) -> int:
        """What a request was charged goes back to the grants that paid, last first; how much that was."""
        body = ("refund", request, amount, reason)
        if self._begin(now, key, body) is not None:
            return int(self.results[key])
        if amount is not None and not 1 <= amount <= MOST:
            raise Refused("BR400")
        if request not in self.charged:
            raise Refused("BR404")
        charge = self.charges.get(request)
        left = self.charged[request] - sum(charge.backs) if charge else 0
        amount = left if amount is None else amount
        if charge is None or not 1 <= amount <= left:
            raise Refused("BR432")
        self.estimates.pop(request, None)
        back = self._last_of(charge, amount)
        for pool_id, *_ in back:
            self.pour(self.pools[pool_id], now)
        grown = [self._return(self.pools[pool_id], start, end, now) for pool_id, start, end, _ in back]
        for part in {part.key: part for *_, part in back}.values():
            own = [n for n in range(len(back)) if back[n][3].key == part.key]
            self._give_room_back(part, [back[n] for n in own], [grown[n] for n in own], now)
        for (pool_id, *_), grows in zip(back, grown, strict=True):
            self.balance(pool_id).limit += grows
            if grows:
                self._came(self.pools[pool_id])
        self.reopen()
        for (pool_id, _, _, part), grows in zip(back, grown, strict=True):
            pool = self.pools[pool_id]
            if grows and pool.kind == "shared" and pool.is_closed:
                self._fold_pool(pool, now, is_over=False)  # holds need less of expired grants where this burns before
                owner = self._pool_of_user(part.chain.user, pool.filter, now)
                self._pass_on(pool, owner, grows, now)
        for pool_id, *_ in back:
            self._fold_pool(self.pools[pool_id], now)
        self._settle_due(now)
        self.version += 1
        self._end(now, key, body, amount)
        return amount

    def _last_of(self, charge: Charge, amount: int) -> list[tuple[UUID, int, int, Part]]:
        """The last stretches that a request drew and that were not refunded before, the very last first."""
        found = []
        for n in reversed(range(len(charge.draws))):
            pool_id, start, end = charge.draws[n]
            end -= charge.backs[n]
            micros = min(amount, end - start)
            if micros:
                amount -= micros
                charge.backs[n] += micros
                found.append((pool_id, end - micros, end, charge.parts[n]))
        return found

    def _return(self, pool: Pool, start: int, end: int, now: datetime) -> int:
        """A stretch goes back to the grants that paid it; what none paid is a grant of its own. How much stays."""
        shares: dict[UUID, int] = {}
        at = 0
        for grant_id, amount in pool.burns:
            overlap = min(at + amount, end) - max(at, start)
            if overlap > 0:
                shares[grant_id] = shares.pop(grant_id, 0) + overlap
            at += amount
        bare, grows = end - start, 0
        for grant_id in reversed(shares):
            grant = self.grants[grant_id]
            back = min(shares[grant_id], grant.burnt - grant.refunded)  # a correction may have brought it back already
            if back <= 0:
                continue
            bare -= back
            grant.refunded += back
            if grant.expires <= now:
                grant.expired += back
            else:
                grant.left += back
                grant.state = "active"
                grows += back
        if bare:
            grant_id = self.names.grant(pool.pool_id, None, bare)
            self._add_grant(Grant(grant_id, pool.pool_id, bare, 100, True, now, LATEST, now, bare, "active"))
        return grows + bare

    def _give_room_back(
        self, charge: Part, back: list[tuple[UUID, int, int, Part]], grown: list[int], now: datetime
    ) -> None:
        """Caps and capped shares have so much less used; a reserved share is so much larger, unless others share it."""
        total = sum(end - start for _, start, end, _ in back)
        for entry in charge.chain.always:
            if entry.metric == CREDITS and admits(entry.filter, charge.what):
                self.balances[entry.balance].used -= total
        for leg in charge.chain.legs:
            of_pool = sum(end - start for pool_id, start, end, _ in back if pool_id == leg.pool_id)
            grows = sum(g for (pool_id, *_), g in zip(back, grown, strict=True) if pool_id == leg.pool_id)
            for entry in leg.entries:
                share = self.allocations.get(entry.balance[0])
                if share is not None and share.kind == "capped":
                    self.balances[entry.balance].used -= of_pool
                elif share is not None and grows and not share.is_ended:
                    goes_on = sum(1 for other in charge.chain.legs if other.pool_id == leg.pool_id) > 1
                    if not goes_on and (share.period == "none" or share.began <= charge.booked):
                        share.opening += grows
                        self.balance(share.allocation_id).limit = max(0, share.amount + share.opening)

    # ------------------------------------------------------------------ shared or personal

    def switch_pools(self, to: str, key: str, now: datetime) -> dict[str, int]:
        """All credits go from shared pools to those of the members, or back."""
        body = ("switch_pools", to)
        if self._begin(now, key, body) is not None:
            return dict(self.results[key])
        if to not in ("personal", "shared"):
            raise Refused("BR400")
        kinds = ("shared",) if to == "personal" else ("personal", "residual")
        closing = [p for p in self.pools.values() if p.kind in kinds and not p.is_closed]
        closing.sort(key=lambda p: (p.created, p.pool_id))
        if any(self.balance(p.pool_id).excess for p in closing):
            raise Refused("BR433")
        told = {"moved_micros": 0, "residual_micros": 0, "held_micros": 0, "pools": len(closing)}
        if to == "personal":
            for pool in closing:
                self._scatter(pool, told, now)
        else:
            for pattern in {None, *(p.filter for p in self.pools.values() if p.kind == "shared")}:
                self._pool_of("shared", None, pattern, now)
            for pattern in sorted({p.filter for p in closing}, key=lambda f: (f is None, f)):
                shared = self._pool_of("shared", None, pattern, now)
                group = [p for p in closing if p.filter == pattern]
                told["moved_micros"] += self._gather(group, shared, now)
                told["held_micros"] += sum(self._note_leaving(p, shared, now) for p in group)
        for pool in closing:
            pool.is_closed = True
        for pool in closing:
            self._fold_pool(pool, now)
        self._settle_due(now)
        self.version += 1
        self.is_shared = to == "shared"
        self._end(now, key, body, told)
        return told

    def _scatter(self, pool: Pool, told: dict[str, int], now: datetime) -> None:
        shares = [a for a in self.allocations.values() if a.pool_id == pool.pool_id and not a.is_ended]
        rests = {a.user: max(0, self.balance(a.allocation_id).room) for a in shares if a.kind == "reserved"}
        for share in shares:
            self._close(share)
        told["moved_micros"] += self._spare(pool)
        told["residual_micros"] += self._spread_over_members(pool, rests, now)
        told["held_micros"] += self._note_leaving(pool, None, now)

    def _spread_over_members(self, pool: Pool, rests: dict[UUID, int], now: datetime, *, is_swept: bool = False) -> int:
        """To each what is set apart for them, or their part of it; then the same to all; the rest to nobody."""
        left = total = self._spare(pool)
        claimed = sum(rests.values())
        members = sorted(user for user, member in self.members.items() if member.status == "active")
        shares = dict.fromkeys(sorted({*members, *rests}), 0)
        for user, rest in rests.items():
            shares[user] = rest if claimed <= total else total * rest // claimed
        left -= sum(shares.values())
        each = left // len(members) if members else 0
        for user in members:
            shares[user] += each
        left -= each * len(members)
        parts = [(self._pool_of_user(u, pool.filter, now), share) for u, share in shares.items() if share]
        if left:
            parts.append((self._pool_of_user(NOBODY, pool.filter, now), left))
        self._divide(pool, parts, now, is_swept=is_swept)
        return left

    def _pool_of_user(self, user: UUID, pattern: str | None, now: datetime) -> Pool:
        """Where a member's credits go, and what is nobody's."""
        if user == NOBODY:
            return self._pool_of("residual", None, pattern, now)
        return self._pool_of("personal", user, pattern, now)

    def _gather(self, givers: list[Pool], taker: Pool, now: datetime) -> int:
        """What several pools can spare goes into one; parts of what was one grant are one again."""
        groups: dict[tuple[UUID | None, Like, Any], list[tuple[Grant, int]]] = {}
        for pool in [*givers, taker]:
            self.pour(pool, now)
        for pool in givers:
            held = self.balance(pool.pool_id).held
            for grant in self._grants_of(pool, "active", "lingering"):
                kept = min(grant.left, held)
                held -= kept
                if grant.state == "active" and grant.left > kept:
                    like = (grant.priority, grant.is_free, grant.effective, grant.expires)
                    group = (self._origin(grant), like, (grant.rolls_until, grant.rolls is None))
                    groups.setdefault(group, []).append((grant, grant.left - kept))
        for (origin, like, _), parts in groups.items():
            total = sum(free for _, free in parts)
            first = parts[0][0]
            whole = replace(
                first, grant_id=self.names.grant(taker.pool_id, origin, total, like), pool_id=taker.pool_id,
                amount=total, left=total, created=now, state="active", burnt=0, expired=0, voided=0, gone=0, lapsed=0,
                refunded=0, parent=origin, is_part=True,
            )  # fmt: skip
            if first.rolls:
                bounds = [(g.rolls or (0, 0), free, g.amount) for g, free in parts]
                whole.rolls = (
                    sum(least if free == amount else 0 for (least, _), free, amount in bounds),
                    sum(most * free // amount for (_, most), free, amount in bounds),
                )
            self._add_grant(whole)
            self.balance(taker.pool_id).limit += total
            self._came(taker)
            for grant, free in parts:
                grant.left -= free
                grant.gone += free
                grant.state = grant.state if grant.left else "ended"
                self.balance(grant.pool_id).limit -= free
        self.reopen()
        self._fold_pool(taker, now)
        return sum(free for parts in groups.values() for _, free in parts)

    def _origin(self, grant: Grant) -> UUID:
        """What it was before any transfer in here; what a member brought along begins with itself."""
        while grant.is_part and grant.parent in self.grants:
            grant = self.grants[grant.parent]
        return grant.grant_id

    def _note_leaving(self, pool: Pool, to: Pool | None, now: datetime) -> int:
        """Where goes what each running request leaves of what it holds; how much they hold."""
        kept = 0
        for request in sorted(self.holds):
            hold = self.holds[request]
            held = [n for leg, n in zip(hold.chain.legs, hold.legs, strict=True) if leg.pool_id == pool.pool_id]
            if held and not hold.flags & OWN_KEY:
                target = to or self._pool_of_user(hold.chain.user, pool.filter, now)
                pool.leaving[request] = (sum(held) + self._charged_to(pool, request), target.pool_id)
                kept += sum(held)
        return kept

    def _sweep(self, pool: Pool, now: datetime) -> None:
        """What turns up in a closed pool goes where it belongs."""
        over = sorted(request for request in pool.leaving if request not in self.holds)
        if over or pool.is_due:
            for request in over:
                kept, to_id = pool.leaving.pop(request)
                pool.rests[to_id] = pool.rests.get(to_id, 0) + kept - self._charged_to(pool, request)
            self._settle_accounts(pool, now)
        if self._spare(pool) and pool.kind == "shared":
            self._spread_over_members(pool, {}, now, is_swept=True)
        elif self._spare(pool):
            shared = [p for p in self.pools.values() if (p.kind, p.filter) == ("shared", pool.filter)]
            for each in shared:
                if not each.is_closed:
                    self._pass_on(pool, each, self._spare(pool), now)
            if all(each.is_closed for each in shared):  # credits are not shared any more: it is the owner's again
                self._pool_of(pool.kind, pool.owner, pool.filter, now)

    def _charged_to(self, pool: Pool, request: UUID) -> int:
        draws = self.charges[request].draws if request in self.charges else []
        return sum(end - start for pool_id, start, end in draws if pool_id == pool.pool_id)

    def _pass_on(self, giver: Pool, taker: Pool, amount: int, now: datetime) -> int:
        amount = min(amount, self._spare(giver))
        self._divide(giver, [(taker, amount)], now, is_swept=True)
        return amount

    def _settle_accounts(self, pool: Pool, now: datetime) -> None:
        """Who used too much pays what is missing, then who left something gets it; what nobody misses is forgotten."""
        for to_id in sorted(p for p, rest in pool.rests.items() if rest < 0):
            self._fold_pool(self.pools[to_id], now)
            if to_id not in pool.rests:  # this one may be open again
                continue
            owes = min(-pool.rests[to_id], self._missing(pool))
            pool.rests[to_id] += self._pass_on(self.pools[to_id], pool, owes, now)
            self.pour(pool, now)
        for to_id in sorted(p for p, rest in pool.rests.items() if rest > 0):
            if to_id not in pool.rests:
                continue
            pool.rests[to_id] -= self._pass_on(pool, self.pools[to_id], pool.rests[to_id], now)
            if self.pools[to_id].is_closed:
                self._fold_pool(self.pools[to_id], now)
        debts, left = 0, self._missing(pool)
        for to_id in sorted(p for p, rest in pool.rests.items() if rest < 0):
            pool.rests[to_id] = -min(-pool.rests[to_id], left - debts)
            debts -= pool.rests[to_id]
        for to_id in sorted(p for p, rest in pool.rests.items() if rest > 0):
            pool.rests[to_id] = min(pool.rests[to_id], debts)
            debts -= pool.rests[to_id]
        pool.rests = {to_id: rest for to_id, rest in pool.rests.items() if rest}
        pool.is_due = False

    def _missing(self, pool: Pool) -> int:
        return max(0, sum(rest for rest in pool.rests.values() if rest > 0) - self.balance(pool.pool_id).room)

    def _came(self, taker: Pool) -> None:
        """What came into a pool may be owed to a closed one, or by one."""
        for pool in self.pools.values():
            if pool.rests and (pool is taker or pool.rests.get(taker.pool_id, 0) < 0):
                pool.is_due = True

    # ------------------------------------------------------------------ moving in

    def depart(self, transfer_id: UUID, kind: str, now: datetime) -> int:
        """All that no hold needs leaves a person's home, unless one of its pools owes something; how much that is.

        Holds need the grants that burn first, and all that there is of those that are past their end.
        """
        self.fold(now)
        if transfer_id in self.departures:
            return self.departures[transfer_id].amount
        home = [p for p in self.pools.values() if p.kind == "individual"]
        home.sort(key=lambda p: (p.created, p.pool_id))
        if any(self.balance(p.pool_id).excess for p in home):
            raise Refused("BR433")
        parts = []
        for pool in home:
            self.pour(pool, now)
            stays = self.balance(pool.pool_id).held
            for grant in self._grants_of(pool, "active", "lingering"):
                leaves = max(0, grant.left - stays) if grant.state == "active" else 0
                stays = max(0, stays - grant.left)
                if leaves:
                    parts.append(self._part_with(grant, pool, leaves))
        held = sum(self.balance(p.pool_id).held for p in home)
        self.departures[transfer_id] = Departure(kind, parts, held)
        return self.departures[transfer_id].amount

    def _part_with(self, grant: Grant, pool: Pool, amount: int) -> Brought:
        grant.left -= amount
        grant.gone += amount
        grant.state = grant.state if grant.left else "ended"
        self.balance(pool.pool_id).limit -= amount
        return Brought(
            grant.grant_id, pool.filter, amount, grant.priority, grant.is_free, grant.effective, grant.expires
        )

    def arrive(self, transfer_id: UUID, user: UUID, left: Departure, now: datetime) -> int:
        """What left a home comes in, once, as grants like those that they were; how much that is.

        Into the shared pool where it was meant for it and there is one still, else into the person's own.
        """
        self.fold(now)
        if transfer_id in self.arrivals:
            return self.arrivals[transfer_id][1]
        for part in left.parts:
            if left.kind == "shared" and self.is_shared:
                pool = self._pool_of("shared", None, part.filter, now)
            else:
                pool = self._pool_of_user(user, part.filter, now)
            self.pour(pool, now)
            grant = Grant(
                self.names.grant(pool.pool_id, part.grant_id, part.amount), pool.pool_id, part.amount, part.priority,
                part.is_free, part.effective, part.expires, now, part.amount, "active", parent=part.grant_id,
                is_part=True,
            )  # fmt: skip
            self._add_grant(grant)
            self.balance(pool.pool_id).limit += part.amount
            self._came(pool)
            self._fold_pool(pool, now)
        self._settle_due(now)
        self.reopen()
        self.version += 1
        self.arrivals[transfer_id] = user, left.amount
        return left.amount

    def note_arrival(self, transfer_id: UUID, now: datetime) -> None:
        """The home knows that they arrived, and when it first learned it."""
        self.fold(now)
        self.departures[transfer_id].arrived = self.departures[transfer_id].arrived or now

    # ------------------------------------------------------------------ chains

    def _refusal(self, user: UUID, key_id: UUID, now: datetime) -> str | None:
        key = self.keys.get(key_id)
        if self.status != "active":
            return "organization_closed"
        if key_id != NOBODY and (key is None or (key.user is not None and key.user != user)):
            return "key_unknown"
        if key and key.revoked is not None and key.revoked <= now:
            return "key_revoked"
        if key and key.expires is not None and key.expires <= now:
            return "key_expired"
        if user != NOBODY and (user not in self.members or self.members[user].status != "active"):
            return "not_a_member"
        return None

    def _ways_to_pay(self, user: UUID, now: datetime) -> tuple[list[Leg], datetime]:
        """Restricted pools first, then personal, then shared; each with the user's share, then the open part.

        An empty way is left out while another has something for the same models.
        """
        ranks = {"personal": 0, "shared": 1, "individual": 2}
        pools = [p for p in self.pools.values() if p.kind in ranks and p.owner in (None, user) and not p.is_closed]
        pools.sort(key=lambda p: (p.filter is None, ranks[p.kind], p.created, p.pool_id))
        ways: list[tuple[Leg, bool]] = []
        until = LATEST
        for pool in pools:
            mine = (
                a for a in self.allocations.values() if (a.pool_id, a.user, a.is_ended) == (pool.pool_id, user, False)
            )
            share = next(mine, None)
            parts: list[UUID | None] = [pool.open_part]
            caps: list[Entry] = []
            if share is not None and share.kind == "reserved":
                parts = [share.allocation_id, *(parts if share.when_empty == "open_part" else [])]
            elif share is not None:
                cap = self.open_period(share.allocation_id, "allocation", True, share.amount, share.period, now)
                caps = [Entry((share.allocation_id, cap.start))]
                until = min(until, cap.end)
            for part in parts:
                entries = [Entry((pool.pool_id, EARLIEST)), *([Entry((part, EARLIEST))] if part else []), *caps]
                has_some = all(b.limit > b.used for b in (self.balances[e.balance] for e in entries))
                ways.append((Leg(pool.pool_id, pool.filter, tuple(entries)), has_some))
        kept = [
            leg
            for leg, has_some in ways
            if has_some or not any(some and other.filter in (None, leg.filter) for other, some in ways)
        ]
        return kept, until

    def _limits_on(self, user: UUID, key_id: UUID) -> list[tuple[Limit, UUID | None]]:
        """The limits that apply, each with whom a default is for here.

        All of their own; of defaults the narrowest, where nothing of their own takes its place.
        """
        key, member = self.keys.get(key_id), self.members.get(user)
        team = (key.team if key else None) or (member.team if member else None)
        department = (key.department if key else None) or (member.department if member else None)
        subjects = {
            "organization": [None],
            "user": [user] if user != NOBODY else [],
            "key": [key_id, key.original] if key else [key_id] if key_id != NOBODY else [],
            "team": [team] if team else [],
            "department": [department] if department else [],
        }
        places = {
            "user": {("team", member.team if member else None), ("department", member.department if member else None)},
            "key": {("team", team), ("department", department)},
            "team": set(),
            "department": set(),
        }
        own: list[tuple[Limit, UUID | None]] = []
        defaults: dict[tuple[Any, ...], list[tuple[int, Limit, UUID]]] = {}
        for limit in self.limits.values():
            if limit.is_ended or not subjects[limit.scope]:
                continue
            if not limit.each:
                if limit.scope_id in subjects[limit.scope]:
                    own.append((limit, limit.scope_id))
            elif limit.within[1] is None or limit.within in places[limit.scope]:
                rank = ("team", "department", None).index(limit.within[0])
                subject = subjects[limit.scope][-1]
                assert subject is not None
                defaults.setdefault(limit.kind, []).append((rank, limit, subject))
        taken = {limit.kind for limit, _ in own}
        for kind, candidates in defaults.items():
            if kind not in taken:
                _, limit, subject = min(candidates, key=lambda c: c[0])
                own.append((limit, subject))
        return sorted(((x, s) for x, s in own if x.amount is not None), key=lambda x: x[0].limit_id)

    def build_chain(self, user: UUID, key_id: UUID, now: datetime) -> Chain:
        """What a user and key must pass now."""
        key = self.keys.get(key_id)
        ends = [each for each in (key.expires, key.revoked) if each is not None] if key else []
        until = min([*ends, LATEST])
        if until <= now:
            until = LATEST
        refusal = self._refusal(user, key_id, now)
        legs, legs_until = self._ways_to_pay(user, now)
        always = []
        for limit, subject in self._limits_on(user, key_id):
            assert limit.amount is not None
            balance_id = self._balance_of(limit, subject)
            amount = limit.amount + self._raised(balance_id)
            row = self.open_period(balance_id, "limit", limit.action != "warns", amount, limit.period, now)
            row.limit = amount
            always.append(Entry((balance_id, row.start), METRICS[limit.metric], limit.filter))
            until = min(until, row.end)
        chain = Chain(
            self.version,
            min(until, legs_until),
            refusal or (None if legs else "no_pool"),
            tuple(legs),
            tuple(always),
            user,
        )
        self.chains[user, key_id] = chain
        return chain

    def is_stale(self, chain: Chain | None, now: datetime) -> bool:
        """It must be built anew before anything is decided by it."""
        return chain is None or chain.version != self.version or chain.valid_until <= now

    def chain_of(self, user: UUID, key_id: UUID, now: datetime) -> Chain:
        """The chain of a user and key as of now."""
        chain = self.chains.get((user, key_id))
        return self.build_chain(user, key_id, now) if chain is None or self.is_stale(chain, now) else chain

    def available(self, chain: Chain, what: What) -> int:
        """What could still be spent on a request: the rooms of its ways to pay, under every limit on credits."""
        total = sum(
            min(max(0, self.balances[e.balance].room) for e in leg.entries)
            for leg in chain.legs
            if admits(leg.filter, what)
        )
        rows = (self.balances[e.balance] for e in chain.always if e.metric == CREDITS and admits(e.filter, what))
        return min([total, *(max(0, b.room) for b in rows if b.stops)])

    # ------------------------------------------------------------------ moving

    def book(
        self,
        chain: Chain,
        what: What,
        own_key: bool,
        *,
        used: list[int],
        calls: int,
        tokens: int,
        freed: list[int],
        freed_calls: int,
        freed_tokens: int,
    ) -> None:
        """Book on every balance of a chain what a request used and what it holds no more, leg by leg."""
        for leg, use, free in zip(chain.legs, used, freed, strict=True):
            for entry in leg.entries:
                if not own_key:
                    self.balances[entry.balance].used += use
                    self.balances[entry.balance].held -= free
        amounts = {
            CREDITS: (sum(used), sum(freed)),
            CALLS: (calls, freed_calls),
            TOKENS: (tokens, freed_tokens),
        }
        for entry in chain.always:
            if admits(entry.filter, what) and not (own_key and entry.metric == CREDITS):
                self.balances[entry.balance].used += amounts[entry.metric][0]
                self.balances[entry.balance].held -= amounts[entry.metric][1]
        self.reopen()

    def spread(self, chain: Chain, what: What, amount: int) -> list[int]:
        """Who pays what is not held: ways with room, in order; the rest is the excess of the last that fits."""
        paid = [0] * len(chain.legs)
        last = len(chain.legs) - 1
        for n, leg in enumerate(chain.legs):
            if amount == 0:
                break
            if not admits(leg.filter, what):
                continue
            last = n
            rooms = [
                self.balances[e.balance].room
                - sum(p for p, other in zip(paid, chain.legs, strict=True) if e in other.entries)
                for e in leg.entries
            ]
            paid[n] = min(amount, max(0, min(rooms)))
            amount -= paid[n]
        if amount:
            paid[last] += amount
        return paid

    def move(self, moves: list[Move], now: datetime) -> list[Verdict]:
        """Decide a batch. No request comes twice in it."""
        self.fold(now)
        answers = self._resolve(moves, now)
        moves = [self._as_held(move) for move in moves]
        for move, answer in zip(moves, answers, strict=True):
            answer.charged = move.amount if answer.outcome is None else answer.charged
        self._known_keys(moves, answers, now)
        self._repeated(moves, answers)
        for pass_slow in (True, False):
            for move, answer in zip(moves, answers, strict=True):
                if move.action in (SETTLE, RELEASE) and answer.outcome is None and not answer.is_booked:
                    hold = self.holds.get(move.request) if move.request else None
                    if self._is_slow(move, hold) == pass_slow:
                        self._settle(move, hold, answer, now)
        self.fold(now, is_over=False)
        self._demands(moves, answers, now)
        self._place(moves, answers, now)
        self._record(moves, answers, now)
        self._store(moves, answers, now)
        for pool in self.pools.values():
            self.pour(pool, now)
        return [self._verdict(move, n, moves, answers) for n, move in enumerate(moves)]

    def _resolve(self, moves: list[Move], now: datetime) -> list[Answer]:
        """Which chain each goes by, and what is decided without looking at any balance."""
        news = (m for m in moves if m.action in (AUTHORIZE, DEDUCT) and m.request not in self.holds)
        for user, key in sorted({(m.user or NOBODY, m.key or NOBODY) for m in news}):
            self.chain_of(user, key, now)
        return [self._first_look(move, now) for move in moves]

    def _first_look(self, move: Move, now: datetime) -> Answer:
        hold = self.holds.get(move.request) if move.request else None
        answer = Answer(request=move.request, held=hold.amount if hold else 0, chain=hold.chain if hold else None)
        if not _is_valid(move) or (move.action == DEDUCT and hold):
            answer.outcome, answer.detail = NOT_ALLOWED, "request_invalid"
        elif move.action == AUTHORIZE and hold:
            answer.outcome = KNOWN
        elif (move.action in (EXTEND, RELEASE) and hold is None) or (
            move.action in (SETTLE, RELEASE) and move.flags & BY_EXPIRY and (hold is None or hold.expires > now)
        ):
            answer.outcome = NO_HOLD
        if hold is None and move.action in (AUTHORIZE, DEDUCT):
            answer.chain = self.chains.get((move.user or NOBODY, move.key or NOBODY))
            if answer.outcome is None and answer.chain is not None:
                refusal = answer.chain.refusal
                if refusal is not None and not (refusal == "no_pool" and move.flags & OWN_KEY):
                    answer.outcome, answer.detail = NOT_ALLOWED, refusal
        return answer

    def _as_held(self, move: Move) -> Move:
        """A request goes on as it was held: model, feature, and at no charge where the customer's own key pays."""
        hold = self.holds.get(move.request) if move.request else None
        if hold is not None and move.action != AUTHORIZE:
            model, feature = hold.what
            move = replace(move, model=model, feature=feature, flags=move.flags & ~OWN_KEY | hold.flags & OWN_KEY)
        return replace(move, amount=0) if move.flags & OWN_KEY else move

    def _known_keys(self, moves: list[Move], answers: list[Answer], now: datetime) -> None:
        elders: dict[str, int] = {}
        for n, (move, answer) in enumerate(zip(moves, answers, strict=True)):
            key = move.idempotency_key
            if key is None or move.action == RELEASE or answer.detail == "request_invalid":
                continue
            elder = elders.setdefault(key, n)
            stored = self.stored.get(key)
            if stored is not None and stored.kept_until > now and not self._came_to_nothing(stored):
                same = stored.body == move.body
                answer.outcome = (
                    KEY_REUSED if not same else KNOWN_REFUSED if stored.outcome in (REFUSED, NOT_ALLOWED) else KNOWN
                )
                answer.request, answer.held, answer.charged = stored.request, stored.held, stored.charged
                answer.binding, answer.detail = stored.binding, stored.detail
            elif elder != n:
                if moves[elder].body == move.body:
                    answer.elder = elder
                answer.outcome = KEY_REUSED

    def _came_to_nothing(self, stored: Stored) -> bool:
        """Its request was released, or its lease ended before it was sent: the key is free again."""
        is_open = stored.outcome == ACCEPTED and stored.request is not None
        return is_open and stored.request not in self.holds and stored.request not in self.charged

    def _repeated(self, moves: list[Move], answers: list[Answer]) -> None:
        """A hold or deduction asked again after an unknown answer may have been booked the first time."""
        for move, answer in zip(moves, answers, strict=True):
            asked_again = move.action in (AUTHORIZE, DEDUCT) and move.flags & REPEATED and move.request in self.charged
            open_or_refused = answer.outcome is None or (
                answer.outcome == NOT_ALLOWED and answer.detail != "request_invalid"
            )
            if asked_again and open_or_refused and move.request is not None:
                answer.outcome, answer.detail = KNOWN, None
                answer.charged = self.charged[move.request]

    # ------------------------------------------------------------------ settling

    def _is_slow(self, move: Move, hold: Hold | None) -> bool:
        """It touches more ways to pay than the one it was held on; those are booked first."""
        if hold is None or hold.is_split:
            return True
        return move.action == SETTLE and move.amount > hold.amount and len(hold.chain.legs) > 1

    def _settle(self, move: Move, hold: Hold | None, answer: Answer, now: datetime) -> None:
        assert move.request is not None
        answer.is_booked = True
        if hold is None:
            self._settle_late(move, answer, now)
            return
        is_slow = self._is_slow(move, hold)
        del self.holds[move.request]
        own_key = bool(hold.flags & OWN_KEY)
        release = move.action == RELEASE
        left = 0 if release else move.amount
        paid = []
        for held in hold.legs:
            paid.append(min(left, held))
            left -= paid[-1]
        if left:
            more = self.spread(hold.chain, hold.what, left)
            paid = [a + b for a, b in zip(paid, more, strict=True)]
        self.book(
            hold.chain,
            hold.what,
            own_key,
            used=paid,
            calls=0 if release else 1,
            tokens=0 if release else move.tokens,
            freed=hold.legs,
            freed_calls=1,
            freed_tokens=hold.tokens,
        )
        if not release:
            self.charged[move.request] = self.charged.get(move.request, 0) + move.amount
            if is_slow:
                self._draw(move.request, Part(hold.chain, hold.what, now), paid)
            else:
                answer.chain, answer.paid = hold.chain, paid
            if move.flags & BY_EXPIRY:
                part = Part(hold.chain, hold.what, now)
                self.estimates[move.request] = Estimate(part, paid, move.tokens, hold.flags)

    def _settle_late(self, move: Move, answer: Answer, now: datetime) -> None:
        """There is no hold: an estimate is corrected, what was booked is told, else it is charged all the same."""
        assert move.request is not None
        if move.action == RELEASE:
            answer.outcome = NO_HOLD
            return
        estimate = self.estimates.pop(move.request, None)
        if estimate is not None:
            amount = 0 if estimate.flags & OWN_KEY else move.amount
            self._correct(estimate, move, amount, now)
            self.charged[move.request] = self.charged[move.request] - sum(estimate.legs) + amount
            answer.charged = amount
            return
        if move.request in self.charged:
            answer.outcome, answer.charged = KNOWN, self.charged[move.request]
            return
        chain = self.chain_of(move.user or NOBODY, move.key or NOBODY, now)
        if not chain.legs:
            answer.outcome, answer.detail, answer.is_booked = NOT_ALLOWED, "no_pool", False
            return
        paid = self.spread(chain, move.what, move.amount)
        self.book(
            chain,
            move.what,
            bool(move.flags & OWN_KEY),
            used=paid,
            calls=1,
            tokens=move.tokens,
            freed=[0] * len(chain.legs),
            freed_calls=0,
            freed_tokens=0,
        )
        self.charged[move.request] = move.amount
        self._draw(move.request, Part(chain, move.what, now), paid)

    def _correct(self, estimate: Estimate, move: Move, amount: int, now: datetime) -> None:
        """Too much goes back to those who paid, last first; too little is spread like any charge without hold."""
        delta = amount - sum(estimate.legs)
        if delta > 0:
            moved = self.spread(estimate.part.chain, estimate.part.what, delta)
        else:
            moved, left = [], -delta
            for paid in reversed(estimate.legs):
                moved.insert(0, -min(left, paid))
                left += moved[0]
        nothing = [0] * len(moved)
        self.book(
            estimate.part.chain,
            estimate.part.what,
            bool(estimate.flags & OWN_KEY),
            used=moved,
            calls=0,
            tokens=move.tokens - estimate.tokens,
            freed=nothing,
            freed_calls=0,
            freed_tokens=0,
        )
        assert move.request is not None
        if delta > 0:
            self._draw(move.request, estimate.part, moved)
        if delta < 0:
            self._undraw(self.charges[move.request], estimate.part.chain, moved)
        for pool_id, difference in sorted(_by_pool(estimate.part.chain, moved).items()):
            pool = self.pools[pool_id]
            if pool.is_closed:
                self._settle_with_successor(pool, estimate.part.chain.user, difference, now)
            if difference < 0 or pool.is_closed:
                self._fold_pool(pool, now, is_over=False)
                self.version += 1

    def _settle_with_successor(self, pool: Pool, user: UUID, moved: int, now: datetime) -> None:
        """What a closed pool was charged otherwise than in the end is settled with where its user spends now."""
        to: Pool | None
        if pool.kind == "shared":
            to = self._pool_of_user(user, pool.filter, now)
        else:
            shared = (
                p for p in self.pools.values() if (p.kind, p.filter) == ("shared", pool.filter) and not p.is_closed
            )
            to = next(shared, None)
        if to is not None:
            pool.rests[to.pool_id] = pool.rests.get(to.pool_id, 0) - moved
            pool.is_due = True

    # ------------------------------------------------------------------ where charges stand

    def _draw(self, request: UUID, part: Part, paid: list[int]) -> None:
        """What was just booked stands at the end of each pool's running total."""
        by_pool = _by_pool(part.chain, paid)
        ends = {pool_id: self.balance(pool_id).used for pool_id in by_pool}
        self._note_charge(request, part, {p: (ends[p] - paid, ends[p]) for p, paid in by_pool.items()})

    def _note_charge(self, request: UUID, part: Part, draws: dict[UUID, tuple[int, int]]) -> None:
        charge = self.charges.setdefault(request, Charge())
        charge.draws += [(pool_id, start, end) for pool_id, (start, end) in draws.items()]
        charge.parts += [part] * len(draws)
        charge.backs += [0] * len(draws)

    def _undraw(self, charge: Charge, chain: Chain, moved: list[int]) -> None:
        """What a correction takes back of a pool is gone from the last stretches of it."""
        for pool_id, back in _by_pool(chain, moved).items():
            left = -back
            for n in reversed(range(len(charge.draws))):
                pool, start, end = charge.draws[n]
                if pool == pool_id:
                    less = min(left, end - start - charge.backs[n])
                    charge.draws[n] = (pool, start, end - less)
                    left -= less

    def _record(self, moves: list[Move], answers: list[Answer], now: datetime) -> None:
        """What was settled and deducted stands in the order of the batch."""
        drawn = [
            (move, answer.chain, _by_pool(answer.chain, answer.paid))
            for move, answer in zip(moves, answers, strict=True)
            if answer.paid is not None and answer.chain is not None
        ]
        at = {p: self.balance(p).used for _, _, paid in drawn for p in paid}
        for _, _, paid in drawn:
            for pool_id, amount in paid.items():
                at[pool_id] -= amount
        for move, chain, paid in drawn:
            assert move.request is not None
            stretches = {p: (at[p], at[p] + amount) for p, amount in paid.items()}
            self._note_charge(move.request, Part(chain, move.what, now), stretches)
            for pool_id, amount in paid.items():
                at[pool_id] += amount

    # ------------------------------------------------------------------ demands

    def _asked(self, move: Move, entry: Entry) -> int:
        """What a demand asks of a balance."""
        extends = move.action == EXTEND
        return {CREDITS: move.amount, CALLS: 0 if extends else 1, TOKENS: move.tokens}[entry.metric]

    def _applies(self, move: Move, entry: Entry) -> bool:
        if not admits(entry.filter, move.what) or (move.flags & OWN_KEY and entry.metric == CREDITS):
            return False
        return move.action != EXTEND or self._asked(move, entry) > 0

    def _demands(self, moves: list[Move], answers: list[Answer], now: datetime) -> None:
        """What fits as a whole is granted as a whole; who touches a balance where not all fit is decided in order."""
        open_ones = []
        for n, (move, answer) in enumerate(zip(moves, answers, strict=True)):
            if move.action in (AUTHORIZE, EXTEND, DEDUCT) and answer.outcome is None:
                assert answer.chain is not None
                own = self.holds[move.request].leg if move.action == EXTEND and move.request else None
                leg = own if own is not None else answer.chain.first_leg(move.what)
                entries = [e for e in answer.chain.always if self._applies(move, e)]
                if leg is not None and leg < len(answer.chain.legs):
                    entries += [e for e in answer.chain.legs[leg].entries if self._applies(move, e)]
                open_ones.append((n, leg, entries))
        sums: dict[tuple[UUID, datetime], int] = {}
        for n, _, entries in open_ones:
            for entry in entries:
                sums[entry.balance] = sums.get(entry.balance, 0) + self._asked(moves[n], entry)
        tight = {
            balance
            for balance, asked in sums.items()
            if self.balances[balance].is_blocked
            or (self.balances[balance].stops and self.balances[balance].room < asked)
        }
        suspects = []
        for n, leg, entries in open_ones:
            nobody_pays = leg is None and not moves[n].flags & OWN_KEY
            if nobody_pays or any(e.balance in tight for e in entries):
                suspects.append(n)
                continue
            chain = answers[n].chain
            assert chain is not None
            takes = [0] * len(chain.legs)
            if takes and leg is not None and leg < len(takes) and not moves[n].flags & OWN_KEY:
                takes[leg] = moves[n].amount
            self._grant(moves[n], answers[n], takes, leg or 0, now)
        for n in suspects:
            self._decide(moves[n], answers[n], now)

    def _grant(self, move: Move, answer: Answer, takes: list[int], leg: int, now: datetime) -> None:
        """Hold or charge what was asked."""
        chain = answer.chain
        assert chain is not None
        assert move.request is not None
        sign = {"used": 1} if move.action == DEDUCT else {"held": 1}
        for way, take in zip(chain.legs, takes, strict=True):
            for entry in way.entries:
                self._add(entry, take, **sign)
        for entry in chain.always:
            if self._applies(move, entry):
                self._add(entry, self._asked(move, entry), **sign)
        answer.outcome, answer.is_booked = ACCEPTED, True
        if move.action == AUTHORIZE:
            self.holds[move.request] = Hold(
                chain,
                takes,
                leg,
                move.tokens,
                move.mark,
                move.mark,
                move.flags & (OWN_KEY | STREAMED),
                move.what,
                bool(move.flags & SENT),
                now,
                now + timedelta(seconds=move.lease),
                is_split=sum(1 for t in takes if t) > 1,
            )
        elif move.action == EXTEND:
            hold = self.holds[move.request]
            if takes[leg : leg + 1] != [move.amount] and move.amount and not move.flags & OWN_KEY:
                hold.is_split = True
            hold.legs = [a + b for a, b in zip(hold.legs, takes, strict=True)]
            hold.tokens += move.tokens
        else:
            self.charged[move.request] = self.charged.get(move.request, 0) + move.amount
            answer.paid = takes

    def _add(self, entry: Entry, amount: int, used: int = 0, held: int = 0) -> None:
        self.balances[entry.balance].used += used * amount
        self.balances[entry.balance].held += held * amount

    def _decide(self, move: Move, answer: Answer, now: datetime) -> None:
        """Alone: every limit must allow it; then the ways to pay, as far as they have room."""
        chain = answer.chain
        assert chain is not None
        assert move.request is not None
        binding: tuple[UUID, datetime] | None = None
        waits = True
        for entry in chain.always:
            row = self.balances[entry.balance]
            if self._applies(move, entry) and row.stops and (row.is_blocked or row.room < self._asked(move, entry)):
                binding = binding or entry.balance
                waits = waits and not row.is_blocked and row.limit - row.used >= self._asked(move, entry)
        takes = [0] * len(chain.legs)
        leg = self.holds[move.request].leg if move.action == EXTEND else None
        asks_pools = not move.flags & OWN_KEY and not (move.action == EXTEND and move.amount == 0)
        first_is_empty = False
        if asks_pools:
            order = [n for n, way in enumerate(chain.legs) if admits(way.filter, move.what)]
            if leg is not None:
                order = [leg, *(n for n in order if n != leg)]
            if not order and binding is None:
                answer.outcome, answer.detail = REFUSED, "no_pool_for_model"
                return
            left = free_left = move.amount
            free_takes = [0] * len(chain.legs)
            for n in order:
                rows = {e.balance: self.balances[e.balance] for e in chain.legs[n].entries}

                def before(e: Entry, takes: list[int]) -> int:
                    return sum(t for t, way in zip(takes, chain.legs, strict=True) if e in way.entries)

                if n == order[0]:
                    first_is_empty = any(row.limit <= row.used for row in rows.values())
                if any(row.is_blocked for row in rows.values()):
                    continue
                entries = chain.legs[n].entries
                room = min(rows[e.balance].room - before(e, takes) for e in entries)
                free = min(rows[e.balance].limit - rows[e.balance].used - before(e, free_takes) for e in entries)
                takes[n] = min(left, max(0, room))
                free_takes[n] = min(free_left, max(0, free))
                left -= takes[n]
                free_left -= free_takes[n]
                if leg is None and (takes[n] > 0 or move.amount == 0):
                    leg = n
                if left == 0:
                    break
            if left or leg is None:
                waits = waits and free_left <= 0 and move.amount > 0
                binding = binding or self._tightest(chain.legs[order[0]])
        if binding is not None:
            answer.outcome = WAIT if waits and move.flags & MAY_WAIT else REFUSED
            answer.binding = binding[0]
            kind = self.balances[binding].kind
            answer.detail = {"limit": "cap_reached", "allocation": "allocation_exhausted"}.get(kind, "pool_exhausted")
            return
        if (
            asks_pools
            and move.action != EXTEND
            and move.amount
            and leg != chain.first_leg(move.what)
            and first_is_empty
        ):
            chain.valid_until = min(chain.valid_until, now)
        self._grant(move, answer, takes, leg or 0, now)

    def _tightest(self, leg: Leg) -> tuple[UUID, datetime]:
        """The balance of a way to pay that stands in the way: the last that is over, else the first with least room."""
        blocked = [e.balance for e in leg.entries if self.balances[e.balance].is_blocked]
        if blocked:
            return blocked[-1]
        return min((e.balance for e in leg.entries), key=lambda b: self.balances[b].room)

    # ------------------------------------------------------------------ what is kept

    def _place(self, moves: list[Move], answers: list[Answer], now: datetime) -> None:
        """Progress and lease of extended holds, granted or not."""
        for move, answer in zip(moves, answers, strict=True):
            if move.action == EXTEND and answer.outcome in (None, ACCEPTED, REFUSED, WAIT):
                if answer.outcome is None:
                    answer.outcome = ACCEPTED
                assert move.request is not None
                hold = self.holds[move.request]
                hold.progress = max(hold.progress, move.mark)
                hold.is_sent = hold.is_sent or bool(move.flags & SENT)
                hold.flags |= move.flags & STREAMED
                hold.expires = max(hold.expires, now + timedelta(seconds=move.lease))
            elif answer.outcome is None:
                answer.outcome = ACCEPTED

    def _store(self, moves: list[Move], answers: list[Answer], now: datetime) -> None:
        for move, answer in zip(moves, answers, strict=True):
            key = move.idempotency_key
            if key is None or move.body is None:
                continue
            if move.action == RELEASE:
                stored = self.stored.get(key)
                if stored is not None and answer.outcome == ACCEPTED and stored.request == move.request:
                    del self.stored[key]
                continue
            new = answer.is_booked or answer.outcome in (REFUSED, NOT_ALLOWED)
            if new and answer.elder is None and answer.outcome in (ACCEPTED, REFUSED, NOT_ALLOWED):
                if answer.detail == "request_invalid":
                    continue
                days = 35 if answer.outcome == ACCEPTED else 1
                self.stored[key] = Stored(
                    move.body,
                    answer.outcome,
                    move.request,
                    move.amount if move.action == AUTHORIZE else 0,
                    answer.charged if move.action in (SETTLE, DEDUCT) else 0,
                    answer.binding,
                    answer.detail,
                    now + timedelta(days=days),
                )

    def _verdict(self, move: Move, n: int, moves: list[Move], answers: list[Answer]) -> Verdict:
        own = answers[n]
        at = own.elder if own.elder is not None else n
        answer = answers[at]
        assert answer.outcome is not None
        held = charged = 0
        if move.action in (AUTHORIZE, EXTEND) and answer.outcome == KNOWN:
            held = answer.held
        elif move.action in (AUTHORIZE, EXTEND) and answer.outcome == ACCEPTED:
            held = answer.held + moves[at].amount
        if move.action in (SETTLE, DEDUCT) and answer.outcome in (ACCEPTED, KNOWN):
            charged = answer.charged
        available = self.available(answer.chain, move.what) if answer.chain is not None else None
        outcome = answer.outcome
        if own.elder is not None:  # a twin learns what its elder got
            outcome = {ACCEPTED: KNOWN, REFUSED: KNOWN_REFUSED, NOT_ALLOWED: KNOWN_REFUSED}.get(outcome, outcome)
        return Verdict(outcome, answer.request, held, charged, available, answer.binding, answer.detail)


def _by_pool(chain: Chain, paid: list[int]) -> dict[UUID, int]:
    """What each pool paid, in the order of the ways to pay."""
    sums: dict[UUID, int] = {}
    for leg, amount in zip(chain.legs, paid, strict=True):
        if amount:
            sums[leg.pool_id] = sums.get(leg.pool_id, 0) + amount
    return sums


def _is_valid(move: Move) -> bool:
    if move.request is None or move.action not in (AUTHORIZE, EXTEND, SETTLE, RELEASE, DEDUCT) or move.flags < 0:
        return False
    if not all(0 <= amount <= MOST for amount in (move.amount, move.tokens, move.mark)):
        return False
    if move.action in (AUTHORIZE, EXTEND) and move.lease <= 0:
        return False
    key = move.idempotency_key
    return key is None or (move.body is not None and 1 <= len(key) <= 255)


# ---------------------------------------------------------------------------------------------- many organizations


def _of_nobody(moves: list[Move]) -> list[Verdict]:
    """Verdicts of an organization that there is not: a key tells no more than that two moves of a batch are one."""
    elders: dict[str, Move] = {}
    verdicts = []
    for move in moves:
        verdict = Verdict(
            NOT_ALLOWED, move.request, detail="organization_unknown" if _is_valid(move) else "request_invalid"
        )
        if move.idempotency_key is not None and move.action != RELEASE and _is_valid(move):
            elder = elders.setdefault(move.idempotency_key, move)
            if elder is not move:
                is_same = elder.body == move.body
                verdict = (
                    replace(verdict, outcome=KNOWN_REFUSED, request=elder.request)
                    if is_same
                    else replace(verdict, outcome=KEY_REUSED)
                )
        verdicts.append(verdict)
    return verdicts


@dataclass
class World:
    """Organizations that share nothing but a batch."""

    organizations: dict[UUID, Organization] = field(default_factory=dict)

    def move(self, moves: list[Move], now: datetime) -> list[Verdict]:
        """Decide a batch; one that names a request twice is decided one by one, settles and releases first."""
        requests = [m.request for m in moves if m.request is not None]
        verdicts: dict[int, Verdict] = {}
        if len(set(requests)) < len(requests):
            order = sorted(range(len(moves)), key=lambda n: (moves[n].action not in (SETTLE, RELEASE), n))
            for n in order:
                again = replace(moves[n], flags=moves[n].flags | REPEATED) if moves[n].flags >= 0 else moves[n]
                verdicts[n] = self.move([again], now)[0]
            return [verdicts[n] for n in range(len(moves))]
        for organization_id in {m.organization for m in moves}:
            places = [n for n, m in enumerate(moves) if m.organization == organization_id]
            organization = self.organizations.get(organization_id)
            asked = [moves[n] for n in places]
            found = _of_nobody(asked) if organization is None else organization.move(asked, now)
            verdicts |= dict(zip(places, found, strict=True))
        return [verdicts[n] for n in range(len(moves))]

    def expire_holds(self, now: datetime) -> int:
        """End every hold whose lease is over: one that was sent is charged by estimate, another is released."""
        due = sorted(
            (hold.expires, request, organization)
            for organization in self.organizations.values()
            for request, hold in organization.holds.items()
            if hold.expires <= now
        )
        moves = []
        for _, request, organization in due:
            hold = organization.holds[request]
            estimate = max(hold.floor, hold.progress) if hold.flags & STREAMED else hold.amount
            moves.append(
                Move(
                    organization.organization_id,
                    SETTLE if hold.is_sent else RELEASE,
                    request,
                    amount=estimate if hold.is_sent else 0,
                    tokens=hold.tokens,
                    flags=BY_EXPIRY | hold.flags,
                    model=hold.what[0],
                    feature=hold.what[1],
                )
            )
        return sum(1 for verdict in self.move(moves, now) if verdict.outcome == ACCEPTED) if moves else 0
