"""Sizes as people write them."""

from __future__ import annotations

import pytest

from nbd_backend.block.units import ceil_div, is_power_of_two, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("4k", 4096),
        ("64K", 65536),
        ("10 GiB", 10 << 30),
        ("1MB", 1 << 20),
        ("7E", 7 << 60),
    ],
)
def test_sizes_count_in_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "k", "-1", "1.5G", "8E", "1Q", "12 12"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not a size"):
        parse_size(text)


def test_rounding() -> None:
    assert (ceil_div(0, 8), ceil_div(1, 8), ceil_div(8, 8), ceil_div(9, 8)) == (0, 1, 1, 2)
    assert [value for value in range(-1, 9) if is_power_of_two(value)] == [1, 2, 4, 8]
