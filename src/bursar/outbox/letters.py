"""How events read in an e-mail: a subject, plain text, and the same as simple HTML.

Who posts an event says in its payload what people shall read: `title` (one line) and `text` (lines). People stand there
by their ids; their names are put in when the e-mail is written, so that no event holds a name.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.message import EmailMessage
from email.parser import BytesHeaderParser
from email.policy import SMTP, compat32
from email.utils import format_datetime
from html import escape
from typing import Any, Final
from uuid import UUID

from bursar import clock
from bursar.outbox.deliveries import Event

LONGEST_SUBJECT: Final = 150
PERSON: Final = re.compile(r"\busr_[0-9a-f]{32}\b")
TITLES: Final = {
    "request.created": "Somebody asks for more than a limit gives",
    "request.decided": "Your request for more was decided",
    "topup.succeeded": "Credits were bought by themselves",
    "topup.failed": "Credits could not be bought by themselves",
    "topup.runaway": "Automatic purchases were stopped: too many in a short time",
    "webhook.disabled": "A webhook was disabled",
}
"""Of events whose payload has no title."""
NEXT_STEPS: Final = {
    "request.created": "bursar caps requests, bursar caps approve, bursar caps deny",
    "request.decided": "bursar caps list",
    "topup.failed": "bursar top-ups list, bursar top-ups show",
    "topup.runaway": "bursar top-ups show, bursar top-ups set",
    "webhook.disabled": "bursar webhooks log, bursar webhooks enable",
}
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


def letter_of(organization: str, events: Sequence[Event]) -> Letter:
    """What these events say; events: at least one."""
    assert events
    return Letter(organization=organization, told=tuple((title_of(each), lines_of(each)) for each in events))


def title_of(event: Event) -> str:
    """The one line of an event."""
    title = event.payload.get("title")
    return title if isinstance(title, str) and title else TITLES.get(event.kind, event.kind)


def lines_of(event: Event) -> tuple[str, ...]:
    """What there is to say; of an event without a text its fields and the next step."""
    text = event.payload.get("text")
    if isinstance(text, list):
        return tuple(str(each) for each in text)
    said = [_field(name, value) for name, value in event.payload.items() if name != "title"]
    next_step = NEXT_STEPS.get(event.kind)
    return (*filter(None, said), *([f"Next: {next_step}"] if next_step else []))


def _field(name: str, value: Any) -> str | None:
    """'amount: 12.5 credit'. What only programs can use (ids, amounts without a unit) is left out."""
    label = name.replace("_", " ")
    if name == "user_id" and isinstance(value, str):
        return f"who: {value if PERSON.fullmatch(value) else f'usr_{UUID(value).hex}'}"
    if isinstance(value, dict) and value.keys() == {"amount", "unit"}:
        return f"{label}: {value['amount']} {value['unit']}"
    if isinstance(value, bool):
        return f"{label}: {'yes' if value else 'no'}"
    return f"{label}: {value}" if isinstance(value, str) and not name.endswith("_id") else None


def people_in(letter: Letter) -> set[UUID]:
    """Whom the letter names by id."""
    everything = "\n".join(line for title, lines in letter.told for line in (title, *lines))
    return {UUID(each.removeprefix("usr_")) for each in PERSON.findall(everything)}


def message_of(letter: Letter, *, mail_id: UUID, sender: str, to: str, names: Mapping[UUID, str]) -> EmailMessage:
    """The e-mail. names: of the people in it; who has none is “a former member”.

    No text can end a header and begin another: what is not printable becomes a space, and nothing is left that the
    library would decode into a line's end.
    """

    def named(text: str) -> str:
        return PERSON.sub(lambda found: names.get(UUID(found[0][4:]), "a former member"), text)

    message = EmailMessage(policy=SMTP)
    message["Subject"] = _one_line(f"[{letter.organization}] {named(letter.subject)}")[:LONGEST_SUBJECT]
    message["From"] = sender
    message["To"] = to
    message["Date"] = format_datetime(clock.now())
    message["Message-ID"] = f"<{mail_id.hex}@{_domain_of(sender)}>"
    message["Auto-Submitted"] = "auto-generated"
    told = [(named(title), [named(line) for line in lines]) for title, lines in letter.told]
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
