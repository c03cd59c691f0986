"""As much of LiteLLM's SDK as the adapter uses, for one provider: Gemini. So its contract is tried without the SDK."""

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

assert os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] == "True"
num_retries: int | None = None


class APIError(Exception):
    """A failure with a status."""

    def __init__(self, status_code: int, text: str) -> None:
        super().__init__(f"litellm.APIError: GeminiException - {text}")
        self.status_code = status_code


class APIConnectionError(APIError):
    """No connection."""


class Model:
    """A value of the SDK's, which is no plain JSON yet."""

    def __init__(self, **fields: Any) -> None:
        self._fields = fields

    def model_dump(self) -> dict[str, Any]:
        """Its fields, empty ones too."""
        return {"system_fingerprint": None, **self._fields}


class Stream:
    """Chunks of an answer."""

    def __init__(self, session: aiohttp.ClientSession, response: aiohttp.ClientResponse, model: str) -> None:
        self._session = session
        self._response = response
        self._model = model
        self._chunks = self._read()

    def __aiter__(self) -> AsyncIterator[Model]:
        return self._chunks

    async def _read(self) -> AsyncIterator[Model]:
        async for line in self._response.content:
            if not line.startswith(b"data: "):
                continue
            event = json.loads(line[6:])
            [candidate] = event["candidates"]
            yield self._chunk({"content": candidate["content"]["parts"][0]["text"]}, None)
            if "finishReason" in candidate:
                yield self._chunk({}, "stop")
                yield self._chunk({}, None, usage=_usage(event.get("usageMetadata")))
        await self.aclose()

    def _chunk(self, delta: dict[str, Any], reason: str | None, **more: Any) -> Model:
        choice = {"index": 0, "delta": {"role": None, **delta}, "finish_reason": reason}
        return Model(id="s", object="chat.completion.chunk", created=1, model=self._model, choices=[choice], **more)

    async def aclose(self) -> None:
        """End the call."""
        self._response.close()
        await self._session.close()


def _usage(reported: dict[str, Any] | None) -> dict[str, Any]:
    counts = reported or {}
    given, made = counts.get("promptTokenCount", 0), counts.get("candidatesTokenCount", 0)
    cached = {"cached_tokens": counts.get("cachedContentTokenCount")}
    return {
        "prompt_tokens": given,
        "completion_tokens": made,
        "total_tokens": given + made,
        "prompt_tokens_details": cached,
    }


async def _post(address: str, api_key: str, body: dict[str, Any]) -> tuple[aiohttp.ClientSession, Any]:
    session = aiohttp.ClientSession()
    try:
        response = await session.post(address, json=body, headers={"x-goog-api-key": api_key})
        if response.status >= 400:
            text = await response.text()
            raise APIError(401 if "API key not valid" in text else response.status, text)
    except aiohttp.ClientConnectionError as error:
        await session.close()
        raise APIConnectionError(500, "no connection") from error
    except APIError:
        await session.close()
        raise
    return session, response


async def acompletion(
    *,
    model: str,
    custom_llm_provider: str,
    messages: list[Any],
    api_key: str = "",
    api_base: str = "",
    stream: bool = False,
    stream_options: Any = None,
    max_tokens: int | None = None,
    **settings: Any,
) -> Any:
    """A chat completion."""
    if custom_llm_provider != "gemini":
        raise APIError(400, f"LLM Provider NOT provided: {custom_llm_provider}")
    if settings.pop("seed", None) == 666:
        raise RuntimeError(f"a fault of the SDK that knows {api_key}")
    assert settings.keys() <= {"timeout", "num_retries", "max_retries", "caching", "no-log", "temperature"}, settings
    contents = [{"role": "user", "parts": [{"text": each["content"]}]} for each in messages]
    body = {"contents": contents, "generationConfig": {"max_output_tokens": max_tokens}}
    method = "streamGenerateContent?alt=sse" if stream else "generateContent"
    session, response = await _post(f"{api_base}/models/{model}:{method}", api_key, body)
    if stream:
        return Stream(session, response, model)
    answer = await response.json()
    await session.close()
    text = answer["candidates"][0]["content"]["parts"][0]["text"]
    message = {"role": "assistant", "content": text, "tool_calls": None}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = _usage(answer.get("usageMetadata"))
    return Model(id="s", object="chat.completion", created=1, model=model, choices=[choice], usage=usage)


async def aembedding(
    *, model: str, custom_llm_provider: str, input: Any, api_key: str = "", api_base: str = "", **settings: Any
) -> Any:
    """Embeddings."""
    texts = [input] if isinstance(input, str) else input
    requests = [{"model": f"models/{model}", "content": {"parts": [{"text": each}]}} for each in texts]
    session, response = await _post(f"{api_base}/models/{model}:batchEmbedContents", api_key, {"requests": requests})
    answer = await response.json()
    await session.close()
    data = [
        {"object": "embedding", "index": n, "embedding": each["values"]} for n, each in enumerate(answer["embeddings"])
    ]
    return Model(object="list", data=data, model=model, usage={"prompt_tokens": 6, "total_tokens": 6})
