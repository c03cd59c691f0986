"""R17: webhooks reach receivers that prove who sent them, whatever dies; and nothing inside a private network."""

import asyncio
import ipaddress
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from standardwebhooks.webhooks import Webhook
from tests.conftest import MASTER_KEY, Org
from tests.credits.conftest import scratch_database
from tests.fakes.certificates import Authority
from tests.fakes.receiver import receiving
from tests.fakes.serving import serving
from tests.promises.figures import SEED, figure, tell

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.identity.organizations import create_organization
from bursar.outbox import outside
from bursar.outbox.deliveries import GIVE_UP_AFTER, Due, Sender, next_wait
from bursar.outbox.endpoints import add_endpoint, post_event, rotate_secret
from bursar.outbox.outside import AddressNotAllowed, Allowed, Outside, Unreachable
from bursar.sealing import Keyring
from bursar.settings import Settings

NAMES = {
    "rebound.acme.example": ["127.0.0.1"],
    "metadata.acme.example": ["169.254.169.254"],
    "inside.acme.example": ["10.0.0.5"],
    "half.acme.example": ["93.184.215.14", "192.168.1.1"],
    "six.acme.example": ["::1"],
    "mapped.acme.example": ["::ffff:127.0.0.1"],
    "nat64.acme.example": ["64:ff9b::7f00:1"],
    "tunnel.acme.example": ["2002:7f00:1::"],
    "teredo.acme.example": ["2001:0:7f00:1:0:0:80ff:fffe"],
    "local.acme.example": ["fe80::1%eth0"],
    "cgnat.acme.example": ["100.64.0.1"],
    "everywhere.acme.example": ["0.0.0.0"],
    "group.acme.example": ["224.0.0.1", "ff02::1"],
}
"""What the name server of an attacker says."""

HOSTILE = [
    *(f"https://{name}/hooks" for name in NAMES),
    "https://127.0.0.1/",
    "https://127.1/",
    "https://2130706433/",
    "https://0x7f000001/",
    "https://0x7f.0.0.1/",
    "https://0177.0.0.1/",
    "https://017700000001/",
    "https://127.0.0.1./",
    "https://0/",
    "https://0.0.0.0/",
    "https://localhost/",
    "https://LOCALHOST./",
    "https://service.localhost/",
    "https://router.local/",
    "https://metadata.google.internal/computeMetadata/v1/",
    "https://intranet/",
    "https://10.0.0.1/",
    "https://172.16.0.1/",
    "https://172.31.255.255/",
    "https://192.168.0.1/",
    "https://169.254.169.254/latest/meta-data/",
    "https://168.63.129.16/",
    "https://100.100.100.200/latest/meta-data/",
    "https://192.0.0.192/",
    "https://198.18.0.1/",
    "https://224.0.0.1/",
    "https://255.255.255.255/",
    "https://[::1]/",
    "https://[::]/",
    "https://[::ffff:127.0.0.1]/",
    "https://[::ffff:a9fe:a9fe]/",
    "https://[::127.0.0.1]/",
    "https://[64:ff9b::10.0.0.1]/",
    "https://[64:ff9b:1::1]/",
    "https://[2002:a00:1::]/",
    "https://[2001:0:a00:1::]/",
    "https://[fd00:ec2::254]/",
    "https://[fc00::1]/",
    "https://[fe80::1]/",
    "https://[fe80::1%25eth0]/",
    "https://[ff02::1]/",
    "https://[2001:db8::1]/",
    "https://[::ffff:0:127.0.0.1]/",
    "https://public.acme.example:22/",
    "https://public.acme.example:8443/",
    "http://public.acme.example/",
    "https://user:password@public.acme.example/",
    "https://public.acme.example@127.0.0.1/",
    "https://public.acme.example#@127.0.0.1/",
    "https://public.acme.example\\@127.0.0.1/",
    "https://127.0.0.1%2f@public.acme.example/",
    "https://⑫⑦.0.0.1/",
    "https://１２７.0.0.1/",
    "https://127。0。0。1/",
    "ftp://public.acme.example/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:6379/_FLUSHALL",
    "//127.0.0.1/",
    "https:///",
    "https://",
    "",
]
PRIVATE = [
    ipaddress.IPv4Network(each)
    for each in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.168.0.0/16",
        "224.0.0.0/4",
        "240.0.0.0/4",
    )
]

_connected: list[Any] = []
_hooked: list[bool] = []


@contextmanager
def connections() -> Iterator[list[Any]]:
    """Every address that a socket of this process is connected to meanwhile, whoever does it."""
    if not _hooked:  # one for the process: an audit hook cannot be taken away
        _hooked.append(True)
        sys.addaudithook(lambda event, given: _connected.append(given[1]) if event == "socket.connect" else None)
    _connected.clear()
    yield _connected


def drawn(chance: random.Random) -> str:
    """A private address in some disguise."""
    network = chance.choice(PRIVATE)
    address = ipaddress.IPv4Address(int(network.network_address) + chance.randrange(network.num_addresses))
    number, parts = int(address), str(address).split(".")
    return "https://{}/".format(
        chance.choice(
            [
                str(address),
                str(number),
                hex(number),
                oct(number).replace("0o", "0"),
                ".".join(hex(int(each)) for each in parts),
                ".".join(f"{int(each):04o}" for each in parts),
                f"{parts[0]}.{number & 0xFFFFFF}",
                f"[::ffff:{address}]",
                f"[::{address}]",
                f"[64:ff9b::{address}]",
                f"[2002:{number >> 16:x}:{number & 0xFFFF:x}::1]",
                f"[2001:0:{number >> 16:x}:{number & 0xFFFF:x}::1]",
                f"a-{number}.acme.example",
            ]
        )
    )


async def resolve(host: str, port: int) -> Sequence[str]:
    """The attacker's name server: whatever the name asks for. Everything else is as the system says."""
    if host in NAMES:
        return NAMES[host]
    if host.startswith("a-"):
        return [str(ipaddress.IPv4Address(int(host.removeprefix("a-").partition(".")[0])))]
    if host == "public.acme.example":
        return ["127.0.0.1"]
    return await outside._resolve(host, port)


async def test_no_hostile_address_is_reached() -> None:
    chance = random.Random(SEED)
    targets = [*HOSTILE, *(drawn(chance) for _ in range(figure("targets") - len(HOSTILE)))]
    refused = 0
    with connections() as connected:
        for allowed in (Allowed(), Allowed(http=True)):
            client = Outside(allowed, resolve=resolve)
            for target in targets:
                with pytest.raises((AddressNotAllowed, Unreachable)):
                    await client.post(target, b"{}", {})
                refused += 1
        assert connected == []
    tell(f"{refused} requests to {len(targets)} hostile targets, 0 connections")
    assert len(HOSTILE) >= 40


async def test_the_same_targets_are_not_reached_by_the_worker_even_where_a_row_names_them(org: Org) -> None:
    """As if somebody had got one past the check at the door."""
    targets = [each for each in HOSTILE if len(each) >= 8]
    ring = Keyring(org.database.settings.master_key)
    place = {"organization_id": org.organization_id}
    async with org.tenant() as conn:
        for target in targets:
            endpoint_id = uuid7()
            await db.execute(
                conn,
                "insert into outbox.endpoints (organization_id, endpoint_id, url, kinds)"
                " values (%(organization_id)s, %(endpoint_id)s, %(url)s, '{*}')",
                endpoint_id=endpoint_id,
                url=target,
                **place,
            )
            await rotate_secret(conn, ring, endpoint_id=endpoint_id, by=OPERATOR, **place)
        await post_event(conn, kind="pool.low", object_kind="pool", object_id=uuid7(), payload={}, **place)
        due = await db.fetch_all(conn, Due, "select organization_id, endpoint_id, event_id from outbox.deliveries")
    with connections() as connected:
        sender = Sender(org.database, Outside(Allowed(), resolve=resolve), ring)
        results = [await sender.send(each) for each in due]
        assert connected == []
    assert len(results) == len(targets)
    assert not any(result is None or result.is_delivered for result in results)


async def test_a_redirect_is_not_followed_and_counts_as_a_failure() -> None:
    inside: list[str] = []

    async def canary(request: web.Request) -> web.Response:
        inside.append(request.path)
        return web.Response(text="secret")

    async def away(request: web.Request) -> web.Response:
        raise web.HTTPTemporaryRedirect(f"http://{request.host}/canary")

    app = web.Application()
    app.router.add_route("*", "/canary", canary)
    app.router.add_post("/hooks", away)
    async with serving(app) as base_url:
        assert await Outside(Allowed(loopback=True)).post(f"{base_url}/hooks", b"{}", {}) == 307
    assert inside == []


async def test_a_name_is_asked_for_once_and_its_first_answer_is_where_it_goes_under_its_name(tmp_path: Path) -> None:
    """A name server that answers with a harmless address first and an inner one after is asked once."""
    authority = Authority.in_folder(tmp_path)
    asked: list[str] = []
    hosts: list[str] = []

    async def rebinding(host: str, port: int) -> Sequence[str]:
        asked.append(host)
        return ["127.0.0.1"] if len(asked) == 1 else ["10.0.0.1"]

    async def take(request: web.Request) -> web.Response:
        hosts.append(request.host)
        return web.Response()

    app = web.Application()
    app.router.add_post("/", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, ssl_context=authority.server("hooks.acme.example")).start()
    port = runner.addresses[0][1]
    client = Outside(Allowed(loopback=True), resolve=rebinding, tls=authority.client())
    with connections() as connected:
        # The certificate is for the name: SNI and verification go by the name, the connection by the address.
        assert await client.post(f"https://hooks.acme.example:{port}/", b"{}", {}) == 200
        assert {each[0] for each in connected} == {"127.0.0.1"}
    assert asked == ["hooks.acme.example"]
    assert hosts == [f"hooks.acme.example:{port}"]
    with pytest.raises(Unreachable, match="certificate"):
        asked.clear()
        await client.post(f"https://other.acme.example:{port}/", b"{}", {})
    await runner.cleanup()


async def test_an_endless_or_silent_answer_ends_within_the_time_and_proxies_are_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://10.0.0.1:3128")
    sent = 0

    async def endless(request: web.Request) -> web.StreamResponse:
        nonlocal sent
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b"x" * 65_536)
            sent += 65_536

    async def silent(request: web.Request) -> web.Response:
        await request.read()
        while True:
            await asyncio.sleep(60)

    app = web.Application()
    app.router.add_post("/endless", endless)
    app.router.add_post("/silent", silent)
    async with serving(app) as base_url:
        client = Outside(Allowed(loopback=True))
        with connections() as connected:
            assert await client.post(f"{base_url}/endless", b"{}", {}) == 200
            began = time.monotonic()
            with pytest.raises(Unreachable, match="no answer within"):
                await client.post(f"{base_url}/silent", b"{}", {})
            assert time.monotonic() - began < 8
            assert {each[0] for each in connected} == {"127.0.0.1"}
    assert sent < 64 * 1024 * 1024


WORKER = """
import asyncio, sys
from bursar import db
from bursar.outbox.deliveries import Sender
from bursar.outbox.outside import Allowed, Outside
from bursar.sealing import Keyring
from bursar.settings import Settings

async def work():
    async with db.opened(Settings.from_environment()) as database:
        keyring = Keyring(database.settings.master_key)
        sender = Sender(database, Outside(Allowed(loopback=True)), keyring, lease_seconds=1)
        while True:
            if not await sender.send_due():
                await asyncio.sleep(0.02)

asyncio.run(work())
"""


@contextmanager
def working(settings: Settings) -> Iterator["subprocess.Popen[bytes]"]:
    """A process that sends what is due, and dies by SIGKILL."""
    environment = os.environ | {
        "DATABASE_URL": str(settings.database_url),
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(settings.data_dir),
    }
    child = subprocess.Popen([sys.executable, "-c", WORKER], env=environment)
    try:
        yield child
    finally:
        child.kill()
        child.wait()


async def test_a_worker_killed_at_any_moment_loses_no_event_and_keeps_their_order_and_ids(
    admin_dsn: str, settings: Settings, database: db.Database
) -> None:
    """database: the run's own comes first, since two that are set up at once on a new cluster race for its roles."""
    chance, kills, things = random.Random(SEED), figure("worker kills"), [uuid7() for _ in range(5)]
    posted: list[str] = []
    async with scratch_database(admin_dsn, settings, "webhooks") as own, receiving(seconds=0.01) as receiver:
        place = {"organization_id": uuid7()}
        async with own.tenant(place["organization_id"]) as conn:
            await create_organization(conn, slug="acme", name="Acme", by=OPERATOR, **place)
            ring = Keyring(own.settings.master_key)
            _, secret = await add_endpoint(conn, ring, Allowed(loopback=True), url=receiver.url, by=OPERATOR, **place)

        async def post() -> None:
            for thing in things:
                async with own.tenant(place["organization_id"]) as conn:
                    event = await post_event(
                        conn, kind="pool.low", object_kind="pool", object_id=thing, payload={"left": "5"}, **place
                    )
                posted.append(f"evt_{event.hex}")

        async def until(done: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
            async with asyncio.timeout(60):
                while not done():
                    assert process.poll() is None
                    await asyncio.sleep(0.002)

        for _ in range(kills):
            await post()
            before = len(receiver.got)
            with working(own.settings) as process:
                await until(lambda before=before: len(receiver.got) > before, process)  # type: ignore[misc]
                await asyncio.sleep(chance.random() * 0.04)
        with working(own.settings) as process:
            await until(lambda: set(receiver.ids) == set(posted), process)
    assert all(Webhook(secret).verify(each.body, each.headers) for each in receiver.got)
    assert len({(each.webhook_id, each.body) for each in receiver.got}) == len(posted)
    for thing in things:
        arrived = [each.place[1] for each in receiver.got if each.place[0] == str(thing)]
        assert list(dict.fromkeys(arrived)) == list(range(1, kills + 1)), "each first comes after all before it"
    tell(f"{kills} kills: {len(posted)} events, {len(receiver.got) - len(posted)} came twice, 0 were lost")


def test_attempts_go_on_for_three_days() -> None:
    for _ in range(100):
        passed, attempts = timedelta(0), 1
        while not (planned := next_wait(attempts, passed))[1]:
            passed += timedelta(seconds=planned[0])
            attempts += 1
        assert passed == GIVE_UP_AFTER
        assert 10 <= attempts <= 20
