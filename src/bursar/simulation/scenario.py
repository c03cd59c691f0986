"""Scenarios: the file that `bursar simulate` plays, its JSON Schema, and what is wrong with a file that is none."""

import json
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, NoReturn
from zoneinfo import ZoneInfo

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from bursar.credits.filters import FEATURE
from bursar.credits.grants import USUAL_PRIORITY, GrantSource
from bursar.credits.limits import AllocationKind, LimitAction, Metric, Period, Scope, WhenEmpty
from bursar.credits.pools import PoolKind
from bursar.money import NotAnAmount, parse_credits, parse_usd
from bursar.problems import FieldError, Problem

SCHEMA_ID: Final = "https://json-schema.org/draft/2020-12/schema"
DEFAULT_POOL: Final = "shared"
FOREVER_SECONDS: Final = 2**31 - 1
"""The longest lease that a hold can have: 68 years."""


class InvalidScenario(Problem):
    """The file is no scenario; `errors` names each wrong place."""

    status, code, title = 422, "invalid_scenario", "This is not a scenario that can be played"


# ---------------------------------------------------------------------------------------------- words


def _text_of(value: object) -> str:
    """An amount as written: text, a whole number or an exact decimal."""
    if isinstance(value, bool) or not isinstance(value, str | int | Decimal):
        raise ValueError('write an amount as "12.5" or 12.5')
    return format(value, "f") if isinstance(value, Decimal) else str(value)


def _micros(value: object) -> int:
    try:
        amount = parse_credits(_text_of(value))
    except NotAnAmount as error:
        raise ValueError(f"{error}; credits have at most six decimal places") from None
    if amount < 0:
        raise ValueError("an amount is not negative")
    return amount


def _nano_usd(value: object) -> int:
    try:
        amount = parse_usd(_text_of(value))
    except NotAnAmount as error:
        raise ValueError(f"{error}; dollars have at most nine decimal places") from None
    if amount < 0:
        raise ValueError("an amount is not negative")
    return amount


def _instant(value: object) -> datetime:
    if not isinstance(value, str):
        raise ValueError('write an instant as "2026-03-01T12:00:00Z"')
    try:
        instant = datetime.fromisoformat(value)
    except ValueError:
        raise ValueError(f'{value!r} is no instant; write it as "2026-03-01T12:00:00Z"') from None
    if instant.tzinfo is None:
        raise ValueError(f'{value!r} names no zone; write "{value}Z" for UTC')
    return instant.astimezone(UTC)


def _zone(value: object) -> str:
    try:
        return ZoneInfo(str(value)).key
    except (ValueError, OSError, LookupError):
        raise ValueError(f"{value!r} is no zone of the IANA database, such as Europe/Paris") from None


_DECIMAL_TEXT: Final = {"type": "string", "pattern": r"^\d{1,19}(\.\d{1,18})?$"}
_AMOUNT: Final = {"anyOf": [_DECIMAL_TEXT, {"type": "number", "minimum": 0}]}

Amount = Annotated[
    int, BeforeValidator(_micros), WithJsonSchema({**_AMOUNT, "description": "Credits, exact to 0.000001"})
]
Dollars = Annotated[int, BeforeValidator(_nano_usd), WithJsonSchema({**_AMOUNT, "description": "US dollars"})]
Instant = Annotated[datetime, BeforeValidator(_instant), WithJsonSchema({"type": "string", "format": "date-time"})]
Zone = Annotated[str, BeforeValidator(_zone), WithJsonSchema({"type": "string", "examples": ["Europe/Paris"]})]
Name = Annotated[str, Field(min_length=1, max_length=100)]
Models = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^([^\\]|\\.)+$")]


Feature = Annotated[str, Field(pattern=FEATURE, description="What it is for, as filters that begin with # go by")]


class Part(BaseModel):
    """What everything in a scenario is: nothing beyond the named fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


# ---------------------------------------------------------------------------------------------- people and pools


class Person(Part):
    """A member. Whoever is only named elsewhere is one too, without team and department."""

    id: Name
    team: Name | None = None
    department: Name | None = None


class Key(Part):
    """An API key, a member's or a service's. A key that is only named elsewhere is a service's."""

    id: Name
    user: Name | None = None
    team: Name | None = None
    department: Name | None = None


class Pool(Part):
    """A pool besides the shared one, which is there anyway and is called `shared`."""

    id: Name
    kind: PoolKind = PoolKind.SHARED
    user: Name | None = Field(default=None, description="Whose it is, for a personal pool")
    models: Models | None = Field(
        default=None, description="It pays for these models only; a LIKE pattern such as gpt-%, or of features: #images"
    )


# ---------------------------------------------------------------------------------------------- what is given


class Recurrence(Part):
    """A grant that comes again: its balance is its amount anew, and what was left of it is gone, unless it rolls over.

    A day that a month does not have is its last one; days are those of the scenario's zone.
    """

    interval: Literal["day", "week", "month", "year"]
    count: int = Field(default=1, ge=1, le=1000, description="How many of them")
    anchor: Instant | None = Field(default=None, description="An instant at which it comes; default: effective_at")


class Grant(Part):
    """Credits, spendable from effective_at on and before expires_at."""

    id: Name
    amount: Amount
    pool: Name = DEFAULT_POOL
    priority: int = Field(default=USUAL_PRIORITY, ge=0, le=32767, description="Lower burns first")
    effective_at: Instant | None = Field(default=None, description="Default: the start of the scenario")
    expires_at: Instant | None = Field(default=None, description="Exclusive; default: never")
    voided_at: Instant | None = Field(default=None, description="When what is left is taken back")
    created_at: Instant | None = Field(default=None, description="When it is made; default: the start of the scenario")
    is_free: bool = Field(
        default=False, description="Complimentary: burns before paid credits that end at the same time"
    )
    cost_basis: Dollars = Field(default=0, description="Money paid for it")
    source: GrantSource = GrantSource.PURCHASE
    recurrence: Recurrence | None = None
    min_rollover: Amount | None = Field(default=None, description="At least this much goes on; default: 0")
    max_rollover: Amount | None = Field(default=None, description="At most this much goes on; default: nothing does")
    rolls_over: Literal["at_reset", "at_end"] = Field(
        default="at_reset",
        description="Whether the bounds count at resets, or at its end, and each time that it recurs",
    )
    rollover_expires_at: Instant | None = Field(
        default=None, description="Until when what goes on at its end can be spent; default: for ever"
    )

    @model_validator(mode="after")
    def _ends_after_it_begins(self) -> "Grant":
        if self.expires_at and self.effective_at and self.expires_at <= self.effective_at:
            raise ValueError("expires_at must lie after effective_at")
        return self

    @model_validator(mode="after")
    def _rolls_over_within_bounds(self) -> "Grant":
        if self.min_rollover is not None and self.max_rollover is None:
            raise ValueError("min_rollover needs max_rollover")
        if (self.min_rollover or 0) > (self.max_rollover or 0):
            raise ValueError("min_rollover must not exceed max_rollover")
        if self.rolls_over == "at_end" and self.expires_at is None and self.recurrence is None:
            raise ValueError("what rolls over at the end needs expires_at or recurrence")
        if self.rollover_expires_at and (self.rolls_over != "at_end" or self.recurrence is not None):
            raise ValueError('rollover_expires_at is for a grant that rolls_over "at_end" and does not recur')
        return self


class Allocation(Part):
    """A member's share of a shared pool; the same user and pool again changes it."""

    at: Instant | None = Field(default=None, description="Default: the start of the scenario")
    id: Name | None = None
    user: Name
    amount: Amount
    pool: Name = DEFAULT_POOL
    kind: AllocationKind = AllocationKind.RESERVED
    period: Period = Field(default=Period.NONE, description="For capped shares")
    when_empty: WhenEmpty = WhenEmpty.STOPS
    oversubscribe: bool = False
    ended_at: Instant | None = None


class Limit(Part):
    """A cap; the same scope, metric, period, models and action again changes its amount."""

    at: Instant | None = Field(default=None, description="Default: the start of the scenario")
    id: Name | None = None
    scope: Scope = Scope.ORGANIZATION
    of: Name | None = Field(default=None, description="Which department, team, user or key")
    metric: Metric = Metric.CREDITS
    amount: Amount = Field(description="Credits, or a count of calls or tokens")
    period: Period = Period.NONE
    action: LimitAction = LimitAction.STOPS
    models: Models | None = None
    ended_at: Instant | None = None

    @model_validator(mode="after")
    def _names_what_it_limits(self) -> "Limit":
        if (self.scope is Scope.ORGANIZATION) != (self.of is None):
            raise ValueError("`of` names whom a limit is for, unless it is for the organization")
        if self.metric is not Metric.CREDITS and self.amount % 1_000_000:
            raise ValueError("a count of calls or tokens is a whole number")
        return self


# ---------------------------------------------------------------------------------------------- what happens


class Usage(Part):
    """Credits that were used. Beyond what there is it is overage, unless it is enforced: then it is refused."""

    at: Instant
    amount: Amount
    id: Name | None = None
    user: Name | None = None
    key: Name | None = None
    model: Name | None = None
    feature: Feature | None = None
    tokens: int = Field(default=0, ge=0)
    booked_at: Instant | None = Field(default=None, description="When it became known, where that was later")
    enforce: bool | None = Field(
        default=None, description="Refuse it where there is no room; default: the scenario's `enforce`"
    )

    @model_validator(mode="after")
    def _is_booked_after_it_was_used(self) -> "Usage":
        if self.booked_at and self.booked_at < self.at:
            raise ValueError("booked_at must not lie before at")
        return self


class Hold(Part):
    """Credits reserved for a running request."""

    id: Name
    at: Instant
    amount: Amount
    user: Name | None = None
    key: Name | None = None
    model: Name | None = None
    feature: Feature | None = None
    tokens: int = Field(default=0, ge=0)
    expires_at: Instant | None = Field(default=None, description="When it ends by itself; default: never")
    sent: bool = Field(default=False, description="The call went out: one that ends by itself is charged, not released")
    streamed: bool = Field(
        default=False, description="Ended by itself it is charged what it had used, not all that it held"
    )
    floor: Amount = Field(default=0, description="Used at once by its input; of a stream the least that is charged")


class Extend(Part):
    """Holds more for a running request."""

    hold: Name
    at: Instant
    amount: Amount = 0
    tokens: int = Field(default=0, ge=0)
    used: Amount = Field(default=0, description="What a stream has used so far")
    expires_at: Instant | None = None


class Settle(Part):
    """Charges what a held request has really used, and frees the rest."""

    hold: Name
    at: Instant
    amount: Amount
    tokens: int = Field(default=0, ge=0)


class Release(Part):
    """Frees a hold and charges nothing."""

    hold: Name
    at: Instant


class Refund(Part):
    """Takes back what a usage or a settled hold was charged, to the grants that paid it, the last first."""

    of: Name = Field(description="The id of a usage or hold")
    at: Instant
    amount: Amount | None = Field(default=None, description="Default: all that is left of it")


class Transfer(Part):
    """Moves credits that no hold needs to another pool, in burn order; they keep their priority and their end."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    at: Instant
    from_pool: Name = Field(alias="from")
    to_pool: Name = Field(alias="to")
    amount: Amount | None = Field(default=None, description="Default: all that can be spared")


class Reset(Part):
    """Ends a usage period of a pool: of each grant goes on min(max_rollover, max(min_rollover, its balance))."""

    at: Instant
    pool: Name = DEFAULT_POOL
    preserve_overage: bool = Field(default=False, description="Overage is paid by what goes on; else it is forgiven")


def _reset(value: object) -> object:
    return {"at": value} if isinstance(value, str) else value


class Scenario(Part):
    """A history of one organization, told by the instants at which things happen."""

    model_config = ConfigDict(extra="forbid", frozen=True, title="Bursar scenario")

    description: str | None = None
    source: str | None = Field(default=None, description="Where the figures come from")
    zone: Zone = Field(default="UTC", description="In which days, weeks and months of limits begin")
    start: Instant | None = Field(default=None, description="Default: the earliest instant that is named")
    enforce: bool = Field(
        default=False, description="Whether usage is refused where there is no room, or becomes overage"
    )
    users: list[Person] = []
    keys: list[Key] = []
    pools: list[Pool] = []
    grants: list[Grant] = []
    allocations: list[Allocation] = []
    limits: list[Limit] = []
    usage: list[Usage] = []
    holds: list[Hold] = []
    extends: list[Extend] = []
    settles: list[Settle] = []
    releases: list[Release] = []
    refunds: list[Refund] = []
    transfers: list[Transfer] = []
    resets: list[Annotated[Reset, BeforeValidator(_reset, json_schema_input_type=Reset | str)]] = Field(
        default=[], description="Instants, or objects"
    )
    ask: list[Instant] = Field(default=[], description="Instants of which the figures are printed; default: the last")

    @property
    def begins(self) -> datetime:
        """The instant before which nothing happens."""
        return self.start if self.start is not None else min(_instants(self), default=datetime(2026, 1, 1, tzinfo=UTC))

    @property
    def asked(self) -> list[datetime]:
        """The instants of which figures are wanted, in order."""
        return sorted(set(self.ask)) or [max(_instants(self), default=self.begins)]


def _instants(value: object) -> Iterator[datetime]:
    """Every instant that is named anywhere in a part."""
    if isinstance(value, datetime):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _instants(each)
    elif isinstance(value, Part):
        for name in type(value).model_fields:
            yield from _instants(getattr(value, name))


# ---------------------------------------------------------------------------------------------- reading


def schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a scenario."""
    return {"$schema": SCHEMA_ID, **Scenario.model_json_schema()}


def read_scenario(text: str) -> Scenario:
    """A file's text as a scenario. Numbers are read exactly.

    Raises:
        InvalidScenario: with every wrong place of it.
    """
    try:
        document = json.loads(text, parse_float=Decimal, parse_constant=_no_number)
    except ValueError as error:
        raise InvalidScenario(f"The file is no JSON: {error}") from None
    try:
        scenario = Scenario.model_validate(document)
    except ValidationError as error:
        raise InvalidScenario(
            "Change what is named here; the form is printed by: bursar simulate --schema",
            errors=[_field_error(each) for each in error.errors()],
        ) from None
    wrong = list(_loose_ends(scenario))
    if wrong:
        raise InvalidScenario(
            "Change what is named here; the form is printed by: bursar simulate --schema", errors=wrong
        )
    return scenario


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _field_error(error: Mapping[str, Any]) -> FieldError:
    message = str(error["msg"]).removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        message = "there is no such field"
    return FieldError(_pointer(error["loc"]), message, error["type"])


def _pointer(place: Sequence[str | int]) -> str:
    return "#/" + "/".join(str(each) for each in place)


def _loose_ends(scenario: Scenario) -> Iterator[FieldError]:
    """Names that come twice or name nothing, and instants before the start."""
    for kind in ("users", "keys", "pools", "grants", "allocations", "limits", "usage", "holds"):
        seen: set[str] = {DEFAULT_POOL} if kind == "pools" else set()
        for number, each in enumerate(getattr(scenario, kind)):
            if each.id is not None and each.id in seen:
                yield FieldError(_pointer((kind, number, "id")), f"{each.id!r} comes twice; give it a name of its own")
            seen.add(each.id)
    pools = {DEFAULT_POOL, *(each.id for each in scenario.pools)}
    places = {"grants": ("pool",), "allocations": ("pool",), "resets": ("pool",), "transfers": ("from_pool", "to_pool")}
    for kind, fields in places.items():
        for number, each in enumerate(getattr(scenario, kind)):
            for name in (getattr(each, field) for field in fields):
                if name not in pools:
                    yield FieldError(_pointer((kind, number, "pool")), f"there is no pool {name!r}; add it to `pools`")
    charged = {use.id for use in scenario.usage} | {hold.id for hold in scenario.holds}
    for number, refund in enumerate(scenario.refunds):
        if refund.of not in charged:
            yield FieldError(_pointer(("refunds", number, "of")), f"there is no usage or hold {refund.of!r}")
    holds = {each.id for each in scenario.holds}
    for kind in ("extends", "settles", "releases"):
        for number, each in enumerate(getattr(scenario, kind)):
            if each.hold not in holds:
                yield FieldError(_pointer((kind, number, "hold")), f"there is no hold {each.hold!r}; add it to `holds`")
    for number, pool in enumerate(scenario.pools):
        if (pool.kind is PoolKind.PERSONAL) != (pool.user is not None):
            yield FieldError(_pointer(("pools", number, "user")), "a personal pool names its user, any other none")
    if scenario.start is not None and min(_instants(scenario)) < scenario.start:
        yield FieldError("#/start", "something happens before; take `start` out, or let it be the earliest instant")
