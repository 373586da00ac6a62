"""The one exception tree of the block layer.

    BlockError              anything the block layer refuses or fails at
      KernelError           a kernel call returned -errno
      BadImage              an image's metadata is damaged or contradicts itself

Each boundary (QMP, CLI, nbdkit) maps `kind` once; texts follow QEMU's where scripts match on them.
"""

import os
import re
from enum import StrEnum


class Kind(StrEnum):
    """What sort of failure it is; what a boundary decides on."""

    INVALID = "invalid"  # an argument or option is wrong
    NOT_FOUND = "not-found"  # no such node, export or bitmap
    IN_USE = "in-use"  # a name is taken, or somebody else's use forbids it
    DENIED = "denied"  # policy refuses: path outside the allow-list, format not stated
    UNSUPPORTED = "unsupported"  # a feature that this version does not have
    BAD_IMAGE = "bad-image"  # metadata is damaged
    IO = "io"  # the operating system or a server said no; errno is set


class BlockError(Exception):
    """`message` says what failed, on which object, and which value; `hint` says what to do, or is empty.

    `errno` is a positive errno number, or 0 when no system call was involved.
    """

    def __init__(self, kind: Kind, message: str, *, hint: str = "", errno: int = 0) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.hint = hint
        self.errno = errno

    def __str__(self) -> str:
        return self.message


class KernelError(BlockError):
    """A kernel function failed: `what` names the operation and its object."""

    def __init__(self, what: str, errno: int, *, hint: str = "") -> None:
        super().__init__(Kind.IO, f"{what}: {os.strerror(errno)}", hint=hint, errno=errno)


class BadImage(BlockError):
    """Metadata of `file` is unusable: header field or table entry `field` holds `value`."""

    def __init__(self, file: str, field: str, value: object, problem: str, *, hint: str = "") -> None:
        named = re.search(rf"(?<!\w){re.escape(str(value))}(?!\w)", problem)
        told = problem if named else f"{problem}: {field} is {value}"
        super().__init__(Kind.BAD_IMAGE, f"{told} in '{file}'", hint=hint)
        self.file = file
        self.field = field
        self.value = value
