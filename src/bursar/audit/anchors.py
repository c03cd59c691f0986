"""Anchors: what the newest seals are, kept where whoever changes the database cannot change it.

Seals alone show that something in the middle changed. That the newest rows were cut off together with their seals, or
that all seals were made anew, shows only against a copy outside. An anchor is one line of JSON:

    {"anchor": 7, "at": "…", "horizon": 281474976713000, "organizations": 3, "root": "…", "heads": {…}, "previous": "…"}

root: Merkle root over the newest seal of every organization. heads: number and hash of those that are new since the
line before. previous: SHA-256 of the line before.
"""

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO, Any, Final
from urllib.parse import urlsplit
from uuid import UUID

import httpx2

from bursar import db
from bursar.audit.findings import Finding
from bursar.audit.hashes import ZEROS, Tree, head_leaf, text_hash
from bursar.audit.seals import QUERIES, Head
from bursar.errors import BursarError

FILE_NAME: Final = "anchors.jsonl"
SECONDS: Final = 600
"""How often an anchor is made."""
ANCHORED: Final = "anchored_seals_are_there"
INVARIANTS: Final = {
    ANCHORED: "Every seal that a line of an anchor file names is there with the same hash (with `--anchors FILE`).",
}
SOONER: Final = timedelta(seconds=SECONDS / 20)
LONGEST_LINE: Final = 64 * 1024 * 1024


class AnchorFailed(BursarError):
    """An anchor could not be made or kept."""


class AnchorsUnreadable(BursarError):
    """A file of anchors is not what was written: a line was changed, taken out or put in."""


@dataclass(frozen=True, slots=True)
class Last:
    """The anchor before. line_hash: of its line."""

    anchor_number: int
    anchored_at: datetime | None
    horizon: int
    line_hash: bytes


NONE_YET: Final = Last(0, None, -1, ZEROS)


@dataclass(frozen=True, slots=True)
class Line:
    """An anchor, ready to be kept."""

    text: str
    last: Last


@dataclass(frozen=True, slots=True)
class _Moment:
    horizon: int
    at: datetime


@dataclass(frozen=True, slots=True)
class _Known:
    organization_id: UUID
    seal_number: int
    seal_hash: bytes | None
    newest: int | None


async def anchor(database: db.Database, *, only_when_due: bool = True) -> list[str]:
    """Keep an anchor wherever the settings say; returns where.

    Raises:
        AnchorFailed: it could not be kept, or the database is behind what was anchored.
    """
    kept = []
    folder, url = database.settings.anchor_dir, database.settings.anchor_url
    if folder is not None and await _keep_in_file(database, folder / FILE_NAME, only_when_due):
        kept.append(str(folder / FILE_NAME))
    if url is not None and await _send(database, url, only_when_due):
        kept.append(_origin(url))
    return kept


async def next_line(database: db.Database, last: Last, *, only_when_due: bool) -> Line | None:
    """The anchor that follows; None where the last one is young.

    Raises:
        AnchorFailed: the database has less than was anchored.
    """
    async with database.platform() as conn:
        await conn.execute("set transaction isolation level repeatable read, read only")
        moment = await db.fetch_one(conn, _Moment, QUERIES.moment)
        if only_when_due and last.anchored_at and moment.at < last.anchored_at + timedelta(seconds=SECONDS) - SOONER:
            return None
        if moment.horizon < last.horizon:
            raise AnchorFailed(
                "The database is behind its last anchor",
                why="Rows and seals were removed from it, or an older backup was restored",
                next_step="bursar verify --anchors FILE says which; then begin a new file: docs/proof.md",
            )
        heads = await db.fetch_all(conn, Head, QUERIES.heads_at)
    new = [head for head in heads if head.until_number > last.horizon]
    said = {
        "anchor": last.anchor_number + 1,
        "at": moment.at.isoformat(),
        "horizon": moment.horizon,
        "organizations": len(heads),
        "root": _root((head.organization_id, head.seal_number, head.seal_hash) for head in heads).hex(),
        "heads": {str(head.organization_id): [head.seal_number, head.seal_hash.hex()] for head in new},
        "previous": last.line_hash.hex(),
    }
    text = json.dumps(said, separators=(",", ":"))
    return Line(text, Last(last.anchor_number + 1, moment.at, moment.horizon, text_hash(text)))


# ---------------------------------------------------------------------------------------------- keeping


async def _keep_in_file(database: db.Database, file: Path, only_when_due: bool) -> bool:
    try:
        with _locked(file) as opened:
            line = await next_line(database, _last_of(opened), only_when_due=only_when_due)
            if line is None:
                return False
            opened.write(line.text.encode() + b"\n")
            opened.flush()
            os.fsync(opened.fileno())
    except OSError as error:
        raise AnchorFailed(f"The anchor cannot be written to {file}", why=str(error)) from error
    return True


@contextmanager
def _locked(file: Path) -> Iterator[IO[bytes]]:
    """The file, for this process alone; at its end stands a whole line."""
    is_new = not file.exists()
    with file.open("a+b") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        opened.seek(0, os.SEEK_END)
        if opened.tell():
            tail = _tail(opened)
            if not tail.endswith(b"\n"):  # the machine stopped in the middle of it: that anchor was never made
                opened.truncate(opened.seek(0, os.SEEK_END) - len(tail) + tail.rfind(b"\n") + 1)
        if is_new:
            _sync_folder(file.parent)
        yield opened


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _tail(opened: IO[bytes]) -> bytes:
    """The last line, with what follows it."""
    size = opened.seek(0, os.SEEK_END)
    length = 4096
    while True:
        length = min(size, length)
        opened.seek(size - length)
        tail = opened.read(length)
        if tail.count(b"\n") > 1 or length == size or length > LONGEST_LINE:
            return tail
        length *= 4


def _last_of(opened: IO[bytes]) -> Last:
    """The anchor in a file's last line."""
    lines = _tail(opened).decode().splitlines() if opened.seek(0, os.SEEK_END) else []
    if not lines:
        return NONE_YET
    said = json.loads(lines[-1])
    return Last(said["anchor"], datetime.fromisoformat(said["at"]), said["horizon"], text_hash(lines[-1]))


async def _send(database: db.Database, url: str, only_when_due: bool) -> bool:
    """Post an anchor; it counts when the answer is a 2xx. A receiver may get one twice, and knows it by its number."""
    async with database.platform() as conn:
        last = await db.fetch_optional(conn, Last, QUERIES.last_sent)
    line = await next_line(database, last or NONE_YET, only_when_due=only_when_due)
    if line is None:
        return False
    try:
        async with httpx2.AsyncClient(timeout=30, follow_redirects=False) as client:
            answer = await client.post(url, content=line.text, headers={"content-type": "application/json"})
    except httpx2.HTTPError as error:
        raise AnchorFailed(f"The anchor could not be sent to {_origin(url)}", why=str(error)) from error
    if not answer.is_success:
        raise AnchorFailed(f"{_origin(url)} did not take the anchor", why=f"It answered {answer.status_code}")
    async with database.platform() as conn:
        await db.execute(
            conn,
            QUERIES.add_anchor,
            anchor_number=line.last.anchor_number,
            anchored_at=line.last.anchored_at,
            horizon=line.last.horizon,
            line_hash=line.last.line_hash,
        )
    return True


def _origin(url: str) -> str:
    """Without path and query, which may hold a secret."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}"


# ---------------------------------------------------------------------------------------------- checking


async def check(conn: db.Connection, file: Path) -> list[Finding]:
    """Which anchored seals the database does not have, or not so. conn: a transaction as bursar_platform.

    Raises:
        AnchorsUnreadable: the file itself is not whole.
    """
    heads: dict[UUID, tuple[int, str]] = {}
    for said in lines_of(file):
        heads |= _heads_in(said)
    suspects = {each.organization_id for each in await _differing(conn, heads)}
    if not suspects:
        return []
    first: dict[UUID, Finding] = {}
    since: dict[UUID, str] = {}
    for said in lines_of(file):
        asked = {each: head for each, head in _heads_in(said).items() if each in suspects - first.keys()}
        differing = {each.organization_id: each for each in await _differing(conn, asked)}
        for organization_id, (number, _) in asked.items():
            if organization_id in differing:
                first[organization_id] = _finding(
                    differing[organization_id], f"seal {number}, anchored at {said['at']}", since.get(organization_id)
                )
            else:
                since[organization_id] = f"seal {number} of {said['at']} is as anchored"
    return [first[each] for each in sorted(first)]


def _finding(known: _Known, subject: str, since: str | None) -> Finding:
    newest = f"no such seal; the newest is {known.newest}" if known.newest else "no seal at all"
    found = "a seal with another hash: it was made anew" if known.seal_hash else newest
    return Finding(ANCHORED, known.organization_id, subject, since or "as anchored", found)


def lines_of(file: Path) -> Iterator[dict[str, Any]]:
    """What each line says, in order.

    Raises:
        AnchorsUnreadable: a line does not follow from the one before, or the last one's root from its heads.
    """
    previous, number, said = ZEROS, 0, {}
    heads: dict[UUID, tuple[int, str]] = {}
    try:
        with file.open(encoding="utf-8") as opened:
            for number, line in enumerate(opened, 1):
                text = line.rstrip("\n")
                said = json.loads(text)
                if said["previous"] != previous.hex():
                    raise AnchorsUnreadable(
                        f"Line {number} of {file} does not follow the line before",
                        why="A line was changed, taken out or put in, or the file is put together from others",
                    )
                previous = text_hash(text)
                heads |= _heads_in(said)
                yield said
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise AnchorsUnreadable(f"{file} is no file of anchors (line {number})", why=str(error)) from error
    if said and _root((each, *_head(heads[each])) for each in sorted(heads)).hex() != said["root"]:
        raise AnchorsUnreadable(f"The root in the last line of {file} is not that of its seals")


def _heads_in(said: dict[str, Any]) -> dict[UUID, tuple[int, str]]:
    return {UUID(key): (int(number), str(hashed)) for key, (number, hashed) in said["heads"].items()}


def _head(head: tuple[int, str]) -> tuple[int, bytes]:
    return head[0], bytes.fromhex(head[1])


def _root(heads: Iterable[tuple[UUID, int, bytes]]) -> bytes:
    tree = Tree()
    for head in heads:
        tree.add(head_leaf(*head))
    return tree.root() if tree.count else ZEROS


async def _differing(conn: db.Connection, heads: dict[UUID, tuple[int, str]]) -> list[_Known]:
    if not heads:
        return []
    known = await db.fetch_all(
        conn,
        _Known,
        QUERIES.hashes_of_seals,
        organization_ids=list(heads),
        seal_numbers=[number for number, _ in heads.values()],
    )
    return [each for each in known if each.seal_hash is None or each.seal_hash.hex() != heads[each.organization_id][1]]
