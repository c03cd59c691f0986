"""The data folder of a demo: its mark, what is in it, and making it empty again.

    <data_dir>/demo.json    the mark, 0600: it holds the texts of the demo's keys, which the database does not

A folder that has anything in it and no mark is somebody's: it is neither seeded nor reset.
"""

import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from bursar.db.embedded import EmbeddedServer
from bursar.demo.seeding import Access, SeededCompany
from bursar.errors import BursarError
from bursar.settings import make_data_dir

MARK: Final = "demo.json"
FORMAT: Final = "bursar demo 1"
_OURS: Final = (MARK, "master.key", "postgres.owner", "postgres.users")


class NotADemo(BursarError):
    """The folder holds something that is no demo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Demo:
    """What a demo's folder says of itself. as_of: the instant up to which its past was told."""

    as_of: datetime
    is_complete: bool
    companies: tuple[SeededCompany, ...] = ()


def read(data_dir: Path) -> Demo | None:
    """The demo in a folder; None where the folder is empty or missing.

    Raises:
        NotADemo
    """
    path = data_dir / MARK
    if not path.exists():
        if data_dir.exists() and any(data_dir.iterdir()):
            raise NotADemo(
                f"{data_dir} holds something that is no demo",
                why=f"It has no {MARK}",
                next_step="Give the demo a folder of its own: --data-dir …",
            )
        return None
    try:
        document = json.loads(path.read_text())
        if document["format"] != FORMAT:
            raise ValueError(f"its format is {document['format']!r}")
        return Demo(
            as_of=datetime.fromisoformat(document["as_of"]),
            is_complete=document["is_complete"],
            companies=tuple(_company(each) for each in document["companies"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise NotADemo(f"{path} is none of this version's", why=str(error)) from error


def write(data_dir: Path, *, as_of: datetime, companies: Sequence[SeededCompany] | None) -> Demo:
    """Mark a folder as a demo's; companies: None until it is complete. Whole or not at all."""
    demo = Demo(as_of=as_of, is_complete=companies is not None, companies=tuple(companies or ()))
    make_data_dir(data_dir)
    draft = data_dir / f".{MARK}.{secrets.token_hex(8)}"
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump({"format": FORMAT, **asdict(demo)}, file, default=str, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    draft.rename(data_dir / MARK)
    return demo


def remove(data_dir: Path) -> None:
    """Delete the demo of a folder, and nothing else. The mark goes last.

    Raises:
        NotADemo
        ServerInUse: a process serves it.
    """
    if read(data_dir) is None:
        return
    EmbeddedServer(data_dir).remove()
    for draft in [*data_dir.glob(f".{MARK}.*"), *data_dir.glob(".master.key.*")]:
        draft.unlink(missing_ok=True)
    for name in reversed(_OURS):
        (data_dir / name).unlink(missing_ok=True)


def _company(document: dict[str, Any]) -> SeededCompany:
    return SeededCompany(
        **{
            **document,
            "organization_id": UUID(document["organization_id"]),
            "admin": _access(document["admin"]),
            "member": _access(document["member"]),
        }
    )


def _access(document: dict[str, Any]) -> Access:
    return Access(
        email=document["email"],
        user_id=UUID(document["user_id"]),
        home_organization_id=UUID(document["home_organization_id"]),
        api_key=document["api_key"],
    )
