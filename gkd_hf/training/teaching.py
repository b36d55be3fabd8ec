"""The teachers of a training: checked, placed on the device, asked; and the images their tokens are measured on."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import Dataset, IterableDataset
from transformers import TrainerCallback

from gkd_hf.data.streaming import SampleStream
from gkd_hf.errors import InputError
from gkd_hf.models.encoders import EncoderOutput
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments, StageArguments
from gkd_hf.training.numbered_samples import numbered_samples
from gkd_hf.training.teacher_cache import teacher_caches

STATISTICS_IMAGES = 64  # of the training's first, from which the statistics of the tokens are estimated
STATISTICS_BATCH = 8  # of them at once, whatever the training's batch: so the processes' number changes nothing


def as_teachers(given: GKDTeacher | str | os.PathLike | Sequence[GKDTeacher | str | os.PathLike]) -> list[GKDTeacher]:
    """Make the teachers that a trainer is given, one or several, each a `GKDTeacher` or what one is made from.

    Raises:
        InputError: none is given, or one of them twice.
    """
    several = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    if not several:
        raise InputError("teacher is an empty list: give one teacher, or several")
    teachers = [each if isinstance(each, GKDTeacher) else GKDTeacher(each) for each in several]
    for k, teacher in enumerate(teachers):
        for other in teachers[:k]:
            if teacher is other or (teacher.source is not None and teacher.source == other.source):
                raise InputError(
                    f"teacher '{teacher.called}' is given twice: name each once, and give it a weight if it is to "
                    "count for more"
                )
    return teachers


def check_precision(teacher: GKDTeacher, args: StageArguments) -> None:
    """Raise `InputError` if a teacher's weights are bf16 already, in a training in fp32."""
    if teacher.halved and not args.bf16:
        raise InputError(
            "the teacher's weights are bf16 (made so by halve() or by an earlier training in bf16), this training "
            f"is in fp32: give it a new {type(teacher).__name__}, or set bf16=True"
        )


class Teaching:
    """Asks a training's teachers about its images.

    Args:
        teachers: those of the training; in bf16 their weights are made bf16, and compiled in place if the arguments
            say so. One that is to be shared out to the processes is so at the first batch.
        args: the training's. image_mean, image_std: of the student, three numbers each.
        autocast: gives the context in which models compute in the training's precision.

    Raises:
        InputError: a teacher whose weights are bf16 already, in a training in fp32; a cache whose folder can neither
            be made nor read, or of a teacher that is shared out.

    Attributes:
        caches: of each teacher's tokens; empty unless the arguments ask for them.
    """

    def __init__(
        self,
        teachers: Sequence[GKDTeacher],
        args: GKDDistillationArguments,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        autocast: Callable[[], AbstractContextManager],
    ):
        self.teachers = tuple(teachers)
        self.args = args
        self.autocast = autocast
        self.mean = torch.tensor(image_mean, device=args.device).view(1, 3, 1, 1)
        self.std = torch.tensor(image_std, device=args.device).view(1, 3, 1, 1)
        self._mesh: DeviceMesh | None = None
        for teacher in self.teachers:
            self._prepare(teacher)
        cached = args.teacher_cache is not None
        self.caches = teacher_caches(self.teachers, args, self.mean, self.std) if cached else []

    def _prepare(self, teacher: GKDTeacher) -> None:
        args = self.args
        check_precision(teacher, args)
        if args.teacher_cache is not None and (teacher.sharded or self._is_shared(teacher)):
            raise InputError(
                f"teacher_cache cannot keep the tokens of '{teacher.called}', which is shared out to the processes: "
                "each of them would have to compute whenever one misses a view; set its sharding (teacher_sharding) "
                "to never, or leave teacher_cache out"
            )
        if args.bf16 and not teacher.sharded:
            teacher.halve()
        if not self._is_shared(teacher):
            teacher.place(args.device)
        if args.torch_compile:  # Trainer does it for the model; in place, so that the teacher stays what it is
            teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)

    def _is_shared(self, teacher: GKDTeacher) -> bool:
        wanted = {"auto": teacher.large, "always": True, "never": False}
        return wanted[teacher.sharding or self.args.teacher_sharding] and self.args.world_size > 1

    def __call__(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], keys: Sequence[bytes] | None = None
    ) -> tuple[EncoderOutput, ...]:
        """Return each teacher's tokens of the student's pixels B×3×H×W, on an h×w grid.

        Args:
            keys: of the views, by which a cache keeps them; None asks the teachers, whether there is one or not.
        """
        asked = [functools.partial(self.ask, teacher, pixel_values, grid) for teacher in self.teachers]
        if keys is None or not self.caches:
            return tuple(ask() for ask in asked)
        return tuple(
            cache(keys, grid, pixel_values.device, ask) for cache, ask in zip(self.caches, asked, strict=True)
        )

    def ask(self, teacher: GKDTeacher, pixel_values: torch.Tensor, grid: tuple[int, int]) -> EncoderOutput:
        """Return one teacher's tokens."""
        teacher.fit_geometry(pixel_values.shape[-1], grid)
        if self._is_shared(teacher) and not teacher.sharded:  # only now: it cannot be resampled afterwards
            if self._mesh is None:
                self._mesh = init_device_mesh(self.args.device.type, (self.args.world_size,))
            teacher.shard(self._mesh)
        with self.autocast():
            return teacher(pixel_values, grid, self.mean, self.std)


def first_batches(dataset: Dataset, args: GKDDistillationArguments) -> Iterator[list[dict[str, Any]]]:
    """Yield the first samples of a training, whatever its processes' number, in batches of `STATISTICS_BATCH`.

    Of a data set whose order is the user's own they are the first that it gives.
    """
    if isinstance(dataset, SampleStream):
        samples = iter(dataset.shard(STATISTICS_BATCH, rank=0, world_size=1))
    elif isinstance(dataset, IterableDataset):
        samples = iter(dataset)
    else:
        numbered = numbered_samples(dataset, args)
        samples = iter(map(dataset.__getitem__, range(len(dataset))))
        if numbered is not None:
            samples = map(numbered.__getitem__, numbered.order)
    samples = itertools.islice(samples, STATISTICS_IMAGES)
    while batch := list(itertools.islice(samples, STATISTICS_BATCH)):
        yield batch


class BeforeFirstStep(TrainerCallback):
    """Calls something when a training has loaded all it goes on from; before the callbacks that are added later."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Do it."""
        self.action()
