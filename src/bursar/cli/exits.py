"""How a command ends: the exit code, and what happened, why, and what to do next."""

import re
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, Final

import psycopg
import structlog
import typer

from bursar import db, problems
from bursar.db.embedded import ServerFailed, ServerInUse
from bursar.errors import BursarError
from bursar.problems import Problem

log = structlog.get_logger(__name__)
_NO_TIME: Final = re.compile(r"Input should be a valid datetime.*")
_A_TIME: Final = "It is no date or time such as 2026-12-31 or 2026-12-31T18:00:00."


class Exit(IntEnum):
    """Exit codes of every command."""

    DONE = 0
    FAILED = 1
    WRONG_USAGE = 2
    NOT_PERMITTED = 3
    NOT_FOUND = 4
    CONFLICT = 5
    REFUSED = 6
    PARTLY_DONE = 7
    UNREACHABLE = 8
    INTERRUPTED = 130


_BY_STATUS = {
    400: Exit.WRONG_USAGE,
    401: Exit.NOT_PERMITTED,
    402: Exit.REFUSED,
    403: Exit.NOT_PERMITTED,
    404: Exit.NOT_FOUND,
    409: Exit.CONFLICT,
    412: Exit.CONFLICT,
    422: Exit.WRONG_USAGE,
    429: Exit.REFUSED,
    503: Exit.UNREACHABLE,
}


def exit_code_of(error: BaseException) -> Exit:
    """The code for a command that ended with this error."""
    match _declared(error):
        case Problem() as problem:
            return _BY_STATUS.get(problem.status, Exit.FAILED)
        case db.NoRow():
            return Exit.NOT_FOUND
        case ServerFailed() | ServerInUse() | psycopg.OperationalError() | ConnectionError():
            return Exit.UNREACHABLE
        case other if _is_usage(other):
            return Exit.WRONG_USAGE
    return Exit.FAILED


def explain(error: Exception) -> None:
    """Say on stderr what happened, why, and what to do next; the whole trace only of a fault that is ours."""
    for line in _lines(_declared(error)):
        typer.echo(line, err=True)


def _declared(error: BaseException) -> BaseException:
    """A refusal that was raised in SQL is the Problem that declares it."""
    return (problems.from_database(error) or error) if isinstance(error, psycopg.Error) else error


def _lines(error: BaseException) -> Iterator[str]:
    match error:
        case Problem():
            yield _sentence(error.title, error.detail)
            yield from (f"  {each.pointer}: {each.detail}" for each in error.errors)
            yield from (f"  {name}: {value}" for name, value in (error.why or {}).items())
            yield f"  code: {error.code}"
        case BursarError():
            yield f"{error.what}."
            if error.why:
                yield f"Why: {error.why}"
            if error.next_step:
                yield f"Next: {error.next_step}"
        case psycopg.OperationalError():
            yield "The database does not answer."
            yield f"Why: {str(error).strip()}"
            yield "Next: bursar db status"
        case other if _is_usage(other):
            yield from _usage_lines(other)
        case _:
            log.error("a fault of the program", exc_info=error)
            yield f"Something went wrong here: {type(error).__name__}: {error}"


def _sentence(title: str, detail: str) -> str:
    """What was refused and why, without saying the same twice."""
    if not detail or detail.lower() == title.lower():
        return f"{title}."
    return detail[0].upper() + detail[1:] if detail.lower().startswith(title.lower()) else f"{title}: {detail}"


def _is_usage(error: BaseException) -> bool:
    """Typer's own errors about arguments; their module is private, what they offer is not."""
    return callable(getattr(error, "format_message", None))


def _usage_lines(error: Any) -> Iterator[str]:
    if not error.format_message():
        return  # the help was shown in place of a message
    context = getattr(error, "ctx", None)
    if context is not None:
        yield str(context.get_usage())
        yield f"Try '{context.command_path} --help' for help."
    yield f"Error: {_NO_TIME.sub(_A_TIME, error.format_message())}"
