"""What was told ends after a while; what is still to be sent, and the last event of each object, do not."""

from dataclasses import replace
from datetime import timedelta
from uuid import UUID

import psycopg
import pytest
from tests.conftest import Org
from tests.outbox.test_events import NUMBERS, asked, endpoint, post

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import now, uuid7
from bursar.credits.verify import verify
from bursar.outbox.endpoints import replay
from bursar.outbox.jobs import purge, purge_outbox
from bursar.problems import NotFound, translated

EVENT = """
    insert into outbox.events (
        organization_id, event_id, kind, object_kind, object_id, sequence, payload, happened_at, posted_at)
    values (%(org)s, %(event)s, 'pool.low', 'pool', %(object)s, %(sequence)s, '{}', clock_timestamp(),
        clock_timestamp() - make_interval(days => %(days)s))"""
DELIVERY = """
    insert into outbox.deliveries (organization_id, endpoint_id, event_id, object_kind, object_id, sequence, created_at)
    values (%(org)s, %(endpoint)s, %(event)s, 'pool', %(object)s, 1, clock_timestamp() - interval '400 days')"""
ENDED = """
    update outbox.deliveries set state = %(state)s, ended_at = clock_timestamp() - make_interval(days => %(days)s)
    where event_id = %(event)s and endpoint_id = %(endpoint)s"""
MAIL = "select outbox.mail_event(%(org)s, %(event)s, array[%(user)s]::uuid[], '{}', 0)"
MAILED = """
    update outbox.mails set state = 'sent', attempts = 1, ended_at = clock_timestamp() - make_interval(days => %(days)s)
    where state = 'pending'"""
LEFT = "select coalesce(array_agg(event_id order by event_id), '{}') from outbox.events"


async def old_events(org: Org, count: int, *, days: int = 400, thing: UUID | None = None) -> list[UUID]:
    """Events of one object so many days ago."""
    thing = thing or uuid7()
    events = [uuid7() for _ in range(count)]
    async with org.tenant() as conn:
        for number, event in enumerate(events, 1):
            await db.execute(
                conn, EVENT, org=org.organization_id, event=event, object=thing, sequence=number, days=days
            )
    return events


async def deliver(org: Org, webhook: UUID, event: UUID, state: str, days: int) -> None:
    """A delivery of an event that is in a state since so many days; pending ones are older than all."""
    async with org.tenant() as conn:
        thing = await db.fetch_value(conn, "select object_id from outbox.events where event_id = %(e)s", e=event)
        await db.execute(conn, DELIVERY, org=org.organization_id, endpoint=webhook, event=event, object=thing)
        if state != "pending":
            await db.execute(conn, ENDED, event=event, endpoint=webhook, state=state, days=days)


async def mail(org: Org, event: UUID) -> None:
    async with org.tenant() as conn:
        await db.execute(conn, MAIL, org=org.organization_id, event=event, user=org.admin)


async def sent(org: Org, days: int) -> None:
    """What waits was mailed so many days ago."""
    async with org.tenant() as conn:
        await db.execute(conn, MAILED, days=days)


async def purged(org: Org, days: int = 30, most: int = 1_000) -> int:
    return await purge(org.database, org.organization_id, days=days, most=most)


async def left(org: Org) -> set[UUID]:
    return set(await asked(org, LEFT))


async def counted(org: Org) -> list[int]:
    """Deliveries, e-mails and their events."""
    counts = ", ".join(f"(select count(*) from outbox.{table})" for table in ("deliveries", "mails", "mail_events"))
    return list(await asked(org, f"select array[{counts}]"))


@pytest.mark.parametrize("state", ["delivered", "failed"])
async def test_an_event_ends_so_long_after_its_last_delivery(org: Org, state: str) -> None:
    one, two = await endpoint(org, "*"), await endpoint(org, "*")
    gone, recent, last = await old_events(org, 3)
    for event, days in ((gone, 31), (recent, 29), (last, 31)):
        await deliver(org, one, event, state, 31)
        await deliver(org, two, event, state, days)
    assert await purged(org) == 6, "two, one and two deliveries, and an event"
    assert await left(org) == {recent, last}
    assert (await counted(org))[0] == 1


async def test_what_is_still_to_be_sent_never_ends(org: Org) -> None:
    webhook = await endpoint(org, "*")
    waiting, mailed, _ = await old_events(org, 3)
    await deliver(org, webhook, waiting, "pending", 0)
    await mail(org, mailed)
    assert await purged(org) == 0
    assert {waiting, mailed} < await left(org)
    assert await counted(org) == [1, 1, 1]


async def test_an_email_ends_with_what_it_told(org: Org) -> None:
    one, two, last = await old_events(org, 3)
    for event in (one, two, last):
        await mail(org, event)
    await sent(org, 29)
    assert await purged(org) == 0
    await mail(org, two)  # again, by another e-mail that waits
    async with org.tenant() as conn:
        await conn.execute("update outbox.mails set ended_at = ended_at - interval '2 days' where state = 'sent'")
    await purged(org)
    assert await left(org) == {two, last}
    assert await counted(org) == [0, 1, 1]


async def test_what_nobody_was_told_ends_so_long_after_it_happened_and_the_next_number_goes_on(org: Org) -> None:
    thing, other = uuid7(), uuid7()
    [*_, last] = await old_events(org, 5, thing=thing)
    recent = await old_events(org, 2, days=29, thing=other)
    assert await purged(org, most=2) == 4, "in small batches, all of them"
    assert await left(org) == {last, *recent}
    async with org.tenant() as conn:
        await post(conn, org.organization_id, thing)
    assert await asked(org, NUMBERS, object_id=thing) == [5, 6]
    await purged(org)
    assert await asked(org, NUMBERS, object_id=thing) == [6]


async def test_the_books_agree_where_events_have_ended(org: Org) -> None:
    webhook = await endpoint(org, "*")
    _, kept, _, _ = await old_events(org, 4)
    await deliver(org, webhook, kept, "delivered", 2)
    assert await purged(org) == 2, "the first, and one between others"
    async with org.database.platform() as conn:
        assert await verify(conn, organization_id=org.organization_id) == []


async def test_an_event_that_is_told_or_the_last_one_is_deleted_by_nobody(org: Org, database: db.Database) -> None:
    told, last = await old_events(org, 2)
    await deliver(org, await endpoint(org, "*"), told, "pending", 0)
    delete = "delete from outbox.events where organization_id = %s and event_id = %s"
    async with await psycopg.AsyncConnection.connect(database.dsn("admin"), autocommit=True) as conn:
        await conn.execute("set role bursar_owner")
        with pytest.raises(psycopg.errors.ForeignKeyViolation):
            await conn.execute(delete, [org.organization_id, told])
        with pytest.raises(psycopg.Error, match="the last one of its object does not end"):
            await conn.execute(delete, [org.organization_id, last])
        with pytest.raises(psycopg.Error, match="never changed"):
            await conn.execute("update outbox.events set kind = 'pool.high' where event_id = %s", [told])
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await conn.execute(delete, [org.organization_id, told])


async def test_nobody_ends_what_another_organization_was_told_or_what_was_told_today(org: Org) -> None:
    events = await old_events(org, 2)
    ask = "select outbox.purge(%(org)s, %(days)s, 10)"
    with pytest.raises(NotFound), translated():
        async with org.tenant() as conn:
            await db.execute(conn, ask, org=uuid7(), days=30)
    with pytest.raises(psycopg.Error, match="for a day at least"):
        async with org.tenant() as conn:
            await db.execute(conn, ask, org=org.organization_id, days=0)
    assert await left(org) == set(events)


async def test_the_worker_does_it_for_every_organization_and_for_none_where_events_are_kept(
    org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, last = await old_events(org, 2)
    with monkeypatch.context() as patched:
        patched.setattr(org.database, "settings", replace(org.database.settings, events_days=0))
        assert await purge_outbox(org.database) == 0
    assert await left(org) == {first, last}
    while await left(org) != {last}:  # another worker may be at it
        await purge_outbox(org.database)


async def test_what_failed_is_replayed_alone_also_where_the_rest_is_forgotten(org: Org) -> None:
    webhook = await endpoint(org, "*")
    failed, _, _ = await old_events(org, 3)
    await deliver(org, webhook, failed, "failed", 1)
    async with org.tenant() as conn:
        again = await replay(
            conn,
            organization_id=org.organization_id,
            endpoint_id=webhook,
            by=OPERATOR,
            since=now() - timedelta(days=500),
            only_failed=True,
        )
    assert again == 1
    assert await counted(org) == [1, 0, 0]
