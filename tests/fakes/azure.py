"""Azure OpenAI as it answers over HTTP: deployment addresses with `api-version`, and the newer `/openai/v1`.

Source: the reference of Azure OpenAI in Microsoft Foundry, "REST API preview/latest", "v1 API", "Content filtering".
"""

from typing import Any

from aiohttp import web
from tests.fakes.serving import Asked, asked, data, events

KEY = "a0b1c2d3e4f5a0b1c2d3e4f5a0b1c2d3"
DEPLOYMENTS = {"gpt-4o": "gpt-4o-2024-08-06", "team a/gpt 4o": "gpt-4o-2024-08-06"}
USAGE = {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16}
SAFE = {name: {"filtered": False, "severity": "safe"} for name in ("hate", "self_harm", "sexual", "violence")}
PROMPT_FILTER = [{"prompt_index": 0, "content_filter_results": SAFE}]


def _refused(http_status: int, code: str, message: str, **more: Any) -> web.Response:
    error = {"code": code, "message": message, **more}
    return web.json_response({"error": error}, status=http_status, headers={"apim-request-id": "a-request"})


class Azure:
    """The resource; `seen` has every call that was let in."""

    def __init__(self) -> None:
        self.seen: list[Asked] = []

    def application(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/openai/deployments/{deployment}/chat/completions", self._by_deployment)
        app.router.add_post("/openai/v1/chat/completions", self._by_v1)
        return app

    async def _by_deployment(self, request: web.Request) -> web.StreamResponse:
        if "api-version" not in request.query:
            return _refused(404, "404", "Resource not found")
        model = DEPLOYMENTS.get(request.match_info["deployment"])
        if model is None:
            return _refused(404, "DeploymentNotFound", "The API deployment for this resource does not exist.")
        return await self._answer(request, model)

    async def _by_v1(self, request: web.Request) -> web.StreamResponse:
        deployment = (await request.json())["model"]
        if deployment not in DEPLOYMENTS:
            return _refused(404, "DeploymentNotFound", "The API deployment for this resource does not exist.")
        return await self._answer(request, DEPLOYMENTS[deployment])

    async def _answer(self, request: web.Request, model: str) -> web.StreamResponse:
        if request.headers.get("api-key") != KEY:
            message = "Access denied due to invalid subscription key or wrong API endpoint."
            return _refused(401, "401", message)
        call = await asked(request)
        self.seen.append(call)
        if "forbidden" in str(call.body["messages"]):
            inner = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": SAFE}
            return _refused(400, "content_filter", "The prompt was filtered.", status=400, innererror=inner)
        head = {"id": "chatcmpl-1", "created": 1, "model": model, "system_fingerprint": "fp_1"}
        if not call.body.get("stream"):
            choice = {
                "index": 0,
                "message": {"role": "assistant", "content": "Good day to you", "refusal": None},
                "finish_reason": "stop",
                "logprobs": None,
                "content_filter_results": SAFE,
            }
            answer = {**head, "object": "chat.completion", "choices": [choice], "usage": USAGE}
            return web.json_response({**answer, "prompt_filter_results": PROMPT_FILTER})
        return await events(request, self._stream(head, call), **{"x-ms-region": "Sweden Central"})

    def _stream(self, head: dict[str, Any], call: Asked) -> list[str]:
        head = {**head, "object": "chat.completion.chunk"}
        first = {
            "choices": [],
            "id": "",
            "created": 0,
            "model": "",
            "object": "",
            "prompt_filter_results": PROMPT_FILTER,
        }
        pieces = [data(first)]
        for word in ("Good ", "day ", "to ", "you"):
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": None, "content_filter_results": SAFE}
            pieces.append(data({**head, "choices": [choice]}))
        end = {"index": 0, "delta": {}, "finish_reason": "stop", "content_filter_results": {}}
        pieces.append(data({**head, "choices": [end]}))
        if (call.body.get("stream_options") or {}).get("include_usage"):
            pieces.append(data({**head, "choices": [], "usage": USAGE}))
        return [*pieces, "data: [DONE]\n\n"]
