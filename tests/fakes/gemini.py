"""Gemini as it answers over HTTP in its own format, which only LiteLLM speaks here.

Source: the Gemini API reference, "Generating content", "Streaming", "Embeddings"; its error model.
"""

import json
from typing import Any

from aiohttp import web
from tests.fakes.serving import Asked, asked

KEY = "AIzaSy0123456789abcdefghijklmnopqrstuvwx"
MODEL = "gemini-2.0-flash"
EMBEDDER = "gemini-embedding-001"
WORDS = ("Good ", "day ", "to ", "you")
USAGE = {
    "promptTokenCount": 70,
    "cachedContentTokenCount": 20,
    "candidatesTokenCount": 4,
    "totalTokenCount": 74,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 70}],
}
STATUSES = {400: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}


def _failed(status: int, word: str, message: str) -> web.Response:
    return web.json_response({"error": {"code": status, "message": message, "status": word}}, status=status)


def _part(text: str, reason: str | None = None) -> dict[str, Any]:
    content = {"role": "model", "parts": [{"text": text}]}
    return {"content": content, "index": 0, **({"finishReason": reason} if reason else {})}


class Gemini:
    """The server; `seen` has every call that was let in, `cut` how many streams their readers left early."""

    def __init__(self) -> None:
        self.seen: list[Asked] = []
        self.cut = 0

    def application(self) -> web.Application:
        """The server."""
        app = web.Application()
        app.router.add_post("/v1beta/models/{model}:{method}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        key = request.headers.get("x-goog-api-key") or request.query.get("key", "")
        if key != KEY:
            return _failed(400, "INVALID_ARGUMENT", f"API key not valid. Please pass a valid API key: {key}")
        call = await asked(request)
        self.seen.append(call)
        text = json.dumps(call.body)
        for status, word in STATUSES.items():
            if f"fail {status}" in text:
                return _failed(status, word, f"Gemini says {status} to {KEY}")
        usage = {} if "no usage" in text else {"usageMetadata": USAGE}
        match request.match_info["method"]:
            case "generateContent":
                answer = {"candidates": [_part("".join(WORDS), "STOP")], "modelVersion": MODEL, "responseId": "r"}
                return web.json_response({**answer, **usage})
            case "streamGenerateContent":
                return await self._stream(request, usage, endless="endless" in text)
            case "batchEmbedContents":
                texts = [each["content"]["parts"][0]["text"] for each in call.body["requests"]]
                return web.json_response({"embeddings": [{"values": [float(len(each)), 0.5, -1.0]} for each in texts]})
        return _failed(404, "NOT_FOUND", "no such method")

    async def _stream(self, request: web.Request, usage: dict[str, Any], *, endless: bool) -> web.StreamResponse:
        assert request.query["alt"] == "sse"
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        head = {"modelVersion": MODEL, "responseId": "r"}
        try:
            for word in WORDS[:-1]:
                await _send(response, {"candidates": [_part(word)], **head})
            while endless:
                await _send(response, {"candidates": [_part("more ")], **head})
        except BaseException:
            self.cut += 1
            raise
        await _send(response, {"candidates": [_part(WORDS[-1], "STOP")], **usage, **head})
        return response


async def _send(response: web.StreamResponse, document: dict[str, Any]) -> None:
    await response.write(f"data: {json.dumps(document)}\r\n\r\n".encode())
