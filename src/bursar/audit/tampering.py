"""Are the sealed rows still what was sealed? Every leaf is hashed anew and compared, seal by seal; none is kept."""

from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg import sql

from bursar import db
from bursar.audit.findings import Finding
from bursar.audit.hashes import MARK_BYTES, ZEROS, Form, Part, Tree, form_hash, leaf_sql, seal_hash
from bursar.audit.seals import QUERIES, known_forms, set_text

SEALED: Final = "sealed_rows_are_unchanged"
CHAINED: Final = "seals_are_a_chain"
INVARIANTS: Final = {
    SEALED: "A row that was sealed is there, is what it was, and no row was put among the sealed ones later.",
    CHAINED: "The seals of an organization are numbered without gap, and each contains the hash of the one before.",
}
ROWS_AT_ONCE: Final = 5_000
SEALS_AT_ONCE: Final = 500
MOST_ROWS: Final = 200_000
"""How many rows, about, one transaction reads."""
MOST_NAMED: Final = 5
"""How many rows a finding names; it counts all."""


@dataclass(frozen=True, slots=True)
class Seal:
    """A row of audit.seals, without marks."""

    seal_number: int
    from_number: int
    until_number: int
    forms: list[int]
    row_counts: list[int]
    roots: list[bytes]
    sealed_at: datetime
    previous_hash: bytes
    seal_hash: bytes


@dataclass(frozen=True, slots=True)
class _Row:
    write_number: int
    form: int
    leaf: bytes


@dataclass(frozen=True, slots=True)
class _Use:
    form: int
    from_number: int


@dataclass(frozen=True, slots=True)
class _Stretch:
    """Write numbers for which a table has a form. until_number: None is for ever."""

    form: Form
    from_number: int
    until_number: int | None


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a finding is: a seal and the times between which its rows were written."""

    seal: Seal
    since: datetime | None

    def __str__(self) -> str:
        since = f"after {self.since:%Y-%m-%d %H:%M:%S}" if self.since else "at any time"
        before = f"before {self.seal.sealed_at:%Y-%m-%d %H:%M:%S} UTC"
        return f"seal {self.seal.seal_number} (rows written {since} and {before})"


async def organizations(conn: db.Connection) -> list[UUID]:
    """Every organization that has a seal or a row to seal. conn: as bursar_platform."""
    found: set[UUID] = set()
    for table in ["audit.seals", *await known_tables(conn)]:
        # Jumps from one organization to the next in the primary key, which begins with it.
        rows = await conn.execute(
            f"""
            with recursive o as (
                (select organization_id from {table} order by organization_id limit 1)
                union all
                select n.organization_id from o cross join lateral (
                    select organization_id from {table} t where t.organization_id > o.organization_id
                    order by organization_id limit 1) n
            ) select organization_id from o
            """
        )
        found |= {row[0] for row in await rows.fetchall()}
    return sorted(found)


async def known_tables(conn: db.Connection) -> list[str]:
    """The sealed tables."""
    return await db.fetch_values(conn, "select table_name from audit.sealed_tables order by 1")


async def check(database: db.Database, *, organization_id: UUID) -> list[Finding]:
    """What is not as it was sealed, in one organization. Rows that are not sealed yet are not looked at.

    Reads in transactions of some hundred thousand rows each, so that none stands in the way of vacuum for long: what is
    sealed never changes, and below the horizon that was read first nothing is added.
    """
    async with database.platform() as conn:
        horizon = int(await db.fetch_value(conn, QUERIES.horizon))
        stretches, findings = await _stretches(conn, organization_id)
    if findings or not stretches:
        return findings
    comparing = _Comparing(organization_id, {each.form.form: each.form for each in stretches})
    low, is_more = 0, True
    while is_more:
        async with database.platform() as conn:
            await set_text(conn)
            seals = await _next_seals(conn, organization_id, comparing.last_number)
            is_more = bool(seals)
            high = max(low, seals[-1].until_number) if seals else max(low, horizon)
            async with _in_order(conn, _sealed_rows(stretches, organization_id, low, high)) as rows:
                for seal in seals:
                    await comparing.take(conn, seal, rows)
                comparing.end(await rows.count_below(high))
            low = high
    return comparing.findings


async def _next_seals(conn: db.Connection, organization_id: UUID, after: int) -> list[Seal]:
    """The seals that follow, of so many rows together as are read in one transaction; one at least."""
    seals = await db.fetch_all(
        conn, Seal, QUERIES.seals, organization_id=organization_id, after=after, most=SEALS_AT_ONCE
    )
    rows = 0
    for place, seal in enumerate(seals):
        rows += sum(seal.row_counts)
        if rows >= MOST_ROWS:
            return seals[: place + 1]
    return seals


async def _stretches(conn: db.Connection, organization_id: UUID) -> tuple[list[_Stretch], list[Finding]]:
    """Which form each table's rows have from which write number on, as the organization's seals say."""
    forms, findings = await known_forms(conn), []
    uses = await db.fetch_all(conn, _Use, QUERIES.first_use_of_forms, organization_id=organization_id)
    by_table: dict[str, list[_Use]] = {form.table_name: [] for form in forms.values()}
    for use in uses:
        form = forms.get(use.form)
        if form is None or form.form_hash != form_hash(form.table_name, form.column_names):
            findings.append(Finding(CHAINED, organization_id, f"form {use.form}", "as it was used", "changed or gone"))
        else:
            by_table[form.table_name].append(use)
    newest = {form.table_name: form.form for form in forms.values()}  # the last one of a table
    found = []
    for table, used in by_table.items():
        steps = [(use.form, use.from_number) for use in used] or [(newest[table], 0)]
        for place, (number, from_number) in enumerate(steps):
            until = steps[place + 1][1] if place + 1 < len(steps) else None
            found.append(_Stretch(forms[number], from_number if place else 0, until))
    return found, findings


def _sealed_rows(stretches: Sequence[_Stretch], organization_id: UUID, low: int, high: int) -> sql.Composed:
    """(write_number, form, leaf) of the rows from low on and below high, in the order in which they were sealed."""
    selects = [
        sql.SQL(
            "select t.write_number, {}::smallint as form, {} as leaf from {} t"
            " where t.organization_id = {} and t.write_number >= {} and t.write_number < {}"
        ).format(
            sql.Literal(each.form.form),
            sql.SQL(leaf_sql(each.form)),
            sql.SQL(each.form.table_name),
            sql.Literal(organization_id),
            sql.Literal(max(low, each.from_number)),
            sql.Literal(high if each.until_number is None else min(high, each.until_number)),
        )
        for each in stretches
    ]
    return sql.SQL(" union all ").join(selects) + sql.SQL(" order by 1, 2, 3")


def _maker(cls: type[Any]) -> Any:
    return lambda cursor: lambda values: cls(*values)


class _Rows:
    """Rows in order, of which the next one can be looked at."""

    def __init__(self, cursor: Any) -> None:
        self._cursor = cursor
        self._some: list[_Row] = []
        self._at = 0

    async def below(self, write_number: int) -> AsyncIterator[_Row]:
        """Take the rows with a lower write number."""
        while True:
            if self._at == len(self._some):
                self._some, self._at = await self._cursor.fetchmany(ROWS_AT_ONCE), 0
                if not self._some:
                    return
            row = self._some[self._at]
            if row.write_number >= write_number:
                return
            self._at += 1
            yield row

    async def count_below(self, write_number: int) -> Counter[int]:
        """Take them too, and only count them by form."""
        counted: Counter[int] = Counter()
        async for row in self.below(write_number):
            counted[row.form] += 1
        return counted


@asynccontextmanager
async def _in_order(conn: db.Connection, query: sql.Composed) -> AsyncIterator[_Rows]:
    async with conn.cursor("sealed_rows", row_factory=_maker(_Row)) as cursor:
        await cursor.execute(query, binary=True)
        yield _Rows(cursor)


class _Comparing:
    """One organization's seals in order, against its rows in order."""

    def __init__(self, organization_id: UUID, forms: Mapping[int, Form]) -> None:
        self.findings: list[Finding] = []
        self._organization_id = organization_id
        self._forms = forms
        self._last: Seal | None = None

    @property
    def last_number(self) -> int:
        """Of the last seal that was compared."""
        return self._last.seal_number if self._last else 0

    async def take(self, conn: db.Connection, seal: Seal, rows: _Rows) -> None:
        """The next seal."""
        self._check_chain(seal)
        self.end(await rows.count_below(seal.from_number))
        trees: dict[int, Tree] = {}
        async for row in rows.below(seal.until_number):
            trees.setdefault(row.form, Tree()).add(row.leaf)
        sealed = dict(zip(seal.forms, zip(seal.row_counts, seal.roots, strict=True), strict=True))
        place = _Place(seal, self._last.sealed_at if self._last else None)
        for form in sorted(sealed.keys() | trees.keys()):
            tree = trees.get(form)
            if sealed.get(form) != ((tree.count, tree.root()) if tree else None):
                count = sealed[form][0] if form in sealed else 0
                await self._narrow(conn, place, self._forms[form], count, tree.count if tree else 0)
        self._last = seal

    def end(self, extra: Mapping[int, int]) -> None:
        """So many rows of each form are between two seals, or behind the last one although a round has passed them."""
        after = f"after seal {self.last_number}" if self._last else "before any seal"
        for form, count in extra.items():
            self._find(SEALED, f"{self._forms[form].table_name} {after}", "no row that is in no seal", f"{count} rows")

    def _check_chain(self, seal: Seal) -> None:
        last = self._last
        number = last.seal_number + 1 if last else 1
        if seal.seal_number != number:
            self._find(CHAINED, f"seal {number}", "is there", f"the next one is seal {seal.seal_number}")
        elif seal.from_number != (last.until_number if last else 0):
            self._find(CHAINED, f"seal {number}", "begins where the one before ended", f"at {seal.from_number}")
        if seal.seal_number == number and seal.previous_hash != (last.seal_hash if last else ZEROS):
            self._find(CHAINED, f"seal {number}", "contains the hash of the seal before", seal.previous_hash.hex()[:16])
        parts = [
            Part(form, self._forms[form].form_hash, count, root)
            for form, count, root in zip(seal.forms, seal.row_counts, seal.roots, strict=True)
        ]
        hashed = seal_hash(
            self._organization_id, seal.seal_number, seal.from_number, seal.until_number, parts, seal.sealed_at,
            seal.previous_hash,
        )  # fmt: skip
        if hashed != seal.seal_hash:
            self._find(CHAINED, f"seal {seal.seal_number}", f"hash {hashed.hex()[:16]}", seal.seal_hash.hex()[:16])

    async def _narrow(self, conn: db.Connection, place: _Place, form: Form, sealed: int, found: int) -> None:
        """Say which rows differ, by the marks that the seal kept of each."""
        marks = await db.fetch_value(
            conn,
            QUERIES.marks,
            organization_id=self._organization_id,
            seal_number=place.seal.seal_number,
            form=form.form,
        )
        kept = Counter(_cut(bytes(marks or b"")))
        strange: list[str] = []
        async with conn.cursor("one_seal") as rows:
            await rows.execute(await self._rows_of(conn, place.seal, form), binary=True)
            async for leaf, key in rows:
                if kept[leaf[:MARK_BYTES]]:
                    kept[leaf[:MARK_BYTES]] -= 1
                else:
                    strange.append(key)
        gone = kept.total()
        changed = min(gone, len(strange))
        said = [
            text
            for count, text in (
                (changed, f"{changed} changed"),
                (gone - changed, f"{gone - changed} removed"),
                (len(strange) - changed, f"{len(strange) - changed} inserted"),
            )
            if count
        ]
        named = "; ".join(strange[:MOST_NAMED]) + ("; …" if len(strange) > MOST_NAMED else "")
        words = ", ".join(said) or "the marks of its rows were changed too"
        self._find(
            SEALED,
            f"{form.table_name} in {place}",
            f"{sealed} rows as sealed",
            f"{found} rows: {words}{f' ({named})' if named else ''}",
        )

    async def _rows_of(self, conn: db.Connection, seal: Seal, form: Form) -> sql.Composed:
        """(leaf, primary key as text) of the rows in a seal's range."""
        keys = await db.fetch_value(conn, QUERIES.keys_of_table, table_name=form.table_name)
        named = [f"'{key} ' || t.\"{key}\"" for key in keys if key != "organization_id"]
        return sql.SQL(
            "select {}, {} from {} t where t.organization_id = {} and t.write_number >= {} and t.write_number < {}"
            " order by t.write_number, 1"
        ).format(
            sql.SQL(leaf_sql(form)),
            sql.SQL(" || ', ' || ".join(named)),
            sql.SQL(form.table_name),
            sql.Literal(self._organization_id),
            sql.Literal(seal.from_number),
            sql.Literal(seal.until_number),
        )

    def _find(self, invariant: str, subject: str, expected: str, found: str) -> None:
        self.findings.append(Finding(invariant, self._organization_id, subject, expected, found))


def _cut(marks: bytes) -> list[bytes]:
    return [marks[at : at + MARK_BYTES] for at in range(0, len(marks), MARK_BYTES)]
