"""Playing a scenario: every step through the money functions, at its instant, in the order that is documented.

At one instant: grants end, are made, come again and begin; resets; grants are voided, credits transferred, caps and
shares set and ended; holds end whose lease is over; refunds, releases, settles, extends; holds and usage. What is asked
about an instant is looked at last.
"""

from collections.abc import Awaitable, Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar import db
from bursar.clock import uuid7
from bursar.credits.limits import LimitAction, Metric, Scope
from bursar.credits.moves import Action, Flag, Move, Verdict
from bursar.db import arrays
from bursar.money import MICROS_PER_CREDIT, Micros
from bursar.simulation import scenario as told
from bursar.simulation.figures import Figures, GrantFigures, Segment, grants_of, look, segments
from bursar.simulation.recurrences import occurrences
from bursar.simulation.scenario import DEFAULT_POOL, FOREVER_SECONDS, Scenario
from bursar.simulation.stage import QUERIES, Actor, Cast, Stage, opened_stage

_TICK: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Refusal:
    """A step that was refused. binding: name of the balance that refused; available: what could still be spent."""

    at: datetime
    kind: str
    name: str | None
    amount: Micros | None
    code: str
    detail: str | None = None
    binding: str | None = None
    available: Micros | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is told. is_move: it moves credits; before those of an instant everything else happens."""

    at: datetime
    rank: int
    run: Callable[[datetime], Awaitable[Refusal | None]]

    @property
    def is_move(self) -> bool:
        return self.rank >= _ENDS


_TIMES, _RESETS, _SETS, _ENDS, _USES = range(5)


@dataclass(slots=True)
class Played:
    """What came of a scenario. names: of pools, grants, caps, shares and holds by their ids."""

    names: dict[UUID, str]
    asked: list[Figures] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)


async def play(database: db.Database, scenario: Scenario) -> Played:
    """Play a scenario in an organization of its own, of which nothing stays."""
    cast = _Names.of(scenario)
    async with opened_stage(database, zone=scenario.zone, at=scenario.begins, cast=cast.cast()) as stage:
        player = _Player(stage, scenario, cast)
        await player.open_pools()
        return await _Clock(stage, scenario, player).run()


# ---------------------------------------------------------------------------------------------- who there is


@dataclass(slots=True)
class _Names:
    """Ids of what a scenario names."""

    users: dict[str, Actor] = field(default_factory=dict)
    keys: dict[str, Actor] = field(default_factory=dict)
    teams: dict[str, UUID] = field(default_factory=dict)
    departments: dict[str, UUID] = field(default_factory=dict)

    @classmethod
    def of(cls, scenario: Scenario) -> "_Names":
        found = cls()
        for person in scenario.users:
            found._user(person.id, person)
        for key in scenario.keys:
            found._key(key.id, key)
        for pool in scenario.pools:
            found._user(pool.user)
        for share in scenario.allocations:
            found._user(share.user)
        uses: tuple[told.Usage | told.Hold, ...] = (*scenario.usage, *scenario.holds)
        for use in uses:
            found._user(use.user)
            found._key(use.key)
        for limit in scenario.limits:
            found.scope_id(limit)
        return found

    def _user(self, name: str | None, person: told.Person | None = None) -> UUID | None:
        if name is None:
            return None
        if name not in self.users:
            team = self._place(self.teams, person.team if person else None)
            department = self._place(self.departments, person.department if person else None)
            self.users[name] = Actor(id=uuid7(), name=name, team=team, department=department)
        return self.users[name].id

    def _key(self, name: str | None, key: told.Key | None = None) -> UUID | None:
        if name is None:
            return None
        if name not in self.keys:
            owner = self._user(key.user) if key else None
            team = self._place(self.teams, key.team if key else None)
            department = self._place(self.departments, key.department if key else None)
            self.keys[name] = Actor(id=uuid7(), name=name, team=team, department=department, user=owner)
        return self.keys[name].id

    @staticmethod
    def _place(known: dict[str, UUID], name: str | None) -> UUID | None:
        return None if name is None else known.setdefault(name, uuid7())

    def scope_id(self, limit: told.Limit) -> UUID | None:
        """Whom a limit is for."""
        match limit.scope:
            case Scope.USER:
                return self._user(limit.of)
            case Scope.KEY:
                return self._key(limit.of)
            case Scope.TEAM:
                return self._place(self.teams, limit.of)
            case Scope.DEPARTMENT:
                return self._place(self.departments, limit.of)
            case _:
                return None

    def asker(self, use: "told.Usage | told.Hold") -> tuple[UUID | None, UUID | None]:
        """User and key of a request; a member's key brings its member."""
        key = self.keys[use.key] if use.key else None
        user = self.users[use.user].id if use.user else key.user if key else None
        return user, key.id if key else None

    def cast(self) -> Cast:
        """All of them, for the stage."""
        return Cast(
            departments={identifier: name for name, identifier in self.departments.items()},
            teams={identifier: name for name, identifier in self.teams.items()},
            users=tuple(self.users.values()),
            keys=tuple(self.keys.values()),
        )


# ---------------------------------------------------------------------------------------------- what happens


class _Player:
    """Runs the steps of a scenario on a stage."""

    def __init__(self, stage: Stage, scenario: Scenario, cast: _Names) -> None:
        self._stage = stage
        self._scenario = scenario
        self._cast = cast
        self._pools: dict[str, UUID] = {}
        self._shares: dict[tuple[str, str], tuple[told.Allocation, UUID]] = {}
        self._caps: dict[tuple[object, ...], UUID] = {}
        self._grants = {grant.id: uuid7() for grant in scenario.grants}
        self._holds = {hold.id: (uuid7(), hold) for hold in scenario.holds}
        self._charges = {use.id: uuid7() for use in scenario.usage if use.id}
        self._charges |= {name: identifier for name, (identifier, _) in self._holds.items()}
        self._told = {grant.id: grant for grant in scenario.grants}
        self.names: dict[UUID, str] = {identifier: name for name, identifier in self._grants.items()}
        self.names |= {identifier: name for name, (identifier, _) in self._holds.items()}

    async def open_pools(self) -> None:
        """The shared pool, and those that the scenario names."""
        at = self._scenario.begins
        for pool in (told.Pool(id=DEFAULT_POOL), *self._scenario.pools):
            user_id = self._cast.users[pool.user].id if pool.user else None
            pool_id = await self._stage.open_pool(
                name=pool.id, kind=pool.kind, user_id=user_id, models=pool.models, at=at
            )
            self._pools[pool.id] = pool_id
            self.names.setdefault(pool_id, pool.id)
            open_part = await self._stage.fetch(QUERIES.open_part, pool_id=pool_id)
            if open_part is not None:
                self.names[open_part] = f"{pool.id}: what nobody reserved"

    def steps(self) -> Iterator[Step]:
        """Every step of the scenario, in the order of the file."""
        start = self._scenario.begins
        for reset in self._scenario.resets:
            yield Step(reset.at, _RESETS, _with(self._reset, reset))
        for grant in self._scenario.grants:
            if grant.recurrence is not None:
                yield from self._recurring(grant, grant.recurrence)
            else:
                yield Step(grant.created_at or start, _TIMES, _with(self._grant, grant))
            if grant.voided_at:
                yield Step(grant.voided_at, _SETS, _with(self._void, grant))
        for transfer in self._scenario.transfers:
            yield Step(transfer.at, _SETS, _with(self._transfer, transfer))
        for share in self._scenario.allocations:
            yield Step(share.at or start, _SETS, _with(self._allocate, share))
            if share.ended_at:
                yield Step(share.ended_at, _SETS, _with(self._end_share, share))
        for number, limit in enumerate(self._scenario.limits):
            name = limit.id or f"{limit.scope.value} cap {number + 1}"
            yield Step(limit.at or start, _SETS, _with(self._limit, (name, limit)))
            if limit.ended_at:
                yield Step(limit.ended_at, _SETS, _with(self._end_limit, (name, limit)))
        yield from self._moves()

    def _recurring(self, grant: told.Grant, recurrence: told.Recurrence) -> Iterator[Step]:
        """A grant until it comes again for the first time, then a schedule, and the end of its last occurrence."""
        begins = grant.effective_at or self._scenario.begins
        made = min(begins, grant.created_at or self._scenario.begins)
        anchor, first = occurrences(recurrence, begins, self._scenario.zone)
        ends = min((each for each in (grant.expires_at, grant.voided_at) if each), default=None)
        if first > begins:
            once = grant.model_copy(update={"effective_at": begins, "expires_at": min(first, ends or first)})
            yield Step(made, _TIMES, _with(self._grant, once))
        if ends is None or first < ends:
            # Counted from the first time, it can be made beforehand, unless that lies in a month too short for its day.
            zone = ZoneInfo(self._scenario.zone)
            if first.astimezone(zone).day == anchor.astimezone(zone).day or recurrence.interval in ("day", "week"):
                anchor, begins = first, made
            yield Step(begins, _TIMES, _with(self._schedule, (grant, anchor, ends)))
        if grant.expires_at and first < grant.expires_at:
            yield Step(grant.expires_at, _TIMES, _with(self._void, grant))

    def _moves(self) -> Iterator[Step]:
        for refund in self._scenario.refunds:
            yield Step(refund.at, _ENDS, _with(self._refund, refund))
        for release in self._scenario.releases:
            yield Step(release.at, _ENDS, _with(self._release, release))
        for settle in self._scenario.settles:
            yield Step(settle.at, _ENDS, _with(self._settle, settle))
        for extend in self._scenario.extends:
            yield Step(extend.at, _ENDS, _with(self._extend, extend))
        for hold in self._scenario.holds:
            yield Step(hold.at, _USES, _with(self._hold, hold))
        for use in self._scenario.usage:
            yield Step(use.booked_at or use.at, _USES, _with(self._use, use))

    def cuts(self) -> Iterator[datetime]:
        """Instants at which the burn order of a pool changes."""
        for grant in self._scenario.grants:
            yield from (at for at in (grant.effective_at, grant.expires_at, grant.voided_at) if at)
        yield from (reset.at for reset in self._scenario.resets)
        yield from (transfer.at for transfer in self._scenario.transfers)

    async def _command(self, asked: Refusal, sql: str, **params: Any) -> Refusal | None:
        """Run a command at the instant of `asked`, which comes back with its code when it is refused."""
        problem = await self._stage.command(sql, at=asked.at, **params)
        return None if problem is None else replace(asked, code=problem.code, detail=problem.detail or None)

    async def _grant(self, grant: told.Grant, at: datetime) -> Refusal | None:
        at_end = grant.rolls_over == "at_end" and grant.max_rollover is not None
        return await self._command(
            _asked(at, "grant", grant.id, grant.amount),
            QUERIES.add_grant,
            grant_id=self._grants[grant.id],
            effective_at=grant.effective_at,
            expires_at=grant.expires_at,
            rollover_expires_at=grant.rollover_expires_at,
            **self._terms(grant, at_end),
        )

    async def _schedule(self, named: tuple[told.Grant, datetime, datetime | None], at: datetime) -> Refusal | None:
        grant, anchor, ends = named
        assert grant.recurrence is not None
        identifier = uuid7()
        self.names[identifier] = grant.id
        return await self._command(
            _asked(at, "grant", grant.id, grant.amount),
            QUERIES.add_schedule,
            schedule_id=identifier,
            zone=self._scenario.zone,
            anchor=anchor,
            unit=grant.recurrence.interval,
            every=grant.recurrence.count,
            ends_at=ends,
            **self._terms(grant, grant.rolls_over == "at_end" and grant.max_rollover is not None),
        )

    def _terms(self, grant: told.Grant, at_end: bool) -> dict[str, Any]:
        """What a grant and a schedule have in common."""
        return {
            "pool_id": self._pools[grant.pool],
            "source": grant.source,
            "amount": grant.amount,
            "priority": grant.priority,
            "is_free": grant.is_free,
            "cost_basis": grant.cost_basis,
            "name": grant.id,
            "least": (grant.min_rollover or 0) if at_end else None,
            "most": grant.max_rollover if at_end else None,
            "key": self._stage.new_key(),
        }

    async def _void(self, grant: told.Grant, at: datetime) -> Refusal | None:
        for each in await self._grants_at(at):
            if self.names[each.grant_id] == grant.id and each.state in ("scheduled", "active", "spent", "lingering"):
                asked = _asked(at, "void", grant.id)
                sql, key = QUERIES.void_grant, self._stage.new_key()
                refusal = await self._command(asked, sql, grant_id=each.grant_id, key=key)
                if refusal is not None:
                    return refusal
        return None

    async def _grants_at(self, at: datetime) -> tuple[GrantFigures, ...]:
        """The grants there are, those that schedules have brought until now too."""
        await self._stage.fetch(QUERIES.bring_up_to_date, at=at)
        return await grants_of(self._stage, self.names)

    async def _reset(self, reset: told.Reset, at: datetime) -> Refusal | None:
        """Every grant of the pool that goes on: what came of it by an earlier reset, or itself."""
        found = await self._grants_at(at)
        parents = {each.parent_grant_id for each in found}
        grants = [
            (each.grant_id, grant.min_rollover or 0, grant.max_rollover or 0)
            for each in found
            if each.grant_id not in parents
            and (grant := self._told.get(self.names[each.grant_id])) is not None
            and all(end is None or end > at for end in (grant.voided_at, grant.expires_at))
        ]
        return await self._command(
            _asked(at, "reset", reset.pool),
            QUERIES.reset_pool,
            pool_id=self._pools[reset.pool],
            grant_ids=arrays.uuids([identifier for identifier, _, _ in grants]),
            least=arrays.int8s([least for _, least, _ in grants]),
            most=arrays.int8s([most for _, _, most in grants]),
            keeps_debt=reset.preserve_overage,
            key=self._stage.new_key(),
        )

    async def _refund(self, refund: told.Refund, at: datetime) -> Refusal | None:
        return await self._command(
            _asked(at, "refund", refund.of, refund.amount),
            QUERIES.refund,
            request_id=self._charges[refund.of],
            amount=refund.amount,
            key=self._stage.new_key(),
        )

    async def _transfer(self, transfer: told.Transfer, at: datetime) -> Refusal | None:
        return await self._command(
            _asked(at, "transfer", f"{transfer.from_pool} to {transfer.to_pool}", transfer.amount),
            QUERIES.transfer,
            from_pool_id=self._pools[transfer.from_pool],
            to_pool_id=self._pools[transfer.to_pool],
            amount=transfer.amount,
            key=self._stage.new_key(),
        )

    async def _allocate(self, share: told.Allocation, at: datetime) -> Refusal | None:
        place = (share.pool, share.user)
        before, identifier = self._shares.get(place, (None, uuid7()))
        if before is not None and (before.kind, before.period) != (share.kind, share.period):
            identifier = uuid7()  # it begins anew
        refusal = await self._command(
            _asked(at, "allocation", share.id or share.user, share.amount), QUERIES.allocate,
            allocation_id=identifier,
            pool_id=self._pools[share.pool],
            user_id=self._cast.users[share.user].id,
            kind=share.kind,
            period=share.period,
            amount=share.amount,
            when_empty=share.when_empty,
            oversubscribe=share.oversubscribe,
            carry=0,
            key=self._stage.new_key(),
        )  # fmt: skip
        if refusal is None:
            self._shares[place] = share, identifier
            self.names.setdefault(identifier, share.id or f"{share.user}'s share of {share.pool}")
        return refusal

    async def _end_share(self, share: told.Allocation, at: datetime) -> Refusal | None:
        _, identifier = self._shares.pop((share.pool, share.user), (None, uuid7()))
        return await self._command(
            _asked(at, "allocation", share.id or share.user), QUERIES.end_allocation, allocation_id=identifier
        )

    async def _limit(self, named: tuple[str, told.Limit], at: datetime) -> Refusal | None:
        name, limit = named
        amount = limit.amount if limit.metric is Metric.CREDITS else limit.amount // MICROS_PER_CREDIT
        identifier = self._caps.setdefault(_kind(limit), uuid7())
        self.names.setdefault(identifier, name)
        return await self._command(
            _asked(at, "limit", name), QUERIES.set_limit,
            limit_id=identifier,
            scope=limit.scope,
            scope_id=self._cast.scope_id(limit),
            metric=limit.metric,
            models=limit.models,
            period=limit.period,
            amount=amount,
            action=limit.action,
        )  # fmt: skip

    async def _end_limit(self, named: tuple[str, told.Limit], at: datetime) -> Refusal | None:
        name, limit = named
        identifier = self._caps.pop(_kind(limit), uuid7())
        return await self._command(_asked(at, "limit", name), QUERIES.end_limit, limit_id=identifier)

    async def _hold(self, hold: told.Hold, at: datetime) -> Refusal | None:
        user_id, key_id = self._cast.asker(hold)
        flags = (Flag.SENT if hold.sent else 0) | (Flag.STREAMED if hold.streamed else 0)
        return await self._move(
            "hold", hold.id, at, self._new_move(
                Action.AUTHORIZE, self._holds[hold.id][0], hold.amount,
                user_id=user_id, api_key_id=key_id, model=hold.model, feature=hold.feature, tokens=hold.tokens,
                flags=Flag(flags), lease_seconds=_lease(at, hold.expires_at), mark_micros=Micros(hold.floor),
            ),
        )  # fmt: skip

    async def _extend(self, extend: told.Extend, at: datetime) -> Refusal | None:
        request_id, hold = self._holds[extend.hold]
        until = extend.expires_at or hold.expires_at
        lease = _lease(at, until) if until is None or until > at else 1
        return await self._move(
            "extend", extend.hold, at, self._new_move(
                Action.EXTEND, request_id, extend.amount, tokens=extend.tokens, mark_micros=Micros(extend.used),
                lease_seconds=lease, flags=Flag.SENT if hold.sent else Flag.NONE,
            ),
        )  # fmt: skip

    async def _settle(self, settle: told.Settle, at: datetime) -> Refusal | None:
        request_id, hold = self._holds[settle.hold]
        user_id, key_id = self._cast.asker(hold)
        move = self._new_move(
            Action.SETTLE, request_id, settle.amount,
            user_id=user_id, api_key_id=key_id, model=hold.model, feature=hold.feature,
            tokens=settle.tokens, used_at=hold.at,
        )  # fmt: skip
        return await self._move("settle", settle.hold, at, move)

    async def _release(self, release: told.Release, at: datetime) -> Refusal | None:
        return await self._move(
            "release", release.hold, at, self._new_move(Action.RELEASE, self._holds[release.hold][0], 0)
        )

    async def _use(self, use: told.Usage, at: datetime) -> Refusal | None:
        user_id, key_id = self._cast.asker(use)
        is_enforced = self._scenario.enforce if use.enforce is None else use.enforce
        move = self._new_move(
            Action.DEDUCT if is_enforced else Action.SETTLE, self._charges[use.id] if use.id else uuid7(), use.amount,
            user_id=user_id, api_key_id=key_id, model=use.model, feature=use.feature, tokens=use.tokens, used_at=use.at,
        )  # fmt: skip
        return await self._move("usage", use.id, at, move)

    def _new_move(self, action: Action, request_id: UUID, amount: int, **rest: Any) -> Move:
        return Move(action, self._stage.organization_id, request_id, amount_micros=Micros(amount), **rest)

    async def _move(self, kind: str, name: str | None, at: datetime, move: Move) -> Refusal | None:
        [verdict] = await self._stage.move([move], at)
        return None if verdict.accepted else self._refused(kind, name, at, move, verdict)

    def _refused(self, kind: str, name: str | None, at: datetime, move: Move, verdict: Verdict) -> Refusal:
        binding = self.names.get(verdict.binding_id) if verdict.binding_id else None
        code = verdict.detail or verdict.outcome.name.lower()
        return Refusal(at, kind, name, move.amount_micros, code, None, binding, verdict.available_micros)


def _with(
    run: Callable[[Any, datetime], Awaitable[Refusal | None]], part: Any
) -> Callable[[datetime], Awaitable[Refusal | None]]:
    return lambda at: run(part, at)


def _kind(limit: told.Limit) -> tuple[object, ...]:
    """What makes a cap the same one when it is told again."""
    return limit.scope, limit.of, limit.metric, limit.period, limit.models, limit.action is LimitAction.WARNS


def _asked(at: datetime, kind: str, name: str | None, amount: int | None = None) -> Refusal:
    """What is told when a command is refused."""
    return Refusal(at, kind, name, None if amount is None else Micros(amount), code="")


def _lease(at: datetime, until: datetime | None) -> int:
    """Whole seconds, rounded up."""
    return FOREVER_SECONDS if until is None else -((at - until) // timedelta(seconds=1))


# ---------------------------------------------------------------------------------------------- when it happens


class _Clock:
    """Goes from instant to instant, those of the scenario and those at which time itself does something."""

    def __init__(self, stage: Stage, scenario: Scenario, player: _Player) -> None:
        self._stage = stage
        self._player = player
        self._asked = scenario.asked
        self._steps: dict[datetime, list[Step]] = {}
        for step in player.steps():
            self._steps.setdefault(step.at, []).append(step)
        self._cuts = set(player.cuts())
        told_at = {*self._steps, *self._asked, *self._cuts, scenario.begins}
        self._times = sorted(at for at in told_at if at <= self._asked[-1])
        self._grants_at: datetime | None = None
        self._holds_at: datetime | None = None
        self._open: Figures | None = None
        self._played = Played(player.names)

    async def run(self) -> Played:
        """Play until nothing more is told or asked."""
        last = self._times[-1]
        told_next = 0
        at: datetime | None = None
        while True:
            while told_next < len(self._times) and at is not None and self._times[told_next] <= at:
                told_next += 1
            times = self._times[told_next : told_next + 1]
            times += [due for due in (self._grants_at, self._holds_at) if due and due <= last and (not at or due > at)]
            if not times:
                break
            at = min(times)
            await self._instant(at)
        await self._cut(last, is_last=True)
        return self._played

    async def _instant(self, at: datetime) -> None:
        steps = sorted(self._steps.get(at, ()), key=lambda step: step.rank)
        is_cut = at in self._cuts or at == self._grants_at or self._open is None
        if is_cut:
            await self._cut(at)
        await self._run(at, (step for step in steps if not step.is_move))
        if is_cut:
            self._open = await look(self._stage, at, self._player.names)
        if self._holds_at is not None and self._holds_at <= at:
            await self._stage.fetch(QUERIES.expire_holds, at=at)
        await self._run(at, (step for step in steps if step.is_move))
        if at in self._asked:
            self._played.asked.append(await look(self._stage, at, self._player.names))
        if is_cut or at == self._holds_at or any(step.rank <= _USES for step in steps):
            self._grants_at, self._holds_at = (await self._stage.rows(QUERIES.next_events))[0]

    async def _run(self, at: datetime, steps: Iterable[Step]) -> None:
        for step in steps:
            refusal = await step.run(at)
            if refusal is not None:
                self._played.refusals.append(refusal)

    async def _cut(self, at: datetime, *, is_last: bool = False) -> None:
        """End the segments that run until here; the last of them with what happened at this instant."""
        if self._open is None or (self._open.at == at and not is_last):
            return
        end = await look(self._stage, at if is_last else at - _TICK, self._player.names)
        found = segments(self._open, replace(end, at=at))
        self._played.segments += (each for each in found if each.used or each.starts_at < each.ends_at)
