"""Random histories: steps as plain data, and a stage that plays them in a database and in the reference side by side.

A step names what happens by small integers, read against what there is at that moment; so any list of steps is a
history, also after steps were taken out of it.

Every command of credits that changes a balance is a step. There are two companies and two people who belong to both and
have a home each, which they leave with credits for one of the companies: at once, later or twice. What is not a step,
and where it is tried: a period's reset, which only scenarios know, as real books do not let grants go on that have no
bounds (reset_pool; verify; tests/simulate); strict caps and extensions that name what shall be held in all
(test_limits.py, test_rules.py); the money behind credits (test_grants_at_random.py, test_moving.py). The wrappers by
name (80_names.sql) call what is a step here. Refunds of a request that was charged by two ways to pay are left out: no
program makes one. What only tells (credits.told_…, available_of, has_sufficient_credits) moves nothing.
"""

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import psycopg
from psycopg.types.json import Jsonb
from tests.credits import reference as ref
from tests.credits.people import INSERT_DEPARTMENT, INSERT_KEY, INSERT_MEMBER, INSERT_ORGANIZATION, INSERT_TEAM

from bursar.clock import uuid7
from bursar.credits.moves import Action, Flag, as_call, as_verdicts
from bursar.credits.moves import Move as RealMove
from bursar.db import arrays
from bursar.money import Micros

Connection = psycopg.Connection[tuple[Any, ...]]
Step = tuple[Any, ...]
Run = Callable[[ref.Organization], Any]
Ask = Callable[[str | None], tuple[list[Any], Run]]
"""The arguments of a command and the same for the reference. What it is told makes it another body under its key."""

BEGINNING = datetime(2026, 3, 27, 20, 0, tzinfo=UTC)  # clocks change in the days after, in all three zones
ZONES = ("UTC", "Europe/Paris", "America/Havana", "Asia/Kolkata")
MODELS = ("gpt-4", "gpt-4-mini", "claude_3", None)
FEATURES = ("chat", "images", "support-bot", None)
FILTERS = (None, None, "gpt%", "claude\\_3", "gpt-4", "#images", "#support-%")
PERIODS = ("none", "day", "week", "month")
ALL_PERIODS = (*PERIODS, "cycle")
WEIGHTS = {
    "batch": 60, "grant": 9, "allocate": 5, "limit": 4, "end_limit": 2, "end_allocation": 2, "void": 3, "pool": 3,
    "expire": 7, "person": 2, "touch": 2, "default": 4, "own": 2, "raise": 3, "end_raise": 2, "renewed": 3,
    "reallocate": 2, "cycle": 1, "transfer": 4, "refund": 6, "schedule": 3, "cancel": 1, "forgive": 2, "switch": 2,
    "again": 5, "top_up": 2, "buy": 4, "bought": 4, "ask": 3, "decide": 3, "campaign": 1, "code": 2, "redeem": 3,
    "depart": 8, "arrive": 5, "overrun": 3,
}  # fmt: skip
ARGUMENTS = {
    "allocate": 7, "limit": 7, "person": 3, "default": 9, "own": 8, "raise": 7, "renewed": 8, "transfer": 5,
    "schedule": 9, "top_up": 6, "ask": 6, "campaign": 8, "depart": 5, "arrive": 2,
}  # fmt: skip
HOME = 1000
"""From this number on, the organization of a step or move is a person's home."""
AT_HOME = (
    "grant", "limit", "end_limit", "void", "pool", "person", "touch", "default", "own", "raise", "end_raise", "cycle",
    "transfer", "refund", "schedule", "cancel", "forgive", "again", "top_up", "buy", "bought", "ask", "decide",
)  # fmt: skip
EARLIER = BEGINNING - timedelta(days=1)
LATENESS = (0, 10, 10, 10**6, 30 * 10**6, 3600 * 10**6, 8 * 3600 * 10**6, 3 * 86400 * 10**6)  # microseconds


STANDING = """
    select organization_id, balance_id, nullif(period_start, '-infinity'), nullif(period_end, 'infinity'), null, kind,
        stops, limit_amount, used_amount, held_amount, excess_amount, null
    from credits.balances where organization_id = any (%s)
    union all
    select h.organization_id, h.request_id, h.placed_at, h.lease_expires_at,
        coalesce(h.leg_micros, array(
            select case n when h.leg then h.amount_micros else 0 end
            from generate_series(1, cardinality(c.leg_filters)) n order by n)),
        h.model, h.is_sent, h.tokens, h.floor_micros, h.progress_micros, h.flags, h.feature
    from credits.holds h join credits.chains c using (organization_id, chain_id) where h.organization_id = any (%s)"""
CHARGES = """
    select request_id, coalesce(sum(charged_micros) filter (where kind < 2), 0)::bigint,
        coalesce(-sum(charged_micros) filter (where kind = 2), 0)::bigint
    from ledger.attribution where organization_id = %s group by 1"""
ESTIMATES = "select request_id, leg_micros from credits.estimates where organization_id = %s"
POOLS = """
    select pool_id, kind, owner_user_id, model_filter, closed_at is not null
    from credits.pools where organization_id = %s"""
NAMES = """
    select grant_id, pool_id, parent_grant_id, amount_micros, priority, is_free, effective_at,
        nullif(expires_at, 'infinity'), reason = 'after the switch of pools' is true
    from credits.grants
    where organization_id = %s and created_at between %s and %s order by ctid"""  # mostly as they came
PURCHASES = """
    select p.pool_id, p.state, p.declines, nullif(p.next_try_at, '-infinity'), array(
        select t.state from credits.top_ups t
        where t.organization_id = p.organization_id and t.pool_id = p.pool_id order by t.requested_at)
    from credits.top_up_policies p where p.organization_id = %s"""
PARTS = """
    select (d.transfer_id, p.grant_id)::text, d.into_kind, d.held_micros, d.arrived_at, p.grant_id, p.model_filter,
        p.amount_micros, p.priority, p.is_free, p.effective_at, nullif(p.expires_at, 'infinity')
    from credits.departures d left join lateral jsonb_to_recordset(d.parts) as p(grant_id uuid, model_filter text,
        amount_micros bigint, priority integer, is_free boolean, effective_at timestamptz, expires_at timestamptz)
        on true
    where d.organization_id = %s"""
ARRIVALS = "select transfer_id, user_id, amount_micros from credits.arrivals where organization_id = %s"
TERMS = """
    select amount_micros, priority, nullif(credits_expire_at, 'infinity')
    from credits.code_redemptions where organization_id = %s and redemption_id = %s"""
WISHES = "select limit_request_id, state from credits.limit_requests where organization_id = %s"
POUR = "select credits.pour(organization_id, pool_id, %s) from credits.pools where organization_id = %s"
GRANTS = """
    select s.grant_id, s.state, s.left_micros,
        coalesce((
            select sum(b.end_micros - b.start_micros) from credits.burns b
            where (b.organization_id, b.pool_id, b.grant_id) = (s.organization_id, s.pool_id, s.grant_id)), 0)::bigint,
        coalesce(sum(e.amount) filter (where e.kind = 'expiry'), 0)::bigint,
        (select coalesce(sum(x.amount), 0)::bigint from ledger.entries x
         where x.organization_id = s.organization_id and x.from_grant_id = s.grant_id)
            + coalesce(sum(e.amount) filter (where e.kind = 'transfer_out'), 0)::bigint,
        coalesce(sum(e.amount) filter (where e.kind = 'refund'), 0)::bigint,
        case when coalesce(bool_or(e.kind in ('grant', 'roll_over', 'transfer', 'transfer_in', 'forgiveness')), false)
             then coalesce(sum(e.amount) filter (where e.kind = 'void'), 0)::bigint
             when s.state = 'ended' then g.amount_micros else 0 end
    from credits.grant_states s join credits.grants g using (organization_id, grant_id)
    left join ledger.entries e on e.organization_id = s.organization_id and e.grant_id = s.grant_id
    where s.organization_id = %s
    group by s.organization_id, s.pool_id, s.grant_id, s.state, s.left_micros, g.amount_micros"""


# ---------------------------------------------------------------------------------------------- steps


def random_steps(seed: int, count: int) -> list[Step]:
    """A history of `count` steps; the same for the same seed."""
    dice = random.Random(seed)
    steps: list[Step] = []
    for org in range(2):
        # A shared pool, a small pool of the first user's own, a share for the second that goes on in the open part.
        steps += [("pool", 0, org, 0, 0, 0), ("grant", 0, org, 0, 200, 0, 0, 0, 1)]
        steps += [("pool", 0, org, 1, 0, 0), ("grant", 0, org, 1, 50, 0, 0, 0, 1)]
        steps += [("allocate", 0, org, 0, 1, 1, 2, 1, 1)]
        # The home of somebody who belongs to both organizations.
        steps += [("pool", 0, HOME + org, 0, 0, 0), ("grant", 0, HOME + org, 0, 100, 0, 0, 0, 1)]
        steps += [("pool", 0, HOME + org, 0, 0, 2 + org), ("grant", 0, HOME + org, 1, 50, 0, 3, 0, 1)]
    prelude = dice.choices(["pool", "grant", "allocate", "limit"], [3, 3, 3, 2], k=min(6, count // 4))
    names = dice.choices(list(WEIGHTS), list(WEIGHTS.values()), k=max(0, count - len(steps) - len(prelude)))
    steps += [(name, 1, *_random_arguments(name, dice)) for name in prelude]
    return steps + [(name, dice.randrange(11), *_random_arguments(name, dice)) for name in names]


def _random_arguments(name: str, dice: random.Random) -> tuple[Any, ...]:
    if name == "batch":
        count = dice.choice((1, 1, 1, 1, 2, 2, 3, 3, 5, 5, 8, 16))
        return (tuple(_random_move(dice) for _ in range(count)),)
    org = dice.randrange(1000) + (HOME if name in AT_HOME and dice.randrange(5) == 0 else 0)
    if name == "grant":
        amount = dice.choice((1, 20, 50, 100, 200, 400))
        return (org, dice.randrange(1000), amount, *(dice.randrange(1000) for _ in range(4)))
    return (org, *(dice.randrange(1000) for _ in range(ARGUMENTS.get(name, 4) - 1)))


def _random_move(dice: random.Random) -> tuple[int, ...]:
    kind, org, *others = (dice.randrange(1000) for _ in range(10))
    return (kind, org + (HOME if dice.randrange(6) == 0 else 0), *others)


# ---------------------------------------------------------------------------------------------- the stage


@dataclass
class Cast:
    """Who there is in one organization, and the requests that were ever made."""

    organization: UUID
    users: list[UUID]
    keys: list[UUID]  # the first are the users', the last a service's
    teams: list[UUID]
    departments: list[UUID]
    requests: list[UUID] = field(default_factory=list)
    sent: list[tuple[str, "Ask"]] = field(default_factory=list)  # commands with idempotency keys
    is_shared: bool = True  # as identity was told last


@dataclass(frozen=True)
class Way:
    """Of somebody who left their home with credits: from where to where, and whose they shall be."""

    transfer_id: UUID
    home: Cast
    company: Cast
    kind: str


class Told(ref.Names):
    """Ids that the database drew in the step that is played now, looked up by what they are of."""

    def __init__(self, stage: "Stage", organization_id: UUID) -> None:
        self.stage, self.organization_id = stage, organization_id
        self.at = EARLIER
        self.new: dict[tuple[Any, ...], list[tuple[UUID, ref.Like, bool]]] = {}

    def pool(self, kind: str, owner: UUID | None, pattern: str | None) -> tuple[UUID, UUID | None]:
        """As in Names."""
        row = self.stage.admin.execute(
            "select pool_id, open_part_id from credits.pools where organization_id = %s and kind = %s"
            " and owner_user_id is not distinct from %s and model_filter is not distinct from %s",
            [self.organization_id, kind, owner, pattern],
        ).fetchone()
        if row is None:
            raise Disagreement(f"there is no {kind} pool of {owner} for {pattern}")
        return row[0], row[1]

    def grant(
        self, pool_id: UUID, parent: UUID | None, amount: int, like: ref.Like | None = None, *, is_swept: bool = False
    ) -> UUID:
        """As in Names."""
        found = None
        if self.at == self.stage.now:
            found = self._found(pool_id, parent, amount, like, is_swept)
        if found is None:  # a step of several commands has them all at one instant
            self._look()
            found = self._found(pool_id, parent, amount, like, is_swept)
        if found is None:
            raise Disagreement(f"no grant of {amount} from {parent} came into {pool_id}; there came {self.new}")
        return found

    def _look(self) -> None:
        self.at, self.new = self.stage.now, {}
        known = self.stage.world.organizations[self.organization_id].grants
        # A refund books each charge of a request by itself.
        for row in self.stage.admin.execute(
            NAMES, [self.organization_id, self.at, self.at + timedelta(microseconds=9)], prepare=True
        ):
            if row[0] not in known:
                is_like = (*row[4:7], row[7] or ref.LATEST)
                self.new.setdefault(row[1:4], []).append((row[0], is_like, row[8]))

    def _found(
        self, pool_id: UUID, parent: UUID | None, amount: int, like: ref.Like | None, is_swept: bool
    ) -> UUID | None:
        came = self.new.get((pool_id, parent, amount), [])
        for each in came:
            if like in (None, each[1]) and is_swept == each[2]:
                came.remove(each)
                return each[0]
        return None


class Disagreement(AssertionError):
    """The database and the reference differ."""


class Stage:
    """Two companies and the homes of two people who belong to both, in the database and in the reference."""

    def __init__(self, simulator: Connection, admin: Connection) -> None:
        arrays.register(simulator)
        self.simulator, self.admin = simulator, admin
        for conn in (simulator, admin):
            conn.prepared_max = 1000  # a null in a command is another type, and makes another statement of it
        self.now = BEGINNING
        self.world = ref.World()
        people = [uuid7() for _ in range(2)]
        self.companies = [self._open(ZONES[n + 1], [*people, uuid7()]) for n in range(2)]
        self.homes = [self._open(ZONES[3 * n], [people[n]] * 3, kind="individual") for n in range(2)]
        self.cast = [*self.companies, *self.homes]
        self.ways: list[Way] = []

    def play(self, steps: Sequence[Step], *, look_every: int = 8) -> None:
        """Play the steps; grants and burns are compared every so many steps and at the end.

        Raises:
            Disagreement
        """
        for number, step in enumerate(steps):
            self._pass_time(step[1])
            getattr(self, f"_{step[0]}")(*step[2:])
            casts = self.cast if step[0] in ("batch", "expire", "depart", "arrive") else [self._cast(step[2])]
            self._say_what_is_shared(casts)
            self._compare(casts, number)
            for cast in casts if number % look_every == 0 else []:
                self._compare_deeply(cast, number)
        self._release_all()
        self._compare(self.cast, len(steps))
        for cast in self.cast:
            self._compare_deeply(cast, len(steps))

    # ------------------------------------------------------------------ setting

    def _cast(self, org: int) -> Cast:
        return (self.homes if org >= HOME else self.companies)[org % 2]

    def _open(self, zone: str, users: list[UUID], *, kind: str = "company") -> Cast:
        organization = ref.Organization(uuid7(), zone=zone, anchor=self.now, is_shared=kind == "company")
        cast = Cast(
            organization.organization_id,
            users=users,
            keys=[uuid7() for _ in range(4)],
            teams=[uuid7() for _ in range(2)],
            departments=[uuid7()],
        )
        for i, user in enumerate(cast.users):
            organization.members[user] = ref.Member(
                team=cast.teams[i % 2], department=cast.departments[0] if i else None
            )
        for i, key in enumerate(cast.keys):
            owner, team = (None, cast.teams[1]) if i == 3 else (cast.users[i], None)
            organization.keys[key] = ref.Key(
                key, key, owner, team=team, expires=self.now + timedelta(days=9) if i == 2 else None
            )
        organization.names = Told(self, cast.organization)
        self.world.organizations[cast.organization] = organization
        with self.admin.transaction():
            self._insert(cast, organization)
            self.admin.execute(
                "update identity.organizations set kind = %s where organization_id = %s", [kind, cast.organization]
            )
        self._say_what_is_shared([cast])
        self.simulator.execute("select credits.open_organization(%s)", [cast.organization])
        return cast

    def _insert(self, cast: Cast, organization: ref.Organization) -> None:
        """The people of an organization, as identity would have them."""
        always = {"org": cast.organization, "now": self.now}
        self.admin.execute(
            INSERT_ORGANIZATION, {**always, "slug": f"h{cast.organization.hex}", "zone": organization.zone}
        )
        for department in cast.departments:
            self.admin.execute(INSERT_DEPARTMENT, {**always, "id": department, "name": department.hex})
        for team in cast.teams:
            self.admin.execute(INSERT_TEAM, {**always, "id": team, "name": team.hex})
        for user, member in organization.members.items():
            place = {"id": user, "email": f"{user.hex}@x.example", "team": member.team, "department": member.department}
            self.admin.execute(INSERT_MEMBER, {**always, **place})
        for key in organization.keys.values():
            columns = {"id": key.key_id, "original": key.original, "public": key.key_id.hex}
            rest = {"user": key.user, "team": key.team, "end": key.expires}
            self.admin.execute(INSERT_KEY, {**always, **columns, **rest})

    def _say_what_is_shared(self, casts: Sequence[Cast]) -> None:
        """An organization is told how it shares when its pools were switched, as the product tells it."""
        for cast in casts:
            is_shared = self._model(cast).is_shared
            if cast.is_shared != is_shared:
                self.admin.execute(
                    "update identity.organizations set is_shared_token_pool = %s where organization_id = %s",
                    [is_shared, cast.organization],
                )
                cast.is_shared = is_shared

    def _model(self, cast: Cast) -> ref.Organization:
        return self.world.organizations[cast.organization]

    def _pass_time(self, how: int) -> None:
        """A little, a lot, or to the very next instant at which something becomes due."""
        if how < len(LATENESS):
            self.now += timedelta(microseconds=LATENESS[how] or 10)
            return
        events = [self.now + timedelta(days=2)]
        for organization in self.world.organizations.values():
            events += [g.effective for g in organization.grants.values() if g.state == "scheduled"]
            events += [g.expires for g in organization.grants.values() if g.state in ("active", "spent")]
            events += [h.expires for h in organization.holds.values()]
            events += [c.valid_until for c in organization.chains.values()]
            events += [s.next_at for s in organization.schedules.values()]
            events += [p.next_try for p in organization.policies.values()]
            events += [w.lapses for w in organization.wishes.values() if w.state == "open"]
            events += [a.renews_at for a in organization.allocations.values() if not a.is_ended]
            events += [r.starts for r in organization.raises.values() if r.state == "scheduled"]
            events += [r.ends for r in organization.raises.values() if r.state == "active"]
        event = min(each for each in events if each > self.now and each != ref.LATEST)
        before = self.now
        self.now = event - timedelta(microseconds=1) if how == 10 else event  # just before it, or at it
        if self.now == before:
            self.now = event

    # ------------------------------------------------------------------ commands

    def _command(self, cast: Cast, sql: str, arguments: list[Any], run: Run) -> None:
        """The command in both; both succeed with the same result or are refused with the same code."""
        found = code = expected = refused = None
        try:
            row = self.simulator.execute(sql, arguments).fetchone()
            found = row[0] if row else None
        except psycopg.Error as error:
            code = error.sqlstate
        try:
            # What is refused changes nothing, so that it is tried on a copy.
            expected = run(self._model(cast).copied() if code else self._model(cast))
        except ref.Refused as refusal:
            refused = refusal.code
        if code != refused or (expected is not None and found != expected):
            raise Disagreement(f"{sql} {arguments}: {found} {code}, the reference {expected} {refused}")

    def _keyed(self, cast: Cast, sql: str, ask: Ask) -> None:
        """A command with an idempotency key, which may be sent again."""
        arguments, run = ask(None)
        self._command(cast, sql, arguments, run)
        cast.sent.append((sql, ask))

    def _again(self, org: int, which: int, how: int, *_: int) -> None:
        """A command of before once more under its key: as it was, or with another body. Most often one of late."""
        cast = self._cast(org)
        if cast.sent:
            lately = cast.sent[-4:] if which % 3 else cast.sent
            sql, ask = lately[which % len(lately)]
            self._command(cast, sql, *ask("another" if how % 3 == 0 else None))

    def _pool(self, org: int, kind: int, owner: int, pattern: int, *_: int) -> None:
        cast = self._cast(org)
        name = ("personal", "personal", "shared")[kind % 3] if kind else "shared"
        if cast in self.homes:
            name = "individual"
        user = cast.users[owner % 3] if name == "personal" else None
        self._open_pool(cast, name, user, FILTERS[pattern % len(FILTERS)])

    def _open_pool(self, cast: Cast, name: str, user: UUID | None, like: str | None) -> None:
        self._command(
            cast,
            "select credits.open_pool(%s, %s, %s, %s, 'Pool', %s, %s)",
            [cast.organization, uuid7(), name, user, like, self.now],
            lambda o: o.open_pool(name, user, like, self.now),
        )

    def _pick_pool(self, cast: Cast, which: int, *, shared: bool = False) -> UUID:
        """Mostly an open one; shared: mostly a shared one."""
        pools = self._model(cast).pools.values()
        mostly = [p.pool_id for p in pools if not p.is_closed and (not shared or p.kind == "shared")]
        return _one(mostly, [p.pool_id for p in pools], which)

    def _grant(self, org: int, pool: int, amount: int, begins: int, ends: int, order: int, key: int) -> None:
        cast = self._cast(org)
        delays = (None, None, 0, 60, 86400, 3 * 86400, -3600)
        delay = delays[begins % len(delays)]
        effective = None if delay is None else self.now + timedelta(seconds=delay)
        lives = (None, None, 600, 86400, 2 * 86400, 5 * 86400, 1)
        life = lives[ends % len(lives)]
        expires = None if life is None else (effective or self.now) + timedelta(seconds=life)
        pool_id = self._pick_pool(cast, pool)
        priority, is_free = (50, 100, 100)[order % 3], order % 2 == 0
        key_text = f"grant {key % 40}" if key % 5 == 0 else f"grant {uuid7()}"
        rolls = (None, None, (0, 30), (20, 60), (40, 40), (5, 4))[key % 6]
        until = None if key % 2 else (expires or self.now) + timedelta(days=1, seconds=ends % 3)
        rolls_until = until if rolls else None

        def ask(reason: str | None) -> tuple[list[Any], Run]:
            grant_id = uuid7()
            given = [pool_id, amount, priority, is_free, effective, expires]
            end = [key_text, self.now, *(rolls or (None, None)), rolls_until]
            return [cast.organization, grant_id, *given, reason, *end], lambda o: o.add_grant(
                grant_id, pool_id, amount, priority, is_free, effective, expires, key_text, self.now, rolls,
                rolls_until, reason,
            )  # fmt: skip

        self._keyed(
            cast,
            "select credits.add_grant(%s, %s, %s, 'purchase', %s, %s::smallint, %s, 0, %s, %s, %s, null, %s, %s,"
            " %s, %s, %s)",
            ask,
        )

    def _transfer(self, org: int, giver: int, taker: int, amount: int, key: int) -> None:
        cast = self._cast(org)
        pools = self._pick_pool(cast, giver), self._pick_pool(cast, taker)
        micros = (None, 1, 10, 40, 0, 10**16)[amount % 6 if amount % 7 else amount % 4]
        key_text = f"transfer {key % 40}"
        self._keyed(
            cast,
            "select credits.transfer_credits(%s, %s, %s, %s, %s, null, %s, %s)",
            lambda reason: (
                [cast.organization, *pools, micros, reason, key_text, self.now],
                lambda o: o.transfer(*pools, micros, key_text, self.now, reason),
            ),
        )

    def _refund(self, org: int, which: int, amount: int, key: int) -> None:
        """Mostly of what was charged lately."""
        cast = self._cast(org)
        charges = self._model(cast).charges
        requests = list(charges)[-12 if which % 4 else 0 :] if which % 19 else cast.requests
        request = requests[which % len(requests)] if requests else uuid7()
        micros = (None, None, 1, 3, 10, 0)[amount % 6]
        key_text = f"refund {key % 60}" if key % 3 == 0 else f"refund {uuid7()}"
        self._keyed(
            cast,
            "select credits.refund_charge(%s, %s, %s, %s, null, %s, %s)",
            lambda reason: (
                [cast.organization, request, micros, reason, key_text, self.now],
                lambda o: o.refund(request, micros, key_text, self.now, reason),
            ),
        )

    def _forgive(self, org: int, pool: int, amount: int, key: int) -> None:
        cast = self._cast(org)
        pools = self._model(cast).pools
        owing = [p for p in pools if self._model(cast).balance(p).excess]
        pool_id = owing[pool % len(owing)] if owing and pool % 5 else self._pick_pool(cast, pool)
        micros = (None, None, 1, 5, 0)[amount % 5]
        key_text = f"forgive {key % 60}"
        self._keyed(
            cast,
            "select credits.forgive_debt(%s, %s, %s, %s, null, %s, %s)",
            lambda reason: (
                [cast.organization, pool_id, micros, reason, key_text, self.now],
                lambda o: o.forgive_debt(pool_id, micros, key_text, self.now, reason),
            ),
        )

    def _schedule(
        self, org: int, pool: int, amount: int, unit: int, anchor: int, lasts: int, ends: int, rolls: int, zone: int
    ) -> None:
        cast = self._cast(org)
        pool_id, micros = self._pick_pool(cast, pool), (3, 15, 40, 0)[amount % 4 if amount % 5 else amount % 3]
        name, every = (("day", 1), ("day", 3), ("week", 1), ("month", 1), ("day", 2), ("year", 1))[unit % 6]
        back = (0, 0, 3600, 5 * 86400, -7200, 70 * 86400, -86400)[anchor % 7]
        start = self.now - timedelta(seconds=back)
        life = (None, None, timedelta(hours=5), timedelta(days=1), timedelta(days=4, hours=1))[lasts % 5]
        is_lasting = lasts % 8 == 7
        until = (None, None, self.now + timedelta(days=6), self.now + timedelta(hours=1))[ends % 4]
        bounds = (None, None, (0, 8), (5, 20), (30, 30), (5, 4))[rolls % 6]
        key_text = f"schedule {rolls % 30}"

        def ask(reason: str | None) -> tuple[list[Any], Run]:
            schedule_id = uuid7()
            head = [cast.organization, schedule_id, pool_id, micros, amount % 2 == 0, ZONES[zone % 4], start]
            tail = [name, every, life, is_lasting, until, *(bounds or (None, None)), reason, key_text, self.now]
            return head + tail, lambda o: o.add_schedule(
                ref.Schedule(
                    schedule_id, pool_id, micros, 80, amount % 2 == 0, ZoneInfo(ZONES[zone % 4]), start, name, every,
                    life, is_lasting, until or ref.LATEST, bounds,
                ),
                key_text, self.now, reason,
            )  # fmt: skip

        self._keyed(
            cast,
            "select credits.add_schedule(%s, %s, %s, 'plan', %s, 80::smallint, %s, 0, %s, %s, %s, %s, %s, %s, %s, %s,"
            " %s, %s, null, %s, %s)",
            ask,
        )

    def _cancel(self, org: int, which: int, *_: int) -> None:
        cast = self._cast(org)
        schedules = list(self._model(cast).schedules)
        schedule_id = schedules[which % len(schedules)] if schedules else uuid7()
        self._command(
            cast,
            "select credits.cancel_schedule(%s, %s, %s) is null",
            [cast.organization, schedule_id, self.now],
            lambda o: o.cancel_schedule(schedule_id, self.now),
        )

    def _top_up(self, org: int, pool: int, below: int, amount: int, ceiling: int, hourly: int) -> None:
        """A pool shall buy by itself, or no more."""
        cast = self._cast(org)
        pool_id = self._pick_pool(cast, pool)
        if below % 7 == 0:
            self._command(
                cast,
                "select credits.end_top_up(%s, %s, %s) is null",
                [cast.organization, pool_id, self.now],
                lambda o: o.end_top_up(pool_id, self.now),
            )
            return
        size = (20, 45, 0)[amount % 3 if amount % 4 else 0]
        terms = ((10, 60, 10**4)[below % 3], size, (40, 100, 10**5)[ceiling % 3])
        most = 1 + hourly % 3
        self._command(
            cast,
            "select credits.set_top_up(%s, %s, %s, %s, %s, %s, null, %s) is null",
            [cast.organization, pool_id, *terms, most, self.now],
            lambda o: o.set_top_up(pool_id, *terms, most, self.now),
        )

    def _buy(self, org: int, which: int, below: int, amount: int) -> None:
        """What the worker does; the first time, a policy is set."""
        cast = self._cast(org)
        pools = list(self._model(cast).policies)
        if not pools:
            self._top_up(org, which, below, amount, amount // 3, which)
            return
        pool_id, purchase_id = pools[which % len(pools)], uuid7()
        self._command(
            cast,
            "select top_up_id from credits.begin_top_up(%s, %s, %s, %s)",
            [cast.organization, pool_id, purchase_id, self.now],
            lambda o: o.begin_top_up(pool_id, purchase_id, self.now),
        )

    def _bought(self, org: int, which: int, succeeded: int, _: int) -> None:
        """It was paid or not; mostly of one that is not decided yet."""
        cast = self._cast(org)
        purchases = self._model(cast).purchases
        if not purchases:
            self._buy(org, which, succeeded, which)
            return
        open_ones = [p for p in purchases if purchases[p].state == "pending"]
        purchase_id = _one(open_ones, list(purchases), which)
        is_paid = succeeded % 3 > 0
        self._command(
            cast,
            "select state from credits.decide_top_up(%s, %s, %s, 0, null, null, %s)",
            [cast.organization, purchase_id, is_paid, self.now],
            lambda o: o.decide_top_up(purchase_id, is_paid, self.now),
        )

    def _ask(self, org: int, which: int, who: int, user: int, amount: int, until: int) -> None:
        cast = self._cast(org)
        limits = self._model(cast).limits
        asking = [x for x in limits if limits[x].action == "asks" and not limits[x].is_ended] if which % 7 else []
        if which % 7 and not asking:
            self._default(org, who, 0, 0, 0, until, 1 + amount % 5, 1, 0)
            return
        limit_ids = asking or list(limits)
        limit_id = limit_ids[which % len(limit_ids)] if limit_ids else uuid7()
        limit = limits.get(limit_id)
        subject = self._subject(cast, limit.scope, who) if limit and limit.each and who % 13 else None
        member, micros = cast.users[user % 3], (5, 20, 60, 0)[amount % 4 if amount % 5 else amount % 3]
        ends = self.now + timedelta(seconds=(3600, 86400, 20 * 86400, 0)[until % 4 if until % 5 else until % 3])
        key_text = f"ask {amount % 40}"

        def ask(reason: str | None) -> tuple[list[Any], Run]:
            wish_id = uuid7()
            wish = [wish_id, limit_id, subject, member, micros, ends, reason or "a demo", key_text, self.now]
            return [cast.organization, *wish], lambda o: o.ask_for_more(*wish)  # type: ignore[arg-type]

        self._keyed(cast, "select credits.request_raise(%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)", ask)

    def _decide(self, org: int, which: int, how: int, _: int) -> None:
        cast = self._cast(org)
        wishes = self._model(cast).wishes
        if not wishes:
            self._ask(org, which, how, which, 1 + how % 4, how)
            return
        open_ones = [w for w in wishes if wishes[w].state == "open" and wishes[w].lapses > self.now]
        if not open_ones and which % 3:
            self._ask(org, which, how, which, 1 + how % 4, how)
            return
        wish_id, raise_id = _one(open_ones, list(wishes), which), uuid7()
        other = (7, self.now + timedelta(hours=2)) if how % 2 else (None, None)
        self._command(
            cast,
            "select credits.decide_request(%s, %s, %s, %s, %s, %s, null, null, %s)",
            [cast.organization, wish_id, how % 3 > 0, raise_id, *other, self.now],
            lambda o: o.decide_wish(wish_id, how % 3 > 0, raise_id, *other, self.now),
        )

    def _campaign(
        self, org: int, starts: int, ends: int, life: int, per_code: int, per_person: int, per_day: int, in_all: int
    ) -> None:
        cast = self._cast(org)
        campaign_id = uuid7()
        begins = self.now + timedelta(hours=(0, 0, 0, 5)[starts % 4])
        until = (None, None, begins + timedelta(days=4), self.now)[ends % 4 if ends % 3 else 0]
        credits_end = (None, None, self.now + timedelta(days=6))[life % 3]
        days = (None, 1, 3)[life % 7 % 3]
        most = (1 + per_code % 3, 1 + per_person % 2, (None, 1, 2)[per_day % 3], (None, 3)[in_all % 2])
        campaign = ref.Campaign(
            15, 50, begins, until or ref.LATEST, credits_end or ref.LATEST, days, *most[:2], *most[2:]
        )
        terms: dict[str, Any] = {"name": f"Campaign {campaign_id}", "amount_micros": 15, "priority": 50}
        terms |= {"is_for_members": True, "valid_from": begins, "valid_until": until or "infinity"}
        terms |= {"credits_expire_at": credits_end or "infinity", "credits_days": days}
        terms |= dict(zip(("most_per_code", "most_per_person", "most_per_day", "most_in_all"), most, strict=True))
        self._command(
            cast,
            "select credits.open_campaign(%s, %s, %s, null, %s) is null",
            [cast.organization, campaign_id, json.dumps(terms, default=str), self.now],
            lambda o: o.open_campaign(campaign_id, campaign, self.now),
        )

    def _code(self, org: int, which: int, revokes: int, code: int) -> None:
        """One more of a campaign; sometimes one, or all of them, are no good any more."""
        cast = self._cast(org)
        model, code_id = self._model(cast), uuid7()
        campaigns, codes = list(model.campaigns), list(model.codes)
        if not campaigns:
            self._campaign(org, 0, which, code, which, revokes, code, revokes)
            return
        campaign_id = campaigns[which % len(campaigns)] if which % 29 else uuid7()
        if revokes % 5 == 0:
            ended = codes[code % len(codes)] if codes and revokes % 10 else None
            self._command(
                cast,
                "select credits.revoke_codes(%s, %s, %s, null, %s)",
                [cast.organization, campaign_id, ended, self.now],
                lambda o: o.revoke_codes(campaign_id, ended, self.now),
            )
            return
        self._command(
            cast,
            "select credits.add_codes(%s, %s, %s, %s)",
            [cast.organization, campaign_id, json.dumps({str(code_id): "hint"}), self.now],
            lambda o: o.add_code(campaign_id, code_id, self.now),
        )

    def _redeem(self, org: int, which: int, who: int, stops: int) -> None:
        """Claimed, then granted, as one call does it; sometimes it stops in between, and is done again later."""
        cast = self._cast(org)
        if not self._model(cast).codes:
            self._code(org, which, 1, stops)
            return
        codes, user, claim_id = list(self._model(cast).codes), cast.users[who % 3], uuid7()
        code_id = codes[which % len(codes)] if codes else uuid7()
        redeem = "select redemption_id from credits.redeem_code(%s, %s, %s, %s, '', %s, %s)"
        claim = [cast.organization, claim_id, code_id, user, cast.organization, self.now]
        self._command(cast, redeem, claim, lambda o: o.redeem(claim_id, code_id, user, self.now))
        model = self._model(cast)
        redeemed = model.codes[code_id].redeemed.get(user) if code_id in model.codes else None
        if redeemed is None or stops % 5 == 0:
            return
        row = self.admin.execute(TERMS, [cast.organization, redeemed[0]]).fetchone()
        assert row is not None
        self._open_pool(cast, "personal", user, None)
        own = next(p for p in model.pools.values() if (p.kind, p.owner, p.filter) == ("personal", user, None))
        grant_id = uuid7()
        self._command(
            cast,
            "select credits.grant_code(%s, %s, %s, %s, 'Welcome', 'hint', %s, %s, %s, null, %s)",
            [cast.organization, grant_id, own.pool_id, redeemed[0], *row, self.now],
            lambda o: o.grant_code(grant_id, own.pool_id, redeemed[0], code_id, self.now),
        )

    def _switch(self, org: int, to: int, key: int, _: int) -> None:
        cast = self._cast(org)
        ways = ("personal", "shared")
        is_shared = any(p.kind == "shared" and not p.is_closed for p in self._model(cast).pools.values())
        way = ways[to % 2] if to % 5 == 4 else ways[1 - is_shared]  # mostly the one that it has not
        key_text = f"switch {key % 60}"
        self._keyed(
            cast,
            "select credits.switch_pools(%s, %s, null, %s, %s)",
            lambda other: (
                [cast.organization, "neither" if other else way, key_text, self.now],
                lambda o: o.switch_pools("neither" if other else way, key_text, self.now),
            ),
        )

    def _overrun(self, org: int, who: int, size: int, more: int) -> None:
        """A request that runs while the pools are switched uses more than it held: somebody may owe a closed pool."""
        cast, request = self._cast(org), uuid7()
        cast.requests.append(request)
        ask = ref.Move(cast.organization, ref.AUTHORIZE, request, cast.users[who % 3], None, size % 20, model="gpt-4")
        self._move([ask])
        if request in self._model(cast).holds:
            self._pass_time(size % 5)
            self._switch(org, 0, more, 0)
            self._pass_time(who % 5)
            self._move([replace(ask, action=ref.SETTLE, amount=size % 20 + (5, 30, 100)[more % 3])])

    def _depart(self, org: int, who: int, kind: int, how: int, when: int) -> None:
        """Somebody leaves their home with credits; mostly they arrive at once, as in one call, sometimes later.

        Sometimes it is a departure of before, mostly of late.
        """
        home, company, into = self.homes[who % 2], self.companies[org % 2], ("personal", "shared")[kind % 2]
        if how % 4:
            home, company, into = self._who_owes() or (home, company, into)
        if how % 5 and not any(g.left and g.state == "active" for g in self._model(home).grants.values()):
            at_home = HOME + self.homes.index(home)
            self._grant(at_home, kind, (20, 50, 100)[when % 3], how, when, who, 1)  # there is nothing to bring
            if when % 3 == 0:
                return
        way = Way(uuid7(), home, company, into)
        if self.ways and how % 6 == 0:
            lately = self.ways[-3:] if how % 4 else self.ways
            way = lately[how % len(lately)]
        model = self._model(way.home)
        asked = (way.transfer_id, way.home.users[0], way.company.organization, way.kind)
        self._command(
            way.home,
            "select amount_micros from credits.depart(%s, %s, %s, %s, %s, null, %s)",
            [way.home.organization, *asked, self.now],
            lambda o: o.depart(way.transfer_id, way.kind, self.now),
        )
        if way.transfer_id in model.departures:
            self.ways += [way] if way not in self.ways else []
            if when % 2:
                self._bring(way, is_noted=when % 13 > 0)

    def _who_owes(self) -> tuple[Cast, Cast, str] | None:
        """A home, a company and a kind of pool whose credits would pay what is owed to a closed pool."""
        for company in self.companies:
            pools = self._model(company).pools
            for to_id in (to_id for pool in pools.values() for to_id, rest in pool.rests.items() if rest < 0):
                if pools[to_id].kind == "shared":
                    return self.homes[0], company, "shared"
                for n, home in enumerate(self.homes):
                    if pools[to_id].owner == company.users[n]:
                        return home, company, "personal"
        return None

    def _arrive(self, _: int, which: int) -> None:
        """What is under way, and sometimes what has arrived before."""
        coming = [way for way in self.ways if self._model(way.home).departures[way.transfer_id].arrived is None]
        ways = coming if which % 3 else self.ways
        if ways:
            self._bring(ways[which % len(ways)], is_noted=which % 7 > 0)

    def _bring(self, way: Way, *, is_noted: bool) -> None:
        """Into the organization, then noted at home, unless the process ends in between."""
        parts = self.admin.execute(
            "select parts from credits.departures where organization_id = %s and transfer_id = %s",
            [way.home.organization, way.transfer_id],
        ).fetchone()
        assert parts is not None
        user, left = way.home.users[0], self._model(way.home).departures[way.transfer_id]
        self._command(
            way.company,
            "select credits.arrive(%s, %s, %s, %s, %s, %s, null, %s)",
            [way.company.organization, way.transfer_id, user, way.home.organization, way.kind, Jsonb(parts[0]),
             self.now],
            lambda o: o.arrive(way.transfer_id, user, left, self.now),
        )  # fmt: skip
        if is_noted:
            self._command(
                way.home,
                "select credits.note_arrival(%s, %s, %s) is null",
                [way.home.organization, way.transfer_id, self.now],
                lambda o: o.note_arrival(way.transfer_id, self.now),
            )

    def _void(self, org: int, which: int, key: int, _: int) -> None:
        cast = self._cast(org)
        grants = list(self._model(cast).grants)
        grant_id = grants[which % len(grants)] if grants and which % 17 else uuid7()
        key_text = f"void {key % 50}"
        self._keyed(
            cast,
            "select credits.void_grant(%s, %s, %s, null, %s, %s)",
            lambda reason: (
                [cast.organization, grant_id, reason, key_text, self.now],
                lambda o: o.void_grant(grant_id, key_text, self.now, reason),
            ),
        )

    def _allocate(self, org: int, pool: int, user: int, kind: int, amount: int, empty: int, key: int) -> None:
        cast = self._cast(org)
        pools = self._model(cast).pools.values()
        if amount % 2 and not any(p.kind == "shared" and not p.is_closed for p in pools):
            self._switch(org, 0, key, 0)  # there is none to have a share of
            return
        share = "reserved" if kind % 3 else "capped"
        picked = (
            self._pick_pool(cast, pool, shared=True),
            cast.users[user % 3],
            share,
            "none" if share == "reserved" else PERIODS[kind % 4],
            (0, 10, 30, 60, 100, -1)[amount % 6 if amount % 31 else 5],
            ("stops", "open_part")[empty % 2],
            empty % 5 == 0,
        )
        key_text = f"share {key % 60}" if key % 4 == 0 else f"share {uuid7()}"
        self._share(cast, picked, 0, key_text)

    def _share(self, cast: Cast, picked: tuple[Any, ...], carry: int, key: str) -> None:
        """picked: as allocate takes it, from the pool to whether more than there is may be reserved."""

        def ask(other: str | None) -> tuple[list[Any], Run]:
            share_id = uuid7()
            arguments = (*picked[:-1], not picked[-1]) if other else picked
            return [cast.organization, share_id, *arguments, key, self.now, carry], lambda o: o.allocate(
                share_id, *arguments, key, self.now, carry
            )

        self._keyed(cast, "select credits.allocate(%s, %s, %s, %s, %s, %s, %s, %s, %s, null, %s, %s, %s)", ask)

    def _end_allocation(self, org: int, which: int, *_: int) -> None:
        cast = self._cast(org)
        shares = self._model(cast).allocations
        allocation_id = _one([a for a in shares if not shares[a].is_ended], list(shares), which)
        self._command(
            cast,
            "select credits.end_allocation(%s, %s, %s) is null",
            [cast.organization, allocation_id, self.now],
            lambda o: o.end_allocation(allocation_id, self.now),
        )

    def _limit(self, org: int, scope: int, metric: int, pattern: int, period: int, amount: int, action: int) -> None:
        cast = self._cast(org)
        scopes: list[tuple[str, UUID | None]] = [("organization", None)]
        scopes += [("user", user) for user in cast.users] + [("key", key) for key in cast.keys]
        scopes += [("team", team) for team in cast.teams] + [("department", cast.departments[0])]
        name, scope_id = scopes[scope % len(scopes)]
        arguments = (
            name,
            scope_id,
            ("credits", "credits", "calls", "tokens")[metric % 4],
            FILTERS[pattern % len(FILTERS)],
            PERIODS[period % 4],
            (0, 8, 30, 80, 200, 500)[amount % 6],
            ("stops", "stops", "warns")[action % 3],
        )
        limit_id = uuid7()
        self._command(
            cast,
            "select credits.set_limit(%s, %s, %s, %s, %s, %s, %s, %s, %s, null, %s) is null",
            [cast.organization, limit_id, *arguments, self.now],
            lambda o: o.set_limit(ref.Limit(limit_id, *arguments), self.now),
        )

    def _set_limit(self, cast: Cast, limit: ref.Limit) -> None:
        self._command(
            cast,
            "select credits.set_limit(%s, %s, %s, %s, %s, %s, %s, %s, %s, null, %s, false, %s, %s, %s) is null",
            [cast.organization, limit.limit_id, limit.scope, limit.scope_id, limit.metric, limit.filter, limit.period,
             limit.amount, limit.action, self.now, limit.each, *limit.within],
            lambda o: o.set_limit(limit, self.now),
        )  # fmt: skip

    def _default(
        self,
        org: int,
        scope: int,
        within: int,
        metric: int,
        pattern: int,
        period: int,
        amount: int,
        action: int,
        _: int,
    ) -> None:
        """For each user, key, team or department, or for those of one team or department."""
        cast = self._cast(org)
        name = ("user", "user", "key", "team", "department")[scope % 5]
        places: list[tuple[str | None, UUID | None]] = [(None, None)]
        if name in ("user", "key"):
            places += [("team", cast.teams[0]), ("team", cast.teams[1]), ("department", cast.departments[0])]
        place = places[within % len(places)]
        self._set_limit(
            cast,
            ref.Limit(
                uuid7(),
                name,
                None,
                ("credits", "credits", "credits", "calls", "tokens")[metric % 5],
                FILTERS[pattern % len(FILTERS)] if pattern % 2 else None,
                ALL_PERIODS[period % 5],
                None if amount % 9 == 0 else (0, 8, 30, 80, 200, 500)[amount % 6],
                ("stops", "asks", "stops", "warns")[action % 4],
                each=True,
                within=place,
            ),
        )

    def _own(self, org: int, which: int, who: int, amount: int, action: int, *_: int) -> None:
        """What takes a default's place, for one: higher, lower, or none."""
        cast = self._cast(org)
        defaults = [x for x in self._model(cast).limits.values() if x.each]
        if not defaults:
            return
        default = defaults[which % len(defaults)]
        self._set_limit(
            cast,
            ref.Limit(
                uuid7(),
                default.scope,
                self._subject(cast, default.scope, who),
                default.metric,
                default.filter,
                default.period,
                None if amount % 4 == 0 else (0, 8, 30, 80, 200, 500)[amount % 6],
                ("stops", "asks")[action % 2] if default.action != "warns" else "warns",
            ),
        )

    def _subject(self, cast: Cast, scope: str, who: int) -> UUID | None:
        found = {"user": cast.users, "key": cast.keys, "team": cast.teams, "department": cast.departments}.get(scope)
        return found[who % len(found)] if found else None

    def _raise(self, org: int, which: int, who: int, amount: int, begins: int, ends: int, key: int) -> None:
        cast = self._cast(org)
        limits = list(self._model(cast).limits.values())
        limit = limits[which % len(limits)] if limits else None
        subject = self._subject(cast, limit.scope, who) if limit and limit.each and who % 13 else None
        delay = (None, None, 60, 3600, 86400)[begins % 5]
        starts = None if delay is None else self.now + timedelta(seconds=delay)
        arguments = (
            limit.limit_id if limit else uuid7(),
            subject,
            (5, 20, 60, 200, 0)[amount % 5],
            starts,
            (starts or self.now) + timedelta(seconds=(60, 86400, 5 * 86400, 20 * 86400, 0)[ends % 5]),
        )
        key_text = f"raise {key % 40}" if key % 5 == 0 else f"raise {uuid7()}"

        def ask(reason: str | None) -> tuple[list[Any], Run]:
            raise_id = uuid7()
            return [cast.organization, raise_id, *arguments, reason, key_text, self.now], lambda o: o.raise_limit(
                raise_id, *arguments, key_text, self.now, reason
            )

        self._keyed(cast, "select credits.raise_limit(%s, %s, %s, %s, %s, %s, %s, %s, null, %s, %s)", ask)

    def _end_raise(self, org: int, which: int, *_: int) -> None:
        cast = self._cast(org)
        raises = self._model(cast).raises
        raise_id = _one([r for r in raises if raises[r].ends > self.now], list(raises), which)
        self._command(
            cast,
            "select credits.end_raise(%s, %s, %s) is null",
            [cast.organization, raise_id, self.now],
            lambda o: o.end_raise(raise_id, self.now),
        )

    def _renewed(
        self, org: int, pool: int, user: int, period: int, amount: int, carry: int, empty: int, over: int
    ) -> None:
        """A reserved share that is renewed."""
        cast = self._cast(org)
        picked = (
            self._pick_pool(cast, pool, shared=True),
            cast.users[user % 3],
            "reserved",
            ("day", "day", "week", "month", "cycle")[period % 5],
            (0, 10, 30, 60)[amount % 4],
            ("stops", "open_part")[empty % 2],
            over % 3 == 0,
        )
        self._share(cast, picked, (0, 0, 15, 100)[carry % 4], f"share {uuid7()}")

    def _reallocate(self, org: int, which: int, to: int, amount: int) -> None:
        cast = self._cast(org)
        shares = self._model(cast).allocations
        reserved = [a for a in shares if not shares[a].is_ended and shares[a].kind == "reserved"]
        share = _one(reserved, list(shares), which)
        target = _one(reserved, list(shares), to) if shares and to % 3 else None
        wanted = (None, 3, 10, 40)[amount % 4]
        key_text = f"reallocate {uuid7()}"

        def ask(other: str | None) -> tuple[list[Any], Run]:
            micros = 1 if other else wanted
            return [cast.organization, share, target, micros, key_text, self.now], lambda o: o.reallocate(
                share, target, micros, key_text, self.now
            )

        self._keyed(cast, "select credits.reallocate(%s, %s, %s, %s, %s, %s)", ask)

    def _cycle(self, org: int, day: int, *_: int) -> None:
        cast = self._cast(org)
        anchor = datetime(2026, 1 + day % 3, (31, 15, 1, 28, 27)[day % 5] if day % 3 != 1 else 28, day % 24, tzinfo=UTC)
        self._command(
            cast,
            "select credits.set_cycle(%s, %s, %s) is null",
            [cast.organization, anchor, self.now],
            lambda o: o.set_cycle(anchor, self.now),
        )

    def _end_limit(self, org: int, which: int, *_: int) -> None:
        cast = self._cast(org)
        limits = self._model(cast).limits
        limit_id = _one([x for x in limits if not limits[x].is_ended], list(limits), which)
        self._command(
            cast,
            "select credits.end_limit(%s, %s, %s) is null",
            [cast.organization, limit_id, self.now],
            lambda o: o.end_limit(limit_id, self.now),
        )

    def _person(self, org: int, who: int, what: int) -> None:
        """A key is revoked, a member leaves, returns or changes the team, a zone changes, an organization is frozen."""
        cast = self._cast(org)
        model, organization = self._model(cast), cast.organization
        user, key = cast.users[who % 3], cast.keys[who % 4]
        sql: str
        arguments: list[Any]
        if what % 6 == 0:
            model.keys[key].revoked = self.now
            sql, arguments = "update identity.api_keys set revoked_at = %s where api_key_id = %s", [self.now, key]
        elif what % 6 == 1 or (what % 6 == 2 and model.members[user].status != "active"):
            status = "suspended" if model.members[user].status == "active" else "active"
            model.members[user].status = status
            sql = "update identity.memberships set status = %s where user_id = %s and organization_id = %s"
            arguments = [status, user, organization]
        elif what % 6 in (2, 3):
            model.members[user].team = cast.teams[what % 2]
            sql, arguments = (
                "update identity.memberships set team_id = %s where user_id = %s and organization_id = %s",
                [cast.teams[what % 2], user, organization],
            )
        elif what % 6 == 4:
            model.zone = ZONES[who % len(ZONES)]
            sql = "update identity.organizations set zone = %s where organization_id = %s"
            arguments = [model.zone, organization]
        else:
            model.status = "frozen" if model.status == "active" and what % 4 == 1 else "active"
            sql = "update identity.organizations set status = %s where organization_id = %s"
            arguments = [model.status, organization]
        self.admin.execute(sql, arguments)
        self._touch(org)

    def _touch(self, org: int, *_: int) -> None:
        cast = self._cast(org)
        self.simulator.execute("select credits.limits_changed(%s)", [cast.organization])
        self._model(cast).version += 1

    def _expire(self, *_: int) -> None:
        self.simulator.execute("select credits.expire_holds(null, %s)", [self.now])
        self.world.expire_holds(self.now)

    def _release_all(self) -> None:
        """Nothing stays held; a later history, which begins at the same instant, would expire it too early."""
        self._pass_time(0)
        moves = [
            ref.Move(o.organization_id, ref.RELEASE, request)
            for o in self.world.organizations.values()
            for request in o.holds
        ]
        if moves:
            self._move(moves)

    # ------------------------------------------------------------------ batches

    def _batch(self, moves: Sequence[Sequence[int]]) -> None:
        """One that names a request twice is decided request by request; most do not, or they would be no batches."""
        asked = [self._as_move(each) for each in moves]
        if moves[0][9] % 5 or len(moves) > 8:
            asked = list({move.request: move for move in asked}.values())
        self._move(asked)

    def _move(self, asked: list[ref.Move]) -> None:
        rows = self.simulator.execute(*as_call([real(move) for move in asked], self.now), binary=True)
        by_place = sorted(rows.fetchall(), key=lambda row: row[0])
        expected = self.world.move(asked, self.now)
        for move, verdict, row, told in zip(asked, expected, by_place, as_verdicts(by_place), strict=True):
            found = ref.Verdict(
                told.outcome, told.request_id, told.held_micros, told.charged_micros, told.available_micros,
                told.binding_id, told.detail,
            )  # fmt: skip
            if found != verdict:
                batch = "\n  ".join(str(each) for each in asked)
                raise Disagreement(
                    f"place {row[0]}: {move}\nfound    {found}\nexpected {verdict}\nof the batch\n  {batch}"
                )

    def _as_move(self, numbers: Sequence[int]) -> ref.Move:
        kind, org, who, which, size, mark, flags, model, key, other = numbers
        cast = self._cast(org)
        organization = self._model(cast)
        action = (1, 1, 1, 1, 2, 2, 3, 3, 3, 3, 4, 5, 5, 5)[kind % 14]
        holds, estimates = list(organization.holds), list(organization.estimates)
        if action in (2, 3, 4) and not holds and other % 9:
            action = 1
        fresh = other % 31 == 0 if action in (2, 3, 4) else other % 29 != 0
        if fresh or not cast.requests:
            request = uuid7()
            cast.requests.append(request)
        elif action == 3 and estimates and other % 3 == 0:
            request = estimates[which % len(estimates)]
        elif action in (2, 3, 4) and holds and other % 11:
            request = holds[which % len(holds)]
        else:
            request = cast.requests[which % len(cast.requests)]
        session = who % 3
        user: UUID | None = cast.users[session]
        api_key = (None, None, None, cast.keys[session], cast.keys[session], cast.keys[3])[which % 6]
        if which % 43 == 0:
            api_key = cast.keys[0]
        if api_key == cast.keys[3]:
            user = None
        bits = (0, 0, 0, ref.SENT, ref.SENT | ref.STREAMED, ref.OWN_KEY, ref.MAY_WAIT, ref.REPEATED)[flags % 8]
        if flags % 7 == 0:
            bits |= ref.MAY_WAIT
        if action in (3, 4) and flags % 11 == 0:
            bits |= ref.BY_EXPIRY
        feature = FEATURES[model // 4 % 4]
        amount = self._size(organization, user, api_key, size, (MODELS[model % 4], feature))
        idempotency_key = body = None
        if key % 7 == 0 and action in (1, 3, 5):
            idempotency_key, body = f"key {key % 70}", bytes([action, other % 7 == 0])
        elif key % 7 == 0 and action == 4:
            idempotency_key, body = f"key {key % 70}", b"release"
        return ref.Move(
            cast.organization if other % 61 else UUID(int=other),
            action,
            request,
            user,
            api_key,
            amount,
            tokens=mark % 7 if mark % 3 else 0,
            mark=mark % 40 if action in (1, 2) else 0,
            lease=(1, 30, 600, 90000)[mark % 4],
            flags=bits,
            model=MODELS[model % 4],
            idempotency_key=idempotency_key,
            body=body,
            feature=feature,
        )

    def _size(
        self, organization: ref.Organization, user: UUID | None, key: UUID | None, size: int, what: ref.What
    ) -> int:
        """Mostly small; sometimes exactly what is there, one more, nothing, too much or negative."""
        if size % 9 < 6:
            return size % 31
        if size % 9 == 6:
            return 0
        chain = organization.chains.get((user or ref.NOBODY, key or ref.NOBODY))
        exact = organization.available(chain, what) if chain else 10
        return (exact // 3, exact + 1, exact, exact // 4, (-1, ref.MOST + 1, exact)[size % 7 % 3], exact // 2)[size % 6]

    # ------------------------------------------------------------------ comparing

    def _compare(self, casts: Sequence[Cast], number: int) -> None:
        """Every balance and hold, in one query."""
        balances: dict[UUID, dict[Any, Any]] = {cast.organization: {} for cast in casts}
        holds: dict[UUID, dict[Any, Any]] = {cast.organization: {} for cast in casts}
        for of, identifier, start, end, legs, *rest in self.admin.execute(STANDING, [[*balances]] * 2, prepare=True):
            if legs is None:
                balances[of][identifier, start or ref.EARLIEST] = (end or ref.LATEST, *rest[:-1])
            else:
                holds[of][identifier] = (start, end, legs, *rest)
        for cast in casts:
            model = self._model(cast)
            self._same(number, "balances", balances[cast.organization], {
                key: (b.end, b.kind, b.stops, b.limit, b.used, b.held, b.excess) for key, b in model.balances.items()
            })  # fmt: skip
            self._same(number, "holds", holds[cast.organization], {
                r: (h.placed, h.expires, h.legs, h.what[0], h.is_sent, h.tokens, h.floor, h.progress, h.flags,
                    h.what[1])
                for r, h in model.holds.items()
            })  # fmt: skip

    def _compare_deeply(self, cast: Cast, number: int) -> None:
        model = self._model(cast)
        self._same(number, "charges", self._rows(CHARGES, cast), {
            r: (charged, sum(model.charges[r].backs) if r in model.charges else 0)
            for r, charged in model.charged.items()
        })  # fmt: skip
        self._same(number, "estimates", self._rows(ESTIMATES, cast), {r: (e.legs,) for r, e in model.estimates.items()})
        self._same(number, "pools", self._rows(POOLS, cast), {
            p.pool_id: (p.kind, p.owner, p.filter, p.is_closed) for p in model.pools.values()
        })  # fmt: skip
        self._same(number, "purchases", self._rows(PURCHASES, cast), {
            pool_id: (
                p.state, p.declines, None if p.next_try == ref.EARLIEST else p.next_try,
                [each.state for each in model.purchases.values() if each.pool_id == pool_id],
            )
            for pool_id, p in model.policies.items()
        })  # fmt: skip
        self._same(number, "wishes", self._rows(WISHES, cast), {w: (x.state,) for w, x in model.wishes.items()})
        self._same(number, "arrivals", self._rows(ARRIVALS, cast), model.arrivals)
        if cast in self.homes:
            self._same(number, "departures", self._rows(PARTS, cast), _told(model.departures))
        for pool in model.pools.values():
            model.pour(pool, self.now)
        self._same(number, "grants", self._grants(cast), {
            g.grant_id: (g.state, g.left, g.burnt, g.expired, g.gone, g.refunded, g.voided)
            for g in model.grants.values()
        })  # fmt: skip

    def _same(self, number: int, what: str, found: dict[Any, Any], expected: dict[Any, Any]) -> None:
        if found != expected:
            keys = [k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k)]
            lines = "\n".join(f"  {k}\n    found    {found.get(k)}\n    expected {expected.get(k)}" for k in keys)
            raise Disagreement(f"{what} after step {number} differ:\n{lines}")

    def _rows(self, sql: str, cast: Cast) -> dict[Any, Any]:
        return {row[0]: row[1:] for row in self.admin.execute(sql, [cast.organization], prepare=True)}

    def _grants(self, cast: Cast) -> dict[Any, Any]:
        """As they are when what was used has been poured, which a rolled back transaction does."""
        with self.admin.transaction(force_rollback=True):
            self.admin.execute(POUR, [self.now, cast.organization])
            return {row[0]: row[1:] for row in self.admin.execute(GRANTS, [cast.organization]).fetchall()}


def _told(departures: dict[UUID, ref.Departure]) -> dict[Any, Any]:
    """One row for each grant that left, or for a departure with nothing."""
    rows: dict[Any, Any] = {}
    for transfer_id, each in departures.items():
        head = each.kind, each.held, each.arrived
        if not each.parts:
            rows[f"({transfer_id},)"] = (*head, *[None] * 7)
        for part in each.parts:
            expires = None if part.expires == ref.LATEST else part.expires
            what = part.grant_id, part.filter, part.amount, part.priority, part.is_free, part.effective, expires
            rows[f"({transfer_id},{part.grant_id})"] = (*head, *what)
    return rows


def _one(mostly: list[UUID], others: list[UUID], which: int) -> UUID:
    """Mostly one of the first, sometimes any, and rarely one that there is not."""
    found = mostly if mostly and which % 5 else others
    return found[which % len(found)] if found and which % 59 < 58 else uuid7()


def real(move: ref.Move) -> RealMove:
    """A move of the reference as the product asks for it."""
    return RealMove(
        Action(move.action),
        move.organization,
        move.request or UUID(int=0),
        user_id=move.user,
        api_key_id=move.key,
        amount_micros=Micros(move.amount),
        tokens=move.tokens,
        mark_micros=Micros(move.mark),
        lease_seconds=move.lease,
        flags=Flag(move.flags),
        model=move.model,
        idempotency_key=move.idempotency_key,
        body_hash=move.body,
        feature=move.feature,
    )


def shrunk(fails: Any, steps: list[Step], *, seconds: float) -> list[Step]:
    """A shorter list of steps that still fails: pieces are taken out, large ones first, then moves of batches."""
    until = time.monotonic() + seconds
    size = len(steps) // 2
    while size >= 1:
        at = 0
        while at < len(steps) and time.monotonic() < until:
            fewer = steps[:at] + steps[at + size :]
            if fails(fewer):
                steps = fewer
            else:
                at += size
        size //= 2
    for at, step in enumerate(steps):
        if step[0] == "batch":
            for n in reversed(range(len(step[2]))):
                kept = step[2][:n] + step[2][n + 1 :]
                fewer = [*steps[:at], (*steps[at][:2], kept), *steps[at + 1 :]]
                if kept and time.monotonic() < until and fails(fewer):
                    steps = fewer
    return steps
