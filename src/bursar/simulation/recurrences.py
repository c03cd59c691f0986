"""When a recurring grant comes: the anchor from which its schedule counts, and the first time after it begins."""

import calendar
from datetime import UTC, datetime, timedelta
from typing import Final
from zoneinfo import ZoneInfo

from bursar.simulation.scenario import Recurrence

_MONTHS: Final = {"month": 1, "year": 12}
_DAYS: Final = {"day": 1, "week": 7}


def occurrences(recurrence: Recurrence, begins: datetime, zone_name: str) -> tuple[datetime, datetime]:
    """(anchor, first): an occurrence that is not after `begins`, and the first that is not before it.

    Instants are aware. Where the told anchor lies later it is moved back by whole intervals, to a month that has its
    day. Clocks are those of the zone.
    """
    zone = ZoneInfo(zone_name)
    anchor = recurrence.anchor or begins
    steps = 0
    while _moved(anchor, recurrence, zone, steps) > begins or not _keeps_day(anchor, recurrence, zone, steps):
        steps -= 1
    anchor, steps = _moved(anchor, recurrence, zone, steps), 0
    while _moved(anchor, recurrence, zone, steps) < begins:
        steps += 1
    return anchor, _moved(anchor, recurrence, zone, steps)


def _moved(anchor: datetime, recurrence: Recurrence, zone: ZoneInfo, steps: int) -> datetime:
    """So many intervals later, by the clocks of the zone; the last day of a month that has no such day."""
    if steps == 0:
        return anchor
    local = anchor.astimezone(zone)
    if recurrence.interval in _DAYS:
        moved = local.replace(tzinfo=None) + timedelta(days=_DAYS[recurrence.interval] * recurrence.count * steps)
    else:
        months = local.year * 12 + local.month - 1 + _MONTHS[recurrence.interval] * recurrence.count * steps
        year, month = months // 12, months % 12 + 1
        day = min(local.day, calendar.monthrange(year, month)[1])
        moved = local.replace(tzinfo=None, year=year, month=month, day=day)
    return moved.replace(tzinfo=zone).astimezone(UTC)


def _keeps_day(anchor: datetime, recurrence: Recurrence, zone: ZoneInfo, steps: int) -> bool:
    if recurrence.interval in _DAYS:
        return True
    return _moved(anchor, recurrence, zone, steps).astimezone(zone).day == anchor.astimezone(zone).day
