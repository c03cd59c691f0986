"""What caps cost: one hot organization without any, and the same with caps of every scope; three grants in each pool.

With caps a request passes eight balances: pool, open part, and caps on organization, user, team, department, key and
model. Users are spread over teams, teams over departments; everybody has a key of their own and calls the capped model.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

import psycopg

from benchmarks.hotpath import contenders, floor
from benchmarks.hotpath.books import PLENTY, QUERIES, Payer
from benchmarks.hotpath.pace import Case, Figure, Pace, interleaved, rate_of
from benchmarks.hotpath.report import Ratio, Row, row_of
from bursar.clock import uuid7
from bursar.credits.batcher import Batcher

TEAMS: Final = 10
DEPARTMENTS: Final = 3
GRANTS: Final = 3
BATCH: Final = 64
LEAST_SHARE: Final = 0.8
WITHOUT: Final = "without caps"
WITH_ALL: Final = "with caps of every scope"


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
        WITHOUT: organizations.without,
        "with a default for every member": organizations.default,
        WITH_ALL: organizations.capped,
    }
    rows: list[Row] = []
    await _use(lane, admin_dsn, [payer for payers in members.values() for payer in payers])
    async with Batcher(lane, lanes=1) as batcher:
        for what, by in (("deduct", contenders.by_batcher), ("hold and settle", contenders.by_hold)):
            cases = [Case(name, by(batcher, payers), callers, server) for name, payers in members.items()]
            paces = await interleaved(cases, rounds=rounds, seconds=seconds)
            rows += compared(f"caps, hot pool, {callers} callers, {what}", paces)
    return rows


def server_alone(lane: str, admin_dsn: str, organizations: Organizations, *, rounds: int, seconds: float) -> list[Row]:
    """The server's work alone, with all caps against none, and the row writes among it that no batch can do without."""
    chains = floor.chains_of(admin_dsn)
    members = {WITHOUT: organizations.without, WITH_ALL: organizations.capped}
    rows: list[Row] = []
    for durable in (True, False):
        paces = floor.interleaved(
            {
                f"{work}, {name}": dsn
                for work, dsn in (("move_batch", lane), ("cost floor", admin_dsn))
                for name in members
            },
            {f"move_batch, {name}": floor.batches(payers, BATCH) for name, payers in members.items()}
            | {f"cost floor, {name}": floor.floors(payers, BATCH, chains) for name, payers in members.items()},
            size=BATCH,
            rounds=rounds,
            seconds=seconds,
            durable=durable,
        )
        rates = {name: Figure.of(each) for name, each in paces.items()}
        group = f"caps, server alone, batches of {BATCH}, {'durable' if durable else 'not waiting for disk'}"
        for name, rate in rates.items():
            bare = rates[name.replace(WITH_ALL, WITHOUT)].median
            ratios = () if name.endswith(WITHOUT) else (Ratio("the rate without", rate.median / bare, LEAST_SHARE),)
            rows.append(Row(group, name, rate, "/s", BATCH / rate.median * 1e3, ratios=ratios))
    return rows


def compared(group: str, paces: Mapping[str, Sequence[Pace]]) -> list[Row]:
    """A row for each, and how much of the rate without caps it is."""
    bare = rate_of(paces[WITHOUT]).median
    ratios = {
        name: (Ratio("the rate without", rate_of(each).median / bare, LEAST_SHARE),)
        for name, each in paces.items()
        if name != WITHOUT
    }
    return [row_of(group, name, each, ratios.get(name, ())) for name, each in paces.items()]
