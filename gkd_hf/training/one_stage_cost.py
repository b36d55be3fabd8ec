"""What a training step of a one-stage method costs: segmenter, projections and teacher, see `step_cost`."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from gkd_hf.distillation.one_stage import ONE_STAGE
from gkd_hf.distillation.one_stage_distiller import OneStageDistiller
from gkd_hf.models.configuration_gkd import GKDStudentConfig
from gkd_hf.models.encoders import common_grid
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation, GKDStudentModel
from gkd_hf.task_teacher import TaskTeacher
from gkd_hf.training.step_cost import SegmentationStep, known_classes


class OneStageStep(SegmentationStep):
    """The step of a one-stage method.

    Args:
        student, teacher: their configurations. method: one of `ONE_STAGE`, method_settings: its keywords.
        geometry: of the teacher. settings: those of `SegmentationStep`; the encoder is trained.
    """

    def __init__(
        self,
        student: PreTrainedConfig,
        teacher: PreTrainedConfig,
        image_size: int,
        *,
        method: str,
        method_settings: dict[str, Any],
        geometry: str = "native",
        **settings: Any,
    ) -> None:
        super().__init__(student, image_size, frozen=False, **settings)
        self.teacher, self.geometry = teacher, geometry
        self.method, self.method_settings = method, method_settings

    def build(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.ModuleList | None]:
        model, student, heads, _ = super().build()
        teacher = TaskTeacher(copy.deepcopy(self.teacher), geometry=self.geometry)
        classes = self.head["num_labels"]
        method = ONE_STAGE[self.method](student.adapter.width, teacher.width, classes, **self.method_settings)
        if method.needs_logits:
            body = GKDStudentModel(GKDStudentConfig(encoder_config=copy.deepcopy(self.teacher)))
            with_head = GKDStudentForSemanticSegmentation.from_student(body, **self.head)
            teacher = TaskTeacher(copy.deepcopy(self.teacher), with_head, geometry=self.geometry)
        self.grid = common_grid(student.adapter, teacher.adapter, self.image_size)
        teacher.fit_geometry(self.image_size, self.grid)
        if self.bf16:
            teacher.halve()
        model.freeze_encoder(False, tokens_used=method.needs_tokens)
        self.blocks, self.logits = tuple(method.needs_blocks), method.needs_logits
        return OneStageDistiller(model, method), student, nn.ModuleList([*heads, method]), nn.ModuleList([teacher])

    def teach(self, teachers: nn.ModuleList | None, pixels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        mean = torch.zeros(1, 3, 1, 1)
        with self._autocast():
            taught = teachers[0].features(pixels, self.grid, mean, mean + 1, self.blocks)
        return (taught.patches, *taught.blocks, *([taught.logits] if self.logits else []))

    def loss(self, model: nn.Module, pixels: torch.Tensor, taught: tuple[torch.Tensor, ...]) -> torch.Tensor:
        labels = torch.zeros(len(pixels), self.image_size, self.image_size, dtype=torch.long)
        patches, *rest = taught
        logits = rest.pop() if self.logits else None
        with self._autocast(), known_classes(self.head["num_labels"]):
            return model(pixels, labels, patches, tuple(rest), logits, self.grid)["total"]
