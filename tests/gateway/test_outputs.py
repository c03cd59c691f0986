"""How much output a call without a limit is held for: by what such calls put out lately."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest
from tests.conftest import Org
from tests.gateway.conftest import Payer

from bursar import db
from bursar.clock import uuid7
from bursar.gateway import outputs
from bursar.gateway.outputs import (
    FIRST_OUTPUT_TOKENS,
    KNOWN_ENOUGH,
    RECENT,
    Guess,
    Outputs,
    Recent,
)
from bursar.identity.principals import Principal

HELLO = [{"role": "user", "content": "hello there"}]


def guess_of(*seen: int) -> Guess:
    recent = Recent()
    for tokens in seen:
        recent.note(tokens)
    return recent.guess()


def principal(organization_id: UUID, user_id: UUID | None = None, api_key_id: UUID | None = None) -> Principal:
    return cast(Principal, SimpleNamespace(organization_id=organization_id, user_id=user_id, api_key_id=api_key_id))


def test_of_what_nothing_is_known_of_a_long_answer_is_held() -> None:
    assert guess_of() == Guess(FIRST_OUTPUT_TOKENS, 0)


def test_the_prior_fades_with_the_square_of_what_is_known() -> None:
    # 100 tokens and a margin of a quarter are 125, and of the 875 to the prior a quarter, a ninth, a hundredth.
    assert guess_of(100) == Guess(125 + 219, 1)
    assert guess_of(100, 100) == Guess(125 + 98, 2)
    assert guess_of(*[100] * 9) == Guess(125 + 9, 9)
    assert guess_of(*[100] * RECENT) == Guess(126, RECENT)


def test_who_puts_out_more_than_the_prior_is_held_for_more_at_once() -> None:
    assert guess_of(4_000).tokens == 5_000


def test_it_is_the_95th_percentile_that_counts_and_no_single_long_answer() -> None:
    assert guess_of(*[100] * 57, *[5_000] * 3).tokens == 126
    assert guess_of(*[100] * 56, *[5_000] * 4).tokens == 6_250
    assert guess_of(*range(1, 21)).tokens == -(-19 * 125 // 100) + -(-(1_000 - 24) // 21**2)


def test_only_the_last_ones_count_and_never_more_than_so_many_are_kept() -> None:
    recent = Recent()
    for tokens in range(10 * RECENT):
        recent.note(tokens)
    assert len(recent) == RECENT
    for _ in range(RECENT):
        recent.note(8)
    assert recent.guess() == Guess(11, RECENT)


async def test_keys_and_models_are_known_apart_and_who_was_not_seen_for_longest_is_forgotten(
    org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outputs, "MOST_KNOWN", 3)
    known = Outputs(org.database)
    dana, theirs = (principal(org.organization_id, api_key_id=uuid7()) for _ in range(2))
    known.note(dana, "m1", 50)
    assert known.guess(dana, "m1").seen == 1
    assert known.guess(dana, "m2") == known.guess(theirs, "m1") == Guess(FIRST_OUTPUT_TOKENS, 0)
    for number in range(2):
        known.note(theirs, f"m{number}", 50)
    known.note(dana, "m1", 50)
    known.note(theirs, "m2", 50)
    assert known.guess(dana, "m1").seen == 2
    assert known.guess(theirs, "m0").seen == 0, "it was the oldest"
    for _ in range(5):
        known.read_soon(uuid7())
    assert len(known._read_at) <= 3
    await known.close()


async def test_another_process_reads_what_the_ledger_knows_of_calls_without_a_limit(payer: Payer) -> None:
    body = {"model": "demo-1", "messages": HELLO}
    for tokens in (40, 50, 60):
        await payer.post(body, bursar_demo=f"output_tokens={tokens}")
    await payer.post({**body, "max_tokens": 7})
    await payer.post(body, bursar_demo="usage=missing")
    elsewhere = Outputs(payer.org.database)
    asker = principal(payer.org.organization_id, payer.user_id, payer.api_key_id)
    elsewhere.note(asker, "demo-1", 900)
    assert elsewhere.guess(asker, "demo-1").seen == 1
    await elsewhere.read(payer.org.organization_id)
    assert elsewhere.guess(asker, "demo-1") == guess_of(40, 50, 60), "whichever knows more is kept"
    assert elsewhere.guess(principal(payer.org.organization_id, payer.user_id), "demo-1").seen == 0


async def test_a_reading_that_began_earlier_is_not_enough_and_one_is_shared_by_all_who_ask(
    org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Outputs(org.database)
    readings: list[str] = []

    async def read(self: Outputs, organization_id: UUID) -> None:
        readings.append("begun")
        await asyncio.sleep(0.02)
        readings.append("ended")

    monkeypatch.setattr(Outputs, "_read", read)
    known.read_soon(org.organization_id)
    await asyncio.sleep(0)
    await asyncio.gather(*(known.read(org.organization_id) for _ in range(20)))
    assert readings == ["begun", "ended"] * 2


async def test_history_that_cannot_be_read_is_none_and_no_call_fails_for_it(
    org: Org, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = Outputs(org.database)
    monkeypatch.setattr(outputs, "QUERIES", replace_query("select no_such_column"))
    await known.read(org.organization_id)
    assert known.guess(principal(org.organization_id, uuid7()), "m") == Guess(FIRST_OUTPUT_TOKENS, 0)


def replace_query(text: str) -> Any:
    return SimpleNamespace(recent_outputs=text)


def test_from_a_few_outputs_on_nobody_else_is_asked() -> None:
    assert [guess_of(*[9] * seen).may_be_better_known for seen in (0, KNOWN_ENOUGH - 1, KNOWN_ENOUGH)] == [
        True,
        True,
        False,
    ]


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise in the main thread, also where an event loop gives nobody a turn."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError("the event loop stood still")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def test_who_asks_in_the_moment_at_which_a_reading_ends_does_not_hold_everybody_up(database: db.Database) -> None:
    known, organization_id = Outputs(database), uuid7()
    known.read_soon(organization_id)
    reading = known._reading[organization_id]
    await asyncio.wait({reading})
    known._reading[organization_id] = reading  # as it is until the loop has called back
    asyncio.get_running_loop().call_later(0.05, known._reading.pop, organization_id)
    with _at_most(10):
        await known.read(organization_id)
    assert organization_id not in known._reading
    await known.close()
