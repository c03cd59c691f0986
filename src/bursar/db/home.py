"""Where an embedded cluster lives, who owns it, and where its socket is."""

import os
import pwd
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from psycopg.conninfo import make_conninfo

from bursar.db.postgres import reachable
from bursar.errors import BursarError

SERVER_UID: Final = 60_999
"""Who the server runs as when we are root: in no range that systemd or Debian gives out; needs no entry in passwd."""

REACHABLE_BASE: Final = Path("/var/lib/bursar")
"""Where root's clusters go when the data folder is closed to SERVER_UID."""

LONGEST_SOCKET_PATH: Final = 107
"""Bytes of a unix socket's path. Source: unix(7), sun_path less its final zero."""


class HomeNotUsable(BursarError):
    """The folder of the cluster is missing, or another user's."""


@dataclass(frozen=True, slots=True)
class Home:
    """A cluster's folder. uid, gid: who the server runs as."""

    link: Path
    path: Path
    uid: int
    gid: int

    @property
    def data(self) -> Path:
        """The cluster itself (PGDATA)."""
        return self.path / "data"

    @property
    def major(self) -> int | None:
        """Major version that made the cluster; None before there is one."""
        file = self.data / "PG_VERSION"
        return int(file.read_text()) if file.exists() else None

    @property
    def socket_dir(self) -> Path:
        """0700, and short enough for a socket."""
        pointer = self.path / "socket"
        return Path(pointer.read_text()) if pointer.exists() else self.path / "run"

    def dsn(self, user: str, database: str, port: int) -> str:
        return make_conninfo("", host=str(self.socket_dir), port=port, user=user, dbname=database)

    def run_as(self) -> dict[str, Any]:
        """Arguments for subprocess that drop root; none when we are not root."""
        return _as_user(self.uid, self.gid) if os.geteuid() == 0 else {}

    @contextmanager
    def lent_for_initdb(self) -> Iterator[dict[str, Any]]:
        """Arguments for running initdb, which wants a user with a name: root lends the folder to nobody if need be."""
        if os.geteuid() != 0 or _has_name(self.uid):
            yield self.run_as()
            return
        nobody = pwd.getpwnam("nobody")
        self.own(nobody.pw_uid, nobody.pw_gid)
        try:
            yield _as_user(nobody.pw_uid, nobody.pw_gid)
        finally:
            self.own()

    def own(self, uid: int | None = None, gid: int | None = None) -> None:
        """Give everything here to the server's user; needs root, and does nothing without."""
        if os.geteuid() != 0:
            return
        uid, gid = self.uid if uid is None else uid, self.gid if gid is None else gid
        os.chown(self.path, uid, gid)
        for folder, folders, names in os.walk(self.path):
            for name in (*folders, *names):
                os.chown(os.path.join(folder, name), uid, gid, follow_symlinks=False)

    def clear_socket_dir(self) -> None:
        """Remove a socket folder outside of our own."""
        pointer = self.path / "socket"
        if pointer.exists():
            shutil.rmtree(self.socket_dir, ignore_errors=True)
            pointer.unlink()

    def remove(self) -> None:
        """Delete the cluster. The server must not run."""
        self.clear_socket_dir()
        shutil.rmtree(self.path)
        if self.link.is_symlink():
            self.link.unlink()


def find_home(data_dir: Path) -> Home:
    """The home that exists in a data folder.

    Raises:
        HomeNotUsable: it is not there; or we are not root and it is another user's.
    """
    link = data_dir / "postgres"
    if link.is_symlink() and not link.exists():
        raise HomeNotUsable(
            f"There is no database in {link}",
            why=f"It leads to {link.readlink()}, which is not there",
            next_step="Bring that folder back; or remove the link, and an empty database is made",
        )
    if not link.is_dir():
        raise HomeNotUsable(f"There is no database in {link}")
    path = link.resolve()
    data = path / "data"
    owner = (data if data.exists() else path).stat()
    if os.geteuid() == 0:
        if owner.st_uid == 0 or not data.exists():
            return Home(link, path, *_user_for(data_dir))
        return Home(link, path, owner.st_uid, owner.st_gid)
    if owner.st_uid != os.geteuid():
        raise HomeNotUsable(f"The database in {path} belongs to uid {owner.st_uid}", next_step="Start as that user")
    return Home(link, path, os.geteuid(), os.getegid())


def place_home(data_dir: Path) -> Home:
    """The home, made where it is missing; its owner and the socket's folder are put right."""
    link = data_dir / "postgres"
    if not link.exists() and not link.is_symlink():
        _make(link, *_user_for(data_dir))
    home = find_home(data_dir)
    if home.path.stat().st_uid != home.uid or (home.data.exists() and home.data.stat().st_uid != home.uid):
        home.own()
    _place_socket_dir(home)
    return home


def _user_for(data_dir: Path) -> tuple[int, int]:
    """uid and gid for a new cluster: ourselves; as root the folder's owner, unless that is root too."""
    if os.geteuid() != 0:
        return os.geteuid(), os.getegid()
    owner = data_dir.stat()
    return (owner.st_uid, owner.st_gid) if owner.st_uid != 0 else (SERVER_UID, SERVER_UID)


def _make(link: Path, uid: int, gid: int) -> None:
    if reachable(link.parent, uid):
        link.mkdir(mode=0o700)
    else:
        REACHABLE_BASE.mkdir(mode=0o711, parents=True, exist_ok=True)
        link.symlink_to(tempfile.mkdtemp(prefix="cluster-", dir=REACHABLE_BASE))
    if os.geteuid() == 0:
        os.chown(link, uid, gid)


def _place_socket_dir(home: Home) -> None:
    if not _is_private(home.socket_dir, home.uid):
        home.clear_socket_dir()
        if _fits(home.path / "run"):
            (home.path / "run").mkdir(mode=0o700, exist_ok=True)
        else:
            (home.path / "socket").write_text(tempfile.mkdtemp(prefix="bursar-", dir=_short_base(home.uid)))
        if os.geteuid() == 0:
            os.chown(home.socket_dir, home.uid, home.gid)
    assert _fits(home.socket_dir)


def _fits(folder: Path) -> bool:
    return len(os.fsencode(folder / ".s.PGSQL.5432")) <= LONGEST_SOCKET_PATH


def _short_base(uid: int) -> Path:
    base = Path(tempfile.gettempdir())
    return base if _fits(base / "bursar-12345678") and reachable(base, uid) else Path("/tmp")


def _is_private(folder: Path, uid: int) -> bool:
    """A folder, no link, of this user and closed to all others."""
    try:
        found = folder.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == uid and stat.S_IMODE(found.st_mode) == 0o700


def _has_name(uid: int) -> bool:
    try:
        pwd.getpwuid(uid)
    except KeyError:
        return False
    return True


def _as_user(uid: int, gid: int) -> dict[str, Any]:
    return {"user": uid, "group": gid, "extra_groups": []}
