"""The database alone keeps organizations apart: row-level security without any filter of the application."""

from uuid import UUID

import psycopg
import pytest

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.identity.departments import create_department
from bursar.identity.memberships import place_member
from bursar.identity.sessions import create_sign_in_link, sign_in
from bursar.identity.teams import create_team
from bursar.identity.users import get_user

TABLES = [
    "audit.events",
    "identity.organizations",
    "identity.departments",
    "identity.teams",
    "identity.memberships",
    "identity.api_keys",
    "identity.sign_in_links",
    "identity.sessions",
]


@pytest.fixture
async def victims(make_org) -> list[UUID]:
    """Organizations with a row in every table between them: a company and its administrator's home."""
    victim = await make_org()
    async with victim.tenant() as conn:
        names = {"organization_id": victim.organization_id, "by": OPERATOR}
        department = await create_department(conn, name="Sales", **names)
        team = await create_team(conn, name="Field", department_id=department.department_id, **names)
        await place_member(
            conn, user_id=victim.admin, team_id=team.team_id, department_id=department.department_id, **names
        )
        user = await get_user(conn, user_id=victim.admin)
    await victim.key(victim.admin)
    async with victim.database.tenant(user.home_organization_id) as conn:
        token = await create_sign_in_link(conn, user=user, by=OPERATOR)
    await sign_in(victim.database, token)
    return [victim.organization_id, user.home_organization_id]


@pytest.mark.parametrize("table", TABLES)
async def test_row_level_security_alone_hides_and_guards_every_row(org, victims, table: str) -> None:
    count = f"select count(*) from {table} where organization_id = any(%(ids)s)"
    async with org.database.platform() as conn:
        assert await db.fetch_value(conn, count, ids=victims) > 0, "the test would prove nothing"
    for acting in (org.database.tenant(org.organization_id), org.database.untenanted()):
        async with acting as conn:
            assert await db.fetch_value(conn, count, ids=victims) == 0
    async with org.tenant() as conn:
        assert (
            await db.fetch_value(
                conn, f"select count(*) from {table} where organization_id <> %(own)s", own=org.organization_id
            )
            == 0
        )
    async with org.database.untenanted() as conn:
        assert await db.fetch_value(conn, f"select count(*) from {table}") == 0


@pytest.mark.parametrize("table", TABLES[1:])
async def test_an_update_for_another_organization_touches_nothing(org, victims, table: str) -> None:
    async with org.tenant() as conn:
        touched = await db.execute(
            conn,
            f"update {table} set organization_id = organization_id where organization_id = any(%(ids)s)",
            ids=victims,
        )
        assert touched == 0


@pytest.mark.parametrize("acts_for_own", [True, False])
@pytest.mark.parametrize("table", TABLES)
async def test_no_row_can_be_written_for_another_organization(org, victims, table: str, acts_for_own: bool) -> None:
    """A true row of the victim, put back under a new id, is refused by the policy before any constraint is asked."""
    ids = {
        "audit.events": "event_id",
        "identity.organizations": "slug",
        "identity.departments": "department_id",
        "identity.teams": "team_id",
        "identity.memberships": "user_id",
        "identity.api_keys": "api_key_id",
        "identity.sign_in_links": "link_id",
        "identity.sessions": "session_id",
    }
    async with org.database.platform() as conn:
        row = await db.fetch_value(
            conn, f"select to_jsonb(t) from {table} t where organization_id = any(%(ids)s) limit 1", ids=victims
        )
    row[ids[table]] = str(clock.uuid7())
    insert = f"insert into {table} select * from jsonb_populate_record(null::{table}, %(row)s)"
    acting = org.database.tenant(org.organization_id) if acts_for_own else org.database.untenanted()
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="row-level security"):
        async with acting as conn:
            await db.execute(conn, insert, row=psycopg.types.json.Jsonb(row))


@pytest.mark.parametrize(
    "table", [*TABLES, "route.organizations", "route.users", "route.memberships", "route.api_keys"]
)
async def test_nothing_is_deleted_or_truncated_by_the_application(org, table: str) -> None:
    for statement in (f"delete from {table}", f"truncate {table}"):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            async with org.tenant() as conn:
                await db.execute(conn, statement)


@pytest.mark.parametrize("table", ["organizations", "users", "memberships", "api_keys", "sign_in_links"])
async def test_nobody_reads_the_routes_but_through_their_functions(org, table: str) -> None:
    for acting in (org.tenant(), org.database.platform()):
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            async with acting as conn:
                await db.execute(conn, f"select * from route.{table}")


CLAIMS = [
    "select route.claim_slug(%(victim)s, 'stolen-slug')",
    "select route.claim_user(%(victim)s, gen_random_uuid(), sha256('x'))",
    "select route.choose_default(%(victim)s, gen_random_uuid(), null)",
    "select route.join_organization(%(victim)s, gen_random_uuid(), now())",
    "select route.leave_organization(%(victim)s, gen_random_uuid())",
    "select route.claim_api_key(%(victim)s, gen_random_uuid(), sha256('x'))",
    "select route.claim_sign_in_link(%(victim)s, gen_random_uuid(), sha256('x'))",
]


@pytest.mark.parametrize("claim", CLAIMS)
async def test_nothing_can_be_claimed_for_another_organization(org, victims, claim: str) -> None:
    for acting in (org.tenant(), org.database.untenanted()):
        with pytest.raises(psycopg.Error) as refusal:
            async with acting as conn:
                await db.execute(conn, claim, victim=victims[0])
        assert refusal.value.sqlstate == "BR404"


async def test_the_money_functions_may_read_who_may_spend_and_change_none_of_it(database: db.Database) -> None:
    for table in ("organizations", "memberships", "api_keys", "departments", "teams"):
        async with database.platform() as conn:
            allowed = [
                await db.fetch_value(
                    conn, "select has_table_privilege('bursar_money', %(t)s, %(p)s)", t=f"identity.{table}", p=privilege
                )
                for privilege in ("select", "insert", "update", "delete")
            ]
        assert allowed == [True, False, False, False]


async def test_the_audit_cannot_be_changed_even_by_its_owner(org, admin_dsn: str) -> None:
    async with await psycopg.AsyncConnection.connect(admin_dsn) as admin:
        await admin.execute("set role bursar_owner")
        for statement in ("update audit.events set reason = 'x'", "delete from audit.events", "truncate audit.events"):
            with pytest.raises(psycopg.Error) as refusal:
                async with admin.transaction():
                    await admin.execute(statement)
            assert refusal.value.sqlstate == "BR409"
