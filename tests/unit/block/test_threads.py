"""Blocking calls off the loop, and handles that are closed."""

from __future__ import annotations

import asyncio
import threading

import pytest

from nbd_backend.block import kernel
from nbd_backend.block.threads import run_blocking
from tests.unit.jobs.loops import both_loops


@both_loops
async def test_a_cancelled_caller_is_held_until_the_call_has_returned() -> None:
    begun, may_end, ended = threading.Event(), threading.Event(), threading.Event()

    def work() -> None:
        begun.set()
        may_end.wait(10)
        ended.set()

    caller = asyncio.ensure_future(run_blocking(work))
    await asyncio.to_thread(begun.wait, 10)
    for _ in range(2):
        caller.cancel()
        await asyncio.sleep(0)
    assert not caller.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()


@both_loops
async def test_a_result_and_an_error_reach_the_caller() -> None:
    assert await run_blocking(int, "7") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        await run_blocking(int, "x")


def test_a_closed_handle_does_not_reach_the_kernel() -> None:
    node = kernel.null_open(512, 0, True, kernel.NodeFlag(0))
    second = node.ref()
    node.close()
    node.close()
    with pytest.raises(RuntimeError, match="use of a closed Node handle"):
        node.pread(512, 0)
    assert second.pread(512, 0) == bytes(512)
    second.close()
