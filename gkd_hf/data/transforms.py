"""Augmentations for distillation and for segmentation, and the plain transform for evaluation.

PIL in, torch out. Image and mask always go through the same geometry, and every random number comes from the given
``numpy.random.Generator``. Recipes of GKD (arXiv 2603.02554): random resized crop, flip, RandAugment and random
erasing (arXiv 1708.04896) without labels; resize, crop, flip and photometric distortion with labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import PIL.Image
import torch

from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.rand_augment import RandAugment

DEFAULT_SHORT_SIDES = tuple(int(512 * (0.5 + 0.1 * step)) for step in range(16))
"""256, 307, …, 1024: half to twice the crop of 512, in steps of a tenth."""

_CROP_TRIES = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 3.3)
_BRIGHTNESS = 32.0
_FACTOR = (0.5, 1.5)
_HUE = 18
_HUE_CIRCLE = 180


class _Normalise:
    """uint8 H×W×3 → float32 3×H×W: (x / 255 - mean) / std, in one pass over the pixels."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        mean_, std_ = (np.asarray(values, dtype=np.float64).reshape(3, 1, 1) for values in (mean, std))
        self._scale = (1.0 / (255.0 * std_)).astype(np.float32)
        self._shift = (-mean_ / std_).astype(np.float32)

    def into(self, out: np.ndarray, pixels: np.ndarray) -> None:
        np.multiply(pixels.transpose(2, 0, 1), self._scale, out=out)
        out += self._shift

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        out = np.empty((3, *pixels.shape[:2]), dtype=np.float32)
        self.into(out, pixels)
        return out


class DistillationTransform:
    """Random resized crop (bicubic), horizontal flip, RandAugment, normalisation, random erasing.

    Args:
        image_size: side S of the square output, pixels.
        mean, std: of the student's normalisation, three numbers each, in 0..1.
        crop_scale: range of the crop's area relative to the image's.
        crop_ratio: range of the crop's width / height, drawn log-uniformly.
        rand_augment: apply RandAugment (m9, mstd 0.5, increasing).
        erase_probability: of filling a rectangle (2 % to a third of the area, ratio 0.3 to 3.3) with N(0, 1) noise.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        crop_scale: tuple[float, float] = (0.08, 1.0),
        crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
        rand_augment: bool = True,
        erase_probability: float = 0.25,
    ) -> None:
        self.image_size = image_size
        self.crop_scale = tuple(crop_scale)
        self.crop_ratio = tuple(crop_ratio)
        self.erase_probability = erase_probability
        self._normalise = _Normalise(mean, std)
        fill = tuple(min(255, round(255 * value)) for value in mean)
        self._rand_augment = RandAugment(fill=fill) if rand_augment else None

    def __call__(
        self, image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """Return ``{"pixel_values": float32 3×S×S}``; a label is not used."""
        return self.crop(image, self.draw_crop(image.size, rng), rng)

    def draw_crop(self, size: tuple[int, int], rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Draw (left, top, right, bottom) of the crop of an image of ``size`` = (width, height)."""
        return random_resized_crop_box(size, self.crop_scale, self.crop_ratio, rng)

    def needed_size(self, size: tuple[int, int], box: tuple[int, int, int, int]) -> tuple[int, int]:
        """Return the least (width, height) of an image of ``size`` at which the crop is not below S×S."""
        width, height = box[2] - box[0], box[3] - box[1]
        return math.ceil(size[0] * self.image_size / width), math.ceil(size[1] * self.image_size / height)

    def crop(
        self, image: PIL.Image.Image, box: tuple[float, float, float, float], rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Do as a call does after drawing the crop: ``box`` in pixels of ``image``, which may be a shrunk one."""
        size = (self.image_size, self.image_size)
        image = image.resize(size, PIL.Image.Resampling.BICUBIC, box=box)
        flip = rng.random() < 0.5
        if flip and self._rand_augment is not None:
            image = image.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT)
        if self._rand_augment is not None:
            image = self._rand_augment(image, rng)
        pixels = np.asarray(image)
        # Without RandAugment in between, flipping is a matter of strides, paid for by the normalisation's own copy.
        if flip and self._rand_augment is None:
            pixels = pixels[:, ::-1]
        values = self._normalise(pixels)
        if rng.random() < self.erase_probability:
            random_erase(values, rng)
        return {"pixel_values": torch.from_numpy(values)}


def random_resized_crop_box(
    size: tuple[int, int], scale: tuple[float, float], ratio: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw (left, top, right, bottom) inside an image of ``size`` = (width, height).

    Area uniform in ``scale`` of the image's, width / height log-uniform in ``ratio``; after ten misses the largest
    centred box of an allowed ratio.
    """
    width, height = size
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        crop_width, crop_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(rng.integers(width - crop_width + 1))
            top = int(rng.integers(height - crop_height + 1))
            return left, top, left + crop_width, top + crop_height
    crop_width = max(1, min(width, round(height * ratio[1])))
    crop_height = max(1, min(height, round(width / ratio[0])))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return left, top, left + crop_width, top + crop_height


def random_erase(values: np.ndarray, rng: np.random.Generator) -> None:
    """Fill one random rectangle of a normalised 3×H×W image with N(0, 1) noise per pixel and channel, in place."""
    channels, height, width = values.shape
    log_ratio = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*_ERASE_AREA)
        aspect = math.exp(rng.uniform(*log_ratio))
        erase_height, erase_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < erase_height < height and 0 < erase_width < width:
            top = int(rng.integers(height - erase_height + 1))
            left = int(rng.integers(width - erase_width + 1))
            noise = rng.standard_normal((channels, erase_height, erase_width), dtype=np.float32)
            values[:, top : top + erase_height, left : left + erase_width] = noise
            return


class SegmentationTransform:
    """Random resize, crop, flip and photometric distortion of an image and its mask, and normalisation.

    Args:
        image_size: side S of the square crop, pixels. A smaller resized image is padded at the right and bottom with
            the mean colour and label 255.
        mean, std: of the student's normalisation, three numbers each, in 0..1.
        short_sides: the resized image's short side is drawn from these, keeping the aspect ratio.
        max_long_side: cap on the resized image's long side.
        max_class_fraction: a crop of which one class covers this much of the labelled pixels, or all of them, is drawn
            again, up to ten times.
        photometric: distort brightness, contrast, saturation and hue.
    """

    def __init__(
        self,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        short_sides: Sequence[int] = DEFAULT_SHORT_SIDES,
        max_long_side: int = 2048,
        max_class_fraction: float = 0.75,
        photometric: bool = True,
    ) -> None:
        self.image_size = image_size
        self.short_sides = tuple(short_sides)
        self.max_long_side = max_long_side
        self.max_class_fraction = max_class_fraction
        self.photometric = photometric
        self._normalise = _Normalise(mean, std)

    def __call__(self, image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray) -> dict[str, torch.Tensor]:
        """Return ``{"pixel_values": float32 3×S×S, "labels": int64 S×S}`` for an image and its mask H×W."""
        short_side = self.short_sides[int(rng.integers(len(self.short_sides)))]
        resized = resized_size(image.size, short_side, self.max_long_side)
        left, top, crop_label = self._crop(label, resized, rng)
        crop_height, crop_width = crop_label.shape
        # Only the crop is resampled, straight from the source: equal to resizing everything and cutting.
        x_ratio, y_ratio = image.width / resized[0], image.height / resized[1]
        box = (
            left * x_ratio,
            top * y_ratio,
            min((left + crop_width) * x_ratio, image.width),
            min((top + crop_height) * y_ratio, image.height),
        )
        image = image.resize((crop_width, crop_height), PIL.Image.Resampling.BILINEAR, box=box)
        flip = rng.random() < 0.5
        if self.photometric:
            image = photometric_distortion(image, rng)
        pixels = np.asarray(image)
        if flip:
            pixels, crop_label = pixels[:, ::-1], crop_label[:, ::-1]
        size = self.image_size
        if (crop_height, crop_width) == (size, size):
            return {
                "pixel_values": torch.from_numpy(self._normalise(pixels)),
                "labels": torch.from_numpy(crop_label.astype(np.int64)),
            }
        values = np.zeros((3, size, size), dtype=np.float32)  # the mean colour, once normalised
        self._normalise.into(values[:, :crop_height, :crop_width], pixels)
        labels = np.full((size, size), IGNORE_INDEX, dtype=np.int64)
        labels[:crop_height, :crop_width] = crop_label
        return {"pixel_values": torch.from_numpy(values), "labels": torch.from_numpy(labels)}

    def _crop(
        self, label: np.ndarray, resized: tuple[int, int], rng: np.random.Generator
    ) -> tuple[int, int, np.ndarray]:
        """Draw the crop's left and top in the resized image; return them with the crop of the resized mask."""
        width, height = min(self.image_size, resized[0]), min(self.image_size, resized[1])
        for _ in range(_CROP_TRIES + 1):
            left = int(rng.integers(resized[0] - width + 1))
            top = int(rng.integers(resized[1] - height + 1))
            rows = _nearest(top, height, resized[1], label.shape[0])
            columns = _nearest(left, width, resized[0], label.shape[1])
            crop = label.take(rows, axis=0).take(columns, axis=1)
            if self.max_class_fraction >= 1:
                break
            counts = np.bincount(crop.ravel(), minlength=IGNORE_INDEX + 1)[:IGNORE_INDEX]
            largest, labelled = counts.max(), counts.sum()
            if largest < labelled and largest < self.max_class_fraction * labelled:
                break
            if (width, height) == resized:
                break  # there is no other crop
        return left, top, crop


def _nearest(start: int, count: int, resized: int, source: int) -> np.ndarray:
    """Source indices of ``count`` nearest-neighbour samples from ``start`` along a side resized from ``source``."""
    positions = (np.arange(start, start + count) + 0.5) * (source / resized)
    return np.minimum(positions.astype(np.intp), source - 1)


def resized_size(size: tuple[int, int], short_side: int, max_long_side: int) -> tuple[int, int]:
    """Return (width, height) with the given short side and the same aspect ratio, the long side capped."""
    width, height = size
    scale = min(short_side / min(size), max_long_side / max(size))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


def photometric_distortion(image: PIL.Image.Image, rng: np.random.Generator) -> PIL.Image.Image:
    """Distort brightness (±32), contrast, saturation (×0.5..1.5) and hue (±36°), each with probability one half.

    Contrast comes before or after the colour changes, with equal probability (the order of SSD, arXiv 1512.02325).
    Values are clipped to 0..255 after each step.
    """
    values = np.arange(256, dtype=np.float32)
    if rng.random() < 0.5:
        values = np.clip(values + np.float32(rng.uniform(-_BRIGHTNESS, _BRIGHTNESS)), 0, 255).astype(np.uint8)
    contrast_first = rng.random() < 0.5
    contrast = rng.uniform(*_FACTOR) if rng.random() < 0.5 else None
    if contrast is not None and contrast_first:
        values = _scaled(values, contrast)
    if values.dtype == np.uint8:
        image = image.point(values.tolist() * 3)
    saturation = rng.uniform(*_FACTOR) if rng.random() < 0.5 else None
    hue = int(rng.integers(-_HUE, _HUE)) if rng.random() < 0.5 else 0
    if saturation is not None or hue:
        steps = np.arange(256)
        hue_table = (steps + round(hue * 256 / _HUE_CIRCLE)) % 256
        saturation_table = steps if saturation is None else _scaled(steps, saturation)
        tables = [*hue_table.tolist(), *saturation_table.tolist(), *steps.tolist()]
        image = image.convert("HSV").point(tables).convert("RGB")
    if contrast is not None and not contrast_first:
        image = image.point(_scaled(np.arange(256), contrast).tolist() * 3)
    return image


def _scaled(values: np.ndarray, factor: float) -> np.ndarray:
    return np.clip(values.astype(np.float32) * np.float32(factor), 0, 255).astype(np.uint8)


class EvaluationTransform:
    """Resize (bilinear) and normalise an image for testing.

    Args:
        mean, std: of the model's normalisation, three numbers each, in 0..1.
        size: (width, height) in pixels to stretch to; ``None`` keeps the image's own size.
        keep_ratio: keep the aspect ratio: the long side at most the longer, the short side at most the shorter of
            ``size`` (an upright image may therefore be taller than ``size``).
    """

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        size: tuple[int, int] | None = None,
        keep_ratio: bool = False,
    ) -> None:
        self.size = None if size is None else (int(size[0]), int(size[1]))
        self.keep_ratio = keep_ratio
        self._normalise = _Normalise(mean, std)

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        """Return float32 3×H×W."""
        size = self.size
        if size is not None and self.keep_ratio:
            size = resized_size(image.size, min(size), max(size))
        if size is not None and size != image.size:
            image = image.resize(size, PIL.Image.Resampling.BILINEAR)
        return torch.from_numpy(self._normalise(np.asarray(image)))
