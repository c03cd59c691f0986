"""Telling a plan to the books: every step through the money functions, at its instant, as the role bursar_simulator."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from itertools import count
from typing import Any, Final
from uuid import UUID, uuid4
from zoneinfo import ZoneInfo

import psycopg

from bursar import db
from bursar.clock import uuid7, uuid7_at
from bursar.credits.grants import GrantSource
from bursar.credits.limits import Scope
from bursar.credits.moves import (
    MOVE_BATCH,
    ONE_REQUEST,
    Action,
    Flag,
    Move,
    Outcome,
    Verdict,
    as_arguments,
    as_verdicts,
)
from bursar.credits.pools import PoolKind
from bursar.db import arrays
from bursar.demo.enrolling import Site
from bursar.demo.plans import Batch, Dated, Refused, Step, Strayed
from bursar.demo.requests import Request
from bursar.demo.rhythm import Calendar
from bursar.demo.stories import Cap, Grant, Share
from bursar.money import Micros, NanoUsd, credits, divide_up, nano_usd_at_list_price

QUERIES: Final = db.load_queries("bursar.demo")

HELD_DAYS: Final = 7
MOST_HELD: Final = 60
"""How many requests are open at the same time, where they are held and settled."""

LEASE_SECONDS: Final = 600
ANSWER_TIME: Final = timedelta(seconds=2)
FAILED_EVERY: Final = 40
"""Where requests are held, one more in so many fails at the provider."""

_PAID: Final = frozenset({GrantSource.PURCHASE, GrantSource.PLAN})


@asynccontextmanager
async def simulator(database: db.Database) -> AsyncIterator[db.Connection]:
    """A connection that may date money. Each statement is a transaction of its own.

    What a crash would lose is no loss here: a demo that was not finished is made anew.
    """
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_simulator"), autocommit=True) as conn:
        arrays.register(conn)
        await conn.execute("set synchronous_commit = off")
        yield conn


class Teller:
    """Tells the steps of one company, in order."""

    def __init__(self, conn: db.Connection, site: Site, as_of: datetime) -> None:
        self._conn = conn
        self._site = site
        self._as_of = as_of
        self._calendar = Calendar(as_of, ZoneInfo(site.company.zone))
        self._numbers = count(1)
        self._pools: dict[str | None, UUID] = {}

    async def open(self) -> None:
        """The company's gate and its pools."""
        company = self._site.company
        await db.execute(self._conn, QUERIES.open_organization, organization_id=self._site.organization_id)
        if company.kind == "individual":
            await self._open_pool(PoolKind.INDIVIDUAL, None, "Individual credits")
        elif company.is_shared:
            await self._open_pool(PoolKind.SHARED, None, "Shared credits")
        for person in dict.fromkeys(grant.pool_of for grant in company.grants if grant.pool_of):
            await self._open_pool(PoolKind.PERSONAL, person, "Personal credits")

    async def _open_pool(self, kind: PoolKind, person: str | None, name: str) -> None:
        self._pools[person] = await self._call(
            QUERIES.open_pool,
            pool_id=uuid7(),
            kind=kind,
            owner_user_id=None if person is None else self._user_id(person),
            name=name,
            at=self._site.joined,
        )

    async def tell(self, step: Step) -> None:
        """One step; a verdict that the story does not tell is a fault."""
        match step:
            case Batch():
                await self._book(step)
            case Refused():
                await self._refuse(step)
            case Dated(at, Grant() as grant):
                await self._grant(at, grant)
            case Dated(at, Share() as share):
                await self._share(at, share)
            case Dated(at, Cap() as cap):
                await self._cap(at, cap)
            case Strayed():
                await self._stray(step)
            case _:
                raise AssertionError(f"{step} is not about credits")

    # What is there to spend

    async def _grant(self, at: datetime, grant: Grant) -> None:
        assert grant.credits is not None
        amount = credits(grant.credits)
        await self._call(
            QUERIES.add_grant,
            grant_id=uuid7(),
            pool_id=self._pools[grant.pool_of],
            source=grant.source,
            amount_micros=amount,
            priority=grant.priority,
            is_free=grant.is_free,
            cost_basis_nano_usd=nano_usd_at_list_price(amount) if grant.source in _PAID else 0,
            expires_at=None if grant.until is None else self._calendar.start(grant.until),
            reason=grant.reason,
            created_by=self._admin_id,
            idempotency_key=self._key(),
            at=at,
        )

    async def _share(self, at: datetime, share: Share) -> None:
        await self._call(
            QUERIES.allocate,
            allocation_id=uuid7(),
            pool_id=self._pools[None],
            user_id=self._user_id(share.person),
            kind=share.kind,
            period=share.period,
            amount_micros=credits(share.credits),
            created_by=self._admin_id,
            idempotency_key=self._key(),
            at=at,
        )

    async def _cap(self, at: datetime, cap: Cap) -> None:
        await self._call(
            QUERIES.set_limit,
            limit_id=uuid7(),
            scope=cap.scope,
            scope_id=self._scope_id(cap),
            model_filter=cap.model_filter,
            period=cap.period,
            amount=credits(cap.credits),
            action=cap.action,
            created_by=self._admin_id,
            at=at,
        )

    def _scope_id(self, cap: Cap) -> UUID | None:
        if cap.target is None:
            return None
        ids = {Scope.DEPARTMENT: self._site.departments, Scope.TEAM: self._site.teams, Scope.KEY: self._site.keys}
        return self._user_id(cap.target) if cap.scope is Scope.USER else ids[cap.scope][cap.target]

    # What is spent

    async def _book(self, batch: Batch) -> None:
        moves = [
            self._move(call.request)._replace(
                user_id=self._user_id(call.person),
                api_key_id=None if call.key is None else self._site.keys[call.key],
                conversation_id=call.conversation_id,
            )
            for call in batch.calls
        ]
        if not self._site.company.holds or batch.at < self._as_of - timedelta(days=HELD_DAYS):
            _all_accepted(await self._decide(moves, batch.at))
            return
        for start in range(0, len(moves), MOST_HELD):
            await self._hold_and_settle(moves[start : start + MOST_HELD])

    async def _hold_and_settle(self, moves: Sequence[Move]) -> None:
        """As the gateway does it: hold somewhat more than it will cost, then settle; a failed one is released."""
        last = max(move.used_at for move in moves if move.used_at is not None)
        failed = [move._replace(request_id=uuid7_at(last)) for move in moves[::FAILED_EVERY]]
        _all_accepted(await self._decide([_held(move) for move in (*moves, *failed)], last))
        ends = [move._replace(action=Action.SETTLE) for move in moves]
        ends += [move._replace(action=Action.RELEASE) for move in failed]
        _all_accepted(await self._decide(ends, min(last + ANSWER_TIME, self._as_of)))

    async def _stray(self, step: Strayed) -> None:
        """The provider's bill names a key that is none of ours: what was used is always charged."""
        move = self._move(step.request)._replace(action=Action.SETTLE, api_key_id=uuid4())
        _all_accepted(await self._decide([move], step.at))

    async def _refuse(self, step: Refused) -> None:
        told = step.refusals
        move = Move(
            action=Action.AUTHORIZE,
            organization_id=self._site.organization_id,
            request_id=uuid7_at(step.at),
            user_id=self._user_id(told.person),
            api_key_id=None if told.key is None else self._site.keys[told.key],
            amount_micros=credits(told.credits),
            lease_seconds=LEASE_SECONDS,
            provider=told.model.provider,
            model=told.model.name,
        )
        (verdict,) = await self._decide([move], step.at)
        assert (verdict.outcome, verdict.detail) == (Outcome.REFUSED, told.detail), f"{told}: {verdict}"

    def _move(self, request: Request) -> Move:
        """A deduction of nobody yet."""
        return Move(
            action=Action.DEDUCT,
            organization_id=self._site.organization_id,
            request_id=uuid7_at(request.used_at),
            amount_micros=request.priced.charged_micros,
            tokens=request.usage.total_tokens,
            cost_nano_usd=request.priced.provider_cost_nano_usd,
            usage=request.usage.as_array(),
            flags=Flag.STREAMED if request.is_streamed else Flag.NONE,
            provider=request.model.provider,
            model=request.model.name,
            price_version_id=request.price_version_id,
            used_at=request.used_at,
        )

    # Small things

    async def _decide(self, moves: Sequence[Move], at: datetime) -> list[Verdict]:
        answer = await self._conn.execute(MOVE_BATCH, as_arguments(moves, at))
        return as_verdicts(await answer.fetchall())

    async def _call(self, query: str, **arguments: Any) -> Any:
        return await db.fetch_value(self._conn, query, organization_id=self._site.organization_id, **arguments)

    def _user_id(self, email: str) -> UUID:
        return self._site.users[email].user_id

    @property
    def _admin_id(self) -> UUID:
        return self._user_id(self._site.company.admin)

    def _key(self) -> str:
        return f"demo {self._site.company.slug} {next(self._numbers)}"


def _held(move: Move) -> Move:
    """The hold for a request: a quarter more than it will cost, a third of it for the input."""
    return move._replace(
        action=Action.AUTHORIZE,
        amount_micros=Micros(divide_up(5 * move.amount_micros, 4)),
        tokens=divide_up(5 * move.tokens, 4),
        cost_nano_usd=NanoUsd(divide_up(5 * move.cost_nano_usd, 4)),
        mark_micros=Micros(move.amount_micros // 3),
        usage=ONE_REQUEST,
        lease_seconds=LEASE_SECONDS,
        flags=move.flags | Flag.SENT,
        used_at=None,
    )


def _all_accepted(verdicts: Sequence[Verdict]) -> None:
    for verdict in verdicts:
        assert verdict.accepted, f"the story has no credits for this: {verdict}"
