#!/usr/bin/env python3
"""Runs the fio profiles of this directory against NBD exports and prints a table that compares them.

    fio-profiles/run.py ours='nbd+unix:///?socket=nbd.sock' theirs='nbd://localhost:10809'

Samples are interleaved (A B, B A, …) over the rounds and the medians are shown, with the ratio to the
first export: on a shared machine ratios hold where absolute figures drift.  Profiles that write are left
out unless --write is given, because they destroy what the exports hold.  Exit status 1 when fio fails.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Sample:
    """What one run of one profile gave, reads and writes together."""

    iops: float
    mib_per_s: float
    p99_us: float
    """The slower of the reads' and the writes' 99th percentile of completion latency, in microseconds."""


def sample_of(report: dict[str, Any]) -> Sample:
    """The figures in fio's JSON report of a profile with one group."""
    job = report["jobs"][0]
    sides = [job[side] for side in ("read", "write") if job[side]["total_ios"]]
    return Sample(
        iops=sum(side["iops"] for side in sides),
        mib_per_s=sum(side["bw_bytes"] for side in sides) / 2**20,
        p99_us=max(side["clat_ns"]["percentile"]["99.000000"] for side in sides) / 1000,
    )


def writes(profile: Path) -> bool:
    """Whether running the profile changes what the export holds."""
    text = profile.read_text(encoding="utf-8")
    return re.search(r"^rw=(?!read$|randread$)", text, re.MULTILINE) is not None


def run_fio(profile: Path, uri: str, seconds: int) -> Sample:
    """One run.  Raises RuntimeError with fio's own words when it fails."""
    text = profile.read_text(encoding="utf-8")
    text = re.sub(r"^runtime=.*$", f"runtime={seconds}", text, flags=re.MULTILINE)
    done = subprocess.run(
        ["fio", "--output-format=json", "-"],
        input=text, env={**os.environ, "URI": uri}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        reason = done.stderr.strip() or done.stdout.strip()
        raise RuntimeError(f"fio {profile.name} against {uri} failed: {reason}")
    # fio may print notes before the report.
    return sample_of(json.loads(done.stdout[done.stdout.index("{") :]))


def measure(
    profiles: Sequence[Path], exports: dict[str, str], rounds: int, seconds: int
) -> dict[tuple[str, str], list[Sample]]:
    """Every sample by (profile, export), the exports' order turned round after each round."""
    samples: dict[tuple[str, str], list[Sample]] = {}
    for profile in profiles:
        for turn in range(rounds):
            for name in list(exports)[:: -1 if turn % 2 else 1]:
                samples.setdefault((profile.stem, name), []).append(run_fio(profile, exports[name], seconds))
                print(".", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return samples


def table(samples: dict[tuple[str, str], list[Sample]], base: str) -> str:
    """The medians as lines of text, with each export's ratio of IOPS to `base`."""
    lines = [f"{'profile':<14} {'export':<12} {'IOPS':>10} {'MiB/s':>9} {'p99 µs':>9} {'ratio':>6}"]
    for (profile, export), taken in samples.items():
        iops = statistics.median(sample.iops for sample in taken)
        rate = statistics.median(sample.mib_per_s for sample in taken)
        p99 = statistics.median(sample.p99_us for sample in taken)
        ratio = iops / statistics.median(sample.iops for sample in samples[profile, base])
        lines.append(f"{profile:<14} {export:<12} {iops:>10,.0f} {rate:>9,.1f} {p99:>9,.0f} {ratio:>6.2f}")
    return "\n".join(lines)


def export(argument: str) -> tuple[str, str]:
    """NAME=URI from the command line."""
    name, equals, uri = argument.partition("=")
    if not (name and equals and uri) or "/" in name:
        raise argparse.ArgumentTypeError(f"expected NAME=URI (ours=nbd://localhost), not {argument!r}")
    return name, uri


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("exports", nargs="+", type=export, metavar="NAME=URI", help="the first is the base")
    parser.add_argument("--profile", action="append", help="only this one (may be repeated): a file's name")
    parser.add_argument("--write", action="store_true", help="run profiles that overwrite the exports too")
    parser.add_argument("--rounds", type=int, default=3, help="samples of each (default: 3)")
    parser.add_argument("--seconds", type=int, default=10, help="length of a sample (default: 10)")
    options = parser.parse_args()

    profiles = sorted(HERE.glob("*.fio"))
    if options.profile:
        wanted = {Path(name).stem for name in options.profile}
        if unknown := wanted - {path.stem for path in profiles}:
            parser.error(f"no such profile: {', '.join(sorted(unknown))}; see {HERE}")
        profiles = [path for path in profiles if path.stem in wanted]
    if not options.write:
        profiles = [path for path in profiles if not writes(path)]
    if not profiles:
        parser.error("all of these profiles overwrite the exports: add --write if that is meant")
    exports = dict(options.exports)
    try:
        samples = measure(profiles, exports, options.rounds, options.seconds)
    except (OSError, RuntimeError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1
    print(table(samples, next(iter(exports))))
    return 0


if __name__ == "__main__":
    sys.exit(main())
