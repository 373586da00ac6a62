"""Locks on image files that QEMU's programs understand, so that they and this server exclude each other.

QEMU keeps one byte for each kind of access that a process uses (from 100 on) and one for each kind that it
does not let others use (from 200 on). A process puts shared locks on its bytes, then looks whether others
hold the opposite ones. The locks belong to the open file description (OFD), so they last until
`FileLock.close`, whatever else this process does with the file, and end with the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from nbd_backend.block.errors import BlockError, KernelError, Kind

_USED, _UNSHARED = 100, 200
_NAMES = {0: "consistent read", 1: "write", 3: "resize"}
_READ, _WRITE, _RESIZE = _NAMES
_FLOCK = struct.Struct("hhqqi4x")  # struct flock on 64-bit Linux: type, whence, start, length, pid
_NO_LOCKS_HERE = (errno.EINVAL, errno.ENOLCK, errno.EOPNOTSUPP)


class FileLock:
    """Locks on one file until `close`."""

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def close(self) -> None:
        """Let the file go; a second call does nothing."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def lock_file(path: str, *, writable: bool, required: bool = False) -> FileLock:
    """Lock `path` as a reader or as the one writer; nobody else may write to it meanwhile.

    Raises BlockError (Kind.IN_USE) when another process is in the way. A file system without such locks is an
    error only if they are `required`. Blocks.
    """
    used = (_READ, _WRITE, _RESIZE) if writable else (_READ,)
    unshared = (_WRITE, _RESIZE)
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise KernelError(f"Could not open '{path}'", error.errno or errno.EIO) from None
    lock = FileLock(descriptor)
    try:
        for byte in (*(_USED + kind for kind in used), *(_UNSHARED + kind for kind in unshared)):
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, byte))
        for kind in used:
            _refuse_held(descriptor, path, _UNSHARED + kind, f'"{_NAMES[kind]}"')
        for kind in unshared:
            _refuse_held(descriptor, path, _USED + kind, f'shared "{_NAMES[kind]}"')
    except OSError as error:
        if required or error.errno not in _NO_LOCKS_HERE:
            lock.close()
            raise KernelError(f"Could not lock '{path}'", error.errno or errno.EIO) from None
    except BlockError:
        lock.close()
        raise
    return lock


def _flock(kind: int, byte: int) -> bytes:
    return _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)


def _refuse_held(descriptor: int, path: str, byte: int, what: str) -> None:
    answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, byte))
    if _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK:
        raise BlockError(
            Kind.IN_USE, f"Failed to get {what} lock", hint=f"Is another process using the image [{path}]?"
        )
