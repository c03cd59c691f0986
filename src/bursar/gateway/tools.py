"""Tools that a provider runs itself and may bill beside tokens: what a request permits, before anything was done.

Sources: the tool types of the official Python clients; OpenAI's price page (web search and file search by the thousand
calls, containers by session); Anthropic's pages on web search (by the thousand) and on code execution (containers by
time, free beside the newer web tools). What bills tokens alone is free here, as its tokens are counted anyway. A tool
that is not listed may be billed in a way that nobody here knows, so it has no price and is refused as such.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeGuard

from bursar.pricing.usage import NO_USAGE, Usage

PRIOR_CALLS: Final = 5
"""Calls of a billed tool that are held for where the request names no limit of its own."""

MOST_CALLS: Final = 1_000
"""No request makes more calls of a tool than this, whatever limit it names."""

WEB_SEARCH: Final = "web_searches"
FILE_SEARCH: Final = "file_searches"
CODE: Final = "code_sessions"
TOKENS_ALONE: Final = ""

# Name of the family, without the version -> the kind of usage that its calls are.
_OPENAI: Final[Mapping[str, str]] = {
    **dict.fromkeys(("function", "custom", "namespace", "mcp", "tool_search"), TOKENS_ALONE),
    **dict.fromkeys(("local_shell", "apply_patch", "computer", "computer_use"), TOKENS_ALONE),
    "web_search": WEB_SEARCH,
    "file_search": FILE_SEARCH,
    "code_interpreter": CODE,
    "shell": CODE,
}
_ANTHROPIC: Final[Mapping[str, str]] = {
    **dict.fromkeys(("custom", "bash", "text_editor", "memory", "computer", "computer_toolset"), TOKENS_ALONE),
    **dict.fromkeys(("browser_toolset", "mcp_toolset", "web_fetch", "advisor"), TOKENS_ALONE),
    **dict.fromkeys(("tool_search_tool_bm", "tool_search_tool_regex"), TOKENS_ALONE),
    "web_search": WEB_SEARCH,
    "code_execution": CODE,
}
_STANDARD_MEMORY: Final = "1g"
_MEMORIES: Final = ("4g", "16g", "64g")
# From these versions on, code that filters what was found is not billed.
_FREE_CODE_FROM: Final = 20260209
_WEB_TOOL: Final = re.compile(r"web_(?:search|fetch)_(\d{8})$", re.ASCII)


@dataclass(frozen=True, slots=True)
class Permitted:
    """What a request lets the provider's tools do.

    sure       billed in any case, such as a container that is made for the request
    most       what may come beside, held for
    guessed    calls beyond `most`, where the request names no limit
    unpriced   tools that nobody here knows to price
    context    conditions of the price: {'memory_limit': '4g'}
    """

    sure: Usage = NO_USAGE
    most: Usage = NO_USAGE
    guessed: Usage = NO_USAGE
    unpriced: tuple[str, ...] = ()
    context: Mapping[str, str] = field(default_factory=dict)


def of_openai(offered: Iterable[Any], *, most_calls: int | None = None) -> Permitted:
    """What tools in OpenAI's form permit. most_calls: of all tools together, where the request limits it."""
    calls = PRIOR_CALLS if most_calls is None else min(most_calls, MOST_CALLS)
    most: dict[str, int] = {}
    unpriced: list[str] = []
    made = 0
    memories = set()
    for kind, tool in _billed(offered, _OPENAI, unpriced):
        if kind != CODE:
            most[kind] = calls
            continue
        container = tool.get("container") if "container" in tool else tool.get("environment")
        if isinstance(container, dict) and _type(container) in ("auto", "container_auto"):
            made += 1
            memories.add(container["memory_limit"] if container.get("memory_limit") in _MEMORIES else _STANDARD_MEMORY)
        elif _type(container) != "local":
            most[CODE] = most.get(CODE, 0) + min(1, calls)
    largest = max(memories, key=lambda memory: int(memory[:-1]), default=_STANDARD_MEMORY)
    return Permitted(
        sure=Usage(requests=0, code_sessions=made),
        most=Usage(requests=0, **most),
        guessed=_beyond(most) if most_calls is None else NO_USAGE,
        unpriced=tuple(unpriced),
        context={} if largest == _STANDARD_MEMORY else {"memory_limit": largest},
    )


def of_chat(offered: Iterable[Any]) -> tuple[str, ...]:
    """Tools of a chat completion that a provider runs: none of their calls is reported there, so none has a price."""
    return tuple(name[:60] for name in map(_type, offered) if name not in ("", "function", "custom"))


def of_anthropic(offered: Iterable[Any], model: str) -> Permitted:
    """What tools in Anthropic's form permit: `max_uses` of each, and one container for code.

    model: that is asked for. An advisor that is another one is billed at another price, which is not looked up.
    """
    tools = list(offered)
    unpriced = [
        "advisor of another model"
        for tool in tools
        if _type(tool).startswith("advisor") and tool.get("model") not in (model, model.rpartition("/")[2])
    ]
    searches = sessions = 0
    is_guess = False
    for kind, tool in _billed(tools, _ANTHROPIC, unpriced):
        if kind == WEB_SEARCH:
            searches += _uses(tool.get("max_uses"))
            is_guess = is_guess or not _is_count(tool.get("max_uses"))
        else:
            sessions = 1
    if any(_is_newer_web_tool(_type(tool)) for tool in tools):
        sessions = 0
    searches = min(searches, MOST_CALLS)
    return Permitted(
        most=Usage(requests=0, web_searches=searches, code_sessions=sessions),
        guessed=_beyond({WEB_SEARCH: searches}) if is_guess else NO_USAGE,
        unpriced=tuple(unpriced),
    )


def _beyond(calls: Mapping[str, int]) -> Usage:
    """What is left of the most calls that any request makes; a container is one."""
    return Usage(requests=0, **{kind: MOST_CALLS - count for kind, count in calls.items() if kind != CODE})


def _billed(
    offered: Iterable[Any], families: Mapping[str, str], unpriced: list[str]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kind and definition of each tool that is billed beside tokens; the unknown ones are noted in `unpriced`.

    A tool without a type is a function in Anthropic's form, and nonsense for the provider to refuse in OpenAI's.
    """
    for tool in offered:
        name = _type(tool)
        if not name:
            continue
        kind = families.get(name.rstrip("0123456789_").removesuffix("_preview"))
        if kind is None:
            unpriced.append(name[:60])
        elif kind != TOKENS_ALONE:
            yield kind, tool


def _type(tool: object) -> str:
    found = tool.get("type") if isinstance(tool, dict) else None
    return found if isinstance(found, str) else ""


def _uses(limit: object) -> int:
    return min(limit, MOST_CALLS) if _is_count(limit) else PRIOR_CALLS


def _is_count(limit: object) -> TypeGuard[int]:
    return isinstance(limit, int) and not isinstance(limit, bool) and limit >= 0


def _is_newer_web_tool(name: str) -> bool:
    match = _WEB_TOOL.match(name)
    return match is not None and int(match[1]) >= _FREE_CODE_FROM
