"""What is known of batches: their rows, who may see them, and the prices pinned for them. No provider is asked here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from psycopg.types.json import Jsonb

from bursar import db
from bursar.credits.moves import Action, Flag, Move
from bursar.gateway.batch_reading import Asked
from bursar.gateway.endpoints import ENDPOINTS
from bursar.gateway.routes import Format
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.money import Micros
from bursar.pricing.book import Quote
from bursar.pricing.prices import Priced, PriceVersion, Rounding, price_in_batch
from bursar.pricing.usage import Usage
from bursar.pricing.versions import find_version
from bursar.problems import Problem

QUERIES: Final = db.load_queries("bursar.gateway", "batches.sql")

ROWS_AT_ONCE: Final = 1_000
"""In one statement; writing its parameters holds up every other call of the process."""


class BatchNotFound(Problem):
    """No such batch, or one of another organization or user."""

    status, code, title = 404, "batch_not_found", "No such batch"


class FileNotFound(Problem):
    """No such file, or one of another organization or user."""

    status, code, title = 404, "file_not_found", "No such file"


class BatchOfAnother(Problem):
    """The batch or file is a colleague's: it may be seen, but neither read nor changed."""

    status, code, title = 403, "batch_of_another", "This is a colleague's"


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of gateway.batches."""

    organization_id: UUID
    batch_id: UUID
    format: Format
    endpoint: str
    user_id: UUID | None
    api_key_id: UUID
    provider: str
    provider_key_id: UUID | None
    is_own_key: bool
    provider_batch_id: str | None
    input_file_id: UUID | None
    request_count: int
    prices: Mapping[str, Any]
    state: str
    told: dict[str, Any] | None
    body_hash: bytes | None
    created_at: datetime
    ends_by: datetime
    lease_until: datetime
    failed_looks: int
    ended_at: datetime | None
    deleted_at: datetime | None

    @property
    def shown_id(self) -> str:
        """The id that clients see."""
        return f"{'batch' if self.format == 'openai' else 'msgbatch'}_{self.batch_id.hex}"

    def move(self, action: Action, request: HeldRequest, **fields: Any) -> Move:
        """A move of one of its requests."""
        flags = Flag.BATCH | Flag.SENT | (Flag.OWN_KEY if self.is_own_key else Flag.NONE)
        price = self.prices["models"][request.model]["charge"]
        return Move(
            action,
            self.organization_id,
            request.request_id,
            self.user_id,
            self.api_key_id,
            provider=self.provider,
            model=request.model,
            price_version_id=None if price is None else UUID(price),
            provider_key_id=self.provider_key_id,
            feature=ENDPOINTS[self.endpoint].feature,
            **{
                **fields,
                "flags": flags | (Flag.UNPRICED if price is None else Flag.NONE) | fields.get("flags", Flag.NONE),
            },
        )


@dataclass(frozen=True, slots=True)
class File:
    """A row of gateway.batch_files."""

    organization_id: UUID
    file_id: UUID
    user_id: UUID | None
    api_key_id: UUID
    provider: str
    provider_key_id: UUID | None
    provider_file_id: str
    batch_id: UUID | None
    endpoint: str
    filename: str
    size_bytes: int
    created_at: datetime
    expires_at: datetime | None

    @property
    def shown_id(self) -> str:
        """The id that clients see."""
        return f"file-{self.file_id.hex}"


@dataclass(frozen=True, slots=True)
class HeldRequest:
    """A request of a batch that was neither charged nor freed yet."""

    custom_id: str
    request_id: UUID
    model: str
    estimate: Sequence[int]
    permitted: Sequence[int]
    context: Mapping[str, str]
    hold_micros: Micros


@dataclass(frozen=True, slots=True)
class Prices:
    """What the requests of a batch cost, as it was when the batch was made.

    quotes: by model as priced. batch_ppm: what a kind without a batch price costs.
    """

    quotes: Mapping[str, Quote]
    batch_ppm: int
    at: datetime

    def most(self, model: str, usage: Usage, context: Mapping[str, str]) -> Priced:
        """What some usage of a model comes to at most. Rounded up."""
        return self.quotes[model].price_in_batch(
            usage, batch_ppm=self.batch_ppm, at=self.at, context=context, rounding=Rounding.UP
        )

    def as_json(self) -> dict[str, Any]:
        """What pins them: ids of versions, which never change, and what is said beside."""
        return {
            "batch_ppm": self.batch_ppm,
            "models": {
                model: {
                    "charge": None if quote.charge is None else str(quote.charge.price_version_id),
                    "cost": None if quote.cost is None else str(quote.cost.price_version_id),
                    "markup_ppm": quote.markup_ppm,
                    "has_context": quote.has_context,
                }
                for model, quote in self.quotes.items()
            },
        }


async def pinned_prices(conn: db.Connection, batch: Batch) -> PinnedPrices:
    """The prices of a batch again, of whatever was said since. conn: acts for its organization."""
    versions: dict[str, PriceVersion] = {}
    for pin in batch.prices["models"].values():
        for version_id in (pin["charge"], pin["cost"]):
            if version_id is not None and version_id not in versions:
                versions[version_id] = await find_version(conn, price_version_id=UUID(version_id))
    return PinnedPrices(batch.prices["models"], versions, batch.prices["batch_ppm"], batch.created_at)


@dataclass(frozen=True, slots=True)
class PinnedPrices:
    """`Prices` from what was stored."""

    models: Mapping[str, Any]
    versions: Mapping[str, PriceVersion]
    batch_ppm: int
    at: datetime

    def price(self, model: str, usage: Usage, context: Mapping[str, str]) -> Priced | None:
        """What some usage of a model comes to; None: a named policy lets it pass unpriced."""
        pin = self.models[model]
        if pin["charge"] is None:
            return None
        return price_in_batch(
            self.versions[pin["cost"]],
            self.versions[pin["charge"]],
            usage,
            pin["markup_ppm"],
            batch_ppm=self.batch_ppm,
            context=context if pin["has_context"] else None,
            at=self.at,
        )


# ------------------------------------------------------------------------------------------------ who sees what


async def get_batch(conn: db.Connection, principal: Principal, shown_id: str, format: Format) -> tuple[Batch, bool]:
    """A batch by the id that clients see, and whether it is the caller's own.

    Raises:
        BatchNotFound: unknown, another organization's, another user's for whom sees only their own, or deleted.
    """
    prefix = "batch_" if format == "openai" else "msgbatch_"
    batch_id = _id(shown_id, prefix)
    batch = None
    if batch_id is not None:
        batch = await db.fetch_optional(
            conn, Batch, QUERIES.batch, organization_id=principal.organization_id, batch_id=batch_id
        )
    if batch is None or batch.format != format or batch.provider_batch_id is None or batch.deleted_at is not None:
        raise BatchNotFound(f"There is no batch {shown_id[:100]!r}")
    own = await _is_own(conn, principal, batch.user_id, batch.api_key_id)
    if not own and not principal.may(Permission.USAGE_READ):
        raise BatchNotFound(f"There is no batch {shown_id[:100]!r}")
    return batch, own


async def get_file(conn: db.Connection, principal: Principal, shown_id: str) -> tuple[File, bool]:
    """A file by the id that clients see, and whether it is the caller's own.

    Raises:
        FileNotFound: as BatchNotFound.
    """
    file_id = _id(shown_id, "file-")
    file = None
    if file_id is not None:
        file = await db.fetch_optional(
            conn, File, QUERIES.batch_file, organization_id=principal.organization_id, file_id=file_id
        )
    own = file is not None and await _is_own(conn, principal, file.user_id, file.api_key_id)
    if file is None or not (own or principal.may(Permission.USAGE_READ)):
        raise FileNotFound(f"There is no file {shown_id[:100]!r}")
    return file, own


async def _is_own(conn: db.Connection, principal: Principal, user_id: UUID | None, api_key_id: UUID) -> bool:
    """A person's are those of any of their keys; a service's those of its key and the keys it was rotated from."""
    if user_id is not None or principal.user_id is not None:
        return user_id == principal.user_id
    return bool(
        await db.fetch_value(
            conn,
            QUERIES.is_same_service,
            organization_id=principal.organization_id,
            api_key_id=principal.api_key_id,
            other_api_key_id=api_key_id,
        )
    )


async def list_batches(
    conn: db.Connection, principal: Principal, format: Format, *, after: str | None, before: str | None, limit: int
) -> tuple[list[Batch], bool]:
    """Batches that the caller sees, newest first, and whether there are more. after, before: ids that clients see.

    Raises:
        BatchNotFound: of after or before.
    """
    edges = {}
    for name, shown_id in (("after", after), ("before", before)):
        found = None if shown_id is None else (await get_batch(conn, principal, shown_id, format))[0].batch_id
        edges[name] = found
    batches = await db.fetch_all(
        conn,
        Batch,
        QUERIES.visible_batches,
        organization_id=principal.organization_id,
        format=format,
        user_id=principal.user_id,
        api_key_id=principal.api_key_id,
        sees_all=principal.may(Permission.USAGE_READ),
        most=limit + 1,
        **edges,
    )
    page, has_more = batches[:limit], len(batches) > limit
    return sorted(page, key=lambda batch: batch.batch_id, reverse=True), has_more


def _id(shown_id: str, prefix: str) -> UUID | None:
    """Of what a client wrote; None where it is none of ours."""
    digits = shown_id.removeprefix(prefix)
    if not shown_id.startswith(prefix) or len(digits) != 32 or not set(digits) <= set("0123456789abcdef"):
        return None
    return UUID(digits)


# ------------------------------------------------------------------------------------------------ changes


async def add_batch(conn: db.Connection, *, requests: Sequence[HeldRequest], **columns: Any) -> bool:
    """Note a batch and its requests before anything is held; false: the idempotency key has one already."""
    columns["prices"] = Jsonb(columns["prices"])
    if await db.fetch_value(conn, QUERIES.add_batch, request_count=len(requests), **columns) is None:
        return False
    for start in range(0, len(requests), ROWS_AT_ONCE):
        some = requests[start : start + ROWS_AT_ONCE]
        await db.execute(
            conn,
            QUERIES.add_batch_requests,
            organization_id=columns["organization_id"],
            batch_id=columns["batch_id"],
            custom_ids=[each.custom_id for each in some],
            request_ids=[each.request_id for each in some],
            models=[each.model for each in some],
            estimates=[_array(each.estimate) for each in some],
            permitted=[_array(each.permitted) for each in some],
            contexts=[json.dumps(dict(each.context)) for each in some],
            holds=[each.hold_micros for each in some],
        )
    return True


def _array(counts: Sequence[int]) -> str:
    """As PostgreSQL writes it."""
    return "{" + ",".join(map(str, counts)) + "}"


async def held_requests(
    conn: db.Connection, batch: Batch, custom_ids: Sequence[str] | None = None
) -> list[HeldRequest]:
    """Requests of a batch that are still held; custom_ids: of these."""
    return await db.fetch_all(
        conn,
        HeldRequest,
        QUERIES.held_requests,
        organization_id=batch.organization_id,
        batch_id=batch.batch_id,
        custom_ids=None if custom_ids is None else list(custom_ids),
    )


async def requests_of_file(conn: db.Connection, file: File) -> tuple[Asked, ...]:
    """What metering read of an uploaded file."""
    rows = await db.fetch_value(
        conn, QUERIES.requests_of_file, organization_id=file.organization_id, file_id=file.file_id
    )
    return tuple(Asked.of_json(row) for row in rows or ())


async def execute(conn: db.Connection, name: str, batch: Batch, **parameters: Any) -> int:
    """Run a named statement on one batch; the number of rows it touched."""
    if "told" in parameters:
        parameters["told"] = Jsonb(parameters["told"])
    return await db.execute(
        conn,
        getattr(QUERIES, name),
        organization_id=batch.organization_id,
        batch_id=batch.batch_id,
        **parameters,
    )
