"""The request path as an ASGI application under /v1: read, hold, call the provider, pass its bytes on, settle."""

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
import structlog
from prometheus_client import Counter, Histogram

from bursar.asgi import Message, Receive, Scope, Send, read_body
from bursar.credits.moves import Verdict
from bursar.gateway import anthropic_wire, openai_wire, sse
from bursar.gateway.calls import Call, Till, body_hash
from bursar.gateway.desk import Desk
from bursar.gateway.routes import Format, ModelNotFound
from bursar.gateway.upstream import Answer, Upstream, UpstreamBroken
from bursar.gateway.wire import Wire
from bursar.identity.principals import KeyCache, Principal
from bursar.identity.roles import Permission
from bursar.money import Micros, format_credits
from bursar.problems import FieldError, InternalError, Problem, WrongMethod, of_exception

Headers = list[tuple[bytes, bytes]]
Result = TypeVar("Result")

MOST_BODY_BYTES: Final = 20 * 1024 * 1024
LARGE_BODY_BYTES: Final = 512 * 1024
MOST_SEND_SECONDS: Final = 120.0
"""A client that has not taken a piece by then has gone: its hold and the provider's connection do not wait for it."""

WIRES: Final[dict[str, Wire]] = {"/v1/chat/completions": openai_wire, "/v1/messages": anthropic_wire}
FORMATS: Final[dict[str, Format]] = {"/v1/chat/completions": "openai", "/v1/messages": "anthropic"}
CALLS = Counter("bursar_gateway_calls_total", "Calls of the gateway by status", ["path", "status"])
SECONDS = Histogram("bursar_gateway_hold_seconds", "Time from the whole request to the hold's commit")

log = structlog.get_logger(__name__)


class NotMetered(Problem):
    """The path is none that is metered; nothing is ever passed through unmetered."""

    status, code, title = 404, "not_metered", "This path is not served here"


class NoKey(Problem):
    """No API key came with the request."""

    status, code, title = 401, "missing_api_key", "An API key is required"


class KeyMayNotInfer(Problem):
    """The key's scopes or its owner's roles do not include model requests."""

    status, code, title = 403, "models_not_permitted", "This key may not make model requests"


class BadHeader(Problem):
    """A header of ours is not what it should be."""

    status, code, title = 400, "invalid_header", "A request header cannot be read"


class ClientGone(Exception):
    """The client hung up."""


class Front:
    """ASGI application of the paths under /v1."""

    def __init__(self, keys: KeyCache, desk: Desk, till: Till, upstream: Upstream) -> None:
        self._keys = keys
        self._desk = desk
        self._till = till
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope["path"]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        wire = WIRES.get(path) or _wire_of_client(headers)
        exchange = Exchange(scope, headers, wire, receive, send)
        try:
            await self._serve(exchange, scope["method"])
        except ClientGone:
            log.info("client gone", path=path)
        except Exception as error:
            problem = of_exception(error)
            if problem is None:
                log.exception("gateway fault", path=path)
            await exchange.refuse(problem or InternalError())
        finally:
            exchange.close()
        CALLS.labels(path if path in WIRES else "other", str(exchange.status)).inc()

    async def _serve(self, exchange: "Exchange", method: str) -> None:
        if exchange.path == "/v1/models" or exchange.path.startswith("/v1/models/"):
            await self._models(exchange, method)
            return
        if exchange.path not in WIRES:
            raise NotMetered(f"{exchange.path[:200]} is not metered; {', '.join(WIRES)} and /v1/models are")
        if method != "POST":
            raise WrongMethod(f"{exchange.path} takes POST", headers={"Allow": "POST"})
        principal = await self._principal(exchange)
        body = await exchange.body()
        read = exchange.wire.read_request
        # A body with files takes long to read; the other calls go on meanwhile.
        request = await asyncio.to_thread(read, body) if len(body) > LARGE_BODY_BYTES else read(body)
        call = await self._desk.open(principal, request, FORMATS[exchange.path], body_hash(exchange.path, body))
        call.conversation_id = _conversation(exchange.headers)
        call.idempotency_key = _idempotency_key(exchange.headers)
        call.request_id = UUID(exchange.request_id.removeprefix("req_"))
        with SECONDS.time():
            await exchange.unless_gone(self._till.hold(call))
        try:
            await self._answer(exchange, call)
        finally:
            # Whatever happened ends the hold. What neither was charged nor is here came to nothing.
            if self._till.is_running(call):
                await self._till.release(call)

    async def _answer(self, exchange: "Exchange", call: Call) -> None:
        """The hold is placed: call the provider and see to what comes."""
        if exchange.is_gone:
            raise ClientGone
        call.meter = exchange.wire.UsageMeter(call.request)
        self._till.sent(call)
        answer = await self._called(exchange, call)
        if answer.status >= 400:
            await self._pass_error(exchange, call, answer)
        elif call.request.stream and not answer.is_json:
            await self._stream(exchange, call, answer)
        else:
            await self._plain(exchange, call, answer)

    async def _called(self, exchange: "Exchange", call: Call) -> Answer:
        """The provider's status and headers. A plain call is seen to its end, since it is paid for anyway; a stream
        whose client goes before it begins is cut, and charged its input.
        """
        body = exchange.wire.upstream_body(
            call.request, model=call.upstream_model, asks_for_usage=call.target.provider.asks_for_usage
        )
        calling = self._upstream.call(call.target, exchange.wire.PATH, body, exchange.headers)
        if not call.request.stream:
            return await calling
        try:
            return await exchange.unless_gone(calling)
        except ClientGone:
            await self._settle_stream(call)
            raise

    async def _pass_error(self, exchange: "Exchange", call: Call, answer: Answer) -> None:
        """The provider refused or failed: it costs nothing, and its own words go on."""
        try:
            body = await answer.read()
        finally:
            await answer.close()
        await self._till.release(call)
        await exchange.send_whole(
            answer.status, [*answer.headers, *_charge_headers(Micros(0), call.available_micros)], body
        )

    async def _plain(self, exchange: "Exchange", call: Call, answer: Answer) -> None:
        """The whole answer, then settle, then the client gets it: what it was charged is in the headers."""
        assert call.meter is not None
        try:
            body = await answer.read()  # the client gets nothing of one that breaks off, and pays nothing
        finally:
            await answer.close()
        call.meter.read_body(body)
        measured = call.meter.measure()
        verdict = await self._till.settle(call, measured.usage, estimated=measured.estimated)
        charged = verdict.charged_micros
        await exchange.send_whole(
            answer.status, [*answer.headers, *_charge_headers(charged, verdict.available_micros)], body
        )

    async def _stream(self, exchange: "Exchange", call: Call, answer: Answer) -> None:
        """Pass the pieces on until the provider ends or breaks, the client goes, or a limit stops it; then settle."""
        failure: Problem | None = None
        try:
            await exchange.unless_gone(self._pump(exchange, call, answer))
        except Problem as problem:
            failure = problem
        finally:
            await answer.close()
            verdict = await self._settle_stream(call)
        if failure is not None:
            await exchange.send_piece(exchange.wire.stream_refusal(failure, request_id=exchange.request_id))
        await exchange.end_stream(_charge_comment(verdict))

    async def _pump(self, exchange: "Exchange", call: Call, answer: Answer) -> None:
        assert call.meter is not None
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

    async def _principal(self, exchange: "Exchange") -> Principal:
        secret = _secret(exchange.headers)
        principal = await self._keys.principal(secret, chosen=exchange.headers.get(b"bursar-organization"))
        if not principal.may(Permission.MODELS_USE):
            raise KeyMayNotInfer(headers={"x-should-retry": "false"})
        return principal

    async def _models(self, exchange: "Exchange", method: str) -> None:
        if method != "GET":
            raise WrongMethod("/v1/models takes GET", headers={"Allow": "GET"})
        principal = await self._principal(exchange)
        models = await self._desk.models(principal)
        wanted = exchange.path.removeprefix("/v1/models").strip("/")
        listed = [model for model in models if not wanted or model["id"] == wanted]
        if wanted and not listed:
            raise ModelNotFound(f"No model {wanted[:200]!r} can be called here")
        document = listed[0] if wanted else {"object": "list", "data": listed, "has_more": False}
        await exchange.send_whole(200, [(b"content-type", b"application/json")], msgspec.json.encode(document))


class Exchange:
    """One HTTP request and its answer, in the vendor's manners."""

    def __init__(self, scope: Scope, headers: dict[bytes, str], wire: Wire, receive: Receive, send: Send) -> None:
        self.path: str = scope["path"]
        self.headers = headers
        self.wire = wire
        self.request_id: str = scope["state"]["request_id"]
        self.status = 0
        self._scope = scope
        self._receive = receive
        self._send_message = send
        self._gone: asyncio.Task[None] | None = None

    async def body(self) -> bytes:
        """The whole body.

        Raises:
            BodyTooLarge, ClientGone
        """
        body = await read_body(self._scope, self._receive, MOST_BODY_BYTES)
        if body is None:
            raise ClientGone
        return body

    async def unless_gone(self, work: Coroutine[Any, Any, Result]) -> Result:
        """What work gives; it is cancelled when the client hangs up first. Only after the body was read.

        Raises:
            ClientGone
        """
        if self._gone is None:
            self._gone = asyncio.create_task(self._wait_until_gone())
        task = asyncio.create_task(work)
        try:
            await asyncio.wait({task, self._gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task})
        if task.cancelled():
            raise ClientGone
        return task.result()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    @property
    def is_gone(self) -> bool:
        """Whether the client is known to have hung up."""
        return self._gone is not None and self._gone.done()

    def close(self) -> None:
        """Nothing is waited for any more."""
        if self._gone is not None:
            self._gone.cancel()

    async def start(self, status: int, headers: Headers) -> None:
        """Status and headers of an answer."""
        self.status = status
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    async def send_piece(self, piece: bytes) -> None:
        """A piece of the body; an empty one is left out, as it would end the answer."""
        if piece:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end_stream(self, comment: bytes) -> None:
        """The last piece."""
        await self._send({"type": "http.response.body", "body": comment, "more_body": False})

    async def _send(self, message: Message) -> None:
        """Hand a message to the server, which waits while the client does not read.

        Raises:
            ClientGone: it has not read for MOST_SEND_SECONDS.
        """
        try:
            async with asyncio.timeout(MOST_SEND_SECONDS):
                await self._send_message(message)
        except TimeoutError:
            raise ClientGone from None

    async def send_whole(self, status: int, headers: Headers, body: bytes) -> None:
        """An answer in one piece."""
        await self.start(status, [*headers, (b"content-length", str(len(body)).encode())])
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def refuse(self, problem: Problem) -> None:
        """Our own refusal in the vendor's error shape; after the answer has begun, as the last event of the stream."""
        if self.status:
            await self.end_stream(self.wire.stream_refusal(problem, request_id=self.request_id))
            return
        headers = [(b"content-type", b"application/json")]
        named = {"x-should-retry": "false"} if problem.status in (401, 402, 403, 404, 422) else {}
        headers += [(name.lower().encode(), value.encode()) for name, value in {**named, **problem.headers}.items()]
        await self.send_whole(problem.status, headers, self.wire.refusal(problem, request_id=self.request_id))


def _wire_of_client(headers: dict[bytes, str]) -> Wire:
    """Whose error shape a client expects on a path that is neither's."""
    return anthropic_wire if b"anthropic-version" in headers else openai_wire


def _secret(headers: dict[bytes, str]) -> str:
    """The API key, as either vendor's client sends it."""
    scheme, _, bearer = headers.get(b"authorization", "").partition(" ")
    if scheme.lower() == "bearer" and bearer.strip():
        return bearer.strip()
    key = headers.get(b"x-api-key")
    if not key:
        raise NoKey("Send it as `Authorization: Bearer …` or `x-api-key: …`", headers={"x-should-retry": "false"})
    return key


def _conversation(headers: dict[bytes, str]) -> UUID | None:
    text = headers.get(b"bursar-conversation")
    if text is None:
        return None
    try:
        return UUID(text.removeprefix("conv_"))
    except ValueError:
        pointer = FieldError("Bursar-Conversation", "a UUID is required")
        raise BadHeader("Bursar-Conversation is not a UUID", errors=[pointer]) from None


def _idempotency_key(headers: dict[bytes, str]) -> str | None:
    key = headers.get(b"idempotency-key")
    if key is not None and not 1 <= len(key) <= 255:
        raise BadHeader(
            "Idempotency-Key has 1 to 255 characters", errors=[FieldError("Idempotency-Key", "too long or empty")]
        )
    return key


def _charge_headers(charged: Micros, available: Micros | None) -> Headers:
    headers = [(b"bursar-charged", format_credits(charged).encode())]
    if available is not None:
        headers.append((b"bursar-available", format_credits(available).encode()))
    return headers


def _hold_headers(call: Call) -> Headers:
    headers = [(b"bursar-held", format_credits(call.held_micros).encode())]
    if call.available_micros is not None:
        headers.append((b"bursar-available", format_credits(call.available_micros).encode()))
    return headers


def _charge_comment(verdict: Verdict) -> bytes:
    available = "" if verdict.available_micros is None else f" available={format_credits(verdict.available_micros)}"
    return sse.comment_bytes(
        f"bursar-charged={format_credits(verdict.charged_micros)}{available} request=req_{verdict.request_id.hex}"
    )
