"""CamVid (Brostow, Fauqueur, Cipolla 2009): 701 frames by day and at dusk, 32 colours for 11 classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from gkd_hf.data.domains import IGNORE_INDEX
from gkd_hf.data.raw_layouts.base import RawLayout, RawSample, ids_of_colours, rgb_image
from gkd_hf.errors import InputError

# Name and colour of label_colors.txt → train id: the usual grouping of the 32 classes into 11.
_CLASSES = {
    "Sky": ((128, 128, 128), 0),
    "Archway": ((192, 0, 128), 1), "Bridge": ((0, 128, 64), 1), "Building": ((128, 0, 0), 1),
    "Tunnel": ((64, 0, 64), 1), "Wall": ((64, 192, 0), 1),
    "Column_Pole": ((192, 192, 128), 2), "TrafficCone": ((0, 0, 64), 2),
    "Road": ((128, 64, 128), 3), "LaneMkgsDriv": ((128, 0, 192), 3), "LaneMkgsNonDriv": ((192, 0, 64), 3),
    "Sidewalk": ((0, 0, 192), 4), "ParkingBlock": ((64, 192, 128), 4), "RoadShoulder": ((128, 128, 192), 4),
    "Tree": ((128, 128, 0), 5), "VegetationMisc": ((192, 192, 0), 5),
    "SignSymbol": ((192, 128, 128), 6), "Misc_Text": ((128, 128, 64), 6), "TrafficLight": ((0, 64, 64), 6),
    "Fence": ((64, 64, 128), 7),
    "Car": ((64, 0, 128), 8), "SUVPickupTruck": ((64, 128, 192), 8), "Truck_Bus": ((192, 128, 192), 8),
    "Train": ((192, 64, 128), 8), "OtherMoving": ((128, 64, 64), 8),
    "Pedestrian": ((64, 64, 0), 9), "Child": ((192, 128, 64), 9), "CartLuggagePram": ((64, 0, 192), 9),
    "Animal": ((64, 128, 64), 9),
    "Bicyclist": ((0, 128, 192), 10), "MotorcycleScooter": ((192, 0, 192), 10),
    "Void": ((0, 0, 0), IGNORE_INDEX),
}  # fmt: skip
_IDS = dict(_CLASSES.values())

# As distributed, this label has a few pixels in colours of no class; they are void here, and an error elsewhere.
_FAULTY = "Seq05VD_f02610"


def _validates(name: str) -> bool:
    sequence, _, frame = name.partition("_")
    return sequence == "0016E5" and frame.isdigit() and 7959 <= int(frame) <= 8159


# The split that has become usual: dusk is a sequence of its own, validation one stretch of another.
_DAY: dict[str, Callable[[str], bool]] = {
    "train": lambda name: name.startswith(("0006R0_", "0016E5_")) and not _validates(name),
    "validation": _validates,
    "test": lambda name: name.startswith("Seq05VD_"),
}
_DUSK: dict[str, Callable[[str], bool]] = {"test": lambda name: name.startswith("0001TP_")}


class CamVid(RawLayout):
    """The day or the dusk part of CamVid, by the sequences' names."""

    description = (
        "  701_StillsRaw_full/SEQUENCE_FRAME.png\n"
        "  LabeledApproved_full/SEQUENCE_FRAME_L.png   RGB in the 32 colours of label_colors.txt"
    )

    def __init__(self, domain: str) -> None:
        self.domain = domain
        self.splits = tuple(self._rules)

    @property
    def _rules(self) -> dict[str, Callable[[str], bool]]:
        return _DAY if self.domain == "camvid_day" else _DUSK

    def samples(self, root: Path, split: str) -> list[RawSample]:
        self.check_split(split)
        everything = self.pair(
            self.collect(self.folder(root, "701_StillsRaw_full"), [".png"]),
            self.collect(self.folder(root, "LabeledApproved_full"), ["_L.png"]),
        )
        samples = [sample for sample in everything if self._rules[split](sample.id)]
        if not samples:
            raise InputError(
                f"{self.domain}: none of the {len(everything)} frames in {root} belongs to '{split}'; "
                f"{self.expectation}"
            )
        return samples

    def read_stored(self, sample: RawSample) -> np.ndarray:
        path = self.label_of(sample)
        others = IGNORE_INDEX if sample.id == _FAULTY else None
        return ids_of_colours(np.asarray(rgb_image(path, "label")), _IDS, str(path), others=others)
