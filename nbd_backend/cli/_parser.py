"""What all commands parse alike: options, sizes, structured options, and errors of one line."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from nbd_backend.block.units import parse_size

T = TypeVar("T")


class UsageError(Exception):
    """The command line is wrong: what and why, in one line. `prog`: the command whose help says more."""

    def __init__(self, prog: str, message: str) -> None:
        super().__init__(f"{prog.partition(' ')[2]}: {message}" if " " in prog else message)
        self.prog = prog


class Parser(argparse.ArgumentParser):
    """argparse with errors as exceptions, no abbreviated options, and descriptions shown as they are
    written.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise UsageError instead of printing several lines and exiting."""
        raise UsageError(self.prog, message)


def argument(convert: Callable[[str], T]) -> Callable[[str], T]:
    """`convert` as an argparse type whose ValueError text reaches the user."""

    def parse(text: str) -> T:
        try:
            return convert(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse


size = argument(parse_size)


@argument
def structure(text: str) -> dict[str, Any]:
    """An option given as a JSON object or as ``key=value,key.sub=value`` (``,,`` is a comma in a value).

    In the second form `on`, `true`, `off`, `false` are booleans, decimal numbers are integers, keys with
    dots nest; file names and identifiers, which may look like numbers, stay text. ValueError says what
    cannot be understood.
    """
    if text.lstrip().startswith("{"):
        try:
            value = json.loads(text)
        except ValueError as error:
            raise ValueError(f"not valid JSON: {error}: {text}") from None
        return dict(value)
    result: dict[str, Any] = {}
    for pair in text.replace(",,", "\0").split(","):
        key, separator, raw = pair.replace("\0", ",").partition("=")
        if not key or not separator:
            raise ValueError(f"'{pair}' is not key=value in '{text}'")
        _insert(result, key, raw)
    return result


TEXT_KEYS = {"filename", "id", "name", "node-name", "description", "path", "host", "port", "uri", "export"}
"""Members that are text, although their values may look like numbers."""
_BOOLEANS = {"on": True, "true": True, "off": False, "false": False}


def scalar(raw: str) -> bool | int | str:
    """A word as the value it most likely is: a boolean, an integer, or text."""
    if raw in _BOOLEANS:
        return _BOOLEANS[raw]
    return int(raw) if raw.isascii() and raw.removeprefix("-").isdigit() else raw


def _insert(result: dict[str, Any], dotted: str, raw: str) -> None:
    *path, key = dotted.split(".")
    where = result
    for step in path:
        where = where.setdefault(step, {})
        if not isinstance(where, dict):
            raise ValueError(f"'{step}' is given as a value and, by '{dotted}', as a group")
    if key in where:
        raise ValueError(f"'{dotted}' is given twice")
    where[key] = raw if key in TEXT_KEYS else scalar(raw)
