"""Pages over HTTP without a server, and in a real browser against one in this process."""

import asyncio
import os
import shutil
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI
from playwright.async_api import Browser, async_playwright

from bursar import db
from bursar.app import create_app
from bursar.audit.events import OPERATOR
from bursar.clock import now, uuid7
from bursar.credits.grants import GrantSource, add_grant
from bursar.credits.moves import Action, Move
from bursar.credits.pools import pool_for
from bursar.identity.addresses import Address
from bursar.identity.api_keys import create_api_key
from bursar.identity.departments import create_department
from bursar.identity.memberships import add_membership
from bursar.identity.roles import Role
from bursar.identity.sessions import create_sign_in_link, sign_in
from bursar.identity.users import get_user
from bursar.money import Micros, NanoUsd, credits
from bursar.settings import Settings

CHROMIUM_FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
MODELS = ["opus", "sonnet", "haiku", "gpt-5", "gpt-5-mini", "gemini", "mistral"]
HOSTILE = """</title><script>alert(1)</script>"'&{{7*7}}<img src=x onerror=alert(2)>"""

Cookie = Callable[[UUID], Awaitable[str]]


@pytest.fixture
def app(database: db.Database, settings: Settings) -> FastAPI:
    """The whole application, without the gateway's lanes and the worker."""
    return create_app(database, settings, parts=())


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx2.AsyncClient]:
    """A browser without script: takes HTML, keeps cookies, says where its requests come from."""
    headers = {"sec-fetch-site": "same-origin", "accept": "text/html,*/*;q=0.8"}
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost", headers=headers) as client:
        yield client


@pytest.fixture
def cookie_of(database: db.Database) -> Cookie:
    """Signs a person in: the value of their session cookie."""

    async def start(user_id: UUID) -> str:
        async with database.untenanted() as conn:
            user = await get_user(conn, user_id=user_id)
        async with database.tenant(user.home_organization_id) as conn:
            token = await create_sign_in_link(conn, user=user, by=OPERATOR)
        return (await sign_in(database, token)).cookie

    return start


@dataclass(frozen=True, slots=True)
class Busy:
    """An organization with usage in every breakdown, and its administrator's session."""

    org: Any
    cookie: str

    @property
    def path(self) -> str:
        return f"/o/{self.org.slug}"

    @property
    def api(self) -> str:
        return f"/api/v1/organizations/{self.org.slug}/overview"


@pytest.fixture
async def busy(make_org, simulate, cookie_of: Cookie) -> Busy:
    """Seven people, keys, seven models, two departments, a hold, an overage; names meant to break pages."""
    org = await make_org(name=f"Acme {HOSTILE}", zone="Europe/Paris", shows_margin=True)
    people = [await _person(org, f"Person {number} {HOSTILE}") for number in range(7)]
    async with org.tenant() as conn:
        place = {"organization_id": org.organization_id, "by": OPERATOR}
        await create_department(conn, name=f"R&D {HOSTILE}", **place)
        keys = [
            (await create_api_key(conn, user_id=person, name=f"Key {HOSTILE}", **place)).key.api_key_id
            for person in people
        ]
        pool_id = await pool_for(conn, organization_id=org.organization_id)
        await add_grant(
            conn,
            organization_id=org.organization_id,
            pool_id=pool_id,
            amount_micros=credits(10_000),
            source=GrantSource.PURCHASE,
            idempotency_key="first",
        )
    moves = [
        _deduct(org, people[at % 7], keys[at % 7] if at % 3 else None, MODELS[at * at % 7], at) for at in range(150)
    ]
    assert all(verdict.accepted for verdict in await simulate(moves))
    hold = Move(
        action=Action.AUTHORIZE,
        organization_id=org.organization_id,
        request_id=uuid7(),
        user_id=people[0],
        amount_micros=credits(12),
        model="opus",
        lease_seconds=3600,
    )
    await simulate([hold])
    return Busy(org, await cookie_of(org.admin))


async def _person(org: Any, name: str) -> UUID:
    user = await org.user(email := f"{uuid7().hex}@{org.slug}.example")
    async with org.tenant() as conn:
        await add_membership(
            conn,
            organization_id=org.organization_id,
            user_id=user.user_id,
            address=Address.of(email, org.database.settings),
            display_name=name,
            roles=[Role.MEMBER],
            by=OPERATOR,
        )
    return UUID(str(user.user_id))


def _deduct(org: Any, user_id: UUID, key: UUID | None, model: str, at: int) -> Move:
    charged = 1_000_003 * (1 + at % 17)
    return Move(
        action=Action.DEDUCT,
        organization_id=org.organization_id,
        request_id=uuid7(),
        user_id=user_id,
        api_key_id=key,
        amount_micros=Micros(charged),
        cost_nano_usd=NanoUsd(charged * 7),
        provider="demo",
        model=model,
        used_at=_some_time_ago(at),
    )


def _some_time_ago(at: int) -> datetime:
    return now() - timedelta(hours=9.7 * at)


@pytest.fixture(scope="session")
async def chromium() -> AsyncIterator[Browser]:
    """The system's Chromium."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    path = os.environ.get("BURSAR_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium found; set BURSAR_CHROMIUM or install the package chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=CHROMIUM_FLAGS)
        yield browser
        await browser.close()


@pytest.fixture
async def site(app: FastAPI) -> AsyncIterator[str]:
    """The application behind a port of this machine; its address."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off"))
        serving = asyncio.create_task(server.serve([listener]))
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        await serving
