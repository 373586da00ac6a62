"""Faults in front of another node: delays and errors by operation and range."""

from __future__ import annotations

import errno as errno_names
from typing import Annotated, Literal

import msgspec

from nbd_backend.block import kernel
from nbd_backend.block.driver import Driver, OpenContext, Opened
from nbd_backend.block.errors import BlockError, Kind
from nbd_backend.block.options import NodeOptions, NodeRef

Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Operation = Literal["read", "write", "flush", "discard"]
_MASK: dict[str, int] = {"read": 1, "write": 2, "flush": 4, "discard": 8}
_EVERYWHERE = 1 << 62


class Rule(msgspec.Struct, rename="kebab", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Requests of these operations that overlap the range wait `delay_ns`, then fail with `errno` (a name
    such as ENOSPC; none: they go on). `skip` matching requests pass first; the rule acts on `count` requests
    (0: all).
    """

    operations: list[Operation]
    offset: Count = 0
    length: Count = _EVERYWHERE
    errno: str | None = None
    delay_ns: Count = 0
    skip: Count = 0
    count: Count = 0


class Options(NodeOptions, frozen=True, kw_only=True):
    """The rules act in the order given, and may be added to later by `add_rule`."""

    file: NodeRef
    rules: tuple[Rule, ...] = ()


async def open_error_inject(context: OpenContext, options: Options) -> Opened:
    """Open the child, put the filter above it, and arm the rules."""
    child = await context.child("file", options.file)
    handle = kernel.error_inject_open(child.handle, context.flags)
    try:
        for rule in options.rules:
            add_rule(handle, rule)
    except BlockError:
        handle.close()
        raise
    return Opened(handle, child.filename, context.read_only, child.info)


def add_rule(node: kernel.Node, rule: Rule) -> None:
    """Arm one more rule on an error-inject node. Any thread."""
    mask = 0
    for operation in rule.operations:
        mask |= _MASK[operation]
    number = 0 if rule.errno is None else _errno(rule.errno)
    kernel.error_inject_rule(
        node, kernel.ErrorRule(mask, rule.offset, rule.length, number, rule.delay_ns, rule.skip, rule.count)
    )


def _errno(name: str) -> int:
    number: int | None = getattr(errno_names, name, None) if name.startswith("E") else None
    if number is None:
        raise BlockError(
            Kind.INVALID, f"Parameter 'errno' does not accept value '{name}'", hint="for example EIO"
        )
    return number


DRIVER = Driver(names=("error-inject",), options=Options, open=open_error_inject, is_filter=True)
