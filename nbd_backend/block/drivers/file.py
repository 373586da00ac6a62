"""Regular files and block devices."""

from __future__ import annotations

import errno
import os
from typing import Literal

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.errors import BlockError, KernelError
from nbd_backend.block.kernel import NodeFlag
from nbd_backend.block.locks import lock_file
from nbd_backend.block.node import FormatInfo
from nbd_backend.block.options import NodeOptions

_READ_ONLY_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Options(NodeOptions, frozen=True, kw_only=True):
    """`locking`: QEMU's locks; "auto": where the file system has them. `aio` does nothing."""

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
    handle = await context.run(_open, path, context)
    lock = None
    if options.locking != "off" and not context.force_share:
        try:
            required = options.locking == "on"
            lock = await context.run(lock_file, path, writable=not handle.read_only, required=required)
        except BlockError:
            handle.close()
            raise
    return Opened(handle, options.filename, handle.read_only, FormatInfo(dirty=False), identity, lock)


def _open(path: str, context: OpenContext) -> kernel.Node:
    """The file as the flags say, or read-only if it cannot be written and the options allow that."""
    try:
        return kernel.file_open(path, context.flags)
    except KernelError as error:
        if not context.auto_read_only or context.read_only or error.errno not in _READ_ONLY_ERRORS:
            raise
        return kernel.file_open(path, context.flags | NodeFlag.READ_ONLY)


DRIVER = Driver(names=("file", "host_device"), options=Options, open=open_file)
