"""Which job types there are: ours, found in the package `jobs.block`, and those that other packages announce.

A job type is a concrete subclass of `jobs.job.Job` with a `type`, an `options` struct, and a classmethod
`create`. A package announces one by an entry point in the group ``nbd_backend.jobs``, whose name is the type.
Types of other packages are loaded when they are asked for: a broken one breaks nothing else.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, Final, Protocol, runtime_checkable

import msgspec

from jobs.errors import JobError
from jobs.job import Job

__all__ = ["GROUP", "EntryPoint", "JobType", "JobTypes"]

GROUP: Final = "nbd_backend.jobs"
#: a class of options; named here because the attribute `type` below hides the builtin
OptionsType = type[msgspec.Struct]


@runtime_checkable
class JobType(Protocol):
    """What a class must have to be created by name."""

    type: ClassVar[str]
    #: the arguments, kebab-case, unknown members refused
    options: ClassVar[OptionsType]

    @classmethod
    def create(cls, context: Any, options: Any) -> Job | Awaitable[Job]:
        """A job, not yet known to a manager; may be async; raises `JobError`, having changed nothing.

        ``context`` is the server's `Context`; ``options`` an instance of the class's `options`.
        """


class EntryPoint(Protocol):
    """An announced job type, as importlib.metadata describes it."""

    @property
    def name(self) -> str:
        """The job type."""

    @property
    def value(self) -> str:
        """Where it is: ``module:class``."""

    def load(self) -> Any:
        """Import it."""


def announced() -> Iterable[EntryPoint]:
    """The job types that installed packages announce."""
    # Costs a megabyte and some milliseconds: only for those who ask for such a type.
    from importlib.metadata import entry_points

    return entry_points(group=GROUP)


class JobTypes:
    """Job types by name. Loop thread only."""

    def __init__(
        self,
        packages: Iterable[str] = ("jobs.block",),
        entry_points: Callable[[], Iterable[EntryPoint]] = announced,
    ) -> None:
        self._packages = tuple(packages)
        self._entry_points = entry_points
        self._own: dict[str, type[JobType]] | None = None
        self._loaded: dict[str, type[JobType]] = {}

    def names(self) -> list[str]:
        """All types, ours and announced ones, in alphabetical order; nothing announced is loaded."""
        return sorted({*self._builtin(), *(point.name for point in self._entry_points())})

    def get(self, name: str) -> type[JobType]:
        """The class of the type ``name``; raises `JobError` if there is none, or it cannot be loaded."""
        own = self._builtin().get(name) or self._loaded.get(name)
        return own if own is not None else self._load(name)

    async def create(self, name: str, context: Any, options: Mapping[str, Any]) -> Job:
        """A job of type ``name`` from JSON ``options``, not yet known to a manager; raises `JobError`."""
        job_type = self.get(name)
        try:
            converted: msgspec.Struct = msgspec.convert(dict(options), job_type.options)
        except msgspec.ValidationError as failure:
            raise JobError(f"Invalid options for a job of type '{name}': {failure}") from failure
        job = job_type.create(context, converted)
        return await job if inspect.isawaitable(job) else job

    def _builtin(self) -> dict[str, type[JobType]]:
        if self._own is None:
            self._own = {found.type: found for package in self._packages for found in _types_in(package)}
        return self._own

    def _load(self, name: str) -> type[JobType]:
        points = [point for point in self._entry_points() if point.name == name]
        if not points:
            raise JobError(f"Job type '{name}' does not exist (there are: {', '.join(self.names())})")
        if len(points) > 1:
            places = " and ".join(sorted(point.value for point in points))
            raise JobError(f"Job type '{name}' is announced twice, by {places}: remove one of the packages")
        self._loaded[name] = _checked(points[0])
        return self._loaded[name]


def _checked(point: EntryPoint) -> type[JobType]:
    """Load what ``point`` announces; anything wrong with it is a `JobError`."""
    try:
        found = point.load()
    except Exception as failure:  # anybody's import may raise anything
        text = f"{type(failure).__name__}: {failure}"
        raise JobError(f"Job type '{point.name}' cannot be loaded from {point.value}: {text}") from failure
    if not _is_job_type(found):
        raise JobError(
            f"Job type '{point.name}' cannot be used: {point.value} is not a concrete subclass of"
            " jobs.job.Job with type, options and create"
        )
    if found.type != point.name:
        raise JobError(f"Job type '{point.name}' cannot be used: {point.value} calls itself '{found.type}'")
    result: type[JobType] = found
    return result


def _types_in(package: str) -> Iterator[type[JobType]]:
    root = importlib.import_module(package)
    for module_info in pkgutil.iter_modules(root.__path__, f"{package}."):
        module = importlib.import_module(module_info.name)
        for found in vars(module).values():
            if _is_job_type(found) and found.__module__ == module.__name__:
                yield found


def _is_job_type(found: object) -> bool:
    return (
        inspect.isclass(found)
        and issubclass(found, Job)
        and not inspect.isabstract(found)
        and bool(found.type)
        and inspect.isclass(getattr(found, "options", None))
        and callable(getattr(found, "create", None))
    )
