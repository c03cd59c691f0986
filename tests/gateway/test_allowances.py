"""Which models an organization, its teams and its keys may use."""

import asyncio
import re
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

import anthropic
import httpx2
import openai
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.conftest import MakeOrg, Org
from tests.gateway.conftest import Payer, fund

from bursar import clock, db
from bursar.audit.events import OPERATOR, Actor, list_events
from bursar.clock import uuid7
from bursar.gateway.allowances import (
    AllowanceFinder,
    Allowances,
    Caller,
    InvalidModelAlias,
    InvalidModelRule,
    ModelAliasNotFound,
    ModelNotAllowed,
    ModelRule,
    ModelRuleNotFound,
    Names,
    add_model_rule,
    list_model_aliases,
    list_model_rules,
    put_model_alias,
    remove_model_alias,
    remove_model_rule,
)
from bursar.gateway.desk import why_not
from bursar.gateway.routes import InvalidModelRoute, ModelRouteNotFound, put_model_route, remove_model_route
from bursar.identity.api_keys import rotate_api_key
from bursar.identity.organizations import get_organization
from bursar.identity.teams import create_team
from bursar.money import Micros

HELLO = [{"role": "user", "content": "hello there"}]
ORGANIZATION, TEAM, KEY, NEXT_KEY = (uuid4() for _ in range(4))
NOBODY = Caller("acme")
CALLER = Caller("acme", TEAM, KEY)


def rule(text: str, scope: Any = "organization", scope_id: UUID | None = None, **columns: Any) -> ModelRule:
    """A rule as 'allow gpt-%'."""
    effect, _, pattern = text.partition(" ")
    values = {"created_at": clock.now(), "set_by": "Dana Reyes", "scope_name": "Data", **columns}
    return ModelRule(
        organization_id=ORGANIZATION,
        rule_id=uuid7(),
        scope=scope,
        scope_id=scope_id or ORGANIZATION,
        effect=effect,  # type: ignore[arg-type]
        pattern=pattern,
        **values,
    )


def allows(rules: list[ModelRule], names: Names, caller: Caller = CALLER) -> bool:
    return Allowances(rules).allows(caller, names)


GPT = Names(("gpt-4o",), "openai", "gpt-4o")
FAST = Names(("fast",), "deepseek", "deepseek-chat")
RESOLD = Names(("openrouter/openai/gpt-4o",), "openrouter", "openai/gpt-4o")


@pytest.mark.parametrize(
    ("rules", "names", "allowed"),
    [
        ([], GPT, True),
        (["allow gpt-4o"], GPT, True),
        (["allow GPT-4O"], GPT, True),
        (["allow gpt-4"], GPT, False),
        (["allow gpt-4%"], GPT, True),
        (["allow openai/%"], GPT, True),
        (["allow %"], GPT, True),
        (["allow gpt-4_"], GPT, False),
        (["allow gpt.4o"], GPT, False),
        (["allow claude-%", "allow gpt-%"], GPT, True),
        (["allow gpt-%"], FAST, False),
        (["allow fast"], FAST, True),
        (["allow deepseek-%"], FAST, True),
        (["deny gpt-4%"], GPT, False),
        (["deny openai/%"], GPT, False),
        (["deny deepseek/%"], FAST, False),
        (["deny fast"], FAST, False),
        (["deny claude-%"], GPT, True),
        (["allow %", "deny gpt-4o"], GPT, False),
        (["deny gpt-4o"], RESOLD, False),
        (["allow gpt-4o"], RESOLD, False),
        (["allow openrouter/openai/%"], RESOLD, True),
    ],
)
def test_a_pattern_is_put_to_every_name_of_a_call(rules: list[str], names: Names, allowed: bool) -> None:
    assert allows([rule(each) for each in rules], names) is allowed


def test_every_scope_that_a_call_is_in_must_let_it_through() -> None:
    whole, of_team = rule("allow gpt-%"), rule("allow claude-%", "team", TEAM)
    assert allows([whole], GPT)
    assert not allows([whole, of_team], GPT)
    assert allows([whole, rule("allow claude-%", "team", uuid4())], GPT), "another team's rule"
    assert not allows([rule("deny gpt-%", "key", KEY)], GPT)
    assert allows([rule("deny gpt-%", "key", KEY)], GPT, NOBODY)
    replaced = rule("deny gpt-%", "key", KEY, keys=[KEY, NEXT_KEY])
    assert not allows([replaced], GPT, Caller("acme", None, NEXT_KEY)), "a rule follows a rotation"


def test_a_fallback_is_allowed_by_its_own_names_only() -> None:
    fallback = Names(("fast",), "anthropic", "claude-x", stands_in=True)
    assert not allows([rule("allow fast")], fallback)
    assert allows([rule("allow fast"), rule("allow anthropic/%")], fallback)
    assert not allows([rule("deny fast")], fallback)


def test_a_refusal_says_which_rule_who_set_it_and_what_next() -> None:
    denied = rule("deny gpt-4%", "team", TEAM)
    with pytest.raises(ModelNotAllowed, match="the team Data does not allow gpt-4%") as refused:
        Allowances([denied]).require(CALLER, GPT)
    assert (refused.value.status, refused.value.code) == (403, "model_not_allowed")
    assert refused.value.why is not None
    assert refused.value.why["rule"] == {
        "id": f"rule_{denied.rule_id.hex}",
        "scope": "team",
        "scope_name": "Data",
        "effect": "deny",
        "pattern": "gpt-4%",
    }
    assert refused.value.why["owner"] == "Dana Reyes"
    assert "ask Dana Reyes" in refused.value.why["next_step"]
    with pytest.raises(ModelNotAllowed, match="the organization allows a%, b% only") as listed:
        Allowances([rule("allow a%"), rule("allow b%")]).require(CALLER, GPT)
    assert listed.value.why is not None
    assert [each["pattern"] for each in listed.value.why["rules"]] == ["a%", "b%"]
    assert listed.value.headers["x-should-retry"] == "false"


@given(st.text(min_size=1, max_size=12), st.text(max_size=12))
def test_only_percent_stands_for_something_else(pattern: str, name: str) -> None:
    pattern = pattern.replace("%", "")
    fits = allows([rule(f"allow {pattern}")], Names((name,)))
    assert fits is (re.fullmatch(re.escape(pattern), name, re.IGNORECASE) is not None)
    assert allows([rule(f"allow {pattern}%")], Names((pattern + name,)))


# -- in the database


async def add(org: Org, text: str, **columns: Any) -> ModelRule:
    effect, _, pattern = text.partition(" ")
    async with org.tenant() as conn:
        return await add_model_rule(
            conn,
            organization_id=org.organization_id,
            effect=effect,  # type: ignore[arg-type]
            pattern=pattern,
            by=columns.pop("by", OPERATOR),
            **columns,
        )


async def rules_of(org: Org) -> list[ModelRule]:
    async with org.tenant() as conn:
        return await list_model_rules(conn, organization_id=org.organization_id)


async def test_rules_are_made_once_listed_taken_away_and_audited(org: Org) -> None:
    first = await add(org, "allow gpt-%", by=Actor(kind="user", id=org.admin))
    assert await add(org, "allow gpt-%") == first, "the same again changes nothing"
    assert (first.set_by, first.scope_name) == ("Dana Test", "Test Corp")
    second = await add(org, "deny %-preview")
    assert [each.pattern for each in await rules_of(org)] == ["%-preview", "gpt-%"]
    async with org.tenant() as conn:
        await remove_model_rule(conn, organization_id=org.organization_id, rule_id=second.rule_id, by=OPERATOR)
    with pytest.raises(ModelRuleNotFound):
        async with org.tenant() as conn:
            await remove_model_rule(conn, organization_id=org.organization_id, rule_id=second.rule_id, by=OPERATOR)
    assert await rules_of(org) == [first]
    async with org.tenant() as conn:
        events = await list_events(conn, organization_id=org.organization_id)
    told = [(each.action, each.object_id) for each in events if each.object_kind == "model_rule"]
    assert told == [
        ("model_rule.removed", second.rule_id),
        ("model_rule.added", second.rule_id),
        ("model_rule.added", first.rule_id),
    ]


@pytest.mark.parametrize("pattern", ["", "   ", "x" * 201, "two\nlines"])
async def test_a_pattern_that_cannot_be_is_refused(org: Org, pattern: str) -> None:
    with pytest.raises(InvalidModelRule):
        await add(org, f"allow {pattern}")


async def test_rules_and_aliases_are_their_organizations_alone(org: Org, make_org: MakeOrg) -> None:
    other = await make_org()
    theirs = await add(other, "deny %")
    async with other.tenant() as conn:
        await put_model_alias(conn, organization_id=other.organization_id, alias="ours", model="demo-1", by=OPERATOR)
    finder = AllowanceFinder(org.database)
    assert not (await finder.of(org.organization_id)).has_rules
    assert (await finder.of(other.organization_id)).has_rules
    async with org.tenant() as conn:
        for table in ("gateway.model_rules", "gateway.model_aliases"):
            assert await db.fetch_value(conn, f"select count(*) from {table}") == 0
    with pytest.raises(ModelRuleNotFound):
        async with org.tenant() as conn:
            await remove_model_rule(conn, organization_id=other.organization_id, rule_id=theirs.rule_id, by=OPERATOR)
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with org.tenant() as conn:
            await add_model_rule(conn, organization_id=other.organization_id, effect="allow", pattern="x", by=OPERATOR)
    assert await rules_of(other) == [theirs]


async def test_what_is_changed_counts_within_five_seconds(org: Org) -> None:
    now = [0.0]
    finder = AllowanceFinder(org.database, clock=lambda: now[0])
    assert not (await finder.of(org.organization_id)).has_rules
    await add(org, "deny %")
    now[0] = 4.9
    assert not (await finder.of(org.organization_id)).has_rules, "read from memory"
    now[0] = 5.0
    assert (await finder.of(org.organization_id)).has_rules


# -- aliases


async def test_an_alias_stands_for_a_model_and_never_for_an_alias(org: Org) -> None:
    async with org.tenant() as conn:
        same = {"organization_id": org.organization_id, "by": OPERATOR}
        made = await put_model_alias(conn, alias="house", model="demo-1", **same)
        again = await put_model_alias(conn, alias="house", model="demo-1-mini", **same)
        assert (again.alias_id, again.model) == (made.alias_id, "demo-1-mini")
        for alias, model in (("x", "house"), ("demo-1-mini", "demo-1"), ("x", "x"), ("", "x"), ("x ", "y"), ("x", "")):
            with pytest.raises(InvalidModelAlias):
                await put_model_alias(conn, alias=alias, model=model, **same)
        assert [each.alias for each in await list_model_aliases(conn, organization_id=org.organization_id)] == ["house"]
        await remove_model_alias(conn, alias="house", **same)
        with pytest.raises(ModelAliasNotFound):
            await remove_model_alias(conn, alias="house", **same)


async def test_a_route_stands_for_a_providers_model_and_never_for_a_route(priced: db.Database) -> None:
    mine, vendors = f"alias-{uuid7().hex}", f"vendors-{uuid7().hex}"
    async with priced.platform() as conn:
        await put_model_route(conn, model=mine, provider="demo", upstream_model="demo-1", by=OPERATOR)
        for target, fallbacks in ((mine, ()), ("demo-1", [f"demo/{mine}"])):
            with pytest.raises(InvalidModelRoute, match="is a route itself, to demo/demo-1"):
                await put_model_route(
                    conn, model="chain", provider="demo", upstream_model=target, fallbacks=fallbacks, by=OPERATOR
                )
        await put_model_route(conn, model=vendors, provider="demo", upstream_model=vendors, by=OPERATOR)
        await put_model_route(conn, model=f"{mine}-2", provider="demo", upstream_model=vendors, by=OPERATOR)
        for name in (mine, f"{mine}-2", vendors):
            await remove_model_route(conn, model=name, by=OPERATOR)
        with pytest.raises(ModelRouteNotFound):
            await remove_model_route(conn, model=mine, by=OPERATOR)


# -- through the gateway


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """The served application looks at every call, so that a test need not wait for five seconds."""
    monkeypatch.setattr("bursar.gateway.allowances.CACHE_SECONDS", 0.0)
    monkeypatch.setattr("bursar.gateway.desk.REFRESH_SECONDS", 0.0)
    monkeypatch.setattr("bursar.identity.principals.KeyCache.SECONDS", 0.0)


def clients(payer: Payer) -> tuple[openai.AsyncOpenAI, anthropic.AsyncAnthropic]:
    return (
        openai.AsyncOpenAI(api_key=payer.key, base_url=f"{payer.base_url}/v1", max_retries=2),
        anthropic.AsyncAnthropic(api_key=payer.key, base_url=payer.base_url, max_retries=2),
    )


async def answered(payer: Payer, model: str) -> int:
    return (await payer.post({"model": model, "max_tokens": 5, "messages": HELLO})).status_code


@pytest.mark.usefixtures("fresh")
async def test_a_model_that_is_not_allowed_is_refused_in_both_formats_and_charges_nothing(payer: Payer) -> None:
    await add(payer.org, "allow demo-1-mini")
    chat, messages = clients(payer)
    with pytest.raises(openai.PermissionDeniedError, match="allows demo-1-mini only") as refused:
        await chat.chat.completions.create(model="demo-1", messages=HELLO, max_tokens=5)  # type: ignore[arg-type]
    assert refused.value.code == "model_not_allowed"
    assert refused.value.body["why"]["rule"]["pattern"] == "demo-1-mini"  # type: ignore[index]
    with pytest.raises(anthropic.PermissionDeniedError, match="allows demo-1-mini only"):
        await messages.messages.create(model="demo-claude", messages=HELLO, max_tokens=5)  # type: ignore[arg-type]
    assert await answered(payer, "demo-1-mini") == 200
    assert await answered(payer, "demo/demo-1-mini") == 200
    assert await answered(payer, "demo/demo-1") == 403, "a prefix is no way around"
    assert (await payer.pool()).held_micros == 0
    assert len(await payer.rows("select from ledger.attribution")) == 2


@pytest.mark.usefixtures("fresh")
async def test_models_lists_what_is_allowed_and_an_organizations_own_names(payer: Payer) -> None:
    await add(payer.org, "allow demo-1%")
    await add(payer.org, "deny demo-1-long")
    async with payer.org.tenant() as conn:
        for alias, model in (("house", "demo-1-mini"), ("poet", "demo-claude"), ("direct", "demo/demo-1")):
            await put_model_alias(
                conn, organization_id=payer.org.organization_id, alias=alias, model=model, by=OPERATOR
            )
    chat, messages = clients(payer)
    listed = [model.id async for model in chat.models.list()]
    # Routes are everybody's: those of other tests are there too.
    assert [name for name in listed if "-0" not in name] == ["demo-1", "demo-1-mini", "direct", "house"]
    assert (await chat.models.retrieve("house")).owned_by == "demo"
    with pytest.raises(openai.NotFoundError):
        await chat.models.retrieve("demo-claude")
    page = await chat.models.list()
    assert not page.has_next_page(), "one page is all"
    anthropics = await messages.models.list(limit=2)
    assert ([model.id for model in anthropics.data], anthropics.has_next_page()) == (listed, False)
    assert (anthropics.first_id, anthropics.last_id, anthropics.data[0].type) == (listed[0], listed[-1], "model")
    one = await messages.models.retrieve("demo-1")
    assert (one.id, one.display_name, one.created_at.year) == ("demo-1", "demo-1", 1970)
    assert await answered(payer, "house") == 200
    assert await answered(payer, "poet") == 403
    [(model,)] = await payer.rows("select model from ledger.attribution")
    assert model == "demo-1-mini", "priced and recorded by the provider's model"


@pytest.mark.usefixtures("fresh")
async def test_an_alias_may_be_what_is_allowed(payer: Payer) -> None:
    async with payer.org.tenant() as conn:
        await put_model_alias(
            conn, organization_id=payer.org.organization_id, alias="house", model="demo-1-mini", by=OPERATOR
        )
    await add(payer.org, "allow house")
    assert await answered(payer, "house") == 200
    assert await answered(payer, "demo-1-mini") == 403


@pytest.mark.usefixtures("fresh")
async def test_teams_and_keys_are_kept_to_theirs(payer: Payer) -> None:
    org = payer.org
    async with org.tenant() as conn:
        team = await create_team(
            conn, organization_id=org.organization_id, name="Data", department_id=None, by=OPERATOR
        )
    member = await org.member(team_id=team.team_id)
    theirs = await org.key(member)
    await add(org, "allow demo-1-mini", scope="team", scope_id=team.team_id)
    await add(org, "deny demo-1-mini", scope="key", scope_id=payer.api_key_id)
    of_team = Payer(org=org, user_id=member, api_key_id=theirs.key.api_key_id, key=theirs.text, base_url=payer.base_url)
    assert [await answered(of_team, model) for model in ("demo-1", "demo-1-mini")] == [403, 200]
    assert [await answered(payer, model) for model in ("demo-1", "demo-1-mini")] == [200, 403]
    async with org.tenant() as conn:
        next_key = await rotate_api_key(
            conn,
            organization_id=org.organization_id,
            api_key_id=payer.api_key_id,
            overlap=timedelta(0),
            by=OPERATOR,
        )
    rotated = Payer(
        org=org,
        user_id=payer.user_id,
        api_key_id=next_key.key.api_key_id,
        key=next_key.text,
        base_url=payer.base_url,
    )
    assert await answered(rotated, "demo-1-mini") == 403, "a new key in the old one's place is no way around"


@pytest.mark.usefixtures("fresh")
async def test_a_fallback_that_is_not_allowed_is_not_asked(payer: Payer, priced: db.Database) -> None:
    name = f"alias-{uuid7().hex}"
    async with priced.platform() as conn:
        await put_model_route(
            conn,
            model=name,
            provider="demo",
            upstream_model="demo-1-mini",
            fallbacks=["demo/demo-1"],
            by=OPERATOR,
        )
    body = {"model": name, "max_tokens": 5, "messages": HELLO}
    assert (await payer.post(body)).status_code == 200
    await add(payer.org, f"allow {name}")
    failed = await payer.post(body, bursar_demo="fail=503")
    assert (failed.status_code, failed.headers.get("bursar-attempt")) == (503, None)
    await add(payer.org, "allow demo/demo-1")
    failed = await payer.post(body, bursar_demo="fail=503")
    assert (failed.status_code, failed.headers.get("bursar-attempt")) == (503, "2")


# -- why


async def test_why_says_the_same_on_the_command_line_and_in_the_api(payer: Payer, make_org: MakeOrg) -> None:
    org = payer.org
    made = await add(org, "deny demo-1", by=Actor(kind="user", id=org.admin))
    async with org.tenant() as conn:
        organization = await get_organization(conn, organization_id=org.organization_id)
    refusal = await why_not(org.database, organization, user_id=None, api_key_id=payer.api_key_id, model="demo-1")
    assert refusal is not None
    assert refusal.why is not None
    assert refusal.why["owner"] == "Dana Test"
    assert await why_not(org.database, organization, user_id=None, api_key_id=None, model="demo-1-mini") is None
    assert await why_not(org.database, organization, user_id=None, api_key_id=None, model="nobodys") is None
    async with httpx2.AsyncClient(base_url=payer.base_url, headers={"authorization": f"Bearer {payer.key}"}) as http:
        path = f"/api/v1/organizations/{org.slug}/why"
        told = (await http.get(path, params={"model": "demo-1"})).json()
        assert (told["allowed"], told["code"], told["rule"]["id"]) == (
            False,
            "model_not_allowed",
            f"rule_{made.rule_id.hex}",
        )
        assert told["available"]["amount"] == "1000", "and all that is said of credits"
        assert (await http.get(path, params={"model": "demo-1-mini"})).json()["allowed"] is True


async def test_an_administrator_makes_rules_and_a_member_does_not(payer: Payer) -> None:
    org = payer.org
    admin, member = await org.key(org.admin), await org.key(await org.member())
    async with org.tenant() as conn:
        team = await create_team(
            conn, organization_id=org.organization_id, name="Data", department_id=None, by=OPERATOR
        )
    path = f"/api/v1/organizations/{org.slug}/model-rules"
    async with httpx2.AsyncClient(base_url=payer.base_url, headers={"authorization": f"Bearer {admin.text}"}) as http:
        made = await http.post(path, json={"effect": "deny", "pattern": "demo-1-long", "team": f"team_{team.team_id}"})
        again = await http.post(path, json={"effect": "deny", "pattern": "demo-1-long", "team": f"team_{team.team_id}"})
        assert (made.status_code, again.json()) == (201, made.json())
        assert (made.json()["set_by"], made.json()["scope_name"]) == ("Dana Test", "Data")
        of_key = {"effect": "allow", "pattern": "%", "key": f"key_{payer.api_key_id.hex}"}
        assert (await http.post(path, json=of_key)).json()["scope"] == "key"
        both = {**of_key, "team": f"team_{team.team_id}"}
        assert (await http.post(path, json=both)).status_code == 422
        assert (await http.post(path, json={**of_key, "key": f"key_{uuid7().hex}"})).status_code == 404
        assert (await http.post(path, json={"effect": "allow", "pattern": " "})).status_code == 422
        assert [each["pattern"] for each in (await http.get(path)).json()["items"]] == ["demo-1-long", "%"]
        removed = await http.delete(f"{path}/{made.json()['id']}")
        assert (removed.status_code, removed.content) == (204, b"")
        assert (await http.delete(f"{path}/{made.json()['id']}")).status_code == 404
        http.headers["authorization"] = f"Bearer {member.text}"
        assert (await http.post(path, json=of_key)).status_code == 403
        assert (await http.get(path)).status_code == 403
    assert [each.pattern for each in await rules_of(org)] == ["%"]


async def test_many_organizations_ask_at_once_and_each_gets_its_own(make_org: MakeOrg) -> None:
    orgs = [await make_org() for _ in range(4)]
    for place, each in enumerate(orgs):
        await add(each, f"allow only-{place}")
    finder = AllowanceFinder(orgs[0].database)
    found = await asyncio.gather(*(finder.of(each.organization_id) for each in orgs * 3))
    for place, allowances in enumerate(found):
        own = place % len(orgs)
        assert [allowances.allows(NOBODY, Names((f"only-{other}",))) for other in range(4)] == [
            other == own for other in range(4)
        ]


async def test_an_organization_without_rules_pays_as_ever(org: Org, base_url: str) -> None:
    await fund(org, Micros(1_000_000))
    key = await org.key(org.admin)
    payer = Payer(org=org, user_id=org.admin, api_key_id=key.key.api_key_id, key=key.text, base_url=base_url)
    assert await answered(payer, "demo-1") == 200
