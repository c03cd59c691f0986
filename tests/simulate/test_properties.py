"""Random scenarios come to what plain integers come to: with resets and recurrence, and with holds of every fate."""

import json
import os
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.credits import reference as ref
from tests.simulate.plain import Grant, told

from bursar import db
from bursar.clock import uuid7
from bursar.simulation.playing import play
from bursar.simulation.report import as_json
from bursar.simulation.scenario import read_scenario

START = datetime(2026, 3, 1, tzinfo=UTC)
HOURS = 60
MANY, FEW = 400, 10
IS_FULL = os.environ.get("BURSAR_TEST_FULL") == "1"
SOME = settings(
    max_examples=MANY if IS_FULL else FEW, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def _at(hour: float) -> str:
    return (START + timedelta(hours=hour)).isoformat()


async def _played(database: db.Database, **scenario: Any) -> dict[str, Any]:
    return as_json(await play(database, read_scenario(json.dumps({"start": _at(0), **scenario}))))


# ---------------------------------------------------------------------------------------------- one pool, no holds


@st.composite
def _grants(draw: st.DrawFn) -> list[Grant]:
    count = draw(st.integers(1, 4))
    found = []
    for number in range(count):
        begins = draw(st.integers(0, HOURS - 2))
        ends = begins + draw(st.integers(1, HOURS)) if draw(st.booleans()) else 10**9
        voided = begins + draw(st.integers(1, HOURS)) if draw(st.integers(0, 3)) == 0 else 10**9
        most = draw(st.sampled_from((0, 5, 50, 10**6)))
        found.append(
            Grant(
                f"g{number}",
                draw(st.integers(1, 100)),
                number,
                begins,
                ends,
                voided,
                draw(st.sampled_from((0, 0, 24, 48))),
                draw(st.integers(0, min(most, 120))),
                most,
            )
        )
    return draw(st.permutations(found))


def _as_told(grant: Grant) -> dict[str, Any]:
    told: dict[str, Any] = {"id": grant.name, "amount": grant.amount, "priority": grant.priority}
    told |= {"effective_at": _at(grant.begins), "min_rollover": grant.least, "max_rollover": grant.most}
    if grant.ends < 10**9:
        told["expires_at"] = _at(grant.ends)
    if grant.voided < 10**9:
        told["voided_at"] = _at(grant.voided)
    if grant.every:
        told["recurrence"] = {"interval": "day", "count": grant.every // 24}
    return told


_HOURLY = st.integers(0, HOURS - 1)


@SOME
@given(
    grants=_grants(),
    usage=st.lists(st.tuples(_HOURLY, st.integers(1, 90)), max_size=8),
    resets=st.lists(st.tuples(st.integers(1, HOURS - 1), st.booleans()), max_size=3, unique_by=lambda each: each[0]),
)
async def test_grants_usage_and_resets_come_to_what_plain_integers_come_to(
    database: db.Database, grants: list[Grant], usage: list[tuple[int, int]], resets: list[tuple[int, bool]]
) -> None:
    hours = sorted({0, HOURS - 1, *(at for at, _ in usage), *(at for at, _ in resets), *(g.begins for g in grants)})
    answer = await _played(
        database,
        grants=[_as_told(grant) for grant in grants],
        usage=[{"at": _at(at), "amount": amount} for at, amount in usage],
        resets=[{"at": _at(at), "preserve_overage": keeps} for at, keeps in resets],
        ask=[_at(at) for at in hours],
    )
    expected = {at: rest for at, *rest in told({"hours": HOURS, "grants": grants, "usage": usage, "resets": resets})}
    for at, found in zip(hours, answer["asked"], strict=True):
        balances, overage = expected[at]
        assert {**dict.fromkeys(balances, 0), **{n: int(v) for n, v in found["grants"].items()}} == balances, at
        assert int(found["overage"]) == overage, at
        assert int(found["balance"]) == sum(balances.values()), at


# ---------------------------------------------------------------------------------------------- holds


_HOLD = st.fixed_dictionaries(
    {
        "at": st.integers(0, HOURS - 10),
        "amount": st.integers(0, 60),
        "lasts": st.sampled_from((1, 5, 200)),
        "sent": st.booleans(),
        "end": st.sampled_from(("settle", "release", "none")),
        "after": st.integers(0, 9),
        "charge": st.integers(0, 80),
    }
)
_PLAIN_GRANT = st.fixed_dictionaries(
    {
        "amount": st.integers(1, 80),
        "priority": st.integers(0, 1),
        "begins": st.integers(0, HOURS // 2),
        "lasts": st.sampled_from((3, 20, 1000)),
        "free": st.booleans(),
    }
)


@SOME
@given(
    grants=st.lists(_PLAIN_GRANT, min_size=1, max_size=4),
    holds=st.lists(_HOLD, max_size=6),
    usage=st.lists(st.tuples(_HOURLY, st.integers(1, 40), st.booleans()), max_size=5),
)
async def test_holds_come_to_what_the_reference_of_the_treasury_comes_to(
    database: db.Database,
    grants: list[dict[str, Any]],
    holds: list[dict[str, Any]],
    usage: list[tuple[int, int, bool]],
) -> None:
    answer = await _played(
        database,
        grants=[
            {
                "id": f"g{n}", "amount": g["amount"], "priority": g["priority"], "effective_at": _at(g["begins"]),
                "expires_at": _at(g["begins"] + g["lasts"]), "is_free": g["free"],
            }
            for n, g in enumerate(grants)
        ],
        holds=[
            {"id": f"h{n}", "at": _at(h["at"]), "amount": h["amount"], "sent": h["sent"],
             "expires_at": _at(h["at"] + h["lasts"] + 0.5)}
            for n, h in enumerate(holds)
        ],
        settles=[
            {"hold": f"h{n}", "at": _at(h["at"] + h["after"] + 0.25), "amount": h["charge"]}
            for n, h in enumerate(holds) if h["end"] == "settle"
        ],
        releases=[
            {"hold": f"h{n}", "at": _at(h["at"] + h["after"] + 0.25)}
            for n, h in enumerate(holds) if h["end"] == "release"
        ],
        usage=[{"at": _at(at), "amount": amount, "enforce": enforce} for at, amount, enforce in usage],
        ask=[_at(hour) for hour in range(0, HOURS, 6)],
    )  # fmt: skip
    for found, expected in zip(answer["asked"], _reference(grants, holds, usage), strict=True):
        balances, overage, used, held = expected
        [pool] = found["pools"]
        assert {name: int(value) for name, value in found["grants"].items()} == balances, found["at"]
        assert (int(pool["overage"]), int(pool["used"]), int(pool["held"])) == (overage, used, held), found["at"]


def _reference(grants: list[dict[str, Any]], holds: list[dict[str, Any]], usage: list[tuple[int, int, bool]]) -> Any:
    """The same, told to the reference: balances of grants, and overage, used and held of the pool."""
    own = ref.Organization(uuid7())
    world = ref.World({own.organization_id: own})
    pool_id = own.open_pool("shared", None, None, START)
    ids = [uuid7() for _ in grants]
    for identifier, g in zip(ids, grants, strict=True):
        begins = START + timedelta(hours=g["begins"])
        ends = begins + timedelta(hours=g["lasts"])
        own.add_grant(identifier, pool_id, g["amount"], g["priority"], g["free"], begins, ends, identifier.hex, START)
    events: list[tuple[float, int, Any]] = []
    requests = [uuid7() for _ in holds]
    for request, h in zip(requests, holds, strict=True):
        lease = int(h["lasts"] * 3600 + 1800)
        flags = ref.SENT if h["sent"] else 0
        events.append((h["at"], 3, _move(own, ref.AUTHORIZE, request, h["amount"], lease=lease, flags=flags)))
        events.append((h["at"] + h["lasts"] + 0.5, 1, None))
        if h["end"] == "settle":
            events.append((h["at"] + h["after"] + 0.25, 2, _move(own, ref.SETTLE, request, h["charge"])))
        elif h["end"] == "release":
            events.append((h["at"] + h["after"] + 0.25, 2, _move(own, ref.RELEASE, request, 0)))
    for at, amount, enforce in usage:
        events.append((at, 4, _move(own, ref.DEDUCT if enforce else ref.SETTLE, uuid7(), amount)))
    events += [(hour, 9, "ask") for hour in range(0, HOURS, 6)]
    for at, _, event in sorted(events, key=lambda each: each[:2]):
        now = START + timedelta(hours=at)
        if event is None:
            world.expire_holds(now)
        elif event == "ask":
            own.fold(now)
            pool = own.balance(pool_id)
            lefts = (own.grants[identifier] for identifier in ids)
            balances = {f"g{n}": g.left if g.state in ("active", "lingering") else 0 for n, g in enumerate(lefts)}
            yield balances, pool.excess, pool.used, pool.held
        else:
            world.move([event], now)


def _move(own: ref.Organization, action: int, request: UUID, amount: int, **rest: Any) -> ref.Move:
    return ref.Move(own.organization_id, action, request, amount=amount, model=None, **rest)
