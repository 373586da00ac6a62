"""What of qcow2 this version serves: refusals that name the feature and say what to do instead."""

from __future__ import annotations

import struct

from nbd_backend.block.errors import BadImage, BlockError, Kind
from nbd_backend.block.qcow2.features import Autoclear, Extension, Incompatible
from nbd_backend.block.qcow2.header import Header

_MAX_BITMAPS = 65535
_MAX_BITMAP_DIRECTORY = 1024 * _MAX_BITMAPS
_BITMAPS = struct.Struct(">IIQQ")
_METHODS = {0: "none", 1: "AES", 2: "LUKS"}


def refuse_unsupported(header: Header, file: str, *, writable: bool) -> None:
    """Raise BlockError (Kind.UNSUPPORTED) naming the first feature of `header` that cannot be served."""
    refusals = (
        (
            header.crypt_method != 0,
            f"{_METHODS[header.crypt_method]} encryption",
            "decrypt it with qemu-img convert",
        ),
        (header.incompatible & Incompatible.DATA_FILE, "external data file", _convert(file)),
        (
            header.autoclear & Autoclear.RAW_DATA_FILE and header.data_file is not None,
            "external data file",
            _convert(file),
        ),
        (header.incompatible & Incompatible.EXTENDED_L2, "extended L2 entries (subclusters)", _convert(file)),
        (header.refcount_order != 4, f"refcount width of {header.refcount_bits} bits", _convert(file)),
    )
    for present, feature, hint in refusals:
        if present:
            raise BlockError(Kind.UNSUPPORTED, f"qcow2: {feature} is not supported in '{file}'", hint=hint)
    if writable:
        _refuse_writable(header, file)


def _convert(file: str) -> str:
    return f"convert it: qemu-img convert -O qcow2 {file} NEW"


def _refuse_writable(header: Header, file: str) -> None:
    open_read_only = "or open it with read-only=true"
    refusals = (
        (
            header.incompatible & Incompatible.CORRUPT,
            "qcow2: Image is corrupt; cannot be opened read/write",
            f"repair it: qemu-img check -r all {file}, {open_read_only}",
        ),
        (
            header.incompatible & Incompatible.DIRTY,
            "qcow2: Image is dirty (lazy refcounts); cannot be opened read/write",
            f"repair it: qemu-img check -r leaks {file}, {open_read_only}",
        ),
        (
            header.snapshots,
            f"qcow2: writing to an image with internal snapshots ({header.snapshots}) is not supported",
            f"delete them: qemu-img snapshot -d NAME {file}, {open_read_only}",
        ),
    )
    for present, problem, hint in refusals:
        if present:
            raise BlockError(Kind.UNSUPPORTED, f"{problem}: '{file}'", hint=hint)


def bitmap_count(header: Header, file: str, file_size: int) -> int:
    """How many persistent bitmaps the image has, after checking their extension (the directory is not read).

    Separate from `parse`, because damaged bitmaps do not keep anyone from reading the disk.
    """
    raw = dict(header.extensions).get(Extension.BITMAPS)
    if raw is None:
        return 0
    if len(raw) != _BITMAPS.size:
        raise BadImage(file, "length of bitmaps extension", len(raw), "bitmaps_ext: Invalid extension length")
    count, reserved, size, offset = _BITMAPS.unpack(raw)
    problems = (
        (reserved != 0, "reserved field", reserved, "bitmaps_ext: Reserved field is not zero"),
        (count == 0, "nb_bitmaps", count, "found bitmaps extension with zero bitmaps"),
        (
            count > _MAX_BITMAPS,
            "nb_bitmaps",
            count,
            f"bitmaps_ext: Image has {count} bitmaps, exceeding the supported maximum of {_MAX_BITMAPS}",
        ),
        (
            size > _MAX_BITMAP_DIRECTORY,
            "bitmap_directory_size",
            size,
            f"bitmaps_ext: bitmap directory size ({size}) exceeds the supported {_MAX_BITMAP_DIRECTORY}",
        ),
        (
            offset == 0
            or offset % header.cluster_size != 0
            or offset > file_size
            or size > file_size - offset,
            "bitmap_directory_offset",
            hex(offset),
            "bitmaps_ext: invalid bitmap directory offset",
        ),
    )
    for wrong, field, value, problem in problems:
        if wrong:
            raise BadImage(file, field, value, problem)
    return int(count)
