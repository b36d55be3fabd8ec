"""Training of the one-stage methods: encoder and head learn the task and from the teacher at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gkd_hf.data.streaming import EvaluationSet
from gkd_hf.distillation.masking import random_masks
from gkd_hf.distillation.one_stage import ONE_STAGE, Features, OneStageMethod
from gkd_hf.distillation.one_stage_distiller import OneStageDistiller
from gkd_hf.errors import InputError
from gkd_hf.models.encoders import grid_owner
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.training.arguments import GKDSegmentationArguments
from gkd_hf.training.numbered_samples import places_of
from gkd_hf.training.segmentation_trainer import GKDSegmentationTrainer
from gkd_hf.training.teaching import check_precision


class HidingCollator:
    """Batch samples and draw the positions that a method hides from each, in the loader's workers.

    Args:
        batch: what batches samples without that. stride: pixels per token of the grid that is compared.
        ratio: part of the positions. args: the training's, for its seed.
    """

    def __init__(
        self,
        batch: Callable[[list[dict[str, Any]]], dict[str, Any]],
        stride: int,
        ratio: float,
        args: GKDSegmentationArguments,
    ):
        self.batch, self.stride, self.ratio = batch, stride, ratio
        self.seed, self.rank = args.seed, args.process_index

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch of B samples with ``hidden`` B×N, True where a position of the h×w = N tokens is hidden."""
        batch = self.batch(samples)
        height, width = grid_of(batch["pixel_values"], self.stride)
        hidden = torch.zeros(len(samples), height * width, dtype=torch.bool)
        rows, masks = random_masks(
            places_of(samples, self.rank),
            height * width,
            sample_probability=1.0,
            patch_ratio=self.ratio,
            seed=self.seed,
        )
        hidden[rows] = masks
        return batch | {"hidden": hidden}


class GKDOneStageTrainer(GKDSegmentationTrainer):
    """`Trainer` of knowledge distillation during the task (KD, CWD, Af-DCD, ViTKD), which GKD is compared with.

    What it trains is one module, the segmenter and the method's projections; the teacher stands beside it and is in no
    checkpoint. ``save_model`` saves the segmenter alone.

    Masks hang on the seed and the samples' places in the run's order alone, as those of stage 1 do.

    Args:
        model: the segmenter. method: what is compared with the teacher's features.
        teacher: with a head where the method needs logits; every process holds all of it, whatever its ``sharding``,
            and its tokens are compared as they are, whatever its ``standardise``. args: ``freeze_encoder`` must be
            False.
        train_dataset, eval_dataset, settings: as of `GKDSegmentationTrainer`.

    Raises:
        InputError: a frozen encoder, a teacher without the head that the method needs or with one for another number
            of classes, or a teacher in bf16 for a training in fp32.
    """

    encoder_prefix = "segmenter.student."

    def __init__(
        self,
        model: GKDStudentForSemanticSegmentation,
        method: OneStageMethod,
        teacher: TaskTeacher,
        args: GKDSegmentationArguments,
        train_dataset: torch.utils.data.Dataset,
        eval_dataset: dict[str, EvaluationSet] | None = None,
        **settings: Any,
    ):
        if args.freeze_encoder:
            raise InputError("a one-stage method trains the encoder, too: set freeze_encoder=False")
        if method.needs_logits and teacher.decode_head is None:
            raise InputError(
                "this method compares logits, and the teacher has no head: learn one on the source first (a segmenter "
                "on the frozen teacher), and give it to TaskTeacher"
            )
        if method.needs_logits and not model.config.num_labels == teacher.num_labels == method.num_labels:
            raise InputError(
                f"this method compares logits of {method.num_labels} classes, the segmenter has "
                f"{model.config.num_labels}, the teacher's head {teacher.num_labels}: all must be the same"
            )
        check_precision(teacher, args)
        self.method = method
        self.teacher = teacher
        self.token_stride = grid_owner(model.student.adapter, teacher.adapter).stride
        super().__init__(model, args, train_dataset, eval_dataset, **settings)
        if method.mask_ratio:
            self.data_collator = HidingCollator(self.data_collator, self.token_stride, method.mask_ratio, args)
        if args.bf16:
            teacher.halve()
        teacher.place(args.device)
        if args.torch_compile:
            teacher.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode)
        self.student_mean = torch.tensor(model.config.image_mean, device=args.device).view(1, 3, 1, 1)
        self.student_std = torch.tensor(model.config.image_std, device=args.device).view(1, 3, 1, 1)

    def trained(self, model: GKDStudentForSemanticSegmentation) -> nn.Module:
        """The segmenter and the method's projections."""
        model.freeze_encoder(False, tokens_used=self.method.needs_tokens)
        return OneStageDistiller(model, self.method)

    def segmenter_of(self, trained: nn.Module) -> GKDStudentForSemanticSegmentation:
        """The segmenter in a `OneStageDistiller`."""
        return trained.segmenter

    def card_settings(self) -> dict[str, Any]:
        """Method and teacher in a recipe's keys; a method of one's own is called by its class."""
        kind = type(self.method)
        own = next((name for name, each in ONE_STAGE.items() if each is kind), kind.__name__)
        name = self.teacher.encoder.config.name_or_path
        teacher = {"name": name, "geometry": self.teacher.geometry} if name else None
        return super().card_settings() | {"method": own, "teacher": teacher}

    def teach(self, pixel_values: torch.Tensor) -> Features:
        """Return the teacher's features of the student's pixels B×3×H×W."""
        grid = grid_of(pixel_values, self.token_stride)
        self.teacher.fit_geometry(pixel_values.shape[-1], grid)
        with self.autocast():
            return self.teacher.features(
                pixel_values, grid, self.student_mean, self.student_std, tuple(self.method.needs_blocks)
            )

    def losses(self, model: nn.Module, pixels: torch.Tensor, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the task's and the method's losses, see `OneStageDistiller`."""
        taught, labels = self.teach(pixels), inputs["labels"].long()
        with self.autocast():
            return model(
                pixels,
                labels,
                taught.patches,
                taught.blocks,
                taught.logits,
                tuple(taught.grid),
                inputs.get("hidden"),
            )


def grid_of(pixel_values: torch.Tensor, stride: int) -> tuple[int, int]:
    """Return the (h, w) grid of tokens of B×3×H×W pixels."""
    height, width = pixel_values.shape[-2:]
    return max(1, round(height / stride)), max(1, round(width / stride))
