"""Everything a one-stage method trains, in one module: the segmenter and what projects its features."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gkd_hf.distillation.one_stage import Features, OneStageMethod
from gkd_hf.models.encoders import resample_tokens
from gkd_hf.models.modeling_gkd import GKDStudentForSemanticSegmentation


class OneStageDistiller(nn.Module):
    """A segmenter that learns the task and from a teacher at once, as one module for a trainer to wrap.

    Args:
        segmenter: encoder and head, both trained. method: its projections and losses.
    """

    def __init__(self, segmenter: GKDStudentForSemanticSegmentation, method: OneStageMethod):
        super().__init__()
        self.segmenter = segmenter
        self.method = method
        self._no_split_modules = segmenter._no_split_modules

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the segmenter's activations in the backward pass, as `TrainingArguments` can ask for."""
        self.segmenter.activation_checkpointing_enable(**settings)

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor,
        teacher_patches: torch.Tensor,
        teacher_blocks: tuple[torch.Tensor, ...],
        teacher_logits: torch.Tensor | None,
        grid: tuple[int, int],
        hidden: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch of B images.

        Args:
            pixel_values: B×3×H×W. labels: B×H×W train ids.
            teacher_patches: B×N×C_t on the (h, w) ``grid``, N = h·w. teacher_blocks: B×N×C_t each, those the method
                needs. teacher_logits: B×K×h'×w' if it needs them.
            hidden: B×N bool, positions that the method hides; None lets it draw them.

        Returns:
            ``total``, ``task``, the decode head's own terms, and the method's terms, unweighted.
        """
        output = self.segmenter(
            pixel_values, labels, output_student=True, output_blocks=tuple(self.method.needs_blocks)
        )
        own = output.student.grid
        student = Features(
            resample_tokens(output.student.last_hidden_state, own, grid),
            grid,
            tuple(resample_tokens(tokens, own, grid) for tokens in output.student.blocks or ()),
            output.logits,
        )
        terms = self.method(student, Features(teacher_patches, grid, teacher_blocks, teacher_logits), hidden)
        distilled = terms.pop("total")
        return {"total": output.loss + distilled, "task": output.loss, **(output.loss_terms or {}), **terms}
