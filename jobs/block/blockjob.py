"""What all jobs on disks share: the device they are known by, and the block-job side of query and events.

The generic job does the work; this subclass only adds the older names under which it is seen: an entry in
query-block-jobs, and the BLOCK_JOB_* events, sent where clients have always found them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.clock import Clock
from jobs.hooks import JobEvent
from jobs.throttled import ThrottledJob

__all__ = ["BlockJob"]


class BlockJob(ThrottledJob):
    """A job on a disk; progress is in bytes, ``speed`` bounds its background copy. Loop thread only."""

    def __init__(
        self,
        *,
        device: str = "",
        speed: int = 0,
        auto_finalize: bool = True,
        auto_dismiss: bool = True,
        clock: Clock | None = None,
    ) -> None:
        """``device`` is the name of the disk the job belongs to, and its default id; "" if it has none."""
        super().__init__(speed=speed, auto_finalize=auto_finalize, auto_dismiss=auto_dismiss, clock=clock)
        self.device = device

    def default_id(self) -> str:
        return self.device

    def block_info(self) -> dict[str, Any]:
        """The job's entry in query-block-jobs."""
        info: dict[str, Any] = {
            "type": self.type,
            "device": self.name,
            "len": self.progress.total,
            "offset": self.progress.current,
            "busy": self.busy,
            "paused": self.pause_count > 0,
            "speed": self.speed,
            "io-status": self.io_status.value,
            "ready": self.is_ready,
            "status": self.status.value,
            "auto-finalize": self.auto_finalize,
            "auto-dismiss": self.auto_dismiss,
        }
        if self.error is not None:
            info["error"] = self.error
        return {**info, **self.extra_block_info()}

    def extra_block_info(self) -> dict[str, Any]:
        """Members that this job type adds to its entry in query-block-jobs; JSON values."""
        return {}

    def on_event(self, event: JobEvent, details: Mapping[str, Any]) -> None:
        if event is JobEvent.READY or event is JobEvent.CANCELLED:
            self.emit(f"BLOCK_{event.value}", self._event_data())
        elif event is JobEvent.COMPLETED:
            error = {"error": details["error"]} if "error" in details else {}
            self.emit("BLOCK_JOB_COMPLETED", {**self._event_data(), **error})
        elif event is JobEvent.PENDING:
            self.emit("BLOCK_JOB_PENDING", {"type": self.type, "id": self.name})
        elif event is JobEvent.ERROR:
            names = {"operation": details["operation"], "action": details["action"]}
            self.emit("BLOCK_JOB_ERROR", {"device": self.name, **names})

    def _event_data(self) -> dict[str, Any]:
        return {
            "type": self.type,
            "device": self.name,
            "len": self.progress.total,
            "offset": self.progress.current,
            "speed": self.speed,
        }
