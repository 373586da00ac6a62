"""Adding and removing nodes, filters, and the texts that scripts match on."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nbd_backend.block import kernel
from nbd_backend.block.errors import BlockError, KernelError, Kind
from nbd_backend.block.exports import Exports
from nbd_backend.block.permissions import ALL, READ, Holder, HolderKind
from nbd_backend.block.qcow2.create import Backing, create_qcow2, create_raw
from tests.support import images
from tests.unit.block.graphs import MIB, failing_reads, image, new_graph, null, open_files
from tests.unit.jobs.loops import both_loops


def chain(directory: Path) -> Path:
    """base.qcow2 <- top.qcow2; returns the top."""
    create_qcow2(str(directory / "base.qcow2"), MIB)
    create_qcow2(str(directory / "top.qcow2"), MIB, backing=Backing("base.qcow2", "qcow2"))
    return directory / "top.qcow2"


@both_loops
async def test_a_chain_is_opened_with_a_node_for_each_file_and_layer(tmp_path: Path) -> None:
    async with new_graph() as graph:
        top = await graph.add(image(chain(tmp_path)))
        assert [node.driver for node in graph.nodes()] == ["qcow2", "qcow2", "file", "file"]
        assert [node.filename for node in top.chain()] == [
            str(tmp_path / "top.qcow2"),
            str(tmp_path / "base.qcow2"),
        ]
        assert top.depth == 1
        assert not top.read_only
        assert top.backing is not None
        assert top.backing.read_only
        assert top.backing.name.startswith("#block")
        assert graph.find("top") is top
        assert graph.by_id(top.id) is top


def ask_qemu(*commands: tuple[str, dict[str, Any]]) -> list[Any]:
    """What qemu-storage-daemon answers to each command."""
    words = ["qemu-storage-daemon", "--chardev", "stdio,id=m", "--monitor", "chardev=m"]
    said = [("qmp_capabilities", {}), *commands, ("quit", {})]
    asked = "".join(json.dumps({"execute": name, "arguments": data}) + "\n" for name, data in said)
    done = subprocess.run(words, input=asked, capture_output=True, text=True, timeout=30, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    return [answer for answer in answers if "return" in answer or "error" in answer][1:-1]


def shape(value: Any) -> Any:
    """The keys and types of a JSON value."""
    if isinstance(value, dict):
        return {key: shape(member) for key, member in value.items()}
    return type(value).__name__


def by_driver_and_file(nodes: list[dict[str, Any]]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(node["drv"], node["file"]): node for node in nodes}


@pytest.mark.parametrize("flat", [False, True])
@both_loops
async def test_nodes_are_described_as_qemu_describes_them(tmp_path: Path, flat: bool) -> None:
    top = chain(tmp_path)
    create_raw(str(tmp_path / "disk.raw"), MIB)
    nothing = {"driver": "null-co", "node-name": "nothing", "size": MIB}
    added = [image(top), image(tmp_path / "disk.raw", "plain", "raw"), nothing]
    queried = ("query-named-block-nodes", {"flat": flat})
    answer = ask_qemu(*(("blockdev-add", options) for options in added), queried)[-1]["return"]
    async with new_graph() as graph:
        for options in added:
            await graph.add(options)
        ours = by_driver_and_file([graph.describe(node, flat=flat) for node in graph.nodes()])
    theirs = by_driver_and_file(answer)
    assert ours.keys() == theirs.keys()
    for which, node in theirs.items():
        assert shape(ours[which]) == shape(node), which
        names = ("node-name",) if which[0] != "file" and not node["node-name"].startswith("#") else ()
        for key in ("ro", "backing_file_depth", "cache", "image", *names):
            assert without_sizes(ours[which][key]) == without_sizes(node[key]), (which, key)


def without_sizes(value: Any) -> Any:
    """Without what depends on when the file system allocates, and on the rounding of the file's own size."""
    if not isinstance(value, dict):
        return value
    hidden = {"actual-size"} | ({"virtual-size"} if value.get("format") == "file" else set())
    return {key: without_sizes(member) for key, member in value.items() if key not in hidden}


MISTAKES: list[tuple[dict[str, Any], str]] = [
    (
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/nope"}},
        "Could not open '/nope': No such file or directory",
    ),
    (
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "/nope", "zz": 1}},
        "Parameter 'file.zz' is unexpected",
    ),
    (
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file"}},
        "Parameter 'file.filename' is missing",
    ),
    (
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": 5}},
        "Invalid parameter type for 'file.filename', expected: string",
    ),
    (
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "raw", "file": {"driver": "file"}}},
        "Parameter 'file.file.filename' is missing",
    ),
    ({"driver": "qcow2", "node-name": "n"}, "Parameter 'file' is missing"),
    ({"node-name": "n"}, "Parameter 'driver' is missing"),
    ({"driver": 5, "node-name": "n"}, "Invalid parameter type for 'driver', expected: string"),
    ({"driver": "nono", "node-name": "n"}, "Parameter 'driver' does not accept value 'nono'"),
    ({"driver": "raw", "node-name": "n", "file": "x"}, "Cannot find device='x' nor node-name='x'"),
    (
        {"driver": "raw", "node-name": "n", "file": None},
        "Invalid parameter type for 'file', expected: BlockdevRef",
    ),
    (
        {"driver": "raw", "node-name": "n", "file": 7},
        "Invalid parameter type for 'file', expected: BlockdevRef",
    ),
    ({**null("n"), "discard": "x"}, "Parameter 'discard' does not accept value 'x'"),
    ({**null("n"), "read-only": "yes"}, "Invalid parameter type for 'read-only', expected: boolean"),
    ({**null("n"), "cache": {"direct": 1}}, "Invalid parameter type for 'cache.direct', expected: boolean"),
    ({**null("n"), "cache": {"x": True}}, "Parameter 'cache.x' is unexpected"),
    (
        {**null("n"), "detect-zeroes": "unmap"},
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
    ),
    ({**null("9n")}, "Invalid node-name: '9n'"),
    ({**null("#n")}, "Invalid node-name: '#n'"),
    ({**null("n" * 32)}, "Node name too long"),
    ({**null("n0")}, "Duplicate nodes with node-name='n0'"),
    ({"driver": "null-co"}, "'node-name' must be specified for the root node"),
]


@pytest.mark.parametrize(("options", "text"), MISTAKES, ids=[text for _, text in MISTAKES])
@both_loops
async def test_wrong_options_are_refused_in_the_words_of_qemu(options: dict[str, Any], text: str) -> None:
    theirs = ask_qemu(("blockdev-add", {"driver": "null-co", "node-name": "n0"}), ("blockdev-add", options))
    async with new_graph() as graph:
        await graph.add(null("n0"))
        with pytest.raises(BlockError) as refused:
            await graph.add(options)
        assert [node.name for node in graph.nodes()] == ["n0"]
    assert refused.value.message == text
    assert theirs[1]["error"]["desc"] == text


@both_loops
async def test_a_window_beyond_its_file_is_refused() -> None:
    async with new_graph() as graph:
        await graph.add(null("n0"))
        with pytest.raises(BlockError, match="larger than the 1048576 bytes"):
            await graph.add({"driver": "raw", "node-name": "r", "file": "n0", "offset": 512, "size": MIB})
        with pytest.raises(BlockError, match="is larger than"):
            await graph.add({"driver": "raw", "node-name": "r", "file": "n0", "offset": MIB + 1})
        window = await graph.add({"driver": "raw", "node-name": "r", "file": "n0", "offset": 512})
        assert window.size == MIB - 512


@both_loops
async def test_detect_zeroes_is_refused_because_it_is_not_there() -> None:
    async with new_graph() as graph:
        with pytest.raises(BlockError, match="detect-zeroes=on is not supported") as refused:
            await graph.add(null("n", detect_zeroes="on"))
        assert refused.value.kind is Kind.UNSUPPORTED


# ---- removing ----


@both_loops
async def test_only_an_unused_node_of_blockdev_add_can_be_removed(tmp_path: Path) -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        top = await graph.add(image(chain(tmp_path)))
        await graph.add(null("n0"))
        await graph.add({"driver": "raw", "node-name": "above", "file": "n0"})
        exports.add("e", None, top)
        assert top.file is not None
        for name, text in (
            ("zip", "Failed to find node with node-name='zip'"),
            ("top", "Node top is in use"),
            (top.file.name, f"Node {top.file.name} is not owned by the monitor"),
            ("n0", "Block device n0 is in use"),
        ):
            with pytest.raises(BlockError) as refused:
                await graph.remove(name)
            assert refused.value.message == text
        await exports.remove("e")
        await graph.remove("top")
        assert [node.name for node in graph.nodes()] == ["above", "n0"]
        await graph.remove("above")
        assert [node.name for node in graph.nodes()] == ["n0"]


@both_loops
async def test_removing_a_node_flushes_it_and_a_failed_flush_keeps_it() -> None:
    rules = [{"operations": ["flush"], "errno": "EIO", "count": 1}]
    async with new_graph() as graph:
        inner = null("inner")
        await graph.add({"driver": "error-inject", "node-name": "faulty", "file": inner, "rules": rules})
        with pytest.raises(KernelError) as failed:
            await graph.remove("faulty")
        assert failed.value.message == "Could not flush node 'faulty': Input/output error"
        assert graph.find("faulty") is not None
        await graph.remove("faulty")
        assert graph.nodes() == []


def unflushable() -> dict[str, Any]:
    rules = [{"operations": ["flush"], "errno": "EIO"}]
    return {"driver": "error-inject", "node-name": "faulty", "file": null("inner"), "rules": rules}


@both_loops
async def test_a_node_that_can_never_be_flushed_goes_at_the_second_attempt() -> None:
    async with new_graph() as graph:
        await graph.add(unflushable())
        with pytest.raises(KernelError) as failed:
            await graph.remove("faulty")
        assert "once more, blockdev-del removes it" in failed.value.hint
        await graph.remove("faulty")
        assert graph.nodes() == []


@both_loops
async def test_whoever_writes_again_is_told_of_the_loss_again() -> None:
    async with new_graph() as graph:
        node = await graph.add(unflushable())
        graph.tell_loss(node)
        exports = Exports(graph)
        exports.add("e", None, node, writable=True)
        await exports.close()
        with pytest.raises(KernelError):
            await graph.remove("faulty")


@both_loops
async def test_the_end_fails_by_a_loss_that_nobody_was_told_of() -> None:
    async with new_graph() as graph:
        await graph.add(unflushable())
        with pytest.raises(KernelError, match="Could not flush node 'faulty'"):
            await graph.close()
    async with new_graph() as graph:
        graph.tell_loss(await graph.add(unflushable()))
        await graph.close()
        assert graph.nodes() == []


@contextmanager
def nbd_server(directory: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """A disk at another server: blockdev-add's options, and the server's process id."""
    path = directory / "nbd.sock"
    with subprocess.Popen(["nbdkit", "-f", "-U", str(path), "memory", str(MIB)]) as remote:
        try:
            while not path.exists():
                assert remote.poll() is None
            server = {"type": "unix", "path": str(path)}
            yield {"driver": "nbd", "node-name": "remote", "server": server}, remote.pid
        finally:
            remote.kill()


def freeze(pid: int) -> None:
    """Stop a child, for certain."""
    os.kill(pid, signal.SIGSTOP)
    os.waitid(os.P_PID, pid, os.WSTOPPED)


@both_loops
async def test_the_end_can_go_on_without_a_server_that_hangs(tmp_path: Path) -> None:
    with nbd_server(tmp_path) as (options, pid):
        async with new_graph() as graph:
            await graph.add({"driver": "raw", "node-name": "top", "file": options})
            freeze(pid)
            closing = asyncio.ensure_future(graph.close())
            await asyncio.sleep(0)  # the flush has begun
            graph.cut_off_all()
            with pytest.raises(KernelError, match="Could not flush node 'top': Connection reset"):
                await closing


@both_loops
async def test_a_server_that_a_guest_uses_is_not_cut_off(tmp_path: Path) -> None:
    with nbd_server(tmp_path) as (options, _):
        async with new_graph() as graph:
            node = await graph.add({"driver": "raw", "node-name": "top", "file": options})
            exports = Exports(graph)
            exports.add("e", None, node)
            assert not graph.cut_off(node)
            assert node.handle.pread(1, 0) == b"\0"
            await exports.close()
            assert graph.cut_off(node)
            with pytest.raises(KernelError, match="Connection reset"):
                node.handle.pread(1, 0)
            graph.tell_loss(node)


@both_loops
async def test_a_failed_add_leaves_nothing_open(tmp_path: Path) -> None:
    top = chain(tmp_path)
    (tmp_path / "base.qcow2").write_bytes(b"no image")
    async with new_graph() as graph:
        with pytest.raises(BlockError, match="not in qcow2 format"):
            await graph.add(image(top))
        assert graph.nodes() == []
        assert not open_files(tmp_path)
        create_qcow2(str(tmp_path / "base.qcow2"), MIB)
        await graph.add(image(top))
        await graph.remove("top")
        assert not open_files(tmp_path)


# ---- one file, several nodes ----


@pytest.mark.parametrize("first_read_only", [False, True])
@both_loops
async def test_a_file_has_one_writer_or_many_readers(tmp_path: Path, first_read_only: bool) -> None:
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    (tmp_path / "link").symlink_to(path)
    async with new_graph() as graph:
        await graph.add(image(path, "first", read_only=first_read_only))
        with pytest.raises(BlockError) as refused:
            await graph.add(image(tmp_path / "link", "second"))
        assert refused.value.message.startswith('Failed to get "write" lock')
        assert refused.value.kind is Kind.IN_USE
        if first_read_only:
            await graph.add(image(tmp_path / "link", "second", read_only=True))
        else:
            with pytest.raises(BlockError):
                await graph.add(image(path, "second", read_only=True))
            shared = image(path, "second", read_only=True, force_share=True)
            shared["file"]["force-share"] = True
            await graph.add(shared)


@both_loops
async def test_an_image_may_not_be_created_over_an_open_one(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    async with new_graph() as graph:
        assert graph.admit_new_file(str(tmp_path / "new")) == str(tmp_path / "new")
        assert graph.admit_new_file(str(path)) == str(path)
        await graph.add(image(path, read_only=True))
        with pytest.raises(BlockError, match="it is open as node '#block"):
            graph.admit_new_file(str(path))


@both_loops
async def test_auto_read_only_opens_what_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "disk.raw"
    create_raw(str(path), MIB)
    real = kernel.file_open

    def not_writable(name: str, flags: kernel.NodeFlag) -> kernel.Node:
        if not flags & kernel.NodeFlag.READ_ONLY:
            raise KernelError(f"Could not open '{name}'", errno.EROFS)
        return real(name, flags)

    monkeypatch.setattr(kernel, "file_open", not_writable)
    async with new_graph() as graph:
        with pytest.raises(KernelError, match="Read-only file system"):
            await graph.add({"driver": "file", "node-name": "f", "filename": str(path)})
        node = await graph.add(
            {"driver": "file", "node-name": "f", "filename": str(path), "auto-read-only": True}
        )
        assert node.read_only


# ---- what opening writes ----


@both_loops
async def test_first_writable_open_clears_autoclear_bits_and_a_read_only_one_does_not(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_qcow2(str(path), MIB)
    images.run(["qemu-img", "bitmap", "--add", path, "b0"])
    with path.open("r+b") as file:
        file.seek(88)
        file.write(struct.pack(">Q", 1 | 1 << 40))
    before = path.read_bytes()
    async with new_graph() as graph:
        await graph.add(image(path, read_only=True))
        await graph.remove("top")
        assert path.read_bytes() == before
        await graph.add(image(path))
        await graph.remove("top")
    assert path.read_bytes()[88:96] == bytes(8)


# ---- filters ----


@both_loops
async def test_a_filter_gets_the_requests_of_exports_while_it_is_there() -> None:
    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("disk"))
        export = exports.add("e", None, node, writable=True).export
        export.pread(bytearray(512), 0)
        made = await graph.insert_filter(node, failing_reads, "faults")
        assert (graph.find("faults"), node.entry) == (made, made)
        with pytest.raises(KernelError) as failed:
            export.pread(bytearray(512), 0)
        assert failed.value.errno == errno.EIO
        late = exports.add("late", "other", node).export
        with pytest.raises(KernelError):
            late.pread(bytearray(512), 0)
        await graph.remove_filter(made)
        export.pread(bytearray(512), 0)
        late.pread(bytearray(512), 0)
        assert graph.find("faults") is None
        await exports.close()


@both_loops
async def test_a_filter_below_another_goes_when_that_one_goes() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("disk"))
        lower = await graph.insert_filter(node, failing_reads, "lower")
        upper = await graph.insert_filter(node, failing_reads, "upper")
        assert upper.file is lower
        await graph.remove_filter(lower)
        assert graph.find("lower") is lower
        await graph.remove_filter(upper)
        assert [each.name for each in graph.nodes()] == ["disk"]
        assert node.entry is node


@both_loops
async def test_an_overlay_reads_its_backing_layer_through_the_filter(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "base.qcow2"), MIB)
    create_qcow2(str(tmp_path / "top.qcow2"), MIB)
    images.qemu_io(tmp_path / "base.qcow2", "write -P 0x33 0 64k")
    async with new_graph() as graph:
        base = await graph.add(image(tmp_path / "base.qcow2", "base", read_only=True))
        top = await graph.add(image(tmp_path / "top.qcow2", backing="base"))
        made = await graph.insert_filter(base, failing_reads)
        assert top.backing is made
        with pytest.raises(KernelError):
            top.handle.pread(512, 0)
        assert [layer.name for layer in top.chain()] == ["top", "base"]
        await graph.remove_filter(made)
        assert top.handle.pread(512, 0) == b"\x33" * 512
        assert top.backing is base


@both_loops
async def test_a_filter_that_cannot_be_made_changes_nothing() -> None:
    def refuse(_: kernel.Node) -> kernel.Node:
        raise KernelError("no filter", errno.ENOMEM)

    async with new_graph() as graph:
        exports = Exports(graph)
        node = await graph.add(null("disk"))
        export = exports.add("e", None, node).export
        with pytest.raises(KernelError, match="no filter"):
            await graph.insert_filter(node, refuse, "faults")
        export.pread(bytearray(512), 0)
        assert [each.name for each in graph.nodes()] == ["disk"]
        await graph.remove_filter(await graph.insert_filter(node, failing_reads, "faults"))
        await exports.close()


@both_loops
async def test_no_filter_below_a_parent_that_would_write_past_it() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("disk"))
        await graph.add({"driver": "raw", "node-name": "view", "file": "disk"})
        with pytest.raises(BlockError, match="is the 'file' child of node 'view'"):
            await graph.insert_filter(node, failing_reads)
        assert len(graph.nodes()) == 2


@both_loops
async def test_a_node_that_a_job_holds_stays() -> None:
    async with new_graph() as graph:
        node = await graph.add(null("disk"))
        holder = Holder(HolderKind.JOB, "b1", "backup")
        permission = graph.permissions.acquire(node, holder, uses=READ, shares=ALL)
        with pytest.raises(BlockError, match="Node disk is in use") as refused:
            await graph.remove("disk")
        assert refused.value.hint == "job 'b1' (backup): end it with job-cancel"
        permission.release()
        await graph.remove("disk")
