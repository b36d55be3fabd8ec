"""Stage 1 of GKD: distil a frozen teacher into a student without labels (1a: a broad set, 1b: the source's images)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import TrainerCallback

from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.masking import random_masks
from gkd_hf.distillation.objective import GKDObjective, MSEObjective
from gkd_hf.errors import InputError
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.models.encoders import EncoderOutput
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments
from gkd_hf.training.artefacts import write_encoder
from gkd_hf.training.numbered_samples import PLACE
from gkd_hf.training.sharding import under, whole_model
from gkd_hf.training.stream_trainer import StreamTrainer

logger = logging.getLogger(__name__)

ATTENTION_STATISTICS = ("attention_entropy", "self_weight", "logit_std")
COLLAPSE_LOGS = 3  # consecutive logs with the self weight near chance before a warning


class MaskingCollator:
    """Batch samples and draw their masks, in the loader's workers.

    Args:
        stride: pixels per token of the grid the losses live on. arguments: p, r and the seed of the masks.
    """

    def __init__(self, stride: int, arguments: GKDDistillationArguments):
        self.stride = stride
        self.sample_probability = arguments.mask_probability
        self.patch_ratio = arguments.mask_ratio
        self.seed = arguments.seed

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `collate` does without labels, with grid (h, w), mask_rows M and masks M×(h·w)."""
        batch = collate([{key: sample[key] for key in sample if key != "labels"} for sample in samples])
        height, width = batch["pixel_values"].shape[-2:]
        grid = (max(1, round(height / self.stride)), max(1, round(width / self.stride)))
        # A data set's samples may have an `index` of their own, beside the place in the order that they are given.
        place = PLACE if PLACE in samples[0] else "index"
        if place in samples[0]:
            indices = [int(sample[place]) for sample in samples]
        else:  # a stream of the user's own does not tell places in the order: the random state decides
            indices = torch.randint(2**62, (len(samples),)).tolist()
        rows, masks = random_masks(
            indices,
            grid[0] * grid[1],
            sample_probability=self.sample_probability,
            patch_ratio=self.patch_ratio,
            seed=self.seed,
        )
        return batch | {"grid": grid, "mask_rows": rows, "masks": masks}


class GKDDistillationTrainer(StreamTrainer):
    """`Trainer` of GKD's stage 1 (arXiv 2603.02554).

    What it trains is one module, the student and its heads; the teacher stands beside it and is in no checkpoint.
    ``save_model`` saves the student alone.

    Args:
        student: the model to distil.
        teacher: a `GKDTeacher`, or what one is made from (a Hub id, a folder). Training in bf16 makes its weights
            bf16; ``args.teacher_sharding`` shares them out to the processes at the first batch.
        args: the paper's recipe by default; ``max_steps`` must be set for a stream.
        train_dataset: a `SampleStream`, whose uint8 pixels are normalised (and erased) on the device, or any data set
            of ``pixel_values`` 3×H×W in the student's normalisation.
        objective: heads to go on with, for example those of stage 1a; None makes new ones.

    Raises:
        InputError: a teacher or geometry that does not fit the student.
    """

    _tag_names = ["gkd", "knowledge-distillation"]
    artefact = "encoder"

    def __init__(
        self,
        student: GKDStudentModel,
        teacher: GKDTeacher | str | os.PathLike,
        args: GKDDistillationArguments,
        train_dataset: torch.utils.data.Dataset,
        *,
        objective: MSEObjective | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        title: str = "distil",
    ):
        self.teacher = teacher if isinstance(teacher, GKDTeacher) else GKDTeacher(teacher)
        if args.activation_checkpointing:
            student.check_activation_checkpointing()
        # A student whose tokens have their places dictates the grid; a CNN's map is resampled to the teacher's.
        grid_owner = student.adapter if student.adapter.owns_grid else self.teacher.adapter
        model = GKDDistiller(student, objective or self._new_objective(student, args))
        self._check_objective(model.objective, student)
        # Masks a batch never draws would leave their parameter without a gradient.
        wanted = args.mask_probability > 0 and args.mask_ratio > 0
        masked = wanted and int(args.mask_probability * args.per_device_train_batch_size + 1e-9) > 0
        if wanted and not masked:
            logger.warning(
                "No sample will be masked: mask_probability %g of a device batch of %d is less than one sample.",
                args.mask_probability,
                args.per_device_train_batch_size,
            )
        for name, parameter in student.named_parameters():
            if name.endswith(("mask_token", "mask_pixel")):
                parameter.requires_grad_(masked)
        super().__init__(
            model,
            args,
            train_dataset,
            data_collator=data_collator or MaskingCollator(grid_owner.stride, args),
            callbacks=callbacks,
            title=title,
        )
        wanted = {"auto": self.teacher.large, "always": True, "never": False}[args.teacher_sharding]
        self._share_teacher = wanted and args.world_size > 1
        if self.teacher.halved and not args.bf16:
            raise InputError(
                "the teacher's weights are bf16 (made so by halve() or by an earlier training in bf16), this training "
                "is in fp32: give it a new GKDTeacher, or set bf16=True"
            )
        if args.bf16 and not self.teacher.sharded:
            self.teacher.halve()
        if not self._share_teacher:
            self.teacher.to(args.device)
        if args.torch_compile:  # Trainer does it for the model; in place, so that the teacher stays what it is
            self.teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.student_mean = torch.tensor(student.config.image_mean, device=args.device).view(1, 3, 1, 1)
        self.student_std = torch.tensor(student.config.image_std, device=args.device).view(1, 3, 1, 1)
        self._near_chance = 0

    def _new_objective(self, student: GKDStudentModel, args: GKDDistillationArguments) -> MSEObjective:
        weights = (args.token_weight, args.feature_weight, args.patch_weight)
        if args.objective == "mse":
            return MSEObjective(student.adapter.width, self.teacher.width, weights)
        return GKDObjective(student.adapter.width, self.teacher.width, weights, args.attention_scale)

    def _check_objective(self, objective: MSEObjective, student: GKDStudentModel) -> None:
        projection = objective.patch.value.proj
        wanted = (student.adapter.width, self.teacher.width)
        if (projection.in_features, projection.out_features) != wanted:
            raise InputError(
                f"the heads map {projection.in_features} to {projection.out_features} channels, student and teacher "
                f"need {wanted[0]} to {wanted[1]}"
            )

    @property
    def student(self) -> GKDStudentModel:
        """The student that is trained."""
        return self.model.student

    @property
    def objective(self) -> MSEObjective:
        """The heads, for the next stage to go on with."""
        return self.model.objective

    def teach(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> EncoderOutput:
        """Return the teacher's tokens of the student's pixels B×3×H×W on an h×w grid."""
        self.teacher.fit_geometry(pixel_values.shape[-1], grid)
        if self._share_teacher and not self.teacher.sharded:  # only now, because it cannot be resampled afterwards
            self.teacher.shard(init_device_mesh(self.args.device.type, (self.args.world_size,)))
        with self.autocast():
            return self.teacher(pixel_values, grid, self.student_mean, self.student_std)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the total loss of a micro batch; its terms are logged."""
        self._follow_query_warmup()
        self.note_bad_rows(inputs.get("bad_rows", []))
        streamed = isinstance(self.train_dataset, SampleStream)
        pixel_values = self.train_dataset.normalised(inputs) if streamed else inputs["pixel_values"]
        grid = tuple(inputs["grid"])
        taught = self.teach(pixel_values, grid)
        look = self._attention_is_logged()
        with self.autocast():
            losses = model(
                pixel_values, taught.patches, taught.cls, grid, inputs["mask_rows"], inputs["masks"], attention=look
            )
        if look:
            self._attention = {name: losses.pop(name) for name in ATTENTION_STATISTICS}
            self._chance = 1 / taught.patches.shape[1]
        self.watch(losses)
        return (losses["total"], losses) if return_outputs else losses["total"]

    # -- query warm-up and collapse ---------------------------------------------------------------------------------

    def _follow_query_warmup(self) -> None:
        if not isinstance(self.objective, GKDObjective) or not self.args.query_warmup_steps:
            return
        step = self.state.global_step
        if step < self.args.query_warmup_steps:
            self.objective.set_query_enabled(False)
        elif step == self.args.query_warmup_steps:
            # Also after a restart at this very step; repeating it within the step's micro batches changes nothing.
            self.objective.start_query_from_value()
            if self.average is not None:
                self.average.restart(("objective.patch.query.", "objective.feature.query."))
        else:
            self.objective.set_query_enabled(True)

    def _attention_is_logged(self) -> bool:
        """Whether this step's end logs, and there is attention to look at."""
        if not isinstance(self.objective, GKDObjective) or not self.objective.feature.query_enabled:
            return False
        return (self.state.global_step + 1) % max(1, int(self.state.logging_steps)) == 0

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add attention entropy, self weight and logit spread, and warn when the attention has collapsed."""
        attention = self.__dict__.pop("_attention", None)
        if attention is not None and "loss" in logs:
            logs.update({name: value.item() for name, value in attention.items()})
            self._near_chance = self._near_chance + 1 if logs["self_weight"] < 2 * self._chance else 0
            if self._near_chance == COLLAPSE_LOGS:
                logger.warning(
                    "QSD attention has collapsed: a token's weight on its own position is %.4f, chance is %.4f. The "
                    "heads learn a codebook instead of the teacher's tokens. Set query_warmup_steps, or an "
                    "attention_scale below 1.",
                    logs["self_weight"],
                    self._chance,
                )
        super().log(logs, start_time)

    # -- for others ---------------------------------------------------------------------------------------------------

    def export(self, folder: str | os.PathLike, facts: RunFacts, image_size: int) -> None:
        """Write the student's encoder to a folder as a plain transformers model; every process must call it."""
        model = whole_model(self)
        if self.is_world_process_zero():
            write_encoder(Path(folder), model.student, facts, image_size)

    def card_settings(self) -> dict[str, Any]:
        """Student, teacher and method in a recipe's keys."""
        names = [model.config.name_or_path for model in (self.student.encoder, self.teacher.encoder)]
        return super().card_settings() | {
            "method": {"qsd": "gkd"}.get(self.args.objective, self.args.objective),
            "student": {"encoder": names[0] or None, "pretrained": bool(names[0])},
            "teacher": {"name": names[1], "geometry": self.teacher.geometry} if names[1] else None,
        }

    def write_model(self, folder: str | os.PathLike, weights: dict[str, torch.Tensor]) -> None:
        """Write the student alone to a folder."""
        self.student.save_pretrained(folder, state_dict=under("student.", weights))
