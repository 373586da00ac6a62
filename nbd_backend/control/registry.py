"""The commands and events that exist: declared where they are implemented, found, never listed.

A command is an async function in any module of ``nbd_backend/control/commands/``:

    class JobReference(Arguments, frozen=True):
        id: str

    @command("job-pause", arguments=JobReference, since="3.0")
    async def job_pause(context: Context, arguments: JobReference) -> None:
        '''Stop a job at its next pause point, until job-resume.'''
        context.jobs.pause(arguments.id)

- ``arguments``: a struct (see arguments.py), or a union of tagged ones; None when the command takes none, and
  then the handler gets None.
- ``returns``: the type of the result, for introspection; None for a command that answers ``{}``. The handler
  may return anything that msgspec encodes to that shape.
- ``since``: the release of the interface that introduced the command.
- ``oob``: the command may overtake others (``exec-oob``). Its handler must not wait for anything.
- the docstring is the command's documentation; a test demands it.
- ``features``: what introspection tells about it, such as ``deprecated`` or ``unstable``.

A handler runs on the loop thread. Commands of one monitor run one after the other, those of several monitors
interleave wherever a handler awaits. It fails by raising QMPError, or what errors.to_qmp_error knows.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from nbd_backend.control.arguments import NoArguments, decode_arguments
from nbd_backend.control.events import Event

if TYPE_CHECKING:
    from nbd_backend.control.context import Context

__all__ = ["Command", "Registry", "command"]

_H = TypeVar("_H", bound=Callable[..., Awaitable[object]])


@dataclass(frozen=True)
class Command:
    """One command as declared; calling it calls its handler."""

    name: str
    handler: Callable[[Context, Any], Awaitable[object]]
    arguments: Any
    returns: Any
    since: str
    oob: bool = False
    features: tuple[str, ...] = ()

    @cached_property
    def _decoder(self) -> msgspec.json.Decoder[Any]:
        return msgspec.json.Decoder(NoArguments if self.arguments is None else self.arguments)

    def decode(self, text: bytes | None) -> Any:
        """The arguments from a JSON object, None for none at all. Raises GenericError."""
        arguments = decode_arguments(self._decoder, text or b"{}")
        return None if self.arguments is None else arguments

    def __call__(self, context: Context, arguments: Any = None) -> Awaitable[object]:
        """Run the handler."""
        return self.handler(context, arguments)


def command(
    name: str,
    *,
    since: str,
    arguments: Any = None,
    returns: Any = None,
    oob: bool = False,
    features: tuple[str, ...] = (),
) -> Callable[[_H], Command]:
    """Declare a command; see the module's description."""

    def declare(handler: _H) -> Command:
        return Command(name, handler, arguments, returns, since, oob, features)

    return declare


class Registry:
    """The commands and events of a set of modules, by name."""

    def __init__(self, modules: Iterable[ModuleType]) -> None:
        """Collect them. Raises ValueError when two definitions have one name."""
        commands: dict[str, Command] = {}
        events: dict[str, Event] = {}
        for module in modules:
            for value in vars(module).values():
                if isinstance(value, Command):
                    _add(commands, value.name, value, module)
                elif isinstance(value, Event):
                    _add(events, value.name, value, module)
        self.commands = MappingProxyType(commands)
        self.events = MappingProxyType(events)

    @classmethod
    def discover(cls) -> Registry:
        """The registry of everything in ``nbd_backend/control/commands/``."""
        package = importlib.import_module("nbd_backend.control.commands")
        found = pkgutil.iter_modules(package.__path__, f"{package.__name__}.")
        return cls(importlib.import_module(name) for name in sorted(module.name for module in found))


_D = TypeVar("_D", Command, Event)


def _add(known: dict[str, _D], name: str, definition: _D, module: ModuleType) -> None:
    if known.setdefault(name, definition) is not definition:
        raise ValueError(f"'{name}' is defined twice; the second definition is in {module.__name__}")
