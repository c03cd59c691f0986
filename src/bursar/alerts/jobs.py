"""Periodic work of alerts: looking. No rules here."""

from collections.abc import Awaitable, Callable
from typing import Final

from bursar import db
from bursar.alerts.looking import look, look_at_grants

Job = Callable[[db.Database], Awaitable[object]]

JOBS: Final[tuple[tuple[float, Job], ...]] = ((2.0, look), (60.0, look_at_grants))
"""Seconds between runs, and what runs."""
