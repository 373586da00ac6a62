"""The composition root: the parts of the server, made, started and stopped in order.

Two threads meet here. nbdkit's main thread calls `start` (after_fork) and `finish` (cleanup); nbdkit's
connections call the look-ups. Everything else runs on one thread of ours with the event loop.

    main thread                      loop thread
    start() ── starts ─────────────► open images, exports, QMP
      waits ◄───────────── ready ────┘
    accepts connections              monitors, jobs
                                     SIGTERM or `quit`: nbdkit stops accepting, jobs are cancelled,
                                       idle clients disconnected
    (last connection has ended)
    finish() ── connections over ──► exports, images flushed and closed, sockets removed
      waits ◄───────────── the end ──┘
    nbdkit exits with 0

nbdkit sets the signals' handlers just before after_fork and would wait for idle clients for ever, so
`start` takes the signals over. They are noticed by Python's wake-up descriptor: a Python handler would
never run, as the main thread is inside nbdkit.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import nbdkit
import uvloop

from jobs.block.legacy import BlockJobNames
from jobs.manager import JobManager
from nbd_backend import sockets
from nbd_backend.block.chain import image_options
from nbd_backend.block.describe import fault_text
from nbd_backend.block.errors import BlockError
from nbd_backend.block.events import EventRing
from nbd_backend.block.exports import Exports
from nbd_backend.block.graph import Graph
from nbd_backend.block.kernel import Event, EventKind, FaultKind
from nbd_backend.block.scratch import DEFAULT_DIRECTORY
from nbd_backend.block.security import PathPolicy
from nbd_backend.config import Config, ImageConfig
from nbd_backend.control.context import Context
from nbd_backend.control.errors import QMPError
from nbd_backend.control.events import EventBus
from nbd_backend.control.registry import Registry
from nbd_backend.control.server import QMPServer
from nbd_backend.listeners import Listeners

GRACE_SECONDS = 0.1
"""How long busy clients may take to notice the end by themselves before everybody is disconnected."""
PATIENCE_SECONDS = 5.0
"""How long clients may take to fetch their replies before the process ends without them."""
STOP_SECONDS = 75
"""When the process is killed that has not ended by itself; below systemd's 90 s."""
HANG_SECONDS = 30
"""How long the end waits for other servers, of NBD nodes, before it goes on without them. What guests wrote
may depend on them, so they get most of the time there is."""
LOOP_ADVANTAGE = 10
"""How much nicer to others the process is than its loop; the kernel's threads do not inherit it."""
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
log = logging.getLogger(__name__)


class Backend:
    """The server in an nbdkit process. `start` and `finish`: main thread; look-ups: any thread."""

    def __init__(self, config: Config, output: int) -> None:
        """`output` is a descriptor that gets the announcement and is closed then."""
        self.native = config["native"]
        self._config = config
        self._output = output
        self._exports: Exports | None = None
        self._ready = threading.Event()
        self._failure: str | None = None
        self._clients_left = False
        self._thread = threading.Thread(target=self._run, name="nbd-backend")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping: asyncio.Event | None = None
        self._connections_over: asyncio.Event | None = None

    @classmethod
    def from_json(cls, text: str, output: int) -> Backend:
        """A backend from what `serve` wrote; msgspec.ValidationError means that the two do not belong
        together.
        """
        return cls(msgspec.json.decode(text, type=Config), output)

    # ---- nbdkit's main thread ----

    def start(self) -> None:
        """Open everything and return when clients can be served. Ends the process with status 1 if that
        fails.
        """
        logging.basicConfig(format="nbd-backend: %(message)s", level=logging.WARNING)
        wake_up, signalled = socket.socketpair()
        signalled.setblocking(False)
        self._wake_up, self._signalled = wake_up, signalled
        signal.set_wakeup_fd(signalled.fileno(), warn_on_full_buffer=False)
        for number in _SIGNALS:
            signal.signal(number, _do_nothing)
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            _end(self._failure)

    def finish(self) -> None:
        """Stop what still runs, flush and close. Returns when it is done; ends the process with 1 if it
        failed.
        """
        assert self._loop is not None  # nbdkit served, so `start` has returned
        assert self._connections_over is not None
        self._loop.call_soon_threadsafe(self._connections_over.set)
        self._thread.join()
        if self._failure is not None:
            _end(self._failure)

    # ---- look-ups, on the threads of nbdkit's connections ----

    @property
    def exports(self) -> Exports:
        """The exports; their snapshot may be read from any thread."""
        assert self._exports is not None  # clients come after `start`
        return self._exports

    def list_exports(self) -> list[tuple[str, str]]:
        """Names and descriptions."""
        return [(entry.name, entry.description) for entry in self.exports.snapshot.values()]

    def default_export(self) -> str:
        """What a client gets that names no export; empty if there is none."""
        default = self.exports.default
        return default.name if default is not None else ""

    def description(self, name: str) -> str:
        """The description of an export, empty if it has none or is gone."""
        entry = self.exports.find(name)
        return entry.description if entry is not None else ""

    # ---- the loop's thread ----

    def _run(self) -> None:
        _go_first()
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._main())
        except Exception as error:  # a defect: whoever waits for this thread must hear of it
            log.exception("the server failed; please report this")
            self._failure = f"{type(error).__name__}: {error}"
        self._ready.set()

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self._connections_over = asyncio.Event()
        self._loop.add_reader(self._wake_up.fileno(), self._stop)
        listeners = Listeners(self._config["listeners"], self._config["spares"], self._config["waker"])
        with EventRing() as ring:
            context = _compose(self._config, ring, listeners, self._stop)
            self._exports = context.exports
            monitors = QMPServer(context)
            try:
                await self._open(context, monitors)
                self._announce(context)
                self._ready.set()
                await self._stopping.wait()
                self._loop.call_later(HANG_SECONDS, context.graph.cut_off_all)
                self._clients_left = not await self._end_clients(listeners, context)
            except _START_ERRORS as error:
                self._failure = _one_line(error)
            finally:
                await monitors.close()
                await self._close(context, listeners)
        if self._clients_left:
            _end(self._failure)

    async def _open(self, context: Context, monitors: QMPServer) -> None:
        for options in self._config["blockdevs"]:
            await _execute(context, "blockdev-add", options)
        for image in self._config["images"]:
            node = await context.graph.add(_image_node(self._config, image))
            context.exports.add(image["name"], image["name"], node, writable=not self._config["read_only"])
        for options in self._config["exports"]:
            await _execute(context, "block-export-add", options)
        for monitor in self._config["monitors"]:
            await monitors.serve(socket.socket(fileno=monitor["fd"]))

    def _stop(self) -> None:
        """Begin to stop; more signals change nothing."""
        with suppress(BlockingIOError):
            self._wake_up.recv(64, socket.MSG_DONTWAIT)
        assert self._stopping is not None  # set before anybody can call this
        if not self._stopping.is_set():
            signal.alarm(STOP_SECONDS)  # its default action is to kill
            self._stopping.set()

    async def _end_clients(self, listeners: Listeners, context: Context) -> bool:
        """Let nbdkit end: no new clients, what is in flight is answered, everybody is disconnected.

        False when some client does not take its replies, so that nbdkit would wait for it for ever.
        """
        assert self._connections_over is not None
        nbdkit.shutdown()
        cancelling = asyncio.create_task(context.jobs.shutdown())  # guest writes may be waiting for a job
        end = asyncio.get_running_loop().time() + PATIENCE_SECONDS
        while asyncio.get_running_loop().time() < end:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._connections_over.wait(), GRACE_SECONDS)
                break
            listeners.disconnect()
        await cancelling
        return self._connections_over.is_set()

    async def _close(self, context: Context, listeners: Listeners) -> None:
        """Close what there is, whatever happened before; the first failure is kept."""
        for step in (context.jobs.shutdown, context.exports.close, context.graph.close):
            try:
                await step()
            except BlockError as error:
                self._failure = self._failure or _one_line(error)
        context.events.close()
        listeners.unlink()
        for monitor in self._config["monitors"]:
            _unlink(monitor["path"])

    def _announce(self, context: Context) -> None:
        with os.fdopen(self._output, "w", encoding="utf-8") as output, suppress(BrokenPipeError):
            output.write(announcement(self._config, context))


# ---- parts ----


def _compose(config: Config, ring: EventRing, listeners: Listeners, stop: Callable[[], None]) -> Context:
    registry = Registry.discover()
    events = EventBus(registry.events)
    graph = Graph(ring, PathPolicy(config["allow_paths"]))
    scratch = config["scratch_dir"] or DEFAULT_DIRECTORY
    exports = Exports(graph, lambda export: events.emit("BLOCK_EXPORT_DELETED", {"id": export}))
    ring.on(EventKind.CORRUPT, lambda event: events.emit("BLOCK_IMAGE_CORRUPTED", _corruption(graph, event)))
    jobs = JobManager(events.emit)
    return Context(registry, events, graph, exports, jobs, BlockJobNames(jobs), listeners, scratch, stop)


def _corruption(graph: Graph, event: Event) -> dict[str, Any]:
    """The data of BLOCK_IMAGE_CORRUPTED for a finding of the kernel's; also logged."""
    node = graph.by_id(event.token)
    name, file = (node.name, node.filename) if node is not None else ("", "an image that is closed by now")
    message = f"{fault_text(FaultKind(event.a), event.b, event.c)}; no more writes go to the image"
    log.error("%s: %s; look closer: qemu-img check %s", file, message, file)
    return {"device": "", "node-name": name, "msg": message, "fatal": True}


async def _execute(context: Context, name: str, options: dict[str, Any]) -> None:
    """A QMP command that the command line asks for."""
    command = context.registry.commands[name]
    await command(context, command.decode(msgspec.json.encode(options)))


def _image_node(config: Config, image: ImageConfig) -> dict[str, Any]:
    """blockdev-add's options for an IMAGE of the command line."""
    options = image_options(
        image["path"], config["format"], **{"node-name": image["name"], "discard": "unmap"}
    )
    if config["read_only"]:
        options["read-only"] = True
    if config["cache"] == "none":
        options["cache"] = {"direct": True}
    if config["l2_cache_size"] is not None and config["format"] == "qcow2":
        options["l2-cache-size"] = config["l2_cache_size"]
    return options


def announcement(config: Config, context: Context) -> str:
    """What a person wants to know once clients can connect: where, and what to do next."""
    lines = []
    for address in context.nbd.addresses:
        for entry in context.exports.snapshot.values():
            access = "read-write" if entry.writable else "read-only"
            uri = sockets.uri(address, entry.name, tls=config["tls"])
            lines.append(f"NBD  {uri}  ({entry.name}, {entry.export.size:,} bytes, {access})")
        if not context.exports.snapshot:
            lines.append(
                f"NBD  {sockets.uri(address, tls=config['tls'])}  (no export yet: use block-export-add)"
            )
    lines += [f"QMP  {monitor['path']}" for monitor in config["monitors"]]
    if config["monitors"]:
        lines.append(
            f"Try: nbd-backend job list --qmp {config['monitors'][0]['path']}    Stop: Ctrl-C or SIGTERM"
        )
    return "".join(f"{line}\n" for line in lines)


_START_ERRORS = (BlockError, QMPError, sockets.AddressError, OSError)


def _one_line(error: Exception) -> str:
    hint = getattr(error, "hint", "")
    return f"{error} ({hint})" if hint else str(error)


def _unlink(path: str) -> None:
    Path(path).unlink(missing_ok=True)


def _go_first() -> None:
    """Let this thread, which does little but is waited for by people, run before a crowd of busy guests.

    Without the privilege it takes its turn as they do.
    """
    niceness = os.getpriority(os.PRIO_PROCESS, os.getpid()) - LOOP_ADVANTAGE
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), max(-20, niceness))


def _do_nothing(number: int, frame: object) -> None:
    """A signal's handler; the wake-up descriptor has told the loop already."""


def _end(failure: str | None) -> None:
    """End the process now, nbdkit or not: with status 1 and one line if there is a failure."""
    if failure is not None:
        sys.stderr.write(f"nbd-backend: serve: {failure}\n")
        sys.stderr.flush()
    os._exit(0 if failure is None else 1)
