"""Companies of a running server, opened by the application's own functions: one without caps, one with all of them."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from benchmarks.hotpath.books import PLENTY
from benchmarks.hotpath.caps import DEPARTMENTS, GRANTS, TEAMS, WITH_ALL, WITHOUT
from benchmarks.hotpath.contenders import MODEL
from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.limits import Scope, set_limit
from bursar.credits.pools import open_credits, pool_for
from bursar.identity.addresses import Address
from bursar.identity.api_keys import NewApiKey, create_api_key
from bursar.identity.departments import create_department
from bursar.identity.memberships import Membership
from bursar.identity.organizations import create_organization
from bursar.identity.roles import Role
from bursar.identity.roles import Scope as KeyScope
from bursar.identity.teams import create_team
from bursar.identity.users import invite
from bursar.money import Micros
from bursar.settings import Settings


async def open_companies(settings: Settings, *, members: int) -> dict[str, list[str]]:
    """WITHOUT and WITH_ALL, whose members each have a key that may charge: the texts of those keys."""
    async with db.opened(settings) as database:
        return {
            WITHOUT: await _open(database, "without", members, is_capped=False),
            WITH_ALL: await _open(database, "capped", members, is_capped=True),
        }


async def _open(database: db.Database, slug: str, members: int, *, is_capped: bool) -> list[str]:
    organization_id = uuid7()
    async with database.tenant(organization_id) as conn:
        made = await create_organization(conn, organization_id=organization_id, slug=slug, name=slug, by=OPERATOR)
        await open_credits(conn, made)
        pool_id = await pool_for(conn, organization_id=organization_id)
        for number in range(GRANTS):
            await add_grant(
                conn,
                organization_id=organization_id,
                pool_id=pool_id,
                amount_micros=Micros(PLENTY // GRANTS),
                source=GrantSource.PURCHASE,
                idempotency_key=f"{slug}-{number}",
            )
        place: dict[str, Any] = {"organization_id": organization_id, "by": OPERATOR}
        departments = [(await create_department(conn, name=f"D{n}", **place)).department_id for n in range(DEPARTMENTS)]
        teams = [(await create_team(conn, name=f"T{n}", **place)).team_id for n in range(TEAMS)]
    people = [
        await invite(
            database,
            organization_id=organization_id,
            address=Address.of(f"member{n}@{slug}.example", database.settings),
            display_name=f"Member {n}",
            roles=[Role.ORG_ADMIN],  # they may charge
            team_id=teams[n % TEAMS],
            department_id=departments[n % TEAMS % DEPARTMENTS],
            by=OPERATOR,
            on_opening=open_credits,
        )
        for n in range(members)
    ]
    async with database.tenant(organization_id) as conn:
        keys = [await _key(conn, person) for person in people]
        if is_capped:
            await _cap(conn, organization_id, Scope.ORGANIZATION, [None])
            await _cap(conn, organization_id, Scope.ORGANIZATION, [None], model=MODEL)
            await _cap(conn, organization_id, Scope.DEPARTMENT, departments)
            await _cap(conn, organization_id, Scope.TEAM, teams)
            await _cap(conn, organization_id, Scope.USER, [person.user_id for person in people])
            await _cap(conn, organization_id, Scope.KEY, [made.key.api_key_id for made in keys])
    return [made.text for made in keys]


async def _key(conn: db.Connection, person: Membership) -> NewApiKey:
    return await create_api_key(
        conn,
        organization_id=person.organization_id,
        user_id=person.user_id,
        name="Benchmark",
        by=OPERATOR,
        scopes=[KeyScope.WRITE],
    )


async def _cap(
    conn: db.Connection, organization_id: UUID, scope: Scope, ids: Sequence[UUID | None], *, model: str | None = None
) -> None:
    for scope_id in ids:
        await set_limit(
            conn, organization_id=organization_id, scope=scope, scope_id=scope_id, amount=PLENTY, model_filter=model
        )
