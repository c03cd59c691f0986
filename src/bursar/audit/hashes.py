"""What is hashed, and how: rows, trees and seals. docs/proof.md has the same in words, for whoever recomputes it.

Every hash is SHA-256. A leaf is hashed by the database (`leaf_sql`), everything else here.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final
from uuid import UUID

LEAF, NODE, FORM = b"\x00", b"\x01", b"\x02"
ZEROS: Final = bytes(32)
MARK_BYTES: Final = 8
"""How much of each leaf a seal keeps, to tell later which row it was that changed."""

TEXT_SETTINGS: Final = {
    "timezone": "UTC",
    "datestyle": "ISO, YMD",
    "intervalstyle": "iso_8601",
    "bytea_output": "hex",
    "extra_float_digits": "1",
}
"""Settings of the session that a row's text depends on."""


@dataclass(frozen=True, slots=True)
class Form:
    """A table and those of its columns that are hashed."""

    form: int
    form_hash: bytes
    table_name: str
    column_names: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one table in a seal. form: number in audit.forms; form_hash: what that number stands for."""

    form: int
    form_hash: bytes
    count: int
    root: bytes


def form_hash(table_name: str, column_names: Sequence[str]) -> bytes:
    """Of a table's name and its columns, in their order."""
    return hashlib.sha256(FORM + _text([table_name, list(column_names)])).digest()


def leaf_sql(form: Form) -> str:
    """SQL of a row's leaf; the row's table is called `t`.

    The text of a composite value tells null from '' and quotes what it must, so that no two rows have the same one.
    """
    columns = ", ".join(f't."{name}"' for name in form.column_names)
    prefix = (LEAF + form.form_hash).hex()
    return f"sha256('\\x{prefix}'::bytea || convert_to(row({columns})::text, 'UTF8'))"


@dataclass(slots=True)
class Tree:
    """The Merkle root of leaves that come one by one; keeps only one node for each level.

    Source: RFC 6962, 2.1 (leaves there are what is a leaf's hash here).
    """

    count: int = 0
    _nodes: list[tuple[int, bytes]] = field(default_factory=list)  # (height, hash), highest first

    def add(self, leaf: bytes) -> None:
        """One more leaf, behind the others."""
        self.count += 1
        height, node = 0, leaf
        while self._nodes and self._nodes[-1][0] == height:
            node = _join(self._nodes.pop()[1], node)
            height += 1
        self._nodes.append((height, node))

    def root(self) -> bytes:
        """Of at least one leaf."""
        nodes = [node for _, node in self._nodes]
        while len(nodes) > 1:
            right = nodes.pop()
            nodes.append(_join(nodes.pop(), right))
        return nodes[0]


def seal_hash(
    organization_id: UUID,
    seal_number: int,
    from_number: int,
    until_number: int,
    parts: Sequence[Part],
    sealed_at: datetime,
    previous_hash: bytes,
) -> bytes:
    """Of everything that a seal says, but its marks."""
    said = [
        "bursar seal 1",
        str(organization_id),
        seal_number,
        from_number,
        until_number,
        [[part.form_hash.hex(), part.count, part.root.hex()] for part in parts],
        int(sealed_at.timestamp()) * 1_000_000 + sealed_at.microsecond,
        previous_hash.hex(),
    ]
    return hashlib.sha256(_text(said)).digest()


def text_hash(text: str) -> bytes:
    """Of a line of an anchor file, without its end."""
    return hashlib.sha256(text.encode()).digest()


def head_leaf(organization_id: UUID, seal_number: int, head: bytes) -> bytes:
    """Leaf of an organization's newest seal in the tree of an anchor."""
    return hashlib.sha256(LEAF + _text([str(organization_id), seal_number, head.hex()])).digest()


def _join(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(NODE + left + right).digest()


def _text(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True).encode()
