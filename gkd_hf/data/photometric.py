"""Photometric distortion of SSD (arXiv 1512.02325) in 16-bit integers, without a conversion to HSV and back.

Hue and saturation are those of the HSV hexcone. With M and m the largest and the smallest channel of a pixel,
C = M - m, and r, g, b its channels, each channel's distance from M is scaled by the saturation's factor; a turn of the
hue by h sextants (a sextant is 60°, |h| < 1) replaces the distance M - r before by

    clamp(max(g, b) - r + max(0, min(g, b) - r) + sign(g - b) h C,  0,  C)

and likewise for g and b, whose neighbours on the hue circle are (b, r) and (r, g).
"""

from __future__ import annotations

import numpy as np
import torch

_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE = 18  # of 180 steps of two degrees
_HUE_STEPS_PER_SEXTANT = 30
_BITS = 7
_ONE = 2**_BITS  # factors in fixed point: 255 times the largest factor stays below 2^16
_BLOCK = 2**15  # pixels that are worked on at once, so that their planes stay in the processor's cache


def photometric_distortion(planes: np.ndarray, rng: np.random.Generator) -> None:
    """Distort brightness (±32), contrast, saturation (×0.5..1.5) and hue (±36°), each with probability one half.

    Contrast comes before or after the colour changes, with equal probability. Values are clipped to 0..255 after each
    step. Each value is within 5 of what real numbers would give; on average within 1.

    Args:
        planes: uint8 3×H×W, contiguous, changed in place. rng: decides everything.
    """
    brightness = rng.uniform(-_BRIGHTNESS, _BRIGHTNESS) if rng.random() < 0.5 else 0.0
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*_FACTOR) if rng.random() < 0.5 else 1.0
    saturation = rng.uniform(*_FACTOR) if rng.random() < 0.5 else 1.0
    hue = int(rng.integers(-_HUE, _HUE)) if rng.random() < 0.5 else 0
    distort(planes, brightness, contrast, saturation, hue / _HUE_STEPS_PER_SEXTANT, contrast_first=contrast_first)


def distort(
    planes: np.ndarray, brightness: float, contrast: float, saturation: float, hue: float, *, contrast_first: bool
) -> None:
    """Apply the four changes to uint8 3×H×W, in place: an addend, two factors in 0..1.5, and sextants in -1..1."""
    flat = planes.reshape(3, -1)
    colours = saturation != 1.0 or hue != 0.0
    if not colours and contrast == 1.0 and brightness == 0.0:
        return
    pixels = flat.shape[1]
    # Five planes r, g, b, r, g: those of all channels' first and second neighbours are then slices.
    ring = np.empty((5, min(_BLOCK, pixels)), dtype=np.int16)
    for start in range(0, pixels, _BLOCK):
        block = flat[:, start : start + _BLOCK]
        work = ring[:, : block.shape[1]]
        own = work[:3]
        own[...] = block
        if brightness:
            own += np.int16(np.floor(brightness))
            _clamp(own, 0, 255)
        if contrast_first:
            _scale(own, contrast)
        if colours:
            work[3:] = work[:2]
            _turn_and_saturate(work, saturation, hue)
        if not contrast_first:
            _scale(own, contrast)
        block[...] = own


def _clamp(values: np.ndarray, low: int, high: int) -> None:
    """Do as ``np.clip`` in place; NumPy's own limits by a number are not vectorised and take four times as long."""
    torch.from_numpy(values).clamp_(low, high)


def _scale(values: np.ndarray, factor: float) -> None:
    """Multiply int16 values of 0..255 in place, clipped to 255."""
    if factor != 1.0:
        unsigned = values.view(np.uint16)
        unsigned *= np.uint16(round(factor * _ONE))
        unsigned >>= _BITS
        _clamp(values, 0, 255)


def _turn_and_saturate(ring: np.ndarray, saturation: float, hue: float) -> None:
    own, second, third = ring[:3], ring[1:4], ring[2:5]
    high, low = np.maximum(second, third), np.minimum(second, third)
    top = np.maximum(own[0], high[0])
    chroma = top - np.minimum(own[0], low[0])
    if hue:
        turn = chroma * np.int16(round(abs(hue) * _ONE))
        turn += _ONE // 2
        turn >>= _BITS
        side = np.subtract(second, third) if hue > 0 else np.subtract(third, second)
        # The sign of the difference times the turn: next to a difference of 1, the clamp below hides any turn.
        side *= np.int16(_ONE)
        np.minimum(side, turn, out=side)
        np.maximum(side, -turn, out=side)
        high -= own
        low -= own
        _clamp(low, 0, 255)
        high += low
        high += side
        _clamp(high, 0, 1024)
        distance = np.minimum(high, chroma, out=high)
    else:
        distance = np.subtract(top, own, out=high)
    if saturation != 1.0:
        unsigned = distance.view(np.uint16)
        if saturation > 1.0:
            # A pixel whose saturation would leave 1 keeps its hue: all three distances get the smaller factor.
            _clamp(chroma, 1, 255)
            most = top.astype(np.float32)
            most *= np.float32(_ONE)
            most /= chroma.astype(np.float32)
            _clamp(most, 0, round(saturation * _ONE))
            unsigned *= most.astype(np.uint16)
        else:
            unsigned *= np.uint16(round(saturation * _ONE))
        unsigned >>= _BITS
    np.subtract(top, distance, out=own)
