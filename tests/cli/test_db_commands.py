"""`bursar db` on an embedded server of its own, and on a server that is not there."""

import json
import subprocess
import sys
from pathlib import Path

from bursar.db.embedded import EmbeddedServer


def bursar(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bursar", *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_status_migrate_verify_on_a_fresh_machine(open_dir: Path) -> None:
    here = {"BURSAR_DATA_DIR": str(open_dir / "data")}
    before = json.loads(bursar("db", "status", "--json", **here).stdout)
    assert before["is_current"] is False
    assert bursar("db", "verify", **here).returncode == 1
    migrated = bursar("db", "migrate", **here)
    assert migrated.stdout.startswith("applied 0001_tenancy\n"), migrated.stderr
    assert json.loads(bursar("db", "migrate", "--json", **here).stdout) == {"migrations": [], "files": []}
    assert bursar("db", "verify", **here).returncode == 0
    (open_dir / "data" / "master.key").unlink()
    other_key = bursar("db", "migrate", **here)
    assert other_key.returncode == 1
    assert "another master key" in other_key.stderr
    server = EmbeddedServer(open_dir / "data")
    assert not server.home.data.joinpath("postmaster.pid").exists()  # each command has stopped what it started
    server.remove()


def test_a_server_that_is_not_there_is_8(tmp_path: Path) -> None:
    done = bursar("db", "status", DATABASE_URL="postgresql://u:hunter22@127.0.0.1:1/x", BURSAR_DATA_DIR=str(tmp_path))
    assert done.returncode == 8
    assert "does not answer" in done.stderr
    assert "hunter22" not in done.stderr


def test_a_wrong_setting_is_named_without_a_trace(tmp_path: Path) -> None:
    done = bursar("db", "status", BURSAR_PORT="x", BURSAR_DATA_DIR=str(tmp_path))
    assert done.returncode == 1
    assert "BURSAR_PORT" in done.stderr
    assert "Traceback" not in done.stderr
