"""Answers of the demo provider in Anthropic's shape, plain and streamed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from bursar.gateway import sse, wire
from bursar.gateway.demo_answers import Answer

_encode: Final = msgspec.json.encode


def tools(request: wire.WireRequest) -> list[str]:
    """Names of the tools that the request offers."""
    offered = wire.read_anything(request.fields, "tools")
    known = offered if isinstance(offered, list) else []
    return [str(tool["name"]) for tool in known if isinstance(tool, dict) and "name" in tool]


def _usage(answer: Answer) -> dict[str, Any] | None:
    asked = answer.directions
    if asked.usage == "missing":
        return None
    if asked.usage == "zero":
        return {"input_tokens": 0, "output_tokens": 0}
    beside = asked.cached + asked.cache_write + asked.cache_write_1h
    usage: dict[str, Any] = {
        "input_tokens": max(0, answer.request.input_tokens - beside),
        "cache_creation_input_tokens": asked.cache_write + asked.cache_write_1h,
        "cache_read_input_tokens": asked.cached,
        "cache_creation": {
            "ephemeral_5m_input_tokens": asked.cache_write,
            "ephemeral_1h_input_tokens": asked.cache_write_1h,
        },
        "output_tokens": answer.output_tokens,
        "service_tier": "standard",
    }
    if asked.reasoning:
        usage["output_tokens_details"] = {"thinking_tokens": asked.reasoning}
    if asked.searches:
        usage["server_tool_use"] = {"web_search_requests": asked.searches, "web_fetch_requests": 0}
    return usage


def _stop(answer: Answer) -> str:
    return "tool_use" if answer.calls else "max_tokens" if answer.is_cut else "end_turn"


def _message(answer: Answer, content: list[dict[str, Any]], stop: str | None) -> dict[str, Any]:
    return {
        "id": f"msg_{answer.id}",
        "type": "message",
        "role": "assistant",
        "model": answer.model,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": None,
    }


def body(answer: Answer) -> bytes:
    """The plain answer."""
    content: list[dict[str, Any]] = [
        {
            "type": "tool_use",
            "id": f"toolu_{answer.id}{turn}",
            "name": name,
            "input": msgspec.json.decode("".join(pieces)),
        }
        for turn, (name, pieces) in enumerate(answer.calls)
    ]
    if not content:
        content = [{"type": "text", "text": "".join(answer.choices[0]), "citations": None}]
    content += _code_blocks(answer)
    message = _message(answer, content, _stop(answer))
    if (usage := _usage(answer)) is not None:
        message["usage"] = usage
    return _encode(message)


def _code_blocks(answer: Answer) -> list[dict[str, Any]]:
    """Code that the provider ran."""
    block = {"type": "server_tool_use", "id": f"srvtoolu_{answer.id}", "name": "code_execution", "input": {}}
    return [block] if answer.directions.code_sessions else []


def _event(kind: str, **values: Any) -> bytes:
    return sse.event_bytes(_encode({"type": kind, **values}), kind)


def events(answer: Answer) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The events before the pieces, one for each piece (blocks open and close with their pieces), and those after."""
    usage = _usage(answer)
    message = _message(answer, [], None)
    if usage is not None:
        message["usage"] = {**usage, "output_tokens": min(1, usage["output_tokens"])}
    first = [_event("message_start", message=message), _event("ping")]
    pieces = _call_pieces(answer) if answer.calls else _text_pieces(answer)
    stop = {"stop_reason": _stop(answer), "stop_sequence": None}
    end = {"delta": stop} if usage is None else {"delta": stop, "usage": _final_counts(usage)}
    code = [
        _event("content_block_start", index=place, content_block=block) + _event("content_block_stop", index=place)
        for place, block in enumerate(_code_blocks(answer), max(1, len(answer.calls)))
    ]
    return first, pieces, [*code, _event("message_delta", **end), _event("message_stop")]


def _final_counts(usage: dict[str, Any]) -> dict[str, Any]:
    """What a message_delta event reports, cumulatively."""
    return {
        name: usage[name] for name in ("output_tokens", "output_tokens_details", "server_tool_use") if name in usage
    }


def _text_pieces(answer: Answer) -> list[bytes]:
    head = (
        b"event: content_block_delta\n"
        b'data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"'
    )
    pieces = [head + piece.encode() + b'"}}\n\n' for piece in answer.choices[0]]
    opened = _event("content_block_start", index=0, content_block={"type": "text", "text": ""})
    closed = _event("content_block_stop", index=0)
    if not pieces:
        return [opened + closed]
    pieces[0] = opened + pieces[0]
    pieces[-1] += closed
    return pieces


def _call_pieces(answer: Answer) -> list[bytes]:
    pieces = []
    for index, (name, arguments) in enumerate(answer.calls):
        block = {"type": "tool_use", "id": f"toolu_{answer.id}{index}", "name": name, "input": {}}
        pieces.append(_event("content_block_start", index=index, content_block=block))
        for piece in arguments:
            delta = {"type": "input_json_delta", "partial_json": piece}
            pieces.append(_event("content_block_delta", index=index, delta=delta))
        pieces[-1] += _event("content_block_stop", index=index)
    return pieces


_ERRORS: Final[Mapping[int, tuple[str, str]]] = {
    400: ("invalid_request_error", "The demo provider was told to refuse this request."),
    401: ("authentication_error", "invalid x-api-key"),
    403: ("permission_error", "Not permitted"),
    404: ("not_found_error", "model"),
    429: ("rate_limit_error", "This request would exceed the rate limit"),
    529: ("overloaded_error", "Overloaded"),
}


def error(status: int) -> bytes:
    """The body of an error with this status."""
    kind, message = _ERRORS.get(status, ("api_error", "Internal server error"))
    return _encode({"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_demo"})


def error_event() -> bytes:
    """An error inside a stream."""
    return sse.event_bytes(error(529), "error")
