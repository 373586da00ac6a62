"""Progress: amounts, rate, time left."""

from __future__ import annotations

import pytest

from jobs.progress import Progress


def test_rate_is_that_of_the_last_seconds() -> None:
    now = 0.0
    progress = Progress(lambda: now)
    assert (progress.rate, progress.eta) == (None, None)
    for _ in range(100):
        now += 0.1
        progress.advance(100)
    for _ in range(100):
        now += 0.1
        progress.advance(10)
    assert progress.rate == pytest.approx(100, rel=0.1)
    progress.set_remaining(1000)
    assert progress.eta == pytest.approx(10, rel=0.1)


def test_a_standstill_has_no_time_left() -> None:
    now = 0.0
    progress = Progress(lambda: now)
    progress.set_remaining(10)
    progress.advance(0)
    now = 100.0
    assert (progress.rate, progress.eta) == (0.0, None)


def test_the_total_moves_both_ways_but_not_below_the_current() -> None:
    progress = Progress(lambda: 0.0)
    progress.set_remaining(10)
    progress.advance(4)
    progress.add_remaining(5)
    assert (progress.current, progress.total) == (4, 15)
    progress.add_remaining(-50)
    assert (progress.current, progress.total) == (4, 4)


def test_negative_amounts_are_refused() -> None:
    progress = Progress(lambda: 0.0)
    with pytest.raises(ValueError, match="cannot go back by 1"):
        progress.advance(-1)
    with pytest.raises(ValueError, match="negative: -1"):
        progress.set_remaining(-1)
