"""Every rule of the qcow2 header: what is changed in a good one, and what is said about it."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_backend.block.errors import BadImage, BlockError, Kind
from nbd_backend.block.qcow2.create import Backing, create_qcow2
from nbd_backend.block.qcow2.header import Header, parse
from nbd_backend.block.qcow2.support import bitmap_count, refuse_unsupported
from tests.support import images

CLUSTER = 64 << 10
SIZE = 1 << 30
LENGTH = 112
FILE = "/images/disk.qcow2"


def good(tmp_path: Path) -> bytearray:
    """The whole of a new image over a backing file."""
    path = tmp_path / "good.qcow2"
    create_qcow2(str(path), SIZE, backing=Backing("base.qcow2", "qcow2"))
    return bytearray(path.read_bytes())


def u32(offset: int, value: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(">I", image, offset, value)


def u64(offset: int, value: int) -> Callable[[bytearray], None]:
    return lambda image: struct.pack_into(">Q", image, offset, value)


def extensions(*found: tuple[int, bytes]) -> Callable[[bytearray], None]:
    """Replace the extension area; the backing name goes."""

    def change(image: bytearray) -> None:
        struct.pack_into(">QI", image, 8, 0, 0)
        area = b"".join(struct.pack(">II", k, len(data)) + data + bytes(-len(data) % 8) for k, data in found)
        image[LENGTH:CLUSTER] = (area + bytes(8)).ljust(CLUSTER - LENGTH, b"\0")

    return change


def version_2(image: bytearray) -> None:
    struct.pack_into(">I", image, 4, 2)
    image[72:LENGTH] = bytes(LENGTH - 72)
    struct.pack_into(">QI", image, 8, 0, 0)


def together(*changes: Callable[[bytearray], None]) -> Callable[[bytearray], None]:
    def change(image: bytearray) -> None:
        for each in changes:
            each(image)

    return change


DAMAGED = [
    ("magic", u32(0, 0x514649FC), "magic", "Image is not in qcow2 format"),
    ("backing name outside the first cluster", u64(8, CLUSTER + 1), "backing_file_offset",
     "Invalid backing file offset"),
    ("backing name inside the header", u64(8, 8), "backing_file_offset", "Invalid backing file offset"),
    ("backing name of 1024 bytes", u32(16, 1024), "backing_file_size", "Backing file name too long"),
    ("backing name beyond the first cluster", together(u64(8, CLUSTER - 8), u32(16, 9)), "backing_file_size",
     "Backing file name too long"),
    ("cluster of 256 bytes", u32(20, 8), "cluster_bits", "Unsupported cluster size: 2^8"),
    ("cluster of 4 MiB", u32(20, 22), "cluster_bits", "Unsupported cluster size: 2^22"),
    ("size of 2^63", u64(24, 1 << 63), "size", "Image is too big"),
    ("size beyond the largest L1 table", u64(24, 1 << 62), "size", "Image is too big"),
    ("size with a part of a sector", u64(24, SIZE - 1), "size", "not a multiple of 512"),
    ("encryption method", u32(32, 3), "crypt_method", "Unsupported encryption method 3"),
    ("LUKS without its extension", u32(32, 2), "crypt_method", "Missing CRYPTO header for crypt method 2"),
    ("LUKS extension without LUKS", extensions((0x0537BE77, bytes(16))), "crypt_method",
     "CRYPTO header extension only expected with LUKS encryption method"),
    ("L1 table too small", u32(36, 1), "l1_size", "L1 table is too small"),
    ("L1 table too large", u32(36, (32 << 20) // 8 + 1), "l1_size", "Active L1 table too large"),
    ("L1 table unaligned", u64(40, CLUSTER + 512), "l1_table_offset", "Active L1 table offset invalid"),
    ("L1 table on the header", u64(40, 0), "l1_table_offset", "Active L1 table offset invalid"),
    ("L1 table beyond the end", u64(40, 1 << 40), "l1_table_offset", "beyond the end of the file"),
    ("L1 table cut by the end", u64(40, 4 * CLUSTER), "l1_table_offset", "beyond the end of the file"),
    ("L1 table beyond 2^63", u64(40, 1 << 63), "l1_table_offset", "Active L1 table offset invalid"),
    ("refcount table unaligned", u64(48, 512), "refcount_table_offset",
     "Reference count table offset invalid"),
    ("refcount table on the header", u64(48, 0), "refcount_table_offset",
     "Reference count table offset invalid"),
    ("refcount table beyond the end", u64(48, 1 << 40), "refcount_table_offset",
     "beyond the end of the file"),
    ("no refcount table", u32(56, 0), "refcount_table_clusters",
     "Image does not contain a reference count table"),
    ("refcount table too large", u32(56, 129), "refcount_table_clusters", "Reference count table too large"),
    ("too many snapshots", u32(60, 65537), "nb_snapshots", "Snapshot table too large"),
    ("snapshots without a table", u32(60, 1), "snapshots_offset", "Snapshot table offset invalid"),
    ("snapshot table unaligned", together(u32(60, 1), u64(64, 512)), "snapshots_offset",
     "Snapshot table offset invalid"),
    ("refcount width", u32(96, 7), "refcount_order", "Reference count entry width too large"),
    ("short header", u32(100, 96), "header_length", "qcow2 header too short"),
    ("header longer than a cluster", u32(100, CLUSTER + 8), "header_length",
     "qcow2 header exceeds cluster size"),
    ("header length not a multiple of 8", u32(100, 108), "header_length", "not a multiple of 8"),
    ("compression type", u32(104, 5 << 24), "compression_type", "qcow2: unknown compression type: 5"),
    ("compression type without its bit", u32(104, 1 << 24), "compression_type",
     "qcow2: Compression type incompatible feature bit must be set"),
    ("compression bit without a type", u64(72, 8), "compression_type",
     "qcow2: Compression type incompatible feature bit must not be set"),
    ("extension beyond its area", extensions((0x12345678, bytes(CLUSTER - LENGTH - 7))),
     "length of header extension 0x12345678", "Header extension too large"),
    ("extension twice", extensions((0x12345678, b""), (0x12345678, b"")), "header extension",
     "Header extension appears twice"),
    ("backing format too long", extensions((0xE2792ACA, b"x" * 16)),
     "length of header extension backing format", "ERROR: ext_backing_format: len=16 too large (>=16)"),
    ("NUL in the backing format", extensions((0xE2792ACA, b"raw\0")), "backing format", "NUL"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "field", "text"), [row[1:] for row in DAMAGED], ids=[row[0] for row in DAMAGED]
)
def test_damaged_header_is_refused_naming_file_field_and_value(
    tmp_path: Path, change: Callable[[bytearray], None], field: str, text: str
) -> None:
    image = good(tmp_path)
    change(image)
    with pytest.raises(BadImage) as refused:
        parse(bytes(image[:CLUSTER]), FILE, len(image))
    assert text in refused.value.message
    assert refused.value.field == field
    assert FILE in refused.value.message
    assert str(refused.value.value) in refused.value.message


def test_nul_in_the_backing_name_is_refused(tmp_path: Path) -> None:
    image = good(tmp_path)
    offset = struct.unpack_from(">Q", image, 8)[0]
    image[offset + 2] = 0
    with pytest.raises(BadImage, match="NUL"):
        parse(bytes(image[:CLUSTER]), FILE, len(image))


@pytest.mark.parametrize("length", [0, 3, 7, 8, 71, 72, 103, 104, 111])
def test_a_header_cut_short_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(BadImage):
        parse(bytes(good(tmp_path)[:length]), FILE, length)


@pytest.mark.parametrize("version", [0, 1, 4])
def test_another_version_is_named(tmp_path: Path, version: int) -> None:
    image = good(tmp_path)
    u32(4, version)(image)
    with pytest.raises(BlockError, match=f"Unsupported qcow2 version {version}") as refused:
        parse(bytes(image[:CLUSTER]), FILE, len(image))
    assert refused.value.kind is Kind.UNSUPPORTED


def test_unknown_incompatible_features_go_by_their_names_or_their_mask(tmp_path: Path) -> None:
    image = good(tmp_path)
    extensions((0x6803F857, struct.pack(">BB46s", 0, 5, b"time travel")))(image)
    u64(72, 1 << 5 | 1 << 6)(image)
    with pytest.raises(BlockError) as refused:
        parse(bytes(image[:CLUSTER]), FILE, len(image))
    wanted = "Unsupported qcow2 feature(s): time travel, Unknown incompatible feature: 40"
    assert refused.value.message == f"{wanted} in '{FILE}'"


def parsed(tmp_path: Path, *changes: Callable[[bytearray], None]) -> Header:
    image = good(tmp_path)
    together(*changes)(image)
    return parse(bytes(image[:CLUSTER]), FILE, len(image))


UNSUPPORTED = [
    ("AES", u32(32, 1), "AES encryption"),
    ("external data file", u64(72, 4), "external data file"),
    ("extended L2", together(u64(72, 16), u32(36, 4)), "extended L2 entries"),
    ("refcount width 1", u32(96, 0), "refcount width of 1 bits"),
    ("refcount width 64", u32(96, 6), "refcount width of 64 bits"),
]


@pytest.mark.parametrize(
    ("change", "feature"), [row[1:] for row in UNSUPPORTED], ids=[row[0] for row in UNSUPPORTED]
)
@pytest.mark.parametrize("writable", [False, True])
def test_unsupported_feature_is_refused_by_name(
    tmp_path: Path, change: Callable[[bytearray], None], feature: str, writable: bool
) -> None:
    with pytest.raises(BlockError) as refused:
        refuse_unsupported(parsed(tmp_path, change), FILE, writable=writable)
    assert refused.value.kind is Kind.UNSUPPORTED
    assert feature in refused.value.message
    assert FILE in refused.value.message
    assert refused.value.hint


READ_ONLY = [
    ("corrupt", u64(72, 2), "qcow2: Image is corrupt; cannot be opened read/write"),
    ("dirty", u64(72, 1), "dirty (lazy refcounts)"),
    ("snapshots", together(u32(60, 1), u64(64, CLUSTER)), "internal snapshots (1)"),
]


@pytest.mark.parametrize(
    ("change", "text"), [row[1:] for row in READ_ONLY], ids=[row[0] for row in READ_ONLY]
)
def test_some_images_may_only_be_read(tmp_path: Path, change: Callable[[bytearray], None], text: str) -> None:
    header = parsed(tmp_path, change)
    refuse_unsupported(header, FILE, writable=False)
    with pytest.raises(BlockError) as refused:
        refuse_unsupported(header, FILE, writable=True)
    assert text in refused.value.message
    assert "read-only" in refused.value.hint


def test_lazy_refcounts_without_the_dirty_bit_may_be_written(tmp_path: Path) -> None:
    refuse_unsupported(parsed(tmp_path, u64(80, 1)), FILE, writable=True)


def test_unknown_compatible_and_autoclear_features_and_extensions_are_accepted(tmp_path: Path) -> None:
    header = parsed(tmp_path, extensions((0x12345678, b"abc")), u64(80, 1 << 40), u64(88, 1 << 41))
    assert (header.compatible, header.autoclear) == (1 << 40, 1 << 41)
    assert header.extensions == ((0x12345678, b"abc"),)


def bitmaps(count: int = 1, reserved: int = 0, size: int = 32, offset: int = CLUSTER) -> tuple[int, bytes]:
    return 0x23852875, struct.pack(">IIQQ", count, reserved, size, offset)


BITMAPS = [
    (bitmaps(reserved=1), "bitmaps_ext: Reserved field is not zero"),
    (bitmaps(count=0), "found bitmaps extension with zero bitmaps"),
    (bitmaps(count=70000), "bitmaps_ext: Image has 70000 bitmaps"),
    (bitmaps(size=1 << 40), "bitmaps_ext: bitmap directory size (1099511627776) exceeds"),
    (bitmaps(offset=512), "bitmaps_ext: invalid bitmap directory offset"),
    (bitmaps(offset=0), "bitmaps_ext: invalid bitmap directory offset"),
    (bitmaps(offset=1 << 40), "bitmaps_ext: invalid bitmap directory offset"),
    ((0x23852875, bytes(23)), "bitmaps_ext: Invalid extension length"),
]


@pytest.mark.parametrize(("extension", "text"), BITMAPS, ids=[text for _, text in BITMAPS])
def test_damaged_bitmaps_are_named_but_do_not_keep_the_header_from_being_read(
    tmp_path: Path, extension: tuple[int, bytes], text: str
) -> None:
    header = parsed(tmp_path, extensions(extension))
    with pytest.raises(BadImage) as refused:
        bitmap_count(header, FILE, 4 * CLUSTER)
    assert text in refused.value.message


def test_bitmaps_are_counted(tmp_path: Path) -> None:
    assert bitmap_count(parsed(tmp_path, extensions(bitmaps(count=3))), FILE, 4 * CLUSTER) == 3
    assert bitmap_count(parsed(tmp_path), FILE, 4 * CLUSTER) == 0


def test_version_2_has_no_feature_words(tmp_path: Path) -> None:
    header = parsed(tmp_path, version_2)
    assert (header.version, header.header_length, header.refcount_bits) == (2, 72, 16)
    assert (header.incompatible, header.compatible, header.autoclear) == (0, 0, 0)


OPTIONS: list[dict[str, object]] = [
    {"compat": "0.10"},
    {"compat": "v3", "cluster_size": 512},
    {"cluster_size": "2M"},
    {"compression_type": "zstd"},
    {"lazy_refcounts": "on"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_what_qemu_img_made_is_read_as_qemu_img_tells_it(tmp_path: Path, options: dict[str, object]) -> None:
    path = images.create(tmp_path / "disk.qcow2", 64 << 20, options=options)
    data = path.read_bytes()
    header = parse(data[: 2 << 20], str(path), len(data))
    told = images.info(path)
    refuse_unsupported(header, str(path), writable=True)
    assert header.size == told["virtual-size"]
    assert header.cluster_size == told["cluster-size"]
    assert header.compression == told["format-specific"]["data"]["compression-type"]
    assert header.backing_file is None


def test_backing_file_and_format_are_found_in_what_qemu_img_made(tmp_path: Path) -> None:
    images.create(tmp_path / "base.raw", 1 << 20, fmt="raw")
    path = images.create(tmp_path / "top.qcow2", backing="base.raw", backing_fmt="raw")
    data = path.read_bytes()
    header = parse(data, str(path), len(data))
    assert (header.backing_file, header.backing_format) == ("base.raw", "raw")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return bytes(good(tmp_path_factory.mktemp("header")))


PLACES = st.one_of(st.integers(0, 127), st.integers(0, 1023))
EDGES = st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF])


@given(st.lists(st.tuples(PLACES, EDGES | st.integers(0, 255)), max_size=12), st.integers(0, 4 * CLUSTER))
def test_any_header_is_read_or_refused(image: bytes, changes: list[tuple[int, int]], size: int) -> None:
    """Damage of any kind ends in a checked header or in a refusal, and a checked one keeps its promises."""
    damaged = bytearray(image)
    for place, value in changes:
        damaged[place] = value
    data = bytes(damaged[: min(size, CLUSTER)])
    try:
        header = parse(data, FILE, size)
        refuse_unsupported(header, FILE, writable=True)
        bitmap_count(header, FILE, size)
    except BlockError as error:
        refusal = error.message
    else:
        refusal = f"none of {FILE}"
        check_promises(header, size)
    assert FILE in refusal


def check_promises(header: Header, size: int) -> None:
    """What the kernel may take for granted in an image of `size` bytes."""
    assert header.l1_entries == 0 or header.l1_offset + header.l1_entries * 8 <= size
    assert header.reftable_offset + header.reftable_clusters * header.cluster_size <= size
    assert header.size <= header.l1_entries * header.cluster_size * (header.cluster_size // 8)
    assert header.size % 512 == 0
