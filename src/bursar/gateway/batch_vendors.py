"""The two vendors' batch APIs: their paths at a provider, what their documents say, and how ours differ from them.

A client sees the provider's document with our ids in it, and sees it ended only once everything in it is charged.
Sources: the OpenAI API reference, "Batch" and "Files"; the Anthropic API reference, "Message Batches"; the types of the
official Python clients.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from bursar.gateway.batch_records import Batch, File
from bursar.gateway.routes import Format
from bursar.gateway.upstream import UpstreamBroken, without_account

BATCHES: Final[Mapping[Format, str]] = {"openai": "/batches", "anthropic": "/messages/batches"}
"""The provider's path of batches, after its base URL; Anthropic's is ours too, after /v1."""

FILES: Final = "/files"
_OPENAI_OVER: Final = ("completed", "failed", "expired", "cancelled")
_TOLD_AT_THE_END: Final = ("completed_at", "expired_at", "cancelled_at", "output_file_id", "error_file_id", "usage")


def document(body: bytes, provider: str) -> dict[str, Any]:
    """A provider's JSON object with an id.

    Raises:
        UpstreamBroken: it is something else.
    """
    try:
        told = msgspec.json.decode(body)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise UpstreamBroken(f"{provider} answered with something that is no JSON.") from error
    if not isinstance(told, dict) or not isinstance(told.get("id"), str) or not told["id"]:
        raise UpstreamBroken(f"{provider} answered without an id.")
    return told


def is_over(format: Format, told: Mapping[str, Any]) -> bool:
    """Whether the provider has done all that it will do."""
    if format == "openai":
        return told.get("status") in _OPENAI_OVER
    return told.get("processing_status") == "ended"


def succeeded(format: Format, told: Mapping[str, Any]) -> int:
    """How many requests the provider says it answered; 0 where it does not say."""
    counts = told.get("request_counts")
    count = counts.get("completed" if format == "openai" else "succeeded") if isinstance(counts, dict) else None
    return count if isinstance(count, int) else 0


def results_of(format: Format, told: Mapping[str, Any]) -> list[str]:
    """The provider's paths at which the results of a batch that is over lie."""
    if format == "anthropic":
        # Of a batch in which nothing was answered there is nothing to read.
        return [f"{BATCHES['anthropic']}/{told['id']}/results"] if succeeded(format, told) else []
    return [f"{FILES}/{each}/content" for each in written_files(told)]


def written_files(told: Mapping[str, Any]) -> list[str]:
    """The provider's ids of the files that a batch of OpenAI's wrote."""
    return [told[name] for name in ("output_file_id", "error_file_id") if isinstance(told.get(name), str)]


def shown(batch: Batch, files: Iterable[File] = ()) -> dict[str, Any]:
    """What a client is told of its batch. files: that it wrote."""
    told = dict(batch.told or {})
    return _openai(batch, told, files) if batch.format == "openai" else _anthropic(batch, told)


def _openai(batch: Batch, told: dict[str, Any], files: Iterable[File]) -> dict[str, Any]:
    ours = {file.provider_file_id: file.shown_id for file in files}
    names = {name: ours.get(str(told.get(name))) for name in ("output_file_id", "error_file_id")}
    told |= {"id": batch.shown_id, **names}
    told["input_file_id"] = f"file-{(batch.input_file_id or UUID(int=0)).hex}"
    if told.get("errors"):
        told["errors"] = msgspec.json.decode(without_account(msgspec.json.encode(told["errors"])))
    if batch.ended_at is None and is_over("openai", told):
        told |= dict.fromkeys(_TOLD_AT_THE_END)
        told["status"] = "finalizing"
    return told


def _anthropic(batch: Batch, told: dict[str, Any]) -> dict[str, Any]:
    told |= {"id": batch.shown_id, "results_url": None}
    if batch.ended_at is not None:
        told["results_url"] = f"/v1{BATCHES['anthropic']}/{batch.shown_id}/results"
    elif is_over("anthropic", told):
        told["processing_status"] = "canceling" if told.get("cancel_initiated_at") else "in_progress"
        told["ended_at"] = None
        counts = told.get("request_counts")
        told["request_counts"] = {
            **dict.fromkeys(counts if isinstance(counts, dict) else (), 0),
            "processing": batch.request_count,
        }
    return told


def shown_file(file: File) -> dict[str, Any]:
    """What a client is told of a file."""
    return {
        "id": file.shown_id,
        "object": "file",
        "bytes": file.size_bytes,
        "created_at": int(file.created_at.timestamp()),
        "expires_at": None if file.expires_at is None else int(file.expires_at.timestamp()),
        "filename": file.filename,
        "purpose": "batch" if file.batch_id is None else "batch_output",
        "status": "processed",
        "status_details": None,
    }


def expiry(told: Mapping[str, Any]) -> datetime | None:
    """When the provider deletes a file, where it says so."""
    seconds = told.get("expires_at")
    return datetime.fromtimestamp(seconds, UTC) if isinstance(seconds, int) and 0 < seconds < 2**33 else None
