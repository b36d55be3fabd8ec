"""RandAugment (arXiv 1909.13719) on PIL images, in the variant "m9, mstd 0.5, increasing" of vision transformers.

Two operations are drawn, with replacement, from fifteen; each is applied with probability 0.5 at a magnitude drawn
from N(9, 0.5) and clipped to 0..10. "Increasing": for every operation a larger magnitude is a stronger change.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import PIL.Image
import PIL.ImageEnhance
import PIL.ImageOps

MAX_MAGNITUDE = 10.0
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_TRANSLATE = 0.45
_MAX_ENHANCE = 0.9
_MAX_SOLARIZE_ADD = 110

Fill = tuple[int, int, int]
Operation = Callable[[PIL.Image.Image, float, np.random.Generator, Fill], PIL.Image.Image]


def _signed(value: float, rng: np.random.Generator) -> float:
    return value if rng.random() < 0.5 else -value


def _resampling(rng: np.random.Generator) -> PIL.Image.Resampling:
    return PIL.Image.Resampling.BILINEAR if rng.random() < 0.5 else PIL.Image.Resampling.BICUBIC


def _affine(
    image: PIL.Image.Image,
    matrix: tuple[float, float, float, float, float, float],
    rng: np.random.Generator,
    fill: Fill,
) -> PIL.Image.Image:
    return image.transform(image.size, PIL.Image.Transform.AFFINE, matrix, resample=_resampling(rng), fillcolor=fill)


def auto_contrast(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Stretch each channel to the full range (magnitude has no effect)."""
    return PIL.ImageOps.autocontrast(image)


def equalize(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Equalise each channel's histogram (magnitude has no effect)."""
    return PIL.ImageOps.equalize(image)


def invert(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Negative (magnitude has no effect)."""
    return PIL.ImageOps.invert(image)


def rotate(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Rotate by up to ±30 degrees."""
    degrees = _signed(level / MAX_MAGNITUDE * _MAX_DEGREES, rng)
    return image.rotate(degrees, resample=_resampling(rng), fillcolor=fill)


def posterize(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Keep 4 bits per channel down to 1 (0 would be a black image, which teaches nothing)."""
    return PIL.ImageOps.posterize(image, max(1, 4 - int(level / MAX_MAGNITUDE * 4)))


def solarize(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Invert every value at or above a threshold that falls from 256 to 0."""
    return PIL.ImageOps.solarize(image, 256 - min(256, int(level / MAX_MAGNITUDE * 256)))


def solarize_add(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Add up to 110 to every value below 128."""
    added = int(level / MAX_MAGNITUDE * _MAX_SOLARIZE_ADD)
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


def _enhance_factor(level: float, rng: np.random.Generator) -> float:
    return max(0.1, 1.0 + _signed(level / MAX_MAGNITUDE * _MAX_ENHANCE, rng))


def color(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Scale saturation by 1 ± up to 0.9."""
    return PIL.ImageEnhance.Color(image).enhance(_enhance_factor(level, rng))


def contrast(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Scale contrast by 1 ± up to 0.9."""
    return PIL.ImageEnhance.Contrast(image).enhance(_enhance_factor(level, rng))


def brightness(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Scale brightness by 1 ± up to 0.9."""
    return PIL.ImageEnhance.Brightness(image).enhance(_enhance_factor(level, rng))


def sharpness(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Scale sharpness by 1 ± up to 0.9."""
    return PIL.ImageEnhance.Sharpness(image).enhance(_enhance_factor(level, rng))


def shear_x(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Shear horizontally by up to ±0.3."""
    return _affine(image, (1, _signed(level / MAX_MAGNITUDE * _MAX_SHEAR, rng), 0, 0, 1, 0), rng, fill)


def shear_y(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Shear vertically by up to ±0.3."""
    return _affine(image, (1, 0, 0, _signed(level / MAX_MAGNITUDE * _MAX_SHEAR, rng), 1, 0), rng, fill)


def translate_x(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Shift horizontally by up to ±45 % of the width."""
    shift = _signed(level / MAX_MAGNITUDE * _MAX_TRANSLATE, rng) * image.width
    return _affine(image, (1, 0, shift, 0, 1, 0), rng, fill)


def translate_y(image: PIL.Image.Image, level: float, rng: np.random.Generator, fill: Fill) -> PIL.Image.Image:
    """Shift vertically by up to ±45 % of the height."""
    shift = _signed(level / MAX_MAGNITUDE * _MAX_TRANSLATE, rng) * image.height
    return _affine(image, (1, 0, 0, 0, 1, shift), rng, fill)


OPERATIONS: tuple[Operation, ...] = (
    auto_contrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


class RandAugment:
    """Apply ``num_operations`` random operations to an RGB image.

    Args:
        magnitude: mean severity, 0..10.
        magnitude_std: standard deviation of the severity.
        num_operations: operations drawn per image.
        probability: with which each drawn operation is applied.
        fill: RGB colour of places that a geometric operation uncovers.
    """

    def __init__(
        self,
        *,
        magnitude: float = 9.0,
        magnitude_std: float = 0.5,
        num_operations: int = 2,
        probability: float = 0.5,
        fill: Fill = (124, 116, 104),
    ) -> None:
        self.magnitude = magnitude
        self.magnitude_std = magnitude_std
        self.num_operations = num_operations
        self.probability = probability
        self.fill = fill

    def __call__(self, image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
        for choice in rng.integers(len(OPERATIONS), size=self.num_operations):
            if rng.random() < self.probability:
                level = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), MAX_MAGNITUDE)
                image = OPERATIONS[choice](image, level, rng, self.fill)
        return image
