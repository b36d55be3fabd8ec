"""One-stage baselines: kd, cwd, af_dcd and vitkd, which distil while the task is learned.

Each is a loss on the features of both networks, with the projections it trains beside the student; the task's own loss
is added by whoever trains.
"""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.nn import functional as F

from gkd_hf.distillation.one_stage_base import (
    Features,
    OneStageMethod,
    check_positive,
    convolutions,
    divergence,
    pixel_divergence,
    same_size,
)
from gkd_hf.distillation.one_stage_contrast import AugmentationFreeContrast
from gkd_hf.distillation.query_based import Projection
from gkd_hf.errors import InputError, nearest
from gkd_hf.models.encoder_adapter import EncoderAdapter

__all__ = [
    "ONE_STAGE",
    "AugmentationFreeContrast",
    "ChannelWiseDistillation",
    "Features",
    "KnowledgeDistillation",
    "OneStageMethod",
    "ViTKD",
    "check_method",
]


class KnowledgeDistillation(OneStageMethod):
    """Plain knowledge distillation of features, or of logits (Hinton et al., arXiv 1503.02531).

    ``feature``: mean over B·N·C_t of (Linear(LN(F_s)) − F_t)², F the patch tokens.
    ``logits``: τ²·KL(softmax(z_t/τ) ‖ softmax(z_s/τ)) over the classes of a pixel, mean over pixels and batch.

    Args:
        student_dim: C_s. teacher_dim: C_t. num_labels: K.
        target: ``"features"`` or ``"logits"``. weight: of the one term. temperature: τ, for logits.

    Raises:
        InputError: a setting outside its range, another target, or a temperature where no logits are compared.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_labels: int,
        *,
        target: str = "features",
        weight: float = 1.0,
        temperature: float = 1.0,
    ):
        if target not in ("features", "logits"):
            raise InputError(f"kd: target must be 'features' or 'logits', got {target!r}")
        check_positive("kd", temperature=temperature)
        if target == "features" and temperature != 1:
            raise InputError(f"kd: temperature {temperature} needs target 'logits'; features have no softmax")
        self.needs_logits = target == "logits"
        super().__init__(num_labels, {"logits" if self.needs_logits else "feature": weight})
        self.temperature = float(temperature)
        self.head = None if self.needs_logits else Projection(student_dim, teacher_dim)

    def terms(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        if self.head is None:
            return {"logits": pixel_divergence(student.logits, teacher.logits, self.temperature)}
        return {"feature": F.mse_loss(self.head(student.patches).float(), teacher.patches.float())}


class ChannelWiseDistillation(OneStageMethod):
    """Channel-wise distillation, CWD (Shu et al., ICCV 2021, arXiv 2011.13256).

    Each channel of a map becomes a distribution over its places, softmax over h·w of y/τ, and both terms are
    τ²/(B·C)·Σ over samples and channels of KL(teacher ‖ student). ``logits`` compares the class scores, C = K;
    ``feature`` the patch tokens as maps, the student's through 1×1 convolution, batch norm and ReLU, C = C_t.

    Weights and the logits' τ are the paper's. In the authors' published training program one criterion, with one τ,
    serves both maps: hence the features' τ.

    Args:
        student_dim: C_s. teacher_dim: C_t. num_labels: K.
        logits_weight: 0 leaves the logits out, and none are needed. feature_weight: 0 leaves the features out.
        logits_temperature, feature_temperature: τ.

    Raises:
        InputError: a setting outside its range.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_labels: int,
        *,
        logits_weight: float = 3.0,
        feature_weight: float = 50.0,
        logits_temperature: float = 4.0,
        feature_temperature: float = 4.0,
    ):
        check_positive("cwd", logits_temperature=logits_temperature, feature_temperature=feature_temperature)
        super().__init__(num_labels, {"logits": logits_weight, "feature": feature_weight})
        self.needs_logits = "logits" in self.weights
        self.logits_temperature, self.feature_temperature = float(logits_temperature), float(feature_temperature)
        self.align = None
        if "feature" in self.weights:
            convolution = nn.Conv2d(student_dim, teacher_dim, kernel_size=1, bias=False)  # the norm has a bias
            self.align = nn.Sequential(convolution, nn.BatchNorm2d(teacher_dim), nn.ReLU())

    def terms(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        terms = {}
        if self.needs_logits:
            maps = same_size(student.logits, teacher.logits)
            terms["logits"] = _channel_divergence(*maps, self.logits_temperature)
        if self.align is not None:
            aligned = self.align(student.patch_map())
            terms["feature"] = _channel_divergence(aligned, teacher.patch_map(), self.feature_temperature)
        return terms


class ViTKD(OneStageMethod):
    """Feature distillation of plain transformers, ViTKD (Yang et al., arXiv 2209.02432).

    ``mimic``: Σ over the first two blocks of Σ (Linear(F_s) − F_t)² / B, each block with its own Linear.
    ``generation``: the last block's tokens, after the final norm, through a Linear; a part r of them is replaced by a
    learned token, 3×3 convolution, ReLU, 3×3 convolution restore them on their grid, and the term is the squared error
    summed over the replaced places, / (r·B).

    Args:
        student_dim: C_s. teacher_dim: C_t. num_labels: K.
        mimic_weight: 0 leaves the first blocks out, and none are needed. generation_weight: 0 leaves the last one out.
        mask_ratio: r.

    Raises:
        InputError: a setting outside its range.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        num_labels: int,
        *,
        mimic_weight: float = 3e-5,
        generation_weight: float = 3e-6,
        mask_ratio: float = 0.5,
    ):
        if not 0 < mask_ratio < 1:
            raise InputError(f"vitkd: mask_ratio must lie in (0, 1), got {mask_ratio}")
        super().__init__(num_labels, {"mimic": mimic_weight, "generation": generation_weight})
        self.mask_ratio = mask_ratio if "generation" in self.weights else 0.0
        self.needs_blocks = (1, 2) if "mimic" in self.weights else ()
        self.mimic = nn.ModuleList(nn.Linear(student_dim, teacher_dim) for _ in self.needs_blocks)
        self.align = self.restore = None
        if "generation" in self.weights:
            self.align, self.restore = nn.Linear(student_dim, teacher_dim), convolutions(teacher_dim)
            self.mask_token = nn.Parameter(torch.zeros(teacher_dim))

    def terms(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        batch = len(student.patches)
        terms = {}
        if self.needs_blocks:
            blocks = zip(self.mimic, student.blocks, teacher.blocks, strict=True)
            errors = [(linear(own).float() - other.float()).square().sum() for linear, own, other in blocks]
            terms["mimic"] = sum(errors) / batch
        if self.align is not None:
            aligned = self.align(student.patches)
            replaced = hidden[..., None]
            aligned = torch.where(replaced, self.mask_token.to(aligned.dtype), aligned)
            restored = self.restore(aligned.transpose(1, 2).unflatten(2, student.grid)).flatten(2).transpose(1, 2)
            error = (restored.float() - teacher.patches.float()).square().masked_fill(~replaced, 0.0)
            terms["generation"] = error.sum() / (self.mask_ratio * batch)
        return terms


ONE_STAGE: dict[str, type[OneStageMethod]] = {
    "kd": KnowledgeDistillation,
    "cwd": ChannelWiseDistillation,
    "af_dcd": AugmentationFreeContrast,
    "vitkd": ViTKD,
}


def check_method(
    name: str, student: EncoderAdapter, teacher: EncoderAdapter, grid: tuple[int, int], **settings: object
) -> None:
    """Refuse what a one-stage method cannot do, before anything is trained.

    Args:
        name: of the method in `ONE_STAGE`. student, teacher: adapters of the two encoders.
        grid: (h, w) of the tokens that are compared. settings: keywords of the method.

    Raises:
        InputError: an unknown method or setting, a setting outside its range, a grid too small, or an encoder without
            the blocks that are compared.
    """
    if name not in ONE_STAGE:
        raise InputError(f"'{name}' is no one-stage method{nearest(name, ONE_STAGE)} (known: {', '.join(ONE_STAGE)})")
    kind = ONE_STAGE[name]
    parameters = inspect.signature(kind).parameters.values()
    known = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    for setting in settings:
        if setting not in known:
            raise InputError(f"{name} has no setting '{setting}'{nearest(setting, known)} (known: {', '.join(known)})")
    with torch.device("meta"):  # weights of no size: only what the constructor refuses matters here
        method = kind(student.width, teacher.width, 1, **settings)
    method.check_grid(grid)
    for who, adapter in (("student", student), ("teacher", teacher)):
        deepest = max(method.needs_blocks, default=0)
        if deepest and (adapter.num_blocks is None or adapter.num_blocks < deepest):
            has = "no blocks of one grid" if adapter.num_blocks is None else f"only {adapter.num_blocks} block"
            raise InputError(
                f"{name} compares the tokens of blocks 1 to {deepest}, but the {who} ('{adapter.config.model_type}') "
                f"has {has}; take a plain vision transformer there, or another method"
            )


def _channel_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """τ²/(B·C)·Σ KL(teacher ‖ student) of B×C×h×w maps whose channels are distributions over the places."""
    batch, channels = student.shape[:2]
    return divergence(student.flatten(2), teacher.flatten(2), temperature, dim=2) / (batch * channels)
