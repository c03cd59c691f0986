"""What is set from outside is checked; the master key is made once and stays."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bursar.settings import SettingError, Settings

LONG_KEY = "k" * 32


def test_every_setting_is_read_and_options_win(tmp_path: Path) -> None:
    environment = {
        "BURSAR_DATA_DIR": str(tmp_path),
        "DATABASE_URL": "postgresql:///x",
        "BURSAR_PORT": "9000",
        "BURSAR_MASTER_KEY": LONG_KEY,
    }
    settings = Settings.from_environment(environment, port=9001, host=None)
    assert (settings.data_dir, settings.database_url) == (tmp_path, "postgresql:///x")
    assert (settings.port, settings.host, settings.workers) == (9001, "127.0.0.1", 1)


def test_the_data_folder_is_in_the_users_home_unless_told() -> None:
    assert Settings.from_environment({}).data_dir == Path.home() / ".local/share/bursar"
    assert Settings.from_environment({"XDG_DATA_HOME": "/x"}).data_dir == Path("/x/bursar")


@pytest.mark.parametrize(
    "wrong",
    [
        {"BURSAR_PORT": "many"},
        {"BURSAR_PORT": "65536"},
        {"BURSAR_PORT": "-1"},
        {"BURSAR_WORKERS": "0"},
        {"BURSAR_LEASE_SECONDS": "1"},
        {"BURSAR_WAIT_SECONDS": "-1"},
        {"BURSAR_LOG_FORMAT": "xml"},
        {"BURSAR_LOG_LEVEL": "loud"},
        {"BURSAR_MASTER_KEY": "short"},
    ],
)
def test_a_wrong_value_is_named(wrong: dict[str, str]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        Settings.from_environment(wrong)


def test_secrets_are_not_shown() -> None:
    settings = Settings(data_dir=Path("/x"), database_url="postgresql://u:secret@h/d", given_master_key=LONG_KEY)
    assert "secret" not in repr(settings)
    assert LONG_KEY not in repr(settings)


def test_the_master_key_is_made_once_private_and_the_same_for_all(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new")
    with ThreadPoolExecutor(8) as threads:
        keys = set(threads.map(lambda _: settings.master_key, range(32)))
    assert len(keys) == 1
    file = tmp_path / "new" / "master.key"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert len(file.read_text().strip()) == 64
    assert os.listdir(tmp_path / "new") == ["master.key"]


def test_a_given_key_is_used_and_none_is_made(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path / "new", given_master_key=LONG_KEY)
    assert settings.master_key == Settings(data_dir=tmp_path, given_master_key=LONG_KEY).master_key
    assert not (tmp_path / "new").exists()


def test_each_purpose_has_a_key_of_its_own() -> None:
    settings = Settings(data_dir=Path("/x"), given_master_key=LONG_KEY)
    keys = {settings.master_key, settings.derive("a"), settings.derive("b")}
    assert len(keys) == 3
    assert all(len(key) == 32 for key in keys)
