"""Runs a coroutine test on asyncio's loop in debug mode and on uvloop; the loop's complaints fail it."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio-debug": asyncio.new_event_loop,
    "uvloop": uvloop.new_event_loop,
}
TIMEOUT = 20.0  # seconds after which a test counts as hanging


def run(loop_kind: str, body: Coroutine[Any, Any, None]) -> None:
    """Run ``body`` to its end; fail on what the loop's exception handler gets, and on tasks left behind."""
    complaints: list[dict[str, Any]] = []

    async def guarded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        await asyncio.wait_for(body, TIMEOUT)
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left behind: {left}"

    with asyncio.Runner(debug=loop_kind == "asyncio-debug", loop_factory=LOOPS[loop_kind]) as runner:
        runner.run(guarded())
    assert not complaints


def both_loops(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Make a plain test, run once on each loop, of a coroutine function."""

    @functools.wraps(test)
    def plain(loop_kind: str, **arguments: Any) -> None:
        run(loop_kind, test(**arguments))

    signature = inspect.signature(test)
    first = inspect.Parameter("loop_kind", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    plain.__dict__["__signature__"] = signature.replace(parameters=[first, *signature.parameters.values()])
    parametrized: Callable[..., None] = pytest.mark.parametrize("loop_kind", list(LOOPS))(plain)
    return parametrized
