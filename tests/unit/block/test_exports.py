"""Exports: what may be exported, how they go, and what other threads see of them."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from nbd_backend.block.errors import BlockError, KernelError
from nbd_backend.block.exports import Exports
from nbd_backend.block.kernel import Export
from nbd_backend.block.permissions import READ, READ_WRITE, Access, Holder, HolderKind
from nbd_backend.block.qcow2.create import create_qcow2
from tests.unit.block.graphs import image, new_graph, null, open_files, wait_for_a_request
from tests.unit.jobs.loops import both_loops

MIB = 1 << 20


@both_loops
async def test_an_export_is_found_by_name_and_the_first_is_the_default() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        assert list(exports.snapshot) == []
        first = exports.add("e1", "sda", await graph.add(null("a")), writable=True, description="system")
        second = exports.add("e2", None, await graph.add(null("b")))
        assert (second.name, second.writable) == ("b", False)
        assert [exports.find("b"), exports.find(""), exports.default] == [second, first, first]
        assert list(exports.snapshot) == ["sda", "b"]
        assert exports.listing() == [
            {"id": "e1", "type": "nbd", "node-name": "a", "shutting-down": False},
            {"id": "e2", "type": "nbd", "node-name": "b", "shutting-down": False},
        ]
        found = Export.find("sda")
        assert found is not None
        assert (found.size, found.writable) == (MIB, True)
        await exports.remove("e1")
        assert exports.default is second
        await exports.close()


@both_loops
async def test_what_cannot_be_exported_is_refused_in_the_words_of_qemu() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("a"))
        fixed = await graph.add(null("fixed", read_only=True))
        exports.add("e", None, node)
        for export_id, name, which, writable, text in (
            ("e", "x", node, False, "Block export id 'e' is already in use"),
            ("9", "x", node, False, "Invalid block export id"),
            ("e2", "a", node, False, "NBD server already has export named 'a'"),
            ("e2", "é" * 2049, node, False, f"export name '{'é' * 2049}' too long"),
            ("e2", "x", fixed, True, "Cannot export read-only node as writable"),
        ):
            with pytest.raises(BlockError) as refused:
                exports.add(export_id, name, which, writable=writable)
            assert refused.value.message == text
        for export_id, text in (("nope", "Export 'nope' is not found"),):
            with pytest.raises(BlockError) as refused:
                await exports.remove(export_id)
            assert refused.value.message == text
        assert list(exports.snapshot) == ["a"]
        await exports.close()


@both_loops
async def test_a_writable_export_of_a_backup_target_is_refused_and_told_how_to_get_it() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("target"))
        job = Holder(HolderKind.JOB, "b1", "backup")
        permission = graph.permissions.acquire(node, job, uses=READ_WRITE | {Access.RESIZE}, shares=READ)
        with pytest.raises(BlockError) as refused:
            exports.add("e", None, node, writable=True)
        text = refused.value.message
        assert text.startswith(
            "Permission conflict on node 'target': permissions 'write' are both required by"
        )
        assert "export 'e' and unshared by job 'b1' (backup)" in text
        assert f"since {job.since:%Y-%m-%d %H:%M:%S} UTC: end it with job-cancel" in text
        assert Export.find("target") is None
        permission.release()
        exports.add("e", None, node, writable=True)
        await exports.close()


@both_loops
async def test_safe_removal_spares_clients_and_hard_removal_does_not() -> None:
    deleted: list[str] = []
    async with new_graph() as graph:
        exports = Exports(graph, deleted.append)
        entry = exports.add("e", None, await graph.add(null("a")), writable=True)
        client = Export.find("a")
        assert client is not None
        client.count_client(1)
        with pytest.raises(BlockError) as refused:
            await exports.remove("e")
        assert refused.value.message == "export 'e' still in use"
        assert refused.value.hint == "Use mode='hard' to force client disconnect"
        client.pread(bytearray(512), 0)
        removal = asyncio.ensure_future(exports.remove("e", "hard"))
        await asyncio.sleep(0)
        assert exports.listing()[0]["shutting-down"] is True
        assert not exports.snapshot
        with pytest.raises(BlockError, match="Export 'e' is already shutting down"):
            await exports.remove("e", "hard")
        await removal
        assert (deleted, exports.listing(), entry.shutting_down) == (["e"], [], True)
        with pytest.raises(KernelError) as failed:
            client.pread(bytearray(512), 0)
        assert failed.value.errno == errno.ESHUTDOWN
        client.count_client(-1)


@both_loops
async def test_a_client_that_lingers_does_not_keep_the_image_open(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    async with new_graph() as graph:
        exports = Exports(graph)
        exports.add("e", None, await graph.add(image(path)), writable=True)
        client = Export.find("top")
        assert client is not None
        client.count_client(1)
        await exports.remove("e", "hard")
        await graph.remove("top")
        assert not open_files(tmp_path)
        client.count_client(-1)


@both_loops
async def test_guests_wait_while_a_node_is_drained_and_go_on_after() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("slow", latency_ns=20_000_000))
        export = exports.add("e", None, node).export
        done = threading.Event()

        def guest() -> None:
            for _ in range(3):
                export.pread(bytearray(512), 0)
            done.set()

        thread = threading.Thread(target=guest)
        thread.start()
        await asyncio.to_thread(wait_for_a_request, export)
        async with graph.drained(node), graph.drained(node):
            assert export.counters().in_flight == 0
            before = export.counters().read_ops
            assert not done.wait(0.1)
            assert export.counters().read_ops == before
        await asyncio.to_thread(thread.join)
        assert export.counters().read_ops == 3
        await exports.close()


@both_loops
async def test_an_export_added_during_a_drain_is_drained_too() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("slow", latency_ns=50_000_000))
        export = exports.add("e", "one", node).export
        guest = asyncio.ensure_future(asyncio.to_thread(export.pread, bytearray(512), 0))
        await asyncio.to_thread(wait_for_a_request, export)

        async def drain() -> None:
            async with graph.drained(node):
                assert not late.done()

        draining = asyncio.ensure_future(drain())
        await asyncio.sleep(0.01)
        second = exports.add("e2", "two", node).export
        late = asyncio.ensure_future(asyncio.to_thread(_two_reads, second))
        await asyncio.gather(draining, guest)
        await late
        await exports.close()


def _two_reads(export: Export) -> None:
    for _ in range(2):
        export.pread(bytearray(512), 0)


@both_loops
async def test_a_cancelled_drain_reopens_the_gates() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("slow", latency_ns=50_000_000))
        export = exports.add("e", None, node).export
        guest = asyncio.ensure_future(asyncio.to_thread(export.pread, bytearray(512), 0))
        await asyncio.to_thread(wait_for_a_request, export)

        async def drain() -> None:
            async with graph.drained(node):
                raise AssertionError("not drained yet")

        draining = asyncio.ensure_future(drain())
        await asyncio.sleep(0.005)
        draining.cancel()
        with pytest.raises(asyncio.CancelledError):
            await draining
        await guest
        await asyncio.to_thread(export.pread, bytearray(512), 0)
        await exports.close()
