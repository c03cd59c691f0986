"""Looks after batches until they have ended: asks the provider, renews what is held, charges results, frees the rest.

Any number of workers may look at once and any of them may be killed at any point: a request is settled under an id of
its own, which books once, and everything else can be done again. What is true is at the provider and in the books; the
rows of a batch follow them.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog

from bursar import db
from bursar.clock import now, uuid7
from bursar.credits import together
from bursar.credits.moves import Action, Flag, Move, Outcome
from bursar.gateway import batch_records as records
from bursar.gateway import batch_vendors as vendors
from bursar.gateway.batch_reading import Result, lines_of, measured, read_result
from bursar.gateway.batch_records import Batch, HeldRequest, PinnedPrices
from bursar.gateway.batches import LEASE_SECONDS, Places, ProviderSaid, fail, said
from bursar.gateway.calls import NotBooked
from bursar.gateway.upstream import Upstream, UpstreamBroken
from bursar.money import Micros
from bursar.pricing.usage import USAGE_KINDS, Usage
from bursar.problems import Problem

CLAIM_SECONDS: Final = 120
"""A look that takes longer is renewed with each portion of results; one that was killed is followed by another then."""

FIRST_LOOK_SECONDS: Final = 5
LONGEST_PAUSE_SECONDS: Final = 60
LONGEST_RETRY_SECONDS: Final = 600
RENEW_AFTER_SECONDS: Final = 12 * 3600
LONGEST_LINE_BYTES: Final = 32 * 1024 * 1024

log = structlog.get_logger(__name__)


class Keeper:
    """Looks after batches, one at a time for each call of `look`."""

    def __init__(self, database: db.Database, upstream: Upstream, places: Places) -> None:
        self._database = database
        self._upstream = upstream
        self._places = places

    async def look(self, organization_id: UUID, batch_id: UUID) -> None:
        """Do what can be done for a batch now. Nothing, where another looks at it or it is not due."""
        async with self._database.tenant(organization_id) as conn:
            batch = await db.fetch_optional(
                conn,
                Batch,
                records.QUERIES.claim_batch,
                organization_id=organization_id,
                batch_id=batch_id,
                seconds=CLAIM_SECONDS,
            )
        if batch is None:
            return
        try:
            if batch.provider_batch_id is None:
                await self._find(batch)
            else:
                await self._follow(batch)
        except (Problem, ProviderSaid) as error:
            log.warning("batch not looked after", batch=batch.shown_id, error=str(error), failed=batch.failed_looks + 1)
            await self._failed(batch)

    async def _failed(self, batch: Batch) -> None:
        """Try again later. When the leases are over, expiry has charged what was held, as estimated: it has ended."""
        if batch.lease_until <= now():
            await self._end(batch, dict(batch.told or {}), state="charged")
            return
        pause = min(FIRST_LOOK_SECONDS * 2**batch.failed_looks, LONGEST_RETRY_SECONDS)
        await self._note("failed_look", batch, seconds=pause)

    # -------------------------------------------------------------------------------- what became of it

    async def _find(self, batch: Batch) -> None:
        """A batch that was noted, and perhaps held and sent, and of which no answer came: does the provider have it?

        A file of ours is read by our batches alone, so one of OpenAI's is known by it. Of Anthropic's only the number
        of requests is told. Where it may be there but cannot be told, its holds run out and are charged as any call
        whose answer is not known.
        """
        candidates = [each async for each in self._untold(batch)]
        if not candidates:
            async with self._database.tenant(batch.organization_id) as conn:
                held = await records.held_requests(conn, batch)
            async with together.lane(self._database) as lane:
                await fail(self._database, lane, batch, held)
        elif batch.format == "openai" and len(candidates) == 1:
            told = candidates[0]
            await self._note("taken_batch", batch, provider_batch_id=told["id"], told=told, seconds=0)
        else:
            raise UpstreamBroken(f"{len(candidates)} batches of {batch.provider} may be this one.")

    async def _untold(self, batch: Batch) -> AsyncIterator[dict[str, Any]]:
        """The provider's batches that may be this one and are known as no other."""
        target = await self._places.target(batch)
        path = f"{vendors.BATCHES[batch.format]}?limit=100"
        listed = _listed(await said(await self._upstream.get(target, path)), batch.provider)
        likely = [each for each in listed if await self._may_be(batch, each)]
        ids = [each["id"] for each in likely]
        async with self._database.platform() as conn:
            known = await db.fetch_values(
                conn, records.QUERIES.batches_of_provider_ids, provider=batch.provider, provider_batch_ids=ids
            )
        for each in likely:
            if each["id"] not in known:
                yield each

    async def _may_be(self, batch: Batch, told: Mapping[str, Any]) -> bool:
        if batch.format == "openai":
            async with self._database.tenant(batch.organization_id) as conn:
                provider_file_id = await db.fetch_value(
                    conn,
                    records.QUERIES.provider_file,
                    organization_id=batch.organization_id,
                    file_id=batch.input_file_id,
                )
            return bool(told.get("input_file_id") == provider_file_id)
        counts = told.get("request_counts")
        total = sum(each for each in counts.values() if isinstance(each, int)) if isinstance(counts, dict) else 0
        return total == batch.request_count and _instant(told.get("created_at")) >= batch.created_at.replace(
            microsecond=0
        )

    async def _follow(self, batch: Batch) -> None:
        """Ask how far it is; when it has ended, charge its results."""
        target = await self._places.target(batch)
        told = dict(batch.told or {})
        if batch.state == "running":
            path = f"{vendors.BATCHES[batch.format]}/{batch.provider_batch_id}"
            told = vendors.document(await said(await self._upstream.get(target, path)), batch.provider)
            is_over = vendors.is_over(batch.format, told)
            pause = CLAIM_SECONDS if is_over else _pause(batch)
            await self._note("told_of_batch", batch, told=told, is_over=is_over, seconds=pause)
            if not is_over:
                await self._renew(batch)
                return
        await self._settle(batch, told)

    async def _renew(self, batch: Batch) -> None:
        """Renew the leases long before they end, so that a worker that is away for hours charges nobody by estimate."""
        if (batch.lease_until - now()).total_seconds() > LEASE_SECONDS - RENEW_AFTER_SECONDS:
            return
        async with self._database.tenant(batch.organization_id) as conn:
            held = await records.held_requests(conn, batch)
        moves = [batch.move(Action.EXTEND, each, lease_seconds=LEASE_SECONDS) for each in held]
        async with together.lane(self._database) as lane:
            await together.book(lane, moves)
        await self._note("renew_batch", batch, seconds=LEASE_SECONDS)

    # -------------------------------------------------------------------------------- what it comes to

    async def _settle(self, batch: Batch, told: dict[str, Any]) -> None:
        """Charge every request that was answered, free every other one, then say that the batch has ended."""
        async with self._database.tenant(batch.organization_id) as conn:
            prices = await records.pinned_prices(conn, batch)
        seen = 0
        async with together.lane(self._database) as lane:
            for path in vendors.results_of(batch.format, told):
                async for portion in self._portions(batch, path):
                    seen += len(portion)
                    await self._book(lane, batch, prices, portion)
            if seen < vendors.succeeded(batch.format, told):
                raise UpstreamBroken(f"{batch.provider} tells of more answers than it gives.")
            async with self._database.tenant(batch.organization_id) as conn:
                held = await records.held_requests(conn, batch)
            await together.free(self._database, lane, [batch.move(Action.RELEASE, each) for each in held])
        await self._end(batch, told, state="freed")

    async def _portions(self, batch: Batch, path: str) -> AsyncIterator[list[Result]]:
        """Results in portions, as they come; lines that are none are left out."""
        target = await self._places.target(batch)
        answer = await self._upstream.get(target, path)
        if answer.status >= 400:
            await said(answer)
        rest, portion = b"", list[Result]()
        async with answer:
            async for piece in answer.pieces():
                lines, rest = lines_of(rest, piece)
                if len(rest) > LONGEST_LINE_BYTES:
                    raise UpstreamBroken(f"{batch.provider} sends a line without end.")
                for line in lines:
                    self._read(batch, line, portion)
                    if len(portion) >= together.PORTION:
                        yield portion
                        portion = []
        if rest.strip():
            self._read(batch, rest, portion)
        if portion:
            yield portion

    def _read(self, batch: Batch, line: bytes, portion: list[Result]) -> None:
        result = read_result(batch.format, line)
        if result is None:
            log.warning("a result of a batch cannot be read", batch=batch.shown_id)
        else:
            portion.append(result)

    async def _book(self, lane: db.Connection, batch: Batch, prices: PinnedPrices, portion: Sequence[Result]) -> None:
        """Settle what was answered and free what failed; then note it. What is noted already is left alone."""
        results = {each.custom_id: each for each in portion}
        async with self._database.tenant(batch.organization_id) as conn:
            held = await records.held_requests(conn, batch, list(results))
        settles = [_settle_move(batch, prices, each, results[each.custom_id]) for each in held]
        answered = [move for move in settles if move is not None]
        failed = [each for each, move in zip(held, settles, strict=True) if move is None]
        for verdict in await together.book(lane, answered):
            if verdict.outcome not in (Outcome.ACCEPTED, Outcome.KNOWN):
                raise NotBooked(f"{verdict.request_id}: {verdict.outcome.name}, {verdict.detail}")
        await together.free(self._database, lane, [batch.move(Action.RELEASE, each) for each in failed])
        charged = [each.custom_id for each, move in zip(held, settles, strict=True) if move is not None]
        async with self._database.tenant(batch.organization_id) as conn:
            await records.execute(conn, "requests_came_to", batch, custom_ids=charged, state="charged")
            await records.execute(
                conn, "requests_came_to", batch, custom_ids=[each.custom_id for each in failed], state="freed"
            )
            await records.execute(conn, "keep_batch", batch, seconds=CLAIM_SECONDS)

    async def _end(self, batch: Batch, told: Mapping[str, Any], *, state: str) -> None:
        """All of it is charged or freed: whoever says so first also notes the files that it wrote."""
        async with self._database.tenant(batch.organization_id) as conn:
            over = "ended" if batch.provider_batch_id is not None else "failed"
            await records.execute(conn, "all_requests_came_to", batch, state=state)
            if not await records.execute(conn, "end_batch", batch, state=over) or batch.format != "openai":
                return
            for provider_file_id in vendors.written_files(told):
                await db.execute(
                    conn,
                    records.QUERIES.add_batch_file,
                    organization_id=batch.organization_id,
                    file_id=uuid7(),
                    user_id=batch.user_id,
                    api_key_id=batch.api_key_id,
                    provider=batch.provider,
                    provider_key_id=batch.provider_key_id,
                    provider_file_id=provider_file_id,
                    batch_id=batch.batch_id,
                    endpoint=batch.endpoint,
                    filename=f"{batch.shown_id}_output.jsonl",
                    size_bytes=0,
                    requests=None,
                    created_at=None,
                    expires_at=None,
                )

    async def _note(self, name: str, batch: Batch, **parameters: Any) -> None:
        async with self._database.tenant(batch.organization_id) as conn:
            await records.execute(conn, name, batch, **parameters)


def _settle_move(batch: Batch, prices: PinnedPrices, request: HeldRequest, result: Result) -> Move | None:
    """What a request is charged; None where it was not answered."""
    if result.body is None:
        return None
    estimate, permitted = _usage(request.estimate), _usage(request.permitted)
    found = measured(batch.endpoint, request.model, estimate, permitted, result.body)
    priced = prices.price(request.model, found.usage, request.context)
    return batch.move(
        Action.SETTLE,
        request,
        amount_micros=Micros(0) if batch.is_own_key or priced is None else priced.charged_micros,
        tokens=found.usage.total_tokens,
        cost_nano_usd=0 if priced is None else priced.provider_cost_nano_usd,
        usage=found.usage.as_array(),
        flags=(Flag.ESTIMATED if found.estimated else Flag.NONE)
        | (Flag.UNPRICED if priced is not None and priced.unpriced_kinds else Flag.NONE),
    )


def _usage(counts: Sequence[int]) -> Usage:
    """As it was stored; of kinds that came later there was nothing."""
    return Usage(**dict(zip(USAGE_KINDS, counts, strict=False)))


def _pause(batch: Batch) -> int:
    """Young batches are asked for often, old ones once a minute."""
    age = (now() - batch.created_at).total_seconds()
    return int(min(LONGEST_PAUSE_SECONDS, FIRST_LOOK_SECONDS + age / 60))


def _listed(body: bytes, provider: str) -> list[dict[str, Any]]:
    try:
        data = msgspec.json.decode(body)["data"]
    except (msgspec.MsgspecError, KeyError, TypeError, RecursionError) as error:
        raise UpstreamBroken(f"{provider} answered with something that is no list.") from error
    return [each for each in data if isinstance(each, dict) and isinstance(each.get("id"), str)]


def _instant(text: object) -> datetime:
    try:
        return datetime.fromisoformat(str(text))
    except ValueError as error:
        raise UpstreamBroken("The provider dates a batch in a way that cannot be read.") from error
