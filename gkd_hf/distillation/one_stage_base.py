"""What the one-stage methods share: what they compare, how their terms are added up, the divergences, the masks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional as F

from gkd_hf.errors import InputError


@dataclass
class Features:
    """What one network says of B images, as the one-stage methods compare it.

    Attributes:
        patches: B×N×C patch tokens after the final norm, on the grid common to student and teacher.
        grid: (h, w) with h·w = N.
        blocks: B×N×C patch tokens after each of the blocks in `OneStageMethod.needs_blocks`, in that order.
        logits: B×K×H×W class scores; None for methods that do not need them.
    """

    patches: torch.Tensor
    grid: tuple[int, int]
    blocks: tuple[torch.Tensor, ...] = ()
    logits: torch.Tensor | None = None

    def detached(self) -> Features:
        """Return the same features without their graph."""
        logits = None if self.logits is None else self.logits.detach()
        blocks = tuple(block.detach() for block in self.blocks)
        return replace(self, patches=self.patches.detach(), blocks=blocks, logits=logits)

    def patch_map(self) -> torch.Tensor:
        """Return the patch tokens as a B×C×h×w map."""
        return self.patches.transpose(1, 2).unflatten(2, self.grid)


class OneStageMethod(nn.Module, ABC):
    """Base of the methods that distil while the task is learned: named terms, added up with their weights.

    Whatever is trained gets a gradient in every forward, as gradient reduction over processes expects. Terms of weight
    0 are neither computed nor given parameters.

    Attributes:
        needs_logits: whether both networks' class scores are compared.
        needs_blocks: 1-based places of the blocks whose tokens are compared, the same ones in both networks.
        mask_ratio: part r of each sample's positions that are hidden from the student's features; 0 hides none.

    Args:
        num_labels: K, the classes that logits have. weights: of the terms, by name.

    Raises:
        InputError: a negative weight, or all of them 0.
    """

    needs_logits: bool = False
    needs_blocks: tuple[int, ...] = ()
    mask_ratio: float = 0.0

    def __init__(self, num_labels: int, weights: dict[str, float]):
        super().__init__()
        if not all(weight >= 0 for weight in weights.values()) or not any(weights.values()):
            raise InputError(f"{type(self).__name__}: weights must be ≥ 0 and not all 0, got {weights}")
        self.num_labels = num_labels
        self.weights = {name: float(weight) for name, weight in weights.items() if weight}

    @property
    def needs_tokens(self) -> bool:
        """Whether a term looks at the patch tokens, and not at logits and blocks alone."""
        return bool(set(self.weights) - {"logits", "mimic"})

    @abstractmethod
    def terms(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Return the unweighted terms by name, each a scalar in fp32.

        Args:
            student, teacher: the latter's features have no graph. hidden: B×N bool, True where a position is hidden;
                None where none is.
        """

    def check_grid(self, grid: tuple[int, int]) -> None:
        """Raise `InputError` if the method cannot work on maps of (h, w) tokens; most can on any."""

    def forward(
        self, student: Features, teacher: Features, hidden: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        """Compare the features of one batch.

        Args:
            student, teacher: their features of the same B images.
            hidden: B×N bool, True at the ⌊r·N⌋ positions of each sample that are hidden; None lets a method with a
                ``mask_ratio`` draw them from torch's generator of the device.

        Returns:
            The unweighted terms by name, and ``total``, their weighted sum; the task's own loss is not in it. In fp32,
            whatever the features are in. No gradient reaches the teacher.

        Raises:
            InputError: features that are missing or do not fit together.
        """
        self._check(student, teacher)
        shape = tuple(student.patches.shape[:2])
        if not self.mask_ratio:
            hidden = None
        elif hidden is None:
            hidden = random_positions(*shape, self.mask_ratio, student.patches.device)
        elif tuple(hidden.shape) != shape:
            raise InputError(
                f"{type(self).__name__}: hidden has to say of {shape[0]}×{shape[1]} tokens, got {tuple(hidden.shape)}"
            )
        terms = self.terms(student, teacher.detached(), hidden)
        return terms | {"total": sum(self.weights[name] * term for name, term in terms.items())}

    def _check(self, student: Features, teacher: Features) -> None:
        what = type(self).__name__
        for who, features in (("student", student), ("teacher", teacher)):
            batch, tokens = features.patches.shape[:2]
            if tokens != features.grid[0] * features.grid[1]:
                raise InputError(f"{what}: the {who}'s {tokens} patches are no {features.grid} grid")
            shapes = [tuple(block.shape[:2]) for block in features.blocks]
            if shapes != [(batch, tokens)] * len(self.needs_blocks):
                wanted = f"{len(self.needs_blocks)} blocks of {batch}×{tokens} tokens"
                raise InputError(f"{what}: the {who} has to come with {wanted}, got {shapes}")
            if self.needs_logits and (features.logits is None or features.logits.shape[1] != self.num_labels):
                shape = None if features.logits is None else tuple(features.logits.shape)
                raise InputError(
                    f"{what}: the {who} has to come with logits of {self.num_labels} classes, got {shape}"
                )
        if tuple(student.grid) != tuple(teacher.grid) or student.patches.shape[0] != teacher.patches.shape[0]:
            shapes = [(features.patches.shape[0], *features.grid) for features in (student, teacher)]
            raise InputError(
                f"{what}: student and teacher have different batches or grids: {shapes[0]} and {shapes[1]}"
            )
        self.check_grid(student.grid)


def check_positive(method: str, **settings: float) -> None:
    """Raise `InputError` naming the first setting that is not above 0."""
    for name, value in settings.items():
        if not value > 0:
            raise InputError(f"{method}: {name} must be positive, got {value}")


def convolutions(channels: int) -> nn.Sequential:
    """Return 3×3 convolution, ReLU, 3×3 convolution: B×C×h×w → B×C×h×w."""
    first, second = (nn.Conv2d(channels, channels, kernel_size=3, padding=1) for _ in range(2))
    return nn.Sequential(first, nn.ReLU(), second)


def same_size(student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both B×K×H×W logits in fp32, the teacher's resized bilinearly to the student's size."""
    student, teacher = student.float(), teacher.float()
    if teacher.shape[-2:] != student.shape[-2:]:
        teacher = F.interpolate(teacher, size=student.shape[-2:], mode="bilinear", align_corners=False)
    return student, teacher


def divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float, dim: int) -> torch.Tensor:
    """Return τ²·Σ KL(teacher ‖ student) over all softmaxes along ``dim`` of y/τ, a scalar in fp32."""
    log_student = F.log_softmax(student.float() / temperature, dim)
    log_teacher = F.log_softmax(teacher.float() / temperature, dim)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def pixel_divergence(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return τ²·KL(teacher ‖ student) over classes, mean over pixels and batch, of B×K×H×W logits of any two sizes."""
    student, teacher = same_size(student, teacher)
    return divergence(student, teacher, temperature, dim=1) / (student.numel() / student.shape[1])


def random_positions(batch: int, positions: int, ratio: float, device: torch.device) -> torch.Tensor:
    """Draw ⌊ratio·positions⌋ positions of each sample, uniformly without replacement; B×positions, True where drawn.

    All on the device, by torch's generator for it: nothing waits, and a checkpoint of the generator repeats the masks.
    """
    count = int(ratio * positions + 1e-9)  # the nudge keeps ⌊0.3 · 10⌋ at 3 where floating point says 2.9999…
    drawn = torch.rand(batch, positions, device=device).argsort(1)[:, :count]
    return torch.zeros(batch, positions, dtype=torch.bool, device=device).scatter(1, drawn, True)
