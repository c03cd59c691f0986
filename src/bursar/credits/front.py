"""The hot routes of the treasury as an ASGI application: authorize, extend, settle, release and deduct by programs.

They are routes of the API like any other, in the document too; only they are answered past FastAPI, which would cost
more than the rest of such a request.
"""

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

import msgspec
import structlog
from fastapi import APIRouter, Request, Response

from bursar.asgi import DEEPEST_JSON, LARGEST_BODY, Receive, Scope, Send, nesting, read_body, send_problem
from bursar.credits import charges
from bursar.credits.batcher import Unavailable
from bursar.credits.charges import Answer, Caller, Charges, HoldEnded, HoldNotFound, NotForOthers
from bursar.credits.grants import KeyReused
from bursar.credits.why import AllocationExhausted, CapReached, InsufficientCredits, NoPoolForRequest
from bursar.identity.guards import NotPermitted, key_text_of
from bursar.identity.memberships import MemberNotFound
from bursar.identity.principals import KeyCache, Principal
from bursar.identity.roles import PERMISSIONS, Permission, Role
from bursar.identity.sessions import NotSignedIn
from bursar.pricing.book import ModelNotPriced
from bursar.problems import (
    BodyTooLarge,
    FieldError,
    InternalError,
    InvalidRequest,
    MalformedBody,
    Problem,
    documents,
    of_exception,
)

PREFIX: Final = "/api/v1/credits/"
_READ: Final = frozenset({b"authorization", b"x-api-key", b"idempotency-key", b"bursar-organization"})
_JSON: Final = (b"content-type", b"application/json")
_PLACE: Final = re.compile(r"(?P<what>.*) - at (?:`key` in )?`\$(?P<place>[^`]*)`", re.DOTALL)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Operation:
    """One route. work: what does it, with the body as read."""

    name: str
    body: type[msgspec.Struct]
    decoder: msgspec.json.Decoder[Any]
    work: Callable[[Charges, Caller, Any], Awaitable[Answer]]
    problems: tuple[type[Problem], ...]

    @property
    def path(self) -> str:
        return PREFIX + self.name


_REFUSALS: Final = (InsufficientCredits, AllocationExhausted, CapReached, NoPoolForRequest)
_BEGINNING: Final = (*_REFUSALS, ModelNotPriced, NotForOthers, MemberNotFound)


def _operation(
    body: type[msgspec.Struct], work: Callable[[Charges, Caller, Any], Awaitable[Answer]], *problems: type[Problem]
) -> Operation:
    return Operation(body.__name__.lower(), body, msgspec.json.Decoder(body), work, problems)


OPERATIONS: Final = {
    each.path: each
    for each in (
        _operation(charges.Authorize, Charges.authorize, *_BEGINNING),
        _operation(charges.Extend, Charges.extend, *_REFUSALS, ModelNotPriced, HoldNotFound, HoldEnded),
        _operation(charges.Settle, Charges.settle, NoPoolForRequest, ModelNotPriced, HoldNotFound),
        _operation(charges.Release, Charges.release, HoldNotFound, HoldEnded),
        _operation(charges.Deduct, Charges.deduct, *_BEGINNING),
    )
}


class Front:
    """ASGI application of POST to the paths of OPERATIONS."""

    def __init__(self, keys: KeyCache, work: Charges) -> None:
        self._keys = keys
        self._charges = work
        self._encode = msgspec.json.Encoder().encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        operation = OPERATIONS[scope["path"]]
        scope["route"] = operation  # metrics and log lines go by it
        try:
            body = await read_body(scope, receive, LARGEST_BODY)
            if body is None:  # the client has gone
                return
            headers = {
                name.decode(): value.decode("latin-1") for name, value in reversed(scope["headers"]) if name in _READ
            }
            answer = await self.answer(operation, headers, body, scope["state"]["request_uuid"])
        except Exception as error:
            problem = of_exception(error)
            if problem is None:
                log.exception("a request ended in a fault")
            close = isinstance(problem, BodyTooLarge)  # the rest of it is not read
            await send_problem(send, problem or InternalError(), scope["state"]["request_id"], close=close)
            return
        start = [_JSON, (b"content-length", b"%d" % len(answer))]
        await send({"type": "http.response.start", "status": 200, "headers": start})
        await send({"type": "http.response.body", "body": answer, "more_body": False})

    async def answer(self, operation: Operation, headers: Mapping[str, str], body: bytes, request_id: UUID) -> bytes:
        """The JSON that answers a request. headers: found by names in lower case.

        Raises:
            NotSignedIn, InvalidApiKey, OrganizationNotFound, NotPermitted, MalformedBody, InvalidRequest, and what the
            operation names.
        """
        principal = await self._principal(headers)
        key = headers.get("idempotency-key")
        if key is not None and not (1 <= len(key) <= 255 and key.isprintable()):
            wrong = FieldError("Idempotency-Key", "1 to 255 printable characters are required")
            raise InvalidRequest(errors=[wrong])
        asked = _read(operation, body)
        caller = Caller.of(principal, request_id, key, operation.path, body)
        return self._encode(await operation.work(self._charges, caller, asked))

    async def _principal(self, headers: Mapping[str, str]) -> Principal:
        text = key_text_of(headers)
        if not text:
            raise NotSignedIn("An API key is required: Authorization: Bearer bk_…")
        chosen = headers.get("bursar-organization")
        principal = self._keys.known(text, chosen=chosen) or await self._keys.principal(text, chosen=chosen)
        if not principal.may(Permission.CHARGES_WRITE):
            able = ", ".join(role for role in Role if Permission.CHARGES_WRITE in PERMISSIONS[role])
            raise NotPermitted(
                f"This needs {Permission.CHARGES_WRITE} and the scope write. Service keys have it, and roles: {able}",
                headers={"x-should-retry": "false"},
            )
        return principal


def _read(operation: Operation, body: bytes) -> Any:
    """The body as the operation takes it.

    Raises:
        MalformedBody: no JSON, or nested too deep. InvalidRequest: a field is wrong, missing or unknown.
    """
    try:
        if nesting(body) > DEEPEST_JSON:
            raise MalformedBody(f"The JSON is nested deeper than {DEEPEST_JSON}")
        return operation.decoder.decode(body)
    except msgspec.ValidationError as error:
        found = _PLACE.fullmatch(str(error))
        what, place = (found["what"], found["place"]) if found else (str(error), "")
        wrong = FieldError("#" + place.replace("[...]", "").replace(".", "/"), what[:200])
        raise InvalidRequest(errors=[wrong]) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise MalformedBody("The body is not valid JSON") from None


def document(router: APIRouter) -> None:
    """Add the routes to the API's, so that they are in its document, and answered wherever they are reached."""
    for operation in OPERATIONS.values():
        router.add_api_route(
            operation.path.removeprefix(router.prefix),
            _endpoint(operation),
            methods=["POST"],
            name=operation.name,
            description=_ABOUT[operation.name],
            response_class=Response,
            responses={
                **documents(NotPermitted, KeyReused, Unavailable, MalformedBody, *operation.problems),
                200: {"description": "Done", "content": {"application/json": {"schema": schema_of(Answer)}}},
            },
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema_of(operation.body)}},
                },
                "parameters": [
                    _header("Idempotency-Key", "1 to 255 characters; a command is done once, however often it comes."),
                    _header("Bursar-Organization", "Slug or id of the organization that pays, for personal keys."),
                ],
            },
        )


_ABOUT: Final = {
    "authorize": "Hold an amount before a program calls a model itself. Refused with 402 and `why` where no room is.",
    "extend": "Renew the lease of a hold, hold so much in all, and note what was used so far.",
    "settle": "Charge what was really used and free the rest of the hold.",
    "release": "Free a hold and charge nothing.",
    "deduct": "Charge at once what is known beforehand, or refuse it.",
}


def _endpoint(operation: Operation) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        front = request.app.state.credits
        if front is None:
            raise Unavailable("This process moves no credits", headers={"Retry-After": "2"})
        body = await request.body()
        answer = await front.answer(operation, request.headers, body, request.state.request_uuid)
        return Response(answer, media_type="application/json")

    endpoint.__name__ = f"post_{operation.name}"
    return endpoint


def _header(name: str, about: str) -> dict[str, Any]:
    return {"name": name, "in": "header", "required": False, "description": about, "schema": {"type": "string"}}


def schema_of(body: type[msgspec.Struct]) -> dict[str, Any]:
    """JSON schema of a body, with everything in its place, since the document has components of its own."""
    schema = msgspec.json.schema(body)
    return _inlined(schema, schema.get("$defs", {}))  # type: ignore[no-any-return]


def _inlined(part: Any, known: Mapping[str, Any]) -> Any:
    if isinstance(part, list):
        return [_inlined(each, known) for each in part]
    if not isinstance(part, dict):
        return part
    if "$ref" in part:
        return _inlined(known[part["$ref"].rpartition("/")[2]], known)
    return {name: _inlined(each, known) for name, each in part.items() if name != "$defs"}
