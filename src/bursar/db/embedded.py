"""The embedded PostgreSQL: initialized, supervised and stopped by us.

Several processes may use one data folder at once. Each holds a shared lock on `postgres.users`; the one that holds
`postgres.owner` supervises the server, and when it goes another takes over. The locks are the kernel's (flock), so
that a killed process leaves none behind. The last user stops the server.

    <data_dir>/postgres.owner, postgres.users    lock files; the supervisor's pid is in the first
    <data_dir>/postgres/                         the server's home, 0700, owned by the server's user
        data/                                    the cluster
        run/                                     the socket's folder, or `socket`, a file that names a shorter one
        postgres.log
        programs-…/                              copy of the programs, where the server's user cannot reach them

As root the server runs as an unprivileged uid. Where that uid cannot reach <data_dir> (below a 0700 home, say),
`postgres` is a link to a folder that it can reach. The mode of a folder that we did not make is never changed.
"""

import atexit
import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import IO, Final

import psycopg
import structlog
from psycopg import sql

from bursar.db.home import Home, find_home, place_home
from bursar.db.postgres import Programs, copy_programs, find_postgres, reachable
from bursar.db.processes import PID_FILE, Postmaster, is_alive, processes_in, read_pid_file
from bursar.errors import BursarError
from bursar.settings import make_data_dir

log = structlog.get_logger(__name__)

DATABASE: Final = "bursar"
SUPERUSER: Final = "postgres"
PORT: Final = 5432  # only names the socket's file; there is no TCP
START_SECONDS: Final = 120.0  # after a crash it reads its log first
LEFT_OVER_SECONDS: Final = 20.0
STOP_SECONDS: Final = 60.0
OWNER_POLL_SECONDS: Final = 0.1
USER_POLL_SECONDS: Final = 0.5
LONGEST_BACK_OFF_SECONDS: Final = 5.0
LOG_BYTES: Final = 10_000_000

OPTIONS: Final[Mapping[str, str]] = {
    "listen_addresses": "",
    "port": str(PORT),
    "unix_socket_permissions": "0700",
    "max_connections": "200",
    "timezone": "UTC",
    "log_timezone": "UTC",
    "log_line_prefix": "%m [%p] %q%u@%d ",
    "lc_messages": "C",
    "jit": "off",  # plans here are small; compiling them costs more than running them
}


class ServerFailed(BursarError):
    """The embedded server does not start."""


class ServerInUse(BursarError):
    """Another process holds the data folder."""


class EmbeddedServer:
    """One cluster in one data folder. Blocking; threads of this object only watch.

    options: further server settings (tests switch fsync off).
    """

    def __init__(self, data_dir: Path, *, pg_bin: Path | None = None, options: Mapping[str, str] | None = None) -> None:
        self.data_dir = data_dir.absolute()
        self._pg_bin = pg_bin
        self._options = {**OPTIONS, **(options or {})}
        self._users: IO[str] | None = None
        self._owner: IO[str] | None = None
        self._postmaster: Postmaster | None = None
        self._watcher: threading.Thread | None = None
        self._stopping = threading.Event()

    @property
    def is_owner(self) -> bool:
        """Whether this process supervises the server (and not another that shares the folder)."""
        return self._owner is not None

    @property
    def pid(self) -> int | None:
        """The server's process."""
        found = read_pid_file(self.home.data)
        return found.pid if found else None

    @cached_property
    def home(self) -> Home:
        """Where the cluster is."""
        return find_home(self.data_dir)

    @property
    def dsn(self) -> str:
        """Connection string of the superuser; stays the same over restarts."""
        return self._dsn(DATABASE)

    def start(self) -> None:
        """Start the server, or attach to the one that another process supervises in this folder.

        Raises:
            ServerFailed: initdb or postgres ends; the last lines of its log are in `why`.
            ServerInUse: another process holds the folder, and its server does not answer.
        """
        assert self._users is None, "already started"
        self._stopping.clear()
        self._users = self._open_lock("postgres.users")
        try:
            fcntl.flock(self._users, fcntl.LOCK_SH)
            self._own_or_attach()
        except BaseException as error:
            if self.is_owner:
                self._end_postmaster()
            self._release()
            if isinstance(error, PermissionError):
                raise ServerFailed(f"The database in {self.data_dir} may not be set up", why=str(error)) from error
            raise
        atexit.register(self.stop)
        self._watcher = threading.Thread(target=self._watch, name="postgres supervisor", daemon=True)
        self._watcher.start()

    def stop(self) -> bool:
        """Let go of the server; whether it was stopped, as it is when nobody else uses it. Can be called twice."""
        if self._users is None:
            return False
        atexit.unregister(self.stop)
        self._stopping.set()
        if self._watcher is not None:
            self._watcher.join()
        try:
            return self._stop_if_last()
        finally:
            self._release()

    def remove(self) -> None:
        """Delete the cluster and everything in it. For a server that is not started here.

        Raises:
            ServerInUse: some process uses it.
        """
        assert self._users is None, "stop it first"
        self._users = self._open_lock("postgres.users")
        try:
            if not _try_lock(self._users):
                raise ServerInUse(f"The database in {self.data_dir} is in use", why=self._holder())
            link = self.data_dir / "postgres"
            if link.exists():
                self._adopt_running()
                self._end_postmaster()
                self.home.remove()
            elif link.is_symlink():  # to a cluster that is gone already
                link.unlink()
        finally:
            self._release()

    # Locks

    def _open_lock(self, name: str) -> IO[str]:
        make_data_dir(self.data_dir)
        path = self.data_dir / name
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            if os.geteuid() == 0:
                os.chown(path, self.data_dir.stat().st_uid, -1)  # so that its owner can come back without root
        except PermissionError as error:
            raise ServerInUse(f"The data folder {self.data_dir} belongs to another user", why=str(error)) from error
        return os.fdopen(descriptor, "r+")

    def _try_to_own(self) -> bool:
        lock = self._open_lock("postgres.owner")
        if not _try_lock(lock):
            lock.close()
            return False
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        self._owner = lock
        return True

    def _holder(self) -> str:
        with contextlib.suppress(OSError):
            pid = (self.data_dir / "postgres.owner").read_text().strip()
            if pid:
                return f"Process {pid} supervises it"
        return "Another process supervises it"

    def _release(self) -> None:
        """Owner first: who then comes past `users` finds the place free."""
        for lock in (self._owner, self._users):
            if lock is not None:
                lock.close()
        self._owner = self._users = None
        self._postmaster = None

    # Starting

    def _own_or_attach(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._try_to_own():
            if self._answers(DATABASE):
                return
            if time.monotonic() > deadline:
                raise ServerInUse(f"The database in {self.data_dir} does not answer", why=self._holder())
            time.sleep(0.02)
        self._bring_up()

    def _answers(self, database: str) -> bool:
        if not (self.data_dir / "postgres").exists():
            return False
        found = find_home(self.data_dir)
        running = read_pid_file(found.data)
        if running is None or not running.is_ready:
            return False
        try:
            psycopg.connect(found.dsn(SUPERUSER, database, PORT), connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def _bring_up(self) -> None:
        """As the owner: adopt a server that runs already, or start one."""
        self.__dict__["home"] = place_home(self.data_dir)
        if not self._adopt_running():
            self._clean_up()
            self._launch()
        self._ensure_database()

    def _adopt_running(self) -> bool:
        """Take over a server whose supervisor was killed; its clients notice nothing."""
        found = read_pid_file(self.home.data)
        if found is None or not is_alive(found.pid, self.home.data):
            return False
        self._postmaster = Postmaster(found.pid, self.home.data)
        deadline = time.monotonic() + START_SECONDS
        while self._wait_until_ready(self._postmaster) and time.monotonic() < deadline:
            if self._answers("postgres"):  # it may say "ready" and be ending
                return True
            time.sleep(0.02)
        return False

    def _clean_up(self) -> None:
        """After a crash: end what outlived the postmaster; drop lock files that name a zombie or a stranger."""
        deadline = time.monotonic() + LEFT_OVER_SECONDS
        while left := processes_in(self.home.data):
            late = time.monotonic() > deadline
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if late else signal.SIGQUIT)
            time.sleep(0.02)
        socket = self.home.socket_dir / f".s.PGSQL.{PORT}"
        for path in (self.home.data / PID_FILE, socket, socket.with_name(f"{socket.name}.lock")):
            path.unlink(missing_ok=True)

    def _launch(self) -> None:
        programs = self._programs()
        if not self.home.data.exists():
            self._initialize(programs)
        command = [str(programs.bin / "postgres"), "-D", str(self.home.data)]
        for name, value in {**self._options, "unix_socket_directories": str(self.home.socket_dir)}.items():
            command += ["-c", f"{name}={value}"]
        with self._open_log() as output:
            child = subprocess.Popen(  # its own session: Ctrl-C in our terminal is for us alone
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.home.data,
                env=_environment(),
                start_new_session=True,
                umask=0o077,
                **self.home.run_as(),
            )
        self._postmaster = Postmaster(child.pid, self.home.data, child)
        if not self._wait_until_ready(self._postmaster):
            raise ServerFailed("PostgreSQL did not start", why=self._last_log_lines())

    def _wait_until_ready(self, postmaster: Postmaster) -> bool:
        deadline = time.monotonic() + START_SECONDS
        while postmaster.is_alive() and time.monotonic() < deadline:
            found = read_pid_file(self.home.data)
            if found is not None and found.is_ready and found.pid == postmaster.pid:
                return True
            time.sleep(0.005)
        return False

    def _ensure_database(self) -> None:
        with psycopg.connect(self._dsn("postgres"), autocommit=True) as conn:
            if conn.execute("select from pg_database where datname = %s", [DATABASE]).fetchone() is None:
                conn.execute(sql.SQL("create database {}").format(sql.Identifier(DATABASE)))

    def _programs(self) -> Programs:
        """Programs of the cluster's own major version, where its user can run them."""
        programs = find_postgres(self._pg_bin, major=self.home.major)
        if reachable(programs.bin, self.home.uid):
            return programs
        copied = copy_programs(programs, self.home.path / f"programs-{programs.version}")
        self.home.own()
        return copied

    def _initialize(self, programs: Programs) -> None:
        """initdb into a draft that becomes the cluster in one rename, so that a broken-off start is begun anew."""
        draft = self.home.path / "data.draft"
        shutil.rmtree(draft, ignore_errors=True)
        command = [str(programs.bin / "initdb"), "-D", str(draft), "-U", SUPERUSER, "-A", "trust", "-E", "UTF8"]
        command += ["--data-checksums", "--no-instructions", *_locale_options(programs.major)]
        with self.home.lent_for_initdb() as user:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd="/", env=_environment(), umask=0o077, check=False, **user
            )
        if done.returncode != 0:
            raise ServerFailed("initdb failed", why=(done.stderr or done.stdout).strip()[-2000:])
        # Whoever passes the 0700 folder of the socket is this user or root; there is no other way in.
        (draft / "pg_hba.conf").write_text("local all all trust\n")
        draft.rename(self.home.data)
        self.home.own()

    # While it runs

    def _watch(self) -> None:
        """Until stop(): restart a server that ended, take over from a supervisor that ended."""
        back_off = OWNER_POLL_SECONDS
        while not self._stopping.wait(OWNER_POLL_SECONDS if self.is_owner else USER_POLL_SECONDS):
            try:
                self._keep_up()
                back_off = OWNER_POLL_SECONDS
            except Exception:
                log.exception("the embedded server cannot be started; trying again", seconds=back_off)
                self._stopping.wait(back_off)
                back_off = min(2 * back_off, LONGEST_BACK_OFF_SECONDS)

    def _keep_up(self) -> None:
        if not self.is_owner and not self._try_to_own():
            return
        if self._postmaster is None or not self._postmaster.is_alive():
            if self._postmaster is not None:
                log.warning("the embedded server ended; starting it again", pid=self._postmaster.pid)
            self._bring_up()

    # Stopping

    def _stop_if_last(self) -> bool:
        assert self._users is not None
        if not _try_lock(self._users):
            return False
        while not self.is_owner and not self._try_to_own():
            time.sleep(0.01)  # the supervisor is on its way out too; only users hold that lock
        if self._postmaster is None:
            self._adopt_running()
        self._end_postmaster()
        self.home.clear_socket_dir()
        return True

    def _end_postmaster(self) -> None:
        """SIGINT is the fast way: sessions are cut, what was committed is written. SIGQUIT if that takes too long."""
        if self._postmaster is None:
            return
        self._postmaster.send(signal.SIGINT)
        if not self._postmaster.wait(STOP_SECONDS):
            log.warning("the embedded server does not end; cutting it off", pid=self._postmaster.pid)
            self._postmaster.send(signal.SIGQUIT)
            self._postmaster.wait(STOP_SECONDS)

    # Small things

    def _dsn(self, database: str) -> str:
        return self.home.dsn(SUPERUSER, database, PORT)

    def _open_log(self) -> IO[bytes]:
        path = self.home.path / "postgres.log"
        if path.exists() and path.stat().st_size > LOG_BYTES:
            path.replace(path.with_suffix(".log.1"))
        output = path.open("ab")
        os.chown(output.fileno(), self.home.uid, self.home.gid)
        return output

    def _last_log_lines(self) -> str:
        return "\n".join((self.home.path / "postgres.log").read_text(errors="replace").splitlines()[-15:])


def _try_lock(file: IO[str]) -> bool:
    """Take an exclusive lock if nobody holds one."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _locale_options(major: int) -> list[str]:
    """The same order and case rules on every machine, whatever its C library."""
    if major >= 17:
        return ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    return ["--locale=C"]


def _environment() -> dict[str, str]:
    """What the server may know of our environment: no secrets, no language."""
    kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "TMPDIR") if name in os.environ}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}
