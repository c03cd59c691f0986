"""The request path as an ASGI application under /v1: read, hold, call the provider, pass its bytes on, settle."""

import asyncio
from functools import cache
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog
from prometheus_client import Counter, Histogram

from bursar.asgi import Receive, Scope, Send
from bursar.gateway import anthropic_wire, batch_front, openai_wire
from bursar.gateway.batch_front import BatchFront
from bursar.gateway.calls import Till, body_hash
from bursar.gateway.desk import Desk
from bursar.gateway.endpoints import ENDPOINTS, Endpoint
from bursar.gateway.exchange import ClientGone, Exchange, NotMetered
from bursar.gateway.relay import Relay
from bursar.gateway.routes import ModelNotFound
from bursar.gateway.wire import Wire
from bursar.identity.principals import KeyCache, Principal
from bursar.identity.roles import Permission
from bursar.problems import FieldError, InternalError, Problem, WrongMethod, of_exception

LARGE_BODY_BYTES: Final = 512 * 1024
CALLS = Counter("bursar_gateway_calls_total", "Calls of the gateway by status", ["path", "status"])
SECONDS = Histogram("bursar_gateway_hold_seconds", "Time from the whole request to the hold's commit")

log = structlog.get_logger(__name__)


class NoKey(Problem):
    """No API key came with the request."""

    status, code, title = 401, "missing_api_key", "An API key is required"


class KeyMayNotInfer(Problem):
    """The key's scopes or its owner's roles do not include model requests."""

    status, code, title = 403, "models_not_permitted", "This key may not make model requests"


class BadHeader(Problem):
    """A header of ours is not what it should be."""

    status, code, title = 400, "invalid_header", "A request header cannot be read"


class Front:
    """ASGI application of the paths under /v1."""

    def __init__(self, keys: KeyCache, desk: Desk, till: Till, relay: Relay, batches: BatchFront) -> None:
        self._keys = keys
        self._desk = desk
        self._till = till
        self._relay = relay
        self._batches = batches

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        path = scope["path"]
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        endpoint = ENDPOINTS.get(path)
        wire = endpoint.wire if endpoint is not None else batch_front.wire_of(path) or _wire_of_client(headers)
        exchange = Exchange(scope, headers, wire, receive, send)
        try:
            await self._serve(exchange, endpoint, scope["method"])
        except ClientGone:
            log.info("client gone", path=path)
        except Exception as error:
            problem = of_exception(error)
            if problem is None:
                log.exception("gateway fault", path=path)
            await exchange.refuse(problem or InternalError())
        finally:
            exchange.close()
        label = path if endpoint is not None else batch_front.area_of(path) or "other"
        _counted(label, exchange.status).inc()

    async def _serve(self, exchange: Exchange, endpoint: Endpoint | None, method: str) -> None:
        if exchange.path == "/v1/models" or exchange.path.startswith("/v1/models/"):
            await self._models(exchange, method)
            return
        if batch_front.area_of(exchange.path) is not None:
            principal = await self._principal(exchange)
            await self._batches.serve(exchange, method, principal, _idempotency_key(exchange.headers))
            return
        if endpoint is None:
            raise NotMetered(f"{exchange.path[:200]} is not metered; {', '.join(ENDPOINTS)} and /v1/models are")
        if method != "POST":
            raise WrongMethod(f"{exchange.path} takes POST", headers={"Allow": "POST"})
        await self._call(exchange, endpoint)

    async def _call(self, exchange: Exchange, endpoint: Endpoint) -> None:
        """One metered call: read, hold, and have it answered."""
        principal = await self._principal(exchange)
        body = await exchange.body(endpoint.most_body_bytes)
        read, kind = endpoint.wire.read_request, exchange.content_type
        # A body with files takes long to read; the other calls go on meanwhile.
        request = await asyncio.to_thread(read, body, kind) if len(body) > LARGE_BODY_BYTES else read(body, kind)
        call = await self._desk.open(
            principal,
            request,
            endpoint.format,
            body_hash(exchange.path, request.identity(body)),
            request_id=exchange.request_uuid,
        )
        call.conversation_id = _conversation(exchange.headers)
        call.feature = endpoint.feature
        call.idempotency_key = _idempotency_key(exchange.headers)
        with SECONDS.time():
            await exchange.unless_gone(self._till.hold(call))
        try:
            await self._relay.answer(exchange, call)
        finally:
            # Whatever happened ends the hold. What neither was charged nor is here came to nothing.
            if self._till.is_running(call):
                await self._till.release(call)

    async def _principal(self, exchange: Exchange) -> Principal:
        secret = _secret(exchange.headers)
        principal = await self._keys.principal(secret, chosen=exchange.headers.get(b"bursar-organization"))
        if not principal.may(Permission.MODELS_USE):
            raise KeyMayNotInfer(headers={"x-should-retry": "false"})
        return principal

    async def _models(self, exchange: Exchange, method: str) -> None:
        if method != "GET":
            raise WrongMethod("/v1/models takes GET", headers={"Allow": "GET"})
        principal = await self._principal(exchange)
        models = await self._desk.models(principal)
        wanted = exchange.path.removeprefix("/v1/models").strip("/")
        listed = [model for model in models if not wanted or model["id"] == wanted]
        if wanted and not listed:
            raise ModelNotFound(f"No model {wanted[:200]!r} can be called here")
        if b"anthropic-version" in exchange.headers:
            document = _as_anthropics(listed, whole_list=not wanted)
        else:
            document = listed[0] if wanted else {"object": "list", "data": listed, "has_more": False}
        await exchange.send_whole(200, [(b"content-type", b"application/json")], msgspec.json.encode(document))


@cache
def _counted(label: str, status: int) -> Counter:
    """Finding it by its labels takes longer than counting."""
    return CALLS.labels(label, str(status))


def _as_anthropics(models: list[dict[str, Any]], *, whole_list: bool) -> dict[str, Any]:
    """Models as Anthropic lists them. No list price says when a model was made: that is the epoch, as Anthropic's own
    reference has it for what is not known.
    """
    data = [
        {"type": "model", "id": each["id"], "display_name": each["id"], "created_at": "1970-01-01T00:00:00Z"}
        for each in models
    ]
    if not whole_list:
        return data[0]
    first, last = (data[0]["id"], data[-1]["id"]) if data else (None, None)
    return {"data": data, "has_more": False, "first_id": first, "last_id": last}


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
