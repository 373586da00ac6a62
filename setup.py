"""Compiles the kernel: all that pyproject.toml cannot say.

``SANITIZE`` in the environment (``address,undefined`` or ``thread``) builds it with these
sanitizers; ``make asan`` and ``make tsan`` do so in a copy of the tree.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

# What the kernel includes from outside, and the Debian package that has it.
PREREQUISITES = {
    "stdio.h": "libc6-dev",
    "Python.h": "python3-dev",
    "nbdkit-filter.h": "nbdkit-plugin-dev",
    "libnbd.h": "libnbd-dev",
    "zlib.h": "zlib1g-dev",
    "libunwind.h": "libunwind-dev",
    "zstd.h": "libzstd-dev",
}


class BuildKernel(build_ext):
    """Checks the prerequisites, compiles on every core, and only what changed."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # One place for objects, so that an editable install and a later rebuild share them.
        self.build_temp = "build/kernel"

    def build_extension(self, ext: Any) -> None:
        check_prerequisites(self.compiler.compiler[0], self.include_dirs)
        sanitize = sanitizer_flags()
        ext.extra_compile_args += sanitize
        ext.extra_link_args += sanitize
        ext.depends.append("setup.py")
        compile_some = self.compiler.compile

        def compile_changed(sources: list[str], **options: Any) -> list[str]:
            """Replaces the compiler's own method: same arguments, same result."""
            changed = [source for source in sources if self._is_stale(source, options["depends"])]
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(lambda source: compile_some([source], **options), changed))
            return [self._object_of(source) for source in sources]

        self.compiler.compile = compile_changed
        super().build_extension(ext)

    def _object_of(self, source: str) -> str:
        return str(self.compiler.object_filenames([source], output_dir=self.build_temp)[0])

    def _is_stale(self, source: str, depends: list[str]) -> bool:
        target = Path(self._object_of(source))
        newest = max(Path(path).stat().st_mtime_ns for path in [source, *depends])
        return not target.exists() or target.stat().st_mtime_ns <= newest


def sanitizer_flags() -> list[str]:
    """Compiler and linker flags for the sanitizers that ``SANITIZE`` names, if any."""
    names = os.environ.get("SANITIZE")
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"] if names else []


def check_prerequisites(compiler: str, include_dirs: Iterable[str]) -> None:
    """Raises CompileError naming the Debian packages of all that the build lacks."""
    search = [f"-I{directory}" for directory in include_dirs]
    try:
        missing = {
            header: package
            for header, package in PREREQUISITES.items()
            if subprocess.run(
                [compiler, "-E", *search, "-include", header, "-x", "c", os.devnull],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            ).returncode
        }
    except FileNotFoundError:
        raise CompileError(f"cannot build the kernel: no C compiler {compiler!r}; apt install gcc") from None
    if missing:
        raise CompileError(
            f"cannot build the kernel: no {', '.join(missing)}; apt install {' '.join(missing.values())}"
        )


setup(cffi_modules=["cffi_build/build_kernel.py:ffibuilder"], cmdclass={"build_ext": BuildKernel})
