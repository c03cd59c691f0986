from dataclasses import replace
from typing import Any

import pytest

from bursar.clock import uuid7
from bursar.sealing import Keyring, SealBroken

MASTER, NEXT_MASTER = b"a" * 32, b"b" * 32
PLACE: dict[str, Any] = {"purpose": "test", "organization_id": uuid7(), "row_id": uuid7()}


def test_what_is_sealed_opens_in_its_place() -> None:
    ring = Keyring(MASTER)
    sealed = ring.seal("sk-secret", **PLACE)
    assert Keyring(MASTER).open(sealed, **PLACE) == "sk-secret"
    assert b"sk-secret" not in sealed.ciphertext
    assert "ciphertext" not in repr(sealed)


@pytest.mark.parametrize("moved", [{"purpose": "other"}, {"organization_id": uuid7()}, {"row_id": uuid7()}])
def test_what_is_moved_does_not_open(moved: dict[str, object]) -> None:
    sealed = Keyring(MASTER).seal("sk-secret", **PLACE)
    with pytest.raises(SealBroken):
        Keyring(MASTER).open(sealed, **{**PLACE, **moved})


def test_what_is_changed_does_not_open() -> None:
    sealed = Keyring(MASTER).seal("sk-secret", **PLACE)
    for place in range(len(sealed.ciphertext)):
        flipped = bytearray(sealed.ciphertext)
        flipped[place] ^= 1
        with pytest.raises(SealBroken):
            Keyring(MASTER).open(replace(sealed, ciphertext=bytes(flipped)), **PLACE)


def test_the_same_secret_is_never_sealed_alike() -> None:
    ring = Keyring(MASTER)
    assert len({ring.seal("x", **PLACE).ciphertext for _ in range(100)}) == 100


def test_another_master_key_opens_only_what_it_is_told_to() -> None:
    sealed = Keyring(MASTER).seal("sk-secret", **PLACE)
    with pytest.raises(SealBroken) as broken:
        Keyring(NEXT_MASTER).open(sealed, **PLACE)
    assert "sk-secret" not in str(broken.value)
    ring = Keyring(NEXT_MASTER, MASTER)
    assert ring.open(sealed, **PLACE) == "sk-secret"
    assert ring.seal("x", **PLACE).sealing_key_id == ring.newest_id == Keyring(NEXT_MASTER).newest_id
