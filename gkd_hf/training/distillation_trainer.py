"""Stage 1 of GKD: distil a frozen teacher into a student without labels (1a: a broad set, 1b: the source's images)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from gkd_hf.data.streaming import SampleStream, collate
from gkd_hf.distillation.distiller import GKDDistiller
from gkd_hf.distillation.masking import random_masks
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import GKDObjective, MSEObjective
from gkd_hf.distillation.standardise import TokenStatistics
from gkd_hf.errors import InputError
from gkd_hf.hub.run_facts import RunFacts
from gkd_hf.models.encoders import EncoderOutput, grid_owner
from gkd_hf.models.modeling_gkd import GKDStudentModel
from gkd_hf.teacher import GKDTeacher
from gkd_hf.training.arguments import GKDDistillationArguments
from gkd_hf.training.artefacts import write_encoder
from gkd_hf.training.new_heads import check_objective, new_objective
from gkd_hf.training.numbered_samples import places_of
from gkd_hf.training.process_group import several
from gkd_hf.training.sharding import share_buffers, under, whole_model
from gkd_hf.training.stream_trainer import StreamTrainer
from gkd_hf.training.teacher_cache import CacheKeeper, CachingCollator, check_views
from gkd_hf.training.teaching import BeforeFirstStep, Teaching, as_teachers, first_batches

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
        self.rank = arguments.process_index

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return what `collate` does without labels, with grid (h, w), mask_rows M and masks M×(h·w)."""
        batch = collate([{key: sample[key] for key in sample if key != "labels"} for sample in samples])
        height, width = batch["pixel_values"].shape[-2:]
        grid = (max(1, round(height / self.stride)), max(1, round(width / self.stride)))
        rows, masks = random_masks(
            places_of(samples, self.rank),
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
        teacher: a `GKDTeacher`, or what one is made from (a Hub id, a folder); or a list of them, each with its own
            heads. The losses of several are weighted by their ``weight``, and their tokens standardised, on one grid:
            the student's where its adapter owns the grid, else the first teacher's. Training in bf16 makes their
            weights bf16; ``args.teacher_sharding`` shares them out to the processes at the first batch.
        args: the paper's recipe by default; ``max_steps`` must be set for a stream.
        train_dataset: a `SampleStream`, whose uint8 pixels are normalised (and erased) on the device, or any data set
            of ``pixel_values`` 3×H×W in the student's normalisation.
        objective: heads to go on with, for example those of stage 1a, with the statistics of the teachers' tokens;
            None makes new ones, and estimates the statistics from the first images.

    Raises:
        InputError: a teacher or geometry that does not fit the student, a teacher that is given twice, a cache of a
            stream whose views do not come back, ``early_backward`` where models are sharded.
    """

    _tag_names = ["gkd", "knowledge-distillation"]
    artefact = "encoder"

    def __init__(
        self,
        student: GKDStudentModel,
        teacher: GKDTeacher | str | os.PathLike | Sequence[GKDTeacher | str | os.PathLike],
        args: GKDDistillationArguments,
        train_dataset: torch.utils.data.Dataset,
        *,
        objective: MSEObjective | MultiTeacherObjective | None = None,
        data_collator: Callable[[list[dict[str, Any]]], dict[str, Any]] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        title: str = "distil",
    ):
        self.teachers = as_teachers(teacher)
        if args.activation_checkpointing:
            student.check_activation_checkpointing()
        # A student whose tokens have their places dictates the grid; a CNN's map is resampled to the teacher's.
        owner = grid_owner(student.adapter, self.teacher.adapter)
        model = GKDDistiller(student, objective or new_objective(student, self.teachers, args))
        check_objective(model.objective, student, self.teachers)
        # Masks a batch never draws would leave their parameter without a gradient.
        wanted = args.mask_probability > 0 and args.mask_ratio > 0
        masked = wanted and int(args.mask_probability * args.per_device_train_batch_size + 1e-9) > 0
        if wanted and not masked:
            logger.warning(
                "No sample will be masked: mask_probability %g of a device batch of %d is less than one sample.",
                args.mask_probability,
                args.per_device_train_batch_size,
            )
        if 0 < args.max_steps <= args.query_warmup_steps:
            logger.warning(
                "The query branches are never used: query_warmup_steps %d is not less than the %d steps of training.",
                args.query_warmup_steps,
                args.max_steps,
            )
        for name, parameter in student.named_parameters():
            if name.endswith(("mask_token", "mask_pixel")):
                parameter.requires_grad_(masked)
        super().__init__(
            model,
            args,
            train_dataset,
            data_collator=data_collator or MaskingCollator(owner.stride, args),
            callbacks=[BeforeFirstStep(self._fit_standardisation), *(callbacks or [])],
            title=title,
        )
        model.early_backward = self._runs_backward_early()
        if args.teacher_cache is not None:
            check_views(train_dataset)  # before the teachers' weights are hashed and folders made
        statistics = (student.config.image_mean, student.config.image_std)
        self._teaching = Teaching(self.teachers, args, *statistics, self.autocast)
        self.cache: CacheKeeper | None = None
        if self._teaching.caches:
            self.cache = CacheKeeper(self._teaching.caches)
            self.add_callback(self.cache)
            self.data_collator = CachingCollator(self.data_collator, [each.store for each in self._teaching.caches])
        self._near_chance: dict[str, int] = {}

    def _runs_backward_early(self) -> bool:
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        if self.args.early_backward and sharded:
            raise InputError("early_backward does not go with FSDP or DeepSpeed: leave it out, or train with DDP")
        if self.args.early_backward is None:
            return self.args.device.type == "cuda" and not (sharded or self.args.torch_compile)
        return self.args.early_backward

    @property
    def teacher(self) -> GKDTeacher:
        """The teacher; of several the first, on whose grid the losses live unless the student owns it."""
        return self.teachers[0]

    @property
    def student(self) -> GKDStudentModel:
        """The student that is trained."""
        return self.model.student

    @property
    def objective(self) -> MSEObjective | MultiTeacherObjective:
        """The heads, with the statistics of tokens that are standardised, for the next stage to go on with."""
        return self.model.objective

    def teach(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], keys: Sequence[bytes] | None = None
    ) -> tuple[EncoderOutput, ...]:
        """Return the tokens of each teacher of the student's pixels B×3×H×W, on an h×w grid.

        With the views' ``keys`` and ``args.teacher_cache`` those that were seen before are read, not computed.
        """
        return self._teaching(pixel_values, grid, keys)

    def pixels(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Return a batch's pixels as the student takes them, float32 B×3×H×W; bytes are normalised on their device."""
        streamed = isinstance(self.train_dataset, SampleStream)
        return self.train_dataset.normalised(inputs) if streamed else inputs["pixel_values"]

    def _fit_standardisation(self) -> None:
        """Estimate what standardises the teachers' tokens, unless a checkpoint or the heads have brought it.

        Every process reads the same images, because a teacher that is shared out needs all of them; what the main one
        finds is then the statistics of all.
        """
        unfitted = self.objective.unfitted() if isinstance(self.objective, MultiTeacherObjective) else []
        if not unfitted:
            return
        found = {k: TokenStatistics() for k, _ in unfitted}
        # Teachers see another batch size here than later: nothing is compiled for it. Nor is a random number of the
        # training's drawn.
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            for samples in first_batches(self.train_dataset, self.args):
                inputs = self._prepare_inputs(self.data_collator(samples))
                for k, statistics in found.items():
                    taught = self._teaching.ask(self.teachers[k], self.pixels(inputs), tuple(inputs["grid"]))
                    statistics.add(taught.patches, taught.cls)
        for k, standardise in unfitted:
            standardise.fit(found[k])
            if several():
                share_buffers(standardise)

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
        pixel_values, grid = self.pixels(inputs), tuple(inputs["grid"])
        self.args.check_masked(grid[0] * grid[1])
        taught = self.teach(pixel_values, grid, inputs.get("view_keys"))
        patches, cls = tuple(each.patches for each in taught), tuple(each.cls for each in taught)
        if not isinstance(self.objective, MultiTeacherObjective):
            (patches,), (cls,) = patches, cls
        look = self._attention_is_logged()
        with self.autocast():
            losses = model(pixel_values, patches, cls, grid, inputs["mask_rows"], inputs["masks"], attention=look)
        if look:
            seen = [name for name in losses if name.rpartition("/")[2] in ATTENTION_STATISTICS]
            self._attention = {name: losses.pop(name) for name in seen}
            self._chance = 1 / (grid[0] * grid[1])
        self.watch(losses)
        return (losses["total"], losses) if return_outputs else losses["total"]

    # -- query warm-up and collapse ---------------------------------------------------------------------------------

    def _query_objectives(self) -> dict[str, GKDObjective]:
        """The objectives that have query branches, by the prefix of their parameters' names in the model."""
        found = self.objective.named_modules(prefix="objective")
        return {f"{name}.": module for name, module in found if isinstance(module, GKDObjective)}

    def _follow_query_warmup(self) -> None:
        if not self.args.query_warmup_steps:
            return
        step = self.state.global_step
        for prefix, objective in self._query_objectives().items():
            if step < self.args.query_warmup_steps:
                objective.set_query_enabled(False)
            elif step == self.args.query_warmup_steps:
                # Also after a restart at this very step; repeating it within the step's micro batches changes nothing.
                objective.start_query_from_value()
                if self.average is not None:
                    self.average.restart((f"{prefix}patch.query.", f"{prefix}feature.query."))
            else:
                objective.set_query_enabled(True)

    def _attention_is_logged(self) -> bool:
        """Whether this step's end logs, and there is attention to look at."""
        if (self.state.global_step + 1) % max(1, int(self.state.logging_steps)):
            return False
        return any(objective.feature.query_enabled for objective in self._query_objectives().values())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add attention entropy, self weight and logit spread, and warn when the attention has collapsed."""
        attention = self.__dict__.pop("_attention", None)
        if attention is not None and "loss" in logs:
            logs.update({name: value.item() for name, value in attention.items()})
            for name in attention:
                if name.rpartition("/")[2] == "self_weight":
                    self._look_for_collapse(name.rpartition("/")[0], logs[name])
        super().log(logs, start_time)

    def _look_for_collapse(self, teacher: str, self_weight: float) -> None:
        near = self._near_chance[teacher] = (
            self._near_chance.get(teacher, 0) + 1 if self_weight < 2 * self._chance else 0
        )
        if near == COLLAPSE_LOGS:
            logger.warning(
                "QSD attention%s has collapsed: a token's weight on its own position is %.4f, chance is %.4f. The "
                "heads learn a codebook instead of the teacher's tokens. Set query_warmup_steps, or an "
                "attention_scale below 1.",
                f" to {teacher}" if teacher else "",
                self_weight,
                self._chance,
            )

    # -- for others ---------------------------------------------------------------------------------------------------

    def export(self, folder: str | os.PathLike, facts: RunFacts, image_size: int) -> None:
        """Write the student's encoder to a folder as a plain transformers model; every process must call it."""
        model = whole_model(self)
        if self.is_world_process_zero():
            write_encoder(Path(folder), model.student, facts, image_size)

    def card_settings(self) -> dict[str, Any]:
        """Student, teachers and method in a recipe's keys."""
        name = self.student.encoder.config.name_or_path
        teachers = [
            {"name": each.encoder.config.name_or_path, "geometry": each.geometry, "weight": each.weight}
            for each in self.teachers
            if each.encoder.config.name_or_path
        ]
        one = len(self.teachers) == 1
        return super().card_settings() | {
            "method": {"qsd": "gkd"}.get(self.args.objective, self.args.objective),
            "student": {"encoder": name or None, "pretrained": bool(name)},
            "teacher": {key: teachers[0][key] for key in ("name", "geometry")} if one and teachers else None,
            **({} if one else {"teachers": teachers}),
        }

    def write_model(self, folder: str | os.PathLike, weights: dict[str, torch.Tensor]) -> None:
        """Write the student alone to a folder."""
        self.student.save_pretrained(folder, state_dict=under("student.", weights))
