"""What can be told to be impossible before any training: the grids, the length of a stage, the output folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from gkd_hf.errors import InputError
from gkd_hf.models.encoders import common_grid
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.recipe import StageRecipe
from gkd_hf.training.recipe_data import RecipeData

LOCK_PATIENCE = 10.0  # seconds: loader workers of a run that was killed may hold on for a moment


@contextmanager
def lock_output_dir(folder: Path) -> Iterator[None]:
    """Keep other runs out of an output folder in this context, which a process leaves however it ends.

    Raises:
        InputError: another run is going on there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_PATIENCE)
    except Timeout as error:
        raise InputError(
            f"another run is going on in output_dir '{folder}': wait for its end, or choose another output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()


def check_output_dir(folder: Path) -> None:
    """Raise `InputError` if results cannot be written there."""
    place = folder
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise InputError(f"output_dir '{folder}' cannot be written: '{place}' is no folder that you may write to")
    free = shutil.disk_usage(place).free
    if free < 2**28:
        raise InputError(f"output_dir '{folder}': only {free // 2**20} MiB are free on that disk; choose another")


def check_grids(student: GKDStudentModel, teachers: Sequence[GKDTeacher], image_size: int) -> tuple[int, int]:
    """Return the grid the losses are computed on; raise `InputError` if a teacher cannot give its tokens on it."""
    stride = student.adapter.stride
    if image_size < 2 * stride:
        raise InputError(f"image_size {image_size} leaves the student a single token: {2 * stride} is the least")
    grid = common_grid(student.adapter, teachers[0].adapter, image_size)
    for teacher in teachers:
        teacher.fit_geometry(image_size, grid)
    return grid


def train_steps(data: RecipeData, name: str, stage: StageRecipe) -> int:
    """Optimiser steps of a stage; raises `InputError` if neither recipe nor data tell."""
    steps = stage.max_steps or stage.steps(data.train_images(stage))
    if not steps:
        raise InputError(
            f"stages.{name}: the number of images of '{stage.data}' is not known: give max_steps, not epochs"
        )
    return steps
