"""Importing: a preview first, all or nothing, the same again changes nothing, and history does not move."""

import asyncio
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest

from bursar import clock, db
from bursar.audit.events import OPERATOR
from bursar.pricing.book import ModelNotPriced, PriceBook
from bursar.pricing.files import ReadList, read
from bursar.pricing.importing import (
    PriceListRejected,
    accepted,
    import_list,
    import_shipped,
    load_shipped,
    preview_list,
)
from bursar.pricing.lists import Preview
from bursar.pricing.models import NameIndex
from bursar.pricing.prices import PER, UNITS
from bursar.pricing.terms import PriceInThePast
from bursar.pricing.usage import USAGE_KINDS
from bursar.pricing.versions import find_version, prices_in_force

OwnList = Callable[..., ReadList]
HOUR = timedelta(hours=1)


async def bring(database: db.Database, listed: ReadList, **arguments: datetime | bool) -> Preview:
    async with database.platform() as conn:
        return await import_list(conn, accepted(listed), by=OPERATOR, **arguments)  # type: ignore[arg-type]


async def input_price(book: PriceBook, provider: str, model: str, at: datetime | None = None) -> int:
    found = await book.list_price(provider=provider, model=model, at=at)
    return found.rates[0].price_nano_usd


async def rows_of(database: db.Database, list_name: str) -> tuple[int, int, int]:
    """Versions, imports, names of a list."""
    counts = []
    async with database.platform() as conn:
        for table in ("versions", "imports", "models"):
            sql = f"select count(*) from pricing.{table} where list_name = %(list_name)s"
            counts.append(int(await db.fetch_value(conn, sql, list_name=list_name)))
    return counts[0], counts[1], counts[2]


async def test_kinds_in_the_database_are_those_of_the_code(database: db.Database) -> None:
    async with database.untenanted() as conn:
        rows = await (await conn.execute("select kind, per, unit from pricing.kinds order by position")).fetchall()
    assert rows == [(kind, PER[kind], UNITS[kind]) for kind in USAGE_KINDS]


async def test_the_shipped_lists_come_with_their_versions_and_what_they_cannot_say(shipped: db.Database) -> None:
    async with shipped.untenanted() as conn:
        rows = await (
            await conn.execute(
                "select list_name, list_version, list_date is not null, not_represented from pricing.imports"
                " where list_name in ('genai-prices', 'bursar') order by list_name"
            )
        ).fetchall()
    (_, own_version, own_date, _), (_, version, has_date, missing) = rows
    assert own_version == load_shipped("bursar").version
    assert own_date
    assert version.startswith("0.")
    assert has_date
    assert missing["unit input_document_kpages"]


async def test_the_shipped_lists_again_change_nothing(shipped: db.Database) -> None:
    before = [await rows_of(shipped, name) for name in ("genai-prices", "bursar")]
    async with shipped.platform() as conn:
        # Others wait meanwhile: their changes would count here.
        revision = await db.fetch_value(conn, "select revision from pricing.book for update")
        assert await import_shipped(conn) == []
        again = [await import_list(conn, load_shipped(name), by=OPERATOR) for name in ("genai-prices", "bursar")]
        assert await db.fetch_value(conn, "select revision from pricing.book") == revision
    assert not any(preview.changes_prices for preview in again)
    assert [await rows_of(shipped, name) for name in ("genai-prices", "bursar")] == before


async def test_what_was_stored_is_what_the_list_says(shipped: db.Database) -> None:
    listed = load_shipped("genai-prices")
    now = datetime(2026, 11, 20, tzinfo=UTC)
    async with shipped.platform() as conn:
        found = await preview_list(conn, listed)
        stored = {(each.provider, each.model) for each in await prices_in_force(conn, at=now)}
    assert {change.outcome for change in found.changes} == {"unchanged"}
    assert found.missing == ()
    assert {("openai", "gpt-5"), ("anthropic", "claude-sonnet-4-5"), ("demo", "demo-fixed")} <= stored


async def test_a_dated_name_is_priced_as_its_model(book: PriceBook) -> None:
    for name in ("gpt-4o", "gpt-4o-2024-08-06", "GPT-4o-20240806"):
        assert (await book.list_price(provider="openai", model=name)).model == "gpt-4o", name
    assert (
        await book.list_price(provider="anthropic", model="claude-sonnet-4-5-20250929")
    ).model == "claude-sonnet-4-5"
    assert (await book.list_price(provider="azure", model="gpt-5")).provider == "openai"
    with pytest.raises(ModelNotPriced):
        await book.list_price(provider="openai", model="moderation")
    with pytest.raises(ModelNotPriced):
        await book.list_price(provider="openrouter", model="deepseek/deepseek-r1:free")


async def test_two_servers_that_start_at_once_import_once(database: db.Database, own_list: OwnList) -> None:
    listed = own_list(large="2.5", small="1")
    done = await asyncio.gather(*(bring(database, listed) for _ in range(4)))
    assert sorted(len(each.of("added")) for each in done) == [0, 0, 0, 2]
    assert await rows_of(database, listed.prices.name) == (2, 1, 2)


async def test_a_preview_names_what_changes_and_changes_nothing(database: db.Database, own_list: OwnList) -> None:
    await bring(database, own_list(large="2.5", small="1", gone="9"))
    listed = own_list(large="3", small="1", new="7")
    async with database.platform() as conn:
        found = await preview_list(conn, accepted(listed))
    assert [(each.model, each.outcome) for each in found.changes] == [
        ("large", "changed"), ("small", "unchanged"), ("new", "added"),
    ]  # fmt: skip
    (difference,) = found.of("changed")[0].differences
    assert (difference.kind, difference.old_nano_usd, difference.new_nano_usd) == (
        "input_tokens",
        2_500_000_000,
        3_000_000_000,
    )
    assert [model for _, model in found.missing] == ["gone"]
    assert (await rows_of(database, listed.prices.name))[0] == 3


async def test_a_changed_price_counts_from_its_instant_on_and_the_old_one_stays(
    database: db.Database, book: PriceBook, own_list: OwnList
) -> None:
    name = own_list(large="2.5").prices.name
    await bring(database, own_list(large="2.5"))
    old = await book.list_price(provider=name, model="large")
    at = clock.now() + HOUR
    await bring(database, own_list(large="3"), effective_from=at)
    assert await input_price(book, name, "large", at - timedelta(microseconds=1)) == 2_500_000_000
    assert await input_price(book, name, "large", at) == 3_000_000_000
    async with database.untenanted() as conn:
        assert await find_version(conn, price_version_id=old.price_version_id) == old


async def test_a_price_cannot_take_effect_in_the_past_unless_one_says_so(
    database: db.Database, book: PriceBook, own_list: OwnList
) -> None:
    name = own_list(large="2").prices.name
    await bring(database, own_list(large="2"))
    before = clock.now()
    await bring(database, own_list(large="3"))
    with pytest.raises(PriceInThePast):
        await bring(database, own_list(large="5"), effective_from=before)
    assert await input_price(book, name, "large", before) == 2_000_000_000
    await bring(database, own_list(large="5"), effective_from=before, backdate=True)
    assert await input_price(book, name, "large", before) == 5_000_000_000
    assert await input_price(book, name, "large") == 5_000_000_000


async def test_an_announced_price_can_be_changed_and_taken_back(
    database: db.Database, book: PriceBook, own_list: OwnList
) -> None:
    name = own_list(large="2").prices.name
    soon = clock.now() + HOUR
    line = "large,input_tokens,{},1M tokens,,,,,{},a test,"
    for usd, expected in (("3", 3), ("4", 4)):
        await bring(database, own_list(line.format(usd, soon.isoformat()), large="2"))
        assert await input_price(book, name, "large", soon) == expected * 1_000_000_000
    await bring(database, own_list(large="2"))
    assert await input_price(book, name, "large", soon) == 2_000_000_000
    assert await input_price(book, name, "large") == 2_000_000_000


async def test_a_price_can_be_withdrawn(database: db.Database, book: PriceBook, own_list: OwnList) -> None:
    name = own_list(large="2").prices.name
    await bring(database, own_list(large="2"))
    await bring(database, own_list("large,input_tokens,,,,,,,,a test,true"))
    with pytest.raises(ModelNotPriced):
        await book.list_price(provider=name, model="large")


async def test_a_list_of_ones_own_goes_before_the_shipped_ones(shipped: db.Database, book: PriceBook) -> None:
    listed = read(
        "provider,model,kind,price_usd,unit\nnovita,baichuan/baichuan-m2-32b,input_tokens,77,1M tokens\n",
        list_name=f"own-{clock.uuid7().hex}",
    )
    before = clock.now()
    old = await input_price(book, "novita", "baichuan/baichuan-m2-32b")
    await bring(shipped, listed)
    assert await input_price(book, "novita", "baichuan/baichuan-m2-32b") == 77_000_000_000
    assert await input_price(book, "novita", "baichuan/baichuan-m2-32b", before) == old != 77_000_000_000
    withdrawn = read(
        "provider,model,kind,price_usd,unit,withdrawn\nnovita,baichuan/baichuan-m2-32b,,,,true\n",
        list_name=listed.prices.name,
    )
    await bring(shipped, withdrawn)
    assert await input_price(book, "novita", "baichuan/baichuan-m2-32b") == old


async def test_nothing_of_a_list_with_a_rejected_row_is_imported(database: db.Database, own_list: OwnList) -> None:
    listed = own_list("small,input_tokens,0,1M tokens,,,,,,,", large="2")
    with pytest.raises(PriceListRejected) as refusal:
        await bring(database, listed)
    assert [(error.pointer, "free" in error.detail) for error in refusal.value.errors] == [("line 3", True)]
    assert await rows_of(database, listed.prices.name) == (0, 0, 0)


@pytest.mark.parametrize("name", ["genai-prices", "bursar", "No Name", ""])
def test_a_file_cannot_take_the_name_of_a_shipped_list(own_list: OwnList, name: str) -> None:
    listed = own_list(large="2")
    with pytest.raises(PriceListRejected):
        accepted(replace(listed, prices=replace(listed.prices, name=name)))


async def test_names_that_a_newer_list_no_longer_has_stay_known(
    database: db.Database, book: PriceBook, own_list: OwnList
) -> None:
    name = own_list(large="2").prices.name
    await bring(database, own_list("old,input_tokens,1,1M tokens,,,,older-*,,,", large="2"))
    await bring(database, own_list(large="2"))
    assert (await book.list_price(provider=name, model="older-one")).model == "old"


async def test_prices_are_never_changed_or_deleted(shipped: db.Database) -> None:
    for statement in ("update pricing.rates set price_nano_usd = 1", "delete from pricing.versions"):
        with pytest.raises(psycopg.Error) as refusal:
            async with await psycopg.AsyncConnection.connect(shipped.dsn("admin")) as conn:
                await conn.execute(statement)
        assert refusal.value.sqlstate == "BR409"


async def test_the_application_reads_prices_and_writes_none(shipped: db.Database) -> None:
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        async with shipped.untenanted() as conn:
            await conn.execute("update pricing.book set revision = 0")


def test_a_name_index_without_lists_knows_nothing() -> None:
    assert NameIndex([], []).find("openai", "gpt-5") is None
