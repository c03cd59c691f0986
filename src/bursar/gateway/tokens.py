"""Our own rule for counting tokens, used where no provider's count is at hand.

The rule, version 1. A token is twelve units. In the UTF-8 form of a text

    a letter, a blank or a control character of ASCII costs    3 units   (four of them make a token)
    a digit costs                                              4 units   (three make a token)
    any other ASCII character (punctuation, symbols) costs     6 units   (two make a token)
    a byte of any character outside ASCII costs                3 units   (a Chinese sign 9, an emoji 12)

and the sum is rounded up once to whole tokens. The rule is near what the large vendors' tokenizers give, rather above
than below for prose and code. Units add up over any cut of a text, so a stream is counted with one integer and no text
is kept. It is used for the estimate of a hold, for answers whose usage is missing, and by the provider `demo`.
"""

from __future__ import annotations

import re
from typing import Final

UNITS_PER_TOKEN: Final = 12
MAX_DEPTH: Final = 64  # a structured-output schema at OpenAI's limit of ten levels nests about forty deep
LEAST_FILE_TOKENS: Final = 1_500
_UNITS_PER_BYTE: Final = 3
_FILE: Final = re.compile(r"data:[\w.+-]+/[\w.+-]+;base64,|[A-Za-z0-9+/_-]{1024}")
_FILE_CHARACTERS_PER_TOKEN: Final = 30
_DIGITS: Final = b"0123456789"
_SYMBOLS: Final = bytes(code for code in range(33, 127) if not chr(code).isalnum())


class TooDeep(ValueError):
    """A JSON value nests deeper than MAX_DEPTH."""


def text_units(text: str) -> int:
    """Units (twelfths of a token) of a text; units of parts add up to the units of the whole."""
    data = text.encode("utf-8", "surrogatepass")
    size = len(data)
    digits = size - len(data.translate(None, _DIGITS))
    symbols = size - len(data.translate(None, _SYMBOLS))
    return _UNITS_PER_BYTE * size + digits + 3 * symbols


def whole_tokens(units: int) -> int:
    """Units rounded up to whole tokens."""
    return -(-units // UNITS_PER_TOKEN)


def count_tokens(text: str) -> int:
    """Tokens of a text by our own rule; the same text always has the same count, the empty text has none."""
    return whole_tokens(text_units(text))


def nested_units(value: object, *, depth: int = MAX_DEPTH) -> int:
    """Units of every text inside a decoded JSON value: keys, strings, numbers as they are written.

    For what has no reading of its own, such as tool definitions and parts of a kind that we do not know. A string that
    is a file rather than a text counts as a file.

    Raises:
        TooDeep: the value nests deeper than MAX_DEPTH.
    """
    if isinstance(value, str):
        return file_units(value) if is_file(value) else text_units(value)
    if isinstance(value, dict | list):
        if depth == 0:
            raise TooDeep
        inner = value.values() if isinstance(value, dict) else value
        names = sum(map(text_units, value)) if isinstance(value, dict) else 0
        return names + sum(nested_units(each, depth=depth - 1) for each in inner)
    return 0 if value is None else text_units(str(value))


def is_file(text: str) -> bool:
    """Whether a string is a base64 data URL, or begins with 1,024 characters of nothing but base64."""
    return _FILE.match(text) is not None


def file_units(encoded: str) -> int:
    """Units of a file in base64: one token for thirty characters, about 2,500 for a page of a PDF of 75 kB."""
    return UNITS_PER_TOKEN * max(LEAST_FILE_TOKENS, len(encoded) // _FILE_CHARACTERS_PER_TOKEN)
