"""What was so at a past instant is told as it was, to the micro."""

from datetime import timedelta
from itertools import pairwise
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.credits.chronicles import Chronicle, Note, random_chronicle
from tests.credits.histories import BEGINNING
from tests.promises.figures import SEED, figure, tell

from bursar import db
from bursar.credits import as_of
from bursar.credits.statements import statements

SHARDS = 4


@pytest.mark.parametrize("shard", range(SHARDS))
async def test_every_noted_instant_is_told_as_it_was_noted(books: db.Database, shard: int) -> None:
    chronicles, steps = figure("chronicles"), figure("steps of a chronicle")
    instants = 0
    with (
        psycopg.connect(books.dsn("bursar_simulator"), autocommit=True) as simulator,
        psycopg.connect(books.dsn("admin"), autocommit=True) as admin,
    ):
        for n in range(shard, chronicles, SHARDS):
            notes = Chronicle(simulator, admin).write(random_chronicle(SEED + n, steps))
            for note in notes:
                found = await _as_told(books, note)
                unlike = _differences(found, _as_noted(note, found))
                assert unlike == [], f"BURSAR_TEST_SEED={SEED + n}, {note.at}, after {note.step}"
                instants += 1
            for organization in {note.organization for note in notes}:
                await _statements_add_up(books, organization, notes)
    tell(f"{chronicles // SHARDS} chronicles of {steps} steps, {instants} instants")


async def _as_told(database: db.Database, note: Note) -> dict[str, Any]:
    when = {"organization_id": note.organization, "at": note.at}
    async with database.tenant(note.organization) as conn:
        pools = await as_of.pools_at(conn, **when)
        grants = await as_of.grants_at(conn, **when)
        limits = await as_of.limits_at(conn, **when)
        shares = await as_of.shares_at(conn, **when)
    return {
        "pools": {p.pool_id: (p.granted_micros, p.used_micros) for p in pools},
        "grants": {g.grant_id: (g.state, g.left_micros, g.burnt_micros) for g in grants},
        "limits": {
            m.limit_id: (m.amount, m.action, m.raised, m.used)
            for m in limits
            if not m.is_default or m.balance_id is None
        },
        "counters": {m.balance_id: (m.used,) for m in limits if m.is_default and m.used},
        "shares": {s.allocation_id: (s.amount_micros, s.when_empty, s.limit_micros, s.used_micros) for s in shares},
    }


def _as_noted(note: Note, found: dict[str, Any]) -> dict[str, Any]:
    """What the note says; where it is not told what was used, nothing else is asked for."""

    def with_unknown(noted: dict[Any, Any], told: dict[Any, Any]) -> dict[Any, Any]:
        return {key: _known(row, told.get(key, row)) for key, row in noted.items()}

    return {
        "pools": note.pools,
        "grants": note.grants,
        "limits": with_unknown(note.limits, found["limits"]),
        "counters": {key: note.counters.get(key) for key in found["counters"]},
        "shares": with_unknown(note.shares, found["shares"]),
    }


def _known(noted: tuple[Any, ...], told: tuple[Any, ...]) -> tuple[Any, ...]:
    """What was noted. Of a limit that nobody had met there was no raise to note; what is not told is None."""
    raised = told[2] if noted[2] is None else noted[2]
    return (*noted[:2], raised, None if told[-1] is None else noted[-1])


def _differences(told: dict[str, Any], noted: dict[str, Any]) -> list[str]:
    return [
        f"{what} {key}: told {told[what].get(key)}, noted {rows.get(key)}"
        for what, rows in noted.items()
        for key in rows.keys() | told[what].keys()
        if rows.get(key) != told[what].get(key)
    ]


async def _statements_add_up(database: db.Database, organization: UUID, notes: list[Note]) -> None:
    """Day by day: opening and movements are the balance at the day's end, and the next opening is the closing."""
    days = [BEGINNING.date() + timedelta(days=n) for n in range(-1, (notes[-1].at - BEGINNING).days + 3)]
    closing: dict[UUID, int] = {}
    async with database.tenant(organization) as conn:
        for first, after in pairwise(days):
            period, found = await statements(conn, organization_id=organization, first=first, after=after)
            end = period.ends_at - timedelta(microseconds=1)
            told = await as_of.pools_at(conn, organization_id=organization, at=end, with_closed=True)
            balances = {pool.pool_id: pool.granted_micros - pool.used_micros for pool in told}
            for each in found:
                assert each.opening_micros == closing.get(each.pool_id, 0)
                assert each.opening_micros + sum(line.micros for line in each.lines) == each.closing_micros
                assert each.closing_micros == balances[each.pool_id]
            closing = {each.pool_id: each.closing_micros for each in found}
            assert {pool: micros for pool, micros in balances.items() if micros} == {
                pool: micros for pool, micros in closing.items() if micros
            }
