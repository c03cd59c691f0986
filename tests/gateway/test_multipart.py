"""Forms: read exactly, put together again to the byte, and refused where they could be read in two ways."""

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bursar.gateway import multipart
from bursar.gateway.wire import UnreadableRequest

METERED = ("model", "file", "stream")
PLAIN = (
    b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\nwhisper-1\r\n'
    b'--b\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n'
    b"Content-Type: audio/wav\r\n\r\n\0\r\n\xff\r\n"
    b"--b--\r\n"
)
TYPE = "multipart/form-data; boundary=b"


def read(body: bytes, content_type: str = TYPE) -> multipart.Form:
    return multipart.read_form(body, content_type, metered=METERED)


def test_a_form_is_read_and_one_field_put_anew_without_touching_another_byte() -> None:
    form = read(PLAIN)
    file = form.part("file")
    assert file is not None
    assert (form.text("model"), file.filename, bytes(form.content(file))) == ("whisper-1", "a.wav", b"\0\r\n\xff")
    assert form.text("stream") is None
    assert form.with_text("model", "large") == PLAIN.replace(b"whisper-1", b"large")
    assert form.with_text("model", "whisper-1") is form.body
    assert form.content_type == 'multipart/form-data; boundary="b"'


names = st.sampled_from(["prompt", "language", "include[]", "timestamp_granularities[]", "x"])
values = st.lists(st.tuples(names, st.text(max_size=20)), max_size=5)


@given(st.text(min_size=1, max_size=20), st.binary(max_size=200), values, st.text(max_size=12))
def test_what_a_client_writes_is_read_as_it_meant(
    model: str, content: bytes, others: list[tuple[str, str]], filename: str
) -> None:
    fields: dict[str, list[str]] = {}
    for name, value in others:
        fields.setdefault(name, []).append(value)
    request = httpx2.Request(
        "POST", "http://x", data={"model": model, **fields}, files={"file": (filename or "f", content, "audio/wav")}
    )
    body = request.read()
    form = read(body, request.headers["content-type"])
    file = form.part("file")
    assert file is not None
    assert form.text("model") == model
    assert bytes(form.content(file)) == content
    assert {name: form.texts(name) for name in fields} == fields
    again = read(form.with_text("model", "another"), form.content_type)
    assert [(each.name, each.filename) for each in again.parts] == [(each.name, each.filename) for each in form.parts]
    assert again.text("model") == "another"
    assert again.with_text("model", model) == body


HOSTILE = {
    "no form": (b"{}", "application/json"),
    "no boundary": (PLAIN, "multipart/form-data"),
    "two boundaries": (PLAIN, "multipart/form-data; boundary=b; boundary=c"),
    "another boundary": (PLAIN, "multipart/form-data; boundary=c"),
    "an endless boundary": (PLAIN, "multipart/form-data; boundary=" + "b" * 71),
    "a mixed form": (PLAIN, "multipart/mixed; boundary=b"),
    "a preamble": (b"x\r\n" + PLAIN, TYPE),
    "an epilogue": (PLAIN + b"x", TYPE),
    "no end": (PLAIN.removesuffix(b"--b--\r\n"), TYPE),
    "nothing at all": (b"", TYPE),
    "no parts": (b"--b--\r\n", TYPE),
    "a bare line feed before the boundary": (PLAIN.replace(b"\r\n--b\r\n", b"\n--b\r\n"), TYPE),
    "a bare line feed behind the boundary": (PLAIN.replace(b"--b\r\n", b"--b\n", 1), TYPE),
    "blanks behind the boundary": (PLAIN.replace(b"--b\r\n", b"--b \r\n", 1), TYPE),
    "the boundary in a file": (PLAIN.replace(b"\xff", b"--bb"), TYPE),
    "a second form in a file": (PLAIN.replace(b"\xff", b"\n--b\nx"), TYPE),
    "two names": (PLAIN.replace(b'name="model"', b'name="model"; name="x"'), TYPE),
    "two dispositions": (PLAIN.replace(b"Content-Type: audio/wav", b"Content-Disposition: form-data; name=x"), TYPE),
    "an encoded name": (PLAIN.replace(b'name="model"', b"name*=UTF-8''model"), TYPE),
    "an escape in a name": (PLAIN.replace(b'name="model"', rb'name="mod\el"'), TYPE),
    "no name": (PLAIN.replace(b'; name="model"', b""), TYPE),
    "no disposition": (PLAIN.replace(b"Content-Disposition", b"X-Disposition", 1), TYPE),
    "an attachment": (PLAIN.replace(b"form-data; name", b"attachment; name", 1), TYPE),
    "a folded header": (PLAIN.replace(b"form-data; name", b"form-data;\r\n name", 1), TYPE),
    "a bare line feed in a header": (PLAIN.replace(b"form-data; name", b"form-data;\n name", 1), TYPE),
    "a header without a colon": (PLAIN.replace(b"Content-Type: audio/wav", b"Content-Type"), TYPE),
    "base64": (PLAIN.replace(b"Content-Type: audio/wav", b"Content-Transfer-Encoding: base64"), TYPE),
    "endless headers": (PLAIN.replace(b"audio/wav", b"a" * 9_000), TYPE),
    "a model in capitals": (PLAIN.replace(b'"model"', b'"Model"'), TYPE),
    "a list of models": (PLAIN.replace(b'"model"', b'"model[]"'), TYPE),
    "a model with a blank": (PLAIN.replace(b'"model"', b'" model"'), TYPE),
    "too many parts": (b'--b\r\nContent-Disposition: form-data; name="x"\r\n\r\n\r\n' * 200 + b"--b--\r\n", TYPE),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_could_be_read_in_two_ways_is_refused(case: str) -> None:
    with pytest.raises(UnreadableRequest):
        read(*HOSTILE[case])


def test_a_field_that_comes_twice_is_no_file_and_no_endless_text() -> None:
    model = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n'
    for body in (
        model + b"cheap\r\n" + PLAIN,
        model.replace(b'"model"', b'"model"; filename="x"') + b"x\r\n--b--\r\n",
        model + b"x" * 70_000 + b"\r\n--b--\r\n",
        model + b"\xff\r\n--b--\r\n",
    ):
        with pytest.raises(UnreadableRequest):
            read(body).text("model")


def test_a_value_that_holds_the_boundary_is_not_put_in() -> None:
    with pytest.raises(UnreadableRequest):
        read(PLAIN).with_text("model", "x\r\n--b--\r\n")


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            [b"--b", b"\r\n", b"--", b"\n", b'Content-Disposition: form-data; name="model"', b"; ", b'"', b"="]
        ),
        st.binary(max_size=6),
    ),
    max_size=25,
).map(b"".join)


@given(pieces, st.one_of(st.just(TYPE), st.text(max_size=60)))
def test_any_bytes_are_a_form_or_refused(body: bytes, content_type: str) -> None:
    try:
        form = read(body, content_type)
        form.text("model")
    except UnreadableRequest:
        return
    assert (
        b"".join(b"--b\r\n" + body[_head(body, each) : each.end] + b"\r\n" for each in form.parts) + b"--b--"
        == body[: body.rindex(b"--b--") + 5]
    )


def _head(body: bytes, part: multipart.Part) -> int:
    """Where the headers of a part begin."""
    return body.rindex(b"--b\r\n", 0, part.start) + 5
