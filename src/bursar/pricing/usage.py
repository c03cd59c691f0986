"""What one request used, in the canonical kinds.

The kinds are disjoint: a token is counted in exactly one of them, so that sums never count twice. Adapters convert
(OpenAI and OpenTelemetry count cached tokens inside the input, Anthropic does not). The one exception says so in its
name: `reasoning_tokens` is an "of which" of `output_tokens`, as providers bill it as output unless it has a price of
its own.
"""

from __future__ import annotations

from operator import add
from typing import Final

import msgspec

# The order of the kinds, everywhere: Usage's fields, `as_array()`, the columns of the attribution row, SQL arrays.
# It is only ever appended to.
USAGE_KINDS: Final = (
    "input_tokens",
    "cache_read_tokens",
    "cache_write_5m_tokens",
    "cache_write_1h_tokens",
    "output_tokens",
    "reasoning_tokens",
    "audio_input_tokens",
    "audio_output_tokens",
    "image_input_tokens",
    "image_output_tokens",
    "images",
    "web_searches",
    "audio_milliseconds",
    "characters",
    "requests",
    "file_searches",
    "code_sessions",
)
(
    INPUT_TOKENS,
    CACHE_READ_TOKENS,
    CACHE_WRITE_5M_TOKENS,
    CACHE_WRITE_1H_TOKENS,
    OUTPUT_TOKENS,
    REASONING_TOKENS,
    AUDIO_INPUT_TOKENS,
    AUDIO_OUTPUT_TOKENS,
    IMAGE_INPUT_TOKENS,
    IMAGE_OUTPUT_TOKENS,
    IMAGES,
    WEB_SEARCHES,
    AUDIO_MILLISECONDS,
    CHARACTERS,
    REQUESTS,
    FILE_SEARCHES,
    CODE_SESSIONS,
) = range(len(USAGE_KINDS))
"""Positions in `as_array()`; the first, INPUT_TOKENS, is 0 (PostgreSQL's arrays begin at 1)."""

UsageArray = tuple[int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int, int]


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Counts of one request (or a sum of requests); all are integers of zero or more.

    (Some six are made for each call; as a frozen dataclass each took four times as long.)

    input_tokens           uncached text input
    cache_read_tokens      input that the provider read from its cache
    cache_write_5m_tokens  input written to a cache that lives five minutes (or whose life is not told)
    cache_write_1h_tokens  input written to a cache that lives an hour
    output_tokens          text output, reasoning included
    reasoning_tokens       of output_tokens: what the model thought
    audio_/image_ tokens   tokens of those modalities; not in input_tokens or output_tokens
    images                 images made; their size and quality is the request's `variant`
    web_searches           searches that the provider bills
    audio_milliseconds     sound heard (transcription) or made (speech) where billed by time
    characters             text spoken, where billed by characters
    requests               calls of the provider; 1 for one request
    file_searches          searches of the provider's own stores of files
    code_sessions          containers in which the provider ran code
    """

    input_tokens: int = 0
    cache_read_tokens: int = 0
    cache_write_5m_tokens: int = 0
    cache_write_1h_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0
    audio_input_tokens: int = 0
    audio_output_tokens: int = 0
    image_input_tokens: int = 0
    image_output_tokens: int = 0
    images: int = 0
    web_searches: int = 0
    audio_milliseconds: int = 0
    characters: int = 0
    requests: int = 1
    file_searches: int = 0
    code_sessions: int = 0

    def __post_init__(self) -> None:
        """Counts are never negative, and what was thought is part of what was put out."""
        if min(self.as_array()) < 0:
            raise ValueError(f"usage counts cannot be negative: {self}")
        if self.reasoning_tokens > self.output_tokens:
            raise ValueError(f"reasoning tokens are part of the output tokens: {self}")

    def as_array(self) -> UsageArray:
        """The counts in the order of USAGE_KINDS."""
        return (
            self.input_tokens,
            self.cache_read_tokens,
            self.cache_write_5m_tokens,
            self.cache_write_1h_tokens,
            self.output_tokens,
            self.reasoning_tokens,
            self.audio_input_tokens,
            self.audio_output_tokens,
            self.image_input_tokens,
            self.image_output_tokens,
            self.images,
            self.web_searches,
            self.audio_milliseconds,
            self.characters,
            self.requests,
            self.file_searches,
            self.code_sessions,
        )

    @property
    def total_input_tokens(self) -> int:
        """All that went in, cached or not, of every modality: what long-context tiers go by."""
        return (
            self.input_tokens
            + self.cache_read_tokens
            + self.cache_write_5m_tokens
            + self.cache_write_1h_tokens
            + self.audio_input_tokens
            + self.image_input_tokens
        )

    @property
    def total_output_tokens(self) -> int:
        """All that came out, of every modality; reasoning is inside `output_tokens`."""
        return self.output_tokens + self.audio_output_tokens + self.image_output_tokens

    @property
    def total_tokens(self) -> int:
        """Input and output together: what a limit on tokens counts."""
        return self.total_input_tokens + self.total_output_tokens

    def __add__(self, other: Usage) -> Usage:
        """The sum of two usages, kind by kind."""
        return Usage(*map(add, self.as_array(), other.as_array()))

    def but(self, **counts: int) -> Usage:
        """The same with other counts of some kinds."""
        return msgspec.structs.replace(self, **counts)


NO_USAGE: Final = Usage(requests=0)

assert Usage.__struct_fields__ == USAGE_KINDS
