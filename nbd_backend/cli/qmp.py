"""Run one QMP command, or start an interactive shell.

Arguments are key=value: numbers, true, false, on, off, JSON objects, lists and strings are recognised,
other values are text; a dot in a key leads into an object (file.filename=disk.qcow2). Without COMMAND a
shell starts, which is the one of the qemu.qmp package: same syntax, completion with TAB, an empty line
shows the events.
"""

from __future__ import annotations

import argparse
import json

from . import CliError
from ._qmp import NO_SERVER, Session, add_address, address, parse_arguments, talk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define COMMAND and its arguments."""
    add_address(parser)
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="such as query-jobs")
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="its arguments")
    parser.add_argument("--json", action="store_true", help="one line, for programs")


def run(arguments: argparse.Namespace) -> int:
    """Print the command's result, or be the shell."""
    if arguments.command is None:
        return _shell(address(arguments.qmp))
    values = parse_arguments(arguments.words)

    async def ask(session: Session) -> object:
        return await session.execute(arguments.command, values or None)

    print(json.dumps(talk(arguments, ask), indent=None if arguments.json else 2, ensure_ascii=False))
    return 0


def _shell(path: str) -> int:
    from qemu.qmp import ConnectError
    from qemu.qmp.qmp_shell import QMPShell

    with QMPShell(path, pretty=True) as shell:
        try:
            shell.connect()
        except ConnectError as error:
            raise CliError(f"no server answers at {path}: {error.exc}", NO_SERVER) from error
        shell.show_banner("QMP shell; TAB completes, an empty line shows events, Ctrl-D leaves.")
        while shell.read_exec_command():
            pass
    return 0
