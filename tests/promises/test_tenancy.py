"""No organization reaches another: every operation, every kind of caller, for a foreign and an unknown name."""

import json
import re
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx2
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import fund

from bursar import db
from bursar.app import ROUTERS, create_app
from bursar.audit.events import OPERATOR
from bursar.clock import now, uuid7
from bursar.credits.limits import Scope as LimitScope
from bursar.credits.limits import set_limit
from bursar.credits.pools import PoolKind, open_pool
from bursar.gateway.provider_keys import add_provider_key
from bursar.gateway.providers import put_provider
from bursar.identity.api_keys import revoke_api_key
from bursar.identity.departments import create_department
from bursar.identity.roles import Role, Scope
from bursar.identity.sessions import create_sign_in_link, sign_in
from bursar.identity.teams import create_team
from bursar.identity.users import get_user
from bursar.money import Micros
from bursar.sealing import Keyring
from bursar.settings import Settings

CANARY = "Zanzibar7Canary"
CALL: dict[str, Any] = {
    "model": "demo-1",
    "max_tokens": 20,
    "messages": [{"role": "user", "content": f"tell me of {CANARY}"}],
}
UNKNOWN = {
    "org": "no-such-organization",
    "request_id": f"req_{uuid7().hex}",
    "token": "bl_nothing",
    "msgbatch": f"msgbatch_{uuid7().hex}",
    "batch": f"batch_{uuid7().hex}",
    "file": f"file-{uuid7().hex}",
}
BATCHED = {"custom_id": "one", "params": {**CALL, "model": "demo-claude"}}
LINE = {"custom_id": "one", "method": "POST", "url": "/v1/chat/completions", "body": CALL}

# What each operation asks for: a permission of the organization in its path; or of its own.
NEEDS = {
    "GET /api/v1/organizations/{org}/overview": "usage:read",
    "GET /api/v1/organizations/{org}/overview.csv": "usage:read",
    "GET /api/v1/organizations/{org}/why": "a member",
    "GET /api/v1/organizations/{org}/model-rules": "limits:read",
    "POST /api/v1/organizations/{org}/model-rules": "limits:write",
    "DELETE /api/v1/organizations/{org}/model-rules/{rule_id}": "a rule",
    "GET /api/v1/requests/{request_id}": "one's own",
    "POST /api/v1/codes/redeem": "codes:redeem",
    "POST /api/v1/credits/authorize": "charges:write",
    "POST /api/v1/credits/deduct": "charges:write",
    "POST /api/v1/credits/extend": "a hold",
    "POST /api/v1/credits/settle": "a hold",
    "POST /api/v1/credits/release": "a hold",
    "GET /sign-in/{token}": "nothing",
    "POST /sign-in/{token}": "a link",
    "POST /sign-out": "nothing",
    "POST /session/organization/{org}": "a session",
    "GET /o/{org}": "usage:read",
    "GET /": "a session",
    "GET /sign-in": "nothing",
    "POST /appearance/{theme}": "nothing",
    "GET /static/{name}": "nothing",
    "GET /healthz": "nothing",
    "GET /readyz": "nothing",
    "GET /metrics": "nothing",
    "POST /v1/chat/completions": "inference",
    "POST /v1/messages": "inference",
    "GET /v1/models": "inference",
    "GET /v1/models/{model}": "inference",
    "POST /v1/messages/batches": "inference",
    "GET /v1/messages/batches": "inference",
    "GET /v1/messages/batches/{msgbatch}": "a batch",
    "POST /v1/messages/batches/{msgbatch}/cancel": "a batch",
    "DELETE /v1/messages/batches/{msgbatch}": "a batch",
    "GET /v1/messages/batches/{msgbatch}/results": "a batch",
    "POST /v1/files": "inference",
    "GET /v1/files/{file}": "a batch",
    "DELETE /v1/files/{file}": "a batch",
    "GET /v1/files/{file}/content": "a batch",
    "POST /v1/batches": "a batch",
    "GET /v1/batches": "inference",
    "GET /v1/batches/{batch}": "a batch",
    "POST /v1/batches/{batch}/cancel": "a batch",
}
# Pages, and what the operator asks, are not in the document for programs; the gateway's paths are the vendors'.
UNDOCUMENTED = {
    "GET /o/{org}",
    "GET /",
    "GET /sign-in",
    "POST /appearance/{theme}",
    "GET /static/{name}",
    "GET /healthz",
    "GET /readyz",
    "GET /metrics",
}
IN_ORGANIZATION = [each for each in NEEDS if "{org}" in each and NEEDS[each] != "a session"]
GATEWAY = [each for each in NEEDS if " /v1" in each and NEEDS[each] == "inference"]
GATEWAY_FILES, MESSAGE_BATCHES = "POST /v1/files", "POST /v1/messages/batches"
OF_BATCHES = [each for each in NEEDS if NEEDS[each] == "a batch"]


@dataclass(frozen=True, slots=True)
class Victim:
    """An organization whose every name has the canary, with a charged request."""

    org: Org
    member: UUID
    member_key: str
    admin_key: str
    request_id: str
    api_key_id: UUID


@dataclass(frozen=True, slots=True)
class Caller:
    """Headers of a kind of caller."""

    name: str
    headers: dict[str, str]


@pytest.fixture
async def victim(make_org: MakeOrg, priced: db.Database, http: httpx2.AsyncClient) -> Victim:
    org = await make_org(name=f"{CANARY} Ltd", shows_margin=True)
    names = {"organization_id": org.organization_id, "by": OPERATOR}
    async with org.tenant() as conn:
        department = await create_department(conn, name=f"{CANARY} Sales", **names)
        team = await create_team(conn, name=f"{CANARY} Field", department_id=department.department_id, **names)
        await open_pool(
            conn,
            organization_id=org.organization_id,
            kind=PoolKind.SHARED,
            name=f"{CANARY} experiments",
            model_filter="demo-1-mini%",
        )
    await fund(org, Micros(1_000_000_000))
    member = await org.member(email=f"{CANARY}-{uuid7().hex}@victim.example", team_id=team.team_id)
    member_key, admin_key = await org.key(member), await org.key(org.admin)
    async with priced.platform() as conn:
        await put_provider(conn, name="cohere", kind="openai", base_url="https://api.cohere.com/v1", by=OPERATOR)
    async with org.tenant() as conn:
        await set_limit(
            conn,
            organization_id=org.organization_id,
            scope=LimitScope.KEY,
            scope_id=member_key.key.api_key_id,
            amount=10**9,
        )
        await add_provider_key(
            conn, Keyring(priced.settings.master_key), provider="cohere", secret=f"gsk_{CANARY}", name=CANARY, **names
        )
    answer = await http.post("/v1/chat/completions", json=CALL, headers=bearer(member_key.text))
    assert answer.status_code == 200
    return Victim(
        org, member, member_key.text, admin_key.text, answer.headers["x-request-id"], member_key.key.api_key_id
    )


@pytest.fixture
def app(database: db.Database, settings: Settings) -> FastAPI:
    return create_app(database, settings, parts=())


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


async def cookie_of(org: Org, user_id: UUID) -> dict[str, str]:
    """A session of a person: headers of a request from our own page."""
    async with org.database.untenanted() as conn:
        user = await get_user(conn, user_id=user_id)
    async with org.database.tenant(user.home_organization_id) as conn:
        token = await create_sign_in_link(conn, user=user, by=OPERATOR)
    cookie = (await sign_in(org.database, token)).cookie
    return {"cookie": f"session_token={cookie}", "sec-fetch-site": "same-origin"}


async def strangers(make_org: MakeOrg) -> list[Caller]:
    """Everyone with a valid key or session of another organization."""
    other = await make_org()
    await fund(other, Micros(1_000_000_000))
    return [
        Caller("administrator of another", bearer((await other.key(other.admin)).text)),
        Caller("member of another", bearer((await other.key(await other.member())).text)),
        Caller("service of another", bearer((await other.key()).text)),
        Caller("session of another", await cookie_of(other, other.admin)),
    ]


def operations(app: FastAPI) -> set[str]:
    """Of the document."""
    document = app.openapi()
    return {f"{method.upper()} {path}" for path, methods in document["paths"].items() for method in methods}


async def ask(http: httpx2.AsyncClient, operation: str, headers: dict[str, str], **names: str) -> httpx2.Response:
    """One call. names: of the path; what is left over goes into the query."""
    method, template = operation.split(" ")
    names.setdefault("rule_id", f"rule_{uuid7().hex}")
    batched = {name: names.pop(name, UNKNOWN[name]) for name in ("msgbatch", "batch", "file")}
    path = re.sub(r"\{(\w+)\}", lambda found: batched.get(found[1]) or names.pop(found[1]), template)
    names.pop("rule_id", None)
    body: dict[str, Any] = {"json": CALL} if method == "POST" and path.startswith("/v1") else {}
    if operation == "POST /v1/messages/batches":
        body = {"json": {"requests": [BATCHED]}}
    if operation == "POST /v1/files":
        body = {"data": {"purpose": "batch"}, "files": {"file": ("asked.jsonl", json.dumps(LINE).encode())}}
    if operation == "POST /v1/batches":
        endpoint = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
        body = {"json": {"input_file_id": batched["file"], **endpoint}}
    if NEEDS[operation] == "limits:write":
        body = {"json": {"effect": "allow", "pattern": "%"}}
    if NEEDS[operation] == "codes:redeem":
        body = {"json": {"code": "00000-00000-00000-00000"}}
    if NEEDS[operation] == "charges:write":
        body = {"json": {"amount": {"amount": "0.01", "unit": "credit"}}}
    if NEEDS[operation] == "a hold":
        amount = {"amount": {"amount": "0", "unit": "credit"}} if template.endswith("settle") else {}
        body = {"json": {"request_id": names.pop("request_id", UNKNOWN["request_id"]), **amount}}
    return await http.request(method, path, headers=headers, params=names, follow_redirects=False, **body)


def shape(answer: httpx2.Response) -> Any:
    """Status and body, but for what is of one request only, or what the caller wrote."""
    kind = answer.headers.get("content-type", "").split(";")[0]
    text = re.sub(r"req_[0-9a-f]{32}", "req", answer.text)
    for name in UNKNOWN.values():
        text = text.replace(name, "name")
    return answer.status_code, kind, json.loads(text) if "json" in kind else text


def assert_no_canary(answer: httpx2.Response, *, who: str) -> None:
    told = answer.text + "".join(f"{name}: {value}\n" for name, value in answer.headers.items())
    assert CANARY.lower() not in told.lower(), f"{who}: {told[:2000]}"


def test_every_operation_is_in_the_document_and_in_the_table_of_this_test(app: FastAPI) -> None:
    routes = {
        f"{method} {route.path}"
        for router in ROUTERS
        for route in router.routes
        if isinstance(route, APIRoute)
        for method in route.methods
    }
    assert operations(app) | UNDOCUMENTED == routes
    assert routes == {each for each in NEEDS if " /v1" not in each}, "say in NEEDS what a new operation asks for"


async def test_a_foreign_and_an_unknown_organization_answer_alike_and_tell_nothing(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    asked = 0
    for caller in await strangers(make_org):
        for operation in [*IN_ORGANIZATION, "POST /session/organization/{org}"]:
            unknown = await ask(http, operation, caller.headers, org=UNKNOWN["org"])
            unknown_id = await ask(http, operation, caller.headers, org=str(uuid7()))
            for org in (victim.org.slug, str(victim.org.organization_id), f"{victim.org.slug}".upper()):
                answer = await ask(http, operation, caller.headers, org=org)
                who = f"{caller.name}: {operation} of {org}"
                with_cookie_only = NEEDS[operation] == "a session" and "cookie" not in caller.headers
                assert answer.status_code == (401 if with_cookie_only else 404), who
                assert shape(answer) == shape(unknown) == shape(unknown_id), who
                assert_no_canary(answer, who=who)
                asked += 1
    print(asked, "calls")


async def test_a_foreign_request_answers_as_an_unknown_one(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    operation = "GET /api/v1/requests/{request_id}"
    others = await victim.org.member()
    colleague = Caller("colleague", bearer((await victim.org.key(others)).text))
    for caller in [*await strangers(make_org), colleague]:
        unknown = await ask(http, operation, caller.headers, request_id=UNKNOWN["request_id"])
        for request_id in (victim.request_id, victim.request_id.removeprefix("req_")):
            answer = await ask(http, operation, caller.headers, request_id=request_id)
            assert (answer.status_code, shape(answer)) == (404, shape(unknown)), caller.name
            assert_no_canary(answer, who=caller.name)
    own = await ask(http, operation, bearer(victim.member_key), request_id=victim.request_id)
    of_all = await ask(http, operation, bearer(victim.admin_key), request_id=victim.request_id)
    assert (own.status_code, of_all.status_code) == (200, 200)


async def test_a_foreign_hold_answers_as_an_unknown_one(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    """Also to the victim's own administrator, where it is the gateway's; a session is not asked for money."""
    service = bearer((await victim.org.key()).text)
    held = (await ask(http, "POST /api/v1/credits/authorize", service)).json()["request_id"]
    charged = (await ask(http, "POST /api/v1/credits/deduct", service)).json()["request_id"]
    callers = await strangers(make_org)
    for operation in (each for each, needs in NEEDS.items() if needs == "a hold"):
        for caller in (callers[0], callers[2], Caller("of the gateway's call", service)):
            unknown = await ask(http, operation, caller.headers)
            foreign = [victim.request_id] if caller.headers == service else [held, charged, victim.request_id]
            for request_id in foreign:
                answer = await ask(http, operation, caller.headers, request_id=request_id)
                assert (answer.status_code, shape(answer)) == (404, shape(unknown)), (caller.name, operation)
                assert_no_canary(answer, who=caller.name)
        assert (await ask(http, operation, callers[1].headers, request_id=held)).status_code == 403
        assert (await ask(http, operation, callers[3].headers, request_id=held)).status_code == 401
    assert (await ask(http, "POST /api/v1/credits/release", service, request_id=held)).status_code == 200


@pytest.mark.parametrize("operation", GATEWAY)
async def test_the_gateway_serves_nobody_in_anothers_name(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient, operation: str
) -> None:
    for caller in (await strangers(make_org))[:3]:
        unknown = await ask(http, operation, {**caller.headers, "bursar-organization": UNKNOWN["org"]}, model="demo-1")
        assert unknown.status_code == 404
        for org in (victim.org.slug, str(victim.org.organization_id)):
            headers = {**caller.headers, "bursar-organization": org}
            answer = await ask(http, operation, headers, model="demo-1")
            assert shape(answer) == shape(unknown), caller.name
            assert_no_canary(answer, who=caller.name)
        assert (await ask(http, operation, caller.headers, model="demo-1")).status_code == 200
    async with victim.org.tenant() as conn:
        assert await db.fetch_value(conn, "select count(*) from ledger.attribution") == 1


async def test_nobody_and_keys_that_are_no_longer_good_are_401_everywhere(
    victim: Victim, http: httpx2.AsyncClient
) -> None:
    revoked, expired = await victim.org.key(victim.org.admin), await victim.org.key(victim.org.admin)
    async with victim.org.tenant() as conn:
        await revoke_api_key(
            conn,
            organization_id=victim.org.organization_id,
            api_key_id=revoked.key.api_key_id,
            by=OPERATOR,
        )
    await _expire(victim, expired.key.api_key_id)
    good = victim.admin_key
    bad = [
        Caller("nobody", {}),
        Caller("revoked", bearer(revoked.text)),
        Caller("expired", bearer(expired.text)),
        Caller("mistyped", bearer(good[:-1] + ("a" if good[-1] != "a" else "b"))),
        Caller("of another kind", {"authorization": "Basic " + good}),
        Caller("a link", bearer("bl_" + good[3:])),
        Caller("a forged session", {"cookie": "session_token=" + "A" * 86, "sec-fetch-site": "same-origin"}),
        Caller("an empty session", {"cookie": "session_token=", "sec-fetch-site": "same-origin"}),
        Caller("too much", bearer("bk_" + "A" * 8_000)),
        Caller("other letters", {b"authorization": "Bearer bk_é".encode("latin-1")}),  # type: ignore[dict-item]
    ]
    names = {"org": victim.org.slug, "request_id": victim.request_id, "model": "demo-1"}
    for operation, needs in NEEDS.items():
        if needs in ("nothing", "a link"):
            continue
        told = set()
        for caller in bad:
            answer = await ask(http, operation, caller.headers, **names)
            assert answer.status_code == 401, (caller.name, operation, answer.text[:300])
            assert_no_canary(answer, who=caller.name)
            if caller.name in ("revoked", "expired"):
                told.add(json.dumps(shape(answer)))
        assert len(told) == 1, "why a key is not good is not told"


async def _expire(victim: Victim, api_key_id: UUID) -> None:
    """Its time was over a minute ago."""
    async with victim.org.tenant() as conn:
        await db.execute(
            conn,
            "update identity.api_keys set expires_at = %(at)s where api_key_id = %(id)s",
            at=now() - timedelta(minutes=1),
            id=api_key_id,
        )


async def test_roles_and_scopes_decide_inside_of_the_organization(victim: Victim, http: httpx2.AsyncClient) -> None:
    org = victim.org
    auditor = await org.member(Role.AUDITOR)
    callers = {
        "member": bearer(victim.member_key),
        "auditor": bearer((await org.key(auditor)).text),
        "administrator": bearer(victim.admin_key),
        "service": bearer((await org.key()).text),
        "inference only": bearer((await org.key(org.admin, scopes=[Scope.INFERENCE])).text),
        "reading only": bearer((await org.key(org.admin, scopes=[Scope.READ])).text),
    }
    may = {
        "usage:read": {"auditor", "administrator", "service", "reading only"},
        "limits:read": {"auditor", "administrator", "service", "reading only"},
        "limits:write": {"administrator", "service"},
        "charges:write": {"administrator", "service"},
        "codes:redeem": {"member", "administrator"},  # a service has no balance of its own
        "a member": set(callers),
        "inference": {"member", "administrator", "service", "inference only"},
    }
    for operation, needs in NEEDS.items():
        if needs not in may:
            continue
        for name, headers in callers.items():
            answer = await ask(http, operation, headers, org=org.slug, model="demo-1", table="people")
            # There is no such code, and after five tries it is not looked for.
            let_in = {"limits:write": {201}, "codes:redeem": {404, 429}}.get(needs, {200})
            wanted = let_in if name in may[needs] else {403}
            assert answer.status_code in wanted, (operation, name, answer.text[:300])
            if wanted == {403}:
                assert_no_canary(answer, who=name)


async def test_a_foreign_rule_answers_as_an_unknown_one(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    made = await ask(
        http, "POST /api/v1/organizations/{org}/model-rules", bearer(victim.admin_key), org=victim.org.slug
    )
    operation = "DELETE /api/v1/organizations/{org}/model-rules/{rule_id}"
    stranger = await make_org()
    admin = bearer((await stranger.key(stranger.admin)).text)
    unknown = await ask(http, operation, admin, org=stranger.slug)
    foreign = await ask(http, operation, admin, org=stranger.slug, rule_id=made.json()["id"])
    assert (foreign.status_code, shape(foreign)) == (404, shape(unknown))
    member = await ask(http, operation, bearer(victim.member_key), org=victim.org.slug, rule_id=made.json()["id"])
    assert member.status_code == 403
    own = await ask(http, operation, bearer(victim.admin_key), org=victim.org.slug, rule_id=made.json()["id"])
    assert own.status_code == 204


async def test_a_foreign_batch_and_its_files_answer_as_unknown_ones(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    """Of another organization, and of a colleague, who sees their own alone."""
    own = bearer(victim.member_key)
    ids = {}
    for name, operation in (("file", GATEWAY_FILES), ("msgbatch", MESSAGE_BATCHES), ("batch", "POST /v1/batches")):
        made = await ask(http, operation, own, **ids)
        assert made.status_code == 200, made.text
        ids[name] = made.json()["id"]
    colleague = Caller("colleague", bearer((await victim.org.key(await victim.org.member())).text))
    blunt = Caller(
        "administrator, inference only",
        bearer((await victim.org.key(victim.org.admin, scopes=[Scope.INFERENCE])).text),
    )
    for caller in [*(await strangers(make_org))[:3], colleague, blunt]:
        for operation in OF_BATCHES:
            unknown = await ask(http, operation, caller.headers)
            answer = await ask(http, operation, caller.headers, **ids)
            told = json.dumps(shape(answer))
            for name, shown_id in ids.items():
                told = told.replace(shown_id, "name")
                assert name in UNKNOWN
            assert (answer.status_code, told) == (404, json.dumps(shape(unknown))), (caller.name, operation)
            assert_no_canary(answer, who=caller.name)
        for operation in ("GET /v1/messages/batches", "GET /v1/batches"):
            assert (await ask(http, operation, caller.headers)).json()["data"] == [], caller.name
    for operation in OF_BATCHES:
        if operation.startswith("GET") and not operation.endswith("results"):
            assert (await ask(http, operation, own, **ids)).status_code == 200, operation
    states = "select count(*) from gateway.batches where deleted_at is null and told ->> 'cancel_initiated_at' is null"
    async with victim.org.tenant() as conn:
        assert await db.fetch_value(conn, states) == 2


async def test_why_tells_a_member_nothing_of_others(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    """Only their own limits; a colleague's needs a permission; a foreign person or key is nobody's."""
    operation = "GET /api/v1/organizations/{org}/why"
    own = bearer(victim.member_key)
    assert (await ask(http, operation, own, org=victim.org.slug, user=f"usr_{victim.org.admin.hex}")).status_code == 403
    stranger = await make_org()
    admin = bearer((await stranger.key(stranger.admin)).text)
    for name, foreign, unknown in (
        ("user", f"usr_{victim.member.hex}", f"usr_{uuid7().hex}"),
        ("key", f"key_{victim.api_key_id.hex}", f"key_{uuid7().hex}"),
    ):
        answers = [await ask(http, operation, admin, org=stranger.slug, **{name: each}) for each in (foreign, unknown)]
        assert shape(answers[0]) == shape(answers[1])
        for answer in answers:
            assert_no_canary(answer, who=name)
            assert answer.status_code == 404 or answer.json()["allowed"] is False


async def test_an_idempotency_key_belongs_to_its_organization(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    headers = {"idempotency-key": "the very same"}
    first = await http.post("/v1/chat/completions", json=CALL, headers={**bearer(victim.member_key), **headers})
    assert first.status_code == 200
    for caller in (await strangers(make_org))[:3]:
        answer = await http.post("/v1/chat/completions", json=CALL, headers={**caller.headers, **headers})
        assert answer.status_code in (200, 422)
        assert first.headers["x-request-id"] not in answer.text + str(answer.headers)
    again = await http.post("/v1/chat/completions", json=CALL, headers={**bearer(victim.member_key), **headers})
    assert again.headers["bursar-original-request"] == first.headers["x-request-id"]


async def test_two_organizations_that_share_a_cache_share_no_answer(
    victim: Victim, make_org: MakeOrg, http: httpx2.AsyncClient
) -> None:
    """Prices, routes and keys are remembered by the process: not one organization's for another's."""
    callers = await strangers(make_org)
    listed = [(await ask(http, "GET /v1/models", each.headers)).text for each in callers[:3]]
    assert (await ask(http, "GET /v1/models", bearer(victim.member_key))).status_code == 200
    assert len(set(listed)) == 1
    assert "cohere" not in listed[0], "the victim alone has a key for it"
