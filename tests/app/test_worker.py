"""The worker ends when it is told to, whatever its jobs do."""

import asyncio
from typing import Any, cast

import pytest

from bursar import worker


async def test_a_job_that_forgets_its_cancellation_keeps_no_worker_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = 0

    async def forgetful(database: Any) -> None:
        nonlocal runs
        runs += 1
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            return  # as a library does that had its answer already

    monkeypatch.setattr(worker, "JOBS", ((0.0, forgetful),))
    work = asyncio.create_task(worker.run(cast(Any, None)))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    work.cancel()
    done, _ = await asyncio.wait([work], timeout=30)
    assert done, "it goes on"
    assert runs == 1
    assert work.cancelled()


async def test_a_job_that_fails_is_run_again_and_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failed, others = 0, asyncio.Event()

    async def failing(database: Any) -> None:
        nonlocal failed
        failed += 1
        if failed == 3:
            others.set()
        raise RuntimeError("broken")

    monkeypatch.setattr(worker, "JOBS", ((0.0, failing),))
    work = asyncio.create_task(worker.run(cast(Any, None)))
    await asyncio.wait_for(others.wait(), 30)
    work.cancel()
    await asyncio.wait([work], timeout=30)
    assert work.cancelled()
