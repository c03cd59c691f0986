"""Bringing price lists into the book: the shipped ones, and files of the operator. conn is always bursar_platform's.

An import is one transaction: it brings everything or nothing. Prices of known models change from an instant on, and
what lies before it stays as it was. The same list again changes nothing.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from importlib.resources import files as resources
from itertools import groupby
from typing import Final, TypeVar
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import clock, db
from bursar.audit.events import SYSTEM, Actor, record
from bursar.identity.organizations import PLATFORM_ORGANIZATION_ID
from bursar.pricing import files, genai_list
from bursar.pricing.lists import Change, Key, Preview, PriceList, preview
from bursar.pricing.models import ModelName, ProviderName
from bursar.pricing.terms import instant_of_effect
from bursar.pricing.versions import QUERIES, VersionRow, rows_of_prices, timeline
from bursar.problems import FieldError, Problem

SHORT_LIST: Final = "bursar"
SHORT_LIST_RANK: Final = 20
SHIPPED: Final = (genai_list.LIST_NAME, SHORT_LIST)
_LIST_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}", re.ASCII)
# Names that a newer list no longer has stay known, behind all that it has.
_BEHIND: Final = 1_000_000


class PriceListRejected(Problem):
    """A price list has rows that cannot be used; nothing of it was imported. errors: one per row."""

    status, code, title = 422, "price_list_rejected", "This price list cannot be imported"


async def import_shipped(conn: db.Connection, *, by: Actor = SYSTEM) -> list[Preview]:
    """Import genai-prices as installed and our own short list, where this version's are not in the book yet.

    Returns what changed, one preview a list; nothing, and quickly, when both are there.
    """
    done = []
    for name in SHIPPED:
        if await _newest_version(conn, name) != shipped_version(name):
            listed = await asyncio.to_thread(load_shipped, name)
            done.append(await import_list(conn, listed, by=by))
    return done


def shipped_version(name: str) -> str:
    """Version of a shipped list, without reading all of it where that is slow."""
    return genai_list.list_version() if name == genai_list.LIST_NAME else load_shipped(name).version


def load_shipped(name: str) -> PriceList:
    """A shipped list, 'genai-prices' or 'bursar'."""
    if name == genai_list.LIST_NAME:
        return genai_list.load(clock.now().date())
    read = files.read(resources("bursar.pricing").joinpath("shipped.json").read_text(encoding="utf-8"))
    assert not read.errors, read.errors
    return replace(read.prices, rank=SHORT_LIST_RANK, tells_history=True)


def accepted(read: files.ReadList) -> PriceList:
    """The list of a file in which nothing was rejected.

    Raises:
        PriceListRejected
    """
    errors = [FieldError(each.place, each.reason) for each in read.errors]
    if not _LIST_NAME.fullmatch(read.prices.name) or read.prices.name in SHIPPED:
        errors.append(FieldError("list", f"{read.prices.name!r} cannot be the name of a list of your own"))
    if not errors and not read.prices.models:
        errors.append(FieldError("file", "no prices"))
    if errors:
        raise PriceListRejected(f"{len(errors)} rows cannot be used; nothing was imported.", errors=errors)
    return read.prices


async def preview_list(conn: db.Connection, listed: PriceList, *, effective_from: datetime | None = None) -> Preview:
    """What importing a list would change now, or from an instant on; changes nothing."""
    now: datetime = await db.fetch_value(conn, QUERIES.present)
    return await _preview(conn, listed, effective_from or now)


async def import_list(
    conn: db.Connection,
    listed: PriceList,
    *,
    by: Actor,
    effective_from: datetime | None = None,
    backdate: bool = False,
) -> Preview:
    """Make the book say what a list says, from an instant on (now when None); returns what changed.

    backdate: allow an instant in the past (to re-rate after a correction); what was charged stays as it was.

    Raises:
        PriceInThePast
    """
    # The lock comes before the comparison, so that of two servers that start at once the second finds all done.
    now: datetime = await db.fetch_value(conn, QUERIES.lock_book)
    instant = instant_of_effect(effective_from, now, backdate=backdate)
    found = await _preview(conn, listed, instant)
    is_newer = await _newest_version(conn, listed.name) != listed.version
    await db.execute(conn, QUERIES.add_list, list_name=listed.name, rank=listed.rank, title=listed.title)
    names_changed = await _write_names(conn, listed)
    if found.changes_prices or names_changed or is_newer:
        await db.execute(conn, QUERIES.change_book)
        import_id = await _record_import(conn, listed, found, by)
        await _write_versions(conn, listed.name, import_id, found.changes)
    return found


async def _newest_version(conn: db.Connection, list_name: str) -> str | None:
    version: str | None = await db.fetch_value(conn, QUERIES.newest_import, list_name=list_name)
    return version


async def _preview(conn: db.Connection, listed: PriceList, effective_from: datetime) -> Preview:
    rows = await db.fetch_all(conn, VersionRow, QUERIES.versions_of_list, list_name=listed.name)
    known = await db.fetch_all(conn, _KnownModel, QUERIES.known_models)
    return preview(
        listed,
        {key: timeline(of_model) for key, of_model in groupby(rows, key=_key)},
        known=frozenset((each.provider, each.model) for each in known),
        effective_from=effective_from,
    )


@dataclass(frozen=True, slots=True)
class _KnownModel:
    """A model that some list prices."""

    provider: str
    model: str


def _key(row: VersionRow) -> Key:
    return (row.provider, row.model)


async def _record_import(conn: db.Connection, listed: PriceList, found: Preview, by: Actor) -> UUID:
    import_id = clock.uuid7()
    counts = {outcome: len(found.of(outcome)) for outcome in ("added", "changed", "unchanged")}
    await db.execute(
        conn,
        QUERIES.add_import,
        import_id=import_id,
        list_name=listed.name,
        list_version=listed.version,
        list_date=listed.date,
        digest=listed.digest(),
        effective_from=found.effective_from,
        not_represented=Jsonb({reason: list(models) for reason, models in listed.not_represented.items()}),
        imported_by=by.user_id,
        **counts,
    )
    await record(
        conn,
        organization_id=PLATFORM_ORGANIZATION_ID,
        by=by,
        action="price_list.imported",
        object_id=import_id,
        new={"list": listed.name, "version": listed.version, "effective_from": found.effective_from, **counts},
    )
    return import_id


async def _write_versions(conn: db.Connection, list_name: str, import_id: UUID, changes: Iterable[Change]) -> None:
    taken = await db.fetch_all(conn, _TakenInstant, QUERIES.instants_of_list, list_name=list_name)
    revisions = {(each.provider, each.model, each.effective_from): each.revision for each in taken}
    added = [(clock.uuid7(), change, segment) for change in changes for segment in change.segments]
    async with conn.cursor() as cursor:
        async with cursor.copy(QUERIES.copy_versions) as copy:
            for version_id, change, segment in added:
                place = (change.provider, change.model, segment.effective_from)
                revision = revisions.get(place, 0) + 1
                withdrawn = segment.prices is None
                await copy.write_row((version_id, list_name, *place, revision, withdrawn, segment.source, import_id))
        async with cursor.copy(QUERIES.copy_rates) as copy:
            for version_id, _, segment in added:
                for rank, kind, above, when, *price in rows_of_prices(segment.prices) if segment.prices else ():
                    await copy.write_row((version_id, rank, kind, above, json.dumps(when), *price))


@dataclass(frozen=True, slots=True)
class _TakenInstant:
    """An instant at which a model has a version already, and its newest revision."""

    provider: str
    model: str
    effective_from: datetime
    revision: int


async def _write_names(conn: db.Connection, listed: PriceList) -> bool:
    """Put the list's names in place of those that the book has of it; False when they are the same.

    Names that the list has no longer stay, behind its own: requests may still come under them.
    """
    old_providers = await db.fetch_all(conn, ProviderName, QUERIES.provider_names_of_list, list_name=listed.name)
    old_models = await db.fetch_all(conn, ModelName, QUERIES.model_names_of_list, list_name=listed.name)
    providers = _with_those_left_behind(listed.providers, old_providers, lambda each: (each.provider,))
    models = _with_those_left_behind(listed.model_names(), old_models, lambda each: (each.provider, each.model))
    if _plain(providers, models) == _plain(old_providers, old_models):
        return False
    await db.execute(conn, QUERIES.remove_model_names, list_name=listed.name)
    await db.execute(conn, QUERIES.remove_provider_names, list_name=listed.name)
    async with conn.cursor() as cursor:
        async with cursor.copy(QUERIES.copy_provider_names) as copy:
            for provider in providers:
                rule = None if provider.rule is None else json.dumps(provider.rule)
                await copy.write_row(
                    (listed.name, provider.provider, provider.position, rule, list(provider.fallbacks))
                )
        async with cursor.copy(QUERIES.copy_model_names) as copy:
            for name in models:
                await copy.write_row(
                    (listed.name, name.provider, name.model, name.position, json.dumps(name.rule), name.context_window)
                )
    return True


_Name = TypeVar("_Name", ProviderName, ModelName)


def _with_those_left_behind(
    new: Iterable[_Name], old: Iterable[_Name], identity: Callable[[_Name], tuple[str, ...]]
) -> list[_Name]:
    """The new names, then the old ones that are not among them, in their old order."""
    names = list(new)
    known = {identity(each) for each in names}
    for each in old:
        if identity(each) not in known:
            names.append(replace(each, position=_BEHIND + each.position % _BEHIND))
    return names


def _plain(providers: Iterable[ProviderName], models: Iterable[ModelName]) -> set[str]:
    """For comparing: a rule is a dictionary, whose order means nothing."""
    return {
        *(json.dumps(asdict(each), sort_keys=True) for each in providers),
        *(json.dumps(asdict(each), sort_keys=True) for each in models),
    }
