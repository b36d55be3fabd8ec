from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest

from gkd_hf.data import photometric
from gkd_hf.data.photometric import distort, photometric_distortion


def exact(pixel: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, first: bool) -> list:
    """One pixel by the textbook: through HSV, in real numbers."""
    values = np.clip(pixel + brightness, 0, 255)
    if first:
        values = np.clip(values * contrast, 0, 255)
    h, s, v = colorsys.rgb_to_hsv(*(values / 255))
    values = 255 * np.array(colorsys.hsv_to_rgb((h + hue / 6) % 1, min(1, s * saturation), v))
    return np.clip(values * (1 if first else contrast), 0, 255).tolist()


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        (0, 1, 1, 0), (-31.5, 1, 1, 0), (20.3, 1.37, 1, 0), (0, 0.5, 1, 0), (0, 1, 0.5, 0), (0, 1, 1.5, 0),
        (0, 1, 1, 0.6), (0, 1, 1, -0.6), (0, 1, 1, 1 / 30), (10, 1.5, 1.5, -0.5), (-10, 0.7, 0.63, 0.43),
    ],
)  # fmt: skip
def test_integers_follow_the_exact_way_through_hsv(changes: tuple, first: bool):
    levels = (0, 1, 2, 40, 127, 128, 200, 254, 255)
    cube = np.array([(r, g, b) for r in levels for g in levels for b in levels], dtype=np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (295, 3), dtype=np.uint8)
    pixels = np.concatenate([cube, noise])
    planes = np.ascontiguousarray(pixels.T.reshape(3, 32, 32))
    distort(planes, *changes, contrast_first=first)
    expected = np.array([exact(pixel.astype(float), *changes, first) for pixel in pixels])
    difference = expected - planes.reshape(3, -1).T
    # Three rounded steps, and a contrast afterwards that makes their error 1.5 times as large.
    assert np.abs(difference).max() <= 5 and abs(difference.mean()) < 1
    if changes[2:] == (1, 0):
        assert difference.min() > -0.8 and difference.max() <= 2


def test_blocks_change_nothing(monkeypatch):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 37, 41), dtype=np.uint8)
    whole, parts = pixels.copy(), pixels.copy()
    distort(whole, 5, 1.2, 1.3, 0.4, contrast_first=True)
    monkeypatch.setattr(photometric, "_BLOCK", 100)
    distort(parts, 5, 1.2, 1.3, 0.4, contrast_first=True)
    assert np.array_equal(whole, parts) and not np.array_equal(whole, pixels)


def distorted(colour: tuple[int, int, int], seed: int) -> np.ndarray:
    planes = np.ascontiguousarray(np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (3, 4, 4)))
    photometric_distortion(planes, np.random.default_rng(seed))
    assert (planes == planes[:, :1, :1]).all()
    return planes[:, 0, 0]


def test_photometric_distortion_stays_in_its_ranges():
    values = [distorted((100, 100, 100), seed) for seed in range(3000)]
    assert all(len(set(value.tolist())) == 1 for value in values)  # saturation and hue leave grey alone
    levels = np.array([value[0] for value in values])
    assert 32 <= levels.min() < 45 and 175 < levels.max() <= 198  # (100 - 32) * 0.5 … (100 + 32) * 1.5
    assert 0.2 < (levels == 100).mean() < 0.3
    hsv = np.array([colorsys.rgb_to_hsv(*(distorted((120, 40, 40), seed) / 255)) for seed in range(400)])
    degrees = (hsv[:, 0] * 360 + 180) % 360 - 180
    assert -41 < degrees.min() < -30 and 28 < degrees.max() < 41  # whole levels are coarse
    assert math.isclose((np.abs(degrees) < 1).mean(), 0.5, abs_tol=0.12)
    assert hsv[:, 1].min() < 0.36 and hsv[:, 1].max() > 0.98
