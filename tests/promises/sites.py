"""A site that can be struck: server processes on an embedded, durable database, and clients that ask until they know.

Nothing of it runs in the test's own process but the clients: the database's supervisor is one of the server processes,
and dies with it.
"""

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
from tests.conftest import MASTER_KEY, Org
from tests.gateway.conftest import free_port, wait_until_ready

from bursar import db
from bursar.credits.pools import list_pools
from bursar.credits.verify import verify
from bursar.db.embedded import EmbeddedServer
from bursar.settings import Settings

PATH = "/v1/chat/completions"
CALL: dict[str, Any] = {"model": "demo-1", "max_tokens": 20, "messages": [{"role": "user", "content": "hello there"}]}
CALL_MICROS = 9_000  # 10 tokens of input at 100 micros, 20 of output at 400
INPUT_MICROS, TOKEN_MICROS = 1_000, 400
LEASE_SECONDS = 2
CLIENTS = 8


@dataclass
class Process:
    """A `bursar serve` that can be killed and started again; what it writes goes to a file."""

    environment: dict[str, str]
    log: Path
    port: int = field(default_factory=free_port)
    child: "subprocess.Popen[bytes] | None" = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def is_running(self) -> bool:
        return self.child is not None and self.child.poll() is None

    def launch(self) -> None:
        """Start it and do not wait."""
        command = [sys.executable, "-m", "bursar", "serve", "--port", str(self.port)]
        with self.log.open("ab") as output:
            self.child = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)

    def start(self) -> None:
        """Start it and wait until it serves; again, where what was killed has not let go of the port yet."""
        for _ in range(20):
            self.launch()
            assert self.child is not None
            try:
                wait_until_ready(self.url, self.child)
            except AssertionError:
                if self.is_running:
                    raise
                time.sleep(0.5)
            else:
                return
        raise AssertionError(self.log.read_text()[-3000:])

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self.child is not None
        self.child.send_signal(number)

    def end(self, number: int) -> int:
        """Send a signal and wait for the end; its exit status."""
        self.send(number)
        assert self.child is not None
        return self.child.wait(timeout=60)

    def workers(self) -> list[int]:
        """The server processes that this one supervises."""
        assert self.child is not None
        found = []
        for pid in Path(f"/proc/{self.child.pid}/task/{self.child.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(int(pid))
        return found


@dataclass
class Site:
    """One single process, one that supervises two, and their database."""

    folder: Path
    single: Process
    double: Process
    database: db.Database
    server: EmbeddedServer  # never started here: only asked where the database is

    @property
    def processes(self) -> list[Process]:
        return [self.single, self.double]

    async def start(self) -> None:
        """Whatever does not run."""
        await asyncio.gather(*(asyncio.to_thread(each.start) for each in self.processes if not each.is_running))

    def kill_database(self) -> None:
        """The postmaster; its backends see that it has gone and end."""
        pid = self.server.pid
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    async def assert_books_agree(self) -> None:
        """By every invariant, as soon as the database answers."""
        findings: list[Any] = [None]

        async def answers() -> bool:
            try:
                async with self.database.platform() as conn:
                    findings[:] = await verify(conn)
            except psycopg.OperationalError:
                return False
            return True

        await until(answers, 90)
        assert findings == []


def open_folder(purpose: str) -> Path:
    """A new folder that any user can pass through."""
    folder = Path(tempfile.mkdtemp(prefix=f"bursar-{purpose}-"))
    folder.chmod(0o711)
    return folder


@asynccontextmanager
async def built(data: Path | None = None) -> AsyncIterator[Site]:
    """A site in a folder of its own, of which one process runs; data: the data folder, elsewhere."""
    folder = open_folder("site")
    data = data or folder / "data"
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(data),
        "BURSAR_LEASE_SECONDS": str(LEASE_SECONDS),
        "BURSAR_LOG_LEVEL": "warning",
        "TMPDIR": str(folder / "tmp"),  # what is killed leaves things behind
    }
    single = Process(environment, folder / "single.log")
    double = Process({**environment, "BURSAR_WORKERS": "2"}, folder / "double.log")
    server = EmbeddedServer(data)
    try:
        await asyncio.to_thread(single.start)
        settings = Settings(data_dir=data, database_url=server.dsn, given_master_key=MASTER_KEY)
        async with db.opened(settings, migrate=False) as database:
            yield Site(folder, single, double, database, server)
    finally:
        for process in (double, single):
            if process.is_running:
                await asyncio.to_thread(process.end, signal.SIGTERM)
        await asyncio.to_thread(server.remove)
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Tally:
    """What clients that ask until they know know in the end."""

    keys: int = 0  # with a definite yes
    charged: dict[str, int] = field(default_factory=dict)  # by request id, as acknowledged
    answered: set[str] = field(default_factory=set)  # request ids that are said to be answered, by an earlier try
    cut: dict[str, int] = field(default_factory=dict)  # pieces seen of streams that broke off, by request id
    streaming: int = 0  # streams that run at the moment
    statuses: Counter[int] = field(default_factory=Counter)  # 0: no answer
    unsaid: int = 0  # 503 without Retry-After

    def __str__(self) -> str:
        seen = ", ".join(f"{count} x {status or 'no answer'}" for status, count in sorted(self.statuses.items()))
        return f"{self.keys} keys, {len(self.charged)} acknowledged charges, {len(self.cut)} cut streams ({seen})"


@dataclass(frozen=True)
class Client:
    """A member with a key, and what their organization was charged."""

    org: Org
    key: str
    http: aiohttp.ClientSession

    def post(self, url: str, directions: str = "", *, idempotency_key: str | None = None, **changes: Any) -> Any:
        """A call that is to be awaited with `async with`."""
        headers = {"bursar-demo": directions} if directions else {}
        headers |= {"idempotency-key": idempotency_key} if idempotency_key else {}
        return self.http.post(url + PATH, json={**CALL, **changes}, headers=headers)

    async def rows(self, sql: str) -> list[Any]:
        """Rows of a query over the organization."""
        async with self.org.tenant() as conn:
            cursor = await conn.execute(sql)  # type: ignore[arg-type]
            return await cursor.fetchall()

    async def holds(self) -> list[Any]:
        """(request, is sent, progress) of each."""
        return await self.rows("select request_id, is_sent, progress_micros from credits.holds order by 1")

    async def charges(self) -> list[Any]:
        """(request, kind, charged, flags) of each row of the attribution."""
        return await self.rows("select request_id, kind, charged_micros, flags from ledger.attribution order by 1, 2")

    async def pool(self) -> tuple[int, int]:
        """(used, held) of the pool."""
        async with self.org.tenant() as conn:
            [pool] = await list_pools(conn, organization_id=self.org.organization_id)
        return pool.used_micros, pool.held_micros

    async def until_no_hold_is_left(self) -> None:
        """Every hold ends by itself, at the latest when its lease does."""

        async def is_quiet() -> bool:
            try:
                return await self.holds() == []
            except psycopg.OperationalError:
                return False

        await until(is_quiet, 30)

    async def keep_calling(self, urls: list[str], tally: Tally, rng: random.Random, stop: asyncio.Event) -> None:
        """Call after call, each with a key of its own, and tried again until there is a definite answer."""
        while not stop.is_set():
            key = f"{rng.random()}"
            if rng.random() < 0.25:
                await self._report(urls, tally, key, rng)
                tally.keys += 1
                continue
            directions = f"delay_ms={rng.choice([0, 0, 5, 50])}"
            stream = rng.random() < 0.4
            changes: dict[str, Any] = {"stream": stream}
            if stream:
                tokens = rng.choice([20, 60])
                directions += f"; output_tokens={tokens}; piece_ms={rng.choice([1, 20])}"
                changes["max_tokens"] = tokens
            while not await self._knows(rng.choice(urls), tally, directions, key, changes):
                await asyncio.sleep(0.1)
            tally.keys += 1

    async def _report(self, urls: list[str], tally: Tally, key: str, rng: random.Random) -> None:
        """Charge as a program does that calls models itself: at once, or by a hold, which may be over by then."""
        amount = rng.randrange(1, 1_000_000)
        charge: dict[str, Any] = {"amount": {"amount": str(amount), "unit": "micro"}}
        if rng.random() < 0.5:
            answer = await self._insist(urls, tally, "deduct", charge, key, rng)
        else:
            hold = {**charge, "lease_seconds": 1, "sent": rng.random() < 0.5}
            held = await self._insist(urls, tally, "authorize", hold, key, rng)
            settle = {**charge, "request_id": held["request_id"]}
            answer = await self._insist(urls, tally, "settle", settle, f"{key} settled", rng)
        tally.charged[answer["request_id"]] = amount

    async def _insist(
        self, urls: list[str], tally: Tally, name: str, body: dict[str, Any], key: str, rng: random.Random
    ) -> dict[str, Any]:
        """Ask until it is done; what was answered."""
        while True:
            path = f"{rng.choice(urls)}/api/v1/credits/{name}"
            try:
                async with self.http.post(path, json=body, headers={"idempotency-key": key}) as answer:
                    document: dict[str, Any] = await answer.json(content_type=None)
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                tally.statuses[0] += 1
            else:
                tally.statuses[answer.status] += 1
                if answer.status == 200:
                    return document
                assert answer.status == 503, f"{name}: {answer.status} {document}"
                tally.unsaid += "retry-after" not in answer.headers
            await asyncio.sleep(0.1)

    async def _knows(self, url: str, tally: Tally, directions: str, key: str, changes: dict[str, Any]) -> bool:
        """Ask once; whether there is a definite answer."""
        text, request_id = "", ""
        try:
            async with self.post(url, directions, idempotency_key=key, **changes) as answer:
                request_id = answer.headers.get("x-request-id", "")
                if changes["stream"] and answer.status == 200:
                    text = await self._streamed(answer, tally, request_id)
                else:
                    text = await answer.text()
        except (aiohttp.ClientError, OSError, TimeoutError):
            tally.statuses[0] += 1
            return False
        tally.statuses[answer.status] += 1
        if answer.status == 200 and "books_unavailable" not in text:
            if changes["stream"]:
                if "bursar-charged=" not in text:
                    return False
                told = text.rsplit("bursar-charged=", 1)[1].split()[0]
            else:
                told = answer.headers["bursar-charged"]
            tally.charged[request_id] = round(float(told) * 1_000_000)
            return True
        if answer.status == 422:
            tally.answered.add(answer.headers["bursar-original-request"])
            return True
        assert answer.status in (200, 502, 503, 504), f"{answer.status} {text}"
        tally.unsaid += answer.status == 503 and "retry-after" not in answer.headers
        return False

    async def _streamed(self, answer: aiohttp.ClientResponse, tally: Tally, request_id: str) -> str:
        lines = []
        tally.streaming += 1
        try:
            async for line in answer.content:
                lines.append(line.decode())
        except (aiohttp.ClientError, OSError):
            tally.cut[request_id] = sum('"content":"' in line and '"content":""' not in line for line in lines)
            raise
        finally:
            tally.streaming -= 1
        return "".join(lines)

    async def assert_exactly_once(self, site: Site, tally: Tally) -> None:
        """Each acknowledged charge is there with its amount, each key was charged once, and nothing is held."""
        booked: Counter[str] = Counter()
        firsts: Counter[str] = Counter()
        for request_id, kind, charged, _ in await self.charges():
            booked[f"req_{request_id.hex}"] += charged
            firsts[f"req_{request_id.hex}"] += kind == 0
        for request_id, charged in tally.charged.items():
            assert booked[request_id] == charged, f"{request_id}: {booked[request_id]} booked, {charged} acknowledged"
        assert tally.answered <= set(booked), "said to be answered, and not there"
        assert set(firsts.values()) <= {1}, "a request was booked twice"
        assert len(firsts) == tally.keys, "as many requests as keys"
        for request_id in tally.cut.keys() & booked.keys():
            assert INPUT_MICROS <= booked[request_id] <= INPUT_MICROS + 60 * TOKEN_MICROS
        assert await self.pool() == (sum(booked.values()), 0)
        assert tally.unsaid == 0, "each 503 says when to try again"
        await site.assert_books_agree()


async def until(condition: Callable[[], Awaitable[bool]], seconds: float = 30) -> None:
    """Wait for it."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.05)


Strike = Callable[[Site, Tally, random.Random], Awaitable[None]]


async def survive(site: Site, client: Client, strikes: int, strike: Strike, seed: int) -> Tally:
    """Strike again and again while clients call. After each the books agree, and the site serves again by itself."""
    rng, tally, stop = random.Random(seed), Tally(), asyncio.Event()
    await site.start()
    urls = [process.url for process in site.processes]
    work = [
        asyncio.create_task(client.keep_calling(urls, tally, random.Random(rng.random()), stop)) for _ in range(CLIENTS)
    ]
    try:
        for _ in range(strikes):
            await asyncio.sleep(rng.random())
            await strike(site, tally, rng)
            if not any(process.is_running for process in site.processes):
                await site.start()  # nobody is left who would start the database
            await site.assert_books_agree()
            await site.start()
            before = tally.keys

            async def serves_again(before: int = before) -> bool:
                for task in work:
                    if task.done():
                        task.result()
                return tally.keys >= before + CLIENTS

            await until(serves_again, 90)
    finally:
        stop.set()
        done, _ = await asyncio.wait(work, timeout=90)
        for task in work:
            task.cancel()
    for task in done:
        task.result()
    assert len(done) == len(work), "a client never got a definite answer"
    await client.until_no_hold_is_left()
    await client.assert_exactly_once(site, tally)
    return tally
