"""What `serve` tells nbdkit's plugin: one JSON object on nbdkit's command line, checked when it is read.

Plain dictionaries, so that the command line, which has 20 ms to live, need not import what decodes them.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict


class ImageConfig(TypedDict):
    """An IMAGE argument."""

    name: str  # of its node and its export
    path: str


class ListenerConfig(TypedDict):
    """An NBD listener that nbdkit was started with."""

    fd: int
    address: str  # unix:PATH or tcp:HOST:PORT
    unlink: bool  # whether PATH is ours to remove at the end


class SpareConfig(TypedDict):
    """A private listening socket (sockets.private_listener) among nbdkit's, to be replaced at run time."""

    fd: int
    handle: int  # an O_PATH descriptor to connect by


class MonitorConfig(TypedDict):
    """A listening unix socket of the QMP server."""

    fd: int
    path: str


class Config(TypedDict):
    """All that the server process needs to know."""

    images: list[ImageConfig]
    format: Literal["qcow2", "raw"]  # of the images
    read_only: bool
    cache: Literal["writeback", "none"]
    l2_cache_size: int | None  # bytes for each qcow2 layer; None: the driver's default
    blockdevs: list[dict[str, Any]]  # arguments of blockdev-add, in order
    exports: list[dict[str, Any]]  # arguments of block-export-add, in order
    allow_paths: list[str] | None  # directories that files may be opened in; None: everywhere
    scratch_dir: str | None
    native: bool  # whether nbdkit runs our filter
    tls: bool  # whether clients must or may use TLS
    listeners: list[ListenerConfig]
    spares: list[SpareConfig]
    waker: int  # the handle of the private socket that is never replaced
    monitors: list[MonitorConfig]
