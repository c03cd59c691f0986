"""The LiteLLM SDK as a small HTTP server: OpenAI's chat completions and embeddings, for every provider that it knows.

A program of its own (`python litellm_adapter.py --port 0`), which `adapter_process` starts, feeds and ends. It imports
nothing of Bursar, so that it runs under any interpreter that has LiteLLM; nothing else imports LiteLLM. On stdout it
says one line: where it listens, or why it does not. It ends when stdin does, which is when whoever started it is gone.

Of a request it takes the body, and from headers: the token that only its starter knows, LiteLLM's name of the provider,
an address in place of the provider's usual one, and the key. Only the fields of CHAT_FIELDS and EMBEDDING_FIELDS go to
the SDK: its own arguments, such as addresses, callbacks and made-up answers, are not the client's to set. An unknown
field is refused, never dropped. Pictures and files come inside the request: the SDK would fetch an address from here.

Prices, retries, caches, callbacks, telemetry and token counting of the SDK are off. What it reports as usage is the
provider's; where the provider reports none it is zero, and Bursar counts by its own rule.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hmac
import importlib.metadata
import importlib.util
import json
import logging
import os
import struct
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

from aiohttp import web

PROVIDER_HEADER: Final = "bursar-litellm-provider"
ADDRESS_HEADER: Final = "bursar-litellm-address"
TOKEN_HEADER: Final = "bursar-adapter-token"
TOKEN_VARIABLE: Final = "BURSAR_ADAPTER_TOKEN"
MALICIOUS_VERSIONS: Final = frozenset({"1.82.7", "1.82.8"})
"""Releases that stole credentials. Source: the project's own security notice."""

CHAT_FIELDS: Final = frozenset(
    ("messages", "temperature", "top_p", "top_k", "n", "stop", "max_tokens", "max_completion_tokens", "modalities")
) | frozenset(
    (
        *("presence_penalty", "frequency_penalty", "logit_bias", "user", "response_format", "seed", "logprobs"),
        *("top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call", "audio"),
        *("prediction", "reasoning_effort", "verbosity", "thinking", "service_tier", "safety_identifier"),
        "web_search_options",
    )
)
EMBEDDING_FIELDS: Final = frozenset(("input", "dimensions", "user", "input_type"))
KEY_FIELDS: Final = frozenset(
    ("api_key", "aws_access_key_id", "aws_secret_access_key", "aws_session_token", "aws_region_name")
) | frozenset(("vertex_project", "vertex_location", "vertex_credentials", "api_version", "organization", "project_id"))
"""What a key that consists of several parts, entered as a JSON object, may have."""

PASSED: Final = ("id", "object", "created", "choices", "system_fingerprint", "service_tier")
CALL_SECONDS: Final = 600.0
MOST_BYTES: Final = 32 * 1024 * 1024
LONGEST_MESSAGE: Final = 2_000
_SECRET_LENGTH: Final = 6


class Refused(Exception):
    """An answer that is no answer: a status and what is said of it."""

    def __init__(self, status: int, message: str, kind: str = "invalid_request_error", code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message[:LONGEST_MESSAGE], "type": kind, "param": None, "code": code}}


class NotUsable(Exception):
    """LiteLLM is not there, or is none that may be used. fault: a word for it."""

    def __init__(self, fault: str, text: str) -> None:
        super().__init__(text)
        self.fault = fault


def load_sdk() -> Any:
    """The SDK, with everything off that is not one call to one provider.

    Raises:
        NotUsable
    """
    if importlib.util.find_spec("litellm") is None:
        raise NotUsable("not_installed", f"LiteLLM is not installed for {sys.executable}")
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if (version := importlib.metadata.version("litellm")) in MALICIOUS_VERSIONS:
            raise NotUsable(
                "malicious", f"LiteLLM {version} steals credentials: remove it, and change what it could read"
            )
    # Before the import, which would fetch a price list and read a .env file otherwise.
    os.environ.update(LITELLM_LOCAL_MODEL_COST_MAP="True", LITELLM_MODE="PRODUCTION", LITELLM_LOG="ERROR")
    logging.disable(logging.CRITICAL)  # its logs would hold what people wrote, and keys
    try:
        import litellm as sdk
    except Exception as error:
        raise NotUsable("broken", f"LiteLLM cannot be imported: {type(error).__name__}: {error}") from error
    for name in ("suppress_debug_info", "disable_token_counter", "disable_hf_tokenizer_download"):
        setattr(sdk, name, True)
    for name in ("telemetry", "drop_params", "modify_params", "set_verbose", "disable_aiohttp_transport"):
        setattr(sdk, name, False)
    sdk.disable_aiohttp_trust_env = True
    sdk.callbacks = []
    sdk.num_retries = 0
    return sdk


class Adapter:
    """The server. token: what each request must bring."""

    def __init__(self, sdk: Any, token: str) -> None:
        self._sdk = sdk
        self._token = token

    def application(self) -> web.Application:
        """The server as an aiohttp application."""
        app = web.Application(client_max_size=MOST_BYTES)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_route("*", "/{path:.*}", self._nothing)
        return app

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        secrets: list[str] = []
        try:
            body = await self._body(request)
            stream = body.pop("stream", None) is True
            body.pop("stream_options", None)  # usage is always asked for, and Bursar shows it to whoever asked
            call = self._call(request, body, CHAT_FIELDS, secrets)
            if not stream:
                return _json(_cleaned(_plain(await self._sdk.acompletion(**call)), call["model"]))
            chunks = await self._sdk.acompletion(**call, stream=True, stream_options={"include_usage": True})
            return await self._stream(request, chunks, call["model"], secrets)
        except Exception as error:
            return _failed(error, secrets)

    async def _nothing(self, request: web.Request) -> web.StreamResponse:
        served = "chat completions and embeddings are"
        return _failed(Refused(404, f"{request.path} is not served for this provider; {served}", code="not_served"), [])

    async def _stream(self, request: web.Request, chunks: Any, model: str, secrets: list[str]) -> web.StreamResponse:
        """Pass the chunks on. Until the first one came, a failure has a status of its own."""
        try:
            events = _events(chunks, model)
            first = await anext(events)
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
            await response.prepare(request)
            await response.write(first)
            try:
                async for event in events:
                    await response.write(event)
            except ConnectionError:
                raise
            except Exception as error:
                await response.write(_event(json.loads(_failed(error, secrets).body or b"")))  # type: ignore[arg-type]
            return response
        finally:
            if hasattr(chunks, "aclose"):  # a client that has gone ends the call at the provider
                await chunks.aclose()

    async def _embeddings(self, request: web.Request) -> web.StreamResponse:
        secrets: list[str] = []
        try:
            body = await self._body(request)
            # Clients ask for base64 on their own; providers do not know it.
            as_base64 = body.pop("encoding_format", None) == "base64"
            call = self._call(request, body, EMBEDDING_FIELDS, secrets)
            found = _plain(await self._sdk.aembedding(**call))
            data = [
                {"object": "embedding", "index": place, "embedding": _vector(each["embedding"], as_base64)}
                for place, each in enumerate(found["data"])
            ]
            usage = _usage(found.get("usage"))
            return _json({"object": "list", "data": data, "model": call["model"], "usage": usage})
        except Exception as error:
            return _failed(error, secrets)

    async def _body(self, request: web.Request) -> dict[str, Any]:
        if not hmac.compare_digest(request.headers.get(TOKEN_HEADER, "").encode(), self._token.encode()):
            raise Refused(401, "This is not for you", "authentication_error")
        try:
            body = json.loads(await request.read())
        except ValueError:
            raise Refused(400, "The body is no JSON") from None
        if not isinstance(body, dict) or not isinstance(body.get("model"), str):
            raise Refused(400, "The body is no object with a model")
        return {name: value for name, value in body.items() if value is not None}

    def _call(
        self, request: web.Request, body: dict[str, Any], known: frozenset[str], secrets: list[str]
    ) -> dict[str, Any]:
        """The arguments for the SDK. secrets: gets what must not be told."""
        model = body.pop("model")
        unknown = sorted(body.keys() - known)
        if unknown:
            raise Refused(400, f"{', '.join(unknown)}: not known for this provider", code="unknown_parameter")
        _refuse_addresses(body.get("messages"))
        _refuse_addresses(body.get("input"))
        arguments = {**body, "model": model, "custom_llm_provider": request.headers[PROVIDER_HEADER]}
        arguments |= {"timeout": CALL_SECONDS, "num_retries": 0, "max_retries": 0, "caching": False, "no-log": True}
        if address := request.headers.get(ADDRESS_HEADER):
            arguments["api_base"] = address
        key = _key(request.headers.get("Authorization", "").removeprefix("Bearer "))
        secrets += [text for text in _texts(key) if len(text) >= _SECRET_LENGTH]
        return arguments | key


def _key(text: str) -> dict[str, Any]:
    """A key, or the parts of one that is entered as a JSON object, as AWS's and Google's."""
    if not text.startswith("{"):
        return {"api_key": text} if text else {}
    try:
        parts = json.loads(text)
    except ValueError:
        raise Refused(401, "The provider key is no JSON object", "authentication_error") from None
    unknown = sorted(parts.keys() - KEY_FIELDS)
    if unknown:
        raise Refused(401, f"The provider key has unknown parts: {', '.join(unknown)}", "authentication_error")
    # Google's is an object itself, which the SDK takes as text.
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in parts.items()}


def _texts(value: Any) -> list[str]:
    """Every text in a value, and the whole of what is JSON inside a text."""
    if isinstance(value, Mapping):
        return [text for each in value.values() for text in _texts(each)]
    if not isinstance(value, str):
        return []
    inside: list[str] = []
    if value.startswith("{"):
        with contextlib.suppress(ValueError):
            inside = _texts(json.loads(value))
    return [value, *inside]


def _refuse_addresses(value: Any) -> None:
    """Nothing is fetched from here: not from the network around the server, and not from the world."""
    if isinstance(value, list):
        for each in value:
            _refuse_addresses(each)
    elif isinstance(value, dict):
        for name, each in value.items():
            if name in ("url", "image_url", "file_id", "file_url", "uri") and isinstance(each, str):
                if not each.startswith("data:"):
                    raise Refused(400, f"{name}: send the data itself, as data:…;base64,…", code="address_not_fetched")
            elif name not in ("arguments", "parameters"):
                _refuse_addresses(each)


async def _events(chunks: Any, model: str) -> AsyncIterator[bytes]:
    """Chunks as events; usage comes once, at the end, in a chunk without choices, as OpenAI sends it."""
    usage: Any = None
    head: dict[str, Any] = {}
    async for chunk in chunks:
        document = _plain(chunk)
        usage = document.pop("usage", None) or usage
        head = _cleaned(document, model)
        yield _event(head)
    if usage is not None:
        yield _event({**head, "choices": [], "usage": _usage(usage)})
    yield b"data: [DONE]\n\n"


def _event(document: Any) -> bytes:
    return b"data: " + json.dumps(document, ensure_ascii=False).encode() + b"\n\n"


def _plain(value: Any) -> Any:
    """What the SDK gives, as plain JSON values without empty fields."""
    if hasattr(value, "model_dump"):
        value = value.model_dump()
    if isinstance(value, Mapping):
        return {name: _plain(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value


def _cleaned(document: dict[str, Any], model: str) -> dict[str, Any]:
    """An answer or chunk with what OpenAI's have, and the model as it was asked for."""
    answer = {name: document[name] for name in PASSED if name in document} | {"model": model}
    if "usage" in document:
        answer["usage"] = _usage(document["usage"])
    return answer


def _usage(reported: Mapping[str, Any] | None) -> dict[str, Any]:
    """The SDK's count in OpenAI's form, where what the cache gave and took is a part of the prompt, as it is there."""
    usage = reported or {}
    given = usage.get("prompt_tokens_details") or {}
    made = usage.get("completion_tokens_details") or {}
    prompt, completion = _count(usage.get("prompt_tokens")), _count(usage.get("completion_tokens"))
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": max(prompt + completion, _count(usage.get("total_tokens"))),
        "prompt_tokens_details": {
            "cached_tokens": _count(given.get("cached_tokens") or usage.get("cache_read_input_tokens")),
            "cache_write_tokens": _count(
                given.get("cache_creation_tokens") or usage.get("cache_creation_input_tokens")
            ),
            "audio_tokens": _count(given.get("audio_tokens")),
            "image_tokens": _count(given.get("image_tokens")),
        },
        "completion_tokens_details": {
            "reasoning_tokens": _count(made.get("reasoning_tokens")),
            "audio_tokens": _count(made.get("audio_tokens")),
        },
    }


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value > 0 else 0


def _vector(numbers: Any, as_base64: bool) -> Any:
    """A vector; as base64 in little-endian floats of 32 bits. Source: the official OpenAI client's reading of it."""
    if as_base64 and isinstance(numbers, list):
        return base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
    return numbers


def _json(document: Any, status: int = 200) -> web.Response:
    return web.Response(
        body=json.dumps(document, ensure_ascii=False).encode(), status=status, content_type="application/json"
    )


def _failed(error: Exception, secrets: list[str]) -> web.Response:
    """A failure in OpenAI's form. The provider's own words are told, less the key; the SDK's own faults are not."""
    if isinstance(error, Refused):
        return _json(error.body, error.status)
    status = getattr(error, "status_code", None)
    if isinstance(error, TimeoutError) or type(error).__name__ == "Timeout":
        status = 504
    elif type(error).__name__ == "APIConnectionError":
        status = 502
    if not isinstance(status, int) or not 400 <= status < 600:
        refused = Refused(500, f"The LiteLLM adapter failed: {type(error).__name__}", "server_error")
        return _json(refused.body, refused.status)
    text = str(error).partition("\nTraceback (most recent call last)")[0]  # which some of the SDK's faults hold
    for secret in secrets:
        text = text.replace(secret, "[removed]")
    kind = "rate_limit_error" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
    return _json(Refused(status, text, kind).body, status)


async def serve(port: int) -> None:
    """Listen on a port of this machine (any free one for 0), say where, and go on until stdin ends."""
    # Taken out, so that nothing of the SDK's finds it there.
    token = os.environ.pop(TOKEN_VARIABLE)
    try:
        sdk = load_sdk()
    except NotUsable as fault:
        print(json.dumps({"fault": fault.fault, "text": str(fault)}), flush=True)
        return
    runner = web.AppRunner(
        Adapter(sdk, token).application(), access_log=None, shutdown_timeout=5, handler_cancellation=True
    )
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", port, backlog=1024, reuse_address=True)
    await site.start()
    print(json.dumps({"port": runner.addresses[0][1]}), flush=True)
    await asyncio.to_thread(sys.stdin.buffer.read)
    await runner.cleanup()


def main() -> None:
    """Run as a program."""
    parser = argparse.ArgumentParser(description="LiteLLM behind an OpenAI-compatible address, for Bursar alone")
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    asyncio.run(serve(arguments.port))
    os._exit(0)  # the SDK leaves threads behind


if __name__ == "__main__":
    main()
