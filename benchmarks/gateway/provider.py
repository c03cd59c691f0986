"""A provider that costs next to nothing: OpenAI's chat completions, plain and streamed, from bytes made beforehand.

python -m benchmarks.gateway.provider PORT [--pieces N]
"""

import argparse
import asyncio
import json
import re
import socket
from typing import Final

import uvloop

MODEL: Final = "gpt-4o-mini"
TEXT: Final = "The quick brown fox jumps over the lazy dog and then takes a long rest below the old tree. "
USAGE: Final = {"prompt_tokens": 12, "completion_tokens": 20, "total_tokens": 32}
_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_STREAM: Final = re.compile(rb'"stream" ?: ?true')


def plain() -> bytes:
    """A whole answer."""
    message = {"role": "assistant", "content": TEXT, "refusal": None}
    document = {
        "id": "chatcmpl-benchmark",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": MODEL,
        "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}],
        "usage": USAGE,
    }
    body = json.dumps(document).encode()
    return (
        b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-request-id: req-benchmark\r\n"
        b"content-length: %d\r\n\r\n%b" % (len(body), body)
    )


def pieces(count: int) -> list[bytes]:
    """A streamed answer in so many pieces of text, each a write of its own; the first has the head."""

    def event(choices: list[object], **more: object) -> bytes:
        document = {"id": "chatcmpl-benchmark", "object": "chat.completion.chunk", "created": 1_700_000_000}
        text = b"data: " + json.dumps({**document, "model": MODEL, "choices": choices, **more}).encode() + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(text), text)

    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    words = [{"index": 0, "delta": {"content": f"word{n} "}, "finish_reason": None} for n in range(count)]
    events = [event([word]) for word in words]
    events.append(event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
    events.append(event([], usage=USAGE))
    done = b"data: [DONE]\n\n"
    events.append(b"%x\r\n%b\r\n0\r\n\r\n" % (len(done), done))
    return [head + events[0], *events[1:]]


class Provider(asyncio.Protocol):
    """One connection."""

    answer = plain()
    stream: tuple[bytes, ...] = ()

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._buffer = b""
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            length = _LENGTH.search(self._buffer, 0, end)
            whole = end + 4 + (int(length[1]) if length else 0)
            if len(self._buffer) < whole:
                return
            body, self._buffer = self._buffer[end + 4 : whole], self._buffer[whole:]
            if _STREAM.search(body):
                self._write(0)
            else:
                self._transport.write(self.answer)  # type: ignore[union-attr]

    def _write(self, place: int) -> None:
        assert self._transport is not None
        if not self._transport.is_closing():
            self._transport.write(self.stream[place])
            if place + 1 < len(self.stream):
                self._loop.call_soon(self._write, place + 1)


async def serve(port: int, count: int) -> None:
    """Until it is ended."""
    Provider.stream = tuple(pieces(count))
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", port), backlog=1024, reuse_port=True)
    server = await loop.create_server(lambda: Provider(loop), sock=listening)
    await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway.provider", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--pieces", type=int, default=20)
    given = parser.parse_args()
    uvloop.run(serve(given.port, given.pieces))


if __name__ == "__main__":
    main()
