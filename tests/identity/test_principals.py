"""Who a key stands for, and in which organization it acts."""

import asyncio
import gc
from datetime import timedelta

import pytest

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.identity import principals
from bursar.identity.api_keys import create_api_key, get_api_key, revoke_api_key
from bursar.identity.departments import create_department
from bursar.identity.memberships import end_membership, place_member, set_roles, suspend_member
from bursar.identity.organizations import (
    OrganizationNotFound,
    get_organization,
    set_organization_status,
    update_organization,
)
from bursar.identity.principals import InvalidApiKey, KeyCache, principal_of_key
from bursar.identity.roles import PERMISSIONS, SERVICE_KEY, Permission, Role, Scope
from bursar.identity.secret_text import API_KEY, new_secret_text
from bursar.identity.users import choose_default


class Traveler:
    """A person in two companies, joined in a known order, with a personal key."""

    def __init__(self, user, key, first, second) -> None:
        self.user, self.key, self.first, self.second = user, key, first, second
        self.home = user.home_organization_id
        self.database = first.database

    async def acts_in(self, chosen=None):
        return (await principal_of_key(self.database, self.key.text, chosen=chosen)).organization_id


@pytest.fixture
async def traveler(make_org) -> Traveler:
    first, second = await make_org(), await make_org()
    email = f"{clock.uuid7().hex}@traveler.example"
    user = await first.user(email)
    # The second organization is joined first by the clock, to tell "first joined" from "first made".
    await first.member(email=email, at=clock.now() - timedelta(days=1))
    await second.member(Role.FINANCE, email=email, at=clock.now() - timedelta(days=2))
    async with first.database.tenant(user.home_organization_id) as conn:
        key = await create_api_key(
            conn,
            organization_id=user.home_organization_id,
            user_id=user.user_id,
            name="Mine",
            by=OPERATOR,
            scopes=list(Scope),
        )
    return Traveler(user, key, second, first)


async def test_a_personal_key_acts_in_the_company_joined_first(traveler) -> None:
    assert await traveler.acts_in() == traveler.first.organization_id


async def test_a_personal_key_acts_in_the_default_once_there_is_one(traveler) -> None:
    for default in (traveler.second.organization_id, traveler.home):
        async with traveler.database.tenant(traveler.home) as conn:
            await choose_default(conn, user=traveler.user, organization_id=default, by=OPERATOR)
        assert await traveler.acts_in() == default


async def test_a_personal_key_acts_where_the_request_chooses(traveler) -> None:
    second = traveler.second
    for chosen in (second.slug, str(second.organization_id), f"org_{second.organization_id.hex}"):
        assert await traveler.acts_in(chosen) == second.organization_id
    assert await traveler.acts_in(str(traveler.home)) == traveler.home


async def test_a_default_that_ended_gives_way_to_the_company_joined_first(traveler) -> None:
    async with traveler.database.tenant(traveler.home) as conn:
        await choose_default(conn, user=traveler.user, organization_id=traveler.second.organization_id, by=OPERATOR)
    async with traveler.second.tenant() as conn:
        await suspend_member(
            conn, organization_id=traveler.second.organization_id, user_id=traveler.user.user_id, by=OPERATOR
        )
    assert await traveler.acts_in() == traveler.first.organization_id


async def test_who_belongs_to_no_company_spends_at_home(traveler) -> None:
    async with traveler.first.tenant() as conn:
        await end_membership(
            conn, organization_id=traveler.first.organization_id, user_id=traveler.user.user_id, by=OPERATOR
        )
    async with traveler.second.tenant() as conn:
        await set_organization_status(
            conn, organization_id=traveler.second.organization_id, status="closed", by=OPERATOR
        )
    assert await traveler.acts_in() == traveler.home


async def test_unknown_and_foreign_choices_are_refused_alike(traveler, org) -> None:
    company_key = await org.key(org.admin)
    answers = set()
    for text in (traveler.key.text, company_key.text):
        for chosen in (
            (await _another(org)).slug,
            str((await _another(org)).organization_id),
            "no-such-organization",
            str(clock.uuid7()),
            "",
        ):
            with pytest.raises(OrganizationNotFound) as refusal:
                await principal_of_key(org.database, text, chosen=chosen)
            answers.add(str(refusal.value.body()))
    assert len(answers) == 1


async def test_a_companys_key_acts_in_that_company_alone(traveler) -> None:
    company = traveler.first
    key = await company.key(traveler.user.user_id)
    for chosen in (None, company.slug, str(company.organization_id)):
        principal = await principal_of_key(company.database, key.text, chosen=chosen)
        assert principal.organization_id == company.organization_id
    for chosen in (traveler.second.slug, str(traveler.home)):
        with pytest.raises(OrganizationNotFound):
            await principal_of_key(company.database, key.text, chosen=chosen)


async def test_a_principal_of_a_personal_key_is_the_member_it_acts_as(traveler) -> None:
    company = traveler.first
    keys = {"organization_id": company.organization_id, "by": OPERATOR}
    async with company.tenant() as conn:
        department = await create_department(conn, name="Travel", **keys)
        place = {"team_id": None, "department_id": department.department_id}
        await place_member(conn, user_id=traveler.user.user_id, **place, **keys)
    principal = await principal_of_key(company.database, traveler.key.text, chosen=None)
    assert principal.user_id == traveler.user.user_id
    assert principal.api_key_id == traveler.key.key.api_key_id
    assert principal.key_organization_id == traveler.home
    assert principal.roles == {Role.FINANCE}
    assert principal.department_id == department.department_id
    assert principal.actor().kind == "api_key"


async def test_a_keys_own_department_goes_before_its_owners(org) -> None:
    keys = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        owners, own = [await create_department(conn, name=name, **keys) for name in ("Owner's", "Key's")]
        place = {"team_id": None, "department_id": owners.department_id}
        await place_member(conn, user_id=org.admin, **place, **keys)
    for made, expected in (
        (await org.key(org.admin), owners),
        (await org.key(org.admin, department_id=own.department_id), own),
    ):
        principal = await principal_of_key(org.database, made.text, chosen=None)
        assert principal.department_id == expected.department_id


async def test_a_service_key_has_no_user_and_hands_nothing_on(org) -> None:
    key = await org.key()
    principal = await principal_of_key(org.database, key.text, chosen=None)
    assert (principal.user_id, principal.roles) == (None, frozenset())
    assert principal.permissions == SERVICE_KEY
    assert not principal.may(Permission.KEYS_WRITE)
    assert not principal.may(Permission.PEOPLE_WRITE)


async def test_scopes_narrow_what_the_owner_may_and_roles_count_from_the_next_request(org) -> None:
    inference, everything = await org.key(org.admin, scopes=[Scope.INFERENCE]), await org.key(org.admin)
    principal = await principal_of_key(org.database, inference.text, chosen=None)
    assert principal.permissions == {Permission.MODELS_USE}
    principal = await principal_of_key(org.database, everything.text, chosen=None)
    assert principal.permissions == PERMISSIONS[Role.ORG_ADMIN] - {Permission.MARGIN_READ}
    async with org.tenant() as conn:
        await set_roles(conn, organization_id=org.organization_id, user_id=org.admin, roles=[Role.AUDITOR], by=OPERATOR)
    principal = await principal_of_key(org.database, everything.text, chosen=None)
    assert principal.permissions == PERMISSIONS[Role.AUDITOR]


async def test_margin_is_for_organizations_that_show_it(org) -> None:
    key = await org.key(org.admin)
    assert not (await principal_of_key(org.database, key.text, chosen=None)).may(Permission.MARGIN_READ)
    async with org.tenant() as conn:
        await update_organization(conn, organization_id=org.organization_id, shows_margin=True, by=OPERATOR)
    assert (await principal_of_key(org.database, key.text, chosen=None)).may(Permission.MARGIN_READ)


async def test_a_frozen_organization_answers_and_a_closed_one_does_not(org) -> None:
    key = await org.key(org.admin)
    async with org.tenant() as conn:
        await set_organization_status(conn, organization_id=org.organization_id, status="frozen", by=OPERATOR)
    assert (await principal_of_key(org.database, key.text, chosen=None)).organization_status == "frozen"
    async with org.tenant() as conn:
        await set_organization_status(conn, organization_id=org.organization_id, status="closed", by=OPERATOR)
    with pytest.raises(InvalidApiKey):
        await principal_of_key(org.database, key.text, chosen=None)


async def test_a_well_formed_text_that_was_never_given_out_is_invalid(org) -> None:
    for organization_id in (org.organization_id, clock.uuid7()):
        with pytest.raises(InvalidApiKey):
            await principal_of_key(org.database, new_secret_text(API_KEY, organization_id).text, chosen=None)


class Clock:
    """A monotonic clock that a test turns."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def __call__(self) -> float:
        return self.seconds


async def test_a_revoked_key_is_let_through_for_at_most_five_seconds_by_each_process(org) -> None:
    """Two caches stand for two processes; both answered just before the revocation."""
    key, turned = await org.key(org.admin), Clock()
    caches = [KeyCache(org.database, monotonic=turned) for _ in range(2)]
    for cache in caches:
        await cache.principal(key.text, chosen=None)
    async with org.tenant() as conn:
        await revoke_api_key(conn, organization_id=org.organization_id, api_key_id=key.key.api_key_id, by=OPERATOR)
    turned.seconds += KeyCache.SECONDS - 0.001
    for cache in caches:
        await cache.principal(key.text, chosen=None)
    turned.seconds += 0.001
    for cache in caches:
        with pytest.raises(InvalidApiKey):
            await cache.principal(key.text, chosen=None)


async def test_a_hit_asks_no_database_and_requests_that_miss_at_once_share_one_look_up(org, monkeypatch) -> None:
    key, looked_up = await org.key(org.admin), 0

    async def counted(*args, **kwargs):
        nonlocal looked_up
        looked_up += 1
        return await principal_of_key(*args, **kwargs)

    monkeypatch.setattr(principals, "principal_of_key", counted)
    cache = KeyCache(org.database)
    answers = await asyncio.gather(*(cache.principal(key.text, chosen=None) for _ in range(50)))
    assert looked_up == 1
    assert len(set(map(id, answers))) == 1
    await cache.principal(key.text, chosen=org.slug)
    assert looked_up == 2


async def test_a_cached_key_stops_at_its_very_expiry(org) -> None:
    key = await org.key(org.admin, expires_at=clock.now() + timedelta(milliseconds=200))
    cache = KeyCache(org.database)
    await cache.principal(key.text, chosen=None)
    await asyncio.sleep(0.25)
    with pytest.raises(InvalidApiKey):
        await cache.principal(key.text, chosen=None)


async def test_refusals_are_not_kept_and_the_cache_stays_small(org) -> None:
    cache = KeyCache(org.database, size=3)
    for _ in range(3):
        with pytest.raises(InvalidApiKey):
            await cache.principal(new_secret_text(API_KEY, org.organization_id).text, chosen=None)
    await asyncio.sleep(0)
    assert len(cache) == 0
    for _ in range(5):
        await cache.principal((await org.key()).text, chosen=None)
    assert len(cache) == 3


async def test_a_caller_that_goes_away_does_not_take_the_answer_from_the_others(org) -> None:
    key, cache = await org.key(org.admin), KeyCache(org.database)
    waiting = [asyncio.create_task(cache.principal(key.text, chosen=None)) for _ in range(3)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    assert (await waiting[1]).user_id == (await waiting[2]).user_id == org.admin
    gc.collect()


async def test_the_last_use_is_written_later_and_never_turned_back(org) -> None:
    key, cache = await org.key(org.admin), KeyCache(org.database)
    await cache.principal(key.text, chosen=None)
    keys = {"organization_id": org.organization_id, "api_key_id": key.key.api_key_id}
    async with org.tenant() as conn:
        assert (await get_api_key(conn, **keys)).last_used_at is None
    assert await cache.last_use.write(org.database) == 1
    assert await cache.last_use.write(org.database) == 0
    async with org.tenant() as conn:
        used_at = (await get_api_key(conn, **keys)).last_used_at
        assert used_at is not None
        assert clock.now() - used_at < timedelta(minutes=1)
        await db.execute(
            conn,
            "update identity.api_keys set last_used_at = 'infinity' where api_key_id = %(id)s",
            id=key.key.api_key_id,
        )
    await cache.principal(key.text, chosen=None)
    await cache.last_use.write(org.database)
    async with org.tenant() as conn:
        later = await db.fetch_value(conn, "select last_used_at = 'infinity' from identity.api_keys")
    assert later is True


async def _another(org):
    """The home of somebody who has nothing to do with this organization."""
    stranger = await org.user()
    async with org.database.platform() as conn:
        return await get_organization(conn, organization_id=stranger.home_organization_id)
