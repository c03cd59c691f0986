import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import web

from bursar.clock import uuid7
from bursar.gateway import anthropic_wire, demo_provider, openai_wire
from bursar.gateway.providers import Provider
from bursar.gateway.upstream import (
    Answer,
    Limits,
    ProviderRefusesUs,
    ProviderTimeout,
    ProviderUnreachable,
    Target,
    Upstream,
    UpstreamBroken,
    without_account,
)

BODY = json.dumps({"model": "demo-1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9}).encode()
STREAM = BODY[:-1] + b', "stream": true}'
HURRIED = Limits(connect_seconds=0.5, first_byte_seconds=0.2, idle_seconds=0.2, total_seconds=1.0)


def provider(base_url: str, name: str = "openai", **columns: Any) -> Provider:
    return Provider(name=name, provider_id=uuid7(), kind="both", base_url=base_url, **columns)


@pytest.fixture(scope="module")
async def demo() -> AsyncIterator[Target]:
    async with demo_provider.running() as url:
        yield Target(provider(url, "demo", auth="none"))


@pytest.fixture
async def upstream() -> AsyncIterator[Upstream]:
    upstream = Upstream()
    yield upstream
    await upstream.close()


@pytest.fixture
async def hurried() -> AsyncIterator[Upstream]:
    upstream = Upstream(HURRIED)
    yield upstream
    await upstream.close()


@asynccontextmanager
async def serving(handler: Any) -> AsyncIterator[str]:
    """A provider of the test's own, answering every path with one handler."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, auto_decompress=False, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


async def echo(request: web.Request) -> web.Response:
    return web.json_response({"path": request.path, "headers": {k.lower(): v for k, v in request.headers.items()}})


async def whole(answer: Answer) -> bytes:
    async with answer:
        return await answer.read()


# -- headers


CLIENT = {
    b"authorization": "Bearer bsr_secret",
    b"x-api-key": "bsr_secret",
    b"cookie": "session_token=secret",
    b"x-forwarded-for": "10.0.0.1",
    b"host": "bursar.example",
    b"content-length": "7",
    b"transfer-encoding": "chunked",
    b"connection": "close",
    b"te": "trailers",
    b"user-agent": "client",
    b"accept-encoding": "br",
    b"idempotency-key": "k",
    b"openai-organization": "org-1",
    b"openai-project": "proj_1",
    b"bursar-organization": "acme",
    b"bursar-demo": "fail=500",
    b"anthropic-beta": "one,two",
    b"openai-beta": "three",
}


async def test_only_allowed_headers_and_the_providers_key_go_out(upstream: Upstream) -> None:
    async with serving(echo) as url:
        target = Target(provider(url), "sk-provider")
        sent = json.loads(await whole(await upstream.call(target, openai_wire.PATH, BODY, CLIENT)))
    assert sent["path"] == "/v1/chat/completions"
    assert {name: value for name, value in sent["headers"].items() if name != "host"} == {
        "authorization": "Bearer sk-provider",
        "content-type": "application/json",
        "content-length": str(len(BODY)),
        "accept": "*/*",
        "accept-encoding": "identity",
        "user-agent": "bursar",
        "anthropic-beta": "one,two",
        "openai-beta": "three",
    }
    assert "secret" not in json.dumps(sent)


@pytest.mark.parametrize(
    ("auth", "path", "expected"),
    [
        ("vendor", openai_wire.PATH, {"authorization": "Bearer k"}),
        ("vendor", anthropic_wire.PATH, {"x-api-key": "k"}),
        ("bearer", anthropic_wire.PATH, {"authorization": "Bearer k"}),
        ("api-key", openai_wire.PATH, {"api-key": "k"}),
        ("none", openai_wire.PATH, {}),
    ],
)
async def test_each_provider_gets_its_key_in_its_way(
    upstream: Upstream, auth: Any, path: str, expected: dict[str, str]
) -> None:
    async with serving(echo) as url:
        sent = json.loads(await whole(await upstream.call(Target(provider(url, auth=auth), "k"), path, BODY, {})))
    assert {k: v for k, v in sent["headers"].items() if k in ("authorization", "x-api-key", "api-key")} == expected


async def test_anthropics_version_is_the_clients_or_the_usual_one(upstream: Upstream) -> None:
    async with serving(echo) as url:
        target = Target(provider(url))
        for headers, expected in (({}, "2023-06-01"), ({b"anthropic-version": "2099-01-01"}, "2099-01-01")):
            sent = json.loads(await whole(await upstream.call(target, anthropic_wire.PATH, BODY, headers)))
            assert sent["headers"]["anthropic-version"] == expected


async def test_the_demo_providers_directions_go_to_it_alone(upstream: Upstream, demo: Target) -> None:
    answer = await upstream.call(demo, openai_wire.PATH, BODY, {b"bursar-demo": "fail=503"})
    assert answer.status == 503
    await answer.close()


async def test_only_allowed_headers_come_back(upstream: Upstream) -> None:
    async def answer_with_headers(_: web.Request) -> web.Response:
        response = web.json_response({})
        response.headers.update(
            {
                "x-request-id": "req_provider",
                "openai-organization": "org-secret",
                "x-ratelimit-limit-requests": "5",
                "anthropic-ratelimit-tokens-limit": "5",
                "set-cookie": "a=b",
                "retry-after": "3",
                "openai-processing-ms": "12",
                "server": "cloudflare",
            }
        )
        return response

    async with serving(answer_with_headers) as url:
        answer = await upstream.call(Target(provider(url)), openai_wire.PATH, BODY, {})
        await answer.close()
    assert sorted(answer.headers) == [
        (b"bursar-provider-request-id", b"req_provider"),
        (b"content-type", b"application/json; charset=utf-8"),
        (b"openai-processing-ms", b"12"),
        (b"retry-after", b"3"),
    ]


# -- bodies


async def test_a_plain_answer_is_read_whole(upstream: Upstream, demo: Target) -> None:
    meter = openai_wire.UsageMeter(openai_wire.read_request(BODY))
    answer = await upstream.call(demo, openai_wire.PATH, BODY, {})
    meter.read_body(await whole(answer))
    assert (answer.status, meter.measure().estimated, meter.measure().usage.output_tokens) == (200, False, 9)


@pytest.mark.parametrize("wire", [openai_wire, anthropic_wire])
async def test_a_stream_comes_piece_by_piece(upstream: Upstream, demo: Target, wire: Any) -> None:
    request = wire.read_request(STREAM)
    meter = wire.UsageMeter(request)
    sent = wire.upstream_body(request, model="demo-1")
    answer = await upstream.call(demo, wire.PATH, sent, {b"bursar-demo": "piece_ms=2"})
    async with answer:
        pieces = [piece async for piece in answer.pieces()]
    assert len(pieces) > 5
    for piece in pieces:
        meter.feed(piece)
    assert (meter.completed, meter.measure().estimated, meter.measure().usage.output_tokens) == (True, False, 9)


async def test_compression_is_undone(upstream: Upstream) -> None:
    async def compressed(_: web.Request) -> web.Response:
        return web.Response(body=gzip.compress(b'{"a": 1}'), headers={"content-encoding": "gzip"})

    async with serving(compressed) as url:
        answer = await upstream.call(Target(provider(url)), openai_wire.PATH, BODY, {})
        assert await whole(answer) == b'{"a": 1}'
    assert b"content-encoding" not in dict(answer.headers)


async def test_a_body_of_twenty_megabytes_arrives(upstream: Upstream) -> None:
    async def length(request: web.Request) -> web.Response:
        size = 0
        async for piece in request.content.iter_any():
            size += len(piece)
        return web.Response(text=str(size))

    async with serving(length) as url:
        body = b"x" * (20 * 1024 * 1024)
        assert await whole(await upstream.call(Target(provider(url)), openai_wire.PATH, body, {})) == b"20971520"


async def test_an_answer_without_end_is_refused(upstream: Upstream, monkeypatch: pytest.MonkeyPatch) -> None:
    async def huge(_: web.Request) -> web.Response:
        return web.Response(body=b"x" * 200_000)

    monkeypatch.setattr("bursar.gateway.upstream.MOST_ANSWER_BYTES", 100_000)
    async with serving(huge) as url:
        answer = await upstream.call(Target(provider(url)), openai_wire.PATH, BODY, {})
        with pytest.raises(UpstreamBroken):
            await whole(answer)


async def test_a_redirect_is_not_followed_and_takes_no_key_along(upstream: Upstream) -> None:
    async def redirect(request: web.Request) -> web.Response:
        assert request.path == "/v1/chat/completions"
        raise web.HTTPTemporaryRedirect("http://127.0.0.1:1/elsewhere")

    async with serving(redirect) as url:
        with pytest.raises(UpstreamBroken):
            await upstream.call(Target(provider(url), "k"), openai_wire.PATH, BODY, {})


# -- faults


async def test_a_provider_that_is_not_there_is_unreachable(upstream: Upstream) -> None:
    with pytest.raises(ProviderUnreachable) as unreachable:
        await upstream.call(Target(provider("http://127.0.0.1:1/v1"), "k"), openai_wire.PATH, BODY, {})
    assert (unreachable.value.status, "127.0.0.1" in str(unreachable.value)) == (502, False)


async def test_no_first_byte_in_time_is_a_timeout(hurried: Upstream, demo: Target) -> None:
    with pytest.raises(ProviderTimeout):
        await hurried.call(demo, openai_wire.PATH, BODY, {b"bursar-demo": "delay_ms=1000"})


async def test_a_pause_in_a_stream_is_a_timeout_and_what_came_before_it_is_kept(
    hurried: Upstream, demo: Target
) -> None:
    answer = await hurried.call(demo, openai_wire.PATH, STREAM, {b"bursar-demo": "piece_ms=1000"})
    pieces = []
    async with answer:
        with pytest.raises(ProviderTimeout):
            async for piece in answer.pieces():
                pieces.append(piece)
    assert pieces


async def test_a_slow_drip_ends_at_the_total_limit(hurried: Upstream, demo: Target) -> None:
    directions = {b"bursar-demo": "piece_ms=100; output_tokens=50"}
    answer = await hurried.call(demo, openai_wire.PATH, STREAM, directions)
    async with answer:
        with pytest.raises(ProviderTimeout):
            async for _ in answer.pieces():
                pass


async def test_a_cut_stream_is_broken_and_what_came_before_it_is_kept(upstream: Upstream, demo: Target) -> None:
    answer = await upstream.call(demo, openai_wire.PATH, STREAM, {b"bursar-demo": "break_after=3"})
    meter = openai_wire.UsageMeter(openai_wire.read_request(STREAM))
    async with answer:
        with pytest.raises(UpstreamBroken):
            async for piece in answer.pieces():
                meter.feed(piece)
    assert (meter.output_so_far, meter.completed) == (3, False)


@pytest.mark.parametrize("directions", ["break_after=0", "break_after=1"])
async def test_a_cut_plain_answer_is_broken(upstream: Upstream, demo: Target, directions: str) -> None:
    with pytest.raises(UpstreamBroken):
        await whole(await upstream.call(demo, openai_wire.PATH, BODY, {b"bursar-demo": directions}))


async def test_a_call_is_never_repeated(upstream: Upstream) -> None:
    calls = 0

    async def hang_up(request: web.Request) -> web.Response:
        nonlocal calls
        calls += 1
        if calls > 1 and request.transport is not None:
            request.transport.close()
        return web.Response()

    async with serving(hang_up) as url:
        target = Target(provider(url))
        await whole(await upstream.call(target, openai_wire.PATH, BODY, {}))
        with pytest.raises(UpstreamBroken):
            await upstream.call(target, openai_wire.PATH, BODY, {})
    assert calls == 2


async def test_closing_an_answer_early_ends_the_call_at_the_provider(upstream: Upstream) -> None:
    ended = asyncio.Event()

    async def endless(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: x\n\n")
                await asyncio.sleep(0.01)
        except (OSError, asyncio.CancelledError):
            ended.set()
            raise

    async with serving(endless) as url:
        answer = await upstream.call(Target(provider(url)), openai_wire.PATH, STREAM, {})
        async for _ in answer.pieces():
            break
        await answer.close()
        assert await asyncio.wait_for(ended.wait(), 5)


async def test_a_provider_that_refuses_the_platforms_key_is_the_operators_matter(
    upstream: Upstream, demo: Target
) -> None:
    answer = await upstream.call(demo, openai_wire.PATH, BODY, {b"bursar-demo": "fail=401"})
    with pytest.raises(ProviderRefusesUs):
        await whole(answer)
    own = Target(demo.provider, is_own_key=True)
    answer = await upstream.call(own, openai_wire.PATH, BODY, {b"bursar-demo": "fail=401"})
    assert b"invalid_api_key" in await whole(answer)


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503, 529])
async def test_other_errors_are_the_providers_own_words(upstream: Upstream, demo: Target, status: int) -> None:
    answer = await upstream.call(demo, anthropic_wire.PATH, BODY, {b"bursar-demo": f"fail={status}"})
    assert (answer.status, json.loads(await whole(answer))["type"]) == (status, "error")


def test_an_error_tells_nothing_of_the_platforms_account() -> None:
    words = (
        b"Rate limit for gpt-4o in organization org-aBcDeFgHiJkLmNoP on tokens, project proj_aBcDeFgHiJkLmNoP, "
        b"key sk-proj-ab**********YZ; see user-supplied text of an org-wide task-oriented limit"
    )
    assert without_account(words) == (
        b"Rate limit for gpt-4o in organization [removed] on tokens, project [removed], "
        b"key [removed]; see user-supplied text of an org-wide task-oriented limit"
    )


def test_a_key_is_in_no_representation() -> None:
    assert "sk-provider" not in repr(Target(provider("https://x/v1"), "sk-provider"))
