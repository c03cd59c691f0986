"""The process of the LiteLLM adapter: started when a provider needs it, watched, started anew when it ends.

It has its own interpreter and memory, and of the environment only what finding programs, certificates and files needs:
no key, no address of the database, no home. Whoever else is on this machine cannot use it, for want of its token.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import structlog
from prometheus_client import Counter

from bursar.gateway import litellm_adapter
from bursar.gateway.litellm_adapter import ADDRESS_HEADER, PROVIDER_HEADER, TOKEN_HEADER, TOKEN_VARIABLE
from bursar.gateway.providers import Provider
from bursar.problems import Problem

PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE")
FIXED: Final = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "LITELLM_TELEMETRY": "False",
    "NO_GCE_CHECK": "true",
    "PYTHONDONTWRITEBYTECODE": "1",
}
START_SECONDS: Final = 60.0
WAIT_SECONDS: Final = 30.0
"""How long a call waits for an adapter that is starting."""
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0
LONG_LIFE_SECONDS: Final = 60.0
STOP_SECONDS: Final = 8.0

STARTS = Counter("bursar_litellm_adapter_starts_total", "Starts of the LiteLLM adapter's process")

log = structlog.get_logger(__name__)


class AdapterUnavailable(Problem):
    """The provider is called through LiteLLM, whose process is not there."""

    status, code, title = 503, "litellm_unavailable", "This provider cannot be called at the moment"


NEXT_STEPS: Final = {
    "not_installed": "The operator installs it (docs/providers.md, “Through LiteLLM”); it is found within a minute.",
    "malicious": "The operator removes that release, and changes every key that it could read.",
}


class AdapterProcess:
    """The adapter of one server process. python: the interpreter that has LiteLLM; None: this one's."""

    def __init__(self, python: Path | None = None, *, environment: Mapping[str, str] | None = None) -> None:
        self._python = str(python or sys.executable)
        self._environment = environment or {}
        self._token = secrets.token_urlsafe(32)
        self._wanted = asyncio.Event()
        self._ready = asyncio.Event()
        self._told = asyncio.Event()
        self._port = 0
        self._fault = ""
        self._text = "its process has not started yet"
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_missing(self) -> bool:
        """Whether it is known that it cannot be started, as where LiteLLM is not installed."""
        return bool(self._fault)

    @property
    def pid(self) -> int | None:
        """The process that runs now."""
        return None if self._process is None else self._process.pid

    def want(self, wanted: bool) -> None:
        """Start it, if it does not run, or end it."""
        if wanted:
            self._wanted.set()
        elif self._wanted.is_set():
            self._wanted.clear()
            self._close()

    async def reached(self, provider: Provider) -> Provider:
        """A provider of the kind litellm as the adapter serves it: one that speaks OpenAI's format.

        Raises:
            AdapterUnavailable: LiteLLM is not installed, or its process does not come up.
        """
        assert provider.litellm_provider is not None
        self.want(True)
        with suppress(TimeoutError):
            async with asyncio.timeout(WAIT_SECONDS):
                await self._told.wait()
        if not self._ready.is_set():
            raise self._unavailable(provider)
        headers = {TOKEN_HEADER: self._token, PROVIDER_HEADER: provider.litellm_provider}
        if provider.base_url is not None:
            headers[ADDRESS_HEADER] = provider.base_url
        return replace(
            provider,
            kind="openai",
            base_url=f"http://127.0.0.1:{self._port}/v1",
            auth="none" if provider.auth == "none" else "bearer",
            headers=headers,
            litellm_provider=None,
        )

    def _unavailable(self, provider: Provider) -> AdapterUnavailable:
        next_step = NEXT_STEPS.get(self._fault, "It is started again by itself; the server's log says more.")
        return AdapterUnavailable(
            f"{provider.name} is called through LiteLLM, and {self._text}. {next_step}",
            why={
                "reason": "litellm_unavailable",
                "provider": provider.name,
                "fault": self._fault or None,
                "next_step": next_step,
            },
            headers={"Retry-After": "5"},
        )

    async def run(self) -> None:
        """Keep it running while it is wanted; after each end the next start waits longer, up to 30 s."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            await self._wanted.wait()
            lived = await self._live()
            pause = FIRST_PAUSE_SECONDS if lived >= LONG_LIFE_SECONDS else min(2 * pause, LONGEST_PAUSE_SECONDS)
            if self._wanted.is_set():
                await asyncio.sleep(LONGEST_PAUSE_SECONDS if self._fault else pause)

    async def _live(self) -> float:
        """One life of the process; its length in seconds."""
        loop = asyncio.get_running_loop()
        with tempfile.TemporaryDirectory(prefix="bursar-litellm-") as home:
            began = loop.time()
            try:
                self._process = await self._spawn(home)
                STARTS.inc()
                async with asyncio.timeout(START_SECONDS):
                    assert self._process.stdout is not None
                    self._read(await self._process.stdout.readline())
                status = await self._process.wait()
                if self._wanted.is_set() and not self._fault:
                    log.error("the LiteLLM adapter ended", status=status, seconds=round(loop.time() - began, 1))
            except (TimeoutError, OSError) as error:
                self._text = "its process does not start"
                log.error("the LiteLLM adapter does not start", error=str(error) or type(error).__name__)
            finally:
                await self._end()
        return loop.time() - began

    async def _spawn(self, home: str) -> asyncio.subprocess.Process:
        environment = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        environment |= {**FIXED, "HOME": home, TOKEN_VARIABLE: self._token, **self._environment}
        return await asyncio.create_subprocess_exec(
            # Neither the folder of the program nor what the user installed is searched for modules.
            *(self._python, "-P", "-s", str(Path(litellm_adapter.__file__)), "--port", str(self._port)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,  # it could hold keys
            cwd=home,
            env=environment,
        )

    def _read(self, line: bytes) -> None:
        """What it says of itself."""
        told: dict[str, Any] = {}
        with suppress(ValueError):
            told = json.loads(line)
        self._fault = str(told.get("fault", ""))
        if "port" in told:
            self._port = int(told["port"])
            self._ready.set()
            log.info("the LiteLLM adapter is ready", pid=self.pid)
        elif self._fault:
            before, self._text = self._text, str(told.get("text", ""))[:500]
            if self._text != before:  # it is tried again and again, in case it is installed meanwhile
                log.error("the LiteLLM adapter cannot start", fault=self._fault, text=self._text)
        else:
            # Perhaps another program has taken its port meanwhile.
            self._port = 0
            self._text = "its process ended as it started"
        self._told.set()

    def _close(self) -> None:
        """Tell it to end, by the end of its input."""
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def _end(self) -> None:
        self._ready.clear()
        if not self._fault:
            self._told.clear()
            self._text = "its process has ended and is started anew"
        process, self._process = self._process, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


@asynccontextmanager
async def running(
    python: Path | None = None, *, environment: Mapping[str, str] | None = None
) -> AsyncIterator[AdapterProcess]:
    """An adapter that starts when it is wanted, and has ended afterwards."""
    adapter = AdapterProcess(python, environment=environment)
    task = asyncio.create_task(adapter.run(), name="LiteLLM adapter")
    try:
        yield adapter
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
