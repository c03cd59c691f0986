"""The vendors' batch and file paths: Anthropic's /v1/messages/batches, OpenAI's /v1/batches and /v1/files."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

import msgspec
from psycopg.types.json import Jsonb

from bursar import db
from bursar.clock import uuid7
from bursar.gateway import anthropic_wire, multipart, openai_wire, wire
from bursar.gateway import batch_records as records
from bursar.gateway import batch_vendors as vendors
from bursar.gateway.batch_reading import BATCHED, ReadBatch, lines_of, read_file, read_message_batch, read_result
from bursar.gateway.batch_records import Batch, BatchOfAnother, File
from bursar.gateway.batches import Batches, Places, ProviderSaid, Terms, said
from bursar.gateway.calls import body_hash
from bursar.gateway.endpoints import MOST_BODY_BYTES
from bursar.gateway.exchange import Exchange, NotMetered
from bursar.gateway.outputs import PRIOR_OUTPUT_TOKENS
from bursar.gateway.routes import Format
from bursar.gateway.upstream import Answer, Target, Upstream, without_account
from bursar.gateway.wire import UnreadableRequest, Wire
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.money import Micros, format_credits
from bursar.problems import WrongMethod

MOST_BATCH_BYTES: Final = 100 * 1024 * 1024
MOST_LISTED: Final = {"openai": 100, "anthropic": 1000}
LISTED: Final = 20
_AREAS: Final = ("/v1/messages/batches", "/v1/batches", "/v1/files")
_PATH: Final = re.compile(
    r"(/v1/messages/batches|/v1/batches|/v1/files)(?:/([^/]{1,200})(?:/(cancel|results|content))?)?"
)
_FIELDS: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])
_JSON: Final = (b"content-type", b"application/json")


def area_of(path: str) -> str | None:
    """Which of our three areas a path lies in; None: in none."""
    return next((area for area in _AREAS if path == area or path.startswith(f"{area}/")), None)


def wire_of(path: str) -> Wire | None:
    """In whose error shape a path of ours answers."""
    area = area_of(path)
    return None if area is None else anthropic_wire if area == _AREAS[0] else openai_wire


@dataclass(frozen=True, slots=True)
class _Asked:
    """One call: who asks, what stands in the path, what repeats it."""

    exchange: Exchange
    principal: Principal
    shown_id: str
    idempotency_key: str | None


class BatchFront:
    """Serves the batch paths. One per process."""

    def __init__(self, database: db.Database, batches: Batches, upstream: Upstream, places: Places) -> None:
        self._database = database
        self._batches = batches
        self._upstream = upstream
        self._places = places
        self._operations: dict[tuple[str, bool, str], dict[str, Callable[[_Asked], Awaitable[None]]]] = {
            ("/v1/messages/batches", False, ""): {"POST": self._make_messages, "GET": self._list_messages},
            ("/v1/messages/batches", True, ""): {"GET": self._show_messages, "DELETE": self._delete_messages},
            ("/v1/messages/batches", True, "cancel"): {"POST": self._cancel_messages},
            ("/v1/messages/batches", True, "results"): {"GET": self._results},
            ("/v1/batches", False, ""): {"POST": self._make, "GET": self._list},
            ("/v1/batches", True, ""): {"GET": self._show},
            ("/v1/batches", True, "cancel"): {"POST": self._cancel},
            ("/v1/files", False, ""): {"POST": self._upload},
            ("/v1/files", True, ""): {"GET": self._show_file, "DELETE": self._delete_file},
            ("/v1/files", True, "content"): {"GET": self._content},
        }

    async def serve(self, exchange: Exchange, method: str, principal: Principal, idempotency_key: str | None) -> None:
        """One call of a path of ours."""
        match = _PATH.fullmatch(exchange.path)
        place = None if match is None else (match[1], match[2] is not None, match[3] or "")
        operations = self._operations.get(place) if place is not None else None
        if match is None or operations is None:
            raise NotMetered(f"{exchange.path[:200]} is not served here")
        operation = operations.get(method)
        if operation is None:
            allowed = ", ".join(operations)
            raise WrongMethod(f"{exchange.path[:200]} takes {allowed}", headers={"Allow": allowed})
        try:
            await operation(_Asked(exchange, principal, match[2] or "", idempotency_key))
        except ProviderSaid as refusal:
            await exchange.send_whole(refusal.status, refusal.headers, refusal.body)

    # -------------------------------------------------------------------------------- Anthropic's

    async def _make_messages(self, asked: _Asked) -> None:
        body = await asked.exchange.body(MOST_BATCH_BYTES)
        read = await asyncio.to_thread(read_message_batch, body, PRIOR_OUTPUT_TOKENS)
        terms = await self._batches.terms(asked.principal, read.asked, "anthropic")
        sent = await asyncio.to_thread(read.written, terms.models)

        async def send(target: Target) -> Answer:
            return await self._upstream.call(target, vendors.BATCHES["anthropic"], sent, asked.exchange.headers)

        batch, held = await self._batches.make(
            asked.principal,
            read.asked,
            terms,
            send,
            format="anthropic",
            endpoint=read.endpoint,
            idempotency_key=asked.idempotency_key,
            body_hash=body_hash(asked.exchange.path, body),
        )
        await self._tell(asked, batch, held)

    async def _list_messages(self, asked: _Asked) -> None:
        query = asked.exchange.query
        async with self._database.tenant(asked.principal.organization_id) as conn:
            batches, has_more = await records.list_batches(
                conn,
                asked.principal,
                "anthropic",
                after=query.get("after_id"),
                before=query.get("before_id"),
                limit=_limit(query, MOST_LISTED["anthropic"]),
            )
        data = [vendors.shown(batch) for batch in batches]
        await _send(asked, _page(data, has_more=has_more))

    async def _show_messages(self, asked: _Asked) -> None:
        await self._tell(asked, (await self._found(asked, "anthropic"))[0])

    async def _cancel_messages(self, asked: _Asked) -> None:
        await self._tell(asked, await self._batches.cancel(await self._to_change(asked, "anthropic")))

    async def _delete_messages(self, asked: _Asked) -> None:
        batch = await self._to_change(asked, "anthropic")
        await self._batches.delete(batch)
        await _send(asked, {"id": batch.shown_id, "type": "message_batch_deleted"})

    async def _results(self, asked: _Asked) -> None:
        batch, is_own = await self._found(asked, "anthropic")
        _require_reading(asked, is_own)
        target, answer = await self._batches.results(batch)
        await _pass_on(asked.exchange, answer, results_of="anthropic", target=target)

    # -------------------------------------------------------------------------------- OpenAI's

    async def _make(self, asked: _Asked) -> None:
        body = await asked.exchange.body(MOST_BODY_BYTES)
        fields = wire.read_fields(body, frozenset({"input_file_id", "endpoint"}))
        shown_id = wire.read_text(fields, "input_file_id")
        endpoint = wire.read_text(fields, "endpoint")
        async with self._database.tenant(asked.principal.organization_id) as conn:
            file, is_own = await records.get_file(conn, asked.principal, shown_id)
            requests = await records.requests_of_file(conn, file)
        _require_reading(asked, is_own)
        if file.batch_id is not None or file.endpoint != endpoint:
            raise UnreadableRequest(f"The requests of {shown_id} are for {file.endpoint}, not {endpoint[:200]}")
        terms = await self._batches.terms(asked.principal, requests, "openai")
        if (terms.first.target.provider.name, terms.first.provider_key_id) != (file.provider, file.provider_key_id):
            raise UnreadableRequest(
                f"The models of {shown_id} are served elsewhere by now, or with another key: upload it again"
            )
        sent = wire.spliced(fields, input_file_id=file.provider_file_id)

        async def send(target: Target) -> Answer:
            return await self._upstream.call(target, vendors.BATCHES["openai"], sent, asked.exchange.headers)

        batch, held = await self._batches.make(
            asked.principal,
            requests,
            terms,
            send,
            format="openai",
            endpoint=endpoint,
            file=file,
            idempotency_key=asked.idempotency_key,
            body_hash=body_hash(asked.exchange.path, body),
        )
        await self._tell(asked, batch, held)

    async def _list(self, asked: _Asked) -> None:
        query = asked.exchange.query
        async with self._database.tenant(asked.principal.organization_id) as conn:
            batches, has_more = await records.list_batches(
                conn,
                asked.principal,
                "openai",
                after=query.get("after"),
                before=None,
                limit=_limit(query, MOST_LISTED["openai"]),
            )
            files = await db.fetch_all(
                conn,
                File,
                records.QUERIES.files_of_batch,
                organization_id=asked.principal.organization_id,
                batch_ids=[batch.batch_id for batch in batches],
            )
        data = [vendors.shown(batch, files) for batch in batches]
        await _send(asked, {"object": "list", **_page(data, has_more=has_more)})

    async def _show(self, asked: _Asked) -> None:
        await self._tell(asked, (await self._found(asked, "openai"))[0])

    async def _cancel(self, asked: _Asked) -> None:
        await self._tell(asked, await self._batches.cancel(await self._to_change(asked, "openai")))

    # -------------------------------------------------------------------------------- files

    async def _upload(self, asked: _Asked) -> None:
        """Read the file by the wire of its lines, and put it to the provider that will answer them."""
        body = await asked.exchange.body(MOST_BATCH_BYTES)
        form = multipart.read_form(body, asked.exchange.content_type, metered=("file", "purpose"))
        if form.text("purpose") != "batch":
            raise UnreadableRequest(
                f"Only files for batches are taken here: purpose=batch, lines for {', '.join(BATCHED)}"
            )
        part = form.part("file")
        if part is None or part.filename is None:
            raise wire.unreadable("file", "a file is required")
        content = bytes(form.content(part))
        read = await asyncio.to_thread(read_file, content, PRIOR_OUTPUT_TOKENS)
        terms = await self._batches.terms(asked.principal, read.asked, "openai")
        target = terms.first.target
        sent, content_type = await asyncio.to_thread(_rewritten, form, read, terms)
        answer = await self._upstream.call(
            target, vendors.FILES, sent, asked.exchange.headers, content_type=content_type
        )
        told = vendors.document(await said(answer), target.provider.name)
        file_id = uuid7()
        async with self._database.tenant(asked.principal.organization_id) as conn:
            await db.execute(
                conn,
                records.QUERIES.add_batch_file,
                organization_id=asked.principal.organization_id,
                file_id=file_id,
                user_id=asked.principal.user_id,
                api_key_id=asked.principal.api_key_id,
                provider=target.provider.name,
                provider_key_id=terms.first.provider_key_id,
                provider_file_id=told["id"],
                batch_id=None,
                endpoint=read.endpoint,
                filename=_plain(part.filename),
                size_bytes=len(content),
                requests=Jsonb([each.as_json() for each in read.asked]),
                created_at=None,
                expires_at=vendors.expiry(told),
            )
            file, _ = await records.get_file(conn, asked.principal, f"file-{file_id.hex}")
        await _send(asked, vendors.shown_file(file))

    async def _show_file(self, asked: _Asked) -> None:
        await _send(asked, vendors.shown_file((await self._found_file(asked))[0]))

    async def _delete_file(self, asked: _Asked) -> None:
        file, is_own = await self._found_file(asked)
        if not (is_own or asked.principal.may(Permission.ORGANIZATION_WRITE)):
            raise BatchOfAnother(f"{file.shown_id} is not yours")
        await said(
            await self._upstream.delete(await self._places.target(file), f"{vendors.FILES}/{file.provider_file_id}")
        )
        async with self._database.tenant(file.organization_id) as conn:
            await db.execute(
                conn,
                records.QUERIES.delete_batch_file,
                organization_id=file.organization_id,
                file_id=file.file_id,
            )
        await _send(asked, {"id": file.shown_id, "object": "file", "deleted": True})

    async def _content(self, asked: _Asked) -> None:
        file, is_own = await self._found_file(asked)
        _require_reading(asked, is_own)
        target = await self._places.target(file)
        answer = await self._upstream.get(target, f"{vendors.FILES}/{file.provider_file_id}/content")
        written: Format | None = None if file.batch_id is None else "openai"
        await _pass_on(asked.exchange, answer, results_of=written, target=target)

    # -------------------------------------------------------------------------------- of all

    async def _found(self, asked: _Asked, format: Any) -> tuple[Batch, bool]:
        """The batch that is asked for, and whether it is the caller's own; a worker looks after it soon."""
        async with self._database.tenant(asked.principal.organization_id) as conn:
            batch, is_own = await records.get_batch(conn, asked.principal, asked.shown_id, format)
            if batch.ended_at is None:
                await records.execute(conn, "look_soon", batch)
        return batch, is_own

    async def _to_change(self, asked: _Asked, format: Any) -> Batch:
        """The batch that is asked for; administrators may stop and delete those of others."""
        batch, is_own = await self._found(asked, format)
        if not (is_own or asked.principal.may(Permission.ORGANIZATION_WRITE)):
            raise BatchOfAnother(f"{batch.shown_id} is not yours")
        return batch

    async def _found_file(self, asked: _Asked) -> tuple[File, bool]:
        async with self._database.tenant(asked.principal.organization_id) as conn:
            return await records.get_file(conn, asked.principal, asked.shown_id)

    async def _tell(self, asked: _Asked, batch: Batch, held: Micros | None = None) -> None:
        async with self._database.tenant(batch.organization_id) as conn:
            files = await db.fetch_all(
                conn,
                File,
                records.QUERIES.files_of_batch,
                organization_id=batch.organization_id,
                batch_ids=[batch.batch_id],
            )
        await _send(asked, vendors.shown(batch, files), held)


async def _send(asked: _Asked, document: dict[str, Any], held: Micros | None = None) -> None:
    headers = [_JSON]
    if held is not None:
        headers.append((b"bursar-held", format_credits(held).encode()))
    await asked.exchange.send_whole(200, headers, msgspec.json.encode(document))


async def _pass_on(exchange: Exchange, answer: Answer, *, results_of: Format | None, target: Target) -> None:
    """A provider's file, piece by piece. results_of: whose results it has; None: it is as it was uploaded."""
    if answer.status >= 400:
        await said(answer)
    async with answer:
        exchange.is_events = False
        await exchange.start(answer.status, answer.headers)
        pieces = answer.pieces()
        if results_of is not None and not target.is_own_key:
            pieces = _without_account(pieces, results_of, target)
        async for piece in pieces:
            await exchange.send_piece(piece)
    await exchange.end_stream(b"")


async def _without_account(pieces: AsyncIterator[bytes], format: Format, target: Target) -> AsyncIterator[bytes]:
    """Whole lines; those of requests that failed without what vendors write of the platform's account into errors."""
    rest = b""
    async for piece in pieces:
        lines, rest = lines_of(rest, piece)
        yield b"".join(_line_without_account(line, format, target) + b"\n" for line in lines)
    if rest:
        yield _line_without_account(rest, format, target)


def _line_without_account(line: bytes, format: Format, target: Target) -> bytes:
    result = read_result(format, line)
    if result is not None and result.body is not None:
        return line
    fields: dict[str, msgspec.Raw] | None = wire.decoded(line, _FIELDS)
    if fields is None:
        return _cleaned(line, target)
    # The client's own name of its request stays, whatever it looks like.
    clean = {
        name: raw if name == "custom_id" else msgspec.Raw(_cleaned(bytes(raw), target)) for name, raw in fields.items()
    }
    return msgspec.json.encode(clean)


def _cleaned(text: bytes, target: Target) -> bytes:
    if target.secret is not None:
        text = text.replace(target.secret.encode(), b"[removed]")
    return without_account(text)


def _require_reading(asked: _Asked, is_own: bool) -> None:
    """Texts are for whoever wrote them; no role includes those of others."""
    if not (is_own or asked.principal.may(Permission.CONVERSATIONS_TEXT)):
        raise BatchOfAnother("What others asked and were answered is theirs to read")


def _page(data: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "data": data,
        "has_more": has_more,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def _limit(query: dict[str, str], most: int) -> int:
    text = query.get("limit", str(LISTED))
    if not (text.isascii() and text.isdigit() and 1 <= int(text[:9]) <= most):
        raise wire.unreadable("limit", f"a number from 1 to {most} is required")
    return int(text)


def _plain(filename: str) -> str:
    """A file's name as it can be stored and put into a header."""
    return "".join(each for each in filename if each.isprintable() and each not in '"\\')[:200] or "batch.jsonl"


def _rewritten(form: multipart.Form, read: ReadBatch, terms: Terms) -> tuple[bytes, str]:
    """The form for the provider, with its own names of the models in the file; and its content type."""
    boundary = secrets.token_hex(24)
    pieces: list[bytes] = []
    for part in form.parts:
        is_file = part.name == "file"
        filename = f'; filename="{_plain(part.filename or "")}"' if is_file else ""
        kind = "\r\nContent-Type: application/jsonl" if is_file else ""
        pieces.append(
            f'--{boundary}\r\nContent-Disposition: form-data; name="{part.name}"{filename}{kind}\r\n\r\n'.encode()
        )
        pieces += [read.written(terms.models) if is_file else bytes(form.content(part)), b"\r\n"]
    pieces.append(f"--{boundary}--\r\n".encode())
    return b"".join(pieces), f"multipart/form-data; boundary={boundary}"
