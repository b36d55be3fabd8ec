"""SYNTHIA-RAND-CITYSCAPES (Ros et al., CVPR 2016): classes and instances in the channels of a 16-bit PNG."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import PIL.Image

from gkd_hf.data.raw_layouts.base import BadSample, RawLayout, RawSample, file_bytes, stored_ids


class Synthia(RawLayout):
    """9,400 rendered frames, all of them for training."""

    domain = "synthia"
    domain_label_map = "synthia"
    splits = ("train",)
    description = (
        "  RGB/NNNNNNN.png\n"
        "  GT/LABELS/NNNNNNN.png   16 bits a channel: the first channel is the class id, the second the instance"
    )

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        return self.pair(
            self.collect(self.folder(root, "RGB", "RAND_CITYSCAPES/RGB"), [".png"]),
            self.collect(self.folder(root, "GT/LABELS", "RAND_CITYSCAPES/GT/LABELS"), [".png"]),
        )

    def read_stored(self, sample: RawSample) -> np.ndarray:
        return _class_channel(self.label_of(sample))


def _class_channel(path: Path) -> np.ndarray:
    """Return the first channel of a 16-bit PNG, H×W uint16."""
    data = file_bytes(path)
    try:
        high, low = (_eight_bits(data, raw_mode) for raw_mode in ("RGB;16B", "RGB;16L"))
    except _NotThreeChannels as error:
        stored = stored_ids(path)  # says so itself if these are colours of 8 bits
        if stored.dtype == np.uint8:
            raise BadSample(
                f"{path} has {error} in place of 16-bit channels; use GT/LABELS as distributed, not GT/COLOR",
                f"label: no 16-bit channels ({error})",
            ) from error
        return stored
    except Exception as error:  # Pillow's plug-ins raise many kinds of exceptions on damaged bytes
        raise BadSample(
            f"{path} is not a readable PNG ({error}); download it again", "label: not a readable PNG"
        ) from error
    return high.astype(np.uint16) << 8 | low


class _NotThreeChannels(Exception):
    """The file is an image, but not one of three 16-bit channels."""


def _eight_bits(data: bytes, raw_mode: str) -> np.ndarray:
    """Return the upper (``RGB;16B``) or lower (``RGB;16L``) eight bits of the first channel.

    Pillow has no image of three 16-bit channels and keeps the first byte of each value, which in these files is
    always 0. Telling its decoder the other byte order makes it keep the second.
    """
    with PIL.Image.open(io.BytesIO(data)) as image:
        if image.format != "PNG" or [tile[3] for tile in image.tile] != ["RGB;16B"]:
            raise _NotThreeChannels(f"{image.mode} pixels")
        image.tile = [tile._replace(args=raw_mode) for tile in image.tile]
        return np.asarray(image)[..., 0]
