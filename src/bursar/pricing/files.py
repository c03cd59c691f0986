"""Price lists in files: CSV for spreadsheets, JSON for programs. Both say the same; docs/prices.md shows examples.

CSV has one unit price a line, with a header line; the lines of one model (and one effective_from) make one price:

    provider,model,kind,price_usd,unit,above_input_tokens,when,free,match,effective_from,source
    acme,acme-large,input_tokens,2.50,1M tokens,,,,acme-large;acme-large-20*,,https://acme.example/pricing
    acme,acme-large,output_tokens,10,1M tokens,,,,,,
    acme,acme-large,output_tokens,5,1M tokens,,service_tier=flex,,,,

The first four columns and `unit` are required: naming the unit keeps a price per thousand from being taken for one per
million. JSON is an object with `models`, each with provider, model, rates and, if need be, match, effective_from,
source, context_window, withdrawn; `list`, `title`, `version`, `date` may stand beside. Numbers are read exactly.

Every row is judged by itself; a list with a rejected row is not imported at all.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time
from typing import Any, Final

from bursar.money import NotAnAmount, parse_usd
from bursar.pricing.lists import ALWAYS, ListedModel, PriceList, Prices, Segment
from bursar.pricing.models import BadRule, ProviderName, Rule, compile_rule
from bursar.pricing.prices import UNITS, UTC_TIME, Rate, Variant, check_rates, check_window

OWN_LIST: Final = "own"
OWN_RANK: Final = 100
LARGEST_FILE: Final = 20 * 1024 * 1024

_REQUIRED_COLUMNS: Final = ("provider", "model", "kind", "price_usd", "unit")
_OPTIONAL_COLUMNS: Final = (
    "above_input_tokens", "minimum", "when", "free", "match", "effective_from", "source", "context_window", "withdrawn",
)  # fmt: skip
_RATE_FIELDS: Final = frozenset({"kind", "price_usd", "unit", "above_input_tokens", "minimum", "when", "free"})
_MODEL_FIELDS: Final = frozenset(
    {"provider", "model", "rates", "match", "effective_from", "source", "context_window", "withdrawn"}
)
_LIST_FIELDS: Final = frozenset({"list", "title", "version", "date", "models"})
_LONGEST_NAME: Final = 200


@dataclass(frozen=True, slots=True)
class RowError:
    """A rejected row. place: 'line 7' of a CSV, '#/models/3/rates/0' of a JSON document."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class ReadList:
    """What a file says: the list of its good rows, and the rows that were rejected."""

    prices: PriceList
    errors: tuple[RowError, ...]


@dataclass
class _Draft:
    """One model as its rows come in. by_instant: rates and variants of each effective_from."""

    provider: str
    model: str
    place: str
    match: list[Any] = field(default_factory=list)
    context_window: int | None = None
    by_instant: dict[datetime, _Point] = field(default_factory=dict)


@dataclass
class _Point:
    """The rows of one model and one instant."""

    place: str
    source: str = ""
    withdrawn: bool = False
    rows: int = 0
    rates: list[Rate] = field(default_factory=list)
    variants: dict[tuple[tuple[str, str], ...], list[Rate]] = field(default_factory=dict)


class _Rejected(ValueError):
    """This row is not usable; the message says why."""


def read(text: str, *, list_name: str = OWN_LIST, title: str = "", version: str = "") -> ReadList:
    """A file's text, CSV or JSON (it begins with '{' then), as a list and its rejected rows."""
    if len(text) > LARGEST_FILE:
        return _rejected_whole(list_name, f"larger than {LARGEST_FILE} characters")
    text = text.removeprefix("\ufeff")
    reader = _Reader()
    about: dict[str, Any] = {}
    try:
        if text.lstrip().startswith("{"):
            about = reader.read_json(text)
        else:
            reader.read_csv(text)
    except _Rejected as error:
        return _rejected_whole(list_name, str(error))
    prices = reader.price_list(
        name=about.get("list", list_name),
        title=about.get("title", title),
        version=about.get("version", version),
        day=about.get("date"),
    )
    return ReadList(prices, tuple(reader.errors))


def _rejected_whole(list_name: str, reason: str) -> ReadList:
    return ReadList(_Reader().price_list(name=list_name, title="", version="", day=None), (RowError("file", reason),))


class _Reader:
    """Collects rows into drafts, and what is wrong with rows into errors."""

    def __init__(self) -> None:
        self.errors: list[RowError] = []
        self._drafts: dict[tuple[str, str], _Draft] = {}

    def read_csv(self, text: str) -> None:
        rows = csv.reader(io.StringIO(text, newline=""), strict=True)
        try:
            header = [name.strip() for name in next(rows, [])]
            _check_header(header)
            for values in rows:
                if any(value.strip() for value in values):
                    self._csv_row(f"line {rows.line_num}", header, values)
        except csv.Error as error:
            raise _Rejected(f"not CSV: {error} (line {rows.line_num})") from error

    def _csv_row(self, place: str, header: list[str], values: list[str]) -> None:
        with self._judging(place):
            if len(values) != len(header):
                raise _Rejected(f"{len(values)} values for {len(header)} columns")
            row: dict[str, Any] = {n: v.strip() for n, v in zip(header, values, strict=True) if v.strip()}
            row["match"] = [each.strip() for each in row.get("match", "").split(";") if each.strip()]
            row["when"] = dict(_pair(each) for each in row.get("when", "").split(";") if each.strip())
            point = self._point(place, row)
            if not _flag(row, "withdrawn"):
                point.rows += 1
                if "unit" not in row:
                    raise _Rejected("the unit is missing")
                _add_rate(point, row)

    def read_json(self, text: str) -> dict[str, Any]:
        """Collects the models; returns what the document says about the list."""
        try:
            document = json.loads(text, parse_float=str, parse_constant=str, object_pairs_hook=_without_twins)
        except RecursionError as error:
            raise _Rejected("nested too deeply") from error
        except ValueError as error:
            raise _Rejected(f"not JSON: {error}") from error
        if not isinstance(document, dict) or not isinstance(document.get("models"), list):
            raise _Rejected("the document has no list of models")
        about = _about(document)
        for number, model in enumerate(document["models"]):
            self._json_model(f"#/models/{number}", model)
        return about

    def _json_model(self, place: str, model: Any) -> None:
        with self._judging(place):
            _check_fields(model, _MODEL_FIELDS)
            point = self._point(place, model)
            rates = model.get("rates", [])
            if not isinstance(rates, list):
                raise _Rejected("rates are not a list")
            for number, rate in enumerate(rates):
                point.rows += 1
                with self._judging(f"{place}/rates/{number}"):
                    _check_fields(rate, _RATE_FIELDS)
                    _add_rate(point, rate)

    def _point(self, place: str, row: Mapping[str, Any]) -> _Point:
        """The draft of a row's model and instant, with what the row says about them."""
        provider, model = _name(row, "provider").lower(), _name(row, "model")
        rules = [_match_rule(each) for each in _list_of(row, "match")]
        window = _optional_count(row, "context_window")
        instant = parse_instant(row.get("effective_from"))
        draft = self._drafts.setdefault((provider, model), _Draft(provider, model, place))
        draft.match.extend(rule for rule in rules if rule not in draft.match)
        draft.context_window = window if window is not None else draft.context_window
        point = draft.by_instant.setdefault(instant, _Point(place))
        point.source = str(row.get("source") or point.source)
        point.withdrawn = point.withdrawn or _flag(row, "withdrawn")
        return point

    def _judging(self, place: str) -> _Judging:
        return _Judging(self.errors, place)

    def price_list(self, *, name: str, title: str, version: str, day: date | None) -> PriceList:
        """The list of what was good; models with something wrong stand among the errors."""
        models = tuple(model for draft in self._drafts.values() if (model := self._model(draft)) is not None)
        providers = dict.fromkeys(model.provider for model in models)
        return PriceList(
            name=name,
            title=title or f"Price list {name}",
            version=version,
            date=day,
            rank=OWN_RANK,
            providers=tuple(ProviderName(each, place, None) for place, each in enumerate(providers)),
            models=models,
        )

    def _model(self, draft: _Draft) -> ListedModel | None:
        segments = []
        for instant, point in sorted(draft.by_instant.items()):
            if point.rows and not (point.rates or point.variants or point.withdrawn):
                continue  # each of its rows was rejected for itself
            with self._judging(point.place):
                segments.append(Segment(instant, _prices(point), point.source))
        if not segments:
            return None
        rules: list[Rule] = [
            {"equals": draft.model},
            *(rule for rule in draft.match if rule != {"equals": draft.model}),
        ]
        rule = rules[0] if len(rules) == 1 else {"or": rules}
        return ListedModel(draft.provider, draft.model, rule, tuple(segments), draft.context_window)


class _Judging:
    """A block whose rejection is noted under its place, and goes no further."""

    def __init__(self, errors: list[RowError], place: str) -> None:
        self._errors = errors
        self._place = place

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, _Rejected):
            return False
        self._errors.append(RowError(self._place, str(error)))
        return True


def _prices(point: _Point) -> Prices | None:
    if point.withdrawn:
        if point.rates or point.variants:
            raise _Rejected("a withdrawn price has no rates")
        return None
    try:
        for rates in (point.rates, *point.variants.values()):
            check_rates(rates)
        return Prices.of(point.rates, [Variant(when, tuple(rates)) for when, rates in point.variants.items()])
    except ValueError as error:
        raise _Rejected(str(error)) from error


def _add_rate(point: _Point, row: Mapping[str, Any]) -> None:
    """Read one unit price and put it to the standard ones or to those of its conditions."""
    rate = parse_rate(row)
    when = _when(row.get("when", {}))
    if when:
        point.variants.setdefault(when, []).append(rate)
    else:
        point.rates.append(rate)


def parse_rate(row: Mapping[str, Any]) -> Rate:
    """A unit price from the fields kind, price_usd and, if need be, unit, above_input_tokens, minimum, free.

    Raises:
        ValueError
    """
    kind = row.get("kind")
    if not isinstance(kind, str) or kind not in UNITS:
        raise _Rejected(f"no such kind: {kind!r}; kinds are {', '.join(UNITS)}")
    if row.get("unit", UNITS[kind]) != UNITS[kind]:
        raise _Rejected(f"{kind} is priced per {UNITS[kind]}, not per {row['unit']!r}")
    value = row.get("price_usd")
    if not isinstance(value, str | int) or isinstance(value, bool):
        raise _Rejected("the price is missing" if value is None else f"not a decimal amount: {value!r}")
    try:
        return Rate(
            kind=kind,
            price_nano_usd=parse_usd(str(value)),
            above_input_tokens=_optional_count(row, "above_input_tokens") or 0,
            minimum=_optional_count(row, "minimum") or 0,
            free=_flag(row, "free"),
        )
    except (NotAnAmount, ValueError) as error:
        raise _Rejected(str(error)) from error


def _when(conditions: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(conditions, dict) or not all(isinstance(each, str) and each for each in conditions.values()):
        raise _Rejected("conditions are texts by name")
    window = conditions.get(UTC_TIME)
    if window is not None:
        try:
            check_window(window)
        except ValueError as error:
            raise _Rejected(str(error)) from error
    return tuple(sorted(conditions.items()))


def _match_rule(value: Any) -> Rule:
    """'acme-large' equals, 'acme-large-*' begins, an object is a rule as bursar.pricing.models knows it."""
    if isinstance(value, str) and value.strip("*"):
        return {"starts_with": value[:-1]} if value.endswith("*") else {"equals": value}
    try:
        compile_rule(value)
    except BadRule as error:
        raise _Rejected(str(error)) from error
    rule: Rule = value
    return rule


def _about(document: Mapping[str, Any]) -> dict[str, Any]:
    unknown = document.keys() - _LIST_FIELDS
    if unknown:
        raise _Rejected(f"unknown fields: {', '.join(sorted(unknown))}")
    about = {name: document[name] for name in ("list", "title", "version") if name in document}
    for name, value in about.items():
        if not isinstance(value, str) or not value:
            raise _Rejected(f"{name} is not a text")
    if "date" in document:
        about["date"] = parse_instant(document["date"]).date()
    return about


def _check_header(header: list[str]) -> None:
    missing = [name for name in _REQUIRED_COLUMNS if name not in header]
    unknown = [name for name in header if name not in (*_REQUIRED_COLUMNS, *_OPTIONAL_COLUMNS)]
    if missing:
        raise _Rejected(f"missing columns: {', '.join(missing)}")
    if unknown or len(set(header)) != len(header):
        raise _Rejected(f"unknown or repeated columns: {', '.join(unknown) or ', '.join(header)}")


def _check_fields(value: Any, allowed: frozenset[str]) -> None:
    if not isinstance(value, dict):
        raise _Rejected("not an object")
    unknown = value.keys() - allowed
    if unknown:
        raise _Rejected(f"unknown fields: {', '.join(sorted(unknown))}")


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of two fields with one name JSON takes the last; in a price list that is a mistake."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice in one object")
    return found


def _name(row: Mapping[str, Any], field_name: str) -> str:
    value = row.get(field_name)
    if not isinstance(value, str) or not value.strip() or len(value) > _LONGEST_NAME or not value.isprintable():
        raise _Rejected(f"{field_name} is missing or no name")
    return value.strip()


def _list_of(row: Mapping[str, Any], field_name: str) -> list[Any]:
    value = row.get(field_name, [])
    if not isinstance(value, list):
        raise _Rejected(f"{field_name} is not a list")
    return value


def _optional_count(row: Mapping[str, Any], field_name: str) -> int | None:
    value = row.get(field_name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str) or not str(value).isascii():
        raise _Rejected(f"{field_name} is not a whole number")
    if not str(value).isdigit() or len(str(value)) > 15:
        raise _Rejected(f"{field_name} is not a whole number: {value!r}")
    return int(value)


def _flag(row: Mapping[str, Any], field_name: str) -> bool:
    value = row.get(field_name, False)
    if isinstance(value, str) and value.lower() in ("true", "yes", "false", "no"):
        return value.lower() in ("true", "yes")
    if not isinstance(value, bool):
        raise _Rejected(f"{field_name} is neither true nor false: {value!r}")
    return value


def parse_instant(value: Any) -> datetime:
    """'2026-12-01' (midnight UTC) or an RFC 3339 time with offset; nothing: since always.

    Raises:
        ValueError
    """
    if value is None:
        return ALWAYS
    try:
        if len(value) == len("2026-12-01"):
            return datetime.combine(date.fromisoformat(value), time(), tzinfo=UTC)
        instant = datetime.fromisoformat(value)
    except (TypeError, ValueError) as error:
        raise _Rejected(f"not a date or time: {value!r}") from error
    if instant.tzinfo is None:
        raise _Rejected(f"a time without its offset from UTC: {value!r}")
    return instant.astimezone(UTC)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name.strip() and equals and value.strip()):
        raise _Rejected(f"not a condition: {text!r}; write size=1024x1024;quality=hd")
    return name.strip(), value.strip()
