"""What the guest does with its disk, what the host does meanwhile, and what disk and backup must then hold.

    guest                                       host
    mkfs, mount, write `before`, sync
    ready                               ──►
                                                start a throttled backup
                                        ◄──     begin
    overwrite, delete, write `during`, sync
    overwritten                         ──►
    go on overwriting                           the backup still runs: unthrottle it, await its end
                                        ◄──     finish
    write `after`, sync, remount, verify
    done ROUNDS                         ──►
    power off

All content is cut from one pseudo-random payload that host and guest both hold, so that no expectation ever
passes through the storage under test.
"""

import hashlib
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from tests.guest.initramfs import Initramfs, find_program
from tests.guest.kernel import Kernel, module_bytes
from tests.guest.machine import BOOT_DEADLINE, Machine
from tests.support import images
from tests.support.qmp import QmpClient
from tests.support.server import NbdBackend

DISK_SIZE = 96 << 20
PAYLOAD = random.Random(20161).randbytes(4 << 20)
CHURN_SIZE = 1 << 20
CHURN_STRIDE = 65_537
"""Bytes between the payload's parts that two rounds of overwriting take."""
THROTTLE = 128 << 10
"""Bytes per second of the backup until the guest has overwritten: at this speed it lasts 40 s or more."""
STALE_TOTALS = re.compile(r"Free (blocks|inodes) count wrong \(")
"""What e2fsck finds in the superblock after any power failure: a mounted ext4 leaves these totals stale."""
APPLETS = (
    "cat", "dd", "head", "insmod", "ip", "mount", "poweroff", "rm", "sh", "sha256sum", "stty", "sync",
    "tail", "touch", "umount",
)  # fmt: skip


@dataclass(frozen=True)
class File:
    """A file of the guest's filesystem: its name and the part of the payload that it holds."""

    name: str
    offset: int
    size: int

    @property
    def sha256(self) -> str:
        """Its content's checksum in hexadecimal."""
        return hashlib.sha256(PAYLOAD[self.offset : self.offset + self.size]).hexdigest()


def _files(phase: str, sizes: Iterable[int]) -> list[File]:
    """One file of each size, each cut from its own place of the payload, aligned to nothing."""
    return [File(f"{phase}-{size}", (size * 31 + len(phase)) % (len(PAYLOAD) - size), size) for size in sizes]


def _churn(rounds: int) -> File:
    """The file that is overwritten in place, as it is after `rounds` rounds."""
    return File("churn", rounds * CHURN_STRIDE % (len(PAYLOAD) - CHURN_SIZE), CHURN_SIZE)


BEFORE = _files("before", [0, 1, 511, 4096, 65_537, 300_000, 2 << 20])
DOOMED = File("doomed", 12_345, 700_001)
DURING = _files("during", [1000, 70_000, 1 << 20])
AFTER = _files("after", [4097, 131_072, 3 << 20])

SCRIPT = """
say() { echo "$*" >&3; }
hear() { read -t 300 -r line <&3; [ "$line" = "$1" ]; }
cut() { tail -c +$(($1 + 1)) /payload | head -c $2; }
write() { while read -r name offset size; do cut $offset $size >/mnt/$name; done <$1; }
churn() { cut $(($1 * STRIDE % SPAN)) CHURN_SIZE | dd of=/mnt/churn bs=64k conv=notrunc,fsync 2>/dev/null; }
churn_until_enough() {
    round=1
    while [ ! -e /enough ]; do
        round=$((round + 1))
        churn $round
    done
    echo $round >/rounds
}

mount -t proc none /proc
mount -t devtmpfs none /dev
for module in $(cat /modules/order); do insmod /modules/$module; done
exec 3<>/dev/ttyS1
stty -F /dev/ttyS1 -echo -onlcr

ATTACH
mkfs.ext4 -q -F MKFS_OPTIONS DISK
mount -t ext4 DISK /mnt
write /plan/before
churn 0
sync
say ready

hear begin
churn 1
rm /mnt/doomed
write /plan/during
sync
say overwritten
churn_until_enough &
churner=$!

hear finish
touch /enough
wait $churner
write /plan/after
sync
umount /mnt
echo 3 >/proc/sys/vm/drop_caches
mount -t ext4 -o ro DISK /mnt
cd /mnt
sha256sum -c /plan/sums
cd /
umount /mnt
DETACH
say done $(cat /rounds)
"""

INIT = """#!/bin/sh
sh -e -x /script || echo failed >/dev/ttyS1
poweroff -f
"""


@dataclass(frozen=True)
class Attachment:
    """How the guest comes by its disk, in the words of its shell, and what it needs for that."""

    disk: str
    """The device file, once attached."""
    modules: Sequence[str]
    """Kernel modules, to be loaded with their dependencies."""
    programs: Sequence[str] = ()
    """Programs copied from the host."""
    attach: str = ""
    """Commands that make the device."""
    detach: str = ""
    """Commands that give it back after the last unmount."""
    mkfs_options: str = ""
    """Options of mkfs.ext4."""


def build_initramfs(path: Path, kernel: Kernel, attachment: Attachment) -> Path:
    """Write the guest's whole userland to `path` and return it."""
    ramfs = Initramfs()
    ramfs.add_character_device("/dev/console", 5, 1)
    for directory in ("/mnt", "/proc"):
        ramfs.add_directory(directory)
    ramfs.add_applets(APPLETS)
    for program in ("mkfs.ext4", *attachment.programs):
        ramfs.add_program(program)
    ramfs.add_file("/etc/mke2fs.conf", Path("/etc/mke2fs.conf").read_bytes())
    modules = kernel.load_order(attachment.modules)
    for module in modules:
        ramfs.add_file(f"/modules/{module.name}", module_bytes(module))
    ramfs.add_file("/modules/order", "".join(f"{module.name}\n" for module in modules))
    ramfs.add_file("/payload", PAYLOAD)
    for phase, files in {"before": [*BEFORE, DOOMED], "during": DURING, "after": AFTER}.items():
        lines = [f"{file.name} {file.offset} {file.size}\n" for file in files]
        ramfs.add_file(f"/plan/{phase}", "".join(lines))
    kept = [*BEFORE, *DURING, *AFTER]
    ramfs.add_file("/plan/sums", "".join(f"{file.sha256}  {file.name}\n" for file in kept))
    ramfs.add_file("/script", _script(attachment))
    ramfs.add_file("/init", INIT, mode=0o755)
    ramfs.write(path)
    return path


def _script(attachment: Attachment) -> str:
    values = {
        "CHURN_SIZE": str(CHURN_SIZE),
        "STRIDE": str(CHURN_STRIDE),
        "SPAN": str(len(PAYLOAD) - CHURN_SIZE),
        "MKFS_OPTIONS": attachment.mkfs_options,
        "DISK": attachment.disk,
        "ATTACH": attachment.attach,
        "DETACH": attachment.detach,
    }
    script = SCRIPT
    for name, value in values.items():
        script = script.replace(name, value)
    return script


def make_disk(directory: Path) -> Path:
    """An empty overlay on a base full of junk: the first write to a cluster copies the rest of it."""
    base = images.create(directory / "base.qcow2", DISK_SIZE)
    images.qemu_io(base, f"write -P 0xa5 0 {DISK_SIZE}")
    return images.create(directory / "disk.qcow2", backing=base)


@dataclass(frozen=True)
class Outcome:
    """What a scenario leaves: the two images, and the rounds of overwriting that the guest completed."""

    disk: Path
    backup: Path
    rounds: int


def play(server: NbdBackend, machine: Machine, disk: Path, backup: Path) -> Outcome:
    """Lead guest and backup through the scenario up to the guest's power-off."""
    images.create(backup, DISK_SIZE)
    machine.hear("ready", timeout=BOOT_DEADLINE)
    with server.qmp() as qmp:
        _start_backup(qmp, backup)
        machine.say("begin")
        machine.hear("overwritten")
        [job] = qmp.cmd("query-jobs")
        assert job["status"] == "running", f"the backup ended before the guest had overwritten: {job}"
        _finish_backup(qmp)
    machine.say("finish")
    rounds = int(machine.hear("done"))
    machine.await_power_off()
    return Outcome(disk, backup, rounds)


def _start_backup(qmp: QmpClient, target: Path) -> None:
    """Start a throttled backup of the default export's node; its point in time is when this returns."""
    node = {"driver": "qcow2", "node-name": "backup", "file": {"driver": "file", "filename": str(target)}}
    qmp.cmd("blockdev-add", node)
    job = {"job-id": "nightly", "device": "sda", "target": "backup", "sync": "full", "speed": THROTTLE}
    qmp.cmd("blockdev-backup", job)


def _finish_backup(qmp: QmpClient) -> None:
    """Lift the throttle, wait for success, and give the target's file back."""
    qmp.cmd("block-job-set-speed", {"device": "nightly", "speed": 0})
    event = qmp.wait_event("BLOCK_JOB_COMPLETED", lambda data: data["device"] == "nightly", timeout=120)
    assert "error" not in event["data"], event
    qmp.wait_job("nightly", "null")
    qmp.cmd("blockdev-del", {"node-name": "backup"})


def verify(outcome: Outcome, directory: Path) -> None:
    """Check images, filesystems and every file's content; the server must have stopped.

    The disk was unmounted: it must be clean and hold every file. The backup is the disk as if power failed
    when the job began: its journal replayed, it must be clean and hold just what had been synced.
    """
    for image in (outcome.disk, outcome.backup):
        images.check(image)
    disk = images.convert(outcome.disk, directory / "disk.raw")
    backup = images.convert(outcome.backup, directory / "backup.raw")
    images.run([find_program("e2fsck"), "-fn", disk])
    repairs = images.run([find_program("e2fsck"), "-fy", backup], expect=(0, 1))
    reasons = [reason for reason, answer in pairwise(repairs.splitlines()) if answer.endswith("? yes")]
    assert all(STALE_TOTALS.match(reason) for reason in reasons), f"not crash-consistent:\n{repairs}"
    images.run([find_program("e2fsck"), "-fn", backup])
    on_disk = _checksums(disk, directory / "on-disk")
    assert on_disk == _expected(*BEFORE, *DURING, *AFTER, _churn(outcome.rounds))
    on_backup = _checksums(backup, directory / "on-backup")
    assert on_backup == _expected(*BEFORE, DOOMED, _churn(0))


def _expected(*files: File) -> dict[str, str]:
    return {file.name: file.sha256 for file in files}


def _checksums(filesystem: Path, into: Path) -> dict[str, str]:
    """Names and checksums of the files in the root of an ext4 image, read out by debugfs without a mount."""
    into.mkdir()
    images.run([find_program("debugfs"), "-R", f"rdump / {into}", filesystem])
    files = [path for path in into.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
