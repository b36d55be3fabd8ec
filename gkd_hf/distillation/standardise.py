"""A teacher's tokens brought to mean 0 and deviation 1 per channel: no teacher outweighs another by its scale."""

from __future__ import annotations

import torch
from torch import nn

from gkd_hf.errors import InputError

LEAST_DEVIATION = 0.01  # of a channel, as a part of the channels' mean deviation: one that is dead stays small


class TokenStandardisation(nn.Module):
    """(t − μ) / σ per channel, with fixed statistics of their own for patch and class tokens.

    Teachers differ in their tokens' scale by orders of magnitude, and so would their squared errors; standardising
    each before several are distilled at once is what Theia (arXiv 2407.20179) does, and PHI-S (arXiv 2410.01680)
    studies. The statistics are estimated once, from a few images, and then belong to the heads: they are persistent
    buffers, and go wherever those go.

    Args:
        width: channels C_t of the teacher.

    Attributes:
        patch_mean, patch_std, cls_mean, cls_std: C_t, fp32. images: how many they are of, 0 before they are fitted.
    """

    def __init__(self, width: int):
        super().__init__()
        for name in ("patch", "cls"):
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_std", torch.ones(width))
        self.register_buffer("images", torch.zeros((), dtype=torch.long))

    def forward(self, patches: torch.Tensor, cls: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Standardise B×N×C_t patch tokens and B×C_t class tokens, each in its own type."""
        return self.patches(patches), _standardised(cls, self.cls_mean, self.cls_std)

    def patches(self, tokens: torch.Tensor) -> torch.Tensor:
        """Standardise B×N×C_t patch tokens, in their own type."""
        return _standardised(tokens, self.patch_mean, self.patch_std)

    @torch.no_grad()
    def fit(self, statistics: TokenStatistics) -> None:
        """Take over what was found out about the teacher's tokens.

        A channel's σ is at least a hundredth of the channels' mean σ, so that one in which nothing happens is not
        blown up, whatever the scale of the tokens. It is 1 where no channel varies at all.

        Raises:
            InputError: no tokens, or some that are not finite.
        """
        images = statistics.images
        if images == 0:
            raise InputError("the teacher's tokens cannot be standardised: there is no image to estimate them from")
        for name, moments in (("patch", statistics.patches), ("cls", statistics.cls)):
            mean, std = moments.mean_and_deviation()
            if not (torch.isfinite(mean).all() and torch.isfinite(std).all()):
                raise InputError(
                    f"the teacher's tokens are not finite on the first {images} images: it cannot be learnt from "
                    "(try precision fp32, or another teacher)"
                )
            std = std.clamp_min(LEAST_DEVIATION * std.mean().item()) if std.any() else torch.ones_like(std)
            self.get_buffer(f"{name}_mean").copy_(mean)
            self.get_buffer(f"{name}_std").copy_(std)
        self.images.fill_(images)


class TokenStatistics:
    """Mean and deviation of a teacher's tokens per channel, collected batch by batch."""

    def __init__(self) -> None:
        self.images = 0
        self.patches, self.cls = Moments(), Moments()

    def add(self, patches: torch.Tensor, cls: torch.Tensor) -> None:
        """Add patch tokens B×N×C_t and class tokens B×C_t of B images."""
        self.images += len(cls)
        self.patches.add(patches.flatten(0, 1))
        self.cls.add(cls)


def _standardised(tokens: torch.Tensor, mean: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
    return ((tokens.float() - mean) / std).to(tokens.dtype)


class Moments:
    """Sums over tokens, in fp64 on the CPU: the same whatever the device, and no scale of the tokens is too large."""

    def __init__(self) -> None:
        self.count = 0
        self.sums: torch.Tensor | float = 0.0
        self.squares: torch.Tensor | float = 0.0

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens K×C."""
        tokens = tokens.to("cpu", torch.float64)
        self.count += len(tokens)
        self.sums = self.sums + tokens.sum(0)
        self.squares = self.squares + tokens.square().sum(0)

    def mean_and_deviation(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and standard deviation (over K, not K − 1) of each channel."""
        mean = self.sums / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0).sqrt()
