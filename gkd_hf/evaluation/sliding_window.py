"""Segmentation of images of any size by a window of fixed size, as in the GKD paper's test protocol (2603.02554).

Overlapping windows are forwarded in batches and averaged; the encoder sees only the size that it was trained at.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn

from gkd_hf.errors import InputError


def window_starts(size: int, window: int, stride: int) -> list[int]:
    """First pixels of the ceil((size − window) / stride) + 1 windows along one axis; the last ends at the border."""
    count = math.ceil(max(size - window, 0) / stride) + 1
    return [min(index * stride, max(size - window, 0)) for index in range(count)]


@torch.no_grad()
def sliding_window_logits(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    *,
    window: int = 512,
    stride: int = 341,
    batch_size: int = 4,
) -> torch.Tensor:
    """Average `forward`'s class scores over overlapping windows.

    Args:
        forward: maps n×3×window×window to n×C×h×w; h×w may be any size and is resized bilinearly to the window.
        pixel_values: B×3×H×W, normalised. An axis shorter than the window is padded with 0, the mean colour, at its
            right or bottom end, and the padding is cut from the result.
        window: side of the square window in pixels.
        stride: step between windows in pixels, at most `window`.
        batch_size: windows per call of `forward`, counted over all images; changes speed and memory, not the result.

    Returns:
        float32 B×C×H×W on the device of `pixel_values`.

    Raises:
        InputError: `pixel_values` is not B×3×H×W, or window, stride or batch size is out of range.
    """
    if pixel_values.ndim != 4 or 0 in pixel_values.shape:
        raise InputError(f"pixel_values has shape {tuple(pixel_values.shape)}; sliding windows need B×3×H×W.")
    if not (window >= 1 and 1 <= stride <= window and batch_size >= 1):
        raise InputError(
            f"Sliding window {window} with stride {stride} and window batch {batch_size}: all must be positive, and "
            "the stride at most the window, or pixels between windows would get no prediction."
        )
    batch, _, height, width = pixel_values.shape
    padded = nn.functional.pad(pixel_values, (0, max(window - width, 0), 0, max(window - height, 0)))
    corners = [
        (image, top, left)
        for image in range(batch)
        for top in window_starts(padded.shape[2], window, stride)
        for left in window_starts(padded.shape[3], window, stride)
    ]
    total, hits = None, padded.new_zeros(padded.shape[2:], dtype=torch.float32)
    for first in range(0, len(corners), batch_size):
        group = corners[first : first + batch_size]
        crops = torch.stack([padded[i, :, top : top + window, left : left + window] for i, top, left in group])
        scores = resize(forward(crops), (window, window))
        if total is None:
            total = scores.new_zeros(batch, scores.shape[1], *padded.shape[2:])
        # One by one and in the order of the windows, so that the sums do not depend on how windows were batched.
        for (image, top, left), score in zip(group, scores, strict=True):
            total[image, :, top : top + window, left : left + window] += score
            if image == 0:
                hits[top : top + window, left : left + window] += 1
    return (total / hits)[:, :, :height, :width]


@torch.no_grad()
def predict_labels(
    forward: Callable[[torch.Tensor], torch.Tensor],
    pixel_values: torch.Tensor,
    label_size: tuple[int, int],
    *,
    window: int = 512,
    stride: int = 341,
    batch_size: int = 4,
) -> torch.Tensor:
    """Predict the class of every pixel at the label's own size (the scores are resized, then the best class taken).

    Args:
        label_size: (height, width) of the label maps, whatever the size of `pixel_values`.

    Returns:
        int64 B×label_height×label_width. The other arguments and the errors are `sliding_window_logits`'s.
    """
    logits = sliding_window_logits(forward, pixel_values, window=window, stride=stride, batch_size=batch_size)
    # Image by image: at native size the scores of one street scene already weigh a gigabyte.
    return torch.cat([resize(logits[i : i + 1], label_size).argmax(1) for i in range(len(logits))])


def resize(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize n×C×h×w bilinearly (half-pixel centres) to n×C×size, in float32; the same tensor if nothing changes."""
    scores = scores.float()
    if tuple(scores.shape[-2:]) == tuple(size):
        return scores
    return nn.functional.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=False)
