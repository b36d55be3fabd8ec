"""GTAV, "Playing for Data" (Richter et al., ECCV 2016): numbered PNGs, labels as palette images of Cityscapes ids."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import scipy.io

from gkd_hf.data.raw_layouts.base import (
    RawLayout,
    RawSample,
    ids_of_colours,
    is_colour_coded,
    named,
    rgb_image,
    stored_ids,
)
from gkd_hf.errors import InputError

_SPLIT_KEYS = {"train": "trainIds", "validation": "valIds", "test": "testIds"}

# Cityscapes' official colours. Where two ids share one, the id with a train id counts: pole and pole group, car and
# licence plate. All of black is ignored, whatever its id.
_COLOURS = {
    (0, 0, 0): 0, (111, 74, 0): 5, (81, 0, 81): 6, (128, 64, 128): 7, (244, 35, 232): 8, (250, 170, 160): 9,
    (230, 150, 140): 10, (70, 70, 70): 11, (102, 102, 156): 12, (190, 153, 153): 13, (180, 165, 180): 14,
    (150, 100, 100): 15, (150, 120, 90): 16, (153, 153, 153): 17, (250, 170, 30): 19, (220, 220, 0): 20,
    (107, 142, 35): 21, (152, 251, 152): 22, (70, 130, 180): 23, (220, 20, 60): 24, (255, 0, 0): 25,
    (0, 0, 142): 26, (0, 0, 70): 27, (0, 60, 100): 28, (0, 0, 90): 29, (0, 0, 110): 30, (0, 80, 100): 31,
    (0, 0, 230): 32, (119, 11, 32): 33,
}  # fmt: skip


class GTAV(RawLayout):
    """24,966 rendered frames; ``split.mat`` says which of them train. Without it every frame is a training image."""

    domain = "gtav"
    domain_label_map = "gtav"
    splits = ("train", "validation", "test")
    description = (
        "  images/NNNNN.png\n"
        "  labels/NNNNN.png   palette images whose indices are Cityscapes' label ids, or RGB in Cityscapes' colours\n"
        "  split.mat          the published train, validation and test lists; without it all images are 'train'"
    )

    def splits_in(self, root: Path) -> tuple[str, ...]:
        return self.splits if (root / "split.mat").is_file() else ("train",)

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        everything = self.pair(
            self.collect(self.folder(root, "images"), [".png"]), self.collect(self.folder(root, "labels"), [".png"])
        )
        lists = root / "split.mat"
        if not lists.is_file():
            if split != "train":
                raise InputError(
                    f"gtav: without {lists} all images are 'train' and there is no '{split}'; download split.mat"
                )
            return everything
        wanted = _listed(lists, split)
        missing = sorted(wanted - {sample.id for sample in everything})
        if missing:
            raise InputError(
                f"gtav: {len(missing)} of {len(wanted)} images that {lists} lists for '{split}' are not in "
                f"{root / 'images'}: {named(missing)}; download the missing parts, or move split.mat away to use all "
                "that is there as 'train'"
            )
        return [sample for sample in everything if sample.id in wanted]

    def read_stored(self, sample: RawSample) -> np.ndarray:
        path = self.label_of(sample)
        if is_colour_coded(path):
            return ids_of_colours(np.asarray(rgb_image(path, "label")), _COLOURS, str(path))
        return stored_ids(path)


def _listed(lists: Path, split: str) -> set[str]:
    try:
        numbers = scipy.io.loadmat(lists)[_SPLIT_KEYS[split]]
    except KeyError as error:
        raise InputError(f"{lists} has no list {error}; use the split.mat published with GTAV") from error
    except Exception as error:  # what loadmat raises on damaged files is not documented
        raise InputError(f"{lists} is not a readable MATLAB file ({error}); download it again") from error
    return {f"{int(number):05d}" for number in np.ravel(numbers)}
