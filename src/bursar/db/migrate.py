"""Schema changes: numbered files once each, function and view files whenever they change.

Order: roles, then the numbered migrations, each in a transaction of its own together with its record, then every
capability's functions and views, lowest layer first, in one transaction. A run that was interrupted at any place is
simply run again. The advisory lock only keeps two runners from doing the same work twice at once.
"""

import hashlib
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

import psycopg
from psycopg.pq import TransactionStatus

from bursar.db.queries import load_queries
from bursar.db.roles import ensure_roles
from bursar.db.rows import Connection, execute, fetch_all, fetch_value
from bursar.errors import BursarError

# Lower layers first: a function or view may use what is above it in this list (STYLE: imports point downwards).
LAYERS: Final = (
    "audit",
    "identity",
    "pricing",
    "ledger",
    "outbox",
    "credits",
    "licenses",
    "usage",
    "alerts",
    "gateway",
    "billing",
    "warehouse",
)
REPEATABLE: Final = (
    "functions",
    "views",
)  # a file (functions.sql), or a folder of parts, run in the order of their names
PART: Final = "-- part: "
NEW_CLUSTER: Final = "a new epoch of write numbers, because this database came from another cluster"
RUNNERS_LOCK: Final = 0x6275_7273_6172  # "bursar"
_FILE_NAME = re.compile(r"(?P<number>\d{4})_(?P<title>[a-z0-9_]+)\.sql")

QUERIES = load_queries("bursar.db")


class MigrationFailed(BursarError):
    """A migration raised an error; nothing of it stays."""


class MigrationEdited(BursarError):
    """A migration that was applied has changed or is gone."""


class SchemaBehind(BursarError):
    """The database lacks migrations that this version needs."""


class WrongMasterKey(BursarError):
    """The database was set up with another master key."""


@dataclass(frozen=True, slots=True)
class Migration:
    """One numbered file."""

    number: int
    title: str
    text: str

    @property
    def name(self) -> str:
        return f"{self.number:04d}_{self.title}"

    @property
    def checksum(self) -> str:
        return checksum(self.text)


@dataclass(frozen=True, slots=True)
class SqlFile:
    """Functions or views of a capability; path such as 'identity/functions.sql', of a folder 'credits/functions'."""

    path: str
    text: str

    @property
    def checksum(self) -> str:
        return checksum(self.text)


@dataclass(frozen=True, slots=True)
class AppliedMigration:
    """A row of db.applied_migrations."""

    migration_number: int
    title: str
    checksum: str


@dataclass(frozen=True, slots=True)
class AppliedFile:
    """A row of db.applied_files."""

    path: str
    checksum: str


@dataclass(frozen=True, slots=True)
class Report:
    """What a run did: names of migrations and files, in order."""

    migrations: tuple[str, ...]
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Status:
    """What is applied, what waits, and what does not fit (empty when all is well)."""

    applied: tuple[str, ...]
    pending: tuple[str, ...]
    changed_files: tuple[str, ...]
    faults: tuple[str, ...]

    @property
    def is_current(self) -> bool:
        return not (self.pending or self.changed_files or self.faults)


@dataclass(frozen=True, slots=True)
class Schema:
    """The files that make the schema."""

    migrations: tuple[Migration, ...]
    files: tuple[SqlFile, ...]


def checksum(text: str) -> str:
    """SHA-256, with line ends as on Unix so that a checkout's setting changes nothing."""
    return hashlib.sha256(text.replace("\r\n", "\n").encode()).hexdigest()


def parse_migrations(texts: Iterable[tuple[str, str]]) -> tuple[Migration, ...]:
    """(file name, text) pairs in any order -> migrations in order.

    Raises:
        ValueError: a name has another form, or a number comes twice.
    """
    found = []
    for name, text in texts:
        match = _FILE_NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is not named NNNN_title.sql")
        found.append(Migration(int(match["number"]), match["title"], text))
    found.sort(key=lambda each: each.number)
    if len({each.number for each in found}) != len(found):
        raise ValueError(f"two migrations have the same number: {[each.name for each in found]}")
    return tuple(found)


def load_schema() -> Schema:
    """The files shipped with this version."""
    folder = files("bursar.db").joinpath("migrations")
    texts = [(each.name, each.read_text(encoding="utf-8")) for each in folder.iterdir() if each.name.endswith(".sql")]
    return Schema(parse_migrations(texts), tuple(_repeatable_files()))


def _repeatable_files() -> Iterable[SqlFile]:
    root = files("bursar")
    for layer in LAYERS:
        for name in REPEATABLE:
            file, folder = root.joinpath(layer, f"{name}.sql"), root.joinpath(layer, name)
            if file.is_file():
                yield SqlFile(f"{layer}/{file.name}", file.read_text(encoding="utf-8"))
            if folder.is_dir():
                parts = sorted((each.name, each.read_text(encoding="utf-8")) for each in folder.iterdir())
                yield SqlFile(f"{layer}/{name}", "".join(f"{PART}{part}\n{text}\n" for part, text in parts))


async def migrate(
    admin_dsn: str, master_key: bytes, *, schema: Schema | None = None, reset_passwords: bool = False
) -> Report:
    """Bring roles and schema up to date; does nothing, and quickly, when they are.

    Raises:
        RolesNotUsable, WrongMasterKey, MigrationEdited, MigrationFailed
    """
    schema = schema or load_schema()
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as conn, _only_runner(conn):
        if await fetch_value(conn, QUERIES.has_records):
            await _check_master_key(conn, master_key)  # before a wrong one can take the roles over
        await ensure_roles(conn, master_key, reset_passwords=reset_passwords)
        await _ensure_records(conn)
        await _check_master_key(conn, master_key)
        status = await _status(conn, schema)
        if status.faults:
            raise MigrationEdited("The database does not fit these migrations", why="; ".join(status.faults))
        for migration in schema.migrations:
            if migration.name in status.pending:
                await _apply_migration(conn, migration)
        await _apply_files(conn, [each for each in schema.files if each.path in status.changed_files])
        if await _is_elsewhere(conn):
            async with _as_owner(conn, NEW_CLUSTER):
                await conn.execute("select audit.begin_epoch()")
    return Report(status.pending, status.changed_files)


async def status(admin_dsn: str, *, schema: Schema | None = None) -> Status:
    """What is applied and what is not; reads only."""
    async with await psycopg.AsyncConnection.connect(admin_dsn, autocommit=True) as conn:
        return await _status(conn, schema or load_schema())


async def server_version(admin_dsn: str) -> str:
    """Such as '18.4'."""
    async with await psycopg.AsyncConnection.connect(admin_dsn) as conn:
        return str(await fetch_value(conn, "show server_version"))


async def require_current(admin_dsn: str) -> None:
    """Refuse to work on a schema that this version does not know.

    Raises:
        SchemaBehind
    """
    found = await status(admin_dsn)
    if not found.is_current:
        waiting = [*found.pending, *found.changed_files, *found.faults]
        raise SchemaBehind(
            "The database is not at this version's schema",
            why=", ".join(waiting),
            next_step="bursar db migrate" if not found.faults else "bursar db verify",
        )


@asynccontextmanager
async def _only_runner(conn: Connection) -> AsyncIterator[None]:
    """Wait for any other runner; the lock goes with the session, so that a killed runner leaves nothing behind."""
    await conn.execute("select pg_advisory_lock(%s)", [RUNNERS_LOCK])
    try:
        yield
    finally:
        if not conn.broken:
            await conn.execute("select pg_advisory_unlock(%s)", [RUNNERS_LOCK])


async def _ensure_records(conn: Connection) -> None:
    """The schema `db`, where the runner keeps its own records."""
    if await fetch_value(conn, QUERIES.has_records):
        return
    async with conn.transaction():
        await conn.execute("set local role bursar_owner")
        await conn.execute(files("bursar.db").joinpath("records.sql").read_text(encoding="utf-8"))


async def _check_master_key(conn: Connection, master_key: bytes) -> None:
    """E-mail hashes, sealed provider keys and role passwords hang on the master key; another one would ruin them."""
    fingerprint = checksum(f"fingerprint {master_key.hex()}")[:32]
    async with conn.transaction():
        await conn.execute("set local role bursar_owner")
        known = await fetch_value(conn, QUERIES.fingerprint)
        if known is None:
            await execute(conn, QUERIES.add_fingerprint, fingerprint=fingerprint)
    if known is not None and known != fingerprint:
        raise WrongMasterKey(
            "This database was set up with another master key",
            why="Its keys, e-mail hashes and provider secrets cannot be read with this one",
            next_step="Set BURSAR_MASTER_KEY, or put the file master.key back into the data folder",
        )


async def _status(conn: Connection, schema: Schema) -> Status:
    if not await fetch_value(conn, QUERIES.has_records):
        return Status((), tuple(each.name for each in schema.migrations), tuple(each.path for each in schema.files), ())
    async with conn.transaction():
        await conn.execute("set local role bursar_owner")
        applied = {each.migration_number: each for each in await fetch_all(conn, AppliedMigration, QUERIES.migrations)}
        checksums = {each.path: each.checksum for each in await fetch_all(conn, AppliedFile, QUERIES.files)}
        changed = [each.path for each in schema.files if checksums.get(each.path) != each.checksum]
    if await _is_elsewhere(conn):
        changed.append(NEW_CLUSTER)
    known = {each.number: each for each in schema.migrations}
    return Status(
        applied=tuple(f"{each.migration_number:04d}_{each.title}" for each in applied.values()),
        pending=tuple(each.name for each in schema.migrations if each.number not in applied),
        changed_files=tuple(changed),
        faults=tuple(_faults(known, applied)),
    )


async def _is_elsewhere(conn: Connection) -> bool:
    """The database was restored into another cluster, which counts transactions of its own: see docs/proof.md."""
    if not await fetch_value(conn, QUERIES.has_epochs):
        return False
    async with conn.transaction():
        await conn.execute("set local role bursar_owner")
        return bool(await fetch_value(conn, "select audit.is_elsewhere()"))


def _faults(known: dict[int, Migration], applied: dict[int, AppliedMigration]) -> Iterable[str]:
    for number, row in applied.items():
        name = f"{number:04d}_{row.title}"
        if number not in known:
            yield f"{name} was applied, but this version does not have it (a newer version ran here)"
        elif known[number].checksum != row.checksum:
            yield f"{name} was changed after it was applied; put it back and write a new migration"
    newest = max(applied, default=0)
    for number in known:
        if number < newest and number not in applied:
            yield f"{known[number].name} comes before {newest:04d}, which is applied already"


async def _apply_migration(conn: Connection, migration: Migration) -> None:
    async with _as_owner(conn, migration.name):
        await _run(conn, migration.name, migration.text)
        await execute(
            conn,
            QUERIES.add_migration,
            migration_number=migration.number,
            title=migration.title,
            checksum=migration.checksum,
        )


async def _apply_files(conn: Connection, changed: list[SqlFile]) -> None:
    """All together or none: functions and views of several layers fit each other."""
    if not changed:
        return
    async with _as_owner(conn, "functions and views"):
        for file in changed:
            await _run(conn, file.path, file.text)
            await execute(conn, QUERIES.set_file, path=file.path, checksum=file.checksum)


@asynccontextmanager
async def _as_owner(conn: Connection, what: str) -> AsyncIterator[None]:
    try:
        async with conn.transaction():
            await conn.execute("set local role bursar_owner")
            yield
    except psycopg.errors.LockNotAvailable as error:
        raise MigrationFailed(f"{what} waited too long for a lock", next_step="Run it again") from error


async def _run(conn: Connection, name: str, text: str) -> None:
    """Run a file's statements; afterwards we are the owner again and still in the same transaction."""
    try:
        await conn.execute(text)
    except psycopg.errors.LockNotAvailable:
        raise
    except psycopg.Error as error:
        raise MigrationFailed(f"{name} failed and left nothing behind", why=_explain(error, text)) from error
    if conn.info.transaction_status != TransactionStatus.INTRANS:
        raise MigrationFailed(f"{name} ends the transaction itself", next_step="Take commit and rollback out of it")
    await conn.execute("set local role bursar_owner")


def _explain(error: psycopg.Error, text: str) -> str:
    """The message with its line number in the file, or in the part of it."""
    place = error.diag.statement_position
    lines = text[: int(place) - 1].split("\n") if place else []
    starts = [number for number, line in enumerate(lines) if line.startswith(PART)]
    part = f"{lines[starts[-1]].removeprefix(PART)} " if starts else ""
    line = f" ({part}line {len(lines) - (starts[-1] + 1 if starts else 0)})" if place else ""
    parts = [f"{error}".strip().splitlines()[0] + line, error.diag.message_detail, error.diag.context]
    return "; ".join(part for part in parts if part)
