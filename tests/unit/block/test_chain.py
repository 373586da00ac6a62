"""What an overlay's header may make us open, and what not."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbd_backend.block.errors import BadImage, BlockError, Kind
from nbd_backend.block.qcow2.create import Backing, create_qcow2, create_raw
from nbd_backend.block.security import PathPolicy
from tests.support import images
from tests.unit.block.graphs import MIB, image, new_graph
from tests.unit.jobs.loops import both_loops


def overlay(path: Path, backing: str, backing_format: str = "qcow2") -> Path:
    create_qcow2(str(path), MIB, backing=Backing(backing, backing_format))
    return path


async def refusal(path: Path, policy: PathPolicy | None = None, driver: str = "qcow2") -> BlockError:
    async with new_graph(policy) as graph:
        with pytest.raises(BlockError) as refused:
            await graph.add(image(path, driver=driver))
        return refused.value


@both_loops
async def test_a_chain_that_comes_back_to_its_top_is_refused(tmp_path: Path) -> None:
    overlay(tmp_path / "b", "c")
    overlay(tmp_path / "c", "a")
    refused = await refusal(overlay(tmp_path / "a", "b"))
    assert refused.message == f"Could not open '{tmp_path / 'a'}': it is in its own backing chain (a loop)"


@both_loops
async def test_a_loop_below_the_top_and_through_a_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "b")
    overlay(tmp_path / "b", "link")
    refused = await refusal(overlay(tmp_path / "a", "b"))
    assert "it is in its own backing chain (a loop)" in refused.message


@both_loops
async def test_a_long_chain_is_opened(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "0"), MIB)
    for i in range(1, 400):
        overlay(tmp_path / str(i), str(i - 1))
    async with new_graph() as graph:
        top = await graph.add(image(tmp_path / "399"))
        assert top.depth == 399
        assert top.handle.pread(512, 0) == bytes(512)
        assert graph.describe(top)["backing_file_depth"] == 399


@both_loops
async def test_a_backing_file_without_a_recorded_format_is_refused(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "base"), MIB)
    path = overlay(tmp_path / "top", "base")
    data = bytearray(path.read_bytes())
    data[112:116] = (0x11223344).to_bytes(4, "big")  # the extension is now an unknown one
    path.write_bytes(data)
    refused = await refusal(path)
    assert refused.kind is Kind.DENIED
    assert f"backing file 'base' of '{path}'" in refused.message
    assert f"qemu-img rebase -u -F qcow2 -b base {path}" in refused.hint


NAMES = ["json:{}", "nbd://localhost/x", "file:base", "nbd:unix:/run/x", "a:b.qcow2"]


@pytest.mark.parametrize("name", NAMES)
@both_loops
async def test_a_backing_name_that_is_no_plain_file_name_is_refused(tmp_path: Path, name: str) -> None:
    refused = await refusal(overlay(tmp_path / "top", name))
    assert refused.kind is Kind.DENIED
    assert f"backing file '{name}'" in refused.message


@both_loops
async def test_a_colon_behind_a_slash_is_part_of_a_name(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "a:b"), MIB)
    async with new_graph() as graph:
        top = await graph.add(image(overlay(tmp_path / "top", "./a:b")))
        assert top.depth == 1


@both_loops
async def test_another_backing_format_is_refused_by_name(tmp_path: Path) -> None:
    refused = await refusal(overlay(tmp_path / "top", "base", "vmdk"))
    assert refused.kind is Kind.UNSUPPORTED
    assert "format 'vmdk' is not supported" in refused.message


@both_loops
async def test_a_missing_backing_file_is_named(tmp_path: Path) -> None:
    refused = await refusal(overlay(tmp_path / "top", "gone"))
    gone, top = tmp_path / "gone", tmp_path / "top"
    expected = f"Could not open backing file '{gone}' of '{top}': No such file or directory"
    assert refused.message == expected


@both_loops
async def test_a_relative_name_is_relative_to_its_overlay(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    create_qcow2(str(tmp_path / "sub" / "base"), MIB)
    overlay(tmp_path / "sub" / "middle", "base")
    async with new_graph() as graph:
        top = await graph.add(image(overlay(tmp_path / "top", "sub/middle")))
        assert [layer.filename for layer in top.chain()] == [
            str(tmp_path / name) for name in ("top", "sub/middle", "sub/base")
        ]


@both_loops
async def test_a_raw_base_ends_the_chain_and_is_never_probed(tmp_path: Path) -> None:
    create_qcow2(str(tmp_path / "base"), MIB)
    async with new_graph() as graph:
        top = await graph.add(image(overlay(tmp_path / "top", "base", "raw")))
        assert [layer.driver for layer in top.chain()] == ["qcow2", "raw"]
        assert top.handle.pread(4, 0) == b"QFI\xfb"


@both_loops
async def test_backing_null_leaves_the_backing_file_alone(tmp_path: Path) -> None:
    async with new_graph() as graph:
        top = await graph.add(image(overlay(tmp_path / "top", "gone"), backing=None))
        assert top.depth == 0


# ---- the allow-list ----


@both_loops
async def test_what_lies_outside_the_allowed_directories_is_refused(tmp_path: Path) -> None:
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        create_raw(str(tmp_path / name / "base"), MIB)
    policy = PathPolicy([tmp_path / "in"])
    outside = str(tmp_path / "out" / "base")
    (tmp_path / "in" / "link").symlink_to(outside)
    (tmp_path / "in-not").symlink_to(tmp_path / "in")
    refused = await refusal(Path(outside), policy, "raw")
    assert refused.kind is Kind.DENIED
    wanted = f"Could not open '{outside}': it lies outside the allowed directories '{tmp_path / 'in'}'"
    assert refused.message == wanted
    for backing in (outside, "../out/base", "link"):
        refused = await refusal(overlay(tmp_path / "in" / "top", backing, "raw"), policy)
        assert "lies outside the allowed directories" in refused.message
    async with new_graph(policy) as graph:
        await graph.add(image(overlay(tmp_path / "in" / "top", "base", "raw")))
        with pytest.raises(BlockError, match="outside the allowed directories"):
            graph.admit_new_file(str(tmp_path / "out" / "new"))


# ---- damaged images ----


@both_loops
async def test_damaged_metadata_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    create_qcow2(str(path), MIB)
    images.qemu_io(path, "write 0 64k")
    data = bytearray(path.read_bytes())
    l1_offset = int.from_bytes(data[40:48], "big")
    data[l1_offset : l1_offset + 8] = (1 << 63 | 0x200).to_bytes(8, "big")
    path.write_bytes(data)
    before = path.read_bytes()
    async with new_graph() as graph:
        with pytest.raises(BadImage) as refused:
            await graph.add(image(path))
        assert graph.nodes() == []
    assert f"L1 table entry 0 is damaged: 0x8000000000000200 in '{path}'" in refused.value.message
    assert path.read_bytes() == before
