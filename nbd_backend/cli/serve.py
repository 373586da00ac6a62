"""Serve disk images over NBD, managed over QMP.

The first IMAGE is the default export; images without NAME= are called sda, sdb, … in order. IMAGE is qcow2
unless --format says otherwise: nothing is ever probed. The command becomes the server (nbdkit, in the
foreground): stop it with SIGTERM or Ctrl-C. It exits with 0 after a clean stop, 1 when it fails, 2 when the
command line is wrong.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import NoReturn

from nbd_backend import sockets
from nbd_backend.config import Config, ImageConfig

from . import CliError, _paths
from ._parser import argument, size, structure

FIRST_FD = 3
"""Where socket activation's descriptors begin."""
MAX_LISTENERS = 16
"""What nbdkit accepts, spare ones included."""
SPARES = 4
"""Listeners that QMP can add at run time, where the limit leaves room."""
_ABOVE_LISTENERS = 64  # descriptors from here on are out of the way
_CERTIFICATES = ("ca-cert.pem", "server-cert.pem", "server-key.pem")
"""What nbdkit reads in the directory of --tls-certificates."""
_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9._-]*)=(.+)", re.DOTALL)
_PACKAGE = Path(__file__).resolve().parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``serve``."""
    add = parser.add_argument
    add("images", nargs="*", metavar="[NAME=]IMAGE", help="a disk image, served under NAME")
    add(
        "--nbd",
        action="append",
        type=argument(_nbd_address),
        metavar="unix:PATH|tcp:HOST:PORT|systemd|none",
        help="where NBD clients connect; may be repeated (default: nbd.sock in the runtime directory)",
    )
    add(
        "--qmp",
        action="append",
        type=argument(_qmp_address),
        metavar="unix:PATH|none",
        help="where QMP clients connect; may be repeated (default: qmp.sock in the runtime directory)",
    )
    add("--read-only", action="store_true", help="clients cannot write, the images are not changed")
    add(
        "--cache",
        choices=["writeback", "none"],
        default="writeback",
        help="none bypasses the page cache (O_DIRECT); default: %(default)s",
    )
    add("--format", choices=["qcow2", "raw"], default="qcow2", help="of the images; default: %(default)s")
    add(
        "--blockdev",
        action="append",
        type=structure,
        default=[],
        metavar="JSON|KEY=VALUE,…",
        help="add a node, as QMP's blockdev-add does",
    )
    add(
        "--export",
        action="append",
        type=structure,
        default=[],
        metavar="JSON|KEY=VALUE,…",
        help="export a node, as QMP's block-export-add does",
    )
    add(
        "--allow-path",
        action="append",
        metavar="DIR",
        help="open files in DIR only; may be given several times",
    )
    add("--l2-cache-size", type=size, metavar="SIZE", help="memory for L2 tables of each IMAGE's top layer")
    add(
        "--threads",
        type=argument(_threads),
        default=16,
        metavar="N",
        help="requests that one client may have in progress at once; default: %(default)s",
    )
    add(
        "--scratch-dir",
        metavar="DIR",
        help="where backups keep what guests overwrite and does not fit in memory",
    )
    add("--tls", choices=["off", "on", "require"], default="off", help="default: %(default)s")
    add(
        "--tls-certificates",
        metavar="DIR",
        help="X.509 certificates of the server, named as nbdkit wants them",
    )
    add("--tls-psk", metavar="FILE", help="pre-shared keys")
    add("--tls-verify-peer", action="store_true", help="require certificates of clients")  # fmt: skip


def run(arguments: argparse.Namespace) -> NoReturn:
    """Bind the sockets and become the server."""
    _check_tls(arguments)
    _check_scratch_dir(arguments.scratch_dir)
    version = _spawn_version()  # runs beside what follows
    images = name_images(arguments.images)
    bound: list[Path] = []
    try:
        config, descriptors = _bind(arguments, images, bound)
        config["native"] = _use_filter(_read_version(version))
        _become_server(arguments, config, descriptors)
    except (sockets.AddressError, CliError, OSError) as error:
        for path in bound:
            path.unlink(missing_ok=True)
        if isinstance(error, sockets.AddressError):
            raise CliError(str(error)) from error
        raise


def _check_tls(arguments: argparse.Namespace) -> None:
    """nbdkit would look for certificates in places of its own, and with ``on`` do without TLS in silence."""
    given = [
        (f"--{name.replace('_', '-')}", value)
        for name in ("tls_certificates", "tls_psk", "tls_verify_peer")
        if (value := getattr(arguments, name))
    ]
    if arguments.tls == "off":
        if given:
            raise CliError(f"{given[0][0]} has no effect without --tls on or --tls require", 2)
        return
    if not (arguments.tls_certificates or arguments.tls_psk):
        raise CliError(f"--tls {arguments.tls} needs --tls-certificates DIR or --tls-psk FILE", 2)
    needed = [Path(arguments.tls_psk)] if arguments.tls_psk else []
    if arguments.tls_certificates:
        needed += [Path(arguments.tls_certificates, name) for name in _CERTIFICATES]
    for path in needed:
        with path.open("rb"):  # raises OSError, which names the file, before anything is bound
            pass


def _check_scratch_dir(path: str | None) -> None:
    if path is None:
        return
    if not Path(path).is_dir():
        raise CliError(f"--scratch-dir {path}: not a directory")
    if not os.access(path, os.W_OK | os.X_OK):
        raise CliError(f"--scratch-dir {path}: no permission to make files there")


def name_images(words: list[str]) -> list[ImageConfig]:
    """Name and absolute path of each IMAGE argument; the unnamed ones are sda, sdb, …, sdz, sdaa, …"""
    images: list[ImageConfig] = []
    for index, word in enumerate(words):
        match = _NAMED.fullmatch(word)
        name, path = (match[1], match[2]) if match else (f"sd{_letters(index)}", word)
        if name in [image["name"] for image in images]:
            raise CliError(f"two images are called '{name}': give one of them another NAME=", 2)
        images.append({"name": name, "path": str(Path(path).absolute())})
    return images


def _letters(index: int) -> str:
    last = chr(ord("a") + index % 26)
    return _letters(index // 26 - 1) + last if index >= 26 else last


def _nbd_address(text: str) -> str:
    if text in {"systemd", "none"} or sockets.unix_path(text):
        return text
    if text.startswith("tcp:"):
        sockets.parse_tcp(text)
        return text
    raise ValueError(f"'{text}' is none of unix:PATH, tcp:HOST:PORT, systemd, none")


def _qmp_address(text: str) -> str:
    if text == "none" or sockets.unix_path(text):
        return text
    raise ValueError(f"'{text}' is neither unix:PATH nor none")


def _threads(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 64:
        raise ValueError(f"'{text}' is not a number of threads from 1 to 64")
    return int(text)


class _Descriptors:
    """The listening sockets that nbdkit gets from FIRST_FD on, and what else outlives the exec."""

    def __init__(self) -> None:
        self.listening: list[int] = []
        self.kept: list[int] = []

    def add_listener(self, fd: int) -> int:
        """Take over `fd`; returns the descriptor that it will have in nbdkit."""
        if len(self.listening) == MAX_LISTENERS:
            raise CliError(f"nbdkit takes at most {MAX_LISTENERS - 1} NBD listeners", 2)
        self.listening.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_LISTENERS))
        return FIRST_FD + len(self.listening) - 1

    def keep(self, fd: int) -> int:
        """Take over `fd` and return the descriptor that it has in nbdkit."""
        self.kept.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ABOVE_LISTENERS))
        return self.kept[-1]

    def settle(self) -> None:
        """Put everything where it was promised; what else has those numbers is overwritten."""
        for number, fd in enumerate(self.listening, FIRST_FD):
            os.dup2(fd, number, inheritable=True)
        for fd in self.kept:
            os.set_inheritable(fd, True)


def _bind(
    arguments: argparse.Namespace, images: list[ImageConfig], bound: list[Path]
) -> tuple[Config, _Descriptors]:
    """Open every socket; `bound` gets the files made, also when this raises."""
    descriptors = _Descriptors()
    config: Config = {
        "images": images,
        "format": arguments.format,
        "read_only": arguments.read_only,
        "cache": arguments.cache,
        "l2_cache_size": arguments.l2_cache_size,
        "blockdevs": arguments.blockdev,
        "exports": arguments.export,
        "allow_paths": arguments.allow_path and [str(Path(root).absolute()) for root in arguments.allow_path],
        "scratch_dir": arguments.scratch_dir and str(Path(arguments.scratch_dir).absolute()),
        "native": True,
        "tls": arguments.tls != "off",
        "listeners": [],
        "spares": [],
        "waker": -1,
        "monitors": [],
    }
    for address in arguments.nbd or [f"unix:{_paths.default_socket('nbd', create=True)}"]:
        _bind_nbd(address, config, descriptors, bound)
    for address in arguments.qmp or [f"unix:{_paths.default_socket('qmp', create=True)}"]:
        if address != "none":
            listener = _listen(address, bound)
            config["monitors"].append(
                {"fd": descriptors.keep(listener.detach()), "path": address[len("unix:") :]}
            )
    _add_spares(config, descriptors)
    return config, descriptors


def _bind_nbd(address: str, config: Config, descriptors: _Descriptors, bound: list[Path]) -> None:
    if address == "systemd":
        for fd in _inherited():
            with socket.socket(fileno=os.dup(fd)) as listener:
                where = sockets.describe(listener)
            config["listeners"].append(
                {"fd": descriptors.add_listener(fd), "address": where, "unlink": False}
            )
    elif address != "none":
        listener = _listen(address, bound)
        where = sockets.bound_address(listener, address)
        number = descriptors.add_listener(listener.detach())
        config["listeners"].append({"fd": number, "address": where, "unlink": where.startswith("unix:")})


def _listen(address: str, bound: list[Path]) -> socket.socket:
    path = sockets.unix_path(address)
    if path is not None:  # the server's working directory is its own affair
        address = f"unix:{Path(path).absolute()}"
    listener = sockets.listen(address)
    if path is not None:
        bound.append(Path(path).absolute())
    return listener


def _inherited() -> range:
    """The descriptors that systemd's socket activation passed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not os.environ.get("LISTEN_FDS", "").isdecimal():
        raise CliError("--nbd systemd: no sockets were passed by socket activation (LISTEN_PID, LISTEN_FDS)")
    return range(FIRST_FD, FIRST_FD + int(os.environ["LISTEN_FDS"]))


def _add_spares(config: Config, descriptors: _Descriptors) -> None:
    """One waker, and as many spare listeners as there is room for (listeners.py)."""
    for number in range(1 + min(SPARES, MAX_LISTENERS - 1 - len(descriptors.listening))):
        listener, handle = sockets.private_listener()
        fd, kept = descriptors.add_listener(listener.detach()), descriptors.keep(handle)
        if number == 0:
            config["waker"] = kept
        else:
            config["spares"].append({"fd": fd, "handle": kept})


def _spawn_version() -> tuple[int, int]:
    """Start ``nbdkit --version``; its process id and the pipe to read."""
    reader, writer = os.pipe()
    actions = [(os.POSIX_SPAWN_DUP2, writer, 1)]
    try:
        return os.posix_spawnp("nbdkit", ["nbdkit", "--version"], os.environ, file_actions=actions), reader
    except FileNotFoundError:
        raise CliError("nbdkit is not installed: apt install nbdkit nbdkit-plugin-python") from None
    finally:
        os.close(writer)


def _read_version(spawned: tuple[int, int]) -> str:
    process, reader = spawned
    with os.fdopen(reader, encoding="ascii", errors="replace") as pipe:
        words = pipe.read().split()
    os.waitpid(process, 0)
    if len(words) < 2:
        raise CliError("`nbdkit --version` says nothing: is nbdkit installed properly?")
    return words[1]


def _kernel() -> Path:
    path = _PACKAGE / "_kernel.abi3.so"
    if not path.exists():
        raise CliError("the kernel is not built: run `make build`")
    return path


def _use_filter(version: str) -> bool:
    """Whether nbdkit of that version can run our filter; says so when it cannot."""
    if os.environ.get("NBD_BACKEND_NO_FILTER", "0") not in {"", "0"}:
        return False
    # The version stands in the file as a C string; importing the module to ask it would take longer than
    # this.
    if f"{version}\0".encode() in _kernel().read_bytes():
        return True
    from nbd_backend.block.kernel import nbdkit_version

    print(
        f"nbd-backend: serve: the data path was built for nbdkit {nbdkit_version()}, but nbdkit {version} is"
        " installed: serving without it, slower; `make build` rebuilds it",
        file=sys.stderr,
    )
    return False


def _become_server(arguments: argparse.Namespace, config: Config, descriptors: _Descriptors) -> NoReturn:
    kernel = _kernel()
    # Without the filter every request runs Python, where more threads only wait for one another.
    threads = arguments.threads if config["native"] else 1
    command = ["nbdkit", "--foreground", f"--threads={threads}", *_tls_options(arguments)]
    if config["native"]:
        command.append(f"--filter={kernel}")
    command += ["python", str(_PACKAGE / "plugin.py"), f"config={json.dumps(config)}"]
    descriptors.settle()
    environment = {
        **os.environ,
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(descriptors.listening)),
        # The interpreter in nbdkit would look for its library beside whatever `python3` is first on PATH.
        "PYTHONHOME": sys.base_prefix,
        "PYTHONPATH": os.pathsep.join([str(_PACKAGE.parent), *_site_packages()]),
    }
    sys.stdout.flush()
    os.execvpe("nbdkit", command, environment)


def _site_packages() -> list[str]:
    return [entry for entry in sys.path if entry.endswith("-packages")]


def _tls_options(arguments: argparse.Namespace) -> list[str]:
    options = [f"--tls={arguments.tls}"]
    if arguments.tls_certificates:
        options.append(f"--tls-certificates={arguments.tls_certificates}")
    if arguments.tls_psk:
        options.append(f"--tls-psk={arguments.tls_psk}")
    if arguments.tls_verify_peer:
        options.append("--tls-verify-peer")
    return options
