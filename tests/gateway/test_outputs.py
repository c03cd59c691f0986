"""What is known of earlier outputs, and how it is read."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bursar import db
from bursar.clock import uuid7
from bursar.gateway.outputs import Outputs


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise in the main thread, also where an event loop gives nobody a turn."""

    def ring(_: int, __: FrameType | None) -> None:
        raise TimeoutError("the event loop stood still")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def test_who_asks_in_the_moment_at_which_a_reading_ends_does_not_hold_everybody_up(database: db.Database) -> None:
    outputs, organization_id = Outputs(database), uuid7()
    outputs.read_soon(organization_id)
    reading = outputs._reading[organization_id]
    await asyncio.wait({reading})
    outputs._reading[organization_id] = reading  # as it is until the loop has called back
    asyncio.get_running_loop().call_later(0.05, outputs._reading.pop, organization_id)
    with _at_most(10):
        await outputs.read(organization_id)
    await outputs.close()
