"""Which model a name means: 'gpt-4o-2024-08-06' is priced as 'gpt-4o'.

A rule has the JSON form that genai-prices uses: {"equals": "gpt-5"}, {"starts_with": ...}, {"ends_with": ...},
{"contains": ...}, {"regex": ...}, {"or": [rules]}, {"and": [rules]}. Case does not matter; a regex is searched in the
lower-case name. Within a provider the first rule that fits decides, in the order of the list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, Final

Rule = Mapping[str, Any]
_Test = Callable[[str], bool]

_COMPACT_DATE: Final = re.compile(r"-(20\d{2})(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])(?=-|:|$)", re.ASCII)
_DEEPEST_RULE: Final = 5


class BadRule(ValueError):
    """The rule has none of the documented forms."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A model of a list and how to know it. position: its place in the provider's list; the first that fits wins."""

    provider: str
    model: str
    position: int
    rule: Rule
    context_window: int | None = None


@dataclass(frozen=True, slots=True)
class ProviderName:
    """A provider of a list. rule: other names of it; fallbacks: whose models it resells, tried in this order."""

    provider: str
    position: int
    rule: Rule | None
    fallbacks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Candidate:
    """Under which provider and model a price may stand. borrowed: found at a provider whose models this one resells."""

    provider: str
    model: str
    borrowed: bool = False


class NameIndex:
    """The rules of one list, ready to be asked. Pure, deterministic, and needs no library."""

    def __init__(self, providers: Iterable[ProviderName], models: Iterable[ModelName]) -> None:
        self._providers = sorted(providers, key=lambda provider: provider.position)
        self._provider_tests = [(each, compile_rule(each.rule)) for each in self._providers if each.rule is not None]
        by_provider: dict[str, list[ModelName]] = {}
        for model in models:
            by_provider.setdefault(model.provider, []).append(model)
        self._models = {provider: _ModelIndex(of_provider) for provider, of_provider in by_provider.items()}

    def find(self, provider: str, name: str) -> Candidate | None:
        """The model that a provider's name means, or None.

        A date written '-20251211' is tried as '-2025-12-11' when the name as it stands means nothing.
        """
        known = self._find_provider(provider.lower().strip())
        if known is None:
            return None
        name = name.lower()
        found = self._match(known, name)
        if found is None and (dashed := _with_dashed_date(name)) != name:
            found = self._match(known, dashed)
        return found

    def _find_provider(self, name: str) -> ProviderName | None:
        for provider in self._providers:
            if provider.provider == name:
                return provider
        return next((provider for provider, fits in self._provider_tests if fits(name)), None)

    def _match(self, provider: ProviderName, name: str) -> Candidate | None:
        for borrowed, owner in enumerate((provider.provider, *provider.fallbacks)):
            index = self._models.get(owner)
            model = index.find(name) if index is not None else None
            if model is not None:
                return Candidate(owner, model, borrowed=borrowed > 0)
        return None


class _ModelIndex:
    """Rules of one provider: plain equalities in a dictionary, the rest tried in order."""

    def __init__(self, models: Sequence[ModelName]) -> None:
        self._exact: dict[str, tuple[int, str]] = {}
        self._tests: list[tuple[int, str, _Test]] = []
        for model in sorted(models, key=lambda model: model.position):
            for alternative in _alternatives(model.rule):
                if set(alternative) == {"equals"}:
                    self._exact.setdefault(str(alternative["equals"]).lower(), (model.position, model.model))
                else:
                    self._tests.append((model.position, model.model, compile_rule(alternative)))

    def find(self, name: str) -> str | None:
        position, found = self._exact.get(name, (None, None))
        for place, model, fits in self._tests:
            if position is not None and place >= position:
                break
            if fits(name):
                return model
        return found


def compile_rule(rule: Any, *, depth: int = 0) -> _Test:
    """A rule as a test of a lower-case name.

    Raises:
        BadRule
    """
    if not isinstance(rule, Mapping) or len(rule) != 1 or depth > _DEEPEST_RULE:
        raise BadRule(f"not a match rule: {str(rule)[:80]}")
    ((form, value),) = rule.items()
    if form in ("or", "and"):
        return _compile_group(form, value, depth)
    if not isinstance(value, str) or not value:
        raise BadRule(f"a rule {form!r} needs a text")
    return _compile_text(form, value)


def _compile_group(form: str, rules: Any, depth: int) -> _Test:
    if not isinstance(rules, Sequence) or isinstance(rules, str) or not rules:
        raise BadRule(f"a rule {form!r} needs a list of rules")
    tests = [compile_rule(rule, depth=depth + 1) for rule in rules]
    if form == "or":
        return lambda name: any(fits(name) for fits in tests)
    return lambda name: all(fits(name) for fits in tests)


def _compile_text(form: str, value: str) -> _Test:
    wanted = value.lower()
    match form:
        case "equals":
            return lambda name: name == wanted
        case "starts_with":
            return lambda name: name.startswith(wanted)
        case "ends_with":
            return lambda name: name.endswith(wanted)
        case "contains":
            return lambda name: wanted in name
        case "regex":
            return _compile_regex(value)
    raise BadRule(f"no such form of rule: {form!r}")


def _compile_regex(value: str) -> _Test:
    try:
        pattern = re.compile(value)
    except re.error as error:
        raise BadRule(f"not a regular expression: {value!r} ({error})") from error
    return lambda name: pattern.search(name) is not None


def _alternatives(rule: Rule) -> Iterator[Rule]:
    """The rules of which any suffices."""
    if set(rule) == {"or"}:
        for each in rule["or"]:
            yield from _alternatives(each)
    else:
        yield rule


def _with_dashed_date(name: str) -> str:
    """'gpt-5.2-20251211' -> 'gpt-5.2-2025-12-11', where the digits are a date."""
    return _COMPACT_DATE.sub(_dashed, name)


def _dashed(match: re.Match[str]) -> str:
    try:
        return f"-{date(int(match[1]), int(match[2]), int(match[3])).isoformat()}"
    except ValueError:
        return match[0]
