"""The overview as JSON, and each of its tables as CSV: the answer of the same handler as the page's."""

import csv
import io
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Annotated, Any, Final

from fastapi import APIRouter, Query, Request, Response

from bursar import clock
from bursar.identity.guards import NotPermitted, database_of, needs
from bursar.identity.organizations import OrganizationNotFound
from bursar.identity.principals import Principal
from bursar.identity.roles import Permission
from bursar.identity.sessions import NotSignedIn
from bursar.problems import FieldError, Problem, documents
from bursar.usage.answers import OverviewAnswer, PeriodAnswer, TrendAnswer, row_answer
from bursar.usage.breakdowns import TOP, Breakdown
from bursar.usage.figures import Overview, overview, snapshot

router = APIRouter(prefix="/api/v1/organizations", tags=["usage"])

MOST_ROWS: Final = 100
_BREAKDOWN_COLUMNS: Final = (
    *("kind", "id", "name", "detail", "state", "count", "credits", "money", "currency", "share_percent"),
    *("requests", "period_start", "period_end", "zone", "as_of"),
)
_DAY_COLUMNS: Final = (
    *("day", "starts_at", "ends_at", "is_partial", "credits", "money", "currency", "requests", "zone", "as_of"),
)
# A spreadsheet takes a cell that begins so for a formula, and runs it.
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r")


class Table(StrEnum):
    """Tables of an overview that can be had as CSV."""

    PEOPLE = "people"
    KEYS = "keys"
    MODELS = "models"
    DEPARTMENTS = "departments"
    DAYS = "days"


class TableNeeded(Problem):
    """CSV holds one table; which one has to be said."""

    status, code, title = 422, "table_needed", "Which table is wanted"


_REFUSALS: Final = documents(NotSignedIn, NotPermitted, OrganizationNotFound, TableNeeded)
_CSV: Final[dict[str, Any]] = {"content": {"text/csv": {}}, "description": "One table, where text/csv is accepted"}
Top = Annotated[int, Query(ge=1, le=MOST_ROWS, description="How many rows a breakdown names")]
Reader = Annotated[Principal, needs(Permission.USAGE_READ)]


@router.get("/{org}/overview", response_model=OverviewAnswer, responses={200: _CSV, **_REFUSALS})
async def read_overview(
    request: Request, principal: Reader, table: Table | None = None, top: Top = TOP
) -> OverviewAnswer | Response:
    """The organization's figures; with `table` and `Accept: text/csv` one of its tables as CSV."""
    found = await overview_for(request, principal, top)
    if "text/csv" in request.headers.get("accept", ""):
        return csv_answer(found, table)
    return OverviewAnswer.of(found)


@router.get("/{org}/overview.csv", response_class=Response, responses={200: _CSV, **_REFUSALS})
async def read_overview_csv(
    request: Request, principal: Reader, table: Table | None = None, top: Top = TOP
) -> Response:
    """One table of the overview as CSV (RFC 4180)."""
    return csv_answer(await overview_for(request, principal, top), table)


async def overview_for(request: Request, principal: Principal, top: int = TOP) -> Overview:
    """The overview as one principal may see it, now: the one handler of page, JSON and CSV."""
    async with snapshot(database_of(request), principal.organization_id) as conn:
        return await overview(
            conn,
            organization_id=principal.organization_id,
            now=clock.now(),
            with_margin=principal.may(Permission.MARGIN_READ),
            top=top,
        )


def csv_answer(found: Overview, table: Table | None) -> Response:
    """One table of an overview as a file.

    Raises:
        TableNeeded
    """
    if table is None:
        names = ", ".join(Table)
        raise TableNeeded(f"table is one of {names}", errors=[FieldError("table", f"one of {names}")])
    name = f"{found.organization.slug}-{table}-{found.local_as_of:%Y-%m-%d}.csv"
    headers = {"Content-Disposition": f'attachment; filename="{name}"', "Cache-Control": "no-store, private"}
    rows = _day_rows(found) if table is Table.DAYS else _breakdown_rows(found, getattr(found, table))
    return Response(as_csv(rows), media_type="text/csv; charset=utf-8; header=present", headers=headers)


def as_csv(rows: Iterable[Sequence[object]]) -> str:
    """RFC 4180; text that a spreadsheet would run is made text by an apostrophe."""
    text = io.StringIO()
    csv.writer(text).writerows([_cell(value) for value in row] for row in rows)
    return text.getvalue()


def _cell(value: object) -> object:
    return f"'{value}" if isinstance(value, Text) and value.startswith(_FORMULA_STARTS) else value


class Text(str):
    """A cell that somebody could have named; numbers keep their sign."""

    __slots__ = ()


def _breakdown_rows(found: Overview, breakdown: Breakdown) -> Iterable[Sequence[object]]:
    yield _BREAKDOWN_COLUMNS
    period = PeriodAnswer.of(found.month, found.local_as_of)
    for row in breakdown.rows:
        answer = row_answer(breakdown.table, row)
        yield (
            *(answer.kind, answer.id, Text(answer.name), Text(answer.detail or ""), answer.state, answer.count),
            *(answer.charged.amount, answer.money.amount, answer.money.unit, answer.share_percent, answer.requests),
            *(period.starts_at.isoformat(), period.ends_at.isoformat(), found.organization.zone),
            found.local_as_of.isoformat(),
        )


def _day_rows(found: Overview) -> Iterable[Sequence[object]]:
    """The last columns are the models of the chart, in credits."""
    answer = TrendAnswer.of(found.trend, found.local_as_of)
    yield (
        *_DAY_COLUMNS,
        *(Text(each.label) for each in found.trend.series),
    )
    for day in answer.days:
        yield (
            *(day.day.isoformat(), day.starts_at.isoformat(), day.ends_at.isoformat(), str(day.is_partial).lower()),
            *(day.charged.amount, day.money.amount, day.money.unit, day.requests),
            *(found.organization.zone, found.local_as_of.isoformat()),
            *(part.amount for part in day.parts),
        )
