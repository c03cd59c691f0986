"""Everything that is set from outside, read once from the environment; and the master key."""

import hashlib
import hmac
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from bursar.errors import BursarError

SHORTEST_MASTER_KEY = 32
LOWEST = {
    "port": 0,
    "workers": 1,
    "pool_size": 1,
    "lease_seconds": 2,
    "wait_seconds": 0,
    "verify_hours": 0,
    "events_days": 0,
}
"""The least value of each setting that is a number."""
SWITCHES = ("webhooks_http", "webhooks_loopback")
"""Settings that are on or off."""


class SettingError(BursarError):
    """A setting has a value that cannot be used."""


def _setting(variable: str, text: str) -> dict[str, str]:
    """Where a field is read from; `text` is its line in the reference of settings."""
    return {"variable": variable, "help": text}


def default_data_dir(environment: Mapping[str, str]) -> Path:
    """$XDG_DATA_HOME/bursar, else ~/.local/share/bursar."""
    base = environment.get("XDG_DATA_HOME")
    return (Path(base) if base else Path.home() / ".local" / "share") / "bursar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the environment says. Immutable; tests make their own."""

    data_dir: Path = field(metadata=_setting("BURSAR_DATA_DIR", "Folder of the embedded database and the master key"))
    database_url: str | None = field(
        default=None,
        repr=False,
        metadata=_setting(
            "DATABASE_URL",
            "PostgreSQL 15 or later, as a role that may create roles; without it the embedded server is used",
        ),
    )
    pg_bin: Path | None = field(
        default=None,
        metadata=_setting("BURSAR_PG_BIN", "Folder of the PostgreSQL programs for the embedded server"),
    )
    given_master_key: str | None = field(
        default=None,
        repr=False,
        metadata=_setting(
            "BURSAR_MASTER_KEY",
            "Secret of at least 32 characters that everything else is derived from; made in BURSAR_DATA_DIR at first "
            "start where it is not given",
        ),
    )
    host: str = field(default="127.0.0.1", metadata=_setting("BURSAR_HOST", "Address that `bursar serve` listens on"))
    port: int = field(default=8420, metadata=_setting("BURSAR_PORT", "Port that `bursar serve` listens on"))
    workers: int = field(default=1, metadata=_setting("BURSAR_WORKERS", "Number of server processes"))
    pool_size: int = field(
        default=10, metadata=_setting("BURSAR_POOL_SIZE", "Most database connections of one process as bursar_app")
    )
    lease_seconds: int = field(
        default=30,
        metadata=_setting(
            "BURSAR_LEASE_SECONDS",
            "How long a hold outlives the last sign of life of the process that placed it; from 2",
        ),
    )
    wait_seconds: int = field(
        default=10,
        metadata=_setting(
            "BURSAR_WAIT_SECONDS",
            "How long a call waits where only the holds of running calls stand in its way; 0: not at all",
        ),
    )
    litellm_python: Path | None = field(
        default=None,
        metadata=_setting(
            "BURSAR_LITELLM_PYTHON",
            "Interpreter that has LiteLLM, where it is installed apart; this server's otherwise",
        ),
    )
    smtp_url: str | None = field(
        default=None,
        repr=False,
        metadata=_setting(
            "BURSAR_SMTP_URL",
            "Mail server for alerts: smtps://user:password@host (TLS, port 465), smtp+starttls://… (587) or smtp://… "
            "(25, not encrypted); without it no e-mail is sent",
        ),
    )
    mail_from: str = field(
        default="bursar@localhost", metadata=_setting("BURSAR_MAIL_FROM", "Address that alerts are mailed from")
    )
    webhooks_http: bool = field(
        default=False, metadata=_setting("BURSAR_WEBHOOKS_HTTP", "1: webhooks may also go to http:// on port 80")
    )
    webhooks_loopback: bool = field(
        default=False,
        metadata=_setting(
            "BURSAR_WEBHOOKS_LOOPBACK",
            "1: webhooks may go to any port of this machine; for tests and development, never where customers add them",
        ),
    )
    events_days: int = field(
        default=30,
        metadata=_setting(
            "BURSAR_EVENTS_DAYS", "How long events are kept after they were told by webhook and e-mail; 0: for ever"
        ),
    )
    anchor_dir: Path | None = field(
        default=None,
        metadata=_setting(
            "BURSAR_ANCHOR_DIR", "Folder outside the database in which anchors are kept (anchors.jsonl); docs/proof.md"
        ),
    )
    anchor_url: str | None = field(
        default=None,
        repr=False,
        metadata=_setting("BURSAR_ANCHOR_URL", "Address that each anchor is posted to; https, or http on this machine"),
    )
    verify_hours: int = field(
        default=24,
        metadata=_setting("BURSAR_VERIFY_HOURS", "How often the books are verified by themselves; 0: never"),
    )
    log_format: str = field(default="console", metadata=_setting("BURSAR_LOG_FORMAT", "console or json"))
    log_level: str = field(default="info", metadata=_setting("BURSAR_LOG_LEVEL", "debug, info, warning or error"))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ, /, **overrides: Any) -> "Settings":
        """Read every setting; `overrides` (command-line options) win where they are not None.

        Raises:
            SettingError: a number is no number, or a choice is unknown.
        """
        values: dict[str, Any] = {"data_dir": default_data_dir(environment)}
        for each in fields(cls):
            text = environment.get(each.metadata["variable"], "")
            if text:
                values[each.name] = _parse(each.name, each.metadata["variable"], text)
        values.update({name: value for name, value in overrides.items() if value is not None})
        settings = cls(**values)
        settings._check()
        return settings

    def _check(self) -> None:
        if self.log_format not in ("console", "json"):
            raise SettingError(f"BURSAR_LOG_FORMAT is {self.log_format!r}", why="It must be console or json")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise SettingError(f"BURSAR_LOG_LEVEL is {self.log_level!r}", why="It is debug, info, warning or error")
        if self.anchor_url is not None and not _is_safe(self.anchor_url):
            raise SettingError("BURSAR_ANCHOR_URL cannot be used", why="It must begin with https://")
        if self.given_master_key is not None and len(self.given_master_key) < SHORTEST_MASTER_KEY:
            raise SettingError(
                "BURSAR_MASTER_KEY is too short",
                why=f"It has {len(self.given_master_key)} of at least {SHORTEST_MASTER_KEY} characters",
                next_step="Make one with: openssl rand -hex 32",
            )

    @property
    def master_key(self) -> bytes:
        """32 bytes; from BURSAR_MASTER_KEY, else from the file master.key in the data folder, made when absent."""
        text = self.given_master_key or _read_or_make_key(self.data_dir / "master.key")
        return hashlib.sha256(text.strip().encode()).digest()

    def derive(self, purpose: str) -> bytes:
        """A 32-byte key for one purpose; no purpose's key reveals another's or the master key."""
        return hmac.new(self.master_key, purpose.encode(), hashlib.sha256).digest()


def _is_safe(url: str) -> bool:
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and parts.hostname in ("127.0.0.1", "::1", "localhost"))


def make_data_dir(path: Path) -> None:
    """Create the data folder. Root's lets others pass through, since the database runs as another user there."""
    try:
        if not path.exists():
            path.mkdir(parents=True, exist_ok=True)
            path.chmod(0o711 if os.geteuid() == 0 else 0o700)
    except OSError as error:
        raise SettingError(
            f"The data folder {path} cannot be made", why=str(error), next_step="Set BURSAR_DATA_DIR to another one"
        ) from error


def _parse(name: str, variable: str, text: str) -> Any:
    if name in ("data_dir", "pg_bin", "litellm_python", "anchor_dir"):
        return Path(text).expanduser().absolute()
    if name in SWITCHES:
        if text not in ("0", "1"):
            raise SettingError(f"{variable} is {text!r}", why="It must be 0 or 1")
        return text == "1"
    if name in LOWEST:
        lowest = LOWEST[name]
        if not text.isascii() or not text.isdigit() or not lowest <= int(text) <= 65535:
            raise SettingError(f"{variable} is {text!r}", why=f"It must be a whole number from {lowest} to 65535")
        return int(text)
    return text


def _read_or_make_key(path: Path) -> str:
    """The key file's text. Two processes that start at once end with the same key: the first link wins."""
    try:
        return path.read_text()
    except PermissionError as error:
        raise SettingError("The master key cannot be read", why=str(error), next_step="Start as its owner") from error
    except FileNotFoundError:
        make_data_dir(path.parent)
    draft = path.with_name(f".master.key.{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(draft, path)
    except FileExistsError:
        pass
    finally:
        draft.unlink()
    return path.read_text()
