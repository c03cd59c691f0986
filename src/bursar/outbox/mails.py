"""Sending e-mails through the installation's mail server.

An e-mail is claimed for the time of a lease, handed over, and noted. Who dies in between leaves it to the next one,
which hands it over once more under the same Message-ID. A mail server's 4xx is tried again for three days; its 5xx is
final.
"""

import asyncio
import smtplib
import ssl
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from email.message import EmailMessage
from typing import Final
from urllib.parse import unquote, urlsplit
from uuid import UUID

import structlog
from prometheus_client import Counter

from bursar import clock, db
from bursar.errors import BursarError
from bursar.outbox.deliveries import Event, next_wait
from bursar.outbox.endpoints import QUERIES
from bursar.outbox.letters import Person, can_be_mailed, letter_of, message_of, people_in
from bursar.outbox.outside import usual_tls
from bursar.settings import Settings

LEASE_SECONDS: Final = 60.0
SMTP_SECONDS: Final = 15.0
MOST_A_RUN: Final = 100
AT_ONCE: Final = 4
PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
DROPPED_WITHOUT_SERVER: Final = "no mail server is set: BURSAR_SMTP_URL"

SENT = Counter("bursar_mails_total", "E-mails, by what came of them: sent, again, failed, dropped", ["outcome"])
log = structlog.get_logger(__name__)


class MailServerSetting(BursarError):
    """BURSAR_SMTP_URL is no address of a mail server."""


class NotSent(Exception):
    """The mail server did not take it. is_final: nor will it later."""

    def __init__(self, answer: str, *, is_final: bool) -> None:
        super().__init__(answer)
        self.answer = answer[:200]
        self.is_final = is_final


@dataclass(frozen=True, slots=True, kw_only=True)
class MailServer:
    """Where e-mails are handed over, and by whom they are."""

    scheme: str
    host: str
    port: int
    user: str
    password: str
    sender: str
    tls: ssl.SSLContext

    @classmethod
    def of(cls, settings: Settings, tls: ssl.SSLContext | None = None) -> "MailServer | None":
        """As the settings say; None where they name none.

        Raises:
            MailServerSetting
        """
        if settings.smtp_url is None:
            return None
        parts = urlsplit(settings.smtp_url)
        try:
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if parts.scheme not in PORTS or not host or parts.path not in ("", "/"):
            raise MailServerSetting(
                "BURSAR_SMTP_URL names no mail server",
                next_step="Write smtps://user:password@mail.acme.example, or smtp+starttls:// or smtp://",
            )
        return cls(
            scheme=parts.scheme,
            host=host,
            port=port or PORTS[parts.scheme],
            user=unquote(parts.username or ""),
            password=unquote(parts.password or ""),
            sender=settings.mail_from,
            tls=tls or usual_tls(),
        )

    def hand_over(self, message: EmailMessage) -> str:
        """Give one e-mail to the server; blocks. Returns what it answered.

        Raises:
            NotSent
        """
        try:
            with self._connected() as client:
                if self.scheme == "smtp+starttls":
                    client.starttls(context=self.tls)
                if self.user:
                    client.login(self.user, self.password)
                client.send_message(message)
                return "taken"
        except smtplib.SMTPRecipientsRefused as error:
            code, text = next(iter(error.recipients.values()))
            raise NotSent(f"{code} {text.decode(errors='replace')}", is_final=code >= 500) from None
        except smtplib.SMTPDataError as error:
            raise NotSent(f"{error.smtp_code} {_text(error)}", is_final=error.smtp_code >= 500) from None
        except smtplib.SMTPResponseException as error:
            # The sender or the password is not accepted: that is the installation's to mend, and then it goes.
            raise NotSent(f"{error.smtp_code} {_text(error)}", is_final=False) from None
        except (smtplib.SMTPException, OSError, ssl.SSLError) as error:
            raise NotSent(f"no connection ({type(error).__name__})", is_final=False) from None

    def _connected(self) -> smtplib.SMTP:
        if self.scheme == "smtps":
            return smtplib.SMTP_SSL(self.host, self.port, timeout=SMTP_SECONDS, context=self.tls)
        return smtplib.SMTP(self.host, self.port, timeout=SMTP_SECONDS)


@dataclass(frozen=True, slots=True)
class DueMail:
    """An e-mail whose time has come."""

    organization_id: UUID
    mail_id: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class _Claim:
    attempts: int
    first_attempt_at: datetime
    user_id: UUID | None
    address: str | None


@dataclass(frozen=True, slots=True)
class _Reader:
    email: str


class Postman:
    """Hands over what is due. server: None where there is none; then what is due is dropped, and says so."""

    def __init__(
        self, database: db.Database, server: MailServer | None, *, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self._database = database
        self._server = server
        self._lease_seconds = lease_seconds

    async def send_due(self) -> int:
        """Hand over what is due now, a few at once; how many there were."""
        async with self._database.platform() as conn:
            due = await db.fetch_all(conn, DueMail, QUERIES.due_mails, most=MOST_A_RUN)
        free = asyncio.Semaphore(AT_ONCE)

        async def one(each: DueMail) -> None:
            async with free:
                try:
                    await self.send(each)
                except Exception:
                    # What is wrong with one must not keep the others waiting; it is due again when its lease ends.
                    log.exception("an e-mail cannot be sent", mail=str(each.mail_id))

        await asyncio.gather(*(one(each) for each in due))
        return len(due)

    async def send(self, due: DueMail) -> str | None:
        """Claim one, hand it over and note what came of it: its state then; None where another one had claimed it."""
        place = {"organization_id": due.organization_id, "mail_id": due.mail_id}
        async with self._database.tenant(due.organization_id) as conn:
            claim = await db.fetch_optional(
                conn, _Claim, QUERIES.claim_mail, **place, lease_seconds=self._lease_seconds
            )
            if claim is None:
                return None
        async with self._database.tenant(due.organization_id) as conn:
            message = await self._written(conn, due, claim)
        state, answer, wait = await self._handed_over(message, claim)
        SENT.labels("again" if state == "pending" else state).inc()
        async with self._database.tenant(due.organization_id) as conn:
            noted = {"state": state, "answer": answer, "wait_seconds": wait, "attempts": claim.attempts}
            await db.execute(conn, QUERIES.note_mail, **place, **noted)
        return state

    async def _handed_over(self, message: EmailMessage | None, claim: _Claim) -> tuple[str, str, float]:
        """State, answer and seconds until the next attempt."""
        if self._server is None:
            return "dropped", DROPPED_WITHOUT_SERVER, 0
        if message is None:
            return "dropped", "its reader is no active member any more, or has no address that can be used", 0
        try:
            return "sent", await asyncio.to_thread(self._server.hand_over, message), 0
        except NotSent as error:
            wait, is_last = next_wait(claim.attempts, clock.now() - claim.first_attempt_at)
            return "failed" if error.is_final or is_last else "pending", error.answer, wait

    async def _written(self, conn: db.Connection, due: DueMail, claim: _Claim) -> EmailMessage | None:
        """The e-mail, with all that joined it until it was claimed; None: nobody can get it."""
        if self._server is None:
            return None
        place = {"organization_id": due.organization_id}
        to = claim.address
        if claim.user_id is not None:
            reader = await db.fetch_optional(conn, _Reader, QUERIES.reader, **place, user_id=claim.user_id)
            to = reader.email if reader else None
        if to is None or not can_be_mailed(to):
            return None
        events = await db.fetch_all(conn, Event, QUERIES.mail_events, **place, mail_id=due.mail_id)
        letter = letter_of(str(await db.fetch_value(conn, QUERIES.organization_name, **place)), events)
        people = await people_of(conn, organization_id=due.organization_id, user_ids=people_in(letter.texts))
        return message_of(letter, mail_id=due.mail_id, sender=self._server.sender, to=to, people=people)


async def people_of(conn: db.Connection, *, organization_id: UUID, user_ids: Iterable[UUID]) -> dict[UUID, Person]:
    """Members, also former ones, by their ids."""
    found = await db.fetch_all(
        conn, Person, QUERIES.people_of, organization_id=organization_id, user_ids=list(user_ids)
    )
    return {each.user_id: each for each in found}


def _text(error: smtplib.SMTPResponseException) -> str:
    said = error.smtp_error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
