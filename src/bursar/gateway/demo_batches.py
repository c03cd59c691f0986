"""Files and batches of the demo provider, in both vendors' shapes.

They lie in a folder, so that every process of an installation serves the same ones, and one that is killed loses none.
A batch is answered once `batch_ms` have passed since it was made (a second, where nothing is said); what it says of
itself follows from the clock alone. Directions on the call that makes it:

    batch_ms         ends after so long
    batch_errored    so many of its first requests fail
    batch_expired    so many of the next ones expire
    and those of a single call, which then hold for every answer in it: output_tokens, usage, cached, …
"""

from __future__ import annotations

import asyncio
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from aiohttp import web

from bursar.gateway import (
    anthropic_wire,
    demo_anthropic,
    demo_media,
    demo_openai,
    demo_responses,
    embeddings_wire,
    openai_wire,
    responses_wire,
    wire,
)
from bursar.gateway.demo_answers import DIRECTIONS_HEADER, PLAIN_DIRECTIONS, Directions, decide, read_directions

USUAL_MS: Final = 1_000
_DAY: Final = 24 * 3600
_PORTION: Final = 200
_encode: Final = msgspec.json.encode


class DemoBatches:
    """The routes, over one folder."""

    def __init__(self, folder: Path) -> None:
        self._store = _Store(folder)

    def routes(self) -> list[web.RouteDef]:
        """What is served."""
        return [
            web.post("/v1/files", self._upload),
            web.get("/v1/files/{id}", self._file),
            web.delete("/v1/files/{id}", self._delete_file),
            web.get("/v1/files/{id}/content", self._content),
            web.post("/v1/batches", self._make),
            web.get("/v1/batches", self._list),
            web.get("/v1/batches/{id}", self._show),
            web.post("/v1/batches/{id}/cancel", self._cancel),
            web.post("/v1/messages/batches", self._make_messages),
            web.get("/v1/messages/batches", self._list_messages),
            web.get("/v1/messages/batches/{id}", self._show_messages),
            web.delete("/v1/messages/batches/{id}", self._delete_messages),
            web.post("/v1/messages/batches/{id}/cancel", self._cancel_messages),
            web.get("/v1/messages/batches/{id}/results", self._results),
        ]

    # -------------------------------------------------------------------------------- OpenAI's files

    async def _upload(self, request: web.Request) -> web.Response:
        try:
            form = await request.post()
        except ValueError:  # no form, or a field that is no text
            return _error(400, "openai")
        file = form.get("file")
        if not isinstance(file, web.FileField):
            return _error(400, "openai")
        content = await asyncio.to_thread(file.file.read)
        kept: dict[str, Any] = {
            "id": f"file-{secrets.token_hex(12)}",
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "expires_at": int(time.time()) + 30 * _DAY,
            "filename": file.filename,
            "purpose": str(form.get("purpose", "batch")),
            "status": "processed",
        }
        await asyncio.to_thread(self._store.put, kept["id"], kept, content)
        return _answer(kept)

    async def _file(self, request: web.Request) -> web.Response:
        kept = self._store.get(request.match_info["id"], "file-")
        return _error(404, "openai") if kept is None else _answer(kept)

    async def _delete_file(self, request: web.Request) -> web.Response:
        kept = self._store.get(request.match_info["id"], "file-")
        if kept is None:
            return _error(404, "openai")
        self._store.remove(kept["id"])
        return _answer({"id": kept["id"], "object": "file", "deleted": True})

    async def _content(self, request: web.Request) -> web.StreamResponse:
        """An uploaded file as it came; what a batch wrote is worked out from what it read."""
        name = request.match_info["id"]
        if name.startswith(("file-out-", "file-err-")):
            batch = self._store.batch("batch_" + name[9:])
            if batch is None or not batch.is_over:
                return _error(404, "openai")
            return await _stream(request, _openai_lines(batch, answered=name.startswith("file-out-")))
        kept = self._store.get(name, "file-")
        if kept is None:
            return _error(404, "openai")
        return web.Response(body=self._store.content(name), content_type="application/octet-stream")

    # -------------------------------------------------------------------------------- OpenAI's batches

    async def _make(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        file = self._store.get(str(body.get("input_file_id")), "file-")
        if file is None:
            return _error(400, "openai")
        entries = [msgspec.json.decode(line) for line in self._store.content(file["id"]).split(b"\n") if line.strip()]
        asked = [(entry["custom_id"], entry["body"]) for entry in entries]
        refused, batch = await self._new(request, "batch_", asked, beside=body)
        return refused or _answer(_openai_batch(batch))

    async def _list(self, request: web.Request) -> web.Response:
        batches = sorted(self._store.batches("batch_"), key=lambda batch: batch.made_at, reverse=True)[:100]
        return _answer({"object": "list", "data": [_openai_batch(batch) for batch in batches], "has_more": False})

    async def _show(self, request: web.Request) -> web.Response:
        batch = self._store.batch(request.match_info["id"], "batch_")
        return _error(404, "openai") if batch is None else _answer(_openai_batch(batch))

    async def _cancel(self, request: web.Request) -> web.Response:
        batch = self._store.cancelled(request.match_info["id"], "batch_")
        return _error(404, "openai") if batch is None else _answer(_openai_batch(batch))

    # -------------------------------------------------------------------------------- Anthropic's batches

    async def _make_messages(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read())
        asked = [(entry["custom_id"], entry["params"]) for entry in body["requests"]]
        refused, batch = await self._new(request, "msgbatch_", asked, beside={})
        return refused or _answer(_anthropic_batch(batch))

    async def _list_messages(self, request: web.Request) -> web.Response:
        batches = sorted(self._store.batches("msgbatch_"), key=lambda batch: batch.made_at, reverse=True)[:100]
        return _answer({"data": [_anthropic_batch(batch) for batch in batches], "has_more": False})

    async def _show_messages(self, request: web.Request) -> web.Response:
        batch = self._store.batch(request.match_info["id"], "msgbatch_")
        return _error(404, "anthropic") if batch is None else _answer(_anthropic_batch(batch))

    async def _delete_messages(self, request: web.Request) -> web.Response:
        batch = self._store.batch(request.match_info["id"], "msgbatch_")
        if batch is None or not batch.is_over:
            return _error(404 if batch is None else 400, "anthropic")
        self._store.remove(batch.id)
        return _answer({"id": batch.id, "type": "message_batch_deleted"})

    async def _cancel_messages(self, request: web.Request) -> web.Response:
        batch = self._store.cancelled(request.match_info["id"], "msgbatch_")
        return _error(404, "anthropic") if batch is None else _answer(_anthropic_batch(batch))

    async def _results(self, request: web.Request) -> web.StreamResponse:
        batch = self._store.batch(request.match_info["id"], "msgbatch_")
        if batch is None or not batch.is_over:
            return _error(404, "anthropic")
        return await _stream(request, _anthropic_lines(batch))

    async def _new(
        self, request: web.Request, prefix: str, asked: list[tuple[str, Any]], *, beside: dict[str, Any]
    ) -> tuple[web.Response | None, _Batch]:
        header = request.headers.get(DIRECTIONS_HEADER) or ""
        batch = _Batch(f"{prefix}{secrets.token_hex(12)}", time.time(), header, None, asked, beside)
        failure = batch.directions.fail
        if failure:
            return _error(failure, "anthropic" if prefix == "msgbatch_" else "openai"), batch
        if batch.directions.break_after == 0 and request.transport is not None:
            await asyncio.to_thread(self._store.put, batch.id, msgspec.to_builtins(batch))
            request.transport.close()
            return web.Response(), batch
        await asyncio.to_thread(self._store.put, batch.id, msgspec.to_builtins(batch))
        return None, batch


@dataclass(frozen=True, slots=True)
class _Batch:
    """A batch as it was made. header: its directions. cancelled_at: when that was asked for, in Unix seconds."""

    id: str
    made_at: float
    header: str
    cancelled_at: float | None
    asked: list[tuple[str, Any]]
    beside: dict[str, Any]

    @property
    def directions(self) -> Directions:
        return read_directions(self.header) if self.header else PLAIN_DIRECTIONS

    @property
    def ends_at(self) -> float:
        milliseconds = self.directions.batch_ms
        return self.made_at + (USUAL_MS if milliseconds is None else milliseconds) / 1000

    @property
    def is_cancelled(self) -> bool:
        """It was told to stop before it had begun to answer."""
        return self.cancelled_at is not None and self.cancelled_at < self.ends_at

    @property
    def is_over(self) -> bool:
        return self.is_cancelled or time.time() >= self.ends_at

    def outcome(self, place: int) -> str:
        """What becomes of its request at a place, counted from 0."""
        errored = self.directions.batch_errored
        if self.is_cancelled:
            return "canceled"
        if place < errored:
            return "errored"
        return "expired" if place < errored + self.directions.batch_expired else "succeeded"

    @property
    def counts(self) -> dict[str, int]:
        """How many have come to what; of a batch that is not over, nothing yet."""
        if not self.is_over:
            return {"processing": len(self.asked), "succeeded": 0, "errored": 0, "canceled": 0, "expired": 0}
        total = len(self.asked)
        errored = 0 if self.is_cancelled else min(total, self.directions.batch_errored)
        expired = 0 if self.is_cancelled else min(total - errored, self.directions.batch_expired)
        canceled = total if self.is_cancelled else 0
        succeeded = total - errored - expired - canceled
        return {"processing": 0, "succeeded": succeeded, "errored": errored, "canceled": canceled, "expired": expired}


class _Store:
    """Documents by id, each in a file of its own that is put in place whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, name: str, kept: dict[str, Any], content: bytes | None = None) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if content is not None:
            self._write(f"{name}.jsonl", content)
        self._write(f"{name}.json", _encode(kept))

    def _write(self, name: str, data: bytes) -> None:
        draft = self._folder / f".{secrets.token_hex(8)}"
        draft.write_bytes(data)
        os.replace(draft, self._folder / name)

    def get(self, name: str, prefix: str) -> dict[str, Any] | None:
        plain = name.removeprefix(prefix)
        if not name.startswith(prefix) or not (plain.isascii() and plain.isalnum()):
            return None
        try:
            kept: dict[str, Any] = msgspec.json.decode((self._folder / f"{name}.json").read_bytes())
        except FileNotFoundError:
            return None
        return kept

    def content(self, name: str) -> bytes:
        return (self._folder / f"{name}.jsonl").read_bytes()

    def remove(self, name: str) -> None:
        for ending in ("json", "jsonl"):
            (self._folder / f"{name}.{ending}").unlink(missing_ok=True)

    def batch(self, name: str, prefix: str = "batch_") -> _Batch | None:
        kept = self.get(name, prefix)
        return None if kept is None else msgspec.convert(kept, _Batch)

    def batches(self, prefix: str) -> Iterator[_Batch]:
        for path in self._folder.glob(f"{prefix}*.json"):
            batch = self.batch(path.stem, prefix)
            if batch is not None:
                yield batch

    def cancelled(self, name: str, prefix: str) -> _Batch | None:
        kept = self.get(name, prefix)
        if kept is None:
            return None
        if kept["cancelled_at"] is None:
            self.put(name, {**kept, "cancelled_at": time.time()})
        return self.batch(name, prefix)


def _openai_batch(batch: _Batch) -> dict[str, Any]:
    counts, made, ended = batch.counts, int(batch.made_at), int(batch.ends_at)
    total = len(batch.asked)
    status = "in_progress"
    if batch.is_over:
        status = "cancelled" if batch.is_cancelled else "expired" if counts["expired"] else "completed"
    over = batch.is_over
    number = batch.id.removeprefix("batch_")
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.beside.get("endpoint"),
        "errors": None,
        "input_file_id": batch.beside.get("input_file_id"),
        "completion_window": batch.beside.get("completion_window", "24h"),
        "status": status,
        "output_file_id": f"file-out-{number}" if over and counts["succeeded"] else None,
        "error_file_id": f"file-err-{number}" if over and counts["succeeded"] < total else None,
        "created_at": made,
        "in_progress_at": made,
        "expires_at": made + _DAY,
        "finalizing_at": ended if over else None,
        "completed_at": ended if status == "completed" else None,
        "failed_at": None,
        "expired_at": ended if status == "expired" else None,
        "cancelling_at": int(batch.cancelled_at) if batch.is_cancelled and batch.cancelled_at else None,
        "cancelled_at": int(batch.cancelled_at) if batch.is_cancelled and batch.cancelled_at else None,
        "request_counts": {
            "total": total,
            "completed": counts["succeeded"],
            "failed": counts["errored"] + counts["expired"] + counts["canceled"],
        },
        "metadata": batch.beside.get("metadata"),
    }


def _anthropic_batch(batch: _Batch) -> dict[str, Any]:
    over = batch.is_over
    return {
        "id": batch.id,
        "type": "message_batch",
        "processing_status": "ended" if over else "in_progress",
        "request_counts": batch.counts,
        "created_at": _told(batch.made_at),
        "expires_at": _told(batch.made_at + _DAY),
        "ended_at": _told(batch.ends_at) if over else None,
        "archived_at": None,
        "cancel_initiated_at": _told(batch.cancelled_at) if batch.cancelled_at is not None else None,
        "results_url": f"http://demo.invalid/v1/messages/batches/{batch.id}/results" if over else None,
    }


def _told(instant: float) -> str:
    return datetime.fromtimestamp(instant, UTC).isoformat()


def _anthropic_lines(batch: _Batch) -> Iterator[bytes]:
    for place, (custom_id, params) in enumerate(batch.asked):
        outcome = batch.outcome(place)
        result: dict[str, Any] = {"type": outcome}
        if outcome == "succeeded":
            result["message"] = msgspec.Raw(_body(batch, anthropic_wire, demo_anthropic, params))
        elif outcome == "errored":
            result["error"] = msgspec.json.decode(demo_anthropic.error(400))
        yield _encode({"custom_id": custom_id, "result": result}) + b"\n"


_WHY: Final = {"expired": "batch_expired", "canceled": "batch_cancelled"}


def _openai_lines(batch: _Batch, *, answered: bool) -> Iterator[bytes]:
    """Lines of the file of answers, or of the file of errors."""
    for place, (custom_id, body) in enumerate(batch.asked):
        outcome = batch.outcome(place)
        if (outcome == "succeeded") != answered:
            continue
        line: dict[str, Any] = {"id": f"batch_req_{place}", "custom_id": custom_id, "response": None, "error": None}
        if outcome in _WHY:
            line["error"] = {"code": _WHY[outcome], "message": "This request was not executed."}
        else:
            status = 200 if answered else 400
            raw = _line_body(batch, body) if answered else demo_openai.error(400)
            line["response"] = {"status_code": status, "request_id": f"req_{place}", "body": msgspec.Raw(raw)}
        yield _encode(line) + b"\n"


def _line_body(batch: _Batch, body: Any) -> bytes:
    if batch.beside.get("endpoint") == "/v1/embeddings":
        return demo_media.embeddings(embeddings_wire.read_request(_encode(body)), batch.directions)
    if batch.beside.get("endpoint") == "/v1/responses":
        return _body(batch, responses_wire, demo_responses, body)
    return _body(batch, openai_wire, demo_openai, body)


def _body(batch: _Batch, format: wire.Wire, shape: Any, params: Any) -> bytes:
    """The answer to one request, as it would be alone."""
    asked = format.read_request(_encode(params))
    answer: bytes = shape.body(decide(asked, batch.directions, shape.tools(asked)))
    return answer


async def _stream(request: web.Request, lines: Iterator[bytes]) -> web.StreamResponse:
    """Lines, a portion at a time, so that others are served in between."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-jsonl"})
    response.enable_chunked_encoding()
    await response.prepare(request)
    async for portion in _portions(lines):
        await response.write(portion)
    return response


async def _portions(lines: Iterator[bytes]) -> AsyncIterator[bytes]:
    take: Callable[[], list[bytes]] = lambda: [line for _, line in zip(range(_PORTION), lines, strict=False)]  # noqa: E731
    while portion := await asyncio.to_thread(take):
        yield b"".join(portion)


def _answer(document: dict[str, Any]) -> web.Response:
    return web.Response(body=_encode(document), content_type="application/json")


def _error(status: int, format: str) -> web.Response:
    body = demo_anthropic.error(status) if format == "anthropic" else demo_openai.error(status)
    return web.Response(body=body, status=status, content_type="application/json")
