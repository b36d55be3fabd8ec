"""Checkpoints that are whole or not there: how one is put in place, and which one a run can go on from.

A checkpoint is written to `OUTPUT_DIR/.saving/checkpoint-N`. When every process has written its part, the main one
adds `complete.json` (name, size and crc32 of every file), forces all of it to the disk and renames the folder to
`OUTPUT_DIR/checkpoint-N`. Older checkpoints go only after that, so a run killed at any moment leaves what it had.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer_utils import rotate_checkpoints

from gkd_hf.data.shard_writer import sync_folder
from gkd_hf.errors import InputError

logger = logging.getLogger(__name__)

SAVING = ".saving"
RECORD = "complete.json"
ENGINES = {
    "plain": "without sharding (one process, or DDP)",
    "fsdp": "sharded by FSDP",
    "deepspeed": "by DeepSpeed",
}
# What a disk or a file system answers with; everything else is for the programmer to see.
DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM, errno.ESTALE)
)
_NAME = re.compile(r"checkpoint-(\d+)")
_REPLACED = "replaced-"
_CHUNK = 2**22  # bytes read at a time
_FULL = 2**24  # bytes: with less than this free, a disk counts as full


@dataclass(frozen=True)
class Standing:
    """What a folder has to go on from.

    Args:
        checkpoint: the newest whole checkpoint, None if there is none.
        passed_over: newer ones that are damaged, newest first: name and what is wrong.
    """

    checkpoint: Path | None
    passed_over: Mapping[str, str]

    def told(self) -> str:
        """One line on what was passed over; "" if nothing was."""
        if not self.passed_over or self.checkpoint is None:
            return ""
        damaged = ", ".join(f"{name} is damaged ({why})" for name, why in self.passed_over.items())
        return f"{damaged}: going on from {self.checkpoint.name}"


# -- finding ----------------------------------------------------------------------------------------------------------


def checkpoint_step(checkpoint: str | os.PathLike) -> int:
    """Return the optimiser steps a checkpoint has behind it.

    Raises:
        InputError: the checkpoint is not there or not whole.
    """
    from transformers.trainer import TRAINER_STATE_NAME  # half a second that a plan does not need

    state = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        return int(json.loads(state.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"cannot resume from '{checkpoint}': {TRAINER_STATE_NAME} is missing or broken") from error


def damage(checkpoint: str | os.PathLike) -> str | None:
    """Return what keeps a checkpoint from being whole, such as `optimizer.pt: crc32 …`; None if nothing does.

    Every file is read.
    """
    folder = Path(checkpoint)
    try:
        if not folder.is_dir():
            return "there is no such folder"
        if not (folder / RECORD).exists():
            return f"{RECORD} is missing: it was interrupted while it was written, or an older version wrote it"
        files = dict(_record(folder)["files"])
        for name, facts in files.items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if (size := path.stat().st_size) != facts["size"]:
                return f"{name}: {size} bytes, not {facts['size']}"
        for name, facts in files.items():
            if (found := _crc32(folder / name)) != facts["crc32"]:
                return f"{name}: crc32 {found:08x}, not {facts['crc32']:08x}"
        checkpoint_step(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename or RECORD).name} is missing"
    except OSError as error:
        return f"{Path(error.filename or folder).name} cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError):
        return f"{RECORD} is broken"
    return None


def standing(folder: str | os.PathLike) -> Standing:
    """Look for the newest whole checkpoint of a folder; the sound ones that are older are not read."""
    passed_over: dict[str, str] = {}
    for _, checkpoint in sorted(_checkpoints(folder), reverse=True):
        why = damage(checkpoint)
        if why is None:
            return Standing(checkpoint, passed_over)
        passed_over[checkpoint.name] = why
    return Standing(None, passed_over)


def last_complete_checkpoint(folder: str | os.PathLike) -> str | None:
    """Return the newest whole checkpoint of ``folder``, or None."""
    found = standing(folder).checkpoint
    return None if found is None else str(found)


def checkpoint_to_resume(folder: str | os.PathLike) -> Standing:
    """Return what a run in ``folder`` goes on from; its checkpoint is None where there is no checkpoint at all.

    Raises:
        InputError: there are checkpoints and every one is damaged. To begin again is for a person to decide.
    """
    found = standing(folder)
    if found.checkpoint is None and found.passed_over:
        damaged = ", ".join(f"{name} ({why})" for name, why in found.passed_over.items())
        raise InputError(
            f"no checkpoint in '{folder}' is whole: {damaged}; put sound ones back, or remove them to begin the "
            "stage again from its first step"
        )
    return found


def check_fresh(folder: str | os.PathLike) -> None:
    """Raise `InputError` if a folder in which a training is to begin holds checkpoints.

    They would not be told from its own: a restart takes the newest there is.
    """
    found = sorted(_checkpoints(folder))
    if found:
        raise InputError(
            f"'{folder}' holds {found[-1][1].name} of an earlier training: resume_from_checkpoint=True goes on from "
            "there; to begin a new one, choose another output_dir, or remove the checkpoints"
        )


def check_whole(checkpoint: str | os.PathLike) -> None:
    """Raise `InputError` if a checkpoint that somebody has named is not there or not whole."""
    if (why := damage(checkpoint)) is not None:
        raise InputError(f"cannot resume from '{checkpoint}': {why}")


def check_resumable(checkpoint: str | os.PathLike, engine: str, processes: int) -> None:
    """Raise `InputError` if a whole checkpoint cannot be taken up by this kind of run.

    Plain checkpoints and those of FSDP go on with any number of processes, those of DeepSpeed only with their own.

    Args:
        checkpoint: its folder. engine: a key of `ENGINES`. processes: of this run.
    """
    record = _record(Path(checkpoint))
    saved, count = record["engine"], record["processes"]
    if saved != engine:
        raise InputError(
            f"cannot resume from '{checkpoint}': it was saved {ENGINES.get(saved, saved)}, this run trains "
            f"{ENGINES[engine]}; launch it as it was begun, or choose another output folder"
        )
    if engine == "deepspeed" and count != processes:
        raise InputError(
            f"cannot resume from '{checkpoint}': DeepSpeed saved it on {count} processes and cannot go on with "
            f"{processes}; launch {count}, or choose another output folder"
        )


# -- saving -----------------------------------------------------------------------------------------------------------


def clear_saving(folder: str | os.PathLike) -> None:
    """Remove what a run that ended while it saved has left; a checkpoint it was about to replace is put back."""
    saving = Path(folder) / SAVING
    if not saving.is_dir():
        return
    for aside in saving.glob(f"{_REPLACED}*"):
        place = Path(folder) / aside.name.removeprefix(_REPLACED)
        if not place.exists():
            os.replace(aside, place)
    shutil.rmtree(saving, ignore_errors=True)


def put_in_place(folder: str | os.PathLike, step: int, engine: str, processes: int) -> Path:
    """Complete `.saving/checkpoint-STEP`, which every process has written, and move it to `checkpoint-STEP`.

    One of the same step that is there already is replaced.

    Raises:
        InputError: a process's part is missing. OSError: the disk refuses.
    """
    name = f"checkpoint-{step}"
    new, place = Path(folder) / SAVING / name, Path(folder) / name
    _check_parts(new, processes)
    files, folders = {}, [new]
    for path in sorted(new.rglob("*")):
        if path.is_dir():
            folders.append(path)
        elif path.name != RECORD:
            crc32 = _crc32(path, to_disk=True)
            files[path.relative_to(new).as_posix()] = {"size": path.stat().st_size, "crc32": crc32}
    record = {"step": step, "engine": engine, "processes": processes, "files": files}
    with (new / RECORD).open("w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    for each in folders:
        sync_folder(each)
    aside = new.with_name(f"{_REPLACED}{name}")
    if place.exists():
        os.replace(place, aside)
    os.replace(new, place)
    sync_folder(place.parent)
    shutil.rmtree(new.parent, ignore_errors=True)
    return place


def rotate(folder: str | os.PathLike, step: int, limit: int | None, best: str | None = None) -> None:
    """Remove checkpoints down to ``limit``, after that of ``step`` has been put in place.

    Later ones go as well: a run that went on from before them has another future, and the next start takes the newest.
    """
    for number, checkpoint in _checkpoints(folder):
        if number > step:
            logger.warning("Removing %s: this run went on from before it.", checkpoint)
            shutil.rmtree(checkpoint, ignore_errors=True)
    rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=False)


@contextmanager
def refused_writes(folder: str | os.PathLike, step: int, is_main: bool) -> Iterator[None]:
    """Turn what a disk refuses in this context into an `InputError`; the main process removes the torn checkpoint.

    An error that is not the disk's, such as one in a callback, is passed on as it is.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, CheckpointException) as error:
        if not _is_of_the_disk(error, Path(folder)):
            raise
        free = _free_bytes(folder)
        if is_main:
            clear_saving(folder)
        last = last_complete_checkpoint(folder)
        then = f"goes on from {Path(last).name}" if last else "begins the stage again: there is no checkpoint yet"
        raise InputError(
            f"the checkpoint of step {step} could not be written to '{folder}': {_reason(error, free)} "
            f"({free / 2**20:.0f} MiB are free there); make room or mend the disk, then run the same command again: "
            f"it {then}"
        ) from error


def is_full_disk(error: BaseException) -> bool:
    """Whether an error, of whatever was being written, says that there is no room."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return isinstance(error, OSError | SafetensorError | RuntimeError) and "No space left" in str(error)


def _is_of_the_disk(error: BaseException, folder: Path) -> bool:
    if isinstance(error, CheckpointException):
        return any(_is_of_the_disk(each, folder) for each, _ in error.failures.values())
    if isinstance(error, OSError):
        if isinstance(error.filename, str | bytes):
            return Path(os.fsdecode(error.filename)).resolve().is_relative_to(folder.resolve())
        return error.errno in DISK_ERRORS
    if isinstance(error, RuntimeError):
        # So torch's zip writer tells of a disk that refuses.
        return re.search(r"PytorchStreamWriter|inline_container|iostream error|No space left", str(error)) is not None
    return isinstance(error, SafetensorError)


def _reason(error: BaseException, free: int) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if free < _FULL:
        return "No space left on device"
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def _free_bytes(folder: str | os.PathLike) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _check_parts(new: Path, processes: int) -> None:
    """Every process leaves its random numbers, unless only the model is saved."""
    states = {path.name for path in new.glob("rng_state*.pth")}
    if not states and not (new / "scheduler.pt").is_file():
        return
    wanted = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    missing = [name for name in wanted if name not in states]
    if missing:
        raise InputError(
            f"'{new}' lacks {', '.join(missing)}: not all processes write to the same folder; output_dir must be on "
            "a file system that all hosts share"
        )


def _checkpoints(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    folder = Path(folder)
    if not folder.is_dir():
        return []
    return [(int(match[1]), entry) for entry in folder.iterdir() if (match := _NAME.fullmatch(entry.name))]


def _record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / RECORD).read_text(encoding="utf-8"))


def _crc32(path: Path, to_disk: bool = False) -> int:
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            value = zlib.crc32(chunk, value)
        if to_disk:
            os.fsync(file.fileno())
    return value
