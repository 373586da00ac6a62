"""Regular files and block devices."""

from __future__ import annotations

import errno
import os
from typing import Literal

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.errors import KernelError
from nbd_backend.block.kernel import NodeFlag
from nbd_backend.block.node import FormatInfo
from nbd_backend.block.options import NodeOptions

_READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Options(NodeOptions, frozen=True, kw_only=True):
    """`aio` and `locking` are taken for compatibility: there is one way to do I/O, and one to lock."""

    filename: str
    aio: Literal["threads", "native", "io_uring"] = "threads"
    locking: Literal["auto", "on", "off"] = "auto"


async def open_file(context: OpenContext, options: Options) -> Opened:
    """Open the file after the path policy, the chain above it and the other users of the same file agreed."""
    path = context.policy.admit(options.filename)
    try:
        status = await context.run(os.stat, path)
    except OSError as error:
        raise KernelError(f"Could not open '{options.filename}'", error.errno or errno.EIO) from None
    identity = (status.st_dev, status.st_ino)
    context.claim_file(options.filename, identity)
    flags = context.flags
    try:
        handle = await context.run(kernel.file_open, path, flags)
    except KernelError as error:
        if not context.auto_read_only or context.read_only or error.errno not in _READ_ONLY_ERRORS:
            raise
        flags |= NodeFlag.READ_ONLY
        handle = await context.run(kernel.file_open, path, flags)
    read_only = bool(flags & NodeFlag.READ_ONLY)
    return Opened(handle, options.filename, read_only, FormatInfo(dirty=False), identity)


DRIVER = Driver(names=("file", "host_device"), options=Options, open=open_file)
