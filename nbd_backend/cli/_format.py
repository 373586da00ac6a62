"""How numbers are shown to people."""

from __future__ import annotations

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def size(count: float) -> str:
    """Bytes with three significant digits and a binary unit: ``1.25 MiB``."""
    power = 0
    while power < len(_UNITS) - 1 and count >= 1000 * 1024**power:
        power += 1
    return f"{count / 1024**power:.3g} {_UNITS[power]}B"


def duration(seconds: float) -> str:
    """``8 s``, ``2 min 05 s``, ``3 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
