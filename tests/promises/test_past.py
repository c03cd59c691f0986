"""What was so at a past instant is told as it was, to the micro."""

from typing import Any

import psycopg
import pytest
from tests.credits.chronicles import Chronicle, Note, random_chronicle
from tests.promises.figures import SEED, figure, tell

from bursar import db
from bursar.credits import as_of

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
            for note in Chronicle(simulator, admin).write(random_chronicle(SEED + n, steps)):
                found = await _as_told(books, note)
                unlike = _differences(found, _as_noted(note, found))
                assert unlike == [], f"BURSAR_TEST_SEED={SEED + n}, {note.at}, after {note.step}"
                instants += 1
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
        "limits": {m.limit_id: (m.amount, m.action, m.raised, m.used) for m in limits},
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
