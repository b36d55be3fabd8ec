"""Memory per GPU and hours of a recipe's stages on any number of GPUs, from simulated steps.

A step is simulated for two batch sizes; between and beyond them memory is affine in the batch, moment by moment,
because every tensor of a step either grows with the images or does not depend on them. What processes share is then
reckoned, not simulated:

- DDP: whole weights, gradients and optimiser on every GPU, and gradient buckets as large as the gradients.
- FSDP2: a part in N of weights, gradients and optimiser states, and, gathered, what lies outside the layers, and two
  layers of the largest kind (the one at work and the one that is fetched ahead), as weights and as gradients, in
  fp32, as the trainers have it.
- A sharded teacher: a part in N of its weights, and gathered as above, without gradients.
- Gradients that are accumulated over micro batches are there from the first one's backward pass on; under FSDP2
  whole, too, because they are cut when they are shared, in the last micro batch.

Hours are the floating-point operations of the stage, recomputed ones included, over what the GPUs do at the stated
utilisation. Decoding, evaluation, communication and checkpoints are in that utilisation or not at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from gkd_hf.methods import ONE_STAGE_METHODS
from gkd_hf.teacher import LARGE
from gkd_hf.training.one_stage_cost import OneStageStep
from gkd_hf.training.recipe import DistillationRecipe, Recipe, StageRecipe
from gkd_hf.training.recipe_data import task_label_space
from gkd_hf.training.scale_question import ScaleQuestion
from gkd_hf.training.stage_arguments import encoder_is_trained, method_of
from gkd_hf.training.step_cost import MOVING, DistillationStep, SegmentationStep, StepCost, masked_images

GIGABYTE = 10**9
RESERVED = 1.5 * GIGABYTE  # held by CUDA, cuBLAS and NCCL before the first tensor
BATCHES = (8, 16)  # simulated of the distillation stages
TASK_BATCHES = (1, 2)  # of the task stage, whose loss goes through the images one by one
LARGEST_RUN = 512  # GPUs of the table's last row


@dataclass(frozen=True)
class Layout:
    """How a stage is laid out: GPUs, micro batches per step, FSDP2 or DDP, activations recomputed or kept."""

    gpus: int
    accumulation: int = 1
    fsdp: bool = False
    checkpointing: bool = False


@dataclass
class Footprint:
    """Bytes on one GPU at a step's worst moment, by part; ``teacher_work``: what the teacher's own forward takes."""

    parts: dict[str, float] = field(default_factory=dict)
    teacher_work: float = 0.0
    phase: str = ""

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def fits(self, memory: float) -> bool:
        """Whether it goes into ``memory`` GB."""
        return self.total <= memory * GIGABYTE


class StageScale:
    """Memory and time of one stage in any `Layout`.

    Args:
        name: of the stage, or of the baseline that is trained in the task's place. stage: the recipe's.
        costs: `Step.costs` of two batches, the smaller first. teacher_sharding: auto, always or never; of each teacher
            if it is several. sharded_costs: of the steps that FSDP2 does, where they differ.
    """

    def __init__(
        self,
        name: str,
        stage: StageRecipe,
        costs: dict[bool, tuple[StepCost, ...] | None],
        teacher_sharding: str | Sequence[str] = "auto",
        sharded_costs: dict[bool, tuple[StepCost, ...] | None] | None = None,
    ) -> None:
        self.name, self.stage = name, stage
        self.costs = costs
        self.sharded_costs = sharded_costs or costs
        self.teacher_sharding = teacher_sharding

    @property
    def key(self) -> str:
        """Of the recipe's stages, the one whose settings these are."""
        return self.name if isinstance(self.stage, DistillationRecipe) else "task"

    @property
    def title(self) -> str:
        """What is trained: a stage or a baseline."""
        return f"{'stage' if self.name == self.key else 'baseline'} {self.name}"

    @property
    def recomputes(self) -> bool:
        """Whether the recipe has the stage compute activations again, and something is trained that can."""
        return self.stage.activation_checkpointing and self.costs[True] is not None

    @property
    def refuses_fsdp(self) -> bool:
        """Whether the recipe asks for what does not go with FSDP2."""
        return isinstance(self.stage, DistillationRecipe) and bool(self.stage.early_backward)

    @property
    def runs_backward_early(self) -> bool:
        """Whether DDP keeps one view's activations at a time, and FSDP2 both."""
        return self.sharded_costs is not self.costs

    def shares(self, gpus: int, accumulation: int | None = None) -> bool:
        """Whether the stage's batch can be shared by so many GPUs."""
        return self.stage.batch_size % (gpus * (accumulation or self.stage.gradient_accumulation_steps)) == 0

    def masks_nothing(self, gpus: int, accumulation: int | None = None) -> bool:
        """Whether no image is masked on so many GPUs, because too few of them are in a GPU's micro batch."""
        stage = self.stage
        if not isinstance(stage, DistillationRecipe) or stage.mask_probability == 0 or stage.mask_ratio == 0:
            return False
        images = stage.batch_size // gpus // (accumulation or stage.gradient_accumulation_steps)
        return masked_images(stage.mask_probability, images) == 0

    def layouts(self, gpus: int, accumulation: int | None = None) -> Iterator[Layout]:
        """DDP and, on several GPUs, FSDP2 if it can be, each without and with activation checkpointing if there is."""
        accumulation = accumulation or self.stage.gradient_accumulation_steps
        for fsdp in (False, True) if gpus > 1 and not self.refuses_fsdp else (False,):
            for checkpointing in (False, True) if self.costs[True] else (False,):
                yield Layout(gpus, accumulation, fsdp, checkpointing)

    def step_flops(self, checkpointing: bool) -> float:
        """Floating-point operations of one step over all GPUs, with those that are done a second time."""
        cost = (self.costs[checkpointing] or self.costs[False])[1]
        return cost.flops / cost.batch * self.stage.batch_size

    def hours(self, steps: int, gpus: int, checkpointing: bool, question: ScaleQuestion) -> float:
        """Hours of the stage."""
        speed = gpus * question.tflops * 1e12 * question.utilisation
        return steps * self.step_flops(checkpointing) / speed / 3600

    def footprint(self, layout: Layout) -> Footprint:
        """Memory of one GPU."""
        costs = (self.sharded_costs if layout.fsdp else self.costs)[layout.checkpointing]
        batch = self.stage.batch_size / layout.gpus / layout.accumulation
        # Gradients that are sharded or accumulated are there all the time; the others come with the backward pass.
        standing_gradients = layout.fsdp or layout.accumulation > 1
        counted = np.array([1, 1, 1, *((0, 0) if standing_gradients else (1, 1))])
        worst, phase, work = np.zeros(len(MOVING)), "", 0.0
        for name in costs[0].moments:
            moments = _between(batch, *((cost.batch, cost.moments[name]) for cost in costs)) * counted
            highest = moments[moments.sum(1).argmax()]
            if phase == "" or highest.sum() > worst.sum():
                worst, phase = highest, name
            if name == "teacher":
                work = float(highest.sum())
        moving = dict(zip(MOVING, worst.tolist(), strict=True))
        parts = self._standing(costs[0], layout, standing_gradients)
        parts["student's gradients"] += moving.pop("student's gradients")
        parts["heads"] += moving.pop("heads' gradients")
        return Footprint(parts | moving, work, phase)

    def _standing(self, cost: StepCost, layout: Layout, gradients: bool) -> dict[str, float]:
        """What is there all the time; gradients too, if they are sharded or accumulated."""
        student, heads, n = cost.student, cost.heads, layout.gpus
        trained = student.trained + heads.trained
        share = n if layout.fsdp else 1
        states = cost.optimiser / max(1, trained)
        kept = 4 * (share if layout.accumulation > 1 else 1) if gradients else 0
        parts = {
            "student's weights": student.bytes / share,
            "student's gradients": kept * student.trained / share,
            "optimiser's states": states * student.trained / share,
            "heads": (heads.bytes + (kept + states) * heads.trained) / share,
        }
        if self.stage.ema_decay is not None:
            parts["weight average"] = 4 * trained / share
        if layout.fsdp:
            layers = sum(w.outside + 2 * w.largest_layer for w in (student, heads))
            learning = sum(w.outside + 2 * w.largest_layer for w in (student, heads) if w.trained)
            parts["gathered layers"] = 4 * (layers + learning)
        elif n > 1:
            parts["gradient buckets"] = 4 * trained
        for teacher, shared in zip(cost.teachers, self.shards_teachers(n), strict=True):
            own = teacher.bytes
            if shared:
                layers = teacher.outside + 2 * teacher.largest_layer
                own = teacher.bytes / n + teacher.bytes / teacher.parameters * layers
            parts["teacher's weights"] = parts.get("teacher's weights", 0) + own
        parts["CUDA and NCCL"] = RESERVED
        return parts

    def shards_teachers(self, gpus: int) -> list[bool]:
        """Whether each teacher is cut over the processes."""
        teachers, wanted = self.costs[False][0].teachers, self.teacher_sharding
        shardings = [wanted] * len(teachers) if isinstance(wanted, str) else wanted[: len(teachers)]
        return [
            gpus > 1 and (sharding == "always" or (sharding == "auto" and teacher.parameters >= LARGE))
            for teacher, sharding in zip(teachers, shardings, strict=True)
        ]

    def ways_to_fit(self, gpus: int, memory: float) -> list[tuple[Layout, Footprint]]:
        """Layouts on so many GPUs that fit, the least change first: each of the three alone, then any together.

        None of them masks nothing.
        """
        own = Layout(gpus, self.stage.gradient_accumulation_steps, False, self.recomputes)
        found = []
        for fsdp, checkpointing in ((False, False), (False, True), (True, False), (True, True)):
            if (fsdp and (gpus == 1 or self.refuses_fsdp)) or (checkpointing and not self.costs[True]):
                continue
            checkpointing = checkpointing or own.checkpointing
            for accumulation in self._accumulations(gpus):
                layout = Layout(gpus, accumulation, fsdp, checkpointing)
                footprint = self.footprint(layout)
                if footprint.fits(memory):
                    found.append((layout, footprint))
                    break
        alone = [each for each in found if _changes(own, each[0]) == 1]
        return list({each[0]: each for each in alone or found[:1]}.values())

    def _accumulations(self, gpus: int) -> list[int]:
        images = self.stage.batch_size // gpus
        least = self.stage.gradient_accumulation_steps
        possible = (each for each in range(least, images + 1) if images % each == 0)
        return [each for each in possible if not self.masks_nothing(gpus, each)]

    def smallest(self, memory: float) -> Layout | None:
        """The fewest GPUs of the table's rows on which the stage fits as it is, in any layout; None: on none.

        Rows that mask nothing do not count.
        """
        for gpus in (each for each in rows(self.stage, LARGEST_RUN) if not self.masks_nothing(each)):
            for layout in self.layouts(gpus):
                if self.footprint(layout).fits(memory):
                    return layout
        return None


def _changes(before: Layout, after: Layout) -> int:
    pairs = [(before.accumulation, after.accumulation), (before.fsdp, after.fsdp)]
    return sum(a != b for a, b in [*pairs, (before.checkpointing, after.checkpointing)])


def _between(batch: float, first: tuple[int, np.ndarray], second: tuple[int, np.ndarray]) -> np.ndarray:
    """The moments of a step of ``batch`` images, from those of two other batches.

    Operation by operation where both steps have the same ones. Mask2Former's loss goes through the images one by one,
    so that its steps differ in length: there their highest moments stand for all.
    """
    (x, a), (y, b) = first, second
    if len(a) != len(b):
        a, b = (each[[each.sum(1).argmax()]] for each in (a, b))
    return np.maximum(0.0, a + (b - a) * (batch - x) / (y - x))


def rows(stage: StageRecipe, largest: int) -> list[int]:
    """1, 2, 4, … GPUs that can share the stage's batch."""
    powers = (2**power for power in range(int(math.log2(largest)) + 1))
    return [gpus for gpus in powers if stage.batch_size % (gpus * stage.gradient_accumulation_steps) == 0]


def stage_scale(recipe: Recipe, name: str, stage: StageRecipe, student: object, *teachers: object) -> StageScale:
    """Simulate a stage's steps.

    Args:
        name: of the stage, or of the baseline that is trained in the task's place: end to end.
        student, teachers: `plan.PlannedEncoder`s; the configurations of those that the stage needs are known.

    Raises:
        InputError: an image size or decode head that does not suit the student.
    """
    distils = isinstance(stage, DistillationRecipe)
    batches = BATCHES if distils else TASK_BATCHES

    settings = {"precision": "fp32" if stage.precision == "fp32" else "bf16", "patch_size": stage.patch_size}
    sharded_costs = None
    if distils:
        distillation = partial(
            DistillationStep,
            student.config,
            [teacher.config for teacher in teachers],
            stage.image_size,
            method=recipe.method,
            geometries=[each.geometry for each in recipe.all_teachers.values()],
            standardise=[each.standardise for each in recipe.all_teachers.values()],
            mask_probability=stage.mask_probability,
            mask_ratio=stage.mask_ratio,
            **settings,
        )
        # Compiled and sharded steps keep both views' activations.
        early = not stage.compile if stage.early_backward is None else stage.early_backward
        step = distillation(early_backward=early)
        sharded_costs = distillation().costs(batches) if early else None
    else:
        settings |= {
            "decode_head": stage.decode_head,
            "classes": len(task_label_space(recipe).classes),
            "norm_feature_maps": stage.norm_feature_maps,
        }
        frozen, method = not encoder_is_trained(recipe, name), method_of(recipe, name)
        if method in ONE_STAGE_METHODS:
            settings |= {"method": method, "method_settings": recipe.method_settings(method)}
            settings["geometry"] = recipe.teacher.geometry
            step = OneStageStep(student.config, teachers[0].config, stage.image_size, **settings)
        else:
            step = SegmentationStep(student.config, stage.image_size, frozen=frozen, **settings)
    costs = step.costs(batches)
    if not distils and frozen and recipe.baselines:
        costs[True] = None  # activation_checkpointing is for those then
    # While the task is learned, a teacher is whole on every GPU.
    return StageScale(
        name,
        stage,
        costs,
        [each.sharding if distils else "never" for each in recipe.all_teachers.values()],
        sharded_costs,
    )
