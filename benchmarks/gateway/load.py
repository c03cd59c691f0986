"""Callers: each sends a request, takes the answer to its last byte, and sends the next. Prints one JSON line.

python -m benchmarks.gateway.load PORT PATH --connections 32 --seconds 5 [--stream] [--key KEY]
"""

import argparse
import asyncio
import json
import re
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import uvloop

from benchmarks.gateway.provider import MODEL

_LENGTH: Final = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_END: Final = b"\r\n0\r\n\r\n"


class Run:
    """What all callers measured."""

    def __init__(self, request: bytes, stop: float) -> None:
        self.request = request
        self.stop = stop
        self.latencies: list[float] = []
        self.firsts: list[float] = []
        self.statuses: Counter[str] = Counter()
        self.sizes = 0
        self.last = b""


class Caller(asyncio.Protocol):
    """One connection."""

    def __init__(self, run: Run, done: "asyncio.Future[None]") -> None:
        self._run = run
        self._done = done
        self._transport: asyncio.Transport | None = None
        self._began = 0.0
        self._head: bytes | None = None
        self._buffer = b""
        self._whole = 0  # bytes of the answer; 0: it is chunked

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._run.statuses["closed"] += 1
            self._done.set_result(None)

    def _next(self) -> None:
        assert self._transport is not None
        self._head, self._buffer = None, b""
        self._began = time.perf_counter()
        if self._began >= self._run.stop:
            if not self._done.done():
                self._done.set_result(None)
            self._transport.close()
            return
        self._transport.write(self._run.request)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self._head is None:
            end = self._buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._head = self._buffer[:end]
            self._run.firsts.append(time.perf_counter() - self._began)
            length = _LENGTH.search(self._head)
            self._whole = end + 4 + int(length[1]) if length else 0
        if len(self._buffer) >= self._whole if self._whole else self._buffer.endswith(_END):
            run = self._run
            run.latencies.append(time.perf_counter() - self._began)
            run.statuses[self._head[9:12].decode()] += 1
            run.sizes += len(self._buffer)
            run.last = self._buffer
            self._next()


async def measure(port: int, request: bytes, connections: int, seconds: float) -> dict[str, Any]:
    """One run."""
    loop = asyncio.get_running_loop()
    began = time.perf_counter()
    run = Run(request, began + seconds)
    waiting = [loop.create_future() for _ in range(connections)]
    for done in waiting:
        await loop.create_connection(lambda done=done: Caller(run, done), "127.0.0.1", port)  # type: ignore[misc]
    busy = time.process_time()
    await asyncio.wait_for(asyncio.gather(*waiting), seconds + 120)
    took = time.perf_counter() - began
    good = run.statuses["200"]
    return {
        "per_second": good / took,
        "requests": sum(run.statuses.values()),
        "statuses": dict(run.statuses),
        "ms": percentiles(run.latencies),
        "first_ms": percentiles(run.firsts),
        "busy": (time.process_time() - busy) / took,
        "last": run.last[-300:].decode("latin-1") if good != sum(run.statuses.values()) else "",
    }


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """p50, p95, p99 in milliseconds."""
    ordered = sorted(seconds)
    if not ordered:
        return {}
    return {f"p{p}": ordered[min(len(ordered) - 1, len(ordered) * p // 100)] * 1e3 for p in (50, 95, 99)}


def request_of(port: int, path: str, key: str, stream: bool) -> bytes:
    """The bytes of one request."""
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": 20,
        "messages": [{"role": "user", "content": "Say something about a quick brown fox, please."}],
    }
    if stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    raw = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
    ).encode() + raw


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gateway.load", description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("path")
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--key", default="none")
    given = parser.parse_args()
    request = request_of(given.port, given.path, given.key, given.stream)
    print(json.dumps(uvloop.run(measure(given.port, request, given.connections, given.seconds))))


if __name__ == "__main__":
    main()
