"""Answers of the demo provider in OpenAI's shape, plain and streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from bursar.gateway import sse, wire
from bursar.gateway.demo_answers import Answer

CREATED: Final = 1_767_225_600  # 2026-01-01, always, as the same request has the same answer
_encode: Final = msgspec.json.encode


def tools(request: wire.WireRequest) -> list[str]:
    """Names of the functions that the request offers."""
    offered = wire.read_anything(request.fields, "tools")
    functions = (
        [tool.get("function") for tool in offered if isinstance(tool, dict)] if isinstance(offered, list) else []
    )
    return [str(function["name"]) for function in functions if isinstance(function, dict) and "name" in function]


def _usage(answer: Answer) -> dict[str, Any] | None:
    asked = answer.directions
    if asked.usage == "missing":
        return None
    prompt, completion = answer.request.input_tokens, answer.output_tokens
    if asked.usage == "zero":
        prompt = completion = 0
    written = {"cache_write_tokens": asked.cache_write} if asked.cache_write else {}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": asked.cached, **written},
        "completion_tokens_details": {"reasoning_tokens": asked.reasoning},
    }


def _finish(answer: Answer) -> str:
    return "tool_calls" if answer.calls else "length" if answer.is_cut else "stop"


def _calls(answer: Answer) -> list[dict[str, Any]]:
    return [
        {
            "id": f"call_{answer.id}{turn}",
            "type": "function",
            "function": {"name": name, "arguments": "".join(pieces)},
        }
        for turn, (name, pieces) in enumerate(answer.calls)
    ]


def body(answer: Answer) -> bytes:
    """The plain answer."""
    called = {"tool_calls": _calls(answer)} if answer.calls else {}
    completion: dict[str, Any] = {
        "id": f"chatcmpl-{answer.id}",
        "object": "chat.completion",
        "created": CREATED,
        "model": answer.model,
        "choices": [
            {
                "index": index,
                "message": {"role": "assistant", "content": "".join(pieces) or None, "refusal": None, **called},
                "logprobs": None,
                "finish_reason": _finish(answer),
            }
            for index, pieces in enumerate(answer.choices)
        ],
        "service_tier": answer.request.service_tier or "default",
    }
    if (usage := _usage(answer)) is not None:
        completion["usage"] = usage
    return _encode(completion)


def events(answer: Answer) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The events before the pieces, one for each piece, and those after."""
    head = b'data: {"id":"chatcmpl-%b","object":"chat.completion.chunk","created":%d,"model":%b,"choices":[' % (
        answer.id.encode(),
        CREATED,
        _encode(answer.model),
    )
    first = [
        head + b'{"index":%d,"delta":{"role":"assistant","content":""},"finish_reason":null}]}\n\n' % index
        for index in range(len(answer.choices))
    ]
    pieces = [
        head + b'{"index":%d,"delta":{"content":"%b"},"finish_reason":null}]}\n\n' % (index, piece.encode())
        for index, choice in enumerate(answer.choices)
        for piece in choice
    ]
    for index, call in enumerate(_calls(answer)):
        opened = {"index": index, **call, "function": {"name": call["function"]["name"], "arguments": ""}}
        pieces.append(_delta(head, {"tool_calls": [opened]}))
        pieces += [
            _delta(head, {"tool_calls": [{"index": index, "function": {"arguments": piece}}]})
            for piece in answer.calls[index][1]
        ]
    last = [
        head + b'{"index":%d,"delta":{},"finish_reason":"%b"}]}\n\n' % (index, _finish(answer).encode())
        for index in range(len(answer.choices))
    ]
    usage = _usage(answer)
    if answer.request.wants_usage and usage is not None:
        last.append(head + b'],"usage":' + _encode(usage) + b"}\n\n")
    return first, pieces, [*last, b"data: [DONE]\n\n"]


def _delta(head: bytes, delta: dict[str, Any]) -> bytes:
    return head + b'{"index":0,"delta":' + _encode(delta) + b',"finish_reason":null}]}\n\n'


_ERRORS: Final[Mapping[int, tuple[str, str | None, str]]] = {
    400: ("invalid_request_error", None, "The demo provider was told to refuse this request."),
    401: ("invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("invalid_request_error", "unsupported_country_region_territory", "Not permitted."),
    404: ("invalid_request_error", "model_not_found", "The model does not exist."),
    429: ("requests", "rate_limit_exceeded", "Rate limit reached."),
}


def error(status: int) -> bytes:
    """The body of an error with this status."""
    kind, code, message = _ERRORS.get(status, ("server_error", None, "The server had an error."))
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})


def error_event() -> bytes:
    """An error inside a stream."""
    return sse.event_bytes(error(500))
