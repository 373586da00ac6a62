"""A guest under qemu-system-x86_64 with software emulation, and the lines that it and the test exchange.

The guest has two serial ports. ttyS0 is its console, captured in a file and shown when something fails. ttyS1
carries the exchange alone, so that kernel messages never break into a line.
"""

import os
import selectors
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.guest.kernel import Kernel

BOOT_DEADLINE = 120.0
"""Seconds until the guest's script speaks; about 4 on an idle machine."""
LINE_DEADLINE = 120.0
"""Seconds between two lines of the script."""
TAIL_LINES = 60


class GuestError(AssertionError):
    """The guest said something unexpected, fell silent or died; the text holds the tail of its console."""


class Machine:
    """A running guest; a context manager that kills it if the block fails to see it power off."""

    def __init__(self, kernel: Kernel, initramfs: Path, console: Path, devices: Sequence[str] = ()) -> None:
        """`devices` are further words of QEMU's command line; `console` is the file that captures ttyS0."""
        self._console = console
        self._unread = b""
        self._said: list[str] = []
        self._command = [
            "qemu-system-x86_64", "-accel", "tcg", "-m", "256", "-smp", "1",
            "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
            "-kernel", str(kernel.image), "-initrd", str(initramfs),
            "-append", "console=ttyS0 loglevel=5 panic=-1 tsc=reliable no_timer_check random.trust_cpu=on",
            "-serial", f"file:{console}",
            "-chardev", "stdio,id=control,signal=off", "-serial", "chardev:control",
            *devices,
        ]  # fmt: skip

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.communicate()
        if error is not None and not isinstance(error, GuestError):
            error.add_note(self._evidence())

    def say(self, line: str) -> None:
        """Send one line to the guest's script."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def hear(self, word: str, *, timeout: float = LINE_DEADLINE) -> str:
        """Await the script's next line, which must begin with `word`; return the rest of it."""
        line = self._next_line(time.monotonic() + timeout, expected=word)
        first, _, rest = line.partition(" ")
        if first != word:
            raise GuestError(f"expected `{word}` of the guest, heard `{line}`\n{self._evidence()}")
        return rest

    def await_power_off(self, *, timeout: float = LINE_DEADLINE) -> None:
        """Wait for the guest to power itself off and check that its kernel reported no storage errors."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestError(f"no power-off within {timeout:g} s\n{self._evidence()}") from None
        if status != 0:
            raise GuestError(f"QEMU exited with {status}\n{self._evidence()}")
        for line in self._console_lines():
            if "I/O error" in line or "EXT4-fs error" in line:
                raise GuestError(f"the guest's kernel reported `{line}`\n{self._evidence()}")

    def _next_line(self, end: float, expected: str) -> str:
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._unread:
                if not selector.select(max(0.0, end - time.monotonic())):
                    raise GuestError(f"the guest did not say `{expected}` in time\n{self._evidence()}")
                data = os.read(self._process.stdout.fileno(), 4096)
                if not data:
                    raise GuestError(f"the guest ended before it said `{expected}`\n{self._evidence()}")
                self._unread += data
        raw, self._unread = self._unread.split(b"\n", 1)
        self._said.append(raw.decode(errors="replace").strip())
        return self._said[-1]

    def _console_lines(self) -> list[str]:
        return self._console.read_text(errors="replace").splitlines() if self._console.exists() else []

    def _evidence(self) -> str:
        said = "\n".join([*self._said, self._unread.decode(errors="replace")])
        tail = "\n".join(self._console_lines()[-TAIL_LINES:])
        return f"--- said by the guest\n{said}\n--- tail of the guest's console\n{tail}"
