"""Files of sound with headers as their formats have them, and nothing but silence in them."""

import struct


def wav(seconds: float, *, rate: int = 8_000, data_size: int | None = None) -> bytes:
    """8 bits, one channel. data_size: what the header says in place of the truth."""
    samples = bytes(int(rate * seconds))
    about = struct.pack("<HHIIHH", 1, 1, rate, rate, 1, 8)
    size = len(samples) if data_size is None else data_size
    body = b"WAVEfmt " + struct.pack("<I", 16) + about + b"LIST\x03\0\0\0abc\0data" + struct.pack("<I", size) + samples
    return b"RIFF" + struct.pack("<I", len(body)) + body


def mp3(frames: int, *, tag: bytes = b"") -> bytes:
    """MPEG-2 layer III, 64 kbit/s, 24 kHz: a frame is 192 bytes and 24 ms."""
    return tag + (b"\xff\xf3\x84\xc4" + bytes(188)) * frames


def mp3_of_changing_rate(frames: int) -> bytes:
    """As `mp3`, with a Xing header that counts the frames; its own is the first."""
    first = bytearray(mp3(1))
    first[13:25] = b"Xing" + struct.pack(">II", 1, frames)
    return bytes(first) + bytes(50)


def ogg(granule: int, *, pre_skip: int = 312) -> bytes:
    """Opus: a page with the head, and a last page."""
    head = b"OpusHead\x01\x01" + struct.pack("<HI", pre_skip, 48_000)
    return _page(0, head) + bytes(3_000) + _page(granule, b"")


def vorbis(granule: int, *, rate: int = 44_100) -> bytes:
    return _page(0, b"\x01vorbis\0\0\0\0\x01" + struct.pack("<I", rate)) + bytes(500) + _page(granule, b"")


def _page(granule: int, content: bytes) -> bytes:
    return b"OggS\0\0" + struct.pack("<q", granule) + bytes(13) + content


def flac(samples: int, *, rate: int = 44_100) -> bytes:
    packed = (rate << 44) | (1 << 41) | (15 << 36) | samples
    return b"fLaC\x80\0\0\x22" + bytes(10) + packed.to_bytes(8, "big") + bytes(16)


def mp4(duration: int, *, scale: int = 1_000, is_long: bool = False, last: bool = True) -> bytes:
    """An m4a. last: `moov` stands behind the sound."""
    times = (
        struct.pack(">B3xQQIQ", 1, 0, 0, scale, duration)
        if is_long
        else struct.pack(">B3xIIII", 0, 0, 0, scale, duration)
    )
    mvhd = _box(b"mvhd", times + bytes(80))
    moov, mdat = _box(b"moov", _box(b"udta", b"x") + mvhd), _box(b"mdat", bytes(5_000))
    return _box(b"ftyp", b"M4A \0\0\0\0") + (mdat + moov if last else moov + mdat)


def _box(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + name + content


def webm(milliseconds: float | None) -> bytes:
    scale = b"\x2a\xd7\xb1\x83" + (1_000_000).to_bytes(3, "big")
    duration = b"" if milliseconds is None else b"\x44\x89\x88" + struct.pack(">d", milliseconds)
    return b"\x1a\x45\xdf\xa3" + bytes(30) + scale + duration + bytes(4_000)


def adts(frames: int) -> bytes:
    """AAC at 24 kHz: frames of 100 bytes and 1,024 samples."""
    return (b"\xff\xf1" + bytes([0b01_0110_00, 0b01_000000, 100 >> 3, (100 & 7) << 5, 0]) + bytes(93)) * frames
