"""One-time links, server-side sessions, and the guards in front of routes, spoken to over HTTP."""

import asyncio
from dataclasses import replace
from datetime import timedelta

import psycopg
import pytest

from bursar import clock
from bursar.audit.events import OPERATOR, list_events
from bursar.identity.addresses import Address
from bursar.identity.guards import COOKIE, is_loopback, key_text_of
from bursar.identity.memberships import add_membership, end_membership, set_roles, suspend_member
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID, ensure_platform
from bursar.identity.principals import InvalidApiKey
from bursar.identity.roles import Role, Scope
from bursar.identity.secret_text import SIGN_IN_LINK, new_secret_text
from bursar.identity.sessions import (
    ADMIN_IDLE,
    ADMIN_LIFE,
    MEMBER_LIFE,
    LinkNotValid,
    NotSignedIn,
    check_cookie,
    create_sign_in_link,
    end_sessions,
    is_alive,
    read_session,
    sign_cookie,
    sign_in,
    sign_out,
)
from bursar.identity.users import get_user

SECOND = timedelta(seconds=1)


async def link_for(org, user_id, **options) -> str:
    async with org.database.untenanted() as conn:
        user = await get_user(conn, user_id=user_id)
    async with org.database.tenant(user.home_organization_id) as conn:
        return await create_sign_in_link(conn, user=user, by=OPERATOR, **options)


async def sign_in_with(browser, token: str):
    return await browser.post(f"/sign-in/{token}")


# ------------------------------------------------------------------------------------------------- links and sessions


async def test_a_link_signs_in_once(org) -> None:
    token = await link_for(org, org.admin)
    person = await sign_in(org.database, token)
    assert person.user.user_id == org.admin
    assert {each.organization_id for each in person.places} >= {org.organization_id}
    assert await read_session(org.database, person.cookie)
    assert person.cookie not in repr(person)
    with pytest.raises(LinkNotValid):
        await sign_in(org.database, token)


async def test_of_racing_uses_of_a_link_exactly_one_wins(org) -> None:
    token = await link_for(org, org.admin)

    async def use() -> bool:
        try:
            await sign_in(org.database, token)
        except LinkNotValid:
            return False
        return True

    assert sorted(await asyncio.gather(*(use() for _ in range(8)))) == [False] * 7 + [True]


async def test_unknown_used_and_late_links_answer_alike(org) -> None:
    used = await link_for(org, org.admin)
    await sign_in(org.database, used)
    late = await link_for(org, org.admin, valid_for=timedelta(milliseconds=1))
    await asyncio.sleep(0.01)
    answers = set()
    for token in (used, late, new_secret_text(SIGN_IN_LINK, org.organization_id).text, "", "bl_x", used[:-1] + "!"):
        with pytest.raises(LinkNotValid) as refusal:
            await sign_in(org.database, token)
        answers.add(str(refusal.value.body()))
    assert len(answers) == 1


async def test_signing_in_always_begins_a_new_session_and_ends_the_one_brought_along(org) -> None:
    first = await sign_in(org.database, await link_for(org, org.admin))
    second = await sign_in(org.database, await link_for(org, org.admin), previous_cookie=first.cookie)
    assert second.session.session_id != first.session.session_id
    assert await read_session(org.database, second.cookie)
    with pytest.raises(NotSignedIn):
        await read_session(org.database, first.cookie)


async def test_signing_out_ends_a_session_at_once_and_for_good(org) -> None:
    person = await sign_in(org.database, await link_for(org, org.admin))
    other = await sign_in(org.database, await link_for(org, org.admin))
    await sign_out(org.database, person.cookie)
    await sign_out(org.database, person.cookie)
    await sign_out(org.database, "nonsense")
    with pytest.raises(NotSignedIn):
        await read_session(org.database, person.cookie)
    assert await read_session(org.database, other.cookie)
    async with org.database.tenant(person.user.home_organization_id) as conn:
        assert await end_sessions(conn, user=person.user, by=OPERATOR, reason="Laptop lost") == 1
        told = [each.action for each in await list_events(conn, organization_id=person.user.home_organization_id)]
    with pytest.raises(NotSignedIn):
        await read_session(org.database, other.cookie)
    assert told[:2] == ["user.sessions_ended", "session.ended"]


async def test_a_cookie_that_was_not_signed_here_is_nobodys(org) -> None:
    settings = org.database.settings
    person = await sign_in(org.database, await link_for(org, org.admin))
    session = person.session
    assert check_cookie(settings, person.cookie) == (session.organization_id, session.session_id)
    foreign = replace(settings, given_master_key="another master key of more than 32 characters")
    forged = sign_cookie(foreign, session.organization_id, session.session_id)
    swapped = person.cookie[22:44] + person.cookie[:22] + person.cookie[44:]
    for cookie in (forged, swapped, person.cookie[:-2], person.cookie + "AA", "", "%", "é", "A" * 86, "A" * 10_000):
        with pytest.raises(NotSignedIn):
            await read_session(org.database, cookie)


@pytest.mark.parametrize("octet", range(0, 86, 7))
async def test_any_changed_character_of_a_cookie_is_found(org, octet: int) -> None:
    cookie = sign_cookie(org.database.settings, org.organization_id, clock.uuid7())
    changed = cookie[:octet] + ("B" if cookie[octet] == "A" else "A") + cookie[octet + 1 :]
    with pytest.raises(NotSignedIn):
        check_cookie(org.database.settings, changed)


async def test_sessions_of_administrators_end_sooner_idle_or_not(org) -> None:
    session = (await sign_in(org.database, await link_for(org, org.admin))).session

    def at(age: timedelta, idle: timedelta, of_administrator: bool) -> bool:
        read_at = session.started_at + age
        return is_alive(replace(session, read_at=read_at, last_seen_at=read_at - idle), of_administrator)

    assert at(ADMIN_LIFE - SECOND, ADMIN_IDLE - SECOND, True)
    assert not at(ADMIN_LIFE, SECOND, True)
    assert not at(ADMIN_IDLE, ADMIN_IDLE, True)
    assert at(ADMIN_LIFE, ADMIN_LIFE, False)
    assert at(MEMBER_LIFE - SECOND, SECOND, False)
    assert not at(MEMBER_LIFE, SECOND, False)


async def test_an_administrators_idle_session_ends_and_a_members_goes_on(org, admin_dsn: str) -> None:
    member = await org.member()
    people = [await sign_in(org.database, await link_for(org, each)) for each in (org.admin, member)]
    async with await psycopg.AsyncConnection.connect(admin_dsn) as admin:
        for person in people:
            await admin.execute(
                "update identity.sessions set started_at = started_at - interval '31 minutes', "
                "last_seen_at = last_seen_at - interval '31 minutes' where session_id = %s",
                [person.session.session_id],
            )
    with pytest.raises(NotSignedIn):
        await read_session(org.database, people[0].cookie)
    await read_session(org.database, people[1].cookie)
    seen = await read_session(org.database, people[1].cookie)
    assert seen.session.read_at - seen.session.last_seen_at < timedelta(minutes=1)
    # A member who becomes an administrator is held to an administrator's rules from the next request on.
    async with org.tenant() as conn:
        await set_roles(conn, organization_id=org.organization_id, user_id=member, roles=[Role.FINANCE], by=OPERATOR)
    assert (await read_session(org.database, people[1].cookie)).is_administrator


async def test_who_is_barred_at_home_is_signed_in_nowhere(org) -> None:
    person = await sign_in(org.database, await link_for(org, org.admin))
    token = await link_for(org, org.admin)
    home = person.user.home_organization_id
    async with org.database.tenant(home) as conn:
        await suspend_member(conn, organization_id=home, user_id=org.admin, by=OPERATOR)
    with pytest.raises(NotSignedIn):
        await read_session(org.database, person.cookie)
    with pytest.raises(LinkNotValid):
        await sign_in(org.database, token)


# ------------------------------------------------------------------------------------------------- over HTTP


async def test_looking_at_a_link_does_not_use_it_up_and_tells_nobody_its_token(browser, org) -> None:
    token = await link_for(org, org.admin)
    for _ in range(2):
        page = await browser.get(f"/sign-in/{token}")
        assert page.status_code == 200
        assert '<form method="post">' in page.text
        assert token not in page.text
        assert page.headers["cache-control"] == "no-store"
        assert page.headers["referrer-policy"] == "same-origin"
        assert "default-src 'none'" in page.headers["content-security-policy"]
    assert not browser.cookies


async def test_signing_in_and_out_with_a_browser(browser, org) -> None:
    answer = await sign_in_with(browser, await link_for(org, org.admin))
    assert (answer.status_code, answer.headers["location"]) == (303, f"/o/{org.slug}")
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("session_token=")
    assert "HttpOnly" in cookie
    assert "SameSite=lax" in cookie
    assert "Secure" not in cookie, "plain http on the own machine"
    acts = (await browser.get(f"/o/{org.slug}")).json()
    assert acts == {"acts_in": str(org.organization_id), "transaction": str(org.organization_id)}
    kept = dict(browser.cookies)
    assert (await browser.post("/sign-out")).status_code == 303
    assert not browser.cookies
    browser.cookies.update(kept)
    assert (await browser.get(f"/o/{org.slug}")).json()["code"] == "not_signed_in"


async def test_the_cookie_is_secure_unless_it_stays_on_this_machine(browser, org) -> None:
    for origin, secure in (("https://bursar.example", True), ("http://10.0.0.7", True), ("http://127.0.0.1", False)):
        token = await link_for(org, org.admin)
        answer = await browser.post(f"{origin}/sign-in/{token}")
        assert ("Secure" in answer.headers["set-cookie"]) is secure
    assert is_loopback("::1")
    assert not is_loopback("localhost.example")


async def test_a_used_link_shows_a_page_that_says_so(browser, org) -> None:
    token = await link_for(org, org.admin)
    await sign_in_with(browser, token)
    again = await sign_in_with(browser, token)
    assert again.status_code == 410
    assert "ask for a new one" in again.text


@pytest.mark.parametrize(
    "headers",
    [
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"sec-fetch-site": "none"},
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {},
    ],
)
async def test_a_change_with_a_cookie_alone_is_refused_from_anywhere_else(app, browser, org, headers) -> None:
    await sign_in_with(browser, await link_for(org, org.admin))
    del browser.headers["sec-fetch-site"]
    token = await link_for(org, org.admin)
    for path in (f"/o/{org.slug}", "/sign-out", f"/session/organization/{org.slug}", f"/sign-in/{token}"):
        answer = await browser.post(path, headers=headers)
        assert (answer.status_code, answer.json()["code"]) == (403, "cross_site_request"), path
    assert (await browser.get(f"/o/{org.slug}", headers=headers)).status_code == 200
    key = await org.key(org.admin)
    answer = await browser.post(f"/o/{org.slug}", headers=headers | {"authorization": f"Bearer {key.text}"})
    assert answer.status_code == 200, "a key is no cookie"


async def test_an_old_browser_says_by_its_origin_where_it_is(browser, org) -> None:
    await sign_in_with(browser, await link_for(org, org.admin))
    del browser.headers["sec-fetch-site"]
    answer = await browser.post(f"/o/{org.slug}", headers={"origin": "http://localhost"})
    assert answer.status_code == 200


async def test_foreign_and_unknown_organizations_answer_alike_to_keys_and_sessions(browser, org, make_org) -> None:
    foreign = await make_org()
    key = await org.key(org.admin)
    await sign_in_with(browser, await link_for(org, org.admin))
    answers = set()
    for headers in ({}, {"x-api-key": key.text}, {"authorization": f"Bearer {key.text}"}):
        for name in (foreign.slug, str(foreign.organization_id), "no-such-organization", str(clock.uuid7())):
            for method in ("GET", "POST"):
                answer = await browser.request(method, f"/o/{name}", headers=headers)
                answers.add((answer.status_code, answer.text))
    assert len(answers) == 1
    assert answers.pop()[0] == 404


async def test_a_member_without_the_permission_is_told_which_roles_have_it(browser, org) -> None:
    member = await org.member()
    key = await org.key(member)
    answer = await browser.get(f"/o/{org.slug}/limits", headers={"x-api-key": key.text})
    assert (answer.status_code, answer.json()["code"]) == (403, "not_permitted")
    assert "org_admin" in answer.json()["detail"]
    admin_key = await org.key(org.admin)
    answer = await browser.get(f"/o/{org.slug}/limits", headers={"x-api-key": admin_key.text})
    assert answer.json() == ["org_admin"]
    reads_only = await org.key(org.admin, scopes=[Scope.READ])
    answer = await browser.get(f"/o/{org.slug}/limits", headers={"x-api-key": reads_only.text})
    assert answer.status_code == 403


async def test_a_revoked_key_and_a_membership_that_ended_count_at_the_next_request(browser, org) -> None:
    member = await org.member()
    await sign_in_with(browser, await link_for(org, member))
    assert (await browser.get(f"/o/{org.slug}")).status_code == 200
    async with org.tenant() as conn:
        await end_membership(conn, organization_id=org.organization_id, user_id=member, by=OPERATOR)
    assert (await browser.get(f"/o/{org.slug}")).status_code == 404


async def test_a_session_acts_where_the_request_then_the_session_chose(browser, org, make_org) -> None:
    email = f"{clock.uuid7().hex}@two.example"
    other, stranger = await make_org(), await make_org()
    person = await org.member(email=email, at=clock.now() - timedelta(days=1))
    await other.member(email=email)
    await sign_in_with(browser, await link_for(org, person))
    assert (await browser.get("/me")).json() == str(org.organization_id)
    refused = await browser.post(f"/session/organization/{stranger.slug}")
    assert refused.status_code == 404
    chosen = await browser.post(f"/session/organization/{other.slug}")
    assert chosen.headers["location"] == f"/o/{other.slug}"
    assert (await browser.get("/me")).json() == str(other.organization_id)
    header = {"bursar-organization": org.slug}
    assert (await browser.get("/me", headers=header)).json() == str(org.organization_id)
    async with other.tenant() as conn:
        await end_membership(conn, organization_id=other.organization_id, user_id=person, by=OPERATOR)
    assert (await browser.get("/me")).json() == str(org.organization_id)


async def platform_member(org, role: Role):
    """The user id of a new member of the platform's own organization."""
    database, email = org.database, f"{clock.uuid7().hex}@operator.example"
    user = await org.user(email)
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        await ensure_platform(conn, by=OPERATOR)
        await add_membership(
            conn,
            organization_id=PLATFORM_ORGANIZATION_ID,
            user_id=user.user_id,
            address=Address.of(email, database.settings),
            display_name="Operator",
            roles=[role],
            by=OPERATOR,
        )
    return user.user_id


async def test_others_of_the_platforms_own_organization_are_let_into_no_other(browser, org) -> None:
    await sign_in_with(browser, await link_for(org, await platform_member(org, Role.AUDITOR)))
    assert (await browser.get("/o/platform")).status_code == 200
    assert (await browser.get(f"/o/{org.slug}")).status_code == 404


async def test_a_system_admin_is_let_into_every_organization_and_spends_in_none(browser, org) -> None:
    await sign_in_with(browser, await link_for(org, await platform_member(org, Role.SYSTEM_ADMIN)))
    assert (await browser.get(f"/o/{org.slug}")).json()["acts_in"] == str(org.organization_id)
    assert (await browser.get(f"/o/{org.slug}/limits")).json() == ["system_admin"]
    assert (await browser.get("/o/no-such-organization")).status_code == 404
    assert (await browser.get("/me", headers={"bursar-organization": org.slug})).status_code == 404


def test_keys_come_as_openai_or_as_anthropic_clients_send_them() -> None:
    assert key_text_of({"authorization": "Bearer bk_x"}) == "bk_x"
    assert key_text_of({"authorization": "bearer  bk_x "}) == "bk_x"
    assert key_text_of({"x-api-key": "bk_x"}) == "bk_x"
    assert key_text_of({}) is None
    assert COOKIE == "session_token"
    with pytest.raises(InvalidApiKey):
        key_text_of({"authorization": "Basic eA=="})
