"""The version that clients see: of the protocol they know, and of this program."""

from __future__ import annotations

from typing import Final

import msgspec

import nbd_backend

__all__ = ["VERSION", "VersionInfo", "VersionTriple"]


class VersionTriple(msgspec.Struct, frozen=True):
    """A release number in three parts."""

    major: int
    minor: int
    micro: int


class VersionInfo(msgspec.Struct, frozen=True):
    """``qemu`` is the release whose interface this server follows; ``package`` names the server itself."""

    qemu: VersionTriple
    package: str


VERSION: Final = VersionInfo(VersionTriple(10, 0, 0), f"nbd-backend {nbd_backend.__version__}")
