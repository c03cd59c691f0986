"""Ollama's OpenAI-compatible server as it answers over HTTP: no key, connections kept, no usage in older streams.

Source: Ollama's documentation, "OpenAI compatibility", and its release notes on `stream_options`.
"""

from typing import Any

from aiohttp import web
from tests.fakes.serving import Asked, asked, data, events

MODEL = "llama3.2:1b"
WORDS = ("Good ", "day ", "to ", "you")
USAGE = {"prompt_tokens": 26, "completion_tokens": 4, "total_tokens": 30}


class Ollama:
    """The server; `seen` has every call, `connections` the ports that they came from. counts: whether it is new enough
    to tell the usage of a stream.
    """

    def __init__(self, *, counts: bool) -> None:
        self.seen: list[Asked] = []
        self.connections: set[int] = set()
        self.counts = counts

    def application(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = await asked(request)
        self.seen.append(call)
        assert request.transport is not None
        self.connections.add(request.transport.get_extra_info("peername")[1])
        if call.body["model"] != MODEL:
            message = f'model "{call.body["model"]}" not found, try pulling it first'
            error = {"message": message, "type": "api_error", "param": None, "code": None}
            return web.json_response({"error": error}, status=404)
        head = {"id": "chatcmpl-7", "created": 1, "model": MODEL, "system_fingerprint": "fp_ollama"}
        if not call.body.get("stream"):
            choice = {"index": 0, "message": {"role": "assistant", "content": "".join(WORDS)}, "finish_reason": "stop"}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": USAGE})
        return await events(request, self._stream(head, call.body.get("stream_options") or {}))

    def _stream(self, head: dict[str, Any], options: dict[str, Any]) -> list[str]:
        head = {**head, "object": "chat.completion.chunk"}
        words = [{"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None} for word in WORDS]
        end = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": "stop"}
        pieces = [data({**head, "choices": [choice]}) for choice in (*words, end)]
        if self.counts and options.get("include_usage"):
            pieces.append(data({**head, "choices": [], "usage": USAGE}))
        return [*pieces, "data: [DONE]\n\n"]
