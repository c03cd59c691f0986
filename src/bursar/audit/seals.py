"""Sealing: every new row of the append-only tables becomes part of its organization's chain of seals.

Which rows a seal covers follows from their write numbers alone, which never change: docs/decisions/0016-seals.md.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg import sql

from bursar import db
from bursar.audit.hashes import MARK_BYTES, TEXT_SETTINGS, ZEROS, Form, Part, Tree, form_hash, leaf_sql, seal_hash

QUERIES: Final = db.load_queries("bursar.audit")
MOST_ROWS: Final = 50_000
"""A seal that has this many rows ends with the transaction that wrote the last of them, and another one begins."""
ROWS_AT_ONCE: Final = 5_000


@dataclass(frozen=True, slots=True)
class Sealed:
    """What a round did. until_number: every row with a lower write number is sealed."""

    seals: int
    rows: int
    until_number: int
    is_all: bool = True


@dataclass(frozen=True, slots=True)
class Round:
    """Which write numbers it covers, from and until, and when it is."""

    from_number: int
    until_number: int
    sealed_at: datetime


@dataclass(frozen=True, slots=True)
class Head:
    """An organization's newest seal."""

    organization_id: UUID
    seal_number: int
    until_number: int
    seal_hash: bytes


@dataclass(frozen=True, slots=True)
class _Row:
    organization_id: UUID
    write_number: int
    form: int
    leaf: bytes


@dataclass(frozen=True, slots=True)
class _Columns:
    table_name: str
    column_names: list[str]


@dataclass(slots=True)
class _Open:
    """The seal that rows are being added to."""

    organization_id: UUID
    trees: dict[int, Tree] = field(default_factory=dict)
    marks: dict[int, bytearray] = field(default_factory=dict)
    rows: int = 0
    write_number: int = -1

    def add(self, row: _Row) -> None:
        self.trees.setdefault(row.form, Tree()).add(row.leaf)
        self.marks.setdefault(row.form, bytearray()).extend(row.leaf[:MARK_BYTES])
        self.rows += 1
        self.write_number = row.write_number

    def is_full_before(self, row: _Row) -> bool:
        return self.rows >= MOST_ROWS and row.write_number > self.write_number


async def seal(conn: db.Connection) -> Sealed:
    """Seal what is new and certain: rows of transactions below the oldest that runs.

    conn: a transaction as bursar_platform that has read nothing yet. Another round that runs is waited for; a
    transaction that runs for long keeps back what was written since it began.
    """
    await set_text(conn)
    around = await db.fetch_one(conn, Round, QUERIES.begin_round)
    if around.from_number >= around.until_number:
        return Sealed(0, 0, around.from_number)
    forms = {form.form: form for form in await current_forms(conn)}
    sealing = _Sealing(conn, around, forms)
    async with conn.cursor("new_rows", row_factory=_as_row) as rows:
        await rows.execute(_new_rows(list(forms.values()), around), binary=True)
        while some := await rows.fetchmany(ROWS_AT_ONCE):
            await sealing.take(some)
    await sealing.end()
    await db.execute(conn, QUERIES.end_round, until_number=around.until_number)
    return Sealed(sealing.seals, sealing.rows, around.until_number)


async def seal_all(database: db.Database, *, seconds: float = 30) -> Sealed:
    """Round after round, until all is sealed that was written before, or the time is over: a transaction runs so long.

    is_all says which.
    """
    async with database.platform() as conn:
        number = int(await db.fetch_value(conn, QUERIES.next_number))
    done, until = Sealed(0, 0, 0), time.monotonic() + seconds
    while True:
        async with database.platform() as conn:
            some = await seal(conn)
        is_all = some.until_number >= number
        done = Sealed(done.seals + some.seals, done.rows + some.rows, some.until_number, is_all)
        if is_all or time.monotonic() > until:
            return done
        await asyncio.sleep(0.1)


async def set_text(conn: db.Connection) -> None:
    """For this transaction, rows are written as text in the one way that is hashed."""
    for name, value in TEXT_SETTINGS.items():
        await conn.execute("select set_config(%s, %s, true)", [name, value])


async def current_forms(conn: db.Connection) -> list[Form]:
    """The sealed tables as they are now; a table with columns that are new gets a new form."""
    found = []
    for each in await db.fetch_all(conn, _Columns, QUERIES.sealed_columns):
        hashed = form_hash(each.table_name, each.column_names)
        number = await db.fetch_value(
            conn, QUERIES.form_of, table_name=each.table_name, column_names=each.column_names, form_hash=hashed
        )
        found.append(Form(int(number), hashed, each.table_name, tuple(each.column_names)))
    return found


async def known_forms(conn: db.Connection) -> dict[int, Form]:
    """Every form there has been, by number."""
    forms = await db.fetch_all(conn, Form, QUERIES.forms)
    return {each.form: replace(each, column_names=tuple(each.column_names)) for each in forms}


def _as_row(cursor: Any) -> Any:
    return lambda values: _Row(*values)


def _new_rows(forms: Sequence[Form], around: Round) -> sql.Composed:
    """Leaves of all rows of a round, by organization, write number, table and leaf."""
    selects = [
        sql.SQL("select t.organization_id, t.write_number, {}::smallint as form, {} as leaf from {} t{}").format(
            sql.Literal(form.form),
            sql.SQL(leaf_sql(form)),
            sql.SQL(form.table_name),
            sql.SQL(" where t.write_number >= {} and t.write_number < {}").format(
                sql.Literal(around.from_number), sql.Literal(around.until_number)
            ),
        )
        for form in forms
    ]
    return sql.SQL(" union all ").join(selects) + sql.SQL(" order by 1, 2, 3, 4")


class _Sealing:
    """Turns rows in order into seals, each organization's behind its newest one."""

    def __init__(self, conn: db.Connection, around: Round, forms: dict[int, Form]) -> None:
        self.seals = self.rows = 0
        self._conn = conn
        self._round = around
        self._forms = forms
        self._heads: dict[UUID, Head] = {}
        self._open: _Open | None = None
        self._ready: list[dict[str, Any]] = []

    async def take(self, rows: Sequence[_Row]) -> None:
        """The next rows."""
        # Rows come by organization: of those before, only the one that is being sealed may go on.
        last = self._open.organization_id if self._open else None
        self._heads = {key: head for key, head in self._heads.items() if key == last}
        unknown = {row.organization_id for row in rows} - self._heads.keys()
        for head in await db.fetch_all(self._conn, Head, QUERIES.heads, organization_ids=list(unknown)):
            self._heads[head.organization_id] = head
        for row in rows:
            if self._open is None or self._open.organization_id != row.organization_id:
                self._close(self._round.until_number)
                self._open = _Open(row.organization_id)
            elif self._open.is_full_before(row):
                self._close(row.write_number)
                self._open = _Open(row.organization_id)
            self._open.add(row)
        self.rows += len(rows)
        await self._write()

    async def end(self) -> None:
        """There are no more."""
        self._close(self._round.until_number)
        await self._write()

    def _close(self, until_number: int) -> None:
        if self._open is None:
            return
        organization_id, trees, marks = self._open.organization_id, self._open.trees, self._open.marks
        head = self._heads.get(organization_id, Head(organization_id, 0, 0, ZEROS))
        numbers = sorted(trees)
        parts = [Part(n, self._forms[n].form_hash, trees[n].count, trees[n].root()) for n in numbers]
        sealed_at = self._round.sealed_at
        number = head.seal_number + 1
        hashed = seal_hash(organization_id, number, head.until_number, until_number, parts, sealed_at, head.seal_hash)
        self._ready.append({
            "organization_id": organization_id, "seal_number": number, "from_number": head.until_number,
            "until_number": until_number, "forms": numbers, "row_counts": [part.count for part in parts],
            "roots": [part.root for part in parts], "marks": [bytes(marks[n]) for n in numbers],
            "sealed_at": sealed_at, "previous_hash": head.seal_hash, "seal_hash": hashed,
        })  # fmt: skip
        # The next rows may be the same organization's, where this seal was full.
        self._heads[organization_id] = Head(organization_id, number, until_number, hashed)
        self._open = None
        self.seals += 1

    async def _write(self) -> None:
        if self._ready:
            async with self._conn.cursor() as cursor:
                await cursor.executemany(QUERIES.add_seal, self._ready)
            self._ready = []
