"""Job types are found in our package and in those that announce them; a broken one harms nobody else."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest

from jobs.errors import JobError
from jobs.types import JobTypes
from tests.unit.jobs.actors import Actor
from tests.unit.jobs.loops import both_loops

MODULE = """
import msgspec
from jobs.job import Job

class Options(msgspec.Struct, forbid_unknown_fields=True, rename="kebab"):
    max_size: int = 0

class Abstract(Job):
    type = "abstract"
    options = Options

class Grep(Job):
    type = "grep"
    options = Options

    @classmethod
    def create(cls, context, options):
        job = cls()
        job.made_of = (context, options.max_size)
        return job

    async def run(self):
        pass
"""


class Options(msgspec.Struct, forbid_unknown_fields=True):
    size: int


class Upload(Actor):
    type = "upload"
    options = Options

    @classmethod
    async def create(cls, context: Any, options: Options) -> Upload:
        return cls()


@dataclass
class Point:
    name: str
    target: Any
    value: str = "package.module:Class"

    def load(self) -> Any:
        if isinstance(self.target, Exception):
            raise self.target
        return self.target


def _types(*points: Point) -> JobTypes:
    return JobTypes(packages=(), entry_points=lambda: points)


def test_types_in_a_package_are_found_without_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "own_jobs"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "grep.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    types = JobTypes(packages=("own_jobs",), entry_points=list)
    assert types.names() == ["grep"]
    assert types.get("grep") is sys.modules["own_jobs.grep"].Grep


def test_our_own_types_need_no_metadata_of_packages() -> None:
    def never() -> list[Point]:
        raise AssertionError("looked at entry points")

    types = JobTypes(entry_points=never)
    for name in types._builtin():
        assert types.get(name).type == name


@both_loops
async def test_an_announced_type_is_created_from_json() -> None:
    job = await _types(Point("upload", Upload)).create("upload", None, {"size": 3})
    assert isinstance(job, Upload)


@both_loops
async def test_wrong_options_are_refused() -> None:
    with pytest.raises(JobError, match=r"^Invalid options for a job of type 'upload': .*colour"):
        await _types(Point("upload", Upload)).create("upload", None, {"size": 3, "colour": 1})


@pytest.mark.parametrize(
    ("points", "text"),
    [
        ([], "Job type 'upload' does not exist (there are: )"),
        ([Point("uplaod", Upload)], "Job type 'upload' does not exist (there are: uplaod)"),
        (
            [Point("upload", ImportError("no boto"))],
            "Job type 'upload' cannot be loaded from package.module:Class: ImportError: no boto",
        ),
        (
            [Point("upload", Options)],
            (
                "Job type 'upload' cannot be used: package.module:Class is not a concrete subclass of"
                " jobs.job.Job with type, options and create"
            ),
        ),
        (
            [Point("upload", Upload, "b:B"), Point("upload", Upload, "a:A")],
            "Job type 'upload' is announced twice, by a:A and b:B: remove one of the packages",
        ),
    ],
)
def test_what_cannot_be_used_says_why(points: list[Point], text: str) -> None:
    with pytest.raises(JobError) as refused:
        _types(*points).get("upload")
    assert str(refused.value) == text


def test_a_type_announced_under_another_name_is_refused() -> None:
    with pytest.raises(JobError, match="calls itself 'upload'"):
        _types(Point("download", Upload)).get("download")
