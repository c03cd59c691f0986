"""How events read in an e-mail: a subject, plain text, and the same as simple HTML.

Who posts an event says in its payload what people shall read: `title` (one line) and `text` (lines). People stand there
by their ids; their names are put in when the e-mail is written, so that no event holds a name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import SMTP, compat32
from email.utils import format_datetime
from html import escape
from typing import Final
from uuid import UUID

from bursar import clock
from bursar.outbox.deliveries import Event

LONGEST_SUBJECT: Final = 150
PERSON: Final = re.compile(r"(--user )?\busr_([0-9a-f]{32})\b")
_UNPRINTABLE: Final = re.compile(r"[\x00-\x1f\x7f\x85\u2028\u2029]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What an e-mail says, before names are put in. told: title and lines of each event."""

    organization: str
    told: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def subject(self) -> str:
        """Of one event its title, of several how many there are."""
        first = self.told[0][0]
        return first if len(self.told) == 1 else f"{first}, and {len(self.told) - 1} more"

    @property
    def texts(self) -> Iterator[str]:
        """Titles and lines."""
        for title, lines in self.told:
            yield title
            yield from lines


def letter_of(organization: str, events: Sequence[Event]) -> Letter:
    """What these events say; events: at least one."""
    assert events
    return Letter(organization=organization, told=tuple((title_of(each), lines_of(each)) for each in events))


def title_of(event: Event) -> str:
    """The one line of an event."""
    return str(event.payload.get("title", event.kind))


def lines_of(event: Event) -> tuple[str, ...]:
    """What there is to say."""
    return tuple(str(each) for each in event.payload.get("text", ()))


@dataclass(frozen=True, slots=True)
class Person:
    """Who stands in a text by their id."""

    user_id: UUID
    name: str
    email: str


def people_in(texts: Iterable[str]) -> set[UUID]:
    """Whom texts name by id."""
    return {UUID(digits) for text in texts for _, digits in PERSON.findall(text)}


def with_names(text: str, people: Mapping[UUID, Person]) -> str:
    """A text with people's names in place of their ids, and their e-mails in commands, which know them by these.

    Who is not among them is “a former member”.
    """

    def named(found: re.Match[str]) -> str:
        option, digits = found.groups()
        who = people.get(UUID(digits))
        if option:
            return f"{option}{who.email}" if who else found[0]
        return who.name if who else "a former member"

    return PERSON.sub(named, text)


def message_of(letter: Letter, *, mail_id: UUID, sender: str, to: str, people: Mapping[UUID, Person]) -> EmailMessage:
    """The e-mail. people: who are in it.

    No text can end a header and begin another: what is not printable becomes a space, and nothing is left that the
    library would decode into a line's end.
    """

    message = EmailMessage(policy=SMTP)
    message["Subject"] = _one_line(f"[{letter.organization}] {with_names(letter.subject, people)}")[:LONGEST_SUBJECT]
    message["From"] = sender
    message["To"] = to
    message["Date"] = format_datetime(clock.now())
    message["Message-ID"] = f"<{mail_id.hex}@{_domain_of(sender)}>"
    message["Auto-Submitted"] = "auto-generated"
    told = [(with_names(title, people), [with_names(line, people) for line in lines]) for title, lines in letter.told]
    message.set_content("\n\n".join("\n".join([title, "", *lines]) for title, lines in told) + "\n\n-- \nBursar\n")
    message.add_alternative(_html(told), subtype="html")
    written = BytesHeaderParser(policy=compat32).parsebytes(message.as_bytes())
    assert written.keys() == message.keys(), "a text became a header"
    return message


def can_be_mailed(address: str) -> bool:
    """Whether an address is safe in a header: the library decodes =?…?= into whatever it says, line ends too."""
    return "=?" not in address and not _UNPRINTABLE.search(address)


def _html(told: Sequence[tuple[str, Sequence[str]]]) -> str:
    parts = [
        f"<h2 style='font-size:16px'>{escape(title)}</h2>" + "".join(f"<p>{escape(line)}</p>" for line in lines if line)
        for title, lines in told
    ]
    return f"<!doctype html><html><body style='font-family:sans-serif;font-size:14px'>{''.join(parts)}</body></html>\n"


def _one_line(text: str) -> str:
    return _UNPRINTABLE.sub(" ", text).replace("=?", "= ?").strip()


def _domain_of(address: str) -> str:
    return address.rpartition("@")[2].strip("<> ") or "localhost"
