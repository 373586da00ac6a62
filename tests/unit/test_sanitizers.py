"""`make asan` and `make tsan` in small: the server serves under each sanitizer without a finding."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_concurrent_requests_are_clean_under_the_sanitizer(kind: str) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    load = ["tests/datapath/test_load.py", "-k", "filter", "--numprocesses", "0"]
    done = subprocess.run(
        [REPOSITORY / ".ci/sanitize", kind, *load],
        env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
