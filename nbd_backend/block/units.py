"""Units as types, so that an offset in a file and a size never mix, and sizes as people write them."""

import re
from typing import NewType

HostOffset = NewType("HostOffset", int)
"""Bytes from the start of an image file."""

SECTOR = 512
KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_SIZE = re.compile(r"(\d+)\s*([KMGTPE]?)(?:iB|B)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50, "E": 60}


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient rounded up; `divisor` is positive."""
    return -(-dividend // divisor)


def is_power_of_two(value: int) -> bool:
    """True for 1, 2, 4, …"""
    return value > 0 and value & (value - 1) == 0


def parse_size(text: str) -> int:
    """Bytes of a size such as ``512``, ``64K``, ``10 GiB`` (powers of 1024, below 2**63); ValueError
    otherwise.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(match[1]) << _SHIFT[match[2].upper()] if match else -1
    if not 0 <= size < 1 << 63:
        raise ValueError(f"'{text}' is not a size: expected a number of bytes or one with K, M, G, T, P or E")
    return size
