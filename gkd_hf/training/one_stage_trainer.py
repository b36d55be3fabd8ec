"""Training of the one-stage methods: encoder and head learn the task and from the teacher at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gkd_hf.data.streaming import EvaluationSet
from gkd_hf.distillation.one_stage import ONE_STAGE, Features, OneStageMethod
from gkd_hf.distillation.one_stage_distiller import OneStageDistiller
from gkd_hf.errors import InputError
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.training.arguments import GKDSegmentationArguments
from gkd_hf.training.segmentation_trainer import GKDSegmentationTrainer


class GKDOneStageTrainer(GKDSegmentationTrainer):
    """`Trainer` of knowledge distillation during the task (KD, CWD, Af-DCD, ViTKD), which GKD is compared with.

    What it trains is one module, the segmenter and the method's projections; the teacher stands beside it and is in no
    checkpoint. ``save_model`` saves the segmenter alone.

    Args:
        model: the segmenter. method: what is compared with the teacher's features.
        teacher: with a head where the method needs logits. args: ``freeze_encoder`` must be False.
        train_dataset, eval_dataset, settings: as of `GKDSegmentationTrainer`.

    Raises:
        InputError: a frozen encoder, a teacher without the head that the method needs, or sharded processes.
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
        self.method = method
        self.teacher = teacher
        super().__init__(model, args, train_dataset, eval_dataset, **settings)
        if args.bf16:
            teacher.halve()
        teacher.to(args.device)
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
        size = pixel_values.shape[-1]
        student = self.segmenter.student.adapter
        stride = student.stride if student.owns_grid else self.teacher.adapter.stride
        grid = tuple(max(1, round(side / stride)) for side in pixel_values.shape[-2:])
        self.teacher.fit_geometry(size, grid)
        with self.autocast():
            return self.teacher.features(
                pixel_values, grid, self.student_mean, self.student_std, tuple(self.method.needs_blocks)
            )

    def losses(self, model: nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the task's and the method's losses, see `OneStageDistiller`."""
        taught = self.teach(pixels)
        with self.autocast():
            return model(pixels, labels, taught.patches, taught.blocks, taught.logits, tuple(taught.grid))
