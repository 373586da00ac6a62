"""Runs the C tests of the kernel: each ``tests/kernel/*.c`` is a program, and a case here.

Objects and programs are kept in ``build/kernel-tests`` under a hash of all that went into them, so
that only what changed is compiled again.  ``SANITIZE`` in the environment (``address,undefined`` or
``thread``) compiles kernel and tests with these sanitizers; ``make asan`` and ``make tsan`` set it.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
KERNEL = REPOSITORY / "cffi_build"
CACHE = REPOSITORY / "build" / "kernel-tests"

# filter.c is nbdkit's door; the rest of the kernel knows neither nbdkit nor Python.
KERNEL_SOURCES = sorted(path for path in KERNEL.glob("*.c") if path.name != "filter.c")
TESTS = sorted(HERE.glob("*.c"))

SANITIZE = os.environ.get("SANITIZE")
COMPILE = ["gcc", "-std=gnu11", "-g", "-O1", "-pthread", "-Wall", "-Wextra", "-Wshadow", "-Werror"]
if SANITIZE:
    COMPILE += [f"-fsanitize={SANITIZE}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
INCLUDE = [f"-I{KERNEL}", f"-I{HERE}"]
LIBRARIES = ["-lnbd", "-lz", "-lzstd", "-lunwind", "-lpthread"]
RUN_LIMIT = 240
"""Seconds that one test program may take."""


def cached(name: str, inputs: Sequence[Path], command: Sequence[str]) -> Path:
    """The file that ``command -o FILE`` makes of `inputs`, made only if no earlier run made the same.

    `command` and the content of `inputs` are what the file is known by.  Safe across processes.
    Fails the test with the compiler's messages when the command fails.
    """
    digest = hashlib.sha256("\0".join(command).encode())
    for path in inputs:
        digest.update(path.read_bytes())
    target = CACHE / f"{name}-{digest.hexdigest()[:24]}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            for old in CACHE.glob(f"{name}-*"):
                old.unlink()
            made = target.with_suffix(".new")
            done = subprocess.run([*command, "-o", str(made)], capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.fail(f"cannot build {name}:\n{done.stderr}", pytrace=False)
            made.rename(target)
    return target


def compile_object(source: Path) -> Path:
    """The object file of one C file."""
    headers = [*sorted(KERNEL.glob("*.h")), *sorted(HERE.glob("*.h"))]
    return cached(f"{source.name}.o", [source, *headers], [*COMPILE, *INCLUDE, "-x", "c", "-c", str(source)])


@cache
def kernel_objects() -> tuple[Path, ...]:
    """The object files of the kernel without its filter."""
    return tuple(compile_object(source) for source in KERNEL_SOURCES)


def link(test: Path) -> Path:
    """The test program of one C test."""
    objects = [compile_object(test), *kernel_objects()]
    return cached(test.stem, objects, [*COMPILE, *map(str, objects), *LIBRARIES])


@pytest.mark.parametrize("test", TESTS, ids=lambda path: path.stem)
def test_kernel_c(test: Path, tmp_path: Path) -> None:
    program = link(test)
    # A preloaded sanitizer runtime is for programs that are not linked with it.
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    environment["ASAN_OPTIONS"] = "detect_leaks=1:detect_stack_use_after_return=1"
    done = subprocess.run(
        [str(program)],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=RUN_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        pytest.fail(f"{test.name} ended with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
