"""A wrong clock for server processes: Python runs this first where the folder is on its path.

The file that BURSAR_TEST_CLOCK names has the seconds by which the clock is wrong; it may change at any moment.
PostgreSQL, which the processes start, keeps its own clock.
"""

import datetime
import os
import time

from bursar import clock

FILE = os.environ["BURSAR_TEST_CLOCK"]
true_time, true_time_ns = time.time, time.time_ns


def wrong_by() -> int:
    """Seconds, as the file says now."""
    with open(FILE, encoding="utf-8") as file:
        return int(file.read() or 0)


time.time = lambda: true_time() + wrong_by()
time.time_ns = lambda: true_time_ns() + wrong_by() * 10**9
clock.now = lambda: datetime.datetime.fromtimestamp(time.time(), datetime.UTC)
