"""Af-DCD: dense contrast of channel groups within patches, without augmented views."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from gkd_hf.distillation.one_stage_base import (
    Features,
    OneStageMethod,
    check_positive,
    convolutions,
    pixel_divergence,
)
from gkd_hf.errors import InputError


class AugmentationFreeContrast(OneStageMethod):
    """Augmentation-free dense contrastive distillation, Af-DCD (Fan et al., NeurIPS 2023).

    The student's patch map is aligned to C_t channels (1×1 convolution), a part of its positions is set to 0, and
    3×3 convolution, ReLU, 3×3 convolution restore it to F̂. Three terms:

    - ``logits``: as in `KnowledgeDistillation`.
    - ``feature``: Σ (F̂ − F_t)² / B.
    - ``contrast``: both maps are max-pooled, their channels cut into groups, their positions into square patches.
      The similarity of two groups' vectors is −‖a − b‖₁/τ; F̂'s vector of a position and group is to be told, by cross
      entropy, from the teacher's of the other groups anywhere in that patch: its positive is the teacher's at the same
      position and group. Summed over groups, mean over positions and batch, as the authors' published loss does.

    Positions beyond the last whole patch are left out of the contrast.

    Args:
        student_dim: C_s. teacher_dim: C_t. num_labels: K.
        logits_weight: 0 leaves the logits out, and none are needed. feature_weight, contrast_weight: of the other two.
        logits_temperature: τ of the logits. contrast_temperature: τ of the similarities.
        mask_ratio: part of the positions set to 0. pool: side of the max-pooling. patch: side of a patch, in pooled
            positions. groups: of consecutive channels.

    Raises:
        InputError: a setting outside its range, or a teacher whose channels do not cut into the groups.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_labels: int,
        *,
        logits_weight: float = 1.0,
        feature_weight: float = 4e-5,
        contrast_weight: float = 1e-3,
        logits_temperature: float = 1.0,
        contrast_temperature: float = 0.07,
        mask_ratio: float = 0.75,
        pool: int = 4,
        patch: int = 4,
        groups: int = 16,
    ):
        check_positive("af_dcd", logits_temperature=logits_temperature, contrast_temperature=contrast_temperature)
        check_positive("af_dcd", pool=pool, patch=patch)
        if not 0 <= mask_ratio < 1:
            raise InputError(f"af_dcd: mask_ratio must lie in [0, 1), got {mask_ratio}")
        if groups < 2:
            raise InputError(f"af_dcd: groups must be at least 2, for there to be others to tell from; got {groups}")
        if teacher_dim % groups:
            raise InputError(
                f"af_dcd: the teacher's {teacher_dim} channels do not cut into {groups} groups of equal width; "
                f"set groups to a divisor of {teacher_dim}"
            )
        weights = {"logits": logits_weight, "feature": feature_weight, "contrast": contrast_weight}
        super().__init__(num_labels, weights)
        if not self.weights.keys() & {"feature", "contrast"}:
            raise InputError("af_dcd: feature_weight and contrast_weight are both 0; for logits alone take kd")
        self.needs_logits = "logits" in self.weights
        self.logits_temperature, self.contrast_temperature = float(logits_temperature), float(contrast_temperature)
        self.mask_ratio, self.pool, self.patch, self.groups = mask_ratio, pool, patch, groups
        self.align = nn.Conv2d(student_dim, teacher_dim, kernel_size=1)
        self.restore = convolutions(teacher_dim)

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise `InputError` if the pooled map does not hold one patch."""
        pooled = grid[0] // self.pool, grid[1] // self.pool
        if "contrast" in self.weights and min(pooled) < self.patch:
            raise InputError(
                f"af_dcd: {grid[0]}×{grid[1]} tokens pooled by {self.pool} leave {pooled[0]}×{pooled[1]}, fewer than "
                f"one {self.patch}×{self.patch} patch; take a larger image, or pool · patch ≤ {min(grid)}"
            )

    def terms(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        aligned, target = self.align(student.patch_map()), teacher.patch_map().float()
        batch, _, height, width = aligned.shape
        if hidden is not None:
            aligned = aligned.masked_fill(hidden.view(batch, 1, height, width), 0.0)
        restored = self.restore(aligned).float()
        terms = {}
        if self.needs_logits:
            terms["logits"] = pixel_divergence(student.logits, teacher.logits, self.logits_temperature)
        if "feature" in self.weights:
            terms["feature"] = (restored - target).square().sum() / batch
        if "contrast" in self.weights:
            terms["contrast"] = self._contrast(restored, target)
        return terms

    def _contrast(self, restored: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        vectors, others = self._group_vectors(restored), self._group_vectors(target)
        similarity = -torch.cdist(vectors, others, p=1) / self.contrast_temperature
        count = similarity.shape[-1]
        group = torch.arange(count, device=similarity.device) % self.groups
        itself = torch.eye(count, dtype=torch.bool, device=similarity.device)
        compared = itself | (group[:, None] != group)
        loss = similarity.masked_fill(~compared, -torch.inf).logsumexp(-1) - similarity.diagonal(dim1=1, dim2=2)
        return loss.sum() / (loss.numel() / self.groups)

    def _group_vectors(self, maps: torch.Tensor) -> torch.Tensor:
        """Cut B×C×h×w maps into (B · patches) × (positions of a patch · groups) × (channels of a group)."""
        maps = F.max_pool2d(maps, self.pool)
        side, height, width = self.patch, maps.shape[2] // self.patch, maps.shape[3] // self.patch
        maps = maps[:, :, : height * side, : width * side]
        cut = maps.unflatten(1, (self.groups, -1)).unflatten(3, (height, side)).unflatten(5, (width, side))
        # B × groups × channels × rows × side × columns × side
        return cut.permute(0, 3, 5, 4, 6, 1, 2).flatten(0, 2).flatten(1, 3)
