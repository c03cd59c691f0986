"""Batches through the gateway: held as a whole before the provider gets them, cancelled and read afterwards.

A batch is noted first, then held, then sent. Whatever breaks in between leaves a note, by which `batch_keeper` finds
out what has become of it. Each request has a hold of its own, placed together with all others of the batch or not at
all, and is later settled under its own id.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

import psycopg
import structlog

from bursar import db
from bursar.clock import now, uuid7
from bursar.credits import together, why
from bursar.credits.batcher import Unavailable
from bursar.credits.grants import KeyReused
from bursar.credits.moves import Action, Flag, Move, Verdict
from bursar.gateway import batch_records as records
from bursar.gateway import batch_vendors as vendors
from bursar.gateway.batch_reading import Asked
from bursar.gateway.batch_records import Batch, File, HeldRequest, Prices
from bursar.gateway.calls import Attempt, TwinInFlight
from bursar.gateway.desk import Desk
from bursar.gateway.provider_keys import KeyFinder
from bursar.gateway.providers import DEMO, get_provider
from bursar.gateway.routes import Format
from bursar.gateway.upstream import Answer, ProviderRefusesUs, ProviderUnreachable, Target, Upstream, UpstreamBroken
from bursar.gateway.wire import UnreadableRequest, WireRequest
from bursar.identity.principals import Principal
from bursar.money import Micros, NanoUsd

WINDOW_SECONDS: Final = 24 * 3600
"""In which a provider answers a batch or gives it up. Source: both vendors' references."""

LEASE_SECONDS: Final = WINDOW_SECONDS + 2 * 3600
OPENING_SECONDS: Final = 700
"""Longer than a call to a provider may take: after that nobody works on a batch that is not known to be there."""

SOON_SECONDS: Final = 10
Headers = Mapping[bytes, str]
Send = Callable[[Target], Awaitable[Answer]]

log = structlog.get_logger(__name__)


class ProviderSaid(Exception):
    """The provider refused; its own words go to the client."""

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
        super().__init__(status)
        self.status = status
        self.headers = headers
        self.body = body


async def said(answer: Answer) -> bytes:
    """A provider's whole answer.

    Raises:
        ProviderSaid: it is an error.
        UpstreamBroken
    """
    async with answer:
        body = await answer.read()
    if answer.status >= 400:
        raise ProviderSaid(answer.status, answer.headers, body)
    return body


class Places:
    """Where batches and files lie, and with which key they are reached."""

    def __init__(self, database: db.Database, keys: KeyFinder, *, demo_base_url: str | None) -> None:
        self._database = database
        self._keys = keys
        self._demo_base_url = demo_base_url

    async def target(self, made: Batch | File) -> Target:
        """The provider with the key that made it. One that is switched off is still asked for what it has."""
        async with self._database.untenanted() as conn:
            provider = await get_provider(conn, name=made.provider)
        if provider.name == DEMO:
            provider = replace(provider, base_url=self._demo_base_url)
        if made.provider_key_id is None:
            return Target(provider)
        key = await self._keys.kept(made.organization_id, made.provider_key_id)
        return Target(provider, key.secret, key.is_own)


@dataclass(frozen=True, slots=True)
class Terms:
    """Who answers the requests of a batch, by which names and prices. attempts: by public name of the model."""

    attempts: Mapping[str, Attempt]

    @property
    def first(self) -> Attempt:
        """Of any model: provider and key are the same for all."""
        return next(iter(self.attempts.values()))

    @property
    def models(self) -> dict[str, str]:
        """Public names and the provider's."""
        return {name: attempt.model for name, attempt in self.attempts.items()}


class Batches:
    """Makes, cancels and deletes batches. One per process."""

    def __init__(self, database: db.Database, desk: Desk, upstream: Upstream, places: Places) -> None:
        self._database = database
        self._desk = desk
        self._upstream = upstream
        self._places = places

    async def terms(self, principal: Principal, asked: Sequence[Asked], format: Format) -> Terms:
        """Who would answer these requests.

        Raises:
            ModelNotFound, ModelNotPriced, NoProviderKey: as for single calls.
            UnreadableRequest: they would go to several providers.
        """
        attempts: dict[str, Attempt] = {}
        for each in asked:
            if each.model not in attempts:
                call = await self._desk.open(principal, _as_request(each), format, b"")
                attempts[each.model] = call.attempts[0]
        # Tens of thousands take long to look at, here and below; the calls of others go on meanwhile.
        await asyncio.to_thread(_require_priced, asked, attempts)
        terms = Terms(attempts)
        places = {(each.target.provider.name, each.provider_key_id) for each in attempts.values()}
        if len(places) > 1:
            names = ", ".join(sorted(name for name, _ in places))
            raise UnreadableRequest(f"All requests of a batch go to one provider; these would go to {names}")
        return terms

    async def make(
        self,
        principal: Principal,
        asked: Sequence[Asked],
        terms: Terms,
        send: Send,
        *,
        format: Format,
        endpoint: str,
        file: File | None = None,
        idempotency_key: str | None = None,
        body_hash: bytes = b"",
    ) -> tuple[Batch, Micros]:
        """Note, hold and send a batch: its row, with what the provider said of it, and how much is held.

        Raises:
            InsufficientCredits, AllocationExhausted, CapReached, …: refused, nothing is held.
            KeyReused, TwinInFlight: a batch was made with this idempotency key.
            ProviderSaid, UpstreamBroken: the provider refused, or did not answer.
        """
        at = now()
        prices = Prices(
            {attempt.quote.model: attempt.quote for attempt in terms.attempts.values()},
            terms.first.target.provider.batch_price_ppm,
            at,
        )
        batch = _new_batch(principal, terms, prices, format=format, endpoint=endpoint, file=file, count=len(asked))
        held, moves = await asyncio.to_thread(_priced, batch, prices, asked, terms)
        async with together.lane(self._database) as conn:
            sums = await asyncio.to_thread(_sums, moves)
            refused = await together.refusal_of(conn, sums)
            if refused is not None:
                raise await self._refusal(principal, sums, refused)
            known = await self._note(batch, held, idempotency_key, body_hash)
            if known is not None:
                return known, Micros(0)
            refused = await self._held(conn, moves)
            if refused is not None:
                await fail(self._database, conn, batch, held)
                raise await self._refusal(principal, moves, refused)
        taken = await self._sent(batch, held, terms.first.target, send)
        return taken, Micros(sum(each.hold_micros for each in held))

    async def _note(
        self, batch: Batch, held: Sequence[HeldRequest], idempotency_key: str | None, body_hash: bytes
    ) -> Batch | None:
        """Note the batch before it is held; the one that was made with the same idempotency key before."""
        async with self._database.tenant(batch.organization_id) as conn:
            added = await records.add_batch(
                conn,
                requests=held,
                organization_id=batch.organization_id,
                batch_id=batch.batch_id,
                format=batch.format,
                endpoint=batch.endpoint,
                user_id=batch.user_id,
                api_key_id=batch.api_key_id,
                provider=batch.provider,
                provider_key_id=batch.provider_key_id,
                is_own_key=batch.is_own_key,
                input_file_id=batch.input_file_id,
                prices=batch.prices,
                idempotency_key=idempotency_key,
                body_hash=body_hash if idempotency_key else None,
                created_at=batch.created_at,
                ends_by=batch.ends_by,
                lease_seconds=LEASE_SECONDS,
                look_after_seconds=OPENING_SECONDS,
            )
            if added:
                return None
            known = await db.fetch_one(
                conn,
                Batch,
                records.QUERIES.batch_of_key,
                organization_id=batch.organization_id,
                idempotency_key=idempotency_key,
            )
        if known.body_hash != body_hash:
            raise KeyReused(headers={"x-should-retry": "false"})
        if known.provider_batch_id is None:
            raise TwinInFlight("Ask again when it has ended", headers={"Retry-After": "5"})
        return known

    async def _held(self, conn: db.Connection, moves: Sequence[Move]) -> Verdict | None:
        try:
            return await together.authorize_all(conn, moves)
        except psycopg.OperationalError as error:
            # Whether it was committed is not known; the note is there, and whoever looks after it frees what is held.
            raise Unavailable("The database does not answer", headers={"Retry-After": "2"}) from error

    async def _sent(self, batch: Batch, held: Sequence[HeldRequest], target: Target, send: Send) -> Batch:
        """Send it. What certainly did not reach the provider is freed at once; what may have is found out later."""
        try:
            body = await said(await send(target))
            told = vendors.document(body, target.provider.name)
        except (ProviderSaid, ProviderUnreachable, ProviderRefusesUs) as refusal:
            if isinstance(refusal, ProviderSaid) and refusal.status >= 500:
                await self._looked_after_soon(batch)
                raise
            async with together.lane(self._database) as conn:
                await fail(self._database, conn, batch, held)
            raise
        except UpstreamBroken:
            await self._looked_after_soon(batch)
            raise
        async with self._database.tenant(batch.organization_id) as conn:
            taken = await records.execute(
                conn, "taken_batch", batch, provider_batch_id=told["id"], told=told, seconds=SOON_SECONDS
            )
        if not taken:
            raise UpstreamBroken(f"{target.provider.name} answered too late.")
        return replace(batch, provider_batch_id=told["id"], told=told, state="running")

    async def _looked_after_soon(self, batch: Batch) -> None:
        async with self._database.tenant(batch.organization_id) as conn:
            await records.execute(conn, "keep_batch", batch, seconds=SOON_SECONDS)

    async def _refusal(self, principal: Principal, moves: Sequence[Move], verdict: Verdict) -> Exception:
        """The decision on the whole batch, and every limit as it is now."""
        model = next((move.model for move in moves if move.request_id == verdict.request_id), moves[0].model) or ""
        async with self._database.tenant(principal.organization_id) as conn:
            answer = await why.why(
                conn,
                organization_id=principal.organization_id,
                user_id=principal.user_id,
                api_key_id=principal.api_key_id,
                model=model,
                feature=moves[0].feature,
                wanted_micros=Micros(sum(move.amount_micros for move in moves)),
            )
        answer = why.decided(answer, code=verdict.detail or "pool_exhausted", binding_id=verdict.binding_id)
        return why.refusal(answer, organization=principal.organization_slug)

    async def cancel(self, batch: Batch) -> Batch:
        """Ask the provider to stop; what it answered until then is charged, the rest is freed when it has ended.

        Raises:
            ProviderSaid, UpstreamBroken
        """
        target = await self._places.target(batch)
        path = f"{vendors.BATCHES[batch.format]}/{batch.provider_batch_id}/cancel"
        told = vendors.document(await said(await self._upstream.call(target, path, b"", {})), target.provider.name)
        async with self._database.tenant(batch.organization_id) as conn:
            await records.execute(conn, "told_of_batch", batch, told=told, is_over=False, seconds=0)
        return replace(batch, told=told)

    async def delete(self, batch: Batch) -> None:
        """Delete a batch of Anthropic's that has ended, here and at the provider.

        Raises:
            BatchNotEnded, ProviderSaid, UpstreamBroken
        """
        if batch.ended_at is None:
            raise BatchNotEnded("Cancel it first, or wait until it has ended")
        target = await self._places.target(batch)
        await said(await self._upstream.delete(target, f"{vendors.BATCHES[batch.format]}/{batch.provider_batch_id}"))
        async with self._database.tenant(batch.organization_id) as conn:
            await records.execute(conn, "delete_batch", batch)

    async def results(self, batch: Batch) -> tuple[Target, Answer]:
        """Results of a batch of Anthropic's, as they come, and whence.

        Raises:
            BatchNotEnded: not everything in it is charged yet.
            UpstreamBroken
        """
        if batch.ended_at is None:
            raise BatchNotEnded("Its results are there when its processing_status is `ended`")
        target = await self._places.target(batch)
        path = f"{vendors.BATCHES[batch.format]}/{batch.provider_batch_id}/results"
        return target, await self._upstream.get(target, path)


class BatchNotEnded(UnreadableRequest):
    """The batch is still processed, or its results are being charged."""

    status, code, title = 400, "batch_not_ended", "The batch has not ended"


def _require_priced(asked: Sequence[Asked], attempts: Mapping[str, Attempt]) -> None:
    for each in asked:
        attempts[each.model].quote.require_priced(each.most, context=each.context, tools=each.unpriced_tools)


def _as_request(asked: Asked) -> WireRequest:
    """As the desk wants it: everything that is held for is in the estimate."""
    return WireRequest(
        model=asked.model,
        stream=False,
        max_output_tokens=None,
        choices=1,
        estimate=asked.most,
        wants_usage=True,
        service_tier="",
        fields={},
        has_output=False,
    )


def _new_batch(
    principal: Principal, terms: Terms, prices: Prices, *, format: Format, endpoint: str, file: File | None, count: int
) -> Batch:
    assert principal.api_key_id is not None
    first = terms.first
    return Batch(
        organization_id=principal.organization_id,
        batch_id=uuid7(),
        format=format,
        endpoint=endpoint,
        user_id=principal.user_id,
        api_key_id=principal.api_key_id,
        provider=first.target.provider.name,
        provider_key_id=first.provider_key_id,
        is_own_key=first.target.is_own_key,
        provider_batch_id=None,
        input_file_id=None if file is None else file.file_id,
        request_count=count,
        prices=prices.as_json(),
        state="opening",
        told=None,
        body_hash=None,
        created_at=prices.at,
        ends_by=prices.at + timedelta(seconds=WINDOW_SECONDS),
        lease_until=_in(LEASE_SECONDS, prices.at),
        failed_looks=0,
        ended_at=None,
        deleted_at=None,
    )


def _in(seconds: int, at: datetime) -> datetime:
    return at + timedelta(seconds=seconds)


def _priced(batch: Batch, prices: Prices, asked: Sequence[Asked], terms: Terms) -> tuple[list[HeldRequest], list[Move]]:
    """What each request is held for, and the move that holds it."""
    held: list[HeldRequest] = []
    moves: list[Move] = []
    for each in asked:
        model = terms.attempts[each.model].quote.model
        most = prices.most(model, each.most, each.context)
        input_alone = prices.most(model, each.estimate, each.context)
        nothing = Micros(0)
        amount = nothing if batch.is_own_key else most.charged_micros
        estimate, permitted = each.estimate.as_array(), each.permitted.as_array()
        request = HeldRequest(each.custom_id, uuid7(), model, estimate, permitted, each.context, amount)
        held.append(request)
        moves.append(
            batch.move(
                Action.AUTHORIZE,
                request,
                amount_micros=amount,
                tokens=each.most.total_tokens,
                cost_nano_usd=most.provider_cost_nano_usd,
                mark_micros=nothing if batch.is_own_key else input_alone.charged_micros,
                lease_seconds=LEASE_SECONDS,
                flags=Flag.UNLIMITED if each.is_guess else Flag.NONE,
            )
        )
    return held, moves


def _sums(moves: Sequence[Move]) -> list[Move]:
    """One move for each model that stands for all of its moves."""
    sums: dict[str | None, Move] = {}
    for move in moves:
        known = sums.get(move.model)
        if known is None:
            sums[move.model] = move._replace(request_id=uuid7(), flags=move.flags & ~Flag.SENT)
        else:
            sums[move.model] = known._replace(
                amount_micros=Micros(known.amount_micros + move.amount_micros),
                tokens=known.tokens + move.tokens,
                cost_nano_usd=NanoUsd(known.cost_nano_usd + move.cost_nano_usd),
                mark_micros=Micros(known.mark_micros + move.mark_micros),
                flags=known.flags | (move.flags & ~Flag.SENT),
            )
    return list(sums.values())


async def fail(database: db.Database, conn: db.Connection, batch: Batch, held: Sequence[HeldRequest]) -> None:
    """The provider never took it: free everything, then say so. conn: from `lane`. Safe to repeat."""
    await together.free(database, conn, [batch.move(Action.RELEASE, each) for each in held])
    async with database.tenant(batch.organization_id) as tenant:
        await records.execute(tenant, "all_requests_came_to", batch, state="freed")
        await records.execute(tenant, "end_batch", batch, state="failed")
