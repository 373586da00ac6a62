"""The gate that every file name passes before it is opened, whoever wrote the name: the command line, QMP, or
the header of an untrusted image.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nbd_backend.block.errors import BlockError, Kind

_PROTOCOL = re.compile(r"[^/]*:")


class PathPolicy:
    """Which files may be opened: those in or below `allowed` after symbolic links are resolved; None allows
    all.
    """

    def __init__(self, allowed: Sequence[str | Path] | None = None) -> None:
        self._allowed = None if allowed is None else [Path(root).resolve() for root in allowed]

    def admit(self, path: str) -> str:
        """The name to open `path` by; raises BlockError (Kind.DENIED) if it lies outside the allowed
        directories.

        With an allow-list the resolved name is returned, so that what was checked is what is opened.
        """
        if self._allowed is None:
            return path
        resolved = Path(path).resolve()
        if any(resolved.is_relative_to(root) for root in self._allowed):
            return str(resolved)
        places = ", ".join(f"'{root}'" for root in self._allowed)
        raise BlockError(
            Kind.DENIED,
            f"Could not open '{path}': it lies outside the allowed directories {places}",
            hint="start the server with another --allow-path",
        )


def plain_backing_name(name: str, overlay: str) -> str:
    """`name`, the backing name in the header of `overlay`, if it is a plain file name.

    Names that select a driver (``json:…``, ``nbd:…``) are refused: an image must not choose what we connect
    to.
    """
    if _PROTOCOL.match(name):
        raise BlockError(
            Kind.DENIED,
            f"Could not open backing file '{name}' of '{overlay}': only plain file names are followed",
            hint=f"give the backing node, or record a file: qemu-img rebase -u -F FORMAT -b FILE {overlay}",
        )
    return name


def recorded_format(format_name: str | None, backing: str, overlay: str) -> str:
    """The backing format recorded in the header of `overlay`; a missing one is refused, never guessed."""
    if format_name is None:
        raise BlockError(
            Kind.DENIED,
            f"Could not open backing file '{backing}' of '{overlay}': the overlay does not record its format,"
            " and formats are never probed",
            hint=f"record it: qemu-img rebase -u -F qcow2 -b {backing} {overlay} (or -F raw, if it is raw)",
        )
    return format_name
