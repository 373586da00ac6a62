"""Errors that a client sees, and the one place where exceptions of other layers become such.

QMPError                 what an error reply says: a class and a text
  ├─ GenericError        nearly everything
  ├─ CommandNotFound     unknown command, or one not allowed in this mode
  ├─ DeviceNotActive     a block-job-* command names no running job
  └─ DeviceNotFound      a command names no device (kept where clients probe for it)
"""

from __future__ import annotations

import logging
import os
from functools import singledispatch
from typing import ClassVar

from jobs.errors import JobError

__all__ = ["CommandNotFound", "DeviceNotActive", "DeviceNotFound", "GenericError", "QMPError", "to_qmp_error"]

_log = logging.getLogger(__name__)


class QMPError(Exception):
    """An error reply: ``class_`` is for programs, ``desc`` for people (though programs match on it)."""

    class_: ClassVar[str] = "GenericError"

    def __init__(self, desc: str) -> None:
        super().__init__(desc)
        self.desc = desc


class GenericError(QMPError):
    """Any failure that clients need not tell apart."""


class CommandNotFound(QMPError):
    """The command does not exist, or not in the present mode of the monitor."""

    class_ = "CommandNotFound"


class DeviceNotActive(QMPError):
    """No block job runs under the given name."""

    class_ = "DeviceNotActive"


class DeviceNotFound(QMPError):
    """No device has the given name."""

    class_ = "DeviceNotFound"


@singledispatch
def to_qmp_error(failure: Exception) -> QMPError:
    """The reply for an exception that left a command.

    A layer's own exceptions are mapped where its commands are, with ``@to_qmp_error.register``. What nobody
    mapped is a defect: it is logged with its traceback, and the client is told so.
    """
    _log.error("a command failed with an unexpected exception; please report this", exc_info=failure)
    return GenericError(
        f"Internal error: {type(failure).__name__}: {failure}; see the server's log, and please report this"
    )


@to_qmp_error.register
def _(failure: QMPError) -> QMPError:
    return failure


@to_qmp_error.register
def _(failure: JobError) -> QMPError:
    return GenericError(str(failure))


@to_qmp_error.register
def _(failure: OSError) -> QMPError:
    text = failure.strerror or (os.strerror(failure.errno) if failure.errno else str(failure))
    return GenericError(f"{text}: {failure.filename}" if failure.filename else text)
