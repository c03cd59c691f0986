"""How long a sound is, read from the headers of its file; nothing is decoded.

Sources: Microsoft, "Multimedia Programming Interface" (RIFF/WAVE); ISO/IEC 11172-3 and 13818-3 (MPEG audio frames), the
Xing and VBRI headers of its encoders; RFC 3533 (Ogg), RFC 7845 (Opus in Ogg), the Vorbis I specification; RFC 9639
(FLAC); ISO/IEC 14496-12 (MP4, `mvhd`); RFC 8794 and RFC 9559 (WebM); ISO/IEC 13818-7 (ADTS).

What a header says is believed: it sizes a hold, and stands for a provider's count that does not come. What the provider
counts is charged.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from typing import Final

LEAST_BYTES_PER_SECOND: Final = 1_000
"""A sound whose length cannot be read is held for as if it had 8 kbit/s, which no codec of files in use goes below."""
TYPICAL_BYTES_PER_SECOND: Final = 4_000
"""The same sound is charged as if it had 32 kbit/s, as recordings of speech have, where the provider counts nothing."""
LONGEST_MS: Final = 100 * 3_600_000
"""Longer ones are taken for misread; the size decides then."""
HEAD_BYTES: Final = 65_536

_Bytes = bytes | memoryview


def milliseconds(head: _Bytes, tail: _Bytes | None = None, size: int | None = None) -> int | None:
    """How long a sound is, rounded up; None where its headers do not say.

    head: the whole file, or its first HEAD_BYTES. tail: its last ones, None: those of head. size: of the whole file.
    """
    start, size = bytes(head[:12]), len(head) if size is None else size
    for marks, read in _READERS:
        if marks.match(start):
            try:
                found = read(head, head if tail is None else tail, size)
            except (struct.error, IndexError, ZeroDivisionError):
                return None
            return found if found is not None and 0 < found <= LONGEST_MS else None
    return None


def most_milliseconds(file: _Bytes) -> int:
    """What to hold for: the length of a sound, or the longest that it can be."""
    found = milliseconds(file)
    return _up(len(file) * 1000, LEAST_BYTES_PER_SECOND) if found is None else found


def likely_milliseconds(file: _Bytes) -> int:
    """What to charge for where nobody says: the length of a sound, or what its size suggests."""
    found = milliseconds(file)
    return _up(len(file) * 1000, TYPICAL_BYTES_PER_SECOND) if found is None else found


def _up(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _wav(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """Size of the data over bytes a second. Files that are made as they are sent give no true size of their data."""
    place, rate = 12, 0
    while place + 8 <= len(head):
        name, length = bytes(head[place : place + 4]), int.from_bytes(head[place + 4 : place + 8], "little")
        if name == b"fmt ":
            _, channels, samples, per_second, block, bits = struct.unpack_from("<HHIIHH", head, place + 8)
            rate = samples * block if block == channels * bits // 8 and bits else per_second
        elif name == b"data":
            return _up(min(length, size - place - 8) * 1000, rate) if rate else None
        place += 8 + length + length % 2
    return None


_MPEG_RATES: Final = {
    3: (44_100, 48_000, 32_000),
    2: (22_050, 24_000, 16_000),
    0: (11_025, 12_000, 8_000),
}
_LAYER3_V1: Final = (0, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_LAYER3_V2: Final = (0, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160)
_LAYER2_V1: Final = (0, 32, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384)
_MPEG_FRAMES: Final = 256


def _mpeg(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """Frames that a Xing, Info or VBRI header counts, else the size over the mean size of the first frames."""
    place = 0
    if bytes(head[:3]) == b"ID3":
        place = 10 + sum((head[6 + each] & 0x7F) << (21 - 7 * each) for each in range(4))
    first, samples, rate = place, 0, 0
    for number in range(_MPEG_FRAMES):
        frame = _mpeg_frame(head, place)
        if frame is None:
            break
        length, of_frame, rate = frame
        if number == 0 and (frames := _counted_frames(head, place, length)) is not None:
            return _up(frames * of_frame * 1000, rate)
        samples += of_frame
        place += length
    if not samples:
        return None
    return _up((size - first) * samples * 1000, (place - first) * rate)


def _mpeg_frame(head: _Bytes, place: int) -> tuple[int, int, int] | None:
    """Bytes, samples and sample rate of the frame that begins here; None where none does."""
    if place + 4 > len(head) or head[place] != 0xFF or head[place + 1] & 0xE0 != 0xE0:
        return None
    version, layer = head[place + 1] >> 3 & 3, head[place + 1] >> 1 & 3
    rate_place, bitrate_place, padding = head[place + 2] >> 2 & 3, head[place + 2] >> 4, head[place + 2] >> 1 & 1
    if version == 1 or layer not in (1, 2) or rate_place == 3 or bitrate_place in (0, 15):
        return None
    rate = _MPEG_RATES[version][rate_place]
    table = _LAYER3_V2 if version != 3 else _LAYER3_V1 if layer == 1 else _LAYER2_V1
    samples = 576 if layer == 1 and version != 3 else 1152
    return samples // 8 * table[bitrate_place] * 1000 // rate + padding, samples, rate


def _counted_frames(head: _Bytes, place: int, length: int) -> int | None:
    frame = bytes(head[place : place + length])
    for name in (b"Xing", b"Info"):
        at = frame.find(name, 4, 64)
        if at >= 0 and frame[at + 7] & 1:
            return int.from_bytes(frame[at + 8 : at + 12], "big")
    at = frame.find(b"VBRI", 4, 64)
    return int.from_bytes(frame[at + 14 : at + 18], "big") if at >= 0 else None


def _ogg(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """The granule position of the last page over the sample rate (of Opus always 48 kHz, less what is skipped)."""
    begin, end = bytes(head[:256]), bytes(tail[-HEAD_BYTES:])
    last = end.rfind(b"OggS")
    if last < 0:
        return None
    granule = int.from_bytes(end[last + 6 : last + 14], "little", signed=True)
    if (at := begin.find(b"OpusHead")) >= 0:
        return _up((granule - int.from_bytes(begin[at + 10 : at + 12], "little")) * 1000, 48_000)
    if (at := begin.find(b"\x01vorbis")) >= 0:
        return _up(granule * 1000, int.from_bytes(begin[at + 12 : at + 16], "little"))
    return None


def _flac(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """Samples over the sample rate, in STREAMINFO; 0 samples where they were not known when it was written."""
    info = int.from_bytes(head[18:26], "big")
    return _up((info & 0xF_FFFF_FFFF) * 1000, info >> 44)


def _mp4(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """The duration in `moov`/`mvhd`, which may stand behind the sound."""
    place, end = 0, len(head)
    while place + 8 <= end:
        length, name = int.from_bytes(head[place : place + 4], "big"), bytes(head[place + 4 : place + 8])
        inner = place + 8
        if length == 1:
            length, inner = int.from_bytes(head[place + 8 : place + 16], "big"), place + 16
        if name == b"moov":
            place = inner
        elif name == b"mvhd":
            form = ">IQ" if head[inner] == 1 else ">II"
            scale, duration = struct.unpack_from(form, head, inner + (20 if head[inner] == 1 else 12))
            return _up(duration * 1000, scale)
        elif length < 8:
            return None
        else:
            place += length
    return None


_WEBM_DURATION: Final = re.compile(rb"\x44\x89(?:\x84(.{4})|\x88(.{8}))", re.DOTALL)
_WEBM_SCALE: Final = re.compile(rb"\x2a\xd7\xb1(?:\x83(.{3})|\x84(.{4}))", re.DOTALL)


def _webm(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """The duration in the segment's information, which recordings that were sent as they were made lack."""
    begin = bytes(head[:4096])
    found, scale = _WEBM_DURATION.search(begin), _WEBM_SCALE.search(begin)
    if found is None:
        return None
    ticks: float = struct.unpack(">f" if found[1] else ">d", found[1] or found[2])[0]
    if not 0 < ticks < LONGEST_MS * 1_000:
        return None
    nanoseconds = int.from_bytes(scale[1] or scale[2], "big") if scale is not None else 1_000_000
    return _up(int(ticks) * nanoseconds, 1_000_000)


_ADTS_RATES: Final = (96_000, 88_200, 64_000, 48_000, 44_100, 32_000, 24_000, 22_050, 16_000, 12_000, 11_025, 8_000)


def _adts(head: _Bytes, tail: _Bytes, size: int) -> int | None:
    """The size over the mean size of the first frames."""
    place = frames = rate = 0
    while frames < _MPEG_FRAMES and place + 6 <= len(head) and head[place] == 0xFF and head[place + 1] & 0xF6 == 0xF0:
        length = (head[place + 3] & 3) << 11 | head[place + 4] << 3 | head[place + 5] >> 5
        rate = _ADTS_RATES[head[place + 2] >> 2 & 15]
        if length < 7:
            break
        place, frames = place + length, frames + 1
    return _up(size * frames * 1024 * 1000, place * rate) if frames else None


_Reader = Callable[[_Bytes, _Bytes, int], int | None]
_READERS: Final[tuple[tuple[re.Pattern[bytes], _Reader], ...]] = (
    (re.compile(rb"RIFF.{4}WAVE", re.DOTALL), _wav),
    (re.compile(rb"OggS"), _ogg),
    (re.compile(rb"fLaC"), _flac),
    (re.compile(rb".{4}ftyp", re.DOTALL), _mp4),
    (re.compile(rb"\x1a\x45\xdf\xa3"), _webm),
    (re.compile(rb"\xff[\xf0\xf1\xf8\xf9]"), _adts),
    (re.compile(rb"ID3|\xff[\xe0-\xff]"), _mpeg),
)
