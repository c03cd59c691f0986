"""What is measured: the fake provider alone, Bursar with one and two server processes, a LiteLLM proxy."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.gateway.provider import MODEL

TICKS: Final = os.sysconf("SC_CLK_TCK")
PATH: Final = "/v1/chat/completions"
LITELLM_KEY: Final = "sk-benchmark-0000"


@dataclass(frozen=True, slots=True)
class Target:
    """Where the callers call, and the process whose children are measured."""

    name: str
    port: int
    key: str
    pid: int
    path: str = PATH


@dataclass(frozen=True, slots=True)
class Consumed:
    """What the processes of a target have taken. cpu: seconds by process, in all."""

    cpu: dict[int, float]
    rss_mb: float
    names: dict[int, str]


def consumed(pid: int) -> Consumed:
    """Of a process and all below it."""
    cpu: dict[int, float] = {}
    names: dict[int, str] = {}
    rss = 0.0
    for each in _tree(pid):
        try:
            stat = Path(f"/proc/{each}/stat").read_text()
            status = Path(f"/proc/{each}/status").read_text()
        except OSError:
            continue  # it has ended
        name, fields = stat[stat.index("(") + 1 : stat.rindex(")")], stat[stat.rindex(")") + 2 :].split()
        cpu[each] = (int(fields[11]) + int(fields[12])) / TICKS
        names[each] = "postgres" if "postgres" in name else "server"
        if names[each] == "server":
            rss += sum(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
    return Consumed(cpu, rss, names)


def _tree(pid: int) -> list[int]:
    found = [pid]
    for each in found:
        try:
            tasks = list(Path(f"/proc/{each}/task").iterdir())
        except OSError:
            continue
        for task in tasks:
            found += [int(child) for child in (task / "children").read_text().split() if int(child) not in found]
    return found


@contextmanager
def provider(pieces: int) -> Iterator[Target]:
    """The fake provider in a process of its own."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway.provider", str(port), "--pieces", str(pieces)]
    with _process(command, {}) as process:
        _wait(port, process)
        yield Target("the provider alone", port, "none", process.pid)


@contextmanager
def bursar(
    folder: Path, provider_port: int, workers: int, *, start: Sequence[str] = ("-m", "bursar")
) -> Iterator[Target]:
    """`bursar serve` on an embedded, durable database; a company whose member has hard limits.

    start: what Python is told to run.
    """
    port = free_port()
    folder.mkdir()
    environment = {"BURSAR_DATA_DIR": str(folder), "BURSAR_PORT": str(port)}
    serve = [sys.executable, *start, "serve", "--workers", str(workers)]
    with _process(serve, environment) as process:
        _wait(port, process, "/readyz")

        def run(*arguments: str) -> str:
            command = [sys.executable, "-m", "bursar", *arguments]
            done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(arguments)}: {done.stdout}{done.stderr}")
            return done.stdout.strip()

        run("orgs", "create", "Benchmark", "--slug", "benchmark")
        run("users", "create", "dana@benchmark.example", "--org", "benchmark", "--name", "Dana")
        run("credits", "add", "100000000", "--org", "benchmark")
        run(
            "caps",
            "set",
            "--org",
            "benchmark",
            "--user",
            "dana@benchmark.example",
            "--stop",
            "90000000cr",
            "--per",
            "month",
        )
        run("caps", "set", "--org", "benchmark", "--stop", "90000000cr", "--per", "day")
        key = run("keys", "create", "Benchmark", "--org", "benchmark", "--user", "dana@benchmark.example")
        run("providers", "add", "openai", "--base-url", f"http://127.0.0.1:{provider_port}/v1", "--auth", "none")
        time.sleep(6)  # running servers follow within five seconds
        processes = "one process" if workers == 1 else f"{workers} processes"
        yield Target(f"Bursar, {processes}", port, key, process.pid)


@contextmanager
def litellm(program: Path, folder: Path, provider_port: int, workers: int = 2) -> Iterator[Target]:
    """A LiteLLM proxy from an environment of its own, in front of the same provider; no budgets, which need a database
    of its own: it does less than what it is compared with.
    """
    port = free_port()
    folder.mkdir()
    config = folder / "config.yaml"
    parameters = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{provider_port}/v1", "api_key": "none"}
    model = {"model_name": MODEL, "litellm_params": parameters}
    settings = {"telemetry": False}
    document = {
        "model_list": [model],
        "litellm_settings": settings,
        "general_settings": {"master_key": LITELLM_KEY},
    }
    config.write_text(json.dumps(document))  # JSON is YAML
    command = [str(program), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--num_workers", str(workers), "--telemetry", "False"]
    environment = {"LITELLM_LOG": "ERROR", "LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION"}
    with _process(command, environment) as process:
        _wait(port, process, "/health/liveliness", seconds=180)
        yield Target(f"LiteLLM, {workers} processes, no budgets", port, LITELLM_KEY, process.pid)


@contextmanager
def _process(command: Sequence[str], environment: dict[str, str]) -> "Iterator[subprocess.Popen[bytes]]":
    process = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(40)
        except subprocess.TimeoutExpired:
            for pid in reversed(_tree(process.pid)):
                os.kill(pid, signal.SIGKILL)
            process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait(port: int, process: "subprocess.Popen[bytes]", path: str | None = None, seconds: float = 60) -> None:
    """Until it answers."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args!r} ended with {process.returncode}")
        try:
            if path is None:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{process.args!r} does not answer")


def load(target: Target, *, connections: int, seconds: float, stream: bool) -> dict[str, Any]:
    """One run of callers, in a process of their own."""
    command = [sys.executable, "-m", "benchmarks.gateway.load", str(target.port), target.path, "--key", target.key]
    command += ["--connections", str(connections), "--seconds", str(seconds), *(["--stream"] if stream else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout)
    if set(figures["statuses"]) != {"200"}:
        raise RuntimeError(f"{target.name}: {figures['statuses']} {figures['last']}")
    return figures
