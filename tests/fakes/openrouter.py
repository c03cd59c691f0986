"""OpenRouter as it answers over HTTP: comments before the first piece, usage with its own cost, errors in mid-stream.

Source: OpenRouter's documentation, "Streaming", "Errors", "Provider routing", "Usage accounting".
"""

from typing import Any

from aiohttp import web
from tests.fakes.serving import Asked, asked, data, events

KEY = "sk-or-v1-0123456789abcdef"
COMMENT = ": OPENROUTER PROCESSING\n\n"
USAGE = {
    "prompt_tokens": 40,
    "completion_tokens": 4,
    "total_tokens": 44,
    "cost": 0.99,
    "is_byok": False,
    "prompt_tokens_details": {"cached_tokens": 10, "audio_tokens": 0},
    "cost_details": {"upstream_inference_cost": None},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
"""Its cost is absurd on purpose: nobody is charged by it."""


class OpenRouter:
    """The server; `seen` has every call that was let in."""

    def __init__(self) -> None:
        self.seen: list[Asked] = []

    def application(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/api/v1/chat/completions", self._chat)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        if request.headers.get("Authorization") != f"Bearer {KEY}":
            return web.json_response({"error": {"message": "No auth credentials found", "code": 401}}, status=401)
        call = await asked(request)
        self.seen.append(call)
        text = str(call.body["messages"])
        head = {"id": "gen-1", "provider": "Together", "model": call.body["model"], "created": 1}
        if "no credits" in text:
            return web.json_response({"error": {"message": "Insufficient credits", "code": 402}}, status=402)
        if not call.body.get("stream"):
            if "breaks" in text:  # the provider behind it failed after the status was sent
                return web.json_response({"error": {"message": "Provider returned error", "code": 502}})
            if "half" in text:
                error = {"message": "Provider returned error", "code": 502}
                choice = {"index": 0, "message": {"content": "Good day"}, "finish_reason": "error", "error": error}
                return web.json_response({**head, "object": "chat.completion", "choices": [choice], "error": error})
            message = {"role": "assistant", "content": "Good day to you", "refusal": None, "reasoning": None}
            choice = {"index": 0, "message": message, "finish_reason": "stop", "native_finish_reason": "stop"}
            return web.json_response({**head, "object": "chat.completion", "choices": [choice], "usage": USAGE})
        return await events(request, self._stream(head, breaks="breaks" in text))

    def _stream(self, head: dict[str, Any], *, breaks: bool) -> list[str]:
        head = {**head, "object": "chat.completion.chunk"}
        pieces = [COMMENT, COMMENT]
        for word in ("Good ", "day "):
            delta = {"role": "assistant", "content": word}
            choice = {"index": 0, "delta": delta, "finish_reason": None, "native_finish_reason": None}
            pieces += [data({**head, "choices": [choice]}), COMMENT]
        if breaks:
            choice = {"index": 0, "delta": {"content": ""}, "finish_reason": "error"}
            error = {"code": "server_error", "message": "Provider disconnected unexpectedly"}
            return [*pieces, data({**head, "error": error, "choices": [choice]})]
        end = {"index": 0, "delta": {"role": "assistant", "content": "to you"}, "finish_reason": "stop"}
        last = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        pieces += [data({**head, "choices": [end]}), data({**head, "choices": [last], "usage": USAGE})]
        return [*pieces, "data: [DONE]\n\n"]
