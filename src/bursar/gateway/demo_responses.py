"""Answers of the demo provider in the shape of OpenAI's responses, plain and streamed."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any, Final

import msgspec

from bursar.gateway import demo_openai, sse, wire
from bursar.gateway.demo_answers import Answer
from bursar.gateway.demo_openai import error

__all__ = ["body", "compacted", "error", "error_event", "events", "tools"]

_encode: Final = msgspec.json.encode


def tools(request: wire.WireRequest) -> list[str]:
    """Names of the functions that the request offers."""
    offered = wire.read_anything(request.fields, "tools")
    known = [tool for tool in offered if isinstance(tool, dict)] if isinstance(offered, list) else []
    return [str(tool["name"]) for tool in known if tool.get("type") == "function" and "name" in tool]


def body(answer: Answer) -> bytes:
    """The plain answer."""
    items = [*_tool_items(answer), *_spoken_items(answer)]
    return _encode(_response(answer, _status(answer), items))


def compacted(answer: Answer) -> bytes:
    """A compaction: an item that stands for what was said before."""
    text = "".join(answer.choices[0])
    item = {"id": f"cmp_{answer.id}", "type": "compaction", "encrypted_content": text}
    document = {"id": f"resp_{answer.id}", "object": "response.compaction", "created_at": demo_openai.CREATED}
    return _encode({**document, "output": [item], "usage": _usage(answer)})


def events(answer: Answer) -> tuple[list[bytes], list[bytes], list[bytes]]:
    """The events before the pieces, one for each piece, and those after."""
    numbers = count()

    def event(kind: str, **fields: Any) -> bytes:
        data = {"type": kind, "sequence_number": next(numbers), **fields}
        return sse.event_bytes(_encode(data), kind)

    first = [
        event(f"response.{state}", response=_response(answer, "in_progress", []))
        for state in ("created", "in_progress")
    ]
    for place, item in enumerate(_tool_items(answer)):
        begun = {**item, "status": "in_progress"}
        first.append(event("response.output_item.added", output_index=place, item=begun))
        first.append(event("response.output_item.done", output_index=place, item=item))
    pieces: list[bytes] = []
    last: list[bytes] = []
    spoken = list(_spoken_items(answer))
    for place, item in enumerate(spoken, len(_tool_items(answer))):
        where = {"item_id": item["id"], "output_index": place}
        opened, done = _around(item)
        head = [event(kind, **where, **fields) for kind, fields in opened]
        texts = answer.calls[place - len(_tool_items(answer))][1] if answer.calls else answer.choices[0]
        delta = "response.function_call_arguments.delta" if answer.calls else "response.output_text.delta"
        more = {} if answer.calls else {"content_index": 0, "logprobs": []}
        of_item = [event(delta, **where, **more, delta=text) for text in texts]
        if answer.calls:  # a call is a part of the answer, as its pieces are
            pieces += [*head, *of_item]
        else:
            first += head
            pieces += of_item
        closing = [event(kind, **where, **fields) for kind, fields in done]
        if answer.calls:
            pieces[-1] += b"".join(closing)
        else:
            last += closing
    status = _status(answer)
    last.append(event(f"response.{status}", response=_response(answer, status, [*_tool_items(answer), *spoken])))
    return first, pieces, last


_Events = list[tuple[str, dict[str, Any]]]


def _around(item: dict[str, Any]) -> tuple[_Events, _Events]:
    """Events before and after the pieces of an item."""
    added, done = "response.output_item.added", "response.output_item.done"
    if item["type"] == "function_call":
        begun = {**item, "arguments": "", "status": "in_progress"}
        arguments = {"name": item["name"], "arguments": item["arguments"]}
        return [(added, {"item": begun})], [
            ("response.function_call_arguments.done", arguments),
            (done, {"item": item}),
        ]
    [part] = item["content"]
    return (
        [
            (added, {"item": {**item, "content": [], "status": "in_progress"}}),
            ("response.content_part.added", {"content_index": 0, "part": {**part, "text": ""}}),
        ],
        [
            ("response.output_text.done", {"content_index": 0, "text": part["text"], "logprobs": []}),
            ("response.content_part.done", {"content_index": 0, "part": part}),
            (done, {"item": item}),
        ],
    )


def _tool_items(answer: Answer) -> list[dict[str, Any]]:
    """What came before the answer: thought, and calls of the provider's own tools."""
    asked = answer.directions
    items: list[dict[str, Any]] = []
    if asked.reasoning:
        items.append({"id": f"rs_{answer.id}", "type": "reasoning", "summary": []})
    items += [
        {"id": f"ws_{answer.id}{turn}", "type": "web_search_call", "status": "completed", "action": {"type": "search"}}
        for turn in range(asked.searches)
    ]
    items += [
        {"id": f"fs_{answer.id}{turn}", "type": "file_search_call", "status": "completed", "queries": []}
        for turn in range(asked.file_searches)
    ]
    items += [
        {
            "id": f"ci_{answer.id}{turn}",
            "type": "code_interpreter_call",
            "status": "completed",
            "container_id": f"cntr_{answer.id}{turn}",
            "code": None,
            "outputs": None,
        }
        for turn in range(asked.code_sessions)
    ]
    return items


def _spoken_items(answer: Answer) -> Iterator[dict[str, Any]]:
    if not answer.calls:
        text = {"type": "output_text", "text": "".join(answer.choices[0]), "annotations": [], "logprobs": []}
        item = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant", "content": [text]}
        yield {**item, "status": _status(answer)}
    for turn, (name, arguments) in enumerate(answer.calls):
        yield {
            "id": f"fc_{answer.id}{turn}",
            "call_id": f"call_{answer.id}{turn}",
            "type": "function_call",
            "status": "completed",
            "name": name,
            "arguments": "".join(arguments),
        }


def _status(answer: Answer) -> str:
    return "incomplete" if answer.is_cut and not answer.calls else "completed"


def _response(answer: Answer, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
    offered = wire.read_anything(answer.request.fields, "tools")
    response: dict[str, Any] = {
        "id": f"resp_{answer.id}",
        "object": "response",
        "created_at": demo_openai.CREATED,
        "status": status,
        "model": answer.model,
        "output": output,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "instructions": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": wire.read_anything(answer.request.fields, "previous_response_id"),
        "service_tier": answer.request.service_tier or "default",
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": offered if isinstance(offered, list) else [],
        "top_p": 1.0,
        "usage": None if status == "in_progress" else _usage(answer),
    }
    if status != "in_progress" and answer.directions.searches:
        response["tool_usage"] = {"web_search": {"num_requests": answer.directions.searches}, "image_gen": _NO_IMAGES}
    return response


_NO_TOKENS: Final = {"image_tokens": 0, "text_tokens": 0}
_NO_IMAGES: Final = {"input_tokens": 0, "input_tokens_details": _NO_TOKENS, "output_tokens": 0, "total_tokens": 0}


def _usage(answer: Answer) -> dict[str, Any] | None:
    asked = answer.directions
    if asked.usage == "missing":
        return None
    into, out = answer.request.input_tokens, answer.output_tokens
    if asked.usage == "zero":
        into = out = 0
    return {
        "input_tokens": into,
        "input_tokens_details": {"cached_tokens": asked.cached, "cache_write_tokens": asked.cache_write},
        "output_tokens": out,
        "output_tokens_details": {"reasoning_tokens": asked.reasoning},
        "total_tokens": into + out,
    }


def error_event() -> bytes:
    """An error inside a stream."""
    failure = {"type": "error", "code": "server_error", "message": "The server had an error.", "param": None}
    return sse.event_bytes(_encode({**failure, "sequence_number": 0}), "error")
