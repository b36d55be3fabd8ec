"""Random patch masks: half of the samples of a batch lose half of their patches (GKD, arXiv 2603.02554)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from gkd_hf.errors import InputError


def random_masks(
    indices: Sequence[int],
    num_patches: int,
    *,
    sample_probability: float = 0.5,
    patch_ratio: float = 0.5,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the masks of one device batch.

    ⌊p·B⌋ samples get exactly ⌊r·N⌋ masked positions each, uniformly without replacement and independently; the others
    get none. Which patches a sample loses depends on ``seed`` and its place in the run's order alone, so neither a
    restart nor another number of processes changes it. The same holds for which samples are masked wherever p·B is
    whole: they are drawn from each of the smallest groups of neighbours of which p is a whole number (one of each pair
    for p = ½). Otherwise they are drawn from the whole device batch.

    Args:
        indices: B places in the run's global order, one per sample.
        num_patches: N. sample_probability: p in [0, 1]. patch_ratio: r in [0, 1).

    Returns:
        rows: ⌊p·B⌋ positions in the batch, ascending. masks: ⌊p·B⌋×N, True where masked.

    Raises:
        InputError: p or r outside its range.
    """
    if not 0 <= sample_probability <= 1:
        raise InputError(f"mask_probability must lie in [0, 1], got {sample_probability}")
    if not 0 <= patch_ratio < 1:
        raise InputError(f"mask_ratio must lie in [0, 1), got {patch_ratio}")
    batch = len(indices)
    # The nudge keeps ⌊0.3 · 10⌋ at 3 where floating point says 2.9999….
    samples, patches = int(sample_probability * batch + 1e-9), int(patch_ratio * num_patches + 1e-9)
    if patches == 0:
        samples = 0
    masks = torch.zeros(samples, num_patches, dtype=torch.bool)
    if samples == 0:
        return torch.zeros(0, dtype=torch.long), masks
    group = _group_size(sample_probability, batch)
    chosen = []
    for first in range(0, batch, group):
        rng = np.random.default_rng((seed, 0, int(indices[first])))
        chosen.append(first + rng.choice(group, size=samples * group // batch, replace=False))
    rows = np.sort(np.concatenate(chosen))
    for mask, row in zip(masks, rows, strict=True):
        positions = np.random.default_rng((seed, 1, int(indices[row]))).permutation(num_patches)[:patches]
        mask[torch.from_numpy(positions)] = True
    return torch.from_numpy(rows), masks


def _group_size(probability: float, batch: int) -> int:
    """The fewest neighbours, of which whole groups make a batch, that a part ``probability`` of is a whole number."""
    for size in range(1, batch):
        part = probability * size
        if batch % size == 0 and abs(part - round(part)) < 1e-9:
            return size
    return batch
