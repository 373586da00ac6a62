"""The qcow2 header and its extensions: parsed and checked completely before anything believes them.

`parse` is a pure function of the bytes and the file's size; it refuses what is damaged (BadImage, with file,
field and value) and accepts what the format allows. `refuse_unsupported` then refuses what this version does
not do, by the feature's name. Below these two, every layer asserts.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import PurePosixPath

from nbd_backend.block.errors import BadImage, BlockError, Kind
from nbd_backend.block.qcow2.features import Extension, FeatureKind, Incompatible, feature_names
from nbd_backend.block.units import MIB, SECTOR, HostOffset, ceil_div

MAGIC = 0x514649FB
V2_LENGTH = 72
V3_MIN_LENGTH = 104
V3_LENGTH = 112  # with the compression type
MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_HEADER_BYTES = 1 << MAX_CLUSTER_BITS  # the first cluster holds header, extensions and backing name

_L1_LIMIT = 32 * MIB
_REFTABLE_LIMIT = 8 * MIB
_MAX_SNAPSHOTS = 65536
_MAX_BACKING_NAME = 1023
_MAX_BACKING_FORMAT = 15
_ENTRY = 8  # bytes of an L1 or refcount table entry
AUTOCLEAR_OFFSET = 88

_V2 = struct.Struct(">IIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")


_KNOWN_INCOMPATIBLE = 31  # an int: ~ of an IntFlag does not reach the unknown bits


@dataclass(frozen=True, slots=True)
class Header:
    """A header that passed every check. Sizes and offsets in bytes."""

    version: int
    size: int
    cluster_bits: int
    backing_file: str | None
    backing_format: str | None
    crypt_method: int
    l1_entries: int
    l1_offset: HostOffset
    reftable_offset: HostOffset
    reftable_clusters: int
    snapshots: int
    snapshots_offset: HostOffset
    incompatible: int
    compatible: int
    autoclear: int
    refcount_order: int
    header_length: int
    compression_type: int
    data_file: str | None
    extensions: tuple[tuple[int, bytes], ...]
    extra: bytes
    """Header bytes after the known fields, to be preserved when the header is rewritten."""

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def refcount_bits(self) -> int:
        """Width of a refcount."""
        return 1 << self.refcount_order

    @property
    def compression(self) -> str:
        """How compressed clusters are compressed."""
        return "zstd" if self.compression_type else "zlib"


def parse(data: bytes, file: str, file_size: int) -> Header:
    """Check the start of an image.

    `data` are the first bytes of `file`: all that fit into MAX_HEADER_BYTES, or fewer if they cover the first
    cluster. Raises BadImage naming file, field and value, or BlockError (Kind.UNSUPPORTED) for an unknown
    version or feature.
    """
    return _Parser(data, file, file_size).parse()


def first_cluster_bytes(start: bytes) -> int:
    """How many bytes `parse` needs, told from the first 24 of an image; 0 when `parse` will refuse them
    anyway.
    """
    bits = int.from_bytes(start[20:24], "big")
    return 1 << bits if MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS else 0


def full_backing_name(header: Header, file: str) -> str | None:
    """The backing name of the overlay `file`, relative names taken from the overlay's directory."""
    name = header.backing_file
    return None if name is None else str(PurePosixPath(file).parent / name)


class _Parser:
    """One pass over one header; the steps stand in the order in which the fields depend on one another."""

    def __init__(self, data: bytes, file: str, file_size: int) -> None:
        self.data = data
        self.file = file
        self.file_size = file_size

    def bad(self, field: str, value: object, problem: str, hint: str = "") -> BadImage:
        return BadImage(self.file, field, value, problem, hint=hint)

    def parse(self) -> Header:
        self._read_v2()
        self._check_cluster_bits()
        self._check_size()
        self._read_v3()
        self._check_features()
        self._check_tables()
        backing_file = self._backing_file()
        extensions = self._extensions()
        by_type = dict(extensions)
        self._check_known_incompatible(by_type)
        self._check_crypt(by_type)
        return Header(
            version=self.version,
            size=self.size,
            cluster_bits=self.cluster_bits,
            backing_file=backing_file,
            backing_format=self._backing_format(by_type),
            crypt_method=self.crypt_method,
            l1_entries=self.l1_entries,
            l1_offset=HostOffset(self.l1_offset),
            reftable_offset=HostOffset(self.reftable_offset),
            reftable_clusters=self.reftable_clusters,
            snapshots=self.snapshots,
            snapshots_offset=HostOffset(self.snapshots_offset),
            incompatible=self.incompatible,
            compatible=self.compatible,
            autoclear=self.autoclear,
            refcount_order=self.refcount_order,
            header_length=self.header_length,
            compression_type=self.compression_type,
            data_file=self._text(by_type, Extension.DATA_FILE),
            extensions=extensions,
            extra=self.data[V3_LENGTH : self.header_length],
        )

    def _read_v2(self) -> None:
        if len(self.data) < 8 or self.data[:4] != MAGIC.to_bytes(4, "big"):
            raise self.bad(
                "magic",
                "0x" + self.data[:4].hex(),
                "Image is not in qcow2 format",
                "give the format it has, such as --format raw",
            )
        self.version = int.from_bytes(self.data[4:8], "big")
        if self.version not in (2, 3):
            raise BlockError(
                Kind.UNSUPPORTED,
                f"Unsupported qcow2 version {self.version} in '{self.file}'",
                hint="versions 2 and 3 are supported",
            )
        if len(self.data) < V2_LENGTH:
            raise self.bad("file size", self.file_size, "qcow2 header is cut short")
        (_, _, self.backing_offset, self.backing_length, self.cluster_bits, self.size, self.crypt_method,
         self.l1_entries, self.l1_offset, self.reftable_offset, self.reftable_clusters, self.snapshots,
         self.snapshots_offset) = _V2.unpack_from(self.data)  # fmt: skip

    def _check_cluster_bits(self) -> None:
        if not MIN_CLUSTER_BITS <= self.cluster_bits <= MAX_CLUSTER_BITS:
            raise self.bad(
                "cluster_bits", self.cluster_bits, f"Unsupported cluster size: 2^{self.cluster_bits}"
            )
        self.cluster_size = 1 << self.cluster_bits

    def _check_size(self) -> None:
        if self.size >= 1 << 63:
            raise self.bad("size", self.size, "Image is too big")
        if self.size % SECTOR:
            raise self.bad(
                "size",
                self.size,
                "Image size is not a multiple of 512 bytes",
                f"round it up: qemu-img resize {self.file} +{SECTOR - self.size % SECTOR}",
            )

    def _read_v3(self) -> None:
        self.incompatible = self.compatible = self.autoclear = self.compression_type = 0
        self.refcount_order, self.header_length = 4, V2_LENGTH
        if self.version == 2:
            return
        if len(self.data) < V3_MIN_LENGTH:
            raise self.bad("file size", self.file_size, "qcow2 header is cut short")
        (self.incompatible, self.compatible, self.autoclear, self.refcount_order,
         self.header_length) = _V3.unpack_from(self.data, V2_LENGTH)  # fmt: skip
        length = self.header_length
        if length < V3_MIN_LENGTH:
            raise self.bad("header_length", length, "qcow2 header too short")
        if length > self.cluster_size:
            raise self.bad("header_length", length, "qcow2 header exceeds cluster size")
        if length % 8:
            raise self.bad("header_length", length, "qcow2 header length is not a multiple of 8")
        if length > len(self.data):
            raise self.bad("file size", self.file_size, "qcow2 header is cut short")
        if length > V3_MIN_LENGTH:
            self.compression_type = self.data[V3_MIN_LENGTH]

    def _check_features(self) -> None:
        if self.refcount_order > 6:
            raise self.bad(
                "refcount_order",
                self.refcount_order,
                "Reference count entry width too large; may not exceed 64 bits",
            )
        if self.compression_type > 1:
            raise self.bad(
                "compression_type",
                self.compression_type,
                f"qcow2: unknown compression type: {self.compression_type}",
            )
        if bool(self.incompatible & Incompatible.COMPRESSION_TYPE) != bool(self.compression_type):
            must = "must" if self.compression_type else "must not"
            raise self.bad(
                "compression_type",
                self.compression_type,
                f"qcow2: Compression type incompatible feature bit {must} be set",
            )
        if self.incompatible & Incompatible.EXTENDED_L2 and self.cluster_bits < 14:
            raise self.bad(
                "cluster_bits", self.cluster_bits, "Extended L2 entries need clusters of at least 16 KiB"
            )

    def _check_tables(self) -> None:
        self._check_l1()
        self._check_reftable()
        if self.snapshots > _MAX_SNAPSHOTS:
            raise self.bad("nb_snapshots", self.snapshots, "Snapshot table too large")
        if self.snapshots:
            self._check_region("snapshots_offset", self.snapshots_offset, 1, "Snapshot table offset invalid")

    def _check_l1(self) -> None:
        if self.l1_entries > _L1_LIMIT // _ENTRY:
            raise self.bad("l1_size", self.l1_entries, "Active L1 table too large")
        entry = 16 if self.incompatible & Incompatible.EXTENDED_L2 else 8
        needed = ceil_div(self.size, self.cluster_size * (self.cluster_size // entry))
        if needed > _L1_LIMIT // _ENTRY:
            raise self.bad("size", self.size, "Image is too big")
        if self.l1_entries < needed:
            raise self.bad("l1_size", self.l1_entries, f"L1 table is too small: {needed} entries are needed")
        if self.l1_entries:
            self._check_region(
                "l1_table_offset", self.l1_offset, self.l1_entries * _ENTRY, "Active L1 table offset invalid"
            )

    def _check_reftable(self) -> None:
        clusters = self.reftable_clusters
        if clusters == 0:
            raise self.bad("refcount_table_clusters", 0, "Image does not contain a reference count table")
        if clusters * self.cluster_size > _REFTABLE_LIMIT:
            raise self.bad("refcount_table_clusters", clusters, "Reference count table too large")
        self._check_region(
            "refcount_table_offset",
            self.reftable_offset,
            clusters * self.cluster_size,
            "Reference count table offset invalid",
        )

    def _check_region(self, field: str, offset: int, length: int, problem: str) -> None:
        """A table must be aligned, must not be the header, and must lie wholly inside the file."""
        if offset % self.cluster_size or offset >= 1 << 63:
            raise self.bad(field, hex(offset), problem)
        if offset == 0:
            raise self.bad(field, 0, f"{problem}: the header lies there")
        if offset > self.file_size or length > self.file_size - offset:
            raise self.bad(
                field,
                hex(offset),
                f"{problem}: the table ends beyond the end of the file ({self.file_size} bytes)",
            )

    def _backing_file(self) -> str | None:
        if self.backing_offset == 0:
            return None
        if self.backing_offset > self.cluster_size or self.backing_offset < self.header_length:
            raise self.bad("backing_file_offset", self.backing_offset, "Invalid backing file offset")
        length = self.backing_length
        if length > min(_MAX_BACKING_NAME, self.cluster_size - self.backing_offset):
            raise self.bad("backing_file_size", length, "Backing file name too long")
        if length > len(self.data) - self.backing_offset:
            raise self.bad("backing_file_size", length, "Backing file name ends beyond the end of the file")
        return (
            self._name("backing file name", self.data[self.backing_offset : self.backing_offset + length])
            or None
        )

    def _name(self, field: str, raw: bytes) -> str:
        """A file name in the file system's encoding; open() would silently cut it at a NUL byte."""
        if b"\0" in raw:
            raise self.bad(field, repr(raw), "Name contains a NUL byte")
        return raw.decode(errors="surrogateescape")

    def _extensions(self) -> tuple[tuple[int, bytes], ...]:
        end = min(self.backing_offset or self.cluster_size, len(self.data))
        position, found, seen = self.header_length, [], set()
        while end - position >= 8:
            kind, length = struct.unpack_from(">II", self.data, position)
            if kind == Extension.END:
                break
            position += 8
            if length > end - position:
                raise self.bad(f"length of header extension {kind:#x}", length, "Header extension too large")
            if kind in seen:
                raise self.bad("header extension", hex(kind), "Header extension appears twice")
            seen.add(kind)
            found.append((kind, self.data[position : position + length]))
            position += -(-length // 8) * 8
        return tuple(found)

    def _check_known_incompatible(self, extensions: dict[int, bytes]) -> None:
        unknown = self.incompatible & ~_KNOWN_INCOMPATIBLE
        if not unknown:
            return
        named = feature_names(extensions.get(Extension.FEATURE_NAMES, b""))
        names = [
            named[FeatureKind.INCOMPATIBLE, bit]
            for bit in range(64)
            if unknown >> bit & 1 and (FeatureKind.INCOMPATIBLE, bit) in named
        ]
        rest = sum(
            1 << bit
            for bit in range(64)
            if unknown >> bit & 1 and (FeatureKind.INCOMPATIBLE, bit) not in named
        )
        if rest:
            names.append(f"Unknown incompatible feature: {rest:x}")
        raise BlockError(
            Kind.UNSUPPORTED, f"Unsupported qcow2 feature(s): {', '.join(names)} in '{self.file}'"
        )

    def _check_crypt(self, extensions: dict[int, bytes]) -> None:
        if self.crypt_method > 2:
            raise self.bad(
                "crypt_method", self.crypt_method, f"Unsupported encryption method {self.crypt_method}"
            )
        pointer = extensions.get(Extension.ENCRYPTION)
        if self.crypt_method == 2 and pointer is None:
            raise self.bad("crypt_method", 2, "Missing CRYPTO header for crypt method 2")
        if self.crypt_method != 2 and pointer is not None:
            raise self.bad(
                "crypt_method",
                self.crypt_method,
                "CRYPTO header extension only expected with LUKS encryption method",
            )

    def _backing_format(self, extensions: dict[int, bytes]) -> str | None:
        raw = extensions.get(Extension.BACKING_FORMAT)
        if raw is None:
            return None
        if len(raw) > _MAX_BACKING_FORMAT:
            raise self.bad(
                "length of header extension backing format",
                len(raw),
                f"ERROR: ext_backing_format: len={len(raw)} too large (>=16)",
            )
        return self._name("backing format", raw) or None

    def _text(self, extensions: dict[int, bytes], kind: Extension) -> str | None:
        raw = extensions.get(kind)
        return None if raw is None else self._name(kind.name.lower().replace("_", " "), raw)
