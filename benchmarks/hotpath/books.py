"""The organizations that the benchmark charges, opened through the real functions, and again in plain tables."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar
from uuid import UUID

import psycopg

from bursar import db
from bursar.clock import uuid7

QUERIES: Final = db.load_queries("benchmarks.hotpath")
PLENTY: Final = 10**15  # micros: never reached
NOTHING: Final = 1  # micros: an exhausted cap
AT_ONCE: Final = 500  # organizations opened in one transaction
Drawn = TypeVar("Drawn")


@dataclass(frozen=True, slots=True)
class Payer:
    """A user with a key, and the four plain balances that stand for the real ones."""

    organization_id: UUID
    user_id: UUID
    api_key_id: UUID
    balance_ids: list[UUID]


@dataclass(frozen=True, slots=True)
class Books:
    """Who pays. hot: users of one organization; exhausted: more, with empty caps; uniform: one per organization."""

    hot: list[Payer]
    exhausted: list[Payer]
    uniform: list[Payer]


def open_books(admin_dsn: str, simulator_dsn: str, *, users: int, exhausted: int, organizations: int) -> Books:
    """Make the benchmark's tables and organizations. Takes about 2 ms an organization."""
    with psycopg.connect(admin_dsn) as admin, psycopg.connect(simulator_dsn) as simulator:
        hot = _draw(users + exhausted, one_organization=True)
        _open(admin, simulator, hot, poor={payer.user_id for payer in hot[users:]})
        uniform = _draw(organizations, one_organization=False)
        for start in range(0, organizations, AT_ONCE):
            _open(admin, simulator, uniform[start : start + AT_ONCE], poor=set())
    with psycopg.connect(admin_dsn, autocommit=True) as admin:
        admin.execute("vacuum analyze")
    return Books(hot[:users], hot[users:], uniform)


def _draw(count: int, *, one_organization: bool) -> list[Payer]:
    shared = (uuid7(), uuid7(), uuid7())
    payers = []
    for _ in range(count):
        organization_id, pool_id, open_part_id = shared if one_organization else (uuid7(), uuid7(), uuid7())
        payers.append(Payer(organization_id, uuid7(), uuid7(), [pool_id, open_part_id, uuid7(), uuid7()]))
    return payers


def _open(
    admin: psycopg.Connection, simulator: psycopg.Connection, payers: Sequence[Payer], *, poor: set[UUID]
) -> None:
    orgs = [payer.organization_id for payer in payers]
    users = [payer.user_id for payer in payers]
    keys = [payer.api_key_id for payer in payers]
    pools = {payer.organization_id: payer.balance_ids[0] for payer in payers}
    caps = [NOTHING if payer.user_id in poor else PLENTY for payer in payers]
    admin.execute(QUERIES.add_organizations, {"organization_ids": list(pools)})
    admin.execute(QUERIES.add_members, {"organization_ids": orgs, "user_ids": users})
    admin.execute(QUERIES.add_keys, {"organization_ids": orgs, "user_ids": users, "api_key_ids": keys})
    plain = sorted({(payer.organization_id, each) for payer in payers for each in payer.balance_ids})
    balances = {"organization_ids": [org for org, _ in plain], "balance_ids": [each for _, each in plain]}
    admin.execute(QUERIES.add_plain_balances, {**balances, "micros": PLENTY})
    admin.commit()
    opened = {"organization_ids": list(pools), "pool_ids": list(pools.values())}
    simulator.execute(QUERIES.open_gates, {"organization_ids": list(pools)})
    simulator.execute(QUERIES.open_pools, opened)
    simulator.execute(QUERIES.add_grants, {**opened, "micros": PLENTY})
    simulator.execute(QUERIES.cap, {"organization_ids": orgs, "scope": "user", "ids": users, "micros": caps})
    simulator.execute(
        QUERIES.cap, {"organization_ids": orgs, "scope": "key", "ids": keys, "micros": [PLENTY] * len(keys)}
    )
    simulator.commit()


def shuffled(things: Sequence[Drawn], seed: int) -> Iterator[Drawn]:
    """Endless draws, the same in every run."""
    draw = random.Random(seed)
    while True:
        yield draw.choice(things)
