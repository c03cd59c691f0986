"""Pages in a real Chromium: four widths, both themes, no script, keyboard, and what a machine can check of WCAG."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page

from bursar.identity.roles import Role

pytestmark = pytest.mark.browser

WIDTHS = [320, 390, 768, 1440]
THEMES = ["light", "dark"]

# What is wrong with a page, each as one line.
FAULTS = (Path(__file__).parent / "faults.js").read_text()


@asynccontextmanager
async def opened(browser: Browser, site: str, cookie: str | None, **options: Any) -> AsyncIterator[Page]:
    """A new page with a session; options: of the browser context."""
    context = await browser.new_context(**options)
    if cookie is not None:
        await context.add_cookies([{"name": "session_token", "value": cookie, "url": site}])
    yield await context.new_page()
    await context.close()


@pytest.mark.parametrize("theme", THEMES)
async def test_no_fault_is_found_at_any_width(chromium: Browser, site: str, busy, make_org, cookie_of, theme) -> None:
    empty = await make_org()
    empty_cookie = await cookie_of(empty.admin)
    member_cookie = await cookie_of(await busy.org.member(Role.MEMBER))
    paths = [
        (busy.path, busy.cookie),
        (f"{busy.path}?view=table&unit=credits", busy.cookie),
        (busy.path, member_cookie),
        (f"/o/{empty.slug}", empty_cookie),
        ("/o/unknown", empty_cookie),
        ("/sign-in/bl_x", None),
    ]
    for path, cookie in paths:
        async with opened(chromium, site, cookie, color_scheme=theme) as page:
            for width in WIDTHS:
                await page.set_viewport_size({"width": width, "height": 900})
                await page.goto(f"{site}{path}")
                assert await page.evaluate(FAULTS) == [], (path, width, theme)


@pytest.mark.parametrize("theme", THEMES)
async def test_open_menus_have_no_fault_either(chromium: Browser, site: str, busy, theme: str) -> None:
    for width in (320, 1440):
        size = {"width": width, "height": 900}
        async with opened(chromium, site, busy.cookie, color_scheme=theme, viewport=size) as page:
            await page.goto(f"{site}{busy.path}")
            menus = await page.locator("details.menu").all()
            assert menus
            for menu in menus:
                await menu.locator("summary").click()
                assert await menu.evaluate("menu => menu.open")
                assert await page.evaluate(FAULTS) == [], (width, theme)
                panel = await menu.locator(".panel").bounding_box()
                assert panel is not None
                assert panel["x"] >= 0
                assert panel["x"] + panel["width"] <= width


async def test_nothing_is_asked_of_another_host_and_the_policy_stops_nothing(
    chromium: Browser, site: str, busy
) -> None:
    asked: list[str] = []
    said: list[str] = []
    async with opened(chromium, site, busy.cookie) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        await page.goto(f"{site}{busy.path}", wait_until="networkidle")
    assert all(url.startswith((site, "data:")) for url in asked)
    assert {re.sub(r"\?.*", "", url.removeprefix(site)) for url in asked} >= {"/static/bursar.css", "/static/bursar.js"}
    assert said == []


async def test_the_chosen_theme_wins_over_the_system_and_is_there_after_a_reload(
    chromium: Browser, site: str, busy
) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    async with opened(chromium, site, busy.cookie, color_scheme="light") as page:
        await page.goto(f"{site}{busy.path}")
        assert await page.evaluate(ground) == "rgb(246, 247, 249)"
        await page.get_by_text("Theme").click()
        await page.get_by_role("button", name="Dark").click()
        assert await page.evaluate(ground) == "rgb(18, 22, 28)"
        assert page.url == f"{site}{busy.path}"
        await page.reload(wait_until="commit")
        assert await page.evaluate("document.documentElement.dataset.theme") == "dark"


async def test_everything_can_be_read_and_used_without_script(chromium: Browser, site: str, busy) -> None:
    async with opened(chromium, site, busy.cookie, java_script_enabled=False, color_scheme="light") as page:
        await page.goto(f"{site}{busy.path}")
        await page.get_by_text("Table of these days").click()
        assert await page.locator("#days tbody tr").count() == 30
        assert await page.locator("#days").is_visible()
        await page.get_by_text("Theme").click()
        await page.get_by_role("button", name="Dark").click()
        await page.wait_for_url(f"{site}{busy.path}")
        assert await page.locator("html").get_attribute("data-theme") == "dark"
        await page.get_by_text("Credits", exact=True).click()
        await page.wait_for_url(f"{site}{busy.path}?unit=credits")


async def test_the_chart_can_be_walked_by_keyboard(chromium: Browser, site: str, busy) -> None:
    async with opened(chromium, site, busy.cookie) as page:
        await page.goto(f"{site}{busy.path}")
        chart = page.get_by_role("slider", name="Day")
        await chart.focus()
        assert await chart.get_attribute("aria-valuenow") == "30"
        await chart.press("ArrowLeft")
        await chart.press("Home")
        assert await chart.get_attribute("aria-valuenow") == "1"
        first = page.locator("#days tbody tr").last
        day = await first.locator("time").text_content()
        assert (await chart.get_attribute("aria-valuetext") or "").startswith(f"{day}: ")
        assert (await page.locator(".readout").inner_text()).startswith(f"{day}: ")
        await chart.press("v")
        assert await page.locator("details.twin").evaluate("twin => twin.open")


async def test_every_control_is_reached_by_tab_in_order_and_shows_its_focus(chromium: Browser, site: str, busy) -> None:
    async with opened(chromium, site, busy.cookie, viewport={"width": 1440, "height": 900}) as page:
        await page.goto(f"{site}{busy.path}")
        seen: list[str] = []
        while True:
            await page.keyboard.press("Tab")
            if await page.evaluate("document.activeElement === document.body"):
                break
            seen.append(await page.evaluate("document.activeElement.textContent.trim()"))
            assert await page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid", seen
        assert seen[0] == "Skip to content"
        assert seen[-1] == "Table of these days"
        assert {"Theme", "Export", "Money", "Credits"} <= set(seen)


async def test_paper_has_every_column_and_no_navigation(chromium: Browser, site: str, busy) -> None:
    async with opened(
        chromium, site, busy.cookie, viewport={"width": 700, "height": 1000}, color_scheme="dark"
    ) as page:
        await page.goto(f"{site}{busy.path}")
        await page.emulate_media(media="print")
        assert not await page.locator("header.top").is_visible()
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert await page.locator("#days").is_visible()
        overflow = await page.evaluate(
            "() => [...document.querySelectorAll('table')].map(t => t.scrollWidth - t.parentElement.clientWidth)"
        )
        assert max(overflow) <= 0
        assert await page.get_by_text(f"{site}{busy.path}").is_visible()


async def test_text_at_twice_its_size_still_fits(chromium: Browser, site: str, busy) -> None:
    async with opened(chromium, site, busy.cookie, viewport={"width": 720, "height": 900}) as page:
        await page.goto(f"{site}{busy.path}")
        await page.evaluate("document.documentElement.style.setProperty('zoom', '2')")
        sideways = await page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert sideways <= 0
