"""What the demo provider says, decided from the request alone, before it takes a vendor's shape."""

from __future__ import annotations

from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, Final

from bursar.gateway import tokens, wire

DIRECTIONS_HEADER: Final = "Bursar-Demo"

# Of all choices or calls together: an answer is made in memory, in the process of a server.
LONGEST_OUTPUT: Final = 250_000
_SHORTEST_ANSWER: Final = 16
_ANSWER_LENGTHS: Final = 240

# Words of three or seven letters: with the blank that follows, each four characters are one token by our rule.
_WORDS: Final = (
    "the company may measure any request and the balance has its account for all who pay the monthly invoice but not "
    "one without holding the reserve for its purpose yet our finance council set the quarter surplus against new "
    "credits and old savings per project due the receipt was counted between two managed capital and revenue"
)
_CYCLE: Final = _WORDS + " "
_CYCLE_TOKENS: Final = tokens.count_tokens(_CYCLE)
WORD_STARTS: Final = tuple(place // 4 for place in range(0, len(_CYCLE), 4) if place == 0 or _CYCLE[place - 1] == " ")
assert len(_CYCLE) == 4 * _CYCLE_TOKENS


# What an answer is decided from, whatever the format.
_PROMPT: Final = ("model", "system", "messages", "instructions", "input")


@dataclass(frozen=True, slots=True)
class Directions:
    """What the header asks of one call; the docstring of `demo_provider` says what each does."""

    delay_ms: int = 0
    piece_ms: int = 0
    fail: int = 0
    error_after: int | None = None
    break_after: int | None = None
    usage: str = ""
    output_tokens: int | None = None
    cached: int = 0
    cache_write: int = 0
    cache_write_1h: int = 0
    reasoning: int = 0
    tool_calls: int = 0
    searches: int = 0
    bytes: int = 0
    file_searches: int = 0
    code_sessions: int = 0
    batch_ms: int | None = None
    batch_errored: int = 0
    batch_expired: int = 0


PLAIN_DIRECTIONS: Final = Directions()
_NAMES: Final = frozenset(field.name for field in fields(Directions))


def read_directions(header: str) -> Directions:
    """Read `name=value; name=value`.

    Raises:
        UnreadableRequest: a name is unknown or a value is no number.
    """
    values: dict[str, Any] = {}
    for part in filter(None, map(str.strip, header.split(";"))):
        name, _, value = part.partition("=")
        if name not in _NAMES:
            raise wire.UnreadableRequest(f"{DIRECTIONS_HEADER}: {name!r} is none of {', '.join(sorted(_NAMES))}")
        if name == "usage":
            values[name] = value
        elif value.isascii() and value.isdigit() and len(value) <= 8:
            values[name] = int(value)
        else:
            raise wire.UnreadableRequest(f"{DIRECTIONS_HEADER}: {name} must be a whole number of at most eight digits")
    return Directions(**values)


@dataclass(frozen=True, slots=True)
class Answer:
    """What is said, before it takes a vendor's shape.

    choices: for each choice the pieces of its text; joined they are its text. Empty pieces where tools are called.
    calls: name and pieces of the arguments (JSON) of each tool call.
    """

    id: str
    request: wire.WireRequest
    directions: Directions
    choices: list[list[str]]
    calls: list[tuple[str, list[str]]]
    output_tokens: int
    is_cut: bool

    @property
    def model(self) -> str:
        return self.request.model


def decide(request: wire.WireRequest, directions: Directions, tool_names: list[str]) -> Answer:
    """Decide the whole answer from the request: its digest gives the length and the place where the text begins.

    Raises:
        UnreadableRequest: the directions ask for too much.
    """
    prompt = b"".join(bytes(request.fields[name]) for name in _PROMPT if name in request.fields)
    digest = blake2b(prompt, digest_size=12)
    number = int.from_bytes(digest.digest()[:6], "big")
    length = _SHORTEST_ANSWER + number % _ANSWER_LENGTHS
    limit = request.max_output_tokens
    is_cut = directions.output_tokens is None and limit is not None and length > limit
    if directions.output_tokens is not None:
        length = directions.output_tokens
    elif is_cut and limit is not None:
        length = limit
    if length * max(request.choices, directions.tool_calls) + directions.tool_calls > LONGEST_OUTPUT:
        raise wire.UnreadableRequest(f"The provider demo puts out at most {LONGEST_OUTPUT} tokens")
    starts = [WORD_STARTS[(number + choice) % len(WORD_STARTS)] for choice in range(request.choices)]
    if directions.tool_calls:
        names = tool_names or ["demo_tool"]
        calls = [(names[turn % len(names)], _arguments(starts[0], length)) for turn in range(directions.tool_calls)]
        output = sum(tokens.count_tokens(name + "".join(pieces)) for name, pieces in calls)
        return Answer(digest.hexdigest(), request, directions, [[]], calls, output + directions.reasoning, False)
    choices = [text_pieces(start, length) for start in starts]
    output = length * request.choices + directions.reasoning
    return Answer(digest.hexdigest(), request, directions, choices, [], output, is_cut)


def text_pieces(start: int, length: int) -> list[str]:
    """A text of exactly `length` tokens, one token a piece. start: one of WORD_STARTS."""
    turns = (start + length) // _CYCLE_TOKENS + 1
    text = (_CYCLE * turns)[4 * start : 4 * (start + length)].rstrip()
    return [text[place : place + 4] for place in range(0, len(text), 4)]


def _arguments(start: int, length: int) -> list[str]:
    return ['{"text": "', *text_pieces(start, max(1, length)), '"}']
