"""Organizations: claims that one of many wins, names that are refused, statuses, and that credits learn of changes."""

import asyncio

import psycopg
import pytest

from bursar import clock, db
from bursar.audit.events import OPERATOR, list_events
from bursar.identity.names import InvalidName
from bursar.identity.organizations import (
    PLATFORM_ORGANIZATION_ID,
    InvalidCurrency,
    InvalidSlug,
    InvalidZone,
    OrganizationClosed,
    OrganizationNotFound,
    SlugTaken,
    create_organization,
    ensure_platform,
    find_organization_id,
    get_organization,
    id_of_reference,
    list_organizations,
    set_organization_status,
    slug_from_name,
    update_organization,
)

LIMITS_VERSION = "select limits_version from credits.gates where organization_id = %(id)s"


async def test_an_organization_is_found_by_slug_and_by_both_forms_of_its_id(org) -> None:
    for reference in (org.slug, str(org.organization_id), f"org_{org.organization_id.hex}"):
        async with org.database.untenanted() as conn:
            assert await find_organization_id(conn, reference) == org.organization_id


@pytest.mark.parametrize("reference", ["no-such-slug", "", "org_12", "A\x00B", "ümlaut", "x" * 1000, "'; drop table x"])
async def test_what_names_no_organization_is_not_found(database: db.Database, reference: str) -> None:
    async with database.untenanted() as conn:
        with pytest.raises(OrganizationNotFound):
            await find_organization_id(conn, reference)


async def test_of_racing_claims_of_a_slug_exactly_one_wins(database: db.Database) -> None:
    slug = f"race-{clock.uuid7().hex[20:]}"

    async def create() -> bool:
        organization_id = clock.uuid7()
        try:
            async with database.tenant(organization_id) as conn:
                await create_organization(conn, organization_id=organization_id, slug=slug, name="Race", by=OPERATOR)
        except SlugTaken:
            return False
        return True

    assert sorted(await asyncio.gather(*(create() for _ in range(8)))) == [False] * 7 + [True]


async def test_a_claim_that_is_rolled_back_leaves_the_slug_free(database: db.Database) -> None:
    slug = f"again-{clock.uuid7().hex[20:]}"
    for zone in ("Europe/Nowhere", "Europe/Paris"):
        organization_id = clock.uuid7()
        try:
            async with database.tenant(organization_id) as conn:
                await create_organization(
                    conn, organization_id=organization_id, slug=slug, name="Again", zone="UTC", by=OPERATOR
                )
                await update_organization(conn, organization_id=organization_id, zone=zone, by=OPERATOR)
        except InvalidZone:
            assert zone == "Europe/Nowhere"
    async with database.untenanted() as conn:
        assert await find_organization_id(conn, slug) == organization_id


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"slug": "a"}, InvalidSlug),
        ({"slug": "Acme"}, InvalidSlug),
        ({"slug": "-acme"}, InvalidSlug),
        ({"slug": "acme--corp"}, InvalidSlug),
        ({"slug": "acme-"}, InvalidSlug),
        ({"slug": "acme\n"}, InvalidSlug),
        ({"slug": "a" * 64}, InvalidSlug),
        ({"slug": "org_acme"}, InvalidSlug),
        ({"slug": "platform"}, InvalidSlug),
        ({"slug": clock.uuid7().hex}, InvalidSlug),
        ({"slug": str(clock.uuid7())}, InvalidSlug),
        ({"name": "  "}, InvalidName),
        ({"name": "a\x00b"}, InvalidName),
        ({"name": "\ud800"}, InvalidName),
        ({"name": "x" * 201}, InvalidName),
        ({"zone": "Mars/Olympus"}, InvalidZone),
        ({"zone": "UTC+25"}, InvalidZone),
        ({"zone": ""}, InvalidZone),
        ({"currency": "usd"}, InvalidCurrency),
        ({"currency": "EURO"}, InvalidCurrency),
    ],
)
async def test_values_that_cannot_be_used_are_refused_by_name(make_org, columns, problem) -> None:
    with pytest.raises(problem):
        await make_org(**columns)


@pytest.mark.parametrize("zone", ["Asia/Kathmandu", "America/New_York", "Etc/GMT+12"])
async def test_any_zone_that_is_accepted_is_known_to_the_database(make_org, zone: str) -> None:
    org = await make_org(zone=zone)
    async with org.tenant() as conn:
        assert (await get_organization(conn, organization_id=org.organization_id)).zone == zone


async def test_the_table_itself_refuses_what_the_code_would_let_through(org) -> None:
    update = "update identity.organizations set {} where organization_id = %(id)s"
    for change in ("zone = 'Mars/Olympus'", "kind = 'platform'", "slug = 'A b'", "status = 'paused'", "currency = 'x'"):
        with pytest.raises((psycopg.errors.DataError, psycopg.errors.CheckViolation)):
            async with org.tenant() as conn:
                await db.execute(conn, update.format(change), id=org.organization_id)


async def test_a_change_keeps_what_is_not_given_and_tells_credits_of_the_zone_only(org) -> None:
    async with org.tenant() as conn:
        version = await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id)
        named = await update_organization(conn, organization_id=org.organization_id, name=" Acme  Corp ", by=OPERATOR)
        assert (named.name, named.zone) == ("Acme Corp", "UTC")
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version
        moved = await update_organization(conn, organization_id=org.organization_id, zone="Asia/Kolkata", by=OPERATOR)
        assert (moved.name, moved.zone) == ("Acme Corp", "Asia/Kolkata")
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 1


async def test_a_closed_organization_stays_closed_and_credits_learn_of_each_step(org) -> None:
    async with org.tenant() as conn:
        version = await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id)
        for status in ("frozen", "active", "closed"):
            changed = await set_organization_status(
                conn, organization_id=org.organization_id, status=status, by=OPERATOR
            )
            assert changed.status == status
        assert await db.fetch_value(conn, LIMITS_VERSION, id=org.organization_id) == version + 3
        with pytest.raises(OrganizationClosed):
            await set_organization_status(conn, organization_id=org.organization_id, status="active", by=OPERATOR)
        told = await list_events(conn, organization_id=org.organization_id, limit=3)
    assert [each.new_value for each in told] == [{"status": "closed"}, {"status": "active"}, {"status": "frozen"}]


async def test_a_stranger_changes_nothing_and_learns_nothing(org, make_org) -> None:
    foreign = await make_org()
    async with org.tenant() as conn:
        for organization_id in (foreign.organization_id, clock.uuid7()):
            with pytest.raises(OrganizationNotFound):
                await update_organization(conn, organization_id=organization_id, name="Mine", by=OPERATOR)
            with pytest.raises(OrganizationNotFound):
                await set_organization_status(conn, organization_id=organization_id, status="closed", by=OPERATOR)


async def test_the_platform_reads_all_organizations_page_by_page(org, make_org) -> None:
    others = [(await make_org()).organization_id for _ in range(2)]
    async with org.database.platform() as conn:
        first = await list_organizations(conn, kind="company", after=org.organization_id, limit=1)
        rest = await list_organizations(conn, kind="company", after=first[0].organization_id)
    ids = [each.organization_id for each in first + rest]
    assert set(others) <= set(ids)
    assert ids == sorted(ids)


async def test_there_is_one_platform_organization_and_only_under_its_own_id(database: db.Database) -> None:
    insert = (
        "insert into identity.organizations (organization_id, slug, name, kind, zone, currency, is_shared_token_pool, "
        "created_at) values (%(id)s, 'x-y', 'X', %(kind)s, 'UTC', 'USD', false, now())"
    )
    for organization_id, kind in ((clock.uuid7(), "platform"), (PLATFORM_ORGANIZATION_ID, "company")):
        with pytest.raises(psycopg.errors.CheckViolation, match="organizations_one_platform"):
            async with database.tenant(organization_id) as conn:
                await db.execute(conn, insert, id=organization_id, kind=kind)


async def test_racing_first_starts_make_one_platform_organization(database: db.Database) -> None:
    async def ensure():
        async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
            return await ensure_platform(conn, by=OPERATOR)

    made = await asyncio.gather(*(ensure() for _ in range(6)))
    assert len(set(made)) == 1


def test_slugs_are_proposed_and_ids_are_told_from_slugs() -> None:
    assert slug_from_name("Quill & Co") == "quill-co"
    assert slug_from_name("東京") == ""
    organization_id = clock.uuid7()
    assert id_of_reference(organization_id.hex.upper()) == organization_id
    assert id_of_reference("{" + str(organization_id) + "}") is None
    assert id_of_reference("acme") is None
