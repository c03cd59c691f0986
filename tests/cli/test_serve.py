"""`bursar serve` as real processes: it comes up, answers, ends on a signal, and leaves no server behind."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bursar.db.embedded import EmbeddedServer
from bursar.serving import metrics_folder

Start = Callable[..., tuple["subprocess.Popen[str]", str]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def wait_for(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


@pytest.fixture
def data_dir(open_dir: Path) -> Iterator[Path]:
    yield open_dir / "data"
    EmbeddedServer(open_dir / "data").remove()


@pytest.fixture
def start(data_dir: Path) -> Iterator[Start]:
    running: list[subprocess.Popen[str]] = []

    def run(*options: str) -> tuple["subprocess.Popen[str]", str]:
        port = free_port()
        command = [sys.executable, "-m", "bursar", "serve", "--port", str(port), "--data-dir", str(data_dir), *options]
        child = subprocess.Popen(
            command,
            env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "BURSAR_LOG_FORMAT": "json"},
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(child)
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: get(f"{url}/readyz")[0] == 200 or child.poll() is not None)
        return child, url

    yield run
    for child in running:
        if child.poll() is None:
            child.kill()
            child.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_comes_up_and_ends_on_a_signal(start: Start, data_dir: Path, number: signal.Signals) -> None:
    child, url = start()
    assert get(f"{url}/healthz")[0] == 200
    assert get(f"{url}/nowhere")[0] == 404
    child.send_signal(number)
    _, err = child.communicate(timeout=90)
    assert "Traceback" not in err
    assert EmbeddedServer(data_dir).pid is None


def test_several_processes_share_the_port_the_database_and_the_metrics(start: Start, data_dir: Path) -> None:
    child, url = start("--workers", "2")
    server = EmbeddedServer(data_dir)
    for _ in range(40):
        assert get(f"{url}/healthz")[0] == 200
    counted = [
        line for line in get(f"{url}/metrics")[1].splitlines() if 'route="/healthz"' in line and "_total" in line
    ]
    assert sum(float(line.split()[-1]) for line in counted) == 40  # of both processes, whichever answered
    assert server.pid is not None
    child.terminate()
    child.communicate(timeout=90)
    assert server.pid is None


def test_metrics_that_a_killed_server_left_are_removed_and_those_of_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = """
import pathlib, sys, time
from bursar.serving import metrics_folder
with metrics_folder() as folder:
    pathlib.Path(folder, "counter_1.db").touch()
    print(folder, flush=True)
    time.sleep(600)
"""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    processes = [subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        killed, living = (Path(process.stdout.readline().strip()) for process in processes if process.stdout)
        processes[0].kill()
        processes[0].wait()
        about_to_start = tmp_path / "bursar-metrics-new"
        about_to_start.mkdir()
        assert killed.exists()
        with metrics_folder() as folder:
            assert sorted(tmp_path.iterdir()) == sorted([living, about_to_start, Path(folder)])
        assert sorted(tmp_path.iterdir()) == sorted([living, about_to_start])
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_killed_it_comes_back_on_the_same_data(start: Start, data_dir: Path) -> None:
    child, _ = start()
    pid = EmbeddedServer(data_dir).pid
    child.kill()
    child.communicate()
    assert pid is not None
    os.kill(pid, 0)  # the database outlives a killed server, and the next one takes it over
    child, url = start()
    assert EmbeddedServer(data_dir).pid == pid
    assert get(f"{url}/readyz")[0] == 200
    child.terminate()
    child.communicate(timeout=90)
    assert EmbeddedServer(data_dir).pid is None
