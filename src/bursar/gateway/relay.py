"""A held call on its way: to the providers that may answer it, in turn, and back to the client; then it is settled."""

import asyncio
import random
from dataclasses import dataclass
from typing import Final

import structlog
from prometheus_client import Counter

from bursar.credits.moves import Verdict
from bursar.gateway import sse
from bursar.gateway.calls import Call, Till
from bursar.gateway.exchange import ClientGone, Exchange, Headers
from bursar.gateway.upstream import Answer, Upstream, UpstreamBroken
from bursar.gateway.wire import WireRequest
from bursar.money import Micros, format_credits
from bursar.problems import Problem

FIRST_PAUSE_SECONDS: Final = 0.25
LONGEST_PAUSE_SECONDS: Final = 4.0
FAILED_STATUSES: Final = (408, 429)
"""Beside all from 500 on: what another attempt may mend. Every other status is the provider's answer."""

RETRIES = Counter("bursar_gateway_retries_total", "Attempts that failed and were followed by another", ["provider"])

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Reply:
    """What a provider answered. body: None for a stream, which is still to come through `answer`."""

    answer: Answer
    body: bytes | None

    @property
    def has_failed(self) -> bool:
        """Whether another attempt may do better."""
        return self.answer.status in FAILED_STATUSES or self.answer.status >= 500

    @property
    def pause_seconds(self) -> float | None:
        """How long the provider asks to be left alone; None: it does not say."""
        text = dict(self.answer.headers).get(b"retry-after", b"").decode("latin-1")
        return float(text) if text.isascii() and text.isdigit() and len(text) < 10 else None


class Relay:
    """Sees held calls to their end. One per process."""

    def __init__(self, till: Till, upstream: Upstream) -> None:
        self._till = till
        self._upstream = upstream

    async def answer(self, exchange: Exchange, call: Call) -> None:
        """Call the provider, and on its failure those after it; pass on what comes, and settle or release.

        Raises:
            UpstreamBroken: no provider answered; nothing is charged.
            ClientGone: nobody waits for the answer any more; what the provider did is charged.
        """
        if exchange.is_gone:
            raise ClientGone
        self._till.sent(call)
        reply = await self._first_answer(exchange, call)
        if reply.body is None:
            await self._stream(exchange, call, reply.answer)
        elif reply.answer.status >= 400:
            await self._pass_error(exchange, call, reply.answer, reply.body)
        else:
            await self._plain(exchange, call, reply.answer, reply.body)

    async def _first_answer(self, exchange: Exchange, call: Call) -> Reply:
        """The answer of the first provider that does not fail; when all do, the last one's failure.

        An attempt has failed as long as nothing of an answer was passed on, so that the client sees one answer, and is
        charged for that one alone.
        """
        while True:
            failed = call.attempt
            call.meter = exchange.wire.UsageMeter(call.request)
            try:
                reply = await self._ask(exchange, call)
            except UpstreamBroken as broken:
                log.warning("attempt failed", request_id=exchange.request_id, provider=failed.target.provider.name)
                if not await self._turn_to_next(exchange, call, None):
                    raise broken
            else:
                if not (reply.has_failed and await self._turn_to_next(exchange, call, reply.pause_seconds)):
                    return reply
            RETRIES.labels(failed.target.provider.name).inc()

    async def _turn_to_next(self, exchange: Exchange, call: Call, pause_seconds: float | None) -> bool:
        """Make the next attempt ready; the same provider gets a pause first. False: there is none."""
        if call.tried + 1 >= len(call.attempts):
            return False
        if call.attempts[call.tried + 1] is call.attempt:
            most = min(FIRST_PAUSE_SECONDS * 2**call.tried, LONGEST_PAUSE_SECONDS)
            pause = random.uniform(most / 2, most) if pause_seconds is None else pause_seconds
            if pause > LONGEST_PAUSE_SECONDS:
                pause = 0.0
                call.skip_same()
            await exchange.unless_gone(asyncio.sleep(pause))
        if exchange.is_gone:
            raise ClientGone
        return await self._till.turn_to_next(call)

    async def _ask(self, exchange: Exchange, call: Call) -> Reply:
        """One attempt: the head of the answer and, unless it is a stream, its body.

        A plain call is seen to its end, since it is paid for anyway; a stream whose client goes before it begins is
        cut, and charged its input.
        """
        wire, attempt = exchange.wire, call.attempt
        body = wire.upstream_body(
            call.request, model=attempt.model, asks_for_usage=attempt.target.provider.asks_for_usage
        )
        calling = self._upstream.call(
            attempt.target, wire.PATH, body, exchange.headers, content_type=call.request.content_type
        )
        if not call.request.stream:
            return await _whole(await calling)
        try:
            answer = await exchange.unless_gone(calling)
        except ClientGone:
            await self._settle_stream(call)
            raise
        if answer.status >= 400 or (call.request.is_events and _is_whole(answer, call.request)):
            return await _whole(answer)
        return Reply(answer, None)

    async def _pass_error(self, exchange: Exchange, call: Call, answer: Answer, body: bytes) -> None:
        """The provider refused or failed: it costs nothing, and its own words go on."""
        if self._till.is_running(call):
            await self._till.release(call)
        await self._till.tell_nearest(call)
        charged = _charge_headers(call, Micros(0), call.available_micros)
        await exchange.send_whole(answer.status, [*answer.headers, *charged], body)

    async def _plain(self, exchange: Exchange, call: Call, answer: Answer, body: bytes) -> None:
        """The whole answer: settle, then the client gets it; what it was charged is in the headers."""
        assert call.meter is not None
        call.meter.read_body(body)
        if call.meter.error and call.meter.usage() is None and not call.meter.output_so_far:
            # A failure under status 200, as OpenRouter tells it when the provider behind it fails late.
            await self._pass_error(exchange, call, answer, body)
            return
        measured = call.meter.measure()
        verdict = await self._till.settle(call, measured.usage, estimated=measured.estimated)
        await self._till.tell_nearest(call)
        charged = _charge_headers(call, verdict.charged_micros, verdict.available_micros)
        await exchange.send_whole(answer.status, [*answer.headers, *charged], body)

    async def _stream(self, exchange: Exchange, call: Call, answer: Answer) -> None:
        """Pass the pieces on until the provider ends or breaks, the client goes, or a limit stops it; then settle."""
        failure: Problem | None = None
        exchange.is_events = call.request.is_events
        try:
            await exchange.unless_gone(self._pump(exchange, call, answer))
        except Problem as problem:
            failure = problem
        finally:
            await answer.close()
            verdict = await self._settle_stream(call)
        if failure is None:
            await exchange.end_stream(_charge_comment(verdict))
        else:
            await exchange.break_stream(failure, _charge_comment(verdict))

    async def _pump(self, exchange: Exchange, call: Call, answer: Answer) -> None:
        assert call.meter is not None
        await self._till.tell_nearest(call)
        await exchange.start(answer.status, [*answer.headers, *_hold_headers(call)])
        try:
            async for piece in answer.pieces():
                await exchange.send_piece(call.meter.feed(piece))
                if call.stopped_by is not None:
                    raise await self._till.stop_reason(call)
        except UpstreamBroken:
            await exchange.send_piece(call.meter.finish())
            raise
        await exchange.send_piece(call.meter.finish())

    async def _settle_stream(self, call: Call) -> Verdict:
        """A stream that began is charged: by the provider's own count where it came, else by ours."""
        assert call.meter is not None
        measured = call.meter.measure()
        return await self._till.settle(call, measured.usage, estimated=measured.estimated)


def _is_whole(answer: Answer, request: WireRequest) -> bool:
    """Whether an answer is one document, though events were asked for."""
    return answer.is_json or (request.may_ignore_stream and not answer.is_events)


async def _whole(answer: Answer) -> Reply:
    """An answer with its body. The client gets nothing of one that breaks off, and pays nothing."""
    try:
        return Reply(answer, await answer.read())
    finally:
        await answer.close()


def _charge_headers(call: Call, charged: Micros, available: Micros | None) -> Headers:
    return [(b"bursar-charged", format_credits(charged).encode()), *_common_headers(call, available)]


def _hold_headers(call: Call) -> Headers:
    return [(b"bursar-held", format_credits(call.held_micros).encode()), *_common_headers(call, call.available_micros)]


def _common_headers(call: Call, available: Micros | None) -> Headers:
    headers = [] if available is None else [(b"bursar-available", format_credits(available).encode())]
    headers += call.limit_headers
    if call.tried:
        headers.append((b"bursar-attempt", str(call.tried + 1).encode()))
        headers.append((b"bursar-provider", call.target.provider.name.encode()))
    return headers


def _charge_comment(verdict: Verdict) -> bytes:
    available = "" if verdict.available_micros is None else f" available={format_credits(verdict.available_micros)}"
    return sse.comment_bytes(
        f"bursar-charged={format_credits(verdict.charged_micros)}{available} request=req_{verdict.request_id.hex}"
    )
