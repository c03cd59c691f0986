"""Fixed-width base 62: digits, capitals, small letters; no sign that has a meaning in addresses, shells or headers."""

from typing import Final

ALPHABET: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_VALUES: Final = {character: value for value, character in enumerate(ALPHABET)}


def width(octets: int) -> int:
    """Characters that hold any value of so many octets: 4 -> 6, 8 -> 11, 16 -> 22, 32 -> 43."""
    digits, largest = 0, (1 << 8 * octets) - 1
    while largest:
        largest //= 62
        digits += 1
    return digits


def encode(data: bytes) -> str:
    """Text of `width(len(data))` characters."""
    number = int.from_bytes(data)
    digits = []
    for _ in range(width(len(data))):
        number, digit = divmod(number, 62)
        digits.append(ALPHABET[digit])
    return "".join(reversed(digits))


def decode(text: str, octets: int) -> bytes:
    """What `encode` made this text of.

    Raises:
        ValueError: no data of so many octets encodes to this text.
    """
    if len(text) != width(octets):
        raise ValueError("not of this width")
    number = 0
    for character in text:
        if character not in _VALUES:
            raise ValueError("not base 62")
        number = number * 62 + _VALUES[character]
    if number >= 1 << 8 * octets:
        raise ValueError("too large")
    return number.to_bytes(octets)
