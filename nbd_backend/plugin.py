"""nbdkit's callbacks: the script that `serve` gives to nbdkit's python plugin, run as ``__main__``.

The filter (cffi_build/filter.c) answers guest requests before they come here; what arrives is
configuration, the opening and closing of connections, and what nbdkit asks about an export. Without the
filter (a build for another nbdkit) requests do come here and take the same kernel functions, one at a time
per connection.

`config`, `config_complete`, `get_ready`, `after_fork` and `cleanup` run on nbdkit's main thread, the rest
on its connections' threads. A callback that raises makes nbdkit log the error and refuse the client or fail
the request.
"""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import NamedTuple

import nbdkit

try:
    from nbd_backend.block.errors import KernelError
    from nbd_backend.block.kernel import Export, ExtentFlag, RequestFlag
    from nbd_backend.server import Backend
except ImportError as error:
    sys.stderr.write(
        f"nbd-backend: serve: cannot load {error.name or 'a module'}: {error}; run `make build`\n"
    )
    os._exit(1)

API_VERSION = 2
BLOCK_SIZES = (1, 4096, 32 << 20)
"""Smallest, preferred and largest request in bytes."""
EXTENTS_AT_ONCE = 1024

backend: Backend


class Client(NamedTuple):
    """What nbdkit keeps for a connection."""

    export: Export
    description: str


class Refused(Exception):
    """An expected failure: nbdkit logs the text alone, without a traceback."""


_format_exception = traceback.format_exception


def _one_line(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> list[str]:
    """Stands in for traceback.format_exception, by which nbdkit makes its log message of an exception."""
    return [str(error)] if isinstance(error, Refused) else _format_exception(kind, error, trace)


# The real one has more ways to be called; nbdkit uses this one.
traceback.format_exception = _one_line  # type: ignore[assignment]


def thread_model() -> int:
    """Requests run in parallel, on as many threads as `serve` gives to each connection."""
    return int(nbdkit.THREAD_MODEL_PARALLEL)


def config(key: str, value: str) -> None:
    """Take the configuration, one JSON object, and a duplicate of standard output, which nbdkit soon
    closes.
    """
    global backend
    if key != "config":
        raise Refused(f"unknown parameter '{key}': this script is started by `nbd-backend serve`")
    backend = Backend.from_json(value, os.dup(1))


def after_fork() -> None:
    """Open the images and the QMP server; ends the process when that fails."""
    backend.start()


def cleanup() -> None:
    """Every connection has ended: stop the jobs, flush and close the images."""
    backend.finish()


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """Names and descriptions of all exports."""
    return backend.list_exports()


def default_export(readonly: bool, is_tls: bool) -> str:
    """What a client gets that names no export."""
    return backend.default_export()


def open(readonly: bool) -> Client:  # noqa: A001 - nbdkit's name for it
    """A client chose an export."""
    name = nbdkit.export_name() or backend.default_export()
    export = Export.find(name)
    if export is None:
        known = ", ".join(f"'{other}'" for other, _ in backend.list_exports()) or "none"
        raise Refused(f"there is no export '{name}'; the exports are {known}")
    if not backend.native:
        export.count_client(1)
    return Client(export, backend.description(name))


def close(client: Client) -> None:
    """A client went."""
    if not backend.native:
        client.export.count_client(-1)


def export_description(client: Client) -> str:
    """For people; set by block-export-add."""
    return client.description


def get_size(client: Client) -> int:
    """Bytes."""
    return client.export.size


def block_size(client: Client) -> tuple[int, int, int]:
    """Any byte range will do."""
    return BLOCK_SIZES


def can_write(client: Client) -> bool:
    """Whether the export is writable."""
    return client.export.writable


def can_flush(client: Client) -> bool:
    """Always."""
    return True


def can_trim(client: Client) -> bool:
    """Always."""
    return True


def can_zero(client: Client) -> bool:
    """Always."""
    return True


def can_fast_zero(client: Client) -> bool:
    """Always: the kernel says at each request whether it is fast."""
    return True


def can_extents(client: Client) -> bool:
    """Always."""
    return True


def can_multi_conn(client: Client) -> bool:
    """Always: a flush on one connection covers what all have written."""
    return True


def is_rotational(client: Client) -> bool:
    """Never: seeking is not the guest's concern."""
    return False


def can_fua(client: Client) -> int:
    """The kernel does it."""
    return int(nbdkit.FUA_NATIVE)


def can_cache(client: Client) -> int:
    """The kernel does it."""
    return int(nbdkit.CACHE_NATIVE)


@contextmanager
def _errno_for_client() -> Iterator[None]:
    """The kernel's errno reaches the client."""
    try:
        yield
    except KernelError as error:
        nbdkit.set_error(error.errno)
        raise Refused(str(error)) from error


def _request_flags(flags: int) -> RequestFlag:
    request = RequestFlag(0)
    if flags & nbdkit.FLAG_FUA:
        request |= RequestFlag.FUA
    if flags & nbdkit.FLAG_MAY_TRIM:
        request |= RequestFlag.MAY_UNMAP
    if flags & nbdkit.FLAG_FAST_ZERO:
        request |= RequestFlag.FAST
    return request


def pread(client: Client, buffer: memoryview, offset: int, flags: int) -> None:
    """Fill the buffer."""
    with _errno_for_client():
        client.export.pread(buffer, offset)


def pwrite(client: Client, buffer: memoryview, offset: int, flags: int) -> None:
    """Write the buffer."""
    with _errno_for_client():
        client.export.pwrite(buffer, offset, _request_flags(flags))


def zero(client: Client, count: int, offset: int, flags: int) -> None:
    """Make the range read as zeroes; EOPNOTSUPP makes nbdkit write them instead, unless they had to be
    fast.
    """
    with _errno_for_client():
        client.export.zero(count, offset, _request_flags(flags))


def trim(client: Client, count: int, offset: int, flags: int) -> None:
    """Discard the range."""
    with _errno_for_client():
        client.export.trim(count, offset, _request_flags(flags))


def flush(client: Client, flags: int) -> None:
    """Make durable what was written."""
    with _errno_for_client():
        client.export.flush()


def cache(client: Client, count: int, offset: int, flags: int) -> None:
    """Prefetch the range."""
    with _errno_for_client():
        client.export.cache(count, offset)


def extents(client: Client, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    """Where the range is allocated and where it reads as zeroes."""
    with _errno_for_client():
        found = client.export.extents(count, offset, 1 if flags & nbdkit.FLAG_REQ_ONE else EXTENTS_AT_ONCE)
    return [(extent.offset, extent.length, _extent_type(extent.flags)) for extent in found]


def _extent_type(flags: ExtentFlag) -> int:
    hole = nbdkit.EXTENT_HOLE if flags & ExtentFlag.HOLE else 0
    return int(hole | (nbdkit.EXTENT_ZERO if flags & ExtentFlag.ZERO else 0))
