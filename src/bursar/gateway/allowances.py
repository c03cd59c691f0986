"""Which models an organization, its teams and its keys may use, and what an organization calls them itself.

A call has names: what was asked for, the provider's name of the model, and provider/model. A rule's pattern is put to
all of them, a denial to the part behind the last slash too. What any rule denies is refused. Where a scope
(organization, team or key) allows anything, it refuses all else; every scope that a call is in must let it through.
Without rules everything is allowed.

A fallback is judged by itself: that the name asked for is allowed says nothing about whom else a route asks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from time import monotonic
from typing import Any, Final, Literal
from uuid import UUID

from bursar import db
from bursar.audit.events import Actor, record
from bursar.clock import uuid7
from bursar.credits.why import header_text
from bursar.gateway.providers import QUERIES
from bursar.identity.api_keys import ApiKeyNotFound, get_api_key
from bursar.identity.memberships import MemberNotFound, get_membership
from bursar.identity.organizations import Organization
from bursar.problems import Problem

Scope = Literal["organization", "team", "key"]
Effect = Literal["allow", "deny"]

CACHE_SECONDS: Final = 5.0
MOST_CACHED: Final = 20_000
MOST_RULES: Final = 500
MOST_ALIASES: Final = 500
LONGEST_NAME: Final = 200
SHOWN_PATTERNS: Final = 5


class ModelNotAllowed(Problem):
    """A rule of the organization keeps this model from the caller."""

    status, code, title = 403, "model_not_allowed", "This model is not allowed here"


class InvalidModelRule(Problem):
    """A rule needs a pattern of 1 to 200 printable characters, and an organization has at most 500 rules."""

    status, code, title = 422, "invalid_model_rule", "This rule cannot be made"


class ModelRuleNotFound(Problem):
    """No such rule in this organization."""

    status, code, title = 404, "model_rule_not_found", "No such rule"


class InvalidModelAlias(Problem):
    """An alias needs two names, and stands for a model, never for another alias."""

    status, code, title = 422, "invalid_model_alias", "This alias cannot be made"


class ModelAliasNotFound(Problem):
    """No such alias in this organization."""

    status, code, title = 404, "model_alias_not_found", "No such alias"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRule:
    """A rule about models.

    scope_name: of the team or key; the organization's own name. set_by: who made it; None: the operator.
    keys: of a rule about a key, that key and those that replaced it.
    """

    organization_id: UUID
    rule_id: UUID
    scope: Scope
    scope_id: UUID
    scope_name: str | None
    effect: Effect
    pattern: str
    created_at: datetime
    set_by: str | None
    keys: Sequence[UUID] = ()

    def as_json(self) -> dict[str, Any]:
        """As in `why.rule`."""
        return {
            "id": f"rule_{self.rule_id.hex}",
            "scope": self.scope,
            "scope_name": self.scope_name,
            "effect": self.effect,
            "pattern": self.pattern,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAlias:
    """A name of an organization's own and what it stands for: a name that everybody can ask for."""

    organization_id: UUID
    alias: str
    alias_id: UUID
    model: str
    created_at: datetime


@dataclass(frozen=True, slots=True)
class Caller:
    """Whose call is judged. slug: the organization's; None: of nobody in particular."""

    slug: str
    team_id: UUID | None = None
    api_key_id: UUID | None = None


@dataclass(frozen=True, slots=True)
class Names:
    """What the model of a call is called.

    asked: by the client, and what that stands for; the name asked for comes first. provider, model: whom the call goes
    to; '' where nobody serves it. stands_in: it is a fallback, which nobody asked for.
    """

    asked: tuple[str, ...]
    provider: str = ""
    model: str = ""
    stands_in: bool = False

    def to_allow(self) -> set[str]:
        """Names by which it can be allowed."""
        own = {self.model, f"{self.provider}/{self.model}"} if self.provider else set()
        return own if self.stands_in else {*self.asked, *own}

    def to_deny(self) -> set[str]:
        """Names by which it can be denied: all, and the bare one, since resellers put the maker's name before it."""
        own = {self.model, f"{self.provider}/{self.model}"} if self.provider else set()
        return {*self.asked, *own, *(name.rpartition("/")[2] for name in (*self.asked, self.model) if name)}


@dataclass(frozen=True, slots=True)
class _Judged:
    """A rule with its pattern made ready."""

    rule: ModelRule
    fits: Callable[[str], object] = field(repr=False)

    def fits_any(self, names: Iterable[str]) -> bool:
        return any(self.fits(name) for name in names)


class Allowances:
    """All rules and aliases of one organization at one moment; pure."""

    def __init__(self, rules: Sequence[ModelRule], aliases: Sequence[ModelAlias] = ()) -> None:
        self._rules = [_Judged(rule, _matcher(rule.pattern)) for rule in rules]
        self.aliases: Mapping[str, str] = {each.alias: each.model for each in aliases}

    @property
    def has_rules(self) -> bool:
        """Whether anything has to be judged."""
        return bool(self._rules)

    def asked_names(self, model: str) -> tuple[str, ...]:
        """The name as asked and, behind an alias, what it stands for, which comes last."""
        real = self.aliases.get(model)
        return (model,) if real is None else (model, real)

    def require(self, caller: Caller, names: Names) -> None:
        """Refuse what a rule keeps from the caller.

        Raises:
            ModelNotAllowed
        """
        if not self._rules:
            return
        denied, allowed = names.to_deny(), names.to_allow()
        applying = [each for each in self._rules if _applies(each.rule, caller)]
        for each in applying:
            if each.rule.effect == "deny" and each.fits_any(denied):
                raise _refusal(caller, names, (each.rule,))
        for scope in ("organization", "team", "key"):
            allowing = [each for each in applying if each.rule.scope == scope and each.rule.effect == "allow"]
            if allowing and not any(each.fits_any(allowed) for each in allowing):
                raise _refusal(caller, names, tuple(each.rule for each in allowing))

    def allows(self, caller: Caller, names: Names) -> bool:
        """Whether `require` lets it through."""
        try:
            self.require(caller, names)
        except ModelNotAllowed:
            return False
        return True


def _applies(rule: ModelRule, caller: Caller) -> bool:
    if rule.scope == "team":
        return rule.scope_id == caller.team_id
    if rule.scope == "key":
        return caller.api_key_id is not None and caller.api_key_id in (rule.scope_id, *rule.keys)
    return True


def _matcher(pattern: str) -> Callable[[str], object]:
    """Whether a name fits: '%' stands for anything, whatever the case. No provider tells models apart by case."""
    expression = ".*".join(map(re.escape, pattern.split("%")))
    return re.compile(expression, re.IGNORECASE | re.DOTALL).fullmatch


def _refusal(caller: Caller, names: Names, rules: Sequence[ModelRule]) -> ModelNotAllowed:
    """rules: the one that denies, or those of the scope whose allow-list does not have the model."""
    first = rules[0]
    asked = f"{names.provider}/{names.model}" if names.stands_in else names.asked[0]
    asked = asked[:LONGEST_NAME]
    whose = (
        "the organization" if first.scope == "organization" else f"the {first.scope} {first.scope_name or ''}".strip()
    )
    shown = ", ".join(rule.pattern for rule in rules[:SHOWN_PATTERNS])
    more = ", …" if len(rules) > SHOWN_PATTERNS else ""
    what = f"{whose} does not allow {shown}" if first.effect == "deny" else f"{whose} allows {shown}{more} only"
    owner = first.set_by
    ask = owner or "an administrator of the organization"
    next_step = f"Choose a model that GET /v1/models lists, or ask {ask} to allow {asked}."
    return ModelNotAllowed(
        f"{asked!r} is not allowed: {what}. {next_step}",
        why={
            "allowed": False,
            "code": ModelNotAllowed.code,
            "model": asked,
            "provider": names.provider or None,
            "rule": first.as_json(),
            "rules": [rule.as_json() for rule in rules],
            "owner": owner,
            "next_step": next_step,
            "request_url": f"/o/{caller.slug}",
        },
        headers={"x-should-retry": "false", "Bursar-Binding-Limit": header_text(what)},
    )


class AllowanceFinder:
    """Rules and aliases for calls, from memory for at most CACHE_SECONDS."""

    def __init__(self, database: db.Database, *, clock: Callable[[], float] = monotonic) -> None:
        self._database = database
        self._clock = clock
        self._found: dict[UUID, tuple[float, Allowances]] = {}

    async def of(self, organization_id: UUID) -> Allowances:
        """What an organization has, at most CACHE_SECONDS old."""
        until, found = self._found.get(organization_id, (0.0, None))
        if found is not None and self._clock() < until:
            return found
        asked_at = self._clock()
        async with self._database.tenant(organization_id) as conn:
            found = await load_allowances(conn, organization_id=organization_id)
        if len(self._found) >= MOST_CACHED:
            self._found.clear()
        self._found[organization_id] = (asked_at + CACHE_SECONDS, found)
        return found


async def load_allowances(conn: db.Connection, *, organization_id: UUID) -> Allowances:
    """Rules and aliases as they are now."""
    return Allowances(
        await list_model_rules(conn, organization_id=organization_id),
        await list_model_aliases(conn, organization_id=organization_id),
    )


async def caller_of(
    conn: db.Connection, organization: Organization, *, user_id: UUID | None, api_key_id: UUID | None
) -> Caller:
    """Whose call it would be: the key's own team goes before its owner's. Who is unknown here is in no team."""
    team_id = None
    with suppress(ApiKeyNotFound, MemberNotFound):
        if api_key_id is not None:
            key = await get_api_key(conn, organization_id=organization.organization_id, api_key_id=api_key_id)
            team_id, user_id = key.team_id, user_id or key.user_id
        if team_id is None and user_id is not None:
            member = await get_membership(conn, organization_id=organization.organization_id, user_id=user_id)
            team_id = member.team_id
    return Caller(organization.slug, team_id, api_key_id)


async def list_model_rules(conn: db.Connection, *, organization_id: UUID) -> list[ModelRule]:
    """Every rule of an organization: the whole organization's first, then by team and key; denials before the rest."""
    return await db.fetch_all(conn, ModelRule, QUERIES.model_rules, organization_id=organization_id)


async def add_model_rule(
    conn: db.Connection,
    *,
    organization_id: UUID,
    effect: Effect,
    pattern: str,
    by: Actor,
    scope: Scope = "organization",
    scope_id: UUID | None = None,
    created_by: UUID | None = None,
) -> ModelRule:
    """Allow or deny models from now on (within seconds in running processes). The same rule again changes nothing.

    scope_id: of the team, or of the first key of a chain of rotations. created_by: the person behind a key that acts.

    Raises:
        InvalidModelRule
    """
    pattern = pattern.strip()
    if not 1 <= len(pattern) <= LONGEST_NAME or not pattern.isprintable():
        raise InvalidModelRule(f"A pattern has 1 to {LONGEST_NAME} printable characters, with % for anything.")
    assert (scope == "organization") == (scope_id is None)
    there = {
        (each.scope, each.scope_id, each.effect, each.pattern): each
        for each in await list_model_rules(conn, organization_id=organization_id)
    }
    wanted = (scope, scope_id or organization_id, effect, pattern)
    if wanted in there:
        return there[wanted]
    if len(there) >= MOST_RULES:
        raise InvalidModelRule(f"There are {MOST_RULES} rules already: a pattern with % stands for many models.")
    rule_id = uuid7()
    await db.execute(
        conn,
        QUERIES.add_model_rule,
        organization_id=organization_id,
        rule_id=rule_id,
        scope=scope,
        scope_id=scope_id or organization_id,
        effect=effect,
        pattern=pattern,
        created_by=by.user_id or created_by,
    )
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="model_rule.added",
        object_id=rule_id,
        new={"scope": scope, "scope_id": scope_id, "effect": effect, "pattern": pattern},
    )
    rules = await list_model_rules(conn, organization_id=organization_id)
    return next(each for each in rules if (each.scope, each.scope_id, each.effect, each.pattern) == wanted)


async def remove_model_rule(conn: db.Connection, *, organization_id: UUID, rule_id: UUID, by: Actor) -> None:
    """Take a rule away; the audit keeps it.

    Raises:
        ModelRuleNotFound
    """
    rules = await list_model_rules(conn, organization_id=organization_id)
    rule = next((each for each in rules if each.rule_id == rule_id), None)
    if rule is None or not await db.execute(
        conn, QUERIES.remove_model_rule, organization_id=organization_id, rule_id=rule_id
    ):
        raise ModelRuleNotFound
    old = {"scope": rule.scope, "scope_id": rule.scope_id, "effect": rule.effect, "pattern": rule.pattern}
    await record(conn, organization_id=organization_id, by=by, action="model_rule.removed", object_id=rule_id, old=old)


async def list_model_aliases(conn: db.Connection, *, organization_id: UUID) -> list[ModelAlias]:
    """Every alias of an organization, by name."""
    return await db.fetch_all(conn, ModelAlias, QUERIES.model_aliases, organization_id=organization_id)


async def put_model_alias(
    conn: db.Connection, *, organization_id: UUID, alias: str, model: str, by: Actor
) -> ModelAlias:
    """Let a name of the organization's own stand for a model, or change what it stands for.

    Raises:
        InvalidModelAlias: a name that cannot be, an alias of an alias, or too many.
    """
    for name in (alias, model):
        if not 1 <= len(name) <= LONGEST_NAME or not name.isprintable() or name != name.strip():
            raise InvalidModelAlias(f"A model's name has 1 to {LONGEST_NAME} printable characters.")
    there = {each.alias: each for each in await list_model_aliases(conn, organization_id=organization_id)}
    if alias == model or model in there:
        raise InvalidModelAlias(f"{model!r} is an alias itself: an alias stands for a model.")
    if any(each.model == alias for each in there.values()):
        raise InvalidModelAlias(f"Another alias stands for {alias!r}: an alias stands for a model.")
    old = there.get(alias)
    if old is None and len(there) >= MOST_ALIASES:
        raise InvalidModelAlias(f"There are {MOST_ALIASES} aliases already.")
    new = await db.fetch_one(
        conn,
        ModelAlias,
        QUERIES.put_model_alias,
        organization_id=organization_id,
        alias=alias,
        alias_id=uuid7() if old is None else old.alias_id,
        model=model,
        created_by=by.user_id,
    )
    if new != old:
        await record(
            conn,
            organization_id=organization_id,
            by=by,
            action="model_alias.added" if old is None else "model_alias.changed",
            object_id=new.alias_id,
            old=None if old is None else {"alias": alias, "model": old.model},
            new={"alias": alias, "model": model},
        )
    return new


async def remove_model_alias(conn: db.Connection, *, organization_id: UUID, alias: str, by: Actor) -> None:
    """Take an alias away.

    Raises:
        ModelAliasNotFound
    """
    old = await db.fetch_optional(
        conn, ModelAlias, QUERIES.remove_model_alias, organization_id=organization_id, alias=alias
    )
    if old is None:
        raise ModelAliasNotFound(f"There is no alias {alias[:100]!r}.")
    await record(
        conn,
        organization_id=organization_id,
        by=by,
        action="model_alias.removed",
        object_id=old.alias_id,
        old={"alias": alias, "model": old.model},
    )
