"""Room on the disk of the embedded database. What is left of it last belongs to what must still be booked.

PostgreSQL ends when it cannot write its log any more, and then nothing can be read either. So no new work is taken once
little is left: calls that run are settled, and everything can still be read.
"""

import os
import time
from pathlib import Path
from typing import Final

import structlog

RESERVE_BYTES: Final = 96 * 1024 * 1024
"""Six files of PostgreSQL's log. What runs when the last of other room goes needs far less to end."""

LOOK_EVERY_SECONDS: Final = 0.2

log = structlog.get_logger(__name__)


class Space:
    """The file system that a folder is on. None: a database elsewhere, whose disk is its operator's."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._looked_at = float("-inf")
        self._is_short = False

    def is_short(self) -> bool:
        """Whether less than the reserve is left; as of a moment ago."""
        at = time.monotonic()
        if self._folder is not None and at >= self._looked_at + LOOK_EVERY_SECONDS:
            self._looked_at = at
            self._look(self._folder)
        return self._is_short

    def _look(self, folder: Path) -> None:
        found = os.statvfs(folder)
        left = found.f_bavail * found.f_frsize
        was_short, self._is_short = self._is_short, left < RESERVE_BYTES
        if self._is_short and not was_short:
            log.error("the database's disk is full; nothing new is taken on", folder=str(folder), bytes_left=left)
        elif was_short and not self._is_short:
            log.warning("the database's disk has room again", folder=str(folder), bytes_left=left)
