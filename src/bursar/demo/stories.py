"""What a sample company is made of: people, keys, credits and use, all told relative to today."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from bursar.credits.grants import USUAL_PRIORITY, GrantSource
from bursar.credits.limits import AllocationKind, LimitAction, Period, Scope
from bursar.demo.requests import Mix, Model
from bursar.demo.rhythm import When
from bursar.identity.organizations import Kind
from bursar.identity.roles import Role

MEMBER = (Role.MEMBER,)


@dataclass(frozen=True, slots=True, kw_only=True)
class Person:
    """Somebody who belongs to a company, known by address. weight: their part of use that is not told by name.

    key: name of the key they use; None: their own sessions.
    """

    name: str
    email: str
    roles: tuple[Role, ...] = MEMBER
    department: str | None = None
    team: str | None = None
    weight: int = 0
    key: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """A key of the company; owner: a member's address, None for a service. is_deleted: revoked when all is told.

    provider: the only one it is used for; None: any.
    """

    name: str
    owner: str | None = None
    provider: str | None = None
    department: str | None = None
    is_deleted: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """Credits that are added. at: where the span begins; until: where that span begins; pool_of: whose personal pool.

    credits: None is what is needed for the company's `available` to come out.
    """

    at: When
    credits: int | None
    until: When | None = None
    source: GrantSource = GrantSource.PURCHASE
    priority: int = USUAL_PRIORITY
    is_free: bool = False
    pool_of: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """An allocation of the shared pool to a person."""

    at: When
    person: str
    credits: int
    kind: AllocationKind = AllocationKind.RESERVED
    period: Period = Period.NONE


@dataclass(frozen=True, slots=True, kw_only=True)
class Cap:
    """A limit in credits; target: a person's address, a key's, team's or department's name; None: the company."""

    at: When
    scope: Scope
    target: str | None
    credits: int
    period: Period = Period.MONTH
    action: LimitAction = LimitAction.STOPS
    model_filter: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Use:
    """Use over a span: so many credits, exactly, in about so many requests.

    people, keys: exact credits of each, or None: people by weight, each through their own key.
    is_one_conversation: all of it, however long. is_exact: False where a mark-up makes charges that no sum can meet.
    """

    when: When
    credits: int
    requests: int
    mix: Mix
    people: Mapping[str, int] | None = None
    keys: Mapping[str, int] | None = None
    is_one_conversation: bool = False
    is_exact: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusals:
    """Requests that a limit refuses. credits: what each would hold."""

    when: When
    person: str
    key: str | None
    count: int
    credits: int
    model: Model
    detail: Literal["cap_reached", "allocation_exhausted", "pool_exhausted"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """A person goes to another department."""

    at: When
    person: str
    department: str
    team: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Stray:
    """A request that came through a key nobody knows; the provider billed it, so it is booked."""

    at: When
    credits: int
    model: Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Company:
    """One sample company. story: the sentence printed beside its link; joined: how many days ago it came.

    departments: teams by department. admin, member: whose links and keys are printed. available: credits that are
    spendable at the end, exactly, where a grant leaves its amount open. holds: whether the last days' requests are
    authorized and settled, as the gateway does, and not deducted.
    """

    slug: str
    name: str
    story: str
    people: tuple[Person, ...]
    admin: str
    member: str
    joined: int = 400
    kind: Kind = "company"
    zone: str = "Europe/Paris"
    currency: str = "USD"
    is_shared: bool = True
    shows_margin: bool = False
    markup_ppm: int | None = None
    departments: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    keys: tuple[Key, ...] = ()
    grants: tuple[Grant, ...] = ()
    available: int | None = None
    shares: tuple[Share, ...] = ()
    caps: tuple[Cap, ...] = ()
    uses: tuple[Use, ...] = ()
    refusals: tuple[Refusals, ...] = ()
    moves: tuple[Move, ...] = ()
    strays: tuple[Stray, ...] = ()
    holds: bool = False
    is_small: bool = False
