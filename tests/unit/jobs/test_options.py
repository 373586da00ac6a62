"""Options that can be changed while a job lives."""

from __future__ import annotations

from typing import Literal

import pytest

from jobs.errors import JobError
from jobs.hooks import settable
from jobs.throttled import ThrottledJob
from tests.unit.jobs.actors import Stage
from tests.unit.jobs.loops import both_loops


class Copy(ThrottledJob):
    """Copies for ever, 1 MiB at a time."""

    type = "copy"

    copied = 0
    mode = "slow"

    async def run(self) -> None:
        while True:
            await self.throttle(1 << 20)
            self.copied += 1

    @settable("mode", Literal["slow", "fast"])
    async def set_mode(self, mode: str) -> None:
        """How to copy."""
        if mode == self.mode:
            raise JobError("already so")
        self.mode = mode


def _copy(stage: Stage) -> Copy:
    job = Copy(clock=stage.clock)
    stage.add(job)
    return job


@both_loops
async def test_an_option_is_set() -> None:
    stage = Stage()
    job = _copy(stage)
    await stage.manager.set_option("j1", "mode", "fast")
    assert job.mode == "fast"
    await stage.close()


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("mode", "slow", "already so"),
        ("mode", "lazy", "Invalid value for option 'mode' of job 'j1': Invalid enum value 'lazy'"),
        ("speed", "3", "Invalid value for option 'speed' of job 'j1': Expected `int`, got `str`"),
        ("speed", -1, "Parameter 'speed' expects a non-negative value"),
        (
            "colour",
            1,
            "Job 'j1' of type 'copy' has no option 'colour' that can be changed (it has: mode, speed)",
        ),
    ],
)
@both_loops
async def test_what_is_wrong_is_refused_and_changes_nothing(name: str, value: object, text: str) -> None:
    stage = Stage()
    job = _copy(stage)
    with pytest.raises(JobError) as refused:
        await stage.manager.set_option("j1", name, value)
    assert str(refused.value) == text
    assert (job.mode, job.speed) == ("slow", 0)
    await stage.close()


@pytest.mark.parametrize(("name", "verb"), [("speed", "set-speed"), ("mode", "change")])
@both_loops
async def test_the_verb_table_decides_when(name: str, verb: str) -> None:
    stage = Stage()
    job = Copy(clock=stage.clock, auto_dismiss=False)
    stage.add(job)
    await stage.start(job)
    await stage.manager.cancel("j1")
    await job.wait_concluded()
    with pytest.raises(JobError, match=f"in state 'concluded' cannot accept command verb '{verb}'"):
        await stage.manager.set_option("j1", name, 1)
    await stage.close()


def test_a_negative_speed_is_refused_at_creation() -> None:
    with pytest.raises(JobError, match="Parameter 'speed' expects a non-negative value"):
        Copy(speed=-1)


@both_loops
async def test_a_type_without_options_says_so() -> None:
    stage = Stage()
    stage.actor()
    with pytest.raises(JobError, match="it has: none"):
        await stage.manager.set_speed("j1", 1)
    await stage.close()
