"""A backup job on a graph of the test's own: whatever it takes it gives back, from wherever it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.block.backup import BackupJob, BackupOptions, BackupTuning
from jobs.errors import JobError
from jobs.manager import JobManager
from jobs.testing import EventRecorder
from nbd_backend.block import kernel
from nbd_backend.block.errors import BlockError, KernelError
from nbd_backend.block.graph import Graph
from tests.unit.block.graphs import new_graph, null
from tests.unit.jobs.loops import both_loops


async def _new(graph: Graph, directory: Path, *, owns_target: bool = False, **options: Any) -> BackupJob:
    for name in ("source", "target"):
        if graph.find(name) is None:
            await graph.add(null(name))
    chosen = BackupOptions(**{"device": "source", "target": "target", "sync": "full", **options})
    return BackupJob(graph, chosen, str(directory), owns_target=owns_target)


def _untouched(graph: Graph) -> bool:
    return all(
        not graph.permissions.holders(node) and node.entry is node and not node.is_filter
        for node in graph.nodes()
    )


def _descriptors() -> list[str]:
    return sorted(link.name for link in Path("/proc/self/fd").iterdir())


@both_loops
async def test_a_backup_gives_back_what_it_took(tmp_path: Path) -> None:
    async with new_graph() as graph:
        manager = JobManager(EventRecorder())
        job = await _new(graph, tmp_path)
        before = _descriptors()
        await manager.launch(job, "j")
        await job.wait_concluded()
        assert job.error is None
        assert _untouched(graph)
        assert _descriptors() == before
        await job.clean()


@pytest.mark.parametrize("step", ["scratch", "filter", "name", "copier"])
@both_loops
async def test_it_gives_back_what_it_took_until_it_failed(
    tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise KernelError("refused", 12)

    async with new_graph() as graph:
        manager = JobManager(EventRecorder())
        directory = tmp_path / "missing" if step == "scratch" else tmp_path
        options: dict[str, Any] = {"filter_node_name": "target"} if step == "name" else {}
        job = await _new(graph, directory, **options)
        before = _descriptors()
        if step == "filter":
            monkeypatch.setattr(kernel, "cbw_open", refuse)
        if step == "copier":
            monkeypatch.setattr(kernel.Copier, "new", refuse)
            await manager.launch(job, "j")
            await job.wait_concluded()
            assert job.error == "refused: Cannot allocate memory"
        else:
            with pytest.raises(BlockError):
                await manager.launch(job, "j")
        monkeypatch.undo()
        assert _untouched(graph)
        assert _descriptors() == before
        assert manager.all_jobs() == []


@both_loops
async def test_a_target_of_its_own_goes_with_the_job(tmp_path: Path) -> None:
    async with new_graph() as graph:
        manager = JobManager(EventRecorder())
        job = await _new(graph, tmp_path, owns_target=True)
        await manager.launch(job, "j")
        await job.wait_concluded()
        assert [node.name for node in graph.nodes()] == ["source"]


@both_loops
async def test_a_point_in_time_that_breaks_ends_the_job_with_the_reason(tmp_path: Path) -> None:
    async with new_graph() as graph:
        manager = JobManager(EventRecorder())
        job = await _new(graph, tmp_path, sync="none", cbw_memory=1 << 16, cbw_scratch=-1)
        await manager.launch(job, "j")
        source = graph.get("source")
        job._on_store_event(kernel.Event(kernel.EventKind.CBW_BROKEN, 28, 0, 0, 0, 0))
        await job.wait_concluded()
        assert job.error == (
            "The state of 'source' at the start of the backup could not be kept: No space left on device"
        )
        assert source.entry is source


@both_loops
async def test_nothing_is_claimed_by_a_job_that_is_refused(tmp_path: Path) -> None:
    async with new_graph() as graph:
        with pytest.raises(JobError, match="max-workers"):
            await _new(graph, tmp_path, x_perf=BackupTuning(max_workers=0))
        assert _untouched(graph)
