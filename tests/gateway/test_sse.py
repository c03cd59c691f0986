import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import sse

STREAM = (
    b"\xef\xbb\xbf: a comment\n\n"
    b"data: one\n\n"
    b"event: named\r\ndata: two\r\n\r\n"
    b"data:three\rdata: four\r\r"
    b"id: 7\nretry: 10\nevent: empty\n\n"
    b'data: {"text": "gr\xc3\xbc\xc3\x9fe \xf0\x9f\x91\x8b"}\r\n\r\n'
    b"\n\n\n"
    b"data\n\n"
    b"data: [DONE]\n\n"
)


def parse(pieces: list[bytes]) -> list[sse.Event]:
    parser = sse.EventParser()
    events = [event for piece in pieces for event in parser.feed(piece)]
    last = parser.finish()
    return [*events, last] if last else events


def pieces_of(data: bytes, cuts: list[int]) -> list[bytes]:
    places = [0, *sorted(cuts), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(places)]


def test_events_are_read_as_the_standard_says() -> None:
    read = [(event.name, event.data) for event in parse([STREAM]) if event.data or event.name]
    assert read == [
        ("", b"one"),
        ("named", b"two"),
        ("", b"three\nfour"),
        ("empty", b""),
        ("", '{"text": "grüße 👋"}'.encode()),
        ("", b"[DONE]"),
    ]


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_any_cut_of_a_stream_gives_the_same_events(cuts: list[int]) -> None:
    assert parse(pieces_of(STREAM, cuts)) == parse([STREAM])


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"data: x", b"data:", b"event: e", b": c", b"q", b"\xc3"])),
    st.data(),
)
def test_any_bytes_in_any_cut_give_the_same_events_and_lose_nothing(parts: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(parts)
    whole = parse([stream])
    cut = parse(pieces_of(stream, data.draw(st.lists(st.integers(0, len(stream))))))
    assert cut == whole
    assert b"".join(event.raw for event in cut) == stream


def test_one_byte_at_a_time_is_the_same_too() -> None:
    assert parse([bytes([byte]) for byte in STREAM]) == parse([STREAM])


def test_a_carriage_return_at_the_end_of_a_piece_waits_for_its_line_feed() -> None:
    parser = sse.EventParser()
    assert parser.feed(b"data: x\r\n\r") == []
    assert [event.raw for event in parser.feed(b"\n")] == [b"data: x\r\n\r\n"]


def test_an_event_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 1000)
    parser = sse.EventParser()
    with pytest.raises(sse.EventTooLong):
        for _ in range(101):
            parser.feed(b"data: xxxx")
