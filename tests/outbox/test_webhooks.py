"""Webhooks: signed, at least once, in order, tried again, rotated, replayed."""

import asyncio
import json
import time
from datetime import timedelta
from typing import Any

import pytest
from standardwebhooks.webhooks import Webhook, WebhookVerificationError
from tests.conftest import MakeOrg, Org
from tests.fakes.receiver import Got, Receiver, receiving
from tests.outbox.conftest import HERE, RING, Hooks

from bursar.audit.events import OPERATOR, list_events
from bursar.clock import now, uuid7
from bursar.outbox.deliveries import GIVE_UP_AFTER, Event, body_of, next_wait
from bursar.outbox.endpoints import (
    InvalidEventKinds,
    TooManyWebhooks,
    WebhookDisabled,
    WebhookNotFound,
    add_endpoint,
    enable_endpoint,
    get_endpoint,
    list_deliveries,
    post_test,
    remove_endpoint,
    replay,
    reseal_some,
    rotate_secret,
    secrets_in_force,
)
from bursar.outbox.outside import AddressNotAllowed, Allowed
from bursar.outbox.signing import headers, new_secret
from bursar.sealing import Keyring, SealBroken


def verified(got: Got, secret: str) -> Any:
    """As the official library reads it; raises when it is not signed by this secret."""
    return Webhook(secret).verify(got.body, got.headers)


async def test_a_webhook_is_signed_as_the_official_library_checks_it(hooks: Hooks, receiver: Receiver) -> None:
    _, secret = await hooks.add(receiver)
    event = await hooks.post()
    await hooks.send()
    [got] = receiver.got
    document = verified(got, secret)
    assert document["type"] == "pool.low"
    assert document["data"]["left"] == "5"
    assert got.webhook_id == f"evt_{event.hex}"
    assert got.headers["content-type"] == "application/json"
    with pytest.raises(WebhookVerificationError):
        verified(Got(got.headers, got.body + b" ", got.host), secret)
    with pytest.raises(WebhookVerificationError):
        verified(got, new_secret())
    old = headers(got.webhook_id, int(time.time()) - 3600, got.body, [secret])
    with pytest.raises(WebhookVerificationError):
        verified(Got({**got.headers, **old}, got.body, got.host), secret)


async def test_the_library_signs_what_we_sign() -> None:
    secret, at = new_secret(), now()
    ours = headers("evt_1", int(at.timestamp()), b'{"a":1}', [secret])
    assert Webhook(secret).sign("evt_1", at, '{"a":1}') == ours["webhook-signature"]


async def test_during_a_rotation_both_secrets_verify_and_afterwards_the_new_one_alone(
    hooks: Hooks, receiver: Receiver
) -> None:
    endpoint_id, old = await hooks.add(receiver)
    place = {"organization_id": hooks.org.organization_id, "endpoint_id": endpoint_id}
    async with hooks.org.tenant() as conn:
        new = await rotate_secret(conn, RING, by=OPERATOR, **place)
    await hooks.post()
    await hooks.send()
    assert verified(receiver.got[-1], old)
    assert verified(receiver.got[-1], new)
    async with hooks.org.tenant() as conn:
        newest = await rotate_secret(conn, RING, by=OPERATOR, overlap=timedelta(0), **place)
        assert await secrets_in_force(conn, RING, **place) == [newest]


async def test_what_a_receiver_refuses_is_sent_again_under_the_same_id_and_body(
    hooks: Hooks, receiver: Receiver
) -> None:
    await hooks.add(receiver)
    await hooks.post()
    receiver.answer = lambda got: 503 if len(receiver.got) < 2 else 204
    for _ in range(3):
        await hooks.send()
        await hooks.later()
    assert len(receiver.got) == 3
    assert len(set(receiver.ids)) == 1
    assert len({each.body for each in receiver.got}) == 1
    assert await hooks.states() == ["delivered"]


async def test_after_three_days_it_is_given_up_and_the_next_event_goes(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.add(receiver)
    thing = uuid7()
    await hooks.post(thing)
    receiver.answer = lambda got: 500 if got.place[1] == 1 else 200
    await hooks.send()
    await hooks.ago("3 days 1 second")
    await hooks.post(thing)
    await hooks.later()
    await hooks.send()
    assert await hooks.states() == ["failed", "delivered"]


def test_attempts_spread_over_three_days_with_growing_waits() -> None:
    passed, waits, attempts = timedelta(0), [], 1
    while True:
        wait, is_last = next_wait(attempts, passed)
        if is_last:
            break
        waits.append(wait)
        passed += timedelta(seconds=wait)
        attempts += 1
    assert passed == GIVE_UP_AFTER
    assert 4 <= waits[0] <= 6
    assert waits[:5] == sorted(waits[:5])
    assert 10 <= len(waits) <= 20
    assert len({next_wait(3, timedelta(0))[0] for _ in range(20)}) > 1  # at random, so that not all come back at once


async def test_events_of_an_object_arrive_in_their_order_while_others_pass(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.add(receiver)
    blocked, free = uuid7(), uuid7()
    for _ in range(3):
        await hooks.post(blocked)
        await hooks.post(free)
    receiver.answer = lambda got: 500 if got.place[0] == str(blocked) and len(receiver.got) < 8 else 200
    for _ in range(20):
        await hooks.send()
        await hooks.later()
    of_free = [each.place[1] for each in receiver.got if each.place[0] == str(free)]
    of_blocked = [each.place[1] for each in receiver.got if each.place[0] == str(blocked)]
    assert of_free == [1, 2, 3]
    assert of_blocked == sorted(of_blocked)
    assert of_blocked[-3:] == [1, 2, 3]
    assert set(await hooks.states()) == {"delivered"}


async def test_two_workers_send_each_event_once(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.add(receiver)
    things = [uuid7() for _ in range(10)]
    for _ in range(4):
        for thing in things:
            await hooks.post(thing)
    others = [Hooks(hooks.org) for _ in range(3)]
    await asyncio.gather(*(each.send() for each in [hooks, *others]))
    await hooks.send()
    assert len(receiver.ids) == 40
    assert len(set(receiver.ids)) == 40
    for thing in things:
        assert [each.place[1] for each in receiver.got if each.place[0] == str(thing)] == [1, 2, 3, 4]


async def test_who_dies_while_sending_leaves_it_to_the_next(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.add(receiver)
    await hooks.post()
    short = Hooks(hooks.org, lease_seconds=0.2)

    sending = asyncio.create_task(short.sender.send((await hooks.due())[0]))
    while not receiver.got:
        await asyncio.sleep(0.001)
    sending.cancel()  # before what came of it is noted
    await asyncio.gather(sending, return_exceptions=True)
    assert await hooks.due() == [] or await hooks.states() == ["delivered"]
    await asyncio.sleep(0.25)
    await hooks.send()
    assert await hooks.states() == ["delivered"]
    assert len(set(receiver.ids)) == 1


async def test_an_endpoint_that_is_gone_is_disabled_at_once_and_administrators_are_told(
    hooks: Hooks, receiver: Receiver
) -> None:
    endpoint_id, _ = await hooks.add(receiver)
    await hooks.post()
    await hooks.post()
    receiver.answer = lambda got: 410
    await hooks.send()
    place = {"organization_id": hooks.org.organization_id, "endpoint_id": endpoint_id}
    async with hooks.org.tenant() as conn:
        assert (await get_endpoint(conn, **place)).state == "disabled"
        newest, *_ = await list_events(conn, organization_id=hooks.org.organization_id)
        assert newest.action == "webhook.disabled"
        readers = await (await conn.execute("select user_id from outbox.mails")).fetchall()
        with pytest.raises(WebhookDisabled):
            await replay(conn, event_id=uuid7(), by=OPERATOR, **place)
    assert readers == [(hooks.org.admin,)]
    assert await hooks.states() == ["failed", "failed"]


async def test_five_days_of_failures_disable_an_endpoint_and_enabling_and_replaying_brings_what_was_missed(
    hooks: Hooks, receiver: Receiver
) -> None:
    endpoint_id, _ = await hooks.add(receiver)
    place = {"organization_id": hooks.org.organization_id, "endpoint_id": endpoint_id}
    began = now()
    await hooks.post()
    receiver.answer = lambda got: 500
    await hooks.send()
    async with hooks.org.tenant() as conn:
        await conn.execute("update outbox.endpoints set failing_since = failing_since - interval '5 days'")
    await hooks.later()
    await hooks.send()
    await hooks.post()  # while it is disabled: nothing goes there
    assert await hooks.states() == ["failed"]
    receiver.answer = lambda got: 200
    async with hooks.org.tenant() as conn:
        assert (await enable_endpoint(conn, by=OPERATOR, **place)).state == "active"
        assert await replay(conn, since=began, by=OPERATOR, **place) == 2
    await hooks.send()
    assert await hooks.states() == ["delivered", "delivered"]


async def test_a_success_brings_back_at_once_what_waited_for_hours(hooks: Hooks, receiver: Receiver) -> None:
    await hooks.add(receiver)
    first = await hooks.post()
    await hooks.post()
    receiver.answer = lambda got: 500
    await hooks.send()
    async with hooks.org.tenant() as conn:
        await conn.execute("update outbox.deliveries set next_attempt_at = clock_timestamp() + interval '9 hours'")
        await conn.execute(
            "update outbox.deliveries set next_attempt_at = clock_timestamp() where event_id = %s", [first]
        )
    receiver.answer = lambda got: 200
    await hooks.send()
    assert await hooks.states() == ["delivered", "delivered"]


async def test_a_replay_of_one_event_comes_under_its_old_id(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.add(receiver)
    event = await hooks.post()
    await hooks.send()
    async with hooks.org.tenant() as conn:
        await replay(
            conn, organization_id=hooks.org.organization_id, endpoint_id=endpoint_id, event_id=event, by=OPERATOR
        )
    await hooks.send()
    assert receiver.ids == [f"evt_{event.hex}"] * 2


async def test_a_test_goes_to_one_webhook_alone(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.add(receiver, "limit.reached")
    async with receiving() as other:
        await hooks.add(other)
        async with hooks.org.tenant() as conn:
            await post_test(conn, organization_id=hooks.org.organization_id, endpoint_id=endpoint_id)
        await hooks.send()
        assert other.got == []
    assert receiver.got[0].document["type"] == "webhook.test"


async def test_what_is_removed_gets_nothing_and_cannot_be_found(hooks: Hooks, receiver: Receiver) -> None:
    endpoint_id, _ = await hooks.add(receiver)
    await hooks.post()
    place = {"organization_id": hooks.org.organization_id, "endpoint_id": endpoint_id}
    async with hooks.org.tenant() as conn:
        await remove_endpoint(conn, by=OPERATOR, **place)
    await hooks.post()
    await hooks.send()
    assert receiver.got == []
    async with hooks.org.tenant() as conn:
        with pytest.raises(WebhookNotFound):
            await list_deliveries(conn, **place)


async def test_what_cannot_be_a_webhook_is_refused(hooks: Hooks, receiver: Receiver) -> None:
    async def add(url: str, *kinds: str) -> None:
        async with hooks.org.tenant() as conn:
            allowed = HERE if kinds else Allowed()
            await add_endpoint(
                conn,
                RING,
                allowed,
                organization_id=hooks.org.organization_id,
                url=url,
                kinds=kinds or ["*"],
                by=OPERATOR,
            )

    for url in ("http://hooks.acme.example/", "https://10.1.2.3/", "https://a:b@hooks.acme.example/", "https://x/"):
        with pytest.raises(AddressNotAllowed):
            await add(url)
    for kind in ("pool", "pool.low; drop", "Pool.low", "*.*", ""):
        with pytest.raises(InvalidEventKinds):
            await add(receiver.url, kind)
    for _ in range(20):
        await add(receiver.url, "pool.low")
    with pytest.raises(TooManyWebhooks):
        await add(receiver.url, "pool.low")


async def test_a_secret_moved_to_another_organization_cannot_be_opened_and_stands_nowhere_in_the_open(
    hooks: Hooks, receiver: Receiver, make_org: MakeOrg
) -> None:
    endpoint_id, secret = await hooks.add(receiver)
    async with hooks.org.tenant() as conn:
        rows = await (await conn.execute("select s::text from outbox.endpoint_secrets s")).fetchall()
        audit = await (await conn.execute("select e::text from audit.events e")).fetchall()
        assert secret.removeprefix("whsec_") not in json.dumps([*rows, *audit])
    stranger = await make_org()
    async with stranger.tenant() as conn:
        place = {"organization_id": stranger.organization_id, "endpoint_id": endpoint_id}
        assert await secrets_in_force(conn, RING, **place) == []
        with pytest.raises(WebhookNotFound):
            await get_endpoint(conn, **place)


async def test_secrets_can_be_sealed_anew_under_another_master_key(org: Org, receiver: Receiver) -> None:
    """Under keyrings of its own, and of one organization: every test's secrets lie together."""
    old, new = Keyring(b"o" * 32), Keyring(b"n" * 32)
    place = {"organization_id": org.organization_id}
    async with org.tenant() as conn:
        endpoint, secret = await add_endpoint(conn, old, HERE, url=receiver.url, by=OPERATOR, **place)
        assert await reseal_some(conn, Keyring(b"n" * 32, b"o" * 32), org.organization_id) == 1
        assert await secrets_in_force(conn, new, endpoint_id=endpoint.endpoint_id, **place) == [secret]
        with pytest.raises(SealBroken):
            await secrets_in_force(conn, old, endpoint_id=endpoint.endpoint_id, **place)
        assert await reseal_some(conn, Keyring(b"n" * 32, b"o" * 32), org.organization_id) == 0


def test_the_body_names_the_event_and_its_object() -> None:
    event = Event(
        event_id=uuid7(),
        kind="pool.low",
        object_kind="pool",
        object_id=uuid7(),
        sequence=7,
        payload={"left": "5"},
        happened_at=now(),
    )
    document = json.loads(body_of(uuid7(), event))
    assert document["data"]["object"]["sequence"] == 7
    assert document["timestamp"].endswith("Z")
