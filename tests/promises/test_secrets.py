"""No key, token, cookie or text of a conversation is in logs, metrics, errors or tables, however calls fail."""

import asyncio
import json
import os
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from aiohttp import web
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict
from tests.conftest import MASTER_KEY, Org
from tests.gateway.conftest import free_port, fund, serve_beside_tests, wait_until_ready

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.gateway.provider_keys import add_provider_key
from bursar.gateway.providers import put_provider
from bursar.gateway.routes import put_model_route
from bursar.identity.api_keys import revoke_api_key
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.identity.sessions import create_sign_in_link, sign_in
from bursar.identity.users import get_user
from bursar.money import Micros
from bursar.sealing import Keyring

MARK = uuid7().hex[-12:]
DEMO = ("fail=500", "fail=401", "fail=999", "break_after=1", "usage=missing", "error_after=1", "nonsense=1")
BAD_KEYS = ("revoked", "mistyped", "cut")
PAGES = ("/o/nowhere", "/api/v1/organizations/nowhere/overview", f"/api/v1/requests/req_{'0' * 32}", "/nowhere")
TABLES = "select schemaname, tablename from pg_tables where schemaname not in ('pg_catalog', 'information_schema')"
MODELS = {"mistral": ("echo-platform", "mistral-large-latest"), "deepseek": ("echo-own", "deepseek-chat")}


def canary(name: str) -> str:
    return f"canary{name}{MARK}"


@dataclass
class Planted:
    """Texts that must stay where they are, by what they are."""

    texts: dict[str, str] = field(default_factory=dict)

    def plant(self, name: str, text: str | None = None) -> str:
        self.texts[name] = text or canary(name)
        return self.texts[name]

    def found_in(self, text: str) -> list[str]:
        return [name for name, secret in self.texts.items() if secret in text]


@asynccontextmanager
async def echoing() -> AsyncIterator[str]:
    """A provider that tells whatever it was told, in errors, answers, headers and streams, and fails on top of it."""

    async def answer(request: web.Request) -> web.StreamResponse:
        text = await request.text()
        told = {"headers": dict(request.headers), "body": text}
        content = json.loads(text)["messages"][-1]["content"]
        if "status 401" in content or "status 400" in content or "status 500" in content:
            status = int(content.split("status ")[1][:3])
            key = request.headers.get("Authorization", "").removeprefix("Bearer ")
            error = {"message": f"Incorrect API key provided: {key}", "type": "invalid_request_error"}
            return web.json_response({"error": error}, status=status, headers={"X-Debug": key})
        if "close" in content:
            assert request.transport is not None
            request.transport.close()
            return web.Response()
        if "odd" in content:
            return web.Response(text=f"<html>{told}</html>", content_type="application/json")
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(b"data: {" + json.dumps(told).encode() + b"\n\ndata: nonsense\n\n")
        return response

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def serving(admin_dsn: str, run_dir: Path, log: Path, log_format: str) -> AsyncIterator[str]:
    """A server process that logs all that it can into a file."""
    port = free_port()
    environment = {
        **os.environ,
        "DATABASE_URL": admin_dsn,
        "BURSAR_MASTER_KEY": MASTER_KEY,
        "BURSAR_DATA_DIR": str(run_dir),
        "BURSAR_LOG_LEVEL": "debug",
        "BURSAR_LOG_FORMAT": log_format,
        "PYTHONASYNCIODEBUG": "1",
    }
    server = _started(serve_beside_tests(port, "-X", "dev"), environment, log)
    try:
        url = f"http://127.0.0.1:{port}"
        await asyncio.to_thread(wait_until_ready, url, server)
        yield url
    finally:
        server.terminate()
        await asyncio.to_thread(server.wait, 60)


def _started(command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


async def fail_in_every_way(url: str, planted: Planted, keys: dict[str, str], cookie: str, token: str) -> list[str]:
    """Many calls; what was answered to those that failed."""
    bearer = {"authorization": f"Bearer {keys['good']}"}
    prompt, system = planted.plant("prompt"), planted.plant("system")

    def call(content: str = "", model: str = "demo-1", **changes: Any) -> dict[str, Any]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": f"{prompt} {content}"}]
        return {"model": model, "max_tokens": 20, "messages": messages, **changes}

    attempts: list[tuple[str, str, dict[str, str], Any]] = []
    for path in ("/v1/chat/completions", "/v1/messages"):
        for model in ("echo-platform", "echo-own"):
            for content in ("status 401", "status 400", "status 500", "close", "odd", "stream"):
                for stream in (False, True):
                    attempts.append(("POST", path, bearer, call(content, model, stream=stream)))
        for demo in DEMO:
            attempts.append(("POST", path, {**bearer, "bursar-demo": demo}, call(stream=demo.startswith("error"))))
        attempts += [
            ("POST", path, bearer, call(max_tokens=9_000_000)),
            ("POST", path, bearer, call(model="no-such-model")),
            ("POST", path, bearer, {**call(), "Messages": prompt}),
            ("POST", path, bearer, {**call(), "messages": {"content": prompt}}),
            ("POST", path, bearer, json.dumps(call())[:-3]),
            ("POST", path, bearer, f"{prompt} is no JSON"),
            ("POST", path, {**bearer, "bursar-organization": "elsewhere"}, call()),
            ("POST", path, {**bearer, "bursar-conversation": "wrong"}, call()),
            ("POST", path, {**bearer, "idempotency-key": "the same"}, call(max_tokens=1)),
            ("POST", path, {**bearer, "idempotency-key": "the same"}, call(max_tokens=2)),
            ("POST", path + "/nothing", bearer, call()),
            *(("POST", path, {"authorization": f"Bearer {keys[name]}"}, call()) for name in BAD_KEYS),
            ("POST", path, {"x-api-key": keys["mistyped"]}, call()),
            ("POST", path, {"authorization": f"Basic {keys['basic']}"}, call()),
        ]
    cookies = {"cookie": f"session_token={cookie}; other={planted.plant('other-cookie')}"}
    forged = {"cookie": f"session_token={planted.plant('forged-cookie', 'Zm9yZ2Vk' * 8 + MARK)}"}
    for headers in (cookies, forged, {"authorization": f"Bearer {keys['revoked']}"}, bearer):
        for path in PAGES:
            attempts.append(("GET", f"{path}?api_key={keys['good']}&token={token}", headers, None))
        attempts.append(("POST", "/sign-out", headers, {"password": prompt}))
        attempts.append(("POST", f"/sign-in/{token}x", {**headers, "sec-fetch-site": "cross-site"}, None))
    unknown = planted.plant("unknown-link", f"bl_{'A' * 40}{MARK}")
    attempts.append(("POST", f"/sign-in/{unknown}", {"sec-fetch-site": "same-origin"}, None))
    attempts.append(("GET", f"/v1/models/{keys['good']}", {}, None))
    attempts.append(("GET", f"/{keys['good']}", {}, None))
    failed = []
    async with httpx2.AsyncClient(base_url=url, timeout=60) as http:
        for method, path, headers, body in attempts:
            content = {"json": body} if isinstance(body, dict) else {"content": body} if body else {}
            answer = await http.request(method, path, headers=headers, **content)
            told = answer.text + str(answer.headers)
            own_words = body is not None and isinstance(body, dict) and "echo-own" in str(body.get("model"))
            if answer.status_code >= 400 and not own_words:
                # A page has its own address in it, which is the reader's to know.
                failed.append(told.replace(path.split("?")[0], "") if "text/html" in told else told)
        failed.append((await http.get("/metrics")).text)
    assert len(failed) > 60
    return failed


@pytest.mark.parametrize("log_format", ["console", "json"])
async def test_secrets_stay_where_they_are(
    org: Org, priced: db.Database, admin_dsn: str, run_dir: Path, tmp_path: Path, log_format: str
) -> None:
    planted = Planted()
    keys = {name: (await org.key(org.admin)) for name in ("good", "revoked")}
    async with org.tenant() as conn:
        await revoke_api_key(
            conn, organization_id=org.organization_id, api_key_id=keys["revoked"].key.api_key_id, by=OPERATOR
        )
    texts = {name: key.text for name, key in keys.items()}
    texts |= {"mistyped": texts["good"][:-2] + "00", "cut": texts["good"][:-9], "basic": canary("basic")}
    for name, text in texts.items():
        planted.plant(f"key-{name}", text.rpartition("_")[2] if name != "basic" else text)
    async with org.database.untenanted() as conn:
        user = await get_user(conn, user_id=org.admin)
    async with org.database.tenant(user.home_organization_id) as conn:
        link = await create_sign_in_link(conn, user=user, by=OPERATOR)
    cookie = (await sign_in(org.database, link)).cookie
    async with org.database.tenant(user.home_organization_id) as conn:
        token = await create_sign_in_link(conn, user=user, by=OPERATOR)
    planted.plant("cookie", cookie)
    planted.plant("link", token.rpartition("_")[2])
    planted.plant("master-key", MASTER_KEY)
    password = conninfo_to_dict(org.database.dsn("bursar_lane"))["password"]
    planted.plant("database-password", str(password))
    await fund(org, Micros(1_000_000_000))
    log = tmp_path / "log"
    async with echoing() as address:
        await _route_to(address, org, priced, planted, log_format)
        async with serving(admin_dsn, run_dir, log, log_format) as url:
            failed = await fail_in_every_way(url, planted, texts, cookie, token)
    assert len(planted.texts) >= 14
    for answer in failed:
        assert planted.found_in(answer) == [], answer[:1500]
    logged = log.read_text()
    assert logged.count("request") > 60, "it logged"
    for line in logged.splitlines():
        assert planted.found_in(line) == [], line[:1500]
    assert await _tables_with(admin_dsn, planted) == []


async def _route_to(address: str, org: Org, priced: db.Database, planted: Planted, suffix: str) -> None:
    """Two models at the provider: with the platform's key, and with the organization's own."""
    keyring = Keyring(priced.settings.master_key)
    async with priced.platform() as conn:
        for name, (model, upstream_model) in MODELS.items():
            await put_provider(conn, name=name, kind="both", base_url=address, by=OPERATOR)
            await put_model_route(conn, model=model, provider=name, upstream_model=upstream_model, by=OPERATOR)
    for organization_id, provider in ((PLATFORM_ORGANIZATION_ID, "mistral"), (org.organization_id, "deepseek")):
        async with priced.tenant(organization_id) as conn:
            await add_provider_key(
                conn,
                keyring,
                organization_id=organization_id,
                provider=provider,
                secret=planted.plant(f"{provider}-key", f"{provider[:3]}{MARK}{suffix}secret"),
                by=OPERATOR,
            )


async def _tables_with(admin_dsn: str, planted: Planted) -> list[tuple[str, str]]:
    """Tables in which any row, as text, has a planted text."""
    found = []
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as conn:
        tables = await (await conn.execute(TABLES)).fetchall()
        for schema, table in tables:
            name = sql.Identifier(schema, table)
            for what, text in planted.texts.items():
                query = sql.SQL("select exists (select from {} t where position(%s in t::text) > 0)").format(name)
                row = await (await conn.execute(query, [text])).fetchone()
                if row is not None and row[0]:
                    found.append((f"{schema}.{table}", what))
    return found
