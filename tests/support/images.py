"""QEMU's image tools as oracles: thin wrappers on qemu-img and qemu-io. All sizes and offsets are bytes.

Every wrapper raises CommandError, which shows the command and all that it printed, when the tool fails.
"""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Image = str | Path
"""A file name or an NBD URI."""


class CommandError(AssertionError):
    """A tool exited with a status other than the expected ones."""


def run(command: Sequence[str | Path], *, expect: Sequence[int] = (0,), timeout: float = 120) -> str:
    """Run a tool and return its standard output; exit statuses outside `expect` raise CommandError."""
    done = subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    if done.returncode not in expect:
        words = " ".join(str(word) for word in command)
        raise CommandError(f"`{words}` exited with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


def create(
    path: Path,
    size: int | None = None,
    *,
    fmt: str = "qcow2",
    backing: Image | None = None,
    backing_fmt: str = "qcow2",
    options: Mapping[str, object] | None = None,
) -> Path:
    """Create an image with qemu-img and return its path. With a backing file `size` may be left out."""
    command: list[str | Path] = ["qemu-img", "create", "-q", "-f", fmt]
    if options:
        command += ["-o", ",".join(f"{key}={value}" for key, value in options.items())]
    if backing is not None:
        command += ["-b", backing, "-F", backing_fmt]
    command.append(path)
    if size is not None:
        command.append(str(size))
    run(command)
    return path


def check(path: Image, *, fmt: str = "qcow2") -> None:
    """Assert that `qemu-img check` finds neither errors nor leaked clusters."""
    run(["qemu-img", "check", "-f", fmt, path])


def compare(left: Image, right: Image, *, left_fmt: str = "qcow2", right_fmt: str = "qcow2") -> None:
    """Assert that two images hold the same bytes; CommandError names the first offset that differs."""
    run(["qemu-img", "compare", "-f", left_fmt, "-F", right_fmt, left, right])


def convert(source: Image, target: Path, *, fmt: str = "qcow2", target_fmt: str = "raw") -> Path:
    """Copy all that `source` shows through its chain into a new image `target`; return `target`."""
    run(["qemu-img", "convert", "-f", fmt, "-O", target_fmt, source, target])
    return target


def extents(image: Image, *, fmt: str = "qcow2") -> list[dict[str, Any]]:
    """The extents of `image` as `qemu-img map --output=json` lists them."""
    found: list[dict[str, Any]] = json.loads(run(["qemu-img", "map", "--output=json", "-f", fmt, image]))
    return found


def info(image: Image, *, fmt: str = "qcow2") -> dict[str, Any]:
    """`qemu-img info --output=json`."""
    facts: dict[str, Any] = json.loads(run(["qemu-img", "info", "--output=json", "-f", fmt, image]))
    return facts


def qemu_io(image: Image, *commands: str, fmt: str = "qcow2", read_only: bool = False) -> str:
    """Run qemu-io commands (`write -P 0x11 0 64k`, …) on one opening of `image` and return what they print.

    A pattern that `read -P` does not find raises CommandError, as every failed command does.
    """
    flags = ["-r"] if read_only else []
    steps = [word for command in commands for word in ("-c", command)]
    return run(["qemu-io", *flags, "-f", fmt, *steps, image])
