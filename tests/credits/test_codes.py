"""Complimentary codes: who may redeem how often, into which balance, and what a crash or a race leaves."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg.types.json import Jsonb
from tests.credits.scenes import Scene

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


# ---------------------------------------------------------------------------------------------- rules, scene by scene

MANY = 1_000


def campaign(scene: Scene, **terms: Any) -> UUID:
    """A campaign of anybody's that allows as much as is not told otherwise."""
    row = {
        "name": "Spring", "amount_micros": 5, "priority": 50, "valid_from": None, "valid_until": "infinity",
        "credits_expire_at": "infinity", "is_for_members": False, "most_per_code": MANY, "most_per_person": MANY,
    }  # fmt: skip
    row |= {name: each.isoformat() if isinstance(each, datetime) else each for name, each in terms.items()}
    return scene.call(  # type: ignore[no-any-return]
        "select credits.open_campaign(%s, %s, %s, null, %s)", scene.organization, uuid7(), Jsonb(row), scene.now
    )


def code(scene: Scene, of: UUID) -> UUID:
    made = uuid7()
    assert scene.call(
        "select credits.add_codes(%s, %s, %s, %s)", scene.organization, of, Jsonb({str(made): "7Q2K"}), scene.now
    ) == 1  # fmt: skip
    return made


def claim(
    scene: Scene, text: UUID, user: UUID | None = None, *, domain: bytes = b"d", into: UUID | None = None
) -> UUID:
    """A redemption of a code: by somebody new, where nobody is named."""
    return scene.call(  # type: ignore[no-any-return]
        "select (credits.redeem_code(%s, %s, %s, %s, %s, %s, %s)).redemption_id",
        scene.organization, uuid7(), text, user or uuid7(), domain, into or scene.organization, scene.now,
    )  # fmt: skip


def revoke(scene: Scene, of: UUID, text: UUID | None = None) -> int:
    return scene.call(  # type: ignore[no-any-return]
        "select credits.revoke_codes(%s, %s, %s, 'why not', %s)", scene.organization, of, text, scene.now
    )


def claims(scene: Scene) -> list[tuple[Any, ...]]:
    return scene.admin(
        "select amount_micros, nullif(credits_expire_at, 'infinity'), grant_id from credits.code_redemptions"
        " where organization_id = %s order by claimed_at, redemption_id", scene.organization,
    )  # fmt: skip


def test_a_person_and_a_code_are_one_redemption(scene: Scene) -> None:
    text, user, other = code(scene, campaign(scene)), uuid7(), uuid7()
    first = claim(scene, text, user)
    assert claim(scene, text, user) == first
    revoke(scene, scene.admin("select campaign_id from credits.codes where code_id = %s", text)[0][0])
    assert claim(scene, text, user) == first, "whatever became of the code"
    with scene.refusal("BR441"):
        claim(scene, text, other)
    assert len(claims(scene)) == 1


def test_a_code_is_redeemed_by_so_many(scene: Scene) -> None:
    spring = campaign(scene, most_per_code=2)
    text, other = code(scene, spring), code(scene, spring)
    for _ in range(2):
        claim(scene, text)
    with scene.refusal("BR443"):
        claim(scene, text)
    claim(scene, other)
    with scene.refusal("BR404"):
        claim(scene, uuid7())
    assert len(claims(scene)) == 3


def test_a_person_redeems_so_many_codes_of_one_campaign(scene: Scene) -> None:
    spring, summer, user = campaign(scene, most_per_person=2), campaign(scene, most_per_person=1), uuid7()
    for _ in range(2):
        claim(scene, code(scene, spring), user)
    with scene.refusal("BR443"):
        claim(scene, code(scene, spring), user)
    claim(scene, code(scene, spring))
    claim(scene, code(scene, summer), user)
    assert len(claims(scene)) == 4


def so_often(scene: Scene, most: str) -> int:
    """Twice, then no more of the same; of another domain, organization, day or campaign it goes on. All there are."""
    scene.now = datetime(2026, 6, 10, 23, 59, tzinfo=UTC)
    spring, summer = campaign(scene, **{most: 2}), campaign(scene, **{most: 1})
    claim(scene, code(scene, summer))
    for _ in range(2):
        claim(scene, code(scene, spring))
    with scene.refusal("BR443"):
        claim(scene, code(scene, spring))
    others = {"most_per_domain": {"domain": b"e"}, "most_per_organization": {"into": uuid7()}}
    if most == "most_in_all":
        with scene.refusal("BR443"):
            claim(scene, code(scene, spring), domain=b"e", into=uuid7())
    else:
        scene.later(minutes=1)  # tomorrow
        claim(scene, code(scene, spring), **others.get(most, {}))
    if most != "most_per_day":
        scene.later(days=1)
        with scene.refusal("BR443"):
            claim(scene, code(scene, spring))
    return len(claims(scene))


def test_people_of_a_domain_redeem_so_often(scene: Scene) -> None:
    assert so_often(scene, "most_per_domain") == 4


def test_into_an_organization_is_redeemed_so_often(scene: Scene) -> None:
    assert so_often(scene, "most_per_organization") == 4


def test_on_a_day_is_redeemed_so_often(scene: Scene) -> None:
    assert so_often(scene, "most_per_day") == 4


def test_in_all_is_redeemed_so_often(scene: Scene) -> None:
    assert so_often(scene, "most_in_all") == 3


def test_a_code_is_redeemed_from_its_first_instant_until_just_before_its_last(scene: Scene) -> None:
    begins, ends = scene.now + timedelta(hours=1), scene.now + timedelta(hours=2)
    text = code(scene, campaign(scene, valid_from=begins, valid_until=ends))
    short = code(scene, campaign(scene, credits_expire_at=ends))
    scene.later(hours=1, microseconds=-1)
    with scene.refusal("BR441"):
        claim(scene, text)
    scene.later(microseconds=1)
    claim(scene, text)
    scene.later(hours=1, microseconds=-1)
    claim(scene, text)
    claim(scene, short)
    scene.later(microseconds=1)
    for each in (text, short):
        with scene.refusal("BR441"):
            claim(scene, each)
    assert len(claims(scene)) == 3


def test_what_a_code_gives_ends_with_its_campaign_or_its_days(scene: Scene) -> None:
    end = scene.now + timedelta(days=5)
    for terms in ({"credits_days": 30}, {"credits_days": 3}, {"credits_days": None}):
        claim(scene, code(scene, campaign(scene, credits_expire_at=end, **terms)))
        scene.later(microseconds=1)
    assert [ends for _, ends, _ in claims(scene)] == [end, end - timedelta(days=2, microseconds=-1), end]


def test_a_code_for_members_goes_into_their_organization_alone(scene: Scene) -> None:
    text = code(scene, campaign(scene, is_for_members=True))
    with scene.refusal("BR442"):
        claim(scene, text, into=uuid7())
    claim(scene, text)
    claim(scene, code(scene, campaign(scene)), into=uuid7())
    assert len(claims(scene)) == 2


def test_a_code_for_a_domain_is_for_its_people_alone(scene: Scene) -> None:
    text = code(scene, campaign(scene, domain_hashes=["\\x6161", "\\x6262"]))
    with scene.refusal("BR442"):
        claim(scene, text, domain=b"cc")
    claim(scene, text, domain=b"bb")
    assert len(claims(scene)) == 1


def test_what_was_revoked_is_redeemed_no_more_and_the_rest_is(scene: Scene) -> None:
    spring, summer = campaign(scene), campaign(scene)
    one, two, other = code(scene, spring), code(scene, spring), code(scene, summer)
    assert revoke(scene, summer, one) == 0, "it is of another campaign"
    assert revoke(scene, spring, one) == 1
    claim(scene, two)
    with scene.refusal("BR441"):
        claim(scene, one)
    scene.later(hours=1)
    assert revoke(scene, spring) == 1, "the one that was not revoked before"
    scene.later(hours=1)
    assert revoke(scene, spring) == 0
    ended = "select revoked_at from credits.code_campaigns where campaign_id = %s"
    assert scene.admin(ended, spring) == [(scene.later(hours=-1),)], "it stays as it was"
    since = "select distinct revoked_at from credits.codes where campaign_id = %s order by 1"
    assert scene.admin(since, spring) == [(scene.now - timedelta(hours=1),), (scene.now,)]
    with scene.refusal("BR441"):
        claim(scene, two)
    with scene.refusal("BR404"):
        code(scene, spring)
    claim(scene, other)


def test_a_campaign_that_would_be_over_is_none(scene: Scene) -> None:
    for name in ("valid_until", "credits_expire_at"):
        with scene.refusal("BR400"):
            campaign(scene, valid_from=scene.now - timedelta(days=1), **{name: scene.now})
    for amount in (0, -1, 10**15 + 1):
        with scene.refusal("BR400"):
            campaign(scene, amount_micros=amount)
    assert scene.admin("select from credits.code_campaigns where organization_id = %s", scene.organization) == []


def test_the_terms_of_a_campaign_say_nothing_of_whose_it_is_or_when_it_ended(scene: Scene) -> None:
    other = Scene(scene.conn)
    opened = campaign(
        scene, organization_id=str(other.organization), campaign_id=str(uuid7()), revoked_at=scene.now, created_at=None
    )
    found = "select organization_id, created_at, revoked_at from credits.code_campaigns where campaign_id = %s"
    assert scene.admin(found, opened) == [(scene.organization, scene.now, None)]


def test_a_redemption_is_granted_once(scene: Scene) -> None:
    pool, user = scene.pool(), scene.user()
    other = scene.pool(models="gpt%")
    claimed = claim(scene, code(scene, campaign(scene)), user)

    def grant(amount: int = 5) -> UUID:
        return scene.call(  # type: ignore[no-any-return]
            "select credits.grant_code(%s, %s, %s, %s, 'Spring', '7Q2K', %s, 50::smallint, 'infinity', %s, %s)",
            scene.organization, uuid7(), pool, claimed, amount, user, scene.now,
        )  # fmt: skip

    granted = grant()
    scene.later(hours=1)
    assert grant() == granted
    with scene.refusal("BR422"):
        grant(6)
    assert scene.grants(pool) == [("code", 5, 5, "active")]
    came_of = "select redemption_id, campaign, hint from credits.grant_codes where grant_id = %s"
    assert scene.admin(came_of, granted) == [(claimed, "Spring", "7Q2K")]
    claim(scene, code(scene, campaign(scene, amount_micros=1)), user)
    for each in (granted, scene.grant(other, 1)):  # noted once: the second would be another's
        scene.call("select credits.finish_redemption(%s, %s, %s, %s)", scene.organization, claimed, each, scene.now)
    assert [each for _, _, each in claims(scene)] == [granted, None]
    assert scene.findings() == []


def tried(scene: Scene, *subjects: bytes, window: str = "1 hour") -> datetime | None:
    """When the next try is free; None: this one was."""
    with scene.acting_as("bursar_app"):
        row = scene.conn.execute("select route.try_code(%s, 3, %s)", [list(subjects), window]).fetchone()
    assert row is not None
    return row[0]  # type: ignore[no-any-return]


def test_who_tried_too_often_tries_no_more_until_the_window_has_passed(scene: Scene) -> None:
    person, other, office, stranger = (uuid7().bytes * 2 for _ in range(4))
    assert tried(scene, stranger) is None
    for _ in range(3):
        assert tried(scene, person, office) is None
    until = tried(scene, person)
    assert until is not None
    assert until > clock.now() + timedelta(minutes=59)
    assert tried(scene, other, office), "from the same address"
    for _ in range(3):
        assert tried(scene, other) is None, "what was refused was not counted"
    assert tried(scene, other)
    assert tried(scene, person, window="0 seconds") is None
    assert tried(scene, person) is None, "what is older than the window is forgotten"
    assert tried(scene, other), "of whom it was asked"
    for _ in range(2):
        assert tried(scene, stranger) is None, "tries of others are none of theirs"
    assert tried(scene, stranger)


def test_a_try_that_succeeded_does_not_count(scene: Scene) -> None:
    person, other = uuid7().bytes * 2, uuid7().bytes * 2
    for _ in range(5):
        assert tried(scene, person, other) is None
        with scene.acting_as("bursar_app"):
            scene.conn.execute("select route.forgive_try(%s)", [[person]])
        if tried(scene, other):
            break
    assert tried(scene, other), "of nobody else"
    assert tried(scene, person) is None


def test_only_who_has_not_tried_lately_is_forgotten(scene: Scene) -> None:
    person = uuid7().bytes * 2
    for _ in range(3):
        tried(scene, person)
    with scene.acting_as("bursar_platform"):
        scene.conn.execute("select route.forget_tries('1 hour')")
    assert tried(scene, person)
    scene.admin("update route.code_tries set tried_at = '{2020-01-01}' where subject_hash = %s", person)
    with scene.acting_as("bursar_platform"):
        scene.conn.execute("select route.forget_tries('1 hour')")
    assert scene.admin("select count(*) from route.code_tries where subject_hash = %s", person) == [(0,)]


def test_a_text_that_is_taken_is_no_other_code(scene: Scene) -> None:
    digest, first, second = uuid7().bytes * 2, uuid7(), uuid7()
    took = "select route.claim_code(%s, %s, %s)"
    with scene.acting_as("bursar_app", scene.organization):
        assert scene.conn.execute(took, [scene.organization, second, uuid7().bytes * 2]).fetchone() == (True,)
        assert scene.conn.execute(took, [scene.organization, first, digest]).fetchone() == (True,)
        assert scene.conn.execute(took, [scene.organization, second, digest]).fetchone() == (False,)
        found = scene.conn.execute("select code_id from route.find_code(%s)", [digest]).fetchall()
    assert found == [(first,)]
    with scene.refusal("BR404"), scene.acting_as("bursar_app", uuid7()):
        scene.conn.execute(took, [scene.organization, second, uuid7().bytes * 2])
