"""How an overlay's header names the layer below it, turned into options that the graph can open."""

from __future__ import annotations

from typing import Any

from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.node import BlockNode
from nbd_backend.block.qcow2.header import Header, full_backing_name
from nbd_backend.block.security import plain_backing_name, recorded_format

_FORMATS = ("qcow2", "raw")


def image_options(path: str, image_format: str = "qcow2", **common: Any) -> dict[str, Any]:
    """blockdev-add's options for the image at `path`, as the command line means it; `common` are further
    members.
    """
    return {"driver": image_format, **common, "file": {"driver": "file", "filename": path}}


def implicit_backing(header: Header, file: BlockNode) -> dict[str, Any] | None:
    """Options of the backing layer that `header`, found in `file`, names; None without one.

    Raises BlockError (Kind.DENIED) when the name is no plain file name or no format is recorded.
    """
    name = header.backing_file
    if name is None:
        return None
    overlay = file.filename
    plain_backing_name(name, overlay)
    image_format = recorded_format(header.backing_format, name, overlay)
    if image_format not in _FORMATS:
        raise BlockError(
            Kind.UNSUPPORTED,
            f"Could not open backing file '{name}' of '{overlay}': format '{image_format}' is not supported",
            hint="convert it to qcow2 or raw with qemu-img convert",
        )
    if file.identity is None and not name.startswith("/"):
        raise BlockError(
            Kind.DENIED,
            f"Could not open backing file '{name}' of '{overlay}': a relative name needs a local overlay",
            hint="give the backing node explicitly",
        )
    return image_options(full_backing_name(header, overlay) or name, image_format)
