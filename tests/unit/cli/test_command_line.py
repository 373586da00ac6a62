"""What the command line understands, and what it says when it does not."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import pytest

from nbd_backend.cli import CliError, _format, chain, commands, job, main
from nbd_backend.cli._parser import structure
from nbd_backend.cli._qmp import parse_arguments
from nbd_backend.cli.serve import name_images


def output_of(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of a command line."""
    try:
        status = main(words)
    except SystemExit as stop:  # argparse ends --help so
        status = int(stop.code or 0)
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_every_command_is_complete() -> None:
    for name in commands():
        module = import_module(f"nbd_backend.cli.{name}")
        assert (module.__doc__ or "").splitlines()[0].endswith(".")
        assert callable(module.add_arguments)
        assert callable(module.run)


@pytest.mark.parametrize("name", commands())
def test_every_command_explains_itself(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = output_of(capsys, name, "--help")
    assert (status, err) == (0, "")
    assert f"nbd-backend {name}" in out


def test_help_lists_all_commands(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output_of(capsys, "--help")
    assert status == 0
    assert all(f"\n  {name} " in out for name in commands())


def test_serve_starts_light() -> None:
    """The module of `serve` must not bring in what the others need."""
    import subprocess

    probe = "import sys, nbd_backend.cli.serve; print(*sorted(sys.modules))"
    loaded = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {"typer", "rich", "asyncio", "msgspec", "qemu.qmp", "ssl"} & set(loaded)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nope"], "'nope' is not a command; the commands are chain, demo, events, image, job"),
        (["serve", "--frob"], "serve: unrecognized arguments: --frob (try `nbd-backend serve --help`)"),
        (["serve", "--nbd", "vsock:1"], "serve: argument --nbd: 'vsock:1' is none of unix:PATH"),
        (["serve", "--nbd", "tcp:h:x"], "serve: argument --nbd: 'tcp:h:x' is not tcp:HOST:PORT with a port"),
        (["serve", "--threads", "0"], "serve: argument --threads: '0' is not a number of threads from 1"),
        (["serve", "--l2-cache-size", "much"], "serve: argument --l2-cache-size: 'much' is not a size"),
        (["serve", "--blockdev", "driver"], "serve: argument --blockdev: 'driver' is not key=value"),
        (["serve", "a=x", "a=y"], "serve: two images are called 'a': give one of them another NAME="),
        (["chain"], "chain: give either an IMAGE or --qmp"),
        (["qmp", "--qmp", "/nope", "stop", "word"], "qmp: 'word' is not key=value"),
        (["job", "start"], "job start: the following arguments are required: TYPE"),
    ],
)
def test_wrong_command_line_is_told_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = output_of(capsys, *words)
    assert (status, out) == (2, "")
    assert err.startswith(f"nbd-backend: {message}")
    assert err.count("\n") == 1


def test_no_command_shows_the_overview(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = output_of(capsys)
    assert status == 2
    assert out.startswith("usage: nbd-backend COMMAND")


def test_missing_server_has_a_status_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = output_of(capsys, "job", "list", "--qmp", "/nonexistent/qmp.sock")
    assert status == 3
    assert err == (
        "nbd-backend: job: no server answers at /nonexistent/qmp.sock: No such file or directory;"
        " start one with `nbd-backend serve`, or give --qmp\n"
    )


def test_images_are_named_in_order() -> None:
    images = name_images(["/a", "data=/b", "/c", "./x=y", "/has=sign"])
    assert [(image["name"], image["path"]) for image in images][:3] == [
        ("sda", "/a"),
        ("data", "/b"),
        ("sdc", "/c"),
    ]
    assert images[3]["name"] == "sdd"
    assert images[3]["path"].endswith("/x=y")
    assert images[4] == {"name": "sde", "path": "/has=sign"}


def test_image_names_go_on_after_z() -> None:
    assert [image["name"] for image in name_images([f"/{n}" for n in range(28)])][25:] == [
        "sdz",
        "sdaa",
        "sdab",
    ]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"driver": "qcow2", "n": 1}', {"driver": "qcow2", "n": 1}),
        (
            "driver=qcow2,file.driver=file,file.filename=/a",
            {"driver": "qcow2", "file": {"driver": "file", "filename": "/a"}},
        ),
        ("read-only=on,size=1048576,name=7", {"read-only": True, "size": 1048576, "name": "7"}),
        ("filename=a,,b=c", {"filename": "a,b=c"}),
        ("cache.direct=true,cache.no-flush=off", {"cache": {"direct": True, "no-flush": False}}),
    ],
)
def test_structured_option(text: str, value: dict[str, Any]) -> None:
    assert structure(text) == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not valid JSON"),
        ("a=1,a=2", "'a' is given twice"),
        ("a=1,a.b=2", "'a' is given as a value and, by 'a.b', as a group"),
        ("=1", "'=1' is not key=value"),
    ],
)
def test_structured_option_refused(text: str, message: str) -> None:
    import argparse

    with pytest.raises(argparse.ArgumentTypeError, match=message):
        structure(text)


def test_qmp_arguments() -> None:
    words = ["id=a", "speed=5", "on=true", "file.filename=x", 'list=["a",1]', "text=a=b", 'quoted="5"']
    assert parse_arguments(words) == {
        "id": "a",
        "speed": 5,
        "on": True,
        "file": {"filename": "x"},
        "list": ["a", 1],
        "text": "a=b",
        "quoted": "5",
    }


def test_qmp_argument_with_broken_json_is_refused() -> None:
    with pytest.raises(CliError, match="not valid JSON"):
        parse_arguments(["x={"])


@pytest.mark.parametrize(
    ("job_type", "values", "command"),
    [
        ("backup", {"target": "node"}, ("blockdev-backup", {"target": "node"})),
        ("backup", {"target": "/a/file"}, ("drive-backup", {"target": "/a/file"})),
        ("mirror", {}, ("blockdev-mirror", {})),
        (
            "verify",
            {"job-id": "v", "x": 1},
            ("job-create", {"type": "verify", "options": {"x": 1}, "id": "v"}),
        ),
    ],
)
def test_job_type_chooses_the_command(
    job_type: str, values: dict[str, Any], command: tuple[str, Any]
) -> None:
    assert job.start_command(job_type, values) == command


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (65536, "64 KiB"),
        (1310720, "1.25 MiB"),
        (1 << 40, "1 TiB"),
    ],
)
def test_size_for_people(count: int, text: str) -> None:
    assert _format.size(count) == text


@pytest.mark.parametrize(("seconds", "text"), [(8, "8 s"), (125, "2 min 05 s"), (11220, "3 h 07 min")])
def test_duration_for_people(seconds: float, text: str) -> None:
    assert _format.duration(seconds) == text


def node(name: str, driver: str, file: str, **more: Any) -> dict[str, Any]:
    """A reply's entry as query-named-block-nodes with flat has it."""
    return {
        "node-name": name,
        "drv": driver,
        "file": file,
        "ro": False,
        "image": {"virtual-size": 1 << 20},
        **more,
    }


LIVE = [
    node("#block1", "qcow2", "/base"),
    node("#block0", "file", "/base"),
    node("sda", "qcow2", "/top", backing_file="/base"),
    node("spare", "null-co", ""),
]


def test_live_graph_is_drawn_from_exports_down() -> None:
    items = chain.live_items(LIVE, [{"id": "e", "type": "nbd", "node-name": "sda"}])
    drawn = [line for item in items for line in chain.tree(item)]
    assert drawn == [
        "export e",
        "└─ sda  qcow2, 1 MiB, read-write, /top",
        "   └─ #block1  qcow2, 1 MiB, read-write, /base",
        "spare  null-co, 1 MiB, read-write,",
    ]


def test_graph_for_graphviz_names_every_edge_once() -> None:
    items = chain.live_items(LIVE, [{"id": n, "type": "nbd", "node-name": "sda"} for n in ("e", "f")])
    lines = chain.dot(items).splitlines()
    assert [line for line in lines if "->" in line] == [
        '  "export e" -> "sda";',
        '  "export f" -> "sda";',
        '  "sda" -> "#block1";',
    ]


def test_ports_and_names_stay_text_in_arguments() -> None:
    words = ["addr.data.port=10809", "id=7", "speed=7"]
    assert parse_arguments(words) == {"addr": {"data": {"port": "10809"}}, "id": "7", "speed": 7}
