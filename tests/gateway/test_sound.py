"""How long sounds are, by the headers of their files."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway import sounds

from bursar.gateway import sound


@pytest.mark.parametrize(
    ("file", "milliseconds"),
    [
        (sounds.wav(2.5), 2_500),
        (sounds.wav(2.5, data_size=0xFFFF_FFFF), 2_500),
        (sounds.mp3(100), 2_400),
        (sounds.mp3(100, tag=b"ID3\x04\0\0\0\0\x00\x05hello"), 2_400),
        (sounds.mp3_of_changing_rate(5_000), 120_000),
        (sounds.ogg(48_312), 1_000),
        (sounds.vorbis(88_200), 2_000),
        (sounds.flac(44_100 * 90), 90_000),
        (sounds.mp4(12_345), 12_345),
        (sounds.mp4(44_100 * 3, scale=44_100, is_long=True, last=False), 3_000),
        (sounds.webm(1_500.0), 1_500),
        (sounds.adts(300), 12_800),
    ],
    ids=["wav", "wav-streamed", "mp3", "mp3-tagged", "mp3-vbr", "opus", "vorbis", "flac", "m4a", "mp4", "webm", "aac"],
)
def test_the_headers_tell_the_length(file: bytes, milliseconds: int) -> None:
    assert sound.milliseconds(file) == milliseconds
    assert sound.milliseconds(memoryview(file)) == milliseconds
    assert sound.most_milliseconds(file) == sound.likely_milliseconds(file) == milliseconds


def test_the_length_of_a_stream_is_read_from_its_first_and_last_pieces() -> None:
    for file, milliseconds in (
        (sounds.wav(60.0), 60_000),
        (sounds.mp3(10_000), 240_000),
        (sounds.ogg(480_312), 10_000),
    ):
        assert sound.milliseconds(file[:20_000], file[-2_000:], len(file)) == milliseconds


@pytest.mark.parametrize(
    "file", [b"", b"what is this", sounds.webm(None), sounds.flac(0), sounds.ogg(-1), b"RIFF", bytes(9)]
)
def test_what_does_not_tell_is_held_by_the_least_rate_and_charged_by_a_usual_one(file: bytes) -> None:
    assert sound.milliseconds(file) is None
    assert sound.most_milliseconds(file) == len(file)
    assert sound.likely_milliseconds(file) == -(-len(file) // 4)


def test_a_header_that_claims_years_is_not_believed() -> None:
    assert sound.milliseconds(sounds.mp4(2**32 - 1, scale=1)) is None
    assert sound.milliseconds(sounds.flac(2**36 - 1, rate=1)) is None


STARTS = [
    sounds.wav(0.1),
    sounds.mp3(3),
    sounds.ogg(960),
    sounds.flac(9),
    sounds.mp4(5),
    sounds.webm(3.0),
    sounds.adts(2),
]


@given(
    st.sampled_from(STARTS),
    st.lists(st.tuples(st.integers(0, 300), st.binary(min_size=1, max_size=8)), max_size=6),
    st.integers(0, 400),
)
def test_damaged_files_have_some_length_or_none_and_never_fail(
    file: bytes, damages: list[tuple[int, bytes]], cut: int
) -> None:
    damaged = bytearray(file)
    for place, junk in damages:
        damaged[place : place + len(junk)] = junk
    shortened = bytes(damaged[: len(damaged) - cut])
    found = sound.milliseconds(shortened)
    assert found is None or 0 < found <= sound.LONGEST_MS
    assert sound.most_milliseconds(shortened) >= 0
