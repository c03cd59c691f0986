"""E-mails: through a real mail server, collected, tried again, and safe against what people call themselves."""

import asyncio
import ssl
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from psycopg.types.json import Jsonb
from tests.conftest import Org
from tests.fakes import mail_server as fake
from tests.fakes.certificates import Authority

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.identity.memberships import end_membership
from bursar.outbox.mails import DueMail, MailServer, MailServerSetting, Postman
from bursar.settings import Settings


def server_at(settings: Settings, url: str, tls: ssl.SSLContext | None = None) -> MailServer:
    found = MailServer.of(replace(settings, smtp_url=url, mail_from="bursar@platform.example"), tls)
    assert found is not None
    return found


async def post_mail(org: Org, payload: dict[str, Any], *readers: UUID, minutes: int = 0, address: str = "") -> UUID:
    """An event with its e-mail."""
    async with org.tenant() as conn:
        event: UUID = await db.fetch_value(
            conn,
            "select outbox.post_event(%(org)s, 'pool.low', 'pool', %(id)s, %(payload)s)",
            org=org.organization_id,
            id=uuid7(),
            payload=Jsonb(payload),
        )
        await db.execute(
            conn,
            "select outbox.mail_event(%(org)s, %(event)s, %(users)s, %(addresses)s, %(minutes)s)",
            org=org.organization_id,
            event=event,
            users=list(readers),
            addresses=[address] if address else [],
            minutes=minutes,
        )
    return event


async def send(org: Org, server: MailServer | None) -> list[str | None]:
    """Hand over what is due in the organization; the state of each."""
    async with org.tenant() as conn:
        due = await db.fetch_all(
            conn,
            DueMail,
            "select organization_id, mail_id from outbox.mails where state = 'pending'"
            " and next_attempt_at <= clock_timestamp()",
        )
    postman = Postman(org.database, server)
    return [await postman.send(each) for each in due]


async def now_due(org: Org) -> None:
    async with org.tenant() as conn:
        await conn.execute("update outbox.mails set next_attempt_at = clock_timestamp() where state = 'pending'")


LOW = {"title": "Shared credits: 80 % used", "text": ["200 of 1000 credits are left.", "At 100 % calls are refused."]}


async def test_an_email_says_what_the_event_says_in_text_and_html(org: Org, settings: Settings) -> None:
    with fake.mail_server() as server:
        await post_mail(org, LOW, org.admin)
        assert await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}")) == ["sent"]
    [message] = server.taken
    assert message["Subject"] == "[Test Corp] Shared credits: 80 % used"
    assert message["From"] == "bursar@platform.example"
    assert message["Auto-Submitted"] == "auto-generated"
    assert str(message["Message-ID"]).endswith("@platform.example>")
    plain, html = message.get_body(("plain",)), message.get_body(("html",))
    assert plain is not None
    assert html is not None
    assert "200 of 1000 credits are left." in plain.get_content()
    assert "<p>200 of 1000 credits are left.</p>" in html.get_content()


async def test_what_happens_within_the_minutes_of_collecting_is_one_email(org: Org, settings: Settings) -> None:
    for percent in (50, 80, 90):
        await post_mail(org, {**LOW, "title": f"{percent} % used"}, org.admin, minutes=5)
    with fake.mail_server() as server:
        url = server_at(settings, f"smtp://127.0.0.1:{server.port}")
        assert await send(org, url) == []
        await now_due(org)
        assert await send(org, url) == ["sent"]
    assert server.taken[0]["Subject"] == "[Test Corp] 50 % used, and 2 more"


async def test_a_server_that_says_later_is_asked_later_under_the_same_message_id(org: Org, settings: Settings) -> None:
    with fake.mail_server() as server:
        url = server_at(settings, f"smtp://127.0.0.1:{server.port}")
        server.at_rcpt, server.at_data = ["451 4.7.1 greylisted"], ["452 no space"]
        await post_mail(org, LOW, org.admin)
        states = []
        for _ in range(3):
            states += await send(org, url)
            await now_due(org)
    assert states == ["pending", "pending", "sent"]
    assert len(server.taken) == 1


@pytest.mark.parametrize("place", ["at_rcpt", "at_data"])
async def test_a_server_that_says_never_is_not_asked_again(org: Org, settings: Settings, place: str) -> None:
    with fake.mail_server() as server:
        setattr(server, place, ["550 5.1.1 no such mailbox"])
        await post_mail(org, LOW, org.admin)
        url = server_at(settings, f"smtp://127.0.0.1:{server.port}")
        assert await send(org, url) == ["failed"]
        await now_due(org)
        assert await send(org, url) == []
    async with org.tenant() as conn:
        assert "no such mailbox" in str(await db.fetch_value(conn, "select answer from outbox.mails"))


async def test_a_server_that_is_away_is_asked_again(org: Org, settings: Settings) -> None:
    await post_mail(org, LOW, org.admin)
    assert await send(org, server_at(settings, "smtp://127.0.0.1:1")) == ["pending"]


async def test_with_starttls_the_password_and_the_email_go_encrypted(
    org: Org, settings: Settings, authority: Authority
) -> None:
    with fake.mail_server(authority.server("127.0.0.1"), needs_login=True) as server:
        await post_mail(org, LOW, org.admin)
        url = f"smtp+starttls://alerts:s3cret%2Fword@127.0.0.1:{server.port}"
        assert await send(org, server_at(settings, url, authority.client())) == ["sent"]
        await post_mail(org, LOW, org.admin)
        assert await send(org, server_at(settings, url)) == ["pending"], "a certificate that nobody vouches for"
    assert server.logins == [("alerts", "s3cret/word")]
    assert server.encrypted == [True]


async def test_who_has_left_gets_none_and_without_a_server_nothing_waits(org: Org, settings: Settings) -> None:
    gone = await org.member()
    await post_mail(org, LOW, gone)
    async with org.tenant() as conn:
        await end_membership(conn, organization_id=org.organization_id, user_id=gone, by=OPERATOR)
    with fake.mail_server() as server:
        assert await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}")) == ["dropped"]
    await post_mail(org, LOW, org.admin)
    assert await send(org, None) == ["dropped"]
    assert server.taken == []


async def test_an_address_that_is_no_members_gets_it_too(org: Org, settings: Settings) -> None:
    with fake.mail_server() as server:
        await post_mail(org, LOW, address="budget@acme.example")
        await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}"))
    assert server.readers == ["budget@acme.example"]


@pytest.mark.parametrize("address", ["=?utf-8?q?a=0d=0aBcc=3a_b?=@acme.example", "a\r\nBcc: b@acme.example"])
async def test_an_address_that_could_become_a_header_gets_nothing(org: Org, settings: Settings, address: str) -> None:
    with fake.mail_server() as server:
        await post_mail(org, LOW, address=address)
        assert await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}")) == ["dropped"]
    assert server.taken == []


async def test_two_workers_send_an_email_once(org: Org, settings: Settings) -> None:
    await post_mail(org, LOW, org.admin)
    with fake.mail_server() as server:
        url = server_at(settings, f"smtp://127.0.0.1:{server.port}")
        await asyncio.gather(*(send(org, url) for _ in range(4)))
    assert len(server.taken) == 1


async def test_people_are_named_when_it_is_written_and_no_name_stands_in_the_event(
    org: Org, settings: Settings
) -> None:
    user = await org.member()
    payload = {"title": f"Daily cap of usr_{user.hex}: reached", "text": [f"And usr_{uuid7().hex} too"]}
    await post_mail(org, payload, org.admin)
    with fake.mail_server() as server:
        await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}"))
    assert server.taken[0]["Subject"] == "[Test Corp] Daily cap of Dana Test: reached"
    body = server.taken[0].get_body(("plain",))
    assert body is not None
    assert "And a former member too" in body.get_content()


async def test_a_command_in_an_email_names_people_by_what_the_command_takes(org: Org, settings: Settings) -> None:
    user = await org.member()
    lines = [f"Next: bursar credits allocate AMOUNT --org acme --user usr_{user.hex}", f"Of --user usr_{uuid7().hex}"]
    await post_mail(org, {"title": "Used up", "text": lines}, org.admin)
    with fake.mail_server() as server:
        await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}"))
    body = server.taken[0].get_body(("plain",))
    assert body is not None
    async with org.tenant() as conn:
        email = await db.fetch_value(conn, "select email from identity.memberships where user_id = %(user)s", user=user)
    assert f"Next: bursar credits allocate AMOUNT --org acme --user {email}" in body.get_content()
    assert lines[1] in body.get_content()


@pytest.mark.parametrize(
    "title",
    [
        "Low\r\nBcc: everybody@evil.example",
        "Low\nSubject: other\n\nbody",
        "Low\u2028Bcc: everybody@evil.example",
        "Low\x1f\x85Bcc: everybody@evil.example",
        "=?utf-8?q?Low=0ABcc:_everybody@evil.example?=",
    ],
)
async def test_no_text_makes_a_header_of_its_own(org: Org, settings: Settings, title: str) -> None:
    with fake.mail_server() as server:
        await post_mail(org, {"title": title, "text": ["<script>alert(1)</script>", ".", "."]}, org.admin)
        assert await send(org, server_at(settings, f"smtp://127.0.0.1:{server.port}")) == ["sent"]
    [message] = server.taken
    assert message["Bcc"] is None
    assert len(message.get_all("Subject") or []) == 1
    assert len(server.readers) == 1
    assert sorted(message.keys()) == sorted(set(message.keys()))
    html = message.get_body(("html",))
    assert html is not None
    assert "<script>" not in html.get_content()


@pytest.mark.parametrize(
    "url", ["mail.acme.example", "http://mail.acme.example", "smtp://", "smtp://h:x", "smtps://h/x"]
)
def test_a_setting_that_names_no_mail_server_is_refused(settings: Settings, url: str) -> None:
    with pytest.raises(MailServerSetting):
        MailServer.of(replace(settings, smtp_url=url))
