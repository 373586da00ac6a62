"""The feature bits and header extensions of qcow2."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag

_FEATURE_ENTRY = struct.Struct(">BB46s")


class Incompatible(IntFlag):
    """Features without which an image cannot be opened."""

    DIRTY = 1
    CORRUPT = 2
    DATA_FILE = 4
    COMPRESSION_TYPE = 8
    EXTENDED_L2 = 16


class Compatible(IntFlag):
    """Features that may be ignored."""

    LAZY_REFCOUNTS = 1


class Autoclear(IntFlag):
    """Features that a program which does not know them switches off by writing."""

    BITMAPS = 1
    RAW_DATA_FILE = 2


class Extension(IntEnum):
    """Known types of header extensions."""

    END = 0
    BACKING_FORMAT = 0xE2792ACA
    FEATURE_NAMES = 0x6803F857
    BITMAPS = 0x23852875
    ENCRYPTION = 0x0537BE77
    DATA_FILE = 0x44415441


class FeatureKind(IntEnum):
    """Which feature word an entry of the feature name table is about."""

    INCOMPATIBLE = 0
    COMPATIBLE = 1
    AUTOCLEAR = 2


def feature_names(table: bytes) -> dict[tuple[int, int], str]:
    """The feature name table: (kind of feature, bit) -> name. A trailing piece of an entry is ignored."""
    usable = len(table) - len(table) % _FEATURE_ENTRY.size
    return {
        (kind, bit): name.rstrip(b"\0").decode(errors="replace")
        for kind, bit, name in _FEATURE_ENTRY.iter_unpack(table[:usable])
    }
