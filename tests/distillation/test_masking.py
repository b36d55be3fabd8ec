"""Masks: how many, which, and that they hang on the sample's place alone."""

from __future__ import annotations

import pytest
import torch

from gkd_hf.distillation.masking import random_masks
from gkd_hf.errors import InputError


@pytest.mark.parametrize(
    "batch, patches, p, r", [(8, 16, 0.5, 0.5), (5, 9, 0.5, 0.5), (10, 10, 0.3, 0.3), (4, 7, 1, 0.9)]
)
def test_exact_counts(batch: int, patches: int, p: float, r: float) -> None:
    rows, masks = random_masks(range(batch), patches, sample_probability=p, patch_ratio=r)
    assert len(rows) == len(set(rows.tolist())) == int(p * batch + 1e-9)
    assert masks.shape == (len(rows), patches) and masks.dtype == torch.bool
    assert masks.sum(1).tolist() == [int(r * patches + 1e-9)] * len(rows)
    assert rows.tolist() == sorted(rows.tolist()) and (len(rows) == 0 or rows.max() < batch)


def test_nothing_is_masked_when_nothing_would_be_hidden() -> None:
    for settings in ({"sample_probability": 0.0}, {"patch_ratio": 0.0}, {"patch_ratio": 0.01}):
        rows, masks = random_masks(range(8), 16, **settings)
        assert len(rows) == 0 and masks.shape == (0, 16)


def test_uniform_over_positions_and_samples() -> None:
    positions, samples = torch.zeros(16), torch.zeros(8)
    for batch in range(1000):
        rows, masks = random_masks(range(8 * batch, 8 * batch + 8), 16)
        positions += masks.sum(0)
        samples[rows] += 1
    # 4000 masks of 8 of 16: 2000 each, σ = √(4000·¼) ≈ 32; 1000 draws of 4 of 8: 500 each, σ ≈ 16
    assert (positions - 2000).abs().max() < 5 * 32
    assert (samples - 500).abs().max() < 5 * 16


def test_a_samples_mask_hangs_on_its_place_and_the_seed() -> None:
    settings = {"sample_probability": 1.0}
    _, together = random_masks([10, 11, 12, 13], 64, **settings)
    _, apart = random_masks([12, 13], 64, **settings)
    assert torch.equal(together[2:], apart)
    assert not torch.equal(together[0], together[1])
    _, other = random_masks([12, 13], 64, seed=1, **settings)
    assert not torch.equal(other, apart)


@pytest.mark.parametrize(
    "p, batches", [(0.5, (2, 4, 8)), (0.25, (4, 8)), (0.3, (10, 20)), (0.75, (4, 12)), (1.0, (1, 8))]
)
def test_the_masked_samples_are_the_same_in_every_device_batch(p: float, batches: tuple[int, ...]) -> None:
    drawn = []
    for batch in batches:
        masked = {}
        for first in range(0, 120, batch):
            rows, masks = random_masks(range(first, first + batch), 9, sample_probability=p, seed=3)
            assert len(rows) == round(p * batch)
            masked |= {first + int(row): mask.tolist() for row, mask in zip(rows, masks, strict=True)}
        drawn.append(masked)
    assert len(drawn[0]) == 120 * p and all(other == drawn[0] for other in drawn)
    assert p == 1 or len({index % batches[0] for index in drawn[0]}) == batches[0]  # not always the same of a group


@pytest.mark.parametrize(
    "settings, name", [({"sample_probability": 1.1}, "mask_probability"), ({"patch_ratio": 1.0}, "mask_ratio")]
)
def test_ranges(settings: dict[str, float], name: str) -> None:
    with pytest.raises(InputError, match=name):
        random_masks(range(4), 16, **settings)
