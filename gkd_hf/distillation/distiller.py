"""Everything stage 1 trains, in one module: the student and its heads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gkd_hf.distillation.early_backward import backward_early
from gkd_hf.distillation.multi_teacher import MultiTeacherObjective
from gkd_hf.distillation.objective import MSEObjective
from gkd_hf.models.encoders import resample_tokens
from gkd_hf.models.modeling_gkd import GKDStudentModel, frozen_running_statistics


class GKDDistiller(nn.Module):
    """Student and heads of stage 1 (GKD, arXiv 2603.02554), as one module for a trainer to wrap.

    Each image is seen whole; the masked samples are seen a second time, and only they are: for the others the second
    view would be the first one, so 1.5·B student forwards give the loss that 2·B would.

    Batch norms in train mode normalise each of the two forwards by its own statistics. Only the view of whole images
    feeds the running statistics, because that is what the student will be used on.

    Args:
        student: to be distilled. objective: heads and losses, of one teacher or of several.
        early_backward: run the backward pass of the whole images before the forward pass of the masked ones, so that
            the activations of one of the two views live at a time; see `backward_early`. It changes the order of sums
            alone, but not every way of training a module bears it: FSDP2, DeepSpeed and torch.compile do not.
    """

    def __init__(
        self,
        student: GKDStudentModel,
        objective: MSEObjective | MultiTeacherObjective,
        early_backward: bool = False,
    ):
        super().__init__()
        self.student = student
        self.objective = objective
        self.early_backward = early_backward
        self._no_split_modules = student._no_split_modules  # the heads are sharded with what is left

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Recompute the student's activations in the backward pass, as `TrainingArguments` can ask for."""
        self.student.activation_checkpointing_enable(**settings)

    def forward(
        self,
        pixel_values: torch.Tensor,
        teacher_patches: torch.Tensor | Sequence[torch.Tensor],
        teacher_cls: torch.Tensor | Sequence[torch.Tensor],
        grid: tuple[int, int],
        mask_rows: torch.Tensor,
        masks: torch.Tensor,
        attention: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of a batch of B images.

        Args:
            pixel_values: B×3×H×W. teacher_patches: B×N×C_t. teacher_cls: B×C_t. For a `MultiTeacherObjective` one of
                each per teacher.
            grid: (h, w) of the teachers' patches, h·w = N; a CNN's map is resampled to it.
            mask_rows: M ≤ B places of the samples to mask. masks: M×N, True where a patch is hidden.
            attention: also look at the attention of the first two samples. Here and not later, because sharded
                heads have their weights only while the forward lasts.

        Returns:
            The objective's named losses, and what its ``attention_statistics`` returns if asked for.
        """
        if self.early_backward and len(mask_rows) and torch.is_grad_enabled():
            taught = (teacher_patches, teacher_cls)
            return self._one_view_at_a_time(taught, attention, pixel_values, grid, mask_rows, masks)
        patches, masked_patches, cls, mask = self.views(pixel_values, grid, mask_rows, masks)
        losses = self.objective(
            student_patches=patches,
            student_patches_masked=masked_patches,
            student_cls=cls,
            teacher_patches=teacher_patches,
            teacher_cls=teacher_cls,
            mask=mask,
        )
        if attention:
            losses |= self.objective.attention_statistics(patches[:2], teacher_patches)
        return losses

    def views(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], mask_rows: torch.Tensor, masks: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return what the student says of a batch, seen whole and masked; see `forward` for the arguments.

        Returns:
            Patch tokens B×N×C_s of the whole images, B×N×C_s in which the masked samples' are those of their second
            view, class tokens B×C_s of the whole images, and the mask B×N, None if nothing is masked.
        """
        patches, cls = self._whole_view(pixel_values, grid)
        if not len(mask_rows):
            return patches, patches, cls, None
        seen_masked = self._masked_view(pixel_values, grid, mask_rows, masks)
        masked_patches = patches.index_copy(0, mask_rows, seen_masked.to(patches.dtype))
        mask = masks.new_zeros(len(patches), masks.shape[1]).index_copy(0, mask_rows, masks)
        return patches, masked_patches, cls, mask

    def _whole_view(self, pixel_values: torch.Tensor, grid: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
        whole = self.student(pixel_values)
        return resample_tokens(whole.last_hidden_state, whole.grid, grid), whole.pooler_output

    def _masked_view(
        self, pixel_values: torch.Tensor, grid: tuple[int, int], mask_rows: torch.Tensor, masks: torch.Tensor
    ) -> torch.Tensor:
        with frozen_running_statistics(self.student):
            masked = self.student(pixel_values[mask_rows], bool_masked_pos=masks, mask_grid=grid)
        return resample_tokens(masked.last_hidden_state, masked.grid, grid)

    def _one_view_at_a_time(
        self,
        taught: tuple[Any, Any],
        attention: bool,
        pixel_values: torch.Tensor,
        grid: tuple[int, int],
        mask_rows: torch.Tensor,
        masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return what `forward` does; ``taught`` is what teachers say of patches, and of classes."""

        def of_whole_images() -> dict[str, torch.Tensor]:
            patches, cls = self._whole_view(pixel_values, grid)
            losses = self.objective.whole_view(patches, cls, *taught, _others(mask_rows, len(pixel_values)))
            return losses | (self.objective.attention_statistics(patches[:2], taught[0]) if attention else {})

        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        losses = backward_early(of_whole_images, trained)
        patches = self._masked_view(pixel_values, grid, mask_rows, masks)
        of_masked = self.objective.masked_view(patches, *taught, mask_rows, masks)
        return {name: loss + of_masked[name] if name in of_masked else loss for name, loss in losses.items()}


def _others(rows: torch.Tensor, count: int) -> torch.Tensor:
    """Return the numbers below ``count`` that are not in the unique ``rows``, without waiting for the device."""
    taken = torch.zeros(count, dtype=torch.uint8, device=rows.device).index_fill(0, rows, 1)
    return taken.argsort(stable=True)[: count - len(rows)]
