"""The project's own rules, checked as tests: style, types, layers, warnings, what the kernel exports."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import grimp
import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KERNEL_SOURCES = sorted((REPOSITORY / "cffi_build").glob("*.c"))
MODULE = REPOSITORY / "nbd_backend" / "_kernel.abi3.so"
BIN = Path(sys.executable).parent
STRICT = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-Wshadow", "-Werror"]


def output_of(command: Sequence[str | Path], *, expect: int = 0) -> str:
    """Run a tool in the repository; fail with all that it printed unless it exits with `expect`."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=REPOSITORY, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode != expect:
        name = Path(command[0]).name
        pytest.fail(f"{name} exited with {done.returncode}:\n{done.stdout}{done.stderr}", pytrace=False)
    return done.stdout


def dynamic_symbols(kind: str) -> set[str]:
    """The built module's dynamic symbols as nm shows them: a letter and the name.

    `kind` is nm's ``--defined-only`` or ``--undefined-only``; of the latter ``U name`` must be found when
    the module loads, ``w name`` may be missing.
    """
    lines = output_of(["nm", "--dynamic", "--without-symbol-versions", kind, MODULE]).splitlines()
    return {" ".join(line.split()[-2:]) for line in lines}


def test_ruff_finds_nothing() -> None:
    output_of([BIN / "ruff", "check", "."])


def test_types_are_strict_and_hold() -> None:
    output_of([sys.executable, "-m", "mypy"])


def test_imports_point_down_only() -> None:
    output_of([BIN / "lint-imports"])


def test_generic_jobs_know_nothing_of_their_types() -> None:
    graph = grimp.build_graph("jobs")
    generic = {name for name in graph.modules if not f"{name}.".startswith("jobs.block.")}
    assert {
        f"{name} imports {imported}"
        for name in generic
        for imported in graph.find_modules_directly_imported_by(name) - generic
    } == set()


@pytest.mark.parametrize("source", KERNEL_SOURCES, ids=lambda path: path.name)
def test_kernel_compiles_without_warnings(source: Path) -> None:
    output_of(["gcc", *STRICT, "-Icffi_build", "-c", source, "-o", "/dev/null"])


def test_kernel_exports_the_two_entry_points_only() -> None:
    assert dynamic_symbols("--defined-only") == {"T PyInit__kernel", "T filter_init"}


def test_kernel_loads_without_nbdkit() -> None:
    strong = {name for name in dynamic_symbols("--undefined-only") if name.startswith("U nbdkit_")}
    assert not strong, f"{strong} exist only in nbdkit: each needs its line in cffi_build/nbdkit_import.h"


def test_kernel_is_not_linked_to_a_python() -> None:
    assert "libpython" not in output_of(["readelf", "--dynamic", MODULE])


def test_no_machine_path_in_the_repository() -> None:
    # Written in pieces, so that this file does not find itself.
    paths = re.compile("|".join("/" + name for name in ("work/", "root/", r"home/\w", "tmp/probe", "opt/")))
    listed = output_of(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"])
    found = [
        f"{name}:{number}: {line.strip()}"
        for name in filter(None, listed.split("\0"))
        if (REPOSITORY / name).is_file()
        for number, line in enumerate((REPOSITORY / name).read_text(errors="replace").splitlines(), 1)
        if paths.search(line)
    ]
    assert not found, "\n".join(found)


def test_only_the_typed_face_imports_the_kernel() -> None:
    sources = [path for package in ("nbd_backend", "jobs") for path in (REPOSITORY / package).rglob("*.py")]
    statement = re.compile(r"^\s*(from|import) .*\b_kernel\b", re.MULTILINE)
    importers = [path for path in sources if statement.search(path.read_text(encoding="utf-8"))]
    assert importers == [REPOSITORY / "nbd_backend" / "block" / "kernel.py"]


def test_every_page_of_documentation_is_in_the_index() -> None:
    docs = REPOSITORY / "docs"
    index = (docs / "README.md").read_text(encoding="utf-8")
    pages = {str(path.relative_to(docs)) for path in docs.rglob("*.md")} - {"README.md"}
    assert {page for page in pages if f"]({page})" not in index} == set()


def test_every_link_in_the_readme_and_the_index_leads_somewhere() -> None:
    for page in (REPOSITORY / "README.md", REPOSITORY / "docs" / "README.md"):
        targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text(encoding="utf-8"))
        assert [target for target in targets if not (page.parent / target).exists()] == [], page
