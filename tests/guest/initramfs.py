"""An initramfs written by hand: a cpio archive in the `newc` format, uncompressed to be unpacked fast."""

import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from pathlib import Path, PurePosixPath


class Initramfs:
    """Collects files under their absolute guest paths; parent directories are added by themselves."""

    def __init__(self) -> None:
        self._archive = bytearray()
        self._present: set[PurePosixPath] = {PurePosixPath("/")}

    def add_directory(self, path: str) -> None:
        """Add an empty directory."""
        self._add(PurePosixPath(path), stat.S_IFDIR | 0o755)

    def add_file(self, path: str, content: bytes | str, *, mode: int = 0o644) -> None:
        """Add a regular file with this content."""
        data = content.encode() if isinstance(content, str) else content
        self._add(PurePosixPath(path), stat.S_IFREG | mode, data)

    def add_link(self, path: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(PurePosixPath(path), stat.S_IFLNK | 0o777, target.encode())

    def add_character_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device node."""
        self._add(PurePosixPath(path), stat.S_IFCHR | 0o600, device=(major, minor))

    def add_program(self, name: str) -> None:
        """Add the host's program `name` as /bin/`name`, with the loader and the libraries it needs."""
        source = find_program(name)
        self.add_file(f"/bin/{name}", source.read_bytes(), mode=0o755)
        for library in _shared_libraries(source):
            self.add_file(str(library), library.read_bytes(), mode=0o755)

    def add_applets(self, names: Iterable[str]) -> None:
        """Add busybox and links to it under /bin."""
        self.add_program("busybox")
        for name in names:
            self.add_link(f"/bin/{name}", "busybox")

    def write(self, path: Path) -> None:
        """Write the archive, ended by its trailer."""
        trailer = _entry("TRAILER!!!", 0, b"", (0, 0), 0)
        path.write_bytes(bytes(self._archive) + trailer)

    def _add(
        self, path: PurePosixPath, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)
    ) -> None:
        if path in self._present:
            return  # a library that two programs share, a directory that several files need
        self._add(path.parent, stat.S_IFDIR | 0o755)
        self._present.add(path)
        self._archive += _entry(str(path.relative_to("/")), mode, content, device, len(self._present))


def _entry(name: str, mode: int, content: bytes, device: tuple[int, int], inode: int) -> bytes:
    """One member: thirteen numbers of eight hexadecimal digits, name, content; both padded to four bytes."""
    encoded = name.encode() + b"\0"
    fields = [inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0]
    header = b"070701" + b"".join(b"%08X" % field for field in fields)
    return _padded(header + encoded) + _padded(content)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def find_program(name: str) -> Path:
    """The host's program of this name, also where only root's PATH leads."""
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin:/sbin")
    if found is None:
        raise FileNotFoundError(f"no program {name}: install busybox-static, nbd-client and e2fsprogs")
    return Path(found)


def _shared_libraries(program: Path) -> list[Path]:
    """The loader and the libraries of a program as ldd finds them; none for a static one."""
    done = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return [Path(path) for path in re.findall(r"(?:=> |^\t)(/\S+) \(0x", done.stdout, re.MULTILINE)]
