"""`bursar webhooks` and `bursar alerts`, as somebody types them beside a receiver."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from tests.conftest import MASTER_KEY, Org
from tests.fakes.receiver import Receiver, receiving

from bursar import cli
from bursar.clock import uuid7
from bursar.outbox.endpoints import post_event
from bursar.settings import Settings

Bursar = Callable[..., Any]


@pytest.fixture
def bursar(org: Org, settings: Settings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Bursar:
    """Runs a command in a thread of its own, since the receiver lives in this one's loop; (exit code, document)."""
    monkeypatch.setenv("DATABASE_URL", str(settings.database_url))
    monkeypatch.setenv("BURSAR_MASTER_KEY", MASTER_KEY)
    monkeypatch.setenv("BURSAR_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("BURSAR_ORG", org.slug)
    monkeypatch.setenv("BURSAR_WEBHOOKS_LOOPBACK", "1")

    async def run(*words: str) -> tuple[int, Any]:
        code = await asyncio.to_thread(cli.run, [*words, "--json"])
        printed = capsys.readouterr().out
        return code, json.loads(printed) if printed else None

    return run


async def added(bursar: Bursar, receiver: Receiver) -> str:
    code, document = await bursar("webhooks", "add", receiver.url, "--kind", "pool.*")
    assert code == 0
    assert document["secret"].startswith("whsec_")
    return str(document["webhook_id"])


async def test_a_webhook_is_added_tried_rotated_and_its_log_read(bursar: Bursar) -> None:
    async with receiving() as receiver:
        webhook = await added(bursar, receiver)
        code, tried = await bursar("webhooks", "test", webhook)
        assert (code, tried) == (0, {"delivered": True, "answer": "answered 200"})
        assert receiver.got[0].document["type"] == "webhook.test"
        _, log = await bursar("webhooks", "log", webhook)
        assert [(each["state"], each["attempts"]) for each in log["items"]] == [("delivered", 1)]
        _, again = await bursar("webhooks", "replay", webhook, "--event", log["items"][0]["event_id"])
        assert again == {"events": 1}
        _, rotated = await bursar("webhooks", "rotate", webhook)
        assert rotated["secret"].startswith("whsec_")
        _, listed = await bursar("webhooks", "list")
        assert [(each["state"], each["pending"]) for each in listed["items"]] == [("active", 1)]


async def test_a_try_that_fails_says_so_by_its_exit_code(bursar: Bursar) -> None:
    async with receiving() as receiver:
        receiver.answer = lambda got: 500
        webhook = await added(bursar, receiver)
        code, tried = await bursar("webhooks", "test", webhook)
    assert (code, tried) == (1, {"delivered": False, "answer": "answered 500"})


async def test_an_address_inside_is_refused_and_an_unknown_webhook_is_not_found(bursar: Bursar) -> None:
    assert (await bursar("webhooks", "add", "https://169.254.169.254/latest"))[0] == 2
    assert (await bursar("webhooks", "log", "whk_0195f2c0a1b27c3d8e4f5a6b7c8d9e0f"))[0] == 4
    assert (await bursar("webhooks", "log", "nonsense"))[0] == 4


async def test_rules_are_set_shown_and_taken_back(bursar: Bursar) -> None:
    code, document = await bursar("alerts", "set", "pool", "--left", "250cr", "--to", "finance")
    assert code == 0
    [rule] = [each for each in document["items"] if not each["is_default"]]
    assert (rule["watches"], rule["measure"], rule["thresholds"]) == ("pool", "left", [250_000_000])
    assert (await bursar("alerts", "set", "pool", "--at", "50", "--off"))[0] == 2
    assert (await bursar("alerts", "set", "pool", "--at", "50", "--of", "nonsense"))[0] == 2
    _, document = await bursar("alerts", "set", "pool", "--default")
    assert all(each["is_default"] for each in document["items"])
    assert (await bursar("alerts", "list")) == (0, {"items": []})
    _, foreseen = await bursar("alerts", "preview", "pool")
    assert [each["threshold"] for each in foreseen["items"]] == [50, 80, 90, 100]


async def test_people_are_listed_by_name_in_what_was_told(org: Org, bursar: Bursar) -> None:
    user, gone = await org.member(), uuid7()
    async with org.tenant() as conn:
        for who in (user, gone):
            await post_event(
                conn,
                organization_id=org.organization_id,
                kind="allocation.threshold",
                object_kind="allocation",
                object_id=uuid7(),
                payload={"title": f"Share of usr_{who.hex} of the shared credits: 90 % used", "text": []},
            )
    _, listed = await bursar("alerts", "list")
    assert [each["title"] for each in listed["items"]] == [
        "Share of a former member of the shared credits: 90 % used",
        "Share of Dana Test of the shared credits: 90 % used",
    ]
