"""A small synchronous QMP client for tests: one unix socket, nothing shared with the code under test."""

import json
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

DEADLINE = 30.0
"""Seconds that any reply or event may take unless the caller says otherwise."""

Message = dict[str, Any]
Match = Callable[[Mapping[str, Any]], bool]


def _any(data: Mapping[str, Any]) -> bool:
    return True


class QmpError(Exception):
    """An error reply. `kind` is its error class (`GenericError`, …), `desc` its text."""

    def __init__(self, command: str, kind: str, desc: str) -> None:
        super().__init__(f"{command}: {kind}: {desc}")
        self.kind = kind
        self.desc = desc


class QmpClient:
    """A monitor session, negotiated on entry. Not thread-safe.

    Events that arrive while something else is awaited stay in `events`, in order, for `wait_event`.
    """

    def __init__(self, path: Path, *, negotiate: bool = True, timeout: float = DEADLINE) -> None:
        """Connect to the monitor at `path` and read its greeting; OSError, TimeoutError if there is none."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._unread = b""
        self._last_id = 0
        self.events: list[Message] = []
        try:
            self._socket.settimeout(timeout)
            self._socket.connect(str(path))
            self.greeting: Message = self.receive(timeout)["QMP"]
            if negotiate:
                self.cmd("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a second call does nothing."""
        self._socket.close()

    def send(self, message: bytes | Mapping[str, Any]) -> None:
        """Send one message: bytes as they are (for malformed input), anything else as a line of JSON."""
        self._socket.sendall(message if isinstance(message, bytes) else json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float = DEADLINE) -> Message:
        """The next message of any kind; ConnectionError at its end, TimeoutError after `timeout` seconds."""
        end = time.monotonic() + timeout
        while b"\n" not in self._unread:
            left = end - time.monotonic()
            if left <= 0:
                raise TimeoutError(f"no QMP message within {timeout:g} s")
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("the QMP server closed the connection")
            self._unread += data
        line, self._unread = self._unread.split(b"\n", 1)
        message: Message = json.loads(line)
        return message

    def cmd(self, name: str, arguments: Mapping[str, Any] | None = None, *, timeout: float = DEADLINE) -> Any:
        """Run a command and return its result. Raises QmpError for an error reply."""
        self._last_id += 1
        request: Message = {"execute": name, "id": self._last_id}
        if arguments is not None:
            request["arguments"] = arguments
        self.send(request)
        end = time.monotonic() + timeout
        while True:
            message = self.receive(end - time.monotonic())
            if "event" in message:
                self.events.append(message)
            elif "error" in message:
                raise QmpError(name, message["error"]["class"], message["error"]["desc"])
            elif message.get("id", self._last_id) == self._last_id:
                return message["return"]

    def wait_event(self, name: str, match: Match = _any, *, timeout: float = DEADLINE) -> Message:
        """Take the first event called `name` whose data satisfies `match`; wait `timeout` seconds at most."""
        end = time.monotonic() + timeout
        seen = 0
        while True:
            for index, event in enumerate(self.events[seen:], seen):
                if event["event"] == name and match(event.get("data", {})):
                    return self.events.pop(index)
            seen = len(self.events)
            try:
                message = self.receive(end - time.monotonic())
            except TimeoutError:
                raise TimeoutError(f"no {name} within {timeout:g} s; events so far: {self.events}") from None
            if "event" in message:
                self.events.append(message)

    def wait_job(self, job: str, status: str, *, timeout: float = DEADLINE) -> Message:
        """Await the JOB_STATUS_CHANGE by which job `job` reports `status` (`ready`, `concluded`, …)."""
        return self.wait_event(
            "JOB_STATUS_CHANGE", lambda data: data["id"] == job and data["status"] == status, timeout=timeout
        )
