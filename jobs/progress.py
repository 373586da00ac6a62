"""How far a job is, how fast it goes, when it will be done, and why it does not move."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

__all__ = ["Progress"]

_WINDOW: Final = 5.0  # seconds over which the rate is measured
_SAMPLE: Final = 0.25  # seconds between two samples at least


class Progress:
    """Work done and work known, in units of the job's choice (bytes for block jobs).

    ``total`` may move in both directions while the job learns more. ``stall`` is a short text, set by
    the job while something keeps it from moving, else None. Loop thread only.
    """

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._samples: deque[tuple[float, int]] = deque()
        self.current = 0
        self.total = 0
        self.stall: str | None = None

    def advance(self, done: int) -> None:
        """Count ``done`` (>= 0) more units as done."""
        if done < 0:
            raise ValueError(f"progress cannot go back by {-done}")
        self._sample()
        self.current += done

    def set_remaining(self, remaining: int) -> None:
        """``remaining`` (>= 0) units are left from here."""
        if remaining < 0:
            raise ValueError(f"remaining work cannot be negative: {remaining}")
        self.total = self.current + remaining

    def add_remaining(self, delta: int) -> None:
        """``delta`` more units of work (fewer, if negative) have become known."""
        self.set_remaining(max(0, self.total - self.current + delta))

    @property
    def rate(self) -> float | None:
        """Units per second over the last seconds; None until it can be told."""
        now = self._now()
        self._trim(now)
        if not self._samples:
            return None
        since, was = self._samples[0]
        return (self.current - was) / (now - since) if now - since >= _SAMPLE else None

    @property
    def eta(self) -> float | None:
        """Seconds until the known work is done at the present rate; None if it cannot be told."""
        remaining = max(0, self.total - self.current)
        rate = self.rate
        if not rate:
            return None
        return remaining / rate

    def _sample(self) -> None:
        now = self._now()
        if not self._samples or now - self._samples[-1][0] >= _SAMPLE:
            self._samples.append((now, self.current))
            self._trim(now)

    def _trim(self, now: float) -> None:
        while len(self._samples) > 1 and now - self._samples[1][0] >= _WINDOW:
            self._samples.popleft()
