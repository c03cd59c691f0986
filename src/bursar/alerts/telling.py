"""What an alert says: what is used and left in its unit, what happens at 100 %, when it resets, and the next step."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

from bursar.credits.filters import on_what
from bursar.money import Micros, format_credits

_HAPPENS = {
    "pool": "calls are refused until credits are added",
    "allocation": "this member's calls are refused",
    "open_part": "this member goes on in the part of the pool that nobody reserved",
    "stops": "calls that go beyond it are refused",
    "warns": "nothing is refused: this limit only warns",
    "asks": "calls that go beyond it wait for somebody's approval",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """What a balance is, whose, and what it does when it is full. People stand in texts by their ids."""

    kind: str
    pool_name: str | None
    pool_kind: str | None
    when_empty: str | None
    scope: str
    metric: str
    model_filter: str | None
    period: str
    action: str
    user_id: UUID | None
    scope_name: str | None
    lead_user_id: UUID | None
    slug: str
    zone: str

    @property
    def name(self) -> str:
        """What people call it."""
        if self.kind in ("pool", "open"):
            part = ": what nobody reserved" if self.kind == "open" else ""
            return f"{self.pool_name or 'Credits'}{self._whose}{part}"
        if self.kind == "allocation":
            return f"Share{self._whose} of the {(self.pool_name or 'shared credits').lower()}"
        per = "" if self.period == "none" else f" per {self.period}"
        return f"{self.scope.capitalize()} cap on {self.metric}{per}{on_what(self.model_filter)}{self._whose}"

    @property
    def _whose(self) -> str:
        if self.scope_name:
            return f" of “{self.scope_name}”"
        return f" of {person(self.user_id)}" if self.user_id else ""

    @property
    def at_full(self) -> str:
        """What happens at 100 %, as a word: stops, warns, asks, open_part."""
        if self.kind == "allocation" and self.when_empty == "open_part":
            return "open_part"
        return self.action

    @property
    def happens(self) -> str:
        """The same as a sentence's end."""
        if self.at_full == "stops" and self.kind in ("pool", "allocation"):
            return _HAPPENS[self.kind]
        return _HAPPENS[self.at_full]

    @property
    def next_step(self) -> str:
        """The command that mends it."""
        if self.kind in ("pool", "open"):
            return f"bursar credits add AMOUNT --org {self.slug}"
        if self.kind == "allocation":
            whom = f" --user {person(self.user_id)}" if self.user_id else ""
            return f"bursar credits allocate AMOUNT --org {self.slug}{whom}"
        if self.action == "asks":
            return f"bursar caps request --org {self.slug}, or bursar caps raise by whoever decides"
        return f"bursar caps list --org {self.slug}, then bursar caps set or raise"

    def amount(self, value: int) -> str:
        """A value in the unit of the balance, without the unit."""
        return format_credits(Micros(value)) if self.metric == "credits" else str(value)


def person(user_id: UUID | None) -> str:
    """How a text names somebody: e-mails put the name in."""
    return f"usr_{user_id.hex}" if user_id else "nobody"


def resets(subject: Subject, period_end: datetime | None) -> str:
    """When it begins anew, in the organization's zone."""
    if period_end is None:
        return "It does not reset."
    local = period_end.astimezone(ZoneInfo(subject.zone))
    return f"It begins anew on {local:%a} {local.day} {local:%b %Y, %H:%M} ({subject.zone})."


def level_payload(
    subject: Subject,
    *,
    rule_id: UUID,
    measure: str,
    threshold: int,
    passed: Sequence[int],
    used: int,
    limit: int,
    left: int,
    period_end: datetime | None,
) -> dict[str, Any]:
    """What is told of a balance that reached a level. limit: what 100 % is; of a pool its present grants."""
    is_full = (measure, threshold) in (("percent", 100), ("left", 0))
    unit, rest = subject.metric, subject.amount(left)
    amounts = f"{subject.amount(used)} of {subject.amount(limit)} {unit} are used, {rest} are left."
    state = f"{threshold} % used" if measure == "percent" else f"{rest} {unit} left"
    return {
        "title": f"{subject.name}: {'used up' if is_full else state}",
        "text": [
            amounts,
            f"{'Now' if is_full else 'At 100 %'} {subject.happens}.",
            resets(subject, period_end),
            f"Next: {subject.next_step}",
        ],
        "rule_id": f"rul_{rule_id.hex}",
        "measure": measure,
        "threshold": str(threshold) if measure == "percent" else subject.amount(threshold),
        "passed": [str(each) if measure == "percent" else subject.amount(each) for each in passed],
        "name": subject.name,
        "scope": subject.scope,
        "user_id": person(subject.user_id) if subject.user_id else None,
        "used": subject.amount(used),
        "limit": subject.amount(limit),
        "left": subject.amount(left),
        "unit": subject.metric,
        "at_100": subject.at_full,
        "resets_at": period_end.isoformat() if period_end else None,
        "next_step": subject.next_step,
    }


def refusal_payload(subject: Subject, *, refusals: int) -> dict[str, Any]:
    """What is told of refusals, once an hour for each balance that refuses."""
    many = "1 request was" if refusals == 1 else f"{refusals} requests were"
    return {
        "title": f"{subject.name}: requests are refused",
        "text": [f"{many} refused in the last hour because of it.", f"Next: {subject.next_step}"],
        "refusals": refusals,
        "name": subject.name,
        "scope": subject.scope,
        "user_id": person(subject.user_id) if subject.user_id else None,
        "next_step": subject.next_step,
    }


def grant_payload(
    subject: Subject, *, has_expired: bool, grant_id: UUID, source: str, amount: int, left: int, expires_at: datetime
) -> dict[str, Any]:
    """What is told of a grant before and after its end. left: at most this much before, exactly what was lost after."""
    local = expires_at.astimezone(ZoneInfo(subject.zone))
    on = f"{local:%a} {local.day} {local:%b %Y, %H:%M} ({subject.zone})"
    said = (
        f"{subject.amount(left)} of {subject.amount(amount)} credits were not used and expired on {on}."
        if has_expired
        else f"Up to {subject.amount(left)} of {subject.amount(amount)} credits expire on {on} unless they are used."
    )
    return {
        "title": f"{subject.name}: credits {'have expired' if has_expired else 'expire soon'}",
        "text": [said, f"Next: bursar credits grants --org {subject.slug}"],
        "grant_id": f"grt_{grant_id.hex}",
        "source": source,
        "amount": subject.amount(amount),
        "left": subject.amount(left),
        "unit": "credits",
        "expires_at": expires_at.isoformat(),
        "next_step": f"bursar credits grants --org {subject.slug}",
    }
