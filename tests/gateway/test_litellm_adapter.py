"""The contract of the LiteLLM adapter: with the real SDK where it is installed, and with a stand-in for it everywhere.

`BURSAR_TEST_LITELLM_PYTHON` names an interpreter that has LiteLLM, where the tests' own has not.
"""

import asyncio
import base64
import importlib.util
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn
from aiohttp import web
from tests.conftest import MakeOrg
from tests.fakes import gemini
from tests.fakes.serving import serving
from tests.gateway.conftest import Payer, fund
from tests.gateway.test_compatible_providers import HEAD, HELLO, charges

from bursar import db
from bursar.app import create_app
from bursar.asgi import Protocol
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.gateway import adapter_process, litellm_adapter
from bursar.gateway.adapter_process import AdapterProcess, AdapterUnavailable
from bursar.gateway.provider_keys import add_provider_key
from bursar.gateway.providers import Provider, put_provider
from bursar.gateway.routes import put_model_route
from bursar.gateway.upstream import ProviderRefusesUs, Target, Upstream
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.money import Micros
from bursar.pricing.files import read
from bursar.pricing.importing import accepted, import_list
from bursar.sealing import Keyring
from bursar.settings import Settings

STANDIN = Path(__file__).parents[1] / "fakes" / "litellm_standin"
IS_INSTALLED = importlib.util.find_spec("litellm") is not None
CHAT: dict[str, Any] = {"model": gemini.MODEL, "messages": HELLO, "max_tokens": 9}


@dataclass(frozen=True, slots=True)
class Sdk:
    """An SDK to try the adapter with: the interpreter that has it, and what the process needs to find it."""

    python: Path | None
    environment: dict[str, str]


def sdk_of(name: str) -> Sdk:
    if name == "stand-in":
        return Sdk(None, {"PYTHONPATH": str(STANDIN)})
    elsewhere = os.environ.get("BURSAR_TEST_LITELLM_PYTHON")
    if not IS_INSTALLED and not elsewhere:
        pytest.skip("LiteLLM is not installed, and BURSAR_TEST_LITELLM_PYTHON names no interpreter that has it")
    return Sdk(None if IS_INSTALLED or not elsewhere else Path(elsewhere), {})


@dataclass(frozen=True, slots=True)
class Scene:
    """A running adapter in front of a fake Gemini."""

    adapter: AdapterProcess
    server: gemini.Gemini
    address: str
    upstream: Upstream

    async def target(self, *, key: str | None = gemini.KEY, **columns: Any) -> Target:
        """Gemini by way of the adapter; its answers are read as those of a customer's own key, unchanged."""
        values: dict[str, Any] = {"base_url": f"{self.address}/v1beta", **columns}
        values.setdefault("litellm_provider", "gemini")
        provider = Provider(name="google", provider_id=uuid7(), kind="litellm", **values)
        return Target(await self.adapter.reached(provider), key, is_own_key=True)

    async def call(
        self, body: dict[str, Any], target: Target | None = None, path: str = "/chat/completions"
    ) -> tuple[int, bytes]:
        """Status and whole body."""
        answer = await self.upstream.call(target or await self.target(), path, json.dumps(body).encode(), {})
        async with answer:
            return answer.status, await answer.read()


@asynccontextmanager
async def scene_of(sdk: Sdk) -> AsyncIterator[Scene]:
    server, upstream = gemini.Gemini(), Upstream()
    try:
        async with (
            serving(server.application()) as address,
            adapter_process.running(sdk.python, environment=sdk.environment) as adapter,
        ):
            yield Scene(adapter, server, address, upstream)
    finally:
        await upstream.close()


@pytest.fixture(scope="module", params=["stand-in", "real"])
async def scene(request: pytest.FixtureRequest) -> AsyncIterator[Scene]:
    async with scene_of(sdk_of(request.param)) as made:
        yield made


def events_of(body: bytes) -> list[Any]:
    return [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]


# -- what goes through


async def test_a_chat_comes_back_in_openais_form_with_the_providers_count(scene: Scene) -> None:
    status, body = await scene.call({**CHAT, "temperature": 0.5})
    answer = json.loads(body)
    assert (status, answer["model"]) == (200, gemini.MODEL)
    assert answer["choices"][0]["message"]["content"] == "Good day to you"
    assert (answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]) == (70, 4)
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 20
    sent = scene.server.seen[-1].body
    assert sent["contents"] == [{"role": "user", "parts": [{"text": "hello there"}]}]
    assert sent["generationConfig"]["max_output_tokens"] == 9


async def test_a_stream_comes_piece_by_piece_and_its_usage_once_at_the_end(scene: Scene) -> None:
    status, body = await scene.call({**CHAT, "stream": True, "stream_options": {"include_usage": True}})
    assert (status, body.endswith(b"data: [DONE]\n\n")) == (200, True)
    *chunks, last = events_of(body)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == "Good day to you"
    assert not any("usage" in chunk for chunk in chunks)
    assert [chunk["choices"][0].get("finish_reason") for chunk in chunks if chunk["choices"]].count("stop") == 1
    assert (last["choices"], last["usage"]["prompt_tokens"], last["usage"]["completion_tokens"]) == ([], 70, 4)


@pytest.mark.parametrize("stream", [False, True])
async def test_where_the_provider_counts_nothing_nothing_is_made_up(scene: Scene, stream: bool) -> None:
    _, body = await scene.call({**CHAT, "messages": [{"role": "user", "content": "no usage"}], "stream": stream})
    usage = events_of(body)[-1].get("usage") if stream else json.loads(body).get("usage")
    assert usage is None or usage["total_tokens"] == 0


async def test_embeddings_come_as_numbers_and_as_the_official_client_asks_for_them(scene: Scene) -> None:
    target = await scene.target()
    call = {"model": gemini.EMBEDDER, "input": ["a", "bcd"]}
    status, body = await scene.call(call, target, "/embeddings")
    answer = json.loads(body)
    assert status == 200, answer
    assert [each["embedding"] for each in answer["data"]] == [[1.0, 0.5, -1.0], [3.0, 0.5, -1.0]]
    assert answer["usage"]["completion_tokens"] == 0
    _, body = await scene.call({**call, "encoding_format": "base64"}, target, "/embeddings")
    packed = base64.b64decode(json.loads(body)["data"][1]["embedding"])
    assert struct.unpack("<3f", packed) == (3.0, 0.5, -1.0)


async def test_a_key_of_several_parts_signs_the_call_as_the_cloud_wants_it() -> None:
    """Bedrock: its address, AWS's signature with the parts of the key, its own form of question and answer."""
    sdk, seen = sdk_of("real"), []

    async def converse(request: web.Request) -> web.Response:
        seen.append((request.raw_path, request.headers["Authorization"], await request.json()))
        message = {"role": "assistant", "content": [{"text": "Good day to you"}]}
        usage = {"inputTokens": 70, "outputTokens": 4, "totalTokens": 74}
        return web.json_response({"output": {"message": message}, "stopReason": "end_turn", "usage": usage})

    app = web.Application()
    app.router.add_post("/model/{model}/converse", converse)
    key = {"aws_access_key_id": "AKIAEXAMPLE", "aws_secret_access_key": "the secret", "aws_region_name": "eu-west-3"}
    async with serving(app) as address, scene_of(sdk) as made:
        target = await made.target(key=json.dumps(key), base_url=address, litellm_provider="bedrock")
        status, body = await made.call({**CHAT, "model": "anthropic.claude-3-haiku-20240307-v1:0"}, target)
        assert (status, json.loads(body)["choices"][0]["message"]["content"]) == (200, "Good day to you")
        assert json.loads(body)["usage"]["prompt_tokens"] == 70
        for bad in ('{"aws_role_name": "x"}', '{"aws'):
            got, answer = await made.call(CHAT, await made.target(key=bad))
            assert (got, "provider key" in json.loads(answer)["error"]["message"]) == (401, True)
    [(path, signature, question)] = seen
    assert path == "/model/anthropic.claude-3-haiku-20240307-v1%3A0/converse"
    assert signature.startswith("AWS4-HMAC-SHA256 Credential=AKIAEXAMPLE/")
    assert "/eu-west-3/bedrock/" in signature
    assert question["messages"] == [{"role": "user", "content": [{"text": "hello there"}]}]


# -- what goes wrong


@pytest.mark.parametrize("status", [400, 429, 500, 503])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_providers_failure_keeps_its_status_and_words_but_no_key(
    scene: Scene, status: int, stream: bool
) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": f"fail {status}"}], "stream": stream}
    got, answer = await scene.call(body)
    error = json.loads(answer)["error"]
    assert (got, f"Gemini says {status}" in error["message"]) == (status, True)
    assert gemini.KEY not in answer.decode()


async def test_a_wrong_key_is_401_and_is_not_repeated(scene: Scene) -> None:
    wrong = "AIzaSy-wrong-0123456789"
    got, answer = await scene.call(CHAT, await scene.target(key=wrong))
    assert (got, wrong in answer.decode()) == (401, False)
    platforms = replace(await scene.target(key=wrong), is_own_key=False)
    with pytest.raises(ProviderRefusesUs):
        await scene.call(CHAT, platforms)


async def test_a_provider_that_is_not_there_is_502(scene: Scene) -> None:
    target = await scene.target(base_url="http://127.0.0.1:9/v1beta")
    got, _ = await scene.call(CHAT, target)
    assert got in (500, 502, 503)


SDKS_OWN = (
    *("api_base", "base_url", "api_key", "custom_llm_provider", "mock_response", "fallbacks", "callbacks", "metadata"),
    *("extra_headers", "model_list", "timeout", "no-log", "litellm_params", "aws_role_name", "cache", "whatever"),
)


@pytest.mark.parametrize("field", SDKS_OWN)
async def test_what_is_not_openais_is_refused_and_never_reaches_the_sdk(scene: Scene, field: str) -> None:
    before = len(scene.server.seen)
    got, answer = await scene.call({**CHAT, field: "x"})
    assert (got, json.loads(answer)["error"]["code"]) == (400, "unknown_parameter")
    assert len(scene.server.seen) == before


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "http://169.254.169.254/latest/meta-data"}},
        {"type": "image_url", "image_url": "https://acme.example/picture.png"},
        {"type": "file", "file": {"file_id": "https://acme.example/book.pdf"}},
        {"type": "file", "file": {"file_id": "gs://bucket/book.pdf"}},
        {"type": "video_url", "video_url": {"url": "file:///etc/passwd"}},
    ],
)
async def test_nothing_is_fetched_from_where_the_adapter_runs(scene: Scene, part: dict[str, Any]) -> None:
    got, answer = await scene.call({**CHAT, "messages": [{"role": "user", "content": [part]}]})
    assert (got, json.loads(answer)["error"]["code"]) == (400, "address_not_fetched")


async def test_other_paths_say_what_is_served(scene: Scene) -> None:
    got, answer = await scene.call({"model": "x", "prompt": "a cat"}, path="/images/generations")
    assert (got, json.loads(answer)["error"]["code"]) == (404, "not_served")


async def test_only_whoever_started_it_is_let_in(scene: Scene) -> None:
    target = await scene.target()
    stranger = replace(target.provider, headers={**target.provider.headers, litellm_adapter.TOKEN_HEADER: "guessed"})
    got, answer = await scene.call(CHAT, replace(target, provider=stranger))
    assert (got, json.loads(answer)["error"]["message"]) == (401, "This is not for you")


async def test_a_reader_who_goes_ends_the_call_at_the_provider(scene: Scene) -> None:
    before = scene.server.cut
    body = {**CHAT, "messages": [{"role": "user", "content": "endless"}], "stream": True}
    answer = await scene.upstream.call(await scene.target(), "/chat/completions", json.dumps(body).encode(), {})
    async for _ in answer.pieces():
        break
    await answer.close()
    for _ in range(200):
        if scene.server.cut > before:
            break
        await asyncio.sleep(0.05)
    assert scene.server.cut > before, "the provider is still talking"


# -- the process


async def test_a_killed_process_is_started_anew_at_the_same_address(scene: Scene) -> None:
    target = await scene.target()
    pid = scene.adapter.pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    while scene.adapter.pid == pid:
        await asyncio.sleep(0.01)
    again = await scene.target()
    assert again.provider.base_url == target.provider.base_url
    assert scene.adapter.pid != pid
    assert (await scene.call(CHAT, target))[0] == 200


async def test_it_runs_while_it_is_wanted_and_no_longer() -> None:
    async with scene_of(sdk_of("stand-in")) as made:
        await made.target()
        pid = made.adapter.pid
        made.adapter.want(False)
        while made.adapter.pid is not None:
            await asyncio.sleep(0.01)
        with pytest.raises(ProcessLookupError):
            os.kill(pid or 0, 0)
        assert (await made.call(CHAT))[0] == 200, "and is started when it is wanted again"


async def test_it_has_nothing_of_the_servers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_API_KEY", "GEMINI_API_KEY", "DATABASE_URL", "BURSAR_MASTER_KEY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "canary")
    async with scene_of(sdk_of("stand-in")) as made:
        await made.target()
        pid = made.adapter.pid
        environment = _environment_of(pid)
        assert not [name for name, value in environment.items() if value == "canary"]
        home = environment["HOME"]
        assert _is_there(home)
    assert not _is_there(home)
    assert not _is_there(f"/proc/{pid}")


def _is_there(path: str) -> bool:
    return Path(path).exists()


def _environment_of(pid: int | None) -> dict[str, str]:
    file = Path(f"/proc/{pid}/environ")
    if not file.exists():
        pytest.skip("this system does not show the environment of processes")
    return dict(line.split("=", 1) for line in file.read_text().split("\0") if line)


def test_it_ends_with_whoever_started_it() -> None:
    command = [sys.executable, "-P", str(Path(litellm_adapter.__file__))]
    environment = {"PYTHONPATH": str(STANDIN), litellm_adapter.TOKEN_VARIABLE: "x"}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    assert "port" in json.loads(process.stdout.readline())
    process.stdin.close()  # as the kernel does when the server is killed
    assert process.wait(timeout=30) == 0
    process.stdout.close()


async def test_the_fault_of_the_sdk_itself_says_nothing() -> None:
    async with scene_of(sdk_of("stand-in")) as made:
        got, answer = await made.call({**CHAT, "seed": 666})
    assert (got, json.loads(answer)["error"]["message"]) == (500, "The LiteLLM adapter failed: RuntimeError")


@pytest.mark.skipif(IS_INSTALLED, reason="LiteLLM is installed here")
async def test_without_litellm_the_refusal_says_what_is_missing_and_what_to_do() -> None:
    async with scene_of(Sdk(None, {})) as made:
        with pytest.raises(
            AdapterUnavailable, match=r"LiteLLM is not installed .* The operator installs it"
        ) as refused:
            await made.target()
    assert refused.value.status == 503


async def test_a_release_that_steals_is_never_imported(tmp_path: Path) -> None:
    package, info = tmp_path / "litellm", tmp_path / "litellm-1.82.8.dist-info"
    package.mkdir()
    info.mkdir()
    (package / "__init__.py").write_text(f"open({str(tmp_path / 'stolen')!r}, 'w')")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: litellm\nVersion: 1.82.8\n")
    async with scene_of(Sdk(None, {"PYTHONPATH": str(tmp_path)})) as made:
        with pytest.raises(AdapterUnavailable, match="steals credentials"):
            await made.target()
    assert not (tmp_path / "stolen").exists()


async def test_one_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    (tmp_path / "litellm.py").write_text("import no_such_module")
    async with scene_of(Sdk(None, {"PYTHONPATH": str(tmp_path)})) as made:
        with pytest.raises(AdapterUnavailable, match="No module named 'no_such_module'"):
            await made.target()


def test_the_real_sdk_asks_nobody_while_it_is_imported() -> None:
    sdk = sdk_of("real")
    program = (
        "import socket, sys\n"
        "def refuse(*arguments, **named): print('asked', arguments, file=sys.stderr); raise OSError('no network')\n"
        "socket.getaddrinfo = socket.socket.connect = socket.create_connection = refuse\n"
        f"import runpy; runpy.run_path({litellm_adapter.__file__!r})['load_sdk']()\n"
        "print('loaded')\n"
    )
    done = subprocess.run(
        [str(sdk.python or sys.executable), "-P", "-c", program], capture_output=True, text=True, timeout=120, env={}
    )
    assert (done.stdout, "asked" in done.stderr) == ("loaded\n", False), done.stderr


# -- through the gateway


@asynccontextmanager
async def gateway(database: db.Database, settings: Settings, sdk: Sdk) -> AsyncIterator[str]:
    """An application of its own, whose adapter uses an SDK; its base URL."""
    with pytest.MonkeyPatch.context() as patch:
        start = partial(adapter_process.running, environment=sdk.environment)
        patch.setattr("bursar.gateway.opening.adapter_process.running", lambda _: start(sdk.python))
        app = create_app(database, settings)
        config = uvicorn.Config(app, port=0, log_config=None, access_log=False, http=Protocol, ws="none")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
            assert not task.done(), "the server ended"
        try:
            yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        finally:
            server.should_exit = True
            await task


async def add_gemini(database: db.Database, base_url: str, *, key: str = gemini.KEY, **columns: Any) -> str:
    """A provider of the kind litellm with a price and a key; its name."""
    name = f"google-{uuid7().hex[-12:]}"
    kinds = {"input_tokens": 1, "cache_read_tokens": 0.5, "output_tokens": 4}
    rows = [f"{name},{gemini.MODEL},{kind},{usd},1M tokens,,,,,,," for kind, usd in kinds.items()]
    async with database.platform() as conn:
        await import_list(conn, accepted(read(HEAD + "\n".join(rows), list_name=name, version="1")), by=OPERATOR)
        await put_provider(
            conn, name=name, kind="litellm", base_url=base_url, litellm_provider="gemini", by=OPERATOR, **columns
        )
    async with database.tenant(PLATFORM_ORGANIZATION_ID) as conn:
        await add_provider_key(
            conn,
            Keyring(database.settings.master_key),
            organization_id=PLATFORM_ORGANIZATION_ID,
            provider=name,
            secret=key,
            by=OPERATOR,
        )
    return name


@pytest.mark.parametrize("name", ["stand-in", "real"])
async def test_gemini_is_charged_by_our_prices_like_any_other_provider(
    payer: Payer, priced: db.Database, settings: Settings, name: str
) -> None:
    sdk, server = sdk_of(name), gemini.Gemini()
    async with serving(server.application()) as address:
        provider = await add_gemini(priced, f"{address}/v1beta")
        async with gateway(priced, settings, sdk) as url:
            client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{url}/v1", max_retries=0)
            call: dict[str, Any] = {**CHAT, "model": f"{provider}/{gemini.MODEL}"}
            answer = await client.chat.completions.create(**call)
            assert answer.choices[0].message.content == "Good day to you"
            chunks = [chunk async for chunk in await client.chat.completions.create(**call, stream=True)]
            assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Good day to you"
            assert all(chunk.usage is None for chunk in chunks)
            with pytest.raises(openai.RateLimitError, match="Gemini says 429"):
                await client.chat.completions.create(**{**call, "messages": [{"role": "user", "content": "fail 429"}]})
    # 50 tokens at 1, 20 at half and 4 at 4 dollars a million, whatever the SDK's own price list says.
    assert await charges(payer, 2) == [(7_600, 50, 20, 4, False)] * 2
    async with priced.platform() as conn:
        await put_provider(conn, name=provider, enabled=False, by=OPERATOR)


@pytest.mark.skipif(IS_INSTALLED, reason="LiteLLM is installed here")
async def test_without_litellm_its_providers_are_refused_all_others_serve_and_own_keys_never_become_a_charge(
    payer: Payer, make_org: MakeOrg, priced: db.Database, settings: Settings
) -> None:
    own = await make_org()
    provider = await add_gemini(priced, "http://127.0.0.1:9/v1beta")
    async with gateway(priced, settings, Sdk(None, {})) as url:
        client = openai.AsyncOpenAI(api_key=payer.key, base_url=f"{url}/v1", max_retries=0)
        with pytest.raises(openai.InternalServerError, match="LiteLLM is not installed") as refused:
            await client.chat.completions.create(**{**CHAT, "model": f"{provider}/{gemini.MODEL}"})
        assert (refused.value.status_code, refused.value.code) == (503, "litellm_unavailable")
        await client.chat.completions.create(**{**CHAT, "model": "demo-1"})
        async with priced.platform() as conn:
            name = f"alias-{uuid7().hex}"
            await put_model_route(
                conn, model=name, provider=provider, upstream_model=gemini.MODEL, fallbacks=["demo/demo-1"], by=OPERATOR
            )
        await asyncio.sleep(5.1)  # running servers follow
        fallen = await client.chat.completions.create(**{**CHAT, "model": name})
        assert fallen.model == "demo-1"
        await fund(own, Micros(10**9))
        async with own.tenant() as conn:
            await add_provider_key(
                conn,
                Keyring(settings.master_key),
                organization_id=own.organization_id,
                provider=provider,
                secret="the-customers-own",
                by=OPERATOR,
            )
        owner = openai.AsyncOpenAI(
            api_key=(await own.key(await own.member())).text, base_url=f"{url}/v1", max_retries=0
        )
        with pytest.raises(openai.InternalServerError, match="LiteLLM is not installed"):
            await owner.chat.completions.create(**{**CHAT, "model": name})
    async with priced.platform() as conn:
        await put_provider(conn, name=provider, enabled=False, by=OPERATOR)
