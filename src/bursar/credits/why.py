"""Why may this be spent, or not: every limit that applies, which one binds, who set it, when it resets.

The same object is in an error, a response header, the page and `bursar why`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from bursar import db
from bursar.credits.filters import features_of, models_of, on_what, shown
from bursar.money import Micros, format_credits
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.credits")

NEXT_STEPS: Final = {
    "pool_exhausted": "Ask an administrator to top up the organization's credits, or wait until running requests end.",
    "allocation_exhausted": "Ask an administrator for a larger share.",
    "cap_reached": "Wait for its reset, use a model or key that it is not on, or ask whoever set it to raise it.",
    "no_pool": "Ask an administrator to add credits for you.",
    "no_pool_for_model": "Your credits are restricted to other models or features: use those.",
    "key_revoked": "Use another API key.",
    "key_expired": "Use another API key, or ask for this one to be rotated.",
    "key_unknown": "Use an API key of this organization.",
    "not_a_member": "Ask an administrator of the organization to invite you again.",
    "organization_closed": "Ask the platform operator about this organization.",
    "model_not_priced": "Use a model that has a price, or ask an administrator to set one.",
}
"""What to do next, by the code of a refusal."""

CODES: Final = {
    "pool": "pool_exhausted",
    "open": "pool_exhausted",
    "allocation": "allocation_exhausted",
    "limit": "cap_reached",
}


@dataclass(frozen=True, slots=True)
class LimitState:
    """One balance that must allow a request, as it is now. Amounts in micros for credits, else counts.

    leg: 0 applies always; n: the n-th way to pay. zone: IANA name, for showing resets_at. action: of a cap, what it
    does; is_default, within: whether it is everybody's, or everybody's of a team or department. raised_amount: what is
    contained in the limit for a time; raised_until: when the first part of that ends.
    """

    refusal: str | None
    balance_id: UUID | None
    leg: int | None
    metric: str | None
    kind: str | None
    stops: bool | None
    is_strict: bool
    limit_amount: int
    used_amount: int
    held_amount: int
    excess_amount: int
    scope: str
    scope_id: UUID | None
    period: str
    resets_at: datetime | None
    owner_id: UUID | None
    owner_name: str | None
    zone: str
    pool_name: str | None
    model_filter: str | None
    action: str | None = None
    limit_id: UUID | None = None
    is_default: bool = False
    within_scope: str | None = None
    within_name: str | None = None
    raised_amount: int = 0
    raised_until: datetime | None = None

    @property
    def room(self) -> int:
        """What may still be held on it; nothing while there is excess."""
        if self.excess_amount > 0:
            return 0
        return max(0, self.limit_amount - self.used_amount - self.held_amount)

    @property
    def name(self) -> str:
        """What people call it."""
        if self.kind == "pool":
            only = shown(self.model_filter)
            return f"{self.pool_name or 'Credits'}{f': {only}' if only else ''}"
        if self.kind == "open":
            return f"{self.pool_name}: what nobody reserved"
        if self.kind == "allocation":
            return "Your share of the shared credits"
        per = "" if self.period == "none" else f" per {self.period}"
        whose = self.scope.capitalize()
        if self.model_filter and self.scope == "organization":
            whose = "Feature" if features_of(self.model_filter) else "Model"
        return f"{whose} cap on {self.metric}{per}{on_what(self.model_filter)}"

    @property
    def origin(self) -> str | None:
        """Of a cap: whose it is; a default names those it is for."""
        if self.kind != "limit":
            return None
        if not self.is_default:
            return "own" if self.scope != "organization" else "organization"
        each = {"user": "member"}.get(self.scope, self.scope)
        return default_for(each, self.within_scope, self.within_name)

    @property
    def asks(self) -> bool:
        """It stops, but more may be asked for."""
        return self.action == "asks"

    @property
    def next_step(self) -> str:
        """Of a cap that is reached: what helps, of what there is."""
        ways = ["ask for more with `bursar caps request`"] if self.asks else []
        ways += ["wait for the reset"] if self.resets_at is not None else []
        ways += ["use another model"] if models_of(self.model_filter) else []
        ways += ["use another key"] if self.scope == "key" else []
        ways += [] if self.asks else ["ask whoever set the cap to raise it"]
        text = ", or ".join(filter(None, (", ".join(ways[:-1]), ways[-1])))
        return f"{text[0].upper()}{text[1:]}."

    def as_json(self, *, binding: bool) -> dict[str, Any]:
        """As in `why.limits[]`."""
        return {
            "id": f"lim_{self.balance_id.hex}" if self.balance_id else None,
            "name": self.name,
            "scope": self.scope,
            "kind": self.kind,
            "period": self.period,
            "does": "asks" if self.asks else "stops" if self.stops else "warns",
            "strict": self.is_strict,
            "origin": self.origin,
            "models": models_of(self.model_filter),
            "features": features_of(self.model_filter),
            "raised": self._amount(self.raised_amount) if self.raised_amount else None,
            "raised_until": self.raised_until.isoformat() if self.raised_until else None,
            "binding": binding,
            "used": self._amount(self.used_amount),
            "held": self._amount(self.held_amount),
            "limit": self._amount(self.limit_amount),
            "available": self._amount(self.room),
            "overage": self._amount(self.excess_amount),
            "resets_at": self.resets_at.isoformat() if self.resets_at else None,
            "owner": self.owner_name,
        }

    def _amount(self, amount: int) -> dict[str, str]:
        if self.metric == "credits":
            return {"amount": format_credits(Micros(amount)), "unit": "credit"}
        return {"amount": str(amount), "unit": (self.metric or "calls").removesuffix("s")}


def default_for(each: str, within_scope: str | None, within_name: str | None) -> str:
    """What a default is called: 'default for every member of team Research'."""
    return f"default for every {each}" + (f" of {within_scope} {within_name}" if within_scope else "")


@dataclass(frozen=True, slots=True)
class Why:
    """The answer: allowed or not, the limit that binds, and all that apply.

    wanted_micros: what the request asks for; available_micros: what could be spent now.
    """

    allowed: bool
    code: str | None
    wanted_micros: Micros
    available_micros: Micros
    limits: tuple[LimitState, ...]
    binding: LimitState | None

    @property
    def next_step(self) -> str | None:
        """What to do about a refusal."""
        if self.allowed:
            return None
        if self.code == "cap_reached" and self.binding is not None:
            return self.binding.next_step
        return NEXT_STEPS.get(self.code or "", "Ask an administrator.")

    def as_json(self, *, organization: str | None = None) -> dict[str, Any]:
        """The `why` object; organization: its slug, for the link to the page."""
        binding = self.binding
        return {
            "allowed": self.allowed,
            "code": self.code,
            "wanted": {"amount": format_credits(self.wanted_micros), "unit": "credit"},
            "available": {"amount": format_credits(self.available_micros), "unit": "credit"},
            "binding_limit": binding.as_json(binding=True) if binding else None,
            "limits": [each.as_json(binding=each is binding) for each in self.limits],
            "owner": binding.owner_name if binding else None,
            "resets_at": binding.resets_at.isoformat() if binding and binding.resets_at else None,
            "next_step": self.next_step,
            "may_ask": binding is not None and binding.asks and not self.allowed,
            "request_url": f"/o/{organization}" if organization else None,
        }


class InsufficientCredits(Problem):
    """A pool, a share of one, or a cap has no room for this request. Clients do not retry it."""

    status, code, title = 402, "pool_exhausted", "Not enough credits"
    sqlstate = "BR402"


class AllocationExhausted(Problem):
    """The user's share of the shared credits is used up."""

    status, code, title = 402, "allocation_exhausted", "Your share of the credits is used up"


class CapReached(Problem):
    """A cap of the user, key, team, department or organization is reached."""

    status, code, title = 402, "cap_reached", "A spending cap is reached"


class NoPoolForRequest(Problem):
    """There is no balance that could pay for this request."""

    status, code, title = 402, "no_pool", "No credits can pay for this request"


class KeyNoLongerValid(Problem):
    """The API key was revoked or has expired since the request was read."""

    status, code, title = 401, "key_not_valid", "This API key is no longer valid"


class NotAllowedHere(Problem):
    """The user or organization may not spend at all."""

    status, code, title = 403, "not_allowed", "Nothing may be spent here"


_PROBLEMS: Final[dict[str, type[Problem]]] = {
    "pool_exhausted": InsufficientCredits,
    "allocation_exhausted": AllocationExhausted,
    "cap_reached": CapReached,
    "no_pool": NoPoolForRequest,
    "no_pool_for_model": NoPoolForRequest,
    "key_revoked": KeyNoLongerValid,
    "key_expired": KeyNoLongerValid,
    "key_unknown": KeyNoLongerValid,
}


async def why(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID | None,
    api_key_id: UUID | None,
    model: str,
    feature: str | None = None,
    wanted_micros: Micros,
) -> Why:
    """Would this request be allowed now, and what decides it. Asks; moves nothing.

    Raises:
        NotFound: no such organization.
    """
    chain_id = await db.fetch_value(
        conn, QUERIES.current_chain, organization_id=organization_id, user_id=user_id, api_key_id=api_key_id
    )
    states = await db.fetch_all(
        conn,
        LimitState,
        QUERIES.chain,
        organization_id=organization_id,
        chain_id=chain_id,
        model=model,
        feature=feature,
    )
    return judge(states, wanted_micros)


def judge(states: Sequence[LimitState], wanted_micros: Micros) -> Why:
    """The verdict on one call of `wanted_micros` that move_batch would give, from the states of its chain."""
    refusal = states[0].refusal if states else "no_pool"
    limits = tuple(each for each in states if each.balance_id is not None)
    if refusal is not None:
        return Why(False, refusal, wanted_micros, Micros(0), limits, None)
    legs = sorted({each.leg for each in limits if each.leg})
    available = _spendable(limits, legs)
    caps = [each for each in limits if each.leg == 0 and each.stops]
    needs = {"credits": wanted_micros, "calls": 1}
    for cap in caps:
        need = needs.get(cap.metric or "", 0)
        if cap.room < need or cap.excess_amount > 0:
            return Why(
                False,
                "cap_reached" if cap.kind == "limit" else "allocation_exhausted",
                wanted_micros,
                available,
                limits,
                cap,
            )
    tightest = min(
        (each for each in limits if each.stops and each.metric == "credits"), key=lambda each: each.room, default=None
    )
    if not legs:
        return Why(False, "no_pool_for_model", wanted_micros, available, limits, None)
    if _of_legs(limits, legs) < wanted_micros or available == 0:
        first = min((each for each in limits if each.leg == legs[0]), key=lambda each: each.room)
        return Why(False, CODES[first.kind or "pool"], wanted_micros, available, limits, first)
    return Why(True, None, wanted_micros, available, limits, tightest)


def _of_legs(limits: Sequence[LimitState], legs: Sequence[int | None]) -> Micros:
    """What the ways to pay have together; a pool that two of them draw on counts once."""
    left = {each.balance_id: each.room for each in limits if each.leg}
    total = 0
    for leg in legs:
        of_leg = [each.balance_id for each in limits if each.leg == leg]
        take = min(left[balance] for balance in of_leg)
        for balance in of_leg:
            left[balance] -= take
        total += take
    return Micros(total)


def _spendable(limits: Sequence[LimitState], legs: Sequence[int | None]) -> Micros:
    """What could be spent now: what the legs have, under every cap on credits."""
    caps = [each.room for each in limits if each.leg == 0 and each.stops and each.metric == "credits"]
    return Micros(min([_of_legs(limits, legs), *caps]))


async def limits_passed(
    conn: db.Connection,
    *,
    organization_id: UUID,
    user_id: UUID | None,
    api_key_id: UUID | None,
    model: str,
    feature: str | None = None,
) -> tuple[LimitState, ...]:
    """What a call that was let through a moment ago had to pass, as it is now. Locks nothing; empty: nobody called."""
    chain_id = await db.fetch_value(
        conn, QUERIES.chain_in_use, organization_id=organization_id, user_id=user_id, api_key_id=api_key_id
    )
    states = await db.fetch_all(
        conn,
        LimitState,
        QUERIES.chain,
        organization_id=organization_id,
        chain_id=chain_id,
        model=model,
        feature=feature,
    )
    return tuple(each for each in states if each.balance_id is not None)


def may_stop(limits: Sequence[LimitState]) -> tuple[LimitState, ...]:
    """The limits that can stop a further call. Of several ways to pay, the last one that has anything: those before it
    only pass the call on.
    """
    legs = sorted({each.leg for each in limits if each.leg})
    able = [leg for leg in legs if min(each.room for each in limits if each.leg == leg) > 0]
    last = (able or legs or [0])[-1]
    return tuple(each for each in limits if each.stops and each.leg in (0, last))


def decided(answer: Why, *, code: str, binding_id: UUID | None) -> Why:
    """The answer with what move_batch decided a moment ago: it is the decision, this is its explanation."""
    binding = next((each for each in answer.limits if each.balance_id == binding_id), None)
    return replace(answer, allowed=False, code=code, binding=binding)


def refusal(answer: Why, *, organization: str | None = None) -> Problem:
    """The problem that a refused request gets; organization: its slug."""
    code = answer.code or "pool_exhausted"
    problem = _PROBLEMS.get(code, NotAllowedHere)
    detail = answer.binding.name if answer.binding else problem.title
    headers = {"x-should-retry": "false"}
    headers.update(limit_headers(answer.binding))
    headers["Bursar-Available"] = format_credits(answer.available_micros)
    return problem(
        f"{detail}: {format_credits(answer.wanted_micros)} credits are needed, "
        f"{format_credits(answer.available_micros)} are available. {answer.next_step or ''}".strip(),
        why=answer.as_json(organization=organization),
        headers=headers,
    )


def limit_headers(limit: LimitState | None) -> dict[str, str]:
    """The headers that name a limit and say when it begins anew."""
    if limit is None:
        return {}
    resets = {"Bursar-Resets-At": limit.resets_at.isoformat()} if limit.resets_at else {}
    return {"Bursar-Binding-Limit": header_text(limit.name), **resets}


def header_text(text: str) -> str:
    """A name that people gave, as a header may hold it: what is not printable ASCII becomes a question mark."""
    return "".join(character if " " <= character <= "~" else "?" for character in text[:200])
