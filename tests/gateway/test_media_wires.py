"""How embeddings, images, speech and sound are read: what is held for, what a provider's count means, what we count."""

import json
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import httpx2
import openai.types
import openai.types.audio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.gateway import sounds

from bursar.gateway import (
    embeddings_wire,
    images_wire,
    speech_wire,
    sse,
    transcriptions_wire,
    translations_wire,
    wire,
)
from bursar.pricing.usage import Usage

JSON_WIRES = (embeddings_wire, images_wire, speech_wire)
KINDS_OF_TOKENS = ("input_tokens", "output_tokens", "audio_input_tokens", "audio_output_tokens", "image_output_tokens")


def lacking(*priced: str) -> Callable[[Usage], bool]:
    """Of a model that has prices for these kinds alone."""

    def lacks(usage: Usage) -> bool:
        names = [name for name in Usage.__struct_fields__ if name != "requests"]
        return any(getattr(usage, name) for name in names if name not in priced)

    return lacks


def ask(module: ModuleType, **fields: Any) -> Any:
    return module.read_request(json.dumps(fields).encode())


def form(file: bytes = sounds.wav(10.0), name: str = "a.wav", **fields: str) -> transcriptions_wire.SoundRequest:
    request = httpx2.Request("POST", "http://x", data={"model": "m", **fields}, files={"file": (name, file)})
    return transcriptions_wire.read_request(request.read(), request.headers["content-type"])


# ------------------------------------------------------------------------------------- the kinds of a price


def test_the_price_decides_in_which_kinds_a_request_is_held() -> None:
    speech = ask(speech_wire, model="m", input="hello there")
    assert speech.as_priced(lacking("characters")).hold_for(24) == Usage(characters=11)
    by_tokens = speech.as_priced(lacking("input_tokens", "audio_output_tokens"))
    assert by_tokens.hold_for(24) == Usage(input_tokens=3, audio_output_tokens=24)
    images = ask(images_wire, model="m", prompt="cat", n=2)
    assert images.as_priced(lacking("images")).hold_for(9) == Usage(images=2)
    assert images.as_priced(lacking(*KINDS_OF_TOKENS)).hold_for(9) == Usage(input_tokens=1, image_output_tokens=18)
    sound = form()
    assert sound.as_priced(lacking("audio_milliseconds")).hold_for(9) == Usage(audio_milliseconds=10_000)
    both = sound.as_priced(lacking("audio_milliseconds", *KINDS_OF_TOKENS))
    assert both.hold_for(9) == Usage(audio_milliseconds=10_000, output_tokens=9)
    tokens = sound.as_priced(lacking(*KINDS_OF_TOKENS))
    assert tokens.hold_for(9) == Usage(audio_input_tokens=100, output_tokens=9)


def test_where_no_kind_is_priced_the_first_is_what_is_refused() -> None:
    for request in (ask(speech_wire, model="m", input="x"), ask(images_wire, model="m", prompt="x"), form()):
        assert request.as_priced(lambda _: True) is request


# ------------------------------------------------------------------------------------------------- embeddings


@given(st.lists(st.lists(st.integers(0, 200_000), min_size=1, max_size=20), min_size=1, max_size=8))
def test_tokens_are_counted_exactly(lists: list[list[int]]) -> None:
    request = ask(embeddings_wire, model="m", input=lists)
    assert request.hold_for(1_000) == Usage(input_tokens=sum(map(len, lists)))


@pytest.mark.parametrize("given", ["", [], [[]], [""]])
def test_an_input_that_comes_to_nothing_counts_as_a_token(given: Any) -> None:
    request = ask(embeddings_wire, model="m", input=given)
    meter = embeddings_wire.UsageMeter(request)
    meter.read_body(b'{"data": [], "usage": {"prompt_tokens": 0}}')
    assert request.hold_for(1) == meter.measure().usage == Usage(input_tokens=1)


@pytest.mark.parametrize(
    ("usage", "tokens"),
    [
        ({"prompt_tokens": 9, "total_tokens": 9}, 9),
        ({"total_tokens": 9}, 9),  # Voyage
        ({"prompt_tokens": 0, "total_tokens": 0}, None),
        ({"prompt_tokens": -9}, None),
        ({"prompt_tokens": 10**15}, None),
        ({"prompt_tokens": "9"}, None),
        (None, None),
    ],
)
def test_the_count_of_embeddings_is_believed_where_it_can_be_true(usage: Any, tokens: int | None) -> None:
    meter = embeddings_wire.UsageMeter(ask(embeddings_wire, model="m", input="hello there"))
    meter.read_body(json.dumps({"data": [], "model": "m-1", "usage": usage}).encode())
    measured = meter.measure()
    assert measured == wire.Measured(Usage(input_tokens=3 if tokens is None else tokens), estimated=tokens is None)
    assert meter.model == "m-1"


# ----------------------------------------------------------------------------------------------------- images


@pytest.mark.parametrize(
    ("model", "size", "quality", "tokens"),
    [
        ("gpt-image-1", "1024x1024", "low", 272),
        ("gpt-image-1.5", "1024x1536", "medium", 1_584),
        ("gpt-image-1-mini", "1024x1536", "high", 6_240),
        ("gpt-image-1", "auto", "auto", 6_240),
        ("gpt-image-2", "1024x1024", "low", 196),
        ("gpt-image-2", "1024x1024", "high", 7_024),
        ("gpt-image-2.5-flare", "1536x1024", "high", 5_488),
        ("gpt-image-2", "1792x1024", "high", 5_063),
        ("gpt-image-2", "3584x2048", "high", 12_329),
        ("gpt-image-2", "auto", "auto", 7_024),
    ],
)
def test_the_tokens_of_an_image_are_those_that_are_published(model: str, size: str, quality: str, tokens: int) -> None:
    assert images_wire.image_tokens(model, size=size, quality=quality) == tokens


@given(st.text(max_size=12), st.text(max_size=8))
def test_an_image_of_any_size_has_some_tokens(size: str, quality: str) -> None:
    assert images_wire.image_tokens("m", size=size, quality=quality) >= 1


def test_partial_images_and_frames_are_held_for() -> None:
    fields = {"model": "gpt-image-2", "prompt": "cat", "size": "1024x1024", "quality": "low", "n": 2}
    request = ask(images_wire, **fields, partial_images=3, stream=True).otherwise
    assert request.hold_for(request.max_output_tokens).image_output_tokens == 2 * (196 + 300)
    gif = ask(images_wire, **fields, output_format="gif", frame_count=4).otherwise
    assert gif.max_output_tokens == 4 * 196


def test_size_and_quality_are_conditions_of_the_price_and_open_ones_the_usual() -> None:
    assert ask(images_wire, model="m", prompt="x").price_context == {"size": "1024x1024", "quality": "standard"}
    chosen = ask(images_wire, model="m", prompt="x", size="1792x1024", quality="hd")
    assert chosen.price_context == {"size": "1792x1024", "quality": "hd"}
    assert (
        ask(images_wire, model="m", prompt="x", size="1792X1024 ", quality="HD").price_context == chosen.price_context
    )
    assert (
        ask(images_wire, model="m", prompt="x", size="auto", quality=None).price_context
        == ask(images_wire, model="m", prompt="x").price_context
    )


def test_images_that_a_second_model_writes_are_refused_since_its_use_is_not_metered() -> None:
    for fields in ({"output_format": "svg"}, {"svg": {"model": "gpt-5"}}):
        with pytest.raises(wire.UnreadableRequest):
            ask(images_wire, model="gpt-image-2.6-flare", prompt="x", **fields)


def test_what_of_the_output_is_text_is_charged_as_text() -> None:
    usage = openai.types.images_response.Usage(
        input_tokens=50,
        input_tokens_details={"text_tokens": 10, "image_tokens": 40},
        output_tokens=1_100,
        output_tokens_details={"text_tokens": 44, "image_tokens": 1_056},
        total_tokens=1_150,
    )
    assert images_wire.read_usage(usage.to_json().encode()) == Usage(
        input_tokens=10, image_input_tokens=40, output_tokens=44, image_output_tokens=1_056
    )


def test_an_answer_that_cannot_be_read_is_charged_as_what_was_asked_for() -> None:
    by_piece = ask(images_wire, model="m", prompt="cat", n=2)
    for request, wanted in (
        (by_piece, Usage(images=2)),
        (by_piece.otherwise, Usage(input_tokens=1, image_output_tokens=2 * 7_024)),
    ):
        for body in (b"", b"<html>", b"{}", b'{"data": 5}'):
            meter = images_wire.UsageMeter(request)
            meter.read_body(body)
            assert meter.measure() == wire.Measured(wanted, estimated=True)


def test_a_cut_stream_of_images_is_charged_by_what_came() -> None:
    by_tokens = ask(images_wire, model="m", prompt="cat", stream=True, partial_images=3, quality="low").otherwise
    meter = images_wire.UsageMeter(by_tokens)
    partial = sse.event_bytes(b'{"type":"image_generation.partial_image","b64_json":"AAAA"}')
    assert meter.feed(partial * 2 + partial[:20]) == partial * 2
    assert meter.finish() == b""
    assert meter.measure() == wire.Measured(Usage(input_tokens=1, image_output_tokens=200), estimated=True)


# ----------------------------------------------------------------------------------------------------- speech


def heard(data: list[bytes], **fields: Any) -> Usage:
    """What is counted of speech by tokens of which these pieces came."""
    meter = speech_wire.UsageMeter(ask(speech_wire, model="m", input="hello there", **fields).otherwise)
    for piece in data:
        assert meter.feed(piece) == piece
    assert meter.finish() == b""
    measured = meter.measure()
    assert measured.estimated
    return measured.usage


def test_speech_of_a_minute_has_the_published_tokens_in_every_form() -> None:
    for pieces, fields in (
        ([sounds.wav(60.0)], {}),
        ([bytes(48_000)] * 60, {"response_format": "pcm"}),
        ([sounds.mp3(100)] * 25, {}),
        ([sounds.ogg(2_880_312)[:900], sounds.ogg(2_880_312)[900:]], {"response_format": "opus"}),
        ([sounds.adts(1)] * 1_406, {}),
    ):
        assert heard(pieces, **fields).audio_output_tokens in (1_250, 1_250 - 1), fields


def test_sound_that_cannot_be_read_is_taken_for_its_text_and_none_for_nothing() -> None:
    assert heard([b"what", b"ever"]) == Usage(input_tokens=3, audio_output_tokens=15)
    assert heard([]) == Usage(input_tokens=3)


@given(st.lists(st.binary(max_size=50_000), max_size=6))
def test_no_pieces_of_sound_are_too_odd(pieces: list[bytes]) -> None:
    assert heard(pieces).audio_output_tokens >= 0


def test_instructions_are_part_of_the_input_but_are_not_spoken() -> None:
    request = ask(speech_wire, model="m", input="hello there", instructions="be kind now").otherwise
    assert request.hold_for(request.max_output_tokens) == Usage(input_tokens=6, audio_output_tokens=24)


# ---------------------------------------------------------------------------------------------- transcriptions


def measured(request: Any, body: bytes) -> wire.Measured:
    meter = transcriptions_wire.UsageMeter(request)
    meter.read_body(body)
    return meter.measure()


BY_TIME = lacking("audio_milliseconds")
BY_TOKENS = lacking(*KINDS_OF_TOKENS)
BY_BOTH = lacking("audio_milliseconds", *KINDS_OF_TOKENS)


@pytest.mark.parametrize(
    ("body", "milliseconds"),
    [
        ({"text": "hi", "usage": {"type": "duration", "seconds": 7}}, 7_000),
        ({"text": "hi", "usage": {"type": "duration", "seconds": 7.0004}}, 7_000),
        ({"text": "hi", "duration": 6.5}, 6_500),
        ({"text": "hi", "duration": "6.5"}, 6_500),  # whisper-1 for years
        ({"text": "hi", "duration": 6.5, "usage": {"type": "duration", "seconds": 7}}, 7_000),
        ({"text": "hi", "usage": {"prompt_audio_seconds": 9, "completion_tokens": 5}}, 9_000),
        ({"text": "hi", "usage": {"type": "duration", "seconds": -7}}, None),
        ({"text": "hi", "usage": {"type": "duration", "seconds": 1e300}}, None),
        ({"text": "hi", "duration": "long"}, None),
        ({"text": "hi"}, None),
    ],
)
def test_the_length_that_a_provider_reports_is_charged(body: Any, milliseconds: int | None) -> None:
    wanted = wire.Measured(Usage(audio_milliseconds=milliseconds or 10_000), estimated=milliseconds is None)
    assert measured(form().as_priced(BY_TIME), json.dumps(body).encode()) == wanted


def test_the_tokens_that_a_provider_reports_are_charged() -> None:
    usage = openai.types.audio.transcription.UsageTokens(
        type="tokens",
        input_tokens=120,
        input_token_details={"audio_tokens": 100, "text_tokens": 20},
        output_tokens=30,
        total_tokens=150,
    )
    body = json.dumps({"text": "hi", "usage": usage.to_dict()}).encode()
    wanted = Usage(input_tokens=20, audio_input_tokens=100, output_tokens=30)
    assert measured(form().as_priced(BY_TOKENS), body) == wire.Measured(wanted, estimated=False)
    assert measured(form().as_priced(BY_TIME), body) == wire.Measured(Usage(audio_milliseconds=10_000), estimated=True)


def test_a_model_that_bills_time_and_text_is_charged_both() -> None:
    body = json.dumps({"usage": {"prompt_audio_seconds": 9, "prompt_tokens": 4, "completion_tokens": 55}}).encode()
    wanted = Usage(audio_milliseconds=9_000, input_tokens=4, output_tokens=55)
    assert measured(form().as_priced(BY_BOTH), body) == wire.Measured(wanted, estimated=False)
    missing = Usage(audio_milliseconds=10_000, output_tokens=1)
    assert measured(form().as_priced(BY_BOTH), b'{"text": "hi"}') == wire.Measured(missing, estimated=True)


SRT = b"1\n00:00:00,000 --> 00:00:04,000\nhello there\n\n2\n00:00:04,000 --> 01:00:09,250\nhello there\n\n"
VTT = b"WEBVTT\n\n00:00.000 --> 00:09.250\nhello there\n\n"


def test_subtitles_tell_the_length_of_a_sound_whose_file_does_not() -> None:
    unknown = bytes(40_000)
    assert form(unknown).as_priced(BY_TIME).hold_for(0) == Usage(audio_milliseconds=40_000)
    for body, milliseconds in ((SRT, 3_609_250), (VTT, 9_250), (b"hello there\n", 10_000)):
        found = measured(form(unknown).as_priced(BY_TIME), body)
        assert found == wire.Measured(Usage(audio_milliseconds=milliseconds), estimated=True)


def test_a_sound_whose_headers_make_it_shorter_than_its_text_takes_is_charged_by_the_text() -> None:
    told = "word " * 480  # 600 of our tokens: 75 seconds of the fastest speech
    for request in (form(sounds.wav(1.0)), form(sounds.wav(1.0)).otherwise):
        assert measured(request, told.encode()).usage.audio_milliseconds == 75_000
        assert measured(request, b"word").usage.audio_milliseconds == 1_000


def test_only_what_was_spoken_counts_as_text() -> None:
    for body, tokens in ((SRT, 6), (VTT, 3), (b"hello there\n", 3), (b"", 0)):
        found = measured(form(response_format="srt").as_priced(BY_TOKENS), body)
        assert found.usage.output_tokens in (tokens, tokens + 1), body


def test_only_the_model_of_a_form_is_changed() -> None:
    request = httpx2.Request(
        "POST",
        "http://x",
        data={"model": "public", "prompt": "public", "timestamp_granularities[]": ["word", "segment"]},
        files={"file": ("public.wav", b"public", "audio/wav")},
    )
    body = request.read()
    read = transcriptions_wire.read_request(body, request.headers["content-type"])
    sent = transcriptions_wire.upstream_body(read, model="theirs")
    assert sent == body.replace(b'name="model"\r\n\r\npublic', b'name="model"\r\n\r\ntheirs')
    again = httpx2.Request("POST", "http://x", content=sent, headers={"content-type": read.content_type})
    assert transcriptions_wire.read_request(again.read(), again.headers["content-type"]).model == "theirs"


def test_forms_that_metering_cannot_read_are_refused() -> None:
    no_file = httpx2.Request("POST", "http://x", data={"model": "m", "file": "x"}, files={"other": ("a", b"x")})
    for make in (
        lambda: form(stream="maybe"),
        lambda: form(model=""),
        lambda: form(file=b""),
        lambda: transcriptions_wire.read_request(no_file.read(), no_file.headers["content-type"]),
    ):
        with pytest.raises(wire.UnreadableRequest):
            make()


# ------------------------------------------------------------------------------------------------- all of them


@given(st.one_of(st.binary(max_size=60), st.text(max_size=60).map(str.encode)), st.booleans())
def test_no_answer_is_too_odd_to_be_measured(body: bytes, streamed: bool) -> None:
    requests = [
        (embeddings_wire, ask(embeddings_wire, model="m", input="hello there")),
        (images_wire, ask(images_wire, model="m", prompt="cat", stream=True)),
        (speech_wire, ask(speech_wire, model="m", input="hello there", stream_format="sse")),
        (transcriptions_wire, form(stream="true")),
        (translations_wire, form()),
    ]
    for module, first in requests:
        each = first
        while each is not None:
            meter = module.UsageMeter(replace(each))
            if streamed:
                meter.feed(b"data: " + body + b"\n\n")
                meter.feed(body)
                meter.finish()
            else:
                meter.read_body(body)
            assert min(meter.measure().usage.as_array()) >= 0
            each = each.otherwise


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = [
    "model",
    "input",
    "prompt",
    "n",
    "size",
    "quality",
    "stream",
    "instructions",
    "response_format",
    "partial_images",
]


@given(st.dictionaries(st.sampled_from(NAMES), json_values))
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    for module in JSON_WIRES:
        try:
            request = ask(module, **{"model": "m", "input": "x", "prompt": "x", **fields})
        except wire.UnreadableRequest:
            continue
        while request is not None:
            assert min(request.hold_for(1).as_array()) >= 0
            assert json.loads(module.upstream_body(request, model="other"))["model"] == "other"
            request = request.otherwise


@given(st.recursive(json_values, lambda inner: st.dictionaries(st.sampled_from(["usage", "type", "data"]), inner)))
def test_any_usage_of_images_is_believed_or_not(value: Any) -> None:
    found = images_wire.read_usage(json.dumps(value).encode())
    assert found is None or found.total_tokens > 0
