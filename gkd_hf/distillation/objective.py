"""Stage-1 objectives: three heads, three mean squared errors, one weighted sum (GKD, arXiv 2603.02554)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from gkd_hf.distillation.query_based import ProjectionDistillation, QuerySoftDistillation
from gkd_hf.errors import InputError


class MSEObjective(nn.Module):
    """GKD's losses with plain LN + Linear heads: the "two-stage MSE" of the paper's ablation.

    Args:
        student_dim: C_s. teacher_dim: C_t.
        weights: λ of the token, feature and patch loss.

    Raises:
        InputError: a negative weight, or all of them 0.
    """

    def __init__(self, student_dim: int, teacher_dim: int, weights: tuple[float, float, float] = (1.0, 1.0, 1.0)):
        super().__init__()
        if len(weights) != 3 or min(weights) < 0 or not any(weights):
            raise InputError(f"the token, feature and patch weights must be ≥ 0 and not all 0, got {tuple(weights)}")
        self.weights = tuple(float(weight) for weight in weights)
        self.patch, self.feature, self.token = (self._head(student_dim, teacher_dim) for _ in range(3))

    def _head(self, student_dim: int, teacher_dim: int) -> nn.Module:
        return ProjectionDistillation(student_dim, teacher_dim)

    def forward(
        self,
        student_patches: torch.Tensor,
        student_patches_masked: torch.Tensor,
        student_cls: torch.Tensor,
        teacher_patches: torch.Tensor,
        teacher_cls: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        """Compute the losses of one batch.

        Args:
            student_patches: B×N×C_s of the whole image. student_patches_masked: B×N×C_s, in which some samples were
                seen with patches hidden. student_cls: B×C_s of the whole image.
            teacher_patches: B×N×C_t. teacher_cls: B×C_t; neither gets a gradient.
            mask: B×N, True where the masked view had the patch hidden; None if it had none hidden.

        Returns:
            ``total`` and, unweighted, ``token`` (class token, over B·C_t), ``feature`` (class and patch tokens, over
            B·(N+1)·C_t) and ``patch`` (masked view, over all B·N·C_t). In fp32, whatever the tokens are in.

        Raises:
            InputError: shapes that do not fit together.
        """
        _check_shapes(student_patches, student_patches_masked, student_cls, teacher_patches, teacher_cls, mask)
        target, target_cls = teacher_patches.detach(), teacher_cls.detach()
        token, feature = self._whole_losses(student_patches, student_cls, target, target_cls)
        patch = self._patch_loss(self.patch(student_patches_masked, target), target, mask, target.numel())
        return self._weighted(token, feature, patch)

    def whole_view(
        self,
        student_patches: torch.Tensor,
        student_cls: torch.Tensor,
        teacher_patches: torch.Tensor,
        teacher_cls: torch.Tensor,
        shown: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute what the whole images contribute to the losses; `masked_view` has the rest, and they add up.

        Args:
            student_patches, student_cls, teacher_patches, teacher_cls: as `forward` takes them.
            shown: places of the B − M samples of which no masked view is taken.

        Returns:
            ``token``, ``feature``, the part of ``patch`` of the shown samples, and ``total``, their weighted sum.

        Raises:
            InputError: shapes that do not fit together.
        """
        _check_shapes(student_patches, student_patches, student_cls, teacher_patches, teacher_cls, None)
        target, target_cls = teacher_patches.detach(), teacher_cls.detach()
        token, feature = self._whole_losses(student_patches, student_cls, target, target_cls)
        patch = torch.zeros_like(token)
        if len(shown):  # attention kernels refuse a batch of none
            own = target[shown]
            patch = self._patch_loss(self.patch(student_patches[shown], own), own, None, target.numel())
        return self._weighted(token, feature, patch)

    def masked_view(
        self,
        student_patches: torch.Tensor,
        teacher_patches: torch.Tensor,
        teacher_cls: torch.Tensor,
        mask_rows: torch.Tensor,
        masks: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Compute what the masked views contribute to the losses; `whole_view` has the rest, and they add up.

        Args:
            student_patches: M×N×C_s of the masked views. teacher_patches: B×N×C_t of all images. teacher_cls: is not
                looked at. mask_rows: places of the M samples. masks: M×N, True where a patch was hidden.

        Returns:
            The masked samples' part of ``patch``, and of ``total``.
        """
        values, target = teacher_patches.numel(), teacher_patches.detach()[mask_rows]
        patch = self._patch_loss(self.patch(student_patches, target), target, masks, values)
        return {"total": self.weights[2] * patch, "patch": patch}

    def _whole_losses(
        self, patches: torch.Tensor, cls: torch.Tensor, target: torch.Tensor, target_cls: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the token and the feature loss."""
        # Errors, not means, so that the class token's is used twice but computed once.
        token_error = _squared_error(self.token(cls[:, None], target_cls[:, None])[:, 0], target_cls)
        feature_error = _squared_error(self.feature(patches, target), target)
        token = token_error / target_cls.numel()
        return token, (token_error + feature_error) / (target_cls.numel() + target.numel())

    def _weighted(self, token: torch.Tensor, feature: torch.Tensor, patch: torch.Tensor) -> dict[str, torch.Tensor]:
        total = sum(weight * loss for weight, loss in zip(self.weights, (token, feature, patch), strict=True))
        return {"total": total, "token": token, "feature": feature, "patch": patch}

    def _patch_loss(
        self, prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, values: int
    ) -> torch.Tensor:
        """Return the patch loss of these samples; ``values`` is B·N·C_t of the whole batch, theirs and the others'."""
        return _squared_error(prediction, target) / values


class ProteusObjective(MSEObjective):
    """Proteus's objective (ICLR 2025): LN + Linear heads, the patch loss on the hidden patches alone.

    ``patch`` is Σ over hidden patches and channels of (prediction − target)² / (hidden patches · C_t): the mean over
    what the student did not see, in place of the mean over all B·N·C_t. Token and feature loss are GKD's. Without a
    hidden patch it is 0, and so are its gradients: they are there, as gradient reduction over processes expects.
    """

    def _patch_loss(
        self, prediction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor | None, values: int
    ) -> torch.Tensor:
        if mask is None:
            mask = torch.zeros(target.shape[:2], dtype=torch.bool, device=target.device)
        error = (prediction.float() - target.float()).square().masked_fill(~mask[..., None], 0.0)
        # Counted on the device: asking for the number here would wait for it in every step.
        return error.sum() / (mask.sum() * target.shape[-1]).clamp_min(1)


class GKDObjective(MSEObjective):
    """Query-based soft distillation of class token, features and masked patches: GKD's stage-1 objective.

    State-dict keys are ``{patch,feature,token}.{query,value}.{norm,proj}.{weight,bias}``. The token head attends over
    a single key, so its query branch can have no gradient: it is kept for loading, and neither computed nor optimised.

    Args:
        student_dim: C_s. teacher_dim: C_t.
        weights: λ of the token, feature and patch loss.
        attention_scale: factor on the attention logits; the paper has 1.0.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        weights: tuple[float, float, float] = (1.0, 1.0, 1.0),
        attention_scale: float = 1.0,
    ):
        if attention_scale <= 0:
            raise InputError(f"attention_scale must be positive, got {attention_scale}")
        self.attention_scale = attention_scale
        super().__init__(student_dim, teacher_dim, weights)
        self.token.query.requires_grad_(False)

    def _head(self, student_dim: int, teacher_dim: int) -> nn.Module:
        return QuerySoftDistillation(student_dim, teacher_dim, self.attention_scale)

    def set_query_enabled(self, enabled: bool) -> None:
        """Switch the query branches off (LN + Linear heads, for a warm-up) or on again."""
        self.patch.query_enabled = self.feature.query_enabled = enabled

    def start_query_from_value(self) -> None:
        """End a warm-up: copy each value branch into its query branch and switch the queries on."""
        self.patch.start_query_from_value()
        self.feature.start_query_from_value()

    def attention_statistics(self, student: torch.Tensor, teacher_patches: torch.Tensor) -> dict[str, torch.Tensor]:
        """Describe the feature head's attention; see `QuerySoftDistillation.attention_statistics`.

        Args:
            student: B×N×C_s, one or two samples. teacher_patches: N×C_t of at least as many.
        """
        return self.feature.attention_statistics(student, teacher_patches[: len(student)])


OBJECTIVES: dict[str, type[MSEObjective]] = {"qsd": GKDObjective, "mse": MSEObjective, "proteus": ProteusObjective}


def _squared_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (prediction.float() - target.float()).square().sum()


def _check_shapes(
    patches: torch.Tensor,
    masked: torch.Tensor,
    cls: torch.Tensor,
    target: torch.Tensor,
    target_cls: torch.Tensor,
    mask: torch.Tensor | None,
) -> None:
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("student_patches and student_patches_masked", lambda: patches.shape == masked.shape),
        ("student_patches and teacher_patches (batch, tokens)", lambda: patches.shape[:2] == target.shape[:2]),
        ("student_cls and student_patches", lambda: cls.shape == (patches.shape[0], patches.shape[2])),
        ("teacher_cls and teacher_patches", lambda: target_cls.shape == (target.shape[0], target.shape[2])),
        ("mask and student_patches", lambda: mask is None or mask.shape == patches.shape[:2]),
    ]
    for what, agree in checks:
        if not agree():
            shapes = {
                "student_patches": tuple(patches.shape),
                "student_patches_masked": tuple(masked.shape),
                "student_cls": tuple(cls.shape),
                "teacher_patches": tuple(target.shape),
                "teacher_cls": tuple(target_cls.shape),
            }
            if mask is not None:
                shapes["mask"] = tuple(mask.shape)
            raise InputError(f"{what} do not fit together: {shapes}")
