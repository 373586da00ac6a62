"""QEMU's programs and we keep out of each other's images."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.locks import lock_file
from nbd_backend.block.qcow2.create import create_qcow2
from tests.support import images
from tests.unit.block.graphs import MIB, image, new_graph
from tests.unit.jobs.loops import both_loops

WRITE = ["qemu-io", "-f", "qcow2", "-c", "write 0 512"]
READ = ["qemu-io", "-r", "-f", "qcow2", "-c", "read 0 512"]


@both_loops
async def test_qemu_neither_writes_nor_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_qcow2(str(path), MIB)
    async with new_graph() as graph:
        await graph.add(image(path))
        images.run([*WRITE, path], expect=[1])
        images.run([*READ, path], expect=[1])
        await graph.remove("top")
        images.run([*WRITE, path])


@both_loops
async def test_qemu_may_read_but_not_write_what_we_read(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_qcow2(str(path), MIB)
    async with new_graph() as graph:
        await graph.add(image(path, read_only=True))
        images.run([*WRITE, path], expect=[1])
        images.run([*READ, path])
        await graph.add(image(path, "second", read_only=True, force_share=True))
        await graph.remove("top")
        images.run([*WRITE, path])


def test_readers_share_and_a_writer_shares_with_nobody(tmp_path: Path) -> None:
    path = str(tmp_path / "disk")
    create_qcow2(path, MIB)
    first, second = lock_file(path, writable=False), lock_file(path, writable=False)
    with pytest.raises(BlockError) as refused:
        lock_file(path, writable=True)
    assert refused.value.message == 'Failed to get "write" lock'
    assert refused.value.hint == f"Is another process using the image [{path}]?"
    assert refused.value.kind is Kind.IN_USE
    first.close()
    second.close()
    writer = lock_file(path, writable=True)
    with pytest.raises(BlockError, match='Failed to get shared "write" lock'):
        lock_file(path, writable=False)
    writer.close()
    lock_file(path, writable=False).close()
