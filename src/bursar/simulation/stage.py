"""The stage: an organization of a simulation's own, in a transaction that is always rolled back."""

import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any, Final
from uuid import UUID

import psycopg

from bursar import db
from bursar.clock import uuid7
from bursar.credits.moves import Move, Verdict, as_call, as_verdicts
from bursar.credits.pools import PoolKind
from bursar.db import arrays
from bursar.problems import Problem, from_database

QUERIES: Final = db.load_queries("bursar.simulation")


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
    """A person or key of a stage. user: whose key it is; original: the key that it was rotated from."""

    id: UUID
    name: str
    team: UUID | None = None
    department: UUID | None = None
    user: UUID | None = None
    original: UUID | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cast:
    """Who there is. Departments and teams: names by id."""

    departments: dict[UUID, str] = field(default_factory=dict)
    teams: dict[UUID, str] = field(default_factory=dict)
    users: Sequence[Actor] = ()
    keys: Sequence[Actor] = ()


class Stage:
    """One organization in an open transaction of the role bursar_simulator."""

    def __init__(self, conn: db.Connection, organization_id: UUID) -> None:
        self.conn = conn
        self.organization_id = organization_id
        self._commands = count(1)

    async def fetch(self, sql: str, /, **params: Any) -> Any:
        """First value of a statement about this organization."""
        return await db.fetch_value(self.conn, sql, organization_id=self.organization_id, **params)

    async def rows(self, sql: str, /, **params: Any) -> list[tuple[Any, ...]]:
        """Rows of a statement about this organization."""
        cursor = await self.conn.execute(sql, {"organization_id": self.organization_id, **params})
        return await cursor.fetchall()

    async def command(self, sql: str, /, **params: Any) -> Problem | None:
        """Run a money command; the refusal, when it is refused, and then nothing has changed."""
        try:
            async with self.conn.transaction():
                await self.fetch(sql, **params)
        except psycopg.Error as error:
            problem = from_database(error)
            if problem is None:
                raise
            return problem
        return None

    async def move(self, moves: Sequence[Move], at: datetime) -> list[Verdict]:
        """Verdicts on one batch, in the order of the moves."""
        cursor = await self.conn.execute(*as_call(moves, at))
        return as_verdicts(sorted(await cursor.fetchall(), key=lambda row: int(row[0])))

    async def open_pool(
        self, *, name: str, kind: PoolKind, user_id: UUID | None, models: str | None, at: datetime
    ) -> UUID:
        """A pool; the one that is there, where there is one of its kind, user and models."""
        pool_id = await self.fetch(
            QUERIES.open_pool, pool_id=uuid7(), kind=kind, user_id=user_id, name=name, models=models, at=at
        )
        assert isinstance(pool_id, UUID)
        return pool_id

    def new_key(self) -> str:
        """An idempotency key that no other command of this stage has."""
        return f"step {next(self._commands)}"


@asynccontextmanager
async def opened_stage(database: db.Database, *, zone: str, at: datetime, cast: Cast) -> AsyncIterator[Stage]:
    """A stage with an organization that has its gate and no pool yet, made at an instant; all of it goes at the end."""
    async with await psycopg.AsyncConnection.connect(database.dsn("bursar_simulator"), autocommit=True) as conn:
        arrays.register(conn)
        await conn.execute("begin")
        try:
            stage = Stage(conn, uuid7())
            await stage.fetch(
                QUERIES.open_stage,
                zone=zone,
                at=at,
                departments=_named(cast.departments),
                teams=_named(cast.teams),
                users=_actors(cast.users),
                keys=_actors(cast.keys),
            )
            await stage.fetch(QUERIES.open_organization)
            yield stage
        finally:
            if not conn.closed:
                await conn.rollback()


def _named(names: dict[UUID, str]) -> str:
    return json.dumps([{"id": str(identifier), "name": name} for identifier, name in names.items()])


def _actors(actors: Iterable[Actor]) -> str:
    names = ("id", "name", "team", "department", "user", "original")
    rows = [{name: getattr(actor, name) for name in names} for actor in actors]
    return json.dumps(rows, default=str)
