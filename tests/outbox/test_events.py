"""Posting events: numbered, in the transaction of the deed, and addressed to who asked for them."""

import asyncio
from typing import Any
from uuid import UUID

import psycopg
import pytest
from tests.conftest import Org

from bursar import db
from bursar.clock import uuid7
from bursar.identity.roles import Role

POST = """select outbox.post_event(%(organization_id)s, %(kind)s, %(object_kind)s, %(object_id)s, '{"credits": "5"}')"""
NUMBERS = """
    select array_agg(sequence order by sequence) from outbox.events
    where organization_id = %(organization_id)s and object_id = %(object_id)s"""


async def post(
    conn: db.Connection, organization_id: UUID, object_id: UUID, *, kind: str = "pool.low", object_kind: str = "pool"
) -> UUID:
    event: UUID = await db.fetch_value(
        conn, POST, organization_id=organization_id, kind=kind, object_kind=object_kind, object_id=object_id
    )
    return event


async def endpoint(org: Org, *kinds: str) -> UUID:
    endpoint_id = uuid7()
    async with org.tenant() as conn:
        await db.execute(
            conn,
            "insert into outbox.endpoints (organization_id, endpoint_id, url, kinds)"
            " values (%(org)s, %(id)s, 'https://receiver.example/', %(kinds)s)",
            org=org.organization_id,
            id=endpoint_id,
            kinds=list(kinds),
        )
    return endpoint_id


async def asked(org: Org, sql: str, **params: Any) -> Any:
    async with org.tenant() as conn:
        return await db.fetch_value(conn, sql, organization_id=org.organization_id, **params)


async def test_the_events_of_an_object_are_numbered_without_gaps_however_many_post_at_once(org: Org) -> None:
    thing, other = uuid7(), uuid7()

    async def some(object_id: UUID, undone: bool) -> None:
        for _ in range(5):
            try:
                async with org.tenant() as conn:
                    await post(conn, org.organization_id, object_id)
                    await asyncio.sleep(0.001)
                    if undone:
                        raise ArithmeticError
            except ArithmeticError:
                continue

    await asyncio.gather(*(some(thing, undone=number % 3 == 0) for number in range(9)), some(other, undone=False))
    assert await asked(org, NUMBERS, object_id=thing) == list(range(1, 31))
    assert await asked(org, NUMBERS, object_id=other) == [1, 2, 3, 4, 5]


async def test_an_event_goes_to_the_endpoints_that_asked_for_its_kind(org: Org) -> None:
    everything, pools, low = await endpoint(org, "*"), await endpoint(org, "pool.*"), await endpoint(org, "pool.low")
    await endpoint(org, "limit.reached", "code.*")
    async with org.tenant() as conn:
        event = await post(conn, org.organization_id, uuid7())
    found = await asked(
        org, "select array_agg(endpoint_id order by endpoint_id) from outbox.deliveries where event_id = %(e)s", e=event
    )
    assert found == sorted([everything, pools, low])


async def test_a_top_up_that_failed_is_mailed_to_who_pays_and_to_nobody_else(org: Org) -> None:
    finance = await org.member(Role.FINANCE)
    await org.member()
    async with org.tenant() as conn:
        event = await post(conn, org.organization_id, uuid7(), kind="topup.failed", object_kind="topup")
    readers = await asked(
        org,
        "select array_agg(m.user_id order by m.user_id) from outbox.mails m join outbox.mail_events e"
        " on e.organization_id = m.organization_id and e.mail_id = m.mail_id where e.event_id = %(e)s",
        e=event,
    )
    assert readers == sorted([finance, org.admin])


async def test_what_comes_while_an_email_collects_joins_it(org: Org) -> None:
    mail = "select outbox.mail_event(%(org)s, %(event)s, array[%(user)s]::uuid[], '{}', 5)"
    for _ in range(3):
        async with org.tenant() as conn:
            event = await post(conn, org.organization_id, uuid7())
            await db.execute(conn, mail, org=org.organization_id, event=event, user=org.admin)
    counts = "select array[(select count(*) from outbox.mails), (select count(*) from outbox.mail_events)]"
    assert await asked(org, counts) == [1, 3]


async def test_an_event_is_never_changed(org: Org) -> None:
    async with org.tenant() as conn:
        await post(conn, org.organization_id, uuid7())
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await conn.execute("update outbox.events set kind = 'pool.exhausted'")


async def test_nobody_posts_for_another_organization(org: Org) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await post(conn, uuid7(), uuid7())


async def test_a_money_function_may_post(org: Org, database: db.Database) -> None:
    async with await psycopg.AsyncConnection.connect(database.dsn("admin")) as conn:
        await conn.execute("set role bursar_money")
        await post(conn, org.organization_id, (thing := uuid7()))
    assert await asked(org, NUMBERS, object_id=thing) == [1]
