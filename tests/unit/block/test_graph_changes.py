"""Changes of the graph that overlap, and jobs that read it meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from nbd_backend.block import kernel
from nbd_backend.block.exports import Exports
from nbd_backend.block.graph import Graph
from nbd_backend.block.node import BlockNode
from nbd_backend.block.qcow2.create import Backing, create_qcow2
from tests.unit.block.graphs import failing_reads, image, new_graph, null
from tests.unit.jobs.loops import both_loops

MIB = 1 << 20


class Reader:
    """A job, as the graph sees it: it can be held still, sooner or later."""

    def __init__(self) -> None:
        self.reading = asyncio.Event()
        self.reading.set()
        self.still = 0

    @asynccontextmanager
    async def quiesced(self) -> AsyncIterator[None]:
        await self.reading.wait()
        self.still += 1
        yield
        self.still -= 1


@both_loops
async def test_a_filter_stays_when_the_one_above_it_goes() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("disk"))
        lower = await graph.insert_filter(node, failing_reads, "lower")
        upper = await graph.insert_filter(node, failing_reads, "upper")
        await graph.remove_filter(upper)
        assert node.entry is lower
        assert graph.find("lower") is lower
        assert lower.handle.size == MIB
        await graph.remove_filter(lower)
        assert node.entry is node


@both_loops
async def test_filters_that_come_and_go_at_the_same_time_leave_the_node_as_it_was() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("disk"))
        export = exports.add("e", None, node).export

        async def come_and_go(number: int) -> None:
            for _ in range(10):
                made = await graph.insert_filter(
                    node, lambda below: kernel.raw_open(below, 0, 0, kernel.NodeFlag(0))
                )
                for _ in range(number):
                    await asyncio.sleep(0)
                await graph.remove_filter(made)

        await asyncio.gather(*(come_and_go(number) for number in range(5)))
        assert graph.nodes() == [node]
        export.pread(bytearray(512), 0)
        await exports.close()


async def _chain(graph: Graph, directory: Path) -> tuple[BlockNode, BlockNode]:
    base, top = directory / "base", directory / "top"
    create_qcow2(str(base), MIB)
    create_qcow2(str(top), MIB, backing=Backing(str(base), "qcow2"))
    node = await graph.add(image(top))
    assert node.backing is not None
    return node, node.backing


@both_loops
async def test_a_job_above_stands_still_while_a_layer_below_it_is_changed(tmp_path: Path) -> None:
    async with new_graph() as graph:
        top, base = await _chain(graph, tmp_path)
        reader = Reader()
        done = graph.use_in_background(top, reader.quiesced)
        async with graph.drained(base):
            assert reader.still == 1
        async with graph.drained(top):
            assert reader.still == 0, "what goes on at its own node is the job's business"
        done()
        async with graph.drained(base):
            assert reader.still == 0


@both_loops
async def test_guests_go_on_while_a_job_is_waited_for(tmp_path: Path) -> None:
    async with new_graph() as graph:
        top, base = await _chain(graph, tmp_path)
        exports = Exports(graph)
        export = exports.add("e", None, top).export
        reader = Reader()
        reader.reading.clear()
        graph.use_in_background(top, reader.quiesced)
        change = asyncio.create_task(graph.insert_filter(base, failing_reads))
        await asyncio.sleep(0)
        await asyncio.to_thread(export.pread, bytearray(512), 0)
        reader.reading.set()
        await graph.remove_filter(await change)
        await exports.close()


@both_loops
async def test_a_job_that_comes_while_guests_are_drained_is_held_too(tmp_path: Path) -> None:
    async with new_graph() as graph:
        top, base = await _chain(graph, tmp_path)
        exports = Exports(graph)
        exports.add("e", None, top)
        reader = Reader()

        async def change() -> int:
            async with graph.drained(base):
                return reader.still

        changing = asyncio.create_task(change())
        await asyncio.sleep(0)  # the gate is closed; its event has not come
        graph.use_in_background(top, reader.quiesced)
        assert await changing == 1
        await exports.close()


@both_loops
async def test_a_filter_that_is_in_place_tells_so() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("disk"))
        faults = {"driver": "error-inject", "node-name": "faults", "file": "disk"}
        by_user = await graph.add(faults)
        assert not by_user.in_place
        made = await graph.insert_filter(by_user, failing_reads)
        assert made.in_place
        await graph.remove_filter(made)
        assert (node.entry, by_user.entry) == (node, by_user)
