"""A mail server that speaks SMTP: what it took, and what it refuses."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from ssl import SSLContext
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session


@dataclass  # without slots, which Python 3.11.2 and aiosmtpd's look at all members do not bear together
class MailServer:
    """at_rcpt, at_data: answers in place of 250, the first one first; what is left then is taken."""

    port: int
    taken: list[EmailMessage] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)
    encrypted: list[bool] = field(default_factory=list)
    at_rcpt: list[str] = field(default_factory=list)
    at_data: list[str] = field(default_factory=list)

    async def handle_RCPT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.at_rcpt:
            return self.at_rcpt.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        if self.at_data:
            return self.at_data.pop(0)
        assert isinstance(envelope.content, bytes)
        message = message_from_bytes(envelope.content, policy=policy.default)
        assert isinstance(message, EmailMessage)
        self.taken.append(message)
        self.readers += envelope.rcpt_tos
        self.encrypted.append(session.ssl is not None)
        return "250 taken"

    def authenticate(self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.logins.append((data.login.decode(), data.password.decode()))
        return AuthResult(success=data.password == b"s3cret/word")


@contextmanager
def mail_server(tls: SSLContext | None = None, *, needs_login: bool = False) -> Iterator[MailServer]:
    """A server on a port of this machine, in a thread of its own. tls: offers STARTTLS and takes nothing without."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        server = MailServer(port=free.getsockname()[1])
    controller = Controller(
        server,
        hostname="127.0.0.1",
        port=server.port,
        tls_context=tls,
        require_starttls=tls is not None,
        authenticator=server.authenticate,
        auth_required=needs_login,
        auth_require_tls=tls is not None,
    )
    controller.start()
    try:
        yield server
    finally:
        controller.stop()
