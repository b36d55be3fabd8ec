"""Fixed views: augmentations of an image that come back, and what tells one view from every other.

An augmentation that is drawn anew in each pass is never seen twice. A fixed one is a function of the seed, the image
and the view's number alone, so whatever is computed from it can be kept: the teacher's tokens, for instance.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch

from gkd_hf.data.transforms import Erasing

KEY_BYTES = 16


def view_generator(seed: int, image: bytes, view: int) -> np.random.Generator:
    """Return the generator that a view's augmentation draws from, wherever in a run, or in which, it is seen.

    Args:
        seed: of the run, ≥ 0.
        image: the encoded image. An image that is stored twice has the same views twice.
        view: number of the view, ≥ 0.
    """
    words = np.frombuffer(hashlib.sha256(image).digest()[:KEY_BYTES], dtype="<u4")
    return np.random.default_rng([seed, *words.tolist(), view])


def view_keys(pixel_values: torch.Tensor, erasing: Sequence[Erasing | None], grid: tuple[int, int]) -> list[bytes]:
    """Return a key of 16 bytes for each image of a batch: a digest of all that a model is shown of it.

    Two keys are equal if pixels, shape, type of number, erased rectangle with its noise, and grid are; another image,
    view, seed, size, or a library that decodes or resizes otherwise, makes another key.

    Args:
        pixel_values: B×3×H×W, as they leave the loader.
        erasing: of each image; empty where nothing is erased on the device.
        grid: (h, w) that the tokens are wanted on.
    """
    shown = f"{tuple(pixel_values.shape[1:])} {pixel_values.dtype} {tuple(grid)}"
    keys = []
    for number, pixels in enumerate(pixel_values):
        erased = erasing[number] if erasing else None
        digest = hashlib.sha256(f"{shown} {erased}".encode())
        digest.update(np.ascontiguousarray(pixels.contiguous().view(torch.uint8).numpy()))
        keys.append(digest.digest()[:KEY_BYTES])
    return keys
