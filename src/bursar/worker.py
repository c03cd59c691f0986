"""The worker: periodic jobs of every capability, in the server's process or in one of its own.

Any number of workers may run: each job is safe to run twice at once. A job that fails is logged and runs again at its
next turn; the others go on.
"""

import asyncio
from typing import Final

import structlog
from prometheus_client import Counter

from bursar import db
from bursar.alerts import jobs as alerts_jobs
from bursar.audit import jobs as audit_jobs
from bursar.credits import jobs as credits_jobs
from bursar.gateway import jobs as gateway_jobs
from bursar.outbox import jobs as outbox_jobs

JOBS: Final = (*audit_jobs.JOBS, *credits_jobs.JOBS, *gateway_jobs.JOBS, *outbox_jobs.JOBS, *alerts_jobs.JOBS)
FAILURES = Counter("bursar_job_failures_total", "Runs of periodic jobs that failed", ["job"])

log = structlog.get_logger(__name__)


async def run(database: db.Database) -> None:
    """Run every job again and again until cancelled."""
    async with asyncio.TaskGroup() as group:
        for seconds, job in JOBS:
            group.create_task(_repeat(database, seconds, job), name=job.__name__)


async def _repeat(database: db.Database, seconds: float, job: credits_jobs.Job) -> None:
    while True:
        try:
            await job(database)
        except Exception:
            FAILURES.labels(job.__name__).inc()
            log.exception("job failed", job=job.__name__)
        # A library that is cancelled just as it has its answer may give the answer and forget the cancellation
        # (asyncio.wait_for did until Python 3.12): who asked for our end would wait for ever.
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise asyncio.CancelledError
        await asyncio.sleep(seconds)
