"""What caps cost: one hot organization without any, and the same with caps of every scope; three grants in each pool.

With caps a request passes eight balances: pool, open part, and caps on organization, user, team, department, key and
model. Users are spread over teams, teams over departments; everybody has a key of their own and calls the capped model.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg

from benchmarks.hotpath import contenders
from benchmarks.hotpath.books import PLENTY, QUERIES, Payer
from benchmarks.hotpath.pace import Case, Figure, Pace, interleaved
from benchmarks.hotpath.report import Ratio, Row
from bursar.clock import uuid7
from bursar.credits.batcher import Batcher

TEAMS: Final = 10
DEPARTMENTS: Final = 3
GRANTS: Final = 3
LEAST_SHARE: Final = 0.8


@dataclass(frozen=True, slots=True)
class Organizations:
    """Who pays: members of an organization without caps, of one with a default for every member, of one with all."""

    without: list[Payer]
    default: list[Payer]
    capped: list[Payer]


def open_organizations(admin_dsn: str, simulator_dsn: str, *, users: int) -> Organizations:
    """Open them through the real functions."""
    with psycopg.connect(admin_dsn) as admin, psycopg.connect(simulator_dsn) as simulator:
        without, default, capped = (_open(admin, simulator, users) for _ in range(3))
        _cap(simulator, default, "user", [None], is_default=True)
        places = admin.execute(QUERIES.places, {"organization_id": capped[0].organization_id}).fetchall()
        _cap(simulator, capped, "organization", [None])
        _cap(simulator, capped, "organization", [None], model=contenders.MODEL)
        _cap(simulator, capped, "user", [payer.user_id for payer in capped])
        _cap(simulator, capped, "key", [payer.api_key_id for payer in capped])
        for scope in ("team", "department"):
            _cap(simulator, capped, scope, [place for kind, place in places if kind == scope])
        simulator.commit()
    return Organizations(without, default, capped)


async def _use(lane: str, admin_dsn: str, payers: Sequence[Payer]) -> None:
    """One deduction of each, as in a database that is in use: plans are made by what the server knows of its tables."""
    async with Batcher(lane, lanes=1) as batcher:
        verdicts = await asyncio.gather(*(batcher.move(contenders.deduction(payer)) for payer in payers))
    assert all(verdict.accepted for verdict in verdicts)
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("vacuum analyze")


def _open(admin: psycopg.Connection, simulator: psycopg.Connection, users: int) -> list[Payer]:
    organization_id, pool_id = uuid7(), uuid7()
    payers = [Payer(organization_id, uuid7(), uuid7(), []) for _ in range(users)]
    members = {
        "organization_ids": [organization_id] * users,
        "user_ids": [payer.user_id for payer in payers],
        "api_key_ids": [payer.api_key_id for payer in payers],
    }
    admin.execute(QUERIES.add_organizations, {"organization_ids": [organization_id]})
    admin.execute(QUERIES.add_members, {name: members[name] for name in ("organization_ids", "user_ids")})
    admin.execute(QUERIES.add_keys, members)
    admin.execute(QUERIES.add_places, {"organization_id": organization_id, "teams": TEAMS, "departments": DEPARTMENTS})
    admin.commit()
    simulator.execute(QUERIES.open_gates, {"organization_ids": [organization_id]})
    simulator.execute(QUERIES.open_pools, {"organization_ids": [organization_id], "pool_ids": [pool_id]})
    simulator.execute(
        QUERIES.add_grants_to_pool,
        {"organization_id": organization_id, "pool_id": pool_id, "micros": PLENTY // GRANTS, "count": GRANTS},
    )
    return payers


def _cap(
    simulator: psycopg.Connection,
    payers: Sequence[Payer],
    scope: str,
    ids: Sequence[UUID | None],
    *,
    model: str | None = None,
    is_default: bool = False,
) -> None:
    simulator.execute(
        QUERIES.cap_each,
        {
            "organization_id": payers[0].organization_id,
            "scope": scope,
            "ids": list(ids),
            "micros": PLENTY,
            "model": model,
            "is_default": is_default,
        },
    )


async def with_and_without(
    lane: str,
    admin_dsn: str,
    server: int | None,
    organizations: Organizations,
    *,
    callers: int,
    rounds: int,
    seconds: float,
) -> list[Row]:
    """Deductions, and holds with their settles, with caps against without."""
    members = {
        "without caps": organizations.without,
        "with a default for every member": organizations.default,
        "with caps of every scope": organizations.capped,
    }
    rows: list[Row] = []
    await _use(lane, admin_dsn, [payer for payers in members.values() for payer in payers])
    async with Batcher(lane, lanes=1) as batcher:
        for what, by in (("deduct", contenders.by_batcher), ("hold and settle", contenders.by_hold)):
            cases = [Case(name, by(batcher, payers), callers, server) for name, payers in members.items()]
            paces = await interleaved(cases, rounds=rounds, seconds=seconds)
            bare = _rate(paces["without caps"]).median
            for name, each in paces.items():
                ratios = (Ratio("the rate without", _rate(each).median / bare, LEAST_SHARE),)
                rows.append(_row(f"caps, hot pool, {callers} callers, {what}", name, each, ratios))
    return rows


def _rate(paces: Sequence[Pace]) -> Figure:
    return Figure.of([pace.per_second for pace in paces])


def _row(group: str, name: str, paces: Sequence[Pace], ratios: tuple[Ratio, ...]) -> Row:
    p50 = Figure.of([pace.p50_ms for pace in paces]).median
    p99 = Figure.of([pace.p99_ms for pace in paces]).median
    client = Figure.of([pace.client for pace in paces]).median
    found = [pace.server for pace in paces if pace.server is not None]
    server = Figure.of(found).median if found else None
    return Row(group, name, _rate(paces), "/s", p50, p99, client, server, () if name == "without caps" else ratios)
