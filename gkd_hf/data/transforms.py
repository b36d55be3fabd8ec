"""Augmentations for distillation and for segmentation, and the plain transform for evaluation.

PIL in, torch out. Image and mask always go through the same geometry, and every random number comes from the given
``numpy.random.Generator``. Recipes of GKD (arXiv 2603.02554): random resized crop, flip, RandAugment and random
erasing (arXiv 1708.04896) without labels; resize, crop, flip and photometric distortion with labels.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch

from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.photometric import photometric_distortion
from gkd_hf.data.rand_augment import RandAugment
from gkd_hf.data.resampling import channels_first, mirrored, nearest, pixel_view, resample

DEFAULT_SHORT_SIDES = tuple(int(512 * (0.5 + 0.1 * step)) for step in range(16))
"""256, 307, …, 1024: half to twice the crop of 512, in steps of a tenth."""

_CROP_TRIES = 10
_ERASE_AREA = (0.02, 1 / 3)
_ERASE_RATIO = (0.3, 3.3)
_SAMPLING = 8
_COUNTED_WHOLE = 2**14  # pixels of a mask
_ROUNDING = 1e-6


@dataclass(frozen=True)
class Crop:
    """What a transform has drawn: where the crop lies in the image, and its mask.

    Attributes:
        box: left, top, right, bottom in pixels of the image.
        size: (width, height) that the crop is resized to.
        label: the crop's train ids, uint8 height×width; None without labels.
    """

    box: tuple[float, float, float, float]
    size: tuple[int, int]
    label: np.ndarray | None = None


@functools.lru_cache
def _kept(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Keep three numbers on a device, 3×1×1: to bring them there with every batch waits for what it computes."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


class _Normalising:
    """uint8 …×3×H×W → float32: (x / 255 - mean) / std."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        mean_, std_ = (np.asarray(values, dtype=np.float64).reshape(3, 1, 1) for values in (mean, std))
        self._scale = tuple((1.0 / (255.0 * std_)).astype(np.float32).ravel().tolist())
        self._shift = tuple((-mean_ / std_).astype(np.float32).ravel().tolist())

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return uint8 …×3×H×W as float32, (x / 255 - mean) / std, on the pixels' device."""
        values = pixels.to(torch.float32)  # the one large allocation: on a CPU, its page faults are half of the cost
        return values.mul_(_kept(self._scale, pixels.device)).add_(_kept(self._shift, pixels.device))


class DistillationTransform(_Normalising):
    """Random resized crop (bicubic), horizontal flip, RandAugment, normalisation, random erasing.

    A call does the first three and draws what is to be erased; `normalise` does the others, for a batch and on its
    device: on the way there, bytes are a quarter of the work.

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
        super().__init__(mean, std)
        fill = tuple(min(255, round(255 * value)) for value in mean)
        self._rand_augment = RandAugment(fill=fill) if rand_augment else None

    def __call__(
        self, image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray | None = None
    ) -> dict[str, Any]:
        """Return ``{"pixel_values": uint8 3×S×S, "erasing": an Erasing or None}``; a label is not used."""
        crop = self.draw(image.size, rng)
        return self.finish(image, crop.box, crop, rng)

    def draw(self, size: tuple[int, int], rng: np.random.Generator, label: np.ndarray | None = None) -> Crop:
        """Draw the crop of an image of ``size`` = (width, height); a label is not used."""
        box = random_resized_crop_box(size, self.crop_scale, self.crop_ratio, rng)
        return Crop(box, (self.image_size, self.image_size))

    def finish(
        self, image: PIL.Image.Image, box: tuple[float, float, float, float], crop: Crop, rng: np.random.Generator
    ) -> dict[str, Any]:
        """Do as a call does after `draw`: ``box`` in pixels of ``image``, which may be a shrunk or partial one."""
        pixels = resample(image, box, crop.size, "bicubic")
        flip = rng.random() < 0.5
        if self._rand_augment is not None:
            small = PIL.Image.frombytes("RGB", crop.size, pixels, "raw", "RGBX", 0, 1)
            if flip:
                small, flip = small.transpose(PIL.Image.Transpose.FLIP_LEFT_RIGHT), False
            pixels = pixel_view(self._rand_augment(small, rng))
        values = channels_first(pixels, flip=flip)
        erasing = draw_erasing(crop.size, rng) if rng.random() < self.erase_probability else None
        return {"pixel_values": torch.from_numpy(values), "erasing": erasing}

    def normalise(self, pixels: torch.Tensor, erasing: Sequence[Erasing | None] = ()) -> torch.Tensor:
        """Return uint8 B×3×S×S as float32, (x / 255 - mean) / std with ``erasing`` filled, on the pixels' device.

        ``erasing`` has an entry for each image, or none at all. The noise of an image follows from its entry alone,
        but differs between kinds of devices.
        """
        values = super().normalise(pixels)
        for image, part in zip(values, erasing, strict=False):
            if part is not None:
                part.fill(image)
        return values


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


@dataclass(frozen=True)
class Erasing:
    """A rectangle of an image, pixels, that is to become noise, and the noise's seed."""

    left: int
    top: int
    width: int
    height: int
    seed: int

    def fill(self, values: torch.Tensor) -> None:
        """Fill the rectangle of a normalised 3×H×W image with N(0, 1) noise per pixel and channel, in place."""
        generator = torch.Generator(values.device).manual_seed(self.seed)
        part = values[:, self.top : self.top + self.height, self.left : self.left + self.width]
        part.copy_(torch.randn(part.shape, generator=generator, device=values.device))


def draw_erasing(size: tuple[int, int], rng: np.random.Generator) -> Erasing | None:
    """Draw a rectangle smaller than ``size`` = (width, height), 2 % to a third of it; None after ten misses."""
    width, height = size
    log_ratio = math.log(_ERASE_RATIO[0]), math.log(_ERASE_RATIO[1])
    for _ in range(_CROP_TRIES):
        area = height * width * rng.uniform(*_ERASE_AREA)
        aspect = math.exp(rng.uniform(*log_ratio))
        erase_height, erase_width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < erase_height < height and 0 < erase_width < width:
            top = int(rng.integers(height - erase_height + 1))
            left = int(rng.integers(width - erase_width + 1))
            return Erasing(left, top, erase_width, erase_height, int(rng.integers(2**63)))
    return None


class SegmentationTransform(_Normalising):
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
        super().__init__(mean, std)
        self._fill = np.array([min(255, max(0, round(255 * value))) for value in mean], dtype=np.uint8)

    def __call__(self, image: PIL.Image.Image, rng: np.random.Generator, label: np.ndarray) -> dict[str, torch.Tensor]:
        """Return ``{"pixel_values": uint8 3×S×S, "labels": uint8 S×S}`` for an image and its mask uint8 H×W.

        Where the resized image is smaller than the crop, the mean colour (to 8 bits) and 255 fill its right and
        bottom. `normalise` makes floats of the pixels: on the way to it, bytes are a quarter of the work.
        """
        crop = self.draw(image.size, rng, label)
        return self.finish(image, crop.box, crop, rng)

    def draw(self, size: tuple[int, int], rng: np.random.Generator, label: np.ndarray) -> Crop:
        """Draw resize and crop of an image of ``size`` = (width, height) with its mask.

        The crop's corner is drawn among the image's own pixels: those of the resized image lie between them.
        """
        short_side = self.short_sides[int(rng.integers(len(self.short_sides)))]
        resized = resized_size(size, short_side, self.max_long_side)
        width, height = min(self.image_size, resized[0]), min(self.image_size, resized[1])
        box_width, box_height = width * size[0] / resized[0], height * size[1] / resized[1]
        for _ in range(_CROP_TRIES + 1):
            left = int(rng.integers(int(size[0] - box_width + _ROUNDING) + 1))
            top = int(rng.integers(int(size[1] - box_height + _ROUNDING) + 1))
            box = (left, top, left + box_width, top + box_height)
            crop = Crop(box, (width, height), nearest(label, box, (width, height)))
            if (width, height) == resized or self.max_class_fraction >= 1:
                break
            if not one_class_prevails(crop.label, self.max_class_fraction):
                break
        return crop

    def finish(
        self, image: PIL.Image.Image, box: tuple[float, float, float, float], crop: Crop, rng: np.random.Generator
    ) -> dict[str, torch.Tensor]:
        """Do as a call does after `draw`: ``box`` in pixels of ``image``, which may be a shrunk or partial one."""
        pixels = resample(image, box, crop.size, "bilinear")
        flip = rng.random() < 0.5
        values = channels_first(pixels, flip=flip)
        if self.photometric:
            photometric_distortion(values, rng)
        label = mirrored(crop.label) if flip else crop.label
        height, width = label.shape
        size = self.image_size
        if (height, width) != (size, size):
            padded = np.full((size, size), IGNORE_INDEX, dtype=np.uint8)
            padded[:height, :width] = label
            whole = np.empty((3, size, size), dtype=np.uint8)
            whole[...] = self._fill[:, None, None]
            whole[:, :height, :width] = values
            label, values = padded, whole
        return {"pixel_values": torch.from_numpy(values), "labels": torch.from_numpy(label)}


def one_class_prevails(label: np.ndarray, fraction: float) -> bool:
    """Whether one class covers ``fraction`` of the labelled pixels of a mask (uint8 H×W), or all of them.

    Every class is counted in a mask of less than 128×128 pixels; in a larger one only those that have half of
    ``fraction`` in every eighth pixel of every eighth row.
    """
    sample = label
    if label.size >= _COUNTED_WHOLE:
        sample = label[_SAMPLING // 2 :: _SAMPLING, _SAMPLING // 2 :: _SAMPLING]
    counts = np.bincount(sample.ravel(), minlength=256)[:IGNORE_INDEX]
    if not counts.any() and sample is not label:  # so few labelled pixels that the sample missed them
        counts = np.bincount(label.ravel(), minlength=256)[:IGNORE_INDEX]
    candidates = np.flatnonzero(counts >= max(1, fraction / 2 * counts.sum()))
    if counts.sum() and not len(candidates):
        return False
    labelled = label.size - np.count_nonzero(label == IGNORE_INDEX)
    largest = max((np.count_nonzero(label == value) for value in candidates), default=0)
    return largest == labelled or largest >= fraction * labelled


def resized_size(size: tuple[int, int], short_side: int, max_long_side: int) -> tuple[int, int]:
    """Return (width, height) with the given short side and the same aspect ratio, the long side capped."""
    width, height = size
    scale = min(short_side / min(size), max_long_side / max(size))
    return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))


class EvaluationTransform(_Normalising):
    """Resize (bilinear) and normalise an image for testing.

    A call does the first; `normalise` does the second, for a batch and on its device.

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
        super().__init__(mean, std)

    def __call__(self, image: PIL.Image.Image) -> torch.Tensor:
        """Return the resized image, uint8 3×H×W."""
        size = self.size
        if size is not None and self.keep_ratio:
            size = resized_size(image.size, min(size), max(size))
        if size is not None and size != image.size:
            image = image.resize(size, PIL.Image.Resampling.BILINEAR)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())
