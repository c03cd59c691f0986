"""The demo's folder: marked, private, and the only kind of folder that is ever emptied."""

from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from bursar.demo import homes
from bursar.demo.homes import NotADemo
from bursar.demo.seeding import Access, SeededCompany

AS_OF = datetime(2026, 10, 20, 14, 2, tzinfo=UTC)


def _company() -> SeededCompany:
    def access(email: str) -> Access:
        return Access(email=email, user_id=uuid4(), home_organization_id=uuid4(), api_key=f"bk_{email}")

    return SeededCompany(
        organization_id=uuid4(),
        slug="acme-corp",
        name="Acme Corp",
        story="…",
        is_small=False,
        admin=access("dana@acme.example"),
        member=access("alice@acme.example"),
    )


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = homes.write(tmp_path / "demo", as_of=AS_OF, companies=[_company()])
    assert homes.read(tmp_path / "demo") == written
    assert written.is_complete


def test_the_mark_is_for_its_owner_alone(tmp_path: Path) -> None:
    homes.write(tmp_path, as_of=AS_OF, companies=None)
    assert (tmp_path / homes.MARK).stat().st_mode & 0o777 == 0o600


def test_a_demo_that_was_begun_is_not_complete(tmp_path: Path) -> None:
    assert not homes.write(tmp_path, as_of=AS_OF, companies=None).is_complete


@pytest.mark.parametrize("missing", [True, False])
def test_an_empty_folder_has_no_demo(tmp_path: Path, missing: bool) -> None:
    assert homes.read(tmp_path / "none" if missing else tmp_path) is None


def test_a_folder_with_anything_else_is_refused_and_never_emptied(tmp_path: Path) -> None:
    (tmp_path / "master.key").write_text("somebody's")
    with pytest.raises(NotADemo):
        homes.read(tmp_path)
    with pytest.raises(NotADemo):
        homes.remove(tmp_path)
    assert (tmp_path / "master.key").read_text() == "somebody's"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"format": "bursar demo 0"}'])
def test_a_mark_that_cannot_be_read_is_no_mark(tmp_path: Path, text: str) -> None:
    (tmp_path / homes.MARK).write_text(text)
    with pytest.raises(NotADemo):
        homes.remove(tmp_path)


def test_removing_leaves_what_is_not_the_demos(tmp_path: Path) -> None:
    homes.write(tmp_path, as_of=AS_OF, companies=None)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "master.key").write_text("the demo's")
    homes.remove(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_key_is_in_no_repr() -> None:
    assert "bk_" not in repr(_company())
