"""vLLM's OpenAI-compatible server as it answers over HTTP: no key, one model, usage on every chunk where asked.

Source: the documentation and protocol definitions of vLLM's OpenAI-compatible server.
"""

from typing import Any

from aiohttp import web
from tests.fakes.serving import Asked, asked, data, events

MODEL = "meta-llama/Llama-3.1-8B-Instruct"
WORDS = ("Good ", "day ", "to ", "you")
PROMPT_TOKENS = 20


def _usage(completion: int) -> dict[str, Any]:
    whole = {
        "prompt_tokens": PROMPT_TOKENS,
        "total_tokens": PROMPT_TOKENS + completion,
        "completion_tokens": completion,
    }
    return {**whole, "prompt_tokens_details": None}


class Vllm:
    """The server; `seen` has every call."""

    def __init__(self) -> None:
        self.seen: list[Asked] = []

    def application(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._models)
        return app

    async def _models(self, request: web.Request) -> web.Response:
        model = {"id": MODEL, "object": "model", "created": 1, "owned_by": "vllm", "root": MODEL, "max_model_len": 8192}
        return web.json_response({"object": "list", "data": [model]})

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        call = await asked(request)
        self.seen.append(call)
        if call.body["model"] != MODEL:
            message = f"The model `{call.body['model']}` does not exist."
            error = {"message": message, "type": "NotFoundError", "param": "model", "code": 404}
            return web.json_response({"error": error}, status=404)
        if call.body.get("stream_options") and not call.body.get("stream"):
            message = "Stream options can only be defined when `stream=True`."
            error = {"message": message, "type": "BadRequestError", "param": None, "code": 400}
            return web.json_response({"error": error}, status=400)
        head = {"id": "chatcmpl-2", "created": 1, "model": MODEL}
        if not call.body.get("stream"):
            message = {"role": "assistant", "content": "".join(WORDS), "reasoning_content": None, "tool_calls": []}
            choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
            whole = {**head, "object": "chat.completion", "choices": [choice], "usage": _usage(len(WORDS))}
            return web.json_response({**whole, "prompt_logprobs": None, "kv_transfer_params": None})
        return await events(request, self._stream(head, call.body.get("stream_options") or {}))

    def _stream(self, head: dict[str, Any], options: dict[str, Any]) -> list[str]:
        head = {**head, "object": "chat.completion.chunk"}
        counts = options.get("include_usage") and options.get("continuous_usage_stats")
        pieces = []
        for place, word in enumerate(("", *WORDS)):
            delta = {"role": "assistant", "content": ""} if place == 0 else {"content": word}
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
            pieces.append({**head, "choices": [choice], **({"usage": _usage(place)} if counts else {})})
        end = {"index": 0, "delta": {"content": ""}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}
        pieces.append({**head, "choices": [end], **({"usage": _usage(len(WORDS))} if counts else {})})
        if options.get("include_usage"):
            pieces.append({**head, "choices": [], "usage": _usage(len(WORDS))})
        return [*map(data, pieces), "data: [DONE]\n\n"]
