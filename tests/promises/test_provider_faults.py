"""R18: whatever a provider does wrong, a call is charged once, by its report or our count, and its hold ends."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from tests.conftest import Org
from tests.gateway import sounds
from tests.gateway.conftest import Payer, fund
from tests.gateway.scripted import HURRIED, Cable, Provider, served
from tests.promises.figures import SEED, figure, tell

from bursar import db
from bursar.gateway.endpoints import ENDPOINTS
from bursar.money import Micros
from bursar.settings import Settings

HELLO = [{"role": "user", "content": "hello there"}]
ESTIMATED = 4
OUTPUT = 20


@dataclass(frozen=True)
class Way:
    """A way to call, and what it comes to: micros for the input and for a token put out."""

    path: str
    body: dict[str, Any]
    input_micros: int
    token_micros: int
    stream: bool = False

    def __str__(self) -> str:
        return f"{self.path}{' streamed' if self.stream else ''}"

    def costs(self, tokens: int = OUTPUT) -> int:
        """Micros of a call that puts out so many tokens."""
        return self.input_micros + tokens * self.token_micros


CHAT = {"model": "demo-1", "max_tokens": OUTPUT, "messages": HELLO}
RESPONSE = {"model": "demo-1", "max_output_tokens": OUTPUT, "input": "hello there"}
CLAUDE = {"model": "demo-claude", "max_tokens": OUTPUT, "messages": HELLO}
WAYS = [
    Way(path, {**body, "stream": stream}, input_micros, token_micros, stream)
    for path, body, input_micros, token_micros in (
        ("/v1/chat/completions", CHAT, 1_000, 400),
        ("/v1/responses", RESPONSE, 1_000, 400),
        ("/v1/messages", CLAUDE, 2_100, 1_500),
    )
    for stream in (False, True)
]


@dataclass(frozen=True)
class Outcome:
    """What must come of a call. charged: the micros of its row, or a range of them; None: there is no row."""

    status: int
    charged: tuple[int, int] | None
    estimated: bool | None = False  # None: it may be either
    code: str = ""  # of the error in the answer or at the end of the stream


def nothing(status: int, code: str = "") -> Outcome:
    return Outcome(status, None, code=code)


def exactly(micros: int, *, estimated: bool = False, code: str = "") -> Outcome:
    return Outcome(200, (micros, micros), estimated, code)


def no_answer() -> str:
    """Directions to wait for longer than we do."""
    return f"delay_ms={int(HURRIED.first_byte_seconds * 1000) + 2000}"


def no_first_token(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    return no_answer(), nothing(504, "provider_timeout")


def cut(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    """In the middle of the answer. What came of a stream before the cut may be lost on its way."""
    if not way.stream:
        return f"break_after={rng.choice([0, 1])}", nothing(502, "provider_broke_off")
    pieces = rng.randrange(1, OUTPUT)
    charged = (way.costs(0), way.costs(pieces))
    return f"break_after={pieces}; piece_ms=2", Outcome(200, charged, True, "provider_broke_off")


def cut_at_once(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    """Before anything was said; a Claude begins by reporting its input and a first token."""
    if not way.stream:
        return "break_after=0", nothing(502, "provider_broke_off")
    return "break_after=0", Outcome(200, (way.costs(0), way.costs(1)), True, "provider_broke_off")


def no_usage(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    """The demo provider counts as we do, so that our count is what it would have said."""
    return "usage=missing", exactly(way.costs(), estimated=True)


def refused(rng: random.Random) -> tuple[str, Outcome]:
    status = rng.choice([429, 500, 503, 529])
    return f"fail={status}", nothing(status)


def refusal(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    return refused(rng)


def error_event(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    """A stream that the provider itself ends with an error; a plain call does not know that."""
    if not way.stream:
        return "", exactly(way.costs())
    pieces = rng.randrange(1, OUTPUT)
    return f"error_after={pieces}; piece_ms=1", exactly(way.costs(pieces), estimated=True)


def slow_drip(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    return f"delay_ms={rng.randrange(300)}; piece_ms={rng.randrange(20, 60)}", exactly(way.costs())


def another_usage(way: Way, rng: random.Random) -> tuple[str, Outcome]:
    """Far less than was held for, or far more."""
    tokens = rng.choice([0, 1, 5, 10 * OUTPUT, 50 * OUTPUT])
    return f"output_tokens={tokens}", exactly(way.costs(tokens))


FAULTS: list[Callable[[Way, random.Random], tuple[str, Outcome]]] = [
    no_first_token,
    cut,
    cut_at_once,
    no_usage,
    refusal,
    error_event,
    slow_drip,
    another_usage,
]


@pytest.fixture(scope="module")
async def stage(priced: db.Database, settings: Settings) -> AsyncIterator[tuple[Provider, str]]:
    """A provider that counts its calls, and an application in front of it that waits for seconds, not minutes."""
    provider = Provider()
    async with served(priced, settings, provider, Cable(priced.dsn("bursar_lane"))) as (base_url, _):
        yield provider, base_url


@pytest.fixture
async def payer(org: Org, stage: tuple[Provider, str]) -> Payer:
    await fund(org, Micros(10**12))
    key = await org.key(org.admin)
    return Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=stage[1])


async def rows_once_quiet(payer: Payer) -> dict[str, list[Any]]:
    """(charged, flags, kind) of the rows by request id, once nothing is held."""
    for _ in range(200):
        if await payer.rows("select 1 from credits.holds") == []:
            break
        await asyncio.sleep(0.05)
    else:
        raise AssertionError("something stays held")
    found: dict[str, list[Any]] = {}
    for request_id, *row in await payer.rows("select request_id, charged_micros, flags, kind from ledger.attribution"):
        found.setdefault(f"req_{request_id.hex}", []).append(row)
    return found


def assert_charged(
    rows: dict[str, list[Any]], expected: dict[str, tuple[str, Outcome]], *, is_free: bool = False
) -> None:
    """Each call has the one row that it must have, or none."""
    assert rows.keys() == {name for name, (_, outcome) in expected.items() if outcome.charged is not None}
    for name, charges in rows.items():
        directions, outcome = expected[name]
        [(charged, flags, kind)] = charges
        assert kind == 0
        assert outcome.charged is not None
        least, most = outcome.charged
        assert least <= charged <= most, directions
        assert (charged == 0) == is_free, "never 0 by accident"
        assert outcome.estimated in (None, bool(flags & ESTIMATED)), directions


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda each: each.__name__)
async def test_a_fault_of_a_provider_is_charged_by_its_report_or_our_count_and_once(
    payer: Payer, stage: tuple[Provider, str], fault: Callable[..., tuple[str, Outcome]], way: Way
) -> None:
    rng = random.Random(SEED)
    headers = {"authorization": f"Bearer {payer.key}"}
    expected: dict[str, tuple[str, Outcome]] = {}
    many = asyncio.Semaphore(20)

    async def call(http: httpx2.AsyncClient, directions: str, outcome: Outcome) -> None:
        async with many:
            answer = await http.post(way.path, json=way.body, headers={"bursar-demo": directions} if directions else {})
        assert answer.status_code == outcome.status, f"{directions}: {answer.text}"
        assert outcome.code in answer.text, f"{directions}: {answer.text}"
        expected[answer.headers["x-request-id"]] = directions, outcome

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=payer.base_url, headers=headers, timeout=30, limits=limits) as http:
        await asyncio.gather(*(call(http, *fault(way, rng)) for _ in range(figure("faults"))))
    rows = await rows_once_quiet(payer)
    assert_charged(rows, expected)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (sum(row[0][0] for row in rows.values()), 0)
    told = Counter(outcome.status for _, outcome in expected.values())
    tell(f"{fault.__name__}, {way}: {len(expected)} calls, statuses {dict(told)}, {len(rows)} charged")


# -- work that is no talk


@dataclass(frozen=True)
class Work:
    """Something else that a provider does. costs: micros of it; is_stream: it comes piece by piece, or as events."""

    path: str
    body: dict[str, Any]
    costs: int
    is_stream: bool = False
    reports: bool = True  # whether the answer says what it is to be billed by
    file: bytes | None = None

    def __str__(self) -> str:
        return f"{self.path} {self.body['model']}{' streamed' if self.is_stream else ''}"

    def calling(self, http: httpx2.AsyncClient, directions: str) -> AbstractAsyncContextManager[httpx2.Response]:
        """The answer as it begins."""
        given: dict[str, Any] = {"json": self.body}
        if self.file is not None:
            given = {"data": self.body, "files": {"file": ("sound.wav", self.file, "audio/wav")}}
        return http.stream("POST", self.path, headers={"bursar-demo": directions}, **given)


TEXT = {"input": "hello there", "voice": "alloy"}
SOUND = sounds.wav(2)
WORKS = [
    Work("/v1/embeddings", {"model": "demo-embedding", "input": "hello there"}, 6),
    Work("/v1/images/generations", {"model": "demo-image", "prompt": "a cat"}, 4_000_000, reports=False),
    Work(
        "/v1/images/generations",
        {"model": "demo-image-tokens", "prompt": "a cat", "quality": "low", "size": "1024x1024", "stream": True},
        2 * 500 + 196 * 3_000,
        is_stream=True,
    ),
    Work("/v1/audio/speech", {"model": "demo-speech", **TEXT}, 16_500, is_stream=True, reports=False),
    Work(
        "/v1/audio/speech",
        {"model": "demo-speech-tokens", "stream_format": "sse", **TEXT},
        3 * 60 + 16 * 1_200,
        is_stream=True,
    ),
    Work("/v1/audio/transcriptions", {"model": "demo-transcribe"}, 20_000, file=SOUND),
    Work(
        "/v1/audio/transcriptions",
        {"model": "demo-transcribe-tokens", "stream": "true"},
        20 * 600 + 6 * 1_000,
        is_stream=True,
        file=SOUND,
    ),
    Work("/v1/audio/translations", {"model": "demo-transcribe"}, 20_000, file=SOUND),
    Work("/v1/responses/compact", RESPONSE, 9_000),
    Work("/v1/messages/count_tokens", {"model": "demo-claude", "messages": HELLO}, 0, reports=False),
]


# By fault: directions to the provider, and what must come of it. A status of 0 is a connection that is cut:
# sound has no place for an error.
WORK_FAULTS: dict[str, Callable[[Work, random.Random], tuple[str, Outcome]]] = {
    "no first token": lambda work, rng: (no_answer(), nothing(504, "provider_timeout")),
    "refusal": lambda work, rng: refused(rng),
    "slow drip": lambda work, rng: (f"delay_ms={rng.randrange(300)}; piece_ms=30", exactly(work.costs)),
    "no usage": lambda work, rng: ("usage=missing", exactly(work.costs, estimated=work.reports)),
    "cut": lambda work, rng: cut_work(work, rng.randrange(4)),
}


def cut_work(work: Work, pieces: int) -> tuple[str, Outcome]:
    """A stream is charged as far as it came; what is behind its last piece may be cut off without loss."""
    if not work.is_stream:
        return f"break_after={pieces}", nothing(502, "provider_broke_off")
    return f"break_after={pieces}; piece_ms=2", Outcome(200 if work.reports else 0, (1, work.costs), None)


@pytest.mark.parametrize("work", WORKS, ids=str)
async def test_a_fault_in_other_work_is_charged_by_its_report_or_our_count_and_once(payer: Payer, work: Work) -> None:
    rng = random.Random(SEED)
    headers = {"authorization": f"Bearer {payer.key}"}
    expected: dict[str, tuple[str, Outcome]] = {}
    many = asyncio.Semaphore(20)

    async def call(http: httpx2.AsyncClient, directions: str, outcome: Outcome) -> None:
        async with many, work.calling(http, directions) as answer:
            name = answer.headers["x-request-id"]
            try:
                text = (await answer.aread()).decode(errors="replace")
                status = answer.status_code
            except httpx2.RemoteProtocolError:
                text, status = "", 0
        assert status == outcome.status, f"{directions}: {text}"
        assert outcome.code in text, f"{directions}: {text}"
        expected[name] = directions, outcome

    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(base_url=payer.base_url, headers=headers, timeout=30, limits=limits) as http:
        faults = [fault(work, rng) for fault in WORK_FAULTS.values() for _ in range(figure("faults"))]
        rng.shuffle(faults)
        await asyncio.gather(*(call(http, *fault) for fault in faults))
    rows = await rows_once_quiet(payer)
    assert_charged(rows, expected, is_free=work.costs == 0)
    pool = await payer.pool()
    assert (pool.used_micros, pool.held_micros) == (sum(row[0][0] for row in rows.values()), 0)
    tell(f"{work}: {len(expected)} calls, {len(rows)} charged")


def test_no_path_is_left_out() -> None:
    assert ENDPOINTS.keys() == {each.path for each in (*WAYS, *WORKS)}
