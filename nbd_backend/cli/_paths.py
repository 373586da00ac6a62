"""Where the sockets are when nobody says otherwise."""

from __future__ import annotations

import os
from pathlib import Path

from . import CliError


def default_socket(kind: str, *, create: bool = False) -> Path:
    """``KIND.sock`` in the runtime directory: /run/nbd-backend for root, else $XDG_RUNTIME_DIR/nbd-backend.

    With `create` the directory is made, for its owner only. Raises CliError when there is no runtime
    directory.
    """
    runtime = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR")
    if not runtime:
        raise CliError(
            f"there is no XDG_RUNTIME_DIR for the default {kind} socket: give --{kind} unix:PATH", 2
        )
    directory = Path(runtime, "nbd-backend")
    if create:
        directory.mkdir(mode=0o700, exist_ok=True)
    return directory / f"{kind}.sock"
