"""Pages over HTTP: who sees what, the same figures as the API, and nothing that a name can break."""

import csv
import gzip
import io
import re
from html.parser import HTMLParser

import pytest

from bursar import db
from bursar.audit.events import OPERATOR
from bursar.clock import uuid7
from bursar.credits.moves import Action, Flag, Move
from bursar.identity.addresses import Address
from bursar.identity.api_keys import create_api_key
from bursar.identity.memberships import add_membership, get_membership
from bursar.identity.organizations import set_organization_status
from bursar.identity.roles import Role, Scope
from bursar.identity.sessions import create_sign_in_link
from bursar.identity.users import get_user
from bursar.money import Micros, credits
from bursar.web.assets import assets
from bursar.web.rendering import POLICY, local_path

PAGE_BUDGET_BYTES = 40_000
FIRST_VISIT_BUDGET_BYTES = 320_000


class Markup(HTMLParser):
    """Elements with their attributes, and the exact values of <data>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def values(self) -> list[str | None]:
        return [attributes["value"] for tag, attributes in self.elements if tag == "data"]


def signed_in(client, cookie: str):
    client.cookies.set("session_token", cookie)
    return client


async def test_the_numbers_on_the_page_are_those_of_the_api(client, busy) -> None:
    signed_in(client, busy.cookie)
    page = Markup((await client.get(busy.path)).text)
    answer = (await client.get(busy.api, headers={"accept": "application/json"})).json()
    expected: list[str] = []
    for pool in answer["pools"]:
        expected += [pool[figure]["amount"] for figure in ("available", "used", "held", "overage")]
    expected += [answer["cost"]["charged"]["amount"], answer["trend"]["charged"]["amount"]]
    expected += [series["charged"]["amount"] for series in answer["trend"]["series"]]
    for day in reversed(answer["trend"]["days"]):
        parts = [part["amount"] for part in day["parts"]]
        expected += [day["charged"]["amount"], *(part for part in parts if float(part))]
    expected += [answer["trend"]["charged"]["amount"]]
    expected += [series["charged"]["amount"] for series in answer["trend"]["series"]]
    for table in ("people", "keys", "models", "departments"):
        expected += [row["charged"]["amount"] for row in answer[table]["rows"]]
        expected.append(answer[table]["charged"]["amount"])
    assert page.values() == expected


async def test_the_unit_changes_what_costs_are_shown_in_and_nothing_else(client, busy) -> None:
    signed_in(client, busy.cookie)
    money, credit = [(await client.get(f"{busy.path}?unit={unit}")).text for unit in ("money", "credits")]
    assert Markup(money).values() == Markup(credit).values()
    assert re.search(r'<h2 id="cost">.*?\$[\d,.]+</data>', money, re.DOTALL)
    assert re.search(r'<h2 id="cost">.*?\d cr</data>', credit, re.DOTALL)


@pytest.mark.parametrize("table", ["people", "keys", "models", "departments", "days"])
async def test_each_table_is_also_csv_with_the_same_rows(client, busy, table: str) -> None:
    signed_in(client, busy.cookie)
    answer = (await client.get(busy.api, headers={"accept": "application/json"})).json()
    by_address = await client.get(f"{busy.api}.csv?table={table}")
    by_accept = await client.get(f"{busy.api}?table={table}", headers={"accept": "text/csv"})
    assert by_address.headers["content-type"] == "text/csv; charset=utf-8; header=present"
    rows, same = [list(csv.DictReader(io.StringIO(found.text, newline=""))) for found in (by_address, by_accept)]
    assert [row["credits"] for row in rows] == [row["credits"] for row in same]
    given = answer["trend"]["days"] if table == "days" else answer[table]["rows"]
    assert [row["credits"] for row in rows] == [row["charged"]["amount"] for row in given]
    assert [row["money"] for row in rows] == [row["money"]["amount"] for row in given]
    assert {row["zone"] for row in rows} == {"Europe/Paris"}
    assert "\r\n" in by_address.text


async def test_a_spreadsheet_runs_nothing_of_what_somebody_named(client, make_org, simulate, cookie_of) -> None:
    org = await make_org()
    async with org.tenant() as conn:
        key = await create_api_key(
            conn, organization_id=org.organization_id, user_id=None, name="=cmd|'/C calc'!A0", by=OPERATOR
        )
    free = Move(
        action=Action.DEDUCT,
        organization_id=org.organization_id,
        request_id=uuid7(),
        api_key_id=key.key.api_key_id,
        amount_micros=Micros(0),
        model="m",
        flags=Flag.UNPRICED,
    )
    assert (await simulate([free]))[0].accepted
    signed_in(client, await cookie_of(org.admin))
    text = (await client.get(f"/api/v1/organizations/{org.slug}/overview.csv?table=keys")).text
    assert "'=cmd|" in text
    assert ",=cmd" not in text


async def test_csv_of_no_table_in_particular_is_refused_by_name(client, busy) -> None:
    signed_in(client, busy.cookie)
    answer = await client.get(f"{busy.api}.csv")
    assert (answer.status_code, answer.json()["code"]) == (422, "table_needed")


async def test_an_api_key_reads_the_same_figures(client, busy) -> None:
    key = await busy.org.key(busy.org.admin, scopes=[Scope.READ])
    answer = await client.get(busy.api, headers={"authorization": f"Bearer {key.text}", "accept": "application/json"})
    assert answer.status_code == 200
    assert answer.json()["organization"]["id"] == f"org_{busy.org.organization_id.hex}"
    inference_only = await busy.org.key(busy.org.admin, scopes=[Scope.INFERENCE])
    refused = await client.get(busy.api, headers={"authorization": f"Bearer {inference_only.text}"})
    assert (refused.status_code, refused.json()["code"]) == (403, "not_permitted")


async def test_a_foreign_organization_looks_like_one_that_does_not_exist(client, org, make_org, cookie_of) -> None:
    foreign = await make_org(name="Secret Corp")
    signed_in(client, await cookie_of(org.admin))
    found, unknown, by_id = [
        await client.get(path) for path in (f"/o/{foreign.slug}", "/o/no-such-one", f"/o/{foreign.organization_id}")
    ]
    assert found.status_code == unknown.status_code == by_id.status_code == 404
    assert "Secret" not in found.text
    assert found.text.replace(foreign.slug, "no-such-one") == unknown.text
    assert by_id.text.replace(str(foreign.organization_id), "no-such-one") == unknown.text


async def test_a_member_is_told_which_role_it_takes(client, org, cookie_of) -> None:
    signed_in(client, await cookie_of(await org.member()))
    answer = await client.get(f"/o/{org.slug}")
    assert answer.status_code == 403
    assert "org_admin" in answer.text
    assert "Available" not in answer.text


async def test_who_is_not_signed_in_is_told_how_and_stays_at_the_address(client, org) -> None:
    for path in (f"/o/{org.slug}", "/"):
        answer = await client.get(path)
        assert answer.status_code == 401
        assert "Please sign in" in answer.text


async def test_programs_are_answered_in_json_where_people_get_a_page(client, org) -> None:
    answer = await client.get(f"/o/{org.slug}", headers={"accept": "application/json"})
    assert answer.headers["content-type"].startswith("application/problem+json")
    assert answer.json()["code"] == "not_signed_in"


async def test_margin_is_absent_where_it_may_not_be_seen(client, make_org, cookie_of) -> None:
    resold = await make_org(shows_margin=False)
    signed_in(client, await cookie_of(resold.admin))
    assert "Margin" not in (await client.get(f"/o/{resold.slug}")).text
    assert (await client.get(f"/api/v1/organizations/{resold.slug}/overview")).json()["margin"] is None


async def test_an_auditor_sees_the_figures(client, busy, cookie_of) -> None:
    signed_in(client, await cookie_of(await busy.org.member(Role.AUDITOR)))
    answer = await client.get(busy.path)
    assert answer.status_code == 200
    assert "Margin" not in answer.text  # that takes a permission of its own


async def test_names_cannot_leave_their_place(client, busy) -> None:
    signed_in(client, busy.cookie)
    text = (await client.get(busy.path)).text
    page = Markup(text)
    assert [attributes.get("src") for tag, attributes in page.elements if tag == "script"] == [
        assets()["bursar.js"].address
    ]
    assert not [tag for tag, _ in page.elements if tag == "img"]
    assert not [name for _, attributes in page.elements for name in attributes if name.startswith("on")]
    assert "&lt;script&gt;alert(1)" in text
    assert "{{7*7}}" in text


async def test_every_page_has_the_strict_policy_and_nothing_inline(client, busy) -> None:
    signed_in(client, busy.cookie)
    for path in (busy.path, "/sign-in", "/sign-in/bl_x", "/o/unknown", "/nowhere"):
        answer = await client.get(path)
        assert answer.headers["content-security-policy"] == POLICY
        assert "no-store" in answer.headers["cache-control"]
        page = Markup(answer.text)
        assert not [tag for tag, attributes in page.elements if "style" in attributes or tag == "style"]
        assert all("src" in attributes for tag, attributes in page.elements if tag == "script")


async def test_a_page_is_light(client, busy, capsys) -> None:
    signed_in(client, busy.cookie)
    answer = await client.get(busy.path, headers={"accept-encoding": "gzip"})
    assert answer.headers["content-encoding"] == "gzip"
    page = int(answer.headers["content-length"])
    files = {name: len(asset.gzipped) for name, asset in assets().items()}
    assert len(gzip.compress(answer.text.encode(), 6, mtime=0)) == page
    with capsys.disabled():
        print(f"\noverview gzipped: page {page} B, first visit {page + sum(files.values())} B with {files}")
    assert page < PAGE_BUDGET_BYTES
    assert page + sum(files.values()) < PAGE_BUDGET_BYTES < FIRST_VISIT_BUDGET_BYTES


async def test_files_are_kept_for_ever_under_an_address_that_changes_with_them(client) -> None:
    for asset in assets().values():
        answer = await client.get(asset.address)
        assert answer.content == asset.content
        assert answer.headers["content-type"] == asset.media_type
        assert "immutable" in answer.headers["cache-control"]
    assert (await client.get("/static/..%2fpages.py")).status_code == 404


async def test_a_theme_is_written_into_the_page_so_that_none_flashes(client) -> None:
    assert "data-theme" not in re.sub("data-theme-form", "", (await client.get("/sign-in")).text)
    answer = await client.post("/appearance/dark?next=/sign-in")
    assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in")
    assert '<html lang="en" data-theme="dark">' in (await client.get("/sign-in")).text
    await client.post("/appearance/system")
    assert "bursar_theme" not in client.cookies


@pytest.mark.parametrize(
    "elsewhere", ["//evil.example", "https://evil.example", "/\\evil.example", "", "x", "/a\nSet-Cookie: x"]
)
def test_a_way_back_leads_to_this_site_only(elsewhere: str) -> None:
    assert local_path(elsewhere) == "/"


async def test_another_site_cannot_choose_a_theme(client) -> None:
    answer = await client.post("/appearance/dark", headers={"sec-fetch-site": "cross-site"})
    assert answer.status_code == 403


async def test_a_sign_in_link_asks_once_more_and_works_once(client, org, database) -> None:
    async with database.untenanted() as conn:
        user = await get_user(conn, user_id=org.admin)
    async with database.tenant(user.home_organization_id) as conn:
        token = await create_sign_in_link(conn, user=user, by=OPERATOR)
    asked = await client.get(f"/sign-in/{token}")
    assert f'action="/sign-in/{token}"' in asked.text
    used = await client.post(f"/sign-in/{token}")
    assert (used.status_code, used.headers["location"]) == (303, f"/o/{org.slug}")
    assert (await client.get("/")).headers["location"] == f"/o/{org.slug}"
    again = await client.post(f"/sign-in/{token}")
    assert again.status_code == 410
    assert "This link cannot be used" in again.text


async def test_people_of_several_organizations_can_switch(client, org, make_org, cookie_of) -> None:
    signed_in(client, await cookie_of(org.admin))
    other = await make_org(name="Other Corp")
    async with org.tenant() as conn:
        member = await get_membership(conn, organization_id=org.organization_id, user_id=org.admin)
    async with other.tenant() as conn:
        await add_membership(
            conn,
            organization_id=other.organization_id,
            user_id=org.admin,
            address=Address.of(member.email, org.database.settings),
            display_name="Dana",
            roles=[Role.FINANCE],
            by=OPERATOR,
        )
    text = (await client.get(f"/o/{org.slug}")).text
    assert f'href="/o/{other.slug}"' in text
    assert (await client.get(f"/o/{other.slug}")).status_code == 200


async def test_an_organization_without_usage_says_what_will_come_and_how(client, org, cookie_of) -> None:
    signed_in(client, await cookie_of(org.admin))
    text = (await client.get(f"/o/{org.slug}")).text
    assert "Nothing has been used yet" in text
    assert "curl http://localhost/v1/chat/completions" in text
    assert text.index("Available") < text.index("Used") < text.index("Held") < text.index("Overage")


async def test_the_ribbon_says_that_it_is_a_demo(app, client) -> None:
    assert "ribbon" not in (await client.get("/sign-in")).text
    app.state.is_demo = True
    assert "Demo" in (await client.get("/sign-in")).text


@pytest.mark.parametrize("query", ["unit=dollars", "view=3d"])
async def test_a_query_that_is_not_known_is_refused(client, busy, query: str) -> None:
    signed_in(client, busy.cookie)
    assert (await client.get(f"{busy.path}?{query}")).status_code == 422


async def test_an_overage_is_said_in_words_and_numbers(client, busy, simulate) -> None:
    async with busy.org.tenant() as conn:
        request_id = await db.fetch_value(conn, "select request_id from credits.holds")
    settled = Move(
        action=Action.SETTLE,
        organization_id=busy.org.organization_id,
        request_id=request_id,
        amount_micros=credits(1_000_000),
    )
    assert (await simulate([settled]))[0].accepted
    signed_in(client, busy.cookie)
    text = (await client.get(busy.path)).text
    overage = (await client.get(busy.api)).json()["pools"][0]["overage"]["amount"]
    assert float(overage) > 0
    assert f'<data value="{overage}">' in text
    assert "<strong>Overage.</strong>" in text


async def test_a_frozen_organization_says_so(client, org, cookie_of) -> None:
    signed_in(client, await cookie_of(org.admin))
    async with org.tenant() as conn:
        await set_organization_status(conn, organization_id=org.organization_id, status="frozen", by=OPERATOR)
    assert "<strong>Frozen.</strong>" in (await client.get(f"/o/{org.slug}")).text


async def test_a_persons_own_organization_shows_their_own_credits(client, org, cookie_of, database) -> None:
    async with database.untenanted() as conn:
        user = await get_user(conn, user_id=org.admin)
    signed_in(client, await cookie_of(org.admin))
    answer = await client.get(f"/o/org_{user.home_organization_id.hex}")
    assert answer.status_code == 200
    assert "Your credits" in answer.text
