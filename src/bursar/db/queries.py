"""Named statements: each capability's queries.sql, read once."""

import re
from importlib.resources import files

_HEAD = re.compile(r"^-- name: *([a-z_][a-z0-9_]*) *$", re.MULTILINE)


class Queries:
    """The statements of one file as attributes: QUERIES.pool_balance -> str."""

    def __init__(self, package: str, statements: dict[str, str]) -> None:
        self._package = package
        self._statements = statements

    def __getattr__(self, name: str) -> str:
        try:
            return self._statements[name]
        except KeyError:
            raise AttributeError(f"{self._package}/queries.sql has no '-- name: {name}'") from None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all statements, in the order of the file."""
        return tuple(self._statements)

    def __dir__(self) -> list[str]:
        return sorted(self._statements)


def load_queries(package: str, file: str = "queries.sql") -> Queries:
    """Read a file of SQL beside a package: blocks headed `-- name: pool_balance`, parameters as %(name)s."""
    return Queries(package, parse_queries(files(package).joinpath(file).read_text(encoding="utf-8")))


def parse_queries(text: str) -> dict[str, str]:
    """Statements by name.

    Raises:
        ValueError: a name comes twice, or SQL stands before the first name.
    """
    before, *parts = _HEAD.split(text)
    if any(line.strip() and not line.startswith("--") for line in before.splitlines()):
        raise ValueError("SQL before the first '-- name:'")
    statements: dict[str, str] = {}
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        if name in statements:
            raise ValueError(f"two statements are named {name!r}")
        statements[name] = body.strip().rstrip(";")
    return statements
