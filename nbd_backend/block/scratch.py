"""Scratch files: unlinked from the start, so that nothing is left behind however the process ends."""

from __future__ import annotations

import os

from nbd_backend.block.errors import KernelError

__all__ = ["DEFAULT_DIRECTORY", "open_scratch"]

DEFAULT_DIRECTORY = "/var/tmp"
"""Where the distribution keeps large temporary files: on disk, not in memory."""


def open_scratch(directory: str) -> int:
    """A descriptor of a new, empty, nameless file on the filesystem of `directory`; the caller closes it."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except IsADirectoryError:  # what a filesystem without nameless files answers
        pass
    except OSError as error:
        raise KernelError(
            f"Could not make a scratch file in '{directory}'",
            error.errno or 0,
            hint="choose another --scratch-dir",
        ) from None
    import tempfile  # rarely needed, and not small

    try:
        descriptor, path = tempfile.mkstemp(dir=directory, prefix="nbd-backend-")
        os.unlink(path)
    except OSError as error:
        raise KernelError(
            f"Could not make a scratch file in '{directory}'",
            error.errno or 0,
            hint="choose another --scratch-dir",
        ) from None
    return descriptor
