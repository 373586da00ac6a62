"""The commands that start a backup: to a node, or to a file that is opened, or created, for it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Literal

from msgspec import UNSET, UnsetType

from jobs.block.backup import BackupJob, BackupOptions, check_options
from nbd_backend.block.chain import image_options
from nbd_backend.block.node import BlockNode
from nbd_backend.block.qcow2.create import Backing, create_qcow2, create_raw
from nbd_backend.control.context import Context
from nbd_backend.control.errors import GenericError
from nbd_backend.control.registry import command

__all__ = ["BlockdevBackup", "DriveBackup"]


class BlockdevBackup(BackupOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Back up ``device`` to the node ``target``."""

    job_id: str | UnsetType = UNSET


class DriveBackup(BackupOptions, frozen=True, kw_only=True, forbid_unknown_fields=True, rename="kebab"):
    """Back up ``device`` to the file ``target``, which is created unless ``mode`` says that it exists."""

    job_id: str | UnsetType = UNSET
    format: Literal["qcow2", "raw"] | UnsetType = UNSET
    mode: Literal["existing", "absolute-paths"] = "absolute-paths"


def _options(arguments: BackupOptions, **changes: Any) -> BackupOptions:
    """The arguments of a command as the job's options."""
    fields = {name: getattr(arguments, name) for name in BackupOptions.__struct_fields__}
    return BackupOptions(**{**fields, **changes})


def _job_id(arguments: BlockdevBackup | DriveBackup) -> str | None:
    return None if isinstance(arguments.job_id, UnsetType) else arguments.job_id


@command("blockdev-backup", arguments=BlockdevBackup, since="2.3")
async def blockdev_backup(context: Context, arguments: BlockdevBackup) -> None:
    """Copy a node, as it is now, to another of the same size, while guests go on writing."""
    job = BackupJob(context.graph, _options(arguments), context.scratch_dir)
    await context.jobs.launch(job, _job_id(arguments))


@command("drive-backup", arguments=DriveBackup, since="1.6", features=("deprecated",))
async def drive_backup(context: Context, arguments: DriveBackup) -> None:
    """Copy a node, as it is now, to an image file, while guests go on writing."""
    source = context.graph.get(arguments.device)
    check_options(arguments, arguments.target)  # before a file that may exist is replaced
    created = None
    if arguments.mode == "absolute-paths":
        created = await _create(context, arguments, source)
    target: BlockNode | None = None
    try:
        target = await context.graph.add_unnamed(_target_options(arguments))
        options = _options(arguments, target=target.name)
        job = BackupJob(context.graph, options, context.scratch_dir, owns_target=True)
        await context.jobs.launch(job, _job_id(arguments))
    except BaseException:
        if target is not None and context.graph.find(target.name) is target:
            await context.graph.remove(target.name)
        if created is not None:
            await asyncio.to_thread(Path(created).unlink, missing_ok=True)
        raise


def _absolute(path: str) -> str:
    """Not resolved: a name that is recorded in an image keeps its symbolic links."""
    return str(Path.cwd() / path)


def _format(arguments: DriveBackup) -> str:
    """Nothing is probed: an existing file is what the caller says, by default qcow2."""
    return "qcow2" if isinstance(arguments.format, UnsetType) else arguments.format


def _target_options(arguments: DriveBackup) -> dict[str, Any]:
    common: dict[str, Any] = {"discard": "unmap"}
    if _format(arguments) == "qcow2":
        common["backing"] = None  # the backup writes whole clusters only: what lies below is never read
    return image_options(_absolute(arguments.target), _format(arguments), **common)


async def _create(context: Context, arguments: DriveBackup, source: BlockNode) -> str | None:
    """Make the target; its path if it did not exist before, so that a failure can take it away."""
    path = context.graph.admit_new_file(_absolute(arguments.target))
    existed = await asyncio.to_thread(Path(path).exists)
    if _format(arguments) == "raw":
        await asyncio.to_thread(create_raw, path, source.size)
    else:
        backing = _backing(arguments, source)
        await asyncio.to_thread(lambda: create_qcow2(path, source.size, backing=backing))
    return None if existed else path


def _backing(arguments: DriveBackup, source: BlockNode) -> Backing | None:
    """What a new target shows where the backup writes nothing."""
    below = {"full": None, "top": source.backing, "none": source}[arguments.sync]
    if below is None:
        return None
    if not below.filename:
        raise GenericError(f"Node '{below.name}' has no file name that the target could name as backing file")
    return Backing(_absolute(below.filename), below.driver)
