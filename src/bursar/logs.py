"""Structured logs, on stderr, without secrets: one line per event, as text or as JSON."""

import logging
import re
import sys
from collections.abc import Mapping
from typing import Any, Final

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


def configure_logs(log_format: str, level: str) -> None:
    """Send our logs and the libraries' through one chain. log_format: console or json."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
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
    handler = logging.StreamHandler(sys.stderr)
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


def _renderer(log_format: str) -> Processor:
    if log_format == "json":
        return structlog.processors.JSONRenderer()
    return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())


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
