"""A Linux kernel for the guest: Debian's cloud kernel, unpacked into a cache and never installed."""

import lzma
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support import images

META_PACKAGE = "linux-image-cloud-amd64"
"""The package whose dependency is the current kernel."""


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel: `image` boots, `modules` is the directory with `modules.builtin` and `kernel/`."""

    image: Path
    modules: Path

    def load_order(self, names: Iterable[str]) -> list[Path]:
        """The module files that `insmod` needs for `names`, dependencies first; built-in ones left out."""
        files = {_module_name(path): path for path in self.modules.rglob("*.ko*")}
        listing = (self.modules / "modules.builtin").read_text()
        builtin = {_module_name(Path(line)) for line in listing.split()}
        order: dict[str, Path] = {}

        def visit(name: str) -> None:
            if name in builtin or name in order:
                return
            if name not in files:
                raise LookupError(
                    f"module {name}: neither built into {self.image.name} nor in {self.modules}"
                )
            for dependency in _dependencies(module_bytes(files[name])):
                visit(dependency)
            order[name] = files[name]

        for name in names:
            visit(name)
        return list(order.values())


def module_bytes(path: Path) -> bytes:
    """The ELF object in a module file, decompressed where the distribution compresses with xz."""
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


def cached_kernel() -> Kernel:
    """The kernel in the cache, downloaded through apt and unpacked on first use; safe with parallel tests."""
    tree = _cache_directory() / f"{META_PACKAGE}-tree"
    if not tree.exists():
        _unpack_into(tree)
    [image] = tree.glob("boot/vmlinuz-*")
    [builtin] = tree.glob("**/modules.builtin")
    return Kernel(image, builtin.parent)


def _cache_directory() -> Path:
    """$NBD_BACKEND_TEST_CACHE, else `nbd-backend` in the user's cache directory; made when missing."""
    user_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    path = Path(os.environ.get("NBD_BACKEND_TEST_CACHE") or user_cache / "nbd-backend")
    path.mkdir(parents=True, exist_ok=True)
    return path


def _unpack_into(tree: Path) -> None:
    """Download and unpack beside `tree`, then rename: `tree` is complete or absent; only one test wins."""
    with tempfile.TemporaryDirectory(dir=tree.parent) as scratch:
        package = _download(Path(scratch))
        unpacked = Path(scratch) / "tree"
        images.run(["dpkg-deb", "-x", package, unpacked])
        try:
            unpacked.rename(tree)
        except OSError:
            if not tree.exists():
                raise


def _download(directory: Path) -> Path:
    """Fetch the package that META_PACKAGE depends on; needs apt's package lists, no privileges."""
    found = re.search(r"Depends: (linux-image-\S+)", images.run(["apt-cache", "depends", META_PACKAGE]))
    if found is None:
        raise LookupError(f"apt knows no kernel that {META_PACKAGE} depends on: run `apt-get update`")
    command = ["apt-get", "download", found[1]]
    done = subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=300, check=False)
    if done.returncode != 0:
        raise LookupError(f"cannot download {found[1]}; run `apt-get update` and try again:\n{done.stderr}")
    [package] = directory.glob("*.deb")
    return package


def _module_name(path: Path) -> str:
    return path.name.split(".ko")[0].replace("-", "_")


def _dependencies(module: bytes) -> list[str]:
    """The modules named by the `depends=` string of the object's .modinfo section."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    names = found[1].decode() if found else ""
    return [name.replace("-", "_") for name in names.split(",") if name]
