"""The same bytes go to qemu-storage-daemon and to us; the replies are the same, but for a few that we mean.

Every input is followed by 0xFF, which brings any parser back, and by a command with a known id: when its
reply is there, everything before it is too.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import pytest
from msgspec import Meta

from nbd_backend.control.arguments import Arguments, Int64, Uint32
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError
from nbd_backend.control.registry import Registry, command
from tests.support.control import registry_of, serving

VERSION = b'{"execute":"query-version"}'
END = b'\xff{"execute":"nope","id":"end of the case"}\n'
PLAIN, OOB, NOT_NEGOTIATED = b'{"execute":"qmp_capabilities"}', b"oob", b""


class JobId(Arguments, frozen=True):
    id: str


class Speed(Arguments, frozen=True):
    device: str
    speed: Int64


class Bitmap(Arguments, frozen=True, kw_only=True):
    node: str
    name: str
    granularity: Uint32 = 65536


class Nodes(Arguments, frozen=True):
    flat: bool = False


class Cache(Arguments, frozen=True):
    direct: bool = False


class Node(Arguments, frozen=True, kw_only=True, tag_field="driver"):
    node_name: str = ""
    read_only: bool = False
    cache: Cache = Cache()


class FileNode(Node, frozen=True, kw_only=True, tag="file"):
    filename: str


Reference = Annotated["str | AnyNode", Meta(title="BlockdevRef")]


class RawNode(Node, frozen=True, kw_only=True, tag="raw"):
    offset: Int64 = 0
    file: Reference


class QuorumNode(Node, frozen=True, kw_only=True, tag="quorum"):
    children: list[Reference]
    vote_threshold: Int64


AnyNode = FileNode | RawNode | QuorumNode


class UnixPath(Arguments, frozen=True):
    path: str


class UnixAddress(Arguments, frozen=True, tag_field="type", tag="unix"):
    data: UnixPath


class Server(Arguments, frozen=True):
    addr: UnixAddress


def lookalikes() -> Registry:
    """Commands that take what the daemon's take; none of them does anything."""

    async def refuse(context: Context, arguments: object) -> None:
        raise GenericError("the comparison is about arguments only")

    declared = {
        "job-pause": JobId,
        "block-job-set-speed": Speed,
        "block-dirty-bitmap-add": Bitmap,
        "query-named-block-nodes": Nodes,
        "blockdev-add": AnyNode,
        "nbd-server-start": Server,
    }
    commands = {name: command(name, arguments=kind, since="1")(refuse) for name, kind in declared.items()}
    return registry_of(**commands)


def call(name: str, arguments: str) -> bytes:
    return f'{{"execute":"{name}","arguments":{arguments}}}'.encode()


def add(text: str) -> bytes:
    return call("blockdev-add", text)


def raw(text: str) -> bytes:
    return add(f'{{"driver":"raw","node-name":"x",{text}}}')


def quorum(children: str) -> bytes:
    return add(f'{{"driver":"quorum","node-name":"x","vote-threshold":1,"children":{children}}}')


SAME: list[tuple[bytes, bytes]] = [
    # requests
    *[
        (PLAIN, text)
        for text in (
            VERSION,
            b'{"execute":"nope"}',
            b'{"execute":"","id":null}',
            '{"execute":"café"}'.encode(),
            b"{}",
            b"[1]",
            b"1\n",
            b'"a"',
            b"null ",
            b'{"execute":1}',
            b'{"execute":"query-version","arguments":[]}',
            b'{"execute":"query-version","arguments":null}',
            b'{"execute":"query-version","arguments":{}}',
            b'{"execute":"query-version","arguments":{"x":1}}',
            b'{"execute":"query-version","foo":1}',
            b'{"foo":1}',
            b'{"id":5,"foo":1}',
            b'{"id":5}',
            b'{"id":5,"execute":"nope"}',
            b'{"exec-oob":"query-version"}',
            b'{"execute":"query-version","control":{}}',
            b'{"execute":"qmp_capabilities"}',
            b'{"id":1}' * 3 + VERSION,
            VERSION * 20,
        )
    ],
    # modes
    *[
        (NOT_NEGOTIATED, text)
        for text in (
            VERSION,
            b'{"execute":"nope"}',
            b'{"exec-oob":"qmp_capabilities"}',
            b'{"execute":"query-version","foo":1}',
            PLAIN + VERSION,
            PLAIN + PLAIN,
            b'{"execute":"qmp_capabilities","arguments":{"enable":"oob"}}',
            b'{"execute":"qmp_capabilities","arguments":{"enable":[1]}}',
            b'{"execute":"qmp_capabilities","arguments":{"enable":["oob","oob"]}}',
            b'{"execute":"qmp_capabilities","arguments":{"enable":[],"x":1}}',
            b"}",
        )
    ],
    (OOB, b'{"exec-oob":"query-version"}'),
    (OOB, b'{"exec-oob":"nope"}'),
    (OOB, b'{"exec-oob":1}'),
    (OOB, b'{"exec-oob":"query-version","execute":"query-version"}'),
    # ids and strings
    *[
        (PLAIN, b'{"execute":"query-version","id":' + text + b"}")
        for text in (
            '[1,{"a":null,"b":1.50,"c":1e3,"d":"\\u00e9é/\\/"}]'.encode(),
            b"18446744073709551615",
            b"-0",
            b'"\\u0000"',
            b'"\\ud83d\\ude00"',
            b'{"b":1,"a":"\\"\\\\\\b\\f\\n\\r\\t"}',
            b"'a\\'b\"c'",
            b'"\\ud800"',
            b'"\\udc00"',
            b'"\\u12zz"',
            b'"\\x"',
            b'"\xff"',
            b'"\x80"',
            b'"\xc3("',
            b'"\xed\xa0\x80"',
            b'"a\nb"',
            b'"a\tb"',
        )
    ],
    # numbers and words
    *[
        (PLAIN, b'{"execute":"query-version","id":' + text + b"}")
        for text in (b"01", b"1.", b".1", b"+1", b"NaN", b"%d", b"1a", b"-01", b"truefalse", b"1e+")
    ],
    # grammar
    *[
        (PLAIN, text)
        for text in (
            b'{"execute":"query-version","id":1,"id":2}',
            b'{"execute":"query-version",}',
            b'{"execute"}',
            b'{"execute":}',
            b"{1:2}",
            b"{true:1}",
            b'{"a" "b"}',
            b'{"a":1 "b":2}',
            b"[1,]",
            b"[,]",
            b"{,}",
            b'{"a":1,,}',
            b"[1 2]",
            b'["a":1]',
            b'{"a":1]',
            b'{"a":foo}',
            b'{"a":{"b":1,"b":2}}',
            b'{"\\u0061":1,"a":2}',
            b"]",
            b"}",
            b":",
            b",",
            b"}" + VERSION,
            b"[}" + VERSION,
        )
    ],
    # finding the way back
    *[
        (PLAIN, text + VERSION)
        for text in (
            b"x",
            b"foo bar ",
            b"foo\n",
            b"%d",
            b"% 1\n",
            b"%\n1 ",
            b"%\t1 ",
            b"%\r1 ",
            b"%: ",
            b"%'",
            b"%\x01",
            b"%\xfe",
            b"-",
            b"- 1",
            b"1+2 ",
            b"nullX",
            b"a_b",
            b"/*",
            b"\xef\xbb\xbf",
            b"\x0b",
            b"\x7f",
            b'"\xfe"',
            b'"\\\n"',
            b'{"execute":"quer\xff',
            b'{"exec\x01',
            b'{"a":[1}',
            b"\n\n\r\n \t",
        )
    ],
    # arguments
    *[
        (PLAIN, text)
        for text in (
            call("job-pause", "{}"),
            call("job-pause", '{"id":1}'),
            call("job-pause", '{"id":null}'),
            call("job-pause", '{"zz":1}'),
            call("job-pause", '{"id":"x","zz":1}'),
            call("block-job-set-speed", '{"device":"a","speed":99999999999999999999}'),
            call("block-job-set-speed", '{"device":"a","speed":1.5}'),
            call("block-job-set-speed", '{"device":"a","speed":"1"}'),
            call("block-job-set-speed", '{"device":"a","speed":true}'),
            call("block-job-set-speed", '{"device":"a","speed":1e3}'),
            call("block-dirty-bitmap-add", '{"node":"a","name":"b","granularity":4294967296}'),
            call("query-named-block-nodes", '{"flat":1}'),
            add("{}"),
            add('{"driver":"zzz"}'),
            add('{"driver":1}'),
            raw('"read-only":false'),
            raw('"file":1'),
            raw('"file":null'),
            raw('"file":{"driver":"file"}'),
            raw('"file":{"driver":"file","filename":1}'),
            raw('"file":{"driver":"file","filename":"a","zz":1}'),
            raw('"file":{"driver":"filx","filename":"a","zz":1}'),
            raw('"file":{}'),
            raw('"read-only":"on","file":"f"'),
            raw('"cache":{"direct":1},"file":"f"'),
            raw('"offset":"a","file":"f"'),
            quorum('"a"'),
            quorum('["a",{"driver":"file"}]'),
            quorum('["a",{"driver":"file","filename":"a","q":1}]'),
            call("nbd-server-start", '{"addr":{"type":"unix"}}'),
            call("nbd-server-start", '{"addr":{"type":"unix","data":{"path":1}}}'),
            call("nbd-server-start", '{"addr":{"type":"unix","data":{"path":"a","x":1}}}'),
        )
    ],
]

#: input -> why we differ, and the texts of our replies
MEANT: list[tuple[str, bytes, bytes, list[str]]] = [
    (
        "its texts say 'null' for a member of an array",
        PLAIN,
        quorum('[1,"a"]'),
        ["Invalid parameter type for 'children[0]', expected: BlockdevRef"],
    ),
    (
        "the same; this text names a capability as the list's element",
        NOT_NEGOTIATED,
        b'{"execute":"qmp_capabilities","arguments":{"enable":["foo"]}}',
        ["Parameter 'enable[0]' does not accept value 'foo'"],
    ),
    (
        "a zero byte ends its text",
        PLAIN,
        b"\x00",
        ["JSON parse error, stray '\x00'"],
    ),
    (
        "ids are echoed as they came: it turns big numbers into floating point",
        PLAIN,
        b'{"execute":"nope","id":123456789012345678901234567890}',
        ["The command nope has not been found"],
    ),
    (
        "it answers an infinite number with what is not JSON",
        PLAIN,
        b'{"execute":"nope","id":1e400}',
        ["The command nope has not been found"],
    ),
    (
        "noncharacters are valid Unicode",
        PLAIN,
        b'{"execute":"\\ufffe"}',
        ["The command \ufffe has not been found"],
    ),
    (
        "an overlong encoding is bad UTF-8",
        PLAIN,
        b'{"execute":"\xc0\x80"}',
        ["JSON parse error, invalid UTF-8 sequence in string"],
    ),
    (
        "a closing quote is no part of an escape",
        PLAIN,
        b'{"execute":"\\u12"}',
        ["JSON parse error, \\u12 is not a valid Unicode character"],
    ),
    (
        "nesting is limited to half as much: beyond what the JSON library decodes without recursion errors",
        PLAIN,
        b"[" * 600 + b"]" * 600,
        [
            "JSON nesting depth limit exceeded",
            "QMP input must be a JSON object",  # the 87 brackets that are left, closed
            *["JSON parse error, expecting value"] * 513,
        ],
    ),
    (
        "a long bad token is repeated in part",
        PLAIN,
        b'"' + b"a" * 100 + b"\x01",
        [f"JSON parse error, stray '\"{'a' * 63}…'"],
    ),
]


class Side:
    """One of the two servers, by the path of its socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def replies(self, mode: bytes, text: bytes) -> list[Any]:
        """What a new monitor answers, in a form that does not depend on layout or version."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(self.path))
            lines = client.makefile("rb")
            lines.readline()
            if mode:
                enable = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'
                client.sendall(enable if mode is OOB else mode)
                assert json.loads(lines.readline()) == {"return": {}}
            client.sendall(text + END)
            found: list[Any] = []
            while True:
                line = lines.readline()
                assert line.endswith(b"\r\n")
                reply = json.loads(line.replace(b": inf", b': "inf"'))
                if reply.get("id") == "end of the case":
                    return found
                if isinstance(reply.get("return"), dict):
                    reply["return"] = sorted(reply["return"])
                found.append(reply)


@pytest.fixture(scope="module")
def daemon() -> Iterator[Side]:
    program = shutil.which("qemu-storage-daemon")
    assert program, "install qemu-system-common, which has qemu-storage-daemon"
    with tempfile.TemporaryDirectory(prefix="qsd-") as directory:
        path = Path(directory, "s")
        chardev = f"socket,id=c,path={path},server=on,wait=off"
        process = subprocess.Popen([program, "--chardev", chardev, "--monitor", "chardev=c"])
        try:
            yield Side(_wait_connectable(path))
        finally:
            process.kill()
            process.wait()


def _wait_connectable(path: Path) -> Path:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
            probe.connect(str(path))
            return path
        time.sleep(0.01)
    raise AssertionError(f"{path} does not accept connections")


@pytest.fixture(scope="module")
def ours() -> Iterator[Side]:
    ready, loops = threading.Event(), []
    stop = asyncio.Event()

    async def main(path: Path) -> None:
        async with serving(path, lookalikes()):
            loops.append(asyncio.get_running_loop())
            ready.set()
            await stop.wait()

    with tempfile.TemporaryDirectory(prefix="qmp-") as directory:
        path = Path(directory, "s")
        thread = threading.Thread(target=lambda: asyncio.run(main(path)))
        thread.start()
        assert ready.wait(20)
        yield Side(path)
        loops[0].call_soon_threadsafe(stop.set)
        thread.join()


def _label(value: object) -> str | None:
    return ascii(value)[2:60] if isinstance(value, bytes) else None


@pytest.mark.parametrize(("mode", "text"), SAME, ids=_label)
def test_the_replies_are_the_same(daemon: Side, ours: Side, mode: bytes, text: bytes) -> None:
    assert ours.replies(mode, text) == daemon.replies(mode, text)


@pytest.mark.parametrize(("why", "mode", "text", "texts"), MEANT, ids=lambda value: _label(value) or "")
def test_the_replies_differ_where_we_mean_it(
    daemon: Side, ours: Side, why: str, mode: bytes, text: bytes, texts: list[str]
) -> None:
    replies = ours.replies(mode, text)
    assert [reply["error"]["desc"] for reply in replies][:-1] == texts
    assert replies != daemon.replies(mode, text), f"no difference any more: {why}"
