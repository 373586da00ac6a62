"""The events of block nodes and exports."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from nbd_backend.control.events import Event

__all__ = ["ExportDeleted", "ImageCorrupted", "IoError", "WriteThreshold"]


class IoError(msgspec.Struct, frozen=True, rename="kebab"):
    """A request of a guest failed. ``reason`` is for people."""

    qom_path: str
    device: str
    operation: Literal["read", "write"]
    action: Literal["ignore", "report", "stop"]
    reason: str
    node_name: str | UnsetType = UNSET
    nospace: bool | UnsetType = UNSET


class ImageCorrupted(msgspec.Struct, frozen=True, rename="kebab"):
    """An image's metadata contradicts itself, at ``offset`` (bytes). ``fatal``: no more writes."""

    device: str
    msg: str
    fatal: bool
    node_name: str | UnsetType = UNSET
    offset: int | UnsetType = UNSET
    size: int | UnsetType = UNSET


class WriteThreshold(msgspec.Struct, frozen=True, rename="kebab"):
    """A write went beyond the threshold set on a node; both numbers in bytes."""

    node_name: str
    amount_exceeded: int
    write_threshold: int


class ExportDeleted(msgspec.Struct, frozen=True):
    """An export is gone."""

    id: str


def _io_error_limit(data: dict[str, Any]) -> Hashable:
    """One a second per device, but each that stops something: clients act on those."""
    return None if data["action"] == "stop" else data["qom-path"]


BLOCK_IO_ERROR = Event("BLOCK_IO_ERROR", IoError, since="0.13", limit=_io_error_limit)
BLOCK_IMAGE_CORRUPTED = Event("BLOCK_IMAGE_CORRUPTED", ImageCorrupted, since="1.7")
BLOCK_WRITE_THRESHOLD = Event("BLOCK_WRITE_THRESHOLD", WriteThreshold, since="2.3")
BLOCK_EXPORT_DELETED = Event("BLOCK_EXPORT_DELETED", ExportDeleted, since="5.2")
