"""`tools/setup` on machines that lack something says what to install."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the script, and an empty one for programs."""
    (tmp_path / "tools").mkdir()
    shutil.copy(TOOLS / "setup", tmp_path / "tools" / "setup")
    (tmp_path / "bin").mkdir()
    for needed in ("sh", "dirname"):
        (tmp_path / "bin" / needed).symlink_to(str(shutil.which(needed)))
    return tmp_path


def run_setup(checkout: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [checkout / "tools" / "setup"],
        env={"PATH": str(checkout / "bin")},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(checkout: Path, body: str) -> None:
    script = checkout / "bin" / "python3"
    script.write_text(f'#!/bin/sh\n{body}\nexec {sys.executable} "$@"\n')
    script.chmod(0o755)


def test_without_python_it_names_the_packages(checkout: Path) -> None:
    done = run_setup(checkout)
    assert done.returncode == 1
    assert "apt-get install python3 python3-pip python3-venv" in done.stderr


def test_an_old_python_is_not_taken(checkout: Path) -> None:
    fake_python(checkout, "exit 1")
    assert "needs Python 3.11 or later" in run_setup(checkout).stderr


def test_without_venv_it_names_the_package_of_this_python(checkout: Path) -> None:
    fake_python(checkout, 'case "$2" in *ensurepip*) exit 1;; esac')
    done = run_setup(checkout)
    assert done.returncode == 1
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"apt-get install python{version}-venv" in done.stderr
