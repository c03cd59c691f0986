import hashlib
import json
from typing import Any

import psycopg
import pytest

from bursar import db
from bursar.audit.events import OPERATOR, list_events
from bursar.clock import uuid7
from bursar.gateway.provider_keys import (
    InvalidProviderKey,
    KeyFinder,
    NoProviderKey,
    ProviderKey,
    ProviderKeyNotFound,
    add_provider_key,
    find_usable_key,
    list_provider_keys,
    reseal_provider_keys,
    revoke_provider_key,
)
from bursar.gateway.providers import ProviderNotFound, put_provider
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.sealing import Keyring, SealBroken

RING = Keyring(hashlib.sha256(b"the tests' master key").digest())
SECRET = "sk-a-key-of-the-tests-1234"


@pytest.fixture
async def provider(database: db.Database) -> str:
    """A provider of the test's own, so that nobody else's keys are there."""
    name = f"p-{uuid7().hex}"
    async with database.platform() as conn:
        await put_provider(conn, name=name, kind="openai", base_url="https://provider.example/v1", by=OPERATOR)
    return name


async def entered(org: Any, provider: str, secret: str = SECRET, **columns: Any) -> ProviderKey:
    async with org.tenant() as conn:
        return await add_provider_key(
            conn, RING, organization_id=org.organization_id, provider=provider, secret=secret, by=OPERATOR, **columns
        )


async def test_a_key_is_kept_sealed_and_found_for_calls(org: Any, provider: str) -> None:
    key = await entered(org, provider, f"  {SECRET}\n")
    assert (key.last4, key.is_own, key.name) == ("1234", True, f"{provider} key")
    async with org.tenant() as conn:
        found = await find_usable_key(conn, RING, organization_id=org.organization_id, provider=provider)
        assert found is not None
        assert (found.secret, found.provider_key_id, found.is_own) == (SECRET, key.provider_key_id, True)
        assert SECRET not in repr(found)
        row = await db.fetch_value(
            conn,
            "select row(k)::text from gateway.provider_keys k where provider_key_id = %(id)s",
            id=key.provider_key_id,
        )
        written = [str(event.new_value) for event in await list_events(conn, organization_id=org.organization_id)]
    assert SECRET.encode().hex() not in row
    assert SECRET not in row
    assert not any(SECRET in text for text in written)
    assert any("1234" in text for text in written)


async def test_the_newest_key_that_is_not_revoked_is_used(org: Any, provider: str) -> None:
    first = await entered(org, provider, "sk-first-key-of-the-tests")
    second = await entered(org, provider, "sk-second-key-of-the-tests")
    finder = KeyFinder(org.database, RING, clock=lambda: clock)
    clock = 0.0
    assert (await finder.key_for(org.organization_id, provider)).provider_key_id == second.provider_key_id
    async with org.tenant() as conn:
        await revoke_provider_key(
            conn, organization_id=org.organization_id, provider_key_id=second.provider_key_id, by=OPERATOR
        )
    clock = 4.9
    assert (await finder.key_for(org.organization_id, provider)).provider_key_id == second.provider_key_id
    clock = 5.1
    assert (await finder.key_for(org.organization_id, provider)).provider_key_id == first.provider_key_id


async def test_an_own_key_goes_before_the_platforms(org: Any, make_org: Any, provider: str) -> None:
    async with org.database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        platforms = await add_provider_key(
            conn, RING, organization_id=PLATFORM_ORGANIZATION_ID, provider=provider, secret="sk-platform", by=OPERATOR
        )
    assert not platforms.is_own
    own = await entered(org, provider)
    finder = KeyFinder(org.database, RING)
    assert (await finder.key_for(org.organization_id, provider)).provider_key_id == own.provider_key_id
    other = await make_org()
    found = await finder.key_for(other.organization_id, provider)
    assert (found.provider_key_id, found.is_own, found.secret) == (platforms.provider_key_id, False, "sk-platform")


async def test_without_any_key_the_call_is_refused_by_name(org: Any, provider: str) -> None:
    with pytest.raises(NoProviderKey) as refused:
        await KeyFinder(org.database, RING).key_for(org.organization_id, provider)
    assert refused.value.why is not None


async def test_a_row_moved_to_another_tenant_does_not_open(org: Any, make_org: Any, provider: str) -> None:
    key = await entered(org, provider)
    thief = await make_org()
    async with await psycopg.AsyncConnection.connect(org.database.dsn("admin")) as conn:
        await conn.execute("set local role bursar_owner")
        await conn.execute(
            "update gateway.provider_keys set organization_id = %s where provider_key_id = %s",
            [thief.organization_id, key.provider_key_id],
        )
    async with thief.tenant() as conn:
        with pytest.raises(SealBroken):
            await find_usable_key(conn, RING, organization_id=thief.organization_id, provider=provider)
    # Nobody could open it where it is now, and the tests share the table.
    async with thief.tenant() as conn:
        await db.execute(
            conn,
            "update gateway.provider_keys set sealing_key_id = %(id)s where provider_key_id = %(key)s",
            id="stolen",
            key=key.provider_key_id,
        )


async def test_another_organizations_keys_are_neither_seen_nor_changed(org: Any, make_org: Any, provider: str) -> None:
    key = await entered(org, provider)
    other = await make_org()
    async with other.tenant() as conn:
        assert await list_provider_keys(conn, organization_id=org.organization_id) == []
        assert await db.fetch_value(conn, "select count(*) from gateway.provider_keys") == 0
        assert await find_usable_key(conn, RING, organization_id=org.organization_id, provider=provider) is None
        with pytest.raises(ProviderKeyNotFound):
            await revoke_provider_key(
                conn, organization_id=org.organization_id, provider_key_id=key.provider_key_id, by=OPERATOR
            )
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with other.tenant() as conn:
            await add_provider_key(
                conn, RING, organization_id=org.organization_id, provider=provider, secret="sk-x", by=OPERATOR
            )


async def test_a_revoked_key_cannot_be_revoked_again_and_stays_in_the_list(org: Any, provider: str) -> None:
    key = await entered(org, provider)
    async with org.tenant() as conn:
        place = {"organization_id": org.organization_id, "provider_key_id": key.provider_key_id, "by": OPERATOR}
        revoked = await revoke_provider_key(conn, **place)
        assert await list_provider_keys(conn, organization_id=org.organization_id) == [revoked]
        with pytest.raises(ProviderKeyNotFound):
            await revoke_provider_key(conn, **place)


@pytest.mark.parametrize("secret", ["", "  ", "two\nlines", "schlüssel", "x" * 4_097, "nul\0"])
async def test_what_cannot_be_a_key_is_refused(org: Any, provider: str, secret: str) -> None:
    with pytest.raises(InvalidProviderKey):
        await entered(org, provider, secret)


async def test_a_key_that_is_a_json_object_is_kept_on_one_line(org: Any, provider: str) -> None:
    document = {"vertex_credentials": {"private_key": "-----BEGIN\nabc\n-----END"}, "vertex_project": "p"}
    await entered(org, provider, json.dumps(document, indent=2))
    async with org.tenant() as conn:
        key = await find_usable_key(conn, RING, organization_id=org.organization_id, provider=provider)
    assert key is not None
    assert "\n" not in key.secret
    assert json.loads(key.secret) == document


async def test_a_key_at_an_unknown_provider_is_refused(org: Any) -> None:
    with pytest.raises(ProviderNotFound):
        await entered(org, "nobody")


async def test_rotating_the_master_key_seals_every_key_anew(org: Any, make_org: Any, provider: str) -> None:
    """Under keyrings of its own, as every test's keys are resealed together."""
    other = await make_org()
    old, new = Keyring(b"o" * 32), Keyring(b"n" * 32)
    for place, secret in ((org, "sk-of-the-first"), (other, "sk-of-the-second")):
        async with place.tenant() as conn:
            await add_provider_key(
                conn, old, organization_id=place.organization_id, provider=provider, secret=secret, by=OPERATOR
            )
        async with place.tenant() as conn:
            rotated = await _reseal_only(conn, Keyring(b"n" * 32, b"o" * 32), place.organization_id)
            assert rotated == 1
            found = await find_usable_key(conn, new, organization_id=place.organization_id, provider=provider)
            assert found is not None
            assert found.secret == secret
            with pytest.raises(SealBroken):
                await find_usable_key(conn, old, organization_id=place.organization_id, provider=provider)
            assert await _reseal_only(conn, Keyring(b"n" * 32, b"o" * 32), place.organization_id) == 0


async def _reseal_only(conn: db.Connection, keyring: Keyring, organization_id: Any) -> int:
    from bursar.gateway import provider_keys

    return await provider_keys._reseal(conn, keyring, organization_id)


async def test_rotation_goes_through_every_organization(
    org: Any, make_org: Any, provider: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    async def note(conn: db.Connection, keyring: Keyring, organization_id: Any) -> int:
        seen.append(organization_id)
        return 1

    monkeypatch.setattr("bursar.gateway.provider_keys._reseal", note)
    other = await make_org()
    await entered(org, provider)
    await entered(other, provider)
    assert await reseal_provider_keys(org.database, Keyring(b"n" * 32)) == len(seen)
    assert {org.organization_id, other.organization_id} <= set(seen)
