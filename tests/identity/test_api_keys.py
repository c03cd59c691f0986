"""Keys: texts that find their own typing errors, rotation with overlap, revocation at once."""

import asyncio
from datetime import timedelta
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar import clock, db
from bursar.audit.events import OPERATOR, events_of_object
from bursar.identity import base62
from bursar.identity.api_keys import (
    ApiKeyNotFound,
    ApiKeyNotUsable,
    InvalidExpiry,
    NoServiceKeyHere,
    create_api_key,
    find_api_key,
    get_api_key,
    list_api_keys,
    revoke_api_key,
    rotate_api_key,
)
from bursar.identity.memberships import MemberNotFound, end_membership, suspend_member
from bursar.identity.organizations import QUERIES
from bursar.identity.principals import InvalidApiKey, principal_of_key
from bursar.identity.roles import Scope
from bursar.identity.secret_text import API_KEY, LENGTH, Malformed, new_secret_text, parse_secret_text

LIMITS_VERSION = "select limits_version from credits.gates where organization_id = %(id)s"


@given(st.binary(max_size=40))
def test_base_62_gives_back_what_it_was_given(data: bytes) -> None:
    text = base62.encode(data)
    assert len(text) == base62.width(len(data))
    assert base62.decode(text, len(data)) == data


@given(st.uuids())
def test_a_key_carries_the_route_to_its_organization(organization_id: UUID) -> None:
    made = new_secret_text(API_KEY, organization_id)
    parsed = parse_secret_text(API_KEY, made.text)
    assert parsed == made
    assert parsed.organization_id == organization_id
    assert made.text.startswith(f"bk_{made.public_id}_")
    assert len(made.text) == LENGTH


@given(st.data())
def test_any_single_wrong_character_is_found_before_a_database_is_asked(data: st.DataObject) -> None:
    text = new_secret_text(API_KEY, clock.uuid7()).text
    place = data.draw(st.integers(0, len(text) - 1))
    wrong = data.draw(st.characters().filter(lambda each: each != text[place]))
    with pytest.raises(Malformed):
        parse_secret_text(API_KEY, text[:place] + wrong + text[place + 1 :])


@given(st.integers(0, LENGTH - 2))
def test_two_swapped_neighbors_are_found(place: int) -> None:
    text = new_secret_text(API_KEY, clock.uuid7()).text
    swapped = text[:place] + text[place + 1] + text[place] + text[place + 2 :]
    if swapped != text:
        with pytest.raises(Malformed):
            parse_secret_text(API_KEY, swapped)


@given(st.text(max_size=200))
def test_anything_else_is_malformed_and_nothing_worse(text: str) -> None:
    for each in (text, f"bk_{text}", text.ljust(LENGTH, "A")[:LENGTH]):
        with pytest.raises(Malformed):
            parse_secret_text(API_KEY, each)


async def test_the_text_is_shown_once_and_nowhere_stored(org) -> None:
    made = await org.key(org.admin)
    assert made.text not in repr(made)
    async with org.database.platform() as conn:
        row = await db.fetch_value(
            conn, "select k::text from identity.api_keys k where api_key_id = %(id)s", id=made.key.api_key_id
        )
        event = await db.fetch_value(
            conn, "select e::text from audit.events e where object_id = %(id)s", id=made.key.api_key_id
        )
    secret = made.text.rpartition("_")[2]
    for stored in (row, event):
        assert secret[:12] not in stored
    assert made.key.last4 == made.text[-4:]


async def test_a_key_is_found_by_its_public_id_and_listed_by_owner(org) -> None:
    mine, service = await org.key(org.admin), await org.key()
    async with org.tenant() as conn:
        found = await find_api_key(conn, organization_id=org.organization_id, public_id=mine.key.public_id)
        assert found == mine.key
        assert await list_api_keys(conn, organization_id=org.organization_id) == [mine.key, service.key]
        assert await list_api_keys(conn, organization_id=org.organization_id, user_id=org.admin) == [mine.key]


async def test_an_expired_key_opens_nothing(org) -> None:
    made = await org.key(org.admin, expires_at=clock.now() + timedelta(milliseconds=200))
    await principal_of_key(org.database, made.text, chosen=None)
    await asyncio.sleep(0.25)
    with pytest.raises(InvalidApiKey):
        await principal_of_key(org.database, made.text, chosen=None)


async def test_a_key_cannot_be_made_to_have_expired(org) -> None:
    with pytest.raises(InvalidExpiry):
        await org.key(org.admin, expires_at=clock.now())


async def test_after_a_rotation_both_texts_work_until_the_overlap_ends(org) -> None:
    old = await org.key(org.admin, scopes=[Scope.READ])
    async with org.tenant() as conn:
        new = await rotate_api_key(
            conn,
            organization_id=org.organization_id,
            api_key_id=old.key.api_key_id,
            overlap=timedelta(milliseconds=300),
            by=OPERATOR,
        )
    assert (new.key.name, new.key.user_id, new.key.scopes) == (old.key.name, old.key.user_id, old.key.scopes)
    assert new.key.original_api_key_id == old.key.api_key_id
    assert new.key.expires_at is None
    for text in (old.text, new.text):
        await principal_of_key(org.database, text, chosen=None)
    await asyncio.sleep(0.35)
    await principal_of_key(org.database, new.text, chosen=None)
    with pytest.raises(InvalidApiKey):
        await principal_of_key(org.database, old.text, chosen=None)


async def test_a_rotation_without_overlap_stops_the_old_text_at_once(org) -> None:
    old = await org.key(org.admin, expires_at=clock.now() + timedelta(days=30))
    async with org.tenant() as conn:
        new = await _rotate(conn, org, old.key.api_key_id)
        replaced = await get_api_key(conn, organization_id=org.organization_id, api_key_id=old.key.api_key_id)
    assert replaced.replaced_by == new.key.api_key_id
    assert replaced.revoked_at is not None
    assert new.key.expires_at is not None
    assert abs(new.key.expires_at - clock.now() - timedelta(days=30)) < timedelta(minutes=1)
    with pytest.raises(InvalidApiKey):
        await principal_of_key(org.database, old.text, chosen=None)


async def test_of_racing_rotations_exactly_one_wins(org) -> None:
    old = await org.key(org.admin)

    async def rotate() -> bool:
        try:
            async with org.tenant() as conn:
                await _rotate(conn, org, old.key.api_key_id, overlap=timedelta(hours=1))
        except ApiKeyNotUsable:
            return False
        return True

    assert sorted(await asyncio.gather(*(rotate() for _ in range(8)))) == [False] * 7 + [True]
    async with org.tenant() as conn:
        assert len(await list_api_keys(conn, organization_id=org.organization_id)) == 2


async def test_a_revoked_key_stops_at_once_and_stays_so(org) -> None:
    made = await org.key(org.admin)
    keys = {"organization_id": org.organization_id, "api_key_id": made.key.api_key_id}
    async with org.tenant() as conn:
        revoked = await revoke_api_key(conn, **keys, by=OPERATOR, reason="leaked")
    with pytest.raises(InvalidApiKey):
        await principal_of_key(org.database, made.text, chosen=None)
    async with org.tenant() as conn:
        assert await revoke_api_key(conn, **keys, by=OPERATOR) == revoked
        told = await events_of_object(
            conn, organization_id=org.organization_id, object_kind="api_key", object_id=made.key.api_key_id
        )
        with pytest.raises(ApiKeyNotUsable):
            await _rotate(conn, org, made.key.api_key_id)
    assert [(each.action, each.reason) for each in told] == [("api_key.revoked", "leaked"), ("api_key.created", None)]


async def test_credits_learn_of_a_revocation_and_a_rotation(org) -> None:
    first, second = await org.key(org.admin), await org.key(org.admin)
    async with org.tenant() as conn:
        version = await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id)
        await _rotate(conn, org, first.key.api_key_id)
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 1
        await revoke_api_key(conn, organization_id=org.organization_id, api_key_id=second.key.api_key_id, by=OPERATOR)
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 2


async def test_credits_of_every_company_learn_of_a_revoked_personal_key(org, make_org) -> None:
    member = await org.member()
    stranger = await make_org()
    user, personal = await _personal_key(org, member)
    async with org.database.platform() as conn:
        versions = [
            await db.fetch_value(conn, LIMITS_VERSION, id=each)
            for each in (org.organization_id, stranger.organization_id)
        ]
    async with org.database.tenant(user) as conn:
        await revoke_api_key(conn, organization_id=user, api_key_id=personal.key.api_key_id, by=OPERATOR)
    async with org.database.platform() as conn:
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == versions[0] + 1
        assert await db.fetch_value(conn, LIMITS_VERSION, id=stranger.organization_id) == versions[1]


async def test_who_leaves_takes_no_key_along_and_who_is_suspended_gets_theirs_back(org) -> None:
    leaver, suspended = await org.member(), await org.member()
    texts = [(await org.key(each)).text for each in (leaver, suspended)]
    async with org.tenant() as conn:
        await end_membership(conn, organization_id=org.organization_id, user_id=leaver, by=OPERATOR)
        await suspend_member(conn, organization_id=org.organization_id, user_id=suspended, by=OPERATOR)
        (key,) = await list_api_keys(conn, organization_id=org.organization_id, user_id=leaver)
        assert key.revoked_at is not None
    for text in texts:
        with pytest.raises(InvalidApiKey):
            await principal_of_key(org.database, text, chosen=None)


async def test_keys_are_for_active_members_and_at_home_for_the_owner_only(org) -> None:
    member = await org.member()
    async with org.database.untenanted() as conn:
        home = await db.fetch_value(conn, QUERIES.home_of_user, user_id=member)
    async with org.database.tenant(home) as conn:
        with pytest.raises(NoServiceKeyHere):
            await create_api_key(conn, organization_id=home, user_id=None, name="x", by=OPERATOR)
        with pytest.raises(MemberNotFound):
            await create_api_key(conn, organization_id=home, user_id=org.admin, name="x", by=OPERATOR)
    async with org.tenant() as conn:
        await end_membership(conn, organization_id=org.organization_id, user_id=member, by=OPERATOR)
        with pytest.raises(MemberNotFound):
            await create_api_key(conn, organization_id=org.organization_id, user_id=member, name="x", by=OPERATOR)


async def test_anothers_key_is_as_unknown_as_none(org, make_org) -> None:
    foreign = await (await make_org()).key()
    async with org.tenant() as conn:
        for api_key_id in (foreign.key.api_key_id, clock.uuid7()):
            with pytest.raises(ApiKeyNotFound):
                await get_api_key(conn, organization_id=org.organization_id, api_key_id=api_key_id)
            with pytest.raises(ApiKeyNotFound):
                await revoke_api_key(conn, organization_id=org.organization_id, api_key_id=api_key_id, by=OPERATOR)
            with pytest.raises(ApiKeyNotFound):
                await _rotate(conn, org, api_key_id)


async def _rotate(conn, org, api_key_id, overlap=timedelta(0)):
    return await rotate_api_key(
        conn, organization_id=org.organization_id, api_key_id=api_key_id, overlap=overlap, by=OPERATOR
    )


async def _personal_key(org, user_id):
    async with org.database.untenanted() as conn:
        home = await db.fetch_value(conn, QUERIES.home_of_user, user_id=user_id)
    async with org.database.tenant(home) as conn:
        return home, await create_api_key(conn, organization_id=home, user_id=user_id, name="Mine", by=OPERATOR)
