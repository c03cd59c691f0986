"""Refusals: declared once beside the function that raises them, sent as application/problem+json.

Source: RFC 9457. A problem raised in SQL (`raise … using errcode = 'BRnnn'`) becomes the Python class that declares the
same `sqlstate`; the SQL `detail`, when it is a JSON object, becomes the `why`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from http import HTTPStatus
from typing import Any, ClassVar

import psycopg

MEDIA_TYPE = "application/problem+json"

# SQLSTATE classes after which nothing was changed and the same may succeed in a moment: connection, resources,
# shutdown, lock not available, serialization and deadlock.
UNAVAILABLE = ("08", "53", "57", "55", "40")
TAKES_NO_WRITES = "25006"  # a full disk, or a standby


@dataclass(frozen=True, slots=True)
class FieldError:
    """One wrong place in a request. pointer: JSON pointer into the body ('#/amount') or a parameter's name."""

    pointer: str
    detail: str
    code: str = "invalid"


class Problem(Exception):
    """A refusal with a name. Subclasses set status, code and title, and sqlstate when SQL raises it too."""

    status: ClassVar[int] = 500
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Something went wrong here"
    sqlstate: ClassVar[str | None] = None

    _by_sqlstate: ClassVar[dict[str, type["Problem"]]] = {}
    _by_code: ClassVar[dict[str, type["Problem"]]] = {}

    def __init__(
        self,
        detail: str = "",
        *,
        errors: Sequence[FieldError] = (),
        why: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.errors = tuple(errors)
        self.why = dict(why) if why is not None else None
        self.headers = dict(headers or {})

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _declare(Problem._by_code, cls.code, cls)
        if cls.sqlstate is not None:
            _declare(Problem._by_sqlstate, cls.sqlstate, cls)

    def body(self, request_id: str | None = None) -> dict[str, Any]:
        """The JSON document; `request_id` finds the request in the logs."""
        members = {
            "type": f"/problems/{self.code}",
            "title": self.title,
            "status": self.status,
            "code": self.code,
            "detail": self.detail or None,
            "request_id": request_id,
            "errors": [asdict(each) for each in self.errors] or None,
            "why": self.why,
        }
        return {name: value for name, value in members.items() if value is not None}


def _declare(registry: dict[str, type[Problem]], name: str, cls: type[Problem]) -> None:
    """Names are unique, so that a code in a log leads to one class."""
    known = registry.get(name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise TypeError(f"{cls.__qualname__} and {known.__qualname__} both declare {name!r}")
    registry[name] = cls


def declared() -> list[type[Problem]]:
    """Every problem that an imported module declares, by code (for the reference page)."""
    return [Problem._by_code[code] for code in sorted(Problem._by_code)]


def from_database(error: psycopg.Error) -> Problem | None:
    """The declared problem behind a database error; None when it is not one of ours, and so a bug."""
    cls = Problem._by_sqlstate.get(error.sqlstate or "")
    if cls is None:
        return None
    return cls(error.diag.message_primary or "", why=_json_object(error.diag.message_detail))


def _json_object(text: str | None) -> dict[str, Any] | None:
    if not text or not text.startswith("{"):
        return None
    try:
        value = json.loads(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


@contextmanager
def translated() -> Iterator[None]:
    """Inside this block a database error that we declared is raised as its Problem.

    For callers that want to catch `InsufficientCredits` by name; the HTTP and CLI handlers translate by themselves.
    """
    try:
        yield
    except psycopg.Error as error:
        problem = from_database(error)
        if problem is None:
            raise
        raise problem from error


def documents(*problems: type[Problem]) -> dict[int | str, dict[str, Any]]:
    """`responses=` of a route: which problems it answers with, grouped by status."""
    by_status: dict[int | str, dict[str, Any]] = {}
    for problem in problems:
        codes = by_status.get(problem.status, {}).get("description", "")
        by_status[problem.status] = {
            "description": f"{codes}, {problem.code}"
            if codes
            else f"{HTTPStatus(problem.status).phrase}: {problem.code}",
            "content": {MEDIA_TYPE: {}},
        }
    return by_status


class InvalidRequest(Problem):
    """The body or a parameter is not what the route takes; `errors` says where."""

    status, code, title = 422, "invalid_request", "The request is not valid"


class MalformedBody(Problem):
    """The body is no JSON at all, or nested too deep to be read."""

    status, code, title = 400, "malformed_body", "The body cannot be read"


class BodyTooLarge(Problem):
    """The body is larger than this path takes."""

    status, code, title = 413, "body_too_large", "The request body is too large"


class NotFound(Problem):
    """Also for what exists in another organization: foreign and unknown ids answer alike."""

    status, code, title = 404, "not_found", "Not found"
    sqlstate = "BR404"


class WrongMethod(Problem):
    """The path takes other methods; the header Allow names them."""

    status, code, title = 405, "method_not_allowed", "This path takes another method"


class RowsNeverChange(Problem):
    """Something tried to change an append-only row."""

    status, code, title = 409, "append_only", "Rows of this kind are never changed"
    sqlstate = "BR409"


class InternalError(Problem):
    """A fault of ours; nothing is told of it but the request id."""

    status, code, title = 500, "internal_error", "Something went wrong here"


class DatabaseUnavailable(Problem):
    """The database does not answer at the moment; nothing was changed."""

    status, code, title = 503, "database_unavailable", "The database does not answer"


def of_exception(error: Exception) -> Problem | None:
    """The refusal that an error of any kind stands for; None: it is a bug."""
    if isinstance(error, Problem):
        return error
    if isinstance(error, psycopg.Error):
        declared_one = from_database(error)
        if declared_one is not None:
            return declared_one
        if isinstance(error, psycopg.OperationalError) and (error.sqlstate or "08")[:2] in UNAVAILABLE:
            return DatabaseUnavailable(headers={"Retry-After": "2"})
        if error.sqlstate == TAKES_NO_WRITES:
            return DatabaseUnavailable("It takes no writes at the moment", headers={"Retry-After": "5"})
    return None
