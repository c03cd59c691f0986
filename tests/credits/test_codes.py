"""Complimentary codes: who may redeem how often, into which balance, and what a crash or a race leaves."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar import clock, db
from bursar.app import create_app
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits import codes
from bursar.credits.codes import ALPHABET, Terms
from bursar.credits.grants import GrantSource, InvalidGrant, list_grants
from bursar.credits.pools import PoolKind, list_pools
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, OrganizationNotFound
from bursar.identity.roles import Scope
from bursar.money import Micros
from bursar.problems import NotFound, translated

FIVE = Micros(5_000_000)


async def make(database: db.Database, owner: UUID, count: int = 1, **terms: Any) -> list[str]:
    """Codes of a new campaign that give five credits."""
    async with database.tenant(owner) as conn:
        with translated():
            campaign = await codes.open_campaign(
                conn,
                settings=database.settings,
                organization_id=owner,
                terms=Terms(**{"name": "Spring", "amount_micros": FIVE, **terms}),
                created_by=None,
                by=OPERATOR,
            )
            made = await codes.add_codes(conn, organization_id=owner, campaign_id=campaign, count=count, by=OPERATOR)
    return list(made.values())


async def redeem(database: db.Database, text: str, user: UUID, into: UUID | None = None, **rest: Any) -> Any:
    with translated():
        return await codes.redeem(database, text=text, user_id=user, into=into, by=OPERATOR, **rest)


@given(st.text(alphabet=ALPHABET, min_size=20, max_size=20))
def test_a_code_is_the_same_however_it_is_typed(plain: str) -> None:
    typed = " - ".join(plain.lower().replace("0", "o").replace("1", "l"))
    assert codes.hash_code(typed) == codes.hash_code(plain)


def test_codes_are_all_different_and_hard_to_guess() -> None:
    made = {codes.new_code() for _ in range(1_000)}
    assert len(made) == 1_000
    assert all(len(text.replace("-", "")) * 5 >= 80 for text in made), "bits"


async def test_a_code_becomes_a_free_personal_grant_never_a_shared_one(database: db.Database, org: Any) -> None:
    user = await org.member()
    [text] = await make(database, org.organization_id, credits_days=30, priority=7)
    redemption = await redeem(database, text, user)
    assert redemption.into_organization_id == org.organization_id
    async with org.tenant() as conn:
        [grant] = await list_grants(conn, organization_id=org.organization_id)
        pools = {each.pool_id: each for each in await list_pools(conn, organization_id=org.organization_id)}
    assert (grant.grant_id, grant.source, grant.amount_micros, grant.is_free, grant.priority) == (
        redemption.grant_id, GrantSource.CODE, FIVE, True, 7,
    )  # fmt: skip
    assert grant.expires_at == redemption.claimed_at + timedelta(days=30)
    assert (pools[grant.pool_id].kind, pools[grant.pool_id].owner_user_id) == (PoolKind.PERSONAL, user)
    assert [each.limit_micros for each in pools.values() if each.kind is PoolKind.SHARED] == [0]
    assert "Spring" in (grant.reason or "")
    assert text[-4:] in (grant.reason or "")


async def test_a_code_of_the_platform_goes_home_or_where_its_redeemer_belongs(database: db.Database, org: Any) -> None:
    one, two, three = await make(database, PLATFORM_ORGANIZATION_ID, 3, most_per_person=3)
    person, stranger = await org.user(), await org.user()
    assert (await redeem(database, one, person.user_id)).into_organization_id == person.home_organization_id
    with pytest.raises(OrganizationNotFound):
        await redeem(database, two, stranger.user_id, org.organization_id)
    member = await org.member()
    assert (await redeem(database, two, member, org.organization_id)).into_organization_id == org.organization_id
    async with database.tenant(person.home_organization_id) as conn:
        [pool] = await list_pools(conn, organization_id=person.home_organization_id)
    assert (pool.kind, pool.available_micros) == (PoolKind.INDIVIDUAL, FIVE)
    with pytest.raises(codes.CodeUsedUp, match="redeemed as often"):
        await redeem(database, one, stranger.user_id)
    assert three


async def test_the_same_person_and_code_is_one_redemption_however_often(database: db.Database, org: Any) -> None:
    user = await org.member()
    [text] = await make(database, org.organization_id, most_per_code=100)
    found = await asyncio.gather(*[redeem(database, text, user) for _ in range(5)])
    assert len({each.grant_id for each in found}) == 1
    async with org.tenant() as conn:
        assert len(await list_grants(conn, organization_id=org.organization_id)) == 1


async def test_of_racing_people_exactly_as_many_win_as_a_code_allows(database: db.Database, org: Any) -> None:
    people = [await org.member() for _ in range(12)]
    [text] = await make(database, org.organization_id, most_per_code=5)
    found = await asyncio.gather(*[redeem(database, text, each) for each in people], return_exceptions=True)
    assert sorted(type(each).__name__ for each in found) == ["CodeUsedUp"] * 7 + ["Redemption"] * 5
    async with org.tenant() as conn:
        assert (
            sum(each.amount_micros for each in await list_grants(conn, organization_id=org.organization_id)) == 5 * FIVE
        )


@pytest.mark.parametrize(
    ("terms", "works", "why"),
    [
        ({"most_per_person": 1}, 1, "by you"),
        ({"most_per_person": 9, "most_per_domain": 2}, 2, "your e-mail domain"),
        ({"most_per_person": 9, "most_per_organization": 2}, 2, "in this organization"),
        ({"most_per_person": 9, "most_per_day": 2}, 2, "today"),
        ({"most_per_person": 9, "most_in_all": 2}, 2, "in all"),
    ],
)
async def test_each_limit_of_a_campaign_counts(
    database: db.Database, org: Any, terms: dict[str, int], works: int, why: str
) -> None:
    user = await org.member()
    made = await make(database, org.organization_id, works + 1, **terms)
    for text in made[:works]:
        await redeem(database, text, user)
    with pytest.raises(codes.CodeUsedUp, match=why):
        await redeem(database, made[works], user)


async def test_a_code_has_its_time_its_domain_and_its_organization(
    database: db.Database, org: Any, make_org: Any
) -> None:
    owner, user, now = org.organization_id, await org.member(), clock.now()
    [early] = await make(database, owner, valid_from=now + timedelta(hours=1))
    with pytest.raises(codes.CodeEnded, match="its time begins"):
        await redeem(database, early, user)
    [short] = await make(database, owner, valid_until=now + timedelta(seconds=1.5))
    await asyncio.sleep(1.6)
    with pytest.raises(codes.CodeEnded, match="its time is over"):
        await redeem(database, short, user)
    [elsewhere] = await make(database, owner, domains=("other.example",))
    with pytest.raises(codes.CodeNotForYou, match="domains"):
        await redeem(database, elsewhere, user)
    [ours] = await make(database, owner, domains=("other.example", f"{org.slug}.example".upper()))
    assert (await redeem(database, ours, user)).grant_id
    [members] = await make(database, owner)
    foreigner = await (await make_org()).member()
    with pytest.raises(codes.CodeNotForYou, match="members of another organization"):
        await redeem(database, members, foreigner)
    with pytest.raises(InvalidGrant):
        await make(database, owner, valid_until=now - timedelta(days=1))


async def test_revoked_codes_and_campaigns_end_and_what_was_granted_stays(database: db.Database, org: Any) -> None:
    owner, people = org.organization_id, [await org.member() for _ in range(3)]
    one, two = await make(database, owner, 2, most_per_code=9)
    await redeem(database, one, people[0])
    async with org.tenant() as conn:
        [campaign] = await codes.list_campaigns(conn, organization_id=owner)
        place = {"organization_id": owner, "campaign_id": campaign.campaign_id, "by": OPERATOR, "reason": None}
        assert await codes.revoke_codes(conn, code_id=(await codes.find_code(conn, one))[1], **place) == 1
    with pytest.raises(codes.CodeEnded, match="revoked"):
        await redeem(database, one, people[1])
    await redeem(database, two, people[1])
    async with org.tenant() as conn:
        assert await codes.revoke_codes(conn, code_id=None, **place) == 1
    with pytest.raises(codes.CodeEnded, match="revoked"):
        await redeem(database, two, people[2])
    with pytest.raises(NotFound), translated():
        async with org.tenant() as conn:
            await codes.add_codes(conn, organization_id=owner, campaign_id=campaign.campaign_id, count=1, by=OPERATOR)
    async with database.platform() as conn:
        [found] = await codes.list_campaigns(conn, organization_id=owner)
    assert (found.codes, found.redemptions, found.people, found.granted_micros) == (2, 2, 2, 2 * FIVE)


async def test_five_tries_an_hour_that_fail_by_person_and_by_address(database: db.Database, org: Any) -> None:
    user, other, third = await org.member(), await org.member(), await org.member()
    [text] = await make(database, org.organization_id, most_per_code=9)
    office = uuid7().bytes * 2
    await redeem(database, text, user, address_hash=office)  # what succeeds does not count
    for _ in range(5):
        with pytest.raises(codes.CodeUnknown):
            await redeem(database, codes.new_code(), user, address_hash=office)
    with pytest.raises(codes.TooManyTries) as refused:
        await redeem(database, text, user)
    assert 3_000 < int(refused.value.headers["Retry-After"]) <= 3_601
    with pytest.raises(codes.TooManyTries):
        await redeem(database, text, other, address_hash=office)
    assert await redeem(database, text, third, address_hash=uuid7().bytes * 2)


async def test_tries_at_the_same_time_are_counted_one_by_one(database: db.Database, org: Any) -> None:
    user = await org.member()
    found = await asyncio.gather(*[redeem(database, codes.new_code(), user) for _ in range(12)], return_exceptions=True)
    assert sorted(type(each).__name__ for each in found) == ["CodeUnknown"] * 5 + ["TooManyTries"] * 7


async def test_redeemed_again_with_another_destination_is_the_first_redemption_and_says_so(
    database: db.Database, org: Any
) -> None:
    member = await org.member()
    [text] = await make(database, PLATFORM_ORGANIZATION_ID)
    first = await redeem(database, text, member, org.organization_id)
    again = await redeem(database, text, member)
    assert (first.is_again, again.is_again) == (False, True)
    assert again == replace(first, is_again=True)


async def test_a_claim_whose_process_ended_is_granted_by_the_job_once(
    database: db.Database, org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    user = await org.member()
    [text] = await make(database, org.organization_id)

    async def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(codes, "pool_for", die)
        await redeem(database, text, user)
    await codes.finish_redemptions(database, older_than=timedelta(0))
    await codes.finish_redemptions(database, older_than=timedelta(0))
    again = await redeem(database, text, user)
    async with org.tenant() as conn:
        assert [each.grant_id for each in await list_grants(conn, organization_id=org.organization_id)] == [
            again.grant_id
        ]


async def test_a_claim_that_cannot_be_granted_keeps_no_other_waiting(
    database: db.Database, org: Any, make_org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = await make_org()
    pool_for = codes.pool_for

    async def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    async def fail_here(conn: db.Connection, *, organization_id: UUID, owner_user_id: UUID | None) -> UUID:
        if organization_id == org.organization_id:
            raise ConnectionError
        return await pool_for(conn, organization_id=organization_id, owner_user_id=owner_user_id)

    for each in (org, other):
        [text] = await make(database, each.organization_id)
        user = await each.member()
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(codes, "pool_for", die)
            await redeem(database, text, user)
    with monkeypatch.context() as patched:
        patched.setattr(codes, "pool_for", fail_here)
        await codes.finish_redemptions(database, older_than=timedelta(0))
    for each, granted in ((org, 0), (other, 1)):
        async with each.tenant() as conn:
            assert len(await list_grants(conn, organization_id=each.organization_id)) == granted


async def test_a_claim_whose_credits_have_expired_is_not_tried_again(
    database: db.Database, org: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = clock.now() + timedelta(seconds=1)
    [text] = await make(database, org.organization_id, credits_expire_at=ends)
    user = await org.member()

    async def die(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(codes, "pool_for", die)
        await redeem(database, text, user)
    async with database.platform() as conn:
        await conn.execute("select pg_sleep_until(%s)", [ends])
        left = await db.fetch_all(
            conn, codes._Unfinished, codes.QUERIES.unfinished_redemptions, older_than=timedelta(0), most=1_000_000
        )
    assert org.organization_id not in {each.organization_id for each in left}


async def test_what_is_burnt_is_told_by_campaign(database: db.Database, org: Any, simulate: Any) -> None:
    user = await org.member()
    [text] = await make(database, org.organization_id, name="Told")
    await redeem(database, text, user)
    async with org.tenant() as conn:
        await conn.execute(
            "select credits.deduct_credits(%s, %s, 1500000, 'm', %s)", [org.organization_id, user, uuid7().hex]
        )
    async with database.platform() as conn:
        [campaign] = await codes.list_campaigns(conn, organization_id=org.organization_id)
    assert (campaign.granted_micros, campaign.burnt_micros) == (FIVE, 1_500_000)
    async with org.tenant() as conn:
        sources = "select payment_kind, complimentary_code, quantity_left::text from reporting.unified_payment_source"
        assert await (await conn.execute(sources)).fetchall() == [
            ("complimentary_code", f"Told …{text[-4:]}", "3.500000")
        ]


@pytest.fixture
async def client(database: db.Database) -> AsyncIterator[httpx2.AsyncClient]:
    app = create_app(database, database.settings, parts=[])
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app=app), base_url="http://localhost") as client:
        yield client


async def test_over_http_with_ones_own_key(database: db.Database, org: Any, client: httpx2.AsyncClient) -> None:
    user = await org.member()
    [text] = await make(database, org.organization_id)

    async def ask(scope: Scope, owner: UUID | None, **body: str) -> httpx2.Response:
        key = await org.key(owner, scopes=[scope])
        headers = {"Authorization": f"Bearer {key.text}"}
        return await client.post("/api/v1/codes/redeem", json=body, headers=headers)

    assert (await ask(Scope.READ, user, code=text)).status_code == 403
    assert (await ask(Scope.WRITE, None, code=text)).status_code == 403, "a service has no balance of its own"
    done = await ask(Scope.WRITE, user, code=text.lower().replace("-", ""))
    assert (done.status_code, done.json()["credits"]) == (201, {"amount": "5", "unit": "credit"})
    assert (await ask(Scope.WRITE, user, code=text)).json() == {**done.json(), "is_again": True}
    unknown = await ask(Scope.WRITE, user, code="nonsense")
    assert (unknown.status_code, unknown.json()["code"]) == (404, "code_unknown")
    for _ in range(4):
        await ask(Scope.WRITE, user, code=codes.new_code())
    limited = await ask(Scope.WRITE, user, code=text)
    assert (limited.status_code, limited.json()["code"]) == (429, "too_many_tries")
    assert int(limited.headers["Retry-After"]) > 0
