"""`serve`: what it starts, what it prints, and how it fails."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.support import images
from tests.support.nbd_client import NbdClient, NbdError, list_exports
from tests.support.server import NbdBackend, executable

MIB = 1 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A disk of 8 MiB whose first MiB holds 7s."""
    path = images.create(tmp_path / "disk.qcow2", 8 * MIB)
    images.qemu_io(path, "write -P 7 0 1M")
    return path


def fails(*words: str | Path, environment: dict[str, str] | None = None) -> tuple[int, str]:
    """Exit status and standard error of a `serve` that must end by itself."""
    done = subprocess.run(
        [str(executable()), "serve", *map(str, words)],
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=20, check=False,
        env={**os.environ, **(environment or {})},
    )  # fmt: skip
    return done.returncode, done.stderr


def said(server: NbdBackend) -> str:
    """What the server printed, but for nbdkit's complaint about the client that only waits for its
    greeting.
    """
    lines = server.log().splitlines(keepends=True)
    return "".join(line for line in lines if "reading initial client flags" not in line)


def sockets_in(directory: Path) -> list[str]:
    """The options for sockets in a directory."""
    return ["--nbd", f"unix:{directory}/nbd.sock", "--qmp", f"unix:{directory}/qmp.sock"]


def test_first_image_is_the_default_export_and_has_a_name(image: Path, tmp_path: Path) -> None:
    other = images.create(tmp_path / "other.qcow2", 4 * MIB)
    with NbdBackend(image, f"data={other}", directory=tmp_path) as server:
        assert [export.name for export in list_exports(server.nbd_path)] == ["sda", "data"]
        for name, size in {"": 8 * MIB, "sda": 8 * MIB, "data": 4 * MIB}.items():
            with NbdClient(server.nbd_path, name) as client:
                assert client.size == size


def test_announcement_says_where_and_what_next(image: Path, tmp_path: Path) -> None:
    with NbdBackend(image, directory=tmp_path) as server:
        printed = said(server)
    assert f"NBD  nbd+unix:///sda?socket={server.nbd_path}  (sda, 8,388,608 bytes, read-write)\n" in printed
    assert f"QMP  {server.qmp_path}\n" in printed
    assert f"nbd-backend job list --qmp {server.qmp_path}" in printed
    assert printed.count("\n") == 3


def test_start_is_quick(image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    with NbdBackend(image, directory=tmp_path) as server, NbdClient(server.nbd_path) as client:
        assert client.read(0, 4096) == b"\x07" * 4096
        took = time.monotonic() - began
    with capsys.disabled():
        print(f"\nstart to first read: {took * 1000:.0f} ms")


def test_unknown_export_is_refused_in_one_line(image: Path, tmp_path: Path) -> None:
    with NbdBackend(image, directory=tmp_path) as server:
        with pytest.raises(NbdError), NbdClient(server.nbd_path, "nope"):
            pass
        errors = [line for line in said(server).splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].endswith("there is no export 'nope'; the exports are 'sda'")


def test_read_only_leaves_the_image_alone(image: Path, tmp_path: Path) -> None:
    before = image.read_bytes()
    with NbdBackend(image, directory=tmp_path, options=["--read-only"]) as server:
        with NbdClient(server.nbd_path) as client, pytest.raises(NbdError):
            client.write(0, b"x")
        assert "read-only" in server.log()
    assert image.read_bytes() == before


def test_blockdev_and_export_options_do_what_qmp_does(image: Path, tmp_path: Path) -> None:
    options = [
        "--blockdev", "driver=null-co,node-name=n0,size=1048576",
        "--export", '{"type": "nbd", "id": "e0", "node-name": "n0", "name": "zeroes", "description": "a,b"}',
    ]  # fmt: skip
    with NbdBackend(image, directory=tmp_path, options=options) as server:
        exports = {export.name: export.description for export in list_exports(server.nbd_path)}
    assert exports == {"sda": "", "zeroes": "a,b"}


def test_without_images_it_waits_for_qmp(tmp_path: Path) -> None:
    server = NbdBackend(directory=tmp_path)
    with server, server.qmp() as qmp:
        assert qmp.cmd("query-block-exports") == []


def test_nbdkit_of_another_version_is_served_without_the_filter(image: Path, tmp_path: Path) -> None:
    path = ":".join([str(stand_in_nbdkit(tmp_path)), os.environ["PATH"]])
    with NbdBackend(image, directory=tmp_path, environment={"PATH": path}) as server:
        with NbdClient(server.nbd_path) as client:
            assert client.read(0, 512) == b"\x07" * 512
            client.write(4096, b"y" * 4096)
        assert b"--filter" not in Path(f"/proc/{server.pid}/cmdline").read_bytes()
        message = server.log().splitlines()[0]
    assert message.startswith("nbd-backend: serve: the data path was built for nbdkit ")
    assert message.endswith(
        "but nbdkit 9.9.9 is installed: serving without it, slower; `make build` rebuilds it"
    )
    images.qemu_io(image, "read -P 0x79 4k 4k")


def stand_in_nbdkit(directory: Path) -> Path:
    """A directory with an nbdkit that claims to be another version and otherwise is the real one."""
    real = subprocess.run(["which", "nbdkit"], capture_output=True, text=True, check=True).stdout.strip()
    stand_in = directory / "bin" / "nbdkit"
    stand_in.parent.mkdir()
    stand_in.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "nbdkit 9.9.9" && exit\nexec {real} "$@"\n')
    stand_in.chmod(0o755)
    return stand_in.parent


def test_sockets_passed_by_systemd_are_served_and_left(image: Path, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "activated.sock"))
        listener.listen()

        def become_activated() -> None:
            os.dup2(listener.fileno(), 3, inheritable=True)
            os.environ |= {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "1"}
            os.execv(
                executable(), [str(executable()), "serve", str(image), "--nbd", "systemd", "--qmp", "none"]
            )

        child = os.fork()
        if child == 0:
            try:
                become_activated()
            finally:
                os._exit(127)
        with NbdClient(tmp_path / "activated.sock") as client:
            assert client.read(0, 512) == b"\x07" * 512
        os.kill(child, signal.SIGTERM)
        assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / "activated.sock").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["{dir}/nope.qcow2"],
            "nbd-backend: serve: Could not open '{dir}/nope.qcow2': No such file or directory\n",
        ),
        (["{dir}"], "nbd-backend: serve: Could not open '{dir}': Is a directory\n"),
        (["a.b-c=", "--format", "raw"], None),
        (
            ["--blockdev", "driver=zzz,node-name=n"],
            "nbd-backend: serve: Parameter 'driver' does not accept value 'zzz'",
        ),
        (
            ["--export", "type=nbd,id=e,node-name=n"],
            "nbd-backend: serve: Cannot find device='' nor node-name='n'\n",
        ),
        (
            ["{dir}/disk.qcow2", "--allow-path", "/usr"],
            "nbd-backend: serve: Could not open '{dir}/disk.qcow2': it lies",
        ),
    ],
)
def test_failed_start_is_one_line_and_leaves_nothing(
    arguments: Sequence[str], message: str | None, image: Path, tmp_path: Path
) -> None:
    words = [word.format(dir=tmp_path) for word in arguments]
    status, error = fails(*words, *sockets_in(tmp_path))
    assert status == 1
    if message is not None:
        assert error.startswith(message.format(dir=tmp_path))
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2"]


def test_socket_in_use_is_told_and_not_disturbed(image: Path, tmp_path: Path) -> None:
    with NbdBackend(image, directory=tmp_path) as server:
        quiet = said(server)
        status, error = fails(image, "--nbd", f"unix:{server.nbd_path}", "--qmp", "none")
        assert (status, said(server)) == (1, quiet)
    assert error == (
        f"nbd-backend: serve: cannot listen on unix:{server.nbd_path}: another process listens there;"
        " stop it or choose another path\n"
    )


def test_missing_nbdkit_is_told(image: Path, tmp_path: Path) -> None:
    python = str(executable().resolve().parent)
    status, error = fails(image, *sockets_in(tmp_path), environment={"PATH": python})
    assert (status, error) == (
        1,
        "nbd-backend: serve: nbdkit is not installed: apt install nbdkit nbdkit-plugin-python\n",
    )


def test_systemd_without_sockets_is_told(image: Path, tmp_path: Path) -> None:
    status, error = fails(image, "--nbd", "systemd", "--qmp", "none")
    assert status == 1
    assert error.startswith("nbd-backend: serve: --nbd systemd: no sockets were passed")


def test_tls_files_without_tls_are_refused(image: Path, tmp_path: Path) -> None:
    status, error = fails(image, *sockets_in(tmp_path), "--tls-psk", "/keys")
    assert status == 2
    assert error == "nbd-backend: serve: --tls-psk has no effect without --tls on or --tls require\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk.qcow2"]


def test_tls_without_keys_is_refused(image: Path, tmp_path: Path) -> None:
    status, error = fails(image, *sockets_in(tmp_path), "--tls", "on")
    assert status == 2
    assert error == "nbd-backend: serve: --tls on needs --tls-certificates DIR or --tls-psk FILE\n"


@pytest.mark.parametrize(
    ("option", "missing"), [("--tls-certificates", "keys/ca-cert.pem"), ("--tls-psk", "keys")]
)
def test_missing_tls_file_is_named_and_nothing_is_left(
    image: Path, tmp_path: Path, option: str, missing: str
) -> None:
    status, error = fails(image, *sockets_in(tmp_path), "--tls", "require", option, tmp_path / "keys")
    assert (status, error) == (1, f"nbd-backend: serve: {tmp_path / missing}: No such file or directory\n")
    assert [path.name for path in tmp_path.iterdir()] == [image.name]


def test_scratch_directory_that_is_none_is_refused_at_the_start(image: Path, tmp_path: Path) -> None:
    status, error = fails(image, *sockets_in(tmp_path), "--scratch-dir", image)
    assert (status, error) == (1, f"nbd-backend: serve: --scratch-dir {image}: not a directory\n")
