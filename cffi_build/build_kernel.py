"""The native kernel as a cffi module: what it is made of and what Python sees of it.

``setup.py`` names ``ffibuilder`` as its cffi module.  The result is one shared object,
``nbd_backend/_kernel.abi3.so``, which is the extension module that ``nbd_backend.block.kernel``
imports and, at once, the filter that nbdkit loads: it exports ``PyInit__kernel`` and
``filter_init`` and nothing else.

The declarations for cffi are the part of ``kernel.h`` between its two marker comments, so that no
signature is written twice.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from cffi import FFI

MODULE = "nbd_backend._kernel"
BEGIN = "/* cffi: begin */"
END = "/* cffi: end */"
LIBRARIES = ["nbd", "z", "zstd", "unwind", "pthread"]
# Assertions stay on (Debian's Python turns them off): a broken invariant must not reach the image.
COMPILE_ARGS = ["-std=gnu11", "-O2", "-g", "-UNDEBUG", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wshadow"]

# This file is also run by cffi's setuptools hook, by exec, with the repository as working directory
# and with __file__ as given in setup.py.
SOURCE_DIR = Path(os.path.relpath(Path(__file__).resolve().parent))


def sources() -> list[Path]:
    """The kernel's own C files, relative to the working directory, in a stable order."""
    return sorted(SOURCE_DIR.glob("*.c"))


def headers() -> list[Path]:
    """Every header that a change of which rebuilds the kernel."""
    return sorted(SOURCE_DIR.glob("*.h"))


def declarations(header: str) -> str:
    """The text of ``kernel.h`` as cffi's parser takes it.

    Returns what stands between the markers, without comments, preprocessor lines and attributes.
    Raises ValueError when the markers do not stand in the text exactly once, in order.
    """
    if header.count(BEGIN) != 1 or header.count(END) != 1 or header.index(BEGIN) > header.index(END):
        raise ValueError(f"kernel.h: expected exactly one {BEGIN!r} followed by one {END!r}")
    body = header[header.index(BEGIN) + len(BEGIN) : header.index(END)]
    body = re.sub(r"/\*.*?\*/", " ", body, flags=re.DOTALL)
    body = re.sub(r"//[^\n]*", "", body)
    body = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*$", "", body, flags=re.MULTILINE)
    return re.sub(r"__attribute__\s*\(\((?:[^()]|\([^()]*\))*\)\)", "", body)


def make_ffi() -> FFI:
    """The cffi builder of the kernel, reading ``kernel.h`` as it is now."""
    ffi = FFI()
    ffi.cdef(declarations((SOURCE_DIR / "kernel.h").read_text(encoding="utf-8")))
    ffi.set_source(
        MODULE,
        '#include "kernel.h"',
        sources=[str(path) for path in sources()],
        depends=[str(path) for path in [*headers(), SOURCE_DIR / "build_kernel.py"]],
        include_dirs=[str(SOURCE_DIR)],
        libraries=LIBRARIES,
        extra_compile_args=COMPILE_ARGS,
        py_limited_api=True,
    )
    return ffi


if __name__ == "__cffi__":  # the name that cffi's setuptools hook gives; importing must not need kernel.h
    ffibuilder = make_ffi()
