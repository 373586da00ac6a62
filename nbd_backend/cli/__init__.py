"""The command line: ``nbd-backend COMMAND …``, one module of this package per command.

A command's module has a docstring, whose first line is its summary in ``--help``, and two functions:
``add_arguments(parser)`` and ``run(arguments) -> int``, the exit status. Modules whose names start with an
underscore are shared by commands. Only the module of the command given is imported, so that ``serve``
starts at once.

Exit status: 0 success; 1 it failed, for the reason on standard error; 2 the command line is wrong; 3 no
server answers on the QMP socket; 4 the job that was waited for failed or was cancelled; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

PROGRAM = "nbd-backend"


class CliError(Exception):
    """A command failed; the text is the one line that the user sees, `status` the exit status."""

    def __init__(self, message: str, status: int = 1) -> None:
        super().__init__(message)
        self.status = status


def commands() -> list[str]:
    """The names of all commands, in alphabetical order."""
    return [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line (default: sys.argv's) and return the exit status; never raises for what a user
    can cause.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        print(_overview())
        return 0 if words else 2
    if words[0] in {"-V", "--version"}:
        from nbd_backend import __version__

        print(f"{PROGRAM} {__version__}")
        return 0
    name = words[0]
    if name not in commands():
        return _fail(f"'{name}' is not a command; the commands are {', '.join(commands())}", 2)
    return _run(name, import_module(f"{__name__}.{name}"), words[1:])


def _run(name: str, module: ModuleType, words: Sequence[str]) -> int:
    from ._parser import Parser, UsageError

    parser = Parser(prog=f"{PROGRAM} {name}", description=module.__doc__)
    module.add_arguments(parser)
    try:
        status: int = module.run(parser.parse_args(words))
    except UsageError as error:
        return _fail(f"{error} (try `{error.prog} --help`)", 2)
    except CliError as error:
        return _fail(f"{name}: {error}", error.status)
    except BrokenPipeError:  # the reader, `head` perhaps, has seen enough
        sys.stderr.close()
        return 1
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        return _fail(f"{name}{where}: {error.strerror or error}")
    except KeyboardInterrupt:
        return 130
    return status


def _fail(message: str, status: int = 1) -> int:
    print(f"{PROGRAM}: {message}", file=sys.stderr)
    return status


def _overview() -> str:
    width = max(map(len, commands()))
    lines = [
        f"  {name:{width}}  {(import_module(f'{__name__}.{name}').__doc__ or '').splitlines()[0]}"
        for name in commands()
    ]
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [ARGUMENTS…]",
            "",
            "Serves live qcow2 chains over NBD and runs block jobs on them, managed over QMP.",
            "",
            *lines,
            "",
            f"`{PROGRAM} COMMAND --help` explains one of them.",
        ]
    )
