"""Our own style, script and picture, read once, under addresses that change with their content."""

import gzip
import hashlib
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Final

_MEDIA_TYPES: Final = {"css": "text/css; charset=utf-8", "js": "text/javascript; charset=utf-8", "svg": "image/svg+xml"}


@dataclass(frozen=True, slots=True)
class Asset:
    """One file. address: of the form /static/<name>?<digest>; gzipped: what most browsers are sent."""

    name: str
    address: str
    media_type: str
    content: bytes
    gzipped: bytes


@cache
def assets() -> dict[str, Asset]:
    """Every file of static/ by name."""
    folder = files("bursar.web").joinpath("static")
    return {each.name: _asset(each.name, each.read_bytes()) for each in folder.iterdir() if "." in each.name}


def address_of(name: str) -> str:
    """Where pages find a file; an address is good for ever, since its digest is in it."""
    return assets()[name].address


def _asset(name: str, content: bytes) -> Asset:
    digest = hashlib.sha256(content).hexdigest()[:12]
    return Asset(
        name=name,
        address=f"/static/{name}?{digest}",
        media_type=_MEDIA_TYPES[name.rsplit(".", 1)[1]],
        content=content,
        gzipped=gzip.compress(content, 9, mtime=0),
    )
