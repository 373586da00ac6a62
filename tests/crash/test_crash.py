"""Crashes and errors at any point of a qcow2 workload: see ``crash_qcow2.c``, which this builds and runs."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.kernel.test_kernel_c import link

PROGRAM = Path(__file__).with_name("crash_qcow2.c")
RUN_LIMIT = 3000 if os.environ.get("HYPOTHESIS_PROFILE") == "nightly" else 240
"""Seconds that the program may take."""


@pytest.mark.timeout(RUN_LIMIT + 60)
def test_no_crash_and_no_error_damages_an_image(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    done = subprocess.run(
        [str(link(PROGRAM))],
        cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=RUN_LIMIT, check=False,
    )  # fmt: skip
    if done.returncode:
        said = done.stdout + done.stderr
        pytest.fail(f"{PROGRAM.name} ended with {done.returncode}:\n{said}", pytrace=False)
