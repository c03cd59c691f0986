"""Looking at server processes: which are alive, which are zombies, which belong to a cluster."""

import contextlib
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

PID_FILE = "postmaster.pid"


@dataclass(frozen=True, slots=True)
class PidFile:
    """postmaster.pid. Source: PostgreSQL documentation, 'Database File Layout'; src/include/utils/pidfile.h."""

    pid: int
    is_ready: bool


def read_pid_file(data: Path) -> PidFile | None:
    """None when there is none or it is not whole yet."""
    try:
        lines = (data / PID_FILE).read_text(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    if not lines or not lines[0].strip().isdigit():
        return None
    return PidFile(int(lines[0]), len(lines) > 7 and lines[7].strip() == "ready")


def is_alive(pid: int, data: Path) -> bool:
    """Whether this process runs and is a server of this cluster: no zombie, no stranger who got the number later."""
    if sys.platform == "linux":
        return not _is_zombie(pid) and _serves(pid, data)
    answer = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(answer) and not answer.startswith("Z") and "postgres" in answer


def processes_in(data: Path) -> list[int]:
    """Server processes whose working folder is the cluster, the postmaster or backends that outlived it.

    Linux only; elsewhere the list is empty and the server's own interlock must do.
    """
    if sys.platform != "linux":
        return []
    pids = [int(each) for each in os.listdir("/proc") if each.isdigit()]
    return [pid for pid in pids if _serves(pid, data)]


def _is_zombie(pid: int) -> bool:
    """Also true of a process that is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return text.rpartition(")")[2].split()[0] in ("Z", "X")


def _serves(pid: int, data: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/cwd")) == data and Path(f"/proc/{pid}/comm").read_text() == "postgres\n"
    except OSError:  # gone, a zombie, or another user's and so not ours
        return False


class Postmaster:
    """The running server: our child, or one that an earlier process of ours left behind."""

    def __init__(self, pid: int, data: Path, child: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._data = data
        self._child = child

    @property
    def is_child(self) -> bool:
        return self._child is not None

    def is_alive(self) -> bool:
        """Reaps the child when it has ended."""
        return self._child.poll() is None if self._child is not None else is_alive(self.pid, self._data)

    def send(self, number: int) -> None:
        """Send a signal; nothing happens when the process is gone."""
        if self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def wait(self, seconds: float) -> bool:
        """Whether it ended within this time."""
        deadline = time.monotonic() + seconds
        while self.is_alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.005)
        return True
