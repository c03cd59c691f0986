"""What a provider may send as HTTP, byte by byte, and what a call makes of it."""

import asyncio
import gzip
import ssl
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from bursar.clock import uuid7
from bursar.gateway import connections, upstream
from bursar.gateway.providers import Provider
from bursar.gateway.upstream import Limits, ProviderTimeout, ProviderUnreachable, Target, Upstream, UpstreamBroken

PATH = "/chat/completions"
OK = b"HTTP/1.1 200 OK\r\n"
JSON = b"content-type: application/json\r\n"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def listening(handler: Handler, tls: ssl.SSLContext | None = None) -> AsyncIterator[Target]:
    """A provider that writes bytes."""
    server = await asyncio.start_server(handler, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    base_url = f"https://localhost:{port}/v1" if tls else f"http://127.0.0.1:{port}/v1"
    try:
        yield Target(Provider(name="openai", provider_id=uuid7(), kind="both", base_url=base_url), "sk-provider")
    finally:
        server.close()


async def asked(reader: asyncio.StreamReader) -> bytes:
    """A request with its body."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
    return head + await reader.readexactly(length)


def saying(*writes: bytes, stays: bool = False) -> Handler:
    """Answers with these writes; then hangs up, or waits for the next request."""

    async def handler(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await asked(reader)
                for each in writes:
                    writer.write(each)
                    await writer.drain()
                    await asyncio.sleep(0.002)
                if not stays:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    return handler


@pytest.fixture
async def calls() -> AsyncIterator[Upstream]:
    made = Upstream(Limits(connect_seconds=2.0, first_byte_seconds=2.0, idle_seconds=2.0, total_seconds=5.0))
    yield made
    await made.close()


async def answer(calls: Upstream, target: Target, body: bytes = b"{}") -> tuple[int, bytes]:
    async with await calls.call(target, PATH, body, {}) as answered:
        return answered.status, await answered.read()


@pytest.mark.parametrize(
    ("writes", "body"),
    [
        ([OK + JSON + b"content-length: 2\r\n\r\n{}"], b"{}"),
        ([OK[:5], OK[5:] + JSON[:7], JSON[7:] + b"\r", b"\n{", b"}"], b"{}"),  # to the end of the connection
        ([OK + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"1;x=y\r\n}\r\n0\r\ntrailer: 1\r\n\r\n"], b"{}"),
        ([OK + b"Transfer-Encoding: CHUNKED\n\n2 \r\n{}\r\n0\r\n\r\n"], b"{}"),  # as odd servers write it
        ([b"HTTP/1.0 200 OK\r\n\r\n", b"{}"], b"{}"),
        ([b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK + b"\r\n{}"], b"{}"),
        ([b"HTTP/1.1 204 No Content\r\n\r\n"], b""),
        ([OK + b"content-length: 0\r\n\r\n"], b""),
        ([OK + b"content-length: 2\r\n\r\n{}", b"HTTP/1.1 500 Oops\r\n\r\n"], b"{}"),
    ],
)
async def test_an_answer_is_read_however_it_is_framed_and_cut(
    calls: Upstream, writes: Sequence[bytes], body: bytes
) -> None:
    async with listening(saying(*writes)) as target:
        status, read = await answer(calls, target)
    assert (status, read) == (204 if b"204" in writes[0] else 200, body)


@pytest.mark.parametrize(
    "writes",
    [
        [b""],
        [OK],
        [OK + b"content-length: 3\r\n\r\n{}"],
        [OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n"],
        [OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n{}\r\n"],
        [OK + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}"],
        [OK + b"content-length: -1\r\n\r\n{}"],
        [b"SSH-2.0-OpenSSH_9.6\r\n"],
        [b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"],
        [b"HTTP/1.1 100 Continue\r\n\r\n"],
        [b"HTTP/1.1 302 Found\r\nlocation: http://127.0.0.1:1/\r\ncontent-length: 0\r\n\r\n"],
        [b"HTTP/1.1 700 Odd\r\ncontent-length: 0\r\n\r\n"],
        [OK + b"x: " + b"y" * (2 * connections.LARGEST_HEAD)],
        [OK + b"content-encoding: br\r\ncontent-length: 2\r\n\r\n{}"],
        [OK + b"content-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}"],
        [OK + b"content-encoding: gzip\r\ncontent-length: 20\r\n\r\n" + gzip.compress(b"{}" * 500, mtime=0)[:20]],
    ],
)
async def test_what_is_no_whole_answer_is_a_provider_that_broke_off(calls: Upstream, writes: Sequence[bytes]) -> None:
    async with listening(saying(*writes)) as target:
        with pytest.raises(UpstreamBroken) as broken:
            await answer(calls, target)
    assert broken.value.code == "provider_broke_off"


async def test_what_came_before_a_fault_is_given_before_it(calls: Upstream) -> None:
    for ending in (b"", b"zz\r\n"):
        async with listening(saying(OK + b"transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n" + ending)) as target:
            answered = await calls.call(target, PATH, b"{}", {})
            got = b""
            with pytest.raises(UpstreamBroken):
                async for piece in answered.pieces():
                    got += piece
            await answered.close()
        assert got == b"{}"


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "packed"),
    [
        (b"gzip", gzip.compress(b'{"a": 1}', mtime=0)),
        (b"X-GZIP", gzip.compress(b'{"a"', mtime=0) + gzip.compress(b": 1}", mtime=0)),
        (b"deflate", zlib.compress(b'{"a": 1}')),
        (b"deflate", raw_deflate(b'{"a": 1}')),
        (b"identity", b'{"a": 1}'),
    ],
    ids=["gzip", "two members", "deflate", "deflate without head", "none"],
)
async def test_compression_that_nobody_asked_for_is_undone_from_pieces_of_a_byte(
    calls: Upstream, coding: bytes, packed: bytes
) -> None:
    head = OK + b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (coding, len(packed))
    async with listening(saying(head, *(packed[n : n + 1] for n in range(len(packed))))) as target:
        assert await answer(calls, target) == (200, b'{"a": 1}')


async def test_a_small_answer_that_unpacks_to_very_much_is_refused(
    calls: Upstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "MOST_ANSWER_BYTES", 3_000_000)
    packed = gzip.compress(bytes(50_000_000), mtime=0)
    head = OK + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % len(packed)
    async with listening(saying(head + packed, stays=True)) as target:
        with pytest.raises(UpstreamBroken, match="too large"):
            await answer(calls, target)
        async with await calls.call(target, PATH, b"{}", {}) as answered:
            sizes = [len(piece) async for piece in answered.pieces()]
    assert (sum(sizes), max(sizes)) == (50_000_000, 1024 * 1024)


async def test_a_connection_serves_one_call_after_the_other_unless_the_provider_closes_it(calls: Upstream) -> None:
    opened = 0

    def counted(handler: Handler) -> Handler:
        async def counting(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal opened
            opened += 1
            await handler(reader, writer)

        return counting

    whole = OK + b"content-length: 2\r\n\r\n{}"
    for writes, expected in (
        ([whole], 1),
        ([whole + b"more than that"], 3),
        ([OK + b"connection: close\r\ncontent-length: 2\r\n\r\n{}"], 3),
        ([whole[:20], whole[20:]], 1),
    ):
        opened = 0
        async with listening(counted(saying(*writes, stays=True))) as target:
            for _ in range(3):
                assert await answer(calls, target) == (200, b"{}")
        assert opened == expected, writes


async def test_a_call_on_a_connection_that_is_closed_at_that_moment_is_repeated_if_it_only_reads(
    calls: Upstream,
) -> None:
    seen: list[bytes] = []

    async def once_each(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for n in range(2):
                seen.append((await asked(reader)).split(b" ", 1)[0])
                if n == 0:
                    writer.write(OK + b"content-length: 2\r\n\r\n{}")
        finally:
            writer.close()

    async with listening(once_each) as target:
        for _ in range(2):
            async with await calls.get(target, "/models") as answered:
                assert await answered.read() == b"{}"
        assert seen == [b"GET", b"GET", b"GET"]
        with pytest.raises(UpstreamBroken):
            await answer(calls, target)
    assert seen == [b"GET", b"GET", b"GET", b"POST"]


async def test_a_provider_that_answers_before_it_has_read_all_is_heard(calls: Upstream) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\n{}")
        await asyncio.sleep(1)
        writer.close()

    async with listening(refuse) as target:
        assert await answer(calls, target, b"x" * 30_000_000) == (413, b"{}")


async def test_a_provider_that_reads_nothing_is_left_after_the_limit() -> None:
    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(2)
        writer.close()

    calls = Upstream(Limits(first_byte_seconds=0.3))
    async with listening(deaf) as target:
        with pytest.raises(ProviderTimeout):
            await answer(calls, target, b"x" * 30_000_000)
    await calls.close()


async def test_a_provider_waits_while_nobody_takes_what_it_sends(calls: Upstream) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        try:
            await asked(reader)
            writer.write(OK + b"\r\n")
            for _ in range(1_000):
                writer.write(b"x" * 65_536)
                await writer.drain()
                sent += 65_536
            writer.close()
        except ConnectionError:
            pass

    async with listening(flood) as target:
        answered = await calls.call(target, PATH, b"{}", {})
        await asyncio.sleep(0.5)
        assert sent < 32_000_000  # what the system's buffers take, and no more
        assert len(await answered.read()) == 65_536_000
        await answered.close()


async def test_who_finds_no_room_waits_for_it_and_no_longer_than_for_an_answer() -> None:
    calls = Upstream(Limits(connections=1, first_byte_seconds=0.3))
    async with listening(saying(OK + b"content-length: 2\r\n\r\n{}", stays=True)) as target:
        first = await calls.call(target, PATH, b"{}", {})
        with pytest.raises(ProviderTimeout):
            await calls.call(target, PATH, b"{}", {})
        waiting = asyncio.create_task(answer(calls, target))
        await asyncio.sleep(0.05)
        await first.close()
        await first.close()  # a second time changes nothing
        assert await waiting == (200, b"{}")
    await calls.close()


async def test_a_call_that_is_cancelled_ends_its_connection(calls: Upstream) -> None:
    gone = asyncio.Event()

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asked(reader)
        with suppress(ConnectionError):
            await reader.read()
        gone.set()
        writer.close()

    async with listening(silent) as target:
        call = asyncio.create_task(answer(calls, target))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await asyncio.wait_for(gone.wait(), 2)


async def test_a_header_never_begins_a_line_of_its_own(calls: Upstream) -> None:
    async with listening(saying(OK + b"content-length: 2\r\n\r\n{}")) as target:
        for odd in ("a\r\nx: y", "a\ny: z", "a\0"):
            with pytest.raises(ValueError, match="header"):
                await calls.call(target, PATH, b"{}", {b"openai-beta": odd})


def certificate(folder: Path) -> ssl.SSLContext:
    """Of `localhost`, signed by nobody else; its file is what a client has to trust."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    at = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(days=1))
        .not_valid_after(at + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context


@pytest.fixture
def trust() -> Callable[[Path | None], None]:
    """The authorities that a client trusts are looked up once."""

    def trusting(path: Path | None) -> None:
        connections._tls.cache_clear()
        if path is not None:
            connections._tls().load_verify_locations(path)

    yield trusting
    connections._tls.cache_clear()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_https_is_spoken_only_to_whom_a_certificate_names(
    tmp_path: Path, trust: Callable[[Path | None], None], run: Callable[..., object]
) -> None:
    context = certificate(tmp_path)
    body = b"x" * 3_000_000

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            for _ in range(2):
                text = (await asked(reader)).partition(b"\r\n\r\n")[2]
                writer.write(OK + b"content-length: %d\r\n\r\n%b" % (len(text), text))
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def scene() -> None:
        calls = Upstream(Limits(connect_seconds=5))
        async with listening(echo, context) as target:
            trust(None)
            with pytest.raises(ProviderUnreachable):
                await answer(calls, target, body)
            trust(tmp_path / "cert.pem")
            assert await answer(calls, target, body) == (200, body)
            assert await answer(calls, target) == (200, b"{}")
            assert target.provider.base_url is not None
            elsewhere = target.provider.base_url.replace("localhost", "127.0.0.1")
            stranger = Target(Provider(name="openai", provider_id=uuid7(), kind="both", base_url=elsewhere))
            with pytest.raises(ProviderUnreachable):
                await answer(calls, stranger, body)
        await calls.close()

    run(scene())
