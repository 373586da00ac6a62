"""The QMP server in the test's own process, on plain asyncio (in debug mode) and on uvloop.

def test_something(runner: asyncio.Runner, socket_path: Path) -> None:
    async def scenario() -> None:
        async with serving(socket_path) as served:
            ...                     # connect to socket_path; served.context, served.server
    runner.run(scenario())
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvloop


@pytest.fixture(params=["asyncio", "uvloop"])
def runner(request: pytest.FixtureRequest) -> Iterator[asyncio.Runner]:
    """Runs coroutines; what a callback or a forgotten task raised fails the test."""
    unhandled: list[dict[str, Any]] = []
    uses_uvloop = request.param == "uvloop"
    with asyncio.Runner(
        debug=not uses_uvloop, loop_factory=uvloop.new_event_loop if uses_uvloop else None
    ) as running:
        running.get_loop().set_exception_handler(lambda _loop, context: unhandled.append(context))
        yield running
    assert not unhandled


@pytest.fixture
def socket_path() -> Iterator[Path]:
    """Where a socket can be made; short, because socket paths are limited."""
    directory = Path(tempfile.mkdtemp(prefix="qmp-"))
    yield directory / "s"
    shutil.rmtree(directory)
