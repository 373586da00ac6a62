"""Follow the events of a running server, a line each, until it ends or Ctrl-C."""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from ._qmp import Session, add_address, talk


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Define the options of ``events``."""
    add_address(parser)
    parser.add_argument("names", nargs="*", metavar="EVENT", help="only these, such as JOB_STATUS_CHANGE")
    parser.add_argument("--json", action="store_true", help="for programs: the events as they come")


def run(arguments: argparse.Namespace) -> int:
    """Print events until the server ends."""

    async def follow(session: Session) -> None:
        async with session.events(*arguments.names) as events:
            async for event in events:
                print(json.dumps(event) if arguments.json else line(event), flush=True)

    talk(arguments, follow)
    return 0


def line(event: dict[str, Any]) -> str:
    """An event for people: time of day, name, data."""
    stamp = event["timestamp"]
    clock = time.strftime("%H:%M:%S", time.localtime(stamp["seconds"]))
    data = " ".join(f"{key}={_shown(value)}" for key, value in event.get("data", {}).items())
    return f"{clock}.{stamp['microseconds'] // 1000:03}  {event['event']}  {data}".rstrip()


def _shown(value: Any) -> str:
    return value if isinstance(value, str) and value and " " not in value else json.dumps(value)
