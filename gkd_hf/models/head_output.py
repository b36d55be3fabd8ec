"""What every decode head returns, and the loss of those that score every pixel."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.nn import functional as F


@dataclass
class HeadOutput:
    """Logits B×K×h×w; with labels also the total loss and its named terms (scalars)."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None
    terms: dict[str, torch.Tensor] = field(default_factory=dict)


def with_cross_entropy(logits: torch.Tensor, labels: torch.Tensor | None, ignore_index: int) -> HeadOutput:
    """Return B×K×h×w ``logits`` and, given B×H×W ``labels``, their cross-entropy at the labels' size.

    The mean is over the pixels that count; without any it is 0, not nan.
    """
    if labels is None:
        return HeadOutput(logits)
    full = F.interpolate(logits, size=labels.shape[-2:], mode="bilinear", align_corners=False)
    loss = F.cross_entropy(full.float(), labels, ignore_index=ignore_index, reduction="sum")
    loss = loss / (labels != ignore_index).sum().clamp(min=1)
    return HeadOutput(logits, loss, {"cross_entropy": loss.detach()})
