"""One organization's story, small but with a row in every table of a tenant: what test_reads multiplies."""

from typing import Any
from uuid import UUID

import psycopg
from psycopg.types.json import Jsonb
from tests.conftest import Org
from tests.credits.scenes import Scene

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import codes, top_ups
from bursar.credits.codes import Terms
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.limits import Scope, allocate, set_limit
from bursar.credits.moves import Flag
from bursar.credits.pools import open_credits, pool_for
from bursar.db import arrays
from bursar.identity.departments import create_department
from bursar.identity.organizations import create_organization
from bursar.identity.roles import Role
from bursar.identity.sessions import create_sign_in_link
from bursar.identity.teams import create_team
from bursar.money import Micros

CREDIT = 1_000_000


async def tell(database: db.Database, slug: str) -> Org:
    """A company of three with keys, limits, shares, charges, holds, refusals, codes, webhooks and batches."""
    org = await _people(database, slug)
    await _credits(org)
    with psycopg.connect(database.dsn("admin"), autocommit=True) as conn:
        _use(conn, org)
        _batches(conn, org.organization_id)
    await _codes_and_purchases(org)
    return org


async def _people(database: db.Database, slug: str) -> Org:
    organization_id = uuid7()
    async with database.tenant(organization_id) as conn:
        organization = await create_organization(
            conn, organization_id=organization_id, slug=slug, name="Large Corp", by=OPERATOR
        )
        await open_credits(conn, organization)
        team = await create_team(conn, organization_id=organization_id, name="Data", by=OPERATOR)
        department = await create_department(conn, organization_id=organization_id, name="Research", by=OPERATOR)
    bare = Org(database=database, organization_id=organization_id, slug=slug, admin=UUID(int=0))
    place = {"team_id": team.team_id, "department_id": department.department_id}
    admin = await bare.member(Role.ORG_ADMIN, **place)
    org = Org(database=database, organization_id=organization_id, slug=slug, admin=admin)
    await org.key(admin)
    await org.key()
    return org


async def _credits(org: Org) -> None:
    place = {"organization_id": org.organization_id}
    async with org.tenant() as conn:
        shared = await pool_for(conn, **place)
        own = await pool_for(conn, **place, owner_user_id=org.admin)
        for pool in (shared, own):
            amount = Micros(100 * CREDIT)
            await add_grant(
                conn, **place, pool_id=pool, amount_micros=amount, source=GrantSource.PURCHASE, idempotency_key=pool.hex
            )
        share = {"pool_id": shared, "user_id": org.admin, "amount_micros": Micros(20 * CREDIT)}
        await allocate(conn, **place, **share, idempotency_key="share")
        for scope, scope_id in ((Scope.ORGANIZATION, None), (Scope.USER, org.admin)):
            await set_limit(conn, **place, scope=scope, scope_id=scope_id, amount=1000 * CREDIT, created_by=org.admin)


def _use(conn: psycopg.Connection[Any], org: Org) -> None:
    """A charge, a hold, a refusal, an estimate, and a charge that two pools paid."""
    arrays.register(conn)
    scene = Scene.__new__(Scene)  # of an organization that there is
    scene.conn, scene.organization, scene.alone = conn, org.organization_id, False
    scene.now = conn.execute("select clock_timestamp()").fetchone()[0]  # type: ignore[index]
    [key] = scene.admin("select api_key_id from identity.api_keys where user_id = %s", org.admin)[0]
    who = {"api_key_id": key, "conversation_id": uuid7()}
    scene.deduct(CREDIT, org.admin, **who)
    scene.later(microseconds=1)
    scene.settle(scene.hold(99 * CREDIT, org.admin, **who), 105 * CREDIT)
    scene.later(microseconds=1)
    scene.hold(CREDIT, org.admin, **who)
    scene.authorize(10_000 * CREDIT, org.admin, **who)
    scene.hold(CREDIT, org.admin, lease_seconds=1, flags=Flag.SENT, **who)
    scene.later(seconds=2)
    scene.expire()


def _batches(conn: psycopg.Connection[Any], organization_id: UUID) -> None:
    file, batch, key = uuid7(), uuid7(), uuid7()
    conn.execute(
        """
        insert into gateway.batch_files (organization_id, file_id, api_key_id, provider, endpoint, filename, size_bytes,
            requests)
        values (%s, %s, %s, 'demo', '/v1/chat/completions', 'asked.jsonl', 10, '{}')""",
        [organization_id, file, key],
    )
    conn.execute(
        """
        insert into gateway.batches (organization_id, batch_id, format, endpoint, api_key_id, provider, is_own_key,
            provider_batch_id, input_file_id, request_count, prices, state, idempotency_key, ends_by, lease_until,
            next_look_at)
        values (%s, %s, 'openai', '/v1/chat/completions', %s, 'demo', false, 'b1', %s, 1, %s, 'running', 'k',
            'infinity', now(), now())""",
        [organization_id, batch, key, file, Jsonb({})],
    )
    conn.execute(
        """
        insert into gateway.batch_requests (organization_id, batch_id, custom_id, request_id, model, estimate,
            permitted, context, hold_micros)
        values (%s, %s, 'c', %s, 'm', '{}', '{}', '{}', 1)""",
        [organization_id, batch, uuid7()],
    )


async def _codes_and_purchases(org: Org) -> None:
    place = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        terms = Terms(name="Spring", amount_micros=Micros(CREDIT))
        settings = org.database.settings
        campaign = await codes.open_campaign(conn, settings=settings, terms=terms, created_by=None, **place)
        made = await codes.add_codes(conn, campaign_id=campaign, count=3, **place)
        pool = await pool_for(conn, organization_id=org.organization_id)
        amounts = {
            "threshold_micros": Micros(10**14),
            "amount_micros": Micros(CREDIT),
            "ceiling_micros": Micros(10**14),
        }
        await top_ups.set_policy(conn, pool_id=pool, **amounts, **place)
        user = await org.user(f"link@{org.slug}.example")
    await codes.redeem(org.database, text=next(iter(made.values())), user_id=org.admin, into=None, by=OPERATOR)
    await top_ups.top_up_pools(org.database)
    async with org.database.tenant(user.home_organization_id) as conn:
        await create_sign_in_link(conn, user=user, by=OPERATOR)
