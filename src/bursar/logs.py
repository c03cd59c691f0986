"""Structured logs, on stderr, without secrets: one line per event, as text or as JSON."""

import asyncio
import atexit
import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Final, TextIO

import structlog
from structlog.typing import EventDict, Processor, WrappedLogger

HIDDEN: Final = "[hidden]"
_SECRET_NAMES: Final = re.compile(
    r"authorization|cookie|password|passwd|secret|master_key|api_key$|x-api-key|private|credential|dsn|database_url|"
    r"(^|_)token$|session_token",
    re.IGNORECASE,
)
_SECRET_TEXTS: Final = (
    (re.compile(r"\b(?:bk|bl|bs)_[A-Za-z0-9]{8,}[A-Za-z0-9_]*"), HIDDEN),  # our own keys, links and sessions
    (re.compile(r"\b(?:sk|pk|rk|whsec)[-_][A-Za-z0-9_-]{12,}"), HIDDEN),  # OpenAI, Anthropic, Stripe
    (re.compile(r"\b(Bearer|Basic)\s+[A-Za-z0-9._~+/=-]{8,}", re.IGNORECASE), rf"\1 {HIDDEN}"),
    (re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s:/@]*):[^\s@]+@"), rf"\1:{HIDDEN}@"),  # a password in a URL
    (re.compile(r"(\bpassword\s*=\s*)('[^']*'|\S+)", re.IGNORECASE), rf"\1{HIDDEN}"),
)
_DEPTH: Final = 8
REQUEST_ID: Final[ContextVar[str | None]] = ContextVar("request_id", default=None)
"""Of the request that is answered; every line that is logged meanwhile has it."""

WRITE_SECONDS: Final = 0.05
MOST_LINES: Final = 256


def configure_logs(log_format: str, level: str) -> None:
    """Send our logs and the libraries' through one chain. log_format: console or json."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_request_id,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
        hide_secrets,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        cache_logger_on_first_use=False,
    )
    # In color, for a person who looks on, lines of requests take the long way too.
    is_plain = log_format == "json" or not sys.stderr.isatty()
    handler = _Handler(sys.stderr, RequestLines(log_format, sys.stderr) if is_plain else None)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(log_format)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level.upper())
    for noisy in ("aiohttp.access", "httpx2", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _add_request_id(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    request_id = REQUEST_ID.get()
    if request_id is not None:
        event.setdefault("request_id", request_id)
    return event


def _renderer(log_format: str) -> Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())


class _Handler(logging.StreamHandler[TextIO]):
    """Where everything is logged; with what writes the lines of requests, if they are written apart."""

    def __init__(self, stream: TextIO, request_lines: "RequestLines | None") -> None:
        super().__init__(stream)
        self.request_lines = request_lines


class RequestLines:
    """The lines of requests, in the form of all others, but made and written in one go: there are a great many.

    They are written every WRITE_SECONDS, and at the end of the process.
    """

    def __init__(self, log_format: str, stream: TextIO) -> None:
        self._is_json = log_format == "json"
        self._stream = stream
        self._lines: list[str] = []
        self._second = 0
        self._second_text = ""
        atexit.register(self.write)

    def add(self, logger: str, *, method: str, route: str, status: int, ms: float, request_id: str) -> None:
        """One line. What it tells is ours, and never secret."""
        at = self._now()
        if self._is_json:
            told = {"method": method, "route": route, "status": status, "ms": ms, "event": "request"}
            line = json.dumps({**told, "request_id": request_id, "level": "info", "logger": logger, "timestamp": at})
        else:
            line = (
                f"{at} [info     ] {'request':<30} [{logger}] method={method} ms={ms} request_id={request_id} "
                f"route={route} status={status}"
            )
        self._lines.append(line)
        if len(self._lines) == 1:
            self._write_soon()
        elif len(self._lines) >= MOST_LINES:
            self.write()

    def _now(self) -> str:
        """As every line has it. What stands before the point is made once a second: it takes longer than the rest."""
        second, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if second != self._second:
            self._second = second
            self._second_text = f"{datetime.fromtimestamp(second, UTC):%Y-%m-%dT%H:%M:%S}"
        return f"{self._second_text}.{nanoseconds // 1000:06d}Z"

    def _write_soon(self) -> None:
        try:
            asyncio.get_running_loop().call_later(WRITE_SECONDS, self.write)
        except RuntimeError:  # nobody would come back to it
            self.write()

    def write(self) -> None:
        """All that waits."""
        if self._lines and not self._stream.closed:
            lines, self._lines = self._lines, []
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()


def log_request(log: Any, *, method: str, route: str, status: int, ms: float, request_id: str) -> None:
    """The line of a request that was answered. log: the caller's."""
    root = logging.root
    lines = getattr(root.handlers[0], "request_lines", None) if root.handlers else None
    if lines is None:
        log.info("request", method=method, route=route, status=status, ms=ms, request_id=request_id)
    elif root.level <= logging.INFO:
        lines.add("bursar.asgi", method=method, route=route, status=status, ms=ms, request_id=request_id)


def hide_secrets(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    """Blank out what is named like a secret, and what looks like one inside of any text."""
    return {name: hidden(name, value) for name, value in event.items()}


def hidden(name: str, value: Any, depth: int = _DEPTH) -> Any:
    """A value as it may be logged under a name."""
    if _SECRET_NAMES.search(name) and value is not None and not isinstance(value, bool):
        return HIDDEN
    if isinstance(value, str):
        return hidden_text(value)
    if isinstance(value, bytes):
        return hidden_text(value.decode("utf-8", "replace"))
    if depth == 0:
        return HIDDEN
    if isinstance(value, Mapping):
        return {str(key): hidden(str(key), each, depth - 1) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [hidden("", each, depth - 1) for each in value]
    return value if isinstance(value, int | float | None) else hidden_text(str(value))


def hidden_text(text: str) -> str:
    """Text without what looks like a key, a token or a password."""
    for pattern, replacement in _SECRET_TEXTS:
        text = pattern.sub(replacement, text)
    return text
