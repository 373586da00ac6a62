"""Scratch files: nameless from the start, so that nothing is left behind however the process ends."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from nbd_backend.block.errors import KernelError

__all__ = ["DEFAULT_DIRECTORY", "open_scratch"]

DEFAULT_DIRECTORY = "/var/tmp"
"""Where the distribution keeps large temporary files: on disk, not in memory."""


def open_scratch(directory: str) -> int:
    """A descriptor of a new, empty, nameless file on the filesystem of `directory`; the caller closes it."""
    try:
        return _open_nameless(directory)
    except OSError as error:
        raise KernelError(
            f"Could not make a scratch file in '{directory}'",
            error.errno or 0,
            hint="choose another --scratch-dir",
        ) from None


def _open_nameless(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    # A filesystem without nameless files.
    import tempfile  # rarely needed, and not small

    descriptor, path = tempfile.mkstemp(dir=directory, prefix="nbd-backend-")
    Path(path).unlink()
    return descriptor
